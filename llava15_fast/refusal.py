"""When the kernels must not run, and the reason that the report gives."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

from llava15_kernels._dispatch import FLOAT_DTYPES

WRAPPED = ("base_layer", "original_module")
"""What PEFT's wrappers call the module that they stand in the place of."""


def refusal(module: nn.Module, x: torch.Tensor, weight: torch.Tensor, options: dict[str, Any]) -> str | None:
    """Why the original method of `module` has to run on `x`, as far as this call says; None if the kernels can.

    Args:
        weight: one that the fused code reads, of the dtype that all have.
        options: keyword arguments of the call, with transformers' `output_...` requests among them.
    """
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters())):
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
    return None


def surroundings() -> str | None:
    """Why no fused code may run at present, whatever it is asked."""
    if _global_forward_hooks or _global_forward_pre_hooks:
        return "a hook listens to all modules"
    if torch.compiler.is_compiling():
        return None
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func runs, or a forward gradient is needed"
    return "torch.jit traces" if torch.jit.is_tracing() else None


def attention_refusal(name: str | None) -> str | None:
    """Why the original has to run with the attention implementation of this name: it is none of transformers', which are all
    ways to the same."""
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name or "eager", eager_attention_forward)
    while isinstance(function, functools.partial):
        function = function.func
    return None if function.__module__.startswith("transformers.") else f"the attention {name!r} is the user's own"


def inside(module: nn.Module) -> nn.Module:
    """The module that PEFT has put an adapter around, or a copy to be trained beside; any other module itself."""
    for name in WRAPPED:
        if name in module._modules:
            return inside(module._modules[name])
    return module


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
