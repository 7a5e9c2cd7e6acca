"""What `patch` replaces and which modules it relies on: `TARGETS`, and the validation of a model against it."""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from torch import nn
from transformers import Qwen3Model

from llava15_kernels._dispatch import FLOAT_DTYPES, check_backend
from llava15_kernels.flash_attn import MAX_HEAD_DIM

from ..fast import guards
from ..fast.guards import FAST, Part
from ..model.modeling import LlavaOnevision1_5ForConditionalGeneration, LlavaOnevision1_5Model, LlavaOnevision1_5VisionModel
from ..model.releases import CACHE


class PatchError(RuntimeError):
    """The model is not as `patch` expects; nothing was changed."""


HEAD = ""
"""Path of the model with the language modeling head; all other paths are relative to `LlavaOnevision1_5Model`."""

TEXT = f"input_ids attention_mask position_ids {CACHE} inputs_embeds use_cache kwargs"
GENERATE = """inputs generation_config logits_processor stopping_criteria prefix_allowed_tokens_fn synced_gpus assistant_model
    streamer negative_prompt_ids negative_prompt_attention_mask custom_generate kwargs"""


TARGETS: tuple[Part, ...] = (
    Part("visual", LlavaOnevision1_5VisionModel, "pixel_values layout", method="embed_patches", kernels=("layer_norm",)),
    Part(
        "visual", LlavaOnevision1_5VisionModel, "hidden_states layout kwargs", method="encode",
        kernels=("layer_norm + residual", "vision_rope_2d", "flash_attn_varlen_func", "gelu"),
    ),
    Part("visual", LlavaOnevision1_5VisionModel, "hidden_states layout", method="merge_patches", kernels=("patch_merge",)),
    Part("language_model", Qwen3Model, TEXT, kernels=(
        "rms_norm + residual", "qk_norm_rope", "flash_attn_varlen_func", "flash_attn_with_kvcache", "silu_and_mul",
        "fused_linear", "decode_attention",
    )),
    Part(HEAD, LlavaOnevision1_5ForConditionalGeneration, GENERATE, method="generate", kernels=("decoding loop",)),
    # Bypassed by the methods above.
    *(part._replace(path=f"visual.{part.path}") for part in (*guards.EMBED_PARTS, *guards.ENCODE_PARTS, *guards.MERGE_PARTS)),
    *(part._replace(path=f"language_model.{part.path}") for part in guards.TEXT_PARTS),
)  # fmt: skip


def find_model(model: Any) -> LlavaOnevision1_5ForConditionalGeneration | LlavaOnevision1_5Model:
    """The model with the language modeling head in `model`, or the one without if there is no head."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    found = [module for module in modules if isinstance(module, LlavaOnevision1_5Model)]
    for module in modules:
        if type(module).__name__ == LlavaOnevision1_5Model.__qualname__ and module not in found:
            raise TypeError(
                f"{type(module).__module__} has its own {type(module).__name__}, which is not supported here: load the model "
                "with llava15_fast.LlavaOnevision1_5ForConditionalGeneration"
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
    """The modules whose class `patch` changes, each with the base class in `FAST`."""
    inner = inner_of(root)
    modules = dict.fromkeys([root, inner, getattr(inner, "visual", None), getattr(inner, "language_model", None)])
    return [(module, base) for module in modules for base in FAST if isinstance(module, base)]


def check_model(root: nn.Module, backend: str) -> None:
    """
    Raises:
        PatchError: a target is missing or has another class, signature, dtype or head_dim than expected.
        ValueError, RuntimeError: the backend is unknown, or cannot run on the model's device.
    """
    inner = inner_of(root)
    vision, text = inner.config.vision_config, inner.config.text_config
    for name, head_dim in (("vision", vision.hidden_size // vision.num_heads), ("text", text.head_dim)):
        if head_dim > MAX_HEAD_DIM:
            raise PatchError(f"{name} head_dim {head_dim} is not supported, expected at most {MAX_HEAD_DIM}")
    weights = [norm.weight for norm in (inner.language_model.norm, inner.visual.pre_layernorm)]
    for weight in (weight for weight in weights if weight is not None):  # without a weight, the guards fall back
        if weight.dtype not in FLOAT_DTYPES:
            raise PatchError(f"dtype {weight.dtype} is not supported, expected float16, bfloat16 or float32")
        if weight.device.type != "meta":
            check_backend(backend, weight.device)
    for target in TARGETS:
        _check_signature(target)
        try:
            found = [("", root)] * (root is not inner) if target.path == HEAD else guards.walk(inner, target.path)
        except LookupError as error:
            raise PatchError(f"{error}: the model's structure has changed") from None
        for path, module in found:
            # An adapter around a part is no error: the method that reads it falls back.
            _check_module(target, path, module if target.kernels else guards.inside(module))
    if not len(inner.language_model.layers):
        raise PatchError(f"{type(root).__name__} has no layers to patch")


def _check_signature(target: Part) -> None:
    method = getattr(target.module_class, target.method, None)
    found, expected = method and tuple(inspect.signature(method).parameters)[1:], tuple(target.parameters.split())
    if found != expected:
        name = f"{target.module_class.__name__}.{target.method}"
        raise PatchError(f"{name} has parameters {found}, expected {expected} (transformers {transformers.__version__})")


def _check_module(target: Part, path: str, module: nn.Module) -> None:
    own = FAST.get(target.module_class, target.module_class)
    expected = own if isinstance(module, own) else target.module_class
    if reason := guards.difference(path, module, expected, target.method):
        raise PatchError(reason)
    # accelerate keeps the forward that its hook wraps under another name.
    slot = "_old_forward" if target.method == "forward" and hasattr(module, "_hf_hook") else target.method
    if guards.is_replaced(module, slot, target.method):
        by = getattr(vars(module)[slot], "__qualname__", type(vars(module)[slot]).__name__)
        name = f"{path}.{target.method}".lstrip(".")
        raise PatchError(f"{name} was already replaced by {by}: undo that before patching")
