"""The vision tower on the kernels: patch embedding, blocks, merger.

    x = pixels Wpatch^T, a class row before each segment, layer_norm
    per block, x and the residual r carried on:
        n, r = layer_norm(x + r)
        q, k, v = n Wqkv^T + b,     q, k = vision_rope_2d(q, k)
        a = attention(q, k, v)                          within each segment
        n, r = layer_norm(a Wproj^T + b + r)
        x = gelu(n W1^T + b) W2^T + b
    -> x + r

Nine kernel launches per block, and no host-device copies.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from llava15_kernels.unchecked import unchecked
from llava15_kernels.vision_rope import apply_rope_tables, vision_rope_tables

from ..model.modeling import LlavaOnevision1_5VisionModel, VisionLayout
from . import limits
from .guards import EMBED, ENCODE, MERGE, Facts, Table, call_guard, original, stands_for
from .request import as_request, current
from .runtime import FastModule, Runtime, runtime_of, with_oom_retry

METHODS = {name: getattr(LlavaOnevision1_5VisionModel, name) for name in ("embed_patches", "encode", "merge_patches")}


@stands_for(LlavaOnevision1_5VisionModel)
class FastVisionModel(FastModule, LlavaOnevision1_5VisionModel):
    forward = as_request(LlavaOnevision1_5VisionModel)

    def embed_patches(self, pixel_values: torch.Tensor, layout: VisionLayout) -> torch.Tensor:
        """The convolution has one patch as its input: a matrix product, which is several times faster."""
        weight = getattr(getattr(self.patch_embed, "proj", None), "weight", None)
        x = pixel_values if weight is None else pixel_values.to(weight.dtype)
        runtime, _ = _enter(self, "embed_patches", EMBED, x, weight)
        if runtime is None:
            return original(FastVisionModel, self, "embed_patches")(self, pixel_values, layout)
        backend = runtime.record.run("visual.embed_patches", runtime.backend_on(x.device))
        hidden_states = weight.new_empty(len(layout.position_ids), len(weight))
        hidden_states[layout.cu_seqlens[:-1]] = self.class_embedding.to(weight.dtype)
        hidden_states[layout.patch_rows] = nn.functional.linear(x, weight.flatten(1))
        norm = self.pre_layernorm
        return unchecked(backend).layer_norm(hidden_states, norm.weight, norm.bias, norm.eps)

    def encode(self, hidden_states: torch.Tensor, layout: VisionLayout, **kwargs: Any) -> torch.Tensor:
        runtime, facts = _enter(self, "encode", ENCODE, hidden_states, **kwargs)
        if runtime is None:
            return original(FastVisionModel, self, "encode")(self, hidden_states, layout, **kwargs)
        if runtime.can_capture(hidden_states.device):
            replayed = _replay(self, runtime, facts, hidden_states, layout)
            if replayed is not None:
                return replayed
        backend = runtime.record.run("visual.encode", runtime.backend_on(hidden_states.device))
        sizes = layout.position_ids, layout.cu_seqlens, layout.max_seqlen
        return with_oom_retry(functools.partial(run_blocks, self, hidden_states, *sizes, backend))

    def merge_patches(self, hidden_states: torch.Tensor, layout: VisionLayout) -> tuple[torch.Tensor, torch.Tensor]:
        runtime, _ = _enter(self, "merge_patches", MERGE, hidden_states)
        if runtime is None:
            return original(FastVisionModel, self, "merge_patches")(self, hidden_states, layout)
        backend, norm = runtime.record.run("visual.merge_patches", runtime.backend_on(hidden_states.device)), self.merger.ln_q
        layer = norm.weight, norm.bias, norm.eps
        merged = unchecked(backend).patch_merge(hidden_states, *layer, layout.cu_seqlens, self.spatial_merge_size)
        return hidden_states[layout.patch_rows], self.merger.mlp(merged)


def _enter(
    module: nn.Module, name: str, table: Table, x: torch.Tensor, weight: torch.Tensor | None = None, **options: Any
) -> tuple[Runtime | None, Facts | None]:
    """Runtime and facts if the kernels run on `x`; None for a fallback, which is counted."""
    runtime, compiling = runtime_of(module), torch.compiler.is_compiling()
    if runtime is None or (compiling and type(module) is not FastVisionModel):
        return None, None
    if not compiling and original(FastVisionModel, module, name) is not METHODS[name]:
        runtime.record.fall_back(f"visual.{name}", "the class overrides a method")
        return None, None
    # A direct call of the method, or a compiled one, has no request.
    request = None if compiling else current(module)
    facts = Facts(table, module) if request is None else request.facts(table, module)
    reason = facts.guard or call_guard(module, x, facts.weight if weight is None else weight, options)
    if reason is not None:
        runtime.record.fall_back(f"visual.{name}", reason)
        return None, None
    return runtime, facts


def _replay(
    module: nn.Module, runtime: Runtime, facts: Facts, hidden_states: torch.Tensor, layout: VisionLayout
) -> torch.Tensor | None:
    """The blocks by a CUDA graph, for sizes at which kernel launches would take longer than the kernels."""
    device = hidden_states.device
    if len(hidden_states) > limits.VISION_GRAPH_ROWS or facts.fingerprint is None:
        return None
    backend = runtime.backend_on(device)
    if backend == "torch" and device.type == "cuda":  # its attention copies lengths to the host
        return None

    def step(hidden_states: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        return run_blocks(module, hidden_states, position_ids, cu_seqlens, layout.max_seqlen, backend)

    # Positions and cu_seqlens are inputs of the graph; the maximum length is baked into the launch.
    sizes = layout.lengths, hidden_states.dtype
    key = ("visual.encode", facts.fingerprint, backend, *sizes)
    inputs = hidden_states, layout.position_ids, layout.cu_seqlens
    output = runtime.graphs.run(runtime.vision_slot(sizes), key, inputs, step, device, facts)
    if output is not None:
        runtime.record.run("visual.encode", f"{backend}, CUDA graph")
    return output


def run_blocks(
    module: nn.Module, hidden_states: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int,
    backend: str,
) -> torch.Tensor:  # fmt: skip
    """(S, hidden) -> (S, hidden)."""
    ops = unchecked(backend)
    angles = position_ids, module.rotary_pos_emb.inv_freq, module.class_pos_emb
    # The kernel computes angles on the fly; the torch backend uses precomputed tables.
    tables = vision_rope_tables(*angles) if backend == "torch" else None

    def norm(layer: nn.LayerNorm, *x: torch.Tensor) -> Any:
        return ops.layer_norm(x[0], layer.weight, layer.bias, layer.eps, *x[1:])

    def attend(attention: nn.Module, normed: torch.Tensor) -> torch.Tensor:
        query, key, value = attention.qkv(normed).view(-1, 3, attention.num_heads, attention.head_dim).unbind(1)
        if tables is None:
            query, key = torch.ops.llava15.vision_rope_2d.default(query, key, *angles)
        else:
            query, key = apply_rope_tables(query, key, *tables)
        segments = cu_seqlens, cu_seqlens, max_seqlen
        attended = ops.flash_attn_varlen(query, key, value, *segments, attention.scaling, False)
        return attention.proj(attended.view(normed.shape))

    blocks = module.blocks
    normed, residual = norm(blocks[0].norm1, hidden_states), hidden_states
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        normed, residual = norm(block.norm2, attend(block.attn, normed), residual)
        hidden_states = block.mlp.fc2(ops.gelu(block.mlp.fc1(normed), None))
        if following is not None:
            normed, residual = norm(following.norm1, hidden_states, residual)
    return hidden_states + residual
