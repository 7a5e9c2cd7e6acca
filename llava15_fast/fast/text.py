"""The text model's forward on the kernels: packed rows, and a KV cache written in place.

    embeds (B, L, width)
        -> rows (T, width)                      without padding
        per layer, x and the residual r carried on:
            n, r = rms_norm(x + r)
            q, k, v = n Wq^T, n Wk^T, n Wv^T
            q = qk_norm_rope(q, k, v)           writes keys and values into the cache (`kv_cache.py`)
            a = attention(q, cache)             split-KV for a few new tokens, varlen for prefill
            n, r = rms_norm(a Wo^T + r)
            x = silu_and_mul(n Wgate^T, n Wup^T) Wdown^T
        -> rms_norm(x + r) -> (B, L, width)

On few rows the norms, SwiGLU and additions are part of the linear layers (`fused_linear`), and `decode_attention` begins at
the projections: six kernel launches per layer in a
decode step of one prompt, eight of several. The first forward of a request (`request.py`) evaluates the guards and
plans it (`first_step`); later ones on the same cache take `next_step`, which checks shapes only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Qwen3Model
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from llava15_kernels.flash_decode import max_rows
from llava15_kernels.linear import pays
from llava15_kernels.qk_norm_rope import norm_and_rotate, rope_tables, write_rows
from llava15_kernels.unchecked import unchecked

from ..model.modeling import send
from ..model.releases import CACHE, as_argument
from .guards import FORWARDS, TEXT, Facts, cache_guard, call_guard, is_plain, original, stands_for
from .kv_cache import LAYERS, Loan, Pair
from .layout import Spans, TextLayout, decode_layout, decode_numbers, prompt_layout
from .request import Request, current
from .runtime import FastModule, Runtime, runtime_of, with_oom_retry

METHOD = "language_model"


@stands_for(Qwen3Model)
class FastTextModel(FastModule, Qwen3Model):
    def forward(
        self, input_ids: torch.Tensor | None = None, attention_mask: Any = None, position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None, inputs_embeds: torch.Tensor | None = None, use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        if (cache := kwargs.pop("cache", None)) is None:  # the newer name, see `releases.CACHE`
            cache = past_key_values
        call = TextCall(input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, kwargs)
        forward, runtime = original(FastTextModel, self, "forward"), runtime_of(self)
        if runtime is None:
            return forward(self, **call.inputs())
        if torch.compiler.is_compiling():
            hidden_states = compiled(self, runtime, call)
            if hidden_states is None:
                return forward(self, **call.inputs())
            return BaseModelOutputWithPast(last_hidden_state=hidden_states)
        own = forward is not FORWARDS[Qwen3Model]
        step = "the class overrides forward" if own else plan(self, runtime, call)
        if isinstance(step, str):
            runtime.record.fall_back(METHOD, step)
            return forward(self, **call.inputs())
        hidden_states = execute(self, runtime, call, step)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE: step.cache if step.returns_cache else None})


@dataclass
class TextCall:
    """The arguments of one forward."""

    input_ids: torch.Tensor | None
    attention_mask: Any
    position_ids: torch.Tensor | None
    cache: Cache | None
    inputs_embeds: torch.Tensor | None
    use_cache: bool | None
    options: dict[str, Any]

    @property
    def given(self) -> torch.Tensor:
        """Ids (B, L) or embeddings (B, L, width)."""
        return self.input_ids if self.inputs_embeds is None else self.inputs_embeds

    def inputs(self) -> dict[str, Any]:
        """For transformers' forward."""
        return {
            "input_ids": self.input_ids, "attention_mask": self.attention_mask, "position_ids": self.position_ids,
            **as_argument(self.cache), "inputs_embeds": self.inputs_embeds, "use_cache": self.use_cache, **self.options,
        }  # fmt: skip


