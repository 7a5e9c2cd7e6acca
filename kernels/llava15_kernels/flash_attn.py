"""Variable-length flash attention, forward: full for the vision tower, causal with grouped KV heads for the text prefill.

Sequences are packed without padding; segment s of the queries is rows cu_seqlens_q[s] : cu_seqlens_q[s + 1]. For each:

    P = softmax(softmax_scale * Q K^T)        row i sees column j if not causal, or if j <= i + len_k - len_q
    O = P V                                   a row that sees no column gives 0

Queries are taken BLOCK_M rows at a time; over the keys, BLOCK_N at a time, a running maximum m and sum l keep the softmax
exact (Dao, https://arxiv.org/abs/2307.08691):

    m' = max(m, rowmax(S))    p = exp(S - m')    a = exp(m - m')    l = a l + rowsum(p)    O = a O + p V

in base 2, with softmax_scale * log2(e) folded into one multiplication.

There are two kernels for it. On NVIDIA's Hopper and newer, tiles come through tensor descriptors, which the hardware copies to
shared memory by itself; everywhere else, and for tensors that a descriptor cannot describe, through pointers.

    q           (total_q, heads, head_dim)        any strides with a contiguous last dimension
    k, v        (total_k, kv_heads, head_dim)     heads a multiple of kv_heads
    cu_seqlens  (segments + 1,) int32
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._dispatch import (
    INTERPRETED,
    LAUNCH_OPTIONS,
    Backend,
    architecture,
    cdiv,
    check_bounds,
    choose_backend,
    launching,
    needs_grad,
    next_power_of_2,
)
from ._registry import Cost, empty_as, nbytes, operator

MAX_HEAD_DIM = 256
L2_BYTES = 32 * 2**20
"""What of an H100's 50 MB is left for keys and values beside queries and outputs; FlashAttention-3 counts with as much."""


@triton.jit
def _softmax_step(scores, running_sum, running_max, scale):
    """p, a, l', m' of the formula, for one block of scores in the running softmax."""
    # A positive scale keeps the order; behind the maximum it is one fused multiply-add a score.
    new_max = tl.maximum(running_max, tl.max(scores, axis=1) * scale)
    # A row that has seen nothing yet keeps -inf; 0 in its place avoids (-inf) - (-inf).
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(scores * scale - finite_max[:, None])
    alpha = tl.exp2(running_max - finite_max)
    return p, alpha, running_sum * alpha + tl.sum(p, axis=1), new_max


