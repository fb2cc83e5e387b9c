"""What a model must beat: always the commonest class, and trees on features of the notes (extra `baselines`)."""

import json
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from amb import evaluate
from amb.data import Sequences
from amb.features import features, note_features
from amb.files import fingerprint, writing
from amb.tasks import IGNORED

TREES = {"sequence": 500, "note": 50}
MOST_NOTES = 100_000  # that a note task's trees learn from


def measure(parts: dict[str, Sequences], truth: dict[str, np.ndarray], classes, level: str, cache: Path) -> dict:
    """Test figures by baseline, as `evaluate.measure` gives them; trees: None without scikit-learn.

    Kept in the folder `cache`, if it can be written, for all fine-tunings on the same words and labels.
    """
    arrays = [
        array
        for role in ("train", "test")
        for array in (*map(parts[role].read, range(len(parts[role]))), parts[role].piece, truth[role])
    ]
    key = fingerprint(Path(__file__).read_bytes(), [list(classes), level, available()], *arrays)
    file = cache / f"baselines-{key}.json"
    if file.exists():
        return json.loads(file.read_text())
    figures = {
        "majority": majority(truth["train"], truth["test"], parts["test"].piece, classes),
        "trees": trees(parts, truth, classes, level) if available() else None,
    }
    with suppress(OSError), writing(file) as out:  # a training of hours does not end without its report for want of it
        out.write(json.dumps(figures).encode())
    return figures


def majority(train: np.ndarray, test: np.ndarray, piece: np.ndarray, classes) -> dict:
    """Figures, on labels `test`, of always answering the commonest label of `train`."""
    counts = np.bincount(train[train != IGNORED], minlength=len(classes))
    log_p = np.log(np.maximum(counts, 1) / counts.sum())
    return evaluate.measure(np.broadcast_to(log_p, (*test.shape, len(classes))), test, piece, classes)


def available() -> bool:
    """Whether scikit-learn is installed."""
    return find_spec("sklearn") is not None


def trees(parts: dict[str, Sequences], truth: dict[str, np.ndarray], classes, level: str, seed: int = 0) -> dict:
    """Extremely randomised trees (Geurts et al. 2006) on features of the same sequences as the model's, or their notes.

    For note tasks on `note_features` of random training sequences, some 100,000 notes in all.
    """
    from sklearn.ensemble import ExtraTreesClassifier

    train, test = parts["train"], parts["test"]
    chosen, everything = np.arange(len(train)), np.arange(len(test))
    places, labels = everything, truth["train"]
    if level == "note":
        order = np.random.default_rng(seed).permutation(len(train))
        chosen = order[: np.searchsorted(train.count[order].cumsum(), MOST_NOTES) + 1]
        places = test.places(everything)[1]
        labels = labels[chosen][train.places(chosen)[1]]  # row by row, as the notes come
    labelled, least = labels != IGNORED, 0.5 / TREES[level]
    forest = ExtraTreesClassifier(
        TREES[level], max_features=0.3, min_samples_leaf=3 if level == "note" else 1, n_jobs=-1, random_state=seed
    ).fit(features_of(train, chosen, level)[labelled], labels[labelled])
    predicted = forest.predict_proba(features_of(test, everything, level))
    answers = np.full((len(predicted), len(classes)), least)  # for a class that no tree names
    answers[:, forest.classes_] = np.maximum(predicted, least)
    chances = np.full((*truth["test"].shape, len(classes)), least)
    chances[places] = answers
    return evaluate.measure(np.log(chances), truth["test"], test.piece, classes)


def features_of(sequences: Sequences, numbers: np.ndarray, level: str) -> np.ndarray:
    """float32 [S, K], features of these sequences, or [notes, K], of their notes."""
    rows, join = (note_features, np.concatenate) if level == "note" else (features, np.stack)
    return join([rows(sequences.read(number), sequences.encoding) for number in numbers])
