"""Guards: whether the fast path computes what transformers' forward would.

A request (`request.py`) evaluates them once, when it begins. Each returns None, or the reason for a fallback, which the report
shows. The tables list the modules that fused code bypasses; functions are compared by identity with the objects seen at import.
Anything unknown falls back.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Container
from functools import cached_property
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers import GenerationMixin
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from llava15_kernels._dispatch import FLOAT_DTYPES

from ..model import modeling
from ..model.modeling import LlavaOnevision1_5ForConditionalGeneration as Head
from ..model.releases import CACHE


class Part(NamedTuple):
    """What a module must be: one whose `method` the patched class replaces with `kernels`, or, with no kernels, one that fused
    code bypasses.

    `path` is relative to the module with the fused code, `*` meaning every child; `parameters` are the names of the method's,
    `size` names the only dimension of a norm's weight, and `numbers` are attributes baked into a captured graph.
    """

    path: str
    module_class: type[nn.Module]
    parameters: str
    size: str = ""
    numbers: tuple[str, ...] = ()
    method: str = "forward"
    kernels: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As shown in the report."""
        return ".".join(part for part in (self.path, self.method.removeprefix("forward")) if part)


def _rms_norm(path: str, size: str) -> Part:
    return Part(path, qwen3.Qwen3RMSNorm, "hidden_states", size, ("variance_epsilon",))


def _layer_norm(path: str) -> Part:
    return Part(path, nn.LayerNorm, "input", "width", ("eps",))


_LAYER = f"hidden_states attention_mask position_ids {CACHE} use_cache position_embeddings kwargs"
_TEXT_ATTENTION = f"hidden_states position_embeddings attention_mask {CACHE} kwargs"
TEXT_PARTS = (
    _rms_norm("norm", "width"),
    Part("rotary_emb", qwen3.Qwen3RotaryEmbedding, "x position_ids", "", ("attention_scaling",)),
    Part("layers.*", qwen3.Qwen3DecoderLayer, _LAYER),
    _rms_norm("layers.*.input_layernorm", "width"),
    _rms_norm("layers.*.post_attention_layernorm", "width"),
    Part("layers.*.self_attn", qwen3.Qwen3Attention, _TEXT_ATTENTION, "", ("scaling",)),
    _rms_norm("layers.*.self_attn.q_norm", "head_dim"),
    _rms_norm("layers.*.self_attn.k_norm", "head_dim"),
    Part("layers.*.mlp", qwen3.Qwen3MLP, "x"),
)
EMBED_PARTS = (
    Part("patch_embed", modeling.LlavaOnevision1_5VisionPatchEmbed, "pixel_values"),
    Part("patch_embed.proj", nn.Conv2d, "input"),
    _layer_norm("pre_layernorm"),
)
_BLOCK_ATTENTION = "hidden_states layout cos sin kwargs"
ENCODE_PARTS = (
    Part("rotary_pos_emb", modeling.LlavaOnevision1_5VisionRotaryEmbedding, "position_ids class_pos_emb"),
    Part("blocks.*", modeling.LlavaOnevision1_5VisionBlock, "hidden_states args kwargs"),
    _layer_norm("blocks.*.norm1"),
    _layer_norm("blocks.*.norm2"),
    Part("blocks.*.attn", modeling.LlavaOnevision1_5VisionAttention, _BLOCK_ATTENTION, "", ("scaling",)),
    Part("blocks.*.mlp", modeling.VisionMlp, "x"),
)
MERGE_PARTS = (Part("merger", modeling.PatchMerger, "x"), _layer_norm("merger.ln_q"))
"""Parents before their children."""

_QKV = {"self_attn.q_proj": "q width", "self_attn.k_proj": "kv width", "self_attn.v_proj": "kv width"}
_MLP = {"mlp.gate_proj": "inner width", "mlp.up_proj": "inner width", "mlp.down_proj": "width inner"}
TEXT_LINEARS = {**_QKV, "self_attn.o_proj": "width q", **_MLP}
BLOCK_LINEARS = {"attn.qkv": "qkv width", "attn.proj": "width width", "mlp.fc1": "inner width", "mlp.fc2": "width inner"}

SILU = (nn.SiLU, type(ACT2FN["silu"]))
GELU = (nn.GELU, type(ACT2FN["gelu"]))

