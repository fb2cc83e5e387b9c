"""Predictions written back into the MIDI file that they were made from: its own ticks, messages and tempo map.

`split` sorts the notes of a file into tracks, `set_velocities` gives them new velocities. Both work on the messages
that mido reads, so that nothing is quantised; `notes` pairs them exactly as `tokenizer.read_midi` does, row for row.
"""

import io
from collections import defaultdict, deque
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import mido
import numpy as np

from amb import tokenizer

# what concerns the whole file: it goes to the first track
CONDUCTOR = ("set_tempo", "time_signature", "key_signature", "smpte_offset", "marker", "copyright", "sysex")
# what shapes the sound of a channel's notes: pedals and other controllers, programs, bends, pressure
CHANNEL = ("control_change", "program_change", "pitchwheel", "aftertouch", "polytouch")


class Place(NamedTuple):
    """Where a message is: places compare in the order in which a player meets them."""

    tick: float
    track: int
    index: int


NEVER = Place(float("inf"), 0, 0)


class Note(NamedTuple):
    """A note by the places of its two messages; `off` is NEVER for a note that does not end."""

    on: Place
    off: Place
    channel: int
    pitch: int


def read(path: str | Path) -> tuple[mido.MidiFile, bytes]:
    """The messages of a MIDI file, and its bytes. Raises MidiError if `tokenizer.read_midi` would."""
    path = Path(path)
    try:
        if not path.is_file():
            raise tokenizer.MidiError("unreadable", "not a regular file" if path.exists() else "no such file")
        data = path.read_bytes()
    except OSError as error:
        raise tokenizer.MidiError("unreadable", error.strerror or str(error)) from None
    tokenizer.read_midi(io.BytesIO(data))
    return mido.MidiFile(file=io.BytesIO(data), clip=True), data


def notes(midi: mido.MidiFile) -> tuple[list[Note], list[Note]]:
    """The notes that end, one for each row of `tokenizer.read_midi(...).notes`, and those that never do."""
    ended, endless = [], []
    for number, track in enumerate(midi.tracks):
        tick, waiting = 0, defaultdict(deque)
        for index, message in enumerate(track):
            tick += message.time
            if message.type not in ("note_on", "note_off"):
                continue
            key, here = (message.channel, message.note), Place(tick, number, index)
            if message.type == "note_on" and message.velocity:
                waiting[key].append(here)
            elif waiting[key]:
                ended.append(Note(waiting[key].popleft(), here, *key))
        endless += (Note(on, NEVER, *key) for key, queue in waiting.items() for on in queue)
    return ended, endless


def split(midi: mido.MidiFile, part: np.ndarray, names: Sequence[str], endless_part: int = -1) -> mido.MidiFile:
    """A type-1 file of the same ticks per beat, with a track of each name, holding the notes of that part.

    part int [N]: for each of `notes(midi)[0]` the index of its name, or -1 to leave it out; `endless_part`: of all
    notes that never end. Messages of notes are the file's own. The first track has its tempos, signatures and keys; a
    named track also has the pedals, programs and bends of its notes' channels: those of the tracks that its notes
    come from, and of tracks that have no notes on such a channel.

    A note-off ends the oldest open note of its pitch in its channel and track. Where notes of several tracks meet in
    one, that could end the wrong one; such a note goes to a further track of the same name.
    """
    ended, endless = notes(midi)
    playing = {(note.on.track, note.channel) for note in ended + endless}
    messages = [list(_placed(number, track)) for number, track in enumerate(midi.tracks)]
    last = max((placed[-1][0].tick for placed in messages if placed), default=0)
    out = mido.MidiFile(type=1, ticks_per_beat=midi.ticks_per_beat, charset=midi.charset)
    everything = sorted((event for placed in messages for event in placed), key=itemgetter(0))
    out.tracks.append(_track([event for event in everything if event[1].type in CONDUCTOR], last))
    for number, name in enumerate(names):
        chosen = [note for note, of in zip(ended, np.asarray(part).tolist(), strict=True) if of == number]
        chosen += endless if endless_part == number else []
        for layer in _layers(chosen):
            sources = {(note.on.track, note.channel) for note in layer}
            channels = {channel for _, channel in sources}
            events = [
                (place, message)
                for place, message in everything
                if message.type in CHANNEL
                and message.channel in channels
                and ((place.track, message.channel) in sources or (place.track, message.channel) not in playing)
            ]
            for note in layer:
                ends = (note.on,) if note.off is NEVER else (note.on, note.off)
                events += ((place, midi.tracks[place.track][place.index]) for place in ends)
            title = (Place(-1, 0, 0), mido.MetaMessage("track_name", name=name))
            out.tracks.append(_track([title, *sorted(events, key=itemgetter(0))], last))
    return out


def set_velocities(midi: mido.MidiFile, velocities: np.ndarray) -> mido.MidiFile:
    """The file with other velocities, int [N], 1 to 127, one for each of `notes(midi)[0]`; 0 keeps a note's own."""
    new = {
        (note.on.track, note.on.index): velocity
        for note, velocity in zip(notes(midi)[0], np.asarray(velocities).tolist(), strict=True)
        if velocity
    }
    kind = 1 if len(midi.tracks) > 1 else midi.type  # some files say 0 and have more; mido does not write that
    out = mido.MidiFile(type=kind, ticks_per_beat=midi.ticks_per_beat, charset=midi.charset)
    for number, track in enumerate(midi.tracks):
        events = [
            (place, message.copy(velocity=new[number, place.index]) if (number, place.index) in new else message)
            for place, message in _placed(number, track)
            if not message.is_realtime  # which no MIDI file may hold
        ]
        out.tracks.append(_track(events, max((place.tick for place, _ in events), default=0)))
    return out


def _placed(number: int, track: mido.MidiTrack):
    tick = 0
    for index, message in enumerate(track):
        tick += message.time
        yield Place(tick, number, index), message


def _layers(chosen: list[Note]) -> list[list[Note]]:
    """The notes in as few tracks as let each note-off find its note: one, unless notes of several tracks collide."""
    layers: list[tuple[dict, list[Note]]] = [({}, [])]
    for note in sorted(chosen):
        key = note.channel, note.pitch
        free = (layer for layer in layers if key not in layer[0] or layer[0][key] <= note.off)
        if not (found := next(free, None)):
            layers.append(found := ({}, []))
        ends, layer = found
        ends[key] = note.off
        layer.append(note)
    return [layer for _, layer in layers]


def _track(events: list[tuple[Place, mido.Message]], last: int) -> mido.MidiTrack:
    """A track of the messages at these places, in order, that ends at tick `last`."""
    track, now = mido.MidiTrack(), 0
    for place, message in events:
        if message.type != "end_of_track":
            tick = max(now, place.tick)
            track.append(message.copy(time=tick - now))
            now = tick
    track.append(mido.MetaMessage("end_of_track", time=last - now))
    return track
