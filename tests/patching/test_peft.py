"""LoRA on what is patched: added before or after, switched off and on, merged, unloaded; and quantised linears.

Skipped without peft; the quantised part without torchao.
"""

import contextlib
import copy

import pytest
import torch
from torch import nn

import llava15_fast
from llava15_fast.fast.guards import is_plain

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "gate_proj", "o_proj", "down_proj", "lm_head", "attn.qkv"]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def with_lora(model, targets=TARGETS, name="default", seed=1, saved=None):
    """`model` with adapters that change the answer: both factors random, where peft begins with one at zero."""
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False, modules_to_save=saved)
    torch.manual_seed(seed)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
        return model
    return peft.get_peft_model(model, config, adapter_name=name).eval()


def answers(model, prompt):
    """Logits of a prompt, and of what follows it greedily: the decode steps are compared too, not only their ids."""
    with torch.no_grad():
        first = model(**prompt).logits
    out = model.generate(**prompt, **GREEDY, return_dict_in_generate=True, output_logits=True)
    return first, torch.stack(out.logits, 1), out.sequences


def assert_equal(found, expected):
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert torch.equal(found[2], expected[2])


STEPS = {
    "adapter": lambda model: None,
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "enabled": lambda model: model.base_model.enable_adapter_layers(),
    "second": lambda model: (with_lora(model, name="second", seed=2), model.set_adapter("second")),
    "back": lambda model: model.set_adapter("default"),
    "merged": lambda model: model.merge_adapter(),
    "unmerged": lambda model: model.unmerge_adapter(),
    "safely merged": lambda model: model.merge_adapter(safe_merge=True),
    "unmerged again": lambda model: model.unmerge_adapter(),
}


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "patch_first"), [("torch", False), ("torch", True), ("triton", False)])
def test_adapters_switched_between_generates(tiny, prompt, patch_first, backend):
    plain = with_lora(copy.deepcopy(tiny))
    if patch_first:
        handle = llava15_fast.patch(tiny, backend)
        answers(tiny, prompt)
    model = with_lora(tiny)
    if not patch_first:
        handle = llava15_fast.patch(model, backend)
    seen = []
    # The interpreter is slow: no merging there, which changes weights and nothing of what runs.
    for step, change in [*STEPS.items()][: 2 if backend == "triton" else None]:
        change(plain)
        change(model)
        expected = answers(plain, prompt)
        assert_equal(answers(model, prompt), expected)
        seen.append(expected[0])
        assert not any(row.fallbacks for row in handle.report().rows), step
    # The steps are not all the same answer: an adapter that nobody runs would pass the comparison above.
    assert all((seen[0] - other).abs().max() > 0.1 for other in seen[1:4:2])
    llava15_fast.unpatch(model)
    assert_equal(answers(model, prompt), answers(plain, prompt))


# What is trained -> the parts of the model whose original runs then.
WRAPPED = {
    "patch_embed.proj": ({"targets": ["patch_embed.proj"]}, {"visual.embed_patches"}),
    "merger": ({"saved": ["merger"]}, {"visual.merge_patches"}),
    "norm": ({"saved": ["norm"]}, {"visual.embed_patches", "language_model"}),  # peft asks for the end of a name
    "q_norm": ({"saved": ["q_norm"]}, {"language_model"}),
    "mlp": ({"saved": ["mlp"]}, {"visual.encode", "language_model"}),
    "self_attn": ({"saved": ["self_attn"], "targets": ["down_proj"]}, {"language_model"}),
    "a layer": ({"saved": ["layers.1"], "targets": ["attn.qkv"]}, {"language_model"}),
    "a block": ({"saved": ["blocks.0"], "targets": ["q_proj"]}, {"visual.encode"}),
}


