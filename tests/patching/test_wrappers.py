"""What other libraries put around a model or change on it, before and after `patch`, and what is left when they go."""

import copy
import functools
import gc
import itertools
import pickle
import types
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.utils import parametrize, prune
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

import llava15_fast
from llava15_fast.fast.runtime import RUNTIME, FastModule
from llava15_fast.model.modeling import LlavaOnevision1_5VisionBlock

CHECKPOINT = Path(__file__).parents[1] / "golden/tiny_hub"
GREEDY = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PATHS = ["", "model", "model.visual", "model.language_model"]
"""Of the modules whose class is changed."""


@pytest.fixture(scope="module")
def loaded():
    return llava15_fast.LlavaOnevision1_5ForConditionalGeneration.from_pretrained(CHECKPOINT).eval()


@pytest.fixture
def tiny(loaded, device):
    """Not read from the disk for every test."""
    return copy.deepcopy(loaded).to(device)


@pytest.fixture
def inputs(golden):
    return golden["one_image"][0]


def outputs(model, prompt):
    with torch.no_grad():
        logits = model(**prompt).logits
    answer = model.generate(**prompt, **GREEDY, return_dict_in_generate=True, output_logits=True)
    return logits, torch.stack(answer.logits, 1), answer.sequences


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        if ours.is_floating_point():
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        else:
            assert torch.equal(ours, theirs)


def differ(found, expected):
    return not torch.allclose(found[0], expected[0], atol=1e-4)


def classes(model):
    return {path: [cls.__qualname__ for cls in type(module).__mro__] for path, module in model.named_modules()}


def is_untouched(model):
    return not any(isinstance(module, FastModule) or RUNTIME in vars(module) for module in model.modules())


def in_order(model, steps):
    for step in steps:
        model = step(model) or model
    return model


def patch(model):
    llava15_fast.patch(model, "torch")


# FSDP and DDP


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def fsdp1(model, *kinds, **options):
    policy = ModuleWrapPolicy(set(kinds)) if kinds else None
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)


def fsdp2(model, *paths):
    text, vision = model.model.language_model, model.model.visual
    parts = {"layers": [*text.layers], "blocks": [*vision.blocks], "embeddings": [text.embed_tokens]}
    parts |= {"text": [text], "vision": [vision], "inner": [model.model]}
    for path in paths:
        for module in parts[path]:
            fully_shard(module, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))


WRAPPERS = {
    "FSDP around layers and blocks": lambda model: fsdp1(
        model, Qwen3DecoderLayer, LlavaOnevision1_5VisionBlock, use_orig_params=True
    ),
    "FSDP around the whole, flat": lambda model: fsdp1(model, use_orig_params=False),
    "FSDP2 of layers": lambda model: fsdp2(model, "layers", "blocks"),
    "FSDP2 of what is patched": lambda model: fsdp2(model, "embeddings", "text", "vision", "inner"),
    "FSDP2 of the whole": lambda model: fsdp2(model),
    "DDP": nn.parallel.DistributedDataParallel,
}


