"""Attention of one new token per prompt, from its projections on: head norms, rotary embedding, cache update, attention.

    q, k            as `qk_norm_rope` gives them
    k_cache[n - 1], v_cache[n - 1] = k, v           n = cache_seqlens, the new token included
    out             as `flash_attn_with_kvcache`

One launch in the place of two: every program of split-KV attention normalizes and rotates its own queries, and the one with the
last split the new key as well. It stores key and value, and begins its running softmax with them instead of reading them back:
no program reads what another one writes.

    q               (B, 1, heads, head_dim)                 any strides with a contiguous last dimension
    k, v            (B, 1, kv_heads, head_dim)              views of a packed qkv, for example
    position_ids    (1, B) or (B, 1) integers
    k_cache, v_cache (B, capacity, kv_heads, head_dim)      written at one row per prompt
    cache_seqlens, cache_leftpad    (B,) int32
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._dispatch import INTERPRETED, LAUNCH_OPTIONS, Backend, choose_backend, launching
from ._registry import Cost, empty_as, nbytes, operator
from .flash_attn import MAX_HEAD_DIM, _attend, scale_of
from .flash_decode import Plan, _split_range, _store_partial, flash_decode_torch
from .flash_decode import _cost as flash_decode_cost
from .qk_norm_rope import norm_and_rotate, rope_tables


@triton.jit
def _norm_rotate(x_ptr, offsets, weight_ptr, dims, mask, cos, sin, eps, HEAD_DIM: tl.constexpr):
    """Heads at `offsets`, with the roundings of `qk_norm_rope`: each element beside its partner half a head away, whose sign
    `sin` carries."""
    dtype = x_ptr.dtype.element_ty
    partners = (dims + HEAD_DIM // 2) % HEAD_DIM
    x = tl.load(x_ptr + offsets + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(x_ptr + offsets + partners[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)[None, :]
    partner_weight = tl.load(weight_ptr + partners).to(tl.float32)[None, :]
    inverse = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / HEAD_DIM + tl.cast(eps, tl.float32))
    x = ((x * inverse).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
    partner = ((partner * inverse).to(dtype).to(tl.float32) * partner_weight).to(dtype).to(tl.float32)
    return (x * cos[None, :] + partner * sin[None, :]).to(dtype)


@triton.jit(do_not_specialize=["n_splits"], do_not_specialize_on_alignment=["position_ptr", "seqlens_ptr", "leftpad_ptr"])
def _decode_kernel(
    q_ptr, new_k_ptr, new_v_ptr, q_weight_ptr, k_weight_ptr, position_ptr, inv_freq_ptr,
    k_ptr, v_ptr, out_ptr, lse_ptr, seqlens_ptr, leftpad_ptr,
    stride_qb, stride_qh, stride_nkb, stride_nkh, stride_nvb, stride_nvh,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_os, stride_ls, capacity, n_splits, eps, scaling, softmax_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    rows = tl.arange(0, BLOCK_M)
    in_rows = rows < GROUP
    head = kv_head * GROUP + rows
    mask = in_rows[:, None] & (dims < HEAD_DIM)[None, :]

    position = tl.load(position_ptr + batch).to(tl.float32)
    angle = position * tl.load(inv_freq_ptr + dims % (HEAD_DIM // 2))
    cos = tl.cos(angle) * tl.cast(scaling, tl.float32)
    sin = tl.sin(angle) * tl.cast(scaling, tl.float32) * tl.where(dims < HEAD_DIM // 2, -1.0, 1.0)
    q_offsets = batch * stride_qb + head[:, None] * stride_qh
    q = _norm_rotate(q_ptr, q_offsets, q_weight_ptr, dims, mask, cos, sin, eps, HEAD_DIM)
    if UPCAST:
        q = q.to(tl.float32)
    # Some compilers pass Python floats as float64. The factor is log2(e).
    scale = tl.cast(softmax_scale, tl.float32) * 1.4426950408889634
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh

    seqlen = tl.load(seqlens_ptr + batch)
    start, end = _split_range(seqlen - 1, leftpad_ptr, batch, split, n_splits, capacity, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    running_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    running_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    last = (seqlen - 1).to(tl.int64)
    if (split == n_splits - 1) & (last >= 0) & (last < capacity):
        new_mask = (dims < HEAD_DIM)[None, :]
        new_offsets = tl.zeros((1, 1), dtype=tl.int64) + batch * stride_nkb + kv_head * stride_nkh
        k = _norm_rotate(new_k_ptr, new_offsets, k_weight_ptr, dims, new_mask, cos, sin, eps, HEAD_DIM)
        v = tl.load(new_v_ptr + batch * stride_nvb + kv_head * stride_nvh + dims[None, :], mask=new_mask, other=0.0)
        tl.store(k_ptr + last * stride_ks + dims[None, :], k, mask=new_mask)
        tl.store(v_ptr + last * stride_vs + dims[None, :], v, mask=new_mask)
        running_max = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1) * scale
        running_sum += 1.0
        acc += v.to(tl.float32)

    full_end = start + tl.maximum(end - start, 0) // BLOCK_N * BLOCK_N
    acc, running_sum, running_max = _attend(
        acc, running_sum, running_max, q, k_ptr, v_ptr, stride_ks, stride_vs, start, full_end, end, end, rows, scale,
        HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL=False, MASKED=False, UPCAST=UPCAST,
    )  # fmt: skip
    acc, running_sum, running_max = _attend(
        acc, running_sum, running_max, q, k_ptr, v_ptr, stride_ks, stride_vs, full_end, end, end, end, rows, scale,
        HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL=False, MASKED=True, UPCAST=UPCAST,
    )  # fmt: skip
    row = batch * HEADS + head
    _store_partial(
        acc, running_sum, running_max, out_ptr, lse_ptr, split, row, dims, mask, in_rows, stride_os, stride_ls, HEAD_DIM
    )


def _cost(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float,
    position_ids: torch.Tensor, inv_freq: torch.Tensor, scaling: float, *cache: Any,
) -> Cost:  # fmt: skip
    attention = flash_decode_cost(q, *cache[:5], True, cache[5])
    new = nbytes(k, v)  # written into the cache, not read from there
    return Cost(
        attention.launches, attention.read + nbytes(q_weight, k_weight, position_ids, inv_freq), attention.written + new
    )


@operator(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight, float eps, Tensor position_ids, "
    "Tensor inv_freq, float scaling, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor cache_leftpad, "
    "float softmax_scale, int num_splits) -> Tensor",
    fake=lambda q, *_: empty_as(q),
    cost=_cost,
)
def _decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    scaling: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor,
    softmax_scale: float,
    num_splits: int,
) -> torch.Tensor:
    batch, _, heads, head_dim = q.shape
    capacity, kv_heads = k_cache.shape[1:3]
    out = empty_as(q)
    if out.numel() == 0:
        return out
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    plan = Plan.choose(q, k_cache, num_splits)
    partial, lse = plan.buffers(out)
    with launching("decode_attention", q):
        _decode_kernel[(plan.splits, kv_heads, batch)](
            q, k, v, q_weight.contiguous(), k_weight.contiguous(), position_ids.contiguous(), inv_freq.contiguous(),
            k_cache, v_cache, partial, lse, cache_seqlens.contiguous(), cache_leftpad.contiguous(),
            q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), v.stride(2),
            *k_cache.stride()[:3], *v_cache.stride()[:3], out.numel(), lse.shape[1], capacity, plan.splits,
            eps, scaling, softmax_scale,
            HEADS=heads, GROUP=heads // kv_heads, HEAD_DIM=head_dim, BLOCK_D=plan.block_d, BLOCK_M=plan.block_m,
            BLOCK_N=plan.block_n, UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
            num_warps=plan.num_warps, num_stages=plan.num_stages, **LAUNCH_OPTIONS,
        )  # fmt: skip
        plan.combine(partial, lse, out)
    return out


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None = None,
    *,
    attention_scaling: float = 1.0,
    softmax_scale: float | None = None,
    num_splits: int = 0,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Attention of one new token per prompt over a cache, which it is appended to.

    Args:
        q: (B, 1, heads, head_dim) in float16, bfloat16 or float32, head_dim even and up to 256.
        k, v: (B, 1, kv_heads, head_dim), heads a multiple of kv_heads, up to 128 times.
        q_weight, k_weight: (head_dim,) of the per-head norms.
        eps: added to the mean squares.
        position_ids: (1, B) or (B, 1) integers.
        inv_freq: (head_dim / 2,) float32.
        k_cache, v_cache: (B, capacity, kv_heads, head_dim); row cache_seqlens - 1 of each prompt is written.
        cache_seqlens: (B,) int32 on the device: tokens in the cache, the new one included.
        cache_leftpad: (B,) int32 on the device: the first token that counts. By default 0.
        attention_scaling: factor on cos and sin.
        softmax_scale: positive; by default 1 / sqrt(head_dim).
        num_splits: splits of the cache; 0 chooses by the device and the capacity.
        backend: see `_dispatch`.

    Returns:
        (B, 1, heads, head_dim) in the dtype of `q`.

    Raises:
        ValueError: shapes that do not fit, or tensors on different devices.
        TypeError: an unsupported dtype, or dtypes that differ.
    """
    if cache_leftpad is None:
        cache_leftpad = torch.zeros_like(cache_seqlens)
    _check(q, k, v, q_weight, k_weight, position_ids, inv_freq, k_cache, v_cache, cache_seqlens, cache_leftpad)
    arguments = (
        q, k, v, q_weight, k_weight, eps, position_ids, inv_freq, attention_scaling, k_cache, v_cache, cache_seqlens,
        cache_leftpad, scale_of("decode_attention", softmax_scale, q), num_splits,
    )  # fmt: skip
    if choose_backend("decode_attention", backend, q, k, v, q_weight, k_weight, inv_freq, k_cache, v_cache) == "torch":
        return decode_attention_ref(*arguments)
    return torch.ops.llava15.decode_attention(*arguments)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: torch.Tensor) -> None:
    op, (q_weight, k_weight, position_ids, inv_freq, k_cache, v_cache, seqlens, leftpad) = "decode_attention", others
    if q.ndim != 4 or k.ndim != 4 or q.shape[1] != 1 or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{op}: q {tuple(q.shape)}, k {tuple(k.shape)}, expected (B, 1, heads, head_dim) and (B, 1, kv_heads, head_dim), "
            "heads a multiple of kv_heads"
        )
    batch, _, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    if head_dim % 2 or not 0 < head_dim <= MAX_HEAD_DIM or heads // kv_heads > 128:
        raise ValueError(
            f"{op}: head_dim {head_dim} and {heads // kv_heads} heads per KV head, expected an even number up to "
            f"{MAX_HEAD_DIM} and at most 128"
        )
    cache = (batch, k_cache.shape[1] if k_cache.ndim > 1 else 0, kv_heads, head_dim)
    for name, tensor, shape in (
        ("k", k, (batch, 1, kv_heads, head_dim)), ("v", v, k.shape), ("q_weight", q_weight, (head_dim,)),
        ("k_weight", k_weight, (head_dim,)), ("inv_freq", inv_freq, (head_dim // 2,)), ("k_cache", k_cache, cache),
        ("v_cache", v_cache, cache), ("cache_seqlens", seqlens, (batch,)), ("cache_leftpad", leftpad, (batch,)),
    ):  # fmt: skip
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    for name, tensor in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}, expected {q.dtype} like q")
    if k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
        raise ValueError(f"{op}: the caches need a contiguous last dimension")
    if position_ids.shape not in ((1, batch), (batch, 1)) or position_ids.is_floating_point():
        raise ValueError(f"{op}: position_ids is {position_ids.dtype} {tuple(position_ids.shape)}, expected {batch} integers")
    for name, tensor in (("position_ids", position_ids), ("cache_seqlens", seqlens), ("cache_leftpad", leftpad)):
        if tensor.device != q.device or (tensor.dtype != torch.int32 and name != "position_ids"):
            raise ValueError(f"{op}: {name} is {tensor.dtype} on {tensor.device}, expected int32 on {q.device}")


def decode_attention_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    scaling: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor,
    softmax_scale: float,
    num_splits: int = 0,
) -> torch.Tensor:
    """The eager reference, step by step. Writes the caches; with float64 inputs it computes in float64."""
    tables = rope_tables(position_ids.reshape(-1, 1), inv_freq, scaling)
    q, k = norm_and_rotate(q, k, q_weight, k_weight, eps, *tables)
    prompts, last = torch.arange(len(q), device=q.device), cache_seqlens.long() - 1
    inside = (last >= 0) & (last < k_cache.shape[1])
    k_cache[prompts[inside], last[inside]] = k[inside, 0].to(k_cache.dtype)
    v_cache[prompts[inside], last[inside]] = v[inside, 0].to(v_cache.dtype)
    return flash_decode_torch(q, k_cache, v_cache, cache_seqlens, cache_leftpad, softmax_scale, True, num_splits)
