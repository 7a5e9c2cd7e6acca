"""`verify`: compares the patched model with eager and a higher-precision reference, on the user's weights and inputs.

    every vision block and text layer       given its input in eager, so that one wrong block shows as one wrong row
    image features, logits of every step    through the whole model, teacher-forced with eager's tokens
    the answer of `generate`                the first token that differs, and eager's margin there

Each part is held to the error rule of the kernels' tests (`llava15_kernels.testing`), in its maximum and its relative error.

In float32, token ids must equal eager's. In 16 bit, where transformers' attention implementations disagree with each other as
well, a token may differ only if the margin between eager's top two logits is below twice eager's distance from the reference.

The reference is float32, or float64 for a float32 model. It needs no second model: one block at a time is cast, so that the
extra memory is one block, or the language modeling head, in twice the bytes, and three times the logits of the new tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Group
from rich.table import Column, Table
from torch import Tensor, nn

from llava15_kernels._dispatch import Backend, default_backend
from llava15_kernels.testing import Comparison

from ..fast import text, vision
from ..fast.layout import Padding, Spans, prompt_layout
from ..model.modeling import LlavaOnevision1_5ForConditionalGeneration
from ..model.releases import CACHE
from ..patching.api import patch, patched, unpatch
from ..patching.report import Report, as_text
from ..patching.targets import find_model

Inputs = dict[str, Tensor]

FALLBACK = "fallback"


@dataclass(frozen=True)
class Difference:
    """A token that differs from eager's, at `step` of the answer to `prompt`; -1 stands for the end of the answer.

    `margin` is between eager's top two logits, `distance` between eager's logits and the reference's; `allowed` means that the
    margin is too small to decide.
    """

    prompt: int
    step: int
    ours: int
    eager: int
    margin: float
    distance: float
    allowed: bool


@dataclass(frozen=True, repr=False)
class Verification:
    """The result of `verify`; `ok` is the verdict and `print` shows tables.

    `parts` are every block, the image features and the logits. `forced` has tokens that differ under teacher forcing,
    `generated` the first differing token of each answer of `generate`, out of `tokens` compared. `backend` tells what ran for
    each part of the patched model, `notes` what could not be compared, and why.
    """

    dtype: torch.dtype
    backend: dict[str, str]
    parts: tuple[Comparison, ...]
    forced: tuple[Difference, ...]
    generated: tuple[Difference, ...]
    tokens: int
    notes: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[str, ...]:
        """Violations of the rules; empty if the model is verified."""
        parts = [f"{part.name} is off by {part.ours:.2e}, expected {part.bound:.2e}" for part in self.parts if not part.ok]
        tokens = [
            f"token {found.step} of prompt {found.prompt} is {found.ours}, expected {found.eager} ({how})"
            for how, differences in (("teacher-forced", self.forced), ("generate", self.generated))
            for found in differences
            if not found.allowed
        ]
        return (*parts, *tokens)

    @property
    def ok(self) -> bool:
        return not self.failures

    def __rich__(self) -> Group:
        dtype, reference = (str(x).removeprefix("torch.") for x in (self.dtype, _reference_dtype(self.dtype)))
        headings = ("patched", "eager", "allowed", "patched, relative", "eager, relative", "")
        columns = Column("part", overflow="fold"), *(Column(heading, justify="right") for heading in headings)
        blocks = Table(*columns, title=f"errors against {reference}, {dtype} model")
        for part in self.parts:
            numbers = (part.ours, part.eager, part.bound, part.ours_relative, part.eager_relative)
            blocks.add_row(part.name, *(f"{number:.1e}" for number in numbers), "ok" if part.ok else "[red]BAD[/red]")
        lines = [f"{part}: {what}" for part, what in self.backend.items()]
        for how, differences in (("teacher-forced on eager's", self.forced), ("generate", self.generated)):
            lines.append(f"tokens, {how}: {self.tokens} compared, {len(differences) or 'none'} differ")
            lines += [
                f"  prompt {found.prompt}, token {found.step}: {found.ours} for {found.eager}; eager's margin "
                f"{found.margin:.2e}, its distance from {reference} {found.distance:.2e}: "
                f"{'near-tie' if found.allowed else 'NOT ALLOWED'}"
                for found in differences[:5]
            ]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"failure: {failure}" for failure in self.failures[:8]]
        return Group(blocks, *lines, f"verdict: {'ok' if self.ok else 'BAD'}")

    __repr__ = as_text


def verify(
    model: nn.Module, inputs: Mapping[str, Tensor], *, max_new_tokens: int = 32, backend: Backend = "auto"
) -> Verification:
    """Compares the patched model with eager and a higher-precision reference on `inputs`.

    Args:
        model: a `LlavaOnevision1_5ForConditionalGeneration` in evaluation mode, patched or not. It is restored afterwards, even
            if this raises, except that a patched model's report starts over.
        inputs: the processor's output: `input_ids`, `attention_mask`, pixels and grids.
        max_new_tokens: maximum length of the answer.
        backend: as for `patch`.

    Raises:
        TypeError: `model` contains no supported model, or one without a language modeling head.
        ValueError: training mode, no `input_ids`, prompts padded on the right, or weights that are not in memory.
        PatchError, RuntimeError: as `patch`.
    """
    root = find_model(model)
    if not isinstance(root, LlavaOnevision1_5ForConditionalGeneration):
        raise TypeError(f"{type(root).__name__} has no language head: verify a LlavaOnevision1_5ForConditionalGeneration")
    if root.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    if inputs.get("input_ids") is None:
        raise ValueError("inputs has no input_ids: pass the processor's output")
    if any(parameter.is_meta for parameter in root.parameters()):
        raise ValueError("some weights are not in memory (offloaded, or on the meta device): load the model without offloading")
    inputs = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and key != "labels"}
    mask = inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    if not mask[:, -1].all():
        raise ValueError("a prompt ends with padding: prompts of a batch are padded on the left, as generate needs it")
    # `patched` restores the previous state, however this ends.
    with torch.no_grad(), exact_float32(), _attention_that_computes_in_any_dtype(root), patched(model, backend):
        return _verify(model, root, inputs, max_new_tokens, backend)


def _verify(model: nn.Module, root: nn.Module, inputs: Inputs, max_new_tokens: int, backend: Backend) -> Verification:
    weight, start = root.model.language_model.norm.weight, inputs["input_ids"].shape[1]
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}

    unpatch(model)
    kept = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    output = root.generate(**inputs, **options, **kept)
    ids, logits = output.sequences[:, start:], torch.stack(output.logits, dim=1)
    margins = _margins(torch.stack(output.scores, dim=1))
    del output
    features = _image_features(root, inputs)

    handle = patch(model, backend)
    ours_features, ours_logits = _image_features(root, inputs), _forced_logits(root, inputs, ids)
    ours_ids = root.generate(**inputs, **options)[:, start:]
    ran = _ran(handle.report(), features is not None)

    unpatch(model)
    with _in_precision(root, _reference_dtype(weight.dtype)):
        exact_features, exact_logits = _image_features(root, inputs), _logits_at_once(root, inputs, ids)

    parts = _blocks(root, inputs, default_backend(weight.device) if backend == "auto" else backend, ran)
    if features is not None:
        parts.append(Comparison.of("image features", ours_features, features, exact_features))
    answer, ours_answer = (_padded(x, root.generation_config.eos_token_id, max_new_tokens) for x in (ids, ours_ids))
    counted = answer[:, : ids.shape[1]] >= 0
    cast = [x[counted].to(weight.dtype) for x in (ours_logits, logits)]
    parts.append(Comparison.of("logits", *cast, exact_logits[counted]))  # type: ignore[call-arg]
    differences = partial(_differences, weight.dtype, (logits.double() - exact_logits.double()).abs().amax(-1))
    forced = tuple(differences(_margins(logits), ours_logits.argmax(-1), logits.argmax(-1), counted))
    generated = tuple(differences(margins, ours_answer, answer, (ours_answer != answer).cumsum(-1) == 1))
    fell_back = [part for part in ("visual.encode", "language_model") if FALLBACK in ran.get(part, "")]
    notes = ["there is no image in the inputs: the vision tower was not compared"] * (features is None)
    notes += [f"{part} ran without the kernels, so its blocks were not compared one by one" for part in fell_back]
    return Verification(weight.dtype, ran, tuple(parts), forced, generated, int(counted.sum()), tuple(notes))


def _margins(logits: Tensor) -> Tensor:
    """(..., vocabulary) -> (...): the difference of the top two logits."""
    return logits.topk(2).values.diff(dim=-1).abs()[..., 0]


def _padded(ids: Tensor, eos: int | list[int] | None, length: int) -> Tensor:
    """(B, length), -1 after the end of an answer."""
    ends = torch.isin(ids, torch.tensor([] if eos is None else eos, dtype=ids.dtype, device=ids.device)).long()
    return nn.functional.pad(ids.masked_fill(ends.cumsum(-1) > ends, -1), (0, length - ids.shape[1]), value=-1)


def _differences(
    dtype: torch.dtype, distances: Tensor, margins: Tensor, ours: Tensor, eager: Tensor, among: Tensor
) -> Iterator[Difference]:
    """For token ids (B, steps), where `among` is true; `margins` and `distances` end with eager's longest answer."""
    for prompt, step in ((ours != eager) & among).nonzero().tolist():
        at = prompt, min(step, margins.shape[1] - 1)
        tokens, margin, distance = (int(x[prompt, step]) for x in (ours, eager)), float(margins[at]), float(distances[at])
        yield Difference(prompt, step, *tokens, margin, distance, dtype != torch.float32 and margin < 2 * distance)  # type: ignore[call-arg]


