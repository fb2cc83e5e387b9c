"""What an encoding is: its fields and the two directions between MIDI and words.

A word is one note, written as F ids, one per field. Those in `octuple.py` and `cp.py` are all an `Encoding`, so that
all other code is the same for each of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import mido
import numpy as np

from .midi import TICKS_PER_BEAT, Notes, Score, read_midi


@dataclass(frozen=True)
class Field:
    """One field of a word: ids 0 … values−1 are ordinary; the specials follow: pad, mask, and maybe sos, eos, cls, sep.

    A special that the encoding lacks is None.
    """

    name: str
    values: int
    specials: int  # how many of them this field has

    size = property(lambda self: self.values + self.specials)  # rows of an embedding table
    pad = property(lambda self: self.values)
    mask = property(lambda self: self.values + 1)
    eos = property(lambda self: self.values + 3 if self.specials > 3 else None)


class Encoded(NamedTuple):
    """A score as words, with what is needed to trace and to count them."""

    words: np.ndarray  # uint16 [notes, F]
    rows: np.ndarray  # int64 [notes]: the row of `score.notes` that each word was made from
    segments: np.ndarray  # int64 [segments]: how many words each run between two restarts of Bar has
    dropped: dict[str, int]  # notes that have no word, by reason


@dataclass(frozen=True)
class Encoding:
    """A vocabulary and the way to it and back. Made once per encoding; get one with `tokenizer.load`.

    `pitch_field` and `pitch_range` are the rule for transposing: an id of that field within the range (both ends
    included) is a pitch and may move, if it stays within the range; any other id (percussion, specials) must not.
    """

    name: str
    fields: tuple[Field, ...]
    pitch_field: int
    pitch_range: tuple[int, int]
    encode_score: Callable[[Score], Encoded]
    decode_words: Callable[[np.ndarray], mido.MidiFile]
    place_words: Callable[[np.ndarray], tuple[np.ndarray, ...]]  # start and end in ticks, MIDI pitch, maybe more

    # of each field, in order
    names = property(lambda self: [field.name for field in self.fields])
    values = property(lambda self: [field.values for field in self.fields])
    sizes = property(lambda self: tuple(field.size for field in self.fields))

    def word(self, special: str) -> np.ndarray | None:
        """uint16 [F], the word that is `special` in all fields; None if the encoding has none, as cp has no eos."""
        ids = [getattr(field, special) for field in self.fields]
        return None if None in ids else np.array(ids, dtype=np.uint16)

    pad = property(lambda self: self.word("pad"))
    mask = property(lambda self: self.word("mask"))
    eos = property(lambda self: self.word("eos"))  # ends a segment

    def encode(self, source: str | Path | BinaryIO) -> np.ndarray:
        """The words of a MIDI file (a path, or a binary file object), uint16 [notes, F]; no EOS, no PAD.

        Raises MidiError, with a reason in few words, for anything that cannot be used.
        """
        return self.encode_with_sources(source)[0]

    def encode_with_sources(self, source: str | Path | BinaryIO) -> tuple[np.ndarray, Notes]:
        """`encode`, and row for row the note that each word was made from. Raises MidiError like `encode`."""
        score = read_midi(source)
        encoded = self.encode_score(score)
        return encoded.words, score.notes.take(encoded.rows)

    def decode(self, words: np.ndarray) -> mido.MidiFile:
        """A MIDI file (480 ticks a beat) that plays `words`, [notes, F]; words that hold a special id are left out.

        Raises ValueError if the shape is wrong or an id is outside its field.
        """
        words = self._checked(words)
        return self.decode_words(words[self.is_note(words)])

    def timeline(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Start and end in beats, and MIDI pitch, of `words` [notes, F] without special ids, as `decode` plays them.

        Raises ValueError like `decode`.
        """
        starts, ends, pitches, *_ = self.place_words(self._checked(words))
        return starts / TICKS_PER_BEAT, ends / TICKS_PER_BEAT, pitches

    def is_note(self, words: np.ndarray) -> np.ndarray:
        """bool [...]: which of the words [..., F] hold no special id."""
        return (words < self.values).all(axis=-1)

    def _checked(self, words: np.ndarray) -> np.ndarray:
        words = np.asarray(words)
        count = len(self.fields)
        if words.ndim != 2 or words.shape[1] != count or words.dtype.kind not in "iu":
            raise ValueError(f"{self.name} words are integers [notes, {count}], not {words.dtype} {words.shape}")
        words = words.astype(np.int64)
        for column, field in zip(words.T, self.fields, strict=True):
            if column.size and not 0 <= column.min() <= column.max() < field.size:
                raise ValueError(f"{field.name} ids are 0 to {field.size - 1}, not {column.min()} to {column.max()}")
        return words
