"""Relative attention in Triton, backward, in the tiles of attention_forward.py.

With P the probabilities, dP = dropout(grad_out V^T) and delta_i = out_i . grad_out_i,

    dS_ij = P_ij (dP_ij - delta_i),   dv_j = sum_i dropout(P)_ij grad_out_i
    dq_i = sum_j dS_ij (k_j + R[i-j+P-1]) / sqrt(D),   dk_j = sum_i dS_ij (q_i + R[i-j+P-1]) / sqrt(D)
    dR[r] = sum over i - j = r - P + 1 of dS_ij (q_i + k_j) / sqrt(D)

A chunk of heads at a time: `score_gradient` computes each logit again and writes dS once, for the two kernels after it.
The gradient of a skew is an unskew; neighbouring tiles together, unskewed, make a plain product with N table rows.
No atomics: one program owns each element it adds to, so a seed gives the same bits every time.
"""

import math

import torch

from .attention_forward import COUNTERS, LOG2E, attend_kernel, head_of, settings, table_rows
from .attention_rotation import drop, rotate
from .dispatch import tl, triton

# bytes of dS at most, for more than one head: 128 of 1,024 notes in 16 bits. All else is O(B H L)
SCRATCH = 2**28
# of table_gradient, whose diagonals have 1 to `blocks` tiles: a few for each multiprocessor even that out
PROGRAMS = 512


@triton.jit
def tile_of(grad_scores, local, row, column, blocks, N: tl.constexpr):
    """Tile [N keys, N queries in reverse] of dS, which is [heads of the chunk, query blocks, key blocks, N, N]."""
    n = tl.arange(0, N)
    tile = (local.to(tl.int64) * blocks + row) * blocks + column
    return grad_scores + tile * (N * N) + n[:, None] * N + n[None, :]


@triton.jit(do_not_specialize=COUNTERS)
def delta_kernel(out, grad_out, delta, heads, padded, D: tl.constexpr, N: tl.constexpr):
    """delta_i = out_i . grad_out_i, the softmax's share of every gradient of row i."""
    head = tl.program_id(1)
    rows, d = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, D)
    present = rows[:, None] < padded
    at = rows[:, None] * heads * D + d[None, :]
    outs = tl.load(head_of(out, head, heads, padded, 1, D) + at, mask=present, other=0.0)
    grads = tl.load(head_of(grad_out, head, heads, padded, 1, D) + at, mask=present, other=0.0)
    tl.store(delta + head.to(tl.int64) * padded + rows, tl.sum(outs.to(tl.float32) * grads, 1), mask=rows < padded)


