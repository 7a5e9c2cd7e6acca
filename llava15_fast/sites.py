"""What `patch` leaves on a module for each method that it replaces: what should run there, and what did run."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn

from llava15_kernels._dispatch import default_backend

logger = logging.getLogger("llava15_fast")

SITES = "_llava15_sites"


@dataclass
class Site:
    """One replaced method of one module: what it should run and what it did run.

    Attributes:
        path: of the module below the patched model.
        attribute: the replaced method.
        kernels: what runs in it.
        backend: asked for: "auto", "triton" or "torch".
        ran: calls per backend.
        fallbacks: calls of the original method per reason.
    """

    path: str
    attribute: str
    kernels: tuple[str, ...]
    backend: str
    ran: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)

    def backend_on(self, device: torch.device) -> str:
        return default_backend(device) if self.backend == "auto" else self.backend

    def start(self, device: torch.device, how: str = "") -> str:
        """The backend for a call on `device`, which is counted; `how` it runs is told in the report."""
        backend = self.backend_on(device)
        if not torch.compiler.is_compiling():
            self.ran[f"{backend}, {how}" if how else backend] += 1
        return backend

    def fall_back(self, reason: str) -> None:
        """The original method runs, because of `reason`: counted, and logged the first time."""
        if not torch.compiler.is_compiling():
            self.fallbacks[reason] += 1
            _log_fallback(".".join(filter(None, (self.path, self.attribute))), reason)


@functools.cache
def _log_fallback(method: str, reason: str) -> None:
    logger.warning("%s: the original runs (%s)", method, reason)


def site_of(module: nn.Module, attribute: str = "forward") -> Site:
    return module.__dict__[SITES][attribute]
