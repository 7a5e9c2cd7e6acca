"""patch, unpatch, patched, report: one instance, checked, reversible."""

import copy
import functools
import inspect
import logging
import os
import pickle
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

import llava15_fast
from llava15_fast import PatchError
from llava15_fast.fast.guards import FAST
from llava15_fast.fast.runtime import FastModule
from llava15_fast.model.releases import CACHE
from llava15_fast.patching import api, targets
from llava15_fast.patching.targets import TARGETS

ROOT = Path(__file__).parents[2]
BACKENDS = ["torch", "triton"]


@pytest.fixture
def inputs(golden):
    return golden["two_images"][0]


@pytest.fixture
def prompt(prompts):
    return prompts["two_images"]


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def forwards(handle):
    """The report's rows of forward passes; `generate` counts its loops."""
    return [row for row in handle.report().rows if row.path != "generate"]


def instance_attributes(model):
    """Every non-module attribute that lies on an instance, by path: what a patch could leave behind."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if callable(value) or name.startswith("_llava15") or name == "_old_forward"
    } | {(path, "class"): type(module) for path, module in model.named_modules()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_unpatch_leaves_no_trace(tiny, inputs, backend):
    before = logits(tiny, inputs)
    attributes = instance_attributes(tiny)
    weights = {name: value.clone() for name, value in tiny.state_dict().items()}
    forwards = {path: module.forward.__func__ for path, module in tiny.named_modules() if hasattr(module.forward, "__func__")}
    llava15_fast.patch(tiny, backend)
    assert instance_attributes(tiny) != attributes
    llava15_fast.unpatch(tiny)
    assert instance_attributes(tiny) == attributes
    assert {p: m.forward.__func__ for p, m in tiny.named_modules() if hasattr(m.forward, "__func__")} == forwards
    after = tiny.state_dict()
    assert weights.keys() == after.keys() and all(torch.equal(weights[name], after[name]) for name in weights)
    assert torch.equal(logits(tiny, inputs), before)
    llava15_fast.unpatch(tiny)  # nothing to undo is no error


def test_only_this_instance_is_patched(tiny, inputs):
    other = copy.deepcopy(tiny)
    shared = type(tiny)(tiny.config).to(tiny.device)
    classes = {type(module): type(module).forward for module in tiny.modules()}
    llava15_fast.patch(tiny, "torch")
    assert not instance_attributes(other).keys() & {(p, n) for p, n in instance_attributes(tiny) if n.startswith("_llava15")}
    assert not any(isinstance(module, FastModule) for model in (other, shared) for module in model.modules())
    assert all(cls.forward is forward for cls, forward in classes.items())


def test_patching_twice_changes_nothing(tiny, inputs):
    llava15_fast.patch(tiny, "torch")
    attributes = instance_attributes(tiny)
    handle = llava15_fast.patch(tiny, "torch")
    assert instance_attributes(tiny) == attributes
    llava15_fast.patch(tiny, "triton")
    assert {row.backend for row in handle.report().rows} == {"triton"}
    llava15_fast.unpatch(tiny)
    assert handle.report().rows == ()


def test_patched_is_undone_after_an_exception(tiny, inputs):
    before, attributes = logits(tiny, inputs), instance_attributes(tiny)
    with pytest.raises(ZeroDivisionError), llava15_fast.patched(tiny, "torch") as handle:
        logits(tiny, inputs)
        assert handle.report().rows
        raise ZeroDivisionError
    assert instance_attributes(tiny) == attributes and torch.equal(logits(tiny, inputs), before)


def test_patched_keeps_an_earlier_patch(tiny):
    handle = llava15_fast.patch(tiny, "torch")
    with llava15_fast.patched(tiny, "triton"):
        assert {row.backend for row in handle.report().rows} == {"triton"}
    assert {row.backend for row in handle.report().rows} == {"torch"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_computes_with_its_own_weights(tiny, inputs, backend, clone):
    llava15_fast.patch(tiny, backend)
    expected = logits(tiny, inputs)
    twin = clone(tiny)
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin, inputs), expected)
    assert not torch.equal(logits(tiny, inputs), expected)
    # Patched they are both, each by itself.
    llava15_fast.unpatch(tiny)
    assert not any(isinstance(module, FastModule) for module in tiny.modules())
    assert sum(isinstance(module, FastModule) for module in twin.modules()) == 4


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_the_kernels_run(tiny, inputs, backend, context):
    handle = llava15_fast.patch(tiny, backend)
    with context():
        tiny(**inputs)
    for row in forwards(handle):
        assert set(row.ran) == {backend} and not row.fallbacks, row


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_fall_back_and_are_reported(tiny, inputs, backend):
    tiny(**inputs).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in tiny.named_parameters()}
    tiny.zero_grad()
    handle = llava15_fast.patch(tiny, backend)
    tiny(**inputs).loss.backward()
    for name, parameter in tiny.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name
    for row in forwards(handle):
        assert not row.ran and set(row.fallbacks) == {"a gradient is needed"}, row
    assert "a gradient is needed" in str(handle.report())


def test_gradient_of_the_class_angles_alone(tiny, inputs):
    """The rotary tables are made before the blocks; a gradient that only they need must not be lost."""
    tiny.requires_grad_(False)
    tiny.model.visual.class_pos_emb.requires_grad_(True)
    llava15_fast.patch(tiny, "triton")
    tiny(**inputs).loss.backward()
    assert tiny.model.visual.class_pos_emb.grad.norm() > 0


def test_report_counts_calls(tiny, prompt):
    handle = llava15_fast.patch(tiny, "torch")
    assert "not called yet" in str(handle.report())
    tiny.generate(**prompt, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    rows = {row.path: row for row in handle.report().rows}
    assert rows["visual.encode"].ran == {"torch": 1} and rows["language_model"].ran == {"torch": 3}
    assert not any(row.fallbacks for row in rows.values())


def by_one_name(signature):
    """Ours take the cache by either name, transformers' by that of their release."""
    return tuple("past_key_values" if name == CACHE else name for name in signature.parameters)


