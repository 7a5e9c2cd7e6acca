"""What is measured: each kernel at the model's shapes, its reference, and who it has to beat.

A `Case` makes fresh random inputs, calls ours and the reference on them, and knows its bytes, its operations and its
competitors. `Checker` holds any of them against the reference by the error rule of `llava15_kernels.testing`: nothing that
fails is timed. With `tiny` the same cases run in moments on a CPU, so that a slip in this table costs no time on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from llava15_kernels import (
    decode_attention,
    decode_attention_ref,
    flash_attn_varlen_func,
    flash_attn_varlen_ref,
    flash_attn_with_kvcache,
    flash_attn_with_kvcache_ref,
    fused_linear,
    fused_linear_ref,
    gelu,
    gelu_ref,
    layer_norm,
    layer_norm_ref,
    patch_merge,
    patch_merge_ref,
    qk_norm_rope,
    qk_norm_rope_ref,
    rms_norm,
    rms_norm_ref,
    silu_and_mul,
    silu_and_mul_ref,
    vision_rope_2d,
    vision_rope_2d_ref,
)
from llava15_kernels._registry import nbytes
from llava15_kernels.qk_norm_rope import write_rows
from llava15_kernels.testing import assert_close

from .sizes import TEXT

Outputs = Any
"""A tensor or a tuple of tensors."""
Provider = Callable[..., Callable[[], Outputs]]
"""provider(*inputs) -> the call to time. Preparation (other layouts, masks, compilation) is not timed."""


class Unavailable(Exception):
    """A provider that does not exist here; the message is its row's status."""


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    `ours(*inputs)` and `reference(*inputs)` give the same outputs; the reference also takes float64 inputs.
    """

    kernel: str
    name: str
    shape: str
    make: Callable[[torch.device, torch.dtype], tuple[Any, ...]]
    ours: Callable[..., Outputs]
    reference: Callable[..., Outputs]
    providers: dict[str, Provider] = field(default_factory=dict)
    slow_providers: dict[str, Provider] = field(default_factory=dict)
    """Those that compile for seconds."""
    bytes: Callable[..., int] | None = None
    """Of the compulsory traffic; by default each floating-point or integer input once and each output once."""
    flops: int = 0
    """0: bound by memory."""
    tiny_launches: bool = False
    """Whether the host hides the device: timed in a CUDA graph too."""

    @property
    def id(self) -> str:
        return f"{self.kernel} {self.name}"

    def traffic(self, inputs: tuple[Any, ...], outputs: Outputs) -> int:
        if self.bytes is not None:
            return self.bytes(*inputs)
        return nbytes(*(x for x in inputs if isinstance(x, torch.Tensor)), *tensors(outputs))


def tensors(outputs: Outputs) -> tuple[torch.Tensor, ...]:
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


@contextlib.contextmanager
def poisoned_buffers() -> Iterator[None]:
    """Fresh floating-point buffers are full of NaN, so that a value a kernel forgets to write is seen."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor

    with mock.patch.object(torch, "empty", poisoned):
        yield


class Checker:
    """One case's inputs with what the reference makes of them in float64 and in the dtype itself."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.case = case
        self.inputs = case.make(device, dtype)
        self.eager = tensors(case.reference(*self.inputs))
        wide = (x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in self.inputs)
        self.exact = tensors(case.reference(*wide))
        self.traffic = case.traffic(self.inputs, self.eager)

    def ours(self) -> Outputs:
        return self.case.ours(*self.inputs)

    def check_ours(self) -> None:
        with poisoned_buffers():
            outputs = self.ours()
        self.check(outputs)

    def check(self, outputs: Outputs) -> None:
        """Raises AssertionError where the outputs break the error rule."""
        found = tensors(outputs)
        assert len(found) == len(self.exact), f"{self.case.id}: {len(found)} outputs, expected {len(self.exact)}"
        for index, (ours, eager, exact) in enumerate(zip(found, self.eager, self.exact, strict=True)):
            assert_close(ours, eager, exact, f"{self.case.id}, output {index}")


def compiled(function: Callable[..., Outputs]) -> Provider:
    """`torch.compile` of a function of the inputs. On a CPU it is traced only: no compiler is asked for."""

    def prepare(*inputs: Any) -> Callable[[], Outputs]:
        torch._dynamo.reset()  # else other shapes of the same function count towards the limit of recompilations
        options = {} if inputs[0].is_cuda else {"backend": "eager"}
        fast = torch.compile(function, dynamic=False, fullgraph=True, **options)
        return lambda: fast(*inputs)

    return prepare


def plain(function: Callable[..., Outputs]) -> Provider:
    return lambda *inputs: lambda: function(*inputs)


def library(module: str, name: str) -> Any:
    """An attribute of a module that need not be installed.

    Raises:
        Unavailable: it is not.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise Unavailable("not installed") from error
    except (ImportError, AttributeError, OSError) as error:
        raise Unavailable(f"unavailable: {error}") from error


