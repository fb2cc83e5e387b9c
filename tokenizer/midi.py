"""MIDI files to arrays of notes and back, by mido. Everything that can be wrong with a file is found here."""

import io
import os
import stat
from collections import defaultdict, deque
from collections.abc import Iterable
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
    midi: mido.MidiFile | None = None  # the messages of the file that was read
    pairs: np.ndarray | None = None  # int64 [notes, 2]: each note's note-on and note-off, as indices into its track


class Part(NamedTuple):
    """One track to be written: notes of one instrument, [start, end, pitch, velocity] in ticks, in order of start."""

    name: str
    instrument: int
    notes: np.ndarray


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
        for index, message in enumerate(track):
            values = message.__dict__  # several times faster than attributes, and this loop is the encoder's cost
            tick += values["time"]
            if tick > MAX_TICK:
                tick = MAX_TICK  # deltas may have thousands of digits; the sum must not
            kind = values["type"]
            if kind == "note_on" and values["velocity"]:
                waiting[values["channel"], values["note"]].append((tick, values["velocity"], index))
            elif kind == "note_off" or kind == "note_on":
                channel, pitch = values["channel"], values["note"]
                queue = waiting[channel, pitch]
                if queue:
                    start, velocity, begun = queue.popleft()
                    cells += (track_index, start, tick, pitch, velocity, channel, programs[channel], begun, index)
            elif kind == "program_change":
                programs[values["channel"]] = values["program"]
            elif kind == "set_tempo":
                tempos.append((tick, values["tempo"]))
            elif kind == "time_signature":
                signatures.append((tick, values["numerator"], values["denominator"]))
        unclosed += sum(map(len, waiting.values()))
    columns = np.array(cells, dtype=np.int64).reshape(-1, 9).T.copy()
    names = np.array([track.name for track in midi.tracks] or [""], dtype=object)
    notes = Notes(*columns[:7], names[columns[0]])
    _refuse_absurd(notes, tempos, signatures)
    # Sorting is stable: within a tick, track order stays.
    by_tick = itemgetter(0)
    tempos, signatures = sorted(tempos, key=by_tick), sorted(signatures, key=by_tick)
    return Score(midi.ticks_per_beat, notes, tempos, signatures, unclosed, midi, columns[7:].T)


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


def write_midi(parts: list[Part], tempos: list, signatures: list, ticks_per_beat: int = 480) -> mido.MidiFile:
    """A type-1 file: one track of tempi [(tick, microseconds)] and signatures [(tick, n, m)], then one per part.

    Within a part, notes of one pitch that overlap must end in the order in which they are given.
    Raises ValueError if there are more parts than a MIDI file can have tracks.
    """
    if len(parts) > 32766:
        raise ValueError(f"{len(parts)} tracks are more than a MIDI file can have")
    midi = mido.MidiFile(type=1, ticks_per_beat=ticks_per_beat)
    conductor = [(tick, mido.MetaMessage("set_tempo", tempo=tempo)) for tick, tempo in tempos]
    conductor += [(tick, mido.MetaMessage("time_signature", numerator=n, denominator=m)) for tick, n, m in signatures]
    midi.tracks.append(delta_track(sorted(conductor, key=itemgetter(0))))
    melodic = [channel for channel in range(16) if channel != PERCUSSION_CHANNEL]
    for index, (name, instrument, notes) in enumerate(parts):
        drums = instrument == PERCUSSION
        channel = PERCUSSION_CHANNEL if drums else melodic[index % 15]
        events = []
        for start, end, pitch, velocity in notes.tolist():
            # At one tick: ends of earlier notes, then starts, then ends of notes without length.
            events.append((start, 1, mido.Message("note_on", channel=channel, note=pitch, velocity=velocity)))
            events.append((end, 2 if start == end else 0, mido.Message("note_off", channel=channel, note=pitch)))
        events.sort(key=lambda event: event[:2])
        head = [
            (0, mido.MetaMessage("track_name", name=name)),
            (0, mido.Message("program_change", channel=channel, program=0 if drums else instrument)),
        ]
        midi.tracks.append(delta_track(head + [(tick, message) for tick, _, message in events]))
    return midi


def delta_track(events: Iterable[tuple[int, mido.Message]], end: int = 0) -> mido.MidiTrack:
    """A track of copies of messages at ticks, in time order, that ends at tick `end` or with its last message."""
    track, now = mido.MidiTrack(), 0
    for tick, message in events:
        if message.type != "end_of_track":
            track.append(message.copy(time=tick - now))
            now = tick
    track.append(mido.MetaMessage("end_of_track", time=max(end - now, 0)))
    return track
