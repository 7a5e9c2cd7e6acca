"""Counts what a forward pass launches and moves, without a GPU: fake tensors, no weights, no data.

    with fake_model("4b") as model, Counter() as counted:
        model(...)
    counted.launches, counted.read, counted.written, counted.flops

Every operator that is not a view counts as one launch, reads its inputs and writes its outputs once; the operators of
`llava15_kernels` count as they declare (`Operator.cost`). Operations are those of matrix products and attention, by the
formulas of `torch.utils.flop_counter` where it has one; a causal attention that skips what is masked counts what it
computes. These are counts, not measurements.
"""

from __future__ import annotations

import contextlib
from collections import Counter as Tally
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import DynamicCache
from transformers.initialization import no_init_weights

from llava15_fast import LlavaOnevision1_5Config, LlavaOnevision1_5ForConditionalGeneration
from llava15_fast.fast.kv_cache import KVPool
from llava15_kernels._registry import OPERATORS, nbytes

from .sizes import TEXT


def config_of(size: str) -> LlavaOnevision1_5Config:
    """The configuration of the published "4b" or "8b" model."""
    text = asdict(TEXT[size])
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
        like = torch.empty(batch, 0, text.num_key_value_heads, text.head_dim)
        KVPool().borrow(cache, text.num_hidden_layers, like, tokens + 1).advance(tokens)
        return cache
    states = torch.empty(batch, text.num_key_value_heads, tokens, text.head_dim)
    for index in range(text.num_hidden_layers):
        cache.update(states, states, index)
    return cache


class Call(NamedTuple):
    """What one call of an operator launches, moves (bytes) and computes (floating-point operations)."""

    name: str
    launches: int
    read: int
    written: int
    flops: int


class Counter(TorchDispatchMode):
    """Launches, bytes and operations of everything that runs inside.

    Args:
        filled: tokens that the caches hold for each prompt. By default attention over a cache counts as if it were full,
            for how full it is only the device knows.

    Attributes:
        launches: kernels.
        read, written: bytes.
        flops: floating-point operations of matrix products and attention.
        tally: launches per operator, by its name as in "aten::mm".
        calls: how often each `Call` was made.
    """

    def __init__(self, filled: int | None = None) -> None:
        super().__init__()
        self.filled = filled
        self.launches = self.read = self.written = self.flops = 0
        self.tally: Tally[str] = Tally()
        self.calls: Tally[Call] = Tally()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        namespace, name = func.namespace, func._schema.name.split("::")[1]
        if namespace == "llava15":
            self._add(self._ours(name, args))
        elif namespace == "aten" and not func.is_view and name not in NOT_LAUNCHED:
            self._add(_aten(func, name, args, kwargs, output))
        return output

    def _add(self, call: Call) -> None:
        self.launches += call.launches
        self.read += call.read
        self.written += call.written
        self.flops += call.flops
        self.tally[call.name] += call.launches
        self.calls[call] += 1

    def _ours(self, name: str, args: tuple) -> Call:
        cost, read, flops = OPERATORS[name].cost(*args), 0, 0
        if name == "flash_attn_varlen":
            flops = _varlen_flops(*args)
        elif name == "fused_linear":
            x, weights = args[:2]
            flops = 2 * x[..., 0].numel() * sum(weight.numel() for weight in weights)
        elif name in ("flash_decode", "decode_attention"):
            q, (k_cache, v_cache) = args[0], args[1:3] if name == "flash_decode" else args[9:11]
            filled = k_cache.shape[1] if self.filled is None else self.filled
            read = -nbytes(k_cache[:, filled:], v_cache[:, filled:])
            flops = 4 * q.numel() * filled
        return Call(f"llava15::{name}", cost.launches, cost.read + read, cost.written, flops)

    @property
    def bytes(self) -> int:
        return self.read + self.written


def _aten(func: Any, name: str, args: tuple, kwargs: dict, output: Any) -> Call:
    inputs, outputs = _tensors((args, kwargs)), _tensors(output)
    if name in GATHERS:  # a gather reads the rows that it returns
        inputs = inputs[1:] + outputs
    elif name in OVERWRITES:
        inputs = inputs[1:]
    flops = 0
    if "attention" in name:
        q, k = args[:2]
        flops = 4 * q[..., 0].numel() * k.shape[-2] * q.shape[-1]
        if _is_causal(func, args, kwargs):
            flops = _visible(q.shape[-2], k.shape[-2]) * flops // (q.shape[-2] * k.shape[-2])
    elif (formula := flop_registry.get(func._overloadpacket)) is not None:
        flops = formula(*args, **kwargs, out_val=output)
    return Call(f"aten::{name}", 1, nbytes(*inputs), nbytes(*outputs), flops)


def _is_causal(func: Any, args: tuple, kwargs: dict) -> bool:
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}.get("is_causal", False)


def _visible(len_q: int, len_k: int) -> int:
    """Pairs of a query and a key that it sees, the last query seeing all keys."""
    unseen = min(len_q, len_k)
    return len_q * len_k - unseen * (unseen - 1) // 2 - max(len_q - len_k, 0) * len_k


def _varlen_flops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
) -> int:
    """Of the segments; where fake bounds hide their lengths, all are as long as the longest, which has to come out even.

    Raises:
        ValueError: it does not.
    """
    if isinstance(cu_seqlens_q, FakeTensor):
        segments, rest = divmod(q.shape[0], max_seqlen_q)
        if rest:
            raise ValueError(f"{q.shape[0]} rows in fake segments of at most {max_seqlen_q}: their lengths cannot be known")
        lengths = [(max_seqlen_q, max_seqlen_q)] * segments
    else:
        with unset_fake_temporarily():
            lengths = list(zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True))
    pairs = sum(_visible(*pair) if causal else pair[0] * pair[1] for pair in lengths)
    return 4 * q.shape[1] * q.shape[2] * pairs


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


GATHERS = frozenset({"embedding", "index", "index_select", "gather"})
OVERWRITES = frozenset({"copy_", "fill_", "zero_"})
"""In-place operators that do not read what they write to."""
NOT_LAUNCHED = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "lift_fresh", "_unsafe_view", "detach_", "sym_size", "promote_types"}
)
"""Operators that allocate or rename, and touch no element."""
