"""The model against the original implementation's numbers and against independent oracles inside transformers."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    GenerationConfig,
    MLCDVisionConfig,
    MLCDVisionModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.generation import ContinuousBatchingConfig
from transformers.models.auto import modeling_auto

import llava15_fast
from llava15_fast import LlavaOnevision1_5Config, LlavaOnevision1_5ForConditionalGeneration
from llava15_fast.model.releases import CACHE, KEEPS_TOWERS

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = GOLDEN / "tiny_hub"
CASES = list(json.loads((GOLDEN / "golden.json").read_text())["cases"])
VISION_CASES = [case for case in CASES if case.startswith("vision")]
PROMPT_CASES = [case for case in CASES if case not in VISION_CASES]
MODES = [None, "torch", "triton"]
KERNELS = {
    "_flash_attn_kernel",
    "_gelu_kernel",
    "_layer_norm_kernel",
    "_patch_merge_kernel",
    "_qk_norm_rope_kernel",
    "_rms_norm_kernel",
    "_silu_and_mul_kernel",
    "_vision_rope_kernel",
}


@pytest.fixture(params=MODES, ids=["unpatched", "torch", "triton"])
def model(request, tiny):
    if request.param is not None:
        llava15_fast.patch(tiny, request.param)
    return tiny


def largest(ours, expected, mask=None):
    difference = (ours - expected).abs()
    return (difference if mask is None else difference[mask]).max().item()


@pytest.mark.parametrize("case", VISION_CASES)
def test_vision_tower_gives_the_originals_numbers(model, golden, case):
    inputs, expected, _ = golden[case]
    with torch.no_grad():
        output = model.model.visual(inputs["pixel_values"], grid_thw=inputs["grid_thw"], output_hidden_states=True)
    assert largest(output.pooler_output, expected["merged"]) < 1e-4
    assert largest(output.last_hidden_state, expected["pre_merger"]) < 1e-4
    if "pre_layernorm_out" in expected:
        stages = ["pre_layernorm_out", *(f"block_{i}_out" for i in range(3))]
        for ours, stage in zip(output.hidden_states, stages, strict=True):
            assert largest(ours, expected[stage]) < 1e-4, stage


@torch.no_grad()
def test_the_vision_towers_attention_weights(model, golden):
    """One tensor per layer, or one per segment."""
    model.set_attn_implementation("eager")
    for case in ("vision_1x4x6", "vision_three_images"):
        inputs, _, _ = golden[case]
        found = model.model.visual(**inputs, output_attentions=True).attentions
        lengths = [t * h * w + 1 for t, h, w in inputs["grid_thw"].tolist()]
        assert len(found) == model.config.vision_config.depth
        for weights in found:
            weights = [weights] if len(lengths) == 1 else weights
            assert [tuple(one.shape) for one in weights] == [(1, 4, length, length) for length in lengths]
            assert all(largest(one.sum(-1), torch.ones(())) < 1e-5 for one in weights)


@pytest.mark.parametrize("case", ["vision_1x4x6", "vision_two_images", "vision_video_3x4x4", "vision_three_images"])
def test_rotary_tables_and_segments_are_the_originals(tiny, golden, case):
    from llava15_fast.model.modeling import VisionLayout

    inputs, expected, _ = golden[case]
    visual = tiny.model.visual
    layout = VisionLayout.from_grids(inputs["grid_thw"].tolist(), 2, inputs["pixel_values"].device)
    cos, sin = visual.rotary_pos_emb(layout.position_ids, visual.class_pos_emb)
    assert torch.equal(layout.cu_seqlens, expected["cu_seqlens"])
    assert largest(cos, expected["rope_cos"]) < 1e-6 and largest(sin, expected["rope_sin"]) < 1e-6


@pytest.mark.parametrize("case", PROMPT_CASES)
def test_prompts_give_the_originals_numbers(model, golden, case):
    inputs, expected, _ = golden[case]
    # What a padding row computes is nobody's business: transformers' own implementations differ there.
    tokens = inputs["attention_mask"].bool()
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
        # Where a layer's output or a loss is asked for, the original may run.
        plain = model(**{**inputs, "labels": None})
    assert largest(plain.logits, expected["logits"], tokens) < 1e-4
    assert largest(output.logits, expected["logits"], tokens) < 1e-4
    assert abs(output.loss - expected["loss"]) < 1e-4
    for i, hidden_states in enumerate(output.hidden_states):
        assert largest(hidden_states, expected[f"hidden_states_{i}"], tokens) < 1e-4, f"hidden_states_{i}"


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("mode", [None, "torch"])
@torch.no_grad()
def test_cache_by_either_name(tiny, mode, name):
    """transformers renamed it; with every release both are understood, by the text model too."""
    ids = torch.arange(5, 15, device=tiny.device)[None]
    expected = tiny(input_ids=ids).logits[:, 6:]
    if mode is not None:
        llava15_fast.patch(tiny, mode)
    for model, hidden in ((tiny, False), (tiny.model.language_model, True)):
        if hidden and name != CACHE:
            continue  # the text model is transformers', which warns
        cache = DynamicCache()
        model(input_ids=ids[:, :6], **{name: cache})
        assert cache.get_seq_length() == 6
        output = model(input_ids=ids[:, 6:], **{name: cache})
        logits = tiny.lm_head(output.last_hidden_state) if hidden else output.logits
        assert largest(logits, expected) < 1e-5 and getattr(output, CACHE) is cache and cache.get_seq_length() == 10


@torch.no_grad()
def towers(model, inputs):
    """`mm_encoder_outputs` of the inputs' pixels, and the inputs without them."""
    rest, outputs = dict(inputs), {}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if name in rest:
            outputs[kind] = model.get_image_features(rest.pop(name), rest.pop(f"{kind}_grid_thw"))
    return outputs, rest


