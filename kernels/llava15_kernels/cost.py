"""What one call of an operator costs: kernel launches, and bytes that have to move between memory and chip.

Each operator declares it beside its registration, for counting a forward pass without a GPU: under fake tensors an operator is
one node, however many kernels it launches. The bytes are the compulsory ones, every operand once: what a kernel reads again is
expected in a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Cost:
    launches: int
    read: int
    written: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


_DECLARED: dict[str, Callable[..., Cost]] = {}


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of the elements that the tensors show, whatever lies between them in memory."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def declares_cost(op: str) -> Callable[[Callable[..., Cost]], Callable[..., Cost]]:
    """Registers the cost of `llava15::<op>`: a function of the operator's arguments."""

    def register(function: Callable[..., Cost]) -> Callable[..., Cost]:
        _DECLARED[op] = function
        return function

    return register


def cost_of(op: str, *args: Any) -> Cost:
    """The declared cost of calling `torch.ops.llava15.<op>(*args)`; the tensors may be fake.

    Raises:
        KeyError: the operator is not one of ours.
    """
    return _DECLARED[op](*args)


def declared_operators() -> tuple[str, ...]:
    return tuple(_DECLARED)