def liger(name: str, arguments: Callable[..., tuple[Any, ...]]) -> Provider:
    def prepare(*inputs: Any) -> Callable[[], Outputs]:
        function = library("liger_kernel.transformers.functional", name)
        return lambda: function(*arguments(*inputs))

    return prepare


EPS = 1e-6
Make = Callable[[torch.device, torch.dtype], tuple[Any, ...]]


def _randn(*shape: int) -> Make:
    return lambda device, dtype: (torch.randn(shape, device=device, dtype=torch.float32).to(dtype),)


def _norm_inputs(rows: int, width: int, vectors: int, residual: bool) -> Make:
    """x, `vectors` weights, and the residual."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        x, other = torch.randn(2, rows, width, device=device).to(dtype)
        weights = torch.randn(vectors, width, device=device).to(dtype)
        return (x, *weights, *((other,) if residual else ()))

    return make


def rms_norm_case(rows: int, width: int, residual: bool, tiny_launches: bool = False) -> Case:
    def reference(x: torch.Tensor, weight: torch.Tensor, other: torch.Tensor | None = None) -> Outputs:
        return rms_norm_ref(x, weight, EPS, other)

    providers = {"eager": plain(reference)}
    if residual:
        providers["Liger-Kernel"] = liger("liger_fused_add_rms_norm", lambda x, weight, other: (x, other, weight, EPS))
    else:
        providers["torch rms_norm"] = plain(lambda x, weight: torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS))
        providers["Liger-Kernel"] = liger("liger_rms_norm", lambda x, weight: (x, weight, EPS))
    return Case(
        "rms_norm", f"{rows}x{width}{' residual' * residual}", f"x ({rows}, {width})",
        _norm_inputs(rows, width, 1, residual),
        lambda x, weight, other=None: rms_norm(x, weight, EPS, other), reference, providers,
        {"torch.compile": compiled(reference)}, tiny_launches=tiny_launches,
    )  # fmt: skip


def layer_norm_case(rows: int, width: int, residual: bool) -> Case:
    def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, other: torch.Tensor | None = None) -> Outputs:
        return layer_norm_ref(x, weight, bias, EPS, other)

    providers = {"eager": plain(reference)}
    if not residual:
        providers["Liger-Kernel"] = liger("liger_layer_norm", lambda x, weight, bias: (x, weight, bias, EPS))
    return Case(
        "layer_norm", f"{rows}x{width}{' residual' * residual}", f"x ({rows}, {width})",
        _norm_inputs(rows, width, 2, residual),
        lambda x, weight, bias, other=None: layer_norm(x, weight, bias, EPS, other), reference, providers,
        {"torch.compile": compiled(reference)},
    )  # fmt: skip


def _grid(rows: int) -> int:
    """The even side of the square grid of patches that with its class row has about so many rows."""
    return max(2, int((rows - 1) ** 0.5) // 2 * 2)


def vision_rope_case(rows: int, heads: int, head_dim: int) -> Case:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        side = _grid(rows)
        positions = torch.cartesian_prod(torch.arange(side), torch.arange(side)).int()
        positions = torch.cat([positions.new_full((1, 2), -1), positions]).to(device)
        q, k, _ = torch.randn(len(positions), 3, heads, head_dim, device=device).to(dtype).unbind(1)
        inv_freq = 10000 ** -(torch.arange(head_dim // 4, device=device) * 4.0 / head_dim)
        return q, k, positions, inv_freq, torch.randn(1, head_dim // 2, device=device).to(dtype)

    return Case(
        "vision_rope_2d", f"{rows}x{heads}x{head_dim}", f"q, k ({rows}, {heads}, {head_dim}) of a packed qkv",
        make, vision_rope_2d, vision_rope_2d_ref,
        {"eager": plain(vision_rope_2d_ref)}, {"torch.compile": compiled(vision_rope_2d_ref)},
    )  # fmt: skip


def patch_merge_case(patches: int, width: int) -> Case:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        x = torch.randn(patches + 1, width, device=device).to(dtype)
        weight, bias = torch.randn(2, width, device=device).to(dtype)
        return x, weight, bias, torch.tensor([0, patches + 1], dtype=torch.int32, device=device)

    def known_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return layer_norm_ref(x[1:], weight, bias, EPS).reshape(-1, 4 * width)

    return Case(
        "patch_merge", f"{patches}x{width}", f"x ({patches + 1}, {width})",
        make,
        lambda x, weight, bias, bounds: patch_merge(x, weight, bias, EPS, bounds),
        lambda x, weight, bias, bounds: patch_merge_ref(x, weight, bias, EPS, bounds),
        # One image whose class row is known to come first: less than ours has to find out.
        {"eager, one image": plain(known_rows)}, {"torch.compile, one image": compiled(known_rows)},
    )  # fmt: skip


def text_heads() -> tuple[int, int, int]:
    """Query heads, KV heads and their width, the same in both models."""
    text = TEXT["4b"]
    return text.num_attention_heads, text.num_key_value_heads, text.head_dim


def qk_norm_rope_case(tokens: int, context: int, tiny_launches: bool = False) -> Case:
    """`tokens` new ones written into a cache behind `context` others."""
    heads, kv_heads, head_dim = text_heads()

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        packed = torch.randn(1, tokens, heads + 2 * kv_heads, head_dim, device=device).to(dtype)
        weights = torch.randn(2, head_dim, device=device).to(dtype)
        inv_freq = 5e6 ** -(torch.arange(head_dim // 2, device=device) * 2.0 / head_dim)
        positions = torch.arange(context, context + tokens, device=device)[None]
        caches = torch.zeros(2, context + tokens, kv_heads, head_dim, device=device, dtype=dtype)
        return (*packed.split([heads, kv_heads, kv_heads], dim=2), *weights, positions, inv_freq, *caches)

    def ours(q, k, v, q_weight, k_weight, positions, inv_freq, k_cache, v_cache) -> Outputs:
        cache = {"v": v, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": positions}
        q = qk_norm_rope(q, k, q_weight, k_weight, EPS, positions, inv_freq, **cache)
        return q, k_cache[None, context:], v_cache[None, context:]

    def eager(q, k, v, q_weight, k_weight, positions, inv_freq, k_cache, v_cache) -> Outputs:
        """Not the torch backend's public function, which looks for rows outside of the cache and so waits for the device."""
        q, k = qk_norm_rope_ref(q, k, q_weight, k_weight, EPS, positions, inv_freq)
        write_rows(k_cache, v_cache, positions, k, v)
        return q, k_cache[None, context:], v_cache[None, context:]

    def reference(q, k, v, q_weight, k_weight, positions, inv_freq, *_: Any) -> Outputs:
        return (*qk_norm_rope_ref(q, k, q_weight, k_weight, EPS, positions, inv_freq), v)

    def traffic(q, k, v, q_weight, k_weight, positions, inv_freq, *_: Any) -> int:
        return 2 * nbytes(q, k, v) + nbytes(q_weight, k_weight, positions, inv_freq)

    return Case(
        "qk_norm_rope", f"{tokens} tokens into the cache", f"q (1, {tokens}, {heads}, {head_dim}), k, v of {kv_heads} heads",
        make, ours, reference, {"eager": plain(eager)}, {"torch.compile": compiled(eager)},
        bytes=traffic, tiny_launches=tiny_launches,
    )  # fmt: skip


