import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding, apply_rotary_pos_emb

from llava15_kernels import qk_norm_rope, qk_norm_rope_ref
from llava15_kernels.testing import DTYPES, assert_close


def inputs(batch, length, heads, kv_heads, head_dim, dtype, device, theta=1e4):
    """q, k, v as views of a packed qkv, positions up to 1000."""
    packed = torch.randn(batch, length, heads + 2 * kv_heads, head_dim, device=device).to(dtype)
    q, k, v = packed.split([heads, kv_heads, kv_heads], dim=2)
    q_weight, k_weight = torch.randn(2, head_dim, device=device).to(dtype)
    position_ids = torch.randint(0, 1000, (batch, length), device=device)
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device) / head_dim)
    return (q, k, q_weight, k_weight, 1e-6, position_ids, inv_freq), v


def wide(arguments):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]


SHAPES = [(1, 1, 1, 1, 16), (2, 7, 6, 2, 16), (1, 5, 32, 8, 128), (2, 3, 5, 5, 80), (1, 4, 3, 1, 256)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_qk_norm_rope(device, shape, dtype):
    arguments, _ = inputs(*shape, dtype, device)
    ours = qk_norm_rope(*arguments, backend="triton")
    eager, ref = qk_norm_rope_ref(*arguments), qk_norm_rope_ref(*wide(arguments))
    for name, *tensors in zip("qk", ours, eager, ref, strict=True):
        assert_close(*tensors, name)


@pytest.mark.parametrize("backend,index", [("triton", torch.int64), ("triton", torch.int32), ("torch", torch.int64)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_keys_and_values_land_in_the_cache(device, shape, backend, index):
    arguments, v = inputs(*shape, torch.float32, device)
    batch, length, _, kv_heads, head_dim = shape
    caches = torch.full((2, batch, length + 9, kv_heads, head_dim), 7.0, device=device)
    k_cache, v_cache = caches.flatten(1, 2)
    starts = torch.randint(0, 9, (batch, 1), device=device)
    in_row = torch.arange(length, device=device) + starts
    slots = (in_row + torch.arange(batch, device=device)[:, None] * (length + 9)).to(index)
    q = qk_norm_rope(*arguments, v=v, k_cache=k_cache, v_cache=v_cache, slot_mapping=slots, backend=backend)
    expected_q, expected_k = qk_norm_rope(*arguments, backend=backend)
    assert torch.equal(q, expected_q)
    for row, start in enumerate(starts[:, 0].tolist()):
        for cache, expected in zip(caches, (expected_k, v), strict=True):
            assert torch.equal(cache[row, start : start + length], expected[row])
            assert (cache[row, :start] == 7.0).all() and (cache[row, start + length :] == 7.0).all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_rows_outside_the_cache_are_not_written(device, backend):
    arguments, v = inputs(1, 4, 2, 1, 16, torch.float32, device)
    storage = torch.full((2, 30, 1, 16), 7.0, device=device)
    caches = {"k_cache": storage[0, 10:20], "v_cache": storage[1, 10:20]}
    slots = torch.tensor([[-1, 9, 10, 2]], device=device)
    qk_norm_rope(*arguments, v=v, **caches, slot_mapping=slots, backend=backend)
    written = (storage != 7.0).all(-1).all(-1)
    assert written.nonzero().tolist() == [[0, 12], [0, 19], [1, 12], [1, 19]]


def test_it_is_qwen3s(device):
    """Norm module, rotary module and rotation of transformers, one after the other."""
    config = Qwen3Config(head_dim=64, num_attention_heads=4, num_key_value_heads=2, hidden_size=256, rope_theta=5e6)
    rotary = Qwen3RotaryEmbedding(config).to(device)
    norms = [Qwen3RMSNorm(64, eps=1e-6).to(device) for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    arguments, _ = inputs(2, 9, 4, 2, 64, torch.float32, device)
    q, k, *_, position_ids, _ = arguments
    with torch.no_grad():
        cos, sin = rotary(q, position_ids)
        theirs = apply_rotary_pos_emb(norms[0](q), norms[1](k), cos, sin, unsqueeze_dim=2)
        weights = (norms[0].weight, norms[1].weight)
        ours = qk_norm_rope(q, k, *weights, 1e-6, position_ids, rotary.inv_freq, backend="triton")
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option,value", [("eps", 0.5), ("theta", 20.0), ("scaling", 0.3)])
def test_every_number_is_used(device, option, value):
    arguments, _ = inputs(1, 5, 2, 1, 32, torch.float32, device, theta=value if option == "theta" else 1e4)
    arguments = (*arguments[:4], value if option == "eps" else 1e-6, *arguments[5:])
    scaling = value if option == "scaling" else 1.0
    ours = qk_norm_rope(*arguments, attention_scaling=scaling, backend="triton")
    eager = qk_norm_rope_ref(*arguments, scaling)
    for mine, same, ref in zip(ours, eager, qk_norm_rope_ref(*wide(arguments), scaling), strict=True):
        assert_close(mine, same, ref)


def test_one_row_of_positions_serves_the_batch(device):
    arguments, _ = inputs(3, 4, 2, 1, 16, torch.float32, device)
    positions = arguments[5][:1]
    broadcast = qk_norm_rope(*arguments[:5], positions, arguments[6], backend="triton")
    repeated = qk_norm_rope(*arguments[:5], positions.expand(3, -1).contiguous(), arguments[6], backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(broadcast, repeated, strict=True))


def test_qk_norm_rope_errors(device):
    arguments, v = inputs(2, 3, 4, 2, 16, torch.float32, device)
    q, k, q_weight, k_weight, eps, positions, inv_freq = arguments
    cache = torch.zeros(8, 2, 16, device=device)
    slots = torch.arange(6, device=device).view(2, 3)
    with pytest.raises(ValueError, match=r"k_weight has shape \(8,\)"):
        qk_norm_rope(q, k, q_weight, k_weight[:8], eps, positions, inv_freq)
    with pytest.raises(ValueError, match="position_ids"):
        qk_norm_rope(q, k, q_weight, k_weight, eps, positions.float(), inv_freq)
    with pytest.raises(ValueError, match="belong together"):
        qk_norm_rope(*arguments, v=v, k_cache=cache)
    with pytest.raises(ValueError, match=r"v_cache has shape \(7, 2, 16\)"):
        qk_norm_rope(*arguments, v=v, k_cache=cache, v_cache=cache[:7], slot_mapping=slots)
    with pytest.raises(ValueError, match="float32"):
        qk_norm_rope(*arguments, v=v, k_cache=cache, v_cache=cache, slot_mapping=slots.float())
    with pytest.raises(TypeError, match="float16"):
        qk_norm_rope(*arguments, v=v, k_cache=cache.half(), v_cache=cache, slot_mapping=slots)
    with pytest.raises(ValueError, match="head_dim 320"):
        qk_norm_rope(*inputs(1, 1, 1, 1, 320, torch.float32, device)[0])


def test_index_tensors_with_strides(device):
    (q, k, q_weight, k_weight, eps, positions, inv_freq), v = inputs(2, 3, 4, 2, 16, torch.float32, device)
    dense = qk_norm_rope(q, k, q_weight, k_weight, eps, positions, inv_freq, backend="triton")
    strided = positions.T.contiguous().T, inv_freq.repeat_interleave(2)[::2]
    found = qk_norm_rope(q, k, q_weight, k_weight, eps, *strided, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))
    cache = torch.zeros(2, 6, 2, 16, device=device)
    slots = torch.arange(6, device=device).view(2, 3).T.contiguous().T
    qk_norm_rope(
        q,
        k,
        q_weight,
        k_weight,
        eps,
        *strided,
        v=v,
        k_cache=cache[0],
        v_cache=cache[1],
        slot_mapping=slots,
        backend="triton",
    )
    assert torch.equal(cache[0], dense[1].flatten(0, 1)) and torch.equal(cache[1], v.flatten(0, 1))


def test_without_query_heads_the_keys_are_still_written(device):
    (q, *rest), _ = inputs(1, 3, 4, 2, 16, torch.float32, device)
    assert torch.equal(qk_norm_rope(q[:, :, :0], *rest, backend="triton")[1], qk_norm_rope(q, *rest, backend="triton")[1])
