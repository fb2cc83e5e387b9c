"""How good a classifier is: figures of one test, over seeds, the difference of two trainings, and their tables.

The input is clean: nothing hidden, nothing transposed, PAD never counted.

Two trainings are compared by paired bootstrap over test pieces (Efron & Tibshirani 1993, chapter 16). Pieces are drawn,
not notes or segments, which are alike within a piece. Both trainings are measured on the same draw, because a hard
piece is hard for both. Seeds are drawn too, each training's separately: they may matter more than the pieces.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from amb import checkpoint
from amb.files import table
from amb.tasks import IGNORED

LEVELS = {"note": ("notes",), "sequence": ("segments", "pieces")}  # units that a test counts
FIGURES = {"accuracy": "accuracy", "macro_f1": "F1"}  # name in reports: heading in tables
DRAWS = 10_000


@torch.no_grad()
def log_probabilities(model: nn.Module, words: Tensor, lengths: Tensor) -> Tensor:
    """words [B, L, F], lengths [B] -> fp32 log-probabilities, [B, L, C] or [B, C]."""
    model.eval()
    return model(words, lengths).log_softmax(dim=-1)


def scores(truth: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> dict:
    """Accuracy, macro F1, per class precision, recall, F1 and count, and the confusion matrix [true, predicted].

    Labels and answers int [n]; IGNORED labels do not count. As in scikit-learn, what would divide by zero is 0 and the
    macro mean is over classes that occur as truth or answer.
    """
    size, counted = len(classes), truth != IGNORED
    pairs = truth[counted].astype(np.int64) * size + predicted[counted]
    matrix = np.bincount(pairs, minlength=size * size).reshape(size, size)
    hit, true, called = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    f1 = 2 * hit / np.maximum(1, true + called)
    columns = {"precision": hit / np.maximum(1, called), "recall": hit / np.maximum(1, true), "f1": f1, "count": true}
    return {
        "accuracy": float(hit.sum() / max(1, matrix.sum())),
        "macro_f1": float(f1[true + called > 0].mean()) if matrix.any() else 0.0,
        "count": int(matrix.sum()),
        "classes": {
            name: {key: column[label].item() for key, column in columns.items()} for label, name in enumerate(classes)
        },
        "confusion": matrix.tolist(),
    }


def by_piece(log_p: np.ndarray, truth: np.ndarray, piece: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Segments to pieces: the mean of the log-probabilities [S, C] of each piece's segments, and its label."""
    _, first, index, count = np.unique(piece, return_index=True, return_inverse=True, return_counts=True)
    mean = np.zeros((len(first), log_p.shape[1]))
    np.add.at(mean, index, log_p)
    return mean / count[:, None], truth[first]


def measure(log_p: np.ndarray, truth: np.ndarray, piece: np.ndarray, classes) -> dict:
    """All figures of a test: log-probabilities [S, C] of segments, or [S, L, C] of notes, labels of the same shape.

    {"accuracy", "loss" (mean cross-entropy, nats): what training watches, "notes": scores}, or "segments" and "pieces"
    for sequence tasks, where piece [S] numbers the piece that each segment is of.
    """
    if truth.ndim == 2:
        log_p, truth = log_p.reshape(-1, len(classes)), truth.reshape(-1)
        units = {"notes": (log_p, truth)}
    else:
        units = {"segments": (log_p, truth), "pieces": by_piece(log_p, truth, piece)}
    rows = np.flatnonzero(truth != IGNORED)
    loss = float(-log_p[rows, truth[rows]].mean(dtype=np.float64))
    figures = {unit: scores(labels, answers.argmax(axis=1), classes) for unit, (answers, labels) in units.items()}
    return {"accuracy": next(iter(figures.values()))["accuracy"], "loss": loss, **figures}


def headline(measured: dict) -> dict:
    """The figures of `measure` that fit a line of metrics: loss, and accuracy and macro F1 by unit."""
    units = {unit: figures for unit, figures in measured.items() if isinstance(figures, dict)}
    short = {unit: {name: figures[name] for name in FIGURES} for unit, figures in units.items()}
    return {"loss": measured["loss"], "accuracy": measured["accuracy"], **short}


