"""A KV cache that is a `DynamicCache` to transformers and preallocated memory to the kernels.

    KVPool        owns the memory; lends it to caches and reclaims it when they are gone
    Buffers       keys and values (B, capacity, kv_heads, head_dim) of every layer, and the graph of the decode step on them
    Loan          one cache's hold on buffers, and its length in tokens
    PooledLayer   a `DynamicLayer` of that cache, whose keys and values are views of the buffers

New tokens are written in place after the first `length`; full buffers are copied once into larger ones. Operations on a layer
by transformers or the user (crop, select, repeat, an update by transformers' forward) leave it with its own tensors, as in a
`DynamicLayer`; the next fast forward moves them back into buffers, with no copy if they are still a prefix of these. Copy on
write: a view that someone may hold is never written to; buffers whose contents were handed out move first.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from . import limits
from .cuda_graphs import Slot

Pair = tuple[torch.Tensor, torch.Tensor]


def capacity_for(tokens: int) -> int:
    return -(-(tokens + limits.KV_HEADROOM) // limits.KV_BLOCK) * limits.KV_BLOCK


def _zeros(like: torch.Tensor, capacity: int) -> Pair:
    """Zeros, because rows that padding leaves unwritten are multiplied by attention weights of 0, which NaN would survive."""
    # A tensor made in inference mode cannot be written to outside of it.
    with torch.inference_mode(False):
        return torch.zeros(2, like.shape[0], capacity, *like.shape[2:], dtype=like.dtype, device=like.device).unbind()


class Buffers:
    """Memory for the keys and values of all layers, each (B, capacity, kv_heads, head_dim), and the slot for the graph of the
    decode step on it. Views of the first `exposed` tokens may be held elsewhere."""

    def __init__(self, n_layers: int, like: torch.Tensor, tokens: int) -> None:
        self.capacity = capacity_for(tokens)
        self.layers = [_zeros(like, self.capacity) for _ in range(n_layers)]
        self.exposed = 0
        self.slot = Slot()

    @property
    def batch(self) -> int:
        return self.layers[0][0].shape[0]

    def fits(self, length: int, tokens: int) -> bool:
        """Whether `tokens` in total fit, `length` of them present, and no view of the rows after those was handed out."""
        return tokens <= self.capacity and self.exposed <= length

    def reserve(self, length: int, tokens: int) -> None:
        """Grows layer by layer, so that old and new memory coexist for one layer only."""
        if self.fits(length, tokens):
            return
        capacity = max(capacity_for(tokens), self.capacity)
        self.slot.clear()
        self.capacity = 0  # until all layers have moved: if interrupted, the next call moves them again
        for index, old in enumerate(self.layers):
            new = _zeros(old[0], capacity)
            for side, before in zip(new, old, strict=True):
                side[:, :length] = before[:, :length]
            self.layers[index] = new
            del old, before
        self.capacity, self.exposed = capacity, 0

    def view(self, index: int, length: int) -> Pair:
        """The first tokens in transformers' order (B, kv_heads, length, head_dim)."""
        keys, values = self.layers[index]
        return keys[:, :length].transpose(1, 2), values[:, :length].transpose(1, 2)

    def shares(self, index: int, tensor: torch.Tensor | None) -> bool:
        return tensor is not None and tensor.untyped_storage()._cdata == self.layers[index][0].untyped_storage()._cdata

    def begins_with(self, index: int, pair: Pair, length: int) -> bool:
        """Whether `pair` is `view(index, length)`."""
        return all(
            self.shares(index, given)
            and (given.storage_offset(), given.shape, given.stride()) == (own.storage_offset(), own.shape, own.stride())
            for given, own in zip(pair, self.view(index, length), strict=True)
        )