STATIC_ROPE = ("default", "linear", "yarn", "llama3")
"""RoPE types whose frequencies do not depend on the input."""

ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
"""Attention implementations that compute the same function."""

OPTIONS = ("output_attentions", "output_hidden_states", "return_dict", "is_causal", "num_items_in_batch", "tokenizer")
"""Known keyword arguments of a forward; any other may change what attention computes."""

_TRUSTED = tuple(
    str(Path(sys.modules[name].__file__).parent) for name in ("torch", "transformers", "llava15_kernels", "llava15_fast")
)


def _is_theirs(function: Any) -> bool:
    """Whether the code is torch's, transformers' or ours: `functools.wraps` copies names, but not the code's file."""
    if isinstance(function, functools.partial):
        function = function.func
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return code is None or code.co_filename.startswith(_TRUSTED)


def _seen(owner: Any, *names: str) -> list[tuple[Any, str, Any]]:
    """(owner, name, value) per attribute; the value is None if third-party code had replaced it before import."""
    values = [(name, getattr(owner, name)) for name in names if hasattr(owner, name)]
    return [(owner, name, value if _is_theirs(value) else None) for name, value in values]


def _methods(*classes: type) -> list[tuple[Any, str, Any]]:
    """Methods of the classes and their bases; of `nn.Module` only those on the call path."""
    found = []
    for cls in dict.fromkeys(classes):
        owners = [owner for owner in cls.__mro__ if owner not in (object, nn.Module)]
        names = dict.fromkeys(name for owner in owners for name in vars(owner) if isinstance(getattr(cls, name), FunctionType))
        called = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__") if issubclass(cls, nn.Module) else ()
        found += _seen(cls, *names, *called)
    return found


_ATTENTION = ("eager_attention_forward", "ALL_ATTENTION_FUNCTIONS")
_PRODUCTS = ("linear", "softmax", "scaled_dot_product_attention")
_MASKS = ("create_causal_mask", "create_sliding_window_causal_mask")
WATCHED = {
    "text": _methods(*(part.module_class for part in TEXT_PARTS), *SILU)
    + _seen(qwen3, "apply_rotary_pos_emb", "rotate_half", "repeat_kv", *_ATTENTION, *_MASKS)
    + _seen(nn.functional, "silu", *_PRODUCTS),
    "embed": _methods(*(part.module_class for part in EMBED_PARTS)) + _seen(nn.functional, "linear", "conv2d", "layer_norm"),
    "encode": _methods(*(part.module_class for part in ENCODE_PARTS), *GELU)
    + _seen(modeling, "apply_rope_tables", "vision_rope_tables", *_ATTENTION)
    + _seen(qwen3, "repeat_kv")
    + _seen(nn.functional, "gelu", "layer_norm", *_PRODUCTS),
    "merge": _methods(*(part.module_class for part in MERGE_PARTS)) + _seen(nn.functional, "layer_norm"),
    "cache": _methods(DynamicCache, Cache, DynamicLayer, CacheLayerMixin),
    "linear": _methods(nn.Linear),
}
CACHE_METHODS = frozenset(name for _, name, _ in WATCHED["cache"])

LOOP = {
    name: getattr(Head, name)
    for name in vars(GenerationMixin)
    if isinstance(getattr(Head, name), FunctionType) and _is_theirs(getattr(Head, name))
}
"""Methods that a decode step of `generate` goes through; if all are known, so is what each step does."""

FAST: dict[type[nn.Module], type[nn.Module]] = {}
"""Class -> class of a patched instance."""


def stands_for(base: Any) -> Callable[[type], type]:
    """Registers the patched class of `base`, under the same `__name__`, which `save_pretrained` writes to the configuration."""

    def declare(cls: type) -> type:
        cls.__name__ = base.__name__
        # transformers records hidden states only for classes in this registry and silently returns None for others.
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), base._can_record_outputs)
        FAST[base] = cls
        return cls

    return declare


def original(patched: type, module: nn.Module, name: str) -> Callable[..., Any]:
    """The unpatched method, as a function: a `super()` that keeps working if another thread unpatches during the call."""
    if torch.compiler.is_compiling():  # Dynamo traces `super` of an instance only
        bound = getattr(super(patched, module), name)
        return lambda _, *args, **kwargs: bound(*args, **kwargs)
    cls = type(module)
    return getattr(super(patched, cls) if issubclass(cls, patched) else cls, name)


