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
    """`fused(x, layers)` is `torch.cat([layer(x) for layer in layers], -1)`.

    It owns no memory: the parameters do, and where they go the fused weight goes.

    Attributes:
        ready: whether the weights lay one under the other when they were last looked at.
        laid: address of the storage that they were laid into here.
    """

    def __init__(self) -> None:
        self.ready = False
        self.laid: int | None = None
        self.gave_up = False

    def __reduce__(self) -> tuple:
        """A copy or a pickle looks for itself: its layers' parameters are its own."""
        return FusedLinear, ()

    def __call__(self, x: torch.Tensor, layers: Sequence[nn.Module], shape: tuple[int, int] | None = None) -> torch.Tensor:
        # torch.compile cannot look at storages, and fuses by itself what follows a product.
        if self.ready and not torch.compiler.is_compiling():
            return nn.functional.linear(x, spanning([layer._parameters["weight"] for layer in layers]))
        return torch.cat([call(layer, x, shape) for layer in layers], dim=-1)

    def prepare(self, layers: Sequence[nn.Module] | None) -> None:
        """Looks whether the weights lie as they should, and lays them so where that is possible; None: it is not."""
        self.ready = layers is not None and all(map(can_fuse, layers)) and (are_spanning(layers) or self._lay(layers))

    def _lay(self, layers: Sequence[nn.Module]) -> bool:
        weights = [layer.weight for layer in layers]
        if self.gave_up or len({(weight.dtype, weight.device, weight.shape[1]) for weight in weights}) > 1:
            return False
        if self.laid is not None:
            _log_stale()
        try:
            # A parameter on an inference tensor could never be trained again.
            with torch.inference_mode(False), torch.no_grad():
                fused = side_by_side(weights)
                for weight, part in zip(weights, fused.split([len(weight) for weight in weights]), strict=True):
                    weight.data = part
        except torch.OutOfMemoryError:
            self.gave_up = True
            _log_no_memory()
            return False
        self.laid = None if is_fake(fused) else fused.untyped_storage().data_ptr()
        return True

    def release(self, layers: Sequence[nn.Module]) -> None:
        """Gives every parameter that still lies where it was laid a storage of its own."""
        for layer in layers:
            weight = layer._parameters.get("weight")
            if self.laid is None or weight is None or type(weight) is not nn.Parameter:
                continue
            if weight.untyped_storage().data_ptr() == self.laid:
                with torch.inference_mode(False), torch.no_grad():
                    weight.data = weight.data.clone()
        self.ready, self.laid = False, None


def call(layer: nn.Module, x: torch.Tensor, shape: tuple[int, int] | None) -> torch.Tensor:
    """`layer` on rows (T, width), which it sees as (B, L, width) where `shape` is (B, L)."""
    return layer(x) if shape is None else layer(x.view(*shape, -1)).flatten(0, 1)


def spanning(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """A view of weights that lie one under the other, as one."""
    return weights[0].as_strided((sum(map(len, weights)), weights[0].shape[1]), (weights[0].shape[1], 1))


def are_spanning(layers: Sequence[nn.Module]) -> bool:
    first = layers[0]._parameters["weight"]
    storage, offset = first.untyped_storage()._cdata, first.storage_offset()
    for layer in layers:
        weight = layer._parameters["weight"]
        if (weight.untyped_storage()._cdata, weight.storage_offset()) != (storage, offset) or not weight.is_contiguous():
            return False
        if (weight.dtype, weight.shape[1]) != (first.dtype, first.shape[1]):
            return False
        offset += weight.numel()
    return True


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