def test_signatures_equal_transformers(tiny):
    """`generate` looks at signatures; a replacement with another one would lose arguments without a word."""
    before = {path: inspect.signature(module.forward) for path, module in tiny.named_modules()}
    llava15_fast.patch(tiny, "torch")
    for path, module in tiny.named_modules():
        assert by_one_name(inspect.signature(module.forward)) == by_one_name(before[path]), path


def test_patched_classes_take_the_declared_parameters():
    for target in (target for target in TARGETS if target.kernels):
        method = getattr(FAST[target.module_class], target.method)
        declared = tuple("past_key_values" if name == CACHE else name for name in target.parameters.split())
        assert by_one_name(inspect.signature(method))[1:] == declared, target.path


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_on_fused_modules_are_not_skipped(tiny, inputs, backend):
    expected = logits(tiny, inputs)
    seen = []
    layer, merger = tiny.model.language_model.layers[1], tiny.model.visual.merger
    hooked = [layer, layer.post_attention_layernorm, layer.mlp, layer.mlp.act_fn, layer.self_attn.q_norm]
    hooked += [merger, merger.ln_q, tiny.model.visual.blocks[0].norm2, tiny.model.visual.patch_embed]
    handles = [module.register_forward_hook(lambda module, args, output: seen.append(module)) for module in hooked]
    handle = llava15_fast.patch(tiny, backend)
    torch.testing.assert_close(logits(tiny, inputs), expected, rtol=0, atol=1e-4)
    assert set(seen) == set(hooked)
    assert all(row.fallbacks and not row.ran for row in forwards(handle))
    assert "a hook on " in str(handle.report())
    for hook in handles:
        hook.remove()
    logits(tiny, inputs)
    assert all(row.ran == {backend: 1} for row in forwards(handle))


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_on_linear_layers_leave_the_rest_fast(tiny, inputs, backend):
    expected = logits(tiny, inputs)
    layer, block = tiny.model.language_model.layers[1], tiny.model.visual.blocks[0]
    hooked = [layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj, block.attn.qkv]
    seen = []
    for module in [*hooked, tiny.model.language_model, tiny.model.visual]:
        module.register_forward_hook(lambda module, args, output: seen.append(module))
    handle = llava15_fast.patch(tiny, backend)
    torch.testing.assert_close(logits(tiny, inputs), expected, rtol=0, atol=1e-4)
    assert set(seen) == {*hooked, tiny.model.language_model, tiny.model.visual}
    assert not any(row.fallbacks for row in handle.report().rows)


