"""Everything `generate` can do, patched against unpatched: the same token ids, scores within 1e-4, callbacks as often."""

import copy
import pickle
import threading
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

import llava15_fast

NEW_TOKENS = 4
PLAIN = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def shortened(model, layers):
    """Fewer layers, for the interpreter's sake; and less sure of itself, so that samples differ."""
    text, visual = model.model.language_model, model.model.visual
    text.layers, visual.blocks = text.layers[:layers], visual.blocks[:layers]
    text.config.num_hidden_layers, text.config.layer_types = layers, text.config.layer_types[:layers]
    with torch.no_grad():
        model.lm_head.weight.mul_(0.25)
    return model


@pytest.fixture(params=[("torch", 3), ("triton", 1)], ids=["torch", "triton"])
def patch(request, tiny):
    """Patches the golden checkpoint, or the model that is passed."""
    backend, layers = request.param
    shortened(tiny, layers)
    return lambda model=tiny: llava15_fast.patch(model, backend)


@pytest.fixture
def cut_prompts(golden, prompts):
    """name -> inputs; texts are cut short, for the same reason."""

    def cut(case, start, end):
        return {name: golden[case][0][name][:, start:end] for name in ("input_ids", "attention_mask")}

    cases = ("one_image", "two_images", "video", "batch_left_pad")
    images = {case: prompts[case] for case in cases}
    return {
        **images,
        "text": cut("text", 0, 4),
        "texts": cut("text_batch_left_pad", 2, 6),
        "right_padded": {name: value.flip(-1) for name, value in cut("text_batch_left_pad", 2, 6).items()},
        "one_empty": {
            **cut("text_batch_left_pad", 2, 6),
            "attention_mask": (mask := cut("text_batch_left_pad", 2, 6)["attention_mask"]) * mask.new_tensor([[1], [0]]),
        },
        "padded": {name: value[1:] for name, value in cut("text_batch_left_pad", 1, 6).items()},
        "one_token": cut("text", 0, 1),
        "repeating": {name: value.repeat(1, 3) for name, value in cut("text", 0, 2).items()},
    }


# What a user plugs into generate; `seen` is what it was called with


class Streamer(BaseStreamer):
    def __init__(self, seen):
        self.seen = seen

    def put(self, value):
        self.seen.append(value.tolist())

    def end(self):
        self.seen.append("end")


class Alternating(LogitsProcessor):
    """Stateful: the first token and every second one after it is not the best."""

    def __init__(self, seen):
        self.seen = seen

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.tolist())
        return scores.scatter(1, scores.argmax(-1, keepdim=True), -1e9) if len(self.seen) % 2 else scores


class After(StoppingCriteria):
    """Row `i` stops after `calls + i` tokens."""

    def __init__(self, seen, calls):
        self.seen, self.calls = seen, calls

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.tolist())
        return torch.arange(len(input_ids), device=input_ids.device) + self.calls <= len(self.seen)


def tokenizer():
    """Token `i` is the word `<i>`; transformers asks how a word follows `abcdef`."""
    words = {"abcdef": 0, **{f"<{i}>": i for i in range(1, 512)}}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="abcdef")))


# The table: row -> prompt, and options of `generate` or how they come from the call


@dataclass
class Call:
    """What a row is built from: the model, its inputs, the plain greedy answer (B, NEW_TOKENS), and a record to fill."""

    model: Any
    inputs: dict[str, torch.Tensor]
    answer: torch.Tensor
    seen: list = field(default_factory=list)

    def embeds(self):
        """The prompt as embeddings instead of ids."""
        with torch.no_grad():
            return {"input_ids": None, "inputs_embeds": self.model.get_input_embeddings()(self.inputs["input_ids"])}

    def eager_attention(self, **options):
        self.model.set_attn_implementation("eager")
        return options

    def weaker(self):
        """An assistant that is sometimes wrong."""
        weaker = copy.deepcopy(self.model)
        with torch.no_grad():
            weaker.lm_head.weight[self.answer[0, 1]] = 0
        return weaker


SAMPLE = {"do_sample": True}
BEAMS = {"num_beams": 3, "num_return_sequences": 3}
DETAILS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
SOME = list(range(0, 512, 5))

