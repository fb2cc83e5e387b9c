"""The masker's target and loss (method, step 5).

Among a sequence's changed notes, with m = min(floor(share * k), changed // 2) and k the number selected:

    target 1 for the m notes with the highest recovery loss, 0 for the m with the lowest,
    L_masker = mean over the sequences of ( mean over the first m of (s - 1)^2 + mean over the last m of s^2 )

`changed // 2` only matters for a handful of notes: without it the two groups would overlap.
"""

import torch
from torch import Tensor

from kernels.sampling import top_k


def masker_loss(
    scores: Tensor,
    note_loss: Tensor,
    selected: Tensor,
    changed: Tensor,
    *,
    share: float = 0.3,
    implementation: str | None = None,
) -> Tensor:
    """Scalar loss of the masker: scores [B, L] in (0, 1); note_loss [B, L]; selected, changed [B, L] bool.

    Gradients flow to the scores only. Ties go to the earlier note in either group.
    """
    return masker_loss_reference(scores, note_loss, selected, changed, share)


def masker_loss_reference(scores: Tensor, note_loss: Tensor, selected: Tensor, changed: Tensor, share: float) -> Tensor:
    """The equation above in tensors over the whole batch."""
    k, available = selected.sum(1, keepdim=True), changed.sum(1, keepdim=True)
    # a product in float32 could fall just below a whole number: share in thousandths keeps the floor exact
    m = torch.minimum(k * round(share * 1000) // 1000, available // 2)
    hardest = top_k(note_loss, changed, m)
    easiest = top_k(-note_loss, changed, m)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    error = hardest * (scores - 1) ** 2 + easiest * scores**2
    return (error.sum(1) / m[:, 0].clamp(min=1)).mean()
