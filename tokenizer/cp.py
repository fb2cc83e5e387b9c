"""The cp encoding: four ids a note (Chou et al., MidiBERT-Piano, arXiv 2107.05223).

    Bar {New, Continue}, Position (16 per bar), Pitch (22–107), Duration (64)

Everything is 4/4 at 480 ticks per beat: a bar has 1,920 ticks, a position 120, a step of duration 60.

`midibert` is cp as the published data and weights of MidiBERT-Piano have it, with two defects (`published` below):
ticks are taken as if every file had 480 a beat, and the grid of starts ends before the last start, so that notes after
its last point snap back to it.
"""

from collections import defaultdict
from functools import partial

import mido
import numpy as np

from .encoding import Encoded, Encoding, Field
from .midi import TICKS_PER_BEAT, MidiError, Part, Score, write_midi

LOWEST, HIGHEST = 22, 107
NEW, CONTINUE = 0, 1
POSITIONS, DURATIONS = 16, 64
POSITION_TICKS, DURATION_TICKS = 120, 60
VELOCITY = 64  # of decoded notes: the words have none

SIZES = {"Bar": 2, "Position": POSITIONS, "Pitch": HIGHEST - LOWEST + 1, "Duration": DURATIONS}
FIELDS = tuple(Field(name, values, specials=2) for name, values in SIZES.items())


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
    tracks, last_end = defaultdict(list), defaultdict(int)
    here, track, last_pitch = -1, 0, -1
    for start, end, pitch in np.stack(place_words(words, published), axis=1).tolist():
        if start != here:
            here, track, last_pitch = start, 0, -1
        track += pitch <= last_pitch
        while last_end[track, pitch] > start:
            track += 1
        last_end[track, pitch], last_pitch = end, pitch
        tracks[track].append((start, end, pitch, VELOCITY))
    parts = [Part("piano", 0, np.array(notes)) for notes in tracks.values()]
    return write_midi(parts, [(0, 500_000)], [(0, 4, 4)])


def place_words(words: np.ndarray, published: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start and end in ticks and MIDI pitch of ordinary cp words, int64 [notes, 4], as they are decoded."""
    bars = np.maximum(np.cumsum(words[:, 0] == NEW) - 1, 0)
    starts = (bars * POSITIONS + words[:, 1]) * POSITION_TICKS
    if published:
        starts += starts == starts.max(initial=0)  # a tick later, so that the grid reaches them when encoded again
    return starts, starts + (words[:, 3] + 1) * DURATION_TICKS, words[:, 2] + LOWEST


WAYS = encode_score, decode_words, place_words
CP, MIDIBERT = (
    Encoding(name, FIELDS, 2, (0, HIGHEST - LOWEST), *(partial(way, published=name == "midibert") for way in WAYS))
    for name in ("cp", "midibert")
)
