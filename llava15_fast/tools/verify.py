"""`verify`: the patched model against eager and against higher precision, on a user's own weights and inputs, as numbers.

    every vision block, every text layer    on the input that it has in eager, so that one wrong block shows as one wrong row
    image features, logits of every step    through the whole model, the answer's tokens forced to be eager's
    the answer of `generate`                the first token that differs, and how sure eager was of its own there

The rule for a part is that of the kernels' tests (`llava15_kernels.testing`), for its largest error and for its relative one.

Token ids have to be eager's in float32. In 16 bit, where two attention implementations of transformers disagree as well,
another token is allowed only where eager's two best logits are closer than twice eager's own distance from the reference.

The reference is float32, for a float32 model float64. It takes no second model: one block at a time is brought to that
precision, so that beside the model there is one block, or the language head, in twice the bytes, and three times the logits of
the new tokens.
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

ORIGINAL = "the original ran"


@dataclass(frozen=True)
class Difference:
    """A token that is not eager's, -1 where the answer had ended: number `step` of the answer to number `prompt`.

    `margin` is that of eager's two best logits there, `distance` that of its logits from the reference's, and `allowed` says
    that eager was not sure itself.
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
    """What `verify` found; `ok` is the verdict and `print` shows it as tables.

    `parts` are every block, the image features and the logits. Tokens are in `forced` if they differ when those before are
    eager's, and in `generated` if they are the first that differ in an answer of `generate`; `tokens` were compared. `backend`
    says what ran per part of the patched model, `notes` what could not be compared, and why.
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
        """What is outside the rule; nothing if the model is verified."""
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
                f"{'eager was not sure' if found.allowed else 'NOT ALLOWED'}"
                for found in differences[:5]
            ]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"outside the rule: {failure}" for failure in self.failures[:8]]
        return Group(blocks, *lines, f"verdict: {'ok' if self.ok else 'BAD'}")

    __repr__ = as_text


def verify(
    model: nn.Module, inputs: Mapping[str, Tensor], *, max_new_tokens: int = 32, backend: Backend = "auto"
) -> Verification:
    """Compares the patched model with eager and with higher precision on `inputs`.

    Args:
        model: a `LlavaOnevision1_5ForConditionalGeneration` in evaluation mode, patched or not. Afterwards it is as before,
            also when this raises; only a patched model's report begins anew.
        inputs: what the processor gives: `input_ids`, `attention_mask`, pixels and grids.
        max_new_tokens: how many tokens to answer.
        backend: as for `patch`.

    Raises:
        TypeError: `model` holds no model that is known here, or none with a language head.
        ValueError: training mode, no `input_ids`, prompts padded on the right, or weights that are not in memory.
        PatchError, RuntimeError: as `patch`.
    """
    root = find_model(model)
    if not isinstance(root, LlavaOnevision1_5ForConditionalGeneration):
        raise TypeError(f"{type(root).__name__} has no language head: verify a LlavaOnevision1_5ForConditionalGeneration")
    if root.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    if inputs.get("input_ids") is None:
        raise ValueError("inputs hold no input_ids: verify takes what the processor gives")
    if any(parameter.is_meta for parameter in root.parameters()):
        raise ValueError("some weights are not in memory (offloaded, or on the meta device): load the model without offloading")
    inputs = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and key != "labels"}
    mask = inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    if not mask[:, -1].all():
        raise ValueError("a prompt ends with padding: prompts of a batch are padded on the left, as generate needs it")
    # `patched` puts back, in whatever way this ends, what was there before.
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
    parts.append(Comparison.of("logits", *cast, exact_logits[counted]))
    differences = partial(_differences, weight.dtype, (logits.double() - exact_logits.double()).abs().amax(-1))
    forced = tuple(differences(_margins(logits), ours_logits.argmax(-1), logits.argmax(-1), counted))
    generated = tuple(differences(margins, ours_answer, answer, (ours_answer != answer).cumsum(-1) == 1))
    fell_back = [part for part in ("visual.encode", "language_model") if ORIGINAL in ran.get(part, "")]
    notes = ["there is no image in the inputs: the vision tower was not compared"] * (features is None)
    notes += [f"{part} ran without the kernels, so its blocks were not compared one by one" for part in fell_back]
    return Verification(weight.dtype, ran, tuple(parts), forced, generated, int(counted.sum()), tuple(notes))


def _margins(logits: Tensor) -> Tensor:
    """(..., vocabulary) -> (...): how far the second best is from the best."""
    return logits.topk(2).values.diff(dim=-1).abs()[..., 0]


def _padded(ids: Tensor, eos: int | list[int] | None, length: int) -> Tensor:
    """(B, length), -1 behind the end of every answer."""
    ends = torch.isin(ids, torch.tensor([] if eos is None else eos, dtype=ids.dtype, device=ids.device)).long()
    return nn.functional.pad(ids.masked_fill(ends.cumsum(-1) > ends, -1), (0, length - ids.shape[1]), value=-1)


def _differences(
    dtype: torch.dtype, distances: Tensor, margins: Tensor, ours: Tensor, eager: Tensor, among: Tensor
) -> Iterator[Difference]:
    """Of token ids (B, steps), where `among` is true; `margins` and `distances` end with the longest answer of eager."""
    for prompt, step in ((ours != eager) & among).nonzero().tolist():
        at = prompt, min(step, margins.shape[1] - 1)
        tokens, margin, distance = (int(x[prompt, step]) for x in (ours, eager)), float(margins[at]), float(distances[at])
        yield Difference(prompt, step, *tokens, margin, distance, dtype != torch.float32 and margin < 2 * distance)


def _blocks(root: nn.Module, inputs: Inputs, backend: str, ran: dict[str, str]) -> list[Comparison]:
    """Every vision block and every text layer on its input in an eager forward of the prompt."""
    visual, language, attention_mask = root.model.visual, root.model.language_model, inputs["attention_mask"]
    reference, found = _reference_dtype(language.norm.weight.dtype), []

    def block_results(index: int, block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> list[Tensor]:
        x, layout, *others = args
        alone = SimpleNamespace(blocks=[block], rotary_pos_emb=visual.rotary_pos_emb, class_pos_emb=visual.class_pos_emb)
        ours = vision.run_blocks(alone, x, layout.position_ids, layout.cu_seqlens, layout.max_seqlen, backend)
        with _cast(reference, block):
            return [ours, output, block.forward(x.to(reference), layout, *others, **kwargs)]

    def layer_results(index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> list[Tensor]:
        """Together with the norm that follows the layer, as the kernels take them."""
        x, positions, mask = args[0], kwargs["position_ids"], kwargs.get("attention_mask")
        norm = [*(following.input_layernorm for following in language.layers[1:]), language.norm][index]
        alone = SimpleNamespace(layers=[layer], norm=norm, rotary_emb=language.rotary_emb, config=language.config)
        tokens = Spans(Padding.read(attention_mask).spans, 0, x.shape[1])
        layout = prompt_layout(tokens, positions.expand(len(x), -1).reshape(1, -1), None)
        ours, wide = text.run_layers(alone, x, layout, None, backend), x.to(reference)
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
            for index, module in enumerate(modules if ORIGINAL not in ran.get(part, ORIGINAL) else ()):
                hook = partial(compare, results, path, index)
                hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        root(**inputs, position_ids=_positions(attention_mask), use_cache=False, logits_to_keep=1)
    return found


def _image_features(root: nn.Module, inputs: Inputs) -> Tensor | None:
    """(tokens, text width) of all images and videos; None without any."""
    features = []
    for pixels, grids in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
        if inputs.get(pixels) is not None:
            features += root.model.get_image_features(inputs[pixels], inputs[grids]).pooler_output
    return torch.cat(features) if features else None


def _forced_logits(root: nn.Module, inputs: Inputs, ids: Tensor) -> Tensor:
    """(B, steps, vocabulary), token by token over a cache, with `ids` (B, steps) as the tokens before."""
    given, mask, logits = inputs, inputs["attention_mask"], []
    for token in ids.split(1, dim=1):
        positions = _positions(mask)[:, -given["input_ids"].shape[1] :]
        output = root(**{**given, "attention_mask": mask}, position_ids=positions, use_cache=True, logits_to_keep=1)
        logits.append(output.logits[:, -1].float())
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        given = {"input_ids": token, "past_key_values": getattr(output, CACHE)}
    return torch.stack(logits, dim=1)


def _logits_at_once(root: nn.Module, inputs: Inputs, ids: Tensor) -> Tensor:
    """What `_forced_logits` gives, by one forward over prompt and answer."""
    answer = ids[:, :-1]
    more = {"input_ids": answer, "attention_mask": torch.ones_like(answer), "mm_token_type_ids": torch.zeros_like(answer)}
    whole = inputs | {name: torch.cat([inputs[name], x], dim=1) for name, x in more.items() if name in inputs}
    positions = _positions(whole["attention_mask"])
    return root(**whole, position_ids=positions, use_cache=False, logits_to_keep=ids.shape[1]).logits


def _positions(mask: Tensor) -> Tensor:
    """As `generate` counts them: from the first token that is not padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


