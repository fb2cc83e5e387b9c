"""What pre-training has learned of pieces: which notes the masker holds for hopeless, which the recoverer restores.

Each note is hidden once, with a seventh of its sequence at a time (the share that training hides), in all its fields,
and restored from the others. Bias, the paper's word, is then measured in two ways, on pieces not trained on:

1. Recovery by frequency: notes in ten groups of equal size by how frequent their true value is among all of them. A
   biased model restores frequent values and not rare ones.
2. Marginals where nothing helps: at the notes that a masker holds for most hopeless, the total variation between the
   mean of the model's probabilities and the distribution of the true values: 0 if they agree, 1 if they have nothing
   in common. An unbiased model that knows nothing of a note gives each value the probability that it has in the data.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from amb import tokenizer
from amb.inference import Piece, Trained, sequences
from amb.kernels import top_k

HIDDEN = 7  # 1/7 = 14.3 % of the notes are hidden at a time, near the 15 % of training
TENTHS = 10
HOPELESS = 0.2  # share of the notes: the mean of the masking rate
SEED = 0


class Inspection(NamedTuple):
    """A model's view of one or several pieces, one row a word, [n, F] in all."""

    true: np.ndarray  # int64 [n, F], the words
    recovered: np.ndarray  # int64 [n, F], the most probable values when the note is hidden
    group: np.ndarray  # int64 [n], which notes were hidden together: 0 … 6, anew in each sequence
    sequence: np.ndarray  # int64 [n], the sequence that each word is in, counted anew in each piece
    scores: np.ndarray | None  # float32 [n], the masker's probability that the note is hopeless; None without a masker
    would_freeze: np.ndarray | None  # bool [n], the notes that an update of the mask book would freeze; likewise
    chances: np.ndarray | None  # float16 [n, sum of the fields' values], the recoverer's probabilities, if asked for


@torch.inference_mode()
def inspect(trained: Trained, piece: Piece, chances: bool = False) -> Inspection:
    """Masker and recoverer on a piece. Raises ValueError if the checkpoint has no recoverer."""
    if not trained.recoverer:
        needs = "inspecting needs a pre-trained model with its heads (train.py)"
        raise ValueError(f"{trained.path} is {trained.about()}: {needs}")
    cut, fields = sequences([piece], trained.encoding.name, trained.notes), trained.encoding.fields
    count = len(piece.words)
    masked = trained.masker is not None and trained.config.objective == "adversarial"
    view = Inspection(
        true=piece.words.astype(np.int64),
        recovered=np.zeros(piece.words.shape, np.int64),
        group=np.zeros(count, np.int64),
        sequence=np.zeros(count, np.int64),
        scores=np.zeros(count, np.float32) if masked else None,
        would_freeze=np.zeros(count, bool) if masked else None,
        chances=np.zeros((count, sum(field.values for field in fields)), np.float16) if chances else None,
    )
    for numbers, words, lengths in trained.batches(cut):
        places, filled = cut.places(numbers)
        places, filled = places[filled], filled[:, : words.shape[1]]
        groups = np.full(words.shape[:2], -1)  # a random group for each note, of equal sizes in each sequence
        for row, (number, notes) in enumerate(zip(numbers.tolist(), cut.count[numbers].tolist(), strict=True)):
            groups[row, np.random.default_rng([SEED, number]).permutation(notes)] = np.arange(notes) % HIDDEN
        view.group[places], view.sequence[places] = groups[filled], np.repeat(numbers, cut.count[numbers])
        for number, logits in enumerate(_recoveries(trained, words, lengths, torch.from_numpy(groups))):
            rows = places[groups[filled] == number]
            view.recovered[rows] = torch.stack([of_field.argmax(-1) for of_field in logits], -1).cpu().numpy()
            if chances:
                shares = [of_field.float().softmax(-1) for of_field in logits]
                view.chances[rows] = torch.cat(shares, -1).cpu().numpy()
        if masked:
            score, real = trained.masker(trained.encoder(words, lengths)), torch.from_numpy(filled).to(words.device)
            share = (trained.config.mask_low + trained.config.mask_high) / 2
            frozen = top_k(score, real, (share * real.sum(1, keepdim=True)).long())
            view.scores[places], view.would_freeze[places] = score[real].cpu().numpy(), frozen[real].cpu().numpy()
    return view


def join(views: list[Inspection]) -> Inspection:
    """The views of a model of several pieces as one."""
    columns = zip(*views, strict=True)
    return Inspection(*(None if column[0] is None else np.concatenate(column) for column in columns))


def _recoveries(trained: Trained, words, lengths, groups: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """For each group, by field, the logits [notes, values] of its notes when they are hidden."""
    mask = torch.from_numpy(trained.encoding.mask.astype(np.int64)).to(words.device)
    for number in range(HIDDEN):
        hidden = (groups == number).to(words.device)
        logits = trained.recoverer(trained.encoder(torch.where(hidden[..., None], mask, words), lengths))
        fields = zip(logits, trained.encoding.fields, strict=True)
        yield [of_field[hidden][:, : field.values] for of_field, field in fields]


def recovery_by_frequency(true: np.ndarray, recovered: np.ndarray, encoding: tokenizer.Encoding) -> np.ndarray:
    """float [F, 10]: accuracy by the frequency of the true value, from the rarest tenth of the notes to the commonest.

    true, recovered int [n, F]. A value that lies across a border counts in both groups, by the share of its notes on
    either side.
    """
    table, tenths = np.empty((len(encoding.fields), TENTHS)), np.arange(TENTHS)
    for row, (field, truth, answer) in enumerate(zip(encoding.fields, true.T, recovered.T, strict=True)):
        counts = np.bincount(truth, minlength=field.values)
        right = np.bincount(truth, truth == answer, minlength=field.values)
        order = np.argsort(counts, kind="stable")
        ends = np.cumsum(counts[order]) / len(truth) * TENTHS
        inside = np.diff(ends[:, None].clip(tenths, tenths + 1), axis=0, prepend=tenths[None])  # [values, 10]
        table[row] = right[order] / np.maximum(counts[order], 1) @ inside
    return table


def marginal_distance(true: np.ndarray, chances: np.ndarray, encoding: tokenizer.Encoding) -> np.ndarray:
    """float [F]: total variation between the mean of the probabilities and the distribution of the true values.

    Of these notes: true int [n, F], chances float [n, sum of the fields' values], field by field.
    """
    ends = np.cumsum([field.values for field in encoding.fields])
    predicted = np.split(chances.mean(axis=0, dtype=np.float64), ends[:-1])
    shares = [np.bincount(truth, minlength=len(p)) / len(truth) for truth, p in zip(true.T, predicted, strict=True)]
    return np.array([np.abs(p - share).sum() / 2 for p, share in zip(predicted, shares, strict=True)])


def most_hopeless(scores: np.ndarray) -> np.ndarray:
    """bool [n]: the fifth of the notes with the highest scores."""
    chosen = np.zeros(len(scores), dtype=bool)
    chosen[np.argsort(-scores, kind="stable")[: round(HOPELESS * len(scores))]] = True
    return chosen
