"""The octuple encoding: eight ids a note (Zeng et al., MusicBERT, arXiv 2106.05630; PianoBART's dictionary).

    Bar, Position, Instrument, Pitch, Duration, Velocity, TimeSig, Tempo

Time is counted in positions, 16 per beat. docs/tokenizer.md has the table of fields. Encoding comes first in this
file, decoding second. Words hold the number of the bar that a note lies in, not its length, which is inferred from the
TimeSig ids.
"""

import math
from collections import defaultdict
from collections.abc import Callable

import mido
import numpy as np

from .encoding import Encoded, Encoding, Field
from .midi import PERCUSSION, MidiError, Part, Score, write_midi

BARS = 256  # a segment's; the next one counts from 0 again
TICKS_PER_POSITION = 30  # of decoded files

SIGNATURES = [(n, m) for m in (1, 2, 4, 8, 16, 32, 64) for n in range(1, 2 * m + 1)]
SIGNATURE_ID = {signature: number for number, signature in enumerate(SIGNATURES)}
BAR_LENGTH = np.array([n * 64 // m for n, m in SIGNATURES])  # in positions

# Octave k of the duration codes has 16 codes of 2^k positions each.
DURATION_CODE = np.repeat(np.arange(128), np.repeat(1 << np.arange(8), 16))  # [4080] positions → code
DURATION_FIRST = np.searchsorted(DURATION_CODE, np.arange(128))  # code → its first number of positions

NAMES = ("Bar", "Position", "Instrument", "Pitch", "Duration", "Velocity", "TimeSig", "Tempo")
SIZES = (BARS, 128, 129, 256, 128, 32, len(SIGNATURES), 49)
FIELDS = tuple(Field(name, values, specials=6) for name, values in zip(NAMES, SIZES, strict=True))


def to_position(tick: np.ndarray, ticks_per_beat: int) -> np.ndarray:
    """round(tick · 16 / ticks_per_beat), half to even like Python's `round`; int64, the shape of `tick`."""
    return np.rint(np.asarray(tick) * 16 / ticks_per_beat).astype(np.int64)


def tempo_id(microseconds: int) -> int:
    """round(12 · log2(clamp(bpm, 16, 256) / 16))."""
    bpm = min(max(mido.tempo2bpm(microseconds), 16), 256)
    return round(math.log2(bpm / 16) * 12)


def signature_id(n: int, m: int) -> int:
    """The id of n/m, reduced to the table: halved while m > 64, then n divided by its smallest divisor while n > 2m.

    Raises MidiError if m stays above 64 because n is odd.
    """
    while m > 64 and n % 2 == 0:
        n, m = n // 2, m // 2
    if m > 64:
        raise MidiError("absurd time signature", f"{n}/{m}")
    while n > 2 * m:
        n //= next(divisor for divisor in range(2, n + 1) if n % divisor == 0)
    return SIGNATURE_ID[n, m]


def _in_force(
    changes: list[tuple], default: tuple, id_of: Callable[..., int], score: Score, last: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions, increasing from 0, and ids of the tempos or signatures in force anywhere up to position `last`.

    Of several changes at one position the last one counts.
    """
    positions = to_position(np.array([tick for tick, *_ in changes]), score.ticks_per_beat).tolist()
    latest = {0: default} | dict(zip(positions, (values for _, *values in changes), strict=True))
    return np.array([(position, id_of(*values)) for position, values in latest.items() if position <= last]).T


def _bars(starts: np.ndarray, signatures: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bar number (uncut) and Position of each of `positions`, increasing, under signatures that change at `starts`.

    `starts` is increasing and begins with 0. A bar keeps the length that it began with, so the timeline is a row of
    runs of equal bars: one run for each signature in which at least one bar begins.
    """
    runs, position, bar = [], 0, 0
    stops = np.append(starts[1:], positions[-1] + 1).tolist()
    for length, stop in zip(BAR_LENGTH[signatures].tolist(), stops, strict=True):
        if position < stop:
            count = -((position - stop) // length)
            runs.append((position, bar, length))
            position, bar = position + count * length, bar + count
    runs = np.array(runs)
    first, bar, length = runs[np.searchsorted(runs[:, 0], positions, side="right") - 1].T
    bars, offsets = np.divmod(positions - first, length)
    return bar + bars, offsets


def encode_score(score: Score) -> Encoded:
    """The words of a score, sorted by all fields in field order (Bar before it is cut into segments).

    Raises MidiError if a time signature that the table cannot hold is in force.
    """
    notes = score.notes
    starts = to_position(notes.start, score.ticks_per_beat)
    lengths = to_position(notes.end, score.ticks_per_beat) - starts
    instruments = notes.instrument
    pitches = np.where(instruments == PERCUSSION, notes.pitch + 128, notes.pitch)
    durations = DURATION_CODE[np.minimum(lengths, len(DURATION_CODE) - 1)]
    velocities = notes.velocity // 4

    # Bar, Position, TimeSig and Tempo are functions of the start that grow with it or do not matter once it is known.
    # The start is below 2^35, so that all of it fits in 63 bits.
    order = np.argsort((((starts << 8 | instruments) << 8 | pitches) << 7 | durations) << 5 | velocities, kind="stable")
    starts = starts[order]

    signature_starts, signatures = _in_force(score.signatures, (4, 4), signature_id, score, starts[-1])
    tempo_starts, tempos = _in_force(score.tempos, (500_000,), tempo_id, score, starts[-1])
    bars, positions = _bars(signature_starts, signatures, starts)
    columns = (
        bars % BARS,
        positions,
        instruments[order],
        pitches[order],
        durations[order],
        velocities[order],
        signatures[np.searchsorted(signature_starts, starts, side="right") - 1],
        tempos[np.searchsorted(tempo_starts, starts, side="right") - 1],
    )
    segments = np.unique(bars // BARS, return_counts=True)[1]
    return Encoded(np.stack(columns, axis=1).astype(np.uint16), order, segments, {"never ends": score.unclosed})


def decode_words(words: np.ndarray) -> mido.MidiFile:
    """MIDI from ordinary octuple words, int64 [notes, 8]. A Bar lower than the one before opens a new segment.

    Every track holds one instrument; notes of one pitch that overlap go to separate tracks.
    """
    if not len(words):
        return write_midi([], [], [])
    starts, ends, pitches, bar_starts, bar_signatures = place_words(words)

    # A signature stands at its bar line, and again at each note that shows another one.
    signatures = _changes(np.append(bar_starts, starts), np.append(bar_signatures, words[:, 6]))
    tempos = _changes(np.append(0, starts), np.append(words[np.argmin(starts), 7], words[:, 7]))
    return write_midi(
        _parts(np.stack((starts, ends, pitches, words[:, 5] * 4 + 2, words[:, 2]), axis=1)),
        [(tick, mido.bpm2tempo(16 * 2 ** (number / 12))) for tick, number in tempos],
        [(tick, *SIGNATURES[number]) for tick, number in signatures],
    )


def place_words(words: np.ndarray) -> tuple[np.ndarray, ...]:
    """Start and end in ticks and MIDI pitch of ordinary octuple words, int64 [notes, 8], as they are decoded.

    And start in ticks and signature id of every bar up to the last. A bar has the signature of its first note; where
    its notes reach further than that, the shortest n/4 that holds them. Empty bars repeat the bar before.
    """
    positions = words[:, 1]
    bars = words[:, 0] + BARS * np.cumsum(np.diff(words[:, 0], prepend=0) < 0)
    order = np.lexsort((positions, bars))
    filled, first, count = np.unique(bars[order], return_index=True, return_counts=True)
    shown = words[order[first], 6]
    reach = positions[order[first + count - 1]] + 1
    quarters = np.array([SIGNATURE_ID[n, 4] for n in range(1, 9)])
    shown = np.where(BAR_LENGTH[shown] < reach, quarters[(reach - 1) // 16], shown)

    before = np.searchsorted(filled, np.arange(bars.max(initial=-1) + 1), side="right") - 1
    signatures = shown[np.maximum(before, 0)]
    bar_starts = (np.cumsum(BAR_LENGTH[signatures]) - BAR_LENGTH[signatures]) * TICKS_PER_POSITION
    starts = bar_starts[bars] + positions * TICKS_PER_POSITION
    lengths = np.maximum(DURATION_FIRST[words[:, 4]] * TICKS_PER_POSITION, 1)  # a note of no length is not heard
    return starts, starts + lengths, words[:, 3] % 128, bar_starts, signatures


def _changes(ticks: np.ndarray, ids: np.ndarray) -> list[tuple[int, int]]:
    """(tick, id) wherever the id changes in time order; the first one always."""
    order = np.argsort(ticks, kind="stable")
    ticks, ids = ticks[order], ids[order]
    kept = np.diff(ids, prepend=-1) != 0
    return list(zip(ticks[kept].tolist(), ids[kept].tolist(), strict=True))


def _parts(notes: np.ndarray) -> list[Part]:
    """Notes, int64 [N, 5] (start and end in ticks, pitch, velocity, instrument), by instrument and voice.

    Notes of one pitch share a voice only if they do not overlap.
    """
    voice_ends, voices = defaultdict(list), defaultdict(list)
    for *note, instrument in notes[np.lexsort(notes[:, [1, 2, 0]].T)].tolist():
        start, end, pitch, _ = note
        busy = voice_ends[instrument, pitch]
        voice = next((number for number, last in enumerate(busy) if last <= start), len(busy))
        busy[voice : voice + 1] = [end]
        voices[instrument, voice].append(note)
    return [
        Part("percussion" if instrument == PERCUSSION else f"program {instrument}", instrument, np.array(members))
        for (instrument, _), members in sorted(voices.items())
    ]


OCTUPLE = Encoding("octuple", FIELDS, 3, (0, 127), encode_score, decode_words, place_words)  # percussion is above 127
