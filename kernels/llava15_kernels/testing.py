"""The error rule that every kernel has to meet, in one place.

float16 and bfloat16, with r = ref.to(dtype):
    max|ours - ref| <= 2 max|eager - ref| + 2 max|(r + 0.3 - 0.3) - r|
float32:
    max|ours - ref| / max|ref| <= max(1e-5, 2 max|eager - ref| / max|ref|)

`ref` is computed in float64, `eager` by the reference in the dtype under test. The second term of the first rule is what two
roundings of that dtype cost, so that an exact eager result does not ask for the impossible. After flash-attention's tests.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Comparison:
    """`ours` against a reference in higher precision, beside what eager gives in our dtype, and the bound that the rule sets.

    The first three numbers are largest absolute errors, the next three norms of the error by the norm of the reference, for
    which the same rule holds. `where` is the coordinate of our largest error, and `shape` that of what is compared.
    """

    name: str
    ours: float
    eager: float
    bound: float
    ours_relative: float
    eager_relative: float
    relative_bound: float
    where: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def ok(self) -> bool:
        """Within the rule; never where eager itself is not finite, for that tells nothing."""
        finite = self.eager < torch.inf and self.eager_relative < torch.inf
        return finite and self.ours <= self.bound and self.ours_relative <= self.relative_bound

    @classmethod
    def of(cls, name: str, ours: torch.Tensor, eager: torch.Tensor, reference: torch.Tensor) -> Comparison:
        reference, rounded = reference.double(), reference.to(eager.dtype)
        numbers: list[float] = []
        # Adding 0.3 and taking it away is two roundings near 0; the norm of one rounding stands for each.
        for order, *rounding in ((torch.inf, rounded + 0.3 - 0.3, rounded), (2, rounded, reference)):
            size = max(_norm(reference, order), torch.finfo(torch.float32).tiny)
            unit = 1.0 if order == torch.inf else size
            pairs = (ours, reference), (eager, reference), rounding
            error, eager_error, rounding_error = (_norm(x.double() - y.double(), order) / unit for x, y in pairs)
            least = 1e-5 * (size / unit)
            exact = eager.dtype == torch.float32
            numbers += [error, eager_error, max(least, 2 * eager_error) if exact else 2 * (eager_error + rounding_error)]
        largest, largest_eager, bound, relative, relative_eager, relative_bound = numbers
        return cls(
            name, largest, largest_eager, bound, relative, relative_eager, relative_bound,
            worst(ours, reference)[1], tuple(reference.shape),
        )  # fmt: skip


def _norm(error: torch.Tensor, order: float) -> float:
    """Its largest value (inf) or the root of the sum of squares (2). NaN counts as infinite."""
    finite = torch.nan_to_num(error.abs(), nan=torch.inf, posinf=torch.inf)
    return float(torch.linalg.vector_norm(finite, order)) if error.numel() else 0.0


def assert_close(ours: torch.Tensor, eager: torch.Tensor, ref: torch.Tensor, what: str = "") -> None:
    """Raises AssertionError with the worst coordinate where `ours` breaks the rule for the largest error.

    Args:
        ours: the kernel's result.
        eager: the reference's result in the same dtype.
        ref: the reference's result in float64.
        what: a name for the message.
    """
    assert ours.shape == ref.shape and ours.dtype == eager.dtype, (
        f"{what}: {ours.dtype} {tuple(ours.shape)}, expected {eager.dtype} {tuple(ref.shape)}"
    )
    found = Comparison.of(what, ours, eager, ref)
    assert found.eager < torch.inf, f"{what}: what it is held against is not finite"
    if not found.ours <= found.bound:
        at = found.where
        raise AssertionError(
            f"{what}: error {found.ours:.3e} > {found.bound:.3e} at {at}: {ours[at].item()!r}, expected {ref[at].item()!r} "
            f"(eager's error is {found.eager:.3e})"
        )
