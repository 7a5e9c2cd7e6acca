"""Attention of a few new queries over a filled cache, split over the cache so that one prompt fills the device.

The cache of each prompt, from its left padding to its length, is cut into n_splits splits. Each program takes one split, one KV
head and all its query heads together (they share the loads), and leaves a normalised partial result with its base-2
log-sum-exp:

    O_i = softmax over split i,   L_i = log2(sum over split i of 2^score)
    O   = sum_i 2^(L_i - L) O_i,   L = log2(sum_i 2^L_i)

Lengths are read on the device and cut there, so that a CUDA graph stays right while they grow; the grid depends on the capacity
alone. Dao et al., https://pytorch.org/blog/flash-decoding.

    q                   (B, L, heads, head_dim)
    k_cache, v_cache    (B, capacity, kv_heads, head_dim)   any strides with a contiguous last dimension
    cache_seqlens       (B,) int32    tokens in the cache, the L new ones included
    cache_leftpad       (B,) int32    the first of them that counts
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import is_fake

from ._dispatch import (
    INTERPRETED,
    LAUNCH_OPTIONS,
    Backend,
    architecture,
    cdiv,
    choose_backend,
    launching,
    multiprocessors,
    next_power_of_2,
)
from ._registry import Cost, empty_as, nbytes, operator
from .flash_attn import MAX_HEAD_DIM, _attend, refuse_options, scale_of


def max_rows(head_dim: int, dtype: torch.dtype) -> int:
    """Queries times the query heads of a KV head: all of them are one tile, which has to fit into the shared memory."""
    return 32 if dtype == torch.float32 and head_dim > 128 else 128


@triton.jit
def _split_range(length, leftpad_ptr, batch, split, n_splits, capacity, BLOCK_N: tl.constexpr):
    """(start, end) of a split of a prompt's cache. Out-of-range lengths never lead outside the cache."""
    length = tl.minimum(length, capacity)
    first = tl.maximum(tl.load(leftpad_ptr + batch), 0)
    split_size = tl.cdiv(tl.cdiv(tl.maximum(length - first, 0), n_splits), BLOCK_N) * BLOCK_N
    start = first + split * split_size
    return start, tl.minimum(start + split_size, length)


@triton.jit
def _store_partial(
    acc,
    running_sum,
    running_max,
    out_ptr,
    lse_ptr,
    split,
    row,
    dims,
    mask,
    in_rows,
    stride_os,
    stride_ls,
    HEAD_DIM: tl.constexpr,
):
    """O_i and L_i of a split, at `row` of the partial results."""
    divisor = tl.where(running_sum == 0.0, 1.0, running_sum)
    out = acc / divisor[:, None]
    out_pointers = out_ptr + split.to(tl.int64) * stride_os + row[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out_pointers, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + split.to(tl.int64) * stride_ls + row, running_max + tl.log2(divisor), mask=in_rows)


@triton.jit(do_not_specialize=["n_queries", "n_splits"], do_not_specialize_on_alignment=["seqlens_ptr", "leftpad_ptr"])
def _split_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, seqlens_ptr, leftpad_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_os, stride_ls, n_queries, capacity, n_splits, softmax_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)

    length = tl.minimum(tl.load(seqlens_ptr + batch), capacity)
    start, end = _split_range(length, leftpad_ptr, batch, split, n_splits, capacity, BLOCK_N)

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    query = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    in_rows = query < n_queries
    mask = in_rows[:, None] & (dims < HEAD_DIM)[None, :]
    q_pointers = q_ptr + batch * stride_qb + query[:, None] * stride_ql + head[:, None] * stride_qh + dims[None, :]
    q = tl.load(q_pointers, mask=mask, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    # Some compilers pass Python floats as float64. The factor is log2(e).
    scale = tl.cast(softmax_scale, tl.float32) * 1.4426950408889634
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh

    diagonal = length - n_queries
    by_all = end - start
    if CAUSAL:
        by_all = tl.minimum(end, diagonal + 1) - start
    full_end = start + tl.maximum(by_all, 0) // BLOCK_N * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    running_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    running_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    acc, running_sum, running_max = _attend(
        acc, running_sum, running_max, q, k_ptr, v_ptr, stride_ks, stride_vs, start, full_end, end, diagonal, query, scale,
        HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL=CAUSAL, MASKED=False, UPCAST=UPCAST,
    )  # fmt: skip
    acc, running_sum, running_max = _attend(
        acc, running_sum, running_max, q, k_ptr, v_ptr, stride_ks, stride_vs, full_end, end, end, diagonal, query, scale,
        HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL=CAUSAL, MASKED=True, UPCAST=UPCAST,
    )  # fmt: skip

    row = (batch * n_queries + query) * HEADS + head
    _store_partial(
        acc, running_sum, running_max, out_ptr, lse_ptr, split, row, dims, mask, in_rows, stride_os, stride_ls, HEAD_DIM
    )