SAME_ANSWER = {
    # Prompts
    "text": ("text", {}),
    "batch of texts, left-padded": ("texts", {}),
    "batch of texts, right-padded": ("right_padded", {}),
    "batch of texts, one of them nothing but padding": ("one_empty", {}),
    "one image": ("one_image", {}),
    "two images": ("two_images", {}),
    "video": ("video", {}),
    "batch of images, left-padded": ("batch_left_pad", {}),
    "prompt of one token": ("one_token", {}),
    "no attention_mask": ("text", {"attention_mask": None}),
    "inputs_embeds": ("text", lambda call: call.embeds()),
    "inputs_embeds, image": ("one_image", lambda call: call.embeds()),
    # Callbacks that only look
    "streamer": ("text", lambda call: {"streamer": Streamer(call.seen)}),
    "stopping_criteria that never stops": (
        "text",
        lambda call: {"stopping_criteria": StoppingCriteriaList([After(call.seen, 99)])},
    ),
    "max_time": ("text", {"max_time": 3600.0}),
    # Speculation
    "prompt_lookup_num_tokens": ("repeating", {"prompt_lookup_num_tokens": 2}),
    "prompt_lookup_num_tokens, image": ("one_image", {"prompt_lookup_num_tokens": 2}),
    "assistant_model": ("text", lambda call: {"assistant_model": call.weaker()}),
    "assistant_model, patched": ("text", lambda call: {"assistant_model": llava15_fast.patch(call.weaker(), "torch").model}),
    "custom_generate": ("text", {"custom_generate": lambda model, input_ids, **kwargs: model._sample(input_ids, **kwargs)}),
    # What comes back
    "return_dict_in_generate": ("text", {"return_dict_in_generate": True}),
    "output_scores, output_logits": ("text", DETAILS),
    "output_scores, output_logits, left-padded batch": ("texts", {**DETAILS, "use_cache": False}),
    "output_scores, output_logits, prompt lookup": ("repeating", {**DETAILS, "prompt_lookup_num_tokens": 2}),
    "output_hidden_states": ("text", {"return_dict_in_generate": True, "output_hidden_states": True}),
    "output_attentions": ("text", lambda call: call.eager_attention(return_dict_in_generate=True, output_attentions=True)),
    "logits_to_keep": ("text", {"logits_to_keep": 2}),
    # Caches
    "use_cache=False": ("text", {"use_cache": False}),
    "use_cache=False, left-padded batch": ("texts", {"use_cache": False}),
    "use_cache=False, image": ("one_image", {"use_cache": False}),
    "past_key_values=DynamicCache()": ("text", lambda call: {"past_key_values": DynamicCache(), **DETAILS}),
    "past_key_values=DynamicCache(config)": ("text", lambda call: {"past_key_values": DynamicCache(config=call.model.config)}),
    "past_key_values=StaticCache": (
        "texts",
        lambda call: {"past_key_values": StaticCache(config=call.model.config, max_cache_len=16)},
    ),
    "cache_implementation=dynamic": ("text", {"cache_implementation": "dynamic"}),
    "cache_implementation=static": ("texts", {"cache_implementation": "static"}),
    "prefill_chunk_size": ("repeating", {"prefill_chunk_size": 4}),
    "prefill_chunk_size, left-padded": ("padded", {"prefill_chunk_size": 2}),
    "prefill_chunk_size, left-padded batch": ("texts", {"prefill_chunk_size": 2}),
    "prefill_chunk_size=1, left-padded batch": ("texts", {"prefill_chunk_size": 1}),
    "prefill_chunk_size, right-padded batch": ("right_padded", {"prefill_chunk_size": 2}),
}

