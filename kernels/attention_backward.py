"""The backward pass of relative attention in Triton, on the squares of `attention_forward.py`.

With P the probabilities, dP = dropout(grad_out V^T) and delta_i = out_i . grad_out_i,

    dS_ij = P_ij (dP_ij - delta_i),   dv_j = sum_i dropout(P)_ij grad_out_i
    dq_i = sum_j dS_ij (k_j + R[i-j+P-1]) / sqrt(D),   dk_j = sum_i dS_ij (q_i + R[i-j+P-1]) / sqrt(D)
    dR[r] = sum over i - j = r - P + 1 of dS_ij (q_i + k_j) / sqrt(D)

A wave of heads at a time: the scores again, dS over them and its transpose beside it, then plain products of the two.
No atomics: one program owns each element it adds to, so a seed gives the same bits every time.
"""

import torch
from torch import Tensor

from .attention_forward import dropout_keep, head_of, position_scores
from .attention_launch import COUNTERS, LOG2E, empty_heads, plan, score_squares, threshold
from .dispatch import tl, triton


@triton.jit(do_not_specialize=COUNTERS)
def delta_kernel(
    out, grad_out, delta, heads, padded, out_b, out_h, out_l, grad_b, grad_h, grad_l,
    D: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """delta_i = out_i . grad_out_i, the softmax's share of every gradient of row i."""
    head = tl.program_id(0)
    rows, d = tl.program_id(1) * M + tl.arange(0, M), tl.arange(0, D)
    present = rows[:, None] < padded
    out = head_of(out, head, heads, out_b, out_h) + rows[:, None] * out_l + d[None, :]
    grad_out = head_of(grad_out, head, heads, grad_b, grad_h) + rows[:, None] * grad_l + d[None, :]
    product = tl.load(out, mask=present, other=0.0).to(tl.float32) * tl.load(grad_out, mask=present, other=0.0)
    tl.store(delta + head.to(tl.int64) * padded + rows, tl.sum(product, 1), mask=rows < padded)


@triton.jit(do_not_specialize=COUNTERS)
def score_gradient_kernel(
    q, k, v, grad_out, query_scores, key_scores, grad_scores, grad_transposed, lengths, seed, logsumexp, delta, grad_v,
    first_head, heads, padded, pitch, stream, stride_b, stride_h, stride_l, grad_b, grad_h, grad_l, out_b, out_h, out_l,
    scale, multiplier,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """One block of keys against all queries: the gradient of v, and dS over the scores it was computed from.

    grad_scores and query_scores are the same memory, as are grad_transposed and key_scores: each element is read, then
    written, by one program, in one iteration.
    """
    start, head = tl.program_id(0) * N, tl.program_id(1)
    index = first_head + head
    length = tl.load(lengths + index // heads)
    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    columns = start + n
    grad_v = head_of(grad_v, index, heads, out_b, out_h) + columns[:, None] * out_l + d[None, :]
    if start >= length:
        tl.store(grad_v, tl.zeros((N, D), grad_v.dtype.element_ty), mask=columns[:, None] < padded)
        return
    q = head_of(q, index, heads, stride_b, stride_h) + d[None, :]
    grad_out = head_of(grad_out, index, heads, grad_b, grad_h) + d[None, :]
    k = head_of(k, index, heads, stride_b, stride_h) + columns[:, None] * stride_l + d[None, :]
    v = head_of(v, index, heads, stride_b, stride_h) + columns[:, None] * stride_l + d[None, :]
    square = head.to(tl.int64) * pitch * pitch
    query_scores += square
    key_scores += square
    grad_scores += square
    grad_transposed += square
    logsumexp += index.to(tl.int64) * padded
    delta += index.to(tl.int64) * padded
    keys = tl.load(k, mask=columns[:, None] < length, other=0.0)
    values = tl.load(v, mask=columns[:, None] < length, other=0.0)
    if THRESHOLD > 0:
        key = tl.load(seed)
    grad_values = tl.zeros((N, D), tl.float32)
    # tiles are transposed, [N, M]: weights are then the left operand of their product, as the tensor cores leave them
    for row in range(0, length, M):
        rows = row + m
        present = rows < length
        at = rows[:, None] * pitch + columns[None, :]
        at_transposed = columns[:, None] * pitch + rows[None, :]
        queries = tl.load(q + rows[:, None] * stride_l, mask=present[:, None], other=0.0)
        logits = tl.load(key_scores + at_transposed).to(tl.float32)
        logits += tl.trans(tl.load(query_scores + at))
        logits = tl.dot(keys, queries.T, logits, input_precision="ieee") * scale
        logits -= tl.load(logsumexp + rows, mask=present, other=0.0)[None, :]
        valid = present[None, :] & (columns[:, None] < length)
        weights = tl.where(valid, tl.exp2(logits), 0.0)
        if THRESHOLD > 0:
            # a dropped weight is carried as a negative one: a mask of its own would cost registers
            keep = tl.trans(dropout_keep(key, rows, start // 4, stream, index, THRESHOLD, M, N))
            weights = tl.where(keep, weights, -weights)
        grads = tl.load(grad_out + rows[:, None] * grad_l, mask=present[:, None], other=0.0)
        kept = tl.maximum(weights, 0.0).to(grads.dtype)
        grad_values = tl.dot(kept, grads, grad_values, input_precision="ieee")
        grad_weights = tl.dot(values, grads.T, input_precision="ieee")
        if THRESHOLD > 0:
            grad_weights = tl.where(weights > 0, grad_weights * multiplier, 0.0)
        grad_logits = tl.abs(weights) * (grad_weights - tl.load(delta + rows, mask=present, other=0.0)[None, :])
        grad_logits = grad_logits.to(grad_scores.dtype.element_ty)
        tl.store(grad_scores + at, tl.trans(grad_logits))
        tl.store(grad_transposed + at_transposed, grad_logits)
    tl.store(grad_v, (grad_values * multiplier).to(grad_v.dtype.element_ty), mask=columns[:, None] < padded)


@triton.jit(do_not_specialize=COUNTERS)
def input_gradient_kernel(
    q, k, distance, lengths, grad_scores, grad_transposed, grad_q, grad_k,
    first_head, heads, padded, pitch, reach, stride_b, stride_h, stride_l, out_b, out_h, out_l, scale,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Side 0: grad_q_i = scale sum_j dS_ij (k_j + R[i-j+P-1]); side 1: grad_k_j = scale sum_i dS_ij (q_i + R[i-j+P-1]).

    dS is written, zeros included, up to whole multiples of BLOCK notes.
    """
    block, head, side = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    index = first_head + head
    length = tl.load(lengths + index // heads)
    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    origin = block // STRIDE * (STRIDE * M)
    first = origin + block % STRIDE
    rows = first + STRIDE * m
    if side == 0:
        other, square, out, sign = k, grad_scores, grad_q, 1
    else:
        other, square, out, sign = q, grad_transposed, grad_k, -1
    out = head_of(out, index, heads, out_b, out_h) + rows[:, None] * out_l + d[None, :]
    total = tl.zeros((M, D), tl.float32)
    if origin < length:
        others = head_of(other, index, heads, stride_b, stride_h) + d[None, :]
        tile = square + head.to(tl.int64) * pitch * pitch + rows[:, None] * pitch
        written = tl.cdiv(length, BLOCK) * BLOCK
        present = rows[:, None] < length
        for column in range(0, length, N):
            columns = column + n
            grads = tl.load(tile + columns[None, :], mask=present & (columns[None, :] < written), other=0.0)
            vectors = tl.load(others + columns[:, None] * stride_l, mask=columns[:, None] < length, other=0.0)
            total = tl.dot(grads, vectors, total, input_precision="ieee")
        for window in range(-STRIDE * M, length, N):
            columns = window + STRIDE * m[:, None] + n[None, :]
            grads = tl.load(tile + columns, mask=present & (columns >= 0) & (columns < written), other=0.0)
            at = reach - 1 + sign * (first - window - n)
            inside = (at >= 0) & (at < 2 * reach - 1)
            table = tl.load(distance + at[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
            total = tl.dot(grads, table, total, input_precision="ieee")
    tl.store(out, (total * scale).to(out.dtype.element_ty), mask=rows[:, None] < padded)


@triton.jit(do_not_specialize=COUNTERS)
def table_gradient_kernel(
    q, k, lengths, grad_scores, grad_transposed, partial,
    first_head, heads, wave, pitch, reach, stride_b, stride_h, stride_l, scale,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """N rows of the table's gradient: from one side, the rows x of one class modulo STRIDE and one wave of heads.

    partial [2, STRIDE, 2P-1, D] keeps the sides and classes apart, so that one program owns each element.
    """
    window, phase, side = tl.program_id(0) * N - pitch, tl.program_id(1), tl.program_id(2)
    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    if side == 0:
        x, square, sign = q, grad_scores, 1
    else:
        x, square, sign = k, grad_transposed, -1
    total = tl.zeros((N, D), tl.float32)
    # columns lie in [0, pitch) only for these rows; a row is phase + STRIDE (step + m)
    first = tl.maximum(0, (-window - N + STRIDE) // STRIDE) // M * M
    last = tl.minimum(pitch, pitch - window) // STRIDE
    blocks = tl.maximum(0, tl.cdiv(last - first, M))
    for step in range(0, wave * blocks):
        head = step // blocks
        length = tl.load(lengths + (first_head + head) // heads)
        steps = first + step % blocks * M + m
        rows = phase + STRIDE * steps
        columns = window + STRIDE * steps[:, None] + n[None, :]
        written = tl.cdiv(length, BLOCK) * BLOCK
        present = rows[:, None] < length
        at = square + head.to(tl.int64) * pitch * pitch + rows[:, None] * pitch + columns
        grads = tl.load(at, mask=present & (columns >= 0) & (columns < written), other=0.0)
        vectors = head_of(x, first_head + head, heads, stride_b, stride_h) + rows[:, None] * stride_l + d[None, :]
        vectors = tl.load(vectors, mask=present, other=0.0)
        total = tl.dot(tl.trans(grads), vectors, total, input_precision="ieee")
    at = reach - 1 + sign * (phase - window - n)
    place = partial + ((side * STRIDE + phase) * (2 * reach - 1) + at[:, None]) * D + d[None, :]
    inside = (at[:, None] >= 0) & (at[:, None] < 2 * reach - 1)
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total * scale, mask=inside)


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, distance: Tensor, lengths: Tensor, seed: Tensor,
    out: Tensor, logsumexp: Tensor, dropout: float, stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, laid out [B, L, H, D], and of the table, in float32."""
    launch = plan(q, distance)
    grad_q, grad_k, grad_v = (empty_heads(q) for _ in range(3))
    squares = score_squares(q, launch)
    grad_squares = tuple(square.view(q.dtype) for square in squares)
    delta = torch.empty_like(logsumexp)
    rows = launch.tiles["delta"]
    delta_kernel[(launch.total, triton.cdiv(launch.padded, rows.m))](
        out, grad_out, delta, launch.heads, launch.padded, *out.stride()[:3], *grad_out.stride()[:3],
        D=launch.width, M=rows.m, num_warps=rows.warps, num_stages=rows.stages,
    )  # fmt: skip
    scores, inputs, table = (launch.tiles[name] for name in ("score_gradient", "input_gradient", "table_gradient"))
    partial = torch.zeros(2, table.stride, *distance.shape, dtype=torch.float32, device=q.device)
    for first in launch.waves():
        wave = min(launch.wave, launch.total - first)
        position_scores(q, k, distance, lengths, squares, first, launch)
        score_gradient_kernel[(triton.cdiv(launch.padded, scores.n), wave)](
            q, k, v, grad_out, *squares, *grad_squares, lengths, seed, logsumexp, delta, grad_v,
            first, launch.heads, launch.padded, launch.pitch, stream,
            *q.stride()[:3], *grad_out.stride()[:3], *grad_v.stride()[:3], launch.scale * LOG2E, 1 / (1 - dropout),
            D=launch.width, M=scores.m, N=scores.n, THRESHOLD=threshold(dropout),
            num_warps=scores.warps, num_stages=scores.stages,
        )  # fmt: skip
        blocks = triton.cdiv(launch.padded, inputs.m * inputs.stride) * inputs.stride
        input_gradient_kernel[(blocks, wave, 2)](
            q, k, distance, lengths, *grad_squares, grad_q, grad_k,
            first, launch.heads, launch.padded, launch.pitch, launch.reach, *q.stride()[:3], *grad_q.stride()[:3],
            launch.scale,
            D=launch.width, M=inputs.m, N=inputs.n, STRIDE=inputs.stride, BLOCK=min(scores.m, scores.n),
            num_warps=inputs.warps, num_stages=inputs.stages,
        )  # fmt: skip
        table_gradient_kernel[(2 * launch.pitch // table.n, table.stride, 2)](
            q, k, lengths, *grad_squares, partial,
            first, launch.heads, wave, launch.pitch, launch.reach, *q.stride()[:3], launch.scale,
            D=launch.width, M=table.m, N=table.n, STRIDE=table.stride, BLOCK=min(scores.m, scores.n),
            num_warps=table.warps, num_stages=table.stages,
        )  # fmt: skip
    return grad_q, grad_k, grad_v, partial.sum((0, 1))
