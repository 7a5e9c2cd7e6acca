"""Linear layers on a few rows, where the weights are all the traffic: several in one launch, with what surrounds them.

    n = rms_norm(x, norm_weight)                with the two roundings of `norms.py`         (only with `norm_weight`)
    y_i = n W_i^T + b_i                         accumulated in float32, rounded once
    y = [y_0, y_1, ...]                         side by side, as q, k and v; or gated:
    y = silu(y_0) * y_1                         with the roundings of `silu_and_mul`
    y = y + residual                            rounded again                                (only with `residual`)

    x           (..., K)            up to 16 rows, last dimension contiguous
    weights     (N_i, K)            one to three as `nn.Linear` holds them, read where they lie, last dimension contiguous
    biases      (N_i,) or None
    residual, y (..., sum of N_i), or (..., N_0) if gated

One row multiplies and sums; 2 to 16 rows are one tile of a matrix product, and are normalized by a launch before it. Among 2 to
16, a row has the same bits whatever the others are.

Time of the four products of a layer on an H100 (bfloat16, cold weights, CUDA graph, microseconds; `benchmarks/NOTES.md`):

    rows        cuBLAS, 7 launches      here, 4 launches        bytes / 3.0 TB/s
    4B   1      98 + norms, SwiGLU      80                      67
         16     101                     86                      67
    8B   1      165                     138                     128
         16     168                     145                     128
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import triton
import triton.language as tl

from ._dispatch import (
    LAUNCH_OPTIONS,
    Backend,
    architecture,
    as_rows,
    cdiv,
    choose_backend,
    launching,
    next_power_of_2,
)
from ._registry import Cost, nbytes, operator
from .activation import silu_and_mul_ref
from .norms import MAX_WIDTH, _rms_norm, rms_norm_ref

MAX_ROWS = 16
MAX_WEIGHTS = 3


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@triton.jit
def _select(
    block, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, N0, N1, N2, stride_0, stride_1, stride_2,
    BLOCK_N: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The weight whose rows `block` computes: (weight, bias, its rows, row stride, first row, column of that row in y)."""
    w_ptr, b_ptr, N, stride = w0_ptr, b0_ptr, N0, stride_0
    first = block * BLOCK_N
    column = first
    if COUNT > 1:
        before = tl.cdiv(N0, BLOCK_N)
        if block >= before:
            w_ptr, b_ptr, N, stride = w1_ptr, b1_ptr, N1, stride_1
            first = (block - before) * BLOCK_N
            column = N0 + first
        if COUNT > 2:
            before += tl.cdiv(N1, BLOCK_N)
            if block >= before:
                w_ptr, b_ptr, N, stride = w2_ptr, b2_ptr, N2, stride_2
                first = (block - before) * BLOCK_N
                column = N0 + N1 + first
    return w_ptr, b_ptr, N, stride, first, column


@triton.jit
def _load(pointers, columns, K: tl.constexpr, BLOCK_K: tl.constexpr):
    if K % BLOCK_K == 0:
        return tl.load(pointers)
    return tl.load(pointers, mask=columns < K, other=0.0)


