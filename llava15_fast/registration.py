"""Makes transformers know the model: Auto classes, tensor names of the two checkpoint formats, names to import.

Done once, when `llava15_fast` is imported. Nothing here changes another model's behaviour.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
import transformers.processing_utils  # noqa: F401  -- replaces sys.modules["transformers"]; must come before names are set
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from .configuration import (
    LlavaOnevision1_5Config,
    LlavaOnevision1_5TextConfig,
    LlavaOnevision1_5UpstreamConfig,
    LlavaOnevision1_5VisionConfig,
)
from .modeling import LlavaOnevision1_5ForConditionalGeneration, LlavaOnevision1_5Model, LlavaOnevision1_5VisionModel

logger = logging.getLogger(__name__)


class ReshapeToParameter(ConversionOps):
    """An embedding table of one row -> the parameter of that size, (1, n) -> (n,) or (1, n)."""

    @torch.no_grad
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        expected = kwargs["model"].get_parameter(kwargs["full_layer_name"]).shape
        return {target_patterns[0]: tensor.reshape(expected)}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("the published names are written, so this direction does not occur")


class UpstreamNameConverter(WeightConverter):
    """Reads a tensor by the upstream port's name; when saving there is nothing to undo."""

    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        return WeightRenaming(r"^no tensor has this name$", r"^$")


def checkpoint_conversions(base_prefix: str) -> list[Any]:
    """Tensor names on disk -> module names. `base_prefix` is "model." below the generation class, else ""."""
    return [
        WeightRenaming(r"^visual", f"{base_prefix}visual"),
        WeightRenaming(r"^model(?!\.(language_model|visual))", f"{base_prefix}language_model"),
        *(
            UpstreamNameConverter(f"visual.{name}.weight", f"visual.{name}", operations=[ReshapeToParameter()])
            for name in ("class_embedding", "class_pos_emb")
        ),
    ]


def register() -> None:
    """Idempotent."""
    for config_class in (LlavaOnevision1_5Config, LlavaOnevision1_5VisionConfig, LlavaOnevision1_5TextConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    try:
        AutoConfig.register(LlavaOnevision1_5UpstreamConfig.model_type, LlavaOnevision1_5UpstreamConfig)
    except ValueError:
        logger.info("transformers brings %s itself", LlavaOnevision1_5UpstreamConfig.model_type)
    AutoModel.register(LlavaOnevision1_5Config, LlavaOnevision1_5Model, exist_ok=True)
    AutoModel.register(LlavaOnevision1_5VisionConfig, LlavaOnevision1_5VisionModel, exist_ok=True)
    for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM):
        auto_class.register(LlavaOnevision1_5Config, LlavaOnevision1_5ForConditionalGeneration, exist_ok=True)
    for model_class, prefix in ((LlavaOnevision1_5ForConditionalGeneration, "model."), (LlavaOnevision1_5Model, "")):
        register_checkpoint_conversion_mapping(
            model_class.__name__, checkpoint_conversions(prefix), overwrite=True
        )