def decode_attention_case(batch: int, context: int, heads: int, kv_heads: int, head_dim: int) -> Case:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        packed = torch.randn(batch, 1, heads + 2 * kv_heads, head_dim, device=device).to(dtype)
        caches = torch.randn(2, batch, context, kv_heads, head_dim, device=device).to(dtype)
        weights, positions = (
            torch.randn(2, head_dim, device=device).to(dtype),
            torch.full((1, batch), context - 1, device=device),
        )
        frequencies = 1e6 ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)
        lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
        return *packed.split([heads, kv_heads, kv_heads], 2), *weights, positions, frequencies, *caches, lengths

    def ours(*inputs: torch.Tensor) -> Outputs:
        return decode_attention(*inputs[:5], 1e-6, *inputs[5:])

    def reference(*inputs: torch.Tensor) -> Outputs:
        *others, k_cache, v_cache, lengths = inputs
        cache = k_cache.clone(), v_cache.clone(), lengths, torch.zeros_like(lengths), head_dim**-0.5
        return decode_attention_ref(*others[:5], 1e-6, *others[5:], 1.0, *cache)

    return Case(
        "decode_attention", f"batch {batch}, {context}", f"q ({batch}, 1, {heads}, {head_dim}), {kv_heads} heads cached",
        make, ours, reference, {"eager": plain(reference)}, tiny_launches=batch == 1,
    )  # fmt: skip


