"""The real 4B and 8B models on fake tensors: launches and bytes of a decode step, and that the counts can be believed."""

from collections import Counter as Tally

import pytest
import torch

import llava15_fast
from benchmarks.counting import Counter, fake_model, filled_cache
from llava15_kernels._dispatch import as_if_on


def decode_step(model, context, patched):
    cache = filled_cache(model, 1, context, stock=not patched)
    ids = torch.zeros(1, 1, dtype=torch.long)
    inputs = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    if patched:
        model(input_ids=ids, **inputs)
        cache.crop(-1)
    with as_if_on("sm_90"), Counter() as counted:
        model(input_ids=ids, **inputs)
    assert cache.get_seq_length() == context + 1
    return counted


def floor(model, context):
    """Bytes that a token cannot do without: every weight once, the keys and values of the context once."""
    text, config = model.model.language_model, model.config.text_config
    weights = sum(p.numel() for p in text.parameters()) - text.embed_tokens.weight.numel() + model.lm_head.weight.numel()
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * context
    return 2 * (weights + cached)


@pytest.mark.parametrize("context", [1024, 8192])
@pytest.mark.parametrize("size", ["4b", "8b"])
def test_a_decode_step_of_the_real_models(size, context):
    """Six launches per layer + 4, and 1.015 times the lower bound's bytes; eager's beside it."""
    with fake_model(size) as model:
        eager = decode_step(model, context, patched=False)
        llava15_fast.patch(model, "triton", cuda_graph=False)
        counted = decode_step(model, context, patched=True)
        layers = model.config.text_config.num_hidden_layers
        assert layers == 36 and counted.launches == 6 * layers + 4 < eager.launches / 9, (counted.launches, eager.launches)
        assert counted.bytes <= 1.015 * floor(model, context), (counted.bytes, eager.bytes)
        assert counted.bytes < eager.bytes
        assert counted.tally["llava15::decode_attention"] == 2 * layers  # split and combined


def test_counts_of_known_operators():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    with Counter() as counted:
        (a @ b).t().view(7, 3)[:2]
        torch.nn.functional.embedding(torch.tensor([1, 1]), a)
    assert counted.tally == {"aten::mm": 1, "aten::embedding": 1}
    assert counted.read == 4 * (15 + 35) + 8 * 2 + 4 * 10 and counted.written == 4 * (21 + 10)


@pytest.mark.parametrize("case", ["text", "one_image"])
def test_counted_launches_of_our_kernels_are_the_real_ones(tiny, prompts, launches, case):
    """The same forward, counted by declarations and by what the interpreter (or the GPU) launches."""
    inputs = prompts[case]
    llava15_fast.patch(tiny, "triton", cuda_graph=False)
    with torch.no_grad(), Counter() as counted:
        output = tiny(**inputs, use_cache=True)
        tiny(input_ids=inputs["input_ids"][:, -1:], past_key_values=output.past_key_values)
    ours = {name: count for name, count in counted.tally.items() if name.startswith("llava15::")}
    assert sum(ours.values()) == len([name for name in launches if name.endswith("_kernel")]) > 0


VIEWS = {
    "view", "transpose", "t", "permute", "expand", "unsqueeze", "squeeze", "slice", "select", "as_strided", "_reshape_alias",
    "alias", "detach", "detach_", "split", "split_with_sizes", "unbind", "_unsafe_view", "lift_fresh", "empty", "empty_like",
    "empty_strided",
}  # fmt: skip


COMPOSITE = {
    name.split(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("aten::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
}


def launched(events):
    """Operators with a kernel of their own, below those that are only made of others; scalars are read, not launched."""
    for event in events:
        # The overloads of `where` for scalars are made of the one for tensors, under the same name.
        itself = event.name == "aten::where" and event.name not in [child.name for child in event.cpu_children]
        if not itself and (event.name in COMPOSITE or not event.name.startswith("aten::")):
            yield from launched(event.cpu_children)
        elif event.name.removeprefix("aten::") not in VIEWS:
            yield event.name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_counted_launches_of_transformers_are_those_that_the_profiler_sees(tiny, attention, phase):
    """A run with data on a CPU, seen by torch's profiler: another way to the same count."""
    tiny.set_attn_implementation(attention)
    ids = torch.arange(9, device=tiny.device)[None]
    with torch.no_grad():
        cache = tiny(input_ids=ids, use_cache=True).past_key_values
        inputs = {"input_ids": ids} if phase == "prefill" else {"input_ids": ids[:, :1], "past_key_values": cache}
        with Counter() as counted:
            tiny(**inputs, use_cache=True, logits_to_keep=1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            tiny(**inputs, use_cache=True, logits_to_keep=1)
    seen = Tally(launched(event for event in profiled.events() if event.cpu_parent is None))
    assert seen == counted.tally


def test_a_prompt_of_the_real_model():
    """Padding is not computed and the head runs over the last position only."""
    with fake_model("4b") as model:
        llava15_fast.patch(model, "triton", cuda_graph=False)
        ids = torch.zeros(1, 1024, dtype=torch.long)
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        with as_if_on("sm_90"), Counter() as counted:
            logits = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits
        layers = model.config.text_config.num_hidden_layers
        assert logits.shape[:2] == (1, 1)
        assert counted.tally["aten::mm"] == 7 * layers + 1 and counted.tally["llava15::flash_attn_varlen"] == layers
        assert counted.launches <= 12 * layers + 8 + 2 * layers  # the cache's KV buffers are made and zeroed here