def _blocks(root: nn.Module, inputs: Inputs, backend: str, ran: dict[str, str]) -> list[Comparison]:
    """Every vision block and text layer, given its input in an eager forward of the prompt."""
    visual, language, attention_mask = root.model.visual, root.model.language_model, inputs["attention_mask"]
    reference, found = _reference_dtype(language.norm.weight.dtype), []

    def block_results(index: int, block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> list[Tensor]:
        x, layout, *others = args
        alone = SimpleNamespace(blocks=[block], rotary_pos_emb=visual.rotary_pos_emb, class_pos_emb=visual.class_pos_emb)
        ours = vision.run_blocks(alone, x, layout.position_ids, layout.cu_seqlens, layout.max_seqlen, backend)
        with _cast(reference, block):
            return [ours, output, block.forward(x.to(reference), layout, *others, **kwargs)]

    def layer_results(index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> list[Tensor]:
        """Includes the norm after the layer, which the kernels fuse with the residual addition."""
        x, positions, mask = args[0], kwargs["position_ids"], kwargs.get("attention_mask")
        norm = [*(following.input_layernorm for following in language.layers[1:]), language.norm][index]
        alone = SimpleNamespace(layers=[layer], norm=norm, rotary_emb=language.rotary_emb, config=language.config)
        tokens = Spans(Padding.read(attention_mask).spans, 0, x.shape[1])
        layout = prompt_layout(tokens, positions.expand(len(x), -1).reshape(1, -1), None)
        ours, wide = text.run_layers(alone, x, layout, None, backend, plain=False), x.to(reference)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(reference)
        wider = {**kwargs, "attention_mask": mask, "position_embeddings": language.rotary_emb(wide, positions)}
        eager = norm.forward(output)
        with _cast(reference, layer, norm):
            exact = norm.forward(layer.forward(wide, **wider))
        return [result[attention_mask.bool()] for result in (ours, eager, exact)]

    def compare(results: Callable[..., list[Tensor]], path: str, index: int, *call: Any) -> None:
        found.append(Comparison.of(f"{path}.{index}", *results(index, *call)))

    with contextlib.ExitStack() as hooks:
        for part, path, modules, results in (
            ("visual.encode", "visual.blocks", visual.blocks, block_results),
            ("language_model", "language_model.layers", language.layers, layer_results),
        ):
            for index, module in enumerate(modules if FALLBACK not in ran.get(part, FALLBACK) else ()):
                hook = partial(compare, results, path, index)
                hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        root(**inputs, position_ids=_positions(attention_mask), use_cache=False, logits_to_keep=1)
    return found


def _image_features(root: nn.Module, inputs: Inputs) -> Tensor | None:
    """(tokens, text width) of all images and videos; None if there are none."""
    features = []
    for pixels, grids in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
        if inputs.get(pixels) is not None:
            features += root.model.get_image_features(inputs[pixels], inputs[grids]).pooler_output
    return torch.cat(features) if features else None


def _forced_logits(root: nn.Module, inputs: Inputs, ids: Tensor) -> Tensor:
    """(B, steps, vocabulary), teacher-forced with `ids` (B, steps), one decode step at a time."""
    given, mask, logits = inputs, inputs["attention_mask"], []
    for token in ids.split(1, dim=1):
        positions = _positions(mask)[:, -given["input_ids"].shape[1] :]
        output = root(**{**given, "attention_mask": mask}, position_ids=positions, use_cache=True, logits_to_keep=1)
        logits.append(output.logits[:, -1].float())
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        given = {"input_ids": token, "past_key_values": getattr(output, CACHE)}
    return torch.stack(logits, dim=1)


def _logits_at_once(root: nn.Module, inputs: Inputs, ids: Tensor) -> Tensor:
    """The same as `_forced_logits`, in one forward over prompt and answer."""
    answer = ids[:, :-1]
    more = {"input_ids": answer, "attention_mask": torch.ones_like(answer), "mm_token_type_ids": torch.zeros_like(answer)}
    whole = inputs | {name: torch.cat([inputs[name], x], dim=1) for name, x in more.items() if name in inputs}
    positions = _positions(whole["attention_mask"])
    return root(**whole, position_ids=positions, use_cache=False, logits_to_keep=ids.shape[1]).logits


def _positions(mask: Tensor) -> Tensor:
    """Positions as in `generate`: counted from the first non-padding token."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


@contextlib.contextmanager
def _meanwhile(name: str, values: Iterable[tuple[Any, Any]]) -> Iterator[None]:
    """Temporarily sets the attribute `name` of every owner."""
    with contextlib.ExitStack() as stack:
        for owner, value in values:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


def _cast(dtype: torch.dtype, *modules: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Temporarily casts the modules' parameters."""
    parameters = [parameter for parameter in nn.ModuleList(modules).parameters() if parameter.is_floating_point()]
    return _meanwhile("data", ((parameter, parameter.data.to(dtype)) for parameter in parameters))


@contextlib.contextmanager
def _in_precision(root: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Makes the whole model compute in `dtype`: each block is cast for the duration of its call."""
    visual, language = root.model.visual, root.model.language_model
    blocks = [visual.patch_embed, visual.pre_layernorm, *visual.blocks, visual.merger]
    with contextlib.ExitStack() as hooks, contextlib.ExitStack() as running:
        for block in (*blocks, *language.layers, language.norm, root.lm_head):
            hooks.enter_context(block.register_forward_pre_hook(lambda module, _: running.enter_context(_cast(dtype, module))))
            hooks.enter_context(block.register_forward_hook(lambda *_: running.close()))
        # Exact, and without a copy of the table.
        embedding = root.get_input_embeddings()
        hooks.enter_context(embedding.register_forward_hook(lambda module, args, output: output.to(dtype)))
        yield


def exact_float32() -> contextlib.AbstractContextManager[None]:
    """Disables TF32, which is the default for convolutions on a GPU."""
    backends: Any = torch.backends
    # The newer settings: torch refuses the older ones once these were used.
    settings = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
    return _meanwhile("fp32_precision", [(setting, "ieee") for setting in settings])


def _attention_that_computes_in_any_dtype(root: nn.Module) -> contextlib.AbstractContextManager[None]:
    """FlashAttention does not support float32: "sdpa" replaces it in eager and in the reference."""
    configs = [module.config for module in (root.model.visual, root.model.language_model)]
    others = [(config, "sdpa") for config in configs if config._attn_implementation not in ("eager", "sdpa")]
    return _meanwhile("_attn_implementation", others)


def _reference_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else torch.float32


def _ran(report: Report, sees: bool) -> dict[str, str]:
    """What ran for each part according to the report; vision only if there were images."""
    rows = [row for row in report.rows if sees or not row.path.startswith("visual")]
    calls = {row.path: [*row.ran, *(f"{FALLBACK}: {reason}" for reason in row.fallbacks)] for row in rows}
    return {path: "; ".join(how) or "not called" for path, how in calls.items()}
