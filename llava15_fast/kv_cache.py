"""A key/value cache that is a `DynamicCache` to transformers and one block of memory to the kernels.

Each layer keeps keys and values in storages (B, capacity, kv_heads, head_dim) of which the first `length` tokens count. New
tokens are written in place; a full storage is copied once into a larger one. `keys` and `values` are views of it in
transformers' order (B, kv_heads, length, head_dim), and assigning to them replaces the contents, so that cropping, beams,
repeating, selecting and resetting are transformers' own code.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

BLOCK = 512
"""Tokens by which a storage grows."""

HEADROOM = 128
"""Tokens that are free after growing, so that a prompt that nearly fills its block does not grow at once again."""


def capacity_for(tokens: int) -> int:
    return -(-(tokens + HEADROOM) // BLOCK) * BLOCK


class _Side:
    """Keys or values of one layer: `view` shows the first `length` tokens of `storage`."""

    def __init__(self, storage: torch.Tensor, length: int = 0) -> None:
        self.storage = storage
        self.length = length

    @property
    def shown(self) -> int:
        """Tokens that someone outside may have kept a view of. The storage knows, for it may outlive this object
        (`DecodeGraphs.lend`)."""
        return getattr(self.storage, "shown", 0)

    @property
    def view(self) -> torch.Tensor:
        return self.storage[:, : self.length].transpose(1, 2)

    @classmethod
    def empty(cls, like: torch.Tensor, tokens: int, device: torch.device) -> _Side:
        """Zeros, not garbage: what padding leaves unwritten is multiplied by a weight of 0 where a mask hides it."""
        batch, heads, _, head_dim = like.shape
        # A storage made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            return cls(torch.zeros(batch, capacity_for(tokens), heads, head_dim, dtype=like.dtype, device=device))

    @classmethod
    def holding(cls, tensor: torch.Tensor, present: _Side | None) -> _Side:
        """(B, heads, length, head_dim) in a storage; in the present one if it is a shorter view of that."""
        length = tensor.shape[2]
        if present is not None and length <= present.length and present.is_start(tensor):
            return cls(present.storage, length)
        side = cls.empty(tensor, length, tensor.device)
        side.append(tensor)
        return side

    def is_start(self, tensor: torch.Tensor) -> bool:
        start = self.storage[:, : tensor.shape[2]].transpose(1, 2)
        return (tensor.shape, tensor.stride()) == (start.shape, start.stride()) and (
            tensor.untyped_storage()._cdata == start.untyped_storage()._cdata
            and tensor.storage_offset() == start.storage_offset()
        )

    def show(self) -> torch.Tensor:
        self.storage.shown = max(self.shown, self.length)
        return self.view

    def has_to_move(self, tokens: int) -> bool:
        """Whether `tokens` do not fit, or what lies behind the present ones is seen by someone."""
        return tokens > self.storage.shape[1] or self.shown > self.length

    def reserve(self, tokens: int) -> None:
        """Room for `tokens`, none of it seen by anyone."""
        if self.has_to_move(tokens):
            larger = _Side.empty(self.view, tokens, self.storage.device)
            larger.append(self.view)
            self.storage = larger.storage

    def append(self, tensor: torch.Tensor) -> None:
        end = self.length + tensor.shape[2]
        self.storage[:, self.length : end] = tensor.transpose(1, 2)
        self.length = end


class PreallocatedLayer(DynamicLayer):
    """A `DynamicLayer` on storages that the kernels write into."""

    def __init__(self) -> None:
        self._private = False
        self._keys: _Side | None = None
        self._values: _Side | None = None
        super().__init__()

    @property
    def keys(self) -> torch.Tensor | None:
        return None if self._keys is None else self._keys.view if self._private else self._keys.show()

    @keys.setter
    def keys(self, tensor: torch.Tensor | None) -> None:
        self._keys = None if tensor is None else _Side.holding(tensor, self._keys)

    @property
    def values(self) -> torch.Tensor | None:
        return None if self._values is None else self._values.view if self._private else self._values.show()

    @values.setter
    def values(self, tensor: torch.Tensor | None) -> None:
        self._values = None if tensor is None else _Side.holding(tensor, self._values)

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor, device: torch.device | None = None
    ) -> None:
        self.dtype, self.device = key_states.dtype, device or key_states.device
        self._keys, self._values = (_Side.empty(states, states.shape[2], self.device) for states in (key_states, value_states))
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return 0 if self._keys is None else self._keys.length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, kv_heads, L, head_dim) behind what is there; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.check_batch(key_states.shape[0])
        for side, states in ((self._keys, key_states), (self._values, value_states)):
            side.reserve(side.length + states.shape[2])
            side.append(states)
        return self._keys.view, self._values.view

    def check_batch(self, batch: int) -> None:
        if (present := self._keys.storage.shape[0]) != batch:
            raise ValueError(f"the cache holds {present} prompts, but the input has {batch}")

    def crop(self, tokens_to_remove: int) -> None:
        """As transformers', which reads keys and values to shorten them and keeps nothing of what it read."""
        self._private = True
        try:
            super().crop(tokens_to_remove)
        finally:
            self._private = False

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """In place: the storages stay where they are."""
        for side in (self._keys, self._values):
            if side is not None:
                if side.shown:
                    with torch.inference_mode(False):  # see `empty`
                        side.storage = side.storage.clone()
                filled = side.storage[:, : side.length]
                filled.copy_(filled.index_select(0, beam_idx.to(filled.device)))

    # What the kernels use.

    def reserve(self, tokens: int, batch: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """Room for `tokens` in all.

        Raises:
            ValueError: the layer holds another number of prompts.
        """
        if not self.is_initialized:
            like = torch.empty((batch, heads, tokens, head_dim), dtype=dtype, device="meta")
            self.lazy_initialization(like, like, device)
        self.check_batch(batch)
        self._keys.reserve(tokens)
        self._values.reserve(tokens)

    def has_to_move(self, tokens: int) -> bool:
        """Whether `reserve` will leave the present storages."""
        return self.is_initialized and (self._keys.has_to_move(tokens) or self._values.has_to_move(tokens))

    @property
    def storages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, capacity, kv_heads, head_dim), free slots included."""
        return self._keys.storage, self._values.storage

    @storages.setter
    def storages(self, storages: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Storages that were used before, for an empty layer."""
        keys, values = storages
        self.dtype, self.device = keys.dtype, keys.device
        self._keys, self._values = _Side(keys), _Side(values)
        self.is_initialized = True

    def advance(self, tokens: int) -> None:
        """The kernels have written `tokens` more."""
        self._keys.length += tokens
        self._values.length += tokens


def adopt(cache: Cache, n_layers: int) -> bool:
    """Makes a plain `DynamicCache` keep its layers in storages; what it holds already is copied once.

    Returns:
        Whether all its layers are `PreallocatedLayer`s now; False, and nothing done, for any other kind of cache.
    """
    if type(cache) is not DynamicCache or cache.offloading or len(cache.layers) > n_layers:
        return False
    if len(cache.layers) == n_layers and all(type(layer) is PreallocatedLayer for layer in cache.layers):
        return True
    if any(type(layer) not in (DynamicLayer, PreallocatedLayer) for layer in cache.layers):
        return False
    if cache.layer_class_to_replicate not in (None, DynamicLayer):
        return False
    layers = []
    for layer in [*cache.layers, *(DynamicLayer() for _ in range(n_layers - len(cache.layers)))]:
        ours = PreallocatedLayer()
        if layer.get_seq_length():
            ours.update(layer.keys, layer.values)
        layers.append(ours)
    cache.layers = layers
    cache.layer_class_to_replicate = None
    return True
