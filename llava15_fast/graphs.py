"""The decode step as a CUDA graph: one launch for the whole text model instead of several hundred.

A graph remembers addresses: of the weights, of the cache's storages, of its inputs and outputs. So

- inputs are copied into buffers of the graph, and its output is copied out, for callers keep what they are given;
- a step is captured only when it comes for the second time with the same storages and weights, and replayed while both stay;
- when a cache dies, its storages stay with the graph and serve the next request of the same batch size.

A cache that grows, another batch size or new weights make another graph; `LIMIT` of them are kept.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache

from .kv_cache import PreallocatedLayer

logger = logging.getLogger("llava15_fast")

LIMIT = 2
"""Graphs that are kept; each holds the key/value storages of its batch."""

ALIGNMENT = 4
"""Rows of 32-bit integers begin at multiples of 16 bytes, so that the kernels that read them are not compiled twice."""


class CapturedStep:
    """`capture` records what a function launches, `replay` launches it again."""

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()

    def capture(self, step: Callable[[], torch.Tensor], pool: Any) -> torch.Tensor:
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            return step()

    def replay(self) -> None:
        self.graph.replay()


@dataclass
class StepInputs:
    """What changes from step to step, at fixed addresses.

    Attributes:
        embeds: (B, 1, width).
        position_ids: (1, B) int64.
        numbers: (3, B rounded up) int32: where keys and values go, tokens in the cache, padding on the left.
    """

    embeds: torch.Tensor
    position_ids: torch.Tensor
    numbers: torch.Tensor

    @classmethod
    def like(cls, embeds: torch.Tensor) -> StepInputs:
        batch, device = embeds.shape[0], embeds.device
        with torch.inference_mode(False):
            return cls(
                torch.empty_strided(embeds.shape, embeds.stride(), dtype=embeds.dtype, device=device),
                torch.zeros(1, batch, dtype=torch.int64, device=device),
                torch.zeros(3, -(-batch // ALIGNMENT) * ALIGNMENT, dtype=torch.int32, device=device),
            )

    def fill(self, embeds: torch.Tensor, position_ids: torch.Tensor, numbers: list[list[int]]) -> None:
        self.embeds.copy_(embeds)
        self.position_ids.copy_(position_ids)
        batch = embeds.shape[0]
        self.numbers[:, :batch].copy_(torch.tensor(numbers, dtype=torch.int32), non_blocking=True)

    @property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """slots (1, B), cache_seqlens (B,) and cache_leftpad (B,)."""
        slots, seqlens, leftpad = self.numbers[:, : self.embeds.shape[0]].unbind()
        return slots[None], seqlens, leftpad


@dataclass
class Entry:
    """One step: seen once, or captured.

    Attributes:
        key: addresses of storages and weights, and the backend.
        storages: keys and values of every layer; kept, for the graph writes to them.
        owner: the cache layer that uses the storages, if it still lives.
    """

    key: tuple
    storages: list[tuple[torch.Tensor, torch.Tensor]]
    owner: weakref.ref[PreallocatedLayer]
    inputs: StepInputs | None = None
    output: torch.Tensor | None = None
    step: CapturedStep | None = None
    failed: bool = False


@dataclass
class DecodeGraphs:
    """The graphs of one text model."""

    entries: list[Entry] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    pool: Any = None

    def __reduce__(self) -> tuple:
        """A copy or a pickle of the model captures its own."""
        return DecodeGraphs, ()

    @staticmethod
    def can_capture(device: torch.device) -> bool:
        return device.type == "cuda" and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()

    def run(
        self,
        key: tuple,
        cache: Cache,
        embeds: torch.Tensor,
        position_ids: torch.Tensor,
        numbers: list[list[int]],
        step: Callable[[StepInputs], torch.Tensor],
    ) -> torch.Tensor | None:
        """The output of `step` on these inputs by a graph, a tensor of its own; or None where it is to run without.

        Args:
            key: what must be as it was, next to the storages, for a graph to be valid.
            numbers: see `StepInputs`; each of B integers.
        """
        with self.lock:
            storages = [layer.storages for layer in cache.layers]
            key = (*key, *(side.data_ptr() for pair in storages for side in pair))
            entry = next((entry for entry in self.entries if entry.key == key), None)
            if entry is None:
                self.entries = [*filter(_is_useful, self.entries), Entry(key, storages, weakref.ref(cache.layers[0]))][-LIMIT:]
                return None
            if entry.failed:
                return None
            # The most recently used is the last to go.
            self.entries.sort(key=lambda other: other is entry)
            if entry.step is None and not self._capture(entry, embeds, position_ids, numbers, step):
                return None
            entry.inputs.fill(embeds, position_ids, numbers)
            entry.step.replay()
            return entry.output.clone()

    def _capture(self, entry: Entry, embeds: torch.Tensor, position_ids: Any, numbers: Any, step: Callable) -> bool:
        inputs = StepInputs.like(embeds)
        inputs.fill(embeds, position_ids, numbers)
        try:
            captured = CapturedStep()
            if self.pool is None and embeds.is_cuda:
                self.pool = torch.cuda.graph_pool_handle()
            # What is captured may be replayed in and out of inference mode.
            with torch.inference_mode(False), torch.no_grad():
                entry.output = captured.capture(lambda: step(inputs), self.pool)
        except torch.OutOfMemoryError:
            entry.failed = True
            logger.warning("no memory to capture the decode step in a CUDA graph: it runs without one")
            return False
        entry.inputs, entry.step = inputs, captured
        return True

    def lend(self, cache: Cache, batch: int, tokens: int, like: torch.Tensor) -> None:
        """Gives an empty cache the storages of one that is gone, if they are of the right size and as `like`."""
        with self.lock:
            for entry in self.entries:
                keys = entry.storages[0][0]
                fits = keys.shape[0] == batch and tokens <= keys.shape[1]
                if fits and entry.owner() is None and (keys.dtype, keys.device) == (like.dtype, like.device):
                    for layer, storages in zip(cache.layers, entry.storages, strict=True):
                        layer.storages = tuple(side.zero_() for side in storages)
                    for other in self.entries:
                        if other.storages[0][0] is keys:
                            other.owner = weakref.ref(cache.layers[0])
                    return

    def clear(self) -> None:
        """Frees the graphs and the storages that only they hold."""
        with self.lock:
            self.entries.clear()
            self.pool = None


def _is_useful(entry: Entry) -> bool:
    """Whether a step can come again: its cache is gone and left its storages, or still uses them."""
    owner = entry.owner()
    return owner is None or (owner.is_initialized and owner.storages[0] is entry.storages[0][0])
