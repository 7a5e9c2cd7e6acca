"""The forwards that `patch` puts in place of a module's own.

Each has the name and the signature of what it replaces, takes the module first, and ends in one of two ways: the kernels of
`llava15_kernels` run, or `Site.start` gives a reason why they must not and the class's own method runs instead.
They live at module level and find everything on the module they are given, so that a deep copy or a pickle of a patched
model computes with its own weights.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from llava15_kernels import flash_attn_varlen_func, patch_merge, rms_norm, rms_norm_ref, vision_rope_2d
from llava15_kernels._dispatch import FLOAT_DTYPES, default_backend
from llava15_kernels.vision_rope import apply_rope_tables, vision_rope_tables

from .modeling import VisionLayout

SITES = "_llava15_sites"
LAYOUT = "llava15_layout"
GRADIENT = "a gradient is needed"
HOOKED = "a forward hook sits on a module that the fused call would skip"


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

    def start(self, module: nn.Module, x: torch.Tensor, *skipped: nn.Module) -> str | None:
        """The backend for a call on `x`, or None where the original method must run; either is counted.

        `skipped` are the modules inside `module` whose `__call__` the fused code does not go through.
        """
        if records_gradient(module, x):
            return self.fall_back(GRADIENT)
        if x.dtype not in FLOAT_DTYPES:
            return self.fall_back(f"no kernel for {x.dtype}")
        if any(has_user_hooks(child) for child in skipped):
            return self.fall_back(HOOKED)
        backend = default_backend(x.device) if self.backend == "auto" else self.backend
        if not torch.compiler.is_compiling():
            self.ran[backend] += 1
        return backend

    def fall_back(self, reason: str) -> None:
        if not torch.compiler.is_compiling():
            self.fallbacks[reason] += 1


def site_of(module: nn.Module, attribute: str = "forward") -> Site:
    return module.__dict__[SITES][attribute]


def records_gradient(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether autograd would record this call. Parameters are only looked at while gradients are on."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters()))


def has_user_hooks(module: nn.Module) -> bool:
    """Whether someone listens to this module, or accelerate brings its weights only when it is called.

    transformers' own recording hooks do not count: they stay, dormant, once hidden states were asked for.
    """
    if hasattr(module, "_hf_hook"):
        return True
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)


class RopeInputs(NamedTuple):
    """What the 2D RoPE kernel makes its angles from, in the place of the (cos, sin) tables."""

    position_ids: torch.Tensor
    inv_freq: torch.Tensor
    class_pos_emb: torch.Tensor


def vision_rotary_forward(
    module: nn.Module, position_ids: torch.Tensor, class_pos_emb: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | RopeInputs:
    """Under the kernel, angles are made where they are used and no table is written."""
    backend = site_of(module).start(module, class_pos_emb)
    if backend == "triton":
        return RopeInputs(position_ids, module.inv_freq, class_pos_emb)
    return type(module).forward(module, position_ids, class_pos_emb)


def vision_attention_forward(
    module: nn.Module,
    hidden_states: torch.Tensor,
    layout: VisionLayout,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | RopeInputs,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    site = site_of(module)
    fused = isinstance(position_embeddings, RopeInputs)
    if kwargs.get("output_attentions") or module.config.output_attentions:
        backend = site.fall_back("attention weights were asked for")
    elif module.training and module.attention_dropout:
        backend = site.fall_back("attention dropout is on")
    else:
        backend = site.start(module, hidden_states)
    if backend is None:
        tables = vision_rope_tables(*position_embeddings) if fused else position_embeddings
        return type(module).forward(module, hidden_states, layout, tables, **kwargs)

    query, key, value = module.qkv(hidden_states).view(-1, 3, module.num_heads, module.head_dim).unbind(1)
    if fused:
        query, key = vision_rope_2d(query, key, *position_embeddings, backend=backend)
    else:
        query, key = apply_rope_tables(query, key, *position_embeddings)
    # accelerate moves tensors between the devices of a split model, but not what a layout holds.
    cu_seqlens = layout.cu_seqlens.to(query.device)
    attended = flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        layout.max_seqlen,
        layout.max_seqlen,
        softmax_scale=module.scaling,
        backend=backend,
    )
    return module.proj(attended.view(hidden_states.shape)), None


def merge_patches(module: nn.Module, hidden_states: torch.Tensor, layout: VisionLayout) -> tuple[torch.Tensor, torch.Tensor]:
    merger = module.merger
    backend = site_of(module, "merge_patches").start(merger, hidden_states, merger, merger.ln_q)
    if backend is None:
        return type(module).merge_patches(module, hidden_states, layout)
    merged = patch_merge(
        hidden_states,
        merger.ln_q.weight,
        merger.ln_q.bias,
        merger.ln_q.eps,
        layout.cu_seqlens.to(hidden_states.device),
        module.spatial_merge_size,
        backend=backend,
    )
    return hidden_states[layout.patch_rows.to(hidden_states.device)], merger.mlp(merged)


def rms_norm_forward(module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    backend = site_of(module).start(module, hidden_states)
    if backend is None:
        return type(module).forward(module, hidden_states)
    if backend == "torch":
        return rms_norm_ref(hidden_states, module.weight, module.variance_epsilon)
    return rms_norm(hidden_states, module.weight, module.variance_epsilon, backend=backend)


def decoder_layer_forward(
    module: nn.Module,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Cache | None = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The attention's residual addition and the norm after it are one call."""
    norm = module.post_attention_layernorm
    inputs = {
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "use_cache": use_cache,
        "position_embeddings": position_embeddings,
        **kwargs,
    }
    backend = site_of(module).start(norm, hidden_states, norm)
    if backend is None:
        return type(module).forward(module, hidden_states, **inputs)
    attended, _ = module.self_attn(hidden_states=module.input_layernorm(hidden_states), **inputs)
    # Under autocast the two differ, and the sum takes the wider one.
    dtype = torch.promote_types(attended.dtype, hidden_states.dtype)
    arguments = (attended.to(dtype), norm.weight, norm.variance_epsilon, hidden_states.to(dtype))
    normed, residual = rms_norm_ref(*arguments) if backend == "torch" else rms_norm(*arguments, backend=backend)
    return residual + module.mlp(normed)


