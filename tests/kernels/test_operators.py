"""The operators as torch sees them: schemas, fakes, compilation, and the cost each declares."""

import pytest
import torch
import torch._dynamo.testing
from torch.utils._pytree import tree_map_only

from llava15_kernels._dispatch import as_if_on
from llava15_kernels._registry import OPERATORS as DECLARED
from llava15_kernels.flash_decode import Plan
from llava15_kernels.testing import DTYPES

H, KV, D, L = 4, 2, 16, 11


def arguments(device, dtype=torch.float32):
    """op -> arguments of a small call."""
    x, residual = torch.randn(2, 6, 48, device=device).to(dtype)
    weight, bias = torch.randn(2, 48, device=device).to(dtype)
    weights = torch.randn(2, 20, 48, device=device).to(dtype)
    packed = torch.randn(2, L, H + 2 * KV, D, device=device).to(dtype)
    q, k, v = packed.split([H, KV, KV], dim=2)
    vision_q, vision_k, _ = torch.randn(L, 3, H, D, device=device).to(dtype).unbind(1)
    head_weight = torch.randn(D, device=device).to(dtype)
    inv_freq = torch.rand(D // 2, device=device)
    positions = torch.arange(L, device=device).expand(2, -1).contiguous()
    k_cache, v_cache = torch.randn(2, 2, 70, KV, D, device=device).to(dtype)
    lengths = torch.tensor([30, 59], dtype=torch.int32, device=device)
    slots = (positions + torch.tensor([[30], [129]], device=device)).contiguous()
    pads = torch.zeros(2, dtype=torch.int32, device=device)
    bounds = torch.tensor([0, 5, L], dtype=torch.int32, device=device)
    rows = torch.tensor([0, 5, 14], dtype=torch.int32, device=device)
    grid = torch.randint(0, 9, (L, 2), dtype=torch.int32, device=device)
    text = (q, k, head_weight, head_weight, 1e-6, positions, inv_freq, 1.0)
    return {
        "rms_norm": (x, weight, 1e-6),
        "add_rms_norm": (x, residual, weight, 1e-6),
        "layer_norm": (x, weight, bias, 1e-5),
        "add_layer_norm": (x, residual, weight, bias, 1e-5),
        "silu_and_mul": x.chunk(2, dim=-1),
        "gelu": (x, bias),
        "fused_linear": (x[0], list(weights), [bias[:20], None], weight, 1e-6, None, True),
        "vision_rope_2d": (vision_q, vision_k, grid, inv_freq[: D // 4].contiguous(), torch.randn(1, D // 2, device=device)),
        "patch_merge": (torch.randn(14, 48, device=device).to(dtype), weight, bias, 1e-5, rows, 2),
        "qk_norm_rope": text,
        "qk_norm_rope_into_cache": (*text, v, k_cache.flatten(0, 1), v_cache.flatten(0, 1), slots),
        "flash_attn_varlen": (q[0], k[0], v[0], bounds, bounds, 6, 0.25, True),
        "decode_attention": (
            q[:, :1],
            k[:, :1],
            v[:, :1],
            *text[2:5],
            positions[:1, :2],
            *text[6:],
            k_cache,
            v_cache,
            lengths,
            pads,
            0.25,
            0,
        ),
        "flash_decode": (q[:, :1], k_cache, v_cache, lengths, pads, 0.25, True, 0),
    }


OPERATORS = [name for name, operator in DECLARED.items() if operator.cost]


def test_every_operator_is_tested(device):
    assert set(arguments(device)) == set(OPERATORS)


@pytest.mark.parametrize("op", OPERATORS)
def test_opcheck(device, op, monkeypatch):
    # opcheck compares two runs of the same call, which NaN in untouched memory would not change.
    monkeypatch.undo()
    torch.library.opcheck(getattr(torch.ops.llava15, op).default, arguments(device)[op])


@pytest.mark.parametrize("op", OPERATORS)
def test_compiles_to_one_graph(device, op):
    """With another number of rows the graph is traced once more, as dynamic, and then serves every number."""
    operator = getattr(torch.ops.llava15, op)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(operator, fullgraph=True, backend=counter)
    call = arguments(device)[op]
    expected = operator(*(x.clone() if isinstance(x, torch.Tensor) else x for x in call))
    ours = compiled(*call)
    for mine, theirs in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (ours, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)
    if op in ("rms_norm", "gelu", "silu_and_mul", "layer_norm"):
        for rows in (7, 8, 9, 20):
            fresh = torch.randn(rows, 6, 48, device=device)
            compiled(*(fresh.chunk(2, dim=-1) if op == "silu_and_mul" else (fresh, *call[1:])))
        assert counter.frame_count <= 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_declared_cost_is_the_real_one(device, op, dtype, launches, stored_bytes):
    call = arguments(device, dtype)[op]
    cost = DECLARED[op].cost(*call)
    getattr(torch.ops.llava15, op)(*call)
    assert len(launches) == cost.launches
    if stored_bytes is not None:
        assert sum(stored_bytes) == cost.written


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="no tensor descriptors before Hopper"
)
def test_flash_attn_through_descriptors(device, launches, stored_bytes):
    """Another kernel behind the same operator: the same cost, and it traces and compiles as well."""
    operator, call = torch.ops.llava15.flash_attn_varlen, arguments(device, torch.float16)["flash_attn_varlen"]
    with as_if_on("sm_90"):
        out = operator(*call)
        assert launches == ["_flash_attn_tiles_kernel"]
        if stored_bytes is not None:
            assert sum(stored_bytes) == DECLARED["flash_attn_varlen"].cost(*call).written
        torch._dynamo.reset()
        assert torch.equal(torch.compile(operator, fullgraph=True, backend="aot_eager")(*call), out)
        torch.library.opcheck(operator.default, call)


@pytest.fixture
def stored_bytes(monkeypatch):
    """Bytes of every store, as the interpreter carries them out; None on a GPU."""
    if torch.cuda.is_available():
        return None
    from triton.runtime.interpreter import InterpreterBuilder

    stored = []
    original = InterpreterBuilder.create_masked_store

    def store(self, ptrs, value, mask, *args):
        stored.append(int(mask.data.sum()) * value.data.itemsize)
        return original(self, ptrs, value, mask, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", store)
    return stored


@pytest.mark.parametrize("op", OPERATORS)
def test_fakes_allocate_as_the_launchers_do(device, op):
    from torch._subclasses import FakeTensorMode

    call = arguments(device)[op]
    real, cost = getattr(torch.ops.llava15, op)(*call), DECLARED[op].cost(*call)
    with FakeTensorMode() as mode:
        faked = tree_map_only(torch.Tensor, mode.from_tensor, list(call))
        fake = getattr(torch.ops.llava15, op)(*faked)
        assert DECLARED[op].cost(*faked) == cost
    for ours, theirs in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (fake, real)), strict=True):
        assert (ours.shape, ours.dtype, ours.stride(), ours.device) == (
            theirs.shape,
            theirs.dtype,
            theirs.stride(),
            theirs.device,
        )


def test_a_decode_plan_does_not_depend_on_lengths(device):
    """Otherwise a CUDA graph captured at one length would be wrong at the next."""
    q, k_cache = torch.empty(1, 1, 8, 64, device=device), torch.empty(1, 4096, 2, 64, device=device)
    assert Plan.choose(q, k_cache, 0) == Plan.choose(q, k_cache, 0) and Plan.choose(q, k_cache, 0).splits > 1
