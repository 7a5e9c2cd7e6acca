import pytest
import torch

from llava15_kernels import flash_attn, flash_attn_varlen_func, flash_attn_varlen_ref
from llava15_kernels._dispatch import architecture, as_if_on
from llava15_kernels.flash_attn import FlashConfig, flash_config
from llava15_kernels.testing import DTYPES, assert_close, worst

BACKENDS = ["triton", "torch"]
HALVES = [dtype for dtype in DTYPES if dtype != torch.float32]
# Descriptors serve 16-bit dtypes.
TRITON_ROUTES = [("pointers", dtype) for dtype in DTYPES] + [("descriptors", dtype) for dtype in HALVES]
ROUTES = TRITON_ROUTES + [("torch", dtype) for dtype in DTYPES]


def over(routes):
    ids = [f"{path}-{str(dtype).removeprefix('torch.')}" for path, dtype in routes]
    return pytest.mark.parametrize("path,dtype", routes, ids=ids)


def attend(path, q, *arguments, **options):
    """The public function on one path, with the tiles of the GPU at hand or else of an H100.

    What has no descriptors there (a large head_dim, an older GPU) goes through pointers on both.
    """
    if path == "torch":
        return flash_attn_varlen_func(q, *arguments, **options, backend="torch")
    name = architecture(q.device) if q.is_cuda else "sm_90"
    with flash_config(FlashConfig.choose(q.shape[-1], q.dtype, name, descriptors=path == "descriptors")):
        return flash_attn_varlen_func(q, *arguments, **options, backend="triton")


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


def check(arguments, causal, path, scale=None):
    q, k, v, cu_q, cu_k, *_ = arguments
    ours = attend(path, *arguments, softmax_scale=scale, causal=causal)
    eager = flash_attn_varlen_ref(q, k, v, cu_q, cu_k, scale, causal)
    ref = flash_attn_varlen_ref(q.double(), k.double(), v.double(), cu_q, cu_k, scale, causal)
    assert_close(ours, eager, ref, "flash_attn_varlen_func")


