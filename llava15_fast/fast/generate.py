"""`generate` on a patched model: greedy search and sampling run in our own decoding loop.

transformers prepares the request and calls `_sample`, which is ours; its own loops do everything else: beams, assistants,
streamers, custom criteria and processors. The loops differ in when the host synchronizes with the device:

    transformers    after every token, to see whether it was the last
    here            polls EOS asynchronously every `limits.EOS_POLL` tokens, and discards surplus tokens

so that the device never idles. On a CPU every token is checked and none is surplus. The state of the random generator after
sampling that ended early is unspecified: surplus tokens may have been drawn.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode, logits_process
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from ..model.modeling import LlavaOnevision1_5ForConditionalGeneration, LlavaOnevision1_5Model
from ..model.releases import CACHE
from . import limits, text
from .guards import methods_guard, original, roots_guard, stands_for
from .request import Request, as_request, current, opened
from .runtime import FastModule, runtime_of

METHOD = "generate"

STEP_INPUTS = frozenset(("input_ids", "attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep"))

Output: TypeAlias = torch.Tensor | GenerateDecoderOnlyOutput

_PURE = """
    EpsilonLogitsWarper EtaLogitsWarper ExponentialDecayLengthPenalty ForcedBOSTokenLogitsProcessor
    ForcedEOSTokenLogitsProcessor InfNanRemoveLogitsProcessor LogitNormalization MinLengthLogitsProcessor
    MinNewTokensLengthLogitsProcessor MinPLogitsWarper NoBadWordsLogitsProcessor NoRepeatNGramLogitsProcessor
    RepetitionPenaltyLogitsProcessor SequenceBiasLogitsProcessor SuppressTokensAtBeginLogitsProcessor
    SuppressTokensLogitsProcessor TemperatureLogitsWarper TopKLogitsWarper TopPLogitsWarper TypicalLogitsWarper