@triton.jit(do_not_specialize=["n_splits"])
def _combine_kernel(
    partial_ptr, lse_ptr, out_ptr, stride_ps, stride_ls, n_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, BLOCK_SPLITS)
    dims = tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + splits.to(tl.int64) * stride_ls + row, mask=splits < n_splits, other=float("-inf"))
    largest = tl.max(lse, axis=0)
    # A row that saw no key has nothing but -inf; 0 in its place avoids (-inf) - (-inf), and its output is 0.
    weights = tl.exp2(lse - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(weights, axis=0)
    mask = (splits < n_splits)[:, None] & (dims < HEAD_DIM)[None, :]
    pointers = partial_ptr + splits.to(tl.int64)[:, None] * stride_ps + row * HEAD_DIM + dims[None, :]
    partial = tl.load(pointers, mask=mask, other=0.0)
    out = tl.sum(partial * weights[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def choose_splits(batch: int, kv_heads: int, capacity: int, block_n: int, processors: int, waves: int = 2) -> int:
    """Splits per prompt: enough programs for every multiprocessor `waves` times over, no split below one tile."""
    wanted = cdiv(waves * processors, batch * kv_heads)
    return max(1, min(wanted, cdiv(capacity, block_n), 128))


@dataclass(frozen=True)
class Plan:
    """Tiles and number of splits of one launch; they depend on shapes, dtype and device, never on lengths."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    splits: int

    @classmethod
    def choose(cls, q: torch.Tensor, k_cache: torch.Tensor, num_splits: int) -> Plan:
        batch, n_queries, heads, head_dim = q.shape
        capacity, kv_heads = k_cache.shape[1:3]
        exact = q.dtype == torch.float32
        block_d = max(16, next_power_of_2(head_dim))
        block_m = max(16, next_power_of_2(n_queries * heads // kv_heads))
        arch = architecture(q.device)
        # Several queries of many or wide heads: with 4 warps they spill, and their tiles outgrow the smaller shared memories.
        large = block_m * block_d > (16 * 128 if exact else 64 * 128)
        amd = arch.startswith("gfx")
        # Exact float32 products use no matrix instruction; larger tiles spill.
        block_n = (32 if block_d <= 64 else 16) if exact else 64 if block_d <= 128 else 32
        if large and not exact and (amd or block_d > 128):
            block_n //= 2
        splits = num_splits or choose_splits(batch, kv_heads, capacity, block_n, multiprocessors(q.device))
        return cls(block_m, block_n, block_d, 8 if large else 4, 1 if exact else 2 if large or amd else 3, splits)

    def buffers(self, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The partial results (splits, rows, head_dim), or `out` itself if there is one split, and their log-sum-exp."""
        rows, head_dim = out.numel() // out.shape[-1], out.shape[-1]
        lse = torch.empty((self.splits, rows), dtype=torch.float32, device=out.device)
        if self.splits == 1:
            return out, lse
        return torch.empty((self.splits, rows, head_dim), dtype=torch.float32, device=out.device), lse

    def combine(self, partial: torch.Tensor, lse: torch.Tensor, out: torch.Tensor) -> None:
        """Launches the combination of the splits into `out`."""
        if self.splits == 1:
            return
        block_splits, rows, head_dim = next_power_of_2(self.splits), lse.shape[1], out.shape[-1]
        _combine_kernel[(rows,)](
            partial, lse, out, rows * head_dim, rows, self.splits,
            HEAD_DIM=head_dim, BLOCK_D=self.block_d, BLOCK_SPLITS=block_splits,
            num_warps=8 if block_splits * self.block_d > 4096 else 4,  # with 4, triton 3.8 spills
            **LAUNCH_OPTIONS,
        )  # fmt: skip


def _cost(q: torch.Tensor, k_cache: torch.Tensor, *others: Any) -> Cost:
    """As if the cache were full: how full it is only the device knows."""
    v_cache, cache_seqlens, cache_leftpad, _, _, num_splits = others
    splits = Plan.choose(q, k_cache, num_splits).splits
    lse = 4 * splits * (q.numel() // q.shape[-1])
    partial = 4 * splits * q.numel() if splits > 1 else 0
    read = nbytes(q, k_cache, v_cache, cache_seqlens, cache_leftpad)
    return Cost(1 + (splits > 1), read + partial + (lse if splits > 1 else 0), nbytes(q) + partial + lse)


@operator(
    "flash_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor cache_leftpad, float softmax_scale, "
    "bool causal, int num_splits) -> Tensor",
    fake=lambda q, *_: empty_as(q),
    cost=_cost,
)
def _flash_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    num_splits: int,
) -> torch.Tensor:
    batch, n_queries, heads, head_dim = q.shape
    capacity, kv_heads = k_cache.shape[1:3]
    out = empty_as(q)
    if out.numel() == 0:
        return out
    q = q if q.stride(-1) == 1 else q.contiguous()
    cache_seqlens, cache_leftpad = cache_seqlens.contiguous(), cache_leftpad.contiguous()
    plan = Plan.choose(q, k_cache, num_splits)
    partial, lse = plan.buffers(out)
    with launching("flash_attn_with_kvcache", q):
        _split_kernel[(plan.splits, kv_heads, batch)](
            q, k_cache, v_cache, partial, lse, cache_seqlens, cache_leftpad,
            *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
            out.numel(), lse.shape[1], n_queries, capacity, plan.splits, softmax_scale,
            HEADS=heads, GROUP=heads // kv_heads, HEAD_DIM=head_dim, BLOCK_D=plan.block_d, BLOCK_M=plan.block_m,
            BLOCK_N=plan.block_n, CAUSAL=causal,
            UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
            num_warps=plan.num_warps, num_stages=plan.num_stages, **LAUNCH_OPTIONS,
        )  # fmt: skip
        plan.combine(partial, lse, out)
    return out


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | int | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Attention over a cache, with flash-attn's signature. New keys and values are in the cache already (`qk_norm_rope`).

    Args:
        q: (B, L, heads, head_dim), float16, bfloat16 or float32, head_dim up to 256; L * heads / kv_heads up to
            128, or 32 in float32 with a head_dim above 128.
        k_cache, v_cache: (B, capacity, kv_heads, head_dim), heads a multiple of kv_heads.
        cache_seqlens: (B,) int32 on the device, or a number: tokens of the cache that count. By default all.
        cache_leftpad: (B,) int32 on the device: the first token that counts. By default 0.
        softmax_scale: positive; by default 1 / sqrt(head_dim).
        causal: aligned to the last query and key.
        num_splits: splits of the cache; 0 chooses by the device and the capacity.
        rotary_interleaved: without meaning here.
        backend: see `_dispatch`.

    Returns:
        (B, L, heads, head_dim) in the dtype of `q`; 0 for a query that sees no key.

    Raises:
        NotImplementedError: appending, rotary, paging, a window, softcap, alibi or the log-sum-exp is asked for.
        ValueError: shapes that do not fit, or tensors on different devices.
        TypeError: an unsupported dtype.
    """
    refuse_options(
        "flash_attn_with_kvcache", k=k, v=v, rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_batch_idx=cache_batch_idx,
        block_table=block_table, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        return_softmax_lse=return_softmax_lse,
    )  # fmt: skip
    batch, capacity = _check(q, k_cache, v_cache)
    if num_splits < 0:
        raise ValueError(f"flash_attn_with_kvcache: num_splits {num_splits}, expected 0 (chosen here) or more")
    if cache_seqlens is None:
        cache_seqlens = capacity
    if isinstance(cache_seqlens, int):
        if not 0 <= cache_seqlens <= capacity:
            raise ValueError(f"flash_attn_with_kvcache: cache_seqlens {cache_seqlens}, expected 0 to the capacity {capacity}")
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    if cache_leftpad is None:
        cache_leftpad = torch.zeros(batch, dtype=torch.int32, device=q.device)
    for name, tensor in (("cache_seqlens", cache_seqlens), ("cache_leftpad", cache_leftpad)):
        if tensor.shape != (batch,) or tensor.dtype != torch.int32 or tensor.device != q.device:
            raise ValueError(
                f"flash_attn_with_kvcache: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected int32 "
                f"({batch},) on {q.device}"
            )
    softmax_scale = scale_of("flash_attn_with_kvcache", softmax_scale, q)
    torch_backend = choose_backend("flash_attn_with_kvcache", backend, q, k_cache, v_cache) == "torch"
    run = flash_decode_torch if torch_backend else torch.ops.llava15.flash_decode
    return run(q, k_cache, v_cache, cache_seqlens, cache_leftpad, softmax_scale, causal, num_splits)


def _check(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> tuple[int, int]:
    op = "flash_attn_with_kvcache"
    if (
        q.ndim != 4
        or k_cache.ndim != 4
        or k_cache.shape != v_cache.shape
        or q.shape[0] != k_cache.shape[0]
        or q.shape[-1] != k_cache.shape[-1]
        or k_cache.shape[2] == 0
        or q.shape[2] % k_cache.shape[2]
    ):
        raise ValueError(
            f"{op}: q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}, expected (B, L, heads, "
            "head_dim) and twice (B, capacity, kv_heads, head_dim), heads a multiple of kv_heads"
        )
    batch, length, heads, head_dim = q.shape
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head_dim {head_dim} is not supported, expected 1 to {MAX_HEAD_DIM}")
    if (rows := length * heads // k_cache.shape[2]) > (most := max_rows(head_dim, q.dtype)):
        raise ValueError(f"{op}: {length} queries of {rows // length} heads per KV head, expected at most {most} together")
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise TypeError(f"{op}: q, k_cache, v_cache are {q.dtype}, {k_cache.dtype}, {v_cache.dtype}, expected one dtype")
    if k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
        raise ValueError(f"{op}: the caches need a contiguous last dimension")
    return batch, k_cache.shape[1]


def flash_decode_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    num_splits: int = 0,
) -> torch.Tensor:
    """The torch backend: `scaled_dot_product_attention`, the heads of a KV head as further queries of it."""
    length, heads = q.shape[1:3]
    kv_heads = k_cache.shape[2]
    if q.device.type != "cpu" or torch.compiler.is_compiling() or is_fake(q) or q.numel() == 0:
        # The host cannot see the lengths.
        return flash_attn_with_kvcache_ref(q, k_cache, v_cache, cache_seqlens, cache_leftpad, softmax_scale, causal)
    ends, starts = cache_seqlens.tolist(), cache_leftpad.tolist()
    first, last = max(min(starts), 0), min(max(ends), k_cache.shape[1])
    if last - max(starts) < length or min(ends) < last:
        return flash_attn_with_kvcache_ref(q, k_cache, v_cache, cache_seqlens, cache_leftpad, softmax_scale, causal)
    mask = None
    if max(starts) > first or (causal and length > 1):
        slots = torch.arange(first, last)
        mask = (slots >= cache_leftpad[:, None, None]).expand(-1, length, -1)
        if causal:
            mask = mask & (slots <= last - length + torch.arange(length)[:, None])
        mask = mask.repeat_interleave(heads // kv_heads, dim=1)[:, None]
    queries = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    keys, values = (cache[:, first:last].transpose(1, 2) for cache in (k_cache, v_cache))
    if max(starts) > first:
        # What lies before a prompt's start may be anything, and 0 times anything need not be 0.
        nobodys = (torch.arange(first, last) < cache_leftpad[:, None])[:, None, :, None]
        keys, values = keys.masked_fill(nobodys, 0.0), values.masked_fill(nobodys, 0.0)
    out = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=softmax_scale)
    return out.unflatten(2, (length, -1)).permute(0, 2, 1, 3, 4).reshape(q.shape)


def flash_attn_with_kvcache_ref(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor,
    softmax_scale: float,
    causal: bool = False,
) -> torch.Tensor:
    """The eager reference: the formula with a mask, in the dtype of the inputs."""
    group = q.shape[2] // k_cache.shape[2]
    k, v = (x.repeat_interleave(group, dim=2).transpose(1, 2) for x in (k_cache, v_cache))
    slots = torch.arange(k_cache.shape[1], device=q.device)
    last = cache_seqlens[:, None].long() - 1
    if causal:
        last = last - torch.arange(q.shape[1] - 1, -1, -1, device=q.device)
    seen = (slots <= last[..., None]) & (slots >= cache_leftpad[:, None, None])
    scores = (q.transpose(1, 2) @ k.transpose(2, 3) * softmax_scale).masked_fill(~seen[:, None], float("-inf"))
    # A row without a visible key is 0/0 here; its output is 0. What lies outside the counted slots may be anything.
    weights = scores.softmax(-1).nan_to_num(0.0)
    counted = seen.any(1)[:, None, :, None]
    return (weights @ torch.where(counted, v, 0.0)).transpose(1, 2).contiguous()
