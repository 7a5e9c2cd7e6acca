"""The text model's forward over the kernels: packed rows, fused projections, a cache that is written in place.

    embeds (B, L, width)
        -> rows (T, width)                      without padding
        per layer, x and the residual r carried on:
            n, r = rms_norm(x + r)
            q, k, v = n [Wq; Wk; Wv]^T          one product (`fusing.py`)
            q = qk_norm_rope(q, k, v)           keys and values go into the cache (`kv_cache.py`)
            a = attention(q, cache)             split over the cache for a few new tokens, varlen for a prompt
            n, r = rms_norm(a Wo^T + r)
            x = silu_and_mul(n [Wgate; Wup]^T) Wdown^T
        -> rms_norm(x + r) -> (B, L, width)

Ten launches a layer in decoding. `TextLayout` holds where every row belongs and is the same for all layers.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)

from llava15_kernels import flash_attn_varlen_func, flash_attn_with_kvcache, qk_norm_rope, rms_norm, silu_and_mul
from llava15_kernels.flash_decode import max_rows
from llava15_kernels.qk_norm_rope import norm_and_rotate, rope_tables, write_rows

from .fusing import FusedLinear, call, is_plain
from .graphs import GRAPHS, DecodeGraphs, Storages, with_room
from .kv_cache import adopt
from .modeling import PADDING_IS_READ
from .parts import Part, activation_obstacle, obstacle
from .refusal import attention_refusal, has_hooks, inside, refusal, surroundings
from .releases import CACHE
from .sites import site_of
from .snapshot import SEEN

FUSED = "_llava15_fused"
QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")


SILU = {nn.SiLU, type(ACT2FN["silu"])}

_NORM = ("hidden_states",)
PARTS = (
    Part("norm", Qwen3RMSNorm, _NORM),
    Part("rotary_emb", Qwen3RotaryEmbedding, ("x", "position_ids")),
    Part(
        "layers.*",
        Qwen3DecoderLayer,
        (
            "hidden_states",
            "attention_mask",
            "position_ids",
            CACHE,
            "use_cache",
            "position_embeddings",
            "kwargs",
        ),
    ),
    Part("layers.*.input_layernorm", Qwen3RMSNorm, _NORM),
    Part("layers.*.post_attention_layernorm", Qwen3RMSNorm, _NORM),
    Part(
        "layers.*.self_attn",
        Qwen3Attention,
        ("hidden_states", "position_embeddings", "attention_mask", CACHE, "kwargs"),
    ),
    Part("layers.*.self_attn.q_norm", Qwen3RMSNorm, _NORM),
    Part("layers.*.self_attn.k_norm", Qwen3RMSNorm, _NORM),
    Part("layers.*.mlp", Qwen3MLP, ("x",)),
)
"""What the fused code stands for; those above come first."""


STATIC_ROPE = ("default", "linear", "yarn", "llama3")
"""Rotary embeddings whose frequencies do not depend on the input."""


KNOWN_PADDING = "known_padding"
"""Keyword argument of a forward: `attention_mask` as a `LeftPadding`, from a caller who has read it before.

