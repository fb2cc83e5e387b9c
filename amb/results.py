"""What a trained model says of MIDI files: predictions and embeddings, as plain arrays."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from amb.pieces import Failure, Piece


@dataclass(frozen=True)
class Prediction:
    """What a fine-tuned model says of a file. If the file cannot be used, `error` says why and `log_p` is None.

    log_p float64: for sequence tasks [C], the mean over the piece's sequences of their log-probabilities `segments`
    [S, C]; `spans` [S, 2] are the seconds at which the first and the last note of each one start, `counts` [S] its
    notes. For note tasks [N, C], one row for each note of `tokenizer.read_midi`, NaN where the encoding drops the note.
    `dropped` counts those by reason, `notes` is the number of notes that the model saw.
    """

    file: str
    classes: tuple[str, ...]
    level: str
    notes: int = 0
    log_p: np.ndarray | None = None
    segments: np.ndarray | None = None
    spans: np.ndarray | None = None
    counts: np.ndarray | None = None
    dropped: dict[str, int] | None = None
    error: str = ""

    @property
    def labels(self) -> np.ndarray:
        """For note tasks int64 [N], indices into `classes`, -1 for a dropped note."""
        seen = ~np.isnan(self.log_p[:, 0])
        return np.where(seen, np.where(seen[:, None], self.log_p, 0).argmax(axis=1), -1)

    @property
    def probabilities(self) -> np.ndarray | None:
        """float64 [C], sum 1: of the piece's class, or for note tasks the share of the notes of each class."""
        if self.log_p is None:
            return None
        if self.level == "note":
            counts = np.bincount(self.labels + 1, minlength=len(self.classes) + 1)[1:]
            return counts / counts.sum()
        return normalise(self.log_p)

    @property
    def label(self) -> str | None:
        """The most probable class; for note tasks, the most frequent one."""
        return None if self.log_p is None else self.classes[int(self.probabilities.argmax())]


class Embeddings(NamedTuple):
    """Vectors of P pieces, in the order of the files; `skipped` are the files that cannot be used."""

    names: list[str]
    vectors: np.ndarray  # float32 [P, d], the mean over the piece's notes
    counts: np.ndarray  # int64 [P], how many notes that were
    skipped: list[Failure]
    notes: "NoteEmbeddings | None"


class NoteEmbeddings(NamedTuple):
    """One row a note that has a word: by piece, within a piece in the order of the words."""

    vectors: np.ndarray  # float32 [notes, d]
    piece: np.ndarray  # int64, index into the pieces' names
    seconds: np.ndarray  # float64, when the note starts
    start: np.ndarray  # int64, the same in the file's ticks
    pitch: np.ndarray  # int64, MIDI pitch
    track: np.ndarray  # int64, index of the track in the file


def normalise(log_p: np.ndarray) -> np.ndarray:
    """Probabilities [..., C] that are proportional to exp(log_p)."""
    p = np.exp(log_p - log_p.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def note_columns(piece: Piece, states: np.ndarray, number: int) -> NoteEmbeddings:
    """The notes of one piece, the `number`-th, with their hidden states [n, d]."""
    notes = piece.notes.take(piece.rows)
    return NoteEmbeddings(states, np.full(len(states), number), piece.seconds, notes.start, notes.pitch, notes.track)
