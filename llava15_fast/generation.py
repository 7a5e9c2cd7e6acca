"""`generate` on a patched model: plain greedy search and sampling run in a loop of our own.

transformers prepares everything (its `generate` calls `decode` through the public `custom_generate` argument) and its loop
does everything else: beams, assistants, streamers, custom criteria and processors. Ours differs in when the host waits:

    transformers    after every token, to see whether it was the last
    here            `LAG` tokens later, and for every `LAG`-th token only; what was computed beyond the end is dropped

so that the device never waits for the host. On a CPU there is nothing to wait for, and no token too many.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode, logits_process
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from .modeling import LlavaOnevision1_5ForConditionalGeneration, LlavaOnevision1_5Model
from .parts import difference, is_replaced
from .refusal import has_hooks
from .releases import CACHE
from .sites import SITES, site_of
from .text import KNOWN_PADDING, LeftPadding, spans_of

LAG = 2
"""Tokens between two looks at whether all sequences have ended."""

ROOM = 4096
"""Tokens of an answer that there is room for at first: a maximum length may be as good as none."""

PURE_PROCESSORS = frozenset(
    getattr(logits_process, name)
    for name in (
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "MinPLogitsWarper",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    )
)
"""Processors that remember nothing: a call for a token beyond the end has no effect."""


def generate(
    module: nn.Module,
    inputs: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    prefix_allowed_tokens_fn: Callable | None = None,
    synced_gpus: bool | None = None,
    assistant_model: Any = None,
    streamer: Any = None,
    negative_prompt_ids: torch.Tensor | None = None,
    negative_prompt_attention_mask: torch.Tensor | None = None,
    custom_generate: Any = None,
    **kwargs: Any,
) -> Any:
    reason = None
    if custom_generate is not None:
        reason = "custom_generate is given"
    elif synced_gpus or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        reason = "several processes generate together"
    elif streamer is not None:
        reason = "a streamer is given"
    elif assistant_model is not None:
        reason = "an assistant model is given"
    elif kwargs.get("tokenizer") is not None:
        reason = "a tokenizer is given, for stop strings"
    elif name := next((name for name in PREPARATION if not _is_own(module, name)), None):
        reason = f"{name} was replaced"
    else:
        reason = _unusual_mode(module, generation_config, kwargs)
    site = site_of(module, "generate")
    if reason is not None:
        site.fall_back(reason)
    return type(module).generate(
        module,
        inputs=inputs,
        generation_config=generation_config,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        synced_gpus=synced_gpus,
        assistant_model=assistant_model,
        streamer=streamer,
        negative_prompt_ids=negative_prompt_ids,
        negative_prompt_attention_mask=negative_prompt_attention_mask,
        custom_generate=custom_generate if reason is not None else decode,
        **kwargs,
    )


PREPARATION = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
"""What our loop asks for one step only, knowing what the next one would be."""


def _is_own(module: nn.Module, name: str) -> bool:
    """Whether a method is the one that our class has: PEFT's prompt tuning replaces some, and so may a user."""
    own = getattr(LlavaOnevision1_5ForConditionalGeneration, name)
    return getattr(type(module), name) is own and not is_replaced(module, name, name)