@triton.jit(do_not_specialize=["N0", "N1", "N2"])
def _one_row_kernel(
    x_ptr, norm_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, residual_ptr, y_ptr,
    N0, N1, N2, stride_0, stride_1, stride_2, eps,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr,
    GATED: tl.constexpr, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    w_ptr, b_ptr, N, stride, first, column = _select(
        tl.program_id(0), w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, N0, N1, N2, stride_0, stride_1, stride_2,
        BLOCK_N, 1 if GATED else COUNT,
    )  # fmt: skip
    inverse = 1.0
    if HAS_NORM:
        everything = tl.arange(0, WIDTH)
        row = tl.load(x_ptr + everything, mask=everything < K, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(row * row, axis=0) / K + tl.cast(eps, tl.float32))
    # Rows past the end read the last one again, which spares every load a mask.
    rows = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first)
    columns = tl.arange(0, BLOCK_K)
    # int64 before the multiplication: lm_head alone is 2^29 elements.
    w_pointers = w_ptr + first.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    up_pointers = w1_ptr + first.to(tl.int64) * stride_1 + rows[:, None] * stride_1 + columns[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    up_acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        x = _load(x_ptr + start + columns, start + columns, K, BLOCK_K).to(tl.float32)
        if HAS_NORM:
            weight = _load(norm_ptr + start + columns, start + columns, K, BLOCK_K).to(tl.float32)
            x = _rounded(_rounded(x * inverse, dtype) * weight, dtype)
        acc += _load(w_pointers + start, (start + columns)[None, :], K, BLOCK_K).to(tl.float32) * x[None, :]
        if GATED:
            up_acc += _load(up_pointers + start, (start + columns)[None, :], K, BLOCK_K).to(tl.float32) * x[None, :]
    y = tl.sum(acc, axis=1)
    if HAS_BIAS:
        y += tl.load(b_ptr + first + rows).to(tl.float32)
    y = _rounded(y, dtype)
    if GATED:
        up = tl.sum(up_acc, axis=1)
        if HAS_BIAS:
            up += tl.load(b1_ptr + first + rows).to(tl.float32)
        y = _rounded(_rounded(y / (1.0 + tl.exp(-y)), dtype) * _rounded(up, dtype), dtype)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + column + rows).to(tl.float32)
    tl.store(y_ptr + column + rows, y.to(dtype), mask=tl.arange(0, BLOCK_N) < N - first)


@triton.jit(do_not_specialize=["n_rows", "N0", "N1", "N2"])
def _few_rows_kernel(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, residual_ptr, y_ptr,
    n_rows, N0, N1, N2, stride_x, stride_0, stride_1, stride_2, stride_residual, stride_y,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, COUNT: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Computes y^T = W x^T: the weight's rows fill the tall side of the matrix instruction."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    w_ptr, b_ptr, N, stride, first, column = _select(
        tl.program_id(0), w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, N0, N1, N2, stride_0, stride_1, stride_2,
        BLOCK_N, 1 if GATED else COUNT,
    )  # fmt: skip
    rows = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first)
    columns = tl.arange(0, BLOCK_K)
    tokens = tl.minimum(tl.arange(0, BLOCK_M), n_rows - 1)
    x_pointers = x_ptr + tokens.to(tl.int64)[None, :] * stride_x + columns[:, None]
    w_pointers = w_ptr + first.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    up_pointers = w1_ptr + first.to(tl.int64) * stride_1 + rows[:, None] * stride_1 + columns[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    up_acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        x = _load(x_pointers + start, (start + columns)[:, None], K, BLOCK_K)
        acc = tl.dot(_load(w_pointers + start, (start + columns)[None, :], K, BLOCK_K), x, acc, input_precision="ieee")
        if GATED:
            up = _load(up_pointers + start, (start + columns)[None, :], K, BLOCK_K)
            up_acc = tl.dot(up, x, up_acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(b_ptr + first + rows).to(tl.float32)[:, None]
    y = _rounded(acc, dtype)
    if GATED:
        if HAS_BIAS:
            up_acc += tl.load(b1_ptr + first + rows).to(tl.float32)[:, None]
        y = _rounded(_rounded(y / (1.0 + tl.exp(-y)), dtype) * _rounded(up_acc, dtype), dtype)
    outputs = (column + rows)[:, None]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + tokens.to(tl.int64)[None, :] * stride_residual + outputs).to(tl.float32)
    mask = (tl.arange(0, BLOCK_N) < N - first)[:, None] & (tl.arange(0, BLOCK_M) < n_rows)[None, :]
    tl.store(y_ptr + tokens.to(tl.int64)[None, :] * stride_y + outputs, y.to(dtype), mask=mask)


@dataclass(frozen=True)
class _Config:
    """Tiles of one launch, measured on an H100 at the shapes of the 4B and the 8B; they decide the order of the sums."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def choose(cls, rows: int, width: int, dtype: torch.dtype, arch: str) -> _Config:
        widest = max(16, next_power_of_2(width))
        if arch == "interpreter":
            return cls(64, min(512, widest), 4, 1)  # where the number of programs takes the time
        if rows == 1:
            # 2 x 2048: 64 bytes of weights in flight per thread, without a pipeline. Widths that it does not divide (2560,
            # 9728) would waste part of it, and are pipelined in smaller tiles.
            return cls(2, 2048, 4, 1) if width % 2048 == 0 else cls(4, min(512, widest), 2, 1 if arch.startswith("gfx") else 3)
        # One warp per 16 rows of the weights, for as many programs as possible, with 32 KB in flight each (96 KB if gated, what
        # the smaller shared memories hold). Exact float32 products use no matrix instruction: larger tiles would spill.
        block_k = 32 if dtype == torch.float32 else min(256, widest)
        return cls(16, block_k, 1, 2 if arch.startswith("gfx") or dtype == torch.float32 else 5)


def pays(rows: int, dtype: torch.dtype) -> bool:
    """Whether `fused_linear` is the faster choice for this many rows; beyond, the library's products are."""
    return rows == 1 or (rows <= MAX_ROWS and dtype != torch.float32)


def _empty_output(x: torch.Tensor, weights: Sequence[torch.Tensor], gated: bool) -> torch.Tensor:
    width = weights[0].shape[0] if gated else sum(weight.shape[0] for weight in weights)
    return torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)