"""
PURE_PROCESSORS = frozenset(getattr(logits_process, name) for name in _PURE.split())
"""Stateless processors: a call for a surplus token has no effect."""


@stands_for(LlavaOnevision1_5Model)
class FastModel(FastModule, LlavaOnevision1_5Model):
    forward = as_request(LlavaOnevision1_5Model)


@stands_for(LlavaOnevision1_5ForConditionalGeneration)
class FastForConditionalGeneration(FastModule, LlavaOnevision1_5ForConditionalGeneration):
    forward = as_request(LlavaOnevision1_5ForConditionalGeneration)

    @functools.wraps(LlavaOnevision1_5ForConditionalGeneration.generate)
    def generate(self, *args: Any, custom_generate: Any = None, **kwargs: Any) -> Any:
        method, runtime = original(FastForConditionalGeneration, self, "generate"), runtime_of(self)
        run = functools.partial(method, self, *args, custom_generate=custom_generate, **kwargs)
        if runtime is None or torch.compiler.is_compiling():
            return run()
        if custom_generate is not None:
            runtime.record.fall_back(METHOD, "custom_generate is given")
            return run()
        if methods_guard(self) or roots_guard(self):
            return run()
        with opened(Request(self, is_generate=True)) as request:
            output = run()
        if not request.loop_began:
            runtime.record.fall_back(METHOD, "neither greedy search nor sampling")
        return output

    @functools.wraps(LlavaOnevision1_5ForConditionalGeneration._prefill)
    def _prefill(self, input_ids: Any, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
        if (request := current(self)) is not None and request.is_generate:
            request.read(model_kwargs.get("attention_mask"))
        prefill = original(FastForConditionalGeneration, self, "_prefill")
        return prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _sample(
        self, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: GenerationConfig,
        synced_gpus: bool = False, streamer: Any = None, **model_kwargs: Any,
    ) -> Output:  # fmt: skip
        """Arguments and results are those of transformers' method."""
        if (request := current(self)) is not None:
            request.loop_began = True
        asked = Asked(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        reason = "a streamer is given" if streamer is not None else None
        reason = reason or ("synced_gpus is on" if synced_gpus else None)
        if request is None or not request.is_generate:  # otherwise checked when it began
            reason = reason or methods_guard(self)
        reason, runtime = reason or asked.guard(), runtime_of(self)
        if runtime is not None and reason is None:
            runtime.record.run(METHOD, runtime.backend_on(input_ids.device))
            return decode(self, asked)
        if runtime is not None:
            runtime.record.fall_back(METHOD, reason)
        sample = original(FastForConditionalGeneration, self, "_sample")
        settings = logits_processor, stopping_criteria, generation_config, synced_gpus, streamer
        return sample(self, input_ids, *settings, **model_kwargs)


@dataclass
class Asked:
    """The arguments of transformers' decoding loops, with the ids (B, L) of the prompts."""

    input_ids: torch.Tensor
    processors: logits_process.LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    model_kwargs: dict[str, Any]

    def guard(self) -> str | None:
        """The reason for a fallback to transformers' loop, or None."""
        mode, cache = self.config.get_generation_mode(), self.model_kwargs.get(CACHE)
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            return f"the mode is {mode}"
        if self.input_ids.ndim != 2:
            return "the ids are not one row per prompt"
        for processor in self.processors:
            if type(processor) not in PURE_PROCESSORS:
                return f"the logits processor {type(processor).__name__} may be stateful"
        for criterion in self.criteria:
            if type(criterion) not in (EosTokenCriteria, MaxLengthCriteria):
                return f"the stopping criterion {type(criterion).__name__} needs every token"
        if self.criteria.max_length is None:
            return "no maximum length is set"
        if self.config.output_attentions or self.config.output_hidden_states:
            return "attentions or hidden states are requested"
        if not self.model_kwargs.get("use_cache"):
            return "use_cache is off"
        if cache is not None and (cache.is_compileable or not cache.is_croppable):
            return f"the cache is a {type(cache).__name__} that does not support crop"
        return None


def decode(model: FastForConditionalGeneration, asked: Asked) -> Output:
    """The decoding loop."""
    answer, kwargs, config = Answer(asked), asked.model_kwargs, asked.config
    inputs = Inputs(model, kwargs)
    # An assistant model is called repeatedly and continues its cache.
    outputs = model._prefill(asked.input_ids, config, kwargs, is_first_iteration=not config.is_assistant)  # type: ignore[call-arg]
    while not answer.append(answer.choose(outputs.logits[:, -1])):
        step = inputs.next(answer.ids, outputs)
        del outputs
        outputs = _next_token(model, step) or model(**step, return_dict=True)
    cache = kwargs.get(CACHE, getattr(outputs, CACHE))
    if (surplus := answer.cut()) and cache is not None:
        cache.crop(-surplus)
    return answer.result(cache)


def _next_token(model: FastForConditionalGeneration, inputs: dict[str, Any]) -> SimpleNamespace | None:
    """A decode step that bypasses the forwards above the layers, which the guards have checked; None if the model itself must
    be called."""
    cache, runtime, language = inputs.get(CACHE), runtime_of(model), model.model.language_model
    request = current(model, cache)
    if request is None or runtime is None or any(inputs[name] is not None for name in inputs.keys() - STEP_INPUTS):
        return None
    call = text.TextCall(inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids"), cache, None, True, {})
    if (step := text.next_step(language, request, call)) is None:
        return None
    logits = model.lm_head(text.execute(language, runtime, call, step))
    return SimpleNamespace(logits=logits, **{CACHE: cache})


class Answer:
    """The generated tokens of all prompts."""

    def __init__(self, asked: Asked) -> None:
        input_ids, config, criteria = asked.input_ids, asked.config, asked.criteria
        self.device, self.processors, self.config = input_ids.device, asked.processors, config
        batch, self.prompt_length = input_ids.shape
        self.length = self.prompt_length
        lengths = [criterion.max_length for criterion in criteria if isinstance(criterion, MaxLengthCriteria)]
        self.max_length = math.ceil(min(lengths))  # transformers takes fractions too
        room = max(min(self.max_length, self.length + limits.ID_BUFFER), self.length + 1)
        # The dtype of transformers' concatenation with new tokens.
        self.buffer = input_ids.new_empty(batch, room, dtype=torch.promote_types(input_ids.dtype, torch.long))
        self.buffer[:, : self.length] = input_ids
        eos_ids = [criterion.eos_token_id for criterion in criteria if isinstance(criterion, EosTokenCriteria)]
        self.eos_ids = torch.cat([ids.to(self.device) for ids in eos_ids]) if eos_ids else None
        pad_id = config._pad_token_tensor
        self.pad_id = None if pad_id is None else pad_id.to(self.device)
        self.unfinished = torch.ones(batch, dtype=torch.bool, device=self.device)
        self.watch = _StopWatch(self.device)
        kept = config.return_dict_in_generate
        self.scores: list[torch.Tensor] | None = [] if kept and config.output_scores else None
        self.logits: list[torch.Tensor] | None = [] if kept and config.output_logits else None

    @property
    def ids(self) -> torch.Tensor:
        """(B, length), prompts included."""
        return self.buffer[:, : self.length]

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, vocabulary) -> (B,)."""
        if self.processors or self.config.do_sample or self.scores is not None or self.logits is not None:
            logits = logits.to(copy=True, dtype=torch.float32, device=self.device)
        scores = self.processors(self.ids, logits)
        if self.scores is not None:
            self.scores.append(scores)
        if self.logits is not None:
            self.logits.append(logits)
        return (draw(scores.softmax(-1)) if self.config.do_sample else scores.argmax(-1)).to(self.device)

    def append(self, tokens: torch.Tensor) -> bool:
        """Returns whether all sequences have ended, as far as the host knows."""
        if self.eos_ids is not None:
            tokens = torch.where(self.unfinished, tokens, self.pad_id)
            # Not `isin`, which sorts if there are many ids, and synchronizes.
            self.unfinished = self.unfinished & (tokens[:, None] != self.eos_ids).all(-1)
        if self.length == self.buffer.shape[1]:
            self.buffer = torch.cat([self.buffer, torch.empty_like(self.buffer)], dim=1)
        self.buffer[:, self.length] = tokens
        self.length += 1
        return self.length >= self.max_length or (self.eos_ids is not None and self.watch.stopped(self.unfinished))

    def cut(self) -> int:
        """Discards surplus tokens and returns their number."""
        needed = self.prompt_length + _tokens_needed(self.ids[:, self.prompt_length :], self.eos_ids)
        surplus, self.length = self.length - needed, needed
        return surplus

    def result(self, cache: Any) -> Output:
        sequences, needed = self.ids.clone(), self.length - self.prompt_length
        if not self.config.return_dict_in_generate:
            return sequences
        scores, logits = (None if kept is None else tuple(kept[:needed]) for kept in (self.scores, self.logits))
        return GenerateDecoderOnlyOutput(sequences=sequences, scores=scores, logits=logits, **{CACHE: cache})


class Inputs:
    """The arguments of the next forward: prepared by transformers for the first decode step, then advanced token by token."""

    def __init__(self, model: FastForConditionalGeneration, model_kwargs: dict[str, Any]) -> None:
        self.model, self.model_kwargs = model, model_kwargs
        self.previous: dict[str, Any] | None = None
        self.mask: torch.Tensor | None = None

    def next(self, ids: torch.Tensor, outputs: Any) -> dict[str, Any]:
        if self.previous is None:
            kwargs = self.model_kwargs
            kwargs.update(self.model._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=False))
            self.previous = self.model.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs)
            return self.previous
        inputs = {**self.previous, "input_ids": ids[:, -1:]}
        if (positions := inputs.get("position_ids")) is not None:
            inputs["position_ids"] = positions + 1
        if (mask := inputs.get("attention_mask")) is not None:
            inputs["attention_mask"] = self._longer(mask)
        self.previous = inputs
        return inputs

    def _longer(self, mask: torch.Tensor) -> torch.Tensor:
        """The mask with one more token: a view of a preallocated mask."""
        tokens = mask.shape[1]
        if self.mask is None or tokens == self.mask.shape[1]:
            self.mask = torch.cat([mask, mask.new_ones(len(mask), limits.ID_BUFFER)], dim=1)
        return self.mask[:, : tokens + 1]


def draw(probabilities: torch.Tensor) -> torch.Tensor:
    """(B, vocabulary) -> (B,): exponential-race sampling, with the same random stream as `torch.multinomial`, whose checks
    synchronize with the device in older releases.

    Raises:
        RuntimeError: a probability is NaN; on a GPU as an asynchronous assertion.
    """
    torch._assert_async((probabilities.sum(-1) > 0).all(), "probabilities are not numbers, or all are 0")
    return (probabilities / torch.empty_like(probabilities).exponential_(1.0)).argmax(-1)


class _StopWatch:
    """Tells whether all sequences have ended: on a GPU with a delay, without waiting for work queued since."""

    def __init__(self, device: torch.device) -> None:
        self.waits = device.type == "cuda"
        self.steps = 0
        self.asked: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def stopped(self, unfinished: torch.Tensor) -> bool:
        if not self.waits:
            return not bool(unfinished.any())
        self.steps += 1
        if self.steps % limits.EOS_POLL:
            return False
        self.asked.append(self.ask(unfinished))
        if len(self.asked) == 1:
            return False
        flag, event = self.asked.popleft()
        event.synchronize()
        return not bool(flag)

    @staticmethod
    def ask(unfinished: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        flag = torch.empty((), dtype=torch.bool, pin_memory=True, device="cpu")
        flag.copy_(unfinished.any(), non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(unfinished.device))  # not necessarily the current device
        return flag, event


def _tokens_needed(generated: torch.Tensor, eos_ids: torch.Tensor | None) -> int:
    """The number of tokens up to the end of the longest sequence."""
    if eos_ids is None:
        return generated.shape[1]
    ended = torch.isin(generated, eos_ids).cumsum(-1) > 0
    return min(generated.shape[1], int((~ended).sum(-1).max()) + 1)
