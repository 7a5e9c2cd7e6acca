"""The text model's queries and keys in one launch: RMSNorm per head, rotary embedding, keys and values into the cache.

    n = rms_norm(x) per head                                            with the two roundings of `rms_norm`
    angle_i = position * inv_freq_i,  i < half,  half = head_dim / 2    in float32
    y[: half] = (n[: half] * cos(angle) - n[half :] * sin(angle)) * scaling
    y[half :] = (n[half :] * cos(angle) + n[: half] * sin(angle)) * scaling

With a cache, keys and values of token (b, l) go to its row slot_mapping[b, l], as in vLLM's caches: packed prompts and prompts
that grow are the same to the kernel. The rows are read on the device, so that a CUDA graph stays right while they change. A row
outside the cache (-1, for example) is not written.
Su et al., https://arxiv.org/abs/2104.09864; per-head norms as in Qwen3, https://arxiv.org/abs/2505.09388.

    q               (B, L, heads, head_dim)         any strides with a contiguous last dimension, e.g. views of a packed qkv
    k, v            (B, L, kv_heads, head_dim)
    position_ids    (B, L) or (1, L) integers
    inv_freq        (head_dim / 2,) float32
    k_cache, v_cache (slots, kv_heads, head_dim)    e.g. a (B, capacity, kv_heads, head_dim) cache flattened
    slot_mapping    (B, L) integers
"""

from __future__ import annotations

from typing import cast

import torch
import triton
import triton.language as tl

from ._dispatch import LAUNCH_OPTIONS, Backend, cdiv, choose_backend, launching, next_power_of_2, warps_for
from ._registry import Cost, empty_as, nbytes, operator
from .flash_attn import MAX_HEAD_DIM
from .norms import rms_norm_torch


