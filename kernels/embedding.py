"""Compound-word embedding: F table rows summed per note, bias, LayerNorm and dropout in one pass.

The paper concatenates F embeddings of size e, scales them by sqrt(e) and projects the result to d. The projection of a
concatenation is the sum of its parts' projections, so each field's table is projected once per step (V_f x e by e x d)
and a note is the sum of F rows of size d: the same function, at a cost that does not grow with the number of notes.

    z = bias + sum_f table[offset_f + word_f],   out = dropout(LayerNorm(z))
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import philox


def compound_embedding(
    words: Tensor,
    table: Tensor,
    offsets: Tensor,
    bias: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-12,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    stream: int = 0,
    implementation: str | None = None,
) -> Tensor:
    """Embed compound words.

    words [B, L, F] integers, word f in [0, V_f); table [sum V_f, d], field f's rows from `offsets[f]` on; bias [d]
    (projection bias + token type); weight, norm_bias [d] of the LayerNorm -> [B, L, d] of the table's dtype.
    """
    keep = philox.dropout_mask((*words.shape[:2], table.shape[1]), dropout, seed, stream, table) if dropout else None
    return compound_embedding_reference(words, table, offsets, bias, weight, norm_bias, eps, keep)


def compound_embedding_reference(
    words: Tensor,
    table: Tensor,
    offsets: Tensor,
    bias: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    keep: Tensor | None = None,
) -> Tensor:
    """The equation above; `keep` [B, L, d] holds dropout's multipliers (0 or 1/(1-p))."""
    rows = (words + offsets).flatten(0, 1)
    z = F.embedding_bag(rows, table, mode="sum").unflatten(0, words.shape[:2]) + bias.to(table.dtype)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    out = F.layer_norm(z, z.shape[-1:], weight.to(z.dtype), norm_bias.to(z.dtype), eps).to(table.dtype)
    return out if keep is None else out * keep
