"""Relative attention on the CPU: some heads of one sequence at a time, so that their L x L tiles stay in cache, with a
hand-written backward that reuses the forward's probabilities and writes the skewed gradients through strided views.

The products with the distance table go by blocks of rows: n queries (or keys) and L keys (queries) are L + n - 1
distances apart, where L and L are 2L - 1. That saves nearly half of these products, which are two thirds of all.

Same function as `attention.relative_attention_reference`, which tests hold it to; the equations are there.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels import philox

TILES = 2**21  # logits at a time: two heads at L = 1,024, 32 at 256
LEAST, MOST = 64, 128  # rows of a block: a quarter of the sequence, within these


def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distance: Tensor,
    lengths: Tensor | None,
    dropout: float,
    seed: int | Tensor,
    stream: int,
) -> Tensor:
    """q, k, v [B, H, L, D], distance [2P-1, D], lengths [B] or None -> [B, H, L, D]; differentiable in all four."""
    counts = [q.shape[2]] * q.shape[0] if lengths is None else lengths.tolist()
    return _BandedAttention.apply(q, k, v, distance, counts, dropout, philox.generator(seed, stream, q.device))


def skew(x: Tensor) -> Tensor:
    """View [..., n, L+n-1] (row-major) as [..., n, L] with out[i, j] = x[i, j-i+n-1]."""
    rows = x.shape[-2]
    row = x.stride(-2)
    shape = (*x.shape[:-1], x.shape[-1] - rows + 1)
    return x.as_strided(shape, (*x.stride()[:-2], row - 1, 1), x.storage_offset() + rows - 1)


def blocks(length: int, reach: int) -> Iterator[tuple[slice, slice, slice]]:
    """Blocks of places, and the table's rows for them as queries (reversed) and as keys, of all `length` notes."""
    size = length if length <= MOST else min(max(length // 4, LEAST), MOST)
    for first in range(0, length, size):
        end = min(first + size, length)
        queries = slice(reach - 1 + first - (length - 1), reach - 1 + end)  # distances first-(L-1) to end-1
        keys = slice(reach - 1 - (end - 1), reach - 1 + length - first)  # distances 1-end to L-1-first
        yield slice(first, end), queries, keys


def groups(heads: int, length: int) -> Iterator[slice]:
    """Heads that go together: as many as have `TILES` logits between them."""
    size = max(1, TILES // length**2)
    for first in range(0, heads, size):
        yield slice(first, min(first + size, heads))


class _BandedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, distance, counts, dropout, generator):
        reach, scale = (distance.shape[0] + 1) // 2, 1 / math.sqrt(q.shape[-1])
        out = torch.zeros_like(q)
        scaled = (distance * scale).to(q.dtype)
        ctx.parts = [(b, n, heads) for b, n in enumerate(counts) for heads in groups(q.shape[1], n)]
        ctx.dropout, ctx.probabilities = dropout, []  # of each part, and which of them are kept: None for all
        room = _room(ctx.parts, q)
        for b, n, heads in ctx.parts:
            qb, kb = q[b, heads, :n], k[b, heads, :n]
            logits = room[: len(qb) * n * n].view(-1, n, n)
            for rows, queries, _ in blocks(n, reach):
                from_query = skew(qb[:, rows] @ scaled[queries].flip(0).T)
                torch.baddbmm(from_query, qb[:, rows], kb.mT, alpha=scale, out=logits[:, rows])
            for rows, _, keys in blocks(n, reach):
                logits[:, :, rows] += skew(kb[:, rows] @ scaled[keys].T).mT
            p = logits.float().softmax(-1).to(q.dtype) if q.dtype != torch.float64 else logits.softmax(-1)
            keep = philox.kept(p.shape, dropout, generator, p.device) if dropout else None
            out[b, heads, :n] = _drop(p, keep, dropout, logits) @ v[b, heads, :n]
            if any(ctx.needs_input_grad):
                ctx.probabilities.append((p, keep))
        ctx.save_for_backward(q, k, v, distance, out)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, distance, out = ctx.saved_tensors
        reach, scale = (distance.shape[0] + 1) // 2, 1 / math.sqrt(q.shape[-1])
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grad_distance = torch.zeros_like(distance)
        table, bands = distance.to(q.dtype), {}
        rooms = [_room(ctx.parts, q) for _ in range(2)]
        for (b, n, heads), (p, keep) in zip(ctx.parts, ctx.probabilities, strict=True):
            qb, kb, vb, gb = (x[b, heads, :n] for x in (q, k, v, grad_out))
            ds, dropped = (room[: len(gb) * n * n].view(-1, n, n) for room in rooms)
            dropped = _drop(p, keep, ctx.dropout, dropped)
            grad_v[b, heads, :n] = dropped.mT @ gb
            gb = gb * scale
            torch.bmm(gb, vb.mT, out=ds).mul_(dropped)
            ds.addcmul_(p, (gb * out[b, heads, :n]).sum(-1, keepdim=True), value=-1)
            gq, gk = ds @ kb, ds.mT @ qb
            for rows, queries, keys in blocks(n, reach):
                band = _unskew(ds[:, rows], bands)
                gq[:, rows] += band @ table[queries].flip(0)
                grad_distance[queries] += (band.flatten(0, 1).T @ qb[:, rows].flatten(0, 1)).flip(0)
                band = _unskew(ds[:, :, rows].mT, bands)
                gk[:, rows] += band @ table[keys]
                grad_distance[keys] += band.flatten(0, 1).T @ kb[:, rows].flatten(0, 1)
            grad_q[b, heads, :n], grad_k[b, heads, :n] = gq, gk
        return grad_q, grad_k, grad_v, grad_distance, None, None, None


def _room(parts: list[tuple[int, int, slice]], like: Tensor) -> Tensor:
    """Memory for the logits of any one of the parts, used again for each: what is fresh has to be mapped in first."""
    return like.new_empty(max(((heads.stop - heads.start) * n * n for _, n, heads in parts), default=0))


def _drop(p: Tensor, keep: Tensor | None, dropout: float, out: Tensor) -> Tensor:
    """p [h, n, n] after dropout, in the memory of `out`; p itself where there is none."""
    return p if keep is None else torch.mul(p, out.copy_(keep), out=out).mul_(1 / (1 - dropout))


def _unskew(x: Tensor, bands: dict[torch.Size, Tensor]) -> Tensor:
    """The transpose of `skew`: [H, n, L] written along the diagonals of zeros [H, n, L+n-1].

    The zeros stay: the next x of the same shape goes where this one is, in the same memory, which `bands` keeps.
    """
    if x.shape not in bands:
        heads, rows, length = x.shape
        bands[x.shape] = x.new_zeros(heads, rows, length + rows - 1)
    skew(bands[x.shape]).copy_(x)
    return bands[x.shape]
