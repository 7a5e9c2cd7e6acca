"""Where an operation runs: the one place that decides between a Triton kernel and its torch counterpart.

    backend="triton"   the Triton kernel: on a GPU, or on a CPU when TRITON_INTERPRET=1 was set before the import
    backend="torch"    the eager counterpart in the same file: any device, differentiable
    backend="auto"     "triton" where it can run, else "torch"

The kernels compute forward passes only, so a call that needs a gradient runs the torch counterpart, logged once.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import torch
import triton
from torch._subclasses.fake_tensor import is_fake
from triton.errors import TritonError

logger = logging.getLogger("llava15_kernels")

Backend = Literal["auto", "triton", "torch"]
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

LAUNCH_OPTIONS = {"enable_fp_fusion": True}
"""Passed with every launch. Contracting a * b + c into one rounding is faster and closer to the reference; Triton's default
for it changes between releases, so it is chosen here."""

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether this process runs Triton kernels in the interpreter; fixed when the kernels are imported."""


_architecture_override: ContextVar[str | None] = ContextVar("architecture", default=None)


def architecture(device: torch.device) -> str:
    """What configurations are chosen by: "sm_90", "gfx942", ..., or "interpreter"."""
    return _architecture_override.get() or _device_architecture(device)


@cache
def _device_architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once, for grids that have to fill the device."""
    if _architecture_override.get():
        return 132  # an H100's, for an architecture that is not at hand
    return _device_multiprocessors(device)


@cache
def _device_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # so that the interpreter sees split work
    return torch.cuda.get_device_properties(device).multi_processor_count


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own wraps its arguments for use in kernels, which costs the host more than `torch.add`."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest one that is at least `n`; 1 for 0. Why not Triton's: see `cdiv`."""
    return 1 << max(n - 1, 0).bit_length()


def warps_for(elements: int, device: torch.device, most: int = 8) -> int:
    """Warps for a tile of this many elements: eight a thread, which are 16 bytes of a 16-bit dtype, up to `most`."""
    threads = 64 if architecture(device).startswith("gfx") else 32
    return max(1, min(most, next_power_of_2(elements // (8 * threads))))


@contextlib.contextmanager
def as_if_on(name: str) -> Iterator[None]:
    """Launchers choose their configurations for this architecture; for compiling without it at hand."""
    token = _architecture_override.set(name)
    try:
        yield
    finally:
        _architecture_override.reset(token)


def default_backend(device: torch.device) -> Literal["triton", "torch"]:
    """The backend that "auto" means on `device`."""
    return "triton" if device.type == "cuda" or (device.type == "cpu" and INTERPRETED) else "torch"


def check_backend(backend: str, device: torch.device) -> None:
    """Raises where `backend` is unknown or cannot run on `device`."""
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f'backend is {backend!r}, expected "auto", "triton" or "torch"')
    if backend == "triton" and default_backend(device) != "triton":
        raise RuntimeError(
            f'backend="triton" cannot run on device {str(device)!r}: it needs a GPU, or TRITON_INTERPRET=1 set before '
            "the kernels are imported"
        )


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def choose_backend(op: str, backend: Backend, *tensors: torch.Tensor | None) -> Literal["triton", "torch"]:
    """The backend of one call, after checking that the tensors fit together.

    Raises:
        ValueError: unknown backend, or tensors on different devices.
        TypeError: a tensor that is not float16, bfloat16 or float32.
        RuntimeError: the asked backend cannot run here.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    device = given[0].device
    for tensor in given:
        if tensor.device != device:
            raise ValueError(f"{op}: tensors on {device} and {tensor.device}, expected one device")
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{op}: dtype {tensor.dtype} is not supported, expected float16, bfloat16 or float32")
    if backend != "torch":
        check_backend(backend, device)
        if default_backend(device) == "torch":
            return "torch"
        if not needs_grad(*given):
            return "triton"
        _log_gradient(op)
    return "torch"


@cache
def _log_gradient(op: str) -> None:
    logger.warning("%s: a gradient is needed and the Triton kernel is forward only, so the torch version runs", op)


DEBUG = os.environ.get("LLAVA15_DEBUG", "0") == "1"
"""Whether lengths that lie in a GPU's memory are checked too, at the price of reading them back in every call."""


def check_bounds(op: str, name: str, cu_seqlens: torch.Tensor, total: int, max_seqlen: int | None = None) -> None:
    """Checks what running sums of lengths say, wherever the host can see it without waiting for a device.

    Raises:
        ValueError: they do not rise from 0 to `total`, or a segment is longer than `max_seqlen`.
    """
    # The cheapest test first: it ends every call on a GPU.
    if not (cu_seqlens.device.type == "cpu" or DEBUG) or torch.compiler.is_compiling() or is_fake(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != total or min(lengths, default=0) < 0:
        raise ValueError(f"{op}: {name} is {bounds}, expected to rise from 0 to the {total} rows")
    if max_seqlen is not None and max(lengths, default=0) > max_seqlen:
        raise ValueError(f"{op}: {name} has a segment of {max(lengths)} rows, longer than max_seqlen {max_seqlen}")


class launching:
    """Around the launches of an operation: makes the tensor's GPU the current one, for Triton launches on the current device
    whatever the tensors say; and what keeps a kernel from being compiled is told with the operation's name and a way out."""

    __slots__ = ("guard", "op", "tensor")

    def __init__(self, op: str, tensor: torch.Tensor) -> None:
        self.op, self.tensor = op, tensor
        self.guard: torch.cuda.device | None = None

    def __enter__(self) -> None:
        if self.tensor.is_cuda:
            self.guard = torch.cuda.device(self.tensor.device)
            self.guard.__enter__()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if self.guard is not None:
            self.guard.__exit__(kind, error, trace)
        if isinstance(error, (TritonError, OSError)):  # OSError: the folder that compiled kernels are kept in
            lines = str(error).strip().splitlines() or [""]
            raise RuntimeError(
                f"{self.op}: the kernel could not be compiled on {self.tensor.device} ({type(error).__name__}: {lines[-1]}); "
                'backend="torch" runs without it'
            ) from error


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., N) -> (rows, N) with a contiguous last dimension; a view wherever the strides allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
