"""Guards: whether the fast path may stand for what the original would do.

A request (`request.py`) asks them once, when it begins. Each answers None, or the reason for a fallback that the report gives.
The tables name the modules that fused code passes over; functions are compared with the objects seen at import. What is not
known is not fast.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Container, Iterable, Iterator
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

from llava15_kernels._dispatch import FLOAT_DTYPES

from ..model import modeling
from ..model.modeling import LlavaOnevision1_5ForConditionalGeneration as Head
from ..model.releases import CACHE


class Part(NamedTuple):
    """A module, or many of a kind, whose work fused code does without calling them.

    Attributes:
        path: below the module that has the fused code, `*` for every child.
        module_class: what it has to be, with the forward of that class.
        parameters: names of the parameters of that forward.
    """

    path: str
    module_class: type[nn.Module]
    parameters: tuple[str, ...]


TEXT_PARTS = (
    Part("norm", qwen3.Qwen3RMSNorm, ("hidden_states",)),
    Part("rotary_emb", qwen3.Qwen3RotaryEmbedding, ("x", "position_ids")),
    Part(
        "layers.*",
        qwen3.Qwen3DecoderLayer,
        ("hidden_states", "attention_mask", "position_ids", CACHE, "use_cache", "position_embeddings", "kwargs"),
    ),
    Part("layers.*.input_layernorm", qwen3.Qwen3RMSNorm, ("hidden_states",)),
    Part("layers.*.post_attention_layernorm", qwen3.Qwen3RMSNorm, ("hidden_states",)),
    Part(
        "layers.*.self_attn",
        qwen3.Qwen3Attention,
        ("hidden_states", "position_embeddings", "attention_mask", CACHE, "kwargs"),
    ),
    Part("layers.*.self_attn.q_norm", qwen3.Qwen3RMSNorm, ("hidden_states",)),
    Part("layers.*.self_attn.k_norm", qwen3.Qwen3RMSNorm, ("hidden_states",)),
    Part("layers.*.mlp", qwen3.Qwen3MLP, ("x",)),
)
EMBED_PARTS = (
    Part("patch_embed", modeling.LlavaOnevision1_5VisionPatchEmbed, ("pixel_values",)),
    Part("patch_embed.proj", nn.Conv2d, ("input",)),
    Part("pre_layernorm", nn.LayerNorm, ("input",)),
)
ENCODE_PARTS = (
    Part("rotary_pos_emb", modeling.LlavaOnevision1_5VisionRotaryEmbedding, ("position_ids", "class_pos_emb")),
    Part("blocks.*", modeling.LlavaOnevision1_5VisionBlock, ("hidden_states", "args", "kwargs")),
    Part("blocks.*.norm1", nn.LayerNorm, ("input",)),
    Part("blocks.*.norm2", nn.LayerNorm, ("input",)),
    Part(
        "blocks.*.attn",
        modeling.LlavaOnevision1_5VisionAttention,
        ("hidden_states", "layout", "position_embeddings", "kwargs"),
    ),
    Part("blocks.*.mlp", modeling.LlavaOnevision1_5VisionMLP, ("hidden_states",)),
)
MERGE_PARTS = (
    Part("merger", modeling.LlavaOnevision1_5VisionPatchMerger, ("hidden_states",)),
    Part("merger.ln_q", nn.LayerNorm, ("input",)),
)
"""Parents before their children."""

SILU = (nn.SiLU, type(ACT2FN["silu"]))
GELU = (nn.GELU, type(ACT2FN["gelu"]))

STATIC_ROPE = ("default", "linear", "yarn", "llama3")
"""Rotary embeddings whose frequencies do not depend on the input."""

ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
"""Implementations that are all ways to the same."""

OPTIONS = ("output_attentions", "output_hidden_states", "return_dict", "is_causal", "num_items_in_batch", "tokenizer")
"""Keyword arguments of a forward that are known; any other may change what attention computes."""


# What was seen at import


class Seen(NamedTuple):
    """`owner`'s attribute `name` was `value`; None if it was somebody else's by then already."""

    owner: Any
    name: str
    value: Any


_TRUSTED = tuple(
    str(Path(sys.modules[name].__file__).parent) for name in ("torch", "transformers", "llava15_kernels", "llava15_fast")
)


def _is_theirs(function: Any) -> bool:
    """Whether its code is torch's, transformers' or ours: `functools.wraps` copies names, but not the file of the code."""
    if isinstance(function, functools.partial):
        function = function.func
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return code is None or code.co_filename.startswith(_TRUSTED)


def _seen(owner: Any, name: str) -> Seen:
    value = getattr(owner, name)
    return Seen(owner, name, value if _is_theirs(value) else None)


def _methods(*classes: type) -> list[Seen]:
    """Of the classes and of what they inherit from, up to `nn.Module`, of which only what a call passes through."""
    found = []
    for cls in classes:
        owners = [owner for owner in cls.__mro__ if owner not in (object, nn.Module)]
        names = dict.fromkeys(name for owner in owners for name in vars(owner) if isinstance(getattr(cls, name), FunctionType))
        found += [_seen(cls, name) for name in names]
        if issubclass(cls, nn.Module):
            found += [_seen(cls, name) for name in ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__")]
    return found


def _classes(parts: Iterable[Part]) -> set[type]:
    return {part.module_class for part in parts}


def _functions(owner: Any, *names: str) -> list[Seen]:
    return [_seen(owner, name) for name in names if name in vars(owner)]


_ATTENTION_NAMES = ("eager_attention_forward", "ALL_ATTENTION_FUNCTIONS")
WATCHED = {
    "text": _methods(*_classes(TEXT_PARTS), *SILU)
    + _functions(qwen3, "apply_rotary_pos_emb", "rotate_half", "repeat_kv", *_ATTENTION_NAMES)
    + _functions(qwen3, "create_causal_mask", "create_sliding_window_causal_mask")
    + _functions(nn.functional, "linear", "silu", "softmax", "scaled_dot_product_attention"),
    "embed": _methods(*_classes(EMBED_PARTS)) + _functions(nn.functional, "linear", "conv2d", "layer_norm"),
    "encode": _methods(*_classes(ENCODE_PARTS), *GELU)
    + _functions(modeling, "apply_rope_tables", "vision_rope_tables", *_ATTENTION_NAMES)
    + _functions(nn.functional, "linear", "gelu", "layer_norm", "softmax", "scaled_dot_product_attention"),
    "merge": _methods(*_classes(MERGE_PARTS)) + _functions(nn.functional, "layer_norm"),
    "cache": _methods(DynamicCache, Cache, DynamicLayer, CacheLayerMixin),
    "linear": _methods(nn.Linear),
}
CACHE_METHODS = frozenset(seen.name for seen in WATCHED["cache"])

LOOP = {
    name: getattr(Head, name)
    for name in vars(GenerationMixin)
    if isinstance(getattr(Head, name), FunctionType) and _is_theirs(getattr(Head, name))
}
"""What a step of `generate` passes through: knowing all of it, a request knows what comes next."""

FORWARDS = {cls: cls.forward for cls in (Head, modeling.LlavaOnevision1_5Model, qwen3.Qwen3Model)}

KNOWN_ATTENTION = {
    name: tuple(
        functions.get(name) if _is_theirs(functions.get(name)) else object()
        for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    )
    for name in ATTENTIONS
}
"""name -> attention and mask function; an object that nothing is in the place of somebody else's."""


