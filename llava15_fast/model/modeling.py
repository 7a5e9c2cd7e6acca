"""LLaVA-OneVision-1.5 on current transformers: the eager reference model.

    pixel_values (N, 3*14*14), grid_thw (n, 3)
        -> LlavaOnevision1_5VisionModel   patch embedding, class rows, 2D-RoPE transformer, 2x2 merger
        -> features (N/4, text width)     replace the embeddings of placeholder tokens
        -> Qwen3Model                     transformers' own text model
        -> lm_head

Module and parameter names are those of the original implementation. A *segment* is one temporal frame of an image or video:
attention in the vision tower is confined to a segment, and every segment starts with a class row.

The original code removes class rows at wrong offsets when there is more than one segment; here this is corrected.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from transformers import GenerationMixin, PreTrainedModel, Qwen3ForCausalLM, Qwen3Model
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger, VisionMlp
from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from llava15_kernels.vision_rope import apply_rope_tables, vision_rope_tables

from .checkpoint import check_checkpoint_files, published_names, register_tensor_names
from .configuration import LlavaOnevision1_5Config, LlavaOnevision1_5VisionConfig
from .releases import CACHE, KEEPS_TOWERS, HeadOutputWithPast, ModelOutputWithPast, as_argument

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Host-to-device copy that does not block the host, as a copy from pageable memory would."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def check_device(name: str, tensor: Tensor, module: nn.Module) -> None:
    """Raises ValueError if `tensor` is not on the device of `module`. accelerate's hooks move tensors themselves."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}, expected a tensor")
    device = module.weight.device
    if tensor.device != device and device.type != "meta" and not hasattr(module, "_hf_hook"):
        raise ValueError(f"{name} is on device {tensor.device}, expected {device}, where the model is")


@dataclass(frozen=True)
class VisionLayout:
    """Layout of the packed vision sequence; computed once per forward, the same for every layer.

    Attributes:
        lengths: rows per segment, class row included.
        cu_seqlens: (segments + 1,) int32, their cumulative sum.
        position_ids: (S, 2) int32, (row, column) of a patch in its grid; (-1, -1) for a class row.
        patch_rows: (N,) indices of the patch rows.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    position_ids: Tensor
    patch_rows: Tensor

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    @classmethod
    def from_grids(cls, grids: list[list[int]], merge_size: int, device: torch.device) -> VisionLayout:
        """`grids` holds (t, h, w) in patches per image or video, already validated."""
        lengths: list[int] = []
        positions: list[Tensor] = []
        # On the host, whatever the default device is.
        numbers: dict[str, Any] = {"dtype": torch.int32, "device": "cpu"}
        class_row = torch.full((1, 2), -1, **numbers)
        for t, h, w in grids:
            grid = torch.cartesian_prod(torch.arange(h, **numbers), torch.arange(w, **numbers))
            # The image processor stores patches merge block by merge block.
            blocks = grid.view(h // merge_size, merge_size, w // merge_size, merge_size, 2).transpose(1, 2)
            positions += [class_row, blocks.reshape(h * w, 2)] * t
            lengths += [h * w + 1] * t
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], **numbers)
        position_ids = torch.cat(positions)
        patch_rows = (position_ids[:, 0] >= 0).nonzero()[:, 0]
        return cls(tuple(lengths), *(send(tensor, device) for tensor in (cu_seqlens, position_ids, patch_rows)))


class LlavaOnevision1_5VisionPatchEmbed(nn.Module):
    """(N, 3*14*14) pixels -> (N, hidden). The kernel of the convolution covers a whole patch."""

    def __init__(self, config: LlavaOnevision1_5VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        kernel = self.proj.weight.shape[1:]
        return self.proj(pixel_values.to(self.proj.weight.dtype).view(-1, *kernel)).flatten(1)


class LlavaOnevision1_5VisionRotaryEmbedding(nn.Module):
    """(S, 2) positions -> cos and sin tables (S, head_dim) of 2D RoPE, in float32.

    The inverse frequencies are f_i = theta^(-2i / (head_dim/2)), i < head_dim/4; class rows have learned angles.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: LlavaOnevision1_5VisionConfig) -> None:
        super().__init__()
        self.dim = config.hidden_size // config.num_heads // 2
        self.theta = config.rope_theta
        self.register_buffer("inv_freq", self.compute_inv_freq(), persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """`.half()` and `.bfloat16()` keep the frequencies in float32: rounded, they would be wrong for distant patches."""
        super()._apply(fn, recurse)
        if self.inv_freq.dtype in (torch.float16, torch.bfloat16):
            self.inv_freq = self.compute_inv_freq().to(self.inv_freq.device)
        return self

    def compute_inv_freq(self) -> Tensor:
        return 1.0 / (self.theta ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim))

    def forward(self, position_ids: Tensor, class_pos_emb: Tensor) -> tuple[Tensor, Tensor]:
        return vision_rope_tables(position_ids, self.inv_freq, class_pos_emb)