@triton.jit
def _norm_rotate_store(
    x_ptr, weight_ptr, y_ptr, heads, pairs, cos, sin, eps, stride_xh, stride_yh, writable,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    pair_mask = (pairs < HALF)[None, :]
    mask = (heads < HEADS)[:, None] & pair_mask
    x_pointers = x_ptr + heads[:, None] * stride_xh + pairs[None, :]
    first = tl.load(x_pointers, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_pointers + HALF, mask=mask, other=0.0).to(tl.float32)
    weight_pointers = weight_ptr + pairs[None, :]
    first_weight = tl.load(weight_pointers, mask=pair_mask, other=0.0).to(tl.float32)
    second_weight = tl.load(weight_pointers + HALF, mask=pair_mask, other=0.0).to(tl.float32)

    mean_square = tl.sum(first * first + second * second, axis=1, keep_dims=True) / (2 * HALF)
    inverse = tl.rsqrt(mean_square + tl.cast(eps, tl.float32))
    first = ((first * inverse).to(dtype).to(tl.float32) * first_weight).to(dtype).to(tl.float32)
    second = ((second * inverse).to(dtype).to(tl.float32) * second_weight).to(dtype).to(tl.float32)

    y_pointers = y_ptr + heads[:, None] * stride_yh + pairs[None, :]
    tl.store(y_pointers, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=mask & writable[:, None])
    tl.store(y_pointers + HALF, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=mask & writable[:, None])


@triton.jit(do_not_specialize=["length", "slots"], do_not_specialize_on_alignment=["position_ptr", "slot_ptr"])
def _qk_norm_rope_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, position_ptr, inv_freq_ptr, slot_ptr,
    q_out_ptr, k_out_ptr, v_out_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_kot, stride_koh, stride_vot, stride_voh, stride_pb,
    length, slots, eps, scaling,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, HAS_CACHE: tl.constexpr,
):  # fmt: skip
    # int64 before the first multiplication with a stride, and after the division, which is several times as long in it.
    token = tl.program_id(0).to(tl.int64)
    batch = (tl.program_id(0) // length).to(tl.int64)
    position_in_row = (tl.program_id(0) % length).to(tl.int64)
    group = tl.program_id(1)
    Q_GROUPS: tl.constexpr = (Q_HEADS + BLOCK_H - 1) // BLOCK_H
    KV_GROUPS: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    pairs = tl.arange(0, BLOCK_D)

    slot = token
    if HAS_CACHE:
        slot = tl.load(slot_ptr + token).to(tl.int64)
    # One flag per head of the group, so that it combines with the masks as a block.
    target_row = slot + tl.zeros((BLOCK_H,), dtype=tl.int64)
    writable = (target_row >= 0) & (target_row < slots)

    if group < Q_GROUPS + KV_GROUPS:
        position = tl.load(position_ptr + batch * stride_pb + position_in_row).to(tl.float32)
        angle = position * tl.load(inv_freq_ptr + pairs, mask=pairs < HALF, other=0.0)
        cos = (tl.cos(angle) * tl.cast(scaling, tl.float32))[None, :]
        sin = (tl.sin(angle) * tl.cast(scaling, tl.float32))[None, :]
        if group < Q_GROUPS:
            heads = group * BLOCK_H + tl.arange(0, BLOCK_H)
            _norm_rotate_store(
                q_ptr + batch * stride_qb + position_in_row * stride_ql, q_weight_ptr,
                q_out_ptr + token * (Q_HEADS * 2 * HALF), heads, pairs, cos, sin, eps, stride_qh, 2 * HALF, heads >= 0,
                Q_HEADS, HALF,
            )  # fmt: skip
        else:
            heads = (group - Q_GROUPS) * BLOCK_H + tl.arange(0, BLOCK_H)
            _norm_rotate_store(
                k_ptr + batch * stride_kb + position_in_row * stride_kl, k_weight_ptr,
                k_out_ptr + slot * stride_kot, heads, pairs, cos, sin, eps, stride_kh, stride_koh,
                writable, KV_HEADS, HALF,
            )  # fmt: skip
    else:
        heads = (group - Q_GROUPS - KV_GROUPS) * BLOCK_H + tl.arange(0, BLOCK_H)
        dims = tl.arange(0, 2 * BLOCK_D)
        mask = (heads < KV_HEADS)[:, None] & (dims < 2 * HALF)[None, :] & writable[:, None]
        source = v_ptr + batch * stride_vb + position_in_row * stride_vl + heads[:, None] * stride_vh + dims[None, :]
        target = v_out_ptr + slot * stride_vot + heads[:, None] * stride_voh + dims[None, :]
        tl.store(target, tl.load(source, mask=mask, other=0.0).to(v_out_ptr.dtype.element_ty), mask=mask)


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    scaling: float,
    v: torch.Tensor | None,
    k_out: torch.Tensor,
    v_out: torch.Tensor | None,
    slot_mapping: torch.Tensor | None,
) -> torch.Tensor:
    """k_out and v_out are (slots, kv_heads, head_dim)."""
    batch, length, q_heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q_out = empty_as(q)
    if k.numel() == 0:
        return q_out
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    position_ids, inv_freq = position_ids.contiguous(), inv_freq.contiguous()
    slot_mapping = position_ids if slot_mapping is None else slot_mapping.contiguous()
    has_cache = v is not None
    v = k if v is None else v if v.stride(-1) == 1 else v.contiguous()
    v_out = k_out if v_out is None else v_out
    block_h = min(8, next_power_of_2(kv_heads))
    groups = cdiv(q_heads, block_h) + (2 if has_cache else 1) * cdiv(kv_heads, block_h)
    with launching("qk_norm_rope", q):
        _qk_norm_rope_kernel[(batch * length, groups)](
            q, k, v, q_weight.contiguous(), k_weight.contiguous(), position_ids, inv_freq,
            slot_mapping, q_out, k_out, v_out,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *k_out.stride()[:2], *v_out.stride()[:2],
            position_ids.stride(0) if position_ids.shape[0] > 1 else 0,
            length, k_out.shape[0], eps, scaling,
            Q_HEADS=q_heads, KV_HEADS=kv_heads, HALF=head_dim // 2, BLOCK_H=block_h,
            BLOCK_D=next_power_of_2(head_dim // 2), HAS_CACHE=has_cache,
            num_warps=warps_for(block_h * head_dim // 2, q.device), **LAUNCH_OPTIONS,
        )  # fmt: skip
    return q_out


_INPUTS = "Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps, Tensor position_ids, Tensor inv_freq, float scaling"


@operator(
    f"qk_norm_rope({_INPUTS}) -> (Tensor, Tensor)",
    fake=lambda q, k, *_: (empty_as(q), empty_as(k)),
    cost=lambda q, k, q_weight, k_weight, eps, position_ids, inv_freq, scaling: Cost(
        1, nbytes(q, k, q_weight, k_weight, position_ids, inv_freq), nbytes(q, k)
    ),
)
def _qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    k_out = empty_as(k)
    return _launch(q, k, q_weight, k_weight, eps, position_ids, inv_freq, scaling, None, k_out.flatten(0, 1), None, None), k_out


# The cost is that of new tokens with a row in the cache each.
operator(
    f"qk_norm_rope_into_cache({_INPUTS}, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> Tensor",
    fake=lambda q, *_: empty_as(q),
    cost=lambda q, k, q_weight, k_weight, eps, position_ids, inv_freq, scaling, v, k_cache, v_cache, slot_mapping: Cost(
        1, nbytes(q, k, v, q_weight, k_weight, position_ids, inv_freq, slot_mapping), nbytes(q, k, v)
    ),
)(_launch)


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    *,
    attention_scaling: float = 1.0,
    v: torch.Tensor | None = None,
    k_cache: torch.Tensor | None = None,
    v_cache: torch.Tensor | None = None,
    slot_mapping: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
    """Normalised and rotated queries and keys; with a cache, keys and values are written into it.

    Args:
        q: (B, L, heads, head_dim), head_dim even and up to 256, in float16, bfloat16 or float32.
        k: (B, L, kv_heads, head_dim).
        q_weight, k_weight: (head_dim,) of the per-head norms.
        eps: added to the mean squares.
        position_ids: (B, L) or (1, L) integers.
        inv_freq: (head_dim / 2,) float32.
        attention_scaling: factor on cos and sin, as some rotary variants have it.
        v: as `k`; together with the next three.
        k_cache, v_cache: (slots, kv_heads, head_dim), written in place.
        slot_mapping: (B, L) integers, the row of the caches that each token goes to; no row twice.
        backend: see `_dispatch`.

    Returns:
        (q, k), contiguous; with a cache q alone.

    Raises:
        ValueError: shapes that do not fit, a part of the cache arguments without the others, or tensors on different devices.
        TypeError: an unsupported dtype.
    """
    cache = (v, k_cache, v_cache, slot_mapping)
    _check(q, k, q_weight, k_weight, position_ids, inv_freq, cache)
    chosen = choose_backend("qk_norm_rope", backend, q, k, q_weight, k_weight, inv_freq, v, k_cache, v_cache)
    if v is None or k_cache is None or v_cache is None or slot_mapping is None:
        if chosen == "torch":
            return qk_norm_rope_ref(q, k, q_weight, k_weight, eps, position_ids, inv_freq, attention_scaling)
        return torch.ops.llava15.qk_norm_rope(q, k, q_weight, k_weight, eps, position_ids, inv_freq, attention_scaling)
    if chosen == "torch":
        q, k = qk_norm_rope_ref(q, k, q_weight, k_weight, eps, position_ids, inv_freq, attention_scaling)
        # A compiled graph cannot depend on values: there, a row outside is torch's error.
        inside = slot_mapping.ge(0) & slot_mapping.lt(k_cache.shape[0])
        if not torch.compiler.is_compiling() and not inside.all():
            slot_mapping, k, v = (x[inside][None] for x in (slot_mapping, k, v))
        write_rows(k_cache, v_cache, slot_mapping, k, v)
        return q
    return torch.ops.llava15.qk_norm_rope_into_cache(
        q, k, q_weight, k_weight, eps, position_ids, inv_freq, attention_scaling, *cache
    )


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    cache: tuple[torch.Tensor | None, ...],
) -> None:
    op = "qk_norm_rope"
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{op}: q {tuple(q.shape)}, k {tuple(k.shape)}, expected (B, L, heads, head_dim) and (B, L, kv_heads, head_dim)"
        )
    batch, length, _, head_dim = q.shape
    if k.shape[2] == 0:
        raise ValueError(f"{op}: k {tuple(k.shape)} has no heads, expected at least one")
    if head_dim % 2 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head_dim {head_dim} is not supported, expected an even number up to {MAX_HEAD_DIM}")
    if q.dtype != k.dtype:
        raise TypeError(f"{op}: q is {q.dtype}, k is {k.dtype}, expected one dtype")
    expected = [
        ("q_weight", q_weight, (head_dim,)),
        ("k_weight", k_weight, (head_dim,)),
        ("inv_freq", inv_freq, (head_dim // 2,)),
        ("position_ids", position_ids, (position_ids.shape[0], length)),
    ]
    if any(part is not None for part in cache):
        v, k_cache, v_cache, slot_mapping = cache
        if v is None or k_cache is None or v_cache is None or slot_mapping is None:
            raise ValueError(f"{op}: v, k_cache, v_cache and slot_mapping belong together, expected all or none")
        slots = k_cache.shape[0] if k_cache.ndim else 0
        expected += [
            ("v", v, k.shape),
            ("k_cache", k_cache, (slots, k.shape[2], head_dim)),
            ("v_cache", v_cache, (slots, k.shape[2], head_dim)),
            ("slot_mapping", slot_mapping, (batch, length)),
        ]
        if slot_mapping.dtype not in (torch.int32, torch.int64) or slot_mapping.device != q.device:
            raise ValueError(
                f"{op}: slot_mapping is {slot_mapping.dtype} on {slot_mapping.device}, expected int32 or int64 on {q.device}"
            )
        for name, tensor in (("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
            if tensor.dtype != q.dtype:
                raise TypeError(f"{op}: {name} is {tensor.dtype}, expected {q.dtype} like q")
        if k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
            raise ValueError(f"{op}: the caches need a contiguous last dimension")
    for name, tensor, shape in expected:
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if position_ids.shape[0] not in (1, batch) or position_ids.is_floating_point() or position_ids.device != q.device:
        raise ValueError(
            f"{op}: position_ids is {position_ids.dtype} {tuple(position_ids.shape)} on {position_ids.device}, expected "
            f"integers ({batch} or 1, {length}) on {q.device}"
        )


def qk_norm_rope_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    attention_scaling: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The eager reference, without a cache. With float64 inputs it computes in float64."""
    return norm_and_rotate(q, k, q_weight, k_weight, eps, *rope_tables(position_ids, inv_freq, attention_scaling))


def rope_tables(
    position_ids: torch.Tensor, inv_freq: torch.Tensor, attention_scaling: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of cat(angles, angles), each (B or 1, L, 1, head_dim), the same for every layer."""
    wide = torch.promote_types(inv_freq.dtype, torch.float32)
    angles = (position_ids[..., None].to(wide) * inv_freq.to(wide))[:, :, None]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos() * attention_scaling, angles.sin() * attention_scaling


def norm_and_rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`qk_norm_rope_ref` with the tables made before."""

    def rotate(x: torch.Tensor) -> torch.Tensor:
        x, dtype = x.to(cos.dtype), x.dtype
        first, second = x.chunk(2, dim=-1)
        # Whole rows at a time: torch's elementwise loops are slow on halves.
        return torch.cat([-second, first], dim=-1).mul_(sin).add_(x * cos).to(dtype)

    q, k = (cast(torch.Tensor, rms_norm_torch(x, weight, eps)) for x, weight in ((q, q_weight), (k, k_weight)))
    return rotate(q), rotate(k)


def write_rows(
    k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    """Keys and values (B, L, kv_heads, head_dim) into the rows `slot_mapping` of the caches, all of which exist."""
    rows = slot_mapping.flatten().long()
    k_cache.index_copy_(0, rows, k.flatten(0, 1))
    v_cache.index_copy_(0, rows, v.flatten(0, 1))
