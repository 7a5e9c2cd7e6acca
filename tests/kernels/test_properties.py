"""Any shape, any lengths, any strides: what the examples of the other files do not think of."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava15_kernels import (
    flash_attn_varlen_func,
    flash_attn_varlen_ref,
    flash_attn_with_kvcache,
    flash_attn_with_kvcache_ref,
    gelu,
    gelu_ref,
    layer_norm,
    layer_norm_ref,
    patch_merge,
    patch_merge_ref,
    qk_norm_rope,
    qk_norm_rope_ref,
    rms_norm,
    rms_norm_ref,
    silu_and_mul,
    silu_and_mul_ref,
    vision_rope_2d,
    vision_rope_2d_ref,
)
from llava15_kernels.testing import DTYPES, assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROPERTY = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

dtypes = st.sampled_from(DTYPES)
head_dims = st.sampled_from([16, 24, 32, 40, 64, 72, 80, 96, 128])
seeds = st.integers(0, 2**31)


def strided(data, shape, dtype, label=""):
    """A random tensor of `shape` as a view: padded rows, an offset into the storage, every second row."""
    pad, offset, step = (data.draw(st.integers(0, 3), f"{label} {what}") for what in ("pad", "offset", "step"))
    step = 1 + step % 2
    wide = torch.randn((shape[0] * step, *shape[1:-1], shape[-1] + pad + offset), device=DEVICE).to(dtype)
    return wide[::step, ..., offset : offset + shape[-1]]


def double(*values):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in values]


def bounds(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)


@PROPERTY
@given(st.data(), seeds, dtypes, st.integers(1, 40), st.integers(1, 700), st.booleans())
def test_norms(data, seed, dtype, rows, width, with_residual):
    torch.manual_seed(seed)
    x = strided(data, (rows, width), dtype)
    residual = strided(data, (rows, width), dtype, "residual") if with_residual else None
    weight, bias = torch.randn(2, width, device=DEVICE).to(dtype)
    total = x if residual is None else x + residual
    for ours, eager, ref in (
        (rms_norm(x, weight, 1e-6, residual, backend="triton"), rms_norm_ref(x, weight, 1e-6, residual),
         rms_norm_ref(*double(total, weight), 1e-6)),
        (layer_norm(x, weight, bias, 1e-5, residual, backend="triton"), layer_norm_ref(x, weight, bias, 1e-5, residual),
         layer_norm_ref(*double(total, weight, bias), 1e-5)),
    ):  # fmt: skip
        if with_residual:
            assert torch.equal(ours[1], total)
            ours, eager = ours[0], eager[0]
        assert_close(ours, eager, ref)


@PROPERTY
@given(st.data(), seeds, dtypes, st.integers(1, 20), st.integers(1, 2500), st.booleans())
def test_activations(data, seed, dtype, rows, width, with_bias):
    torch.manual_seed(seed)
    x = strided(data, (rows, 2 * width), dtype)
    bias = torch.randn(2 * width, device=DEVICE).to(dtype) if with_bias else None
    assert_close(silu_and_mul(x, backend="triton"), silu_and_mul_ref(x), silu_and_mul_ref(x.double()))
    assert_close(gelu(x, bias, backend="triton"), gelu_ref(x, bias), gelu_ref(*double(x, bias)))


@PROPERTY
@given(st.data(), seeds, dtypes, st.integers(1, 60), st.integers(1, 6), head_dims)
def test_vision_rope(data, seed, dtype, rows, heads, head_dim):
    torch.manual_seed(seed)
    q, k = (strided(data, (rows, heads, head_dim), dtype, name) for name in "qk")
    positions = torch.randint(-1, 120, (rows, 1), device=DEVICE, dtype=torch.int32).expand(-1, 2).contiguous()
    positions[:, 1] = torch.where(positions[:, 0] < 0, -1, torch.randint_like(positions[:, 1], 0, 120))
    half = head_dim // 2
    inv_freq = 1.0 / 1e4 ** (torch.arange(0, half, 2, device=DEVICE) / half)
    rest = (positions, inv_freq, torch.randn(1, half, device=DEVICE).to(dtype))
    ours, eager = vision_rope_2d(q, k, *rest, backend="triton"), vision_rope_2d_ref(q, k, *rest)
    for tensors in zip(ours, eager, vision_rope_2d_ref(*double(q, k, *rest)), strict=True):
        assert_close(*tensors)


@PROPERTY
@given(seeds, dtypes, st.lists(st.integers(0, 12), min_size=1, max_size=30), st.integers(1, 200))
def test_patch_merge(seed, dtype, blocks, width):
    torch.manual_seed(seed)
    cu_seqlens = bounds([4 * n + 1 for n in blocks])
    x = torch.randn(int(cu_seqlens[-1]), width, device=DEVICE).to(dtype)
    weight, bias = torch.randn(2, width, device=DEVICE).to(dtype)
    ours = patch_merge(x, weight, bias, 1e-5, cu_seqlens, backend="triton")
    eager = patch_merge_ref(x, weight, bias, 1e-5, cu_seqlens)
    assert_close(ours, eager, patch_merge_ref(*double(x, weight, bias), 1e-5, cu_seqlens))


@PROPERTY
@given(st.data(), seeds, dtypes, st.integers(1, 3), st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), head_dims)
def test_qk_norm_rope(data, seed, dtype, batch, length, kv_heads, group, head_dim):
    torch.manual_seed(seed)
    q = strided(data, (batch, length, kv_heads * group, head_dim), dtype, "q")
    k = strided(data, (batch, length, kv_heads, head_dim), dtype, "k")
    weights = torch.randn(2, head_dim, device=DEVICE).to(dtype)
    positions = torch.randint(0, 4000, (batch, length), device=DEVICE)
    inv_freq = 1.0 / 1e6 ** (torch.arange(0, head_dim, 2, device=DEVICE) / head_dim)
    call = (q, k, *weights, 1e-6, positions, inv_freq)
    ours, eager = qk_norm_rope(*call, backend="triton"), qk_norm_rope_ref(*call)
    for tensors in zip(ours, eager, qk_norm_rope_ref(*double(*call)), strict=True):
        assert_close(*tensors)


lengths = st.lists(st.tuples(st.sampled_from([0, 1, 15, 16, 17, 33, 64, 65]), st.integers(0, 90)), min_size=1, max_size=4)


@PROPERTY
@given(st.data(), seeds, dtypes, lengths, st.integers(1, 2), st.integers(1, 3), head_dims, st.booleans())
def test_varlen_attention(data, seed, dtype, pairs, kv_heads, group, head_dim, causal):
    torch.manual_seed(seed)
    len_q, len_k = zip(*pairs, strict=True)
    if sum(len_q) == 0 or sum(len_k) == 0:
        len_q, len_k = (*len_q, 3), (*len_k, 5)
    q = strided(data, (sum(len_q), kv_heads * group, head_dim), dtype, "q")
    k, v = (strided(data, (sum(len_k), kv_heads, head_dim), dtype, name) for name in "kv")
    cu = (bounds(len_q), bounds(len_k))
    eager = flash_attn_varlen_ref(q, k, v, *cu, causal=causal)
    ref = flash_attn_varlen_ref(*double(q, k, v), *cu, causal=causal)
    for backend in ("triton", "torch"):
        ours = flash_attn_varlen_func(q, k, v, *cu, max(len_q), max(len_k), causal=causal, backend=backend)
        assert_close(ours, eager, ref, backend)


@PROPERTY
@given(
    st.data(),
    seeds,
    dtypes,
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 2),
    st.integers(1, 4),
    head_dims,
    st.integers(0, 5),
)
def test_attention_over_a_cache(data, seed, dtype, batch, queries, kv_heads, group, head_dim, splits):
    torch.manual_seed(seed)
    capacity = data.draw(st.integers(1, 150), "capacity")
    ends = [data.draw(st.integers(0, capacity), "length") for _ in range(batch)]
    starts = [data.draw(st.integers(0, end), "left padding") for end in ends]
    q = strided(data, (batch, queries, kv_heads * group, head_dim), dtype, "q")
    k, v = (strided(data, (batch, capacity, kv_heads, head_dim), dtype, name) for name in "kv")
    seqlens, leftpad = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (ends, starts))
    scale = head_dim**-0.5
    ours = flash_attn_with_kvcache(
        q, k, v, cache_seqlens=seqlens, cache_leftpad=leftpad, causal=True, num_splits=splits, backend="triton"
    )
    eager = flash_attn_with_kvcache_ref(q, k, v, seqlens, leftpad, scale, True)
    assert_close(ours, eager, flash_attn_with_kvcache_ref(*double(q, k, v), seqlens, leftpad, scale, True))