FORWARDS = {cls: cls.forward for cls in (Head, modeling.LlavaOnevision1_5Model, qwen3.Qwen3Model)}

KNOWN_ATTENTION = {
    name: tuple(
        functions.get(name) if _is_theirs(functions.get(name)) else object()
        for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    )
    for name in ATTENTIONS
}
"""name -> attention and mask function; a sentinel that equals nothing if third-party code had replaced one."""


def replaced(group: str) -> str | None:
    """Which entry of `WATCHED[group]` has changed since import, or None."""
    for owner, name, value in WATCHED[group]:
        if getattr(owner, name, None) is not value or value is None:
            return f"{owner.__name__}.{name} was replaced"
    return None


def walk(root: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """The modules that match `path`, each with its resolved path.

    Raises:
        LookupError: a component of the path does not exist; the message says which.
    """
    found = [("", root)]
    for name in path.split("."):
        parents, found = found, []
        for done, module in parents:
            if name == "*":
                found += [(f"{done}.{index}", child) for index, child in module._modules.items()]
            elif (child := getattr(module, name, None)) is not None:
                found.append((f"{done}.{name}" if done else name, child))
            else:
                raise LookupError(f"{done or type(root).__name__} has no {name!r}")
    return found


def inside(module: nn.Module) -> nn.Module:
    """The module inside a PEFT adapter or beside PEFT's trainable copy; any other module unchanged."""
    for name in ("base_layer", "original_module"):
        if name in module._modules:
            return inside(module._modules[name])
    return module


def _unwrapped(function: Any) -> Any:
    """transformers wraps a layer's forward, and a subclass's once more; third-party wrappers are not removed."""
    while _is_theirs(function) and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def difference(path: str, module: nn.Module, module_class: type[nn.Module], method: str = "forward") -> str | None:
    """Why the class of `module` may compute something other than `module_class` does, or None."""
    if not isinstance(module, module_class):
        return f"{path} is a {type(module).__name__}, expected {module_class.__name__}"
    found, expected = (_unwrapped(getattr(cls, method, None)) for cls in (type(module), module_class))
    if found is not expected:
        return f"{path}: {type(module).__name__} has its own {method}, expected {module_class.__name__}'s"
    return None


def is_replaced(module: nn.Module, slot: str = "forward", method: str = "forward") -> bool:
    """Whether the instance overrides the method; its class's method bound to it, which accelerate leaves behind, does not."""
    present = vars(module).get(slot)
    return present is not None and not (isinstance(present, MethodType) and present.__func__ is getattr(type(module), method))


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has forward hooks, or accelerate loads its weights only when it is called.

    transformers' own recording hooks do not count: they stay registered, dormant, once hidden states were requested.
    """
    if "_hf_hook" in module.__dict__:
        return True
    if not module._forward_hooks and not module._forward_pre_hooks:
        return False
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)


def is_plain(layer: nn.Module) -> bool:
    """Whether `layer` computes just x W^T + b, with no hooks."""
    if type(layer) is not nn.Linear or has_hooks(layer) or "forward" in vars(layer):
        return False
    # A quantized weight is a tensor subclass in a parameter; replicas of DataParallel have plain tensors.
    return type(layer.weight) in (nn.Parameter, torch.Tensor) or is_fake(layer.weight)


def _module_guard(path: str, module: nn.Module, module_class: type[nn.Module]) -> str | None:
    if type(module) is not module_class:
        if inside(module) is not module:
            return f"an adapter on {path}, which the fused code would bypass"
        if found := difference(path, module, module_class) or difference(path, module, module_class, "__call__"):
            return found
        if "parametrizations" in module._modules:
            return f"{path} is parametrized"
    if has_hooks(module):
        return f"a hook on {path}, which the fused code would bypass"
    return f"{path}.forward was replaced" if is_replaced(module) else None


def _activation_guard(module: nn.Module, classes: Container[type[nn.Module]]) -> str | None:
    """The same for an activation, which the configuration selects."""
    if has_hooks(module):
        return "a hook on an activation, which the fused code would bypass"
    if type(module) not in classes or is_replaced(module) or getattr(module, "approximate", "none") != "none":
        return f"no kernel for the activation {type(module).__name__}"
    return None


def _vision_sizes(module: nn.Module) -> dict[str, int]:
    return {"width": module.config.hidden_size, "qkv": 3 * module.config.hidden_size}


class Table(NamedTuple):
    """What one part of the model must be; `name` is also its key in `WATCHED`.

    Attributes:
        sizes: module -> values of named dimensions; names without a value must agree within a layer.
        blocks, linears: the path of the layers and, within each, path -> dimensions of linear layers, which are called as
            modules and may carry adapters.
        guard, block_guard: check the settings of the module, and of each layer.
        extra: other tensors that are read.
    """

    name: str
    parts: tuple[Part, ...]
    guard: Callable[[Any], str | None]
    sizes: Callable[[Any], dict[str, int]] = _vision_sizes
    blocks: str = ""
    linears: dict[str, str] = {}
    block_guard: Callable[[Any, Any], str | None] = lambda block, config: None
    extra: tuple[str, ...] = ()


class Facts:
    """What the guards found in a part of the model when a request began.

    Attributes:
        guard: the reason for a fallback, or None.
        plain: whether all linear layers are `is_plain`.
        row_by_row: whether all of them, adapters included, compute each row independently of its position.
    """

    def __init__(self, table: Table, module: nn.Module) -> None:
        self.table, self.module = table, module
        self.weight: torch.Tensor | None = None  # the first one; all must share its dtype
        self.plain = self.row_by_row = not replaced("linear")
        self._tensors: list[torch.Tensor] = []
        self._numbers: list[float] = []
        try:
            self.guard = context_guard() or replaced(table.name) or self._look_at(table, module)
        except LookupError as error:
            self.guard = str(error)

    def _look_at(self, table: Table, module: nn.Module) -> str | None:
        sizes = table.sizes(module)
        for part in table.parts:
            for path, child in walk(module, part.path):
                if reason := _module_guard(path, child, part.module_class) or self._norm_guard(path, child, part, sizes):
                    return reason
                self._numbers += [getattr(child, name) for name in part.numbers]
        if reason := table.guard(module):
            return reason
        blocks = list(getattr(module, table.blocks)) if table.blocks else []
        for block in blocks:
            if reason := table.block_guard(block, module.config):
                return reason
        sizes_of = [dict(sizes) for _ in blocks]
        for path, dimensions in table.linears.items():
            names = dimensions.split()
            for (where, linear), known in zip(walk(module, f"{table.blocks}.*.{path}"), sizes_of, strict=True):
                if reason := self._linear_guard(where, linear, names, known):
                    return reason
        self._tensors += [tensor for path in table.extra for _, tensor in walk(module, path)]
        self._numbers.append(len(blocks))
        return None

    def _norm_guard(self, path: str, norm: nn.Module, part: Part, sizes: dict[str, int]) -> str | None:
        names = () if not part.size else ("weight", "bias") if part.module_class is nn.LayerNorm else ("weight",)
        found = (self._weight_guard(f"{path}.{name}", getattr(norm, name), [part.size], sizes) for name in names)
        return next(filter(None, found), None)

    def _linear_guard(self, path: str, linear: nn.Module, names: list[str], sizes: dict[str, int]) -> str | None:
        if is_plain(linear):
            self._tensors += [] if linear.bias is None else [linear.bias]
            return self._weight_guard(path, linear.weight, names, sizes)
        # An adapted layer is called as a module: only its width matters.
        self.plain = False
        # Through hooks, PEFT selects adapters by prompt, or by position.
        heard = any(has_hooks(child) for child in linear.modules())
        self.row_by_row &= not heard and isinstance(inside(linear), nn.Linear)
        width = sizes.get(names[0])
        found = getattr(inside(linear), "out_features", width)
        return None if width in (None, found) else f"{path} has {found} outputs, expected {width}"

    def _weight_guard(self, path: str, weight: torch.Tensor | None, names: list[str], sizes: dict[str, int]) -> str | None:
        if weight is None or weight.ndim != len(names):
            return f"{path} is {weight if weight is None else tuple(weight.shape)}, expected {tuple(names)}"
        self.weight = weight if self.weight is None else self.weight
        self._tensors.append(weight)
        found, expected = tuple(weight.shape), tuple(map(sizes.setdefault, names, weight.shape))
        same = (weight.dtype, found) == (self.weight.dtype, expected)
        return None if same else f"{path} is {weight.dtype} {found}, expected {self.weight.dtype} {expected}"

    @cached_property
    def fingerprint(self) -> tuple | None:
        """What is baked into a captured graph: addresses of the tensors it reads, and numbers. None: graphs are not allowed."""
        known = self.guard is None and self.plain and not any(map(is_fake, self._tensors))
        return (*map(_place, self._tensors), *self._numbers) if known else None

    def hold(self) -> list[torch.Tensor]:
        """Those tensors, to keep them alive even if the module gets new ones."""
        return [tensor.detach() for tensor in self._tensors]

    def still_hold(self, held: list[torch.Tensor]) -> bool:
        """Whether the module reads the tensors `held`: while these are alive, nothing else can occupy their addresses."""
        found = (*map(_place, held), *self._numbers)
        return found == self.fingerprint == Facts(self.table, self.module).fingerprint


def _place(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _text_sizes(module: nn.Module) -> dict[str, int]:
    config = module.config
    heads = {"q": config.num_attention_heads * config.head_dim, "kv": config.num_key_value_heads * config.head_dim}
    return {"width": config.hidden_size, "head_dim": config.head_dim, **heads}


def _text_guard(module: nn.Module) -> str | None:
    config, layers = module.config, list(module.layers)[: module.config.num_hidden_layers]
    if not layers:
        return "there are no layers"
    kinds = getattr(config, "layer_types", None) or []
    if module.has_sliding_layers or len(kinds) < len(layers) or set(kinds[: len(layers)]) != {"full_attention"}:
        return "not all layers have full attention"
    if not getattr(config, "is_causal", True):
        return "the attention is not causal"
    if module.rotary_emb.rope_type not in STATIC_ROPE:
        return f"no kernel for the rotary embedding {module.rotary_emb.rope_type!r}"
    if sorted(layer.self_attn.layer_idx for layer in layers) != list(range(len(layers))):
        return "the layer indices are not consecutive"
    return attention_guard(config._attn_implementation, masked=True)


def _layer_guard(layer: nn.Module, config: Any) -> str | None:
    attention, head_dim = layer.self_attn, config.head_dim
    if reason := _activation_guard(layer.mlp.act_fn, SILU) or _attention_guard(attention, config):
        return reason
    if not attention.is_causal or getattr(attention, "sliding_window", None) is not None:
        return "the attention is not causal"
    if attention.q_norm.variance_epsilon != attention.k_norm.variance_epsilon:
        return "no kernel for norms of queries and keys that differ in their epsilon"
    heads = attention.head_dim, attention.num_key_value_groups * config.num_key_value_heads
    return None if heads == (head_dim, config.num_attention_heads) else "a layer's head counts differ from the configuration"


def _embed_guard(module: nn.Module) -> str | None:
    proj = module.patch_embed.proj
    settings = proj.padding, proj.dilation, proj.groups, proj.stride, len(proj.weight), proj.weight.dtype, proj.bias
    plain = (0, 0), (1, 1), 1, proj.kernel_size, module.config.hidden_size, module.pre_layernorm.weight.dtype, None
    return None if settings == plain else "the patch embedding is not a plain matrix product"


def _merge_guard(module: nn.Module) -> str | None:
    merged = module.config.hidden_size * module.spatial_merge_size**2
    return None if module.merger.hidden_size == merged else "the merger's width differs from the model's"


def _encode_guard(module: nn.Module) -> str | None:
    if not len(module.blocks):
        return "there are no blocks"
    return attention_guard(module.config._attn_implementation, masked=False)


def _block_guard(block: nn.Module, config: Any) -> str | None:
    attention = block.attn
    if reason := _activation_guard(block.mlp.act, GELU) or _attention_guard(attention, config):
        return reason
    heads = attention.num_heads, attention.num_heads * attention.head_dim
    return None if heads == (config.num_heads, config.hidden_size) else "a block's head counts differ from the configuration"


def _attention_guard(attention: nn.Module, config: Any) -> str | None:
    if attention.training and attention.attention_dropout:
        return "attention dropout is on"
    if not attention.scaling > 0:
        return f"the softmax scale is {attention.scaling}"
    return None if attention.config is config else "a layer has its own configuration"


_ANGLES = ("class_pos_emb", "rotary_pos_emb.inv_freq")
TEXT = Table("text", TEXT_PARTS, _text_guard, _text_sizes, "layers", TEXT_LINEARS, _layer_guard, ("rotary_emb.inv_freq",))
EMBED = Table("embed", EMBED_PARTS, _embed_guard)
ENCODE = Table("encode", ENCODE_PARTS, _encode_guard, _vision_sizes, "blocks", BLOCK_LINEARS, _block_guard, _ANGLES)
MERGE = Table("merge", MERGE_PARTS, _merge_guard)


def context_guard() -> str | None:
    """The reason for a fallback that holds for every call at present."""
    if _global_forward_hooks or _global_forward_pre_hooks:
        return "a global module hook is registered"
    if torch.compiler.is_compiling():
        return None
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform or forward-mode AD is active"
    return "torch.jit traces" if torch.jit.is_tracing() else None


def attention_guard(name: str | None, masked: bool) -> str | None:
    """Rejects attention and mask functions other than transformers' own, which all compute the same."""
    name = name or "eager"
    known = KNOWN_ATTENTION.get(name)
    if known is None or ALL_ATTENTION_FUNCTIONS.get(name) is not known[0]:
        return f"unknown attention implementation {name!r}"
    return f"unknown mask function of {name!r}" if masked and ALL_MASK_ATTENTION_FUNCTIONS.get(name) is not known[1] else None


def call_guard(module: nn.Module, x: torch.Tensor, weight: torch.Tensor, options: dict[str, Any], *others: Any) -> str | None:
    """The reason for a fallback that depends on this call: its input `x`, its keyword arguments `options`, and `others` that a
    gradient might flow through; all weights have the dtype of `weight`."""
    if x.is_meta:
        return "the tensors are on the meta device"
    if torch.is_grad_enabled():
        tensors = (x, *others, *module.parameters())
        # Replicas of DataParallel have no parameters: their weights are tensors that lead back to some.
        if any(tensor.requires_grad for tensor in tensors) or getattr(module, "_is_replica", False):
            return "a gradient is needed"
    if weight.dtype not in FLOAT_DTYPES or (x.is_floating_point() and x.dtype != weight.dtype):
        return f"no kernel for {x.dtype} inputs and {weight.dtype} weights"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on"
    for option in ("output_attentions", "output_hidden_states"):
        asked = options.get(option)
        if getattr(module.config, option, False) if asked is None else asked:
            return f"{option} is on"
    if options.get("return_dict") is False:
        return "return_dict is off"
    if options.get("is_causal") is False:
        return "the attention is not causal"
    unknown = [name for name, value in options.items() if name not in OPTIONS and value is not None]
    return f"unknown argument {unknown[0]!r}" if unknown else None


def cache_guard(cache: Any, n_layers: int, layer_classes: Container[type]) -> str | None:
    """Rejects caches other than transformers' plain `DynamicCache`, and those with overridden methods."""
    if reason := replaced("cache"):
        return reason
    kind = type(cache).__name__
    if type(cache) is not DynamicCache or cache.offloading or cache.layer_class_to_replicate not in (None, DynamicLayer):
        return f"unsupported cache {kind}"
    layers = cache.layers
    if len(layers) > n_layers or any(type(layer) not in layer_classes for layer in layers):
        return f"unsupported layers in the cache {kind}"
    if any(not CACHE_METHODS.isdisjoint(vars(owner)) for owner in (cache, *layers)):
        return f"the cache {kind} overrides a method"
    lengths = {layer.get_seq_length() for layer in layers} | ({0} if len(layers) < n_layers else set())
    return "the layers of the cache hold different numbers of tokens" if len(lengths) > 1 else None


def methods_guard(model: nn.Module) -> str | None:
    """Rejects a model with its own version of a method of the decoding loop."""
    for name, seen in LOOP.items():
        if original(FAST[Head], model, name) is not seen or name in vars(model):
            return f"{name} was replaced"
    return None


def roots_guard(model: nn.Module) -> str | None:
    """Rejects custom or hooked forwards above the layers, which a decode step skips."""
    roots = model, model.model, getattr(model.model, "language_model", None)
    for module, (cls, forward) in zip(roots, FORWARDS.items(), strict=True):
        if module is not None and (
            has_hooks(module) or is_replaced(module) or original(FAST[cls], module, "forward") is not forward
        ):
            return f"the {cls.__name__}'s forward was replaced, or has a hook"
    return None
