"""What other libraries save of a patched model is what they save of an unpatched one, tensor by tensor and byte by byte."""

import copy
import importlib
import json
import operator
import pickle
import pickletools
from pathlib import Path

import accelerate
import huggingface_hub
import pytest
import safetensors.torch as safetensors
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import llava15_fast

CHECKPOINT = Path(__file__).parents[1] / "golden/tiny_hub"
GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def loaded():
    return llava15_fast.LlavaOnevision1_5ForConditionalGeneration.from_pretrained(CHECKPOINT).eval()


@pytest.fixture
def tiny(loaded):
    """Not read from the disk for every test; on the CPU, where all of them put what they load."""
    return copy.deepcopy(loaded)


@pytest.fixture
def prompt(prompt):
    return {name: value.cpu() for name, value in prompt.items()}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def pair(tiny, prompt, request):
    """An unpatched model, and a patched one that has answered already."""
    if request.param:
        tiny.config.tie_word_embeddings = tiny.config.text_config.tie_word_embeddings = True
        tiny.tie_weights()
    patched = copy.deepcopy(tiny)
    llava15_fast.patch(patched, "torch")
    patched.generate(**prompt, **GREEDY)
    return tiny, patched


untied = pytest.mark.parametrize("pair", [False], ids=["untied"], indirect=True)


def zeroed(model):
    """A model of the same kind without its weights."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    return twin


def assert_same_weights(found, expected):
    found, expected = (model if isinstance(model, dict) else model.state_dict() for model in (found, expected))
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def files(folder):
    """Contents by name. A header of safetensors lists its metadata in no particular order."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    for name, content in found.items():
        if name.endswith(".safetensors"):
            end = 8 + int.from_bytes(content[:8], "little")
            found[name] = json.loads(content[8:end]), content[end:]
    return found


def accelerator():
    return accelerate.Accelerator(cpu=True)


def save_state_dict_of_hub(model, folder):
    huggingface_hub.save_torch_state_dict(model.state_dict(), folder, shared_tensors_to_discard=["lm_head.weight"])


# Each writes into a folder.
SAVERS = {
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "save_pretrained, sharded": lambda model, folder: model.save_pretrained(folder, max_shard_size="200KB"),
    "safetensors.save_file": lambda model, folder: safetensors.save_file(model.state_dict(), folder / "model.safetensors"),
    "safetensors.save_model": lambda model, folder: safetensors.save_model(model, str(folder / "model.safetensors")),
    "huggingface_hub.save_torch_model": huggingface_hub.save_torch_model,
    "huggingface_hub.save_torch_model, sharded": lambda model, folder: huggingface_hub.save_torch_model(
        model, folder, max_shard_size="200KB"
    ),
    "huggingface_hub.save_torch_state_dict": save_state_dict_of_hub,
    "accelerate.save_model": lambda model, folder: accelerator().save_model(model, folder),
    "accelerate.save_model, sharded": lambda model, folder: accelerator().save_model(model, folder, max_shard_size="200KB"),
    "torch.save of the state dict": lambda model, folder: torch.save(model.state_dict(), folder / "model.pt"),
}


@pytest.mark.parametrize("saver", SAVERS)
def test_saved_files_are_identical(pair, tmp_path, saver):
    written = []
    for name, model in zip(("plain", "patched"), pair, strict=True):
        folder = tmp_path / name
        folder.mkdir()
        try:
            SAVERS[saver](model, folder)
        except RuntimeError as error:  # safetensors refuses weights that are one
            written.append(str(error))
        else:
            written.append(files(folder))
    plain, patched = written
    assert plain and plain == patched
    if "sharded" in saver:
        assert sum(name.endswith(".safetensors") for name in plain) > 3


def test_the_configuration_names_the_published_class(pair, tmp_path):
    pair[1].save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlavaOnevision1_5ForConditionalGeneration"]
    assert type(pair[1].config).__name__ == type(pair[0].config).__name__


