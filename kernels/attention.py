"""Attention with query- and key-side relative positions (Hugging Face's `relative_key_query`; Huang et al. 2020, M4).

    S_ij = (q_i . k_j + q_i . R[i-j+P-1] + k_j . R[i-j+P-1]) / sqrt(D),   keys j >= length excluded
    P    = dropout(softmax_j S),   out_i = sum_j P_ij v_j

R is one distance table of 2P-1 rows per layer, shared by all heads. Its rows enter as products Q R^T and K R^T of
L x (2L-1); the logit wants column i-j+P-1 of row i, a *skew*. With R's rows reversed, the skew of a row-major product
is again a strided view of it: X[i, j-i+L-1] lies at i (2L-2) + j + (L-1). So nothing of size L x L x D is ever built.
"""

import math

import torch
from torch import Tensor

from kernels import philox
from kernels.attention_cpu import banded_attention
from kernels.dispatch import resolve


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distance: Tensor,
    lengths: Tensor | None = None,
    *,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    stream: int = 0,
    implementation: str | None = None,
) -> Tensor:
    """Attend within each sequence's valid notes.

    q, k, v [B, H, L, D]; distance [2P-1, D] with L <= P, row P-1 meaning i = j; lengths [B] valid keys per sequence
    (None: all L; at least 1 each) -> [B, H, L, D], 0 in the rows at or beyond a sequence's length.
    Raises ValueError where L > P.
    """
    if 2 * q.shape[2] - 1 > distance.shape[0]:
        raise ValueError(
            f"sequence of {q.shape[2]} notes, but the distance table reaches {(distance.shape[0] + 1) // 2}"
        )
    resolve(q, implementation)
    if q.device.type == "cpu" and implementation is None:
        return banded_attention(q, k, v, distance, lengths, dropout, seed, stream)
    keep = philox.dropout_mask((*q.shape[:3], q.shape[2]), dropout, seed, stream, q) if dropout else None
    return relative_attention_reference(q, k, v, distance, lengths, keep)


def relative_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, distance: Tensor, lengths: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """The equation above; `keep` [B, H, L, L] holds dropout's multipliers (0 or 1/(1-p))."""
    length, reach = q.shape[2], (distance.shape[0] + 1) // 2
    band = distance[reach - length : reach + length - 1]
    logits = q @ k.mT + skew(q @ band.flip(0).T) + skew(k @ band.T).mT
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / math.sqrt(q.shape[-1])
    if lengths is None:
        lengths = torch.full(q.shape[:1], length, device=q.device)
    valid = torch.arange(length, device=q.device) < lengths[:, None, None, None]
    weights = logits.masked_fill(~valid, -torch.inf).softmax(-1)
    if keep is not None:
        weights = weights * keep
    return (weights.to(v.dtype) @ v) * valid.mT


def skew(x: Tensor) -> Tensor:
    """View [..., L, 2L-1] (row-major) as [..., L, L] with out[i, j] = x[i, j-i+L-1]."""
    length = x.shape[-2]
    row = x.stride(-2)
    return x.as_strided((*x.shape[:-1], length), (*x.stride()[:-2], row - 1, 1), x.storage_offset() + length - 1)
