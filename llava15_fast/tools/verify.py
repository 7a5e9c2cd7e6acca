"""`verify`: the patched model against eager and against higher precision, on a user's own weights and inputs, as numbers.

    every vision block, every text layer    on the input that it has in eager, so that one wrong block shows as one wrong row
    image features, logits of every step    through the whole model, the answer's tokens forced to be eager's
    the answer of `generate`                the first token that differs, and how sure eager was of its own there

The rule for a part is that of the kernels' tests, for its largest error and for its relative one (ratio of norms):

    16 bit     ours <= 2 eager's + what two roundings to that dtype cost
    float32    ours / largest value <= max(1e-5, 2 eager's / largest value)

Token ids have to be eager's in float32. In 16 bit, where two attention implementations of transformers disagree as well,
another token is allowed only where eager's two best logits are closer than twice eager's own distance from the reference.

The reference is float32, for a float32 model float64. It takes no second model: one block at a time is brought to that
precision, so that beside the model there is one block, or the language head, in twice the bytes, and three times the logits of
the new tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import nn

from llava15_kernels._dispatch import Backend, default_backend
from llava15_kernels.testing import worst

from ..fast import text, vision
from ..fast.layout import Padding, Spans, prompt_layout
from ..model.modeling import LlavaOnevision1_5ForConditionalGeneration
from ..model.releases import CACHE
from ..patching.api import patch, patched, unpatch
from ..patching.report import Report, as_text
from ..patching.targets import find_model

Part = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """One part of the model against the reference: the largest absolute error and the relative one, ours beside eager's.

    Attributes:
        name: path of the block, or what is compared.
        ours, eager, bound: largest absolute errors, and what the rule allows.
        ours_relative, eager_relative, relative_bound: norm of the error by norm of the reference, and what the rule allows.
        where: coordinate of our largest error.
        shape: of what is compared.
    """

    name: str
    ours: float
    eager: float
    bound: float
    ours_relative: float
    eager_relative: float
    relative_bound: float
    where: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def ok(self) -> bool:
        """Within the rule; never where eager itself is not finite, for that tells nothing."""
        finite = self.eager < torch.inf and self.eager_relative < torch.inf
        return finite and self.ours <= self.bound and self.ours_relative <= self.relative_bound

    @classmethod
    def of(cls, name: str, ours: torch.Tensor, eager: torch.Tensor, reference: torch.Tensor) -> Comparison:
        dtype, reference = eager.dtype, reference.double()
        (error, where), (eager_error, _) = worst(ours, reference), worst(eager, reference)
        size = float(torch.linalg.vector_norm(reference)) or 1.0
        relative, eager_relative = (
            float(torch.linalg.vector_norm(x.double() - reference)) / size if worst(x, reference)[0] < torch.inf else torch.inf
            for x in (ours, eager)
        )
        if dtype == torch.float32:
            scale = float(reference.abs().max()) or 1.0
            bound, relative_bound = max(1e-5 * scale, 2 * eager_error), max(1e-5, 2 * eager_relative)
        else:
            rounded = reference.to(dtype)
            bound = 2 * eager_error + 2 * worst(rounded + 0.3 - 0.3, rounded)[0]
            # Adding 0.3 and taking it away is two roundings near 0; the norm of one rounding stands for each.
            relative_bound = 2 * eager_relative + 2 * float(torch.linalg.vector_norm(rounded.double() - reference)) / size
        return cls(
            name, error, eager_error, bound, relative, eager_relative, relative_bound, where, tuple(reference.shape)
        )  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """A token that is not eager's.

    Attributes:
        prompt, step: which answer, and which of its tokens.
        ours, eager: the token ids; -1 where the answer had ended.
        margin: of eager's two best logits there.
        distance: of eager's logits there from the reference's.
        allowed: whether eager was not sure itself.
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

    Attributes:
        dtype: of the model.
        backend: what ran in the patched model, per part.
        parts: every block, the image features and the logits.
        forced: tokens that differ when the tokens before are eager's.
        generated: the first token that differs in each answer of `generate`.
        tokens: how many tokens were compared.
        notes: what could not be compared, and why.
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
        blocks = Table(title=f"errors against {self._reference}, {_name(self.dtype)} model")
        blocks.add_column("part", overflow="fold")
        for heading in ("patched", "eager", "allowed", "patched, relative", "eager, relative", ""):
            blocks.add_column(heading, justify="right")
        for part in self.parts:
            numbers = (part.ours, part.eager, part.bound, part.ours_relative, part.eager_relative)
            blocks.add_row(part.name, *(f"{number:.1e}" for number in numbers), "ok" if part.ok else "[red]BAD[/red]")
        lines = [f"{part}: {what}" for part, what in self.backend.items()]
        for how, differences in (("teacher-forced on eager's", self.forced), ("generate", self.generated)):
            lines.append(f"tokens, {how}: {self.tokens} compared, {len(differences) or 'none'} differ")
            for found in differences[:5]:
                sure = "eager was not sure" if found.allowed else "NOT ALLOWED"
                lines.append(
                    f"  prompt {found.prompt}, token {found.step}: {found.ours} for {found.eager}; eager's margin "
                    f"{found.margin:.2e}, its distance from {self._reference} {found.distance:.2e}: {sure}"
                )
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"outside the rule: {failure}" for failure in self.failures[:8]]
        return Group(blocks, *lines, f"verdict: {'ok' if self.ok else 'BAD'}")

    @property
    def _reference(self) -> str:
        return _name(_reference_dtype(self.dtype))

    def __repr__(self) -> str:
        return as_text(self)


