"""Rows behind 2^31 elements are found: an index times a stride is computed in 64 bits.

The tensors show a few rows of 4 GB of address space, of which only the touched pages exist.
"""

import pytest
import torch

from llava15_kernels import (
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    gelu,
    layer_norm,
    patch_merge,
    qk_norm_rope,
    rms_norm,
    vision_rope_2d,
)

ROWS, STRIDE = 2049, 2**20  # both fit into 32 bits, the last row's offset 2^31 does not


@pytest.fixture
def far(device):
    """Makes (2049, *shape) float16 tensors whose rows lie 2^20 elements apart, random in the last ten rows."""

    def make(*shape):
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * size)
        tensor = torch.empty_strided((ROWS, *shape), (STRIDE, *strides), dtype=torch.float16, device=device)
        tensor[-10:] = torch.randn(10, *shape, device=device)
        return tensor

    return make


def test_row_kernels(far, device):
    x = far(64)
    weight, bias = torch.randn(2, 64, device=device).half()
    for op in (
        lambda x: rms_norm(x, weight, 1e-6, backend="triton"),
        lambda x: layer_norm(x, weight, bias, 1e-5, backend="triton"),
        lambda x: gelu(x, backend="triton"),
    ):
        assert torch.equal(op(x)[-10:], op(x[-10:].contiguous()))


def test_patch_merge(far, device):
    x = far(64)
    weight, bias = torch.randn(2, 64, device=device).half()

    def merge(x):
        bounds = torch.tensor([0, x.shape[0]], dtype=torch.int32, device=device)
        return patch_merge(x, weight, bias, 1e-5, bounds, backend="triton")

    assert torch.equal(merge(x)[-2:], merge(x[-9:].contiguous()))


def test_vision_rope(far, device):
    q, k = far(2, 16), far(2, 16)
    positions = torch.randint(0, 50, (ROWS, 2), dtype=torch.int32, device=device)
    rest = torch.rand(4, device=device), torch.rand(8, device=device)
    whole = vision_rope_2d(q, k, positions, *rest, backend="triton")
    near = vision_rope_2d(q[-10:].contiguous(), k[-10:].contiguous(), positions[-10:], *rest, backend="triton")
    assert all(torch.equal(a[-10:], b) for a, b in zip(whole, near, strict=True))


def test_varlen_attention(far, device):
    q, k, v = far(2, 16), far(1, 16), far(1, 16)
    far_bounds = torch.tensor([ROWS - 10, ROWS], dtype=torch.int32, device=device)
    near_bounds = torch.tensor([0, 10], dtype=torch.int32, device=device)
    # The operator itself: the public function wants the rows before to belong to a segment as well.
    whole = torch.ops.llava15.flash_attn_varlen(q, k, v, far_bounds, far_bounds, 10, 0.25, False)
    near = (x[-10:].contiguous() for x in (q, k, v))
    assert torch.equal(whole[-10:], flash_attn_varlen_func(*near, near_bounds, near_bounds, 10, 10, backend="triton"))


def test_attention_over_a_cache(far, device):
    k, v = (far(1, 16)[None] for _ in range(2))
    q = torch.randn(1, 1, 2, 16, device=device).half()
    pads = torch.tensor([ROWS - 10], dtype=torch.int32, device=device)
    whole = flash_attn_with_kvcache(q, k, v, cache_leftpad=pads, num_splits=1, backend="triton")
    near = (x[:, -10:].contiguous() for x in (k, v))
    assert torch.equal(whole, flash_attn_with_kvcache(q, *near, num_splits=1, backend="triton"))


def test_writing_into_a_cache(far, device):
    k_cache, v_cache = far(1, 16), far(1, 16)
    q, k, v = torch.randn(3, 1, 2, 1, 16, device=device).half()
    weight, inv_freq = torch.ones(16, device=device).half(), torch.rand(8, device=device)
    positions = torch.arange(2, device=device)[None]
    slots = torch.tensor([[ROWS - 2, ROWS - 1]], device=device)
    call = (q, k, weight, weight, 1e-6, positions, inv_freq)
    qk_norm_rope(*call, v=v, k_cache=k_cache, v_cache=v_cache, slot_mapping=slots, backend="triton")
    assert torch.equal(k_cache[-2:], qk_norm_rope(*call, backend="triton")[1][0]) and torch.equal(v_cache[-2:], v[0])