Reading the mask behind the vision tower would make the host wait for the tower before it launches the first layer."""


class LeftPadding(NamedTuple):
    """An attention mask known to the host: tokens before `starts[b]` are padding, all others up to `total` are not."""

    starts: tuple[int, ...]
    total: int

    def mask(self, device: torch.device) -> torch.Tensor:
        starts = _send(torch.tensor(self.starts, device="cpu"), device)[:, None]
        return (torch.arange(self.total, device=device) >= starts).long()


def text_model_forward(
    module: nn.Module,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: torch.Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    if (cache := kwargs.pop("cache", None)) is not None:  # its other name, see `releases.CACHE`
        past_key_values = cache
    padding_is_read = kwargs.pop(PADDING_IS_READ, False)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        CACHE: past_key_values,
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
        **kwargs,
    }
    site = site_of(module)
    padding = inputs.pop(KNOWN_PADDING, None)
    if isinstance(attention_mask, LeftPadding):
        padding = attention_mask

    def original(reason: str | None = None) -> Any:
        if reason is not None:
            site.fall_back(reason)
        if isinstance(attention_mask, LeftPadding):
            inputs["attention_mask"] = attention_mask.mask(module.device)
        return type(module).forward(module, **{**inputs, CACHE: past_key_values})

    if reason := surroundings() or (seen := look_at(module)).obstacle:
        return original(reason)
    given = input_ids if inputs_embeds is None else inputs_embeds
    if (input_ids is None) == (inputs_embeds is None):
        return original()  # raises
    if given.shape[2:] != (() if inputs_embeds is None else module.norm.weight.shape) or given.ndim < 2:
        return original("the input is not one token or one row per position")
    if reason := _text_refusal(module, given, kwargs):
        return original(reason)

    goes_on = use_cache is not None  # `generate` says it, and reads what follows the last token, be it padding
    use_cache = module.config.use_cache if use_cache is None else use_cache
    if use_cache and past_key_values is None:
        past_key_values = DynamicCache(config=module.config)
    if past_key_values is not None and not adopt(past_key_values, module.config.num_hidden_layers):
        return original(f"the cache is a {type(past_key_values).__name__} of its own kind")
    graphs = _graphs(module)
    if past_key_values is not None and graphs is not None and not past_key_values.layers[0].is_initialized:
        graphs.lend(past_key_values, *given.shape[:2], module.norm.weight)
    layout = TextLayout.of(module, given, padding or attention_mask, position_ids, past_key_values, goes_on, padding_is_read)
    if isinstance(layout, str):
        return original(layout)

    if not seen.plain and layout.rows is None:
        layout = replace(layout, shape=tuple(given.shape[:2]))
    elif not seen.row_by_row and layout.rows is not None:
        return original("a linear layer has to see the padding, which is left out")
    embeds = module.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    hidden_states = _replay(module, seen, embeds, layout, past_key_values)
    if hidden_states is None:
        storages = None if past_key_values is None else [layer.storages for layer in past_key_values.layers]
        run = functools.partial(run_layers, module, embeds, layout.on_device(), storages, site.start(embeds.device))
        hidden_states = with_room(run)
    if past_key_values is not None:
        for layer in past_key_values.layers:
            layer.advance(embeds.shape[1])
    return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE: past_key_values if use_cache else None})


def _text_refusal(module: nn.Module, given: torch.Tensor, options: dict[str, Any]) -> str | None:
    """Why transformers' own forward has to run, as far as configuration and options say; None if the kernels can."""
    if module.has_sliding_layers or options.get("is_causal") is False:
        return "the attention is not plainly causal"
    if module.rotary_emb.rope_type not in STATIC_ROPE:
        return f"no kernel for the rotary embedding {module.rotary_emb.rope_type!r}"
    own = attention_refusal(module.config._attn_implementation)
    return own or refusal(module, given, module.norm.weight, options)


class Seen(NamedTuple):
    """What a look at all layers has shown, and true until one of them changes (`snapshot.py`).

    Attributes:
        obstacle: why transformers' own forward has to run, or None.
        plain: whether all linear layers compute nothing but a product, and nobody listens.
        row_by_row: whether all of them, adapters included, compute the same for a row wherever it stands.
        fixed: what a captured decode step has fixed, addresses of weights and numbers; None if there can be none.
    """

    obstacle: str | None
    plain: bool
    row_by_row: bool
    fixed: tuple[float, ...] | None


def look_at(module: nn.Module) -> Seen:
    if not torch.compiler.is_compiling():
        return module.__dict__[SEEN].of(module)
    reason = _obstacle(module)
    return Seen(reason, *(2 * [False] if reason else _kinds(module)), None)


def find(module: nn.Module) -> Seen:
    """Looks at every layer, and lays weights side by side where they are not any more."""
    groups = list(_side_by_side(module))
    # A weight in two places cannot be a part of two products.
    users = Counter(id(weight) for part in module.modules() for weight in part._parameters.values())
    users += Counter(id(layer._parameters.get("weight")) for _, layers in groups for layer in layers)
    for owner, layers in groups:
        alone = all(users[id(layer._parameters.get("weight"))] == 2 for layer in layers)
        owner.__dict__.setdefault(FUSED, FusedLinear()).prepare(layers if alone else None)
    reason = _obstacle(module)
    if reason:
        return Seen(reason, False, False, None)
    plain, row_by_row = _kinds(module)
    return Seen(None, plain, row_by_row, _fixed(module) if plain else None)


