"""The cp encoding: four ids a note (Chou et al., MidiBERT-Piano, arXiv 2107.05223).

    Bar {New, Continue}, Position (16 per bar), Pitch (22–107), Duration (64)

Everything is 4/4 at 480 ticks per beat: a bar has 1,920 ticks, a position 120, a step of duration 60.

`midibert` is cp as the published data and weights of MidiBERT-Piano have it, with two defects (`published` below):
ticks are taken as if every file had 480 a beat, and the grid of starts ends before the last start, so that notes after
its last point snap back to it.
"""

from dataclasses import replace
from functools import partial

import mido
import numpy as np

from .encoding import Encoded, Encoding, Field
from .midi import MidiError, Part, Score, write_midi

LOWEST, HIGHEST = 22, 107
NEW, CONTINUE = 0, 1
POSITIONS, DURATIONS = 16, 64
POSITION_TICKS, DURATION_TICKS, TICKS_PER_BEAT = 120, 60, 480
VELOCITY = 64  # of decoded notes: the words have none

FIELDS = tuple(
    Field(name, values, specials=2)
    for name, values in (
        ("Bar", 2),
        ("Position", POSITIONS),
        ("Pitch", HIGHEST - LOWEST + 1),
        ("Duration", DURATIONS),
    )
)


def nearest(ticks: np.ndarray, unit: int, ticks_per_beat: int) -> np.ndarray:
    """How many times `unit` (in 480ths of a beat) is nearest to `ticks`, ties to the lower; exact, in integers.

    ⌈x − 1/2⌉ with x = ticks · 480 / (ticks_per_beat · unit); int64, the shape of `ticks`.
    """
    whole = ticks_per_beat * unit
    return -((whole - 2 * TICKS_PER_BEAT * ticks) // (2 * whole))


def encode_score(score: Score, published: bool = False) -> Encoded:
    """The words of a score by start (as the file has it, before it snaps), then track, then pitch.

    Raises MidiError if no note is within the pitch range.
    """
    rows = np.flatnonzero((score.notes.pitch >= LOWEST) & (score.notes.pitch <= HIGHEST))
    outside = len(score.notes.pitch) - len(rows)
    if not len(rows):
        raise MidiError("no notes", f"all {outside} are outside pitches {LOWEST} to {HIGHEST}")
    rows = rows[np.lexsort((score.notes.pitch[rows], score.notes.track[rows], score.notes.start[rows]))]
    notes = score.notes.take(rows)
    ticks_per_beat = TICKS_PER_BEAT if published else score.ticks_per_beat
    places = nearest(notes.start, POSITION_TICKS, ticks_per_beat)
    if published:
        places = np.minimum(places, max(score.notes.start.max() - 1, 0) // POSITION_TICKS)
    bars, positions = np.divmod(places, POSITIONS)
    steps = nearest(notes.end - notes.start, DURATION_TICKS, ticks_per_beat)
    columns = (
        np.where(np.diff(bars, prepend=-1) > 0, NEW, CONTINUE),
        positions,
        notes.pitch - LOWEST,
        np.clip(steps - 1, 0, DURATIONS - 1),
    )
    dropped = {"never ends": score.unclosed, f"pitch outside {LOWEST} to {HIGHEST}": outside}
    return Encoded(np.stack(columns, axis=1).astype(np.uint16), rows, np.array([len(rows)]), dropped)


def decode_words(words: np.ndarray, published: bool = False) -> mido.MidiFile:
    """MIDI from ordinary cp words, int64 [notes, 4]: piano, 4/4, one bar per New (empty bars are not in the words).

    Encoding sorts by track and pitch within a position, so the order of the words is kept by the choice of tracks:
    a note whose pitch does not rise above the last one's moves to the next track, and so does one that would start
    inside another note of its pitch.
    """
    starts, ends = _place(words, published)
    tracks: list[list] = []
    last_end: dict[tuple[int, int], int] = {}
    here, track, last_pitch = -1, 0, -1
    for start, end, pitch in zip(starts.tolist(), ends.tolist(), (words[:, 2] + LOWEST).tolist(), strict=True):
        if start != here:
            here, track, last_pitch = start, 0, -1
        if pitch <= last_pitch:
            track += 1
        while last_end.get((track, pitch), 0) > start:
            track += 1
        last_end[track, pitch], last_pitch = end, pitch
        while track >= len(tracks):
            tracks.append([])
        tracks[track].append((start, end, pitch, VELOCITY))
    parts = [Part("piano", 0, np.array(notes)) for notes in tracks]
    return write_midi(parts, [(0, 500_000)], [(0, 4, 4)])


def place_words(words: np.ndarray, published: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start and end in beats and MIDI pitch of ordinary cp words, int64 [notes, 4], as they are decoded."""
    starts, ends = _place(words, published)
    return starts / TICKS_PER_BEAT, ends / TICKS_PER_BEAT, words[:, 2] + LOWEST


def _place(words: np.ndarray, published: bool) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of every note, in ticks."""
    bars = np.maximum(np.cumsum(words[:, 0] == NEW) - 1, 0)
    starts = (bars * POSITIONS + words[:, 1]) * POSITION_TICKS
    if published and len(starts):
        starts += starts == starts.max()  # a tick later, so that the grid reaches them when they are encoded again
    return starts, starts + (words[:, 3] + 1) * DURATION_TICKS


CP = Encoding(
    name="cp",
    fields=FIELDS,
    pitch_field=2,
    pitch_range=(0, HIGHEST - LOWEST),
    encode_score=encode_score,
    decode_words=decode_words,
    place_words=place_words,
)
MIDIBERT = replace(
    CP,
    name="midibert",
    encode_score=partial(encode_score, published=True),
    decode_words=partial(decode_words, published=True),
    place_words=partial(place_words, published=True),
)
