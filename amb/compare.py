"""Is one training better than another? Paired bootstrap over test pieces (Efron & Tibshirani 1993, chapter 16).

Pieces, not notes or segments, are drawn: those of one piece are alike, and a test of them one by one finds anything
significant. Both trainings are measured on the same draw, so that a hard piece is hard for both. Where there are
several seeds, they are drawn too, each training's on their own: another seed may change more than other pieces.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from amb import checkpoint, evaluate
from amb.tasks import IGNORED

DRAWS = 10_000


class Difference(NamedTuple):
    """Accuracy of the first less that of the second, in the test as it is and over the draws."""

    mean: float
    low: float  # the 2.5th percentile of the draws
    high: float  # the 97.5th
    p: float  # two-sided: twice the share of draws on the other side of 0


def hits(test: Path, level: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of a training's test.npz, for each unit how many answers of each piece are right, and of how many: float [P].

    Units are notes, or segments and pieces. Raises CheckpointError where the file is missing or damaged.
    """
    with checkpoint.reading(test), np.load(test, allow_pickle=False) as arrays:
        log_p, truth, piece = arrays["log_p"].astype(np.float32), arrays["truth"], arrays["piece"]
    numbers = np.unique(piece, return_inverse=True)[1]
    right, counted = log_p.argmax(-1) == truth, truth != IGNORED
    if level == "note":
        return {"notes": (_sums(numbers, (right & counted).sum(1)), _sums(numbers, counted.sum(1)))}
    of_piece, labels = evaluate.by_piece(log_p, truth, piece)
    return {
        "segments": (_sums(numbers, right), _sums(numbers, counted)),
        "pieces": ((of_piece.argmax(1) == labels).astype(float), np.ones(len(labels))),
    }


def bootstrap(first: np.ndarray, second: np.ndarray, counts: np.ndarray, seed: int = 0) -> Difference:
    """first [S, P], second [S', P]: right answers of each piece by S and S' seeds, out of counts [P]."""
    rng = np.random.default_rng(seed)
    pieces = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), DRAWS)
    gaps = _mean_of_drawn(first, rng) - _mean_of_drawn(second, rng)
    found = (pieces * gaps).sum(axis=1) / (pieces @ counts)
    low, high = np.quantile(found, (0.025, 0.975))
    p = min(1.0, 2 * min((found <= 0).mean(), (found >= 0).mean()))
    mean = (first.mean(axis=0) - second.mean(axis=0)).sum() / counts.sum()
    return Difference(float(mean), float(low), float(high), float(p))


def _mean_of_drawn(hits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[S, P] -> [DRAWS, P], means over as many seeds as there are, drawn with replacement."""
    seeds = len(hits)
    return rng.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS) @ hits / seeds


def _sums(numbers: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.bincount(numbers, values)
