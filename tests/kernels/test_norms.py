import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from llava15_kernels import layer_norm, layer_norm_ref, rms_norm, rms_norm_ref
from llava15_kernels.testing import DTYPES, assert_close

WIDTHS = [64, 80, 128, 1000, 2560, 4096, 8192]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(device, width, dtype, with_residual):
    x, residual = torch.randn(2, 5, 3, width, device=device).to(dtype)
    residual = residual if with_residual else None
    weight = torch.randn(width, device=device).to(dtype)
    ours = rms_norm(x, weight, 1e-6, residual, backend="triton")
    eager = rms_norm_ref(x, weight, 1e-6, residual)
    # The residual sum is rounded by definition, so the reference starts from the rounded sum.
    total = x if residual is None else x + residual
    ref = rms_norm_ref(total.double(), weight.double(), 1e-6)
    if with_residual:
        assert torch.equal(ours[1], eager[1])
        ours, eager = ours[0], eager[0]
    assert_close(ours, eager, ref, "rms_norm")


def test_rms_norm_keeps_both_roundings_of_hugging_face(device):
    """Bits differ from Qwen3RMSNorm in under 1e-3 of the elements, which one rounding less does not reach."""
    module = Qwen3RMSNorm(256, eps=1e-6).to(device, torch.float16)
    module.weight.data = torch.randn(256, device=device).half()
    x = torch.randn(400, 256, device=device).half()
    with torch.no_grad():
        theirs = module(x)
        ours = rms_norm(x, module.weight, 1e-6, backend="triton")
    wide = x.float()
    once = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * module.weight.float()).half()
    assert (ours != theirs).float().mean() < 1e-3
    assert (once != theirs).float().mean() > 1e-2


def test_rms_norm_rounds_the_residual_sum_first(device):
    x, residual = torch.randn(2, 50, 128, device=device).half()
    weight = torch.ones(128, device=device).half()
    y, total = rms_norm(x, weight, 1e-6, residual, backend="triton")
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(total, weight, 1e-6, backend="triton"))


def test_rms_norm_of_strided_and_misaligned_views(device):
    base = torch.randn(7, 3, 2 * 96 + 1, device=device)
    weight = torch.randn(96, device=device)
    for view in (base[..., 1:97], base[:, 1, 96:192], base[::2, :, 5:101]):
        ours = rms_norm(view, weight, 1e-6, backend="triton")
        dense = rms_norm(view.contiguous(), weight, 1e-6, backend="triton")
        assert torch.equal(ours, dense)
        assert_close(ours, rms_norm_ref(view, weight, 1e-6), rms_norm_ref(view.double(), weight.double(), 1e-6))


def test_rms_norm_mixed_weight_dtype(device):
    x, weight = torch.randn(4, 64, device=device).half(), torch.randn(64, device=device)
    ours = rms_norm(x, weight, 1e-6, backend="triton")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, rms_norm_ref(x, weight, 1e-6), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.5])
def test_rms_norm_uses_eps(device, eps):
    x, weight = torch.randn(6, 64, device=device) * 1e-3, torch.ones(64, device=device)
    ours = rms_norm(x, weight, eps, backend="triton")
    assert_close(ours, rms_norm_ref(x, weight, eps), rms_norm_ref(x.double(), weight.double(), eps))


def test_rms_norm_of_nothing(device):
    y, total = rms_norm(
        torch.empty(0, 64, device=device), torch.ones(64, device=device), 1e-6, torch.empty(0, 64, device=device)
    )
    assert y.shape == total.shape == (0, 64)


def test_rms_norm_needing_a_gradient_is_differentiable(device):
    x = torch.randn(3, 64, device=device, requires_grad=True)
    weight = torch.ones(64, device=device)
    rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad is not None
    assert not rms_norm(x.detach(), weight, 1e-6, backend="triton").requires_grad


def test_rms_norm_errors(device):
    x, weight = torch.randn(3, 64, device=device), torch.ones(64, device=device)
    with pytest.raises(ValueError, match=r"weight \(32,\)"):
        rms_norm(x, weight[:32], 1e-6)
    with pytest.raises(ValueError, match=r"residual \(2, 64\)"):
        rms_norm(x, weight, 1e-6, x[:2])
    with pytest.raises(ValueError, match="16384"):
        rms_norm(torch.randn(1, 20000), torch.ones(20000), 1e-6)
    with pytest.raises(TypeError, match="float64"):
        rms_norm(x.double(), weight.double(), 1e-6)
    with pytest.raises(ValueError, match="meta"):
        rms_norm(x, weight.to("meta"), 1e-6)
    with pytest.raises(ValueError, match="'cuda'"):
        rms_norm(x, weight, 1e-6, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 80, 1000, 1024, 8192])
@pytest.mark.parametrize("with_residual", [False, True])
def test_layer_norm(device, width, dtype, with_residual):
    x, residual = torch.randn(2, 5, 3, width, device=device).to(dtype) * 2 + 1
    residual = residual if with_residual else None
    weight, bias = torch.randn(2, width, device=device).to(dtype)
    ours = layer_norm(x, weight, bias, 1e-5, residual, backend="triton")
    eager = layer_norm_ref(x, weight, bias, 1e-5, residual)
    total = x if residual is None else x + residual
    ref = layer_norm_ref(total.double(), weight.double(), bias.double(), 1e-5)
    if with_residual:
        assert torch.equal(ours[1], total)
        ours, eager = ours[0], eager[0]
    assert_close(ours, eager, ref, "layer_norm")


def test_layer_norm_is_torchs(device):
    module = torch.nn.LayerNorm(80, eps=1e-5, device=device, dtype=torch.float16)
    x = torch.randn(30, 80, device=device).half()
    with torch.no_grad():
        ours = layer_norm(x, module.weight, module.bias, module.eps, backend="triton")
        assert_close(ours, module(x), module.double()(x.double()), "layer_norm")


def test_layer_norm_errors(device):
    x, weight = torch.randn(3, 64, device=device), torch.ones(64, device=device)
    with pytest.raises(ValueError, match=r"bias \(32,\)"):
        layer_norm(x, weight, weight[:32], 1e-5)
    with pytest.raises(ValueError, match=r"residual \(2, 64\)"):
        layer_norm(x, weight, weight, 1e-5, x[:2])
