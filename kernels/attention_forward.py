"""Relative attention in Triton, forward; the equation is in attention.py, a walk through this file in docs/kernels.md.

A program takes N queries past all keys, N at a time. The queries of a tile stand in reverse, row m is query i0 + N-1-m,
so that logit (m, n) wants row y + m + n of the distance table read in reverse, for both of its position terms. The
queries and the keys meet the same two blocks of N table rows, and the next tile needs one new block.
"""

import math

import torch
from torch import Tensor

from .attention_rotation import drop, rotate
from .dispatch import tl, triton

LOG2E = math.log2(math.e)
# integers that differ between launches: a kernel is not compiled again for each
COUNTERS = ["first_head", "heads", "chunk", "stream", "threshold"]
# by `kind`: whether the rotation is in PTX, None where no kernel is right; attention_check.py enters its results
spellings: dict[tuple, bool | None] = {}


@triton.jit
def head_of(pointer, head, heads, padded, parts, D: tl.constexpr):
    """The first vector of a head in [B, L, parts, H, D]; the next note's is parts * heads * D further."""
    return pointer + ((head // heads).to(tl.int64) * padded * parts * heads + head % heads) * D


@triton.jit
def table_rows(table, first, reach, N: tl.constexpr, D: tl.constexpr):
    """N rows of the reversed table. Beyond its ends rows repeat: only notes beyond the sequence are so far apart."""
    at = tl.minimum(tl.maximum(2 * reach - 2 - first - tl.arange(0, N), 0), 2 * reach - 2)
    return tl.load(table + at[:, None] * D + tl.arange(0, D)[None, :])


@triton.jit(do_not_specialize=COUNTERS)
def attend_kernel(
    qkv, table, lengths, seed, out, logsumexp, heads, padded, reach, stream, scale, threshold, multiplier,
    D: tl.constexpr, N: tl.constexpr, DROPOUT: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One block of queries against all keys, softmax by running maximum; `scale` holds log2(e), for exp2."""
    start, head = tl.program_id(0) * N, tl.program_id(1)
    length = tl.load(lengths + head // heads).to(tl.int32)
    n, d = tl.arange(0, N), tl.arange(0, D)
    rows = start + N - 1 - n
    # position terms are rotated in 16 bits: float16 has three more of them than bfloat16 for the fraction, and ends at
    # 65,504; the largest in weights/small is 117
    SCORE: tl.constexpr = tl.float16 if qkv.dtype.element_ty.primitive_bitwidth == 16 else tl.float32
    q = head_of(qkv, head, heads, padded, 3, D) + d[None, :]
    k, v, note = q + heads * D, q + 2 * heads * D, 3 * heads * D
    queries = tl.load(q + rows[:, None] * note, mask=rows[:, None] < length, other=0.0)
    seed = tl.load(seed)
    y = reach - N - start  # the table row of logit (0, 0) where the keys begin
    query_a = tl.dot(queries, table_rows(table, y, reach, N, D).T, input_precision="ieee").to(SCORE)
    total = tl.zeros((N,), tl.float32)
    maximum = tl.full((N,), float("-inf"), tl.float32)
    mixed = tl.zeros((N, D), tl.float32)
    for column in range(0, tl.where(start < length, length, 0), N):
        columns = column + n
        present = columns[:, None] < length
        keys = tl.load(k + columns[:, None] * note, mask=present, other=0.0)
        table_a = table_rows(table, y + column, reach, N, D)
        table_b = table_rows(table, y + column + N, reach, N, D)
        key_a = tl.dot(keys, table_a.T, input_precision="ieee").to(SCORE)
        key_b = tl.dot(keys, table_b.T, input_precision="ieee").to(SCORE)
        query_b = tl.dot(queries, table_b.T, input_precision="ieee").to(SCORE)
        positions = tl.trans(rotate(key_a, key_b, BACK=False, PTX=PTX)) + rotate(query_a, query_b, BACK=False, PTX=PTX)
        query_a = query_b
        # the product is added to the positions, not they to it: the sum has the layout of a product from the start
        logits = tl.dot(queries, keys.T, positions.to(tl.float32), input_precision="ieee")
        logits = tl.where(columns[None, :] < length, logits, float("-inf"))
        raised = tl.maximum(maximum, tl.max(logits, 1))
        shrink = tl.exp2((maximum - raised) * scale)
        weights = tl.exp2(logits * scale - (raised * scale)[:, None])
        total = total * shrink + tl.sum(weights, 1)
        maximum = raised
        if DROPOUT:
            weights = drop(weights, seed, start, column, stream, head, threshold, False, PTX)
        values = tl.load(v + columns[:, None] * note, mask=present, other=0.0)
        mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None], input_precision="ieee")
    total = tl.where(rows < length, total, 1.0)
    mixed = tl.where(rows[:, None] < length, mixed * (multiplier / total)[:, None], 0.0)
    out = head_of(out, head, heads, padded, 1, D) + rows[:, None] * heads * D + d[None, :]
    tl.store(out, mixed.to(out.dtype.element_ty), mask=rows[:, None] < padded)
    logsumexp += head.to(tl.int64) * padded + rows
    tl.store(logsumexp, maximum * scale + tl.log2(total), mask=rows < padded)


def settings(qkv: Tensor, dropout: float) -> tuple[dict, dict]:
    """Of kernels with dropout the threshold of a 16-bit draw and the multiplier of what is kept; options of all."""
    chances = {"threshold": min(round(dropout * 2**16), 2**16 - 1), "multiplier": 1 / (1 - dropout)}
    width = qkv.shape[4]
    # a third stage keeps sm_80 and its kin from spilling; on sm_90 it would leave room for one program instead of two
    stages = 2 if capability(qkv)[0] in (9, 10) else 3 if width <= 64 else 1
    ptx = spellings.get(kind(qkv, dropout), ptx_fits(qkv))
    size = 16 if qkv.dtype == torch.float32 else 64
    return chances | {"DROPOUT": dropout > 0}, dict(D=width, N=size, PTX=ptx, num_warps=4, num_stages=stages)


def kind(qkv: Tensor, dropout: float) -> tuple:
    return qkv.device, qkv.dtype, qkv.shape[4], dropout > 0


def ptx_fits(qkv: Tensor) -> bool:
    """Whether Triton lays out products as the PTX wants: sm_90, and up to D = 64 sm_80, sm_86, sm_89, sm_120."""
    if qkv.dtype == torch.float32 or triton.knobs.runtime.interpret or torch.version.hip:
        return False
    major = capability(qkv)[0]
    return major == 9 or (major in (8, 12) and qkv.shape[4] <= 64)


def capability(x: Tensor) -> tuple[int, int]:
    """Of the device; on the CPU launches are only recorded, to be compiled for any."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)
