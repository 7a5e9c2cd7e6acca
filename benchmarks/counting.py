"""Counts what a forward pass launches and moves, without a GPU: fake tensors, no weights, no data.

    with fake_model("4b") as model, Counter() as counted:
        model(...)
    counted.launches, counted.read, counted.written

Every operator that is not a view counts as one launch, reads its inputs and writes its outputs once; the operators of
`llava15_kernels` count as they declare (`cost_of`). These are counts, not measurements.
"""

from __future__ import annotations

import contextlib
from collections import Counter as Tally
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache
from transformers.initialization import no_init_weights

from llava15_fast import LlavaOnevision1_5Config, LlavaOnevision1_5ForConditionalGeneration
from llava15_fast.kv_cache import adopt
from llava15_kernels.cost import cost_of, nbytes

TEXT = {
    "4b": {"hidden_size": 2560, "intermediate_size": 9728},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288},
}
BASE = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
}


def config_of(size: str) -> LlavaOnevision1_5Config:
    """The configuration of the published "4b" or "8b" model."""
    text = {**BASE, **TEXT[size]}
    return LlavaOnevision1_5Config(text_config=text, vision_config={"text_hidden_size": text["hidden_size"]})


@contextlib.contextmanager
def fake_model(size: str, dtype: torch.dtype = torch.bfloat16) -> Iterator[LlavaOnevision1_5ForConditionalGeneration]:
    """The real model's shapes without any memory, while the context lasts."""
    before = torch.get_default_dtype()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        torch.set_default_dtype(dtype)
        try:
            with no_init_weights():
                model = LlavaOnevision1_5ForConditionalGeneration(config_of(size)).eval()
            yield model
        finally:
            torch.set_default_dtype(before)


def filled_cache(model: LlavaOnevision1_5ForConditionalGeneration, batch: int, tokens: int, stock: bool) -> DynamicCache:
    """A cache that holds `tokens` tokens of every prompt, as transformers or as the kernels keep it."""
    text = model.config.text_config
    cache = DynamicCache(config=text)
    if not stock:
        adopt(cache, text.num_hidden_layers)
    states = torch.empty(batch, text.num_key_value_heads, tokens, text.head_dim)
    for index in range(text.num_hidden_layers):
        cache.update(states, states, index)
    return cache


class Counter(TorchDispatchMode):
    """Launches and bytes of everything that runs inside.

    Attributes:
        launches: kernels.
        read, written: bytes.
        tally: launches per operator, by its name as in "aten::mm".
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.read = self.written = 0
        self.tally: Tally[str] = Tally()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        namespace, name = func.namespace, func._schema.name.split("::")[1]
        if namespace == "llava15":
            cost = cost_of(name, *args)
            self._add(f"llava15::{name}", cost.launches, cost.read, cost.written)
        elif namespace == "aten" and not func.is_view and name not in NOT_LAUNCHED:
            inputs, outputs = (
                [x for x in tree_leaves(part) if isinstance(x, torch.Tensor)] for part in ((args, kwargs), output)
            )
            # A gather reads the rows that it returns.
            read = inputs[1:] + outputs if name in GATHERS else inputs
            self._add(f"aten::{name}", 1, nbytes(*read), nbytes(*outputs))
        return output

    def _add(self, name: str, launches: int, read: int, written: int) -> None:
        self.launches += launches
        self.read += read
        self.written += written
        self.tally[name] += launches

    @property
    def bytes(self) -> int:
        return self.read + self.written


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


GATHERS = frozenset({"embedding", "index", "index_select", "gather"})
NOT_LAUNCHED = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "lift_fresh", "_unsafe_view", "detach_", "sym_size"}
)
"""Operators that allocate or rename, and touch no element."""