@pytest.mark.parametrize("mode", [None, "torch"])
@pytest.mark.parametrize("case", ["two_images", "video", "batch_left_pad"])
def test_mm_encoder_outputs_replace_pixels(tiny, golden, case, mode, prompts):
    inputs = prompts[case]
    if mode is not None:
        llava15_fast.patch(tiny, mode)
    outputs, rest = towers(tiny, inputs)
    with torch.no_grad():
        expected, found = tiny(**inputs), tiny(**rest, mm_encoder_outputs=outputs)
    assert torch.equal(found.logits, expected.logits)
    if KEEPS_TOWERS:
        for kind, output in outputs.items():
            assert found[f"{kind}_outputs"] is output and torch.is_tensor(expected[f"{kind}_outputs"].last_hidden_state)
    (kind,) = outputs
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for options in (greedy, {**greedy, "num_beams": 2}):
        expected = tiny.generate(**inputs, **options)
        assert torch.equal(tiny.generate(**rest, mm_encoder_outputs=outputs, **options), expected)
    assert len(outputs[kind].pooler_output) == len(golden[case][0][f"{kind}_grid_thw"])  # as it was
    with pytest.raises(ValueError, match="passed as pixels and in mm_encoder_outputs"):
        tiny(**inputs, mm_encoder_outputs=outputs)
    outputs[kind].pooler_output = outputs[kind].pooler_output[:-1] or [outputs[kind].last_hidden_state[:1]]
    with pytest.raises(ValueError, match=f"{kind} placeholder tokens"):
        tiny(**rest, mm_encoder_outputs=outputs)


@pytest.mark.parametrize("mode", [None, "torch"])
@pytest.mark.parametrize("chunk", [1, 5, 8])
@pytest.mark.parametrize("case", ["two_images", "video", "batch_left_pad"])
def test_chunked_prefill_with_images(tiny, prompts, case, chunk, mode):
    inputs = prompts[case]
    if mode is not None:
        llava15_fast.patch(tiny, mode)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if not KEEPS_TOWERS:
        with pytest.raises(ValueError, match="placeholder tokens"):
            tiny.generate(**inputs, **options, prefill_chunk_size=chunk)
        return
    expected = tiny.generate(**inputs, **options)
    for beams in ({}, {"num_beams": 2}):
        expected = tiny.generate(**inputs, **options, **beams)
        assert torch.equal(tiny.generate(**inputs, **options, **beams, prefill_chunk_size=chunk), expected)


