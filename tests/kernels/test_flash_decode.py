import pytest
import torch

from llava15_kernels import flash_attn_varlen_ref, flash_attn_with_kvcache, flash_attn_with_kvcache_ref
from llava15_kernels.flash_decode import choose_splits
from llava15_kernels.testing import DTYPES, assert_close

BACKENDS = ["triton", "torch"]


def inputs(batch, length, heads, kv_heads, head_dim, capacity, dtype, device):
    q = torch.randn(batch, length, heads, head_dim, device=device).to(dtype)
    k, v = torch.randn(2, batch, capacity, kv_heads, head_dim, device=device).to(dtype)
    return q, k, v


def int32(*values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def check(q, k, v, seqlens, leftpad, causal, backend="triton", splits=0):
    scale = q.shape[-1] ** -0.5
    ours = flash_attn_with_kvcache(
        q, k, v, cache_seqlens=seqlens, cache_leftpad=leftpad, causal=causal, num_splits=splits, backend=backend
    )
    eager = flash_attn_with_kvcache_ref(q, k, v, seqlens, leftpad, scale, causal)
    ref = flash_attn_with_kvcache_ref(q.double(), k.double(), v.double(), seqlens, leftpad, scale, causal)
    assert_close(ours, eager, ref, "flash_attn_with_kvcache")
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [0, 1, 3, 8])
@pytest.mark.parametrize("length", [1, 3])
def test_flash_attn_with_kvcache(device, length, splits, dtype):
    q, k, v = inputs(3, length, 8, 2, 64, 300, dtype, device)
    check(q, k, v, int32(300, 129, 17, device=device), int32(0, 5, 0, device=device), True, splits=splits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("ends,starts", [((90, 90), (0, 0)), ((70, 70), (5, 5)), ((64, 64), (0, 61)), ((90, 40), (7, 2))])
def test_the_torch_backend(device, ends, starts, length, causal, dtype):
    q, k, v = inputs(2, length, 6, 2, 64, 90, dtype, device)
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for x in (k, v):
            x[row, :start] = x[row, end:] = float("nan")
    # The reference multiplies scores before it hides them.
    clean = [x.nan_to_num(0.0) for x in (k, v)]
    ends, starts = int32(*ends, device=device), int32(*starts, device=device)
    ours = flash_attn_with_kvcache(q, k, v, cache_seqlens=ends, cache_leftpad=starts, causal=causal, backend="torch")
    arguments = (ends, starts, 64**-0.5, causal)
    eager = flash_attn_with_kvcache_ref(q, *clean, *arguments)
    assert_close(ours, eager, flash_attn_with_kvcache_ref(q.double(), *(x.double() for x in clean), *arguments))


@pytest.mark.parametrize("heads,kv_heads,head_dim", [(5, 5, 16), (32, 8, 128), (2, 1, 72), (4, 2, 80), (1, 1, 256)])
def test_head_shapes(device, heads, kv_heads, head_dim):
    q, k, v = inputs(2, 1, heads, kv_heads, head_dim, 70, torch.float32, device)
    check(q, k, v, int32(70, 33, device=device), int32(0, 0, device=device), False)


def test_the_reference_is_the_varlen_reference(device):
    """Two formulations of the same thing: a mask over a cache, and a packed sequence with fewer queries than keys."""
    q, k, v = inputs(1, 4, 4, 2, 16, 50, torch.float64, device)
    cu_q, cu_k = int32(0, 4, device=device), int32(0, 37, device=device)
    packed = flash_attn_varlen_ref(q[0], k[0, 3:40], v[0, 3:40], cu_q, cu_k, causal=True)
    masked = flash_attn_with_kvcache_ref(q, k, v, int32(40, device=device), int32(3, device=device), 0.25, True)
    torch.testing.assert_close(masked[0], packed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_counted_slots_are_read(device, backend):
    """NaN before the left padding's end and behind the length stays unseen; a large value in the last slot does not."""
    q, k, v = inputs(2, 1, 4, 2, 16, 90, torch.float32, device)
    for row, (first, end) in enumerate([(7, 65), (0, 33)]):
        for x in (k, v):
            x[row, :first] = x[row, end:] = float("nan")
        v[row, end - 1] += 1000.0
    ours = flash_attn_with_kvcache(
        q, k, v, cache_seqlens=int32(65, 33, device=device), cache_leftpad=int32(7, 0, device=device), backend=backend
    )
    assert ours.isfinite().all() and (ours.abs() > 0.5).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_without_keys_give_zero(device, backend):
    q, k, v = inputs(3, 3, 2, 1, 16, 40, torch.float32, device)
    seqlens, leftpad = int32(0, 2, 20, device=device), int32(0, 0, 20, device=device)
    ours = check(q, k, v, seqlens, leftpad, True, backend)
    assert (ours[0] == 0).all() and (ours[1, 0] == 0).all() and (ours[2] == 0).all() and (ours[1, 1:] != 0).any()


def test_lengths_beyond_the_cache_are_cut(device):
    q, k, v = inputs(1, 1, 2, 1, 16, 80, torch.float32, device)
    outside = flash_attn_with_kvcache(q, k[:, :40], v[:, :40], cache_seqlens=int32(1000, device=device), backend="triton")
    inside = flash_attn_with_kvcache(q, k[:, :40], v[:, :40], cache_seqlens=40, backend="triton")
    assert torch.equal(outside, inside)


def test_strided_caches(device):
    """A cache stored head by head, as transformers keeps it."""
    q, k, v = inputs(2, 1, 4, 2, 16, 50, torch.float32, device)
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    assert torch.equal(
        flash_attn_with_kvcache(q, *by_head, backend="triton"), flash_attn_with_kvcache(q, k, v, backend="triton")
    )


def test_two_runs_are_bit_equal(device):
    q, k, v = inputs(2, 1, 8, 2, 64, 200, torch.float16, device)
    first, second = (flash_attn_with_kvcache(q, k, v, causal=True, backend="triton") for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("capacity,expected", [(64, 1), (1024, 16), (8192, 33), (131072, 33)])
def test_splits_fill_an_h100_with_one_prompt(capacity, expected):
    assert choose_splits(1, 8, capacity, 64, processors=132) == expected


def test_flash_decode_errors(device):
    q, k, v = inputs(2, 1, 4, 2, 16, 50, torch.float32, device)
    with pytest.raises(NotImplementedError, match="rotary_cos"):
        flash_attn_with_kvcache(q, k, v, rotary_cos=torch.ones(4, 8, device=device))
    with pytest.raises(NotImplementedError, match="k is not supported"):
        flash_attn_with_kvcache(q, k, v, k, v)
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        flash_attn_with_kvcache(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="cache_seqlens 51"):
        flash_attn_with_kvcache(q, k, v, cache_seqlens=51)
    with pytest.raises(ValueError, match=r"cache_leftpad is .*\(3,\)"):
        flash_attn_with_kvcache(q, k, v, cache_leftpad=int32(0, 0, 0, device=device))
    with pytest.raises(ValueError, match="softmax_scale is 0"):
        flash_attn_with_kvcache(q, k, v, softmax_scale=0.0)
    with pytest.raises(ValueError, match="at most 128"):
        flash_attn_with_kvcache(torch.randn(2, 80, 4, 16, device=device), k, v)
    with pytest.raises(TypeError, match="float16"):
        flash_attn_with_kvcache(q, k.half(), v.half())


def test_expanded_lengths(device):
    q, k, v = inputs(2, 1, 4, 2, 16, 32, torch.float32, device)
    expanded = int32(20, device=device).expand(2)
    found = flash_attn_with_kvcache(q, k, v, cache_seqlens=expanded, backend="triton")
    assert torch.equal(found, flash_attn_with_kvcache(q, k, v, cache_seqlens=20, backend="triton"))
    with pytest.raises(ValueError, match="num_splits -1"):
        flash_attn_with_kvcache(q, k, v, num_splits=-1)
