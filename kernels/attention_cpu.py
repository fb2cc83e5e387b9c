"""Relative attention on the CPU: one sequence at a time, so that its L x L tiles stay in cache, with a hand-written
backward that reuses the forward's probabilities and writes the skewed gradients through strided views.

Same function as `attention.relative_attention_reference`, which tests hold it to; the equations are there.
"""

import math

import torch
from torch import Tensor

from kernels import philox


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
    """View [..., L, 2L-1] (row-major) as [..., L, L] with out[i, j] = x[i, j-i+L-1]."""
    length = x.shape[-2]
    row = x.stride(-2)
    return x.as_strided((*x.shape[:-1], length), (*x.stride()[:-2], row - 1, 1), x.storage_offset() + length - 1)


class _BandedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, distance, counts, dropout, generator):
        reach, scale = (distance.shape[0] + 1) // 2, 1 / math.sqrt(q.shape[-1])
        out = torch.zeros_like(q)
        scaled = (distance * scale).to(q.dtype)
        probabilities, keeps = [], []
        for b, n in enumerate(counts):
            band = scaled[reach - n : reach + n - 1]
            from_query, from_key = q[b, :, :n] @ band.flip(0).T, k[b, :, :n] @ band.T
            logits = torch.baddbmm(skew(from_query), q[b, :, :n], k[b, :, :n].mT, alpha=scale)
            logits += skew(from_key).mT
            p = logits.float().softmax(-1).to(q.dtype) if q.dtype != torch.float64 else logits.softmax(-1)
            keep = None
            if dropout:
                keep = philox.dropout_mask(p.shape, dropout, generator, p)
            out[b, :, :n] = (p if keep is None else p * keep) @ v[b, :, :n]
            probabilities.append(p)
            keeps.append(keep)
        ctx.save_for_backward(q, k, v, distance, out)
        ctx.counts, ctx.probabilities, ctx.keeps = counts, probabilities, keeps
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, distance, out = ctx.saved_tensors
        heads, length, width = q.shape[1:]
        reach, scale = (distance.shape[0] + 1) // 2, 1 / math.sqrt(width)
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grad_distance = torch.zeros_like(distance)
        table = distance.to(q.dtype)
        for b, n in enumerate(ctx.counts):
            qb, kb, vb, gb = q[b, :, :n], k[b, :, :n], v[b, :, :n], grad_out[b, :, :n]
            p, keep = ctx.probabilities[b], ctx.keeps[b]
            grad_v[b, :, :n] = (p if keep is None else p * keep).mT @ gb
            ds = gb @ vb.mT
            if keep is not None:
                ds *= keep
            ds.sub_((gb * out[b, :, :n]).sum(-1, keepdim=True)).mul_(p).mul_(scale)
            # the skew's transpose: write dS along the diagonals of a zero band, then plain products
            rows = slice(reach - n, reach + n - 1)
            band = table[rows]
            unskewed = ds.new_zeros(heads, n, 2 * n - 1)
            skew(unskewed).copy_(ds)
            grad_q[b, :, :n] = ds @ kb + unskewed @ band.flip(0)
            grad_distance[rows] += (unskewed.flatten(0, 1).T @ qb.flatten(0, 1)).flip(0)
            skew(unskewed).copy_(ds.mT)
            grad_k[b, :, :n] = ds.mT @ qb + unskewed @ band
            grad_distance[rows] += unskewed.flatten(0, 1).T @ kb.flatten(0, 1)
        return grad_q, grad_k, grad_v, grad_distance, None, None, None
