"""One pre-training step's loss: choose, corrupt, recover, and teach the masker (method, steps 1 to 6).

Where several processes train as one (amb/parallel.py), each calls this with its rows of the batch: means are over the
whole batch, losses and counts are this process's parts of their sums. `first_row` is where its rows begin.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from amb import parallel
from amb.config import Config
from amb.model import AdversarialMidiBert

# streams of the step's random numbers: the two encoder passes take 1 + 3 N each, so they are kept far apart
SAMPLING, MASKER_PASS, RECOVERER_PASS = 0, 1_000, 2_000


class Words(NamedTuple):
    """What the objective must know of an encoding: the MASK word [F] and each field's number of ordinary values [F]."""

    mask: Tensor
    values: Tensor


class StepLoss(NamedTuple):
    """`loss` to minimise (scalar), its parts (scalars, detached), hits per field [F] and the number of notes they are
    out of (0-d int64): of the selected notes, and of all that are not PAD."""

    loss: Tensor
    recovery: Tensor
    masker: Tensor
    correct_selected: Tensor
    correct_valid: Tensor
    selected: Tensor
    valid: Tensor


def pretrain_loss(
    model: AdversarialMidiBert,
    words: Tensor,
    lengths: Tensor,
    frozen: Tensor,
    encoding: Words,
    field_weights: Tensor,
    config: Config,
    seed: int | Tensor,
    first_row: int = 0,
) -> StepLoss:
    """L_mlm + L_masker on clean words [B, L, F] with lengths [B] and the mask book's rows frozen [B, ceil(L / 8)].

    With `objective="random"` there is no masker: every note is as likely to be hidden as any other.
    """
    if config.objective == "random":
        return random_loss(model, words, lengths, encoding, field_weights, config.mask_cap, seed, first_row)
    scores = model.masker(model.encoder(words, lengths, parallel.dropout_seed(seed), MASKER_PASS))
    sample = kernels.adversarial_sample(
        words, lengths, encoding.mask, encoding.values,
        scores=scores.detach(), frozen=frozen, rate=(config.mask_low, config.mask_high), cap=config.mask_cap,
        seed=seed, stream=SAMPLING, first_row=first_row,
    )  # fmt: skip
    counts = _counts(sample, lengths)
    recovered = _recover(model, words, lengths, sample, counts, field_weights, seed)
    masker = kernels.masker_loss(
        scores, recovered.note_loss, sample.selected, sample.changed, share=config.masker_share
    )
    return _collect(recovered, masker * (len(words) / counts[2]), sample, lengths)


def random_loss(
    model: AdversarialMidiBert,
    words: Tensor,
    lengths: Tensor,
    encoding: Words,
    field_weights: Tensor,
    share: float,
    seed: int | Tensor,
    first_row: int = 0,
) -> StepLoss:
    """L_mlm with floor(share * notes) random notes selected: BERT's objective, and every run's validation (step 8)."""
    sample = kernels.adversarial_sample(
        words, lengths, encoding.mask, encoding.values, rate=(share, share), cap=1.0,
        seed=seed, stream=SAMPLING, first_row=first_row,
    )  # fmt: skip
    recovered = _recover(model, words, lengths, sample, _counts(sample, lengths), field_weights, seed)
    return _collect(recovered, recovered.loss.new_zeros(()), sample, lengths)


def _counts(sample, lengths) -> Tensor:
    """How many notes are selected, how many valid and how many sequences there are in the whole batch: int64 [3]."""
    valid = lengths.sum()
    return parallel.add(torch.stack([sample.selected.sum(), valid, torch.full_like(valid, len(lengths))]))


def _recover(model, words, lengths, sample, counts, field_weights, seed) -> kernels.MaskedLM:
    hidden = model.encoder(sample.words, lengths, parallel.dropout_seed(seed), RECOVERER_PASS)
    out = model.recoverer.out
    return kernels.masked_lm(
        hidden, out.weight, out.bias, words, sample.selected, lengths, field_weights, model.recoverer.sizes,
        counts=counts[:2],
    )  # fmt: skip


def _collect(recovered, masker, sample, lengths) -> StepLoss:
    return StepLoss(
        loss=recovered.loss + masker,
        recovery=recovered.loss.detach(),
        masker=masker.detach(),
        correct_selected=recovered.correct_selected,
        correct_valid=recovered.correct_valid,
        selected=sample.selected.sum(),
        valid=lengths.sum(),
    )


def field_weights(correct: Tensor, counted: Tensor) -> Tensor:
    """w_f proportional to 1 / accuracy_f, summing to 1 (method, step 4): correct [F] hits out of `counted` notes.

    Accuracies below 5 % count as 5 %, so that a field nobody recovers yet does not take all the weight.
    """
    inverse = 1 / (correct / counted.clamp(min=1)).clamp(min=0.05)
    return inverse / inverse.sum()


def uniform_weights(fields: int) -> Tensor:
    """The weights before any accuracy is known."""
    return torch.full((fields,), 1 / fields)
