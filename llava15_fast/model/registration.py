"""Registers the model with transformers: Auto classes, tensor names of the two checkpoint formats, importable names.

Runs once, when `llava15_fast` is imported. Other models load as before; `AutoProcessor.from_pretrained` checks the `model_type`
first.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

import transformers.processing_utils  # replaces sys.modules["transformers"]; must come before names are set
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from . import configuration, modeling
from .checkpoint import register_tensor_names
from .configuration import LlavaOnevision1_5Config
from .processing import LlavaOnevision1_5Processor

logger = logging.getLogger(__name__)

CONFIGS = LlavaOnevision1_5Config, configuration.LlavaOnevision1_5VisionConfig, configuration.LlavaOnevision1_5TextConfig
HEAD, MODEL = modeling.LlavaOnevision1_5ForConditionalGeneration, modeling.LlavaOnevision1_5Model
EXPORTED = (*CONFIGS, MODEL, modeling.LlavaOnevision1_5VisionModel, HEAD, LlavaOnevision1_5Processor)
"""Exported for `from transformers import LlavaOnevision1_5ForConditionalGeneration`, as the model's reference page has it."""


def _is_this_model(name_or_path: Any, kwargs: dict[str, Any]) -> bool:
    keys = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    try:
        config, _ = transformers.PreTrainedConfig.get_config_dict(name_or_path, **{k: kwargs[k] for k in keys if k in kwargs})
    except (OSError, ValueError):
        return False  # no readable configuration: transformers reports why
    model_type = config.get("model_type")
    return model_type in CONFIG_MAPPING and issubclass(CONFIG_MAPPING[model_type], LlavaOnevision1_5Config)


def _install_processor_lookup() -> None:
    """Makes `AutoProcessor.from_pretrained` return our processor for this model, whatever class its files name.

    The published files name `Qwen2_5_VLProcessor`, which takes precedence over the model type in AutoProcessor.
    """
    original = transformers.AutoProcessor.from_pretrained

    @functools.wraps(original)
    def from_pretrained(pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        load = LlavaOnevision1_5Processor.from_pretrained if _is_this_model(pretrained_model_name_or_path, kwargs) else original
        return load(pretrained_model_name_or_path, **kwargs)

    if not hasattr(original, "llava15_fast"):
        from_pretrained.llava15_fast = True  # type: ignore[attr-defined]
        transformers.AutoProcessor.from_pretrained = staticmethod(from_pretrained)


def register() -> None:
    """Idempotent."""
    for config_class in CONFIGS:
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    CONFIG_MAPPING.register(configuration.UPSTREAM_TYPE, LlavaOnevision1_5Config, exist_ok=True)
    models = transformers.AutoModel, transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM
    for auto_class, model_class in zip(models, (MODEL, HEAD, HEAD), strict=True):
        auto_class.register(LlavaOnevision1_5Config, model_class, exist_ok=True)
    transformers.AutoModel.register(CONFIGS[1], modeling.LlavaOnevision1_5VisionModel, exist_ok=True)
    transformers.AutoProcessor.register(LlavaOnevision1_5Config, LlavaOnevision1_5Processor, exist_ok=True)
    _install_processor_lookup()
    for exported in EXPORTED:
        if getattr(sys.modules["transformers"], exported.__name__, exported) is exported:
            setattr(sys.modules["transformers"], exported.__name__, exported)
        else:
            logger.warning("transformers has its own %s, which is not replaced", exported.__name__)
            # transformers looks up tensor name mappings by class name, which theirs and ours must not share.
            exported.__name__ = configuration.OWN_NAME + exported.__name__
    for model_class in (HEAD, MODEL):
        register_tensor_names(model_class)
    # `transformers serve` and others look up the modality by class name.
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[LlavaOnevision1_5Config.model_type] = HEAD.__name__