def trained(model, inputs):
    """Loss and gradients."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    grads = [parameter.grad for parameter in model.parameters()]
    return [loss, *(grad.to_local() if hasattr(grad, "to_local") else grad for grad in grads)]


@pytest.mark.filterwarnings("ignore:FSDP is switching")
@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo is for CPUs")
@pytest.mark.parametrize("first", ["patch", "wrap"])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_distributed(tiny, inputs, prompt, group, kind, first):

    def run(model):
        with torch.no_grad():
            found = [model(**prompt).logits]
        if "FSDP" not in kind:
            found.append(model.module.generate(**prompt, **GREEDY))
        elif "FSDP2" in kind:
            found.append(model.generate(**prompt, **GREEDY))
        return [*found, *trained(model, inputs)]

    wrap = WRAPPERS[kind]
    plain = in_order(copy.deepcopy(tiny), [wrap])
    model = tiny if first == "patch" else in_order(tiny, [wrap])
    try:
        patch(model)
    except llava15_fast.PatchError:  # refused, and named: something of FSDP is in the place of a layer
        assert first == "wrap" and "layers" in kind
    if first == "patch":
        model = in_order(model, [wrap])
    # FSDP2 adds gradients up where `generate` ran before: the plain model runs as often.
    assert_same(run(model), run(plain))
    llava15_fast.unpatch(model)
    assert is_untouched(model) and classes(model) == classes(plain)
    assert_same(run(model), run(plain))
    if "layers" not in kind:
        llava15_fast.patch(model, "torch")
        assert_same(run(model), run(plain))


def replica(model, scale, trains=True):
    """As nn.DataParallel makes it on every device; its weights are others, so that it shows which are used."""
    modules = dict(model.named_modules())
    copies = {path: module._replicate_for_data_parallel() for path, module in modules.items()}
    for path, module in modules.items():
        for name in module._modules:
            copies[path]._modules[name] = copies[f"{path}.{name}".lstrip(".")]
        for name, weight in module._parameters.items():
            if weight is None or not trains:
                copies[path]._parameters[name] = None if weight is None else nn.Parameter(weight.detach() * scale)
            else:
                setattr(copies[path], name, weight * scale)
        for name, buffer in module._buffers.items():
            copies[path]._buffers[name] = buffer
    return copies[""]


def test_replicas_compute_with_their_own_weights(tiny, golden, prompt):
    inputs = golden["two_images"][0]

    def run(model):
        model.zero_grad()
        replica(model, 0.9)(**inputs).loss.backward()
        with torch.no_grad():
            found = replica(model, 0.9)(**inputs), replica(model, 0.9, trains=False)(**prompt)
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert len(grads) > 30
        return *(part.logits for part in found), *(grad.clone() for grad in grads)

    expected = run(tiny)
    before = outputs(tiny, inputs)
    patch(tiny)
    assert_same(run(tiny), expected)
    assert differ(expected, before)
    assert_same(outputs(tiny, inputs), before)
    llava15_fast.unpatch(tiny)
    assert_same(run(tiny), expected)


def test_a_call_with_other_weights(tiny, prompt):
    """`torch.func.functional_call` puts them in for one call."""
    weights = {name: 0.9 * value for name, value in tiny.named_parameters()}

    def run():
        with torch.no_grad():
            return [torch.func.functional_call(tiny, weights, (), prompt).logits]

    expected, before = run(), outputs(tiny, prompt)
    llava15_fast.patch(tiny, "torch")
    assert_same(outputs(tiny, prompt), before)
    assert_same(run(), expected)
    assert_same(outputs(tiny, prompt), before)
    assert differ(expected, before)


# Parametrizations, and hooks that make weights


class Scaled(nn.Module):
    def forward(self, weight):
        return 0.5 * weight + torch.linspace(-1, 1, weight.numel(), device=weight.device).view_as(weight)


PARAMETRIZED = {
    "class_pos_emb": ("model.visual", "class_pos_emb"),
    "class_embedding": ("model.visual", "class_embedding"),
    "linear": ("model.language_model.layers.1.mlp.up_proj", "weight"),
    "qkv": ("model.visual.blocks.1.attn.qkv", "bias"),
    "norm": ("model.language_model.layers.1.input_layernorm", "weight"),
    "patch embedding": ("model.visual.patch_embed.proj", "weight"),
    "embeddings": ("model.language_model.embed_tokens", "weight"),
}
ORDERS = {
    "-".join(order): order
    for order in itertools.permutations(["patch", "add", "remove", "unpatch"])
    if order.index("patch") < order.index("unpatch") and order.index("add") < order.index("remove")
}


def some_orders(whats, thoroughly):
    """Of some all orders, of others those in which the two cross."""
    return [(what, order) for what in whats for order in ORDERS if what in thoroughly or order in CROSSED]


CROSSED = ["patch-add-unpatch-remove", "add-patch-remove-unpatch"]


@pytest.mark.parametrize(("what", "order"), some_orders(PARAMETRIZED, ["class_pos_emb"]))
def test_parametrizations(tiny, prompt, what, order):
    path, name = PARAMETRIZED[what]
    plain, patched = copy.deepcopy(tiny), copy.deepcopy(tiny)
    first = outputs(plain, prompt)
    steps = {
        "patch": lambda model: patch(model) if model is patched else None,
        "unpatch": llava15_fast.unpatch,
        "add": lambda model: parametrize.register_parametrization(model.get_submodule(path), name, Scaled()),
        "remove": lambda model: parametrize.remove_parametrizations(model.get_submodule(path), name, leave_parametrized=False),
    }
    for step in ORDERS[order]:
        for model in (plain, patched):
            with torch.no_grad():
                in_order(model, [lambda model, step=step: steps[step](model) and None])
        expected = outputs(plain, prompt)
        assert_same(outputs(patched, prompt), expected)
        if step == "add":
            assert differ(expected, first)
    assert is_untouched(patched) and classes(patched) == classes(tiny)
    assert list(patched.state_dict()) == list(plain.state_dict())


OF_TORCH = {
    "pruned": (
        lambda module: prune.random_unstructured(module, "weight", 0.5),
        lambda module: prune.remove(module, "weight"),
    ),
    "weight norm by a hook": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "spectral norm": (
        nn.utils.parametrizations.spectral_norm,
        lambda module: parametrize.remove_parametrizations(module, "weight"),
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("order", CROSSED)
@pytest.mark.parametrize("kind", OF_TORCH)
def test_weights_computed_in_every_call(tiny, prompt, kind, order):
    add, remove = OF_TORCH[kind]
    plain, patched = copy.deepcopy(tiny), copy.deepcopy(tiny)
    steps = {"patch": patch, "unpatch": llava15_fast.unpatch, "add": add, "remove": remove}
    for step in ORDERS[order]:
        for model in (plain, patched):
            torch.manual_seed(1)
            if step in ("patch", "unpatch"):
                if model is patched:
                    steps[step](model)
                continue
            text, vision = model.model.language_model.layers[1], model.model.visual.blocks[1]
            for module in (text.self_attn.q_proj, text.mlp.down_proj, vision.attn.qkv, vision.mlp.fc2):
                steps[step](module)
            if step == "add":  # a weight that is changed below the one that is made
                with torch.no_grad():
                    next(text.mlp.down_proj.parameters()).mul_(1.5)
        torch.manual_seed(2)
        expected = outputs(plain, prompt)
        torch.manual_seed(2)
        assert_same(outputs(patched, prompt), expected)
    assert is_untouched(patched) and classes(patched) == classes(plain)


# Subclasses of a user's


class Named(llava15_fast.LlavaOnevision1_5ForConditionalGeneration):
    """With an attribute and a method."""

    def __init__(self, config):
        super().__init__(config)
        self.calls = 0

    def describe(self):
        return f"{type(self).__name__} {self.calls}"


class Doubled(Named):
    """With a forward, which `super()` calls."""

    @functools.wraps(Named.forward)
    def forward(self, *args, **kwargs):
        self.calls += 1
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits.flip(-1)
        return output


class WithInit(Named):
    def __init__(self, config, factor=1.0):
        super().__init__(config)
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None, image_grid_thw=None, **kwargs):
        kwargs |= {"attention_mask": attention_mask, "pixel_values": pixel_values, "image_grid_thw": image_grid_thw}
        output = super().forward(input_ids, **kwargs)
        output.logits = output.logits * self.factor
        return output


def of_class(cls, tiny):
    model = cls(tiny.config).eval().to(tiny.device)
    model.load_state_dict(tiny.state_dict(), strict=False)
    return model


@pytest.mark.parametrize("cls", [Named, Doubled, WithInit])
def test_subclasses(tiny, prompt, cls, tmp_path):
    model = of_class(cls, tiny)
    expected = outputs(model, prompt)
    assert differ(expected, outputs(tiny, prompt)) == (cls is Doubled)
    names = {name: value.clone() for name, value in model.state_dict().items()}
    handle = llava15_fast.patch(model, "torch")
    assert isinstance(model, cls) and type(model).__name__ == cls.__name__
    assert_same(outputs(model, prompt), expected)
    assert handle.report().rows
    assert (model.calls > 0) == (cls is Doubled) and model.describe() == f"{cls.__name__} {model.calls}"

    model.save_pretrained(tmp_path / "saved")
    torch.save(model, tmp_path / "model.pt")
    llava15_fast.unpatch(copy.deepcopy(model))  # changes nothing of the original
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(tmp_path / "model.pt", weights_only=False),
        "save_pretrained": cls.from_pretrained(tmp_path / "saved").eval().to(tiny.device),
        "save_pretrained of its class": type(model).from_pretrained(tmp_path / "saved").eval().to(tiny.device),
        "itself": model,
    }
    for name, twin in copies.items():
        assert isinstance(twin, cls), name
        assert {name: value.shape for name, value in twin.state_dict().items()} == {n: v.shape for n, v in names.items()}
        assert_same(outputs(twin, prompt), expected)
        llava15_fast.unpatch(twin)
        assert type(twin) is cls and is_untouched(twin), name
        assert_same(outputs(twin, prompt), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, names[name])


def test_class_made_in_a_function(tiny, prompt):
    class Local(Named):
        @functools.wraps(Named.forward)
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = of_class(Local, tiny)
    expected = outputs(model, prompt)
    llava15_fast.patch(model, "torch")
    assert_same(outputs(copy.deepcopy(model), prompt), expected)
    llava15_fast.unpatch(model)
    assert type(model) is Local


@pytest.mark.parametrize("path", PATHS)
def test_reclassed_patched_module(tiny, prompt, path):
    """Put there by hand, before the patch or on top of it."""
    plain = copy.deepcopy(tiny)
    counts = []

    def subclass(model):
        module = model.get_submodule(path)
        original = type(module)

        def train(self, mode=True):
            counts.append(type(self).__name__)
            return original.train(self, mode)

        module.__class__ = type("Other", (original,), {"train": train, "__module__": original.__module__})

    expected = outputs(plain, prompt)
    for steps in ([subclass, patch], [patch, subclass]):
        model = in_order(copy.deepcopy(tiny), steps)
        assert_same(outputs(model, prompt), expected)
        model.eval()
        assert counts.pop() == "Other"
        llava15_fast.unpatch(model)
        assert_same(outputs(model, prompt), expected)
        model.eval()
        assert counts.pop() == "Other" and is_untouched(model)
        assert len(type(model.get_submodule(path)).__mro__) == len(type(plain.get_submodule(path)).__mro__) + 1


# accelerate


def counting(calls):
    accelerate = pytest.importorskip("accelerate")

    class Counting(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    return Counting()


@pytest.mark.parametrize(("path", "order"), some_orders(PATHS, [""]))
def test_hooks_of_accelerate_on_patched_modules(tiny, prompt, path, order):
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    plain, calls = copy.deepcopy(tiny), []
    expected = outputs(plain, prompt)
    steps = {
        "patch": patch,
        "unpatch": llava15_fast.unpatch,
        "add": lambda model: add_hook_to_module(model.get_submodule(path), counting(calls)) and None,
        "remove": lambda model: remove_hook_from_module(model.get_submodule(path)) and None,
    }
    done = set()
    for step in ORDERS[order]:
        in_order(tiny, [steps[step]])
        done.add(step)
        calls.clear()
        assert_same(outputs(tiny, prompt), expected)
        assert bool(calls) == ("add" in done and "remove" not in done)
    assert is_untouched(tiny) and classes(tiny) == classes(plain)
    module = tiny.get_submodule(path)
    assert module.forward.__func__ is type(module).forward


@pytest.mark.parametrize("order", CROSSED)
def test_accelerate_offloaded_weights(tiny, prompt, order):
    """Offloaded, and on the device again when the hooks go."""
    accelerate = pytest.importorskip("accelerate")
    plain = copy.deepcopy(tiny)
    expected = outputs(plain, prompt)
    state = {name: value.clone() for name, value in tiny.state_dict().items()}
    steps = {
        "patch": patch,
        "unpatch": llava15_fast.unpatch,
        "add": lambda model: accelerate.cpu_offload(model, execution_device=model.device) and None,
        "remove": lambda model: accelerate.hooks.remove_hook_from_submodules(model),
    }
    for step in ORDERS[order]:
        in_order(tiny, [steps[step]])
        assert_same(outputs(tiny, prompt), expected)
    assert is_untouched(tiny) and classes(tiny) == classes(plain)
    assert all(torch.equal(value, state[name]) for name, value in tiny.state_dict().items())


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
def test_a_dispatched_model(tiny, prompt, first, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    expected = outputs(tiny, prompt)
    if first:
        patch(tiny)
    where = {"model.visual": tiny.device, "model.language_model": "disk", "lm_head": tiny.device}
    tiny = accelerate.dispatch_model(tiny, where, main_device=tiny.device, offload_dir=str(tmp_path), force_hooks=True)
    if not first:
        patch(tiny)
    assert_same(outputs(tiny, prompt), expected)
    llava15_fast.unpatch(tiny)
    assert_same(outputs(tiny, prompt), expected)


# Memory, copies


@pytest.mark.parametrize("way", ["patch", "generate", "beams", "unpatch", "copy"])
def test_del_frees_the_weights(tiny, prompt, way):
    """With the last name, as unpatched; not only when the collector of cycles comes by."""
    model = copy.deepcopy(tiny)
    gc.disable()
    try:
        patch(model)
        if way != "patch":
            outputs(model, prompt)
        if way == "beams":
            model.generate(**prompt, **GREEDY, num_beams=2)
        if way == "unpatch":
            llava15_fast.unpatch(model)
        if way == "copy":
            twin = copy.copy(model)
            del twin
        held = [weakref.ref(parameter) for parameter in model.parameters()]
        runtime = weakref.ref(vars(model)[RUNTIME]) if RUNTIME in vars(model) else lambda: None
        del model
        assert [reference() for reference in held] == [None] * len(held)
        assert runtime() is None
    finally:
        gc.enable()


def own_weights(twin):
    with torch.no_grad():
        for path, module in twin.named_modules():
            del path
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(0.9 * parameter)


def shallow(model):
    """Modules of its own over the same weights."""
    twin = copy.copy(model)
    twin._modules = {name: shallow(child) for name, child in model._modules.items()}
    twin._parameters = dict(model._parameters)
    return twin


CLONES = {
    "copy.copy": shallow,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("clone", CLONES)
def test_a_copy_computes_with_its_own_weights(tiny, prompt, clone):
    plain = copy.deepcopy(tiny)
    before = outputs(plain, prompt)
    own_weights(plain)
    expected = outputs(plain, prompt)
    patch(tiny)
    twin = CLONES[clone](tiny)
    own_weights(twin)
    assert_same(outputs(twin, prompt), expected)
    assert_same(outputs(tiny, prompt), before)
    llava15_fast.unpatch(tiny)
    assert_same(outputs(twin, prompt), expected)
    assert_same(outputs(tiny, prompt), before)
    llava15_fast.unpatch(twin)
    assert_same(outputs(twin, prompt), expected)
    assert is_untouched(twin) and is_untouched(tiny)


def test_a_shallow_copy_of_the_head(tiny, prompt):
    """It has the modules of the model: `unpatch` of one is that of both, and both go on answering."""
    expected = outputs(tiny, prompt)
    patch(tiny)
    twin = copy.copy(tiny)
    twin.generation_config = copy.deepcopy(tiny.generation_config)
    twin.generation_config.max_new_tokens = 3
    assert twin.generate(**prompt, do_sample=False, pad_token_id=0).shape[1] == prompt["input_ids"].shape[1] + 3
    for model in (twin, tiny):
        assert_same(outputs(model, prompt), expected)
    llava15_fast.unpatch(twin)
    for model in (twin, tiny):
        assert_same(outputs(model, prompt), expected)
    handle = llava15_fast.patch(tiny, "torch")
    for model in (twin, tiny):
        assert_same(outputs(model, prompt), expected)
    assert any(row.ran for row in handle.report().rows)
    llava15_fast.unpatch(tiny)
    llava15_fast.unpatch(twin)
    assert is_untouched(tiny) and is_untouched(twin)


def test_a_part_of_the_model_by_itself(tiny, prompt):
    """A shallow copy of the text model with one layer, and the text model in another model."""
    ids = prompt["input_ids"].clamp(max=400)

    def run(model):
        text = model.model.language_model
        twin = copy.copy(text)
        twin._modules, twin.config = dict(text._modules), copy.deepcopy(text.config)
        twin.config.num_hidden_layers = 1
        with torch.no_grad():
            return [twin(input_ids=ids).last_hidden_state, text(input_ids=ids).last_hidden_state]

    expected = run(tiny)
    patch(tiny)
    assert_same(run(tiny), expected)
    assert not torch.equal(*run(tiny))


# What is asked for, and what lies on instances


@pytest.mark.parametrize("cls", [None, Named])
@pytest.mark.parametrize("first", ["patch", "call"])
def test_hidden_states_and_attentions_on_request(tiny, prompt, first, cls):
    tiny.set_attn_implementation("eager")
    model = tiny if cls is None else of_class(cls, tiny)
    plain = copy.deepcopy(model)
    pixels = {"pixel_values": prompt["pixel_values"], "grid_thw": prompt["image_grid_thw"]}
    ids = {"input_ids": prompt["input_ids"].clamp(max=400)}
    calls = [
        lambda model, **asked: model(**prompt, **asked),
        lambda model, **asked: model.model(**prompt, **asked),
        lambda model, **asked: model.model.language_model(**ids, **asked),
        lambda model, **asked: model.model.visual(**pixels, **asked),
        lambda model, **asked: model.generate(**prompt, **GREEDY, return_dict_in_generate=True, **asked),
    ]

    def run(model):
        with torch.no_grad():
            return [call(model, output_hidden_states=True, output_attentions=True) for call in calls]

    def tensors(found):
        return [found] if isinstance(found, torch.Tensor) else [tensor for part in found for tensor in tensors(part)]

    expected = run(plain)
    if first == "call":
        run(model)
    patch(model)
    with torch.no_grad():
        model(**prompt)
    for found, wanted in zip(run(model), expected, strict=True):
        assert found.hidden_states is not None and found.keys() == wanted.keys()
        for name in ("hidden_states", "attentions"):
            if wanted.get(name) is not None:
                assert_same(tensors(found[name]), tensors(wanted[name]))
    llava15_fast.unpatch(model)
    for found, wanted in zip(run(model), expected, strict=True):
        assert_same(tensors(found.hidden_states), tensors(wanted.hidden_states))


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("kind", ["function", "method"])
@pytest.mark.parametrize("path", PATHS)
def test_a_forward_on_an_instance_wins(tiny, prompt, path, kind, first):
    def put(model):
        module = model.get_submodule(path)
        forward = type(module).forward

        @functools.wraps(forward)
        def own(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            key = {"": "logits", "model.visual": "pooler_output"}.get(path, "last_hidden_state")
            output[key] = output[key].flip(-1)
            return output

        bound = types.MethodType(own, module)
        module.forward = bound if kind == "method" else functools.wraps(bound)(lambda *args, **kwargs: bound(*args, **kwargs))
        return module.forward

    plain = copy.deepcopy(tiny)
    before = outputs(plain, prompt)
    put(plain)
    expected = outputs(plain, prompt)
    if not first:
        patch(tiny)
    forward = put(tiny)
    if first:
        try:
            patch(tiny)
        except llava15_fast.PatchError:
            assert path == "model.language_model"
    assert_same(outputs(tiny, prompt), expected)
    assert differ(expected, before)
    llava15_fast.unpatch(tiny)
    assert vars(tiny.get_submodule(path))["forward"] is forward
    if first:  # after, it is bound to the class that is gone
        assert_same(outputs(tiny, prompt), expected)
    del tiny.get_submodule(path).forward
    assert_same(outputs(tiny, prompt), before)