def _linears(layer: nn.Module) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    named = [owner._modules[name] for owner, names in ((attention, QKV), (mlp, GATE_UP)) for name in names]
    return [*named, attention.o_proj, mlp.down_proj]


def _kinds(module: nn.Module) -> tuple[bool, bool]:
    """`Seen.plain` and `Seen.row_by_row`."""
    linears = [part for layer in module.layers for part in _linears(layer)]
    # PEFT's adapters choose by the prompt, or by the place in it, through hooks.
    heard = any(has_hooks(child) for part in linears if not is_plain(part) for child in part.modules())
    return all(map(is_plain, linears)), not heard and all(isinstance(inside(part), nn.Linear) for part in linears)


def _obstacle(module: nn.Module) -> str | None:
    if reason := obstacle(module, PARTS):
        return reason
    for layer in module.layers:
        attention = layer.self_attn
        if reason := activation_obstacle(layer.mlp.act_fn, SILU):
            return reason
        if attention.training and attention.attention_dropout:
            return "attention dropout is on"
        if not attention.is_causal:
            return "the attention is not plainly causal"
        if attention.q_norm.variance_epsilon != attention.k_norm.variance_epsilon:
            return "no kernel for norms of queries and keys that differ in their epsilon"
    return None


def _fixed(module: nn.Module) -> tuple[float, ...] | None:
    """See `Seen`; every part is what it should be, every linear layer plain."""
    weights, numbers = [module.norm.weight, module.rotary_emb.inv_freq], [module.rotary_emb.attention_scaling]
    for layer in module.layers:
        attention, linears = layer.self_attn, _linears(layer)
        if any(part.bias is not None for part in linears):
            return None
        norms = [layer.input_layernorm, layer.post_attention_layernorm, attention.q_norm, attention.k_norm]
        weights += [part.weight for part in (*linears, *norms)]
        numbers += [attention.scaling, *(norm.variance_epsilon for norm in norms)]
    numbers.append(module.norm.variance_epsilon)
    return None if any(map(is_fake, weights)) else (*(weight.data_ptr() for weight in weights), *numbers)


