import pytest
import torch

from llava15_kernels import flash_attn_varlen_func, flash_attn_varlen_ref
from llava15_kernels.testing import DTYPES, assert_close, worst

BACKENDS = ["triton", "torch"]
# Lengths around the tile edges, one token, nothing at all, queries and keys that differ.
CASES = {
    "one-token": ([1], [1]),
    "edges": ([15, 16, 17, 31, 32, 33], None),
    "empty": ([0, 20, 0, 0, 33, 0], None),
    "long": ([130, 65], None),
    "filled-cache": ([5, 1, 40], [70, 33, 40]),
    "no-keys": ([7, 9], [0, 12]),
    "more-queries": ([20, 9], [12, 3]),
}


def cumulative(lengths, device):
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)


def inputs(lengths_q, lengths_k, heads, kv_heads, head_dim, dtype, device):
    lengths_k = lengths_q if lengths_k is None else lengths_k
    q = torch.randn(sum(lengths_q), heads, head_dim, device=device).to(dtype)
    k, v = torch.randn(2, sum(lengths_k), kv_heads, head_dim, device=device).to(dtype)
    return q, k, v, cumulative(lengths_q, device), cumulative(lengths_k, device), max(lengths_q), max(lengths_k)


def check(arguments, causal, backend, scale=None):
    q, k, v, cu_q, cu_k, *_ = arguments
    ours = flash_attn_varlen_func(*arguments, softmax_scale=scale, causal=causal, backend=backend)
    eager = flash_attn_varlen_ref(q, k, v, cu_q, cu_k, scale, causal)
    ref = flash_attn_varlen_ref(q.double(), k.double(), v.double(), cu_q, cu_k, scale, causal)
    assert_close(ours, eager, ref, "flash_attn_varlen_func")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_flash_attn_varlen(device, case, causal, dtype, backend):
    check(inputs(*case, 4, 2, 64, dtype, device), causal, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads,kv_heads,head_dim", [(5, 5, 16), (6, 2, 16), (2, 1, 72), (2, 2, 80), (4, 1, 128), (1, 1, 256)])
def test_flash_attn_varlen_heads(device, heads, kv_heads, head_dim, dtype):
    check(inputs([19, 40], None, heads, kv_heads, head_dim, dtype, device), True, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_every_segments_last_key_counts(device, causal, backend):
    """A large value in each segment's last key is in the output of the rows that see it."""
    q, k, v, cu, *rest = inputs([33, 16, 50], None, 2, 2, 16, torch.float32, device)
    last = cu[1:].long() - 1
    v[last] += 1000.0
    check((q, k, v, cu, *rest), causal, backend)
    ours = flash_attn_varlen_func(q, k, v, cu, *rest, causal=causal, backend=backend)
    assert (ours[last].abs() > 1.0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_nothing_leaks_between_segments(device, causal, backend):
    """NaN in the neighbouring segments leaves a segment's output finite."""
    q, k, v, cu, _, longest, _ = inputs([33, 40, 20], None, 2, 2, 16, torch.float32, device)
    inside = slice(int(cu[1]), int(cu[2]))
    for x in (q, k, v):
        outside = torch.ones(x.shape[0], dtype=torch.bool)
        outside[inside] = False
        x[outside] = float("nan")
    ours = flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=causal, backend=backend)
    assert ours[inside].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_a_segment_alone_gives_the_same_bits_as_in_a_pack(device, causal, dtype):
    q, k, v, cu, _, longest, _ = inputs([50, 7, 130], None, 2, 1, 64, dtype, device)
    packed = flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=causal, backend="triton")
    for start, end in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        bounds = cumulative([end - start], device)
        alone = flash_attn_varlen_func(
            *(x[start:end] for x in (q, k, v)), bounds, bounds, end - start, end - start, causal=causal, backend="triton"
        )
        assert torch.equal(alone, packed[start:end])


def test_two_runs_are_bit_equal(device):
    arguments = inputs([70, 65], None, 2, 1, 64, torch.float16, device)
    first, second = (flash_attn_varlen_func(*arguments, causal=True, backend="triton") for _ in range(2))
    assert torch.equal(first, second)


def test_strided_views_of_a_packed_qkv(device):
    """As the vision tower passes them; and with a misaligned storage offset."""
    qkv = torch.randn(60 * 3 * 4 * 16 + 1, device=device)
    for base in (qkv[:-1], qkv[1:]):
        q, k, v = base.view(60, 3, 4, 16).unbind(1)
        cu = cumulative([25, 35], device)
        strided = flash_attn_varlen_func(q, k, v, cu, cu, 35, 35, backend="triton")
        dense = flash_attn_varlen_func(*(x.contiguous() for x in (q, k, v)), cu, cu, 35, 35, backend="triton")
        assert torch.equal(strided, dense)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_softmax_scale_is_used(device, scale, backend):
    check(inputs([20, 33], None, 2, 2, 16, torch.float32, device), False, backend, scale)


def test_scale_defaults_to_the_head_dim(device):
    arguments = inputs([20], None, 1, 1, 64, torch.float32, device)
    assert torch.equal(
        flash_attn_varlen_func(*arguments, backend="triton"),
        flash_attn_varlen_func(*arguments, softmax_scale=0.125, backend="triton"),
    )


def test_large_scores_do_not_overflow(device):
    q, k, v, *rest = inputs([33], None, 1, 1, 64, torch.float32, device)
    check((q * 100, k * 100, v, *rest), True, "triton")


@pytest.mark.parametrize(
    "option,value",
    [("dropout_p", 0.1), ("window_size", (4, 0)), ("softcap", 1.0), ("return_attn_probs", True)],
)
def test_unsupported_options_are_named(device, option, value):
    with pytest.raises(NotImplementedError, match=option):
        flash_attn_varlen_func(*inputs([4], None, 1, 1, 16, torch.float32, device), **{option: value})


def test_flash_attn_errors(device):
    q, k, v, cu, *rest = inputs([8], None, 4, 2, 16, torch.float32, device)
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        flash_attn_varlen_func(q[:, :3], k, v, cu, *rest)
    with pytest.raises(ValueError, match="head_dim 320"):
        flash_attn_varlen_func(*(torch.randn(8, 1, 320, device=device) for _ in range(3)), cu, *rest)
    with pytest.raises(TypeError, match="float16"):
        flash_attn_varlen_func(q, k.half(), v.half(), cu, *rest)
    with pytest.raises(TypeError, match="float64"):
        flash_attn_varlen_func(q.double(), k.double(), v.double(), cu, *rest)
    with pytest.raises(ValueError, match="int64"):
        flash_attn_varlen_func(q, k, v, cu.long(), *rest)
    with pytest.raises(ValueError, match="meta"):
        flash_attn_varlen_func(q, k, v, cu.to("meta"), *rest)


def test_the_error_rule_sees_a_lost_key(device):
    """The rule is no formality: leaving one key of 33 out breaks it."""
    q, k, v, cu, *_ = inputs([33], None, 1, 1, 64, torch.float16, device)
    short = cumulative([32], device)
    ref = flash_attn_varlen_ref(q.double(), k.double(), v.double(), cu, cu)
    lost = flash_attn_varlen_ref(q, k[:32], v[:32], cu, short)
    with pytest.raises(AssertionError, match="error"):
        assert_close(lost, flash_attn_varlen_ref(q, k, v, cu, cu), ref)
    assert worst(lost, ref)[0] > 1e-2


def test_index_tensors_with_strides(device):
    q, k, v, cu, *rest = inputs([3, 5], None, 4, 2, 16, torch.float32, device)
    strided = torch.stack([cu, cu + 99], dim=1)[:, 0]
    assert not strided.is_contiguous()
    dense = flash_attn_varlen_func(q, k, v, cu, *rest, backend="triton")
    assert torch.equal(flash_attn_varlen_func(q, k, v, strided, strided, *rest[1:], backend="triton"), dense)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bounds", [[0], [2, 8], [0, 5], [0, 99], [0, 6, 4, 8]])
def test_bounds_that_do_not_cover_the_rows(device, bounds, backend):
    """Known to the host on a CPU; on a GPU only with LLAVA15_DEBUG=1, which reads them back."""
    if device.type != "cpu":
        pytest.skip("the host does not see them")
    q, k, v, *_ = inputs([8], None, 2, 2, 16, torch.float32, device)
    cu = torch.tensor(bounds, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="expected to rise from 0 to the 8 rows"):
        flash_attn_varlen_func(q, k, v, cu, cu, 99, 99, backend=backend)
    cu = torch.tensor([0, 8], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="segment of 8 rows, longer than max_seqlen 5"):
        flash_attn_varlen_func(q, k, v, cu, cu, 5, 5, backend=backend)