@dataclass(frozen=True)
class TextLayout:
    """A padded (B, L) batch as segments of its flattened rows: per prompt its padding and its tokens, in either order.

    Padding is a segment of its own, so that no token sees it and its rows stay finite.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int

    @classmethod
    def for_prefill(
        cls,
        module: nn.Module,
        inputs_embeds: torch.Tensor,
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        use_cache: bool | None,
        options: dict[str, Any],
    ) -> TextLayout | str:
        """The layout of a first forward, or the reason why transformers' own attention has to run."""
        if records_gradient(module, inputs_embeds):
            return GRADIENT
        if inputs_embeds.dtype not in FLOAT_DTYPES:
            return f"no kernel for {inputs_embeds.dtype}"
        if past_key_values is not None and past_key_values.get_seq_length() != 0:
            return "the cache is already filled (decoding)"
        if options.get("output_attentions", module.config.output_attentions):
            return "attention weights were asked for"
        if module.training and module.config.attention_dropout:
            return "attention dropout is on"
        if module.has_sliding_layers or options.get("is_causal") is False:
            return "the attention is not plainly causal"
        batch, length = inputs_embeds.shape[:2]
        if attention_mask is None:
            # Without a cache transformers reads jumps in the positions as the borders of packed sequences.
            cached = past_key_values is not None or (module.config.use_cache if use_cache is None else use_cache)
            if not cached and position_ids is not None and bool((position_ids.diff(dim=-1) != 1).any()):
                return "the positions describe packed sequences"
            bounds = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=inputs_embeds.device)
            return cls(bounds, length)
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != (batch, length):
            return "the attention mask is not one flag per token"
        pads = padding_of(attention_mask)
        if pads is None:
            return "the attention mask has holes"
        lengths = [part for pad in pads for part in ((pad, length - pad) if pad >= 0 else (length + pad, -pad))]
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(bounds.to(inputs_embeds.device, non_blocking=True), max(lengths))


def padding_of(attention_mask: torch.Tensor) -> list[int] | None:
    """Per row the number of pads, positive on the left and negative on the right; None if they are elsewhere.

    One copy to the host.
    """
    valid = attention_mask.bool()
    index = torch.arange(valid.shape[1], device=valid.device)
    tokens = valid.sum(-1, keepdim=True)
    left = (valid == (index >= valid.shape[1] - tokens)).all(-1)
    right = (valid == (index < tokens)).all(-1)
    pads = []
    for count, on_left, on_right in torch.stack([tokens[:, 0], left.long(), right.long()], dim=1).tolist():
        if not on_left and not on_right:
            return None
        pads.append(valid.shape[1] - count if on_left else count - valid.shape[1])
    return pads


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
    """Turns the padding mask into segments once per forward; transformers' own forward does the rest, without a mask."""
    embeds = inputs_embeds if inputs_embeds is not None else module.embed_tokens(input_ids)
    layout = TextLayout.for_prefill(module, embeds, attention_mask, position_ids, past_key_values, use_cache, kwargs)
    site = site_of(module)
    if isinstance(layout, str):
        site.fall_back(layout)
    else:
        site.start(module, embeds)
        attention_mask = {"full_attention": None}
    return type(module).forward(
        module,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=embeds,
        use_cache=use_cache,
        **kwargs,
        **{LAYOUT: layout},
    )


def text_attention_forward(
    module: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    layout = kwargs.pop(LAYOUT, "called without the patched text model")
    site = site_of(module)
    if isinstance(layout, str):
        site.fall_back(layout)
        return type(module).forward(module, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
    # The mask is gone, so the original cannot run any more. The text model found no gradient to compute; should one be
    # needed here after all, the torch backend is differentiable.
    backend = site.start(module, hidden_states) or "torch"
    batch, length, _ = hidden_states.shape
    shape = (batch, length, -1, module.head_dim)
    query = module.q_norm(module.q_proj(hidden_states).view(shape))
    key = module.k_norm(module.k_proj(hidden_states).view(shape))
    value = module.v_proj(hidden_states).view(shape)
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings, unsqueeze_dim=2)
    if past_key_values is not None:
        past_key_values.update(key.transpose(1, 2), value.transpose(1, 2), module.layer_idx)
    cu_seqlens = layout.cu_seqlens.to(query.device)
    attended = flash_attn_varlen_func(
        # Under autocast the norms' float32 weights widen queries and keys, values stay narrow.
        query.flatten(0, 1).to(value.dtype),
        key.flatten(0, 1).to(value.dtype),
        value.flatten(0, 1),
        cu_seqlens,
        cu_seqlens,
        layout.max_seqlen,
        layout.max_seqlen,
        softmax_scale=module.scaling,
        causal=True,
        backend=backend,
    )
    return module.o_proj(attended.view(batch, length, -1)), None