@dataclass(frozen=True)
class TextLayout:
    """Where the rows of one forward belong.

    Attributes:
        position_ids: (1, T), of the rows.
        rows: (T,) indices of the tokens in the flattened (B, L); None when none is padding.
        slots: (1, T) rows of the flattened cache (B * capacity) that they are written to; None without a cache.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: segments for the varlen attention, or None.
        total_k: rows that the segments of the keys cover.
        cache_seqlens, cache_leftpad: (B,) int32 for attention split over the cache, or None.
        shape: (B, L) where linear layers have to see their rows in transformers' shape, because of a hook or adapter.
        numbers: the values of `slots`, `cache_seqlens` and `cache_leftpad` where they are not on the device yet.
    """

    position_ids: torch.Tensor
    rows: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    total_k: int = 0
    cache_seqlens: torch.Tensor | None = None
    cache_leftpad: torch.Tensor | None = None
    shape: tuple[int, int] | None = None
    numbers: list[list[int]] | None = None

    def on_device(self) -> TextLayout:
        if self.numbers is None:
            return self
        slots, seqlens, leftpad = (
            _send(torch.tensor(values, dtype=torch.int32, device="cpu"), self.position_ids.device) for values in self.numbers
        )
        return replace(self, slots=slots[None], cache_seqlens=seqlens, cache_leftpad=leftpad, numbers=None)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        given: torch.Tensor,
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        goes_on: bool = False,
        padding_is_read: bool = False,
    ) -> TextLayout | str:
        """The layout for `given` (B, L, ...) behind what the cache holds, which gets room for it; or why there is none."""
        batch, length = given.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        total = past + length
        device = given.device
        if position_ids is None:
            position_ids = torch.arange(past, total, device=device)[None]
        elif position_ids.ndim != 2 or position_ids.shape[1] != length:
            return "the positions are not one per token"
        elif cache is None and attention_mask is None and bool((position_ids.diff(dim=-1) != 1).any()):
            # Without a cache transformers reads jumps in the positions as the borders of packed sequences.
            return "the positions describe packed sequences"
        spans = [(0, total)] * batch
        if isinstance(attention_mask, LeftPadding):
            if attention_mask.total != total:
                return "the attention mask is not one flag per token"
            spans = [(start, total) for start in attention_mask.starts]
        elif attention_mask is not None:
            if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != (batch, total):
                return "the attention mask is not one flag per token"
            spans = spans_of(attention_mask)
            if spans is None:
                return "the attention mask has holes"
        starts_at = [max(start, past) for start, _ in spans]  # of the new tokens that are not padding
        ends_at = [max(end, past) for _, end in spans]
        if starts_at == ends_at:
            return "there is nothing but padding"
        if goes_on and any(end < total for end in ends_at):
            return "a prompt ends with padding"
        if padding_is_read and any(start > past for start in starts_at):
            return "a loss reads the padding before a prompt"
        full = all(start == past and end == total for start, end in zip(starts_at, ends_at, strict=True))

        def indices(first: list[int], last: list[int], offset: int) -> torch.Tensor:
            """first[b] : last[b] of every prompt b, moved by b * offset, on the device."""
            parts = [
                torch.arange(start + b * offset, end + b * offset, device="cpu")
                for b, (start, end) in enumerate(zip(first, last, strict=True))
            ]
            return _send(torch.cat(parts), device)

        rows = None
        if not full:
            rows = indices([start - past for start in starts_at], [end - past for end in ends_at], length)
        position_ids = position_ids.to(device).expand(batch, -1).reshape(1, -1)
        if rows is not None:
            position_ids = position_ids[:, rows]
        if cache is None and full:
            bounds = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
            return cls(position_ids, None, None, bounds, bounds, length, length, batch * length)
        if cache is None:
            lengths = [end - start for start, end in spans]
            return cls(position_ids, rows, None, **_segments(lengths, lengths, device))

        capacity = _make_room(module, cache, total, batch, device)
        group = module.config.num_attention_heads // module.config.num_key_value_heads
        if full and past and length * group <= max_rows(module.config.head_dim, module.norm.weight.dtype):
            starts = [start for start, _ in spans]
            if torch.compiler.is_compiling():
                # Numbers of the host would be constants of the graph, and every token another graph.
                counted: dict[str, Any] = {"dtype": torch.int32, "device": device}
                tokens = torch.arange(batch, **counted)[:, None] * capacity + torch.arange(past, total, **counted)
                ends = torch.full((batch,), total, **counted)
                return cls(
                    position_ids, slots=tokens.view(1, -1), cache_seqlens=ends, cache_leftpad=torch.tensor(starts, **counted)
                )
            slots = [b * capacity + token for b in range(batch) for token in range(past, total)]
            return cls(position_ids, numbers=[slots, [total] * batch, starts])
        slots = indices(starts_at, ends_at, capacity)[None]
        # The cache's rows are cut into segments too: what lies between the prompts is nobody's, and no query sees it.
        lengths_q, lengths_k, covered = [], [], 0
        for b, (start, end) in enumerate(spans):
            first = b * capacity + start
            lengths_q += [0, ends_at[b] - starts_at[b]]
            lengths_k += [first - covered, end - start]
            covered = first + end - start
        return cls(position_ids, rows, slots, **_segments(lengths_q, lengths_k, device))


def _make_room(module: nn.Module, cache: Cache, tokens: int, batch: int, device: torch.device) -> int:
    """Room for `tokens` in all layers; returns the capacity."""
    # Read once: that takes longer than looking at a layer's storages.
    heads, head_dim, dtype = module.config.num_key_value_heads, module.config.head_dim, module.norm.weight.dtype
    graphs = _graphs(module)
    if graphs is not None and cache.layers[0].has_to_move(tokens):
        graphs.forget(cache)

    def reserve() -> None:
        for layer in cache.layers:
            layer.reserve(tokens, batch, heads, head_dim, dtype, device)

    with_room(reserve)
    return cache.layers[0].storages[0].shape[1]