@contextlib.contextmanager
def _meanwhile(name: str, values: Iterable[tuple[Any, Any]]) -> Iterator[None]:
    """The attribute `name` of every owner has another value."""
    with contextlib.ExitStack() as stack:
        for owner, value in values:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


def _cast(dtype: torch.dtype, *modules: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The modules' parameters have another dtype."""
    parameters = [parameter for parameter in nn.ModuleList(modules).parameters() if parameter.is_floating_point()]
    return _meanwhile("data", ((parameter, parameter.data.to(dtype)) for parameter in parameters))


@contextlib.contextmanager
def _in_precision(root: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The whole model computes in `dtype`: each block is cast when it is called, and back when it has run."""
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
    """float32 products are computed in float32; convolutions on a GPU are not, by default."""
    backends = torch.backends
    # By these: the older settings raise as soon as someone has used these.
    settings = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
    return _meanwhile("fp32_precision", [(setting, "ieee") for setting in settings])


def _attention_that_computes_in_any_dtype(root: nn.Module) -> contextlib.AbstractContextManager[None]:
    """FlashAttention has no float32: "sdpa" stands for it in eager and in the reference."""
    configs = [module.config for module in (root.model.visual, root.model.language_model)]
    others = [(config, "sdpa") for config in configs if config._attn_implementation not in ("eager", "sdpa")]
    return _meanwhile("_attn_implementation", others)


def _reference_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else torch.float32


def _ran(report: Report, sees: bool) -> dict[str, str]:
    """Per part what ran, as the report says; vision only where there was something to see."""
    rows = [row for row in report.rows if sees or not row.path.startswith("visual")]
    calls = {row.path: [*row.ran, *(f"{ORIGINAL}: {reason}" for reason in row.fallbacks)] for row in rows}
    return {path: "; ".join(how) or "not called" for path, how in calls.items()}