@triton.jit(do_not_specialize=COUNTERS)
def score_gradient_kernel(
    qkv, grad_out, table, lengths, seed, logsumexp, delta, grad_scores, grad_qkv,
    first_head, heads, padded, reach, stream, scale, threshold, multiplier,
    D: tl.constexpr, N: tl.constexpr, DROPOUT: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One block of keys along the queries: the gradient of v, and dS.

    Tiles are [keys, queries], so that weights are the left operand of their product, as tensor cores leave them.
    """
    start, local, blocks = tl.program_id(0) * N, tl.program_id(1), tl.num_programs(0)
    head = first_head + local
    length = tl.load(lengths + head // heads).to(tl.int32)
    n, d = tl.arange(0, N), tl.arange(0, D)
    columns = start + n
    INPUT: tl.constexpr = qkv.dtype.element_ty
    SCORE: tl.constexpr = tl.float16 if INPUT.primitive_bitwidth == 16 else tl.float32
    q, note = head_of(qkv, head, heads, padded, 3, D) + d[None, :], 3 * heads * D
    k = q + heads * D + columns[:, None] * note
    grad_out = head_of(grad_out, head, heads, padded, 1, D) + d[None, :]
    logsumexp += head.to(tl.int64) * padded
    delta += head.to(tl.int64) * padded
    grad_scores = tile_of(grad_scores, local, 0, tl.program_id(0), blocks, N)
    keys = tl.load(k, mask=columns[:, None] < length, other=0.0)
    values = tl.load(k + heads * D, mask=columns[:, None] < length, other=0.0)
    seed = tl.load(seed)
    y = reach - N + start  # the table row of logit (0, 0) where the queries begin; it falls as they go on
    key_b = tl.dot(keys, table_rows(table, y + N, reach, N, D).T, input_precision="ieee").to(SCORE)
    total = tl.zeros((N, D), tl.float32)
    for row in range(0, tl.where(start < length, length, 0), N):
        rows = row + N - 1 - n
        present = rows < length
        queries = tl.load(q + rows[:, None] * note, mask=present[:, None], other=0.0)
        table_a = table_rows(table, y - row, reach, N, D)
        table_b = table_rows(table, y - row + N, reach, N, D)
        query_a = tl.dot(queries, table_a.T, input_precision="ieee").to(SCORE)
        query_b = tl.dot(queries, table_b.T, input_precision="ieee").to(SCORE)
        key_a = tl.dot(keys, table_a.T, input_precision="ieee").to(SCORE)
        positions = tl.trans(rotate(query_a, query_b, BACK=False, PTX=PTX)) + rotate(key_a, key_b, BACK=False, PTX=PTX)
        key_b = key_a
        logits = tl.dot(keys, queries.T, positions.to(tl.float32), input_precision="ieee") * scale
        # rows beyond the sequence: exp2(-inf)
        weights = tl.exp2(logits - tl.load(logsumexp + rows, mask=present, other=float("inf"))[None, :])
        if DROPOUT:
            weights = drop(weights, seed, row, start, stream, head, threshold, True, PTX)
        grads = tl.load(grad_out + rows[:, None] * heads * D, mask=present[:, None], other=0.0)
        kept = tl.maximum(weights, 0.0) if DROPOUT else weights
        total = tl.dot(kept.to(INPUT), grads, total, input_precision="ieee")
        grad_weights = tl.dot(values, grads.T, input_precision="ieee")
        if DROPOUT:
            grad_weights = tl.where(weights > 0, grad_weights * multiplier, 0.0)
        # dropped weights are negative: a mask beside them would cost registers
        grad_logits = tl.abs(weights) * (grad_weights - tl.load(delta + rows, mask=present, other=0.0)[None, :])
        grad_logits = tl.where(columns[:, None] < length, grad_logits, 0.0).to(INPUT)
        tl.store(grad_scores + row * blocks * N, grad_logits)
    total = tl.where(columns[:, None] < length, total * multiplier, 0.0)
    grad_v = head_of(grad_qkv, head, heads, padded, 3, D) + 2 * heads * D + columns[:, None] * note + d[None, :]
    tl.store(grad_v, total.to(INPUT), mask=columns[:, None] < padded)


@triton.jit(do_not_specialize=COUNTERS)
def input_gradient_kernel(
    qkv, table, lengths, grad_scores, grad_qkv, first_head, heads, padded, reach, scale,
    D: tl.constexpr, N: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    head = first_head + tl.program_id(1)
    if tl.program_id(2) == 0:
        input_gradient(qkv, table, lengths, grad_scores, grad_qkv, head, heads, padded, reach, scale, D, N, PTX, False)
    else:
        input_gradient(qkv, table, lengths, grad_scores, grad_qkv, head, heads, padded, reach, scale, D, N, PTX, True)


@triton.jit
def input_gradient(
    qkv, table, lengths, grad_scores, grad_qkv, head, heads, padded, reach, scale,
    D: tl.constexpr, N: tl.constexpr, PTX: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One block of grad_q = scale dS (k + R), or with KEYS of grad_k = scale dS^T (q + R).

    A block of queries stands in reverse and takes the keys in order; one of keys takes the queries last first: either
    way the table rows ascend, and this tile with the one before, unskewed, belongs to N whole rows of the table.
    """
    block, local, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    length = tl.load(lengths + head // heads).to(tl.int32)
    n, d = tl.arange(0, N), tl.arange(0, D)
    rows = block * N + (n if KEYS else N - 1 - n)
    note = 3 * heads * D
    other = head_of(qkv, head, heads, padded, 3, D) + (0 if KEYS else heads * D) + d[None, :]
    count = tl.where(block * N < length, tl.cdiv(length, N), 0)
    y = reach + (block - count) * N if KEYS else reach - N - block * N
    # a tile that was loaded is multiplied by one: a product has the layout that the rotation wants
    one = tl.where(n[:, None] == n[None, :], 1.0, 0.0).to(qkv.dtype.element_ty)
    previous = tl.zeros((N, N), one.dtype)
    total = tl.zeros((N, D), tl.float32)
    for step in range(0, count):
        if KEYS:
            grads = tl.load(tile_of(grad_scores, local, count - 1 - step, block, blocks, N))
            others = (count - step) * N - 1 - n
        else:
            grads = tl.trans(tl.load(tile_of(grad_scores, local, block, step, blocks, N)))
            others = step * N + n
        grads = tl.dot(one, grads, input_precision="ieee").to(one.dtype)
        vectors = tl.load(other + others[:, None] * note, mask=others[:, None] < length, other=0.0)
        total = tl.dot(grads, vectors, total, input_precision="ieee")
        distances = table_rows(table, y + step * N, reach, N, D)
        total = tl.dot(rotate(previous, grads, BACK=True, PTX=PTX), distances, total, input_precision="ieee")
        previous = grads
    distances = table_rows(table, y + count * N, reach, N, D)
    nothing = tl.zeros((N, N), one.dtype)
    total = tl.dot(rotate(previous, nothing, BACK=True, PTX=PTX), distances, total, input_precision="ieee")
    out = head_of(grad_qkv, head, heads, padded, 3, D) + (heads * D if KEYS else 0) + rows[:, None] * note + d[None, :]
    tl.store(out, (total * scale).to(one.dtype), mask=rows[:, None] < padded)


@triton.jit(do_not_specialize=COUNTERS)
def table_gradient_kernel(
    qkv, lengths, grad_scores, partial, first_head, heads, chunk, blocks, padded, reach, scale,
    D: tl.constexpr, N: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The gradient of the 2 N table rows of one diagonal of tiles, from every splits-th head of the chunk.

    partial [splits, 2, N + 2P-1 + N, D]: a diagonal's first N rows and its last, which are also its neighbour's first,
    are kept apart, so that one program owns each element.
    """
    diagonal, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    shift = (diagonal + 1) // 2 * (1 - diagonal % 2 * 2)  # key block less query block: 0, -1, 1, ... longest first
    # the sum is transposed, [D, N], and has a tile's rows at least: with fewer Triton lays out products otherwise
    W: tl.constexpr = D if D > N else N
    n, d = tl.arange(0, N), tl.arange(0, W)
    count = blocks - tl.abs(shift)
    INPUT: tl.constexpr = qkv.dtype.element_ty
    one = tl.where(n[:, None] == n[None, :], 1.0, 0.0).to(INPUT)
    nothing = tl.zeros((N, N), INPUT)
    grad_a = tl.zeros((W, N), tl.float32)
    grad_b = tl.zeros((W, N), tl.float32)
    for step in range(0, tl.cdiv(chunk - split, splits) * count):
        local = split + step // count * splits
        head = first_head + local
        row = tl.maximum(0, -shift) + step % count
        column = row + shift
        length = tl.load(lengths + head // heads).to(tl.int32)
        rows, columns = row * N + N - 1 - n, column * N + n
        written = columns[:, None] < tl.where(row * N < length, length, 0)
        grads = tl.load(tile_of(grad_scores, local, row, column, blocks, N), mask=written, other=0.0)
        note = 3 * heads * D
        # head_of, multiplied in another order: 15 registers less here, but 16 bytes of stack in score_gradient
        q = qkv + (head // heads).to(tl.int64) * (padded * note) + head % heads * D + d[None, :]
        queries = tl.load(q + rows[:, None] * note, mask=(rows[:, None] < length) & (d[None, :] < D), other=0.0).T
        k = q + heads * D + columns[:, None] * note
        keys = tl.load(k, mask=(columns[:, None] < length) & (d[None, :] < D), other=0.0).T
        by_query = tl.dot(one, tl.trans(grads), input_precision="ieee").to(INPUT)
        grad_a = tl.dot(queries, rotate(nothing, by_query, BACK=True, PTX=PTX), grad_a, input_precision="ieee")
        grad_b = tl.dot(queries, rotate(by_query, nothing, BACK=True, PTX=PTX), grad_b, input_precision="ieee")
        by_key = tl.dot(one, grads, input_precision="ieee").to(INPUT)
        grad_a = tl.dot(keys, rotate(nothing, by_key, BACK=True, PTX=PTX), grad_a, input_precision="ieee")
        grad_b = tl.dot(keys, rotate(by_key, nothing, BACK=True, PTX=PTX), grad_b, input_precision="ieee")
    for half in tl.static_range(2):
        place = reach - 2 + (2 - half - shift) * N  # of the first row of grad, in the order of the table
        at = partial + (split * 2 + half) * (2 * reach - 1 + 2 * N) * D + place * D - n[None, :] * D + d[:, None]
        grad = (grad_b if half else grad_a) * scale
        tl.store(at, grad + tl.load(at, mask=d[:, None] < D, other=0.0), mask=d[:, None] < D)


class TritonAttention(torch.autograd.Function):
    """qkv [B, L, 3, H, D], table [2P-1, D], lengths [B], seed [1], dropout, stream -> [B, L, H, D]

    Kept for backward, beside inputs and output: the log2-sum-exp2 [B, H, L] of the logits of valid rows.
    """

    @staticmethod
    def forward(ctx, qkv, distance, lengths, seed, dropout, stream):
        qkv, table = qkv.contiguous(), distance.to(qkv.dtype).contiguous()
        batch, padded, _, heads, width = qkv.shape
        out = qkv.new_empty(batch, padded, heads, width)
        logsumexp = qkv.new_empty(batch, heads, padded, dtype=torch.float32)
        chances, options = settings(qkv, dropout)
        attend_kernel[(triton.cdiv(padded, options["N"]), batch * heads)](
            qkv, table, lengths, seed, out, logsumexp, heads, padded, (len(table) + 1) // 2, stream,
            LOG2E / math.sqrt(width), **chances, **options,
        )  # fmt: skip
        ctx.save_for_backward(qkv, table, lengths, seed, out, logsumexp)
        ctx.dropout, ctx.stream = dropout, stream
        return out

    @staticmethod
    def backward(ctx, grad_out):
        qkv, table, lengths, seed, out, logsumexp = ctx.saved_tensors
        batch, padded, _, heads, width = qkv.shape
        reach, scale = (len(table) + 1) // 2, 1 / math.sqrt(width)
        chances, options = settings(qkv, ctx.dropout)
        size = options["N"]
        blocks = triton.cdiv(padded, size)
        grad_out, grad_qkv, delta = grad_out.contiguous(), torch.empty_like(qkv), torch.empty_like(logsumexp)
        delta_kernel[(blocks, batch * heads)](out, grad_out, delta, heads, padded, D=width, N=size)
        chunk = max(1, min(batch * heads, SCRATCH // ((blocks * size) ** 2 * qkv.element_size())))
        grad_scores = qkv.new_empty(chunk, blocks, blocks, size, size)
        splits = max(1, min(chunk, PROGRAMS // (2 * blocks - 1)))
        partial = qkv.new_zeros(splits, 2, len(table) + 2 * size, width, dtype=torch.float32)
        for first in range(0, batch * heads, chunk):
            count = min(chunk, batch * heads - first)
            score_gradient_kernel[(blocks, count)](
                qkv, grad_out, table, lengths, seed, logsumexp, delta, grad_scores, grad_qkv,
                first, heads, padded, reach, ctx.stream, scale * LOG2E, **chances, **options,
            )  # fmt: skip
            input_gradient_kernel[(blocks, count, 2)](
                qkv, table, lengths, grad_scores, grad_qkv, first, heads, padded, reach, scale, **options
            )
            table_gradient_kernel[(2 * blocks - 1, splits)](
                qkv, lengths, grad_scores, partial, first, heads, count, blocks, padded, reach, scale, **options
            )
        return grad_qkv, partial.sum((0, 1))[size:-size], None, None, None, None
