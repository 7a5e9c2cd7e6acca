"""Differences between the supported releases of transformers."""

import inspect
from typing import Any

from transformers import ProcessorMixin, Qwen3Model, modeling_outputs
from transformers.cache_utils import Cache

CACHE = "cache" if "cache" in inspect.signature(Qwen3Model.forward).parameters else "past_key_values"
"""The name of the KV cache in arguments and outputs: `cache` from transformers 5.24 on.

Our own forwards accept both names in every release."""


def as_argument(cache: Any) -> dict[str, Any]:
    """`cache` as an argument of transformers' forwards; the paged cache of continuous batching always has the newer name."""
    return {CACHE if cache is None or isinstance(cache, Cache) else "cache": cache}


ADJUSTS_MASKS = hasattr(ProcessorMixin, "_adjust_assistant_masks_indices")
SANITIZES = "sanitize_control_tokens" in inspect.signature(ProcessorMixin.apply_chat_template).parameters
"""Whether `apply_chat_template` counts placeholders in its mask of the assistant's tokens, and keeps control tokens out."""

KEEPS_TOWERS = hasattr(modeling_outputs, "MultimodalCausalLMOutputWithPast")
"""Whether model outputs have fields for the vision tower's outputs."""
_KIND = "Multimodal" if KEEPS_TOWERS else ""
ModelOutputWithPast = getattr(modeling_outputs, f"{_KIND}BaseModelOutputWithPast")
HeadOutputWithPast = getattr(modeling_outputs, f"{_KIND}CausalLMOutputWithPast")
