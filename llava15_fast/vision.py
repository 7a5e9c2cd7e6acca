"""The vision tower over the kernels: patch embedding, blocks, merger.

    x = pixels Wpatch^T, a class row before each segment, layer_norm
    per block, x and the residual r carried on:
        n, r = layer_norm(x + r)
        q, k, v = n Wqkv^T + b,     q, k = vision_rope_2d(q, k)
        a = attention(q, k, v)                          inside each segment
        n, r = layer_norm(a Wproj^T + b + r)
        x = gelu(n W1^T + b) W2^T + b
    -> x + r

Nine launches a block, and no copy between host and device.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake
from transformers.activations import ACT2FN

from llava15_kernels import flash_attn_varlen_func, gelu, layer_norm, patch_merge, vision_rope_2d
from llava15_kernels.vision_rope import apply_rope_tables, vision_rope_tables

from .fusing import is_plain
from .graphs import GRAPHS, with_room
from .modeling import (
    LlavaOnevision1_5VisionAttention,
    LlavaOnevision1_5VisionBlock,
    LlavaOnevision1_5VisionMLP,
    LlavaOnevision1_5VisionPatchEmbed,
    LlavaOnevision1_5VisionPatchMerger,
    LlavaOnevision1_5VisionRotaryEmbedding,
    VisionLayout,
)
from .parts import Part, activation_obstacle, obstacle
from .refusal import attention_refusal, refusal, surroundings
from .sites import site_of
from .snapshot import SEEN

GRAPH_ROWS = 3300
"""Rows up to which the blocks are captured: two images of 560 x 560. Beyond, the device takes longer than the host (a model:
about 225 launches of 15 us against 2.3 ms for 1601 rows and 15.6 ms for 6401)."""


GELU = {nn.GELU, type(ACT2FN["gelu"])}

EMBED_PARTS = (
    Part("patch_embed", LlavaOnevision1_5VisionPatchEmbed, ("pixel_values",)),
    Part("patch_embed.proj", nn.Conv2d, ("input",)),
    Part("pre_layernorm", nn.LayerNorm, ("input",)),
)
ENCODE_PARTS = (
    Part("rotary_pos_emb", LlavaOnevision1_5VisionRotaryEmbedding, ("position_ids", "class_pos_emb")),
    Part("blocks.*", LlavaOnevision1_5VisionBlock, ("hidden_states", "args", "kwargs")),
    Part("blocks.*.norm1", nn.LayerNorm, ("input",)),
    Part("blocks.*.norm2", nn.LayerNorm, ("input",)),
    Part(
        "blocks.*.attn",
        LlavaOnevision1_5VisionAttention,
        ("hidden_states", "layout", "position_embeddings", "kwargs"),
    ),
    Part("blocks.*.mlp", LlavaOnevision1_5VisionMLP, ("hidden_states",)),
)
MERGE_PARTS = (
    Part("merger", LlavaOnevision1_5VisionPatchMerger, ("hidden_states",)),
    Part("merger.ln_q", nn.LayerNorm, ("input",)),
)
"""What the fused code stands for; those above come first."""


class Seen(NamedTuple):
    """What a look at the tower has shown, and true until it changes (`snapshot.py`).

    Attributes:
        embed, encode, merge: why the original of each has to run, or None.
        fixed: what captured blocks have fixed: addresses of weights, and numbers; None if a linear layer may compute
            differently every time, or nobody can know.
    """

    embed: str | None
    encode: str | None
    merge: str | None
    fixed: tuple[float, ...] | None


def look_at(module: nn.Module) -> Seen:
    return find(module) if torch.compiler.is_compiling() else module.__dict__[SEEN].of(module)


def find(module: nn.Module) -> Seen:
    reason = obstacle(module, ENCODE_PARTS) or _peculiarity(module)
    return Seen(
        embed=obstacle(module, EMBED_PARTS),
        encode=reason,
        merge=obstacle(module, MERGE_PARTS),
        fixed=None if reason or torch.compiler.is_compiling() else _fixed(module),
    )


def _peculiarity(module: nn.Module) -> str | None:
    for block in module.blocks:
        if reason := activation_obstacle(block.mlp.act, GELU):
            return reason
        if block.attn.training and block.attn.attention_dropout:
            return "attention dropout is on"
    return None


def _fixed(module: nn.Module) -> tuple[float, ...] | None:
    """See `Seen`; every part is what it should be."""
    weights, numbers = [module.class_pos_emb, module.rotary_pos_emb.inv_freq], []
    for block in module.blocks:
        linears = [block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2]
        if not all(map(is_plain, linears)):
            return None
        weights += [value for part in (*linears, block.norm1, block.norm2) for value in part._parameters.values()]
        numbers += [block.attn.scaling, block.norm1.eps, block.norm2.eps]
    weights = [weight for weight in weights if weight is not None]
    return None if any(map(is_fake, weights)) else (*(weight.data_ptr() for weight in weights), *numbers)


def embed_patches(module: nn.Module, pixel_values: torch.Tensor, layout: VisionLayout) -> torch.Tensor:
    """The convolution sees one patch at a time: a matrix product, several times faster as one."""
    site, norm, embedding = site_of(module, "embed_patches"), module.pre_layernorm, module.patch_embed
    reason = surroundings() or look_at(module).embed
    if reason is None:
        weight = embedding.proj.weight
        pixel_values = pixel_values.to(weight.dtype)
        reason = refusal(module, pixel_values, weight, {})
    if reason is not None:
        site.fall_back(reason)
        return type(module).embed_patches(module, pixel_values, layout)
    backend = site.start(pixel_values.device)
    hidden_states = weight.new_empty(len(layout.position_ids), len(weight))
    hidden_states[layout.cu_seqlens[:-1]] = module.class_embedding.to(weight.dtype)
    hidden_states[layout.patch_rows] = nn.functional.linear(pixel_values, weight.flatten(1))
    return layer_norm(hidden_states, norm.weight, norm.bias, norm.eps, backend=backend)


def encode(module: nn.Module, hidden_states: torch.Tensor, layout: VisionLayout, **kwargs: Any) -> torch.Tensor:
    site = site_of(module, "encode")
    if reason := surroundings() or (seen := look_at(module)).encode or _encode_refusal(module, hidden_states, kwargs):
        site.fall_back(reason)
        return type(module).encode(module, hidden_states, layout, **kwargs)
    replayed = _replay(module, seen, hidden_states, layout)
    if replayed is not None:
        return replayed
    backend = site.start(hidden_states.device)
    sizes = layout.position_ids, layout.cu_seqlens, layout.max_seqlen
    return with_room(functools.partial(run_blocks, module, hidden_states, *sizes, backend))


def _replay(module: nn.Module, seen: Seen, hidden_states: torch.Tensor, layout: VisionLayout) -> torch.Tensor | None:
    """The blocks by a CUDA graph, where the host would take longer to launch them than the device to run them."""
    graphs, site, device = module.__dict__.get(GRAPHS), site_of(module, "encode"), hidden_states.device
    if graphs is None or seen.fixed is None or len(hidden_states) > GRAPH_ROWS or not graphs.can_capture(device):
        return None
    backend = site.backend_on(device)
    if backend == "torch" and device.type == "cuda":  # its attention reads lengths back from the device
        return None

    def step(hidden_states: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        return run_blocks(module, hidden_states, position_ids, cu_seqlens, layout.max_seqlen, backend)

    # The grids themselves are inputs; the longest segment is a number in the launch.
    key = (backend, layout.lengths, hidden_states.dtype, seen.fixed)
    output = graphs.run(key, (hidden_states, layout.position_ids, layout.cu_seqlens), step, device)
    if output is not None:
        site.start(device, "CUDA graph")
    return output


def run_blocks(
    module: nn.Module,
    hidden_states: torch.Tensor,
    position_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    backend: str,
) -> torch.Tensor:
    """(S, hidden) -> (S, hidden)."""
    angles = position_ids, module.rotary_pos_emb.inv_freq, module.class_pos_emb
    # Without the kernel, which makes its angles where it uses them, the tables are made once.
    tables = vision_rope_tables(*angles) if backend == "torch" else None

    def norm(layer: nn.LayerNorm, *x: torch.Tensor) -> Any:
        return layer_norm(x[0], layer.weight, layer.bias, layer.eps, *x[1:], backend=backend)

    def attend(attention: nn.Module, normed: torch.Tensor) -> torch.Tensor:
        query, key, value = attention.qkv(normed).view(-1, 3, attention.num_heads, attention.head_dim).unbind(1)
        if tables is None:
            query, key = vision_rope_2d(query, key, *angles, backend=backend)
        else:
            query, key = apply_rope_tables(query, key, *tables)
        attended = flash_attn_varlen_func(
            query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
            softmax_scale=attention.scaling, backend=backend,
        )  # fmt: skip
        return attention.proj(attended.view(normed.shape))

    blocks = module.blocks
    normed, residual = norm(blocks[0].norm1, hidden_states), hidden_states
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        normed, residual = norm(block.norm2, attend(block.attn, normed), residual)
        hidden_states = block.mlp.fc2(gelu(block.mlp.fc1(normed), backend=backend))
        if following is not None:
            normed, residual = norm(following.norm1, hidden_states, residual)
    return hidden_states + residual


def _encode_refusal(module: nn.Module, hidden_states: torch.Tensor, options: dict[str, Any]) -> str | None:
    """Why the original has to run, as far as configuration and options say; None if the kernels can."""
    own = attention_refusal(module.config._attn_implementation)
    return own or refusal(module, hidden_states, module.blocks[0].norm1.weight, options)


def merge_patches(module: nn.Module, hidden_states: torch.Tensor, layout: VisionLayout) -> tuple[torch.Tensor, torch.Tensor]:
    merger, site = module.merger, site_of(module, "merge_patches")
    reason = surroundings() or look_at(module).merge
    if reason := reason or refusal(module, hidden_states, merger.ln_q.weight, {}):
        site.fall_back(reason)
        return type(module).merge_patches(module, hidden_states, layout)
    merged = patch_merge(
        hidden_states,
        merger.ln_q.weight,
        merger.ln_q.bias,
        merger.ln_q.eps,
        layout.cu_seqlens,
        module.spatial_merge_size,
        backend=site.start(hidden_states.device),
    )
    return hidden_states[layout.patch_rows], merger.mlp(merged)
