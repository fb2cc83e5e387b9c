"""The mask book: which notes of the training set are frozen, one bit a note (method, step 7).

A frozen note is one the masker keeps finding hopeless: it is not selected for masking any more, until it is unfrozen
by chance. The book is a uint8 tensor [sequences, ceil(L / 8)], lowest bit first, so that the memory it takes is an
eighth of a byte a note and `kernels.adversarial_sample` can read it as it is.
"""

import torch
from torch import Tensor

from amb.kernels import philox, top_k
from amb.kernels.sampling import draw_count, unpack_bits


def empty_book(sequences: int, notes: int) -> Tensor:
    """A book in which nothing is frozen: uint8 [sequences, ceil(notes / 8)]."""
    return torch.zeros(sequences, (notes + 7) // 8, dtype=torch.uint8)


def pack_bits(flags: Tensor) -> Tensor:
    """bool [B, L] -> uint8 [B, ceil(L / 8)], lowest bit first (the inverse of `kernels.sampling.unpack_bits`)."""
    padded = torch.nn.functional.pad(flags, (0, -flags.shape[1] % 8)).unflatten(1, (-1, 8))
    return (padded.to(torch.uint8) << torch.arange(8, device=flags.device)).sum(-1).to(torch.uint8)


def update(
    rows: Tensor,
    indices: Tensor,
    scores: Tensor,
    lengths: Tensor,
    *,
    rate: tuple[float, float],
    unfreeze: float,
    seed: int,
) -> Tensor:
    """Freeze what the masker finds most hopeless, then unfreeze by chance; return the new rows.

    rows uint8 [B, ceil(L / 8)]; indices [B], the rows' places in the book (they number the random draws, so that the
    result does not depend on how the book is cut into batches); scores [B, L] of the masker; lengths [B].
    Per sequence: freeze the floor(rho * unfrozen) highest-scoring unfrozen notes, rho ~ U(rate); then let each frozen
    note go with probability u ~ U(0, unfreeze).
    """
    length = scores.shape[1]
    sequence, note = indices[:, None], torch.arange(length, device=scores.device)
    share, release, _, _ = philox.philox(seed, 0, sequence, 0, 0)
    draw = philox.philox(seed, note, sequence, 1, 0)[0]
    frozen = unpack_bits(rows, length)
    unfrozen = ~frozen & (note < lengths[:, None])
    frozen |= top_k(scores, unfrozen, draw_count(share, unfrozen.sum(1, keepdim=True), rate))
    frozen &= draw >= (release * philox.fixed_point(unfreeze)) >> 32
    return pack_bits(frozen)


def frozen_count(book: Tensor) -> int:
    """How many notes are frozen."""
    return sum(int(((book >> bit) & 1).sum()) for bit in range(8))