def _cost(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], norm_weight: torch.Tensor | None,
    eps: float, residual: torch.Tensor | None, gated: bool,
) -> Cost:  # fmt: skip
    separate = norm_weight is not None and x.numel() > x.shape[-1]
    written = nbytes(_empty_output(x.to("meta"), weights, gated))
    normed = nbytes(x) if separate else 0
    return Cost(1 + separate, nbytes(x, *weights, *biases, norm_weight, residual) + normed, written + normed)


@operator(
    "fused_linear(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? norm_weight, float eps, Tensor? residual, bool gated) "
    "-> Tensor",
    fake=lambda x, weights, biases, norm_weight, eps, residual, gated: _empty_output(x, weights, gated),
    cost=_cost,
)
def _fused_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    gated: bool,
) -> torch.Tensor:
    y = _empty_output(x, weights, gated)
    if y.numel() == 0:
        return y
    rows, width = as_rows(x), x.shape[-1]
    n_rows = rows.shape[0]
    if norm_weight is not None and n_rows > 1:
        rows, norm_weight = _rms_norm(rows, norm_weight, eps), None
    weights = [weight if weight.stride(-1) == 1 else weight.contiguous() for weight in weights]
    has_bias = any(bias is not None for bias in biases)
    if has_bias:
        biases = [
            weight.new_zeros(weight.shape[0]) if bias is None else bias.contiguous()
            for weight, bias in zip(weights, biases, strict=True)
        ]
    out, residual_rows = y.view(n_rows, -1), rows if residual is None else as_rows(residual)
    config = _Config.choose(n_rows, width, x.dtype, architecture(x.device))
    missing = [weights[0]] * (MAX_WEIGHTS - len(weights))
    three = [*weights, *missing]
    sizes, strides = [weight.shape[0] for weight in three], [weight.stride(0) for weight in three]
    outputs = sizes[: 1 if gated else len(weights)]
    grid = (sum(cdiv(size, config.block_n) for size in outputs),)
    pointers = *three, *([*biases, *missing] if has_bias else three), residual_rows, out
    common = {
        "K": width, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "COUNT": len(weights), "GATED": gated,
        "HAS_BIAS": has_bias, "HAS_RESIDUAL": residual is not None, "STAGES": config.num_stages, "num_warps": config.num_warps,
        **LAUNCH_OPTIONS,
    }  # fmt: skip
    with launching("fused_linear", x):
        if n_rows == 1:
            norm = rows if norm_weight is None else norm_weight.contiguous()
            _one_row_kernel[grid](
                rows, norm, *pointers, *sizes, *strides, eps,
                WIDTH=next_power_of_2(width), HAS_NORM=norm_weight is not None, **common,
            )  # fmt: skip
        else:
            _few_rows_kernel[grid](
                rows, *pointers, n_rows, *sizes, rows.stride(0), *strides, residual_rows.stride(0), out.stride(0),
                BLOCK_M=MAX_ROWS, **common,
            )  # fmt: skip
    return y


