import pytest
import torch

from llava15_kernels import patch_merge, patch_merge_ref
from llava15_kernels.testing import DTYPES, assert_close

LENGTHS = {"one": [25], "uneven": [9, 37, 5], "frames": [17] * 20, "many": [5] * 150}


def inputs(lengths, width, dtype, device):
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    x = torch.randn(sum(lengths), width, device=device).to(dtype) * 3 + 1
    weight, bias = torch.randn(2, width, device=device).to(dtype)
    return x, weight, bias, 1e-5, cu_seqlens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 80, 1024])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_patch_merge(device, lengths, width, dtype):
    x, weight, bias, eps, cu_seqlens = inputs(lengths, width, dtype, device)
    # A class row that slips into the output would show.
    x[cu_seqlens[:-1].long()] = float("nan")
    ours = patch_merge(x, weight, bias, eps, cu_seqlens, backend="triton")
    eager = patch_merge_ref(x, weight, bias, eps, cu_seqlens)
    ref = patch_merge_ref(x.double(), weight.double(), bias.double(), eps, cu_seqlens)
    assert ours.shape == (sum(length - 1 for length in lengths) // 4, 4 * width)
    assert_close(ours, eager, ref, "patch_merge")


@pytest.mark.parametrize("merge_size", [1, 3])
def test_patch_merge_of_another_size(device, merge_size):
    x, weight, bias, eps, cu_seqlens = inputs([10, 19], 48, torch.float32, device)
    ours = patch_merge(x, weight, bias, eps, cu_seqlens, merge_size, backend="triton")
    torch.testing.assert_close(ours, patch_merge_ref(x, weight, bias, eps, cu_seqlens, merge_size), rtol=1e-5, atol=1e-5)


def test_patch_merge_of_a_strided_view(device):
    x, weight, bias, eps, cu_seqlens = inputs([9, 13], 40, torch.float32, device)
    wide = torch.randn(22, 100, device=device)
    wide[:, 3:43] = x
    ours = patch_merge(wide[:, 3:43], weight, bias, eps, cu_seqlens, backend="triton")
    assert torch.equal(ours, patch_merge(x, weight, bias, eps, cu_seqlens, backend="triton"))


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_patch_merge_uses_eps(device, eps):
    x, weight, bias, _, cu_seqlens = inputs([9, 13], 64, torch.float32, device)
    x = x * 1e-2
    ours = patch_merge(x, weight, bias, eps, cu_seqlens, backend="triton")
    ref = patch_merge_ref(x.double(), weight.double(), bias.double(), eps, cu_seqlens)
    assert_close(ours, patch_merge_ref(x, weight, bias, eps, cu_seqlens), ref)


def test_patch_merge_errors(device):
    x, weight, bias, eps, cu_seqlens = inputs([9, 13], 64, torch.float32, device)
    with pytest.raises(ValueError, match="leave 19 patches, expected a multiple of 4"):
        patch_merge(x[:21], weight, bias, eps, cu_seqlens.clamp(max=21))
    if device.type == "cpu":  # a GPU is not waited for
        with pytest.raises(ValueError, match=r"cu_seqlens is \[0, 9, 50\], expected to rise from 0 to the 22 rows"):
            patch_merge(x, weight, bias, eps, torch.tensor([0, 9, 50], dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match="merge_size 0"):
        patch_merge(x, weight, bias, eps, cu_seqlens, 0)
    with pytest.raises(ValueError, match="int64"):
        patch_merge(x, weight, bias, eps, cu_seqlens.long())
    with pytest.raises(ValueError, match=r"weight \(32,\)"):
        patch_merge(x, weight[:32], bias, eps, cu_seqlens)
    with pytest.raises(ValueError, match="meta"):
        patch_merge(x, weight, bias, eps, cu_seqlens.to("meta"))