def test_one_parameter_makes_a_small_file(pair, tmp_path):
    weight = pair[1].model.language_model.layers[1].self_attn.k_proj.weight
    torch.save(weight, tmp_path / "weight.pt")
    assert (tmp_path / "weight.pt").stat().st_size < weight.nbytes + 2048
    assert len(pickle.dumps(weight)) < weight.nbytes + 2048
    assert torch.equal(torch.load(tmp_path / "weight.pt"), weight)


def through_save_pretrained(model, folder, fresh):
    model.save_pretrained(folder, max_shard_size="200KB")
    return type(fresh).from_pretrained(folder)


def through_torch_save(model, folder, fresh):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


def through_state_dict(model, folder, fresh):
    torch.save(model.state_dict(), folder / "state.pt")
    fresh.load_state_dict(torch.load(folder / "state.pt"))
    return fresh


def through_safetensors(model, folder, fresh):
    safetensors.save_model(model, str(folder / "model.safetensors"))
    assert safetensors.load_model(fresh, folder / "model.safetensors") == (set(), [])
    return fresh


def through_hub(model, folder, fresh):
    huggingface_hub.save_torch_model(model, folder, max_shard_size="200KB")
    huggingface_hub.load_torch_model(fresh, folder)
    return fresh


def through_accelerate_model(model, folder, fresh):
    accelerator().save_model(model, folder, max_shard_size="600KB")
    accelerate.load_checkpoint_in_model(fresh, str(folder))
    return fresh


def through_accelerate_state(model, folder, fresh):
    """The weights of a training, with its optimizer."""
    saver = accelerator()
    saver.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    saver.save_state(folder)
    loader = accelerator()
    fresh, _ = loader.prepare(fresh, torch.optim.SGD(fresh.parameters(), lr=0.1))
    loader.load_state(folder)
    saver.free_memory()
    return fresh


def through_distributed_checkpoint(model, folder, fresh):
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder, no_dist=True)
    dcp.load(state := {"model": fresh.state_dict()}, checkpoint_id=folder, no_dist=True)
    fresh.load_state_dict(state["model"])
    return fresh


def through_distributed_state_dict(model, folder, fresh):
    """By torch's own names of parameters."""
    state = get_model_state_dict(model)
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    loaded = get_model_state_dict(fresh)
    dcp.load(loaded, checkpoint_id=folder, no_dist=True)
    set_model_state_dict(fresh, loaded)
    return fresh


THERE_AND_BACK = {
    "save_pretrained": through_save_pretrained,
    "torch.save": through_torch_save,
    "state dict": through_state_dict,
    "safetensors": through_safetensors,
    "huggingface_hub": through_hub,
    "accelerate, the model": through_accelerate_model,
    "accelerate, the state": through_accelerate_state,
    "distributed checkpoint": through_distributed_checkpoint,
    "distributed state dict": through_distributed_state_dict,
}


@untied
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("way", THERE_AND_BACK)
def test_saved_models_reload(pair, prompt, tmp_path, way):
    """Into another patched model, or one that the way makes."""
    plain, patched = pair
    expected = plain.generate(**prompt, **GREEDY)
    loaded = THERE_AND_BACK[way](patched, tmp_path, zeroed(patched))
    assert_same_weights(loaded, plain)
    assert torch.equal(loaded.eval().generate(**prompt, **GREEDY), expected)


@untied
def test_weights_changed_after_saving_are_restored(pair, tmp_path):
    """Into the very model that was saved."""
    plain, patched = pair
    trainer = accelerator()
    trainer.prepare(patched)
    trainer.save_state(tmp_path)
    with torch.no_grad():
        for parameter in patched.parameters():
            parameter.add_(1.0)
    trainer.load_state(tmp_path)
    assert_same_weights(patched, plain)
    trainer.free_memory()


@untied
def test_pickle_is_importable_elsewhere(pair):
    found = pickletools.genops(pickle.dumps(pair[1], protocol=2, fix_imports=False))
    names = {argument for opcode, argument, _ in found if opcode.name == "GLOBAL"}
    assert "llava15_fast.fast.generate FastForConditionalGeneration" in names
    for name in names:
        module, attribute = name.split(" ", 1)
        assert operator.attrgetter(attribute)(importlib.import_module(module))
