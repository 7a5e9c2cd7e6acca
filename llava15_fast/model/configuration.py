"""Configurations of LLaVA-OneVision-1.5 in the published format.

LlavaOnevision1_5Config                     model_type "llavaonevision1_5"
|- vision_config  LlavaOnevision1_5VisionConfig   "rice_vit"
|- text_config    LlavaOnevision1_5TextConfig     "LLaVAOneVision1_5_text" (a Qwen3 configuration)
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, Qwen3Config
from transformers.activations import ACT2FN

UPSTREAM_TYPE = "llava_onevision1_5"
"""The `model_type` of the port in preparation upstream; its files load into the same classes."""

OWN_NAME = "Llava15Fast"
"""Prefix of our class names where transformers has its own class; saved configurations name the published ones."""

MAX_LAYERS = 1000
"""A bound on what a hostile configuration can allocate."""

RULES = {
    "layers": (lambda value: type(value) is int and 0 < value <= MAX_LAYERS, f"a whole number from 1 to {MAX_LAYERS}"),
    "sizes": (lambda value: type(value) is int and value > 0, "a whole number of at least 1"),
    "numbers": (lambda value: type(value) in (int, float) and 0 <= value < float("inf"), "a number of at least 0"),
    "bases": (lambda value: type(value) in (int, float) and 0 < value < float("inf"), "a number above 0"),
    "ids": (lambda value: type(value) is int and value >= 0, "a whole number of at least 0"),
    "mappings": (lambda value: value is None or isinstance(value, dict) or hasattr(value, "to_dict"), "a mapping"),
    "activations": (lambda value: value in ACT2FN, "an activation that transformers knows"),
}
"""Validation rules of fields. With zero layers or heads a model would load, and answer, without the file's weights."""


def _check(part: str, fields: dict[str, Any], **names: list[str]) -> None:
    """Raises ValueError if a field violates its rule. `names` is rule -> fields."""
    for rule, fields_of_rule in names.items():
        holds, expected = RULES[rule]
        for name in fields_of_rule:
            if not holds(value := fields.get(name)):
                raise ValueError(f"{part}{name} is {value!r}, expected {expected}")


class LlavaOnevision1_5VisionConfig(PreTrainedConfig):
    """The RICE vision transformer and its 2x2 patch merger.

    `text_hidden_size` is the width of the merged features (the upstream port calls it `out_hidden_size`);
    `rope_theta` is the base of 2D RoPE.
    """

    model_type = "rice_vit"
    base_config_key = "vision_config"
    attribute_map = {"num_attention_heads": "num_heads", "num_hidden_layers": "depth"}

    depth: int = 24
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_heads: int = 16
    hidden_act: str = "gelu"
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 1
    text_hidden_size: int = 2560
    layer_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if (out_hidden_size := kwargs.pop("out_hidden_size", None)) is not None:
            self.text_hidden_size = out_hidden_size
        super().__post_init__(**kwargs)
        sizes = ["hidden_size", "intermediate_size", "num_heads", "text_hidden_size", "in_channels", "patch_size"]
        sizes.append("spatial_merge_size")
        numbers = ["layer_norm_eps", "attention_dropout", "initializer_range"]
        rules = {
            "layers": ["depth"],
            "sizes": sizes,
            "numbers": numbers,
            "activations": ["hidden_act"],
            "bases": ["rope_theta"],
        }
        _check("vision ", vars(self), **rules)
        if self.hidden_size % (4 * self.num_heads):
            found = f"vision hidden_size {self.hidden_size} with num_heads {self.num_heads}"
            raise ValueError(f"{found}: 2D RoPE needs a head_dim that is a multiple of 4")
        if self.temporal_patch_size != 1:
            raise ValueError(f"temporal_patch_size {self.temporal_patch_size} is not supported, expected 1")


class LlavaOnevision1_5TextConfig(Qwen3Config):
    """The Qwen3 language model; the defaults are the 4B's.

    `rope_theta` and `rope_scaling` may be given at the top level, as in the published files.
    """

    model_type = "LLaVAOneVision1_5_text"
    base_config_key = "text_config"
    default_theta = 1000000.0

    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    max_window_layers: int = 36

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        sizes = ["hidden_size", "intermediate_size", "vocab_size", "head_dim", "num_attention_heads", "num_key_value_heads"]
        numbers = ["rms_norm_eps", "attention_dropout", "initializer_range"]
        rules = {"layers": ["num_hidden_layers"], "sizes": sizes, "numbers": numbers, "activations": ["hidden_act"]}
        _check("text ", vars(self), **rules)
        _check("text ", {"rope_theta": self.default_theta, **self.rope_parameters}, bases=["rope_theta"])
        if len(self.layer_types) < self.num_hidden_layers:
            raise ValueError(
                f"text layer_types is {self.layer_types}, expected one for each of {self.num_hidden_layers} layers"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            found = f"text num_attention_heads {self.num_attention_heads}"
            raise ValueError(f"{found} is not a multiple of num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ValueError(f"text head_dim {self.head_dim} is odd: RoPE rotates pairs")

    def to_dict(self) -> dict[str, Any]:
        """As Qwen3's, plus the `rope_theta` key of the published format."""
        output = super().to_dict()
        parameters = output.get("rope_parameters") or {}
        if parameters.get("rope_type") == "default" and "rope_theta" in parameters:
            output |= {"rope_theta": parameters["rope_theta"], "rope_scaling": None}
        return output


class LlavaOnevision1_5Config(PreTrainedConfig):
    """The whole model. If `tie_word_embeddings` is absent, `lm_head` has its own weight."""

    model_type = "llavaonevision1_5"
    sub_configs = {"vision_config": LlavaOnevision1_5VisionConfig, "text_config": LlavaOnevision1_5TextConfig}
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_outputs", "video_outputs"]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int | None = 151652
    vision_end_token_id: int | None = 151653
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _part(LlavaOnevision1_5TextConfig, self.text_config)
        width = self.text_config.hidden_size
        self.vision_config = _part(LlavaOnevision1_5VisionConfig, self.vision_config, text_hidden_size=width)
        # Older releases of transformers wrote the flag into the text configuration.
        self.tie_word_embeddings = bool(self.tie_word_embeddings or self.text_config.tie_word_embeddings)
        # Repeated at the published top level; the text configuration's value is the one that counts.
        kwargs.pop("vocab_size", None)
        super().__post_init__(**kwargs)
        _check("", vars(self), ids=["image_token_id", "video_token_id"])
        if (found := self.vision_config.text_hidden_size) != width:
            raise ValueError(f"vision text_hidden_size {found} must equal the text hidden_size {width}")

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if names := output.get("architectures"):
            output["architectures"] = [name.removeprefix(OWN_NAME) for name in names]
        return output

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', but ignores the file's attention implementation, which could name a repository with code."""
        _check("", config_dict, mappings=["text_config", "vision_config", "id2label", "label2id", "quantization_config"])
        ignored = ("model_type", "attn_implementation", "_attn_implementation")
        return super().from_dict({key: value for key, value in config_dict.items() if key not in ignored}, **kwargs)


def _part(config_class: type[PreTrainedConfig], given: Any, **defaults: Any) -> PreTrainedConfig:
    if isinstance(given, PreTrainedConfig):
        return given
    return config_class(**{**defaults, **{key: value for key, value in (given or {}).items() if key != "model_type"}})
