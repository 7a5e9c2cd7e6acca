"""How the rows of one forward of the text model map to tokens, cache slots and attention segments; the same for all layers."""

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
    """An attention mask, read to the host.

    Attributes:
        spans: per prompt, (start, end) of its non-padding tokens.
        length: of the mask; later tokens are not padding.
    """

    spans: tuple[tuple[int, int], ...]
    length: int

    @classmethod
    def read(cls, mask: Any) -> Padding | str:
        """Takes one device-to-host copy. Returns the reason for a fallback if the mask is not left and right padding."""
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            return "the attention mask is not one value per token"
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
        """The spans, clipped to the first `total` tokens."""
        length = self.length
        return [(min(start, total), total if end == length < total else min(end, total)) for start, end in self.spans]


@dataclass(frozen=True)
class TextLayout:
    """
    Attributes:
        position_ids: (1, T), of the rows.
        rows: (T,) indices of the tokens in the flattened (B, L); None without padding.
        slots: (1, T) slots of the flattened cache (B * capacity) to write to; None without a cache.
        segments: cu_seqlens_q, cu_seqlens_k, max_seqlen_q of varlen attention, or None.
        total_k: number of key rows that the segments cover.
        cache_seqlens, cache_leftpad: (B,) int32 for split-KV attention, or None.
    """

    position_ids: torch.Tensor
    rows: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    segments: tuple[torch.Tensor, torch.Tensor, int] | None = None
    total_k: int = 0
    cache_seqlens: torch.Tensor | None = None
    cache_leftpad: torch.Tensor | None = None


class Spans:
    """Which of `length` new tokens after `past` are padding, for a batch of prompts.

    Attributes:
        spans: (start, end) of the non-padding tokens, past ones included.
        starts, ends: the part of each span in the new tokens, in absolute positions.
        is_empty, is_full: whether all, or none, of the new tokens are padding.
    """

    def __init__(self, spans: Sequence[tuple[int, int]], past: int, length: int) -> None:
        self.spans, self.past, self.length = spans, past, length
        self.starts = [max(start, past) for start, _ in spans]
        self.ends = [max(end, past) for _, end in spans]
        self.is_empty = self.starts == self.ends
        self.is_full = all(start == past for start in self.starts) and all(end == past + length for end in self.ends)

    def indices(self, offset: int, shift: int, device: torch.device) -> torch.Tensor:
        """The concatenated ranges starts[b] : ends[b], each shifted by b * offset - shift."""
        parts = [
            torch.arange(start + b * offset - shift, end + b * offset - shift, device="cpu")
            for b, (start, end) in enumerate(zip(self.starts, self.ends, strict=True))
        ]
        return send(torch.cat(parts), device)


def prompt_layout(tokens: Spans, position_ids: torch.Tensor, capacity: int | None) -> TextLayout:
    """For prefill, or a chunk of it: varlen attention, without rows for padding.

    Args:
        position_ids: (1, B * L).
        capacity: of the KV buffers; None without a cache, in which case there is no past.
    """
    device, batch = position_ids.device, len(tokens.spans)
    if capacity is None and tokens.is_full:
        length = tokens.length
        bounds = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
        return TextLayout(position_ids, segments=(bounds, bounds, length), total_k=batch * length)
    rows = None if tokens.is_full else tokens.indices(tokens.length, tokens.past, device)
    if rows is not None:
        position_ids = position_ids[:, rows]
    if capacity is None:
        lengths = [end - start for start, end in tokens.spans]
        return TextLayout(position_ids, rows, None, _segments(lengths, lengths, device), sum(lengths))
    # Rows of the cache between two prompts form key segments without queries.
    lengths_q, lengths_k, covered = [], [], 0
    for b, (start, end) in enumerate(tokens.spans):
        first = b * capacity + start
        lengths_q += [0, tokens.ends[b] - tokens.starts[b]]
        lengths_k += [first - covered, end - start]
        covered = first + end - start
    slots = tokens.indices(capacity, 0, device)[None]
    return TextLayout(position_ids, rows, slots, _segments(lengths_q, lengths_k, device), covered)


def decode_numbers(starts: Sequence[int], past: int, length: int, capacity: int) -> torch.Tensor:
    """Slots, sequence lengths and left padding as one flat int32 tensor on the host; see `decode_layout`."""
    batch, total = len(starts), past + length
    slots = [b * capacity + token for b in range(batch) for token in range(past, total)]
    return torch.tensor([*slots, *[total] * batch, *starts], dtype=torch.int32, device="cpu")


def decode_layout(position_ids: torch.Tensor, numbers: torch.Tensor, batch: int) -> TextLayout:
    """For a few new tokens per prompt: split-KV attention. `position_ids` (1, B * L)."""
    slots, seqlens, leftpad = numbers.split([position_ids.shape[1], batch, batch])
    return TextLayout(position_ids, slots=slots[None], cache_seqlens=seqlens, cache_leftpad=leftpad)


def _segments(lengths_q: list[int], lengths_k: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Drops pairs of empty segments."""
    pairs = [pair for pair in zip(lengths_q, lengths_k, strict=True) if pair != (0, 0)]
    rows = [[0, *accumulate(lengths)] for lengths in zip(*pairs, strict=True)]
    return (*send(torch.tensor(rows, dtype=torch.int32, device="cpu"), device), max(lengths_q))
