"""Bias, the paper's word, in numbers: does the adversarial objective learn less of what nothing determines?

Two questions to a pre-trained model, answered on pieces it has not trained on, each note hidden once (`inspection`):

1. Recovery by frequency. Notes in ten groups of equal size by how frequent their true value is among all of them. A
   biased model restores frequent values and not rare ones.
2. Marginals where nothing helps. At the notes that a masker holds for most hopeless, how far the mean of the model's
   probabilities lies from the distribution of the true values: total variation, half the sum of the absolute
   differences, 0 where they agree, 1 where they have nothing in common. An unbiased model that knows nothing of a note
   gives each value the probability that it has in the data; a biased one, more to some.
"""

from typing import NamedTuple

import numpy as np

from amb import tokenizer
from amb.inference import Trained
from amb.inspection import inspect

GROUPS = 10
HOPELESS = 0.2  # share of the notes: the mean of the masking rate


class Views(NamedTuple):
    """One model's view of some pieces: true and recovered words int64 [n, F], the probability of each value float16
    [n, sum of the fields' values], the masker's scores [n] or None."""

    true: np.ndarray
    recovered: np.ndarray
    chances: np.ndarray
    scores: np.ndarray | None


def look(trained: Trained, files: list[str]) -> Views:
    """Raises MidiError for a file that cannot be used, ValueError for a model without its recoverer."""
    read = [trained.encode(file) for file in files]
    seen = [inspect(trained, piece, chances=True) for piece in read]
    return Views(
        np.concatenate([piece.words for piece in read]).astype(np.int64),
        np.concatenate([view.recovered for view in seen]),
        np.concatenate([view.chances for view in seen]),
        None if seen[0].scores is None else np.concatenate([view.scores for view in seen]),
    )


def recovery_by_frequency(true: np.ndarray, recovered: np.ndarray, encoding: tokenizer.Encoding) -> np.ndarray:
    """float [F, 10]: accuracy by the frequency of the true value, from the rarest tenth of the notes to the commonest.

    A value that lies across a border counts in both groups, by the share of its notes on either side.
    """
    table = np.empty((len(encoding.fields), GROUPS))
    for row, (field, truth, answer) in enumerate(zip(encoding.fields, true.T, recovered.T, strict=True)):
        counts = np.bincount(truth, minlength=field.values)
        right = np.bincount(truth, truth == answer, minlength=field.values)
        order = np.argsort(counts, kind="stable")
        ends = np.cumsum(counts[order]) / len(truth) * GROUPS
        inside = np.minimum(ends[:, None], np.arange(1, GROUPS + 1)) - np.maximum(
            np.concatenate([[0.0], ends[:-1]])[:, None], np.arange(GROUPS)
        )
        rate = right[order] / np.maximum(counts[order], 1)
        table[row] = rate @ np.maximum(inside, 0)
    return table


def marginal_distance(true: np.ndarray, chances: np.ndarray, encoding: tokenizer.Encoding) -> np.ndarray:
    """float [F]: total variation between the mean of the probabilities and the distribution of the true values.

    Of these notes: true int [n, F], chances float [n, sum of the fields' values], field by field.
    """
    ends = np.cumsum([field.values for field in encoding.fields])
    predicted = np.split(chances.mean(axis=0, dtype=np.float64), ends[:-1])
    shares = [np.bincount(truth, minlength=len(p)) / len(truth) for truth, p in zip(true.T, predicted, strict=True)]
    return np.array([np.abs(p - share).sum() / 2 for p, share in zip(predicted, shares, strict=True)])


def hopeless(scores: np.ndarray) -> np.ndarray:
    """bool [n]: the fifth of the notes with the highest scores."""
    chosen = np.zeros(len(scores), dtype=bool)
    chosen[np.argsort(-scores, kind="stable")[: round(HOPELESS * len(scores))]] = True
    return chosen
