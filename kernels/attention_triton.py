"""Relative attention in Triton: the equations are in attention.py, a walk through this file in docs/kernels.md.

The skew is done in memory, by addresses alone. A wave of heads at a time, `position_scores` writes both position
products at the place of their logit, into two scratch squares per head: q_i . R[i-j+P-1] at [i, j] and k_j . R[i-j+P-1]
at [j, i]. The attention kernels read them as plain aligned tiles; the backward pass overwrites them with dS and its
transpose, and the gradients of q, k and R are products of those squares, read by the same addresses.

Rows STRIDE apart share a window of R. Row x = a + STRIDE m against column y = w + STRIDE m + n has the distance
x - y = a - w - n whatever m: a tile of such rows is a plain product with N consecutive rows of R, and its skew moves
row m by STRIDE m columns, a whole 16-byte vector. With STRIDE = 1 every load and store would be two bytes wide.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import philox

LOG2E = math.log2(math.e)
# integers that differ between launches of one step: a kernel is not compiled again for each
COUNTERS = ["first_head", "heads", "wave", "stream"]


class Tile(NamedTuple):
    """A program's block of M rows and N columns; `stride`: distance between its rows, where it skews."""

    m: int
    n: int
    warps: int = 4
    stages: int = 2
    stride: int = 1


def tiles(width: int, dtype: torch.dtype) -> dict[str, Tile]:
    """Shipped tiles by kernel, chosen by static figures (docs/kernels.md). M, N and `stride` are powers of two."""
    if dtype == torch.float32:
        small = Tile(32, 32)
        return dict.fromkeys(("attend", "score_gradient"), small) | dict.fromkeys(
            ("position_scores", "input_gradient", "table_gradient"), small._replace(stride=4)
        )
    return {
        "position_scores": Tile(64, 64, stages=3, stride=4),
        "attend": Tile(64, 64),
        "score_gradient": Tile(64, 64),
        "input_gradient": Tile(64, 64, stages=3, stride=4),
        "table_gradient": Tile(64, 64, stages=3, stride=4),
    }