POSITIONS = {
    "last token": lambda output: torch.cat([output[:, :-1], output[:, -1:] + 3.0], dim=1),
    "first token": lambda output: torch.cat([output[:, :1] + 3.0, output[:, 1:]], dim=1),
    "mean of the prompt": lambda output: output - output.mean(dim=1, keepdim=True),
    "shape": lambda output: output * output.shape[1] if output.ndim == 3 else 1 / 0,
}


@pytest.mark.parametrize("where", ["q_proj", "up_proj", "o_proj", "down_proj"])
@pytest.mark.parametrize("what", POSITIONS)
@pytest.mark.parametrize("case", ["one_image", "text_batch_left_pad"])
def test_hooks_see_transformers_values(tiny, prompts, case, what, where):
    """Batch and positions, padding included: a hook may do anything with them."""
    prompt = prompts[case]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    layer = tiny.model.language_model.layers[1]
    module = getattr(layer.self_attn if where in ("q_proj", "o_proj") else layer.mlp, where)
    module.register_forward_hook(lambda module, args, output: POSITIONS[what](output))

    def outputs():
        answer = tiny.generate(**prompt, **options, return_dict_in_generate=True, output_logits=True)
        return torch.stack(answer.logits)

    expected = outputs()
    handle = llava15_fast.patch(tiny, "torch")
    torch.testing.assert_close(outputs(), expected, rtol=0, atol=1e-4)
    # Where nothing has to be left out, the kernels run.
    row = next(row for row in handle.report().rows if row.path == "language_model")
    assert row.ran and bool(row.fallbacks) == (case == "text_batch_left_pad")


# Weights are read where they lie


def places(model):
    """Where every weight lies, and who shares it."""
    return {
        name: (weight.data_ptr(), weight.untyped_storage()._cdata, weight.untyped_storage().nbytes(), weight.storage_offset())
        + tuple(weight.stride())
        for name, weight in model.state_dict(keep_vars=True).items()
    }


def projections(model):
    for layer in model.model.language_model.layers:
        yield [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
        yield [layer.mlp.gate_proj, layer.mlp.up_proj]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_weight_ever_moves(tiny, inputs, prompt, backend):
    before = places(tiny)
    llava15_fast.patch(tiny, backend)
    assert places(tiny) == before
    logits(tiny, inputs)
    tiny.generate(**prompt, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert places(tiny) == before
    llava15_fast.unpatch(tiny)
    assert places(tiny) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: model.load_state_dict(scaled(model.state_dict()), assign=True),
        lambda model: [setattr(layer, "weight", nn.Parameter(layer.weight * 2)) for layer in chain(*projections(model))],
    ],
    ids=["converted", "assigned", "replaced"],
)
def test_replaced_weights_are_freed(tiny, inputs, change):
    llava15_fast.patch(tiny, "torch")
    logits(tiny, inputs)
    held = [StorageWeakRef(group[0].weight.untyped_storage()) for group in projections(tiny)]
    assert not any(reference.expired() for reference in held)
    change(tiny)
    assert all(reference.expired() for reference in held)


