import pytest
import torch

from llava15_kernels import gelu, gelu_ref, silu_and_mul, silu_and_mul_ref
from llava15_kernels.testing import DTYPES, assert_close


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (3, 7, 96), (5, 2 * 1500)])
def test_silu_and_mul(device, shape, dtype):
    x = torch.randn(shape, device=device).to(dtype) * 3
    ours = silu_and_mul(x, backend="triton")
    assert ours.shape == (*shape[:-1], shape[-1] // 2)
    assert_close(ours, silu_and_mul_ref(x), silu_and_mul_ref(x.double()), "silu_and_mul")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7, 48), (5, 1500)])
def test_gelu(device, shape, with_bias, dtype):
    x = torch.randn(shape, device=device).to(dtype) * 3
    bias = torch.randn(shape[-1], device=device).to(dtype) if with_bias else None
    ref = gelu_ref(x.double(), None if bias is None else bias.double())
    assert_close(gelu(x, bias, backend="triton"), gelu_ref(x, bias), ref, "gelu")


def test_gelu_is_the_exact_one(device):
    """The tanh approximation is off by up to 5e-4, which the rule sees."""
    x = torch.linspace(-4, 4, 400, device=device)
    approximate = torch.nn.functional.gelu(x, approximate="tanh")
    with pytest.raises(AssertionError):
        assert_close(approximate, gelu_ref(x), gelu_ref(x.double()))
    assert_close(gelu(x, backend="triton"), gelu_ref(x), gelu_ref(x.double()))


def test_large_values_stay_finite(device):
    x = torch.tensor([[-1e4, 1e4, -1e4, 1e4]], device=device)
    torch.testing.assert_close(silu_and_mul(x, backend="triton"), silu_and_mul_ref(x))
    torch.testing.assert_close(gelu(x, backend="triton"), gelu_ref(x))


def test_strided_views(device):
    base = torch.randn(6, 2 * 64 + 1, device=device)
    view = base[::2, 1:]
    assert torch.equal(silu_and_mul(view, backend="triton"), silu_and_mul(view.contiguous(), backend="triton"))
    assert torch.equal(gelu(view, backend="triton"), gelu(view.contiguous(), backend="triton"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_and_up_apart(device, dtype):
    """Two tensors, each with rows of its own stride, give what both give side by side."""
    gate = torch.randn(5, 70, device=device).to(dtype)[:, 3:67]
    up = torch.randn(10, 65, device=device).to(dtype)[::2, 1:]
    packed = silu_and_mul(torch.cat((gate, up), -1), backend="triton")
    assert torch.equal(silu_and_mul(gate, up, backend="triton"), packed)


def test_activation_errors(device):
    with pytest.raises(ValueError, match=r"\(3, 5\)"):
        silu_and_mul(torch.randn(3, 5, device=device))
    with pytest.raises(ValueError, match=r"bias .*\(4,\)"):
        gelu(torch.randn(3, 5, device=device), torch.randn(4, device=device))
    with pytest.raises(TypeError, match="float64"):
        gelu(torch.randn(3, 5, device=device).double())


def test_gate_and_up_in_two_tensors(device):
    """As two linear layers give them, with rows that have strides of their own."""
    x = torch.randn(5, 2 * 40, device=device)
    gate, up = x.chunk(2, dim=-1)
    packed = silu_and_mul(x, backend="triton")
    assert torch.equal(silu_and_mul(gate.contiguous(), up, backend="triton"), packed)
    torch.testing.assert_close(silu_and_mul(gate, up, backend="torch"), packed)
    with pytest.raises(ValueError, match="differ"):
        silu_and_mul(gate, up[:, :20])
