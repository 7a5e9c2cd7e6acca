"""Linear layers that read the same input, computed by one matrix product over their weights in one storage.

The weights are laid one under the other and the layers' parameters become views of them: no second copy, and whoever writes
into a parameter writes into the fused weight. The sharing is lost without a word when a model is copied, converted, moved or
loaded with `assign=True`; so whoever uses it calls `prepare` once after everything that may have changed the layers
(`snapshot.py` tells), and it is made anew.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from .refusal import has_hooks

logger = logging.getLogger("llava15_fast")


class FusedLinear:
    """`fused(x, layers)` is `torch.cat([layer(x) for layer in layers], -1)`."""

    def __init__(self) -> None:
        self.weight: torch.Tensor | None = None
        self.ready = False
        self.gave_up = False

    def __reduce__(self) -> tuple:
        """A copy or a pickle begins without a weight: its layers' parameters are its own."""
        return FusedLinear, ()

    def __call__(self, x: torch.Tensor, layers: Sequence[nn.Module]) -> torch.Tensor:
        # torch.compile cannot look at storages, and fuses by itself what follows a product.
        if self.ready and not torch.compiler.is_compiling():
            return nn.functional.linear(x, self.weight)
        return torch.cat([layer(x) for layer in layers], dim=-1)

    def prepare(self, layers: Sequence[nn.Module] | None) -> None:
        """Looks whether the fused weight is that of the layers, and makes it if it is not and can be; None: there is none."""
        possible = layers is not None and not self.gave_up and all(can_fuse(layer) for layer in layers)
        if possible and not self._is_current(layers):
            self._fuse(layers)
        self.ready = possible and self.weight is not None

    def _is_current(self, layers: Sequence[nn.Module]) -> bool:
        if self.weight is None:
            return False
        storage, offset = self.weight.untyped_storage()._cdata, self.weight.storage_offset()
        for layer in layers:
            weight = layer._parameters["weight"]
            if weight.untyped_storage()._cdata != storage or weight.storage_offset() != offset or not weight.is_contiguous():
                return False
            offset += weight.numel()
        return weight.dtype == self.weight.dtype and offset == self.weight.numel()

    def _fuse(self, layers: Sequence[nn.Module]) -> None:
        stale, self.weight = self.weight, None
        weights = [layer.weight for layer in layers]
        if len({(weight.dtype, weight.device, weight.shape[1]) for weight in weights}) > 1:
            return
        if stale is not None:
            _log_stale()
        try:
            # A parameter on an inference tensor could never be trained again.
            with torch.inference_mode(False), torch.no_grad():
                self.weight = side_by_side(weights)
                for weight, part in zip(weights, self.weight.split([len(weight) for weight in weights]), strict=True):
                    weight.data = part
        except torch.OutOfMemoryError:
            self.weight, self.gave_up = None, True
            _log_no_memory()

    def release(self, layers: Sequence[nn.Module]) -> None:
        """Gives every parameter that still is a view of the fused weight a storage of its own."""
        if self.weight is None:
            return
        storage = self.weight.untyped_storage()._cdata
        for layer in layers:
            weight = layer._parameters.get("weight")
            if weight is not None and not is_fake(weight) and weight.untyped_storage()._cdata == storage:
                with torch.inference_mode(False), torch.no_grad():
                    weight.data = weight.data.clone()
        self.weight, self.ready = None, False


def side_by_side(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """[(N_i, K)] -> (sum of N_i, K)."""
    return torch.cat(weights)


def is_plain(layer: nn.Module) -> bool:
    """Whether `layer` computes nothing but a product with its weight, and its bias, and nobody listens to it."""
    weight = layer._parameters.get("weight") if type(layer) is nn.Linear else None
    # A quantised weight is a tensor of another class in a parameter.
    return (
        (type(weight) is nn.Parameter or (weight is not None and is_fake(weight)))
        and not has_hooks(layer)
        and "forward" not in layer.__dict__
    )


def can_fuse(layer: nn.Module) -> bool:
    """Whether the weight of `layer` may become a view of a larger one."""
    if not is_plain(layer) or layer._parameters["bias"] is not None:
        return False
    weight = layer._parameters["weight"]
    return not weight.is_inference() and weight.device.type != "meta"


@functools.cache
def _log_no_memory() -> None:
    logger.warning("no memory to lay weights side by side: these layers run one by one")


@functools.cache
def _log_stale() -> None:
    logger.info("weights were copied, moved or replaced: laid side by side anew")
