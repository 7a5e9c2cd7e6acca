"""The rule that everything else is held to."""

import pytest
import torch

from llava15_kernels.testing import DTYPES, assert_close


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def tensors(request):
    """(ours, eager, ref), of which none is wrong."""
    ref = torch.randn(64, 8, dtype=torch.float64)
    return ref.to(request.param), ref.to(request.param), ref


def test_what_is_rounded_once_is_right(tensors):
    assert_close(*tensors)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1.5])
def test_one_wrong_element_is_found_and_named(tensors, wrong):
    ours, eager, ref = tensors
    ref[3, 5], ours[3, 5] = 1.0, wrong
    eager[3, 5] = 1.0
    with pytest.raises(AssertionError, match=r"at \(3, 5\)"):
        assert_close(ours, eager, ref, "op")


@pytest.mark.parametrize("broken", ["eager", "ref"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_right_beside_a_broken_reference(tensors, broken, value):
    """Twice an infinite error would allow everything."""
    ours, eager, ref = tensors
    (eager if broken == "eager" else ref)[0, 0] = value
    with pytest.raises(AssertionError, match="not finite"):
        assert_close(ours, eager, ref, "op")


def test_another_shape_or_dtype_is_wrong(tensors):
    ours, eager, ref = tensors
    for other in (ours[:1], ours.double()):
        with pytest.raises(AssertionError, match="expected"):
            assert_close(other, eager, ref)
