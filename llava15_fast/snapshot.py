"""Whether a tree of modules is still what it was when it was last looked at.

Fused code has to know of every module that it passes over that nobody listens to it, and of every weight where it lies. For
36 layers finding that out takes the host about as long as a token takes a GPU; seeing that nothing has changed is a comparison
of identities, most of it inside C.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import chain, compress, repeat
from operator import attrgetter, contains
from typing import Any, Generic, TypeVar

import torch
from torch import nn

T = TypeVar("T")

SEEN = "_llava15_seen"
"""The attribute of a module that holds what was `Remembered` of it."""

NUMBERS = (
    "variance_epsilon",
    "eps",
    "scaling",
    "attention_scaling",
    "attention_dropout",
    "is_causal",
    "head_dim",
    "num_heads",
    "layer_idx",
)
"""Attributes of modules that fused code reads, where a module has them."""


class Snapshot:
    """What can be exchanged in a tree without a word: modules, parameters and buffers under their names; memory, dtype and
    layout of the plain tensors among them; hooks; forwards of classes; and on instances a forward, accelerate's hook,
    `NUMBERS`, and whether what has dropout trains.

    Modules that have been replaced are kept alive until the next look, tensors are not. A new tensor that has the identity of
    one that is gone, its address and its dtype is the same to everyone who asks here.
    """

    def __init__(self, root: nn.Module) -> None:
        self.modules = list(root.modules())
        self.attributes = [vars(module) for module in self.modules]
        tables = [table for m in self.modules for table in (m._modules, m._parameters, m._buffers)]
        hooks = [table for m in self.modules for table in (m._forward_hooks, m._forward_pre_hooks)]
        self.empty = [table for table in (*tables, *hooks) if not table]
        self.tables = [table for table in tables if table]
        self.hooks = [table for table in hooks if table]
        members = self._members()
        self.identities = _identities(members)
        self.classes = list({type(module) for module in self.modules})
        numbered = [(vars(m), name) for m in self.modules for name in NUMBERS if name in vars(m)]
        numbered += [(vars(m), "training") for m in self.modules if "attention_dropout" in vars(m)]
        self.numbered = [owner for owner, _ in numbered]
        self.numbers = [name for _, name in numbered]
        # Fake tensors and those of quantisers have no address of their own.
        self.located = [type(member) in (nn.Parameter, torch.Tensor) for member in members]
        self.state = self._state(members)

    def holds(self) -> bool:
        if any(self.empty):
            return False
        members = self._members()
        return _identities(members) == self.identities and self._state(members) == self.state

    def _members(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self.tables))]

    def _state(self, members: list[Any]) -> tuple[list[Any], ...]:
        tensors = [*compress(members, self.located)]
        return (
            [*map(torch.Tensor.data_ptr, tensors)],
            [*map(attrgetter("dtype"), tensors)],
            [*map(torch.Tensor.numel, tensors)],
            [*map(torch.Tensor.is_contiguous, tensors)],
            [*chain.from_iterable(self.tables)],
            [*chain.from_iterable(self.hooks)],
            [*map(attrgetter("forward"), self.classes)],
            [*map(dict.get, self.numbered, self.numbers)],
            [*map(contains, self.attributes, repeat("forward"))],
            [*map(contains, self.attributes, repeat("_hf_hook"))],
        )


def _identities(members: list[Any]) -> tuple[list[int], list[type]]:
    return [*map(id, members)], [*map(type, members)]


class Remembered(Generic[T]):
    """`find(root)`, found out anew only when the tree below `root` has changed."""

    def __init__(self, find: Callable[[nn.Module], T]) -> None:
        self.find = find
        self.known: tuple[Snapshot, T] | None = None
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple:
        """A copy or a pickle of the model looks for itself."""
        return type(self), (self.find,)

    def of(self, root: nn.Module) -> T:
        if not self._is_current():
            with self.lock:
                if not self._is_current():  # another thread may have looked meanwhile
                    found = self.find(root)
                    # After it: `find` may lay weights elsewhere.
                    self.known = Snapshot(root), found
        return self.known[1]

    def _is_current(self) -> bool:
        known = self.known
        return known is not None and known[0].holds()