def scaled(state):
    return {name: value * 1.01 for name, value in state.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict(scaled(model.state_dict())),
        lambda model: model.load_state_dict(scaled(model.state_dict()), assign=True),
        lambda model: [parameter.data.mul_(1.01) for parameter in model.parameters()],
        lambda model: [setattr(parameter, "data", parameter.data * 1.01) for parameter in model.parameters()],
        lambda model: setattr(model.model.language_model.layers[0].mlp, "gate_proj", nn.Linear(48, 96, bias=False)),
        lambda model: setattr(
            model.model.language_model.layers[0].self_attn,
            "v_proj",
            nn.Sequential(model.model.language_model.layers[0].self_attn.v_proj, nn.Tanh()),
        ),
        lambda model: model.double().float(),
    ],
    ids=["load", "load-assign", "in-place", "data", "new-linear", "wrapped", "converted"],
)
def test_new_weights_are_used(tiny, inputs, change):
    """Nothing may go on with what was there before."""
    handle = llava15_fast.patch(tiny, "torch")
    logits(tiny, inputs)
    torch.manual_seed(1)
    change(tiny)
    found = logits(tiny, inputs)
    assert not any(row.fallbacks for row in handle.report().rows)
    llava15_fast.unpatch(tiny)
    torch.testing.assert_close(found, logits(tiny, inputs), rtol=0, atol=1e-4)
    # Eager sums the patch embedding in another order; a fresh patch does not.
    llava15_fast.patch(tiny, "torch")
    assert torch.equal(found, logits(tiny, inputs))


def test_weights_read_in_inference_mode_can_be_trained(tiny, inputs):
    llava15_fast.patch(tiny, "torch")
    with torch.inference_mode():
        tiny(**inputs)
    tiny(**inputs).loss.backward()
    assert tiny.model.language_model.layers[0].self_attn.k_proj.weight.grad.norm() > 0


def test_saving_a_patched_model(tiny, inputs, tmp_path):
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    llava15_fast.patch(tiny, "torch")
    expected = logits(tiny, inputs)
    tiny.save_pretrained(tmp_path)
    loaded = type(tiny).from_pretrained(tmp_path).eval().to(tiny.device)
    assert all(torch.equal(before[name], value) for name, value in loaded.state_dict().items())
    assert torch.equal(logits(llava15_fast.patch(loaded, "torch").model, inputs), expected)


def test_recording_hooks_do_not_disable_the_fast_path(tiny, inputs):
    handle = llava15_fast.patch(tiny, "torch")
    with torch.no_grad():
        tiny(**inputs, output_hidden_states=True)
        llava15_fast.unpatch(tiny)
        handle = llava15_fast.patch(tiny, "torch")
        tiny(**inputs)
    assert not any(row.fallbacks for row in handle.report().rows)


