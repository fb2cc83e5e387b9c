"""Relative attention on the CPU: some heads at a time, so that their L x L tiles stay in cache, with a hand-written
backward that reuses the forward's probabilities and writes the skewed gradients through strided views.

The products with the distance table go by blocks of rows: n queries (or keys) and L keys (queries) are L + n - 1
distances apart, where L and L are 2L - 1. That saves nearly half of these products, which are two thirds of all.
Tiles that are read by columns have a margin between their rows: at a power of two apart, all rows would share the same
few lines of the cache, and a transposed copy takes five times as long. Transposing is copying, never part of a sum: in
bf16 a sum that reads by columns takes four times as long as both. What dropout drops, it marks by the sign.

Same function as `attention.relative_attention_reference`, which tests hold it to; the equations are there.
"""

import math
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import philox

TILES = 2**20  # logits at a time: 16 heads at L = 256
LEAST, MOST = 64, 128  # rows of a block: a quarter of the sequence, within these
MARGIN = 16  # numbers between the rows of a tile that is read by columns


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


def blocks(length: int, reach: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of rows, and the table's rows for them: as keys, whose columns are all queries; reversed, as queries.

    These are distances from 1 - end to length - 1 - first, and one more: products with an even number are faster.
    """
    size = length if length <= MOST else min(max(length // 4, LEAST), MOST)
    for first in range(0, length, size):
        end = min(first + size, length)
        yield slice(first, end), slice(reach - end, reach + length - first)


class Part(NamedTuple):
    """What goes together: some sequences of `notes` notes with all their heads, or one with some of its heads."""

    sequences: slice
    heads: slice
    notes: int

    def size(self, margin: int) -> int:
        """How many numbers a tile takes."""
        heads = (self.sequences.stop - self.sequences.start) * (self.heads.stop - self.heads.start)
        return heads * self.notes * (self.notes + margin)

    def tile(self, room: Tensor, margin: int = 0) -> Tensor:
        """[h, n, n] in `room`, with `margin` numbers between its rows."""
        return room[: self.size(margin)].view(-1, self.notes, self.notes + margin)[..., : self.notes]

    def of(self, x: Tensor) -> Tensor:
        """x [B, H, L, D] -> [h, n, D]."""
        return x[self.sequences, self.heads, : self.notes].flatten(0, 1)

    def to(self, x: Tensor, value: Tensor) -> None:
        """The other way: value [h, n, D] into x [B, H, L, D]."""
        target = x[self.sequences, self.heads, : self.notes]
        target.copy_(value.view(target.shape))


def parts(counts: list[int], heads: int) -> Iterator[Part]:
    """As many neighbours of one length, or heads of one sequence, as have `TILES` logits between them; two at least."""
    first = 0
    for notes, run in groupby(counts):
        end = first + len(list(run))
        most = max(2, TILES // notes**2)
        sequences = max(1, most // heads)
        for b in range(first, end, sequences):
            for h in range(0, heads, most):
                yield Part(slice(b, min(b + sequences, end)), slice(h, min(h + most, heads)), notes)
        first = end


class _BandedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, distance, counts, dropout, generator):
        scale = 1 / math.sqrt(q.shape[-1])
        out = torch.zeros_like(q)
        table, reversed_table = _tables(distance * scale, q.dtype)
        ctx.parts = list(parts(counts, q.shape[1]))
        ctx.dropout, ctx.probabilities = dropout, []  # of each part; negative where they are dropped
        rooms = _rooms(ctx.parts, q)
        for part in ctx.parts:
            qb, kb, vb = map(part.of, (q, k, v))
            logits, by_key = part.tile(rooms[0]), part.tile(rooms[1], MARGIN)
            for rows, band in _bands(kb, table):
                by_key[:, rows] = band
            logits.copy_(by_key.mT)
            for rows, band in _bands(qb, reversed_table):
                logits[:, rows] += band
            logits.baddbmm_(qb, kb.mT, alpha=scale)
            p = logits.softmax(-1)  # computed in fp32 at least
            kept = philox.keep(logits, dropout, generator).mul_(p) if dropout else p
            part.to(out, kept @ (vb / (1 - dropout)))
            if any(ctx.needs_input_grad):
                ctx.probabilities.append(p.neg_().add_(kept, alpha=2) if dropout else p)
        ctx.save_for_backward(q, k, v, distance, out)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, distance, out = ctx.saved_tensors
        scale = 1 / math.sqrt(q.shape[-1])
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        table, reversed_table = _tables(distance, q.dtype)
        grad_table, grad_reversed = (torch.zeros_like(table, dtype=distance.dtype) for _ in range(2))
        rooms, zeros = _rooms(ctx.parts, q), {}
        for part, p in zip(ctx.parts, ctx.probabilities, strict=True):
            qb, kb, vb, gb, ob = map(part.of, (q, k, v, grad_out, out))
            room, ds = (part.tile(room, MARGIN) for room in rooms)
            sums = (gb * ob).sum(-1, keepdim=True)
            gb = gb / (1 - ctx.dropout)
            kept = torch.clamp_min(p, 0, out=room)
            part.to(grad_v, kept.mT @ gb)
            torch.bmm(gb * scale, vb.mT, out=ds).mul_(kept)
            ds.addcmul_(torch.abs(p, out=room), sums, value=-scale)
            part.to(grad_q, ds @ kb + _bands_backward(ds, qb, reversed_table, grad_reversed, zeros))
            by_key = room.copy_(ds.mT)
            part.to(grad_k, by_key @ qb + _bands_backward(by_key, kb, table, grad_table, zeros))
        grad_distance = grad_table[:-1] + grad_reversed[:-1].flip(0)
        return grad_q, grad_k, grad_v, grad_distance, None, None, None


def _tables(distance: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The distance table for keys and, reversed, for queries, each with the row too many that `blocks` reads."""
    return tuple(F.pad(rows.to(dtype), (0, 0, 0, 1)) for rows in (distance, distance.flip(0)))


def _bands(x: Tensor, table: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """x [h, n, D] times the distance table, for blocks of rows of x: [h, rows, n], a column for each other note."""
    for rows, distances in blocks(x.shape[1], len(table) // 2):
        yield rows, skew(x[:, rows] @ table[distances].T)[..., :-1]


def _bands_backward(ds: Tensor, x: Tensor, table: Tensor, grad_table: Tensor, zeros: dict) -> Tensor:
    """The gradient of x [h, n, D] from that of its bands, ds [h, n, n]; that of the table is added to `grad_table`.

    `zeros` is memory of `_unskew`.
    """
    grad = torch.empty_like(x)
    for rows, distances in blocks(x.shape[1], len(table) // 2):
        band = _unskew(ds[:, rows], zeros)
        grad[:, rows] = band @ table[distances]
        grad_table[distances] += band.flatten(0, 1).T @ x[:, rows].flatten(0, 1)
    return grad


def _rooms(parts: list[Part], like: Tensor) -> list[Tensor]:
    """Memory for two tiles of any part, used again for each: what is fresh has to be mapped in first."""
    size = max((part.size(MARGIN) for part in parts), default=0)
    return [like.new_empty(size) for _ in range(2)]


def _unskew(x: Tensor, zeros: dict[torch.Size, Tensor]) -> Tensor:
    """The transpose of what `_bands` does to its products: [h, n, L] along the diagonals of zeros [h, n, L+n].

    The zeros stay: the next x of the same shape goes where this one is, in the same memory, which `zeros` keeps.
    """
    if x.shape not in zeros:
        heads, rows, length = x.shape
        zeros[x.shape] = x.new_zeros(heads, rows, length + rows)
    skew(zeros[x.shape])[..., :-1].copy_(x)
    return zeros[x.shape]