@dataclass
class Step:
    """The plan of one forward; for a few new tokens with the layout's `numbers`, on the host, in place of a layout."""

    facts: Facts
    cache: Cache | None
    returns_cache: bool
    loan: Loan | None
    position_ids: torch.Tensor
    layout: TextLayout | None = None
    numbers: torch.Tensor | None = None


def plan(module: nn.Module, runtime: Runtime, call: TextCall) -> Step | str:
    """The plan, or the reason for a fallback."""
    request = current(module, call.cache) or Request(module)
    return next_step(module, request, call) or first_step(module, runtime, request, call)


def next_step(module: nn.Module, request: Request, call: TextCall) -> Step | None:
    """A few more tokens per prompt in a running request; None if they need a full plan."""
    loan = request.loan
    if loan is None:
        return None
    (batch, length), mask, past, buffers = call.given.shape[:2], call.attention_mask, loan.length, loan.buffers
    if not loan.is_whole or batch != buffers.batch or length > request.most_tokens:
        return None
    if mask is not None and mask.shape != (batch, past + length):
        return None
    if past < getattr(request.padding, "length", 0):  # a chunk of the prompt, which may contain padding
        return None
    if not buffers.fits(past, past + length):
        with_oom_retry(lambda: buffers.reserve(past, past + length))
    numbers, positions = decode_numbers(request.starts, past, length, buffers.capacity), _position_ids(call, past)
    return Step(request.facts(TEXT, module), call.cache, call.use_cache is not False, loan, positions, numbers=numbers)


def first_step(module: nn.Module, runtime: Runtime, request: Request, call: TextCall) -> Step | str:
    """Evaluates all guards before it touches the cache."""
    facts, use_cache, cache = request.facts(TEXT, module), call.use_cache, call.cache
    if reason := facts.guard or _input_guard(module, call):
        return reason
    config, (batch, length), n_layers = module.config, call.given.shape[:2], module.config.num_hidden_layers
    use_cache = config.use_cache if use_cache is None else use_cache  # type: ignore[assignment]
    if use_cache and cache is None:
        cache = DynamicCache(config=config)
    if cache is not None and (reason := cache_guard(cache, n_layers, LAYERS)):
        return reason
    past = 0 if cache is None else cache.get_seq_length()
    tokens = _tokens(request, call, past)
    if isinstance(tokens, str):
        return tokens
    if not tokens.is_full and not facts.plain and not facts.row_by_row:
        return "a linear layer needs the padding, which is skipped"
    loan = None
    if cache is not None:
        like = facts.weight.new_empty((batch, 0, config.num_key_value_heads, config.head_dim))
        loan = with_oom_retry(lambda: runtime.pool.borrow(cache, n_layers, like, past + length))
    # Maximum number of new tokens per prompt for split-KV attention.
    most_tokens = max_rows(config.head_dim, facts.weight.dtype) // (config.num_attention_heads // config.num_key_value_heads)
    request.begin(cache, loan, [start for start, _ in tokens.spans], most_tokens)
    step = Step(facts, cache, bool(use_cache), loan, _position_ids(call, past))
    if loan is not None and tokens.is_full and past and length <= most_tokens:
        step.numbers = decode_numbers(request.starts, past, length, loan.buffers.capacity)
    else:
        step.layout = prompt_layout(tokens, step.position_ids, None if loan is None else loan.buffers.capacity)
    return step


def compiled(module: nn.Module, runtime: Runtime, call: TextCall) -> torch.Tensor | None:
    """The forward that torch.compile captures; None for a fallback, as with a cache, which would be written in place, or a
    mask, which would be read."""
    cached = call.cache is not None or (module.config.use_cache if call.use_cache is None else call.use_cache)
    if type(module) is not FastTextModel or cached or call.attention_mask is not None or call.position_ids is not None:
        return None
    facts = Facts(TEXT, module)
    if facts.guard or _input_guard(module, call):
        return None
    batch, length = call.given.shape[:2]
    embeds = module.embed_tokens(call.input_ids) if call.inputs_embeds is None else call.inputs_embeds
    layout = prompt_layout(Spans([(0, length)] * batch, 0, length), _position_ids(call, 0), None)
    return run_layers(module, embeds, layout, None, runtime.backend_on(embeds.device), facts.plain)


