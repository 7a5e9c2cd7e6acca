"""What only a GPU can show: long sequences at speed, and CUDA graphs."""

import contextlib

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
from llava15_kernels._dispatch import architecture
from llava15_kernels.flash_attn import FlashConfig, flash_config
from llava15_kernels.testing import assert_close

pytestmark = pytest.mark.gpu


def bounds(*lengths):
    return torch.tensor([0, *lengths], device="cuda").cumsum(0, dtype=torch.int32)


def path(name, head_dim, dtype):
    """As the device has it, or by pointers."""
    if name == "default":
        return contextlib.nullcontext()
    return flash_config(FlashConfig.choose(head_dim, dtype, architecture(torch.device("cuda", 0)), descriptors=False))


ROUTES = [(name, dtype) for name in ("default", "pointers") for dtype in (torch.float16, torch.bfloat16)]
LENGTHS = {
    "few-long": [1025, 1, 127, 2048, 513],
    "edges": [0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025],
    "one-image": [3201],
}


@pytest.mark.parametrize("name,dtype", [*ROUTES, ("default", torch.float32)])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("heads,kv_heads,head_dim", [(16, 16, 64), (32, 8, 128), (4, 4, 80), (4, 2, 256)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_long_sequences(lengths, heads, kv_heads, head_dim, causal, dtype, name):
    cu, longest = bounds(*lengths), max(lengths)
    q = torch.randn(int(cu[-1]), heads, head_dim, device="cuda").to(dtype)
    k, v = torch.randn(2, int(cu[-1]), kv_heads, head_dim, device="cuda").to(dtype)
    with path(name, head_dim, dtype):
        ours = flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=causal, backend="triton")
    eager = flash_attn_varlen_ref(q, k, v, cu, cu, causal=causal)
    assert_close(ours, eager, flash_attn_varlen_ref(q.double(), k.double(), v.double(), cu, cu, causal=causal))


@pytest.mark.parametrize("name,dtype", ROUTES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("heads,kv_heads,head_dim", [(4, 4, 64), (8, 2, 128), (2, 2, 72)])
def test_queries_and_keys_of_different_lengths(heads, kv_heads, head_dim, causal, dtype, name):
    lengths_q = [1, 113, 128, 1025, 700, 0, 64, 300]
    lengths_k = [1025, 203, 217, 1024, 2049, 5, 0, 129]
    cu_q, cu_k = bounds(*lengths_q), bounds(*lengths_k)
    q = torch.randn(int(cu_q[-1]), heads, head_dim, device="cuda").to(dtype)
    k, v = torch.randn(2, int(cu_k[-1]), kv_heads, head_dim, device="cuda").to(dtype)
    with path(name, head_dim, dtype):
        ours = flash_attn_varlen_func(q, k, v, cu_q, cu_k, max(lengths_q), max(lengths_k), causal=causal, backend="triton")
    eager = flash_attn_varlen_ref(q, k, v, cu_q, cu_k, causal=causal)
    ref = flash_attn_varlen_ref(q.double(), k.double(), v.double(), cu_q, cu_k, causal=causal)
    assert_close(ours, eager, ref)


@pytest.mark.parametrize("name,dtype", ROUTES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("heads,kv_heads,head_dim", [(4, 4, 64), (8, 2, 128), (2, 2, 80)])
def test_a_long_segment_between_nan(heads, kv_heads, head_dim, causal, dtype, name):
    """Its output is, bit for bit, what it is alone."""
    cu = bounds(70, 1025, 70)
    q = torch.randn(int(cu[-1]), heads, head_dim, device="cuda").to(dtype)
    k, v = torch.randn(2, int(cu[-1]), kv_heads, head_dim, device="cuda").to(dtype)
    inside = slice(70, 1095)
    alone = [x[inside].clone() for x in (q, k, v)]
    for x in (q, k, v):
        x[:70] = x[1095:] = float("nan")
    with path(name, head_dim, dtype):
        packed = flash_attn_varlen_func(q, k, v, cu, cu, 1025, 1025, causal=causal, backend="triton")
        own = flash_attn_varlen_func(*alone, bounds(1025), bounds(1025), 1025, 1025, causal=causal, backend="triton")
    assert torch.equal(packed[inside], own) and own.isfinite().all()


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9, reason="needs capability 9")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_descriptors_are_used_and_captured(head_dim, launches):
    """Launched on Hopper and newer; a CUDA graph holds them and sees new values behind the same addresses."""
    q, k, v = torch.randn(3, 700, 4, head_dim, device="cuda").half()
    cu = bounds(300, 400)

    def attend():
        return flash_attn_varlen_func(q, k, v, cu, cu, 400, 400, causal=True, backend="triton")

    attend()
    assert launches == ["_flash_attn_tiles_kernel"]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    for x in (q, k, v):
        x.normal_()
    graph.replay()
    assert torch.equal(captured, attend())


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
