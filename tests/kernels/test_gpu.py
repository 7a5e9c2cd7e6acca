"""What only a GPU can show: long sequences at speed, and CUDA graphs."""

import pytest
import torch

from llava15_kernels import (
    flash_attn_varlen_func,
    flash_attn_varlen_ref,
    flash_attn_with_kvcache,
    flash_attn_with_kvcache_ref,
    qk_norm_rope,
    rms_norm,
)
from llava15_kernels.testing import assert_close

pytestmark = pytest.mark.gpu


def bounds(*lengths):
    return torch.tensor([0, *lengths], device="cuda").cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("heads,kv_heads,head_dim", [(16, 16, 64), (32, 8, 128), (4, 4, 80), (4, 2, 256)])
def test_long_sequences(heads, kv_heads, head_dim, causal, dtype):
    cu = bounds(1025, 1, 127, 2048, 513)
    q = torch.randn(int(cu[-1]), heads, head_dim, device="cuda").to(dtype)
    k, v = torch.randn(2, int(cu[-1]), kv_heads, head_dim, device="cuda").to(dtype)
    ours = flash_attn_varlen_func(q, k, v, cu, cu, 2048, 2048, causal=causal, backend="triton")
    eager = flash_attn_varlen_ref(q, k, v, cu, cu, causal=causal)
    assert_close(ours, eager, flash_attn_varlen_ref(q.double(), k.double(), v.double(), cu, cu, causal=causal))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def test_long_caches(batch, dtype):
    q = torch.randn(batch, 1, 32, 128, device="cuda").to(dtype)
    k, v = torch.randn(2, batch, 8192, 8, 128, device="cuda").to(dtype)
    seqlens = torch.randint(1, 8193, (batch,), dtype=torch.int32, device="cuda")
    pads = torch.zeros(batch, dtype=torch.int32, device="cuda")
    ours = flash_attn_with_kvcache(q, k, v, cache_seqlens=seqlens, causal=True, backend="triton")
    eager = flash_attn_with_kvcache_ref(q, k, v, seqlens, pads, 128**-0.5, True)
    assert_close(ours, eager, flash_attn_with_kvcache_ref(q.double(), k.double(), v.double(), seqlens, pads, 128**-0.5, True))


def test_a_decode_step_in_a_cuda_graph():
    """Captured once, replayed at growing lengths and with other inputs, equal to running it anew."""
    batch, heads, kv_heads, head_dim, capacity = 2, 8, 2, 64, 1024
    dtype = torch.bfloat16
    packed = torch.randn(batch, 1, heads + 2 * kv_heads, head_dim, device="cuda").to(dtype)
    k_cache, v_cache = torch.randn(2, batch, capacity, kv_heads, head_dim, device="cuda").to(dtype)
    weight, inv_freq = torch.randn(head_dim, device="cuda").to(dtype), torch.rand(head_dim // 2, device="cuda")
    lengths = torch.tensor([5, 100], dtype=torch.int32, device="cuda")
    positions = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
    first_slots = capacity * torch.arange(batch, device="cuda")[:, None]

    def step(k_cache, v_cache):
        q, k, v = packed.split([heads, kv_heads, kv_heads], dim=2)
        q = qk_norm_rope(
            rms_norm(q, weight, 1e-6), k, weight, weight, 1e-6, positions, inv_freq,
            v=v, k_cache=k_cache.flatten(0, 1), v_cache=v_cache.flatten(0, 1), slot_mapping=first_slots + positions,
        )  # fmt: skip
        return flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths + 1, causal=True)

    eager_caches = k_cache.clone(), v_cache.clone()
    positions.copy_(lengths[:, None])
    with torch.no_grad():
        step(k_cache.clone(), v_cache.clone())  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(k_cache, v_cache)
        for _ in range(5):
            packed.copy_(torch.randn_like(packed))
            positions.copy_(lengths[:, None])
            graph.replay()
            assert torch.equal(captured, step(*eager_caches))
            assert torch.equal(k_cache, eager_caches[0]) and torch.equal(v_cache, eager_caches[1])
            lengths += 37
