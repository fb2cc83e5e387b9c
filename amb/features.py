"""Hand-made features of a sequence of notes, or of its notes: for the baselines, and for a linear head."""

import numpy as np

from amb import tokenizer

NEIGHBOURS = 8  # notes before and after each note that its features are about


def features(words: np.ndarray, encoding: tokenizer.Encoding) -> np.ndarray:
    """Of a sequence of notes [n, F]: histogram, mean and deviation of some columns; sorted pitch classes; density."""
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
    parts = [[density], np.sort(np.bincount(pitch % 12, minlength=12)) / len(words)]
    for values, bins in columns:
        values = values if len(values) else np.zeros(1)
        parts += [np.bincount(values.astype(int), minlength=bins)[:bins] / len(values), [values.mean(), values.std()]]
    return np.concatenate(parts).astype(np.float32)


def octaves(beats: np.ndarray) -> np.ndarray:
    """0 ... 9: how often 1/32 of a beat has to be doubled."""
    return (np.log2(np.maximum(beats, 1 / 32)) + 5).clip(0, 9)


def note_features(words: np.ndarray, encoding: tokenizer.Encoding) -> np.ndarray:
    """float32 [n, K] for notes [n, F], in their order: their own values, the sizes of their chords, their neighbours.

    Pitch, velocity, duration and start of the NEIGHBOURS notes before and after each one are differences from its own.
    """
    start, end, pitch = encoding.timeline(words)
    names = [field.name for field in encoding.fields]
    velocity = words[:, names.index("Velocity")] if "Velocity" in names else np.zeros(len(words))
    _, chord, size = np.unique(start, return_inverse=True, return_counts=True)
    values = np.stack([pitch, velocity, end - start, start], axis=1).astype(float)
    padded = np.pad(values, ((NEIGHBOURS, NEIGHBOURS), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * NEIGHBOURS + 1, axis=0) - values[..., None]
    places = np.stack([start % 1, start % 4, size[chord]], axis=1)
    return np.hstack([values[:, :3], places, windows.reshape(len(words), -1)]).astype(np.float32)
