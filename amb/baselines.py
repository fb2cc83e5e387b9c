"""What a model must beat: always the commonest class, and trees on hand-made features (extra `baselines`)."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from amb import evaluate, tokenizer
from amb.data import Sequences
from amb.files import write_json
from amb.tasks import IGNORED

TREES = {"sequence": 500, "note": 50}
MOST_NOTES = 100_000  # that a note task's trees learn from


def measure(parts: dict[str, Sequences], truth: dict[str, np.ndarray], classes, level: str, cache: Path) -> dict:
    """Test figures by baseline, as `evaluate.measure` gives them; trees: None without scikit-learn.

    Kept in the folder `cache`, if it can be written, for all fine-tunings on the same words and labels.
    """
    file = cache / f"baselines-{_key(parts, truth, classes, level)}.json"
    if file.exists():
        return json.loads(file.read_text())
    figures = {
        "majority": majority(truth["train"], truth["test"], parts["test"].piece, classes),
        "trees": trees(parts, truth, classes, level) if available() else None,
    }
    with suppress(OSError):  # a training of hours does not end without its report for want of a copy
        own = cache / f"baselines-{os.getpid()}.json"  # another process may be writing the same
        write_json(own, figures)
        os.replace(own, file)
    return figures


def _key(parts: dict[str, Sequences], truth: dict[str, np.ndarray], classes, level: str) -> str:
    """A hash of this file and of all that it works on."""
    found = hashlib.sha256(Path(__file__).read_bytes())
    found.update(json.dumps([list(classes), level, available()]).encode())
    for role in ("train", "test"):
        for array in (*notes(parts[role]), parts[role].count, parts[role].piece, truth[role]):
            found.update(array.tobytes())
    return found.hexdigest()[:12]


def majority(train: np.ndarray, test: np.ndarray, piece: np.ndarray, classes) -> dict:
    """Figures, on labels `test`, of always answering the commonest label of `train`."""
    counts = np.bincount(train[train != IGNORED], minlength=len(classes))
    log_p = np.log(np.maximum(counts, 1) / counts.sum())
    return evaluate.measure(np.broadcast_to(log_p, (*test.shape, len(classes))), test, piece, classes)


def available() -> bool:
    """Whether scikit-learn is installed."""
    try:
        import sklearn.ensemble  # noqa: F401
    except ImportError:
        return False
    return True


def trees(parts: dict[str, Sequences], truth: dict[str, np.ndarray], classes, level: str, seed: int = 0) -> dict:
    """Extremely randomised trees (Geurts et al. 2006) on features of the same sequences as the model's, or their notes.

    For note tasks on `note_features` of random training sequences, some 100,000 notes in all.
    """
    from sklearn.ensemble import ExtraTreesClassifier

    of_notes = level == "note"
    chosen = np.arange(len(parts["train"]))
    if of_notes:
        order = np.random.default_rng(seed).permutation(chosen)
        chosen = order[: np.searchsorted(parts["train"].count[order].cumsum(), MOST_NOTES) + 1]
    seen, asked = features_of(parts["train"], chosen, level), features_of(parts["test"], None, level)
    labels, places = truth["train"][chosen], np.arange(len(truth["test"]))
    if of_notes:  # row by row, the notes come in the order of their labels
        labels = labels[filled(parts["train"])[chosen]]
        places = np.nonzero(filled(parts["test"]))
    known = labels != IGNORED
    forest = ExtraTreesClassifier(
        TREES[level], max_features=0.3, min_samples_leaf=3 if of_notes else 1, n_jobs=-1, random_state=seed
    ).fit(seen[known], labels[known])
    floor = 0.5 / TREES[level]
    log_p = np.full((*truth["test"].shape, len(classes)), np.log(floor))
    found = np.full((len(asked), len(classes)), floor)
    found[:, forest.classes_] = np.maximum(forest.predict_proba(asked), floor)
    log_p[places] = np.log(found)
    return evaluate.measure(log_p, truth["test"], parts["test"].piece, classes)


def features_of(sequences: Sequences, numbers: np.ndarray | None, level: str) -> np.ndarray:
    """float32 [S, K], features of these sequences (all, if None), or [notes, K], of their notes."""
    encoding = encoding_of(sequences)
    if level == "note":
        return np.concatenate([note_features(words, encoding) for words in notes(sequences, numbers)])
    return np.stack([features(words, encoding) for words in notes(sequences, numbers)])


def encoding_of(sequences: Sequences) -> tokenizer.Encoding:
    return tokenizer.load(sequences.stores[0].encoding)


def filled(sequences: Sequences) -> np.ndarray:
    """bool [S, L]: where there are notes, not EOS or PAD."""
    return np.arange(sequences.notes) < sequences.count[:, None]


def notes(sequences: Sequences, numbers: np.ndarray | None = None):
    """The notes of each sequence, uint16 [n, F], without EOS and PAD."""
    for number in range(len(sequences)) if numbers is None else numbers:
        store = sequences.stores[sequences.store[number]]
        yield store.read(int(sequences.start[number]), int(sequences.count[number]))


def features(words: np.ndarray, encoding: tokenizer.Encoding) -> np.ndarray:
    """Some 160 hand-made features of a sequence of notes [n, F]: pitch, harmony, rhythm, texture, dynamics, tempo."""
    start, end, pitch = encoding.timeline(words)
    order = np.lexsort((pitch, start))
    words, start, end, pitch = words[order], start[order], end[order], pitch[order]
    fields = {field.name: words[:, index].astype(np.int64) for index, field in enumerate(encoding.fields)}
    onset, first = np.unique(start, return_index=True)
    chord = np.diff(np.append(first, len(start)))
    gap, duration = np.diff(onset), end - start
    top = np.maximum.reduceat(pitch, first)
    bottom = np.minimum.reduceat(pitch, first)
    within = np.diff(pitch)[np.diff(start) == 0]  # between neighbours of one chord
    chroma = share(pitch % 12, 12, duration)
    parts = [
        chroma,
        np.sort(chroma)[::-1],
        key_fit(chroma),
        share(pitch // 6, 22),
        summary(pitch),
        summary(top),
        summary(bottom),
        summary(np.diff(top)),
        share(np.clip(np.diff(top), -8, 8) + 8, 17),
        share(np.abs(within) % 12, 12),
        share(np.minimum(chord, 7), 8),
        summary(np.log2(np.maximum(duration, 1 / 32))),
        share(np.clip(np.log2(np.maximum(duration, 1 / 32)) + 5, 0, 9).astype(int), 10),
        summary(np.log2(np.maximum(gap, 1 / 32))),
        share(np.clip(np.log2(np.maximum(gap, 1 / 32)) + 5, 0, 9).astype(int), 10),
        share((start * 4).astype(int) % 4, 4),
        share((start * 16).astype(int) % 4, 4),
        [len(start) / max(1.0, end.max() - start.min()), duration.sum() / max(1.0, end.max() - start.min())],
        summary(fields["Velocity"]) if "Velocity" in fields else [],
        summary(np.diff(fields["Velocity"])) if "Velocity" in fields else [],
        summary(fields["Tempo"]) if "Tempo" in fields else [],
        summary(fields["TimeSig"])[:1] if "TimeSig" in fields else [],
    ]
    return np.concatenate([np.asarray(part, dtype=np.float32).ravel() for part in parts])


def note_features(words: np.ndarray, encoding: tokenizer.Encoding, neighbours: int = 8) -> np.ndarray:
    """[n, K] for notes [n, F], in their order: each one's own values, its place in its chord, its surroundings.

    These are means of 9, 33 and 129 notes around it, and the differences from the `neighbours` before and after it.
    """
    start, end, pitch = encoding.timeline(words)
    names = [field.name for field in encoding.fields]
    velocity = words[:, names.index("Velocity")].astype(float) if "Velocity" in names else np.zeros(len(words))
    duration = end - start
    onset, chord, size = np.unique(start, return_inverse=True, return_counts=True)
    top, bottom, loudest = np.full((3, len(onset)), -np.inf)
    np.maximum.at(top, chord, pitch)
    np.maximum.at(bottom, chord, -pitch)
    np.maximum.at(loudest, chord, velocity)
    gap = np.append(np.diff(onset), 0)
    columns = [pitch, velocity, duration, start % 1, start % 4, size[chord], gap[chord]]
    columns += [top[chord] - pitch, bottom[chord] + pitch, loudest[chord] - velocity]
    for values in (pitch, velocity):
        total = np.insert(values.cumsum(), 0, 0)
        for reach in (4, 16, 64):
            first = np.maximum(np.arange(len(words)) - reach, 0)
            after = np.minimum(np.arange(len(words)) + reach + 1, len(words))
            columns.append(values - (total[after] - total[first]) / (after - first))
    for values in (pitch, velocity, duration, start):
        padded = np.pad(values.astype(float), neighbours, mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * neighbours + 1)
        columns += list((np.delete(windows, neighbours, axis=1) - values[:, None]).T)
    return np.stack(columns, axis=1).astype(np.float32)


def share(values: np.ndarray, bins: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Histogram of small non-negative integers, summing to 1."""
    counts = np.bincount(values.astype(np.int64), weights, minlength=bins)[:bins]
    return counts / max(counts.sum(), 1e-9)


def summary(values: np.ndarray) -> np.ndarray:
    """Mean, deviation and the 10th, 50th and 90th percentile; zeros for nothing."""
    if not len(values):
        return np.zeros(5)
    return np.array([values.mean(), values.std(), *np.percentile(values, (10, 50, 90))])


# Krumhansl and Kessler (1982): how well each pitch class fits a major and a minor key
PROFILES = np.array(
    [
        [6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88],
        [6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17],
    ]
)


def key_fit(chroma: np.ndarray) -> np.ndarray:
    """Best correlation of a pitch-class histogram [12] with a major and with a minor key, and their difference."""
    turned = np.stack([np.roll(chroma, -shift) for shift in range(12)])
    turned = (turned - turned.mean(axis=1, keepdims=True)) / np.maximum(turned.std(axis=1, keepdims=True), 1e-9)
    profiles = PROFILES - PROFILES.mean(axis=1, keepdims=True)
    fit = (turned @ (profiles / profiles.std(axis=1, keepdims=True)).T / 12).max(axis=0)
    return np.append(fit, fit[0] - fit[1])