@triton.jit
def _hide(scores, column, len_k, diagonal, rows, CAUSAL: tl.constexpr):
    """Scores of keys behind the end, or beyond the diagonal, as -inf."""
    seen = (column < len_k)[None, :]
    if CAUSAL:
        seen = seen & (column[None, :] <= rows[:, None] + diagonal)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _attend(
    acc, running_sum, running_max, q, k_ptr, v_ptr, stride_k, stride_v, start, end, len_k, diagonal, rows, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Keys start : end into the running softmax. MASKED blocks may pass the end of the keys or the diagonal."""
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    for block in range(start, end, BLOCK_N):
        column = block + columns
        offset = column.to(tl.int64)
        k_pointers = k_ptr + dims[:, None] + offset[None, :] * stride_k
        v_pointers = v_ptr + offset[:, None] * stride_v + dims[None, :]
        if MASKED:
            k = tl.load(k_pointers, mask=(dims < HEAD_DIM)[:, None] & (column < len_k)[None, :], other=0.0)
            v = tl.load(v_pointers, mask=(column < len_k)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        elif HEAD_DIM != BLOCK_D:
            k = tl.load(k_pointers, mask=(dims < HEAD_DIM)[:, None], other=0.0)
            v = tl.load(v_pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        else:
            k = tl.load(k_pointers)
            v = tl.load(v_pointers)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        # Without "ieee" a float32 product is TF32, a thousand times less exact; 16-bit products are not affected.
        scores = tl.dot(q, k, input_precision="ieee")
        if MASKED:
            scores = _hide(scores, column, len_k, diagonal, rows, CAUSAL)
        p, alpha, running_sum, running_max = _softmax_step(scores, running_sum, running_max, scale)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, running_sum, running_max


@triton.jit
def _attend_tiles(
    acc, running_sum, running_max, q, k_tiles, v_tiles, head, start_k, start, end, len_k, diagonal, rows, scale,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`_attend` with keys and values from descriptors."""
    columns = tl.arange(0, BLOCK_N)
    for block in range(start, end, BLOCK_N):
        k = k_tiles.load([head, start_k + block, 0]).reshape(BLOCK_N, BLOCK_D)
        if UPCAST:
            k = k.to(tl.float32)
        scores = tl.dot(q, k.T)
        column = block + columns
        if MASKED:
            scores = _hide(scores, column, len_k, diagonal, rows, CAUSAL)
        p, alpha, running_sum, running_max = _softmax_step(scores, running_sum, running_max, scale)
        v = v_tiles.load([head, start_k + block, 0]).reshape(BLOCK_N, BLOCK_D)
        if MASKED:
            # Past the last key lie the next segment's values: 0 * NaN would be NaN.
            v = tl.where((column < len_k)[:, None], v, 0.0)
        if UPCAST:
            v = v.to(tl.float32)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, running_sum, running_max


@triton.jit
def _place(cu_seqlens_q_ptr, cu_seqlens_k_ptr, n_blocks, heads_at_once):
    """This program's head and block of rows, and where its segment begins and how long it is in queries and keys."""
    head = tl.program_id(1) * heads_at_once + tl.program_id(0) % heads_at_once
    tile = tl.program_id(0) // heads_at_once
    segment = tile // n_blocks
    # The last block first: under a causal mask it takes longest, and what takes longest should not start last.
    block = n_blocks - 1 - tile % n_blocks
    start_q = tl.load(cu_seqlens_q_ptr + segment)
    start_k = tl.load(cu_seqlens_k_ptr + segment)
    len_q = tl.load(cu_seqlens_q_ptr + segment + 1) - start_q
    len_k = tl.load(cu_seqlens_k_ptr + segment + 1) - start_k
    return head, block, start_q, len_q, start_k, len_k


@triton.jit
def _key_range(block, len_q, len_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """(full_end, masked_end): all rows of the block see the keys before the first, in whole tiles; none sees one from the
    second on."""
    by_all = len_k
    by_any = len_k
    if CAUSAL:
        # The block's first row sees the fewest columns, its last row the most.
        diagonal = len_k - len_q
        by_all = tl.minimum(len_k, tl.maximum(block * BLOCK_M + diagonal + 1, 0))
        by_any = tl.minimum(len_k, tl.maximum((block + 1) * BLOCK_M + diagonal, 0))
    return by_all // BLOCK_N * BLOCK_N, by_any


@triton.jit
def _store_rows(out_ptr, acc, running_sum, rows, dims, start_q, len_q, head, stride_os, stride_oh, HEAD_DIM: tl.constexpr):
    out = acc / tl.where(running_sum == 0.0, 1.0, running_sum)[:, None]
    out_ptr += start_q.to(tl.int64) * stride_os + head.to(tl.int64) * stride_oh
    out_pointers = out_ptr + rows.to(tl.int64)[:, None] * stride_os + dims[None, :]
    tl.store(out_pointers, out.to(out_ptr.dtype.element_ty), mask=(rows < len_q)[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit(
    do_not_specialize=["n_blocks", "heads_at_once"],
    do_not_specialize_on_alignment=["cu_seqlens_q_ptr", "cu_seqlens_k_ptr"],
)
def _flash_attn_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    stride_qs, stride_qh, stride_ks, stride_kh, stride_vs, stride_vh, stride_os, stride_oh,
    n_blocks, heads_at_once, softmax_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    head, block, start_q, len_q, start_k, len_k = _place(cu_seqlens_q_ptr, cu_seqlens_k_ptr, n_blocks, heads_at_once)
    if block * BLOCK_M >= len_q:
        return

    # int64 before the first multiplication with a stride: tokens * stride passes 2^31 on long packs.
    head = head.to(tl.int64)
    q_ptr += start_q.to(tl.int64) * stride_qs + head * stride_qh
    k_ptr += start_k.to(tl.int64) * stride_ks + (head // GROUP) * stride_kh
    v_ptr += start_k.to(tl.int64) * stride_vs + (head // GROUP) * stride_vh

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    in_rows = (rows < len_q)[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + rows.to(tl.int64)[:, None] * stride_qs + dims[None, :], mask=in_rows, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    # Some compilers pass Python floats as float64. The factor is log2(e).
    scale = tl.cast(softmax_scale, tl.float32) * 1.4426950408889634

    diagonal = len_k - len_q
    full_end, masked_end = _key_range(block, len_q, len_k, BLOCK_M, BLOCK_N, CAUSAL)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    running_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    running_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    acc, running_sum, running_max = _attend(
        acc, running_sum, running_max, q, k_ptr, v_ptr, stride_ks, stride_vs, 0, full_end, len_k, diagonal, rows, scale,
        HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL=CAUSAL, MASKED=False, UPCAST=UPCAST,
    )  # fmt: skip
    acc, running_sum, running_max = _attend(
        acc, running_sum, running_max, q, k_ptr, v_ptr, stride_ks, stride_vs, full_end, masked_end, len_k, diagonal, rows,
        scale, HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL=CAUSAL, MASKED=True, UPCAST=UPCAST,
    )  # fmt: skip
    _store_rows(out_ptr, acc, running_sum, rows, dims, start_q, len_q, head, stride_os, stride_oh, HEAD_DIM)


@triton.jit(
    do_not_specialize=["n_blocks", "heads_at_once"],
    do_not_specialize_on_alignment=["cu_seqlens_q_ptr", "cu_seqlens_k_ptr"],
)
def _flash_attn_tiles_kernel(
    q_tiles, k_tiles, v_tiles, out_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, stride_os, stride_oh,
    n_blocks, heads_at_once, softmax_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    head, block, start_q, len_q, start_k, len_k = _place(cu_seqlens_q_ptr, cu_seqlens_k_ptr, n_blocks, heads_at_once)
    if block * BLOCK_M >= len_q:
        return

    # Tiles do not stop at the segment's end: rows there belong to the next one, and are masked as keys and never stored.
    # Beyond the tensor and beyond head_dim they are 0.
    kv_head = head // GROUP
    q = q_tiles.load([head, start_q + block * BLOCK_M, 0]).reshape(BLOCK_M, BLOCK_D)
    if UPCAST:
        q = q.to(tl.float32)
    scale = tl.cast(softmax_scale, tl.float32) * 1.4426950408889634

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    diagonal = len_k - len_q
    full_end, masked_end = _key_range(block, len_q, len_k, BLOCK_M, BLOCK_N, CAUSAL)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    running_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    running_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    acc, running_sum, running_max = _attend_tiles(
        acc, running_sum, running_max, q, k_tiles, v_tiles, kv_head, start_k, 0, full_end, len_k, diagonal, rows, scale,
        BLOCK_D, BLOCK_N, CAUSAL=CAUSAL, MASKED=False, UPCAST=UPCAST,
    )  # fmt: skip
    acc, running_sum, running_max = _attend_tiles(
        acc, running_sum, running_max, q, k_tiles, v_tiles, kv_head, start_k, full_end, masked_end, len_k, diagonal, rows,
        scale, BLOCK_D, BLOCK_N, CAUSAL=CAUSAL, MASKED=True, UPCAST=UPCAST,
    )  # fmt: skip
    _store_rows(out_ptr, acc, running_sum, rows, tl.arange(0, BLOCK_D), start_q, len_q, head, stride_os, stride_oh, HEAD_DIM)


@dataclass(frozen=True)
class FlashConfig:
    """Tile sizes of one launch, and whether they are read through tensor descriptors.

    They depend on head_dim, dtype and architecture alone, never on lengths: a segment gives the same bits alone and in
    any pack. All compile without spills (`python -m benchmarks.aot`).
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False

    @classmethod
    def choose(cls, head_dim: int, dtype: torch.dtype, architecture: str, descriptors: bool = True) -> FlashConfig:
        """The configuration of an architecture; `descriptors=False` where the tensors do not allow any."""
        if dtype == torch.float32:
            # Exact float32 products use no matrix instruction; larger tiles spill.
            return cls(32, 32, 4, 1) if head_dim <= 64 else cls(16, 16, 4, 1)
        if architecture.startswith("gfx"):
            return cls(128, 64, 4, 2) if head_dim <= 64 else cls(128, 32, 4, 2) if head_dim <= 128 else cls(64, 32, 4, 1)
        if descriptors and head_dim <= 128 and (generation := _generation(architecture)) >= 9:
            if generation == 12:  # products from registers, as before Hopper
                return cls(128, 64 if head_dim <= 64 else 32, 8, 2, descriptors=True)
            # head_dim 64 leaves room for two programs on a processor: one's softmax runs under the other's products.
            return cls(128, 64, 4, 3, descriptors=True) if head_dim <= 64 else cls(128, 128, 8, 2, descriptors=True)
        if head_dim <= 64:
            return cls(128, 64, 4, 3)
        if head_dim <= 128:
            return cls(128, 64, 8, 2)
        return cls(64, 32, 8, 2)


def _generation(architecture: str) -> int:
    """9 for Hopper's "sm_90"; 0 for what is not NVIDIA's."""
    return int(architecture[3:]) // 10 if architecture.startswith("sm_") else 0


_forced: ContextVar[FlashConfig | None] = ContextVar("flash_config", default=None)


@contextlib.contextmanager
def flash_config(config: FlashConfig) -> Iterator[None]:
    """Launches use this configuration: for tests of one path, and for tuning."""
    token = _forced.set(config)
    try:
        yield
    finally:
        _forced.reset(token)


def _configure(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> FlashConfig:
    """The one place that decides between descriptors and pointers."""
    chosen = q.shape[-1], q.dtype, architecture(q.device)
    config = _forced.get() or FlashConfig.choose(*chosen)
    if config.descriptors and not all(map(_describable, (q, k, v))):
        return FlashConfig.choose(*chosen, descriptors=False)
    return config


def _heads_at_once(q: torch.Tensor, k: torch.Tensor, segments: int) -> int:
    """How many heads take turns block by block, so that the longest causal blocks of all of them start first: as many as have
    room for their keys and values in the L2, where each block of a head finds them again."""
    bytes_of_head = 2 * k.shape[0] // max(1, segments) * k.shape[2] * k.element_size()
    room, kv_heads = max(1, L2_BYTES // max(1, bytes_of_head)), k.shape[1]
    return max(n for n in range(1, kv_heads + 1) if n <= room and kv_heads % n == 0) * (q.shape[1] // kv_heads)


def _describable(x: torch.Tensor) -> bool:
    """Whether the hardware can copy tiles of `x`: 16 bits, not empty, and steps of 16 bytes, or 8 elements, but in the last
    dimension."""
    rows, heads, _ = x.stride()
    steps = rows > 0 and heads > 0 and rows % 8 == heads % 8 == 0
    return steps and x.element_size() == 2 and x.numel() > 0 and x.data_ptr() % 16 == 0


def _tiles(x: torch.Tensor, rows: int, block_d: int) -> TensorDescriptor:
    """`x` (total, heads, head_dim) in tiles of one head, so that the tile's first dimension can be dropped."""
    return TensorDescriptor.from_tensor(x.transpose(0, 1), [1, rows, block_d])


# SymInt: a plain int would make torch.compile start anew for every length.
@operator(
    "flash_attn_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "float softmax_scale, bool causal) -> Tensor",
    fake=lambda q, *_: empty_as(q),
    cost=lambda q, k, v, cu_seqlens_q, cu_seqlens_k, *_: Cost(1, nbytes(q, k, v, cu_seqlens_q, cu_seqlens_k), nbytes(q)),
)
def _flash_attn_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
) -> torch.Tensor:
    heads, head_dim = q.shape[1:]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    out = empty_as(q)
    if out.numel() == 0 or max_seqlen_q == 0:
        return out
    config = _configure(q, k, v)
    n_blocks = cdiv(max_seqlen_q, config.block_m)
    segments = cu_seqlens_q.shape[0] - 1
    at_once = _heads_at_once(q, k, segments) if causal else 1
    grid = (segments * n_blocks * at_once, heads // at_once)
    block_d = max(16, next_power_of_2(head_dim))
    options = dict(
        GROUP=heads // k.shape[1], HEAD_DIM=head_dim, BLOCK_D=block_d,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, CAUSAL=causal,
        # The interpreter has no working bfloat16 arithmetic.
        UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
        num_warps=config.num_warps, num_stages=config.num_stages, **LAUNCH_OPTIONS,
    )  # fmt: skip
    with launching("flash_attn_varlen_func", q):
        if config.descriptors:
            _flash_attn_tiles_kernel[grid](
                _tiles(q, config.block_m, block_d), _tiles(k, config.block_n, block_d), _tiles(v, config.block_n, block_d),
                out, cu_seqlens_q, cu_seqlens_k, *out.stride()[:2], n_blocks, at_once, softmax_scale, **options,
            )  # fmt: skip
        else:
            _flash_attn_kernel[grid](
                q, k, v, out, cu_seqlens_q, cu_seqlens_k,
                *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2],
                n_blocks, at_once, softmax_scale, **options,
            )  # fmt: skip
    return out


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Attention over packed sequences, with flash-attn's signature.

    Args:
        q: (total_q, heads, head_dim), float16, bfloat16 or float32, head_dim up to 256.
        k, v: (total_k, kv_heads, head_dim), heads a multiple of kv_heads.
        cu_seqlens_q, cu_seqlens_k: (segments + 1,) int32 on the device of `q`, beginning with 0 and ending with the totals.
        max_seqlen_q, max_seqlen_k: at least the longest segment's length.
        softmax_scale: positive; by default 1 / sqrt(head_dim).
        causal: aligned to the last query and key: row i sees columns up to i + len_k - len_q.
        deterministic: always the case.
        backend: see `_dispatch`.

    Returns:
        (total_q, heads, head_dim) in the dtype of `q`.

    Raises:
        NotImplementedError: dropout, a window, softcap, alibi, attention probabilities or a block table is asked for.
        ValueError: shapes that do not fit, head_dim above 256, a scale that is not positive, or tensors on different devices.
        TypeError: an unsupported dtype.
    """
    refuse_options(
        "flash_attn_varlen_func", dropout_p=dropout_p, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        return_attn_probs=return_attn_probs, block_table=block_table,
    )  # fmt: skip
    _check_shapes(q, k, v, cu_seqlens_q, cu_seqlens_k)
    check_bounds("flash_attn_varlen_func", "cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    if cu_seqlens_k is not cu_seqlens_q or k.shape[0] != q.shape[0] or max_seqlen_k != max_seqlen_q:
        check_bounds("flash_attn_varlen_func", "cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    softmax_scale = scale_of("flash_attn_varlen_func", softmax_scale, q)
    torch_backend = choose_backend("flash_attn_varlen_func", backend, q, k, v) == "torch"
    run = flash_attn_varlen_torch if torch_backend else torch.ops.llava15.flash_attn_varlen
    return run(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, softmax_scale, causal)


def refuse_options(op: str, **options: object) -> None:
    """Raises NotImplementedError for an option that is on, however it is said."""

    def is_off(value: object) -> bool:
        if isinstance(value, (tuple, list)):  # a window of no width
            return all(side is None or (isinstance(side, int) and side == -1) for side in value)
        return value is None or (isinstance(value, (bool, int, float)) and value == 0)

    for name, value in options.items():
        if not is_off(value):
            given = f"a {type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)
            raise NotImplementedError(f"{op}: {name} is not supported, but is {given}")


def scale_of(op: str, softmax_scale: float | None, q: torch.Tensor) -> float:
    if softmax_scale is None:
        return q.shape[-1] ** -0.5
    if not softmax_scale > 0.0:
        raise ValueError(f"{op}: softmax_scale is {softmax_scale}, expected a positive number")
    return softmax_scale


def _check_shapes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor
) -> None:
    op = "flash_attn_varlen_func"
    if (
        q.ndim != 3
        or k.ndim != 3
        or k.shape != v.shape
        or q.shape[-1] != k.shape[-1]
        or k.shape[1] == 0
        or q.shape[1] % k.shape[1]
    ):
        raise ValueError(
            f"{op}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, expected (total_q, heads, head_dim) and twice "
            "(total_k, kv_heads, head_dim), heads a multiple of kv_heads"
        )
    if not 0 < q.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head_dim {q.shape[-1]} is not supported, expected 1 to {MAX_HEAD_DIM}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"{op}: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}, expected one dtype")
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if (
            cu_seqlens.ndim != 1
            or cu_seqlens.shape[0] == 0
            or cu_seqlens.dtype != torch.int32
            or cu_seqlens.shape != cu_seqlens_q.shape
        ):
            raise ValueError(
                f"{op}: {name} is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, expected int32 (segments + 1,), equally long"
            )
        if cu_seqlens.device != q.device:
            raise ValueError(f"{op}: {name} on {cu_seqlens.device}, q on {q.device}, expected one device")


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """`x` where CUDA's kernels of `scaled_dot_product_attention` can read it by 16 bytes, which they do without looking
    (pytorch#183484)."""
    steps = x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1])
    return x.clone(memory_format=torch.contiguous_format) if x.is_cuda and any(step % 16 for step in steps) else x


def flash_attn_varlen_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
) -> torch.Tensor:
    """The torch backend. The host needs the lengths, which torch.compile cannot look into: one opaque node for it."""
    opaque = torch.compiler.is_compiling() and not needs_grad(q, k, v)
    attend = torch.ops.llava15.flash_attn_varlen_sdpa if opaque else flash_attn_varlen_sdpa
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)


@operator(
    "flash_attn_varlen_sdpa(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float softmax_scale, "
    "bool causal) -> Tensor",
    fake=lambda q, *_: empty_as(q),
)
def flash_attn_varlen_sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    softmax_scale: float,
    causal: bool,
) -> torch.Tensor:
    """`scaled_dot_product_attention`, neighbouring segments of equal lengths in one call."""
    lengths_q, lengths_k = (cu_seqlens.diff().tolist() for cu_seqlens in (cu_seqlens_q, cu_seqlens_k))
    group = q.shape[1] // k.shape[1]
    q, k, v = map(_aligned, (q, k, v))
    outputs = []
    start_q = start_k = 0
    for (len_q, len_k), run in groupby(zip(lengths_q, lengths_k, strict=True)):
        count = len(list(run))
        end_q, end_k = start_q + count * len_q, start_k + count * len_k
        queries = q[start_q:end_q].unflatten(0, (count, len_q)) if len_q else q[:0]
        keys, values = (x[start_k:end_k].unflatten(0, (count, len_k)) if len_k else x[:0] for x in (k, v))
        start_q, start_k = end_q, end_k
        if len_q == 0:
            continue
        if len_k == 0:
            outputs.append(torch.zeros_like(queries).flatten(0, 1))
            continue
        # torch aligns its causal mask to the first query and key, flash-attn to the last: the first queries may see no key.
        blind, mask = max(0, len_q - len_k) if causal else 0, None
        queries = queries[:, blind:]
        if causal and len_q < len_k:
            mask = torch.ones(len_q, len_k, dtype=torch.bool, device=q.device).tril(len_k - len_q)
        output = torch.nn.functional.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=mask,
            is_causal=causal and mask is None,
            scale=softmax_scale,
            enable_gqa=group > 1,
        ).transpose(1, 2)
        outputs.append(torch.nn.functional.pad(output, (0, 0, 0, 0, blind, 0)).flatten(0, 1))
    if len(outputs) == 1:
        return outputs[0].contiguous()
    return torch.cat(outputs) if outputs else torch.empty(q.shape, dtype=q.dtype, device=q.device)


def flash_attn_varlen_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """The eager reference: the formula, segment by segment, in the dtype of the inputs."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for start_q, end_q, start_k, end_k in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        queries = q[start_q:end_q].transpose(0, 1)
        keys, values = (x[start_k:end_k].repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
        scores = queries @ keys.transpose(1, 2) * scale
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(keys.shape[1] - queries.shape[1] + 1)
            scores = scores.masked_fill(hidden, float("-inf"))
        # A row without a visible key is 0/0 here; its output is 0.
        weights = scores.softmax(-1).nan_to_num(0.0) if causal else scores.softmax(-1)
        out[start_q:end_q] = (weights @ values).transpose(0, 1)
    return out