def _input_guard(module: nn.Module, call: TextCall) -> str | None:
    if (call.input_ids is None) == (call.inputs_embeds is None):
        return "not exactly one of input_ids and inputs_embeds is given"
    given = call.given
    if given.ndim < 2 or given.shape[2:] != (() if call.inputs_embeds is None else module.norm.weight.shape):
        return "the input is not one token or one row per position"
    layers = () if call.cache is None or not torch.is_grad_enabled() else getattr(call.cache, "layers", ())
    sides = [getattr(layer, side, None) for layer in layers for side in ("keys", "values")]
    filled = [side for side in sides if isinstance(side, torch.Tensor)]
    return call_guard(module, given, module.norm.weight, call.options, *filled)


def _tokens(request: Request, call: TextCall, past: int) -> Spans | str:
    """Which of the new tokens are padding, or the reason for a fallback."""
    mask, positions, (batch, length) = call.attention_mask, call.position_ids, call.given.shape[:2]
    if positions is not None and (positions.ndim != 2 or positions.shape[1] != length):
        return "position_ids are not one per token"
    if positions is not None and call.cache is None and mask is None and (positions.diff(dim=-1) != 1).any():
        # Without a cache, transformers takes jumps in the positions for boundaries of packed sequences.
        return "position_ids describe packed sequences"
    total = past + length
    padding = request.padding_of(mask)
    if isinstance(padding, str):
        return padding
    if mask is not None and mask.shape != (batch, total):
        return "the attention mask is not one value per token"
    tokens = Spans([(0, total)] * batch if padding is None else padding.within(total), past, length)
    if tokens.is_empty:
        return "all tokens are padding"
    # `generate`, which passes `use_cache`, uses the logits of the last position even if it is padding.
    if call.use_cache is not None and any(end < total for end in tokens.ends):
        return "a prompt ends with padding"
    if request.reads_padding and not tokens.is_full:
        return "logits at padding are used"
    return tokens


def _position_ids(call: TextCall, past: int) -> torch.Tensor:
    """(1, B * L), on the device."""
    given, positions = call.given, call.position_ids
    if positions is None:
        positions = torch.arange(past, past + given.shape[1], device=given.device)[None]
    return positions.to(given.device).expand(given.shape[0], -1).reshape(1, -1)


def execute(module: nn.Module, runtime: Runtime, call: TextCall, step: Step) -> torch.Tensor:
    """(B, L, width), after the last norm; advances the cache once the new tokens are written."""
    embeds = module.embed_tokens(call.input_ids) if call.inputs_embeds is None else call.inputs_embeds
    hidden_states = None if step.numbers is None else _replay(module, runtime, step, embeds)
    if hidden_states is None:
        backend = runtime.record.run(METHOD, runtime.backend_on(embeds.device))
        layout, kv_buffers = step.layout, None if step.loan is None else step.loan.buffers.layers
        if layout is None:
            layout = decode_layout(step.position_ids, send(step.numbers, embeds.device), len(embeds))
        run = functools.partial(run_layers, module, embeds, layout, kv_buffers, backend, step.facts.plain)
        hidden_states = with_oom_retry(run)
    if step.loan is not None:
        step.loan.advance(embeds.shape[1])
    return hidden_states


