"""What ran: calls of the kernels per backend, and calls that fell back to the original method per reason."""

from __future__ import annotations

import functools
import logging
from collections import Counter, defaultdict

import torch

logger = logging.getLogger("llava15_fast")


class Record:
    """Of one patched model; `method` is what the report calls it, "visual.encode" say.

    Attributes:
        ran: method -> backend -> calls.
        fallbacks: method -> reason -> calls of the original.
    """

    def __init__(self) -> None:
        self.ran: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.fallbacks: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def run(self, method: str, how: str) -> None:
        if not torch.compiler.is_compiling():
            self.ran[method][how] += 1

    def fall_back(self, method: str, reason: str) -> None:
        """The original runs, because of `reason`: counted, and logged the first time."""
        if not torch.compiler.is_compiling():
            self.fallbacks[method][reason] += 1
            _log_fallback(method, reason)


@functools.cache
def _log_fallback(method: str, reason: str) -> None:
    logger.warning("%s falls back to the original: %s", method, reason)
