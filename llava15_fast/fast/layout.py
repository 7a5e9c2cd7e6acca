"""Where the rows of one forward of the text model belong: what a plan comes down to, the same for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake

from ..model.modeling import send


@dataclass(frozen=True)
class Padding:
    """An attention mask known to the host.

    Attributes:
        spans: per prompt its first token, and the end of its tokens.
        length: tokens that the mask is about; those behind it are no padding.
    """

    spans: tuple[tuple[int, int], ...]
    length: int

    @classmethod
    def read(cls, mask: Any) -> Padding | str:
        """One copy to the host; or why the mask is no left and right padding."""
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            return "the attention mask is not one flag per token"
        if torch.compiler.is_compiling() or mask.is_meta or is_fake(mask):
            return "the attention mask cannot be read"
        valid = mask.bool()
        count = valid.sum(-1)
        start = valid.int().argmax(-1)
        index = torch.arange(valid.shape[1], device=valid.device)
        one_run = (valid == ((index >= start[:, None]) & (index < (start + count)[:, None]))).all(-1)
        spans = torch.stack([start, count, one_run.long()], dim=1).tolist()
        if not all(whole for *_, whole in spans):
            return "the attention mask has holes"
        return cls(tuple((first, first + tokens) for first, tokens, _ in spans), valid.shape[1])

    def within(self, total: int) -> list[tuple[int, int]]:
        """The spans among the first `total` tokens."""
        length = self.length
        return [(min(start, total), total if end == length < total else min(end, total)) for start, end in self.spans]


@dataclass(frozen=True)
class TextLayout:
    """
    Attributes:
        position_ids: (1, T), of the rows.
        rows: (T,) indices of the tokens in the flattened (B, L); None when none is padding.
        slots: (1, T) rows of the flattened cache (B * capacity) that they are written to; None without a cache.
        segments: the varlen attention's cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, or None.
        total_k: rows that the segments of the keys cover.
        cache_seqlens, cache_leftpad: (B,) int32 for attention split over the cache, or None.
    """

    position_ids: torch.Tensor
    rows: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    segments: tuple[torch.Tensor, torch.Tensor, int, int] | None = None
    total_k: int = 0
    cache_seqlens: torch.Tensor | None = None
    cache_leftpad: torch.Tensor | None = None


class Spans:
    """Which of `length` new tokens behind `past` are padding, for a batch of prompts.

    Attributes:
        spans: of the tokens that are none, the past ones among them.
        starts, ends: of those among the new tokens, counted from the beginning.
        is_empty, is_full: whether all of the new ones are padding, or none.
    """

    def __init__(self, spans: Sequence[tuple[int, int]], past: int, length: int) -> None:
        self.spans, self.past, self.length = spans, past, length
        self.starts = [max(start, past) for start, _ in spans]
        self.ends = [max(end, past) for _, end in spans]
        self.is_empty = self.starts == self.ends
        self.is_full = all(start == past for start in self.starts) and all(end == past + length for end in self.ends)

    def indices(self, offset: int, shift: int, device: torch.device) -> torch.Tensor:
        """starts[b] : ends[b] of every prompt b, moved by b * offset - shift."""
        parts = [
            torch.arange(start + b * offset - shift, end + b * offset - shift, device="cpu")
            for b, (start, end) in enumerate(zip(self.starts, self.ends, strict=True))
        ]
        return send(torch.cat(parts), device)


def prompt_layout(tokens: Spans, position_ids: torch.Tensor, capacity: int | None) -> TextLayout:
    """For a prompt or the next part of one: varlen attention, without rows for padding.

    Args:
        position_ids: (1, B * L).
        capacity: of the KV buffers; None without a cache, and then there is no past.
    """
    device, batch = position_ids.device, len(tokens.spans)
    if capacity is None and tokens.is_full:
        length = tokens.length
        bounds = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
        return TextLayout(position_ids, segments=(bounds, bounds, length, length), total_k=batch * length)
    rows = None if tokens.is_full else tokens.indices(tokens.length, tokens.past, device)
    if rows is not None:
        position_ids = position_ids[:, rows]
    if capacity is None:
        lengths = [end - start for start, end in tokens.spans]
        return TextLayout(position_ids, rows, None, _segments(lengths, lengths, device), sum(lengths))
    # The cache's rows are cut into segments too: what lies between the prompts is nobody's, and no query sees it.
    lengths_q, lengths_k, covered = [], [], 0
    for b, (start, end) in enumerate(tokens.spans):
        first = b * capacity + start
        lengths_q += [0, tokens.ends[b] - tokens.starts[b]]
        lengths_k += [first - covered, end - start]
        covered = first + end - start
    slots = tokens.indices(capacity, 0, device)[None]
    return TextLayout(position_ids, rows, slots, _segments(lengths_q, lengths_k, device), covered)


def decode_numbers(starts: Sequence[int], past: int, length: int, capacity: int) -> torch.Tensor:
    """(3, B) or, for several tokens, a flat tensor of int32 on the host: slots, lengths, left padding; see `decode_layout`."""
    batch, total = len(starts), past + length
    slots = [b * capacity + token for b in range(batch) for token in range(past, total)]
    return torch.tensor([*slots, *[total] * batch, *starts], dtype=torch.int32, device="cpu")


def decode_layout(position_ids: torch.Tensor, numbers: torch.Tensor, batch: int) -> TextLayout:
    """For a few new tokens of every prompt: attention split over the cache. `position_ids` (1, B * L)."""
    slots, seqlens, leftpad = numbers.split([position_ids.shape[1], batch, batch])
    return TextLayout(position_ids, slots=slots[None], cache_seqlens=seqlens, cache_leftpad=leftpad)


def _segments(lengths_q: list[int], lengths_k: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Pairs of empty segments are left out."""
    pairs = [pair for pair in zip(lengths_q, lengths_k, strict=True) if pair != (0, 0)]
    rows = [[0, *accumulate(lengths)] for lengths in zip(*pairs, strict=True)]
    return (*send(torch.tensor(rows, dtype=torch.int32, device="cpu"), device), max(lengths_q), max(lengths_k))
