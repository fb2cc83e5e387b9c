"""One pre-training step's loss: choose, corrupt, recover, and teach the masker (method, steps 1 to 6).

Read `pretrain_loss` first. Several processes, or micro-batches, each compute a part of a batch: `Part` says which, and
`in_parts`, below, cuts a batch into them. The whole batch is one part.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from amb import kernels, parallel, tokenizer
from amb.config import Config
from amb.model import AdversarialMidiBert

# streams of the step's random numbers: the two encoder passes take 1 + 3 N each, so they are kept far apart
SAMPLING, MASKER_PASS, RECOVERER_PASS = 0, 1_000, 2_000


class Vocabulary(NamedTuple):
    """The MASK word [F] and each field's number of ordinary values [F], on the device."""

    mask: Tensor
    values: Tensor

    @classmethod
    def of(cls, encoding: tokenizer.Encoding, device: torch.device) -> "Vocabulary":
        return cls(*(torch.tensor(np.int64(row), device=device) for row in (encoding.mask, encoding.values)))


class StepLoss(NamedTuple):
    """Scalars `loss`, to minimise, and its parts `recovery` and `masker`, detached; hits per field, int64 [F], among
    the `selected` notes and among all `valid` (not PAD) ones, and how many notes these are, 0-d int64."""

    loss: Tensor
    recovery: Tensor
    masker: Tensor
    correct_selected: Tensor
    correct_valid: Tensor
    selected: Tensor
    valid: Tensor


class Part(NamedTuple):
    """Rows of a batch: the number of the first; and of the whole batch, if the part is not all of it, int64 [3]: the
    notes that will be selected, those that are not PAD, the sequences."""

    first_row: int = 0
    counts: Tensor | None = None


WHOLE = Part()


def pretrain_loss(
    model: AdversarialMidiBert,
    words: Tensor,
    lengths: Tensor,
    frozen: Tensor | None,
    vocabulary: Vocabulary,
    field_weights: Tensor,
    config: Config,
    seed: int | Tensor,
    part: Part = WHOLE,
) -> StepLoss:
    """L_mlm + L_masker of clean words [B, L, F], lengths [B], and the mask book's rows `frozen` [B, ceil(L / 8)].

    With the objective "random", BERT's, notes are selected at random: there is no masker, and nothing is frozen.
    """
    adversarial, table = config.objective == "adversarial", model.encoder.table()
    # 1. the masker scores every note of the clean input
    if adversarial:
        scores = model.masker(model.encoder(words, lengths, dropout_seed(seed, part), MASKER_PASS, table))
    # 2. and 3. choose the notes with the highest scores that are not frozen, and corrupt them
    sample = kernels.adversarial_sample(
        words, lengths, *vocabulary, scores=scores.detach() if adversarial else None,
        frozen=frozen if adversarial else None, **rates(config), seed=seed, stream=SAMPLING, first_row=part.first_row,
    )  # fmt: skip
    # 4. recover them
    hidden = model.encoder(sample.words, lengths, dropout_seed(seed, part), RECOVERER_PASS, table)
    out = model.recoverer.out
    recovered = kernels.masked_lm(
        hidden, out.weight, out.bias, words, sample.selected, lengths, field_weights, model.recoverer.sizes,
        counts=None if part.counts is None else part.counts[:2],
    )  # fmt: skip
    # 5. teach the masker which of its notes were hard to recover
    masker = recovered.loss.new_zeros(())
    if adversarial:
        masker = masker_loss(scores, recovered.note_loss, sample.selected, sample.changed, config.masker_share)
    if part.counts is not None:
        masker = masker * (len(words) / part.counts[2])
    # 6. minimise both
    return StepLoss(
        loss=recovered.loss + masker,
        recovery=recovered.loss.detach(),
        masker=masker.detach(),
        correct_selected=recovered.correct_selected,
        correct_valid=recovered.correct_valid,
        selected=sample.selected.sum(),
        valid=lengths.sum(),
    )


