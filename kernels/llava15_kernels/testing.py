"""The error rule that every kernel has to meet, in one place.

float16 and bfloat16, with r = ref.to(dtype):
    max|ours - ref| <= 2 max|eager - ref| + 2 max|(r + 0.3 - 0.3) - r|
float32:
    max|ours - ref| / max|ref| <= max(1e-5, 2 max|eager - ref| / max|ref|)

`ref` is computed in float64, `eager` by the reference in the dtype under test. The second term of the first rule is what two
roundings of that dtype cost, so that an exact eager result does not ask for the impossible. After flash-attention's tests.
"""

from __future__ import annotations

import math

import torch

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
"""What can be proven here: Triton's interpreter has no working bfloat16 arithmetic."""


def worst(ours: torch.Tensor, ref: torch.Tensor) -> tuple[float, tuple[int, ...]]:
    """The largest absolute difference and where it is. NaN counts as the largest."""
    difference = (ours.double() - ref.double()).abs()
    difference = torch.where(difference.isnan(), torch.inf, difference)
    if difference.numel() == 0:
        return 0.0, ()
    index = int(difference.argmax())
    return float(difference.flatten()[index]), tuple(int(i) for i in torch.unravel_index(torch.tensor(index), ref.shape))


def assert_close(ours: torch.Tensor, eager: torch.Tensor, ref: torch.Tensor, what: str = "") -> None:
    """Raises AssertionError with the worst coordinate where `ours` breaks the rule.

    Args:
        ours: the kernel's result.
        eager: the reference's result in the same dtype.
        ref: the reference's result in float64.
        what: a name for the message.
    """
    assert ours.shape == ref.shape and ours.dtype == eager.dtype, (
        f"{what}: {ours.dtype} {tuple(ours.shape)}, expected {eager.dtype} {tuple(ref.shape)}"
    )
    error, where = worst(ours, ref)
    eager_error, _ = worst(eager, ref)
    assert eager_error < math.inf, f"{what}: what it is held against is not finite"
    if ours.dtype == torch.float32:
        scale = max(float(ref.abs().max()) if ref.numel() else 0.0, torch.finfo(torch.float32).tiny)
        error, eager_error = error / scale, eager_error / scale
        bound = max(1e-5, 2 * eager_error)
    else:
        rounded = ref.to(ours.dtype)
        bound = 2 * eager_error + 2 * worst(rounded + 0.3 - 0.3, rounded)[0]
    if not error <= bound:
        raise AssertionError(
            f"{what}: error {error:.3e} > {bound:.3e} at {where}: {ours[where].item()!r}, expected {ref[where].item()!r} "
            f"(eager's error is {eager_error:.3e})"
        )