def test_attention_weights_on_request(golden, inputs):
    model = llava15_fast.LlavaOnevision1_5ForConditionalGeneration.from_pretrained(
        ROOT / "tests/golden/tiny_hub", attn_implementation="eager"
    ).eval()
    model = model.to(inputs["input_ids"].device)
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True).attentions
        llava15_fast.patch(model, "torch")
        found = model(**inputs, output_attentions=True).attentions
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_with_holes_and_packed_positions_fall_back(tiny, golden, backend):
    inputs = golden["text"][0]
    holes = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    holes["attention_mask"][0, 4] = 0
    packed = {
        "input_ids": inputs["input_ids"],
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]], device=tiny.device),
        "use_cache": False,
    }
    expected = [logits(tiny, case) for case in (holes, packed)]
    llava15_fast.patch(tiny, backend)
    for case, wanted in zip((holes, packed), expected, strict=True):
        difference = (logits(tiny, case) - wanted).abs()
        if "attention_mask" in case:
            difference = difference[case["attention_mask"].bool()]
        assert difference.max() < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_turn_on_the_returned_cache(tiny, golden, backend):
    """The cache that the patched prefill filled continues as transformers' own would."""
    inputs = golden["text"][0]
    follow_up = torch.randint(0, 490, (1, 7), device=tiny.device)

    def second_turn():
        with torch.no_grad():
            first = tiny(input_ids=inputs["input_ids"], use_cache=True)
            return tiny(input_ids=follow_up, past_key_values=first.past_key_values).logits

    expected = second_turn()
    llava15_fast.patch(tiny, backend)
    torch.testing.assert_close(second_turn(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cache", ["static", "dynamic", None])
def test_generation_with_a_chosen_cache(tiny, golden, prompts, cache):
    inputs, expected = prompts["batch_left_pad"], golden["batch_left_pad"][1]
    llava15_fast.patch(tiny, "torch")
    options = {"cache_implementation": cache} if cache else {"use_cache": False}
    output = tiny.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, **options)
    assert torch.equal(output[:, inputs["input_ids"].shape[1] :], expected["greedy_ids"])


# accelerate puts its own forward on instances


@pytest.mark.parametrize("patch_first", [True, False], ids=["patch-then-hook", "hook-then-patch"])
def test_accelerate_hooks_and_patch_coexist(tiny, inputs, patch_first):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    expected = logits(tiny, inputs)
    calls = []

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    hooked = [tiny.model.language_model.layers[0], tiny.model.language_model.norm, tiny.model.visual.blocks[0].attn]
    if patch_first:
        handle = llava15_fast.patch(tiny, "torch")
    for module in hooked:
        add_hook_to_module(module, Counting())
    if not patch_first:
        handle = llava15_fast.patch(tiny, "torch")
    torch.testing.assert_close(logits(tiny, inputs), expected, rtol=0, atol=1e-4)
    assert set(calls) == set(hooked)
    rows = {(row.path, row.kernels[0]): row for row in handle.report().rows}
    assert rows["visual.merge_patches", "patch_merge"].ran and not rows["language_model", "rms_norm + residual"].ran
    llava15_fast.unpatch(tiny)
    calls.clear()
    assert torch.equal(logits(tiny, inputs), expected) and set(calls) == set(hooked)
    for module in hooked:
        remove_hook_from_module(module)
    assert torch.equal(logits(tiny, inputs), expected)
    assert not any(isinstance(m.__dict__.get("forward"), functools.partial) for m in tiny.modules())


# What patch refuses, without touching the model


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "a string", nn.ModuleList()])
def test_an_unknown_model_is_refused(model):
    with pytest.raises(TypeError, match=r"holds 0 models of class LlavaOnevision1_5Model"):
        llava15_fast.patch(model)
    with pytest.raises(TypeError, match=type(model).__name__):
        llava15_fast.unpatch(model)


def refused(model, match, error=PatchError):
    attributes = instance_attributes(model)
    with pytest.raises(error, match=match):
        llava15_fast.patch(model, "torch")
    assert instance_attributes(model) == attributes


def test_a_changed_structure_is_named(tiny):
    tiny.model.language_model.layers[1].self_attn.q_norm = nn.LayerNorm(16)
    refused(tiny, r"language_model\.layers\.1\.self_attn\.q_norm is a LayerNorm, expected Qwen3RMSNorm")


def test_a_missing_module_is_named(tiny):
    del tiny.model.visual.rotary_pos_emb
    refused(tiny, "visual has no 'rotary_pos_emb'")


def test_a_changed_signature_is_named(tiny, monkeypatch):
    target = next(target for target in TARGETS if target.path.endswith("self_attn"))
    changed = target._replace(parameters="x")
    monkeypatch.setattr(targets, "TARGETS", (*TARGETS, changed))
    refused(tiny, r"Qwen3Attention\.forward has parameters .*expected \('x',\)")