class Loan:
    """A cache's hold on buffers with `length` valid tokens, referenced by its layers, `held` of which are in the buffers; it
    ends with the last reference."""

    def __init__(self, buffers: Buffers) -> None:
        self.buffers, self.length, self.held = buffers, 0, 0

    @property
    def is_whole(self) -> bool:
        return self.held == len(self.buffers.layers)

    def advance(self, tokens: int) -> None:
        """Counts `tokens` that the kernels have written."""
        self.length += tokens


def _unexposed(name: str) -> Callable[..., Any]:
    """transformers' method of that name, whose reads of keys and values do not count as handing them out."""

    def run(layer: PooledLayer, *args: Any, **kwargs: Any) -> Any:
        layer._unseen = True
        try:
            return getattr(DynamicLayer, name)(layer, *args, **kwargs)
        finally:
            layer._unseen = False

    return functools.wraps(getattr(DynamicLayer, name))(run)


class PooledLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values are in layer `_index` of a loan's buffers, until others are assigned: then these
    are its `_own`."""

    _loan: Loan | None = None
    _own: tuple[torch.Tensor | None, torch.Tensor | None] | None = (None, None)
    _unseen = False

    def peek(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Keys and values for internal use, without marking them as handed out."""
        return self._loan.buffers.view(self._index, self._loan.length) if self._own is None else self._own

    def _get(self, side: int) -> torch.Tensor | None:
        tensor = self.peek()[side]
        # A cropped layer's own tensors are views of the buffers, too.
        if not self._unseen and self._loan is not None and self._loan.buffers.shares(self._index, tensor):
            self._loan.buffers.exposed = max(self._loan.buffers.exposed, tensor.shape[-2])
        return tensor

    def _set(self, side: int, tensor: torch.Tensor | None) -> None:
        pair = list(self.peek())
        pair[side] = tensor
        if self._own is None:
            self._loan.held -= 1
        self._own = tuple(pair)  # type: ignore[assignment]
        if self._loan is not None and not any(self._loan.buffers.shares(self._index, own) for own in pair):
            self._loan = None

    keys = property(lambda self: self._get(0), lambda self, tensor: self._set(0, tensor))
    values = property(lambda self: self._get(1), lambda self, tensor: self._set(1, tensor))

    def hold(self, loan: Loan, index: int) -> None:
        """Puts the layer into the loan's buffers."""
        self._loan, self._index, self._own = loan, index, None
        keys = loan.buffers.layers[index][0]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        loan.held += 1

    def get_seq_length(self) -> int:
        if self._own is None:
            return self._loan.length
        keys = self._own[0]
        return 0 if not self.is_initialized or keys.numel() == 0 else keys.shape[-2]

    crop = _unexposed("crop")
    batch_repeat_interleave = _unexposed("batch_repeat_interleave")
    batch_select_indices = _unexposed("batch_select_indices")
    _update = _unexposed("update")
    _reorder = _unexposed("reorder_cache")

    def update(self, key_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        if self._own is None and self._loan.length == 0:
            self.reset()  # the batch size may differ
        return self._update(key_states, *args, **kwargs)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """In place, so that a captured decode step stays valid."""
        if self._own is not None or self._loan.buffers.exposed:
            return self._reorder(beam_idx)
        for side in self._loan.buffers.layers[self._index]:
            filled = side[:, : self._loan.length]
            filled.copy_(filled.index_select(0, beam_idx.to(filled.device)))
        return None

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """A copy, or a pickle, is a `DynamicLayer` with its own memory."""
        if self.get_seq_length() == 0:
            return DynamicLayer, ()
        pair = [tensor.clone() for tensor in self.peek()]
        state = {name: value for name, value in vars(self).items() if name not in ("_loan", "_index", "_own", "_unseen")}
        return DynamicLayer, (), {**state, "keys": pair[0], "values": pair[1]}


class KVPool:
    """The memory of one model's caches.

    A finalizer returns buffers once no layer of their cache is alive; those with a captured graph are kept for the next request
    of the same batch size.
    """

    def __init__(self) -> None:
        self.idle: list[Buffers] = []
        self.lock = threading.RLock()

    def borrow(self, cache: Cache, n_layers: int, like: torch.Tensor, tokens: int) -> Loan:
        """A loan for `cache`, which passed `cache_guard`, with capacity for `tokens` in total; its contents are kept.

        Args:
            like: (B, ?, kv_heads, head_dim) with the dtype and device of the buffers.

        Raises:
            ValueError: the batch size of the cache differs.
        """
        layers = cache.layers
        length = layers[0].get_seq_length() if layers else 0
        if length and (present := len(_peek(layers[0])[0])) != len(like):
            raise ValueError(f"the cache holds {present} prompts, but the input has {len(like)}")
        loan = self._present(layers, n_layers, length)
        if loan is None or loan.buffers.batch != len(like):
            loan = self._lend(n_layers, like, max(tokens, length))
            layers += [DynamicLayer() for _ in range(n_layers - len(layers))]
            for index, layer in enumerate(layers):
                _move(layer, loan, index, length)
        loan.length = length
        loan.buffers.reserve(length, tokens)
        return loan

    @staticmethod
    def _present(layers: list, n_layers: int, length: int) -> Loan | None:
        """The loan whose buffers hold all layers in order up to `length`, if there is one."""
        loan = layers[0]._loan if layers and type(layers[0]) is PooledLayer else None
        if loan is None or len(layers) != n_layers or len(loan.buffers.layers) != n_layers:
            return None
        for index, layer in enumerate(layers):
            if type(layer) is not PooledLayer or layer._loan is not loan or layer._index != index:
                return None
            if layer._own is not None and (length == 0 or not loan.buffers.begins_with(index, layer._own, length)):
                return None
        for index, layer in enumerate(layers):
            if layer._own is not None:
                layer.hold(loan, index)
        return loan

    def _lend(self, n_layers: int, like: torch.Tensor, tokens: int) -> Loan:
        buffers = self._take(n_layers, like, tokens) or Buffers(n_layers, like, tokens)
        loan = Loan(buffers)
        weakref.finalize(loan, self.take_back, buffers).atexit = False
        return loan

    def _take(self, n_layers: int, like: torch.Tensor, tokens: int) -> Buffers | None:
        wanted = n_layers, like.shape[0], like.shape[2:], like.dtype, like.device
        with self.lock:
            for buffers in reversed(self.idle):
                keys = buffers.layers[0][0]
                if (len(buffers.layers), keys.shape[0], keys.shape[2:], keys.dtype, keys.device) == wanted and (
                    tokens <= buffers.capacity
                ):
                    self.idle.remove(buffers)
                    for pair in buffers.layers:
                        pair[0]._base.zero_()
                    return buffers
        return None

    def take_back(self, buffers: Buffers) -> None:
        with self.lock:
            if buffers.slot.graph is not None and not buffers.exposed and buffers.capacity:
                self.idle = [*self.idle, buffers][-limits.IDLE_BUFFERS :]

    def clear(self) -> bool:
        """Frees idle buffers. Returns whether there were any."""
        with self.lock:
            held, self.idle = bool(self.idle), []
            return held


LAYERS = DynamicLayer, PooledLayer
"""Layer classes of the caches that are supported."""


def _peek(layer: DynamicLayer) -> Pair:
    return layer.peek() if type(layer) is PooledLayer else (layer.keys, layer.values)


def _move(layer: DynamicLayer, loan: Loan, index: int, length: int) -> None:
    """Copies the contents of `layer` into the loan's buffers; the object stays the same, as a `PooledLayer`."""
    if length:
        for side, tensor in zip(loan.buffers.layers[index], _peek(layer), strict=True):
            side[:, :length] = tensor.transpose(1, 2)
    if type(layer) is DynamicLayer:
        layer.__class__ = PooledLayer
        vars(layer).pop("keys", None)
        vars(layer).pop("values", None)
    elif layer._own is None:
        layer._loan.held -= 1
    layer.hold(loan, index)
