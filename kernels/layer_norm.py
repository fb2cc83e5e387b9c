"""Residual connection, dropout and LayerNorm in one pass (the post-LN Transformer's two joints per layer).

z = x + dropout(y),   out = (z - mean z) / sqrt(var z + eps) * weight + bias,   mean and var over the last axis, fp32
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import philox


def residual_layer_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-12,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    stream: int = 0,
    implementation: str | None = None,
) -> Tensor:
    """LayerNorm(x + dropout(y)) over the last axis: x, y [..., d]; weight, bias [d] -> [..., d] of x's dtype."""
    keep = philox.dropout_mask(y.shape, dropout, seed, stream, y) if dropout else None
    return residual_layer_norm_reference(x, y, weight, bias, eps, keep)


def residual_layer_norm_reference(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float, keep: Tensor | None = None
) -> Tensor:
    """The equation above; `keep` [..., d] holds dropout's multipliers (0 or 1/(1-p))."""
    z = x + (y if keep is None else y * keep)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return F.layer_norm(z, z.shape[-1:], weight.to(z.dtype), bias.to(z.dtype), eps).to(x.dtype)
