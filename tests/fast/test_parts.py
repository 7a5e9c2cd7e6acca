"""Modules that the fused code passes over: whatever is put in their place, before or after the patch, is obeyed."""

import contextlib
import copy
import functools

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RotaryEmbedding

import llava15_fast
from llava15_fast.patching.targets import TARGETS

OPTIONS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def outputs(model, prompt):
    with torch.no_grad():
        logits = model(**prompt).logits
    torch.manual_seed(3)
    answer = model.generate(**prompt, **OPTIONS, return_dict_in_generate=True, output_logits=True)
    return [logits, *answer.logits]


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def fallbacks(handle):
    return {row.path for row in handle.report().rows if row.fallbacks}


def changed(output):
    """Not by a factor, which a norm behind it would undo."""
    if isinstance(output, tuple):
        return (changed(output[0]), *output[1:])
    return output + 0.3 * output.flip(1 if output.ndim == 4 else -1)


class Wrapper(nn.Module):
    """As interpretability code steers a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return changed(self.module(*args, **kwargs))


class Transparent(Wrapper):
    """Shows the attributes of what it wraps."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["module"], name)


class Nothing(nn.Module):
    def forward(self, x, *args, **kwargs):
        return 0 * x


class OtherRotary(Qwen3RotaryEmbedding):
    def forward(self, x, position_ids):
        return super().forward(x, 2 * position_ids)


PATHS = {
    "language_model": [
        "language_model.norm",
        "language_model.rotary_emb",
        "language_model.layers.1",
        "language_model.layers.1.self_attn",
        "language_model.layers.1.self_attn.k_norm",
        "language_model.layers.1.input_layernorm",
        "language_model.layers.1.mlp",
        "language_model.layers.1.mlp.act_fn",
    ],
    "visual.encode": [
        "visual.rotary_pos_emb",
        "visual.blocks.1",
        "visual.blocks.1.attn",
        "visual.blocks.1.mlp",
        "visual.blocks.1.mlp.act",
        "visual.blocks.1.norm1",
    ],
    "visual.embed_patches": ["visual.patch_embed", "visual.patch_embed.proj", "visual.pre_layernorm"],
    "visual.merge_patches": ["visual.merger", "visual.merger.ln_q"],
}


def replace(model, path, new):
    parent, _, name = path.rpartition(".")
    setattr(model.model.get_submodule(parent), name, new(model.model.get_submodule(path)))


def instance_forward(model, path):
    module = model.model.get_submodule(path)
    forward = module.forward
    module.forward = lambda *args, **kwargs: changed(forward(*args, **kwargs))


def subclass(model, path):
    module = model.model.get_submodule(path)
    original = type(module)
    module.__class__ = type(
        "Other", (original,), {"forward": lambda self, *args, **kwargs: changed(original.forward(self, *args, **kwargs))}
    )