@pytest.mark.parametrize("path", ["language_model.norm", "language_model.layers.0.post_attention_layernorm", "visual.merger"])
def test_incompatible_module_is_named(tiny, path):
    """Of a class of its own, or with a forward of its own: also where a fused call only reads its weights."""
    module = tiny.model.get_submodule(path)
    original = type(module)
    module.__class__ = type(
        "Other", (original,), {"forward": lambda self, hidden_states: 2 * original.forward(self, hidden_states)}
    )
    refused(tiny, "Other has its own forward")
    module.__class__ = original
    module.forward = lambda hidden_states: 3 * original.forward(module, hidden_states)
    refused(tiny, rf"{path.replace('.', '[.]')}\.forward was already replaced")


def test_bypassed_module_of_another_class_is_named(tiny):
    tiny.model.visual.merger.ln_q = nn.RMSNorm(64)
    refused(tiny, r"visual\.merger\.ln_q is a RMSNorm, expected LayerNorm")


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast(tiny, inputs, backend):
    def forward():
        with torch.no_grad(), torch.autocast(tiny.device.type, torch.float16):
            return tiny(**inputs).logits.float()

    expected = forward()
    llava15_fast.patch(tiny, backend)
    assert ((forward() - expected).abs().max() / expected.abs().max()) < 2e-2


def test_float64_falls_back(tiny, inputs):
    """A reference run in float64 is nothing to refuse once the model is patched."""
    handle = llava15_fast.patch(tiny, "torch")
    tiny.double()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    found = logits(tiny, inputs)
    llava15_fast.unpatch(tiny)
    assert torch.equal(found, logits(tiny, inputs)) and found.dtype == torch.float64
    assert handle.report().rows == ()


@pytest.mark.parametrize("patched", [False, True])
def test_accelerate_weights_loaded_on_demand(tiny, inputs, patched):
    from accelerate import cpu_offload

    expected = logits(tiny, inputs)
    if patched:
        llava15_fast.patch(tiny, "torch")
    cpu_offload(tiny, execution_device=tiny.device)
    torch.testing.assert_close(logits(tiny, inputs), expected, rtol=0, atol=1e-4)


def test_a_model_split_over_devices(tiny, prompt):
    """The second device is "meta", which computes nothing but is another device."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    text = tiny.model.language_model
    for module in (text.layers[1], text.layers[2], text.norm, tiny.lm_head):
        module.to("meta")
        add_hook_to_module(module, AlignDevicesHook(execution_device="meta", place_submodules=False))
    llava15_fast.patch(tiny, "torch")
    with torch.no_grad():
        assert tiny(**prompt, use_cache=False).logits.device.type == "meta"


def test_an_unsupported_dtype_is_named(tiny):
    refused(tiny.double(), "float64")


def test_an_unsupported_head_dim_is_named(tiny):
    tiny.config.text_config.head_dim = 512
    refused(tiny, "text head_dim 512")


def test_foreign_forward_is_left_in_place(tiny):
    norm = tiny.model.language_model.norm
    norm.forward = functools.partial(type(norm).forward, norm)
    refused(tiny, r"language_model\.norm\.forward was already replaced")


def test_an_unknown_backend_is_named(tiny):
    with pytest.raises(ValueError, match="'fast'"):
        llava15_fast.patch(tiny, "fast")


def test_an_interrupted_patch_is_undone(tiny, monkeypatch):
    attributes = instance_attributes(tiny)
    install, count = api._install, iter(range(2))

    def interrupted(*args):
        if next(count, None) is None:
            raise KeyboardInterrupt
        install(*args)

    monkeypatch.setattr(api, "_install", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llava15_fast.patch(tiny, "torch")
    assert instance_attributes(tiny) == attributes


def test_tensors_on_different_devices_are_named(tiny, inputs):
    llava15_fast.patch(tiny, "torch")
    with pytest.raises(ValueError, match="pixel_values is on device meta"), torch.no_grad():
        tiny(**{**inputs, "pixel_values": inputs["pixel_values"].to("meta")})
    with pytest.raises(ValueError, match="input_ids is on device meta"), torch.no_grad():
        tiny(input_ids=inputs["input_ids"].to("meta"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels without the interpreter")
def test_without_interpreter_and_gpu_auto_means_torch():
    code = """
