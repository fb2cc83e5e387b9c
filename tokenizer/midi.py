"""MIDI files to arrays of notes and back, with mido's messages. Whatever is wrong with a file is detected here."""

import os
import re
import stat
import struct
import unicodedata
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple

import mido
import numpy as np
from mido.midifiles.meta import UnknownMetaMessage, build_meta_message

MAX_BYTES = 8 << 20  # mido makes some 150 bytes of objects from one of the file's; real pieces are below 1 MiB
MAX_TICK = 1 << 31
MAX_NUMBER = 16  # bytes of a variable-length number: four by the standard, more with leading zeros
MAX_TRACKS = (1 << 15) - 1  # that mido can write
TICKS_PER_BEAT = 480  # of written files
PERCUSSION_CHANNEL = 9  # "channel 10" to musicians, who count from 1
MELODIC = [channel for channel in range(16) if channel != PERCUSSION_CHANNEL]
PERCUSSION = 128  # the instrument number of percussion, after the 128 programs

CHUNK_NAME = re.compile(rb"[A-Za-z]{4}")
END_OF_TRACK = b"\xff\x2f\x00"
DATA_BYTES = [2] * 192 + [1] * 32 + [2] * 16 + [0, 1, 2, 1] + [0] * 12  # after each status byte


class MidiError(ValueError):
    """A MIDI file that cannot be used. `reason` is one of a few short phrases, `detail` says more about this file."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self):
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


class Notes(NamedTuple):
    """Columns of equal length, one row a note. Ticks are those of the file."""

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
    """What a MIDI file holds of notes and time."""

    ticks_per_beat: int
    notes: Notes  # by track, within a track in the order in which they end
    tempos: list[tuple[int, int]]  # (tick, microseconds per beat), in time order, then track order
    signatures: list[tuple[int, int, int]]  # (tick, n, m) for n/m, in time order, then track order
    unclosed: int  # notes that never end, left out
    midi: mido.MidiFile | None = None  # the messages of the file that was read
    pairs: np.ndarray | None = None  # int64 [notes, 2]: each note's note-on and note-off, as indices into its track
    damage: str = ""  # what of the file could not be read; notes are those before


class Part(NamedTuple):
    """One track to be written: notes of one instrument, [start, end, pitch, velocity] in ticks, in order of start."""

    name: str
    instrument: int
    notes: np.ndarray


def read_midi(source: str | Path | BinaryIO) -> Score:
    """Read a MIDI file from a path or a binary file object. Raises MidiError for anything that cannot be used.

    Of a file that is cut off or has a bad track, all events before the damage are used; `damage` is the reason.
    """
    data = _read_bytes(source)
    # Before it there may be a RIFF header (.rmi), a byte order mark, blank lines, or MacBinary's 128 bytes.
    begin = data.find(b"MThd", 0, None if data[8:12] == b"RMID" else 256)
    if begin < 0:
        raise MidiError("not MIDI", "does not begin with MThd")
    data = data[begin:]
    if len(data) < 14:
        raise MidiError("damaged", "cut off in its header")
    size, kind, count, division = struct.unpack_from(">LHHh", data, 4)
    if kind == 2:
        raise MidiError("type 2", "its tracks do not play together")
    if kind > 2:
        raise MidiError("damaged", f"file type {kind}")
    if division < 0:
        raise MidiError("SMPTE time", "the file counts frames, not beats")
    if division == 0:
        raise MidiError("damaged", "zero ticks per beat")
    midi, damage = mido.MidiFile(type=kind, ticks_per_beat=division), []
    for number, (body, cut_off) in enumerate(islice(_tracks(data, 8 + size), MAX_TRACKS), 1):
        track, problem = _read_track(body)
        midi.tracks.append(track)
        if problem or cut_off:
            damage.append(f"track {number}: {problem or 'cut off'}")
    if len(midi.tracks) < count:
        damage.append(f"{count - len(midi.tracks)} of {count} tracks are missing")
    return _collect(midi, "; ".join(damage[:3]))


def _read_bytes(source: str | Path | BinaryIO) -> bytes:
    is_file = hasattr(source, "read")
    try:
        if not is_file and not stat.S_ISREG(os.stat(source).st_mode):  # opening a named pipe would wait for a writer
            is_folder = os.path.isdir(source)
            raise MidiError("unreadable", "a folder without readable MIDI" if is_folder else "not a regular file")
        with nullcontext(source) if is_file else open(source, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise MidiError("unreadable", error.strerror or str(error)) from None
    if len(data) > MAX_BYTES:
        raise MidiError("too large", f"more than {MAX_BYTES >> 20} MiB")
    return data


def _tracks(data: bytes, at: int) -> Iterator[tuple[bytes, bool]]:
    """The events of each track from byte `at`, and whether the file ends before they do; other chunks are ignored."""
    while at + 8 <= len(data) and not data.startswith(b"MThd", at):  # which would be another file, appended
        name, size = struct.unpack_from(">4sL", data, at)
        start, end = at + 8, at + 8 + size
        if name == b"MTrk":
            ends_well = data[end - 3 : end] == END_OF_TRACK or end == len(data) or CHUNK_NAME.match(data, end)
        else:
            ends_well = CHUNK_NAME.match(name) and end <= len(data)
        # Where the size is wrong, the chunk ends where the next track begins, or with the file.
        stop = end if ends_well else data.find(b"MTrk", at + 4)
        stop = len(data) if stop < 0 else stop
        if name == b"MTrk":
            yield data[start:stop], end > stop == len(data) and not data.endswith(END_OF_TRACK)
        at = stop


def _read_track(body: bytes) -> tuple[mido.MidiTrack, str]:
    """A track's messages up to the first that is damaged; and what the damage is, if any.

    mido makes the messages. It does not read the track, because it forgets running status at a system-exclusive
    message and gives up at the first unknown byte.
    """
    track, at, running, waited = mido.MidiTrack(), 0, 0, 0
    while at < len(body):
        begin = at
        try:
            delta, at = _number(body, at)
            status, at = (body[at], at + 1) if body[at] >= 0x80 else (running, at)
            kind = body[at] if status == 0xFF else 0
            if status in (0xF0, 0xF7, 0xFF):
                size, at = _number(body, at + (status == 0xFF))
            else:
                size = DATA_BYTES[status]
                running = status if status < 0xF0 else running
            data, at = body[at : at + size], at + size
            if not status or at > len(body):
                raise IndexError
        except IndexError:
            ended = bool(track) and track[-1].type == "end_of_track"  # what follows the end is no loss
            return track, "" if ended else f"its last {len(body) - begin:,} bytes cannot be read"
        waited += delta
        if message := _message(status, kind, data, waited):
            track.append(message)
            waited = 0
    return track, ""


def _number(body: bytes, at: int) -> tuple[int, int]:
    """A variable-length number at byte `at`, at most MAX_TICK, and where it ends. Raises IndexError if it does not."""
    value = 0
    for end, byte in enumerate(body[at : at + MAX_NUMBER], at + 1):
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return min(value, MAX_TICK), end
    raise IndexError


def _message(status: int, kind: int, data: bytes, time: int) -> mido.Message | mido.MetaMessage | None:
    """A message; None for what is left out: system messages other than system-exclusive ones, and meta messages that
    mido does not know or cannot decode. Data bytes above 127 become 127."""
    if status == 0xFF:
        try:
            message = build_meta_message(kind, list(data), time)
        except Exception:  # whatever its decoders stumble over
            return None
        return None if isinstance(message, UnknownMetaMessage) else message
    if status in (0xF0, 0xF7):
        data = data.removeprefix(b"\xf0").removesuffix(b"\xf7")
        return mido.Message("sysex", data=[min(byte, 127) for byte in data], time=time)
    return mido.Message.from_bytes([status, *(min(byte, 127) for byte in data)], time) if status < 0xF0 else None


def _name(track: mido.MidiTrack) -> str:
    """The track's name as UTF-8, or else latin-1, in one normal form, without control characters and outer space."""
    text = track.name  # mido decodes all text as latin-1
    with suppress(UnicodeDecodeError):
        text = text.encode("latin-1").decode("utf-8")
    kept = "".join(character for character in text if unicodedata.category(character) != "Cc")
    return unicodedata.normalize("NFC", kept).strip()


