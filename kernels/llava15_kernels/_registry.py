"""Operators: schema, launcher, fake and cost of each, declared once.

    @operator("gelu(Tensor x, Tensor? bias) -> Tensor", fake=lambda x, bias: empty_as(x), cost=lambda x, bias: Cost(...))
    def _gelu(x, bias): ...

registers `torch.ops.llava15.gelu`. The cost is what one call launches and moves, for counting a forward pass without a GPU:
under fake tensors an operator is one node, however many kernels it launches. Bytes are the compulsory ones, every operand once:
what a kernel reads again is expected in a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Launcher = TypeVar("Launcher", bound=Callable[..., Any])


@dataclass(frozen=True)
class Cost:
    """Kernel launches, and bytes read and written."""

    launches: int
    read: int
    written: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Operator:
    """`fake` and `cost` take the operator's arguments, which may be fake tensors; `cost` is None for one without kernels."""

    fake: Callable[..., Any]
    cost: Callable[..., Cost] | None


OPERATORS: dict[str, Operator] = {}
"""name -> what was declared with `torch.ops.llava15.<name>`."""


def operator(
    schema: str, *, fake: Callable[..., Any], cost: Callable[..., Cost] | None = None
) -> Callable[[Launcher], Launcher]:
    """Registers the decorated launcher as `llava15::<schema>`, on CPU (Triton's interpreter) and GPU."""
    name = f"llava15::{schema.partition('(')[0]}"

    def register(launcher: Launcher) -> Launcher:
        torch.library.define(name, schema[schema.index("(") :])
        torch.library.impl(name, ("cpu", "cuda"), launcher)
        torch.library.register_fake(name, fake)
        OPERATORS[name.removeprefix("llava15::")] = Operator(fake, cost)
        return launcher

    return register


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of the elements that the tensors show, whatever lies between them in memory."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def empty_as(x: torch.Tensor) -> torch.Tensor:
    """A new contiguous tensor of the shape, dtype and device of `x`; `empty_like` would keep its strides."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