def replaced(group: str) -> str | None:
    """What of `WATCHED[group]` is not what it was."""
    for owner, name, value in WATCHED[group]:
        if getattr(owner, name, None) is not value or value is None:
            return f"{owner.__name__}.{name} was replaced"
    return None


# Modules


def walk(root: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that `path` means, each with its own path.

    Raises:
        LookupError: a name on the way is missing; the message says where.
    """

    def below(module: nn.Module, done: str, names: list[str]) -> Iterator[tuple[str, nn.Module]]:
        if not names:
            yield done, module
        elif names[0] == "*":
            for index, child in module.named_children():
                yield from below(child, f"{done}.{index}", names[1:])
        elif (child := getattr(module, names[0], None)) is not None:
            yield from below(child, f"{done}.{names[0]}".lstrip("."), names[1:])
        else:
            raise LookupError(f"{done or type(module).__name__} has no {names[0]!r}")

    return below(root, "", path.split(".") if path else [])


WRAPPED = ("base_layer", "original_module")
"""What PEFT's wrappers call the module that they stand in the place of."""


def inside(module: nn.Module) -> nn.Module:
    """The module that PEFT has put an adapter around, or a copy to be trained beside; any other module itself."""
    for name in WRAPPED:
        if name in module._modules:
            return inside(module._modules[name])
    return module


def difference(path: str, module: nn.Module, module_class: type[nn.Module], method: str = "forward") -> str | None:
    """What tells that `module` computes by its class something else than `module_class` does, or None."""
    if not isinstance(module, module_class):
        return f"{path} is a {type(module).__name__}, expected {module_class.__name__}"
    if getattr(type(module), method, None) is not getattr(module_class, method, None):
        return f"{path}: {type(module).__name__} has its own {method}, expected {module_class.__name__}'s"
    return None


def is_replaced(module: nn.Module, slot: str = "forward", method: str = "forward") -> bool:
    """Whether the instance has a method of its own; its class's, bound to it, is none: accelerate leaves that behind."""
    present = vars(module).get(slot)
    return present is not None and not (isinstance(present, MethodType) and present.__func__ is getattr(type(module), method))


def has_hooks(module: nn.Module) -> bool:
    """Whether someone listens to this module, or accelerate brings its weights only when it is called.

    transformers' own recording hooks do not count: they stay, dormant, once hidden states were asked for.
    """
    if "_hf_hook" in module.__dict__:
        return True
    if not module._forward_hooks and not module._forward_pre_hooks:
        return False
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)