@over(ROUTES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_flash_attn_varlen(device, case, causal, dtype, path):
    check(inputs(*case, 4, 2, 64, dtype, device), causal, path)


@over(TRITON_ROUTES)
@pytest.mark.parametrize(
    "heads,kv_heads,head_dim",
    [(5, 5, 16), (6, 2, 16), (2, 2, 20), (3, 1, 32), (2, 1, 72), (2, 2, 80), (1, 1, 96), (4, 1, 128), (1, 1, 256)],
)
def test_flash_attn_varlen_heads(device, heads, kv_heads, head_dim, dtype, path):
    check(inputs([19, 40], None, heads, kv_heads, head_dim, dtype, device), True, path)


# (padded length of the queries, of the keys, how much of them is real): one off the tiles' edges on either side.
PADDED = [
    (1, 63, "random"),
    (63, 64, "full"),
    (64, 65, "third"),
    (65, 63, "random"),
    (127, 128, "third"),
    (128, 129, "random"),
    (129, 127, "third"),
    (128, 256, "full"),
    (200, 300, "random"),
    (257, 200, "third"),
]


def random_lengths(batch, longest, mode, device):
    shortest = {"full": longest, "random": max(1, longest - 20), "third": max(1, longest // 3)}[mode]
    return torch.randint(shortest, longest + 1, (batch,), device=device)


def padded_attention(q, k, v, lengths_q, lengths_k, causal):
    """Dense attention over (batch, length, heads, head_dim), of which the first `lengths` are real."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    row = torch.arange(q.shape[1], device=q.device)[:, None]
    column = torch.arange(k.shape[1], device=q.device)
    lengths_q, lengths_k = (x[:, None, None, None] for x in (lengths_q, lengths_k))
    seen = column < lengths_k
    if causal:
        seen = seen & (column <= row + lengths_k - lengths_q)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@over([route for route in TRITON_ROUTES if route[1] in HALVES])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("heads,kv_heads,head_dim", [(2, 2, 64), (3, 1, 128)], ids=["mha", "gqa"])
@pytest.mark.parametrize("length_q,length_k,mode", PADDED)
def test_unpadded_equals_padded(device, length_q, length_k, mode, heads, kv_heads, head_dim, causal, dtype, path):
    """Packing what a padding mask leaves gives what dense attention under that mask gives."""
    batch = 3
    lengths_q, lengths_k = (random_lengths(batch, length, mode, device) for length in (length_q, length_k))
    q = torch.randn(batch, length_q, heads, head_dim, device=device).to(dtype)
    k, v = torch.randn(2, batch, length_k, kv_heads, head_dim, device=device).to(dtype)
    real_q, real_k = (
        torch.arange(length, device=device) < lengths[:, None]
        for length, lengths in ((length_q, lengths_q), (length_k, lengths_k))
    )
    cu_q, cu_k = (cumulative(lengths.tolist(), device) for lengths in (lengths_q, lengths_k))
    ours = attend(path, q[real_q], k[real_k], v[real_k], cu_q, cu_k, length_q, length_k, causal=causal)
    eager = padded_attention(q, k, v, lengths_q, lengths_k, causal)
    ref = padded_attention(q.double(), k.double(), v.double(), lengths_q, lengths_k, causal)
    assert_close(ours, eager[real_q], ref[real_q], "unpadded")


@over(ROUTES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_every_segments_last_key_counts(device, causal, dtype, path):
    """A large value in each segment's last key is in the output of the rows that see it."""
    q, k, v, cu, *rest = inputs([33, 16, 50, 128], None, 2, 2, 16, dtype, device)
    last = cu[1:].long() - 1
    v[last] += 1000.0
    check((q, k, v, cu, *rest), causal, path)
    ours = attend(path, q, k, v, cu, *rest, causal=causal)
    assert (ours[last].abs() > 1.0).all()


@over(ROUTES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 6e4])
def test_nothing_leaks_between_segments(device, value, causal, dtype, path):
    """Whatever stands in the neighbouring segments, a segment's output is what it is by itself."""
    q, k, v, cu, *_ = inputs([33, 140, 20], None, 2, 2, 16, dtype, device)
    inside = slice(int(cu[1]), int(cu[2]))
    outside = torch.ones(q.shape[0], dtype=torch.bool)
    outside[inside] = False
    for x in (q, k, v):
        x[outside] = value
    packed = attend(path, q, k, v, cu, cu, 140, 140, causal=causal)[inside]
    own, bounds = [x[inside] for x in (q, k, v)], cumulative([140], device)
    eager = flash_attn_varlen_ref(*own, bounds, bounds, causal=causal)
    ref = flash_attn_varlen_ref(*(x.double() for x in own), bounds, bounds, causal=causal)
    assert_close(packed, eager, ref, "beside other segments")


@over(TRITON_ROUTES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_a_segment_alone_gives_the_same_bits_as_in_a_pack(device, head_dim, causal, dtype, path):
    q, k, v, cu, _, longest, _ = inputs([50, 7, 130], None, 2, 1, head_dim, dtype, device)
    packed = attend(path, q, k, v, cu, cu, longest, longest, causal=causal)
    for start, end in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        bounds = cumulative([end - start], device)
        alone = attend(path, *(x[start:end] for x in (q, k, v)), bounds, bounds, end - start, end - start, causal=causal)
        assert torch.equal(alone, packed[start:end])


@pytest.mark.parametrize("path", ["pointers", "descriptors"])
def test_two_runs_are_bit_equal(device, path):
    arguments = inputs([70, 65], None, 2, 1, 64, torch.float16, device)
    first, second = (attend(path, *arguments, causal=True) for _ in range(2))
    assert torch.equal(first, second)


@over(TRITON_ROUTES)
def test_strided_views_of_a_packed_qkv(device, dtype, path):
    """As the vision tower passes them; and with a misaligned storage offset, which no descriptor allows."""
    qkv = torch.randn(60 * 3 * 4 * 16 + 1, device=device).to(dtype)
    for base, taken in ((qkv[:-1], path), (qkv[1:], "pointers")):
        q, k, v = base.view(60, 3, 4, 16).unbind(1)
        cu = cumulative([25, 35], device)
        strided = attend(path, q, k, v, cu, cu, 35, 35)
        dense = attend(taken, *(x.contiguous() for x in (q, k, v)), cu, cu, 35, 35)
        assert torch.equal(strided, dense)


def possible_descriptors(device):
    """what -> (q, k and v, whether an H100 reads them through descriptors)."""

    def randn(*shape):
        return torch.randn(shape, dtype=torch.float16, device=device)

    q, k, v = randn(3, 20, 2, 64)
    return {
        "plain": (q, k, v, True),
        "packed": (*randn(20, 3, 2, 64).unbind(1), True),
        "part-of-a-head": (q[..., 8:16], k[..., 8:16], v[..., 8:16], True),
        "misaligned-base": (q[..., 4:], k[..., 4:], v[..., 4:], False),
        "misaligned-rows": (q, randn(20, 132)[:, :128].unflatten(1, (2, 64)), v, False),
        "misaligned-heads": (*randn(3, 20, 2, 20), False),
        "expanded-heads": (q, k[:, :1].expand(-1, 2, -1), v, False),
        "no-keys": (q, k[:0], v[:0], False),
        "wide-heads": (*randn(3, 20, 2, 256), False),
    }


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="no tensor descriptors before Hopper"
)
@pytest.mark.parametrize("what", possible_descriptors("meta"))
def test_descriptors_where_they_are_possible(device, what, launches):
    q, k, v, expected = possible_descriptors(device)[what]
    cu_q, cu_k = cumulative([20], device), cumulative([len(k)], device)
    eager = flash_attn_varlen_ref(q, k, v, cu_q, cu_k)
    ref = flash_attn_varlen_ref(q.double(), k.double(), v.double(), cu_q, cu_k)
    for name in ("sm_90", "sm_80"):
        with as_if_on(name):
            ours = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 20, 20, backend="triton")
        assert launches[-1] == ("_flash_attn_tiles_kernel" if expected and name == "sm_90" else "_flash_attn_kernel")
        assert_close(ours, eager, ref, what)


@pytest.mark.parametrize(
    "name,expected",
    [("sm_80", False), ("sm_89", False), ("sm_90", True), ("sm_100", True), ("sm_120", True), ("sm_121", True),
     ("gfx942", False), ("interpreter", False)],
)  # fmt: skip
def test_architectures_with_descriptors(name, expected):
    for dtype in (torch.float16, torch.bfloat16):
        assert [FlashConfig.choose(dim, dtype, name).descriptors for dim in (16, 64, 128)] == [expected] * 3
        assert not FlashConfig.choose(129, dtype, name).descriptors
        assert not FlashConfig.choose(64, dtype, name, descriptors=False).descriptors
    assert not FlashConfig.choose(64, torch.float32, name).descriptors


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("what", possible_descriptors("meta"))
def test_the_torch_backend_takes_any_strides(device, what, causal):
    """On a GPU `scaled_dot_product_attention` reads 16 bytes at a time, wherever a tensor lies."""
    q, k, v, _ = possible_descriptors(device)[what]
    cu_q, cu_k = cumulative([7, 13], device), cumulative([min(7, len(k)), max(len(k) - 7, 0)], device)
    ours = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 20, 20, causal=causal, backend="torch")
    eager = flash_attn_varlen_ref(q, k, v, cu_q, cu_k, causal=causal)
    ref = flash_attn_varlen_ref(q.double(), k.double(), v.double(), cu_q, cu_k, causal=causal)
    assert_close(ours, eager, ref, what)