WAYS = {
    "forward": instance_forward,
    "class": subclass,
    "wrapper": lambda model, path: replace(model, path, Wrapper),
    "transparent wrapper": lambda model, path: replace(model, path, Transparent),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("part", PATHS)
def test_replaced_submodule(tiny, prompt, part, way):
    """After the patch; what it does is what happens, and only the part that it belongs to takes the slower way."""
    for path in PATHS[part]:
        plain, patched = copy.deepcopy(tiny), copy.deepcopy(tiny)
        handle = llava15_fast.patch(patched, "torch")
        before = outputs(patched, prompt)
        try:
            for model in (plain, patched):
                WAYS[way](model, path)
            expected = outputs(plain, prompt)
        except AttributeError:
            continue  # transformers reads attributes of what was there: it cannot be wrapped
        assert not torch.allclose(expected[0], before[0], atol=1e-4), path
        assert_same(outputs(patched, prompt), expected)
        assert fallbacks(handle) == {part}, path


OTHERS = {
    "ablation": lambda model: replace(model, "language_model.layers.1.mlp", lambda _: Nothing()),
    "steered layer": lambda model: replace(model, "language_model.layers.1", Wrapper),
    "identity for a norm": lambda model: replace(model, "language_model.layers.1.input_layernorm", lambda _: nn.Identity()),
    "rotary embedding": lambda model: replace(
        model, "language_model.rotary_emb", lambda _: OtherRotary(model.config.text_config).to(model.device)
    ),
    "activation": lambda model: replace(model, "language_model.layers.1.mlp.act_fn", lambda _: nn.GELU()),
    "activation of one block": lambda model: replace(model, "visual.blocks.1.mlp.act", lambda _: nn.ReLU()),
    "another gelu": lambda model: replace(model, "visual.blocks.1.mlp.act", lambda _: nn.GELU("tanh")),
    "epsilon of k": lambda model: setattr(model.model.language_model.layers[1].self_attn.k_norm, "variance_epsilon", 1.0),
    "epsilon": lambda model: setattr(model.model.language_model.layers[1].input_layernorm, "variance_epsilon", 1.0),
    "not causal": lambda model: [
        setattr(layer.self_attn, "is_causal", False) for layer in model.model.language_model.layers
    ],
    "gate and up exchanged": lambda model: exchange(model.model.language_model.layers[1].mlp),
    "layers exchanged": lambda model: setattr(
        model.model.language_model, "layers", nn.ModuleList([model.model.language_model.layers[i] for i in (1, 0, 2)])
    ),
    "pruned": lambda model: prune(model.model.language_model.layers[1].mlp),
}  # fmt: skip


def exchange(mlp):
    """Other names, and the same order."""
    gate, up, down, activation = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn
    mlp._modules.clear()
    mlp.up_proj, mlp.gate_proj, mlp.down_proj, mlp.act_fn = gate, up, down, activation


def prune(mlp):
    """Structured: the addresses stay, the shapes do not."""
    for linear, part in ((mlp.gate_proj, slice(48)), (mlp.up_proj, slice(48)), (mlp.down_proj, (slice(None), slice(48)))):
        linear.weight.data = linear.weight.data[part]


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("what", OTHERS)
def test_other_changes(tiny, prompt, what, first):
    plain, patched = copy.deepcopy(tiny), tiny
    plain_before = outputs(plain, prompt)
    if not first:
        llava15_fast.patch(patched, "torch")
        outputs(patched, prompt)
    for model in (plain, patched):
        OTHERS[what](model)
    expected = outputs(plain, prompt)
    assert not torch.allclose(expected[0], plain_before[0], atol=1e-4)
    if first:
        with contextlib.suppress(llava15_fast.PatchError):  # refused, and named: see test_patching
            llava15_fast.patch(patched, "torch")
    assert_same(outputs(patched, prompt), expected)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_nonpositive_softmax_scale(tiny, prompt, scale):
    tiny.set_attn_implementation("eager")  # with sdpa transformers' answer is NaN
    tiny.model.language_model.layers[1].self_attn.scaling = scale
    expected = outputs(tiny, prompt)
    llava15_fast.patch(tiny, "torch")
    assert_same(outputs(tiny, prompt), expected)


def test_class_forward_was_replaced(tiny, prompt, monkeypatch):
    """As other packages of kernels do."""
    plain = copy.deepcopy(tiny)
    handle = llava15_fast.patch(tiny, "torch")
    before = outputs(tiny, prompt)
    original = Qwen3MLP.forward
    monkeypatch.setattr(Qwen3MLP, "forward", lambda self, x: 1.1 * original(self, x))
    expected = outputs(plain, prompt)
    assert not torch.allclose(expected[0], before[0], atol=1e-4)
    assert_same(outputs(tiny, prompt), expected)
    assert fallbacks(handle) == {"language_model"}
    monkeypatch.undo()
    assert_same(outputs(tiny, prompt), before)


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
def test_custom_attention_module(tiny, prompt, first):
    def half(module, query, key, value, attention_mask, **kwargs):
        output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output / 2, weights

    AttentionInterface.register("half", half)
    AttentionMaskInterface.register("half", sdpa_mask)
    plain = copy.deepcopy(tiny)
    plain.set_attn_implementation("half")
    if first:
        tiny.set_attn_implementation("half")
    handle = llava15_fast.patch(tiny, "torch")
    tiny.set_attn_implementation("half")
    assert_same(outputs(tiny, prompt), outputs(plain, prompt))
    assert fallbacks(handle) == {"language_model", "visual.encode"}


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_a_hook_on_all_modules(tiny, prompt, register):
    def listen(module, args, *output):
        if isinstance(module, Qwen3MLP):
            return 1.1 * output[0] if output else (1.1 * args[0],)
        return None

    plain = copy.deepcopy(tiny)
    llava15_fast.patch(tiny, "torch")
    before = outputs(tiny, prompt)
    hook = getattr(nn.modules.module, register)(listen)
    try:
        expected, found = outputs(plain, prompt), outputs(tiny, prompt)
    finally:
        hook.remove()
    assert_same(found, expected)
    assert not torch.allclose(found[0], before[0], atol=1e-4)
    assert_same(outputs(tiny, prompt), before)


@pytest.mark.parametrize("part", ["language_model", "visual"])
@pytest.mark.parametrize("where", ["modules", "all"])
def test_attention_dropout_is_applied(tiny, prompt, part, where):
    """Where the modules of attention train, whatever their parents do."""
    plain = copy.deepcopy(tiny)
    handle = llava15_fast.patch(tiny, "torch")
    before = outputs(tiny, prompt)
    for model in (plain, tiny):
        for module in getattr(model.model, part).modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
                module.train()
        if where == "all":
            model.train()
    results = []
    for model in (plain, tiny):
        torch.manual_seed(5)
        with torch.no_grad():
            results.append(model(**prompt).logits)
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)
    assert not torch.allclose(results[0], before[0], atol=1e-4)
    assert fallbacks(handle) == {{"visual": "visual.encode"}.get(part, part)}


