"""Decode steps on few rows, where `fused_linear` and `decode_attention` stand for the modules of a layer."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import llava15_fast
from llava15_fast.model.releases import CACHE, as_argument
from llava15_kernels.unchecked import unchecked

OPTIONS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LINEARS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture
def fused(monkeypatch):
    """Names of the fused operations, as they are called."""
    called, ops = [], unchecked("triton")
    for name in ("fused_linear", "decode_attention"):
        function = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, name=name, function=function: called.append(name) or function(*args))
    return called


@pytest.fixture
def pair(tiny):
    patched = copy.deepcopy(tiny)
    llava15_fast.patch(patched, "triton", cuda_graph=False)
    return tiny, patched


def logits(model, ids, mask=None):
    options = OPTIONS | {"return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **options).logits)


def check(pair, ids, mask=None):
    expected, ours = (logits(model, ids, mask) for model in pair)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def prompt(pair, batch=1):
    return torch.arange(3, 3 + 9 * batch, device=pair[0].device).view(batch, 9)


def layers(model):
    return model.model.language_model.layers


def test_a_decode_step_is_fused(pair, fused):
    check(pair, prompt(pair))
    steps, n_layers = OPTIONS["max_new_tokens"] - 1, len(layers(pair[0]))
    assert fused.count("fused_linear") == 4 * n_layers * steps and fused.count("decode_attention") == n_layers * steps


@pytest.mark.parametrize(
    ("batch", "dtype"), [(1, torch.float16), (3, torch.float16), (16, torch.float16), (17, torch.float16), (3, torch.float32)]
)
def test_batches(pair, fused, batch, dtype):
    """Up to 16 rows in 16 bit; attention of one new token is fused for every batch."""
    ids, found = prompt(pair, batch), []
    mask = torch.ones(batch, ids.shape[1] + 2, dtype=torch.long, device=ids.device)
    mask[0, :4] = 0
    for model in pair:
        model.to(dtype)
        with torch.no_grad():
            cache = model(ids, attention_mask=mask[:, :-2], use_cache=True)[CACHE]
            for past in (1, 2):
                given = {"input_ids": ids[:, past : past + 1], "attention_mask": mask[:, : ids.shape[1] + past]}
                outputs = model(**given, **as_argument(cache))
        found.append(outputs.logits.float())
    error = (found[0] - found[1]).norm() / found[0].norm()
    assert error < (1e-5 if dtype == torch.float32 else 5e-3)
    assert ("fused_linear" in fused) is (batch <= 16 and dtype == torch.float16) and "decode_attention" in fused


def test_biases(pair, fused):
    for model in pair:
        torch.manual_seed(5)
        for layer in layers(model):
            attention = layer.self_attn
            for linear in (attention.q_proj, attention.k_proj, attention.o_proj):  # not of v
                linear.bias = nn.Parameter(torch.randn(linear.out_features, device=model.device))
    check(pair, prompt(pair))
    assert "fused_linear" in fused


def test_weights_that_change_and_weights_in_other_places(pair, fused):
    check(pair, prompt(pair))
    for model in pair:
        for layer in layers(model):
            layer.mlp.up_proj.weight.data.mul_(0.5)
            layer.self_attn.k_proj.weight = nn.Parameter(layer.self_attn.k_proj.weight.detach().t().contiguous().t() * 2)
    check(pair, prompt(pair))
    assert "fused_linear" in fused


@pytest.mark.parametrize("name", ["forward", "__call__"])
def test_a_replaced_linear_class_is_obeyed(pair, fused, monkeypatch, name):
    check(pair, prompt(pair))
    assert fused
    fused.clear()
    function = getattr(nn.Linear, name)
    monkeypatch.setattr(nn.Linear, name, lambda self, *args, **kwargs: 0.5 * function(self, *args, **kwargs).flip(-1))
    check(pair, prompt(pair))
    assert "fused_linear" not in fused
    monkeypatch.undo()


def test_a_replaced_function_is_obeyed(pair, fused, monkeypatch):
    function = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args, **kwargs: function(*args, **kwargs) * 0.5)
    check(pair, prompt(pair))
    assert not fused


CHANGES = ("pre-hook", "forward", "subclass", "parametrization", "another module")


@pytest.mark.parametrize(("what", "path"), [*(("hook", path) for path in LINEARS), *((what, LINEARS[3]) for what in CHANGES)])
def test_a_changed_linear_layer_is_obeyed(pair, fused, what, path):
    for model in pair:
        parent, name = layers(model)[-1].get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        linear = getattr(parent, name)
        if what == "hook":
            linear.register_forward_hook(lambda module, args, output: output * 0.5)
        elif what == "pre-hook":
            linear.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
        elif what == "forward":
            linear.forward = lambda x, forward=linear.forward: forward(x) * 0.5
        elif what == "subclass":
            linear.__class__ = type("Own", (nn.Linear,), {"forward": lambda self, x: nn.Linear.forward(self, x) * 0.5})
        elif what == "parametrization":
            torch.manual_seed(3)
            parametrizations.weight_norm(linear)
            linear.parametrizations.weight.original0.data.mul_(0.5)
        else:
            setattr(parent, name, nn.Sequential(linear, nn.Tanh()))
    check(pair, prompt(pair))
    assert "fused_linear" not in fused
