"""From MIDI files to words that a model may see: in parallel, in order, a bounded number at a time.

Reading is what training does, by the same functions: the task's view of the score, the encoding, and `data.cut` for
the sequences. A file that cannot be used becomes a `Failure` in its place and stops nothing.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from amb import data, tokenizer
from amb.tokenizer import MidiError, Notes, Score, cores, find_midi, run

FEW = 8  # files that are read before a pool of processes would have started


class Piece(NamedTuple):
    """One file as words, [n] of them, and as notes, [N] of them; n < N where the encoding drops notes."""

    file: str
    words: np.ndarray  # uint16 [n, F], as the model's task may see them; no EOS, no PAD
    rows: np.ndarray  # int64 [n], the row of `notes` that each word stands for
    notes: Notes  # all notes of the file that end, as the file has them
    seconds: np.ndarray  # float64 [n], when each word's note starts
    segments: np.ndarray  # int64, how many words each run between two restarts of Bar has
    dropped: dict[str, int]  # notes that have no word, by reason


class Failure(NamedTuple):
    """A file that cannot be used, and why, in few words."""

    file: str
    reason: str


def read(source: str | Path | BinaryIO, encoding: str, view: Callable | None = None) -> Piece:
    """One MIDI file, by a path or as a binary file object. Raises MidiError, with a reason in few words."""
    encoded, original = tokenizer.encode_file(source, encoding, view)
    rows, dropped = encoded.rows, {reason: count for reason, count in encoded.dropped.items() if count}
    starts = original.notes.start[rows]
    name = getattr(source, "name", "") if hasattr(source, "read") else os.fspath(source)
    return Piece(name, encoded.words, rows, original.notes, seconds(original, starts), encoded.segments, dropped)


def seconds(score: Score, ticks: np.ndarray) -> np.ndarray:
    """When each of `ticks` is reached, in seconds, under the score's tempos; float64, the shape of `ticks`."""
    at = np.array([0] + [tick for tick, _ in score.tempos])
    pace = np.array([500_000] + [tempo for _, tempo in score.tempos]) / score.ticks_per_beat / 1e6
    begun = np.append(0, np.cumsum(np.diff(at) * pace[:-1]))
    last = np.searchsorted(at, ticks, side="right") - 1
    return begun[last] + (ticks - at[last]) * pace[last]


def find(sources: str | Path | Iterable[str | Path]) -> list[str]:
    """The MIDI files that `sources`, files and folders, name: in that order, folders sorted and at any depth.

    What is missing or holds no MIDI stays in the list, for `read_all` to say so.
    """
    files = []
    for source in [sources] if isinstance(sources, str | Path) else sources:
        source = Path(source)
        found = [path for _, path in find_midi(source)[0]]
        files += found or [str(source)]
    return files


def read_all(
    files: list[str], encoding: str, view: Callable | None = None, workers: int | None = None
) -> Iterator[Piece | Failure]:
    """Each file in order, read by `workers` processes (by default one per core that this process may use).

    In threads other than the main one, in pool workers, and for a few files, this process reads them itself.
    """
    if workers is None:
        workers = cores()
    # `run` forks, and looks after its processes by comparing lists of them: one thread only may do that.
    main = threading.current_thread() is threading.main_thread()
    if not main or multiprocessing.current_process().daemon or len(files) < FEW:
        workers = 1
    with closing(run(files, partial(_try, encoding=encoding, view=view), workers)) as outcomes:
        yield from outcomes


def _try(file: str, encoding: str, view: Callable | None) -> Piece | Failure:
    if os.path.isdir(file):
        return Failure(file, "a folder without .mid or .midi files")
    try:
        return read(file, encoding, view)
    except MidiError as error:
        return Failure(file, str(error))
    except MemoryError:
        return Failure(file, "too large (out of memory)")


def windows(outcomes: Iterable[Piece | Failure], words: int) -> Iterator[list[Piece | Failure]]:
    """The outcomes in order, some at a time: as many as it takes to hold `words` words, or 1,000."""
    window, held = [], 0
    for outcome in outcomes:
        window.append(outcome)
        held += len(outcome.words) if isinstance(outcome, Piece) else 0
        if held >= words or len(window) == 1000:
            yield window
            window, held = [], 0
    if window:
        yield window


def sequences(pieces: list[Piece], encoding: str, notes: int) -> data.Sequences:
    """The sequences of up to `notes` words that fine-tuning's evaluation would cut these pieces into.

    `.piece` is the index into `pieces`, `.start` counts words of all pieces together; see `data.Sequences`.
    """
    lengths = np.concatenate([piece.segments for piece in pieces])
    offsets = np.cumsum(lengths) - lengths
    counts = [len(piece.words) for piece in pieces]
    starts = np.cumsum(counts) - counts
    listed = [
        tokenizer.Piece(0, piece.file, int(start), count)
        for piece, start, count in zip(pieces, starts, counts, strict=True)
    ]
    words = np.concatenate([piece.words for piece in pieces])
    store = tokenizer.Store(Path(), encoding, words, listed, np.stack([offsets, lengths], axis=1), {})
    return data.cut([store], [["read"] * len(pieces)], "read", notes, even=True)
