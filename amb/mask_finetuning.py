"""Mask fine-tuning (method, Fine-tuning step): the second idea of the paper.

Pre-training inputs hold MASK words; fine-tuning inputs normally do not. Hiding a share of the notes while fine-tuning
closes that gap, and the classifier then relies less on single notes. Evaluation hides none.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from amb import kernels, parallel
from amb.model import Classifier
from amb.objective import Part, dropout_seed
from amb.tasks import IGNORED

# streams of the step's random numbers; the encoder takes 1 + 3 N
HIDING, ENCODER = 0, 1_000


class TaskLoss(NamedTuple):
    """Scalars: the `loss` to minimise, how many labels count, and how many of these were hit, 0-d int64."""

    loss: Tensor
    hits: Tensor
    counted: Tensor


def hide_notes(
    words: Tensor, lengths: Tensor, mask_word: Tensor, share: float, seed: int, first_row: int = 0
) -> tuple[Tensor, Tensor]:
    """Put MASK, in all fields, in place of floor(share * notes) random notes of each sequence.

    words [B, L, F], lengths [B], mask_word [F] -> new words, and which notes are hidden, bool [B, L]. PAD never is.
    `first_row` is the first sequence's number in the whole batch: it numbers the draws.
    """
    sample = kernels.adversarial_sample(
        words, lengths, mask_word, mask_word, rate=(share, share), cap=1.0, masked=1.0, replaced=0.0,
        seed=seed, stream=HIDING, first_row=first_row,
    )  # fmt: skip
    return sample.words, sample.selected


def finetune_loss(
    model: Classifier,
    words: Tensor,
    lengths: Tensor,
    labels: Tensor,
    mask_word: Tensor,
    class_weights: Tensor | None,
    share: float,
    seed: int,
    first_row: int = 0,
) -> TaskLoss:
    """Cross-entropy with a share of the notes hidden.

    labels int64: [B, L] for note tasks, [B] for sequence tasks; IGNORED carries no loss, nor does a hidden note.
    class_weights [C] or None. Of several processes, each calls this with its rows of the batch, from `first_row` on;
    their losses add up.
    """
    if share:
        words, hidden = hide_notes(words, lengths, mask_word, share, seed, first_row)
        if labels.ndim == 2:
            labels = labels.masked_fill(hidden, IGNORED)
    logits = model(words, lengths, dropout_seed(seed, Part(first_row)), ENCODER)
    counted = labels != IGNORED
    weight = counted.float() if class_weights is None else counted * class_weights[labels.clamp(min=0)]
    each = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
    whole = parallel.add(weight.sum()).clamp(min=1e-6)  # a batch may have no label at all
    hits = ((logits.argmax(dim=-1) == labels) & counted).sum()
    return TaskLoss((each * weight.flatten()).sum() / whole, hits, counted.sum())
