"""How good a classifier is, on clean input: nothing hidden, nothing transposed, PAD never counted."""

import numpy as np
import torch
from torch import Tensor

from amb.model import Classifier
from amb.tasks import IGNORED


@torch.no_grad()
def log_probabilities(model: Classifier, words: Tensor, lengths: Tensor) -> Tensor:
    """words [B, L, F], lengths [B] -> fp32 log-probabilities, [B, L, C] or [B, C]."""
    model.eval()
    return model(words, lengths).log_softmax(dim=-1)


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """int64 [C, C]: how many of true class i (row) were called j (column); IGNORED labels do not count."""
    counted = truth != IGNORED
    flat = truth[counted].astype(np.int64) * classes + predicted[counted]
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)


def scores(matrix: np.ndarray, classes: list[str] | tuple[str, ...]) -> dict:
    """Accuracy, macro F1 and, per class, precision, recall, F1 and support, from a confusion matrix.

    As in scikit-learn, what would divide by zero is 0 and the macro mean is over classes that occur as truth or answer.
    """
    hit, true, called = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)

    def share(part, whole):
        return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)

    f1 = share(2 * hit, true + called)
    columns = zip(share(hit, called), share(hit, true), f1, true, strict=True)
    return {
        "accuracy": float(hit.sum() / max(1, matrix.sum())),
        "macro_f1": float(f1[true + called > 0].mean()) if matrix.any() else 0.0,
        "count": int(matrix.sum()),
        "classes": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "count": int(n)}
            for name, (p, r, f, n) in zip(classes, columns, strict=True)
        },
        "confusion": matrix.tolist(),
    }


def loss(log_p: np.ndarray, truth: np.ndarray) -> float:
    """Mean cross-entropy (nats) of log-probabilities [n, C] where labels [n] are not IGNORED."""
    rows = np.flatnonzero(truth != IGNORED)
    return float(-log_p[rows, truth[rows]].mean(dtype=np.float64))


def by_piece(log_p: np.ndarray, truth: np.ndarray, piece: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Segments to pieces: the mean of the log-probabilities [S, C] of each piece's segments, and its label."""
    _, first, index, count = np.unique(piece, return_index=True, return_inverse=True, return_counts=True)
    mean = np.zeros((len(first), log_p.shape[1]))
    np.add.at(mean, index, log_p)
    return mean / count[:, None], truth[first]


def measure(log_p: np.ndarray, truth: np.ndarray, piece: np.ndarray, classes) -> dict:
    """All figures of a test: log-probabilities [S, C] of segments, or [S, L, C] of notes, labels of the same shape.

    {"accuracy", "loss": what training watches, "notes": scores}, or "segments" and "pieces" for sequence tasks, where
    piece [S] says which segments are of one piece.
    """
    count = len(classes)
    if truth.ndim == 2:
        log_p, truth = log_p.reshape(-1, count), truth.reshape(-1)
        units = {"notes": scores(confusion(truth, log_p.argmax(axis=1), count), classes)}
    else:
        pieces, labels = by_piece(log_p, truth, piece)
        units = {
            "segments": scores(confusion(truth, log_p.argmax(axis=1), count), classes),
            "pieces": scores(confusion(labels, pieces.argmax(axis=1), count), classes),
        }
    return {"accuracy": next(iter(units.values()))["accuracy"], "loss": loss(log_p, truth), **units}


def headline(measured: dict) -> dict:
    """The figures of `measure` that fit a line of metrics: loss, and accuracy and macro F1 by unit."""
    units = {unit: figures for unit, figures in measured.items() if isinstance(figures, dict)}
    short = {unit: {name: figures[name] for name in ("accuracy", "macro_f1")} for unit, figures in units.items()}
    return {"loss": measured["loss"], "accuracy": measured["accuracy"], **short}
