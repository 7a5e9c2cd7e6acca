"""2D rotary position embedding of the vision tower, on queries and keys in one launch.

For a patch at (row, column), with half = head_dim / 2 and f_i the inverse frequencies, i < half / 2:

    angle = [row * f_0, ..., row * f_(half/2 - 1), column * f_0, ..., column * f_(half/2 - 1)]        (half,)
    y[: half] = x[: half] * cos(angle) - x[half :] * sin(angle)
    y[half :] = x[half :] * cos(angle) + x[: half] * sin(angle)

A class row, marked by position (-1, -1), has the learned `class_pos_emb` as its angles. All of it in float32; the angles
are made in the kernel, so no cos / sin table is ever written to memory.
Su et al., https://arxiv.org/abs/2104.09864; in two dimensions as in MLCD and RICE, https://arxiv.org/abs/2507.20025.

    q, k            (S, heads, head_dim)   any strides with a contiguous last dimension, e.g. views of a packed qkv
    position_ids    (S, 2) int32
    inv_freq        (head_dim / 4,) float32
    class_pos_emb   (1, head_dim / 2)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._dispatch import LAUNCH_OPTIONS, Backend, cdiv, choose_backend, launching, next_power_of_2
from ._registry import Cost, empty_as, nbytes, operator


@triton.jit
def _rotate(x_ptr, y_ptr, x_offsets, y_offsets, cos, sin, mask, HALF: tl.constexpr):
    first = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + x_offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    dtype = y_ptr.dtype.element_ty
    tl.store(y_ptr + y_offsets, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(y_ptr + y_offsets + HALF, (second * cos + first * sin).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _vision_rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, position_ptr, inv_freq_ptr, class_ptr,
    stride_qs, stride_qh, stride_ks, stride_kh, n_rows,
    HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    pairs = tl.arange(0, BLOCK_D)
    heads = tl.arange(0, BLOCK_H)
    row_mask = rows < n_rows
    pair_mask = pairs < HALF

    # The first half of the pairs turns with the row, the second with the column.
    by_row = pairs < HALF // 2
    axis = tl.where(by_row, 0, 1)
    frequency = tl.load(inv_freq_ptr + tl.where(by_row, pairs, pairs - HALF // 2), mask=pair_mask, other=0.0)
    position = tl.load(position_ptr + rows[:, None] * 2 + axis[None, :], mask=row_mask[:, None] & pair_mask[None, :], other=0)
    class_angle = tl.load(class_ptr + pairs, mask=pair_mask, other=0.0).to(tl.float32)
    angle = tl.where(position < 0, class_angle[None, :], position.to(tl.float32) * frequency[None, :])
    cos = tl.cos(angle)[:, None, :]
    sin = tl.sin(angle)[:, None, :]

    mask = row_mask[:, None, None] & (heads < HEADS)[None, :, None] & pair_mask[None, None, :]
    row, head, pair = rows[:, None, None], heads[None, :, None], pairs[None, None, :]
    out = row * (HEADS * 2 * HALF) + head * (2 * HALF) + pair
    _rotate(q_ptr, q_out_ptr, row * stride_qs + head * stride_qh + pair, out, cos, sin, mask, HALF)
    _rotate(k_ptr, k_out_ptr, row * stride_ks + head * stride_kh + pair, out, cos, sin, mask, HALF)


@operator(
    "vision_rope_2d(Tensor q, Tensor k, Tensor position_ids, Tensor inv_freq, Tensor class_pos_emb) -> (Tensor, Tensor)",
    fake=lambda q, k, *_: (empty_as(q), empty_as(k)),
    cost=lambda q, k, *others: Cost(1, nbytes(q, k, *others), nbytes(q, k)),
)
def _vision_rope_2d(
    q: torch.Tensor, k: torch.Tensor, position_ids: torch.Tensor, inv_freq: torch.Tensor, class_pos_emb: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    n_rows, heads, head_dim = q.shape
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = empty_as(q), empty_as(k)
    if q.numel() == 0:
        return q_out, k_out
    block_h, block_d = next_power_of_2(heads), next_power_of_2(head_dim // 2)
    # About 2048 pairs a program: 16 elements a thread at 4 warps.
    block_s = max(1, 2048 // (block_h * block_d))
    with launching("vision_rope_2d", q):
        _vision_rope_kernel[(cdiv(n_rows, block_s),)](
            q, k, q_out, k_out, position_ids.contiguous(), inv_freq.contiguous(), class_pos_emb.contiguous(),
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), n_rows,
            HEADS=heads, HALF=head_dim // 2, BLOCK_S=block_s, BLOCK_H=block_h, BLOCK_D=block_d,
            num_warps=4, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return q_out, k_out


def vision_rope_2d(
    q: torch.Tensor,
    k: torch.Tensor,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    class_pos_emb: torch.Tensor,
    *,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated copies of `q` and `k`; the inputs are left as they are.

    Args:
        q, k: (S, heads, head_dim), head_dim a multiple of 4, in float16, bfloat16 or float32.
        position_ids: (S, 2) integers, (row, column) of each patch, (-1, -1) for a class row.
        inv_freq: (head_dim / 4,) float32, theta^(-2i / (head_dim / 2)).
        class_pos_emb: (1, head_dim / 2) or (head_dim / 2,), the angles of a class row.
        backend: see `_dispatch`.

    Returns:
        q and k, (S, heads, head_dim), contiguous, in their dtypes.

    Raises:
        ValueError: shapes that do not fit, or tensors on different devices.
        TypeError: an unsupported dtype.
    """
    if q.ndim != 3 or q.shape[-1] % 4:
        raise ValueError(f"vision_rope_2d: q has shape {tuple(q.shape)}, expected (S, heads, head_dim), head_dim % 4 == 0")
    head_dim = q.shape[-1]
    expected = {
        "k": (k.shape, q.shape),
        "position_ids": (position_ids.shape, (q.shape[0], 2)),
        "inv_freq": (inv_freq.shape, (head_dim // 4,)),
        "class_pos_emb": ((class_pos_emb.numel(),), (head_dim // 2,)),
    }
    for name, (found, wanted) in expected.items():
        if tuple(found) != tuple(wanted):
            raise ValueError(f"vision_rope_2d: {name} has shape {tuple(found)}, expected {tuple(wanted)}")
    if position_ids.device != q.device or position_ids.is_floating_point():
        raise ValueError(
            f"vision_rope_2d: position_ids are {position_ids.dtype} on {position_ids.device}, expected integers on {q.device}"
        )
    if choose_backend("vision_rope_2d", backend, q, k, inv_freq, class_pos_emb) == "torch":
        return vision_rope_2d_ref(q, k, position_ids, inv_freq, class_pos_emb)
    return torch.ops.llava15.vision_rope_2d(q, k, position_ids, inv_freq, class_pos_emb)


def vision_rope_2d_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    class_pos_emb: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The eager reference. With float64 `q`, `k`, `inv_freq` it computes in float64."""
    return apply_rope_tables(q, k, *vision_rope_tables(position_ids, inv_freq, class_pos_emb))


def vision_rope_tables(
    position_ids: torch.Tensor, inv_freq: torch.Tensor, class_pos_emb: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of cat(angles, angles), each (S, head_dim), in the dtype of `inv_freq`, at least float32."""
    inv_freq = inv_freq.to(torch.promote_types(inv_freq.dtype, torch.float32))
    angles = (position_ids.to(inv_freq.dtype)[:, :, None] * inv_freq).flatten(1)
    angles = torch.where(position_ids[:, :1] < 0, class_pos_emb.to(inv_freq.dtype), angles)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rope_tables(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates q and k (S, heads, head_dim) by tables (S, head_dim), in the tables' dtype."""
    cos, sin = cos[:, None], sin[:, None]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        wide = x.to(cos.dtype)
        first, second = wide.chunk(2, dim=-1)
        return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)

    return rotate(q), rotate(k)