@pytest.mark.parametrize("patch_first", [False, True])
@pytest.mark.parametrize("what", WRAPPED)
def test_wrapper_around_a_bypassed_module(tiny, prompt, what, patch_first):
    """A LoRA convolution, a projector that is trained as a whole: that part runs as it is, the others keep the kernels."""
    options, expected_fallbacks = WRAPPED[what]
    plain = with_lora(copy.deepcopy(tiny), **options)
    if patch_first:
        handle = llava15_fast.patch(tiny, "torch")
        answers(tiny, prompt)
    model = with_lora(tiny, **options)
    if not patch_first:
        handle = llava15_fast.patch(model, "torch")
    with torch.no_grad():
        for (name, theirs), ours in zip(plain.named_parameters(), model.parameters(), strict=True):
            if "modules_to_save" in name:
                ours.add_(0.1 * torch.randn_like(ours))
                theirs.copy_(ours)
    for context in (lambda model: contextlib.nullcontext(), lambda model: model.disable_adapter()):
        with context(plain), context(model):
            assert_equal(answers(model, prompt), answers(plain, prompt))
    assert {row.path for row in handle.report().rows if row.fallbacks} == expected_fallbacks
    assert llava15_fast.verify(model, prompt, max_new_tokens=2, backend="torch").ok
    llava15_fast.unpatch(model)
    assert not any(name.startswith("_llava15") for module in model.modules() for name in module.__dict__)
    assert_equal(answers(model, prompt), answers(plain, prompt))
    assert_equal(answers(model.merge_and_unload(), prompt), answers(plain.merge_and_unload(), prompt))


def test_fully_trained_vision_tower(tiny, prompt):
    """A copy of a patched module runs the kernels on its own weights; an unpatched one is refused, and named."""
    plain = with_lora(copy.deepcopy(tiny), ["q_proj"], saved=["visual"])
    with pytest.raises(llava15_fast.PatchError, match="visual is a ModulesToSaveWrapper"):
        llava15_fast.patch(plain, "torch")
    handle = llava15_fast.patch(tiny, "torch")
    model = with_lora(tiny, ["q_proj"], saved=["visual"])
    assert_equal(answers(model, prompt), answers(plain, prompt))
    rows = {row.path: row for row in handle.report().rows}
    assert all(rows[f"visual.{name}"].ran for name in ("embed_patches", "encode", "merge_patches"))


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("end", ["merge_and_unload", "unload"])
@pytest.mark.parametrize("patch_first", [False, True])
def test_adapters_removed(tiny, prompt, patch_first, end, safe_merge):
    options = {"safe_merge": safe_merge} if end == "merge_and_unload" else {}
    before = answers(tiny, prompt)
    plain = getattr(with_lora(copy.deepcopy(tiny)), end)(**options)
    if patch_first:
        handle = llava15_fast.patch(tiny, "torch")
    model = with_lora(tiny)
    if not patch_first:
        handle = llava15_fast.patch(model, "torch")
    answers(model, prompt)
    model = getattr(model, end)(**options)
    expected = answers(plain, prompt)
    assert_equal(answers(model, prompt), expected)
    assert ((expected[0] - before[0]).abs().max() > 0.1) == (end == "merge_and_unload")
    assert not any(row.fallbacks for row in handle.report().rows)


@pytest.mark.parametrize("patch_first", [False, True])
def test_training_an_adapter_on_a_patched_model(tiny, golden, prompt, patch_first):
    inputs = golden["one_image"][0]
    plain = with_lora(copy.deepcopy(tiny))
    if patch_first:
        llava15_fast.patch(tiny, "torch")
    model = with_lora(tiny)
    if not patch_first:
        llava15_fast.patch(model, "torch")
    for trained in (plain, model):
        trained.train()
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            trained(**inputs).loss.backward()
            optimizer.step()
        trained.eval()
    pairs = list(zip(plain.named_parameters(), model.named_parameters(), strict=True))
    assert sum(p.grad is not None for (_, p), _ in pairs) == 2 * sum("lora_A" in name for (name, _), _ in pairs) > 0
    for (name, theirs), (own_name, ours) in pairs:
        assert name == own_name and torch.equal(ours, theirs), name
        assert (ours.grad is None and theirs.grad is None) or torch.equal(ours.grad, theirs.grad), name
    assert_equal(answers(model, prompt), answers(plain, prompt))