def verify(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], *, max_new_tokens: int = 32, backend: Backend = "auto"
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
    inputs = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor) and key != "labels"}
    mask = inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    if not mask[:, -1].all():
        raise ValueError("a prompt ends with padding: prompts of a batch are padded on the left, as generate needs it")
    # `patched` puts back, in whatever way this ends, what was there before.
    with torch.no_grad(), exact_float32(), _attention_that_computes_in_any_dtype(root), patched(model, backend):
        return _verify(model, root, inputs, max_new_tokens, backend)


def _verify(
    model: nn.Module, root: nn.Module, inputs: dict[str, torch.Tensor], max_new_tokens: int, backend: Backend
) -> Verification:
    dtype = root.model.language_model.norm.weight.dtype
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    prompt_length = inputs["input_ids"].shape[1]

    unpatch(model)
    kept = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    output = root.generate(**inputs, **options, **kept)
    ids, logits = output.sequences[:, prompt_length:], torch.stack(output.logits, dim=1)
    margins = torch.stack(output.scores, dim=1).topk(2).values.diff(dim=-1).abs()[..., 0]
    lengths = _lengths(ids, root.generation_config.eos_token_id)
    features = _image_features(root, inputs)
    del output

    patch(model, backend)
    ours_features = _image_features(root, inputs)
    ours_logits = _forced_logits(root, inputs, ids)
    ours_ids = root.generate(**inputs, **options)[:, prompt_length:]
    report = patch(model, backend).report()

    unpatch(model)
    with _in_precision(root, _reference_dtype(dtype)):
        exact_features = _image_features(root, inputs)
        exact_logits = _logits_at_once(root, inputs, ids)
    ran = _ran(report, features)
    parts = list(_blocks(root, inputs, _backend_name(root, backend), ran))
    if features is not None:
        parts.append(Comparison.of("image features", ours_features, features, exact_features))
    counted = torch.arange(ids.shape[1], device=ids.device) < torch.tensor(lengths, device=ids.device)[:, None]
    cast = [tensor[counted].to(dtype) for tensor in (ours_logits, logits)]
    parts.append(Comparison.of("logits", *cast, exact_logits[counted]))

    distances = (logits.double() - exact_logits.double()).abs().amax(-1)
    raw_margins = logits.topk(2).values.diff(dim=-1).abs()[..., 0]

    def difference(prompt: int, step: int, ours: int, eager: int, margins: torch.Tensor) -> Difference:
        at = prompt, min(step, ids.shape[1] - 1)
        margin, distance = float(margins[at]), float(distances[at])
        return Difference(prompt, step, ours, eager, margin, distance, dtype != torch.float32 and margin < 2 * distance)

    forced = []
    for prompt, step in ((ours_logits.argmax(-1) != logits.argmax(-1)) & counted).nonzero().tolist():
        tokens = (int(x[prompt, step].argmax()) for x in (ours_logits, logits))
        forced.append(difference(prompt, step, *tokens, raw_margins))
    generated = []
    ours_lengths = _lengths(ours_ids, root.generation_config.eos_token_id)
    for prompt, (length, ours_length) in enumerate(zip(lengths, ours_lengths, strict=True)):
        answers = ours_ids[prompt, :ours_length].tolist(), ids[prompt, :length].tolist()
        for step, (ours, eager) in enumerate(zip_longest(*answers, fillvalue=-1)):
            if ours != eager:
                generated.append(difference(prompt, step, ours, eager, margins))
                break
    return Verification(dtype, ran, tuple(parts), tuple(forced), tuple(generated), sum(lengths), tuple(_notes(ran, features)))