def _send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device without waiting for it: from pageable memory only some 64 KB could be sent that way."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _segments(lengths_q: list[int], lengths_k: list[int], device: torch.device) -> dict[str, Any]:
    """The varlen attention's arguments. Pairs of empty segments are left out."""
    pairs = [pair for pair in zip(lengths_q, lengths_k, strict=True) if pair != (0, 0)]
    rows = [[0, *accumulate(lengths)] for lengths in (zip(*pairs, strict=True) if pairs else ((), ()))]
    bounds = _send(torch.tensor(rows, dtype=torch.int32, device="cpu"), device)
    return {
        "cu_seqlens_q": bounds[0],
        "cu_seqlens_k": bounds[1],
        "max_seqlen_q": max(lengths_q),
        "max_seqlen_k": max(lengths_k),
        "total_k": sum(lengths_k),
    }


def spans_of(attention_mask: torch.Tensor) -> list[tuple[int, int]] | None:
    """Per prompt the first token and the end of its tokens; None if a mask is not one run. One copy to the host."""
    valid = attention_mask.bool()
    count = valid.sum(-1)
    start = valid.int().argmax(-1)
    index = torch.arange(valid.shape[1], device=valid.device)
    one_run = (valid == ((index >= start[:, None]) & (index < (start + count)[:, None]))).all(-1)
    spans = []
    for first, tokens, whole in torch.stack([start, count, one_run.long()], dim=1).tolist():
        if not whole:
            return None
        spans.append((first, first + tokens))
    return spans


def _graphs(module: nn.Module) -> DecodeGraphs | None:
    """torch.compile captures by itself."""
    return None if torch.compiler.is_compiling() else module.__dict__.get(GRAPHS)