OTHER_ANSWER = {
    "max_new_tokens=1": ("text", {"max_new_tokens": 1}),
    "max_new_tokens=1, image": ("one_image", {"max_new_tokens": 1}),
    "max_length": ("text", {"max_new_tokens": None, "max_length": 7}),
    "max_length without bound, eos_token_id": (
        "text",
        lambda call: {"max_new_tokens": None, "max_length": int(1e30), "eos_token_id": call.answer[0, 2].item()},
    ),
    "max_time=0": ("text", {"max_time": 0.0}),
    # Sampling
    "do_sample": ("text", SAMPLE),
    "do_sample, left-padded batch": ("texts", SAMPLE),
    "do_sample, image": ("one_image", SAMPLE),
    "temperature": ("text", {**SAMPLE, "temperature": 2.5}),
    "top_k": ("text", {**SAMPLE, "top_k": 5}),
    "top_p": ("text", {**SAMPLE, "top_k": 0, "top_p": 0.7}),
    "min_p": ("text", {**SAMPLE, "top_k": 0, "min_p": 0.1}),
    "typical_p": ("text", {**SAMPLE, "typical_p": 0.6}),
    "epsilon_cutoff, eta_cutoff": ("text", {**SAMPLE, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3}),
    "num_return_sequences": ("text", {**SAMPLE, "num_return_sequences": 3}),
    "num_return_sequences, batch of images": ("batch_left_pad", {**SAMPLE, "num_return_sequences": 2, "max_new_tokens": 2}),
    # Logits processors
    "repetition_penalty": ("text", {"repetition_penalty": 0.1}),
    "no_repeat_ngram_size": ("text", {"repetition_penalty": 0.1, "no_repeat_ngram_size": 2}),
    "bad_words_ids": ("text", lambda call: {"bad_words_ids": [[call.answer[0, 0].item()], call.answer[0, 1:3].tolist()]}),
    "suppress_tokens": ("text", lambda call: {"suppress_tokens": call.answer[0, :3].tolist()}),
    "begin_suppress_tokens": ("text", lambda call: {"begin_suppress_tokens": call.answer[0, :1].tolist()}),
    "sequence_bias": ("text", lambda call: {"sequence_bias": [[call.answer[0, :1].tolist(), -9.0], [[7, 7], 1.0]]}),
    "forced_eos_token_id": ("text", {"forced_eos_token_id": 9}),
    "remove_invalid_values, renormalize_logits": (
        "text",
        {**SAMPLE, "remove_invalid_values": True, "renormalize_logits": True},
    ),
    "exponential_decay_length_penalty": ("text", {"exponential_decay_length_penalty": (1, 9.0), "eos_token_id": 9}),
    "guidance_scale": ("text", {"guidance_scale": 4.0}),
    "guidance_scale, negative_prompt_ids": (
        "text",
        lambda call: {"guidance_scale": 4.0, "negative_prompt_ids": call.inputs["input_ids"][:, :2]},
    ),
    "prefix_allowed_tokens_fn": ("text", {"prefix_allowed_tokens_fn": lambda row, ids: [len(ids), len(ids) + 20, 300]}),
    "logits_processor with state": ("text", lambda call: {"logits_processor": LogitsProcessorList([Alternating(call.seen)])}),
    "logits_processor with state, do_sample": (
        "texts",
        lambda call: {**SAMPLE, "logits_processor": LogitsProcessorList([Alternating(call.seen)])},
    ),
    "logits_processor with state, num_beams": (
        "text",
        lambda call: {**BEAMS, "logits_processor": LogitsProcessorList([Alternating(call.seen)])},
    ),
    # Where an answer ends
    "eos_token_id": ("text", lambda call: {"eos_token_id": call.answer[0, 2].item()}),
    "eos_token_id as the first token": ("text", lambda call: {"eos_token_id": call.answer[0, 0].item()}),
    "eos_token_id, do_sample": ("texts", {**SAMPLE, "eos_token_id": SOME, "pad_token_id": 1}),
    "list of eos_token_id, prompts end one by one": (
        "texts",
        lambda call: {"eos_token_id": [call.answer[0, 1].item(), call.answer[1, 2].item()], "pad_token_id": 7},
    ),
    "eos_token_id, num_beams": ("text", lambda call: {**BEAMS, "eos_token_id": call.answer[0, 1].item()}),
    "min_new_tokens": ("text", lambda call: {"min_new_tokens": 3, "eos_token_id": call.answer[0, 0].item()}),
    "min_length": ("text", lambda call: {"min_length": 6, "eos_token_id": call.answer[0, 0].item()}),
    "stop_strings": ("text", lambda call: {"stop_strings": [f"<{call.answer[0, 1]}>"], "tokenizer": tokenizer()}),
    "stopping_criteria": ("text", lambda call: {"stopping_criteria": StoppingCriteriaList([After(call.seen, 3)])}),
    "stopping_criteria, prompts end one by one": (
        "texts",
        lambda call: {"stopping_criteria": StoppingCriteriaList([After(call.seen, 2)]), "eos_token_id": 511},
    ),
    "stopping_criteria, EosTokenCriteria": (
        "texts",
        lambda call: {"stopping_criteria": StoppingCriteriaList([EosTokenCriteria(call.answer[:, 1].tolist())])},
    ),
    "stopping_criteria, several MaxLengthCriteria": (
        "text",
        {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(7), MaxLengthCriteria(6)])},
    ),
    "streamer, do_sample, eos_token_id": (
        "one_image",
        lambda call: {**SAMPLE, "streamer": Streamer(call.seen), "eos_token_id": SOME},
    ),
    # Beams
    "num_beams": ("text", BEAMS),
    "num_beams, left-padded batch": ("texts", BEAMS),
    "num_beams, image": ("one_image", BEAMS),
    "num_beams, inputs_embeds, image": ("one_image", lambda call: {**call.embeds(), **BEAMS}),
    "num_beams, batch of images": ("batch_left_pad", {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 2}),
    "num_beams, do_sample": ("text", {**BEAMS, **SAMPLE}),
    "num_beams, num_return_sequences": ("text", {"num_beams": 4, "num_return_sequences": 2}),
    "num_beams, early_stopping, length_penalty": (
        "text",
        lambda call: {**BEAMS, "early_stopping": True, "length_penalty": -1.0, "eos_token_id": call.answer[0].tolist()},
    ),
    "num_beams, output_scores, output_logits": ("text", {**DETAILS, **BEAMS}),
    "num_beams, cache_implementation=static": ("text", {"cache_implementation": "static", **BEAMS}),
    # And together
    "assistant_model, do_sample": ("text", lambda call: {**SAMPLE, "assistant_model": call.weaker()}),
    "output_scores, output_logits, eos_token_id": ("text", lambda call: {**DETAILS, "eos_token_id": call.answer[0, 2].item()}),
    "output_scores, output_logits, do_sample, top_k": ("text", {**DETAILS, **SAMPLE, "top_k": 9, "temperature": 0.7}),
    "position_ids": ("text", lambda call: {"position_ids": call.inputs["input_ids"].new_tensor([[0, 5, 9, 30]])}),
    "generation_config": ("text", {"generation_config": GenerationConfig(**{**PLAIN, **DETAILS, **SAMPLE, "top_k": 7})}),
    "generation_config, overridden": (
        "text",
        {"generation_config": GenerationConfig(**PLAIN, num_beams=3), "num_beams": 1, "repetition_penalty": 0.1},
    ),
}