def _replay(module: nn.Module, runtime: Runtime, step: Step, embeds: torch.Tensor) -> torch.Tensor | None:
    """The output for one new token per prompt from a CUDA graph; None if there is no graph."""
    batch, length = embeds.shape[:2]
    if length != 1 or not runtime.can_capture(embeds.device) or step.facts.fingerprint is None:
        return None
    backend, kv_buffers = runtime.backend_on(embeds.device), step.loan.buffers.layers

    def run(embeds: torch.Tensor, position_ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        return run_layers(module, embeds, decode_layout(position_ids, numbers, batch), kv_buffers, backend, True)

    # Pinned, because copies from pageable memory may synchronize.
    numbers = step.numbers.pin_memory() if embeds.device.type == "cuda" else step.numbers
    key = (METHOD, step.facts.fingerprint, backend, embeds.shape, embeds.dtype, step.position_ids.dtype)
    slot, inputs = step.loan.buffers.slot, (embeds, step.position_ids, numbers)
    hidden_states = runtime.graphs.run(slot, key, inputs, run, embeds.device, step.facts)
    if hidden_states is not None:
        runtime.record.run(METHOD, f"{backend}, CUDA graph")
    return hidden_states


def run_layers(
    module: nn.Module, embeds: torch.Tensor, layout: TextLayout, kv_buffers: Sequence[Pair] | None, backend: str, plain: bool
) -> torch.Tensor:
    """(B, L, width) -> (B, L, width) after the last norm, with zeros at padding.

    Args:
        kv_buffers: keys and values of every layer, (B, capacity, kv_heads, head_dim).
        plain: whether all linear layers compute just x W^T + b; others are called, with transformers' shapes.
    """
    x = embeds.flatten(0, 1)
    if layout.rows is not None:
        x = x[layout.rows]
    shape = None if plain or layout.rows is not None else tuple(embeds.shape[:2])
    run, layers = Run(module, layout, len(embeds), backend, shape), [*module.layers][: module.config.num_hidden_layers]
    buffers = [None if kv_buffers is None else kv_buffers[layer.self_attn.layer_idx] for layer in layers]
    if plain and backend == "triton" and pays(len(x), x.dtype):
        for layer, kv_buffer in zip(layers, buffers, strict=True):
            x = run.fused_layer(layer, x, kv_buffer)
        normed = run.norm(module.norm, x)
    else:
        norms = [layer.input_layernorm for layer in layers[1:]] + [module.norm]
        normed, residual = run.norm(layers[0].input_layernorm, x), x
        for layer, kv_buffer, next_norm in zip(layers, buffers, norms, strict=True):
            x, residual = run.layer(layer, normed, residual, kv_buffer)
            normed, residual = run.norm(next_norm, x, residual)
    if layout.rows is None:
        return normed.view(embeds.shape)
    return normed.new_zeros(embeds.shape).flatten(0, 1).index_copy_(0, layout.rows, normed).view(embeds.shape)


class Run:
    """State shared by all layers of one forward."""

    def __init__(self, module: nn.Module, layout: TextLayout, batch: int, backend: str, shape: tuple[int, int] | None) -> None:
        self.layout, self.batch, self.backend, self.shape, config = layout, batch, backend, shape, module.config
        self.ops = unchecked(backend)
        # Read once: attribute access on transformers' configurations is slow.
        self.heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        rope = layout.position_ids, module.rotary_emb.inv_freq.float(), module.rotary_emb.attention_scaling
        # The kernel computes angles on the fly; the torch backend uses precomputed tables.
        self.rope = rope_tables(*rope) if backend == "torch" else rope

    def layer(
        self, layer: nn.Module, normed: torch.Tensor, residual: torch.Tensor, kv_buffer: Pair | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A decoder layer behind its first norm: what its MLP adds, and the residual it is added to."""
        attention, mlp = layer.self_attn, layer.mlp
        projected = self.project(normed, attention.q_proj, attention.k_proj, attention.v_proj)
        (x,) = self.project(self.attend(attention, projected, kv_buffer), attention.o_proj)
        normed, residual = self.norm(layer.post_attention_layernorm, x, residual)
        (x,) = self.project(self.gated(mlp, normed), mlp.down_proj)
        return x, residual

    def fused_layer(self, layer: nn.Module, x: torch.Tensor, kv_buffer: Pair | None) -> torch.Tensor:
        """The same on few rows: (T, width) -> (T, width), the residual stream before and behind the layer."""
        attention, mlp = layer.self_attn, layer.mlp
        qkv = self.fused(x, attention.q_proj, attention.k_proj, attention.v_proj, norm=layer.input_layernorm)
        projected = qkv.split([n * attention.head_dim for n in self.heads], dim=-1)
        x = self.fused(self.attend(attention, projected, kv_buffer), attention.o_proj, residual=x)
        inner = self.fused(x, mlp.gate_proj, mlp.up_proj, norm=layer.post_attention_layernorm, gated=True)
        return self.fused(inner, mlp.down_proj, residual=x)

    def fused(
        self, x: torch.Tensor, *layers: nn.Linear, norm: nn.Module | None = None, residual: torch.Tensor | None = None,
        gated: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)
        return self.ops.fused_linear(x, weights, biases, weight, eps, residual, gated)

    def norm(self, norm: nn.Module, x: torch.Tensor, *residual: torch.Tensor) -> Any:
        return self.ops.rms_norm(x, norm.weight, norm.variance_epsilon, *residual)

    def project(self, x: torch.Tensor, *layers: nn.Module) -> list[torch.Tensor]:
        """Linear layers on the same rows (T, width), by the library, hooks and adapters included."""
        if self.shape is None:
            return [layer(x) for layer in layers]
        return [layer(x.view(*self.shape, -1)).flatten(0, 1) for layer in layers]

    def gated(self, mlp: nn.Module, normed: torch.Tensor) -> torch.Tensor:
        gate, up = self.project(normed, mlp.gate_proj, mlp.up_proj)
        if self.backend == "torch" and is_plain(mlp.gate_proj):  # no hook may hold its output
            return nn.functional.silu(gate, inplace=True).mul_(up)
        return self.ops.silu_and_mul(gate, up)

    def attend(self, attention: nn.Module, projected: Sequence[torch.Tensor], kv_buffer: Pair | None) -> torch.Tensor:
        """q, k and v, each (T, its heads * head_dim) -> (T, heads * head_dim): QK norm, RoPE, cache update, attention."""
        layout, head_dim = self.layout, attention.head_dim
        q, k, v = (x.view(1, -1, n, head_dim) for x, n in zip(projected, self.heads, strict=True))
        norms = attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon
        lengths = layout.cache_seqlens, layout.cache_leftpad
        if self.backend == "triton" and lengths[0] is not None and q.shape[1] == self.batch:  # one new token per prompt
            new = (x.view(self.batch, 1, -1, head_dim) for x in (q[0], k[0], v[0]))
            attended = self.ops.decode_attention(*new, *norms, *self.rope, *kv_buffer, *lengths, attention.scaling, 0)
            return attended.view(self.batch, -1)
        keys, values = (k[0], v[0]) if kv_buffer is None else (side.flatten(0, 1) for side in kv_buffer)
        if self.backend == "torch":
            q, k = norm_and_rotate(q, k, *norms, *self.rope)
            if kv_buffer is not None:
                write_rows(keys, values, layout.slots, k, v)
        elif kv_buffer is None:
            q, k = torch.ops.llava15.qk_norm_rope.default(q, k, *norms, *self.rope)
        else:
            cache = v, keys, values, layout.slots
            q = torch.ops.llava15.qk_norm_rope_into_cache.default(q, k, *norms, *self.rope, *cache)
        if layout.cache_seqlens is not None:
            queries = q.view(self.batch, -1, self.heads[0], head_dim)
            attended = self.ops.flash_decode(queries, *kv_buffer, *lengths, attention.scaling, True, 0)
        else:
            keys = k[0] if kv_buffer is None else keys
            covered = keys[: layout.total_k], values[: layout.total_k]
            attended = self.ops.flash_attn_varlen(q[0], *covered, *layout.segments, attention.scaling, True)
        return attended.view(len(projected[0]), -1)