def _collect(midi: mido.MidiFile, damage: str) -> Score:
    """Notes, tempi and time signatures of a parsed file. A note-off ends the oldest open note of its pitch."""
    cells, tempos, signatures, unclosed = [], [], [], 0
    for track_index, track in enumerate(midi.tracks):
        tick, programs, waiting = 0, [0] * 16, defaultdict(deque)
        for index, message in enumerate(track):
            values = message.__dict__  # several times faster than attributes, and this loop is the encoder's cost
            tick += values["time"]
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
    if not cells:
        raise MidiError("damaged" if damage else "no notes", damage)
    if max(cells[2::9]) >= MAX_TICK:
        raise MidiError("absurd time", "a note ends at tick 2^31 or later")
    columns = np.array(cells, dtype=np.int64).reshape(-1, 9).T.copy()
    names = np.array([_name(track) for track in midi.tracks], dtype=object)
    notes = Notes(*columns[:7], names[columns[0]])
    tempos = _usable(tempos, notes.start, "absurd tempo")
    signatures = _usable(signatures, notes.start, "absurd time signature")
    return Score(midi.ticks_per_beat, notes, tempos, signatures, unclosed, midi, columns[7:].T, damage)


def _usable(changes: list[tuple], starts: np.ndarray, reason: str) -> list[tuple]:
    """Tempi or signatures by tick, without absurd ones. Raises MidiError if a note starts while one is in force."""
    changes = sorted(changes, key=itemgetter(0))  # stable: within a tick, track order stays
    before = np.searchsorted(np.sort(starts), [tick for tick, *_ in changes])  # notes that start before each change
    usable = []
    for change, now, later in zip(changes, before, np.append(before, len(starts))[1:], strict=True):
        if 0 not in change[1:] and max(change[1:]) < 1 << 31:
            usable.append(change)
        elif now < later:
            raise MidiError(reason, f"at tick {change[0]}")
    return usable


