"""Relative attention in Triton: the equations are in attention.py, a walk through this file in docs/kernels.md.

The skew is done in memory, by addresses alone. A wave of heads at a time, `position_scores` writes both position
products at the place of their logit, into two scratch squares per head: q_i . R[i-j+P-1] at [i, j] and k_j . R[i-j+P-1]
at [j, i]. The attention kernels read them as plain aligned tiles; the backward pass overwrites them with dS and its
transpose, and the gradients of q, k and R are products of those squares, read by the same addresses.

Rows STRIDE apart share a window of R. Row x = a + STRIDE m against column y = w + STRIDE m + n has the distance
x - y = a - w - n whatever m: a tile of such rows is a plain product with N consecutive rows of R, and its skew moves
row m by STRIDE m columns, a whole 16-byte vector. With STRIDE = 1 every load and store would be two bytes wide.
"""

import torch
from torch import Tensor

from .attention_launch import COUNTERS, LOG2E, Launch, empty_heads, plan, score_squares, threshold
from .dispatch import tl, triton


@triton.jit
def head_of(pointer, head, heads, stride_b, stride_h):
    return pointer + (head // heads).to(tl.int64) * stride_b + (head % heads) * stride_h


@triton.jit
def dropout_keep(seed, rows, columns, stream, head, THRESHOLD: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Kept weights of a tile: one Philox call (column / 4, row, stream, head) draws for four neighbouring columns."""
    group = columns + tl.arange(0, N // 4)
    a, b, c, d = tl.philox(seed, group[None, :], rows[:, None], stream, head)
    even = tl.join(a >= THRESHOLD, c >= THRESHOLD)
    odd = tl.join(b >= THRESHOLD, d >= THRESHOLD)
    return tl.reshape(tl.join(even, odd), (M, N))


@triton.jit(do_not_specialize=COUNTERS)
def position_scores_kernel(
    q, k, distance, lengths, query_scores, key_scores,
    first_head, heads, pitch, reach, stride_b, stride_h, stride_l,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Side 0: query_scores[i, j] = q_i . R[i-j+P-1]; side 1: key_scores[j, i] = k_j . R[i-j+P-1]."""
    block, head, side = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + (first_head + head) // heads)
    origin = block // STRIDE * (STRIDE * M)
    if origin >= length:
        return
    first = origin + block % STRIDE
    if side == 0:
        x, out, sign = q, query_scores, 1
    else:
        x, out, sign = k, key_scores, -1
    x = head_of(x, first_head + head, heads, stride_b, stride_h)
    out += head.to(tl.int64) * pitch * pitch
    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    rows = first + STRIDE * m
    vectors = tl.load(x + rows[:, None] * stride_l + d[None, :], mask=rows[:, None] < length, other=0.0)
    for window in range(-STRIDE * M, length, N):
        at = reach - 1 + sign * (first - window - n)
        inside = (at >= 0) & (at < 2 * reach - 1)
        table = tl.load(distance + at[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        scores = tl.dot(vectors, table.T, input_precision="ieee")
        columns = window + STRIDE * m[:, None] + n[None, :]
        place = out + rows[:, None] * pitch + columns
        written = (rows[:, None] < length) & (columns >= 0) & (columns < pitch)
        tl.store(place, scores.to(out.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=COUNTERS)
def attend_kernel(
    q, k, v, query_scores, key_scores, lengths, seed, out, logsumexp,
    first_head, heads, padded, pitch, stream, stride_b, stride_h, stride_l, out_b, out_h, out_l, scale, multiplier,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """One block of queries against all keys, softmax by running maximum. Logits are in powers of two throughout."""
    start, head = tl.program_id(0) * M, tl.program_id(1)
    index = first_head + head
    length = tl.load(lengths + index // heads)
    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    rows = start + m
    out = head_of(out, index, heads, out_b, out_h) + rows[:, None] * out_l + d[None, :]
    if start >= length:
        tl.store(out, tl.zeros((M, D), out.dtype.element_ty), mask=rows[:, None] < padded)
        return
    q = head_of(q, index, heads, stride_b, stride_h)
    k = head_of(k, index, heads, stride_b, stride_h) + d[None, :]
    v = head_of(v, index, heads, stride_b, stride_h) + d[None, :]
    query_scores += head.to(tl.int64) * pitch * pitch + rows[:, None] * pitch
    key_scores += head.to(tl.int64) * pitch * pitch + rows[None, :]
    queries = tl.load(q + rows[:, None] * stride_l + d[None, :], mask=rows[:, None] < length, other=0.0)
    if THRESHOLD > 0:
        key = tl.load(seed)
    total = tl.zeros((M,), tl.float32)
    maximum = tl.full((M,), float("-inf"), tl.float32)
    mixed = tl.zeros((M, D), tl.float32)
    for column in range(0, length, N):
        columns = column + n
        present = columns[:, None] < length
        keys = tl.load(k + columns[:, None] * stride_l, mask=present, other=0.0)
        logits = tl.load(query_scores + columns[None, :]).to(tl.float32)
        logits += tl.trans(tl.load(key_scores + columns[:, None] * pitch))
        logits = tl.dot(queries, keys.T, logits, input_precision="ieee") * scale
        logits = tl.where(columns[None, :] < length, logits, float("-inf"))
        raised = tl.maximum(maximum, tl.max(logits, 1))
        shrink = tl.exp2(maximum - raised)
        weights = tl.exp2(logits - raised[:, None])
        total = total * shrink + tl.sum(weights, 1)
        maximum = raised
        if THRESHOLD > 0:
            weights = tl.where(dropout_keep(key, rows, column // 4, stream, index, THRESHOLD, M, N), weights, 0.0)
        values = tl.load(v + columns[:, None] * stride_l, mask=present, other=0.0)
        mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None], input_precision="ieee")
    mixed = tl.where(rows[:, None] < length, mixed * (multiplier / total)[:, None], 0.0)
    tl.store(out, mixed.to(out.dtype.element_ty), mask=rows[:, None] < padded)
    tl.store(logsumexp + index.to(tl.int64) * padded + rows, maximum + tl.log2(total), mask=rows < padded)


def position_scores(
    q: Tensor, k: Tensor, distance: Tensor, lengths: Tensor, squares: tuple[Tensor, Tensor], first: int, launch: Launch
) -> None:
    tile = launch.tiles["position_scores"]
    blocks = triton.cdiv(launch.padded, tile.m * tile.stride) * tile.stride
    position_scores_kernel[(blocks, min(launch.wave, launch.total - first), 2)](
        q, k, distance, lengths, *squares, first, launch.heads, launch.pitch, launch.reach, *q.stride()[:3],
        D=launch.width, M=tile.m, N=tile.n, STRIDE=tile.stride,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, distance: Tensor, lengths: Tensor, seed: Tensor, dropout: float, stream: int
) -> tuple[Tensor, Tensor]:
    """Output [B, H, L, D], laid out [B, L, H, D], and the rows' log2-sum-exp2 [B, H, L].

    q, k, v share their strides and have unit stride in D; distance is contiguous and of their dtype.
    """
    launch, out = plan(q, distance), empty_heads(q)
    logsumexp = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    squares = score_squares(q, launch)
    tile = launch.tiles["attend"]
    for first in launch.waves():
        position_scores(q, k, distance, lengths, squares, first, launch)
        attend_kernel[(triton.cdiv(launch.padded, tile.m), min(launch.wave, launch.total - first))](
            q, k, v, *squares, lengths, seed, out, logsumexp,
            first, launch.heads, launch.padded, launch.pitch, stream, *q.stride()[:3], *out.stride()[:3],
            launch.scale * LOG2E, 1 / (1 - dropout),
            D=launch.width, M=tile.m, N=tile.n, THRESHOLD=threshold(dropout),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, logsumexp
