"""`patch`, `unpatch`, `patched`: the kernels go into the forward passes of one model instance, and out again.

`TARGETS` declares every method that is replaced, with the class and the signature it must have. All of them are checked
before the first is touched; a replacement is an attribute of the module instance, so classes and other models stay as
they are, and taking the attribute away is the undo.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import transformers
from rich.table import Table
from torch import nn
from transformers import Qwen3Model

from llava15_kernels._dispatch import FLOAT_DTYPES, Backend, check_backend
from llava15_kernels.flash_attn import MAX_HEAD_DIM

from . import generation, text, vision
from .graphs import GRAPHS, DecodeGraphs, Graphs
from .modeling import LlavaOnevision1_5ForConditionalGeneration, LlavaOnevision1_5Model, LlavaOnevision1_5VisionModel
from .parts import difference, is_replaced, walk
from .refusal import inside
from .releases import CACHE
from .sites import SITES, Site
from .snapshot import SEEN, Remembered
from .tables import as_text


class PatchError(RuntimeError):
    """The model is not what `patch` expects; nothing was changed."""


@dataclass(frozen=True)
class Target:
    """A method to replace.

    Attributes:
        path: module path below `LlavaOnevision1_5Model`, `*` for every index; `HEAD` for the model with the language head.
        module_class: the class the module must be an instance of.
        parameters: names of the parameters that the class's method must have.
        replacement: module-level function with the same parameters, after the module; None for a module that is only read
            by the replacement of another, and must be what that expects.
        kernels: what runs in it, for the report.
        attribute: the method.
    """

    path: str
    module_class: type[nn.Module]
    parameters: tuple[str, ...]
    replacement: Callable[..., Any] | None
    kernels: tuple[str, ...] = ()
    attribute: str = "forward"

    @property
    def name(self) -> str:
        """As the report calls it."""
        return ".".join(part for part in (self.path, self.attribute.removeprefix("forward")) if part)


DECODE_GRAPHS = 2
"""Graphs of the decode step that are kept; each holds the key/value storages of its batch."""

VISION_GRAPHS = 8
"""Graphs of the vision tower that are kept; each holds the output for its images."""

VISION_PATIENCE = 4
"""Images of one size before the next is captured: a capture takes the host about as long as several replays save (a model: 225
launches of 15 us and as long again for the graph itself, against 3 ms)."""

HEAD = ""

TARGETS: tuple[Target, ...] = (
    Target(
        "visual",
        LlavaOnevision1_5VisionModel,
        ("pixel_values", "layout"),
        vision.embed_patches,
        ("layer_norm",),
        attribute="embed_patches",
    ),
    Target(
        "visual",
        LlavaOnevision1_5VisionModel,
        ("hidden_states", "layout", "kwargs"),
        vision.encode,
        ("layer_norm + residual", "vision_rope_2d", "flash_attn_varlen_func", "gelu"),
        attribute="encode",
    ),
    Target(
        "visual",
        LlavaOnevision1_5VisionModel,
        ("hidden_states", "layout"),
        vision.merge_patches,
        ("patch_merge",),
        attribute="merge_patches",
    ),
    Target(
        "language_model",
        Qwen3Model,
        ("input_ids", "attention_mask", "position_ids", CACHE, "inputs_embeds", "use_cache", "kwargs"),
        text.text_model_forward,
        ("rms_norm + residual", "qk_norm_rope", "flash_attn_varlen_func", "flash_attn_with_kvcache", "silu_and_mul"),
    ),
    Target(
        HEAD,
        LlavaOnevision1_5ForConditionalGeneration,
        (
            "inputs",
            "generation_config",
            "logits_processor",
            "stopping_criteria",
            "prefix_allowed_tokens_fn",
            "synced_gpus",
            "assistant_model",
            "streamer",
            "negative_prompt_ids",
            "negative_prompt_attention_mask",
            "custom_generate",
            "kwargs",
        ),
        generation.generate,
        ("decoding loop",),
        attribute="generate",
    ),
    # Their work is done inside the replaced methods above.
    *(
        Target(f"{root}.{part.path}", part.module_class, part.parameters, None)
        for root, parts in (
            ("visual", (*vision.EMBED_PARTS, *vision.ENCODE_PARTS, *vision.MERGE_PARTS)),
            ("language_model", text.PARTS),
        )
        for part in parts
    ),
)

_REPLACEMENTS = frozenset(target.replacement for target in TARGETS if target.replacement is not None)


def patch(model: nn.Module, backend: Backend = "auto", *, cuda_graph: bool = True) -> PatchHandle:
    """Replaces the forwards of `TARGETS` on this instance by ones that run the kernels.

    Args:
        model: a `LlavaOnevision1_5ForConditionalGeneration` or `LlavaOnevision1_5Model`, or a module that holds one.
        backend: "triton" for the kernels, "torch" for their eager counterparts, "auto" for the kernels wherever they can
            run. A call that needs a gradient runs the original forward.
        cuda_graph: on a GPU, replay the decode step, and the vision tower on small images of sizes that come again, as CUDA
            graphs.

    Returns:
        A handle with `report()`. Patching a patched model again changes nothing, or changes the backend.

    Raises:
        TypeError: `model` holds no model that is known here.
        PatchError: a target is missing or has another class, signature, dtype or head_dim than expected.
        RuntimeError: the backend cannot run on the model's device.
    """
    root = _find_model(model)
    _check_model(_inner(root), backend)
    found = [(target, path, module) for target in TARGETS for path, module in _resolve(root, target)]
    if not found:
        raise PatchError(f"{type(root).__name__} has no layers to patch")
    for target, path, module in found:
        _check_untouched(target, path, module)
    language_model = _inner(root).language_model
    graphs_on = GRAPHS in language_model.__dict__
    replaced = [(target, path, module) for target, path, module in found if target.replacement is not None]
    # Not so after an `unpatch` that was interrupted.
    complete = all(_is_ours(module.__dict__.get(_slot(target, module))) for target, _, module in replaced)
    if complete and graphs_on == cuda_graph and all(site.backend == backend for site in _sites(root)):
        return PatchHandle(model)
    try:
        unpatch(model)
        for target, path, module in replaced:
            _install(target, path, module, backend)
        language_model.__dict__[SEEN] = Remembered(text.find)
        _inner(root).visual.__dict__[SEEN] = Remembered(vision.find)
        text.look_at(language_model)  # lays weights side by side
        if language_model.norm.weight.device.type == "cuda":
            torch.cuda.empty_cache()  # what the weights have left
        if cuda_graph:
            language_model.__dict__[GRAPHS] = DecodeGraphs(DECODE_GRAPHS)
            _inner(root).visual.__dict__[GRAPHS] = Graphs(VISION_GRAPHS, VISION_PATIENCE)
    except BaseException:
        unpatch(model)
        raise
    return PatchHandle(model)


def unpatch(model: nn.Module) -> None:
    """Puts the original forwards back. A model that is not patched stays as it is.

    Raises:
        TypeError: `model` holds no model that is known here.
    """
    root = _find_model(model)
    text.release_weights(_inner(root).language_model)
    for module in root.modules():
        if (graphs := module.__dict__.pop(GRAPHS, None)) is not None:
            graphs.clear()
        for attribute in module.__dict__.get(SITES, {}):
            if _is_ours(module.__dict__.get(attribute)):
                del module.__dict__[attribute]
            if _is_ours(module.__dict__.get("_old_forward")):
                # accelerate's hook calls this one and expects it to be there.
                module.__dict__["_old_forward"] = MethodType(type(module).forward, module)
        # Last: a replacement finds what it needs until it is gone, and who was interrupted can call this again.
        module.__dict__.pop(SITES, None)
        module.__dict__.pop(SEEN, None)


@contextlib.contextmanager
def patched(model: nn.Module, backend: Backend = "auto", *, cuda_graph: bool = True) -> Iterator[PatchHandle]:
    """`patch` for the length of a `with` block; undone also when the body raises.

    A model that was patched before stays patched, with its backend.
    """
    root = _find_model(model)
    before = {site.backend for site in _sites(root)}
    graphs_before = GRAPHS in _inner(root).language_model.__dict__
    handle = patch(model, backend, cuda_graph=cuda_graph)
    try:
        yield handle
    finally:
        try:
            unpatch(model)
        finally:  # interrupted or not
            for previous in before:
                patch(model, previous, cuda_graph=graphs_before)


@dataclass(frozen=True)
class ReportRow:
    """The sites of one target: `modules` of them, their calls per backend, their calls of the original per reason."""

    path: str
    modules: int
    kernels: tuple[str, ...]
    backend: str
    ran: dict[str, int]
    fallbacks: dict[str, int]


@dataclass(frozen=True, repr=False)
class Report:
    """Which kernel ran for which module, and why the original ran instead. `print` shows it as a table."""

    rows: tuple[ReportRow, ...]

    def __rich__(self) -> Table:
        table = Table(title="llava15_fast")
        for heading in ("module", "kernel", "ran (calls)", "original ran instead (calls)"):
            table.add_column(heading, overflow="fold")
        for row in self.rows:
            ran = [f"{backend} ({calls})" for backend, calls in row.ran.items()]
            fallbacks = [f"{reason} ({calls})" for reason, calls in row.fallbacks.items()]
            nothing = f"not called yet ({row.backend})" if not row.ran and not row.fallbacks else "-"
            name = row.path if row.modules == 1 else f"{row.path} x {row.modules}"
            table.add_row(name, "\n".join(row.kernels), "\n".join(ran) or nothing, "\n".join(fallbacks) or "-")
        return table

    def __repr__(self) -> str:
        return as_text(self)


class PatchHandle:
    """What `patch` returns: the patched model's report."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def report(self) -> Report:
        """Calls since the model was patched; empty after `unpatch`."""
        present = _sites(_find_model(self.model))
        rows = []
        for target in TARGETS:
            sites = [site for site in present if (site.path, site.attribute) == (target.path, target.attribute)]
            if sites:
                ran = sum((site.ran for site in sites), Counter())
                fallbacks = sum((site.fallbacks for site in sites), Counter())
                asked = sites[0].backend
                rows.append(ReportRow(target.name, len(sites), target.kernels, asked, dict(ran), dict(fallbacks)))
        return Report(tuple(rows))

    def __repr__(self) -> str:
        state = "patched" if _sites(_find_model(self.model)) else "not patched"
        return f"<PatchHandle of a {type(self.model).__name__}, {state}>"


