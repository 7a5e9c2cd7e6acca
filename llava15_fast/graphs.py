"""CUDA graphs: one launch for a whole forward pass instead of several hundred.

A graph remembers addresses: of weights, of storages that it writes to, of its inputs and outputs. So

- inputs are copied into buffers of the graph, and its output is copied out, for callers keep what they are given;
- a step is captured only when it has come before with the same `key`, and replayed as long as that comes;
- the key holds every address that must not have changed.

`DecodeGraphs` is for decoding: its graphs write to the storages of a cache. When that cache dies, the storages stay with the
graph and serve the next request of the same batch size.

Graphs of one model replay on one stream at a time. Settings of torch's own arithmetic, TF32 say, are those of the capture.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers.cache_utils import Cache

from .kv_cache import PreallocatedLayer

logger = logging.getLogger("llava15_fast")

GRAPHS = "_llava15_graphs"
"""The attribute of a module that holds its graphs."""

SEEN_KEYS = 64
"""Steps that are remembered while they wait for being captured."""

T = TypeVar("T")
Step = Callable[..., torch.Tensor]
Storages = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of every layer, each (B, capacity, kv_heads, head_dim)."""


_capturing = threading.Lock()
"""A stream captures one graph at a time, and so, in torch 2.11, does a random generator."""

_living: weakref.WeakSet[Graphs] = weakref.WeakSet()