SLOWER = {"output_hidden_states", "output_attentions"}
"""Rows for which the original runs."""

MAY_BE_SLOWER = {
    *(row for row in (*SAME_ANSWER, *OTHER_ANSWER) if "static" in row.lower()),
    "batch of texts, right-padded",
    "batch of texts, one of them nothing but padding",
    "prefill_chunk_size, left-padded",
    "prefill_chunk_size, right-padded batch",
}


def run(call, options):
    """The output of a row; a fresh one, as its helpers have state."""
    call = copy.copy(call)
    call.seen = []
    options = options(call) if callable(options) else options
    plain = {} if "generation_config" in options else PLAIN
    torch.manual_seed(7)
    return call.model.generate(**{**call.inputs, **plain, **options}), call.seen


def assert_same(found, expected):
    """Integers are equal, floats within 1e-4, caches as long; containers have the same entries."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 if expected.is_floating_point() else 0)
    elif isinstance(expected, ModelOutput):
        assert list(found) == list(expected)
        assert_same(list(found.values()), list(expected.values()))
    elif isinstance(expected, DynamicCache):
        assert found.get_seq_length() == expected.get_seq_length()
        assert_same([pair[:2] for pair in found], [pair[:2] for pair in expected])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)
    else:
        assert found == expected


@pytest.mark.parametrize("row", [*SAME_ANSWER, *OTHER_ANSWER])
def test_generate(tiny, cut_prompts, patch, row):
    prompt, options = {**SAME_ANSWER, **OTHER_ANSWER}[row]
    inputs = cut_prompts[prompt]
    answer = tiny.generate(**inputs, **PLAIN)[:, inputs["input_ids"].shape[1] :]
    call = Call(tiny, inputs, answer)
    expected = run(call, options)
    # The option does what it says: no row compares the plain answer with itself by accident.
    ids = expected[0] if isinstance(expected[0], torch.Tensor) else expected[0].sequences
    assert torch.equal(ids[:, -NEW_TOKENS:], answer) == (row in SAME_ANSWER)

    handle = patch()
    assert_same(run(call, options), expected)
    model = next(row for row in handle.report().rows if row.path == "language_model")
    if row in SLOWER:
        assert model.fallbacks and not model.ran
    elif row not in MAY_BE_SLOWER:
        assert model.ran and not model.fallbacks


# What takes more than one call


@pytest.fixture(params=["torch", "triton"])
def way(request, tiny, golden, prompts):
    """A backend, and a prompt for it: about an image, or for the interpreter's sake a few tokens for one layer."""
    if request.param == "torch":
        return SimpleNamespace(backend="torch", prompt=prompts["one_image"], slow=False)
    shortened(tiny, 1)
    short = {name: golden["text"][0][name][:, :4] for name in ("input_ids", "attention_mask")}
    return SimpleNamespace(backend="triton", prompt=short, slow=True)