def test_beams_encode_an_image_once(tiny, prompts, monkeypatch):
    inputs, seen, forward = prompts["two_images"], [], tiny.model.visual.forward
    monkeypatch.setattr(
        tiny.model.visual, "forward", lambda pixels, *a, **k: seen.append(len(pixels)) or forward(pixels, *a, **k)
    )
    tiny.generate(**inputs, max_new_tokens=2, num_beams=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert seen == [len(inputs["pixel_values"])]


@pytest.mark.parametrize(
    ("case", "mode"),
    [
        (case, mode)
        for case in PROMPT_CASES
        for mode in MODES
        if case != "batch_right_pad" and not (mode == "triton" and case.endswith("alone"))  # these are rows of the batches
    ],
)
def test_greedy_ids_are_the_originals(tiny, golden, prompts, case, mode):
    if mode is not None:
        llava15_fast.patch(tiny, mode)
    # The interpreter is slow, and one decode step as the next.
    tokens = 12 if mode != "triton" else 4
    inputs, expected = prompts[case], golden[case][1]
    output = tiny.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(output[:, inputs["input_ids"].shape[1] :], expected["greedy_ids"][:, :tokens])


@pytest.mark.parametrize("case", ["one_image", "video", "batch_left_pad"])
def test_every_kernel_of_a_prompt_is_launched(tiny, golden, launches, case):
    llava15_fast.patch(tiny, "triton")
    inputs, _, _ = golden[case]
    with torch.no_grad():
        tiny(**{**inputs, "labels": None}, logits_to_keep=1)
    assert set(launches) == KERNELS


@pytest.mark.parametrize("case", PROMPT_CASES)
def test_every_gradient_norm_is_the_originals(tiny, golden, case):
    inputs, _, description = golden[case]
    tiny(**inputs).loss.backward()
    parameters = dict(tiny.named_parameters())
    norms = description["out"]["grad_norms"]
    assert len(norms) == len(parameters)
    for published, expected in norms.items():
        name = published if published == "lm_head.weight" else live_name(published)
        gradient = parameters[name].grad
        if expected is None:
            assert gradient is None or not gradient.any(), name
        else:
            assert abs(gradient.norm().item() - expected) <= 1e-3 * expected, name


def live_name(published):
    if published.startswith("visual"):
        return f"model.{published}"
    return published.replace("model.", "model.language_model.", 1)


@pytest.mark.parametrize("mode", [None, "torch"])
@pytest.mark.parametrize("case,kind", [("one_image", "image"), ("video", "video")])
def test_placeholders_without_pixels_are_an_error(tiny, golden, mode, case, kind):
    """In a prompt; behind a cache they are tokens like any other, for the model may have chosen them."""
    if mode is not None:
        llava15_fast.patch(tiny, mode)
    inputs = {name: golden[case][0][name] for name in ("input_ids", "attention_mask")}
    message = rf"\d+ {kind} placeholder tokens .* in the prompt, but no {kind} pixels were passed"
    for call in (tiny, tiny.model, lambda **inputs: tiny.generate(**inputs, max_new_tokens=2, pad_token_id=0)):
        with pytest.raises(ValueError, match=message):
            call(**inputs)
    prompt = torch.arange(5, 15, device=tiny.device)[None]
    placeholder = torch.full_like(prompt[:, :1], getattr(tiny.config, f"{kind}_token_id"))
    with torch.no_grad():
        output = tiny(input_ids=prompt, use_cache=True)
        tiny(input_ids=placeholder, **{CACHE: getattr(output, CACHE)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes most of a GPU's memory")
@pytest.mark.parametrize("mode", [None, "torch"])
def test_continuous_batching(tiny, golden, mode):
    """Texts are answered as `generate` answers them; there is no way for an image, so that its placeholders are refused."""
    if mode is not None:
        llava15_fast.patch(tiny, mode)
    ids = golden["text"][0]["input_ids"][0, -6:].tolist()
    prompts = [ids, ids[2:], ids[:1]]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = [tiny.generate(torch.tensor([one]), **options)[0, len(one) :].tolist() for one in prompts]
    limits = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    settings = {"generation_config": GenerationConfig(**options), "continuous_batching_config": limits}
    answers = tiny.generate_batch(inputs=prompts, **settings)
    assert [answer.generated_tokens for answer in answers.values()] == expected
    with pytest.raises(ValueError, match=r"1 image placeholder tokens .* but no image pixels were passed"):
        tiny.generate_batch(inputs=[ids, [*ids, tiny.config.image_token_id]], **settings)
    with pytest.raises(ValueError, match=r"1 video placeholder tokens .* but no video pixels were passed"):
        tiny.init_continuous_batching(**settings).add_request([*ids, tiny.config.video_token_id])


@pytest.mark.parametrize("mode", [None, "torch"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_sampled_placeholder_needs_no_pixels(tiny, golden, mode, use_cache):
    prompt = golden["text_batch_left_pad"][0]["input_ids"][-1:, -4:]
    if mode is not None:
        llava15_fast.patch(tiny, mode)
    bias = {"sequence_bias": [[[tiny.config.image_token_id], 1000.0]]}
    ids = tiny.generate(
        prompt, max_new_tokens=4, do_sample=False, use_cache=use_cache, eos_token_id=None, pad_token_id=0, **bias
    )
    assert ids[0, 4:].tolist() == [tiny.config.image_token_id] * 4


def test_image_features_as_a_tuple(tiny, golden):
    inputs, _, _ = golden["two_images"]
    grids = inputs["pixel_values"], inputs["image_grid_thw"]
    for model in (tiny, tiny.model):
        expected = model.get_image_features(*grids)
        patches, features = model.get_image_features(*grids, return_dict=False)
        assert torch.equal(patches, expected.last_hidden_state)
        assert all(map(torch.equal, features, expected.pooler_output))
    tiny.config.return_dict = tiny.model.config.return_dict = False
    assert isinstance(tiny(**inputs), tuple)


def test_attributes_other_libraries_read():
    name = LlavaOnevision1_5ForConditionalGeneration.__name__
    assert modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["llavaonevision1_5"] == name
    assert LlavaOnevision1_5ForConditionalGeneration._tp_plan == Qwen3ForCausalLM._tp_plan  # or a tied head is wrong
    list(AutoModelForImageTextToText._model_mapping.values())


@pytest.mark.parametrize("mode", [None, "torch"])
def test_reentrant_checkpointing_gives_the_same_gradients(tiny, golden, mode):
    inputs, _, _ = golden["two_images"]
    tiny.train()
    tiny(**inputs, use_cache=False).loss.backward()
    plain = {name: parameter.grad.clone() for name, parameter in tiny.named_parameters()}
    tiny.zero_grad()
    tiny.gradient_checkpointing_enable({"use_reentrant": True})
    tiny.enable_input_require_grads()
    if mode is not None:
        llava15_fast.patch(tiny, mode)
    tiny(**inputs, use_cache=False).loss.backward()
    for name, parameter in tiny.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], msg=name)


def test_gradient_checkpointing_gives_the_same_gradients(tiny, golden):
    inputs, _, _ = golden["two_images"]
    tiny.train()
    tiny(**inputs, use_cache=False).loss.backward()
    plain = {name: parameter.grad.clone() for name, parameter in tiny.named_parameters()}
    tiny.zero_grad()
    tiny.gradient_checkpointing_enable()
    tiny(**inputs, use_cache=False).loss.backward()
    for name, parameter in tiny.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], msg=name)


def test_live_names_are_the_originals(tiny):
    expected = json.loads((GOLDEN / "live_names.json").read_text())
    assert {name: list(parameter.shape) for name, parameter in tiny.named_parameters()} == expected


@pytest.mark.parametrize(
    ("case", "mode"),
    [
        *((case, mode) for case in ("one_image", "two_images", "video", "batch_left_pad") for mode in (None, "torch")),
        ("one_image", "triton"),  # the pixels are repeated before any kernel runs: it arrives there
    ],
)
def test_images_are_expanded_as_a_whole(tiny, golden, prompts, case, mode):
    """Several answers to a prompt that each take the best token are the greedy answer, several times."""
    inputs, expected = prompts[case], golden[case][1]
    if mode is not None:
        llava15_fast.patch(tiny, mode)
    options = {"max_new_tokens": 12 if mode != "triton" else 2, "eos_token_id": None, "pad_token_id": 0}
    times = 3 if mode != "triton" else 2
    output = tiny.generate(**inputs, **options, do_sample=True, top_k=1, num_return_sequences=times)
    wanted = expected["greedy_ids"][:, : options["max_new_tokens"]].repeat_interleave(times, dim=0)
    assert torch.equal(output[:, inputs["input_ids"].shape[1] :], wanted)


def test_beams_see_the_image(tiny, prompts):
    """A beam's score is the log-probability of its tokens about the real image."""
    inputs = prompts["two_images"]
    output = tiny.generate(
        **inputs, max_new_tokens=5, num_beams=3, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    ids = output.sequences
    vision = {key: inputs[key] for key in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        logprobs = tiny(input_ids=ids, **vision).logits.log_softmax(-1)
    start = inputs["input_ids"].shape[1]
    score = logprobs[0, start - 1 : -1].gather(-1, ids[0, start:, None]).sum()
    torch.testing.assert_close(output.sequences_scores[0], score, rtol=0, atol=1e-3)


def test_half_keeps_the_frequencies_exact(tiny):
    expected = tiny.model.visual.rotary_pos_emb.inv_freq.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tiny.to(dtype)
        assert torch.equal(tiny.model.visual.rotary_pos_emb.inv_freq, expected)


# Loading and saving


@pytest.mark.parametrize("auto", [LlavaOnevision1_5ForConditionalGeneration, AutoModelForImageTextToText, AutoModelForCausalLM])
def test_published_checkpoint_loads_and_saves_back(auto, tmp_path):
    model, info = auto.from_pretrained(
        TINY, torch_dtype="auto", device_map="auto", trust_remote_code=True, output_loading_info=True
    )
    assert type(model) is LlavaOnevision1_5ForConditionalGeneration
    assert not any(info.values())
    model.save_pretrained(tmp_path)
    assert_same_tensors(tmp_path / "model.safetensors")


def assert_same_tensors(path):
    saved, original = load_file(path), load_file(TINY / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)


def test_auto_map_does_not_bring_remote_code(tmp_path):
    config = json.loads((TINY / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_llavaonevision1_5.Llavaonevision1_5Config",
        "AutoModelForCausalLM": "modeling_llavaonevision1_5.LLaVAOneVision1_5_ForConditionalGeneration",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(TINY / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(model) is LlavaOnevision1_5ForConditionalGeneration


def test_sharded_checkpoint_with_an_index(tiny, tmp_path):
    tiny.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and (tmp_path / "model.safetensors.index.json").is_file()
    model, info = LlavaOnevision1_5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    reference = tiny.state_dict()
    assert all(torch.equal(value, reference[name].cpu()) for name, value in model.state_dict().items())


def test_save_and_reload_keeps_the_published_configuration(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    published = json.loads((TINY / "config.json").read_text())
    assert saved["model_type"] == published["model_type"] == "llavaonevision1_5"
    for part in ("text_config", "vision_config"):
        for key, value in published[part].items():
            assert saved[part][key] == value, (part, key)
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert reloaded.text_config.rope_parameters == tiny.config.text_config.rope_parameters
    assert reloaded.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()


def test_base_model_loads_and_saves_the_published_names(tmp_path):
    model, info = AutoModel.from_pretrained(TINY, output_loading_info=True)
    assert not info["missing_keys"] and info["unexpected_keys"] == {"lm_head.weight"}
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names == load_file(TINY / "model.safetensors").keys() - {"lm_head.weight"}


def test_checkpoint_in_the_upstream_ports_naming(tmp_path):
    tensors = {}
    for name, value in load_file(TINY / "model.safetensors").items():
        name = name if name == "lm_head.weight" else live_name(name)
        if name.endswith(("class_embedding", "class_pos_emb")):
            name, value = f"{name}.weight", value.reshape(1, -1)
        tensors[name] = value
    config = json.loads((TINY / "config.json").read_text())
    config["model_type"] = "llava_onevision1_5"
    config["text_config"]["model_type"] = "qwen3"
    config["vision_config"]["out_hidden_size"] = config["vision_config"].pop("text_hidden_size")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    for auto in (LlavaOnevision1_5ForConditionalGeneration, AutoModelForImageTextToText):
        model, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        model.save_pretrained(tmp_path / "saved")
        assert_same_tensors(tmp_path / "saved/model.safetensors")


def test_absent_tie_word_embeddings_means_not_tied():
    config = json.loads((TINY / "config.json").read_text())
    del config["tie_word_embeddings"]
    loaded = LlavaOnevision1_5Config.from_dict(config)
    assert loaded.tie_word_embeddings is False
    model = LlavaOnevision1_5ForConditionalGeneration(loaded)
    assert model.lm_head.weight is not model.model.language_model.embed_tokens.weight


@pytest.mark.parametrize(
    "file,content",
    [("missing", None), ("truncated", lambda data: data[: len(data) // 2]), ("garbage", lambda data: b"not a checkpoint")],
)
def test_missing_and_corrupt_weights_are_named(tmp_path, file, content):
    (tmp_path / "config.json").write_text((TINY / "config.json").read_text())
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content((TINY / "model.safetensors").read_bytes()))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


ABSURD = [
    ("text_config.layer_types", []), ("text_config.layer_types", ["full_attention"]), ("text_config.num_hidden_layers", 0),
    ("text_config.rope_parameters", {"rope_type": "default", "rope_theta": 0}), ("text_config", "x"), ("text_config", []),
    ("vision_config.patch_size", 0), ("vision_config.patch_size", [14, 14]), ("vision_config.rope_theta", 0),
    ("vision_config", [1]), ("image_token_id", -1), ("video_token_id", "x"), ("id2label", []), ("quantization_config", ["x"]),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), ABSURD, ids=[f"{field}={value}" for field, value in ABSURD])
def test_an_absurd_configuration_is_named(tmp_path, field, value):
    config = json.loads((TINY / "config.json").read_text())
    *part, name = field.split(".")
    (config[part[0]] if part else config)[name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    named = "rope_theta" if name == "rope_parameters" else name
    with pytest.raises(ValueError, match=rf"{named} is .*, expected "):
        AutoConfig.from_pretrained(tmp_path)


def test_a_missing_shard_is_named(tiny, tmp_path):
    tiny.save_pretrained(tmp_path, max_shard_size="300KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


# Inputs that do not fit


def test_grid_and_pixels_must_match(tiny, golden):
    inputs, _, _ = golden["vision_1x4x6"]
    pixels = inputs["pixel_values"]
    with pytest.raises(ValueError, match="describes 16 patches, but pixel_values has 24"):
        tiny.model.visual(pixels, grid_thw=torch.tensor([[1, 4, 4]]))
    with pytest.raises(ValueError, match=r"\(1, 3, 8\).*merge size 2"):
        tiny.model.visual(pixels, grid_thw=torch.tensor([[1, 3, 8]]))
    with pytest.raises(ValueError, match=r"\(0, 4, 6\)"):
        tiny.model.visual(pixels, grid_thw=torch.tensor([[0, 4, 6]]))
    with pytest.raises(ValueError, match=r"expected \(patches, 588\)"):
        tiny.model.visual(pixels[:, :100], grid_thw=inputs["grid_thw"])
    with pytest.raises(ValueError, match=r"expected a tensor \(images, 3\)"):
        tiny.model.visual(pixels, grid_thw=torch.tensor([1, 4, 6]))
    with pytest.raises(ValueError, match=r"grid_thw has shape \(0, 3\)"):
        tiny.model.visual(pixels[:0], grid_thw=torch.zeros(0, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="on device meta"):
        tiny.model.visual(pixels.to("meta"), grid_thw=inputs["grid_thw"])


def test_placeholders_and_features_must_match(tiny, golden):
    inputs, _, _ = golden["one_image"]
    tokens = inputs["input_ids"].clone()
    tokens[0, 4] = 1
    with pytest.raises(ValueError, match=r"5 image placeholder tokens \(id 500\).* 6 features"):
        tiny(input_ids=tokens, pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
    with pytest.raises(ValueError, match="without image_grid_thw"):
        tiny(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="exactly one of"):
        tiny(attention_mask=inputs["attention_mask"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_inputs_embeds_with_pixels_see_the_image(tiny, golden, mode):
    inputs, expected, _ = golden["one_image"]
    embeds = tiny.get_input_embeddings()(inputs["input_ids"]).detach()
    if mode is not None:
        llava15_fast.patch(tiny, mode)
    arguments = {key: inputs[key] for key in ("pixel_values", "image_grid_thw", "attention_mask")}
    with torch.no_grad():
        logits = tiny(inputs_embeds=embeds, **arguments).logits
    assert largest(logits, expected["logits"]) < 1e-4
    output = tiny.generate(
        inputs_embeds=embeds, **arguments, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(output, expected["greedy_ids"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(golden, mode, attention):
    inputs, expected, _ = golden["two_images"]
    model = LlavaOnevision1_5ForConditionalGeneration.from_pretrained(TINY, attn_implementation=attention).eval()
    model = model.to(inputs["input_ids"].device)
    if mode is not None:
        llava15_fast.patch(model, mode)
    with torch.no_grad():
        assert largest(model(**inputs).logits, expected["logits"]) < 1e-4


# Oracles


def relative(ours, expected):
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def tiny_config(**changes):
    """The golden configuration with values replaced: `vision_rope_theta=...`, `text_rms_norm_eps=...`"""
    config = json.loads((TINY / "config.json").read_text())
    for key, value in changes.items():
        part, _, name = key.partition("_")
        config[f"{part}_config"][name] = value
    return LlavaOnevision1_5Config.from_dict(config)


def random_model(config):
    model = LlavaOnevision1_5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1 if parameter.ndim > 1 else 1.0)
    return model


# Values far from the usual ones, so that a constant in their place is seen; and a shape where no two sizes agree.
VISION_VARIANTS = {
    "as-is": {},
    "layer_norm_eps": {"vision_layer_norm_eps": 0.5},
    "rope_theta": {"vision_rope_theta": 20.0},
    "five-heads": {"vision_num_heads": 5, "vision_hidden_size": 80, "vision_intermediate_size": 112},
}
TEXT_VARIANTS = {
    "as-is": {},
    "rms_norm_eps": {"text_rms_norm_eps": 0.5},
    "rope_theta": {"text_rope_theta": 20.0},
    "no-groups": {"text_num_key_value_heads": 6},
    "head_dim": {"text_head_dim": 40},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("changes", VISION_VARIANTS.values(), ids=VISION_VARIANTS.keys())
def test_vision_tower_is_mlcd(device, changes, mode):
    config = tiny_config(**changes)
    model = random_model(config)
    vision = config.vision_config
    oracle = MLCDVisionModel(
        MLCDVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_hidden_layers=vision.depth,
            num_attention_heads=vision.num_heads,
            image_size=84,
            patch_size=14,
            hidden_act=vision.hidden_act,
            layer_norm_eps=vision.layer_norm_eps,
        )
    ).eval()
    theta_of_oracle(oracle, vision)
    oracle.load_state_dict(mlcd_weights(model.model.visual, oracle.state_dict()))
    image = torch.randn(1, 3, 84, 84)
    # 6 x 6 patches in merge-block order, as the image processor stores them.
    order = torch.arange(36).view(3, 2, 3, 2).transpose(1, 2).flatten()
    patches = image.view(3, 6, 14, 6, 14).permute(1, 3, 0, 2, 4).reshape(36, -1)[order]
    with torch.no_grad():
        expected = oracle(image).last_hidden_state[0, 1:][order]
        model.to(device)
        if mode is not None:
            llava15_fast.patch(model, mode)
        output = model.model.visual(patches.to(device), grid_thw=torch.tensor([[1, 6, 6]]))
    assert relative(output.last_hidden_state.cpu(), expected) <= 1e-5
    merged = model.model.visual.merger.cpu()(expected)
    assert relative(output.pooler_output.cpu(), merged) <= 1e-5


def theta_of_oracle(oracle, vision):
    """MLCD has no setting for the base of its rotary embedding on every version, so its frequencies are put in."""
    half = vision.hidden_size // vision.num_heads // 2
    inv_freq = 1.0 / vision.rope_theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    assert oracle.vision_rotary_embedding.inv_freq.shape == inv_freq.shape
    oracle.vision_rotary_embedding.inv_freq = inv_freq


def mlcd_weights(visual, expected):
    ours = visual.state_dict()
    hidden = visual.config.hidden_size
    weights = {}
    for name, value in ours.items():
        if name.startswith("merger"):
            continue
        if ".qkv." in name:
            prefix, kind = name.replace("blocks.", "encoder.layers.").replace(".attn.", ".self_attn.").split("qkv.")
            for i, part in enumerate("qkv"):
                weights[f"{prefix}{part}_proj.{kind}"] = value[i * hidden : (i + 1) * hidden]
            continue
        for ours_part, theirs in (
            ("blocks.", "encoder.layers."),
            (".attn.proj", ".self_attn.out_proj"),
            ("norm1", "layer_norm1"),
            ("norm2", "layer_norm2"),
            ("patch_embed.proj", "embeddings.patch_embedding"),
            ("class_embedding", "embeddings.class_embedding"),
            ("pre_layernorm", "pre_layrnorm"),
        ):
            name = name.replace(ours_part, theirs)
        weights[name] = value
    missing = expected.keys() - weights.keys()
    assert missing <= {"post_layernorm.weight", "post_layernorm.bias"} and not weights.keys() - expected.keys()
    return {**{name: expected[name] for name in missing}, **weights}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("changes", TEXT_VARIANTS.values(), ids=TEXT_VARIANTS.keys())
def test_text_model_is_qwen3(device, changes, mode):
    config = tiny_config(**changes)
    model = random_model(config)
    text = {key: value for key, value in config.text_config.to_dict().items() if key not in ("model_type", "rope_theta")}
    oracle = Qwen3ForCausalLM(Qwen3Config(**text)).eval()
    weights = {
        name.replace("model.language_model.", "model."): value
        for name, value in model.state_dict().items()
        if "visual" not in name
    }
    oracle.load_state_dict(weights)
    input_ids = torch.randint(0, 490, (2, 17 if mode == "triton" else 40))
    with torch.no_grad():
        expected = oracle(input_ids).logits
        model.to(device)
        if mode is not None:
            llava15_fast.patch(model, mode)
        assert relative(model(input_ids.to(device)).logits.cpu(), expected) <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        VISION_VARIANTS["layer_norm_eps"],
        VISION_VARIANTS["rope_theta"],
        TEXT_VARIANTS["rms_norm_eps"],
        TEXT_VARIANTS["rope_theta"],
    ],
    ids=["layer_norm_eps", "vision rope_theta", "rms_norm_eps", "text rope_theta"],
)
def test_every_changed_value_changes_the_answer(golden, changes):
    """Otherwise the comparisons above would pass with the value ignored."""
    inputs, _, _ = golden["one_image"]
    inputs = {key: value.cpu() for key, value in inputs.items()}
    plain = random_model(tiny_config())
    changed = LlavaOnevision1_5ForConditionalGeneration(tiny_config(**changes)).eval()
    changed.load_state_dict(copy.deepcopy(plain.state_dict()))
    with torch.no_grad():
        assert relative(changed(**inputs).logits, plain(**inputs).logits) > 1e-3