def write_midi(parts: list[Part], tempos: list, signatures: list) -> mido.MidiFile:
    """A type-1 file: one track of tempi [(tick, microseconds)] and signatures [(tick, n, m)], then one per part.

    Every note lasts a tick at least. Within a part, notes of one pitch that overlap must end in the order in which
    they are given. Warns where programs have to share a channel; see `_channels`.
    Raises ValueError if there are more parts than a MIDI file can have tracks.
    """
    if len(parts) >= MAX_TRACKS:
        raise ValueError(f"{len(parts)} tracks are more than a MIDI file can have")
    midi = mido.MidiFile(type=1, ticks_per_beat=TICKS_PER_BEAT)
    conductor = [(tick, mido.MetaMessage("set_tempo", tempo=tempo)) for tick, tempo in tempos]
    conductor += [(tick, mido.MetaMessage("time_signature", numerator=n, denominator=m)) for tick, n, m in signatures]
    midi.tracks.append(delta_track(sorted(conductor, key=itemgetter(0))))
    for (name, instrument, notes), channel in zip(parts, _channels(parts), strict=True):
        program = 0 if instrument == PERCUSSION else instrument
        events = [
            (0, 0, mido.MetaMessage("track_name", name=name)),
            (0, 0, mido.Message("program_change", channel=channel, program=program)),
        ]
        for start, end, pitch, velocity in notes.tolist():
            events.append((start, 1, mido.Message("note_on", channel=channel, note=pitch, velocity=velocity)))
            events.append((max(end, start + 1), 0, mido.Message("note_off", channel=channel, note=pitch)))
        events.sort(key=itemgetter(0, 1))  # at one tick: ends of earlier notes, then starts
        midi.tracks.append(delta_track((tick, message) for tick, _, message in events))
    return midi


def _channels(parts: list[Part]) -> list[int]:
    """A channel for each part: each program has its own while there are channels, then further parts of a program have.

    Of more programs than channels, those with the fewest notes share the last one, and a warning says so: players give
    them one sound.
    """
    notes = Counter()
    for part in parts:
        notes[part.instrument] += len(part.notes)
    programs = [program for program, _ in notes.most_common() if program != PERCUSSION]
    channel_of = {PERCUSSION: PERCUSSION_CHANNEL, **dict(zip(programs, MELODIC, strict=False))}
    if len(programs) > len(MELODIC):
        shared = ", ".join(map(str, sorted(programs[len(MELODIC) - 1 :])))
        warnings.warn(f"programs {shared} share a channel: a MIDI file has {len(MELODIC)} for them", stacklevel=5)
    spare, channels = iter(MELODIC[len(programs) :]), []
    for part in parts:
        channel = channel_of.get(part.instrument, MELODIC[-1])
        channels.append(next(spare, channel) if channel in channels and channel != PERCUSSION_CHANNEL else channel)
    return channels


def delta_track(events: Iterable[tuple[int, mido.Message]]) -> mido.MidiTrack:
    """A track of copies of messages at ticks, in time order, that ends with the last of them."""
    track, now = mido.MidiTrack(), 0
    for tick, message in events:
        if message.type != "end_of_track":
            track.append(message.copy(time=tick - now))
            now = tick
    track.append(mido.MetaMessage("end_of_track"))
    return track
