"""Relative attention in PyTorch: the reference, and the form of it that runs on a CPU. attention.py has the equation.

Both take q, k, v [B, H, L, D], distance [2P-1, D], lengths [B], and `keep` [B, H, L, L], dropout's multipliers (0 or
1/(1-p)), or None; both give [B, H, L, D]. With R's rows reversed, the skew of a row-major product is a strided view of
it: X[i, j-i+L-1] lies at i (2L-2) + j + (L-1). So nothing of size L x L x D is ever built.

The CPU's form takes some heads at a time, so that their L x L tiles stay in the cache. Its products with R go by blocks
of n rows: between n queries and L keys are L + n - 1 distances, between L and L 2L - 1. This saves nearly half of these
products, which are two thirds of all.
"""

import math
from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

TILES = 2**20  # logits at a time on a CPU: 16 heads at L = 256


def relative_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, distance: Tensor, lengths: Tensor, keep: Tensor | None = None
) -> Tensor:
    length, reach = q.shape[2], (distance.shape[0] + 1) // 2
    band = distance[reach - length : reach + length - 1].to(q.dtype)
    logits = q @ k.mT + skew(q @ band.flip(0).T) + skew(k @ band.T).mT
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / math.sqrt(q.shape[-1])
    valid = torch.arange(length, device=q.device) < lengths[:, None, None, None]
    weights = logits.masked_fill(~valid, -torch.inf).softmax(-1)
    if keep is not None:
        weights = weights * keep
    return (weights.to(v.dtype) @ v) * valid.mT


def skew(x: Tensor) -> Tensor:
    """View [..., n, L+n-1] (row-major) as [..., n, L] with out[i, j] = x[i, j-i+n-1]."""
    rows = x.shape[-2]
    row = x.stride(-2)
    shape = (*x.shape[:-1], x.shape[-1] - rows + 1)
    return x.as_strided(shape, (*x.stride()[:-2], row - 1, 1), x.storage_offset() + rows - 1)


def relative_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, distance: Tensor, lengths: Tensor, keep: Tensor | None = None
) -> Tensor:
    """`relative_attention_reference`, some heads of sequences of one length at a time."""
    batch, heads, length, width = q.shape
    counts = lengths.tolist()
    table = (distance / math.sqrt(width)).to(q.dtype)
    # a row more than there are distances: products with an even number of them are a fifth faster
    tables = [F.pad(rows, (0, 0, 0, 1)) for rows in (table.flip(0), table)]
    q, k, v, keep = (x if x is None else x.flatten(0, 1) for x in (q, k, v, keep))
    mixed = []
    for notes, run in groupby(range(batch * heads), lambda head: counts[head // heads]):
        run = list(run)
        step = max(2, TILES // notes**2)
        for first in range(run[0], run[-1] + 1, step):
            part = slice(first, min(first + step, run[-1] + 1)), slice(notes)
            kept = None if keep is None else keep[part][..., :notes]
            out = _Attention.apply(q[part], k[part], v[part], *tables, kept)
            mixed.append(F.pad(out, (0, 0, 0, length - notes)))
    return torch.cat(mixed).view(batch, heads, length, width)


class _Attention(torch.autograd.Function):
    """q, k, v [h, n, D], tables [2P, D] = R / sqrt(D), for queries reversed, keep [h, n, n] or None -> [h, n, D].

    By hand, because autograd would keep two more tiles a head: dropout is multiplied again in backward.
    """

    @staticmethod
    def forward(ctx, q, k, v, query_table, key_table, keep):
        logits = q.new_empty(*q.shape[:2], q.shape[1])
        # transposing is copying, never part of a sum: a sum that reads by columns takes several times as long
        for rows, distances in _blocks(k, key_table):
            logits[:, :, rows] = skew(k[:, rows] @ key_table[distances].T)[..., :-1].mT
        for rows, distances in _blocks(q, query_table):
            logits[:, rows] += skew(q[:, rows] @ query_table[distances].T)[..., :-1]
        weights = logits.baddbmm_(q, k.mT, alpha=1 / math.sqrt(q.shape[2])).softmax(-1)
        ctx.save_for_backward(q, k, v, query_table, key_table, keep, weights)
        return (weights if keep is None else torch.mul(weights, keep, out=logits)) @ v

    @staticmethod
    def backward(ctx, grad):
        q, k, v, query_table, key_table, keep, weights = ctx.saved_tensors
        scale = 1 / math.sqrt(q.shape[2])
        grad_v = (weights if keep is None else weights * keep).mT @ grad
        grad = grad @ v.mT if keep is None else (grad @ v.mT).mul_(keep)
        grad = torch._softmax_backward_data(grad, weights, -1, weights.dtype)
        # 16 numbers between the rows: at a power of two apart, a column's numbers share a few lines of the cache
        by_key = F.pad(grad, (0, 16))[..., :-16].mT
        grad_q, grad_query_table = _bands_backward(grad, q, query_table, (grad @ k).mul_(scale))
        grad_k, grad_key_table = _bands_backward(by_key, k, key_table, (by_key @ q).mul_(scale))
        return grad_q, grad_k, grad_v, grad_query_table, grad_key_table, None


def _bands_backward(grad: Tensor, x: Tensor, table: Tensor, grad_x: Tensor) -> tuple[Tensor, Tensor]:
    """`grad_x` with the gradient of x [h, n, D] added, and the table's, for grad [h, n, n] of the skewed products."""
    grad_table = torch.zeros_like(table, dtype=torch.promote_types(table.dtype, torch.float32))
    for rows, distances in _blocks(x, table):
        band = grad.new_zeros(len(x), rows.stop - rows.start, distances.stop - distances.start)
        skew(band)[..., :-1].copy_(grad[:, rows])
        grad_x[:, rows] += band @ table[distances]
        grad_table[distances] += band.flatten(0, 1).T @ x[:, rows].flatten(0, 1)
    return grad_x, grad_table.to(table.dtype)


def _blocks(x: Tensor, table: Tensor) -> Iterator[tuple[slice, slice]]:
    """Blocks of rows of x [h, n, D], and the rows of the table [2P, D] at the distances from these to all others, and
    one more."""
    notes, reach = x.shape[1], len(table) // 2
    size = notes if notes <= 128 else min(max(notes // 4, 64), 128)
    for first in range(0, notes, size):
        end = min(first + size, notes)
        yield slice(first, end), slice(reach - end, reach + notes - first)
