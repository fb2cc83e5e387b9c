"""MIDI files to arrays of notes, by mido. Everything that can be wrong with a file is found here."""

import io
import os
import stat
from collections import defaultdict, deque
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple

import mido
import numpy as np

MAX_BYTES = 8 << 20  # mido makes some 150 bytes of objects from one of the file's; real pieces are below 1 MiB
MAX_RUN = 1 << 14  # see _refuse_endless_numbers
MAX_TICK = 1 << 31
PERCUSSION_CHANNEL = 9  # "channel 10" to musicians, who count from 1
PERCUSSION = 128  # the instrument number of percussion, after the 128 programs


class MidiError(ValueError):
    """A MIDI file that cannot be used. `reason` is one of a few short phrases, `detail` says more about this file."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self):
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


class Notes(NamedTuple):
    """Columns of equal length, one row a note. Ticks are the file's own."""

    track: np.ndarray  # int64, index of the track in the file
    start: np.ndarray  # int64 tick
    end: np.ndarray  # int64 tick
    pitch: np.ndarray  # int64, 0–127, percussion too
    velocity: np.ndarray  # int64, 1–127
    channel: np.ndarray  # int64, 0–15; 9 is percussion
    program: np.ndarray  # int64, 0–127, of the channel in that track when the note ended
    name: np.ndarray  # object: the track's name, a str

    def take(self, rows: np.ndarray) -> "Notes":
        """The given rows (indices or a boolean mask), in that order."""
        return Notes(*(column[rows] for column in self))

    @property
    def instrument(self) -> np.ndarray:
        """int64, the program, or 128 for percussion."""
        return np.where(self.channel == PERCUSSION_CHANNEL, PERCUSSION, self.program)


class Score(NamedTuple):
    """What a MIDI file says about notes and time."""

    ticks_per_beat: int
    notes: Notes  # by track, within a track in the order in which they end
    tempos: list[tuple[int, int]]  # (tick, microseconds per beat), in time order, then track order
    signatures: list[tuple[int, int, int]]  # (tick, n, m) for n/m, in time order, then track order
    unclosed: int  # notes that never end, left out


def read_midi(source: str | Path | BinaryIO) -> Score:
    """Read a MIDI file from a path or a binary file object. Raises MidiError for anything that cannot be used."""
    data = _read_bytes(source)
    if data[:4] != b"MThd":
        raise MidiError("not MIDI", "does not begin with MThd")
    _refuse_endless_numbers(data)
    try:
        midi = mido.MidiFile(file=io.BytesIO(data), clip=True)
    except Exception as error:  # mido raises whatever its parser stumbles over
        raise MidiError("damaged", f"{type(error).__name__} {error}".strip()) from None
    if midi.type == 2:
        raise MidiError("type 2", "its tracks do not play together")
    if midi.type not in (0, 1):
        raise MidiError("damaged", f"file type {midi.type}")
    if midi.ticks_per_beat < 0:
        raise MidiError("SMPTE time", "the file counts frames, not beats")
    if midi.ticks_per_beat == 0:
        raise MidiError("damaged", "zero ticks per beat")
    return _collect(midi)


def _read_bytes(source: str | Path | BinaryIO) -> bytes:
    try:
        if hasattr(source, "read"):
            data = source.read(MAX_BYTES + 1)
        else:
            if not stat.S_ISREG(os.stat(source).st_mode):  # opening a named pipe would wait for a writer
                raise MidiError("unreadable", "not a regular file")
            with open(source, "rb") as file:
                data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise MidiError("unreadable", error.strerror or str(error)) from None
    if len(data) > MAX_BYTES:
        raise MidiError("too large", f"more than {MAX_BYTES >> 20} MiB")
    return data


def _refuse_endless_numbers(data: bytes) -> None:
    """Raise MidiError if more than MAX_RUN bytes in a row have their high bit set.

    In a variable-length number that bit means "more follows", and mido's time to read one grows with the square of
    its length: without this check one file could keep a worker busy for hours.
    """
    low = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) < 0x80)
    if np.diff(low, prepend=-1, append=len(data)).max() > MAX_RUN:
        raise MidiError("damaged", f"more than {MAX_RUN:,} bytes in a row that end no number")


def _collect(midi: mido.MidiFile) -> Score:
    """Notes, tempi and time signatures of a parsed file. A note-off ends the oldest open note of its pitch."""
    cells, tempos, signatures, unclosed = [], [], [], 0
    for track_index, track in enumerate(midi.tracks):
        tick, programs, waiting = 0, [0] * 16, defaultdict(deque)
        for message in track:
            values = message.__dict__  # several times faster than attributes, and this loop is the encoder's cost
            tick += values["time"]
            if tick > MAX_TICK:
                tick = MAX_TICK  # deltas may have thousands of digits; the sum must not
            kind = values["type"]
            if kind == "note_on" and values["velocity"]:
                waiting[values["channel"], values["note"]].append((tick, values["velocity"]))
            elif kind == "note_off" or kind == "note_on":
                channel, pitch = values["channel"], values["note"]
                queue = waiting[channel, pitch]
                if queue:
                    start, velocity = queue.popleft()
                    cells += (track_index, start, tick, pitch, velocity, channel, programs[channel])
            elif kind == "program_change":
                programs[values["channel"]] = values["program"]
            elif kind == "set_tempo":
                tempos.append((tick, values["tempo"]))
            elif kind == "time_signature":
                signatures.append((tick, values["numerator"], values["denominator"]))
        unclosed += sum(map(len, waiting.values()))
    columns = np.array(cells, dtype=np.int64).reshape(-1, 7).T.copy()
    names = np.array([track.name for track in midi.tracks] or [""], dtype=object)
    notes = Notes(*columns, names[columns[0]])
    _refuse_absurd(notes, tempos, signatures)
    # Sorting is stable: within a tick, track order stays.
    by_tick = itemgetter(0)
    return Score(midi.ticks_per_beat, notes, sorted(tempos, key=by_tick), sorted(signatures, key=by_tick), unclosed)


def _refuse_absurd(notes: Notes, tempos: list, signatures: list) -> None:
    if not len(notes.track):
        raise MidiError("no notes")
    if notes.end.max() >= MAX_TICK:
        raise MidiError("absurd time", "a note ends at tick 2^31 or later")
    if any(tempo == 0 for _, tempo in tempos):
        raise MidiError("absurd tempo", "zero microseconds per beat")
    for _, n, m in signatures:
        if n == 0 or m >= 1 << 31:
            raise MidiError("absurd time signature", f"{n}/2^{m.bit_length() - 1}")
