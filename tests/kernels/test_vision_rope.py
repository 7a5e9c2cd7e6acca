import pytest
import torch

from llava15_kernels import vision_rope_2d, vision_rope_2d_ref
from llava15_kernels.testing import DTYPES, assert_close


def inputs(rows, heads, head_dim, dtype, device, theta=10000.0):
    """q and k as the strided views of a packed qkv, class rows every 9 rows, positions up to 100."""
    q, k, _ = torch.randn(rows, 3, heads, head_dim, device=device).to(dtype).unbind(1)
    position_ids = torch.randint(0, 100, (rows, 2), dtype=torch.int32, device=device)
    position_ids[::9] = -1
    half = head_dim // 2
    inv_freq = 1.0 / theta ** (torch.arange(0, half, 2, device=device) / half)
    class_pos_emb = torch.randn(1, half, device=device).to(dtype)
    return q, k, position_ids, inv_freq, class_pos_emb


def wide(q, k, position_ids, inv_freq, class_pos_emb):
    return q.double(), k.double(), position_ids, inv_freq.double(), class_pos_emb.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,heads,head_dim", [(1, 1, 16), (37, 5, 16), (25, 4, 72), (19, 3, 80), (111, 16, 64), (9, 2, 256)])
def test_vision_rope(device, rows, heads, head_dim, dtype):
    arguments = inputs(rows, heads, head_dim, dtype, device)
    ours = vision_rope_2d(*arguments, backend="triton")
    eager = vision_rope_2d_ref(*arguments)
    ref = vision_rope_2d_ref(*wide(*arguments))
    for name, *tensors in zip("qk", ours, eager, ref, strict=True):
        assert_close(*tensors, name)


def test_vision_rope_leaves_its_inputs_alone(device):
    arguments = inputs(20, 4, 64, torch.float32, device)
    before = [x.clone() for x in arguments]
    vision_rope_2d(*arguments, backend="triton")
    assert all(torch.equal(x, y) for x, y in zip(arguments, before, strict=True))


def test_vision_rope_row_and_column_are_told_apart(device):
    """Row angles turn the first half of the pairs, column angles the second."""
    q, k, position_ids, inv_freq, class_pos_emb = inputs(8, 2, 32, torch.float32, device)
    position_ids[:] = torch.tensor([3, 0])
    by_row, _ = vision_rope_2d(q, k, position_ids, inv_freq, class_pos_emb, backend="triton")
    assert torch.equal(by_row[..., 8:16], q[..., 8:16]) and not torch.equal(by_row[..., :8], q[..., :8])
    position_ids[:] = torch.tensor([0, 3])
    by_column, _ = vision_rope_2d(q, k, position_ids, inv_freq, class_pos_emb, backend="triton")
    assert torch.equal(by_column[..., :8], q[..., :8]) and not torch.equal(by_column[..., 8:16], q[..., 8:16])


@pytest.mark.parametrize("theta", [100.0, 10000.0])
def test_vision_rope_uses_the_frequencies(device, theta):
    arguments = inputs(30, 2, 64, torch.float32, device, theta)
    ours, _ = vision_rope_2d(*arguments, backend="triton")
    assert_close(ours, vision_rope_2d_ref(*arguments)[0], vision_rope_2d_ref(*wide(*arguments))[0])


def test_vision_rope_errors(device):
    q, k, position_ids, inv_freq, class_pos_emb = inputs(8, 2, 32, torch.float32, device)
    with pytest.raises(ValueError, match=r"inv_freq has shape \(4,\), expected \(8,\)"):
        vision_rope_2d(q, k, position_ids, inv_freq[:4], class_pos_emb)
    with pytest.raises(ValueError, match=r"position_ids has shape \(7, 2\)"):
        vision_rope_2d(q, k, position_ids[:7], inv_freq, class_pos_emb)
    with pytest.raises(ValueError, match="head_dim"):
        vision_rope_2d(q[..., :30], k[..., :30], position_ids, inv_freq, class_pos_emb)
    with pytest.raises(ValueError, match="float32"):
        vision_rope_2d(q, k, position_ids.float(), inv_freq, class_pos_emb)
    with pytest.raises(TypeError, match="float64"):
        vision_rope_2d(q.double(), k.double(), position_ids, inv_freq, class_pos_emb)


def test_vision_rope_with_strided_frequencies(device):
    q, k, position_ids, inv_freq, class_pos_emb = inputs(8, 2, 32, torch.float32, device)
    strided = inv_freq.repeat_interleave(2)[::2]
    dense = vision_rope_2d(q, k, position_ids, inv_freq, class_pos_emb, backend="triton")
    found = vision_rope_2d(q, k, position_ids, strided, class_pos_emb, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))