class LlavaOnevision1_5VisionAttention(Qwen2_5_VLVisionAttention):
    """Multi-head attention within each segment, with 2D RoPE on queries and keys and a packed qkv projection."""

    def __init__(self, config: LlavaOnevision1_5VisionConfig) -> None:
        super().__init__(config)
        self.attention_dropout = config.attention_dropout

    def forward(
        self, hidden_states: Tensor, layout: VisionLayout, cos: Tensor, sin: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | tuple[Tensor, ...] | None]:
        """(S, hidden) -> (S, hidden), and the attention weights if the implementation returns them, as a tuple for several
        segments."""
        query, key, value = self.qkv(hidden_states).view(-1, 3, self.num_heads, self.head_dim).unbind(1)
        query, key = apply_rope_tables(query, key, cos, sin)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        options = dict(attention_mask=None, scaling=self.scaling, dropout=dropout, is_causal=False, **kwargs)
        segments = (tensor.transpose(0, 1)[None].split(layout.lengths, dim=2) for tensor in (query, key, value))
        outputs, weights = zip(*(attention(self, *segment, **options) for segment in zip(*segments, strict=True)), strict=True)
        hidden_states = torch.cat(outputs, dim=1).reshape(hidden_states.shape)
        return self.proj(hidden_states), weights[0] if len(weights) == 1 or weights[0] is None else weights


class LlavaOnevision1_5VisionBlock(GradientCheckpointingLayer):
    """x += attn(norm1(x)); x += mlp(norm2(x))."""

    def __init__(self, config: LlavaOnevision1_5VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = LlavaOnevision1_5VisionAttention(config)
        self.mlp = VisionMlp(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), *args, **kwargs)[0]
        return hidden_states + self.mlp(self.norm2(hidden_states))


class LlavaOnevision1_5PreTrainedModel(PreTrainedModel):
    config: LlavaOnevision1_5Config
    config_class = LlavaOnevision1_5Config
    base_model_prefix = "model"
    published_prefix = ""
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen3DecoderLayer", "LlavaOnevision1_5VisionBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """transformers looks up tensor name mappings by class name, which a user's subclass changes."""
        super().__init_subclass__(**kwargs)
        if cls.__module__ != __name__:  # `register` handles ours, which may have to make way for transformers' own classes
            register_tensor_names(cls)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LlavaOnevision1_5VisionRotaryEmbedding):
            init.copy_(module.inv_freq, module.compute_inv_freq())
        elif isinstance(module, LlavaOnevision1_5VisionModel):
            init.normal_(module.class_embedding, mean=0.0, std=module.config.hidden_size**-0.5)
            init.normal_(module.class_pos_emb, mean=0.0, std=1.0)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', after a check of the files in a local folder; loads safetensors only, unless told otherwise.

        Code from a checkpoint never runs, with or without `trust_remote_code`: all code needed is in this package.

        Raises:
            OSError: a safetensors file of the folder is missing or corrupt; the message names it.
        """
        kwargs.pop("trust_remote_code", None)
        check_checkpoint_files(pretrained_model_name_or_path, kwargs.get("subfolder") or "", kwargs.get("variant"))
        kwargs.setdefault("use_safetensors", True)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', always with the published tensor names, whatever naming the model was loaded with."""
        loaded_names = getattr(self, "_weight_conversions", None)
        if getattr(self, "hf_quantizer", None) is None:
            self._weight_conversions = published_names(self.published_prefix)
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self._weight_conversions = loaded_names  # type: ignore[assignment]