def tied(model):
    layers = model.model.language_model.layers
    layers[1].mlp.gate_proj.weight = layers[0].mlp.gate_proj.weight
    layers[2].mlp.up_proj = layers[0].mlp.up_proj
    layers[2].self_attn.k_proj.weight = layers[2].self_attn.v_proj.weight


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
def test_shared_weights(tiny, prompt, first):
    """They stay one, and a later change in place is seen everywhere."""
    plain = copy.deepcopy(tiny)
    if first:
        tied(tiny)
    llava15_fast.patch(tiny, "torch")
    outputs(tiny, prompt)
    if not first:
        tied(tiny)
    tied(plain)
    assert_same(outputs(tiny, prompt), outputs(plain, prompt))
    for model in (plain, tiny):
        model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})
    assert_same(outputs(tiny, prompt), outputs(plain, prompt))
    llava15_fast.unpatch(tiny)
    layers = tiny.model.language_model.layers
    assert layers[1].mlp.gate_proj.weight is layers[0].mlp.gate_proj.weight
    assert_same(outputs(tiny, prompt), outputs(plain, prompt))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_transforms_of_torch_func(tiny, golden, backend):
    """The kernels know nothing of duals and batches: a tangent would be lost without a word."""
    ids = golden["text"][0]["input_ids"]
    tiny.requires_grad_(False).set_attn_implementation("eager")
    embeds = tiny.get_input_embeddings()(ids)

    def logits(embeds):
        return tiny(inputs_embeds=embeds, use_cache=False).logits

    expected = torch.func.jvp(logits, (embeds,), (torch.ones_like(embeds),))
    handle = llava15_fast.patch(tiny, backend)
    for found in (torch.func.jvp(logits, (embeds,), (torch.ones_like(embeds),)),):
        assert_same(found, expected)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(embeds, torch.ones_like(embeds))
        assert_same(torch.autograd.forward_ad.unpack_dual(logits(dual)), expected)
    assert "language_model" in fallbacks(handle)


@pytest.mark.parametrize("owner", ["model", "inner"])
def test_user_wrapped_model_forward(tiny, prompts, owner):
    """It may look at the mask, which has to be a tensor then."""
    prompt = prompts["text_batch_left_pad"]
    module = tiny if owner == "model" else tiny.model
    shapes, forward = [], module.forward

    @functools.wraps(forward)
    def wrapped(*args, **kwargs):
        shapes.append(tuple(kwargs["attention_mask"].shape))
        return forward(*args, **kwargs)

    module.forward = wrapped
    expected = tiny.generate(**prompt, **OPTIONS)
    seen = list(shapes)
    shapes.clear()
    llava15_fast.patch(tiny, "torch")
    assert torch.equal(tiny.generate(**prompt, **OPTIONS), expected) and shapes == seen


@pytest.mark.parametrize("name", ["prepare_inputs_for_generation", "_update_model_kwargs_for_generation"])
def test_custom_prepare_inputs(tiny, prompts, name):
    """Called for every token, and obeyed."""
    prompt = prompts["text_batch_left_pad"]
    calls, method = [], getattr(tiny, name)

    def own(*args, **kwargs):
        calls.append(name)
        return method(*args, **kwargs)

    setattr(tiny, name, own)
    expected = tiny.generate(**prompt, **OPTIONS)
    count = len(calls)
    handle = llava15_fast.patch(tiny, "torch")
    assert torch.equal(tiny.generate(**prompt, **OPTIONS), expected) and len(calls) == 2 * count
    assert fallbacks(handle) == {"generate"}


def test_unpatched_text_model(tiny, prompts):
    prompt = prompts["text_batch_left_pad"]
    expected = tiny.generate(**prompt, **OPTIONS)
    other = copy.deepcopy(tiny.model.language_model)
    llava15_fast.patch(tiny, "torch")
    tiny.model.language_model = other
    assert torch.equal(tiny.generate(**prompt, **OPTIONS), expected)


def test_every_part_is_a_target():
    """What is looked at in every model is what `patch` asks for."""
    declared = {target.path for target in TARGETS if not target.kernels}
    parts = {path.replace(".1", ".*") for paths in PATHS.values() for path in paths} - {
        "language_model.layers.*.mlp.act_fn",
        "visual.blocks.*.mlp.act",
    }
    assert parts <= declared
    assert declared - parts == {
        "language_model.layers.*.post_attention_layernorm",
        "language_model.layers.*.self_attn.q_norm",
        "visual.blocks.*.norm2",
    }
