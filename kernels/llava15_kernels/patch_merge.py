"""The patch merger's input in one pass: class rows dropped, LayerNorm, 2x2 merge.

A packed sequence holds, for each segment, one class row and then its patches in merge-block order. For patch p, in segment s:

    row    = p + s + 1                                        s + 1 class rows stand before it
    out[p] = (x[row] - mean(x[row])) * rsqrt(var(x[row]) + eps) * weight + bias        in float32, rounded once

Patches of one 2x2 block are consecutive, so out (N, C) *is* the merged matrix (N / 4, 4 C): the merge is a view.

    x               (S, C)              S = N + segments, C up to 16384
    cu_seqlens      (segments + 1,) int32, counting the class rows
    weight, bias    (C,)
    out             (N / merge^2, merge^2 * C)
"""

from __future__ import annotations

from typing import cast

import torch
import triton
import triton.language as tl

from ._dispatch import LAUNCH_OPTIONS, Backend, cdiv, check_bounds, choose_backend, launching
from ._registry import Cost, nbytes, operator
from .norms import MAX_WIDTH, RowConfig, _layer_norm_rows, layer_norm_ref


@triton.jit(do_not_specialize=["n_patches", "n_segments"], do_not_specialize_on_alignment=["cu_seqlens_ptr"])
def _patch_merge_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, cu_seqlens_ptr,
    stride_x, n_patches, n_segments, eps,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SEGMENTS: tl.constexpr,
):  # fmt: skip
    patches = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)[None, :]

    # A patch lies after as many whole segments as end, in patches, at or before it.
    segment = tl.zeros((BLOCK_M,), dtype=tl.int64)
    for start in range(0, n_segments, BLOCK_SEGMENTS):
        index = start + tl.arange(0, BLOCK_SEGMENTS)
        in_range = index < n_segments
        ends = tl.load(cu_seqlens_ptr + index + 1, mask=in_range, other=0) - (index + 1)
        passed = in_range[None, :] & (ends[None, :] <= patches[:, None])
        segment += tl.sum(passed.to(tl.int64), axis=1)

    mask = (patches < n_patches)[:, None] & (columns < N)
    rows = (patches + segment + 1)[:, None]
    x = tl.load(x_ptr + rows * stride_x + columns, mask=mask, other=0.0).to(tl.float32)
    y = _layer_norm_rows(x, mask, columns, weight_ptr, bias_ptr, eps, N)
    tl.store(out_ptr + patches[:, None] * N + columns, y.to(out_ptr.dtype.element_ty), mask=mask)


def _empty_output(x: torch.Tensor, weight: torch.Tensor, cu_seqlens: torch.Tensor, merge_size: int) -> torch.Tensor:
    n_patches = x.shape[0] - (cu_seqlens.shape[0] - 1)
    block = merge_size**2
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return torch.empty((n_patches // block, block * x.shape[1]), dtype=dtype, device=x.device)


def _cost(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, _: float, cu_seqlens: torch.Tensor, size: int) -> Cost:
    patches = nbytes(x) - (cu_seqlens.shape[0] - 1) * x.shape[1] * x.element_size()
    written = nbytes(_empty_output(x.to("meta"), weight, cu_seqlens, size))
    return Cost(1, patches + nbytes(weight, bias, cu_seqlens), written)


@operator(
    "patch_merge(Tensor x, Tensor weight, Tensor bias, float eps, Tensor cu_seqlens, int merge_size) -> Tensor",
    fake=lambda x, weight, bias, eps, cu_seqlens, merge_size: _empty_output(x, weight, cu_seqlens, merge_size),
    cost=_cost,
)
def _patch_merge(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, cu_seqlens: torch.Tensor, merge_size: int
) -> torch.Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = _empty_output(x, weight, cu_seqlens, merge_size)
    if out.numel() == 0:
        return out
    width, n_segments = x.shape[1], cu_seqlens.shape[0] - 1
    config = RowConfig.choose(width)
    with launching("patch_merge", x):
        _patch_merge_kernel[(cdiv(out.numel() // width, config.block_m),)](
            x, weight.contiguous(), bias.contiguous(), out, cu_seqlens.contiguous(),
            x.stride(0), out.numel() // width, n_segments, eps,
            N=width, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_SEGMENTS=128,
            num_warps=config.num_warps, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return out


def patch_merge(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    cu_seqlens: torch.Tensor,
    merge_size: int = 2,
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """The merged, normalised patches of a packed vision sequence.

    Args:
        x: (S, C), each segment a class row followed by its patches; float16, bfloat16 or float32.
        weight, bias: (C,) of the LayerNorm.
        eps: added to the variance.
        cu_seqlens: (segments + 1,) int32, class rows counted; each segment holds a multiple of merge_size^2 patches.
        merge_size: patches per side of a block.
        backend: see `_dispatch`.

    Returns:
        (N / merge_size^2, merge_size^2 * C) in the promoted dtype of `x` and `weight`, N = S - segments.

    Raises:
        ValueError: shapes that do not fit, tensors on different devices, or C above 16384.
        TypeError: an unsupported dtype.
    """
    if x.ndim != 2 or weight.shape != x.shape[1:] or bias.shape != x.shape[1:] or not 0 < x.shape[1] <= MAX_WIDTH:
        raise ValueError(
            f"patch_merge: x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)}, expected (S, C), (C,), "
            f"(C,), C <= {MAX_WIDTH}"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"patch_merge: cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, expected int32 (segments + 1,)"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(f"patch_merge: cu_seqlens on {cu_seqlens.device}, x on {x.device}, expected one device")
    if merge_size < 1:
        raise ValueError(f"patch_merge: merge_size {merge_size}, expected at least 1")
    check_bounds("patch_merge", "cu_seqlens", cu_seqlens, x.shape[0])
    n_patches = x.shape[0] - (cu_seqlens.shape[0] - 1)
    if n_patches < 0 or n_patches % merge_size**2:
        raise ValueError(
            f"patch_merge: {x.shape[0]} rows with {cu_seqlens.shape[0] - 1} class rows leave {n_patches} patches, expected a "
            f"multiple of {merge_size**2}"
        )
    if choose_backend("patch_merge", backend, x, weight, bias) == "torch":
        return patch_merge_ref(x, weight, bias, eps, cu_seqlens, merge_size)
    return torch.ops.llava15.patch_merge(x, weight, bias, eps, cu_seqlens, merge_size)


def patch_merge_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    cu_seqlens: torch.Tensor,
    merge_size: int = 2,
) -> torch.Tensor:
    """The eager reference."""
    is_patch = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    is_patch[cu_seqlens[:-1].long()] = False
    normed = cast(torch.Tensor, layer_norm_ref(x[is_patch], weight, bias, eps))
    return normed.reshape(-1, merge_size**2 * x.shape[1])