class LlavaOnevision1_5VisionModel(LlavaOnevision1_5PreTrainedModel):
    """The vision tower: `visual(pixel_values, grid_thw=...).pooler_output` holds the merged features."""

    config: LlavaOnevision1_5VisionConfig
    config_class = LlavaOnevision1_5VisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image", "video")  # type: ignore[assignment]
    _no_split_modules = ["LlavaOnevision1_5VisionBlock"]
    _input_embed_layer = "patch_embed"
    _can_record_outputs = {"hidden_states": LlavaOnevision1_5VisionBlock, "attentions": LlavaOnevision1_5VisionAttention}

    def __init__(self, config: LlavaOnevision1_5VisionConfig) -> None:
        super().__init__(config)
        self.spatial_merge_size = config.spatial_merge_size
        self.patch_embed = LlavaOnevision1_5VisionPatchEmbed(config)
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.class_pos_emb = nn.Parameter(torch.empty(1, config.hidden_size // config.num_heads // 2))
        self.rotary_pos_emb = LlavaOnevision1_5VisionRotaryEmbedding(config)
        self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList([LlavaOnevision1_5VisionBlock(config) for _ in range(config.depth)])
        self.merger = PatchMerger(config.text_hidden_size, config.hidden_size, config.spatial_merge_size)
        self.merger.ln_q.eps = config.layer_norm_eps
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, grid_thw: Tensor | None = None, layout: VisionLayout | None = None, **kwargs: Any
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Args:
            pixel_values: (N, channels * patch * patch) rows of the image processor, in merge-block order.
            grid_thw: (n, 3) integers, (t, h, w) in patches of every image or video; sum of t*h*w is N.
            layout: alternative to `grid_thw`, from `VisionLayout.from_grids`; then nothing is copied to the host, and the
                whole forward can be compiled or captured.

        Returns:
            `last_hidden_state` (N, hidden) before the merger and `pooler_output` (N/4, text width).

        Raises:
            ValueError: the grid does not match the pixels or the merge size.
        """
        if layout is None:
            grids = self.check_inputs(pixel_values, grid_thw)
            layout = VisionLayout.from_grids(grids, self.spatial_merge_size, pixel_values.device)
        hidden_states = self.encode(self.embed_patches(pixel_values, layout), layout, **kwargs)
        patches, merged = self.merge_patches(hidden_states, layout)
        return BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=merged)

    def embed_patches(self, pixel_values: Tensor, layout: VisionLayout) -> Tensor:
        """(N, pixels) -> (S, hidden): patch embedding, a class row before each segment, pre_layernorm."""
        patches = self.patch_embed(pixel_values)
        class_row = self.class_embedding.to(patches.dtype)[None]
        segments = patches.split([length - 1 for length in layout.lengths])
        rows = [row for segment in segments for row in (class_row, segment)]
        return self.pre_layernorm(torch.cat(rows))

    def encode(self, hidden_states: Tensor, layout: VisionLayout, **kwargs: Any) -> Tensor:
        """(S, hidden) -> (S, hidden), through the blocks."""
        # Not as a tuple: gradient checkpointing detaches tensor arguments, but not tensors inside containers.
        cos, sin = self.rotary_pos_emb(layout.position_ids, self.class_pos_emb)
        for block in self.blocks:
            hidden_states = block(hidden_states, layout, cos, sin, **kwargs)
        return hidden_states

    def merge_patches(self, hidden_states: Tensor, layout: VisionLayout) -> tuple[Tensor, Tensor]:
        """(S, hidden) -> the patches (N, hidden) without class rows, and the merged features (N/4, text width)."""
        patches = hidden_states[layout.patch_rows.to(hidden_states.device)]
        return patches, self.merger(patches)

    def check_inputs(self, pixel_values: Tensor, grid_thw: Tensor) -> list[list[int]]:
        """The grids as Python integers, validated against the pixels."""
        shape = getattr(grid_thw, "shape", ())
        if len(shape) != 2 or shape[-1] != 3 or shape[0] == 0:
            found = f"has shape {tuple(shape)}" if hasattr(grid_thw, "shape") else f"is a {type(grid_thw).__name__}"
            raise ValueError(f"grid_thw {found}, expected a tensor (images, 3) with (t, h, w) per image")
        check_device("pixel_values", pixel_values, self.patch_embed.proj)
        width = self.config.in_channels * self.config.patch_size**2
        if pixel_values.ndim != 2 or pixel_values.shape[-1] != width:
            raise ValueError(f"pixel_values has shape {tuple(pixel_values.shape)}, expected (patches, {width})")
        grids, merge = grid_thw.tolist(), self.spatial_merge_size
        for index, (t, h, w) in enumerate(grids):
            if not all(type(size) is int for size in (t, h, w)) or min(t, h, w) < 1 or h % merge or w % merge:
                expected = f"positive integers with h and w divisible by the merge size {merge}"
                raise ValueError(f"grid_thw[{index}] is ({t}, {h}, {w}), expected {expected}")
        if (patches := sum(map(math.prod, grids))) != pixel_values.shape[0]:
            raise ValueError(f"grid_thw {grids} describes {patches} patches, but pixel_values has {pixel_values.shape[0]}")
        return grids


class LlavaOnevision1_5Model(LlavaOnevision1_5PreTrainedModel):
    """Vision tower and language model; returns hidden states."""

    def __init__(self, config: LlavaOnevision1_5Config) -> None:
        super().__init__(config)
        self.visual = LlavaOnevision1_5VisionModel._from_config(config.vision_config)
        self.language_model = Qwen3Model._from_config(config.text_config)
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor, **kwargs: Any
    ) -> tuple | BaseModelOutputWithPooling:
        """The vision tower's output with `pooler_output` split: one (t*h*w/4, text width) tensor per image."""
        pixel_values = pixel_values.to(self.visual.class_embedding.dtype)  # replicas have no parameters to ask for `dtype`
        # Before the tower is launched: a read after it would block the host.
        counts = self.feature_counts("image", pixel_values, image_grid_thw)
        output = self.visual(pixel_values, grid_thw=image_grid_thw, **{**kwargs, "return_dict": True})
        output.pooler_output = output.pooler_output.split(counts)
        return output

    def get_video_features(self, pixel_values_videos: Tensor, video_grid_thw: Tensor, **kwargs: Any) -> Any:
        """As `get_image_features`, one tensor per video."""
        return self.get_image_features(pixel_values_videos, video_grid_thw, **kwargs)

    def placeholder_mask(self, kind: str, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(B, L) mask of the placeholders of `kind`: by id, or by embedding if there are no ids."""
        token_id = getattr(self.config, f"{kind}_token_id")
        if input_ids is not None and input_ids.shape[-1]:
            return input_ids == token_id
        placeholder = self.get_input_embeddings()(torch.tensor(token_id, device=inputs_embeds.device))
        return (inputs_embeds == placeholder).all(-1)

    def feature_counts(self, kind: str, pixels: Tensor, grid_thw: Tensor | None) -> list[int]:
        """Features per image or video. Raises ValueError if grids and pixels do not match."""
        if grid_thw is None:
            raise ValueError(f"{kind} pixels were passed without {kind}_grid_thw")
        return [math.prod(grid) // self.visual.spatial_merge_size**2 for grid in self.visual.check_inputs(pixels, grid_thw)]

    def check_placeholders(self, kind: str, mask: Tensor, features: int) -> None:
        """Raises ValueError if there are not as many placeholders as features."""
        if (count := int(mask.sum())) != features:
            found = f"{count} {kind} placeholder tokens (id {getattr(self.config, f'{kind}_token_id')}) in the prompt"
            unequal = f"the {kind} inputs give {features} features: they must be equal"
            raise ValueError(f"{found}, but {unequal if features else f'no {kind} pixels were passed'}")

    def check_pixels(self, input_ids: Tensor, cache: Cache | None, **pixels: Tensor | None) -> None:
        """Raises ValueError if a prompt has placeholders of a kind ("image", "video") without pixels. After the prompt, they
        may be tokens that the model has sampled."""
        unknown = torch.compiler.is_compiling() or torch.jit.is_tracing() or input_ids.is_meta or is_fake(input_ids)
        if unknown or (cache is not None and cache.get_seq_length()):
            return
        for kind in (kind for kind, given in pixels.items() if given is None):
            self.check_placeholders(kind, input_ids == getattr(self.config, f"{kind}_token_id"), 0)

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, use_cache: bool | None = None,
        pixel_values: Tensor | None = None, pixel_values_videos: Tensor | None = None, image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None, mm_token_type_ids: Tensor | None = None, cache: Cache | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None, **kwargs: Any,
    ) -> tuple | ModelOutputWithPast:  # fmt: skip
        """
        Args:
            input_ids: (B, L) token ids, or `inputs_embeds` (B, L, width) in their place.
            attention_mask: (B, L), 0 where a token is padding.
            position_ids: (B, L); by default 0, 1, 2, ... (plain 1D positions, no mrope).
            pixel_values: (N, 3*14*14) patches of all images, with `image_grid_thw` (images, 3).
            pixel_values_videos: the same for video frames, with `video_grid_thw` (videos, 3).
            mm_token_type_ids: accepted for callers that pass every processor output; not needed.
            cache: `past_key_values` by its newer name (`releases.py`).
            mm_encoder_outputs: {"image": output of `get_image_features`, "video": ...}, in place of pixels.

        Raises:
            ValueError: placeholders and features, or grids and pixels, do not match; or a prompt (with nothing cached before
                it) has placeholders without pixels.
        """
        cache = past_key_values if cache is None else cache
        encoded = {kind: output for kind, output in (mm_encoder_outputs or {}).items() if output is not None}
        # On the host before the first tower is launched: a read after it would block the host.
        grids = {"image": image_grid_thw, "video": video_grid_thw}
        grids = {kind: grid.cpu() if isinstance(grid, Tensor) else grid for kind, grid in grids.items()}
        pixels = {"image": pixel_values, "video": pixel_values_videos}
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            check_device("input_ids", input_ids, self.get_input_embeddings())
            if cache is None and mm_encoder_outputs is None:  # `generate` has checked
                self.check_pixels(input_ids, cache, **{kind: encoded.get(kind, given) for kind, given in pixels.items()})
            inputs_embeds = self.get_input_embeddings()(input_ids)
        masks = {}
        for kind in (kind for kind, given in pixels.items() if given is not None or kind in encoded):
            if kind in encoded and pixels[kind] is not None:
                raise ValueError(f"{kind}s were passed as pixels and in mm_encoder_outputs, expected one of these")
            masks[kind] = self.placeholder_mask(kind, input_ids, inputs_embeds)
            known = encoded[kind].pooler_output if kind in encoded else None
            counts = self.feature_counts(kind, pixels[kind], grids[kind]) if known is None else map(len, known)
            self.check_placeholders(kind, masks[kind], sum(counts))
        for kind, mask in masks.items():
            if kind not in encoded:
                encoded[kind] = self.get_image_features(pixels[kind], grids[kind], return_dict=True)
            features = torch.cat(tuple(encoded[kind].pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(mask.to(inputs_embeds.device)[..., None], features)
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        outputs = self.language_model(**inputs, use_cache=use_cache, **{**kwargs, **as_argument(cache), "return_dict": True})
        towers = {f"{kind}_outputs": encoded.get(kind) for kind in pixels} if KEEPS_TOWERS else {}
        return ModelOutputWithPast(**outputs, **towers)


class LlavaOnevision1_5ForConditionalGeneration(LlavaOnevision1_5PreTrainedModel, GenerationMixin):
    """The model with its language modeling head, which has `generate`."""

    published_prefix = "model."
    _tp_plan = Qwen3ForCausalLM._tp_plan
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: LlavaOnevision1_5Config) -> None:
        super().__init__(config)
        self.model = LlavaOnevision1_5Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, input_ids: Tensor | None = None, **model_kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeats each prompt for beams and multiple return sequences; its images are encoded once and the features repeated.

        Placeholders without pixels are refused here, since an assistant model's forwards get no pixels.
        """
        encoded = {**(model_kwargs.pop("mm_encoder_outputs", None) or {})}
        given = {kind: encoded.get(kind, model_kwargs.get(name)) for kind, name in PIXELS.items()}
        if input_ids is not None:
            self.model.check_pixels(input_ids, model_kwargs.get(CACHE), **given)
        for kind in (kind for kind in PIXELS if expand_size > 1 and given[kind] is not None):
            mask = self.model.placeholder_mask(kind, input_ids, model_kwargs.get("inputs_embeds"))
            bounds = [0, *accumulate(mask.sum(-1).tolist())]
            if encoded.get(kind) is None:
                pixels, grid_thw = model_kwargs.pop(PIXELS[kind]), model_kwargs.pop(f"{kind}_grid_thw", None)
                encoded[kind] = self.get_image_features(pixels, grid_thw, return_dict=True)
            features = encoded[kind].pooler_output
            ends = [0, *accumulate(map(len, features))]
            if not {*bounds} <= {*ends} or bounds[-1] != ends[-1]:
                raise ValueError(f"placeholders of the prompts end at {bounds[1:]}, but the features of {kind}s at {ends[1:]}")
            cuts = pairwise(ends.index(bound) for bound in bounds)
            repeated = [one for a, b in cuts for one in [*features[a:b]] * expand_size]
            encoded[kind] = BaseModelOutputWithPooling(pooler_output=repeated)
        expand = super()._expand_inputs_for_generation
        input_ids, model_kwargs = expand(expand_size=expand_size, input_ids=input_ids, **model_kwargs)
        return input_ids, {**model_kwargs, **({"mm_encoder_outputs": encoded} if encoded else {})}

    def _maybe_prepare_encoder_kwargs_for_generation(self, inputs: Any, model_kwargs: Any, name: Any, config: Any) -> Any:
        """Encodes images before prefill only if that is chunked: within a forward, reads precede the launches."""
        prepare = super()._maybe_prepare_encoder_kwargs_for_generation
        return model_kwargs if config.prefill_chunk_size is None else prepare(inputs, model_kwargs, name, config)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, is_first_iteration: bool = False, **kwargs: Any) -> dict[str, Any]:
        """As transformers', whose older releases take a prompt's first chunk for a step, and pass features to every step."""
        if not KEEPS_TOWERS and (cache := kwargs.get(CACHE)) is not None and not cache.is_compileable:
            is_first_iteration |= cache.get_seq_length() == 0
        if not kwargs.get("use_cache", True):
            kwargs.setdefault("mm_encoder_outputs", {})  # placeholders may have been sampled
        elif not is_first_iteration:
            kwargs.pop("mm_encoder_outputs", None)
        return super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)

    def _check_text(self, input_ids: list[int]) -> None:
        """Continuous batching takes token ids only. Raises ValueError if they contain placeholders."""
        self.model.check_pixels(torch.tensor([[*input_ids]], device="cpu"), None, image=None, video=None)

    @functools.wraps(GenerationMixin.generate_batch)
    def generate_batch(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        for input_ids in inputs:
            self._check_text(input_ids)
        return super().generate_batch(inputs, *args, **kwargs)

    @functools.wraps(GenerationMixin.init_continuous_batching)
    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().init_continuous_batching(*args, **kwargs)
        add_request = type(manager).add_request.__get__(manager)
        manager.add_request = lambda input_ids, *args, **kwargs: (
            self._check_text(input_ids),  # type: ignore[func-returns-value]
            add_request(input_ids, *args, **kwargs),
        )[1]
        return manager

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor, **kwargs: Any) -> Any:
        """See `LlavaOnevision1_5Model.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

    def get_video_features(self, pixel_values_videos: Tensor, video_grid_thw: Tensor, **kwargs: Any) -> Any:
        """See `LlavaOnevision1_5Model.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, video_grid_thw, **kwargs)

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, pixel_values: Tensor | None = None, pixel_values_videos: Tensor | None = None,
        image_grid_thw: Tensor | None = None, video_grid_thw: Tensor | None = None, mm_token_type_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0, cache: Cache | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None, **kwargs: Any,
    ) -> tuple | HeadOutputWithPast:  # fmt: skip
        """As `LlavaOnevision1_5Model.forward`, plus

        Args:
            labels: (B, L) target token ids, -100 to ignore a position; shifted here.
            logits_to_keep: number of last positions to compute logits for (0: all), or their indices.
        """
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
            past_key_values=past_key_values if cache is None else cache, use_cache=use_cache, pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos, image_grid_thw=image_grid_thw, video_grid_thw=video_grid_thw,
            mm_encoder_outputs=mm_encoder_outputs, **{**kwargs, "return_dict": True},
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return HeadOutputWithPast(loss=loss, logits=logits, **others)