def both(model, action, backend="torch"):
    """What `action(model)` gives unpatched and then patched."""
    expected = action(model)
    handle = llava15_fast.patch(model, backend)
    return expected, action(model), handle


def language_model(handle):
    return next(row for row in handle.report().rows if row.path == "language_model")


LOOKUP, SAMPLED = {"prompt_lookup_num_tokens": 2}, {"eos_token_id": SOME, "do_sample": True}


@pytest.mark.parametrize(
    ("case", "options", "backend"),
    [
        *((case, options, "torch") for case in ("text", "one_image") for options in ({}, LOOKUP, SAMPLED)),
        *(("text_batch_left_pad", options, "torch") for options in ({}, SAMPLED)),  # transformers looks up for one prompt only
        ("text", {}, "triton"),
        ("text_batch_left_pad", SAMPLED, "triton"),
    ],
)
def test_multi_turn_on_the_returned_cache(tiny, prompts, case, options, backend):
    prompt = prompts[case]
    if backend == "triton":
        shortened(tiny, 1)
        prompt = {name: value[:, -4:] for name, value in prompt.items()}
    question = torch.randint(5, 490, (len(prompt["input_ids"]), 3), device=tiny.device)

    def talk(model):
        inputs, turns = prompt, []
        for _ in range(3):
            torch.manual_seed(7)  # where an early end leaves the random generator is not specified
            turn = model.generate(**inputs, **{**PLAIN, **options, "return_dict_in_generate": True})
            turns.append((turn.sequences, turn.past_key_values.get_seq_length()))
            ids = torch.cat([turn.sequences, question], dim=1)
            mask = torch.ones_like(ids)
            mask[:, : prompt["attention_mask"].shape[1]] = prompt["attention_mask"]
            inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": turn.past_key_values}
        return turns

    expected, found, handle = both(tiny, talk, backend)
    assert_same(found, expected)
    if "prompt_lookup_num_tokens" not in options:  # transformers 5.17 feeds the prompt twice there, with a mask for one
        assert not language_model(handle).fallbacks


def test_shared_prefix_with_several_questions(tiny, prompts):
    """The usual prefix caching: a deep copy of one filled cache per question, also in inference mode."""
    prefix = prompts["one_image"]
    questions = torch.randint(5, 490, (3, 4), device=tiny.device)

    def ask(model):
        with torch.inference_mode():
            filled = model(**prefix, past_key_values=DynamicCache()).past_key_values
        answers = []
        for question in questions:
            ids = torch.cat([prefix["input_ids"], question[None]], dim=1)
            answers.append(model.generate(ids, past_key_values=copy.deepcopy(filled), **PLAIN))
        assert filled.get_seq_length() == prefix["input_ids"].shape[1]
        return answers

    expected, found, _ = both(tiny, ask)
    assert_same(found, expected)


def test_cache_longer_than_the_prompt(tiny, prompts):
    """Nothing to rely on, but no reason to differ: the mask that transformers makes is shorter than the cache then."""
    other = torch.arange(5, 25, device=tiny.device)[None]

    def generate(model):
        with torch.no_grad():
            cache = model(other, past_key_values=DynamicCache()).past_key_values
        return model.generate(**prompts["text"], past_key_values=cache, **PLAIN)

    expected, found, _ = both(tiny, generate)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("first", [True, False], ids=["patched-first", "unpatched-first"])
def test_cache_moves_between_patched_and_unpatched(tiny, golden, first):
    ids = golden["text"][0]["input_ids"]

    def turns(patched):
        cache, answers = DynamicCache(), ids
        for turn in range(4):
            if patched is not None and (turn % 2 == 0) == patched:
                llava15_fast.patch(tiny, "torch")
            else:
                llava15_fast.unpatch(tiny)
            answers = tiny.generate(torch.cat([answers, ids[:, :2]], dim=1), past_key_values=cache, **PLAIN)
        return answers

    assert torch.equal(turns(first), turns(None))


