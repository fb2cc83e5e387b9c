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

from . import attention_backward, attention_forward, philox
from .attention_cpu import banded_attention, skew
from .attention_launch import empty_heads
from .dispatch import resolve

WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    The Triton kernels take D = 16, 32, 64 or 128, float32, bfloat16 or float16, compute in q's dtype, and draw dropout
    by position: `seed` may be a tensor of one int64 on the device. Raises ValueError where L > P, or for any other D or
    dtype there.
    """
    if 2 * q.shape[2] - 1 > distance.shape[0]:
        raise ValueError(
            f"sequence of {q.shape[2]} notes, but the distance table reaches {(distance.shape[0] + 1) // 2}"
        )
    choice = resolve(q, implementation)
    if choice == "triton":
        if q.shape[3] not in WIDTHS or q.dtype not in DTYPES:
            raise ValueError(f"no attention kernel for {q.dtype} heads of width {q.shape[3]}")
        if lengths is None:
            lengths = torch.full(q.shape[:1], q.shape[2], dtype=torch.int32, device=q.device)
        if not isinstance(seed, Tensor):
            seed = torch.full((1,), seed, dtype=torch.int64, device=q.device)
        return _attention(q, k, v, distance, lengths, seed, dropout, stream)[0]
    if q.device.type == "cpu" and implementation is None:
        return banded_attention(q, k, v, distance, lengths, dropout, seed, stream)
    generator = philox.generator(seed, stream, q.device)
    keep = philox.dropout_mask((*q.shape[:3], q.shape[2]), dropout, generator, q) if dropout else None
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


@torch.library.custom_op("kernels::relative_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, distance: Tensor, lengths: Tensor, seed: Tensor, dropout: float, stream: int
) -> tuple[Tensor, Tensor]:
    q, k, v = _alike(q, k, v)
    table = distance.to(q.dtype).contiguous()
    return attention_forward.forward(q, k, v, table, lengths.to(torch.int32), seed, dropout, stream)


@torch.library.custom_op("kernels::relative_attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, distance: Tensor, lengths: Tensor, seed: Tensor,
    out: Tensor, logsumexp: Tensor, dropout: float, stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = _alike(q, k, v)
    table, lengths = distance.to(q.dtype).contiguous(), lengths.to(torch.int32)
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    grad_q, grad_k, grad_v, grad_distance = attention_backward.backward(
        grad_out, q, k, v, table, lengths, seed, out, logsumexp, dropout, stream
    )
    return grad_q, grad_k, grad_v, grad_distance.to(distance.dtype)


def _alike(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels take one set of strides for all three, 1 along D: views of one projection are taken as they are."""
    if q.stride() == k.stride() == v.stride() and q.stride(-1) == 1:
        return q, k, v
    return q.contiguous(), k.contiguous(), v.contiguous()


@_attention.register_fake
def _(q, k, v, distance, lengths, seed, dropout, stream):
    return empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_attention_backward.register_fake
def _(grad_out, q, k, v, distance, lengths, seed, out, logsumexp, dropout, stream):
    return empty_heads(q), empty_heads(q), empty_heads(q), torch.empty_like(distance)


def _setup_context(ctx, inputs, output):
    q, k, v, distance, lengths, seed, ctx.dropout, ctx.stream = inputs
    ctx.save_for_backward(q, k, v, distance, lengths, seed, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_out, _):
    grads = _attention_backward(grad_out, *ctx.saved_tensors, ctx.dropout, ctx.stream)
    return *grads, None, None, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)