@over(ROUTES)
@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_softmax_scale_is_used(device, scale, dtype, path):
    check(inputs([20, 33], None, 2, 2, 16, dtype, device), True, path, scale)


def test_scale_defaults_to_the_head_dim(device):
    arguments = inputs([20], None, 1, 1, 64, torch.float32, device)
    assert torch.equal(
        flash_attn_varlen_func(*arguments, backend="triton"),
        flash_attn_varlen_func(*arguments, softmax_scale=0.125, backend="triton"),
    )


@over(TRITON_ROUTES)
@pytest.mark.parametrize("heads,kv_heads", [(8, 4), (3, 3)])
def test_the_order_of_the_blocks_changes_no_bit(device, heads, kv_heads, dtype, path, monkeypatch):
    arguments = inputs([35, 20], None, heads, kv_heads, 16, dtype, device)
    found = {}
    for room in (1, 2, heads):  # KV heads that the L2 has room for
        monkeypatch.setattr(flash_attn, "L2_BYTES", room * 2 * 27 * 16 * arguments[0].element_size())
        found[room] = attend(path, *arguments, causal=True)
    assert all(torch.equal(ours, found[1]) for ours in found.values())
    check(arguments, True, path)


@over(TRITON_ROUTES)
def test_large_scores_do_not_overflow(device, dtype, path):
    q, k, v, *rest = inputs([33], None, 1, 1, 64, dtype, device)
    check((q * 10, k * 10, v, *rest), True, path)  # scores of some hundreds: exp overflows behind 88


