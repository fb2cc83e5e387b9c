"""The recoverer's output layers and loss: F linear layers and their cross-entropies, weighted (method, step 4).

c_f(note)  = -log softmax(W_f h + b_f)[true value]
L_mlm      = sum_f w_f (mean of c_f over the selected notes + mean of c_f over all notes that are not PAD)
note loss  = sum_f w_f c_f          (what the masker's target is made from; no gradient)
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class MaskedLM(NamedTuple):
    """`loss` scalar; `note_loss` [B, L] fp32, 0 at PAD; `correct_selected`, `correct_valid` [F] int64 hits."""

    loss: Tensor
    note_loss: Tensor
    correct_selected: Tensor
    correct_valid: Tensor


def masked_lm(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    words: Tensor,
    selected: Tensor,
    lengths: Tensor,
    field_weights: Tensor,
    sizes: tuple[int, ...],
    *,
    implementation: str | None = None,
) -> MaskedLM:
    """Weighted recovery loss of all fields.

    hidden [B, L, d]; weight [sum V_f, d] and bias [sum V_f], the F output layers stacked in field order with `sizes`
    (V_0 ... V_{F-1}); words [B, L, F] the true words; selected [B, L] bool; lengths [B] notes per sequence;
    field_weights [F], summing to 1. Gradients flow from `loss` to hidden, weight and bias.
    """
    return masked_lm_reference(hidden, weight, bias, words, selected, lengths, field_weights, sizes)


def masked_lm_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    words: Tensor,
    selected: Tensor,
    lengths: Tensor,
    field_weights: Tensor,
    sizes: tuple[int, ...],
) -> MaskedLM:
    """The equations above, as PyTorch says them."""
    valid = torch.arange(words.shape[1], device=words.device) < lengths[:, None]
    logits = F.linear(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    costs, hits = [], []
    for field, scores in enumerate(logits.split(sizes, dim=-1)):
        target = words[..., field]
        costs.append(F.cross_entropy(scores.transpose(1, 2), target, reduction="none"))
        hits.append(scores.detach().argmax(-1) == target)
    cost, hit = torch.stack(costs, -1), torch.stack(hits, -1)
    of_selected = (cost * selected[..., None]).sum((0, 1)) / selected.sum().clamp(min=1)
    of_valid = (cost * valid[..., None]).sum((0, 1)) / valid.sum().clamp(min=1)
    note_loss = (cost.detach() * field_weights).sum(-1) * valid
    return MaskedLM(
        loss=(field_weights * (of_selected + of_valid)).sum(),
        note_loss=note_loss,
        correct_selected=(hit & selected[..., None]).sum((0, 1)),
        correct_valid=(hit & valid[..., None]).sum((0, 1)),
    )
