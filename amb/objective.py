"""One pre-training step's loss: choose, corrupt, recover, and teach the masker (method, steps 1 to 6).

A batch may be computed in parts: by several processes that train as one (amb/parallel.py), or one after the other to
save memory. `Counts` of the whole batch come first, so that means are over the whole and the parts' losses and hits add
up; `first_row` is where a part begins. Only dropout depends on how a batch is cut.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from amb import kernels, parallel, tokenizer
from amb.config import Config
from amb.model import AdversarialMidiBert

# streams of the step's random numbers: the two encoder passes take 1 + 3 N each, so they are kept far apart
SAMPLING, MASKER_PASS, RECOVERER_PASS = 0, 1_000, 2_000


class Words(NamedTuple):
    """What the objective must know of an encoding: the MASK word [F] and each field's number of ordinary values [F]."""

    mask: Tensor
    values: Tensor

    @classmethod
    def of(cls, encoding: tokenizer.Encoding, device: torch.device) -> "Words":
        values = [field.values for field in encoding.fields]
        return cls(torch.from_numpy(encoding.mask.astype(np.int64)).to(device), torch.tensor(values, device=device))


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


class Counts(NamedTuple):
    """Of a whole batch, int64 0-d: how many notes will be selected, how many are not PAD, how many sequences."""

    selected: Tensor
    valid: Tensor
    sequences: Tensor


def adversarial_rates(config: Config) -> dict:
    """How many notes the adversarial objective selects: rho ~ U(low, high) of the unfrozen, at most cap L (step 2)."""
    return {"rate": (config.mask_low, config.mask_high), "cap": config.mask_cap}


def random_rates(config: Config) -> dict:
    """BERT's: floor(share * notes) of each sequence."""
    return {"rate": (config.mask_cap, config.mask_cap), "cap": 1.0}


def count(
    words: Tensor, lengths: Tensor, frozen: Tensor, config: Config, seed: int | Tensor, first_row: int = 0
) -> Counts:
    """What `pretrain_loss` needs to know of a whole batch to compute a part; arguments as there."""
    if config.objective == "random":
        return _count(words, lengths, None, random_rates(config), seed, first_row)
    return _count(words, lengths, frozen, adversarial_rates(config), seed, first_row)


def _count(words, lengths, frozen, rates, seed, first_row) -> Counts:
    selected = kernels.selected_counts(
        lengths, frozen, words.shape[1], **rates, seed=seed, stream=SAMPLING, first_row=first_row
    )
    valid = lengths.sum()
    return Counts(*parallel.add(torch.stack([selected.sum(), valid, torch.full_like(valid, len(lengths))])))


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
    counts: Counts | None = None,
) -> StepLoss:
    """L_mlm + L_masker on clean words [B, L, F] with lengths [B] and the mask book's rows frozen [B, ceil(L / 8)].

    With `objective="random"` there is no masker: every note is as likely to be hidden as any other. Without `counts`
    these rows, or the processes' shares together, are the whole batch.
    """
    if config.objective == "random":
        return random_loss(model, words, lengths, encoding, field_weights, config, seed, first_row, counts)
    counts = counts or _count(words, lengths, frozen, adversarial_rates(config), seed, first_row)
    scores = model.masker(model.encoder(words, lengths, part_seed(seed, first_row), MASKER_PASS))
    sample = kernels.adversarial_sample(
        words, lengths, encoding.mask, encoding.values, scores=scores.detach(), frozen=frozen,
        **adversarial_rates(config), seed=seed, stream=SAMPLING, first_row=first_row,
    )  # fmt: skip
    recovered = _recover(model, words, lengths, sample, counts, field_weights, part_seed(seed, first_row))
    masker = masker_loss(scores, recovered.note_loss, sample.selected, sample.changed, config.masker_share)
    return _collect(recovered, masker * (len(words) / counts.sequences), sample, lengths)


def masker_loss(scores: Tensor, note_loss: Tensor, selected: Tensor, changed: Tensor, share: float) -> Tensor:
    """Scalar loss of the masker (step 5): scores [B, L] in (0, 1); note_loss [B, L]; selected, changed [B, L] bool.

    Among a sequence's changed notes, with m = min(floor(share * selected), changed // 2): target 1 for the m notes with
    the highest recovery loss, 0 for the m with the lowest; ties go to the earlier note. The two groups' mean squared
    errors, summed; mean over the sequences, 0 where there are none.
    """
    k, available = selected.sum(1, keepdim=True), changed.sum(1, keepdim=True)
    # share in thousandths, or the product could fall just below a whole number; beyond half, the groups would meet
    m = torch.minimum(k * round(share * 1000) // 1000, available // 2)
    hardest = kernels.top_k(note_loss, changed, m)
    easiest = kernels.top_k(-note_loss, changed, m)
    error = hardest * (scores - 1) ** 2 + easiest * scores**2
    return (error.sum(1) / m[:, 0].clamp(min=1)).sum() / max(len(scores), 1)


def random_loss(
    model: AdversarialMidiBert,
    words: Tensor,
    lengths: Tensor,
    encoding: Words,
    field_weights: Tensor,
    config: Config,
    seed: int | Tensor,
    first_row: int = 0,
    counts: Counts | None = None,
) -> StepLoss:
    """L_mlm with random notes selected: BERT's objective, and every run's validation (step 8)."""
    counts = counts or _count(words, lengths, None, random_rates(config), seed, first_row)
    sample = kernels.adversarial_sample(
        words, lengths, encoding.mask, encoding.values, **random_rates(config),
        seed=seed, stream=SAMPLING, first_row=first_row,
    )  # fmt: skip
    recovered = _recover(model, words, lengths, sample, counts, field_weights, part_seed(seed, first_row))
    return _collect(recovered, recovered.loss.new_zeros(()), sample, lengths)


def part_seed(seed: int | Tensor, first_row: int) -> int | Tensor:
    """The seed of dropout in the part of a batch that begins at `first_row`, or all parts would drop alike."""
    return seed ^ (first_row * 0x9E3779B97F4A7C15 & (1 << 62) - 1) if first_row else seed


def _recover(model, words, lengths, sample, counts, field_weights, seed) -> kernels.MaskedLM:
    hidden = model.encoder(sample.words, lengths, seed, RECOVERER_PASS)
    out = model.recoverer.out
    return kernels.masked_lm(
        hidden, out.weight, out.bias, words, sample.selected, lengths, field_weights, model.recoverer.sizes,
        counts=torch.stack(counts[:2]),
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


def add_up(parts: list[StepLoss]) -> StepLoss:
    """The parts of a batch as one, detached."""
    return StepLoss(*(torch.stack([value.detach() for value in column]).sum(0) for column in zip(*parts, strict=True)))


def field_weights(correct: Tensor, counted: Tensor) -> Tensor:
    """w_f proportional to 1 / accuracy_f, summing to 1 (method, step 4): correct [F] hits out of `counted` notes.

    Accuracies below 5 % count as 5 %, so that a field nobody recovers yet does not take all the weight.
    """
    inverse = 1 / (correct / counted.clamp(min=1)).clamp(min=0.05)
    return inverse / inverse.sum()


def uniform_weights(fields: int) -> Tensor:
    """The weights before any accuracy is known."""
    return torch.full((fields,), 1 / fields)
