"""What a model must beat: always the commonest class, and trees on features of the notes (extra `baselines`)."""

from importlib.util import find_spec

import numpy as np

from amb import evaluate, tokenizer
from amb.data import Sequences
from amb.tasks import IGNORED

TREES = {"sequence": 500, "note": 50}
MOST_NOTES = 100_000  # that a note task's trees learn from
NEIGHBOURS = 8  # notes before and after each note that its features are about
KEYS = (  # how well each pitch class fits C major and C minor (Krumhansl and Kessler 1982)
    [6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88],
    [6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17],
)


def measure(parts: dict[str, Sequences], truth: dict[str, np.ndarray], classes, level: str) -> dict:
    """Test figures by baseline, as `evaluate.measure` gives them; trees: None without scikit-learn."""
    return {
        "majority": majority(truth["train"], truth["test"], parts["test"].piece, classes),
        "trees": trees(parts, truth, classes, level) if find_spec("sklearn") else None,
    }


def majority(train: np.ndarray, test: np.ndarray, piece: np.ndarray, classes) -> dict:
    """Figures, on labels `test`, of always answering the commonest label of `train`."""
    counts = np.bincount(train[train != IGNORED], minlength=len(classes))
    log_p = np.log(np.maximum(counts, 1) / counts.sum())
    return evaluate.measure(np.broadcast_to(log_p, (*test.shape, len(classes))), test, piece, classes)


def trees(parts: dict[str, Sequences], truth: dict[str, np.ndarray], classes, level: str) -> dict:
    """Extremely randomised trees (Geurts et al. 2006) on features of the same sequences as the model's, or their notes.

    For note tasks on `note_features` of random training sequences, about 100,000 notes in all.
    """
    from sklearn.ensemble import ExtraTreesClassifier

    train, test = parts["train"], parts["test"]
    chosen, everything = np.arange(len(train)), np.arange(len(test))
    places, labels = everything, truth["train"]
    if level == "note":
        order = np.random.default_rng(0).permutation(len(train))
        chosen = order[: np.searchsorted(train.count[order].cumsum(), MOST_NOTES) + 1]
        places = test.places(everything)[1]
        labels = labels[chosen][train.places(chosen)[1]]  # row by row, as the notes come
    labelled, least = labels != IGNORED, 0.5 / TREES[level]
    forest = ExtraTreesClassifier(
        TREES[level], max_features=0.3, min_samples_leaf=3 if level == "note" else 1, n_jobs=-1, random_state=0
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


def features(words: np.ndarray, encoding: tokenizer.Encoding) -> np.ndarray:
    """Of a sequence of notes [n, F]: histogram, mean and deviation of some columns; pitch classes; key; density.

    Saved regressions (`amb.model.LinearClassifier`) are of these numbers in this order.
    """
    start, end, pitch = encoding.timeline(words)
    order = np.lexsort((pitch, start))
    words, start, end, pitch = words[order], start[order], end[order], pitch[order]
    _, first, size = np.unique(start, return_index=True, return_counts=True)
    top, in_chord = np.maximum.reduceat(pitch, first), np.diff(start, prepend=-1) == 0
    columns = [  # values, how many bins of width 1
        (pitch % 12, 12),
        (pitch / 6, 22),
        (np.diff(top, prepend=top[0]).clip(-8, 8) + 8, 17),
        (np.diff(pitch, prepend=pitch[0])[in_chord] % 12, 12),
        (size.clip(max=7), 8),
        (octaves(end - start), 10),
        (octaves(np.diff(start[first])), 10),
        (4 * start % 4, 4),
        (16 * start % 4, 4),
    ]
    for number, field in enumerate(encoding.fields):
        if field.name in ("Velocity", "Tempo", "TimeSig"):
            columns.append((words[:, number] * (16 / field.values), 16))
    density = len(words) / max(1.0, end.max() - start.min())
    parts = [[density], np.sort(np.bincount(pitch % 12, minlength=12)) / len(words), key_fit(pitch, end - start)]
    for values, bins in columns:
        values = values if len(values) else np.zeros(1)
        parts += [np.bincount(values.astype(int), minlength=bins)[:bins] / len(values), [values.mean(), values.std()]]
    return np.concatenate(parts).astype(np.float32)


def key_fit(pitch: np.ndarray, beats: np.ndarray) -> np.ndarray:
    """The best correlations of the pitch classes' durations with a major and with a minor key, and their difference."""
    sounding = np.bincount(pitch % 12, beats, minlength=12)
    with np.errstate(invalid="ignore"):  # all may sound equally long
        fit = np.nan_to_num(np.corrcoef(KEYS, [np.roll(sounding, up) for up in range(12)])[:2, 2:]).max(axis=1)
    return np.append(fit, fit[0] - fit[1])


def octaves(beats: np.ndarray) -> np.ndarray:
    """0 ... 9: how often 1/32 of a beat has to be doubled."""
    return (np.log2(np.maximum(beats, 1 / 32)) + 5).clip(0, 9)


def note_features(words: np.ndarray, encoding: tokenizer.Encoding) -> np.ndarray:
    """float32 [n, K] for notes [n, F], in their order: their values, the sizes of their chords, their neighbours.

    Pitch, velocity, duration and start of the NEIGHBOURS notes before and after are differences from the note's.
    """
    start, end, pitch = encoding.timeline(words)
    names = encoding.names
    velocity = words[:, names.index("Velocity")] if "Velocity" in names else np.zeros(len(words))
    _, chord, size = np.unique(start, return_inverse=True, return_counts=True)
    values = np.stack([pitch, velocity, end - start, start], axis=1).astype(float)
    padded = np.pad(values, ((NEIGHBOURS, NEIGHBOURS), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * NEIGHBOURS + 1, axis=0) - values[..., None]
    places = np.stack([start % 1, start % 4, size[chord]], axis=1)
    return np.hstack([values[:, :3], places, windows.reshape(len(words), -1)]).astype(np.float32)
