"""The operations without validation, for a caller whose own guards have established what the public functions check.

    ops = unchecked("triton")            the registered operators
    ops = unchecked("torch")             their eager counterparts
    y = ops.rms_norm(x, weight, eps)

Validation is a third of a call's host time. Arguments are positional, and complete: there are no defaults to work out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import flash_attn, flash_decode, norms
from .activation import gelu_ref, silu_and_mul_ref
from .decode_attention import decode_attention_ref
from .linear import fused_linear_ref
from .patch_merge import patch_merge_ref


@dataclass
class Operations:
    """
    Attributes:
        rms_norm: (x, weight, eps[, residual]) -> y or (y, sum)
        layer_norm: (x, weight, bias, eps[, residual]) -> y or (y, sum)
        silu_and_mul: (gate, up) -> y
        gelu: (x, bias or None) -> y
        flash_attn_varlen: (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, softmax_scale, causal) -> out
        flash_decode: (q, k_cache, v_cache, cache_seqlens, cache_leftpad, softmax_scale, causal, num_splits) -> out
        patch_merge: (x, weight, bias, eps, cu_seqlens, merge_size) -> merged
        decode_attention: (q, k, v, q_weight, k_weight, eps, position_ids, inv_freq, scaling, k_cache, v_cache, cache_seqlens,
            cache_leftpad, softmax_scale, num_splits) -> out
        fused_linear: (x, weights, biases, norm_weight, eps, residual, gated) -> y
    """

    rms_norm: Callable[..., Any]
    layer_norm: Callable[..., Any]
    silu_and_mul: Callable[..., torch.Tensor]
    gelu: Callable[..., torch.Tensor]
    flash_attn_varlen: Callable[..., torch.Tensor]
    flash_decode: Callable[..., torch.Tensor]
    patch_merge: Callable[..., torch.Tensor]
    decode_attention: Callable[..., torch.Tensor]
    fused_linear: Callable[..., torch.Tensor]


_ops = torch.ops.llava15
_TRITON = Operations(
    norms.rms_norm_triton, norms.layer_norm_triton, _ops.silu_and_mul.default, _ops.gelu.default,
    _ops.flash_attn_varlen.default, _ops.flash_decode.default, _ops.patch_merge.default, _ops.decode_attention.default,
    _ops.fused_linear.default,
)  # fmt: skip
_TORCH = Operations(
    norms.rms_norm_torch, norms.layer_norm_ref, silu_and_mul_ref, gelu_ref,
    flash_attn.flash_attn_varlen_torch, flash_decode.flash_decode_torch, patch_merge_ref, decode_attention_ref,
    fused_linear_ref,
)  # fmt: skip


def unchecked(backend: str) -> Operations:
    """The operations of `backend`, "triton" or "torch", which the caller has chosen (`default_backend`)."""
    return _TORCH if backend == "torch" else _TRITON
