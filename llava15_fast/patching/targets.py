"""What `patch` replaces, and what has to be as it expects: `TARGETS`, and the checks of a model against it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn
from transformers import Qwen3Model

from llava15_kernels._dispatch import FLOAT_DTYPES, check_backend
from llava15_kernels.flash_attn import MAX_HEAD_DIM

from ..fast import guards
from ..fast.guards import difference, inside, is_replaced, walk
from ..fast.runtime import FAST
from ..model.modeling import LlavaOnevision1_5ForConditionalGeneration, LlavaOnevision1_5Model, LlavaOnevision1_5VisionModel
from ..model.releases import CACHE


class PatchError(RuntimeError):
    """The model is not what `patch` expects; nothing was changed."""


@dataclass(frozen=True)
class Target:
    """A method that the patched class of a module replaces, or one whose work it does without calling it.

    Attributes:
        path: module path below `LlavaOnevision1_5Model`, `*` for every index; `HEAD` for the model with the language head.
        module_class: the class the module must be an instance of.
        parameters: names of the parameters that the class's method must have.
        kernels: what runs in its place, for the report; nothing for a module that is only read by the replacement of another.
        attribute: the method.
    """

    path: str
    module_class: type[nn.Module]
    parameters: tuple[str, ...]
    kernels: tuple[str, ...] = ()
    attribute: str = "forward"

    @property
    def name(self) -> str:
        """As the report calls it."""
        return ".".join(part for part in (self.path, self.attribute.removeprefix("forward")) if part)


HEAD = ""

TARGETS: tuple[Target, ...] = (
    Target("visual", LlavaOnevision1_5VisionModel, ("pixel_values", "layout"), ("layer_norm",), "embed_patches"),
    Target(
        "visual",
        LlavaOnevision1_5VisionModel,
        ("hidden_states", "layout", "kwargs"),
        ("layer_norm + residual", "vision_rope_2d", "flash_attn_varlen_func", "gelu"),
        "encode",
    ),
    Target("visual", LlavaOnevision1_5VisionModel, ("hidden_states", "layout"), ("patch_merge",), "merge_patches"),
    Target(
        "language_model",
        Qwen3Model,
        ("input_ids", "attention_mask", "position_ids", CACHE, "inputs_embeds", "use_cache", "kwargs"),
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
        ("decoding loop",),
        "generate",
    ),
    # Their work is done inside the replaced methods above.
    *(
        Target(f"{root}.{part.path}", part.module_class, part.parameters)
        for root, parts in (
            ("visual", (*guards.EMBED_PARTS, *guards.ENCODE_PARTS, *guards.MERGE_PARTS)),
            ("language_model", guards.TEXT_PARTS),
        )
        for part in parts
    ),
)


def find_model(model: Any) -> LlavaOnevision1_5ForConditionalGeneration | LlavaOnevision1_5Model:
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


def inner_of(root: nn.Module) -> LlavaOnevision1_5Model:
    return root.model if isinstance(root, LlavaOnevision1_5ForConditionalGeneration) else root


def patched_modules(root: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
    """The modules whose class `patch` changes, each with its class as declared."""
    inner = inner_of(root)
    modules = dict.fromkeys([root, inner, getattr(inner, "visual", None), getattr(inner, "language_model", None)])
    return [(module, base) for module in modules for base in FAST if isinstance(module, base)]


def check_model(root: nn.Module, backend: str) -> None:
    """
    Raises:
        PatchError: a target is missing or has another class, signature, dtype or head_dim than expected.
        ValueError, RuntimeError: the backend is unknown, or cannot run on the model's device.
    """
    _check_sizes(inner_of(root), backend)
    for target in TARGETS:
        for path, module in _resolve(root, target):
            _check_untouched(target, path, module)
    if not len(inner_of(root).language_model.layers):
        raise PatchError(f"{type(root).__name__} has no layers to patch")


def _check_sizes(model: LlavaOnevision1_5Model, backend: str) -> None:
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
        found = [("", root)] if root is not inner_of(root) else []
    else:
        try:
            found = list(walk(inner_of(root), target.path))
        except LookupError as error:
            raise PatchError(f"{error}: the model's structure has changed") from None
    for path, module in found:
        if not target.kernels:
            # An adapter around it makes the replacement that reads it fall back.
            module = inside(module)
        own = FAST.get(target.module_class)
        expected = own if own is not None and isinstance(module, own) else target.module_class
        if reason := difference(path, module, expected, target.attribute):
            raise PatchError(reason)
        method = getattr(target.module_class, target.attribute, None)
        parameters = tuple(inspect.signature(method).parameters)[1:] if method else None
        if parameters != target.parameters:
            raise PatchError(
                f"{target.module_class.__name__}.{target.attribute} has parameters {parameters}, expected {target.parameters} "
                f"(transformers {transformers.__version__})"
            )
    return found


def _check_untouched(target: Target, path: str, module: nn.Module) -> None:
    # accelerate keeps a forward that its hook wraps under another name.
    slot = "_old_forward" if target.attribute == "forward" and hasattr(module, "_hf_hook") else target.attribute
    if is_replaced(module, slot, target.attribute):
        present = vars(module)[slot]
        name = ".".join(filter(None, (path, target.attribute)))
        raise PatchError(
            f"{name} was already replaced by {getattr(present, '__qualname__', type(present).__name__)}: undo that before "
            "patching"
        )
