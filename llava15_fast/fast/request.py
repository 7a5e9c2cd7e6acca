"""A request: a call of `generate`, or a direct forward. It is guarded and planned once, when it begins.

    generate            opens a request; transformers' `_prefill` tells it the whole mask; its first forward binds the cache,
                        and the forwards on that cache are its steps: they follow the plan and look at nothing else
    a direct forward    of the model, the inner model, the text model or the vision tower is a request of its own

The request travels in a context variable: the plain model knows nothing of it, and a mask stays a tensor for everyone. What
changes in the middle of a request is seen by the next one.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from .guards import FAST, Facts, Table, original
from .kv_cache import Loan
from .layout import Padding
from .runtime import runtime_of

_current: ContextVar[Request | None] = ContextVar("llava15_request", default=None)


class Request:
    """
    Attributes:
        runtime: of the model whose modules it goes through.
        is_generate: whether it is a call of `generate`, whose loop is known.
        mask, padding: the attention mask that was read, and what it says.
        reads_padding: whether what is said of padding counts: in a loss, or as logits of what predicts a prompt's first token.
        cache, loan: that a `generate` is bound to by its first forward.
        starts: per prompt its first token that is no padding.
        most_tokens: new ones of a prompt that a step may have.
        begun, loop_began: whether the text model, and the decoding loop, have run.
    """

    def __init__(self, module: nn.Module, mask: Any = None, is_generate: bool = False) -> None:
        self.runtime = runtime_of(module)
        self.is_generate, self.reads_padding = is_generate, False
        self.cache: Any = None
        self.loan: Loan | None = None
        self.starts: list[int] = []
        self.most_tokens = 0
        self.begun = self.loop_began = False
        self._facts: dict[tuple, Facts] = {}
        self.read(mask)

    def read(self, mask: Any) -> None:
        """Looks at the mask, before anything is launched: behind the vision tower the host would wait for it."""
        self.mask = mask
        self.padding = None if mask is None else Padding.read(mask)

    def padding_of(self, mask: Any) -> Padding | str | None:
        """What `mask` says; in `generate` it is the one that was read, or its beginning."""
        if mask is self.mask or (self.is_generate and self.padding is not None):
            return self.padding
        return None if mask is None else Padding.read(mask)

    def covers(self, module: nn.Module, cache: Any = None) -> bool:
        """Whether a forward of `module` on `cache` belongs to it: the first one, or a step on the cache that is bound."""
        if self.runtime is None or runtime_of(module) is not self.runtime:
            return False
        return not self.begun or (cache is not None and cache is self.cache)

    def begin(self, cache: Any, loan: Loan | None, starts: list[int], most_tokens: int) -> None:
        """The text model runs: the vision tower is done, and from now on only steps on `cache` belong to a `generate`."""
        self.begun, self.starts, self.most_tokens = True, starts, most_tokens
        if self.is_generate:
            self.cache, self.loan = cache, loan

    def facts(self, table: Table, module: nn.Module) -> Facts:
        """Looked at once."""
        key = table.name, id(module)
        if key not in self._facts:
            self._facts[key] = Facts(table, module)
        return self._facts[key]


def current(module: nn.Module, cache: Any = None) -> Request | None:
    """The request that a forward of `module` on `cache` belongs to."""
    request = _current.get()
    return request if request is not None and request.covers(module, cache) else None


@contextlib.contextmanager
def opened(request: Request) -> Iterator[Request]:
    token = _current.set(request)
    try:
        yield request
    finally:
        _current.reset(token)


def _loss_reads_padding(labels: Any, mask: Any) -> bool:
    """Whether a token that counts, one that is not -100, follows padding, which predicts it."""
    if labels is None or mask is None:
        return False
    if mask.ndim != 2 or labels.shape[1] > mask.shape[1] or mask.is_meta or is_fake(mask):
        return True
    padding = mask[:, -labels.shape[1] :] == 0
    return bool(((labels[:, 1:] != -100).to(mask.device) & padding[:, :-1]).any())


def _keeps_padding(given: dict[str, Any], padding: Padding | str | None) -> bool:
    """Whether logits are kept of a place before a prompt."""
    tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    kept = given.get("logits_to_keep", 0)
    if not isinstance(padding, Padding) or tokens is None or (isinstance(kept, torch.Tensor) and not kept.numel()):
        return False
    length = tokens.shape[1]
    first = int((kept % length).min()) if isinstance(kept, torch.Tensor) else max(0, length - kept) if kept else 0
    return any(start > padding.length - length + first for start, _ in padding.spans)


def as_request(base: type[nn.Module]) -> Callable[..., Any]:
    """The forward of the patched class of `base`: the original, as a part of the request that it belongs to or as its own."""
    names = tuple(inspect.signature(base.forward).parameters)[1:]

    @functools.wraps(base.forward)
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(original(FAST[base], module, "forward"), module, *args, **kwargs)
        if torch.compiler.is_compiling():
            return run()
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = given.get("past_key_values") if given.get("cache") is None else given["cache"]
        if current(module, cache) is not None:
            return run()
        request = Request(module, given.get("attention_mask"))
        if "labels" in names:
            labels, padding = given.get("labels"), request.padding
            request.reads_padding = _loss_reads_padding(labels, request.mask) or _keeps_padding(given, padding)
        with opened(request):
            return run()

    return forward
