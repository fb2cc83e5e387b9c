"""What pre-training learned: which notes the masker finds hopeless, and which notes the recoverer restores.

Each note is hidden once, with a seventh of its sequence at a time (the share that training hides), in all its fields,
and restored from the others. Bias, the paper's word, is then measured in two ways, on pieces not trained on:

1. Recovery by frequency: notes in ten groups of equal size by how frequent their true value is among all of them. A
   biased model restores frequent values and not rare ones.
2. Marginals at hopeless notes: at the notes with the masker's highest scores, the total variation between the mean of
   the model's probabilities and the distribution of the true values: 0 if they agree, 1 if they have nothing in
   common. An unbiased model without any information on a note gives each value its frequency in the data.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from amb import tokenizer
from amb.inference import Piece, Trained

HIDDEN = 7  # 1/7 = 14.3 % of the notes are hidden at a time, near the 15 % of training
TENTHS = 10
HOPELESS = 0.2  # share of the notes: the mean of the masking rate


class Inspection(NamedTuple):
    """A model's answers on one or several pieces, one row a word, [n, F] in all."""

    true: np.ndarray  # int64 [n, F], the words
    recovered: np.ndarray  # int64 [n, F], the most probable values when the note is hidden
    group: np.ndarray  # int64 [n], which notes were hidden together: 0 … 6, anew in each sequence
    sequence: np.ndarray  # int64 [n], the sequence that each word is in, counted anew in each piece
    scores: np.ndarray | None  # float32 [n], the masker's probability that the note is hopeless; None without a masker
    chances: np.ndarray | None  # float16 [n, sum of the fields' values], the recoverer's probabilities, if asked for


def inspect(trained: Trained, piece: Piece, chances: bool = False) -> Inspection:
    """Masker and recoverer on a piece. Raises ValueError if the checkpoint has no recoverer."""
    if not trained.recoverer:
        needs = "inspecting needs a pre-trained model with its heads (train.py)"
        raise ValueError(f"{trained.path} is {trained.about()}: {needs}")
    cut, ends = trained.sequences([piece]), np.cumsum(trained.encoding.values)
    # a random group for each note, of equal sizes in each sequence
    draws = [np.random.default_rng([0, number]).permutation(count) for number, count in enumerate(cut.count)]
    group = np.concatenate([np.argsort(draw) % HIDDEN for draw in draws])
    recovered = np.zeros(piece.words.shape, np.int64)
    probabilities = np.zeros((len(piece.words), ends[-1]), np.float16) if chances else None
    for number in range(HIDDEN):
        hidden = group == number
        answers = trained.answers(cut, partial(_recovery, trained), hidden)[hidden]
        recovered[hidden] = np.stack([p.argmax(1) for p in np.split(answers, ends[:-1], axis=1)], axis=1)
        if chances:
            probabilities[hidden] = answers
    scores = None
    if trained.masker and trained.config.objective == "adversarial":
        scores = trained.answers(cut, lambda *batch: trained.masker(trained.encoder(*batch))[..., None])[:, 0]
    sequence = np.repeat(np.arange(len(cut)), cut.count)
    return Inspection(piece.words.astype(np.int64), recovered, group, sequence, scores, probabilities)


def _recovery(trained: Trained, words: Tensor, lengths: Tensor) -> Tensor:
    """float32 [B, L, sum of the fields' values]: the recoverer's probabilities, field by field, specials left out."""
    logits = zip(trained.recoverer(trained.encoder(words, lengths)), trained.encoding.values, strict=True)
    return torch.cat([of_field[..., :values].float().softmax(-1) for of_field, values in logits], dim=-1)


def join(views: list[Inspection]) -> Inspection:
    """The views of a model of several pieces as one."""
    columns = zip(*views, strict=True)
    return Inspection(*(None if column[0] is None else np.concatenate(column) for column in columns))


def recovery_by_frequency(true: np.ndarray, recovered: np.ndarray, encoding: tokenizer.Encoding) -> np.ndarray:
    """float [F, 10]: accuracy by the frequency of the true value, from the rarest tenth of the notes to the commonest.

    true, recovered int [n, F]. A value that lies across a border counts in both groups, by the share of its notes on
    either side.
    """
    table, tenths = np.empty((len(encoding.fields), TENTHS)), np.arange(TENTHS)
    for row, (values, truth, answer) in enumerate(zip(encoding.values, true.T, recovered.T, strict=True)):
        counts = np.bincount(truth, minlength=values)
        right = np.bincount(truth, truth == answer, minlength=values)
        order = np.argsort(counts, kind="stable")
        ends = np.cumsum(counts[order]) / len(truth) * TENTHS
        inside = np.diff(ends[:, None].clip(tenths, tenths + 1), axis=0, prepend=tenths[None])  # [values, 10]
        table[row] = right[order] / np.maximum(counts[order], 1) @ inside
    return table


def marginal_distance(true: np.ndarray, chances: np.ndarray, encoding: tokenizer.Encoding) -> np.ndarray:
    """float [F]: total variation between the mean of the probabilities and the distribution of the true values.

    Of these notes: true int [n, F], chances float [n, sum of the fields' values], field by field.
    """
    ends = np.cumsum(encoding.values)
    predicted = np.split(chances.mean(axis=0, dtype=np.float64), ends[:-1])
    shares = [np.bincount(truth, minlength=len(p)) / len(truth) for truth, p in zip(true.T, predicted, strict=True)]
    return np.array([np.abs(p - share).sum() / 2 for p, share in zip(predicted, shares, strict=True)])


def most_hopeless(scores: np.ndarray) -> np.ndarray:
    """bool [n]: the fifth of the notes with the highest scores."""
    chosen = np.zeros(len(scores), dtype=bool)
    chosen[np.argsort(-scores, kind="stable")[: round(HOPELESS * len(scores))]] = True
    return chosen
