"""Adversarial sampling: which notes to hide, and how (method, steps 1 to 3).

Per sequence, with s' the masker's score where a note is unfrozen and not PAD:

    rho ~ U(rate),   k = min(floor(rho * eligible), floor(cap * L)),   selected = the k notes with the highest s'
    of the selected: 80 % -> MASK in all fields, 10 % -> a random valid value per field, 10 % stay

Without scores every eligible note gets a random one, which is plain random masking. All draws are Philox
counters (row, note), compared as 32-bit integers: a seed gives the same notes on every device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import philox


class Sample(NamedTuple):
    """`words` [B, L, F] corrupted; `selected` [B, L] bool; `changed` [B, L] bool, the 80 + 10 % among the selected."""

    words: Tensor
    selected: Tensor
    changed: Tensor


def adversarial_sample(
    words: Tensor,
    lengths: Tensor,
    mask_word: Tensor,
    values: Tensor,
    *,
    scores: Tensor | None = None,
    frozen: Tensor | None = None,
    rate: tuple[float, float] = (0.1, 0.3),
    cap: float = 0.15,
    masked: float = 0.8,
    replaced: float = 0.1,
    seed: int | Tensor = 0,
    stream: int = 0,
    implementation: str | None = None,
) -> Sample:
    """Select notes, corrupt them, and say which.

    words [B, L, F] integers; lengths [B]; mask_word [F]; values [F], the number of ordinary values of each field
    (random replacements are drawn below it); scores [B, L] in [0, 1] or None for random masking; frozen uint8
    [B, ceil(L / 8)], one bit a note, lowest bit first, or None. Ties go to the earlier note.
    """
    return adversarial_sample_reference(
        words, lengths, mask_word, values, scores, frozen, rate, cap, masked, replaced, seed, stream
    )


def adversarial_sample_reference(
    words: Tensor,
    lengths: Tensor,
    mask_word: Tensor,
    values: Tensor,
    scores: Tensor | None,
    frozen: Tensor | None,
    rate: tuple[float, float],
    cap: float,
    masked: float,
    replaced: float,
    seed: int | Tensor,
    stream: int,
) -> Sample:
    """The method above in tensors over the whole batch: no loop over notes or sequences."""
    batch, length, fields = words.shape
    row = torch.arange(batch, device=words.device)[:, None]
    note = torch.arange(length, device=words.device)[None, :]
    action, order, _, _ = philox.philox(seed, note, row, stream, 0)
    share = philox.philox(seed, 0, row, stream, 1)[0]

    eligible = note < lengths[:, None]
    if frozen is not None:
        eligible &= ~unpack_bits(frozen, length)
    k = draw_count(share, eligible.sum(1, keepdim=True), rate).clamp(max=int(cap * length))
    selected = top_k(order.double() if scores is None else scores, eligible, k)

    to_mask = selected & (action < philox.fixed_point(masked))
    changed = selected & (action < philox.fixed_point(masked + replaced))
    groups = [philox.philox(seed, note, row, stream, 2 + group) for group in range((fields + 3) // 4)]
    draws = torch.stack([draw for group in groups for draw in group][:fields], -1)
    random_words = ((draws * values) >> 32).to(words.dtype)
    corrupted = torch.where(changed[..., None], random_words, words)
    return Sample(torch.where(to_mask[..., None], mask_word.to(words.dtype), corrupted), selected, changed)


def draw_count(draw: Tensor, eligible: Tensor, rate: tuple[float, float]) -> Tensor:
    """floor(rho * eligible) with rho ~ U(rate), in 32-bit fixed point: `draw` holds Philox words."""
    low, high = (philox.fixed_point(r) for r in rate)
    rho = low + ((draw * (high - low)) >> 32)
    return (rho * eligible) >> 32


def top_k(scores: Tensor, eligible: Tensor, k: Tensor) -> Tensor:
    """Mark the k[b] highest-scoring eligible notes of each row: scores, eligible [B, L], k [B, 1] -> bool [B, L].

    Ties go to the earlier note; never more than the eligible.
    """
    ranked = scores.detach().masked_fill(~eligible, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = ranked.argsort(dim=1)
    return (rank < k) & eligible


def unpack_bits(bits: Tensor, length: int) -> Tensor:
    """uint8 [B, ceil(length / 8)], lowest bit first -> bool [B, length]."""
    return ((bits[..., None] >> torch.arange(8, device=bits.device)) & 1).flatten(1)[:, :length].bool()