def test_hooks_are_called_as_often_as_unpatched(tiny, way):
    text = tiny.model.language_model
    heard = {
        "model": tiny,
        "inner": tiny.model,
        "visual": tiny.model.visual,
        "language_model": text,
        "layer": text.layers[-1],
        "norm": text.norm,
        "embed_tokens": text.embed_tokens,
        "q_proj": text.layers[0].self_attn.q_proj,
        "down_proj": text.layers[-1].mlp.down_proj,
        "lm_head": tiny.lm_head,
    }
    if way.slow:
        heard = {name: heard[name] for name in ("language_model", "layer", "q_proj")}
    for name, module in heard.items():
        calls = Counter()
        hooks = [
            module.register_forward_hook(lambda *_, calls=calls: calls.update(["after"])),
            module.register_forward_pre_hook(lambda *_, calls=calls: calls.update(["before"])),
        ]

        def count(model, calls=calls):
            calls.clear()
            return model.generate(**way.prompt, **PLAIN), dict(calls)

        expected, found, _ = both(tiny, count, way.backend)
        assert_same(found, expected)
        assert expected[1], name
        llava15_fast.unpatch(tiny)
        for hook in hooks:
            hook.remove()


def test_hook_that_changes_the_output(tiny, way):
    plain = tiny.generate(**way.prompt, **PLAIN)
    for module in (tiny.model.language_model.layers[0].self_attn.k_proj, tiny.model.language_model.norm, tiny.lm_head):
        hook = module.register_forward_hook(lambda module, args, output: output.flip(-1))
        expected, found, _ = both(tiny, lambda model: model.generate(**way.prompt, **PLAIN), way.backend)
        assert torch.equal(found, expected) and not torch.equal(expected, plain)
        llava15_fast.unpatch(tiny)
        hook.remove()


@pytest.mark.slow
def test_two_patched_models_side_by_side(tiny, way):
    """Each has its own weights, caches and callbacks, also when one generates in the middle of the other."""
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.flip(0))

    class Inner(LogitsProcessor):
        def __init__(self):
            self.answers = []

        def __call__(self, input_ids, scores):
            self.answers.append(other.generate(**way.prompt, **PLAIN))
            return scores

    def generate(model):
        inner = Inner()
        return model.generate(**way.prompt, **PLAIN, logits_processor=LogitsProcessorList([inner])), inner.answers

    expected = generate(tiny)
    llava15_fast.patch(other, way.backend)
    llava15_fast.patch(tiny, way.backend)
    assert_same(generate(tiny), expected)
    assert not torch.equal(expected[0][:, -NEW_TOKENS:], expected[1][0][:, -NEW_TOKENS:])


def test_two_threads_on_one_model(tiny, prompts):
    cases = ["text", "one_image", "batch_left_pad", "video"]
    options = {**PLAIN, "max_new_tokens": 24}
    expected = [tiny.generate(**prompts[case], **options) for case in cases]
    llava15_fast.patch(tiny, "torch")
    found = [[] for _ in cases]

    def work(i):
        for _ in range(3):
            found[i].append(tiny.generate(**prompts[cases[i]], **options))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answers, wanted in zip(found, expected, strict=True):
        assert len(answers) == 3 and all(torch.equal(answer, wanted) for answer in answers)


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.to(model.device),
        lambda model: model.double().float(),
        lambda model: model.train(),
        lambda model: model.eval(),
        lambda model: model.requires_grad_(False),
        lambda model: llava15_fast.unpatch(model) or model,
        lambda model: llava15_fast.patch(model, "torch", cuda_graph=False).model,
    ],
    ids=["deepcopy", "pickle", "to", "double-float", "train", "eval", "frozen", "unpatch", "patch-again"],
)
def test_answer_after_a_model_change(tiny, way, change):
    """Between two calls; the weights stay the same."""
    expected = tiny.generate(**way.prompt, **PLAIN)
    llava15_fast.patch(tiny, way.backend)
    assert torch.equal(tiny.generate(**way.prompt, **PLAIN), expected)
    assert torch.equal(change(tiny).generate(**way.prompt, **PLAIN), expected)