def spread(values: list[float]) -> dict:
    """Mean and (n - 1) deviation of a sample; the deviation of a single value is None."""
    return {"mean": float(np.mean(values)), "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def over_seeds(results: list[dict], level: str) -> dict:
    """Trainings that differ in their seed alone; best epoch, validation and test figures as `spread`."""

    def test(unit: str) -> dict:
        return {name: spread([result["test"][unit][name] for result in results]) for name in FIGURES}

    return {
        "seeds": [result["seed"] for result in results],
        "best_epoch": spread([result["best_epoch"] for result in results]),
        "valid": spread([result["valid"]["accuracy"] for result in results]),
        **{unit: test(unit) for unit in LEVELS[level]},
    }


def percent(value: dict) -> str:
    """`81.2 ± 0.4 %`, or without deviation."""
    deviation = "" if value["deviation"] is None else f" ± {100 * value['deviation']:.1f}"
    return f"{100 * value['mean']:.1f}{deviation} %"


def results_table(title: str, level: str, trainings: dict, baselines: dict, published: dict | None = None) -> str:
    """Test figures of trainings ({name: over_seeds}), baselines ({name: measure, or None}) and a publication.

    `published` is accuracy by unit, in per cent.
    """
    columns = [(unit, figure) for unit in LEVELS[level] for figure in FIGURES]
    head = [title, "seeds", "best epoch", f"valid, {LEVELS[level][0]}", *(f"{u}, {FIGURES[f]}" for u, f in columns)]
    rows = []
    for name, figures in trainings.items():
        row = [name, len(figures["seeds"]), f"{figures['best_epoch']['mean']:.0f}", percent(figures["valid"])]
        rows.append(row + [percent(figures[unit][figure]) for unit, figure in columns])
    for name, figures in baselines.items():
        if figures:
            rows.append(
                [f"*{name}*", *[None] * 3, *(f"{100 * figures[unit][figure]:.1f} %" for unit, figure in columns)]
            )
    if published:
        cells = [f"{published[unit]:.1f} %" if f == "accuracy" and unit in published else None for unit, f in columns]
        rows.append(["*published*", *[None] * 3, *cells])
    return table(head, rows)


def print_report(run: Path, report: dict) -> None:
    """The test figures, the kept model's classes, and which files hold more."""
    units, baselines = LEVELS[report["level"]], report["baselines"]
    kept = next(training for training in report["trainings"] if training["seed"] == report["model"]["seed"])
    print(f"\n{report['task']}, test set: {report['pieces']['test']} pieces; clean input, nothing masked\n")
    print(results_table("", report["level"], {"this run": report["test"]}, baselines))
    if "trees" in baselines and baselines["trees"] is None:
        print("trees: not measured; pip install scikit-learn (the extra `baselines`)")
    print(f"\nkept: {run / 'model.pt'} (seed {kept['seed']}, epoch {kept['best_epoch']} of {kept['epochs']})\n")
    columns = "precision", "recall", "f1"
    classes = kept["test"][units[-1]]["classes"].items()
    rows = [[name, *(f"{of[figure]:.1%}" for figure in columns), f"{of['count']:,}"] for name, of in classes]
    print(table([units[-1], "precision", "recall", "F1", "count"], rows))
    pictures = f", {run}/curves.png, confusion.png" if (run / "curves.png").exists() else ""
    print(f"\nmore: {run / 'report.json'}{pictures}")
    for name, figures in baselines.items():
        for unit in units:
            if figures and kept["test"][unit]["accuracy"] <= figures[unit]["accuracy"]:
                print(f"the model kept is NOT better than the {name} baseline by {unit}")


def hits(test: Path, level: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """From a training's test.npz, for each unit the right answers in each piece and the number of answers: float [P].

    Raises CheckpointError where the file is missing or damaged.
    """
    with checkpoint.reading(test), np.load(test, allow_pickle=False) as arrays:
        log_p, truth, piece = arrays["log_p"].astype(np.float32), arrays["truth"], arrays["piece"]
    numbers, counted = np.unique(piece, return_inverse=True)[1], truth != IGNORED
    right = (log_p.argmax(-1) == truth) & counted
    sums = (np.bincount(numbers, flags.reshape(len(numbers), -1).sum(1)) for flags in (right, counted))
    answers = {LEVELS[level][0]: tuple(sums)}
    if level == "sequence":
        of_piece, labels = by_piece(log_p, truth, piece)
        answers["pieces"] = (of_piece.argmax(1) == labels).astype(float), np.ones(len(labels))
    return answers


def bootstrap(first: np.ndarray, second: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Accuracy of one training less that of another: its mean, 95 % interval (low, high) and two-sided p.

    first [S, P], second [S', P]: right answers in each piece by S and S' seeds, out of counts [P].
    """
    rng = np.random.default_rng(0)
    pieces = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), DRAWS)
    gaps = (pieces * (_mean_of_drawn(first, rng) - _mean_of_drawn(second, rng))).sum(axis=1) / (pieces @ counts)
    mean = (first.mean(axis=0) - second.mean(axis=0)).sum() / counts.sum()
    low, high = np.quantile(gaps, (0.025, 0.975)).tolist()
    p = 2 * min((gaps <= 0).mean(), (gaps >= 0).mean())  # twice the share of draws on the other side of 0
    return {"mean": float(mean), "low": low, "high": high, "p": min(1.0, float(p))}


def _mean_of_drawn(hits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[S, P] -> [DRAWS, P], means over as many seeds as there are, drawn with replacement."""
    seeds = len(hits)
    return rng.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS) @ hits / seeds