def _blocks(root: nn.Module, inputs: dict[str, torch.Tensor], backend: str, ran: dict[str, str]) -> Iterator[Comparison]:
    """Every vision block and every text layer on its input in an eager forward of the prompt. A text layer is taken together
    with the norm that follows it, as the kernels do."""
    visual, language = root.model.visual, root.model.language_model
    reference = _reference_dtype(language.norm.weight.dtype)
    valid, padding = inputs["attention_mask"].bool(), Padding.read(inputs["attention_mask"])
    found: list[Comparison] = []

    def compare_block(index: int) -> Callable[..., None]:
        alone = SimpleNamespace(
            blocks=visual.blocks[index : index + 1],
            rotary_pos_emb=visual.rotary_pos_emb,
            class_pos_emb=visual.class_pos_emb,
        )

        def compare(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> None:
            x, layout, *others = args
            ours = vision.run_blocks(alone, x, layout.position_ids, layout.cu_seqlens, layout.max_seqlen, backend)
            with _Cast(block, reference):
                exact = block.forward(x.to(reference), layout, *others, **kwargs)
            found.append(Comparison.of(f"visual.blocks.{index}", ours, output, exact))

        return compare

    def compare_layer(index: int) -> Callable[..., None]:
        last = index + 1 == len(language.layers)
        norm = language.norm if last else language.layers[index + 1].input_layernorm
        alone = SimpleNamespace(
            layers=language.layers[index : index + 1], norm=norm, rotary_emb=language.rotary_emb, config=language.config
        )

        def compare(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> None:
            x, positions = args[0], kwargs["position_ids"]
            tokens = Spans(padding.within(x.shape[1]), 0, x.shape[1])
            rows = positions.expand(len(x), -1).reshape(1, -1)
            ours = text.run_layers(alone, x, prompt_layout(tokens, rows, None), None, backend)
            wide = x.to(reference)
            wider = {**kwargs, "position_embeddings": language.rotary_emb(wide, positions)}
            if wider.get("attention_mask") is not None and wider["attention_mask"].is_floating_point():
                wider["attention_mask"] = wider["attention_mask"].to(reference)
            with _Cast(layer, reference), _Cast(norm, reference):
                exact = norm.forward(layer.forward(wide, **wider))
            eager = norm.forward(output)
            found.append(Comparison.of(f"language_model.layers.{index}", ours[valid], eager[valid], exact[valid]))

        return compare

    with contextlib.ExitStack() as stack:
        for part, modules, compare in (
            ("visual.encode", visual.blocks, compare_block),
            ("language_model", language.layers, compare_layer),
        ):
            if _took_the_kernels(ran.get(part)):
                for index, module in enumerate(modules):
                    stack.callback(module.register_forward_hook(compare(index), with_kwargs=True).remove)
        root(**inputs, position_ids=_positions(inputs["attention_mask"]), use_cache=False, logits_to_keep=1)
    yield from found


def _image_features(root: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """(tokens, text width) of all images and videos; None without any."""
    features = []
    for pixels, grids in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
        if inputs.get(pixels) is not None:
            features += root.model.get_image_features(inputs[pixels], inputs[grids]).pooler_output
    return torch.cat(features) if features else None


def _forced_logits(root: nn.Module, inputs: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """(B, steps, vocabulary), token by token over a cache, with `ids` (B, steps) as the tokens before."""
    mask = inputs["attention_mask"]
    output = root(**inputs, position_ids=_positions(mask), use_cache=True, logits_to_keep=1)
    logits = [output.logits[:, -1].float()]
    for step in range(ids.shape[1] - 1):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        output = root(
            input_ids=ids[:, step : step + 1],
            attention_mask=mask,
            position_ids=_positions(mask)[:, -1:],
            past_key_values=getattr(output, CACHE),
            use_cache=True,
            logits_to_keep=1,
        )
        logits.append(output.logits[:, -1].float())
    return torch.stack(logits, dim=1)


def _logits_at_once(root: nn.Module, inputs: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """What `_forced_logits` gives, by one forward over prompt and answer."""
    answer = ids[:, :-1]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], dim=1)
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], answer], dim=1), "attention_mask": mask}
    if (types := inputs.get("mm_token_type_ids")) is not None:
        whole["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(answer)], dim=1)
    return root(**whole, position_ids=_positions(mask), use_cache=False, logits_to_keep=ids.shape[1]).logits


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """As `generate` counts them: from the first token that is not padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _lengths(ids: torch.Tensor, eos: int | list[int] | None) -> list[int]:
    """Tokens of every answer, its end included; what follows is padding."""
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    ended = torch.isin(ids, torch.tensor(ends, dtype=ids.dtype, device=ids.device)).cumsum(-1) > 0
    return ((~ended).sum(-1) + 1).clamp(max=ids.shape[1]).tolist()


class _Cast:
    """In a `with` block, or between `on` and `off`, a module's parameters have another dtype."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.module, self.dtype = module, dtype
        self.saved: list[tuple[nn.Parameter, torch.Tensor]] = []

    def on(self, *_: Any) -> None:
        for parameter in self.module.parameters():
            if parameter.is_floating_point():
                self.saved.append((parameter, parameter.data))
                parameter.data = parameter.data.to(self.dtype)

    def off(self, *_: Any) -> None:
        for parameter, data in self.saved:
            parameter.data = data
        self.saved = []

    def __enter__(self) -> None:
        try:
            self.on()
        except BaseException:
            self.off()
            raise

    __exit__ = off


@contextlib.contextmanager
def _in_precision(root: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The whole model computes in `dtype`: each block is cast when it is called, and back when it has run."""
    visual, language = root.model.visual, root.model.language_model
    blocks = [visual.patch_embed, visual.pre_layernorm, *visual.blocks, visual.merger]
    with contextlib.ExitStack() as stack:
        for block in (*blocks, *language.layers, language.norm, root.lm_head):
            cast = _Cast(block, dtype)
            stack.callback(cast.off)  # where the block raised
            stack.callback(block.register_forward_pre_hook(cast.on).remove)
            stack.callback(block.register_forward_hook(cast.off).remove)
        # Exact, and without a copy of the table.
        embedding = root.get_input_embeddings()
        stack.callback(embedding.register_forward_hook(lambda module, args, output: output.to(dtype)).remove)
        yield


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """float32 products are computed in float32; convolutions on a GPU are not, by default."""
    # By these: the older settings raise as soon as someone has used these.
    backends = torch.backends
    settings = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


@contextlib.contextmanager
def _attention_that_computes_in_any_dtype(root: nn.Module) -> Iterator[None]:
    """FlashAttention has no float32: "sdpa" stands for it in eager and in the reference."""
    configs = [module.config for module in (root.model.visual, root.model.language_model)]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            if config._attn_implementation not in ("eager", "sdpa"):
                config._attn_implementation = "sdpa"
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def _reference_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else torch.float32


def _backend_name(root: nn.Module, backend: str) -> str:
    return default_backend(root.model.language_model.norm.weight.device) if backend == "auto" else backend


def _ran(report: Report, features: torch.Tensor | None) -> dict[str, str]:
    """Per part what ran, as the report says; vision only where there was something to see."""
    seen = {}
    for row in report.rows:
        if not row.path.startswith("visual") or features is not None:
            originals = [f"{ORIGINAL}: {reason}" for reason in row.fallbacks]
            seen[row.path] = "; ".join([*row.ran, *originals]) or "not called"
    return seen


ORIGINAL = "the original ran"


def _took_the_kernels(what: str | None) -> bool:
    return what is not None and ORIGINAL not in what


def _notes(ran: dict[str, str], features: torch.Tensor | None) -> Iterator[str]:
    if features is None:
        yield "there is no image in the inputs: the vision tower was not compared"
    for part in ("visual.encode", "language_model"):
        if part in ran and not _took_the_kernels(ran[part]):
            yield f"{part} ran without the kernels, so its blocks were not compared one by one"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