def _module_guard(path: str, module: nn.Module, module_class: type[nn.Module]) -> str | None:
    if type(module) is not module_class:
        if inside(module) is not module:
            return f"an adapter sits on {path}, which the fused code would pass over"
        if found := difference(path, module, module_class) or difference(path, module, module_class, "__call__"):
            return found
        if "parametrizations" in module._modules:
            return f"{path} is parametrized"
    if has_hooks(module):
        return f"a hook sits on {path}, which the fused code would pass over"
    return f"{path}.forward was replaced" if is_replaced(module) else None


def parts_guard(root: nn.Module, parts: Iterable[Part], group: str) -> str | None:
    """A part that someone listens to, has adapted, or put something else in the place of."""
    if reason := replaced(group):
        return reason
    try:
        for part in parts:
            for path, module in walk(root, part.path):
                if reason := _module_guard(path, module, part.module_class):
                    return reason
    except LookupError as error:
        return str(error)
    return None


def _activation_guard(module: nn.Module, classes: Container[type[nn.Module]]) -> str | None:
    """The same for an activation, which a configuration chooses."""
    if has_hooks(module):
        return "a hook sits on an activation, which the fused code would pass over"
    if type(module) not in classes or is_replaced(module) or getattr(module, "approximate", "none") != "none":
        return f"no kernel for the activation {type(module).__name__}"
    return None


