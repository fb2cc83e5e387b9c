"""Octuple words back to MIDI.

The words say in which bar a note lies, not how long the bars are: those lengths are inferred from the TimeSig ids.
"""

import mido
import numpy as np

from .midi import PERCUSSION
from .midi_out import Part, write_midi
from .octuple import BAR_LENGTH, BARS, DURATION_FIRST, POSITIONS, SIGNATURE_ID, SIGNATURES

TICKS_PER_POSITION = 30  # at 480 ticks per beat


def decode_words(words: np.ndarray) -> mido.MidiFile:
    """MIDI from ordinary octuple words, int64 [notes, 8]. A Bar lower than the one before opens a new segment.

    Every track holds one instrument; notes of one pitch that lie inside one another go to separate tracks.
    """
    if not len(words):
        return write_midi([], [], [])
    starts, ends, bar_starts, bar_signatures = _place(words)
    parts = _parts(starts * TICKS_PER_POSITION, ends * TICKS_PER_POSITION, words)

    # A signature stands at its bar line, and again at each note that shows another one.
    signatures = _changes(np.append(bar_starts, starts), np.append(bar_signatures, words[:, 6]))
    tempos = _changes(np.append(0, starts), np.append(words[np.argmin(starts), 7], words[:, 7]))
    return write_midi(
        parts,
        [(tick, mido.bpm2tempo(16 * 2 ** (number / 12))) for tick, number in tempos],
        [(tick, *SIGNATURES[number]) for tick, number in signatures],
    )


def place_words(words: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start and end in beats and MIDI pitch of ordinary octuple words, int64 [notes, 8], as they are decoded."""
    if not len(words):
        return np.empty(0), np.empty(0), np.empty(0, np.int64)
    starts, ends, _, _ = _place(words)
    return starts / 16, ends / 16, words[:, 3] % 128


def _place(words: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Start and end of every note and start of every bar, in positions; signature id of every bar."""
    bars = words[:, 0] + BARS * np.append(0, np.cumsum(np.diff(words[:, 0]) < 0))
    bar_starts, bar_signatures = _timeline(bars, words[:, 1], words[:, 6])
    starts = bar_starts[bars] + words[:, 1]
    return starts, starts + DURATION_FIRST[words[:, 4]], bar_starts, bar_signatures


def _timeline(bars: np.ndarray, positions: np.ndarray, signatures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start, in positions, and signature id of every bar up to the last, from the notes that lie in them.

    A bar has the signature of its first note; where its notes reach further than that, the shortest n/4 that holds
    them. Empty bars repeat the bar before, or are as short as can be if the piece would not fit otherwise.
    """
    order = np.lexsort((positions, bars))
    filled, first = np.unique(bars[order], return_index=True)
    last = np.append(first[1:], len(order)) - 1
    shown = signatures[order[first]]
    reach = positions[order[last]] + 1
    quarters = np.array([SIGNATURE_ID[n, 4] for n in range(1, 9)])
    shown = np.where(BAR_LENGTH[shown] < reach, quarters[(reach - 1) // 16], shown)

    before = np.maximum(np.searchsorted(filled, np.arange(filled[-1] + 1), side="right") - 1, 0)
    everywhere = shown[before]
    if BAR_LENGTH[everywhere].sum() > POSITIONS:
        everywhere = np.full(len(everywhere), SIGNATURE_ID[1, 64])
        everywhere[filled] = shown
    return np.cumsum(BAR_LENGTH[everywhere]) - BAR_LENGTH[everywhere], everywhere


def _changes(positions: np.ndarray, ids: np.ndarray) -> list[tuple[int, int]]:
    """(tick, id) wherever the id changes in time order; the first one always."""
    order = np.argsort(positions, kind="stable")
    positions, ids = positions[order], ids[order]
    kept = np.append(True, ids[1:] != ids[:-1])
    return list(zip((positions[kept] * TICKS_PER_POSITION).tolist(), ids[kept].tolist(), strict=True))


def _parts(starts: np.ndarray, ends: np.ndarray, words: np.ndarray) -> list[Part]:
    """The notes by instrument and voice. Notes of one pitch share a voice only if they end in the order they start."""
    instruments, pitches = words[:, 2], words[:, 3] % 128
    order = np.lexsort((ends, starts, pitches, instruments))
    voices = np.zeros(len(words), dtype=np.int64)
    key, voice_ends = None, []
    for row, instrument, pitch, end in zip(
        *(x[order].tolist() for x in (np.arange(len(words)), instruments, pitches, ends)), strict=True
    ):
        if (instrument, pitch) != key:
            key, voice_ends = (instrument, pitch), []
        voice = next((v for v, last in enumerate(voice_ends) if last <= end), len(voice_ends))
        voice_ends[voice : voice + 1] = [end]
        voices[row] = voice
    parts = []
    for instrument, voice in np.unique(np.stack((instruments, voices), axis=1), axis=0).tolist():
        rows = order[(instruments[order] == instrument) & (voices[order] == voice)]
        rows = rows[np.argsort(starts[rows], kind="stable")]
        notes = np.stack((starts[rows], ends[rows], pitches[rows], words[rows, 5] * 4 + 2), axis=1)
        parts.append(Part("percussion" if instrument == PERCUSSION else f"program {instrument}", instrument, notes))
    return parts
