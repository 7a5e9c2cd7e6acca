"""Weights that share their memory with somebody: `patch` neither cuts that, nor goes on with what was there before."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import llava15_fast

CHECKPOINT = Path(__file__).parents[1] / "golden/tiny_hub"
GREEDY = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def loaded():
    return llava15_fast.LlavaOnevision1_5ForConditionalGeneration.from_pretrained(CHECKPOINT).eval()


@pytest.fixture
def tiny(loaded, device):
    """Not read from the disk for every test."""
    return copy.deepcopy(loaded).to(device)


def outputs(model, prompt):
    with torch.no_grad():
        logits = model(**prompt).logits
    answer = model.generate(**prompt, **GREEDY, return_dict_in_generate=True, output_logits=True)
    return logits, torch.stack(answer.logits, 1), answer.sequences


def assert_same(found, expected):
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert torch.equal(found[2], expected[2])


def places(model):
    """Where every weight and buffer lies, as an object and in memory."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        name: (id(tensor), tensor.data_ptr(), tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.stride())
        for name, tensor in named
    }


def scale(tensors):
    with torch.no_grad():
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.mul_(0.9)


def in_shared_memory(model):
    model.share_memory()
    assert all(parameter.is_shared() for parameter in model.parameters())
    return list(model.parameters())


def of_another_model(model):
    """As a policy has its trainer's weights."""
    other = copy.deepcopy(model)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = theirs.data
    return list(other.parameters())


def assigned(model):
    other = copy.deepcopy(model)
    model.load_state_dict(other.state_dict(), assign=True)
    return list(other.parameters())


def the_same_parameters(model):
    """Not only the same memory: those of another model itself."""
    other = copy.deepcopy(model)
    for path, module in model.named_modules():
        for name in module._parameters:
            module._parameters[name] = other.get_submodule(path)._parameters[name]
    return list(other.parameters())


def flat(model, order=None, gap=0):
    """As optimizers, DDP and FSDP lay parameters out."""
    parameters = list(model.parameters())
    parameters = parameters if order is None else order(parameters)
    buffer = torch.zeros(sum(parameter.numel() + gap for parameter in parameters), device=parameters[0].device)
    offset = 0
    for parameter in parameters:
        piece = buffer[offset : offset + parameter.numel()]
        piece.copy_(parameter.detach().flatten())
        parameter.data = piece.view_as(parameter)
        offset += parameter.numel() + gap
    return [buffer]


def transposed(model):
    """Weights that lie with their columns one behind the other."""
    kept = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            kept.append(module.weight.data.t().contiguous())
            module.weight.data = kept[-1].t()
    return kept


def of_numpy(model):
    kept = []
    for parameter in model.parameters():
        kept.append(parameter.detach().cpu().numpy().copy())
        parameter.data = torch.from_numpy(kept[-1])
    return [torch.from_numpy(array) for array in kept]


# Each gives the memory, through which somebody else changes the weights later.
WAYS = {
    "share_memory": in_shared_memory,
    "data": of_another_model,
    "load_state_dict(assign=True)": assigned,
    "parameters of another model": the_same_parameters,
    "flat": flat,
    "flat, backwards and with gaps": lambda model: flat(model, lambda parameters: parameters[::-1], gap=3),
    "transposed": transposed,
    "state dict": lambda model: [*model.state_dict().values()],
}
if not torch.cuda.is_available():
    WAYS["numpy"] = of_numpy


@pytest.mark.parametrize("when", ["before patch", "after patch"])
@pytest.mark.parametrize("way", WAYS)
def test_aliased_weights_written_by_others(tiny, prompt, way, when):
    # Both copies: matrix products are the same to the bit only where weights are aligned alike.
    plain, patched = copy.deepcopy(tiny), copy.deepcopy(tiny)
    if when == "after patch":
        llava15_fast.patch(patched, "torch")
        outputs(patched, prompt)
    memory = [WAYS[way](model) for model in (plain, patched)]
    before = places(patched)

    llava15_fast.patch(patched, "torch")
    first = outputs(patched, prompt)
    assert_same(first, outputs(plain, prompt))
    for tensors in memory:
        scale(tensors)
    second = outputs(patched, prompt)
    assert_same(second, outputs(plain, prompt))
    assert not torch.allclose(first[0], second[0], atol=1e-3)
    assert places(patched) == before
    llava15_fast.unpatch(patched)
    assert places(patched) == before
    for tensors in memory:
        scale(tensors)
    found, expected = outputs(patched, prompt), outputs(plain, prompt)
    assert all(map(torch.equal, found, expected))
    if way == "share_memory":
        assert all(parameter.is_shared() for parameter in patched.parameters())


def test_trainer_step(tiny, prompt, golden):
    """The policy is patched, and answers with the weights of the trainer, which is not, or is as well."""
    trainer, results = copy.deepcopy(tiny), []
    for patched in ((), (0,), (0, 1)):
        models = [copy.deepcopy(tiny), copy.deepcopy(trainer)]
        for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
            mine.data = theirs.data
        for index in patched:
            llava15_fast.patch(models[index], "torch")
        policy, learner = models
        outputs(policy, prompt)
        learner(**golden["one_image"][0]).loss.backward()
        torch.optim.SGD(learner.parameters(), lr=0.5).step()
        results.append(outputs(policy, prompt))
    for found in results[1:]:
        assert_same(found, results[0])
    assert not torch.allclose(results[0][0], outputs(tiny, prompt)[0], atol=1e-3)


def test_state_dict_taken_while_patched_is_writable_after_unpatch(tiny, prompt):
    plain, patched = copy.deepcopy(tiny), copy.deepcopy(tiny)
    scale(plain.state_dict().values())
    llava15_fast.patch(patched, "torch")
    state = patched.state_dict()
    outputs(patched, prompt)
    llava15_fast.unpatch(patched)
    scale(state.values())
    assert all(map(torch.equal, outputs(patched, prompt), outputs(plain, prompt)))


def test_model_interpolation(tiny, prompt):
    """`lerp_`, `copy_` and `swap_tensors` on a patched model, as averaging of weights does."""
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    average = torch.optim.swa_utils.AveragedModel(tiny)
    llava15_fast.patch(average.module, "torch")
    outputs(average.module, prompt)
    for model in (tiny, other):
        average.update_parameters(model)
    expected = copy.deepcopy(tiny)
    with torch.no_grad():
        for mine, theirs in zip(expected.parameters(), other.parameters(), strict=True):
            mine.lerp_(theirs, 0.5)
    assert_same(outputs(average.module, prompt), outputs(expected, prompt))
    with torch.no_grad():
        for mine, theirs in zip(average.module.parameters(), other.parameters(), strict=True):
            torch.utils.swap_tensors(mine, nn.Parameter(theirs.detach().clone()))
    assert_same(outputs(average.module, prompt), outputs(other, prompt))