def fused_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None] | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Linear layers on the same few rows, optionally behind RMSNorm, gated by SiLU, and with a residual addition.

    Args:
        x: (..., K) in float16, bfloat16 or float32, up to 16 rows.
        weights: one to three of (N_i, K), in the dtype of `x`.
        biases: (N_i,) or None for each weight; by default none.
        norm_weight: (K,); if given, `x` is normalized first, K up to 16384.
        eps: added to the mean square of that norm.
        residual: as the result; if given, it is added last.
        gated: silu of the first product times the second; for two weights of one shape.
        backend: see `_dispatch`.

    Returns:
        (..., sum of N_i) in the dtype of `x`, the products side by side; (..., N_0) if gated.

    Raises:
        ValueError: more than 16 rows, shapes that do not fit, or tensors on different devices.
        TypeError: an unsupported dtype, or dtypes that differ.
    """
    biases = [None] * len(weights) if biases is None else list(biases)
    _check(x, weights, biases, norm_weight, residual, gated)
    arguments = x, list(weights), biases, norm_weight, eps, residual, gated
    if choose_backend("fused_linear", backend, x, *weights, *biases, norm_weight, residual) == "torch":
        return fused_linear_ref(*arguments)
    return torch.ops.llava15.fused_linear(*arguments)


def _check(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], norm_weight: torch.Tensor | None,
    residual: torch.Tensor | None, gated: bool,
) -> None:  # fmt: skip
    op, shapes = "fused_linear", [tuple(weight.shape) for weight in weights]
    if not 1 <= len(weights) <= MAX_WEIGHTS or (gated and (len(weights) != 2 or shapes[0] != shapes[1])):
        raise ValueError(f"{op}: weights {shapes}, expected one to {MAX_WEIGHTS}, or two of one shape if gated")
    if x.ndim == 0 or x.shape[-1] == 0 or any(len(shape) != 2 or shape[1] != x.shape[-1] for shape in shapes):
        raise ValueError(f"{op}: x {tuple(x.shape)} with weights {shapes}, expected (..., K) and (N, K)")
    if (rows := x.numel() // x.shape[-1]) > MAX_ROWS:
        raise ValueError(f"{op}: x {tuple(x.shape)} has {rows} rows, expected at most {MAX_ROWS}")
    if len(biases) != len(weights):
        raise ValueError(f"{op}: {len(biases)} biases for {len(weights)} weights, expected one or None for each")
    for weight, bias in zip(weights, biases, strict=True):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{op}: a bias {tuple(bias.shape)} for a weight {tuple(weight.shape)}, expected (N,) and (N, K)")
    if norm_weight is not None and (norm_weight.shape != x.shape[-1:] or x.shape[-1] > MAX_WIDTH):
        raise ValueError(
            f"{op}: norm_weight {tuple(norm_weight.shape)} for x {tuple(x.shape)}, expected (K,) with K <= {MAX_WIDTH}"
        )
    expected = (*x.shape[:-1], shapes[0][0] if gated else sum(shape[0] for shape in shapes))
    if residual is not None and residual.shape != expected:
        raise ValueError(f"{op}: residual {tuple(residual.shape)}, expected {expected}")
    for tensor in (*weights, *biases, norm_weight, residual):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{op}: x is {x.dtype} and another tensor {tensor.dtype}, expected one dtype")


def fused_linear_ref(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None],
    norm_weight: torch.Tensor | None = None, eps: float = 1e-6, residual: torch.Tensor | None = None, gated: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The eager reference: norm, products, activation and addition one by one, each rounded."""
    normed = x if norm_weight is None else cast(torch.Tensor, rms_norm_ref(x, norm_weight, eps))
    products = [torch.nn.functional.linear(normed, *layer) for layer in zip(weights, biases, strict=True)]
    y = silu_and_mul_ref(*products) if gated else torch.cat(products, dim=-1)
    return y if residual is None else y + residual