def rates(config: Config) -> dict:
    """How many of a sequence's n unfrozen notes are selected.

    Adversarial: floor(rho n), rho ~ U(mask_low, mask_high), at most mask_cap L (step 2). Random: floor(mask_cap n).
    """
    if config.objective == "random":
        return {"rate": (config.mask_cap, config.mask_cap), "cap": 1.0}
    return {"rate": (config.mask_low, config.mask_high), "cap": config.mask_cap}


def masker_loss(scores: Tensor, note_loss: Tensor, selected: Tensor, changed: Tensor, share: float) -> Tensor:
    """The masker's squared error (step 5): scores [B, L] in (0, 1), note_loss [B, L], selected and changed bool [B, L].

    Of a sequence's changed notes the m with the highest recovery loss have the target 1, the m with the lowest 0;
    m = floor(share k) for k selected notes, at most half of the changed ones, so that the groups do not overlap.
    The mean over each group, summed, averaged over the sequences. Gradients flow to the scores.
    """
    # share in thousandths: rounded, the product could fall just below a whole number
    m = selected.sum(1, keepdim=True) * round(share * 1000) // 1000
    m = torch.minimum(m, changed.sum(1, keepdim=True) // 2)
    hardest, easiest = kernels.top_k(torch.stack([note_loss, -note_loss]), changed, m)
    error = (hardest | easiest) * (scores - hardest.float()) ** 2
    return (error.sum(1) / m[:, 0].clamp(min=1)).sum() / max(len(scores), 1)


def field_weights(correct: Tensor, counted: Tensor) -> Tensor:
    """w_f proportional to 1 / accuracy_f, summing to 1 (method, step 4): correct [F] hits out of `counted` notes.

    Accuracies below 5 % count as 5 %, so that a field that is not recovered yet does not take all the weight.
    """
    inverse = 1 / (correct / counted.clamp(min=1)).clamp(min=0.05)
    return inverse / inverse.sum()


def uniform_weights(fields: int) -> Tensor:
    """The weights before any accuracy is known."""
    return torch.full((fields,), 1 / fields)


# A batch in parts: by several processes that train as one (amb/parallel.py), or one after the other to save memory.
# Means are over the whole batch, so that the parts' losses, gradients and hits add up. Only dropout depends on the cut.


def dropout_seed(seed: int | Tensor, part: Part) -> int | Tensor:
    """The seed of a part's dropout: another one for each part, or all parts would drop the same units."""
    return seed ^ (part.first_row * 0x9E3779B97F4A7C15 & (1 << 62) - 1) if part.first_row else seed


def in_parts(
    words: Tensor,
    lengths: Tensor,
    frozen: Tensor | None,
    config: Config,
    seed: int | Tensor,
    first_row: int,
    size: int | None = None,
) -> Iterator[tuple[slice, Part]]:
    """This process's rows, from the batch's `first_row` on, `size` rows at a time (None: all at once).

    A process that has no rows yields one empty part: all processes must take part in the sums.
    """
    if parallel.size == 1 and not size:
        yield slice(None), WHOLE
        return
    selected = kernels.selected_counts(
        lengths, frozen if config.objective == "adversarial" else None, words.shape[1], **rates(config),
        seed=seed, stream=SAMPLING, first_row=first_row,
    )  # fmt: skip
    valid = lengths.sum()
    counts = parallel.add(torch.stack([selected.sum(), valid, torch.full_like(valid, len(lengths))]))
    size = size or max(1, len(words))
    for start in range(0, max(1, len(words)), size):
        yield slice(start, start + size), Part(first_row + start, counts)


def add_up(parts: list[StepLoss]) -> StepLoss:
    """The parts of a batch as one, detached."""
    return StepLoss(*(torch.stack([value.detach() for value in column]).sum(0) for column in zip(*parts, strict=True)))