class CapturedStep:
    """`capture` records what a function launches on a device, `replay` launches it again.

    `torch.cuda.graph` is not for this: it captures on one stream for all devices, so that nothing of a model on another than
    the first would be recorded, and an error leaves the caller on that stream.

    Args:
        stream: to capture on. Graphs that share one have to share a pool: torch gives matrix products a workspace for each
            stream, takes it from the pool that is captured into first, and frees it with any graph of that stream
            (pytorch#193402), while the others still write to it.
    """

    new_pool = staticmethod(torch.cuda.graph_pool_handle)
    new_stream = staticmethod(torch.cuda.Stream)

    def __init__(self, device: torch.device, stream: Any) -> None:
        self.device, self.stream = device, stream
        self.graph = torch.cuda.CUDAGraph()

    def capture(self, step: Callable[[], torch.Tensor], pool: Any) -> torch.Tensor:
        with _capturing, without_collection(), torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            try:
                self.graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                output = step()
            except BaseException:
                # Ends with an error of its own, where the first one has spoilt the capture.
                with contextlib.suppress(RuntimeError):
                    self.graph.capture_end()
                _after_failure(self.device, pool)
                raise
            try:
                self.graph.capture_end()
            except RuntimeError:
                _after_failure(self.device, pool)
                raise
            return output

    def replay(self) -> None:
        self.graph.replay()

    def wait(self) -> None:
        """Until no replay runs any more: memory that can be unmapped is taken away from one that does."""
        torch.cuda.synchronize(self.device)


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """What Python collects may unload a module of kernels, which no capture survives."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _after_failure(device: torch.device, pool: Any) -> None:
    """A capture that could not be ended leaves the allocator recording and, in torch 2.11, the random generator: nothing
    random would run any more. Another one, that can be ended, puts that right."""
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)
    with contextlib.suppress(RuntimeError):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device=device)
        graph.capture_end()


def with_room(run: Callable[[], T]) -> T:
    """`run()`; where memory runs out, once more without what the graphs of all models hold: they only save time."""
    if torch.compiler.is_compiling():
        return run()
    try:
        return run()
    except torch.OutOfMemoryError:
        if not any([graphs.clear() for graphs in list(_living)]):
            raise
    logger.warning("no memory: CUDA graphs were given up for it")
    return run()


@dataclass
class Entry:
    """One step: seen once, or captured.

    Attributes:
        key: what must be as it was.
        inputs: buffers at fixed addresses.
        storages: what the graph writes to besides its output; kept alive.
        owners: the layers of the cache that uses the storages, as far as they still live.
    """

    key: tuple
    inputs: tuple[torch.Tensor, ...] = ()
    output: torch.Tensor | None = None
    step: CapturedStep | None = None
    failed: bool = False
    storages: Storages | None = None
    owners: tuple[weakref.ref[PreallocatedLayer], ...] = ()

    @property
    def is_abandoned(self) -> bool:
        """Whether the cache is gone, and nobody has kept a layer of it."""
        return all(owner() is None for owner in self.owners)


class Graphs:
    """The last few graphs of one module.

    Args:
        limit: how many are kept; the one that was not used for longest goes.
        patience: how often a step runs launch by launch before it is captured. A capture has to be paid back by replays.
    """

    def __init__(self, limit: int, patience: int = 1) -> None:
        self.limit, self.patience = limit, patience
        self.entries: list[Entry] = []
        self.seen: dict[tuple, int] = {}
        self.lock = threading.RLock()
        self.pool: Any = None
        self.streams: dict[torch.device, Any] = {}
        self.gave_up = False
        _living.add(self)

    def __reduce__(self) -> tuple:
        """A copy or a pickle of the model captures its own."""
        return type(self), (self.limit, self.patience)

    @staticmethod
    def can_capture(device: torch.device) -> bool:
        return device.type == "cuda" and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()

    def run(self, key: tuple, inputs: tuple[torch.Tensor, ...], step: Step, device: torch.device) -> torch.Tensor | None:
        """`step(*inputs)` by a graph, a tensor of its own; None where it is to run without.

        Args:
            inputs: tensors of the shapes and dtypes that the key stands for; on the host or on `device`.
            step: is given buffers on `device` in their place.
        """
        with self.lock:
            entry = self.find(key)
            if entry is None:
                times = self.seen.pop(key, 0)
                if times < self.patience:
                    self.seen = dict([*self.seen.items(), (key, times + 1)][-SEEN_KEYS:])
                    return None
                entry = Entry(key)
                self.add(entry)
            return self.replay(entry, inputs, step, device)

    def find(self, key: tuple) -> Entry | None:
        return next((entry for entry in self.entries if entry.key == key), None)

    def add(self, entry: Entry) -> None:
        self.entries = [*self.entries, entry][-self.limit :]

    def replay(self, entry: Entry, inputs: tuple[torch.Tensor, ...], step: Step, device: torch.device) -> torch.Tensor | None:
        if entry.failed or self.gave_up:
            return None
        # The most recently used is the last to go.
        self.entries.sort(key=lambda other: other is entry)
        if entry.step is None and not self._capture(entry, inputs, step, device):
            return None
        _fill(entry.inputs, inputs)
        entry.step.replay()
        return entry.output.clone()

    def _capture(self, entry: Entry, inputs: tuple[torch.Tensor, ...], step: Step, device: torch.device) -> bool:
        try:
            # What is captured may be replayed in and out of inference mode.
            with torch.inference_mode(False), torch.no_grad():
                buffers = tuple(torch.empty(x.shape, dtype=x.dtype, device=device) for x in inputs)
                _fill(buffers, inputs)
                # Nothing may be compiled or set up while capturing; and a step can be repeated.
                step(*buffers)
                captured, entry.output = self._captured(lambda: step(*buffers), device)
        except torch.OutOfMemoryError:
            entry.failed = True
            logger.warning("no memory to capture a CUDA graph: the step runs without one")
            return False
        except RuntimeError as error:
            # Whatever it was, launching operation by operation says it better, or does without.
            self.gave_up = True
            logger.warning("a CUDA graph could not be captured (%s): steps run without one", error)
            return False
        entry.inputs, entry.step = buffers, captured
        return True

    def _captured(self, step: Callable[[], torch.Tensor], device: torch.device) -> tuple[CapturedStep, torch.Tensor]:
        with contextlib.suppress(torch.OutOfMemoryError):
            return self._record(step, device)
        # While capturing, memory that others have left cannot be reclaimed; nor while the error holds on to its own.
        torch.cuda.empty_cache()
        return self._record(step, device)

    def _record(self, step: Callable[[], torch.Tensor], device: torch.device) -> tuple[CapturedStep, torch.Tensor]:
        # A pool whose last graph is gone must not be captured into again: torch raises, as long as something in it lives.
        if not any(other.step for other in self.entries):
            self.pool = CapturedStep.new_pool()
        if device not in self.streams:
            self.streams[device] = CapturedStep.new_stream(device)
        captured = CapturedStep(device, self.streams[device])
        return captured, captured.capture(step, self.pool)

    def clear(self) -> bool:
        """Frees the graphs and the storages that only they hold; whether there were any."""
        with self.lock:
            held = bool(self.entries)
            for entry in self.entries:
                if entry.step is not None:
                    entry.step.wait()
            self.entries.clear()
            self.seen.clear()
            self.pool = None
            return held


class DecodeGraphs(Graphs):
    """Graphs of the decode step; each belongs to the storages of one cache."""

    def run_on_cache(
        self, key: tuple, cache: Cache, inputs: tuple[torch.Tensor, ...], step: Step, device: torch.device
    ) -> torch.Tensor | None:
        """As `run`, for a step that writes to the storages of `cache`."""
        with self.lock:
            storages = [layer.storages for layer in cache.layers]
            key = (*key, *(side.data_ptr() for pair in storages for side in pair))
            entry = self.find(key)
            if entry is None:
                self.entries = [other for other in self.entries if _can_return(other)]
                self.add(Entry(key, storages=storages, owners=_references(cache)))
                return None
            return self.replay(entry, inputs, step, device)

    def forget(self, cache: Cache) -> None:
        """The storages of `cache` are about to be left: they are not kept beside the new ones."""
        with self.lock:
            self.entries = [entry for entry in self.entries if entry.owners[0]() is not cache.layers[0]]

    def lend(self, cache: Cache, batch: int, tokens: int, like: torch.Tensor) -> None:
        """Gives an empty cache the storages of one that is gone, if they are of the right size and as `like`."""
        with self.lock:
            for entry in self.entries:
                keys = entry.storages[0][0]
                fits = keys.shape[0] == batch and tokens <= keys.shape[1] and len(entry.storages) == len(cache.layers)
                fits = fits and not any(hasattr(side, "shown") for pair in entry.storages for side in pair)
                if fits and entry.is_abandoned and (keys.dtype, keys.device) == (like.dtype, like.device):
                    for layer, storages in zip(cache.layers, entry.storages, strict=True):
                        layer.storages = tuple(side.zero_() for side in storages)
                    for other in self.entries:
                        if other.storages[0][0] is keys:
                            other.owners = _references(cache)
                    return


def _can_return(entry: Entry) -> bool:
    """Whether a step can come again: its cache is gone and left its storages, or still uses them."""
    owner = entry.owners[0]()
    return entry.is_abandoned or (owner is not None and owner.is_initialized and owner.storages[0] is entry.storages[0][0])


def _references(cache: Cache) -> tuple[weakref.ref[PreallocatedLayer], ...]:
    return tuple(weakref.ref(layer) for layer in cache.layers)


def _fill(buffers: tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor, ...]) -> None:
    for buffer, value in zip(buffers, inputs, strict=True):
        buffer.copy_(value, non_blocking=True)