def _find_model(model: Any) -> LlavaOnevision1_5ForConditionalGeneration | LlavaOnevision1_5Model:
    """The model with the language head in `model`, or the model without where there is no head."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    found = [module for module in modules if isinstance(module, LlavaOnevision1_5Model)]
    if foreign := [
        module for module in modules if type(module).__name__ == LlavaOnevision1_5Model.__qualname__ and module not in found
    ]:
        raise TypeError(
            f"{type(foreign[0]).__module__} has a {type(foreign[0]).__name__} of its own, which is not known here: load the "
            "model with llava15_fast.LlavaOnevision1_5ForConditionalGeneration"
        )
    if len(found) != 1:
        raise TypeError(
            f"{type(model).__name__} holds {len(found)} models of class LlavaOnevision1_5Model, expected one: pass a "
            "LlavaOnevision1_5ForConditionalGeneration"
        )
    heads = [module for module in modules if isinstance(module, LlavaOnevision1_5ForConditionalGeneration)]
    return heads[0] if heads else found[0]


def _inner(root: nn.Module) -> LlavaOnevision1_5Model:
    return root.model if isinstance(root, LlavaOnevision1_5ForConditionalGeneration) else root


def _check_model(model: LlavaOnevision1_5Model, backend: str) -> None:
    vision_config, text_config = model.config.vision_config, model.config.text_config
    for name, head_dim in (
        ("vision", vision_config.hidden_size // vision_config.num_heads),
        ("text", text_config.head_dim),
    ):
        if head_dim > MAX_HEAD_DIM:
            raise PatchError(f"{name} head_dim {head_dim} is not supported, expected at most {MAX_HEAD_DIM}")
    for norm in (model.language_model.norm, model.visual.pre_layernorm):
        if norm.weight.dtype not in FLOAT_DTYPES:
            raise PatchError(f"dtype {norm.weight.dtype} is not supported, expected float16, bfloat16 or float32")
        if norm.weight.device.type != "meta":
            check_backend(backend, norm.weight.device)


def _resolve(root: nn.Module, target: Target) -> list[tuple[str, nn.Module]]:
    """The modules of a target with their paths, checked.

    Raises:
        PatchError: one is missing, or is not what the target declares.
    """
    if target.path == HEAD:
        found = [("", root)] if root is not _inner(root) else []
    else:
        try:
            found = list(walk(_inner(root), target.path))
        except LookupError as error:
            raise PatchError(f"{error}: the model's structure has changed") from None
    for path, module in found:
        if target.replacement is None:
            # An adapter around it makes the replacement that reads it fall back.
            module = inside(module)
        if reason := difference(path, module, target.module_class, target.attribute):
            raise PatchError(reason)
        method = getattr(type(module), target.attribute, None)
        parameters = tuple(inspect.signature(method).parameters)[1:] if method else None
        if parameters != target.parameters:
            raise PatchError(
                f"{type(module).__name__}.{target.attribute} has parameters {parameters}, expected {target.parameters} "
                f"(transformers {transformers.__version__})"
            )
    return found


def _install(target: Target, path: str, module: nn.Module, backend: str) -> None:
    slot = _slot(target, module)
    module.__dict__.setdefault(SITES, {})[target.attribute] = Site(path, target.attribute, target.kernels, backend)
    module.__dict__[slot] = functools.partial(target.replacement, module)


def _slot(target: Target, module: nn.Module) -> str:
    """The attribute that holds the method; accelerate keeps a forward that its hook wraps under another name."""
    return "_old_forward" if target.attribute == "forward" and hasattr(module, "_hf_hook") else target.attribute


def _check_untouched(target: Target, path: str, module: nn.Module) -> None:
    slot = _slot(target, module)
    if is_replaced(module, slot, target.attribute) and not _is_ours(present := module.__dict__[slot]):
        name = ".".join(filter(None, (path, target.attribute)))
        raise PatchError(
            f"{name} was already replaced by {getattr(present, '__qualname__', type(present).__name__)}: undo that before "
            "patching"
        )


def _is_ours(value: Any) -> bool:
    return isinstance(value, functools.partial) and value.func in _REPLACEMENTS


def _sites(root: nn.Module) -> list[Site]:
    return [site for module in root.modules() for site in module.__dict__.get(SITES, {}).values()]
