"""RMSNorm and LayerNorm over the last dimension, optionally fused with the residual addition before them.

    s = x + residual                                                rounded to the dtype of x        (only with `residual`)

    rms_norm:    n = s * rsqrt(mean(s^2) + eps)                     in float32, rounded to the dtype of x
                 y = n * weight
    layer_norm:  y = (s - mean(s)) * rsqrt(var(s) + eps) * weight + bias        in float32, rounded once

The two roundings of RMSNorm are those of Hugging Face's `Qwen3RMSNorm`, LayerNorm's single one is torch's.
Zhang and Sennrich, https://arxiv.org/abs/1910.07467; Ba et al., https://arxiv.org/abs/1607.06450.

    x, residual, y, s   (..., N)      N up to 16384, last dimension contiguous
    weight, bias        (N,)

One pass: a row is read once, kept in registers, written once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import torch
import triton
import triton.language as tl

from ._dispatch import LAUNCH_OPTIONS, Backend, as_rows, cdiv, choose_backend, launching, next_power_of_2
from ._registry import Cost, empty_as, nbytes, operator

MAX_WIDTH = 16384

Outputs = tuple[torch.Tensor, torch.Tensor | None]
"""y, and the rounded sum where there is a residual."""


@triton.jit
def _add_residual(x_ptr, residual_ptr, sum_ptr, rows, columns, mask, stride_x, stride_residual, N, HAS_RESIDUAL: tl.constexpr):
    """The rows of x, or of the rounded sum, in float32; the sum is stored."""
    x = tl.load(x_ptr + rows * stride_x + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + rows * stride_residual + columns, mask=mask, other=0.0)
        rounded = (x + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(sum_ptr + rows * N + columns, rounded, mask=mask)
        x = rounded.to(tl.float32)
    return x


@triton.jit(do_not_specialize=["n_rows"])
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr,
    stride_x, stride_residual, n_rows, eps,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    # int64 before the first multiplication: rows * stride passes 2^31 on long packs.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < n_rows) & (columns < N)
    x = _add_residual(x_ptr, residual_ptr, sum_ptr, rows, columns, mask, stride_x, stride_residual, N, HAS_RESIDUAL)
    mean_square = tl.sum(x * x, axis=1, keep_dims=True) / N
    normed = (x * tl.rsqrt(mean_square + tl.cast(eps, tl.float32))).to(x_ptr.dtype.element_ty)
    weight = tl.load(weight_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    y = normed.to(tl.float32) * weight
    tl.store(y_ptr + rows * N + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm_rows(x, mask, columns, weight_ptr, bias_ptr, eps, N: tl.constexpr):
    """LayerNorm of rows x (BLOCK_M, BLOCK_N) in float32; `mask` is false, and x 0, outside of them."""
    mean = tl.sum(x, axis=1, keep_dims=True) / N
    centred = tl.where(mask, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1, keep_dims=True) / N
    weight = tl.load(weight_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    # Some compilers pass Python floats as float64, which would turn the whole row into float64.
    return centred * tl.rsqrt(variance + tl.cast(eps, tl.float32)) * weight + bias


@triton.jit(do_not_specialize=["n_rows"])
def _layer_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr,
    stride_x, stride_residual, n_rows, eps,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < n_rows) & (columns < N)
    x = _add_residual(x_ptr, residual_ptr, sum_ptr, rows, columns, mask, stride_x, stride_residual, N, HAS_RESIDUAL)
    y = _layer_norm_rows(x, mask, columns, weight_ptr, bias_ptr, eps, N)
    tl.store(y_ptr + rows * N + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class RowConfig:
    """Tiles of kernels that keep whole rows in registers; they depend on the width alone."""

    block_m: int
    block_n: int
    num_warps: int

    @classmethod
    def choose(cls, width: int) -> RowConfig:
        """4 warps hold 2048 elements as 16 a thread, two loads of 16 bytes in 16 bit: narrow rows (the heads of q and k) share
        a program, rows from 2048 have one each. Beyond 4096 elements 4 warps would hold more than 32 a thread."""
        block_n = next_power_of_2(width)
        return cls(max(1, 2048 // block_n), block_n, 4 if block_n <= 4096 else 8)


def _empty_outputs(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> Outputs:
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    return y, None if residual is None else empty_as(x)


def _launch(
    kernel: triton.JITFunction,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> Outputs:
    y, total = _empty_outputs(x, residual, weight)
    if x.numel() == 0:
        return y, total
    width = x.shape[-1]
    rows = as_rows(x)
    residual_rows = rows if residual is None else as_rows(residual)
    weight = weight.contiguous()
    config = RowConfig.choose(width)
    with launching("rms_norm" if bias is None else "layer_norm", x):
        kernel[(cdiv(rows.shape[0], config.block_m),)](
            rows, residual_rows, weight, weight if bias is None else bias.contiguous(), y, y if total is None else total,
            rows.stride(0), residual_rows.stride(0), rows.shape[0], eps,
            N=width, BLOCK_M=config.block_m, BLOCK_N=config.block_n, HAS_RESIDUAL=residual is not None,
            num_warps=config.num_warps, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return y, total


def _cost(x: torch.Tensor, residual: torch.Tensor | None, *vectors: torch.Tensor) -> Cost:
    return Cost(1, nbytes(x, residual, *vectors), nbytes(*_empty_outputs(x.to("meta"), residual, vectors[0])))


@operator(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    fake=lambda x, weight, eps: _empty_outputs(x, None, weight)[0],
    cost=lambda x, weight, eps: _cost(x, None, weight),
)
def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _launch(_rms_norm_kernel, x, None, weight, None, eps)[0]


@operator(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    fake=lambda x, residual, weight, eps: _empty_outputs(x, residual, weight),
    cost=lambda x, residual, weight, eps: _cost(x, residual, weight),
)
def _add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Outputs:
    return _launch(_rms_norm_kernel, x, residual, weight, None, eps)


@operator(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    fake=lambda x, weight, bias, eps: _empty_outputs(x, None, weight)[0],
    cost=lambda x, weight, bias, eps: _cost(x, None, weight, bias),
)
def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return _launch(_layer_norm_kernel, x, None, weight, bias, eps)[0]


@operator(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    fake=lambda x, residual, weight, bias, eps: _empty_outputs(x, residual, weight),
    cost=lambda x, residual, weight, bias, eps: _cost(x, residual, weight, bias),
)
def _add_layer_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Outputs:
    return _launch(_layer_norm_kernel, x, residual, weight, bias, eps)


@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: None = None, *, backend: Backend = "auto"
) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor, *, backend: Backend = "auto"
) -> tuple[torch.Tensor, torch.Tensor]: ...
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
    _check("rms_norm", x, residual, weight=weight)
    torch_backend = choose_backend("rms_norm", backend, x, weight, residual) == "torch"
    return (rms_norm_torch if torch_backend else rms_norm_triton)(x, weight, eps, residual)


@overload
def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, residual: None = None, *, backend: Backend = "auto"
) -> torch.Tensor: ...
@overload
def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, residual: torch.Tensor, *, backend: Backend = "auto"
) -> tuple[torch.Tensor, torch.Tensor]: ...
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm of `x`, or of `x + residual`.

    Args:
        x: (..., N) in float16, bfloat16 or float32.
        weight, bias: (N,).
        eps: added to the variance.
        residual: as `x`; if given, it is added first.
        backend: see `_dispatch`.

    Returns:
        y (..., N) in the promoted dtype of `x` and `weight`; with `residual` the pair (y, x + residual).

    Raises:
        ValueError: shapes that do not fit, tensors on different devices, or N above 16384.
        TypeError: an unsupported dtype.
    """
    _check("layer_norm", x, residual, weight=weight, bias=bias)
    torch_backend = choose_backend("layer_norm", backend, x, weight, bias, residual) == "torch"
    return (layer_norm_ref if torch_backend else layer_norm_triton)(x, weight, bias, eps, residual)


