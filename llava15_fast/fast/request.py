"""A request: a call of `generate`, or a direct forward. Guards are evaluated and the request is planned once, when it begins.

    generate            opens a request; in transformers' `_prefill` it reads the whole mask; its first forward binds the cache,
                        and forwards on that cache are its steps, which follow the plan without evaluating guards again
    a direct forward    of the model, the inner model, the text model or the vision tower is its own request

The request travels in a context variable, so that the plain model needs no knowledge of it and masks remain tensors. Changes
made to the model during a request take effect with the next one.
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
        runtime: of the patched model.
        is_generate: whether this is a call of `generate` with a known loop.
        mask, padding: the attention mask that was read, and its padding.
        reads_padding: whether outputs at padding are used: in a loss, or as the logits that predict a prompt's first token.
        cache, loan: bound by the first forward within `generate`.
        starts: index of the first non-padding token, per prompt.
        most_tokens: the maximum number of new tokens per prompt in a step.
        begun, loop_began: whether the text model, and the decoding loop, have started.
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
        """Reads the mask before any kernel launch: after the vision tower is queued, the copy would block the host."""
        self.mask = mask
        self.padding = None if mask is None else Padding.read(mask)

    def padding_of(self, mask: Any) -> Padding | str | None:
        """The padding of `mask`; within `generate`, `mask` is the one that was read, or a prefix of it."""
        if mask is self.mask or (self.is_generate and self.padding is not None):
            return self.padding
        return None if mask is None else Padding.read(mask)

    def covers(self, module: nn.Module, cache: Any = None) -> bool:
        """Whether a forward of `module` on `cache` belongs to this request: its first one, or a step on the bound cache."""
        if self.runtime is None or runtime_of(module) is not self.runtime:
            return False
        return not self.begun or (cache is not None and cache is self.cache)

    def begin(self, cache: Any, loan: Loan | None, starts: list[int], most_tokens: int) -> None:
        """Called when the text model starts; from here on only steps on `cache` belong to a `generate`."""
        self.begun, self.starts, self.most_tokens = True, starts, most_tokens
        if self.is_generate:
            self.cache, self.loan = cache, loan

    def facts(self, table: Table, module: nn.Module) -> Facts:
        """Computed once per request."""
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
    """Whether a label that counts (not -100) is predicted from a padding position."""
    if labels is None or mask is None:
        return False
    if mask.ndim != 2 or labels.shape[1] > mask.shape[1] or mask.is_meta or is_fake(mask):
        return True
    padding = mask[:, -labels.shape[1] :] == 0
    return bool(((labels[:, 1:] != -100).to(mask.device) & padding[:, :-1]).any())


def _keeps_padding(given: dict[str, Any], padding: Padding | str | None) -> bool:
    """Whether logits of padding to the left of a prompt are kept."""
    tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    kept = given.get("logits_to_keep", 0)
    if not isinstance(padding, Padding) or tokens is None or (isinstance(kept, torch.Tensor) and not kept.numel()):
        return False
    length = tokens.shape[1]
    first = int((kept % length).min()) if isinstance(kept, torch.Tensor) else max(0, length - kept) if kept else 0
    return any(start > padding.length - length + first for start, _ in padding.spans)


def as_request(base: type[nn.Module]) -> Callable[..., Any]:
    """The forward of the patched class of `base`: the original forward, inside its request, which it opens if there is none."""
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