import torch, pytest, llava15_fast
model = llava15_fast.LlavaOnevision1_5ForConditionalGeneration.from_pretrained("tests/golden/tiny_hub").eval()
handle = llava15_fast.patch(model)
with torch.no_grad():
    model(input_ids=torch.arange(5)[None])
assert {backend for row in handle.report().rows for backend in row.ran} == {"torch"}
with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
    llava15_fast.patch(model, "triton")
assert {row.backend for row in handle.report().rows} == {"auto"}  # as before the failed call
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=ROOT)


def test_a_fallback_of_a_kernel_is_logged_once(caplog, device):
    from llava15_kernels import rms_norm
    from llava15_kernels._dispatch import _log_gradient

    _log_gradient.cache_clear()
    x = torch.randn(2, 64, requires_grad=True, device=device)
    with caplog.at_level(logging.WARNING, "llava15_kernels"):
        for _ in range(3):
            rms_norm(x, torch.ones(64, device=device), 1e-6)
    assert len(caplog.records) == 1 and "gradient" in caplog.text


def test_meta_and_fake_tensors(tiny):
    """For the shapes of what comes out: as unpatched."""
    ids = torch.arange(5, 15, device=tiny.device)[None]
    llava15_fast.patch(tiny, "torch")
    meta = copy.deepcopy(tiny).to("meta")
    with torch.no_grad():
        shape = tiny(input_ids=ids).logits.shape
        assert meta(input_ids=ids.to("meta")).logits.shape == shape
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = mode.from_tensor(ids)
            assert tiny(input_ids=fake, attention_mask=torch.ones_like(fake)).logits.shape == shape


@pytest.mark.parametrize("kept,fast", [({}, False), ({"logits_to_keep": 1}, True), ({"logits_to_keep": 5}, False)])
def test_logits_at_padding_match_eager(tiny, prompts, kept, fast):
    """Of what stands before a prompt, too, whoever makes a loss of them; a prompt whose last ones are kept stays fast."""
    inputs = prompts["batch_left_pad"]
    pads = (inputs["attention_mask"] == 0).sum(-1).max()
    if kept.get("logits_to_keep", 0) > 1:
        kept = {"logits_to_keep": torch.tensor([int(pads) - 1, -1], device=tiny.device)}
    with torch.no_grad():
        expected = tiny(**inputs, **kept).logits
        handle = llava15_fast.patch(tiny, "torch")
        torch.testing.assert_close(tiny(**inputs, **kept).logits, expected, rtol=0, atol=1e-4)
    row = next(row for row in handle.report().rows if row.path == "language_model")
    assert [*row.fallbacks] == ([] if fast else ["logits at padding are used"])


@pytest.mark.parametrize("side,masked,fast", [("left", True, False), ("right", True, True), ("right", False, False)])
def test_loss_at_padding_matches_eager(tiny, side, masked, fast):
    """What is said of the padding before a prompt predicts its first token, as transformers shifts labels."""
    rows = [[5, 6, 7], [8, 9, 10, 11, 12, 13]]
    pads = [6 - len(row) for row in rows]
    ids = torch.tensor([[0] * pad + row if side == "left" else row + [0] * pad for row, pad in zip(rows, pads, strict=True)])
    mask = (ids != 0).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100) if masked else ids}
    inputs = {name: value.to(tiny.device) for name, value in inputs.items()}
    with torch.no_grad():
        expected = tiny(**inputs).loss
        handle = llava15_fast.patch(tiny, "torch")
        torch.testing.assert_close(tiny(**inputs).loss, expected, rtol=1e-5, atol=0)
        row = next(row for row in handle.report().rows if row.path == "language_model")
        assert bool(row.ran) == fast
        assert [*row.fallbacks] == ([] if fast else ["logits at padding are used"])
        tiny(**{**inputs, "labels": None}, logits_to_keep=1)
        assert next(row for row in handle.report().rows if row.path == "language_model").ran