def _check(op: str, x: torch.Tensor, residual: torch.Tensor | None, **vectors: torch.Tensor) -> None:
    for name, vector in vectors.items():
        if not isinstance(vector, torch.Tensor):
            raise TypeError(f"{op}: {name} is {type(vector).__name__}, expected a tensor")
        if x.ndim == 0 or vector.shape != x.shape[-1:] or not 0 < x.shape[-1] <= MAX_WIDTH:
            raise ValueError(
                f"{op}: x {tuple(x.shape)} with {name} {tuple(vector.shape)}, expected (..., N) and (N,), N <= {MAX_WIDTH}"
            )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"{op}: residual {tuple(residual.shape)} {residual.dtype} must be as x {tuple(x.shape)} {x.dtype}")


def rms_norm_triton(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` by its operators, unchecked."""
    if residual is None:
        return torch.ops.llava15.rms_norm.default(x, weight, eps)
    return torch.ops.llava15.add_rms_norm.default(x, residual, weight, eps)


def layer_norm_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`layer_norm` by its operators, unchecked."""
    if residual is None:
        return torch.ops.llava15.layer_norm.default(x, weight, bias, eps)
    return torch.ops.llava15.add_layer_norm.default(x, residual, weight, bias, eps)


def rms_norm_ref(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The eager reference, with the same roundings. In float64 it computes in float64."""
    total = x if residual is None else x + residual
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = weight * normed.to(total.dtype)
    return y if residual is None else (y, total)


def rms_norm_torch(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The torch backend: the bits of `rms_norm_ref`, in float32 with two passes and two buffers less."""
    if not x.dtype == weight.dtype == torch.float32:
        return rms_norm_ref(x, weight, eps, residual)
    total = x if residual is None else x + residual
    inverse = (total * total).mean(-1, keepdim=True).add_(eps).rsqrt_()
    y = (total * inverse).mul_(weight)
    return y if residual is None else (y, total)


def layer_norm_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The eager reference. Mixed dtypes are promoted, as the kernel does."""
    total = x if residual is None else x + residual
    dtype = torch.promote_types(x.dtype, weight.dtype)
    y = torch.nn.functional.layer_norm(total.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype), eps)
    return y if residual is None else (y, total)