def _unusual_mode(module: nn.Module, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> str | None:
    """What makes a call more than greedy search or sampling, from wherever transformers would take it."""
    usual = {
        "num_beams": 1,
        "num_beam_groups": 1,
        "penalty_alpha": 0.0,
        "constraints": None,
        "force_words_ids": None,
        "prompt_lookup_num_tokens": None,
        "assistant_early_exit": None,
        "use_mtp": False,
        "dola_layers": None,
        "stop_strings": None,
        "token_healing": False,
    }
    for name, value in usual.items():
        for source in (kwargs.get(name), getattr(generation_config, name, None), getattr(module.generation_config, name, None)):
            if source is not None:
                if source != value and (source or value):
                    return f"{name} is set"
                break
    return None


def decode(
    model: nn.Module,
    input_ids: torch.Tensor,
    logits_processor: logits_process.LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Greedy search and sampling, in the place of transformers' `_sample` and with its arguments and results."""
    site = site_of(model, "generate")
    if reason := _refusal(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs):
        site.fall_back(reason)
        return model._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
        )
    device = input_ids.device
    site.start(device)
    batch, prompt_length = input_ids.shape
    limits = [criterion.max_length for criterion in stopping_criteria if isinstance(criterion, MaxLengthCriteria)]
    max_length = math.ceil(min(limits))  # transformers takes fractions too
    eos_ids = [criterion.eos_token_id for criterion in stopping_criteria if isinstance(criterion, EosTokenCriteria)]
    eos_ids = torch.cat([ids.to(device) for ids in eos_ids]) if eos_ids else None
    pad_id = generation_config._pad_token_tensor
    pad_id = None if pad_id is None else pad_id.to(device)
    keep_scores = generation_config.return_dict_in_generate and generation_config.output_scores
    keep_logits = generation_config.return_dict_in_generate and generation_config.output_logits
    scores: list[torch.Tensor] = []
    raw_logits: list[torch.Tensor] = []

    room = max(min(max_length, prompt_length + ROOM), prompt_length + 1)
    # The dtype that a concatenation with new tokens has.
    ids = input_ids.new_empty(batch, room, dtype=torch.promote_types(input_ids.dtype, torch.long))
    ids[:, :prompt_length] = input_ids
    length = prompt_length
    unfinished = torch.ones(batch, dtype=torch.bool, device=device)
    watch = _StopWatch(device)
    randomness = _Randomness(device)
    padding = _left_padding(model, model_kwargs)
    known = {} if padding is None or generation_config.prefill_chunk_size is not None else {KNOWN_PADDING: padding}
    # An assistant is asked again and again, behind the cache that it keeps.
    first = not generation_config.is_assistant
    outputs = model._prefill(input_ids, generation_config, {**model_kwargs, **known}, is_first_iteration=first)
    step_inputs = None
    while True:
        logits = outputs.logits[:, -1]
        if logits_processor or generation_config.do_sample or keep_scores or keep_logits:
            logits = logits.to(copy=True, dtype=torch.float32, device=device)
        processed = logits_processor(ids[:, :length], logits)
        if keep_scores:
            scores.append(processed)
        if keep_logits:
            raw_logits.append(logits)
        if generation_config.do_sample:
            randomness.note()
            tokens = draw(processed.softmax(-1))
        else:
            tokens = processed.argmax(-1)
        tokens = tokens.to(device)
        if eos_ids is not None:
            tokens = torch.where(unfinished, tokens, pad_id)
            # Not `isin`, which sorts where there are many, and waits for the device.
            unfinished = unfinished & (tokens[:, None] != eos_ids).all(-1)
        if length == ids.shape[1]:
            ids = torch.cat([ids, torch.empty_like(ids)], dim=1)
        ids[:, length] = tokens
        length += 1
        if length >= max_length or (eos_ids is not None and watch.stopped(unfinished)):
            break
        step_inputs = _next_inputs(model, ids[:, :length], outputs, model_kwargs, padding, step_inputs)
        del outputs
        outputs = model(**step_inputs, return_dict=True)

    needed = _tokens_needed(ids[:, prompt_length:length], eos_ids)
    cache = model_kwargs.get(CACHE, getattr(outputs, CACHE))
    if surplus := length - prompt_length - needed:
        if cache is not None:
            cache.crop(-surplus)
        randomness.rewind(surplus)
    sequences = ids[:, : prompt_length + needed].clone()
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=tuple(scores[:needed]) if keep_scores else None,
        logits=tuple(raw_logits[:needed]) if keep_logits else None,
        **{CACHE: cache},
    )


def draw(probabilities: torch.Tensor) -> torch.Tensor:
    """(B, vocabulary) -> (B,), as `torch.multinomial` draws them and from the same random numbers: which of exponential clocks
    that go at these rates is the first. Older releases make the host wait for multinomial's checks; it waits for nothing here.

    Raises:
        RuntimeError: a probability is not a number; on a GPU as late as an assertion there.
    """
    torch._assert_async((probabilities.sum(-1) > 0).all(), "probabilities are not numbers, or all are 0")
    return (probabilities / torch.empty_like(probabilities).exponential_(1.0)).argmax(-1)