def silu_case(tokens: int, width: int, tiny_launches: bool = False) -> Case:
    return Case(
        "silu_and_mul", f"{tokens}x{width}", f"x ({tokens}, {2 * width})",
        _randn(tokens, 2 * width), silu_and_mul, silu_and_mul_ref,
        {"eager": plain(silu_and_mul_ref), "Liger-Kernel": liger("liger_swiglu", lambda x: x.chunk(2, dim=-1))},
        {"torch.compile": compiled(silu_and_mul_ref)}, tiny_launches=tiny_launches,
    )  # fmt: skip


def linear_case(
    name: str, rows: int, sizes: tuple[int, ...], width: int, norm: bool = False, residual: bool = False, gated: bool = False
) -> Case:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        tensors = [torch.randn(rows, width), *(torch.randn(n, width) / width**0.5 for n in sizes)]
        tensors += [torch.randn(width)] * norm + [torch.randn(rows, sizes[0])] * residual
        return tuple(tensor.to(device, dtype) for tensor in tensors)

    def by(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
        def run(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            weights, rest = rest[: len(sizes)], rest[len(sizes) :]
            last = {"norm_weight": rest[0]} if norm else {"residual": rest[0]} if residual else {}
            return function(x, weights, [None] * len(sizes), **last, gated=gated)

        return run

    return Case(
        "fused_linear", f"{name}, {rows} row{'s' * (rows > 1)}", f"x ({rows}, {width}), weights {sizes}",
        make, by(fused_linear), by(fused_linear_ref),
        {"eager": plain(by(fused_linear_ref))}, {"torch.compile": compiled(by(fused_linear_ref))},
    )  # fmt: skip


def linear_cases(config: str, rows: int, n: Callable[[int, int], int]) -> list[Case]:
    """The products of a text layer in a decode step."""
    text = TEXT[config]
    width, inner = n(text.hidden_size, 40), n(text.intermediate_size, 56)
    heads, kv_heads = n(text.num_attention_heads * text.head_dim, 64), n(text.num_key_value_heads * text.head_dim, 16)
    return [
        linear_case(f"{config} norm + qkv", rows, (heads, kv_heads, kv_heads), width, norm=True),
        linear_case(f"{config} o + residual", rows, (width,), heads, residual=True),
        linear_case(f"{config} norm + gate, up + SwiGLU", rows, (inner, inner), width, norm=True, gated=True),
        linear_case(f"{config} down + residual", rows, (width,), inner, residual=True),
    ]


def gelu_case(rows: int, width: int, bias: bool) -> Case:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        x = torch.randn(rows, width, device=device).to(dtype)
        return (x, torch.randn(width, device=device).to(dtype)) if bias else (x,)

    return Case(
        "gelu", f"{rows}x{width}{' bias' * bias}", f"x ({rows}, {width})", make, gelu, gelu_ref,
        {"eager": plain(gelu_ref)}, {"torch.compile": compiled(gelu_ref)},
    )  # fmt: skip


@dataclass(frozen=True)
class Bounds:
    """Running sums of lengths that are on the host already: a reference that asks for them waits for no device."""

    lengths: tuple[int, ...]

    def tolist(self) -> list[int]:
        sums = [0]
        for length in self.lengths:
            sums.append(sums[-1] + length)
        return sums


def batched(x: torch.Tensor, count: int) -> torch.Tensor:
    """(count * length, heads, head_dim) -> (count, heads, length, head_dim), a view."""
    return x.unflatten(0, (count, -1)).transpose(1, 2)


def sdpa(backend: SDPBackend, lengths: tuple[int, ...], causal: bool) -> Provider:
    """torch's attention by one of its backends: equal lengths as a batch, others one call each."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, **grouped)
        return out.transpose(1, 2).flatten(0, 1)

    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> Callable[[], torch.Tensor]:
        if len(set(lengths)) == 1:
            parts = [tuple(batched(x, len(lengths)) for x in (q, k, v))]
        else:
            split = (x.split(lengths) for x in (q, k, v))
            parts = [tuple(batched(x, 1) for x in part) for part in zip(*split, strict=True)]

        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                return attend(*parts[0]) if len(parts) == 1 else torch.cat([attend(*part) for part in parts])

        return call

    return prepare


def torch_varlen(lengths: tuple[int, ...], causal: bool) -> Provider:
    """`torch.nn.attention.varlen.varlen_attn`, whose arguments change between releases."""

    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, *_: Any) -> Callable[[], torch.Tensor]:
        function = library("torch.nn.attention.varlen", "varlen_attn")
        known = inspect.signature(function).parameters
        options: dict[str, Any] = {}
        if causal:
            options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
        if q.shape[1] != k.shape[1] and "enable_gqa" in known:
            options["enable_gqa"] = True
        longest = max(lengths)
        return lambda: function(q, k, v, bounds, bounds, longest, longest, **options)

    return prepare


def flash_attn_varlen(lengths: tuple[int, ...], causal: bool) -> Provider:
    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, *_: Any) -> Callable[[], torch.Tensor]:
        function, longest = library("flash_attn", "flash_attn_varlen_func"), max(lengths)
        return lambda: function(q, k, v, bounds, bounds, longest, longest, causal=causal)

    return prepare


def flex(
    visible: Callable[..., torch.Tensor] | None, to_batch: Callable[[torch.Tensor], torch.Tensor], lengths: tuple[int, ...]
) -> Provider:
    """FlexAttention, compiled on a GPU. `visible(batch, head, row, column, segments)` is its mask; None sees everything."""

    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> Callable[[], torch.Tensor]:
        attend = library("torch.nn.attention.flex_attention", "flex_attention")
        make_mask = library("torch.nn.attention.flex_attention", "create_block_mask")
        q, k, v = (to_batch(x) for x in (q, k, v))
        mask = None
        if visible is not None:
            segments = torch.repeat_interleave(torch.tensor(lengths)).to(q.device)

            def mask_mod(batch, head, row, column) -> torch.Tensor:
                return visible(row, column, segments)

            mask = make_mask(mask_mod, None, None, q.shape[2], k.shape[2], device=q.device)
        if q.is_cuda:
            torch._dynamo.reset()
            attend = torch.compile(attend, dynamic=False, fullgraph=True)
        grouped = q.shape[1] != k.shape[1]
        return lambda: attend(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2).flatten(0, 1)

    return prepare


def attention_case(name: str, lengths: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, causal: bool) -> Case:
    """A pack of segments; queries and keys as the rotary kernels leave them, values still inside the packed projection."""
    total, longest, host = sum(lengths), max(lengths), Bounds(lengths)

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        packed = torch.randn(total, heads + 2 * kv_heads, head_dim, device=device).to(dtype)
        q, k, v = packed.split([heads, kv_heads, kv_heads], dim=1)
        return q.contiguous(), k.contiguous(), v, torch.tensor(host.tolist(), dtype=torch.int32, device=device)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        return flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, causal=causal)

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        """By KV heads: the scores of all heads of a long sequence would not fit in float64."""
        parts = (x.chunk(kv_heads, dim=1) for x in (q, k, v))
        return torch.cat([flash_attn_varlen_ref(*part, host, host, causal=causal) for part in zip(*parts, strict=True)], dim=1)

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return flash_attn_varlen_ref(q, k, v, host, host, causal=causal)

    def visible(row: torch.Tensor, column: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        inside = segments[row] == segments[column]
        return inside & (row >= column) if causal else inside

    return Case(
        "flash_attn_varlen_func", name,
        f"{' + '.join(map(str, lengths))} rows, {heads}/{kv_heads} heads of {head_dim}{', causal' * causal}",
        make, ours, reference,
        {
            "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION, lengths, causal),
            "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION, lengths, causal),
            "SDPA efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION, lengths, causal),
            "torch varlen_attn": torch_varlen(lengths, causal),
            "flash-attn": flash_attn_varlen(lengths, causal),
            "SDPA math": sdpa(SDPBackend.MATH, lengths, causal),
            "eager": plain(eager),
        },
        {
            "FlexAttention": flex(visible if causal or len(lengths) > 1 else None, lambda x: batched(x, 1), lengths),
            "torch.compile": compiled(eager),
        },
        # Half of the products where causal, as flash-attention counts.
        flops=sum(4 * n * n * heads * head_dim for n in lengths) // (2 if causal else 1),
    )  # fmt: skip


def decode_case(batch: int, context: int) -> Case:
    """One new token per prompt over full caches."""
    heads, kv_heads, head_dim = text_heads()
    scale = head_dim**-0.5

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        q = torch.randn(batch, 1, heads, head_dim, device=device).to(dtype)
        caches = torch.empty(2, batch, context, kv_heads, head_dim, device=device, dtype=dtype).normal_()
        lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
        return q, *caches, lengths, torch.zeros_like(lengths)

    def ours(q, k_cache, v_cache, lengths, pads) -> torch.Tensor:
        return flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, cache_leftpad=pads, causal=True)

    def eager(*inputs: torch.Tensor) -> torch.Tensor:
        return flash_attn_with_kvcache_ref(*inputs, scale, True)

    def reference(*inputs: torch.Tensor) -> torch.Tensor:
        """By prompts: repeated caches in float64 are sixteen times the caches."""
        return torch.cat([eager(*(x[row : row + 1] for x in inputs)) for row in range(batch)])

    def torch_attention(backend: SDPBackend) -> Provider:
        def prepare(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *_: Any) -> Callable[[], torch.Tensor]:
            q, k, v = (x.transpose(1, 2) for x in (q, k_cache, v_cache))

            def call() -> torch.Tensor:
                with sdpa_kernel(backend):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

            return call

        return prepare

    def flash_attn(q, k_cache, v_cache, lengths, _) -> Callable[[], torch.Tensor]:
        function = library("flash_attn", "flash_attn_with_kvcache")
        return lambda: function(q, k_cache, v_cache, cache_seqlens=lengths, causal=True)

    def flex_decoding(*inputs: torch.Tensor) -> Callable[[], torch.Tensor]:
        call = flex(None, lambda x: x.transpose(1, 2), ())(*inputs)
        return lambda: call().unflatten(0, (batch, 1))

    return Case(
        "flash_attn_with_kvcache", f"batch {batch}, {context}",
        f"q ({batch}, 1, {heads}, {head_dim}), caches ({batch}, {context}, {kv_heads}, {head_dim})",
        make, ours, reference,
        {
            "SDPA flash": torch_attention(SDPBackend.FLASH_ATTENTION),
            "SDPA cuDNN": torch_attention(SDPBackend.CUDNN_ATTENTION),
            "SDPA efficient": torch_attention(SDPBackend.EFFICIENT_ATTENTION),
            "flash-attn": flash_attn,
            "SDPA math": torch_attention(SDPBackend.MATH),
            "eager": plain(eager),
        },
        {"FlexAttention": flex_decoding, "torch.compile": compiled(eager)},
        tiny_launches=context <= 8192 and batch == 1,
    )  # fmt: skip


def cases(tiny: bool = False) -> list[Case]:
    """The table, most telling first; with `tiny` the same cases, under the same names, at sizes for a CPU."""
    table = _table(tiny)
    return [replace(case, name=full.name) for case, full in zip(table, _table(False), strict=True)] if tiny else table


def _table(tiny: bool) -> list[Case]:
    def n(full: int, small: int) -> int:
        return small if tiny else full

    small, large = TEXT["4b"], TEXT["8b"]

    def decode(batch: int, context: int) -> Case:
        return decode_case(n(batch, min(batch, 2)), n(context, context // 1024 + 4))

    def vision(name: str, *lengths: int) -> Case:
        return attention_case(
            f"vision {name}", tuple(n(x, x // 200 + 5) for x in lengths), n(16, 2), n(16, 2), n(64, 16), False
        )

    def text(name: str, *lengths: int) -> Case:
        lengths = tuple(n(x, x // 500 + 6) for x in lengths)
        return attention_case(f"causal {name}", lengths, n(32, 4), n(8, 2), n(128, 32), True)

    return [
        vision("6401", 6401),
        vision("1601", 1601),
        vision("4x1601", 1601, 1601, 1601, 1601),
        vision("12545", 12545),
        vision("mixed", 577, 1601, 6401),
        text("1024", 1024),
        text("4096", 4096),
        text("16384", 16384),
        text("4x1024", 1024, 1024, 1024, 1024),
        *(decode(batch, context) for batch in (1, 16) for context in (1024, 8192, 32768)),
        rms_norm_case(n(4096, 6), n(4096, 48), residual=False),
        rms_norm_case(n(4096, 6), n(4096, 48), residual=True),
        vision_rope_case(n(6401, 17), n(16, 2), n(64, 16)),
        qk_norm_rope_case(n(1664, 5), 0),
        silu_case(n(1664, 5), n(small.intermediate_size, 40)),
        silu_case(n(1664, 5), n(large.intermediate_size, 48)),
        layer_norm_case(n(6401, 7), n(1024, 40), residual=True),
        layer_norm_case(n(6401, 7), n(1024, 40), residual=False),
        patch_merge_case(n(6400, 16), n(1024, 40)),
        gelu_case(n(6401, 7), n(4096, 40), bias=False),
        gelu_case(n(6401, 7), n(4096, 40), bias=True),
        *(
            decode_attention_case(batch, n(context, 70), n(32, 4), n(8, 2), n(128, 32))
            for batch, context in ((1, 1024), (1, 8192), (16, 1024))
        ),
        *(case for config in TEXT for rows in (1, 16) for case in linear_cases(config, rows, n)),
        rms_norm_case(1, n(small.hidden_size, 40), residual=False, tiny_launches=True),
        rms_norm_case(1, n(large.hidden_size, 48), residual=False, tiny_launches=True),
        rms_norm_case(1, n(small.hidden_size, 40), residual=True, tiny_launches=True),
        rms_norm_case(1, n(large.hidden_size, 48), residual=True, tiny_launches=True),
        qk_norm_rope_case(1, n(8191, 7), tiny_launches=True),
        silu_case(1, n(small.intermediate_size, 40), tiny_launches=True),
        silu_case(1, n(large.intermediate_size, 48), tiny_launches=True),
    ]  # fmt: skip
