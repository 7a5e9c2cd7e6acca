import pytest
import torch

from llava15_kernels import decode_attention, decode_attention_ref, flash_attn_with_kvcache, qk_norm_rope
from llava15_kernels.testing import DTYPES, assert_close

HEADS = [pytest.param(4, 2, 16, id="4-2-16"), pytest.param(6, 1, 64, id="6-1-64"), pytest.param(3, 3, 40, id="3-3-40")]


def call(device, dtype, seqlens, heads=4, kv_heads=2, head_dim=16, capacity=150, pads=None):
    """Operands as views of a packed projection, and a cache with NaN where nothing is stored yet."""
    batch = len(seqlens)
    packed = torch.randn(batch, 1, heads + 2 * kv_heads, head_dim, device=device).to(dtype) * 2
    k_cache, v_cache = torch.randn(2, batch, capacity, kv_heads, head_dim, device=device).to(dtype)
    lengths = torch.tensor(seqlens, dtype=torch.int32, device=device)
    pads = torch.tensor(pads or [0] * batch, dtype=torch.int32, device=device)
    for cache in (k_cache, v_cache):
        for b, length in enumerate(seqlens):
            cache[b, max(length - 1, 0) :] = torch.nan
            cache[b, : pads[b]] = torch.nan
    q_weight, k_weight = torch.randn(2, head_dim, device=device).to(dtype)
    positions = (lengths - pads - 1).clamp(min=0)[None].long()
    inv_freq = 10000.0 ** -(torch.arange(head_dim // 2, device=device) / head_dim * 2)
    return [
        *packed.split([heads, kv_heads, kv_heads], dim=2), q_weight, k_weight, 1e-6, positions, inv_freq, 1.0, k_cache, v_cache,
        lengths, pads, head_dim**-0.5,
    ]  # fmt: skip


def wide(arguments):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]


def copy(arguments):
    """With caches of its own, which are written."""
    return [x.clone() if index in (9, 10) else x for index, x in enumerate(arguments)]


def run(arguments, num_splits=0):
    *tensors, pads, scale = arguments
    operands, scaling, cache = tensors[:8], tensors[8], tensors[9:]
    options = {"attention_scaling": scaling, "softmax_scale": scale, "num_splits": num_splits, "backend": "triton"}
    return decode_attention(*operands, *cache, pads, **options)


def check(arguments, num_splits=0):
    ours, eager, exact = copy(arguments), copy(arguments), copy(wide(arguments))
    out = run(ours, num_splits)
    assert_close(out, decode_attention_ref(*eager), decode_attention_ref(*exact), "out")
    for side, name in ((9, "k_cache"), (10, "v_cache")):
        for b, length in enumerate(arguments[11].tolist()):
            assert_close(ours[side][b, length - 1], eager[side][b, length - 1], exact[side][b, length - 1], name)
            kept = [index for index in range(ours[side].shape[1]) if index != length - 1]
            assert torch.equal(ours[side][b, kept].nan_to_num(7.0), arguments[side][b, kept].nan_to_num(7.0)), "other rows"
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("num_splits", [0, 1, 3])
def test_against_the_reference(device, heads, kv_heads, head_dim, num_splits, dtype):
    check(call(device, dtype, [130, 64, 1], heads, kv_heads, head_dim), num_splits)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 129, 150])
def test_lengths_at_the_borders_of_tiles_and_capacity(device, length):
    check(call(device, torch.float32, [length]), 4)


def test_left_padding(device):
    check(call(device, torch.float32, [100, 70], pads=[0, 37]), 2)
    check(call(device, torch.float32, [70], pads=[69]))


def test_positions_and_scaling_of_the_rotary_embedding(device):
    arguments = call(device, torch.float32, [90, 12])
    arguments[6], arguments[8] = torch.tensor([[5], [40000]], device=device), 1.3
    check(arguments)


def test_it_is_the_two_calls(device):
    """`qk_norm_rope` into the cache, then `flash_attn_with_kvcache`."""
    arguments = call(device, torch.float32, [90, 33])
    q, k, v, q_weight, k_weight, eps, positions, inv_freq, _, *_ = arguments
    k_cache, v_cache, lengths = (x.clone() for x in arguments[9:12])
    slots = (torch.arange(2, device=device) * k_cache.shape[1] + lengths - 1)[:, None].long()
    cache = {"v": v, "k_cache": k_cache.flatten(0, 1), "v_cache": v_cache.flatten(0, 1), "slot_mapping": slots}
    queries = qk_norm_rope(q, k, q_weight, k_weight, eps, positions.reshape(2, 1), inv_freq, **cache, backend="triton")
    expected = flash_attn_with_kvcache(queries, k_cache, v_cache, cache_seqlens=lengths, causal=True, backend="triton")
    ours = copy(arguments)
    torch.testing.assert_close(run(ours), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[9], k_cache, equal_nan=True)
    assert torch.equal(ours[10].nan_to_num(7.0), v_cache.nan_to_num(7.0))


@pytest.mark.parametrize("length", [0, -3, 151])
def test_a_length_outside_the_cache_writes_nothing(device, length):
    arguments = call(device, torch.float32, [40])
    arguments[9].fill_(0.5), arguments[10].fill_(0.5)
    arguments[11].fill_(length)
    before = arguments[9].clone(), arguments[10].clone()
    assert run(arguments).isfinite().all()
    assert torch.equal(arguments[9], before[0]) and torch.equal(arguments[10], before[1])


def test_errors(device):
    good = call(device, torch.float32, [20, 30])
    for index, value, kind, message in [
        (0, good[0].expand(-1, 2, -1, -1), ValueError, r"expected \(B, 1, heads"),
        (1, good[1][:, :, :0], ValueError, "k .* expected"),
        (2, good[2][:1], ValueError, "v has shape"),
        (2, good[2].half(), TypeError, "v is torch.float16"),
        (6, good[6].float(), ValueError, "position_ids is torch.float32"),
        (7, good[7][:3], ValueError, "inv_freq has shape"),
        (9, good[9].transpose(2, 3).contiguous().transpose(2, 3), ValueError, "contiguous last dimension"),
        (11, good[11].long(), ValueError, "cache_seqlens is torch.int64"),
    ]:
        with pytest.raises(kind, match=message):
            run([value if at == index else x for at, x in enumerate(good)])