def _refusal(
    input_ids: torch.Tensor,
    processors: logits_process.LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> str | None:
    """Why transformers' own loop has to run, or None."""
    if config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"the mode is {config.get_generation_mode()}"
    if input_ids.ndim != 2:
        return "the ids are not one row per prompt"
    for processor in processors:
        if type(processor) not in PURE_PROCESSORS:
            return f"the logits processor {type(processor).__name__} may remember what it saw"
    for criterion in criteria:
        if type(criterion) not in (EosTokenCriteria, MaxLengthCriteria):
            return f"the stopping criterion {type(criterion).__name__} has to see every token"
    if criteria.max_length is None:
        return "there is no maximum length"
    if config.output_attentions or config.output_hidden_states:
        return "attentions or hidden states are asked for"
    if not model_kwargs.get("use_cache"):
        return "use_cache is off"
    cache = model_kwargs.get(CACHE)
    if cache is not None and (cache.is_compileable or not cache.is_croppable):
        return f"the cache is a {type(cache).__name__} that cannot be cropped"
    return None


def _next_inputs(
    model: nn.Module,
    ids: torch.Tensor,
    outputs: Any,
    model_kwargs: dict[str, Any],
    padding: LeftPadding | None,
    previous: dict[str, Any] | None,
) -> dict[str, Any]:
    """The arguments of the next forward: prepared by transformers for the first time, continued after that."""
    if previous is None:
        model_kwargs.update(model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False))
        inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **model_kwargs)
        if padding is not None:
            inputs["attention_mask"] = LeftPadding(padding.starts, padding.total + 1)
        return inputs
    inputs = {**previous, "input_ids": ids[:, -1:]}
    if (positions := previous.get("position_ids")) is not None:
        inputs["position_ids"] = positions + 1
    mask = previous.get("attention_mask")
    if isinstance(mask, LeftPadding):
        inputs["attention_mask"] = LeftPadding(mask.starts, mask.total + 1)
    elif mask is not None:
        inputs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
    return inputs


def _left_padding(model: nn.Module, model_kwargs: dict[str, Any]) -> LeftPadding | None:
    """The attention mask, read from the device; None if there is none, or if someone else has to see it as a tensor."""
    mask, text = model_kwargs.get("attention_mask"), getattr(model.model, "language_model", None)
    ways = ((model, LlavaOnevision1_5ForConditionalGeneration), (model.model, LlavaOnevision1_5Model))
    if text is None or SITES not in vars(text) or any(difference("", *way) or is_replaced(way[0]) for way in ways):
        return None
    heard = any(has_hooks(module) for module in (model, model.model, text))
    if heard or not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return None
    spans = spans_of(mask)
    if spans is None or any(end != mask.shape[1] for _, end in spans):
        return None
    return LeftPadding(tuple(start for start, _ in spans), mask.shape[1])


class _StopWatch:
    """Tells whether all sequences have ended: on a GPU late, and without waiting for the work that was queued since."""

    def __init__(self, device: torch.device) -> None:
        self.waits = device.type == "cuda"
        self.steps = 0
        self.asked: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def stopped(self, unfinished: torch.Tensor) -> bool:
        if not self.waits:
            return not bool(unfinished.any())
        self.steps += 1
        if self.steps % LAG:
            return False
        self.asked.append(self.ask(unfinished))
        return len(self.asked) > 1 and not self.answer(*self.asked.popleft())

    @staticmethod
    def ask(unfinished: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        flag = torch.empty((), dtype=torch.bool, pin_memory=True, device="cpu")
        flag.copy_(unfinished.any(), non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(unfinished.device))  # the current device may be another
        return flag, event

    @staticmethod
    def answer(flag: torch.Tensor, event: torch.cuda.Event) -> bool:
        event.synchronize()
        return bool(flag)


class _Randomness:
    """The random generator's states before the last draws: those for tokens beyond the end are to leave no trace."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type != "cpu"
        self.generator = torch.get_device_module(device).default_generators[device.index] if on_gpu else torch.default_generator
        self.states: deque[torch.Tensor] = deque(maxlen=2 * LAG)

    def note(self) -> None:
        """Before a draw. On a GPU the state is a seed and an offset, kept by the host."""
        self.states.append(self.generator.get_state())

    def rewind(self, draws: int) -> None:
        if self.states:
            self.generator.set_state(self.states[-draws])


def _tokens_needed(generated: torch.Tensor, eos_ids: torch.Tensor | None) -> int:
    """Up to the last sequence's end: those after it were computed before the host knew."""
    if eos_ids is None:
        return generated.shape[1]
    ended = torch.isin(generated, eos_ids).cumsum(-1) > 0
    return min(generated.shape[1], int((~ended).sum(-1).max()) + 1)
