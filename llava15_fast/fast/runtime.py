"""What the patched modules of one model share."""

from __future__ import annotations

import functools
import logging
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from llava15_kernels._dispatch import Backend, default_backend

from . import limits
from .cuda_graphs import Graphs, Slot
from .kv_cache import KVPool

logger = logging.getLogger("llava15_fast")

RUNTIME = "_llava15_runtime"
"""The attribute of a patched module that holds its `Runtime`."""

T = TypeVar("T")

_living: weakref.WeakSet[Runtime] = weakref.WeakSet()


class Record:
    """What ran in one patched model; `method` is its name in the report, such as "visual.encode".

    Attributes:
        ran: method -> backend -> calls.
        fallbacks: method -> reason -> fallbacks to transformers' forward.
    """

    def __init__(self) -> None:
        self.ran: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.fallbacks: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def run(self, method: str, how: str) -> str:
        if not torch.compiler.is_compiling():
            self.ran[method][how] += 1
        return how

    def fall_back(self, method: str, reason: str) -> None:
        """Counts a fallback and logs it the first time."""
        if not torch.compiler.is_compiling():
            self.fallbacks[method][reason] += 1
            _log_fallback(method, reason)


@functools.cache
def _log_fallback(method: str, reason: str) -> None:
    logger.warning("%s falls back to transformers: %s", method, reason)


class Runtime:
    """Options, record, KV pool and CUDA graphs of one patched model. Copies and pickles get their own."""

    def __init__(self, backend: Backend, cuda_graph: bool) -> None:
        self.backend, self.cuda_graph = backend, cuda_graph
        self.record = Record()
        self.pool = KVPool()
        self.graphs = Graphs()
        # For the most recent image sizes; a graph is freed with its slot.
        self.vision_slot = functools.lru_cache(limits.VISION_GRAPHS)(lambda sizes: Slot())
        _living.add(self)

    def __reduce__(self) -> tuple:
        return Runtime, (self.backend, self.cuda_graph)

    def backend_on(self, device: torch.device) -> str:
        return default_backend(device) if self.backend == "auto" else self.backend

    def can_capture(self, device: torch.device) -> bool:
        return self.cuda_graph and self.graphs.can_capture(device)

    def release(self) -> bool:
        """Frees graphs and idle KV buffers. Returns whether there were any."""
        freed = [self.graphs.clear(), self.pool.clear()]
        self.vision_slot.cache_clear()
        return any(freed)


def runtime_of(module: nn.Module) -> Runtime | None:
    """None if another thread has unpatched the model in the meantime."""
    return vars(module).get(RUNTIME)


def with_oom_retry(run: Callable[[], T]) -> T:
    """`run()`; on out-of-memory, once more after freeing graphs and idle KV buffers of all models, which only save time."""
    if torch.compiler.is_compiling():
        return run()
    try:
        return run()
    except torch.OutOfMemoryError:
        if not any([runtime.release() for runtime in list(_living)]):
            raise
    logger.warning("out of memory: CUDA graphs and idle KV buffers were freed")
    return run()


class FastModule:
    """Base of the patched classes."""

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """Frees the graphs when weights move or change dtype, or they would keep the old weights alive."""
        if (runtime := runtime_of(self)) is not None:
            runtime.release()
        return super()._apply(fn, recurse)