@pytest.mark.parametrize(
    "option,value",
    [
        ("dropout_p", 0.1), ("window_size", (4, 0)), ("window_size", torch.tensor([-1, -1])), ("softcap", 1.0),
        ("return_attn_probs", True), ("alibi_slopes", torch.zeros(1)),
    ],
)  # fmt: skip
def test_unsupported_options_are_named(device, option, value):
    with pytest.raises(NotImplementedError, match=f"{option} is not supported"):
        flash_attn_varlen_func(*inputs([4], None, 1, 1, 16, torch.float32, device), **{option: value})


def test_options_that_are_off(device):
    arguments = inputs([4], None, 1, 1, 16, torch.float32, device)
    expected = flash_attn_varlen_func(*arguments)
    for off in ({"dropout_p": 0}, {"softcap": None}, {"return_attn_probs": 0}) + tuple(
        {"window_size": window} for window in ((-1, -1), [-1, -1], (None, None), None)
    ):
        assert torch.equal(flash_attn_varlen_func(*arguments, **off), expected)


@pytest.mark.parametrize("lengths_q,lengths_k", [([20, 9], [12, 3]), ([7, 9], [0, 12]), ([5], [5])])
def test_gradients_where_queries_see_no_key(device, lengths_q, lengths_k):
    q, k, v, *rest = inputs(lengths_q, lengths_k, 2, 1, 16, torch.float32, device)
    gradients = []
    for attend, given, dtype in ((flash_attn_varlen_func, rest, q.dtype), (flash_attn_varlen_ref, rest[:2], torch.float64)):
        tensors = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        attend(*tensors, *given, causal=True).square().sum().backward()
        gradients.append([x.grad for x in tensors])
    for ours, exact in zip(*gradients, strict=True):
        assert ours.isfinite().all() and (ours - exact.nan_to_num(0.0)).abs().max() < 1e-4


def test_flash_attn_errors(device):
    q, k, v, cu, *rest = inputs([8], None, 4, 2, 16, torch.float32, device)
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        flash_attn_varlen_func(q[:, :3], k, v, cu, *rest)
    for scale in (0.0, -0.5, float("nan")):
        with pytest.raises(ValueError, match=f"softmax_scale is {scale}, expected a positive number"):
            flash_attn_varlen_func(q, k, v, cu, *rest, softmax_scale=scale)
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