def _weight_guard(path: str, module: nn.Module, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> str | None:
    """Weights that are there, of the dtype that all have and of the shapes that the configuration says."""
    for name, shape in shapes.items():
        weight = getattr(module, name, None)
        found = None if weight is None else (tuple(weight.shape), weight.dtype)
        if found != (shape, dtype):
            return f"{path}.{name} is {found and found[1]} {found and found[0]}, expected {dtype} {shape}"
    return None


def _linear_guard(path: str, layer: nn.Module, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Of a linear layer only the shape is asked: it is called as it is, unless it is `is_plain`."""
    if is_plain(layer):
        return _weight_guard(path, layer, {"weight": shape}, dtype)
    width = getattr(inside(layer), "out_features", shape[0])
    return None if width == shape[0] else f"{path} has {width} outputs, expected {shape[0]}"


def is_plain(layer: nn.Module) -> bool:
    """Whether `layer` computes nothing but a product with its weight, and its bias, and nobody listens to it."""
    if type(layer) is not nn.Linear or has_hooks(layer) or "forward" in vars(layer):
        return False
    # A quantised weight is a tensor of another class in a parameter; a replica of DataParallel has tensors.
    return type(layer.weight) in (nn.Parameter, torch.Tensor) or is_fake(layer.weight)


def _numbers_of(norms: Iterable[nn.Module], attribute: str) -> tuple[float, ...]:
    return tuple(getattr(norm, attribute) for norm in norms)


class Facts:
    """What the guards found in a model's part when a request began.

    Attributes:
        guard: why the original has to run, or None.
        plain: whether all linear layers are `is_plain`.
        row_by_row: whether all of them, adapters included, compute the same for a row wherever it stands.
    """

    def __init__(self, module: nn.Module, guard: str | None, linears: Iterable[nn.Module] = (), reads: Any = None) -> None:
        self.guard = guard
        linears = [] if guard else list(linears)
        self.plain = all(map(is_plain, linears))
        # PEFT's adapters choose by the prompt, or by the place in it, through hooks.
        heard = any(has_hooks(child) for part in linears if not is_plain(part) for child in part.modules())
        self.row_by_row = not heard and all(isinstance(inside(part), nn.Linear) for part in linears)
        self._reads = reads

    @cached_property
    def reads(self) -> list[torch.Tensor] | None:
        """The tensors that a captured graph would read; None if it could not know them."""
        if self.guard or not self.plain or replaced("linear"):
            return None
        tensors, _ = self._reads()
        return None if any(map(is_fake, tensors)) else tensors

    @cached_property
    def fingerprint(self) -> tuple | None:
        """What a captured graph has fixed: where those tensors lie, and numbers."""
        if self.reads is None:
            return None
        _, numbers = self._reads()
        return (*((tensor.data_ptr(), tensor.stride(), tensor.dtype) for tensor in self.reads), *numbers)


def _parameters_of(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    found = [getattr(module, name, None) for module in modules for name in ("weight", "bias")]
    return [tensor for tensor in found if tensor is not None]


# The text model


def linears_of(layer: nn.Module) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    return [*qkv_of(attention), attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def qkv_of(attention: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    return attention.q_proj, attention.k_proj, attention.v_proj


def text_facts(module: nn.Module) -> Facts:
    guard = context_guard() or parts_guard(module, TEXT_PARTS, "text") or _text_config_guard(module)
    for layer in () if guard else module.layers:
        if guard := _layer_guard(module, layer):
            break

    def reads() -> tuple[list[torch.Tensor], list[float]]:
        layers = list(module.layers)
        norms = [module.norm]
        for layer in layers:
            norms += [layer.input_layernorm, layer.post_attention_layernorm, layer.self_attn.q_norm, layer.self_attn.k_norm]
        linears = [linear for layer in layers for linear in linears_of(layer)]
        numbers = [*_numbers_of(norms, "variance_epsilon"), *(layer.self_attn.scaling for layer in layers)]
        numbers += [module.rotary_emb.attention_scaling, module.config.num_hidden_layers]
        return [module.rotary_emb.inv_freq, *_parameters_of([*norms, *linears])], numbers

    linears = () if guard else [linear for layer in module.layers for linear in linears_of(layer)]
    return Facts(module, guard, linears, reads)


def _text_config_guard(module: nn.Module) -> str | None:
    config, layers = module.config, list(module.layers)[: module.config.num_hidden_layers]
    if not layers:
        return "there are no layers"
    kinds = getattr(config, "layer_types", None) or []
    if module.has_sliding_layers or len(kinds) < len(layers) or set(kinds[: len(layers)]) != {"full_attention"}:
        return "not all layers have full attention"
    if not getattr(config, "is_causal", True):
        return "the attention is not plainly causal"
    if module.rotary_emb.rope_type not in STATIC_ROPE:
        return f"no kernel for the rotary embedding {module.rotary_emb.rope_type!r}"
    if sorted(layer.self_attn.layer_idx for layer in layers) != list(range(len(layers))):
        return "the layers are not numbered one by one"
    return attention_guard(config._attn_implementation, masked=True)


def _layer_guard(module: nn.Module, layer: nn.Module) -> str | None:
    attention, mlp, config, dtype = layer.self_attn, layer.mlp, module.config, module.norm.weight.dtype
    if reason := _activation_guard(mlp.act_fn, SILU):
        return reason
    if attention.config is not config:
        return "a layer has a configuration of its own"
    if attention.training and attention.attention_dropout:
        return "attention dropout is on"
    if not attention.is_causal or getattr(attention, "sliding_window", None) is not None:
        return "the attention is not plainly causal"
    if attention.q_norm.variance_epsilon != attention.k_norm.variance_epsilon:
        return "no kernel for norms of queries and keys that differ in their epsilon"
    width, head_dim = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    if attention.head_dim != head_dim or attention.num_key_value_groups * kv != q:
        return "a layer's heads are not those of the configuration"
    for name, shape in (("q_proj", (q, width)), ("k_proj", (kv, width)), ("v_proj", (kv, width)), ("o_proj", (width, q))):
        if reason := _linear_guard(f"self_attn.{name}", getattr(attention, name), shape, dtype):
            return reason
    inner = tuple(mlp.gate_proj.weight.shape[:1]) if is_plain(mlp.gate_proj) else ()
    for name, shape in (("gate_proj", (*inner, width)), ("up_proj", (*inner, width)), ("down_proj", (width, *inner))):
        if inner and (reason := _linear_guard(f"mlp.{name}", getattr(mlp, name), shape, dtype)):
            return reason
    for norm, size in (
        (layer.input_layernorm, width),
        (layer.post_attention_layernorm, width),
        (attention.q_norm, head_dim),
        (attention.k_norm, head_dim),
    ):
        if reason := _weight_guard("a norm", norm, {"weight": (size,)}, dtype):
            return reason
    return None


# The vision tower


def embed_guard(module: nn.Module) -> str | None:
    if reason := context_guard() or parts_guard(module, EMBED_PARTS, "embed"):
        return reason
    proj = module.patch_embed.proj
    settings = proj.padding, proj.dilation, proj.groups, proj.stride
    if proj.bias is not None or settings != ((0, 0), (1, 1), 1, proj.kernel_size):
        return "the patch embedding is no plain matrix product"
    return _norm_guard("pre_layernorm", module.pre_layernorm, len(proj.weight), proj.weight.dtype)


def merge_guard(module: nn.Module) -> str | None:
    reason = context_guard() or parts_guard(module, MERGE_PARTS, "merge")
    if reason:
        return reason
    norm, merged = module.merger.ln_q, module.merger.merged_size
    width, rest = divmod(merged, module.spatial_merge_size**2)
    weight = norm.weight
    return "the merger's width is not the model's" if rest else _norm_guard(
        "merger.ln_q", norm, width, torch.float32 if weight is None else weight.dtype
    )  # fmt: skip


def _norm_guard(path: str, norm: nn.LayerNorm, width: int, dtype: torch.dtype) -> str | None:
    if norm.normalized_shape != (width,):
        return f"{path} is over {norm.normalized_shape}, expected ({width},)"
    return _weight_guard(path, norm, {"weight": (width,), "bias": (width,)}, dtype)


def encode_facts(module: nn.Module) -> Facts:
    guard = context_guard() or parts_guard(module, ENCODE_PARTS, "encode")
    blocks = () if guard else list(module.blocks)
    if not guard:
        guard = None if blocks else "there are no blocks"
        guard = guard or attention_guard(module.config._attn_implementation, masked=False)
    for block in blocks:
        if guard := guard or _block_guard(module, block):
            break

    def linears() -> list[nn.Module]:
        return [linear for block in blocks for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)]

    def reads() -> tuple[list[torch.Tensor], list[float]]:
        norms = [norm for block in blocks for norm in (block.norm1, block.norm2)]
        tensors = [module.class_pos_emb, module.rotary_pos_emb.inv_freq, *_parameters_of([*norms, *linears()])]
        return tensors, [*_numbers_of(norms, "eps"), *(block.attn.scaling for block in blocks)]

    return Facts(module, guard, () if guard else linears(), reads)


def _block_guard(module: nn.Module, block: nn.Module) -> str | None:
    attention, config = block.attn, module.config
    if reason := _activation_guard(block.mlp.act, GELU):
        return reason
    if attention.training and attention.attention_dropout:
        return "attention dropout is on"
    if attention.config is not config:
        return "a block has a configuration of its own"
    width = config.hidden_size
    if (attention.num_heads, attention.num_heads * attention.head_dim) != (config.num_heads, width):
        return "a block's heads are not those of the configuration"
    weight = module.blocks[0].norm1.weight
    dtype = torch.float32 if weight is None else weight.dtype
    for path, layer, shape in (("attn.qkv", attention.qkv, (3 * width, width)), ("attn.proj", attention.proj, (width, width))):
        if reason := _linear_guard(path, layer, shape, dtype):
            return reason
    for layer in (block.mlp.fc1, block.mlp.fc2):
        if is_plain(layer) and layer.weight.dtype != dtype:
            return f"a block has {layer.weight.dtype} weights, expected {dtype}"
    return _norm_guard("norm1", block.norm1, width, dtype) or _norm_guard("norm2", block.norm2, width, dtype)


# Around a call


def context_guard() -> str | None:
    """Why no fused code may run at present, whatever it is asked."""
    if _global_forward_hooks or _global_forward_pre_hooks:
        return "a hook listens to all modules"
    if torch.compiler.is_compiling():
        return None
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func runs, or a forward gradient is needed"
    return "torch.jit traces" if torch.jit.is_tracing() else None


def attention_guard(name: str | None, masked: bool) -> str | None:
    """An attention, or a mask function for it, that is none of transformers', which are all ways to the same."""
    name = name or "eager"
    known = KNOWN_ATTENTION.get(name)
    if known is None or ALL_ATTENTION_FUNCTIONS.get(name) is not known[0]:
        return f"the attention {name!r} is not known"
    return f"the masks of {name!r} are not known" if masked and ALL_MASK_ATTENTION_FUNCTIONS.get(name) is not known[1] else None


def call_guard(
    module: nn.Module, x: torch.Tensor, weight: torch.Tensor, options: dict[str, Any], *others: torch.Tensor
) -> str | None:
    """Why the original has to run on `x`, as far as this call says.

    Args:
        weight: one that the fused code reads, of the dtype that all have.
        options: keyword arguments of the call, with transformers' `output_...` requests among them.
        others: tensors that a gradient might flow through besides.
    """
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
        return "a tuple is asked for"
    if options.get("is_causal") is False:
        return "the attention is not plainly causal"
    unknown = [name for name, value in options.items() if name not in OPTIONS and value is not None]
    return f"the argument {unknown[0]!r} is not known" if unknown else None


def cache_guard(cache: Any, n_layers: int, layer_classes: Container[type]) -> str | None:
    """A cache that is not transformers' plain dynamic one, or one that somebody has given methods of its own."""
    if reason := replaced("cache"):
        return reason
    kind = type(cache).__name__
    if type(cache) is not DynamicCache or cache.offloading or cache.layer_class_to_replicate not in (None, DynamicLayer):
        return f"the cache is a {kind} of its own kind"
    layers = cache.layers
    if len(layers) > n_layers or any(type(layer) not in layer_classes for layer in layers):
        return f"the cache is a {kind} with layers of its own kind"
    if any(not CACHE_METHODS.isdisjoint(vars(owner)) for owner in (cache, *layers)):
        return f"the {kind} has a method of its own"
    return None


def methods_guard(model: nn.Module, method: Callable[[str], Any]) -> str | None:
    """A method of `generate` that is not transformers' or ours; `method` gives that of the model's class without the patch."""
    for name, seen in LOOP.items():
        if method(name) is not seen or name in vars(model):
            return f"{name} was replaced"
    return None


def roots_guard(roots: Iterable[tuple[nn.Module, type, Any]]) -> str | None:
    """What a step of `generate` passes through on its way to the layers, and may change its mask: a module, its class, and
    the forward of its class without the patch."""
    for module, cls, forward in roots:
        if has_hooks(module) or is_replaced(module) or forward is not FORWARDS[cls]:
            return f"the {cls.__name__}'s forward is not its own, or someone listens to it"
    return None