def _replay(
    module: nn.Module, seen: Seen, embeds: torch.Tensor, layout: TextLayout, cache: Cache | None
) -> torch.Tensor | None:
    """The output for one new token per prompt by a CUDA graph; None where there is none."""
    graphs, site = _graphs(module), site_of(module)
    if graphs is None or seen.fixed is None or layout.numbers is None or embeds.shape[1] != 1:
        return None
    if not graphs.can_capture(embeds.device):
        return None
    backend = site.backend_on(embeds.device)
    storages = [layer.storages for layer in cache.layers]
    # Pinned: a copy from elsewhere may wait for the device.
    numbers = torch.tensor(layout.numbers, dtype=torch.int32, device="cpu", pin_memory=embeds.device.type == "cuda")

    def step(embeds: torch.Tensor, position_ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        slots, seqlens, leftpad = numbers.unbind()
        fixed = TextLayout(position_ids, slots=slots[None], cache_seqlens=seqlens, cache_leftpad=leftpad)
        return run_layers(module, embeds, fixed, storages, backend)

    key = (backend, embeds.shape, embeds.dtype, layout.position_ids.dtype, seen.fixed)
    hidden_states = graphs.run_on_cache(key, cache, (embeds, layout.position_ids, numbers), step, embeds.device)
    if hidden_states is not None:
        site.start(embeds.device, "CUDA graph")
    return hidden_states


def run_layers(
    module: nn.Module, embeds: torch.Tensor, layout: TextLayout, storages: Storages | None, backend: str
) -> torch.Tensor:
    """(B, L, width) -> (B, L, width) after the last norm; zeros where the layout has padding."""
    x = embeds.flatten(0, 1)
    if layout.rows is not None:
        x = x[layout.rows]
    rope = layout.position_ids, module.rotary_emb.inv_freq.float(), module.rotary_emb.attention_scaling
    if backend == "torch":
        # Made once; the kernel makes its angles where it uses them.
        rope = rope_tables(*rope)
    config = module.config
    # Read once: transformers' configurations take their time.
    heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
    layers = [*module.layers][: config.num_hidden_layers]
    norms = [layer.input_layernorm for layer in layers[1:]] + [module.norm]
    first = layers[0].input_layernorm
    normed, residual = rms_norm(x, first.weight, first.variance_epsilon, backend=backend), x
    for layer, next_norm in zip(layers, norms, strict=True):
        norm, mlp = layer.post_attention_layernorm, layer.mlp
        attended = attend(heads, layer.self_attn, normed, layout, rope, storages, embeds.shape[0], backend)
        normed, residual = rms_norm(attended, norm.weight, norm.variance_epsilon, residual, backend=backend)
        x = call(mlp.down_proj, _gated(mlp, normed, layout.shape, backend), layout.shape)
        normed, residual = rms_norm(x, next_norm.weight, next_norm.variance_epsilon, residual, backend=backend)
    if layout.rows is None:
        return normed.view(embeds.shape)
    return normed.new_zeros(embeds.shape).flatten(0, 1).index_copy_(0, layout.rows, normed).view(embeds.shape)


def _gated(mlp: nn.Module, normed: torch.Tensor, shape: tuple[int, int] | None, backend: str) -> torch.Tensor:
    if backend == "torch" and len(normed) > 1:
        # Halves of rows are slow to read for torch's elementwise loops, and products of many rows gain nothing side by side.
        gate, up = call(mlp.gate_proj, normed, shape), call(mlp.up_proj, normed, shape)
        if is_plain(mlp.gate_proj):  # nobody else holds its output
            return nn.functional.silu(gate, inplace=True).mul_(up)
        return nn.functional.silu(gate) * up
    return silu_and_mul(project(mlp, GATE_UP, normed, shape), backend=backend)


def attend(
    heads: tuple[int, int, int],
    attention: nn.Module,
    normed: torch.Tensor,
    layout: TextLayout,
    rope: tuple,
    storages: Storages | None,
    batch: int,
    backend: str,
) -> torch.Tensor:
    """(T, width) -> (T, width): projections, head norms, rotary embedding, cache, attention, output projection.

    `heads` are those of q, k and v.
    """
    head_dim = attention.head_dim
    qkv = project(attention, QKV, normed, layout.shape)
    q, k, v = qkv.view(1, -1, sum(heads), head_dim).split(heads, dim=2)
    norms = attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon
    if storages is not None:
        k_cache, v_cache = storages[attention.layer_idx]
        keys, values = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    if backend == "torch":
        q, k = norm_and_rotate(q, k, *norms, *rope)
        if storages is not None:
            write_rows(keys, values, layout.slots, k, v)
    else:
        *angles, scaling = rope
        cache = {} if storages is None else {"v": v, "k_cache": keys, "v_cache": values, "slot_mapping": layout.slots}
        q = qk_norm_rope(q, k, *norms, *angles, attention_scaling=scaling, backend=backend, **cache)
        if storages is None:
            q, k = q
    if storages is None:
        keys, values = k[0], v[0]
    if layout.cache_seqlens is not None:
        attended = flash_attn_with_kvcache(
            q.view(batch, -1, heads[0], head_dim), k_cache, v_cache,
            cache_seqlens=layout.cache_seqlens, cache_leftpad=layout.cache_leftpad,
            softmax_scale=attention.scaling, causal=True, backend=backend,
        )  # fmt: skip
    else:
        attended = flash_attn_varlen_func(
            q[0], keys[: layout.total_k], values[: layout.total_k], layout.cu_seqlens_q, layout.cu_seqlens_k,
            layout.max_seqlen_q, layout.max_seqlen_k, softmax_scale=attention.scaling, causal=True, backend=backend,
        )  # fmt: skip
    return call(attention.o_proj, attended.view(normed.shape[0], -1), layout.shape)


def project(module: nn.Module, names: tuple[str, ...], x: torch.Tensor, shape: tuple[int, int] | None) -> torch.Tensor:
    """The outputs of the named linear layers of `module`, side by side."""
    layers = [module._modules[name] for name in names]
    fused = module.__dict__.get(FUSED)
    return (FusedLinear() if fused is None else fused)(x, layers, shape)


def release_weights(module: nn.Module) -> None:
    """Takes the fused weights of a text model apart."""
    for owner, layers in _side_by_side(module):
        if (fused := owner.__dict__.get(FUSED)) is not None:
            fused.release([inside(layer) for layer in layers])
            del owner.__dict__[FUSED]


def _side_by_side(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Every module that has the linear layers of `QKV` or `GATE_UP`, wherever an adapter has moved it, and these."""
    for owner in module.modules():
        for names in (QKV, GATE_UP):
            if all(name in owner._modules for name in names):
                yield owner, [owner._modules[name] for name in names]