@pytest.mark.parametrize("patch_first", [False, True])
def test_int8_weight_only_linears(tiny, prompt, patch_first):
    """torchao's linears are `nn.Linear` with a weight of another class: left alone, everything around them still patched."""
    quantization = pytest.importorskip("torchao.quantization")

    def quantize(model):
        quantization.quantize_(model.model.language_model, quantization.Int8WeightOnlyConfig())

    unquantised = answers(tiny, prompt)
    plain = copy.deepcopy(tiny)
    quantize(plain)
    if patch_first:
        handle = llava15_fast.patch(tiny, "torch")
        answers(tiny, prompt)
    quantize(tiny)
    if not patch_first:
        handle = llava15_fast.patch(tiny, "torch")
    linears = [m for m in tiny.model.language_model.modules() if isinstance(m, nn.Linear)]
    weights = [type(linear.weight) for linear in linears]
    expected = answers(plain, prompt)
    assert_equal(answers(tiny, prompt), expected)
    assert [type(linear.weight) for linear in linears] == weights and nn.Parameter not in weights
    assert not any(is_plain(linear) for linear in linears)
    assert not any(row.fallbacks for row in handle.report().rows)
    assert (expected[0] - unquantised[0]).abs().max() > 1e-3  # it is quantised


def two_adapters(model):
    return with_lora(with_lora(model), name="second", seed=2)


@pytest.mark.parametrize("names", [["default", "second"], ["__base__", "second"], ["second", "default"]])
def test_an_adapter_for_each_prompt(tiny, prompts, names):
    """PEFT deals out the prompts of a batch: linear layers have to see which row is whose, padding included."""
    prompt = prompts["text_batch_left_pad"]
    plain, model = two_adapters(copy.deepcopy(tiny)), two_adapters(tiny)
    handle = llava15_fast.patch(model, "torch")
    for inputs, chosen in ((prompt, names), ({key: value[1:] for key, value in prompt.items()}, names[1:])):
        expected = plain.generate(**inputs, **GREEDY, adapter_names=chosen)
        assert torch.equal(model.generate(**inputs, **GREEDY, adapter_names=chosen), expected)
        assert chosen == ["default"] or not torch.equal(model.generate(**inputs, **GREEDY), expected)
    assert any("needs the padding" in reason for row in handle.report().rows for reason in row.fallbacks)


def test_adapter_activated_at_a_token(tiny, prompts):
    """Activated LoRA: what stands before its token is left alone."""
    prompt = prompts["text"]
    tokens = prompt["input_ids"][0, 4:6].tolist()
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False, alora_invocation_tokens=tokens
    )
    models = []
    for model in (copy.deepcopy(tiny), tiny):
        torch.manual_seed(1)
        models.append(peft.get_peft_model(model, config).eval())
    llava15_fast.patch(models[1], "torch")
    expected, found = (model.generate(**prompt, **GREEDY) for model in models)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=4, num_layers=3, token_dim=48, num_attention_heads=6
        ),
        peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=4, num_layers=3, token_dim=48, num_attention_heads=6
        ),
    ],
    ids=["prompt", "prefix", "p-tuning"],
)  # fmt: skip
@pytest.mark.parametrize("case", ["text", "text_batch_left_pad"])
def test_prompt_tuning(tiny, prompts, case, config, first):
    """PEFT prepares every step itself."""
    prompt = prompts[case]
    models = []
    for model in (copy.deepcopy(tiny), tiny):
        if model is tiny and first:
            llava15_fast.patch(model, "torch")
        torch.manual_seed(0)
        model = peft.get_peft_model(model, copy.deepcopy(config)).eval()
        with torch.no_grad():
            for parameter in model.prompt_encoder.parameters():
                parameter.normal_()
        models.append(model)
    if not first:
        llava15_fast.patch(models[1], "torch")
    expected, found = (model.generate(**prompt, **GREEDY) for model in models)
    assert torch.equal(found, expected)
