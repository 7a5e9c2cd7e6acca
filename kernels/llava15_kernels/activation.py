"""The activations of the two MLPs.

    silu_and_mul:   y = silu(a) * b,  silu(a) = a / (1 + exp(-a)),     x = [a, b] or a, b  text (SwiGLU)
    gelu:           y = t / 2 * (1 + erf(t / sqrt(2))),                t = x + bias        vision, the exact form

silu(a) is rounded to the dtype of x before the product, as two eager calls round it.
Shazeer, https://arxiv.org/abs/2002.05202; Hendrycks and Gimpel, https://arxiv.org/abs/1606.08415.

    silu_and_mul    x (..., 2 N), or a and b (..., N) -> (..., N)
    gelu            x (..., N), bias (N,) or None -> (..., N)

The tails in float32 against float64, for 32768 values up to 104 away from 0; compiled code for sm_90, run by an interpreter
of PTX, and the torch backend on a CPU:

    largest error               sm_90       torch
    silu, relative, a > -1      1.2e-7      1.2e-7
                    a > -20     9.6e-7      1.4e-7      exp is 2^(a log2 e), whose exponent is rounded
                    a > -80     3.7e-6      1.1e-7      0 below -88.7, where exp(-a) overflows: |silu| < 3e-37
    gelu, relative, t > -1      1.6e-7      3.0e-7
          absolute, t < -1      1.3e-7      9.3e-7      1 + erf cancels: 0 below -5.5, where |gelu| < 1e-7
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._dispatch import LAUNCH_OPTIONS, Backend, as_rows, cdiv, choose_backend, launching, warps_for
from ._registry import Cost, empty_as, nbytes, operator

BLOCK = 2048


@triton.jit
def _silu_and_mul_kernel(gate_ptr, up_ptr, y_ptr, stride_gate, stride_up, n_columns, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = columns < n_columns
    gate = tl.load(gate_ptr + row * stride_gate + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + columns, mask=mask, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(gate_ptr.dtype.element_ty)
    tl.store(y_ptr + row * n_columns + columns, (activated.to(tl.float32) * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_kernel(x_ptr, bias_ptr, y_ptr, stride_x, n_columns, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = columns < n_columns
    t = tl.load(x_ptr + row * stride_x + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        t += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    y = 0.5 * t * (1.0 + tl.erf(t * 0.7071067811865476))
    tl.store(y_ptr + row * n_columns + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@operator(
    "silu_and_mul(Tensor gate, Tensor up) -> Tensor",
    fake=lambda gate, up: empty_as(gate),
    cost=lambda gate, up: Cost(1, nbytes(gate, up), nbytes(gate)),
)
def _silu_and_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    y = empty_as(gate)
    if y.numel():
        rows, up_rows = as_rows(gate), as_rows(up)
        with launching("silu_and_mul", gate):
            _silu_and_mul_kernel[(rows.shape[0], cdiv(y.shape[-1], BLOCK))](
                rows, up_rows, y, rows.stride(0), up_rows.stride(0), y.shape[-1],
                BLOCK_N=BLOCK, num_warps=warps_for(BLOCK, gate.device, 4), **LAUNCH_OPTIONS,
            )  # fmt: skip
    return y


@operator(
    "gelu(Tensor x, Tensor? bias) -> Tensor",
    fake=lambda x, bias: empty_as(x),
    cost=lambda x, bias: Cost(1, nbytes(x, bias), nbytes(x)),
)
def _gelu(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = empty_as(x)
    if y.numel():
        rows = as_rows(x)
        with launching("gelu", x):
            _gelu_kernel[(rows.shape[0], cdiv(y.shape[-1], BLOCK))](
                rows, rows if bias is None else bias.contiguous(), y, rows.stride(0), y.shape[-1],
                HAS_BIAS=bias is not None, BLOCK_N=BLOCK, num_warps=warps_for(BLOCK, x.device, 4), **LAUNCH_OPTIONS,
            )  # fmt: skip
    return y


def silu_and_mul(x: torch.Tensor, up: torch.Tensor | None = None, *, backend: Backend = "auto") -> torch.Tensor:
    """silu of the first half of the last dimension, times the second half; or `silu(x) * up`.

    Args:
        x: (..., 2 N) in float16, bfloat16 or float32, gate and up projection side by side; with `up` the gate alone, (..., N).
        up: (..., N) in the same dtype, the up projection.
        backend: see `_dispatch`.

    Returns:
        (..., N) in the dtype of `x`.

    Raises:
        ValueError: an odd last dimension, shapes or dtypes that differ, or tensors on different devices.
        TypeError: an unsupported dtype.
    """
    if up is None:
        if x.ndim == 0 or x.shape[-1] % 2 or x.shape[-1] == 0:
            raise ValueError(f"silu_and_mul: x has shape {tuple(x.shape)}, expected (..., 2 N)")
        x, up = x.chunk(2, dim=-1)
    elif x.ndim == 0 or x.shape != up.shape or x.dtype != up.dtype:
        raise ValueError(f"silu_and_mul: x {x.dtype} {tuple(x.shape)} and up {up.dtype} {tuple(up.shape)} differ")
    if choose_backend("silu_and_mul", backend, x, up) == "torch":
        return silu_and_mul_ref(x, up)
    return torch.ops.llava15.silu_and_mul(x, up)


def gelu(x: torch.Tensor, bias: torch.Tensor | None = None, *, backend: Backend = "auto") -> torch.Tensor:
    """The exact GELU of `x`, or of `x + bias`.

    Args:
        x: (..., N) in float16, bfloat16 or float32.
        bias: (N,) in the same dtype; if given, it is added first.
        backend: see `_dispatch`.

    Returns:
        (..., N) in the dtype of `x`.

    Raises:
        ValueError: shapes that do not fit, or tensors on different devices.
        TypeError: an unsupported dtype.
    """
    if x.ndim == 0 or x.shape[-1] == 0 or (bias is not None and (bias.shape != x.shape[-1:] or bias.dtype != x.dtype)):
        described = None if bias is None else f"{bias.dtype} {tuple(bias.shape)}"
        raise ValueError(f"gelu: x {x.dtype} {tuple(x.shape)} with bias {described}, expected (..., N) and (N,) of one dtype")
    if choose_backend("gelu", backend, x, bias) == "torch":
        return gelu_ref(x, bias)
    return torch.ops.llava15.gelu(x, bias)


def silu_and_mul_ref(x: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """The eager reference."""
    gate, up = x.chunk(2, dim=-1) if up is None else (x, up)
    return torch.nn.functional.silu(gate) * up


def gelu_ref(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The eager reference."""
    return torch.nn.functional.gelu(x if bias is None else x + bias)
