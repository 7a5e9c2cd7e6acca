"""What a snapshot of a module tree has to notice, and what it must not mind."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn

import llava15_fast
from llava15_fast import text, vision
from llava15_fast.snapshot import SEEN, Remembered, Snapshot


@pytest.fixture
def tree():
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4, bias=False)), nn.BatchNorm1d(4))


def replace_data(module):
    """The same parameter, dtype and shape, other memory."""
    kept = module[0].weight.data
    module[0].weight.data = kept.clone()


def back_at_the_same_address(module):
    """As memory that is freed and taken again."""
    module[0].weight.data = module[0].weight.data.view(torch.float16)[:, :4]


CHANGES = {
    "a module is replaced": lambda m: setattr(m, "0", nn.Linear(4, 4)),
    "a module is replaced deep inside": lambda m: setattr(m[1], "1", nn.Linear(4, 4, bias=False)),
    "a module is wrapped": lambda m: setattr(m[1], "1", nn.Sequential(m[1][1])),
    "a leaf gets a child": lambda m: m[1][0].add_module("adapter", nn.Identity()),
    "a module goes": lambda m: m.__delitem__(2),
    "a parameter is replaced": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(4, 4))),
    "a parameter appears": lambda m: m[1][1].register_parameter("bias", nn.Parameter(torch.ones(4))),
    "a parameter goes": lambda m: setattr(m[0], "bias", None),
    "assign": lambda m: m.load_state_dict({name: value.clone() for name, value in m.state_dict().items()}, assign=True),
    "other memory": replace_data,
    "another dtype": lambda m: m.double(),
    "another dtype at the same address": back_at_the_same_address,
    "another dtype and back": lambda m: m.double().float(),
    "a buffer is replaced": lambda m: setattr(m[2], "running_mean", torch.zeros(4)),
    "a forward hook": lambda m: m[1][0].register_forward_hook(lambda *_: None),
    "a forward pre-hook": lambda m: m[0].register_forward_pre_hook(lambda *_: None),
    "a forward on an instance": lambda m: setattr(m[1][1], "forward", lambda x: x),
    "accelerate's hook": lambda m: setattr(m[0], "_hf_hook", object()),
    "a parametrization": lambda m: nn.utils.parametrizations.weight_norm(m[0]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_it_notices(tree, change):
    snapshot = Snapshot(tree)
    assert snapshot.holds()
    change(tree)
    assert not snapshot.holds()
    assert Snapshot(tree).holds()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[0].weight.data.mul_(2.0),
        lambda m: m.load_state_dict({name: value + 1 for name, value in m.state_dict().items()}),
        lambda m: m.eval()(torch.ones(2, 4)).sum().backward(),
        lambda m: m.requires_grad_(False),
    ],
    ids=["in place", "load", "run and gradient", "frozen"],
)
def test_it_does_not_mind(tree, change):
    snapshot = Snapshot(tree)
    change(tree)
    assert snapshot.holds()


def test_another_hook_in_the_place_of_one_is_noticed(tree):
    handle = tree[0].register_forward_hook(lambda *_: None)
    snapshot = Snapshot(tree)
    handle.remove()
    tree[0].register_forward_hook(lambda *_: None)
    assert not snapshot.holds()


def test_replaced_weights_are_not_kept_alive(tree):
    weight, snapshot = weakref.ref(tree[0].weight), Snapshot(tree)
    tree.load_state_dict({name: value.clone() for name, value in tree.state_dict().items()}, assign=True)
    assert weight() is None and not snapshot.holds()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["deepcopy", "pickle"])
def test_a_copy_looks_for_itself(tree, clone):
    remembered = Remembered(vision.find)
    remembered.known = Snapshot(tree), "seen"
    assert remembered.of(tree) == "seen"
    assert clone(remembered).known is None and clone(remembered).find is vision.find


def test_a_request_looks_once(tiny, golden, monkeypatch):
    """Ten tokens and an image, then a hook, then none: layers are looked at when something has changed."""
    looks = []
    for part in (text, vision):
        monkeypatch.setattr(part, "find", lambda module, find=part.find: looks.append(type(module).__name__) or find(module))
    llava15_fast.patch(tiny, "torch")
    prompt = {key: value for key, value in golden["one_image"][0].items() if key != "labels"}

    def request():
        looks.clear()
        tiny.generate(**prompt, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
        return sorted(looks)

    assert request() == ["LlavaOnevision1_5VisionModel"]  # `patch` has looked at the text model
    assert request() == []
    handle = tiny.model.language_model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert request() == ["Qwen3Model"]
    handle.remove()
    assert request() == ["Qwen3Model"]
    llava15_fast.unpatch(tiny)
    assert not any(SEEN in module.__dict__ for module in tiny.modules())
