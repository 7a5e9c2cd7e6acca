"""RMSNorm, optionally fused with the residual addition before it.

    s = x + residual                                  rounded to the dtype of x        (only with `residual`)
    n = s * rsqrt(mean(s^2) + eps)                    in float32, rounded to the dtype of x
    y = n * weight

The two roundings are those of Hugging Face's `Qwen3RMSNorm`; Zhang and Sennrich, https://arxiv.org/abs/1910.07467.

    x, residual, y, s   (..., N)      N up to 16384, last dimension contiguous
    weight              (N,)

One pass: a row is read once, kept in registers, written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._dispatch import Backend, choose_backend, device_guard

MAX_WIDTH = 16384


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr,
    stride_x, stride_residual, n_rows, eps,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    # int64 before the first multiplication: rows * stride passes 2^31 on long packs.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < n_rows) & (columns < N)
    dtype = x_ptr.dtype.element_ty

    x = tl.load(x_ptr + rows * stride_x + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + rows * stride_residual + columns, mask=mask, other=0.0)
        rounded = (x + residual.to(tl.float32)).to(dtype)
        tl.store(sum_ptr + rows * N + columns, rounded, mask=mask)
        x = rounded.to(tl.float32)
    # Some compilers pass Python floats as float64, which would turn the whole row into float64.
    mean_square = tl.sum(x * x, axis=1, keep_dims=True) / N
    normed = x * tl.rsqrt(mean_square + tl.cast(eps, tl.float32))
    weight = tl.load(weight_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    y = normed.to(dtype).to(tl.float32) * weight
    tl.store(y_ptr + rows * N + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., N) -> (rows, N) with contiguous rows; a view wherever the strides allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    width = x.shape[-1]
    rows = _as_rows(x)
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y, total
    residual_rows = rows if residual is None else _as_rows(residual)
    block_n = triton.next_power_of_2(width)
    # About 2048 elements a program keep 4 warps busy on narrow rows (q/k heads); wide rows get one program each.
    block_m = max(1, 2048 // block_n)
    with device_guard(x):
        _rms_norm_kernel[(triton.cdiv(rows.shape[0], block_m),)](
            rows, residual_rows, weight.contiguous(), y, total if total is not None else y,
            rows.stride(0), residual_rows.stride(0), rows.shape[0], eps,
            N=width, BLOCK_M=block_m, BLOCK_N=block_n, HAS_RESIDUAL=residual is not None,
            num_warps=4 if block_n <= 4096 else 8,
        )  # fmt: skip
    return y, total


torch.library.define("llava15::rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor")
torch.library.define("llava15::add_rms_norm", "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)")


@torch.library.impl("llava15::rms_norm", ("cpu", "cuda"))
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _launch(x, None, weight, eps)[0]


@torch.library.impl("llava15::add_rms_norm", ("cpu", "cuda"))
def _(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch(x, residual, weight, eps)


@torch.library.register_fake("llava15::rms_norm")
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)


@torch.library.register_fake("llava15::add_rms_norm")
def _(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    return y, torch.empty(x.shape, dtype=x.dtype, device=x.device)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of `x`, or of `x + residual`.

    Args:
        x: (..., N) in float16, bfloat16 or float32.
        weight: (N,).
        eps: added to the mean square.
        residual: as `x`; if given, it is added first.
        backend: see `_dispatch`.

    Returns:
        y (..., N) in the promoted dtype of `x` and `weight`; with `residual` the pair (y, x + residual).

    Raises:
        ValueError: shapes that do not fit, tensors on different devices, or N above 16384.
        TypeError: an unsupported dtype.
    """
    if x.ndim == 0 or weight.shape != x.shape[-1:] or not 0 < x.shape[-1] <= MAX_WIDTH:
        raise ValueError(
            f"rms_norm: x {tuple(x.shape)} with weight {tuple(weight.shape)}, expected (..., N) and (N,), N <= {MAX_WIDTH}"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"rms_norm: residual {tuple(residual.shape)} {residual.dtype} must be as x {tuple(x.shape)} {x.dtype}")
    if choose_backend("rms_norm", backend, x, weight, residual) == "torch":
        return rms_norm_ref(x, weight, eps, residual)
    if residual is None:
        return torch.ops.llava15.rms_norm(x, weight, eps)
    return torch.ops.llava15.add_rms_norm(x, residual, weight, eps)


def rms_norm_ref(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The eager reference, with the same roundings. In float64 it computes in float64."""
    total = x if residual is None else x + residual
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = weight * normed.to(total.dtype)
    return y if residual is None else (y, total)