@pytest.mark.parametrize("assign", [False, True])
def test_other_weights_change_the_answer(tiny, way, assign):
    prompt = way.prompt
    other = copy.deepcopy(tiny)
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    before, after = tiny.generate(**prompt, **PLAIN), other.generate(**prompt, **PLAIN)
    llava15_fast.patch(tiny, way.backend)
    assert torch.equal(tiny.generate(**prompt, **PLAIN), before)
    tiny.load_state_dict({name: value.clone() for name, value in other.state_dict().items()}, assign=assign)
    assert torch.equal(tiny.generate(**prompt, **PLAIN), after) and not torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("first", ["patch", "convert"])
def test_half_precision_runs(tiny, prompts, dtype, first):
    """Which ids are right then is not asked here."""
    if first == "convert":
        tiny.to(dtype)
    llava15_fast.patch(tiny, "torch").model.to(dtype)
    output = tiny.generate(**prompts["batch_left_pad"], **PLAIN, return_dict_in_generate=True, output_logits=True)
    assert len(output.logits) == NEW_TOKENS and all(logits.isfinite().all() for logits in output.logits)


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("place", ["logits_processor", "stopping_criteria", "streamer", "hook"])
def test_call_after_an_interrupted_one(tiny, prompts, place, error):
    calls = iter(range(99))

    def third_fails(result):
        if next(calls) == 2:
            raise error
        return result

    going_on = torch.zeros(1, dtype=torch.bool, device=tiny.device)
    plugged = {
        "logits_processor": LogitsProcessorList([lambda input_ids, scores: third_fails(scores)]),
        "stopping_criteria": StoppingCriteriaList([lambda input_ids, scores, **kwargs: third_fails(going_on)]),
        "streamer": SimpleNamespace(put=third_fails, end=lambda: None),
    }
    cache, prompt = DynamicCache(), prompts["text"]
    expected = tiny.generate(**prompt, **PLAIN)
    llava15_fast.patch(tiny, "torch")
    if place == "hook":
        hook = tiny.lm_head.register_forward_hook(lambda module, args, output: third_fails(output))
    with pytest.raises(type(error)):
        tiny.generate(**prompt, **PLAIN, past_key_values=cache, **({} if place == "hook" else {place: plugged[place]}))
    if place == "hook":
        hook.remove()
    assert torch.equal(tiny.generate(**prompt, **PLAIN), expected)
    # What the interrupted call left in the user's cache is right too: it goes on from there.
    cache.crop(3 - cache.get_seq_length())
    assert torch.equal(tiny.generate(**prompt, **PLAIN, past_key_values=cache), expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_autograd_contexts(tiny, prompts, context):
    """`generate` needs no gradient by itself, so the kernels run."""

    def generate(model):
        with context():
            first = model.generate(**prompts["text"], **PLAIN, return_dict_in_generate=True)
        # Out of the context again, on what was made inside.
        ids = torch.cat([first.sequences, first.sequences[:, :2]], dim=1)
        return first.sequences, model.generate(ids, past_key_values=first.past_key_values, **PLAIN)

    expected, found, handle = both(tiny, generate)
    assert_same(found, expected)
    assert not language_model(handle).fallbacks


def test_hidden_states_once_do_not_disable_the_fast_path(tiny, way):
    prompt = way.prompt
    handle = llava15_fast.patch(tiny, way.backend)
    tiny.generate(**prompt, **PLAIN, return_dict_in_generate=True, output_hidden_states=True)
    before = language_model(handle)
    tiny.generate(**prompt, **PLAIN)
    after = language_model(handle)
    assert before.fallbacks == after.fallbacks and sum(after.ran.values()) - sum(before.ran.values()) == NEW_TOKENS


def test_growing_past_several_blocks(tiny, golden):
    """A long prompt and a cache that fills up on the way."""
    ids = torch.randint(5, 490, (2, 500), device=tiny.device)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    options = {**PLAIN, "max_new_tokens": 30, "return_dict_in_generate": True}

    def two_turns(model):
        first = model.generate(ids, attention_mask=mask, **options)
        longer = torch.cat([first.sequences, ids], dim=1)
        wider = torch.cat([mask, torch.ones(2, longer.shape[1] - 500, dtype=mask.dtype, device=mask.device)], dim=1)
        second = model.generate(longer, attention_mask=wider, past_key_values=first.past_key_values, **options)
        return first.sequences, second.sequences, second.past_key_values.get_seq_length()

    expected, found, _ = both(tiny, two_turns)
    assert_same(found, expected)
