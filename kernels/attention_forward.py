"""Relative attention in Triton, forward; the equation is in attention.py, a walk through this file in docs/kernels.md.

A program takes N queries past all keys, N at a time. The queries of a tile stand in reverse, row m is query i0 + N-1-m,
so that logit (m, n) wants row y + m + n of the distance table read in reverse, for both of its position terms. The
queries and the keys meet the same two blocks of N table rows, and the next tile needs one new block.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .attention_rotation import drop, skew
from .dispatch import tl, triton

LOG2E = math.log2(math.e)
# integers that differ between launches: a kernel is not compiled again for each
COUNTERS = ["first_head", "heads", "chunk", "stream", "threshold"]
# whether a device spells the rotation in PTX, by `kind`; attention_check.py writes what it has tried
spellings: dict[tuple, bool | None] = {}


@triton.jit
def head_of(pointer, head, heads, stride_b, stride_h):
    return pointer + (head // heads).to(tl.int64) * stride_b + (head % heads) * stride_h


@triton.jit
def table_rows(table, first, reach, N: tl.constexpr, D: tl.constexpr):
    """N rows of the reversed table. Beyond its ends rows repeat: only notes beyond the sequence are so far apart."""
    at = tl.minimum(tl.maximum(2 * reach - 2 - first - tl.arange(0, N), 0), 2 * reach - 2)
    return tl.load(table + at[:, None] * D + tl.arange(0, D)[None, :])


@triton.jit(do_not_specialize=COUNTERS)
def attend_kernel(
    q, k, v, table, lengths, seed, out, logsumexp,
    heads, padded, reach, stream, stride_b, stride_h, stride_l, out_b, out_h, out_l, scale, threshold, multiplier,
    D: tl.constexpr, N: tl.constexpr, DROPOUT: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One block of queries against all keys, softmax by running maximum; `scale` holds log2(e), for exp2."""
    start, head = tl.program_id(0) * N, tl.program_id(1)
    length = tl.load(lengths + head // heads).to(tl.int32)
    n, d = tl.arange(0, N), tl.arange(0, D)
    rows = start + N - 1 - n
    out = head_of(out, head, heads, out_b, out_h) + rows[:, None] * out_l + d[None, :]
    if start >= length:
        tl.store(out, tl.zeros((N, D), out.dtype.element_ty), mask=rows[:, None] < padded)
        return
    # position terms are rotated in 16 bits, and float16 has three more of them than bfloat16 for the fraction
    SCORE: tl.constexpr = tl.float16 if q.dtype.element_ty.primitive_bitwidth == 16 else tl.float32
    q = head_of(q, head, heads, stride_b, stride_h) + rows[:, None] * stride_l + d[None, :]
    k = head_of(k, head, heads, stride_b, stride_h) + d[None, :]
    v = head_of(v, head, heads, stride_b, stride_h) + d[None, :]
    queries = tl.load(q, mask=rows[:, None] < length, other=0.0)
    if DROPOUT:
        seed = tl.load(seed)
    y = reach - N - start  # the table row of logit (0, 0) where the keys begin
    query_a = tl.dot(queries, table_rows(table, y, reach, N, D).T, input_precision="tf32x3").to(SCORE)
    total = tl.zeros((N,), tl.float32)
    maximum = tl.full((N,), float("-inf"), tl.float32)
    mixed = tl.zeros((N, D), tl.float32)
    for column in range(0, length, N):
        columns = column + n
        present = columns[:, None] < length
        keys = tl.load(k + columns[:, None] * stride_l, mask=present, other=0.0)
        table_a = table_rows(table, y + column, reach, N, D)
        table_b = table_rows(table, y + column + N, reach, N, D)
        key_a = tl.dot(keys, table_a.T, input_precision="tf32x3").to(SCORE)
        key_b = tl.dot(keys, table_b.T, input_precision="tf32x3").to(SCORE)
        query_b = tl.dot(queries, table_b.T, input_precision="tf32x3").to(SCORE)
        positions = tl.trans(skew(key_a, key_b, PTX)) + skew(query_a, query_b, PTX)
        query_a = query_b
        # the product is added to the positions, not they to it: the sum has the layout of a product from the start
        logits = tl.dot(queries, keys.T, positions.to(tl.float32), input_precision="tf32x3")
        logits = tl.where(columns[None, :] < length, logits, float("-inf"))
        raised = tl.maximum(maximum, tl.max(logits, 1))
        shrink = tl.exp2((maximum - raised) * scale)
        weights = tl.exp2(logits * scale - (raised * scale)[:, None])
        total = total * shrink + tl.sum(weights, 1)
        maximum = raised
        if DROPOUT:
            weights = drop(weights, seed, start, column, stream, head, threshold, False, PTX)
        values = tl.load(v + columns[:, None] * stride_l, mask=present, other=0.0)
        mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None], input_precision="tf32x3")
    mixed = tl.where(rows[:, None] < length, mixed * (multiplier / total)[:, None], 0.0)
    tl.store(out, mixed.to(out.dtype.element_ty), mask=rows[:, None] < padded)
    logsumexp += head.to(tl.int64) * padded + rows
    tl.store(logsumexp, maximum * scale + tl.log2(total), mask=rows < padded)


def forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, seed: Tensor, dropout: float, stream: int
) -> tuple[Tensor, Tensor]:
    """Output [B, H, L, D], laid out [B, L, H, D], and the log2-sum-exp2 [B, H, L] of the logits of valid rows.

    q, k, v share their strides, 1 in D; the distance table [2P-1, D] is contiguous and of their dtype.
    """
    batch, heads, padded, width = q.shape
    out = q.new_empty(batch, padded, heads, width).transpose(1, 2)
    logsumexp = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    dropping, shared = settings(q, dropout)
    attend_kernel[(triton.cdiv(padded, shared["N"]), batch * heads)](
        q, k, v, table, lengths, seed, out, logsumexp, heads, padded, (len(table) + 1) // 2, stream,
        *q.stride()[:3], *out.stride()[:3], LOG2E / math.sqrt(width), *dropping, DROPOUT=dropout > 0, **shared,
    )  # fmt: skip
    return out, logsumexp


def settings(q: Tensor, dropout: float) -> tuple[tuple[int, float], dict[str, Any]]:
    """The threshold of a 16-bit draw and the multiplier of what is kept; constants and options of every launch."""
    threshold = min(round(dropout * 2**16), 2**16 - 1)
    # a third stage keeps sm_80 and its kin from spilling; on sm_90 it would leave room for one program instead of two
    stages = 2 if capability(q)[0] in (9, 10) else 3 if q.shape[3] <= 64 else 1
    ptx = spellings.get(kind(q, dropout), ptx_fits(q))
    size = 32 if q.dtype == torch.float32 else 64
    return (threshold, 1 / (1 - dropout)), dict(D=q.shape[3], N=size, PTX=ptx, num_warps=4, num_stages=stages)


def kind(q: Tensor, dropout: float) -> tuple:
    return q.device, q.dtype, q.shape[3], dropout > 0


def ptx_fits(q: Tensor) -> bool:
    """Whether Triton lays out products as the PTX wants: sm_90, and up to D = 64 sm_80, sm_86, sm_89, sm_120."""
    if q.dtype == torch.float32 or triton.knobs.runtime.interpret or torch.version.hip:
        return False
    major = capability(q)[0]
    return major == 9 or (major in (8, 12) and q.shape[3] <= 64)


def capability(q: Tensor) -> tuple[int, int]:
    """Of the device; on the CPU launches are only recorded, to be compiled for any."""
    return torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