# A wave's scratch is two squares a head: enough heads that every multiprocessor holds two programs of 64 rows
ROWS_PER_PROCESSOR = 128


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
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr, PRECISION: tl.constexpr,
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
        scores = tl.dot(vectors, table.T, input_precision=PRECISION)
        columns = window + STRIDE * m[:, None] + n[None, :]
        place = out + rows[:, None] * pitch + columns
        written = (rows[:, None] < length) & (columns >= 0) & (columns < pitch)
        tl.store(place, scores.to(out.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=COUNTERS)
def attend_kernel(
    q, k, v, query_scores, key_scores, lengths, seed, out, logsumexp,
    first_head, heads, padded, pitch, stream, stride_b, stride_h, stride_l, out_b, out_h, out_l, scale, multiplier,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
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
        logits = tl.dot(queries, keys.T, logits, input_precision=PRECISION) * scale
        logits = tl.where(columns[None, :] < length, logits, float("-inf"))
        raised = tl.maximum(maximum, tl.max(logits, 1))
        shrink = tl.exp2(maximum - raised)
        weights = tl.exp2(logits - raised[:, None])
        total = total * shrink + tl.sum(weights, 1)
        maximum = raised
        if THRESHOLD > 0:
            weights = tl.where(dropout_keep(key, rows, column // 4, stream, index, THRESHOLD, M, N), weights, 0.0)
        values = tl.load(v + columns[:, None] * stride_l, mask=present, other=0.0)
        mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None], input_precision=PRECISION)
    mixed = tl.where(rows[:, None] < length, mixed * (multiplier / total)[:, None], 0.0)
    tl.store(out, mixed.to(out.dtype.element_ty), mask=rows[:, None] < padded)
    tl.store(logsumexp + index.to(tl.int64) * padded + rows, maximum + tl.log2(total), mask=rows < padded)


@triton.jit(do_not_specialize=COUNTERS)
def delta_kernel(
    out, grad_out, delta, heads, padded, out_b, out_h, out_l, grad_b, grad_h, grad_l,
    D: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """delta_i = out_i . grad_out_i, the softmax's share of every gradient of row i."""
    head = tl.program_id(1)
    rows, d = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, D)
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
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
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
        logits = tl.dot(keys, queries.T, logits, input_precision=PRECISION) * scale
        logits -= tl.load(logsumexp + rows, mask=present, other=0.0)[None, :]
        valid = present[None, :] & (columns[:, None] < length)
        weights = tl.where(valid, tl.exp2(logits), 0.0)
        if THRESHOLD > 0:
            # a dropped weight is carried as a negative one: a mask of its own would cost registers
            keep = tl.trans(dropout_keep(key, rows, start // 4, stream, index, THRESHOLD, M, N))
            weights = tl.where(keep, weights, -weights)
        grads = tl.load(grad_out + rows[:, None] * grad_l, mask=present[:, None], other=0.0)
        kept = tl.maximum(weights, 0.0).to(grads.dtype)
        grad_values = tl.dot(kept, grads, grad_values, input_precision=PRECISION)
        grad_weights = tl.dot(values, grads.T, input_precision=PRECISION)
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
    PRECISION: tl.constexpr,
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
            total = tl.dot(grads, vectors, total, input_precision=PRECISION)
        for window in range(-STRIDE * M, length, N):
            columns = window + STRIDE * m[:, None] + n[None, :]
            grads = tl.load(tile + columns, mask=present & (columns >= 0) & (columns < written), other=0.0)
            at = reach - 1 + sign * (first - window - n)
            inside = (at >= 0) & (at < 2 * reach - 1)
            table = tl.load(distance + at[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
            total = tl.dot(grads, table, total, input_precision=PRECISION)
    tl.store(out, (total * scale).to(out.dtype.element_ty), mask=rows[:, None] < padded)


@triton.jit(do_not_specialize=COUNTERS)
def table_gradient_kernel(
    q, k, lengths, grad_scores, grad_transposed, partial,
    first_head, heads, wave, pitch, reach, stride_b, stride_h, stride_l, scale,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
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
        total = tl.dot(tl.trans(grads), vectors, total, input_precision=PRECISION)
    at = reach - 1 + sign * (phase - window - n)
    place = partial + ((side * STRIDE + phase) * (2 * reach - 1) + at[:, None]) * D + d[None, :]
    inside = (at[:, None] >= 0) & (at[:, None] < 2 * reach - 1)
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total * scale, mask=inside)


class Launch(NamedTuple):
    """What every kernel of one call shares."""

    heads: int
    total: int
    width: int
    reach: int
    padded: int
    pitch: int
    wave: int
    scale: float
    tiles: dict[str, Tile]
    precision: str

    def waves(self) -> range:
        return range(0, self.total, self.wave)


def plan(q: Tensor, distance: Tensor) -> Launch:
    batch, heads, padded, width = q.shape
    chosen = tiles(width, q.dtype)
    block = max(max(tile.m, tile.n) for tile in chosen.values())
    pitch = triton.cdiv(padded, block) * block
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 2
    wave = max(1, min(batch * heads, ROWS_PER_PROCESSOR * processors // pitch))
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    reach = (distance.shape[0] + 1) // 2
    return Launch(heads, batch * heads, width, reach, padded, pitch, wave, 1 / math.sqrt(width), chosen, precision)


def score_squares(q: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    """Scratch [wave, pitch, pitch] for either side's position scores."""
    dtype = torch.float32 if q.dtype == torch.float32 else torch.float16
    scratch = torch.empty(2, launch.wave, launch.pitch, launch.pitch, dtype=dtype, device=q.device)
    return scratch[0], scratch[1]


def position_scores(
    q: Tensor, k: Tensor, distance: Tensor, lengths: Tensor, squares: tuple[Tensor, Tensor], first: int, launch: Launch
) -> None:
    tile = launch.tiles["position_scores"]
    blocks = triton.cdiv(launch.padded, tile.m * tile.stride) * tile.stride
    position_scores_kernel[(blocks, min(launch.wave, launch.total - first), 2)](
        q, k, distance, lengths, *squares, first, launch.heads, launch.pitch, launch.reach, *q.stride()[:3],
        D=launch.width, M=tile.m, N=tile.n, STRIDE=tile.stride, PRECISION=launch.precision,
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
            D=launch.width, M=tile.m, N=tile.n, THRESHOLD=threshold(dropout), PRECISION=launch.precision,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, logsumexp


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
    delta_kernel[(triton.cdiv(launch.padded, 64), launch.total)](
        out, grad_out, delta, launch.heads, launch.padded, *out.stride()[:3], *grad_out.stride()[:3],
        D=launch.width, M=64,
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
            D=launch.width, M=scores.m, N=scores.n, THRESHOLD=threshold(dropout), PRECISION=launch.precision,
            num_warps=scores.warps, num_stages=scores.stages,
        )  # fmt: skip
        blocks = triton.cdiv(launch.padded, inputs.m * inputs.stride) * inputs.stride
        input_gradient_kernel[(blocks, wave, 2)](
            q, k, distance, lengths, *grad_squares, grad_q, grad_k,
            first, launch.heads, launch.padded, launch.pitch, launch.reach, *q.stride()[:3], *grad_q.stride()[:3],
            launch.scale,
            D=launch.width, M=inputs.m, N=inputs.n, STRIDE=inputs.stride, BLOCK=min(scores.m, scores.n),
            PRECISION=launch.precision, num_warps=inputs.warps, num_stages=inputs.stages,
        )  # fmt: skip
        table_gradient_kernel[(2 * launch.pitch // table.n, table.stride, 2)](
            q, k, lengths, *grad_squares, partial,
            first, launch.heads, wave, launch.pitch, launch.reach, *q.stride()[:3], launch.scale,
            D=launch.width, M=table.m, N=table.n, STRIDE=table.stride, BLOCK=min(scores.m, scores.n),
            PRECISION=launch.precision, num_warps=table.warps, num_stages=table.stages,
        )  # fmt: skip
    return grad_q, grad_k, grad_v, partial.sum((0, 1))


def empty_heads(q: Tensor) -> Tensor:
    """[B, H, L, D] laid out [B, L, H, D], as the next projection reads it."""
    batch, heads, length, width = q.shape
    return q.new_empty(batch, length, heads, width).transpose(1, 2)


def threshold(dropout: float) -> int:
    return philox.fixed_point(dropout)
