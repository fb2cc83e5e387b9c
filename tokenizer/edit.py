"""MIDI files rewritten note by note: their own ticks, messages and tempo map stay.

`split` sorts the notes of a file into tracks, `set_velocities` gives them new velocities. Both work on the messages
that mido read (`Score.midi`), so that nothing is quantised; notes are the rows of `Score.notes`.
"""

from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

import mido
import numpy as np

from .midi import MAX_TICK, Score, delta_track

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


def split(score: Score, part: np.ndarray, names: Sequence[str], endless_part: int = -1) -> mido.MidiFile:
    """A type-1 file of the same ticks per beat, with a track of each name, holding the notes of that part.

    part int [N]: for each note of `score` the index of its name, or -1 to leave it out; `endless_part`: of all notes
    that never end. Messages of notes are the file's own. The first track has its tempos, signatures and keys; a
    named track also has the pedals, programs and bends of its notes' channels: those of the tracks that its notes
    come from, and of tracks that have no notes on such a channel.

    A note-off ends the oldest open note of its pitch in its channel and track. Where notes of several tracks meet in
    one, that could end the wrong one; such a note goes to a further track of the same name.
    """
    midi = score.midi
    events = sorted((event for number in range(len(midi.tracks)) for event in _placed(midi, number)), key=itemgetter(0))
    ended, endless = _notes(score, events)
    playing = {(note.on.track, note.channel) for note in ended + endless}
    out = mido.MidiFile(type=1, ticks_per_beat=midi.ticks_per_beat, charset=midi.charset)
    conductor = [(place.tick, message) for place, message in events if message.type in CONDUCTOR]
    out.tracks.append(delta_track(conductor))
    for number, name in enumerate(names):
        title = (0, mido.MetaMessage("track_name", name=name.encode("utf-8").decode("latin-1")))  # mido writes latin-1
        chosen = [note for note, of in zip(ended, np.asarray(part).tolist(), strict=True) if of == number]
        chosen += endless if endless_part == number else []
        for layer in _layers(chosen):
            sources = {(note.on.track, note.channel) for note in layer}
            channels = {channel for _, channel in sources}
            sounding = [
                (place, message)
                for place, message in events
                if message.type in CHANNEL
                and message.channel in channels
                and ((place.track, message.channel) in sources or (place.track, message.channel) not in playing)
            ]
            places = [place for note in layer for place in (note.on, note.off) if place is not NEVER]
            sounding += ((place, midi.tracks[place.track][place.index]) for place in places)
            sounding.sort(key=itemgetter(0))
            out.tracks.append(delta_track([title, *((place.tick, message) for place, message in sounding)]))
    return out


def set_velocities(score: Score, velocities: np.ndarray) -> mido.MidiFile:
    """The file with other velocities, int [N], 1 to 127, one for each note of `score`; 0 keeps a note's own."""
    ons = zip(score.notes.track.tolist(), score.pairs[:, 0].tolist(), strict=True)
    velocity_of = dict(zip(ons, np.asarray(velocities).tolist(), strict=True))
    midi = score.midi
    kind = 1 if len(midi.tracks) > 1 else midi.type  # some files say 0 and have more; mido does not write that
    out = mido.MidiFile(type=kind, ticks_per_beat=midi.ticks_per_beat, charset=midi.charset)
    for number in range(len(midi.tracks)):
        events = [
            (place.tick, message.copy(velocity=velocity) if (velocity := velocity_of.get(place[1:], 0)) else message)
            for place, message in _placed(midi, number)
        ]
        out.tracks.append(delta_track(events))
    return out


def _placed(midi: mido.MidiFile, number: int):
    """(Place, message) of one track's messages in order, as far as there are notes."""
    tick = 0
    for index, message in enumerate(midi.tracks[number]):
        tick += message.time
        if tick > MAX_TICK:
            break
        yield Place(tick, number, index), message


def _notes(score: Score, events: list[tuple[Place, mido.Message]]) -> tuple[list[Note], list[Note]]:
    """The notes that end, row for row of `score.notes`, and those that never do."""
    notes = score.notes
    columns = (notes.track, notes.start, notes.end, notes.channel, notes.pitch, *score.pairs.T)
    ended = [
        Note(Place(start, track, on), Place(end, track, off), channel, pitch)
        for track, start, end, channel, pitch, on, off in zip(*(column.tolist() for column in columns), strict=True)
    ]
    ons = {note.on for note in ended}
    endless = [
        Note(place, NEVER, message.channel, message.note)
        for place, message in events
        if message.type == "note_on" and message.velocity and place not in ons
    ]
    return ended, endless


def _layers(chosen: list[Note]) -> list[list[Note]]:
    """The notes in as few tracks as let each note-off find its note: one, unless notes of several tracks collide."""
    layers: list[tuple[dict, list[Note]]] = [({}, [])]
    for note in sorted(chosen):
        key = note.channel, note.pitch
        free = (layer for layer in layers if key not in layer[0] or layer[0][key] <= note.off)
        if not (layer := next(free, None)):
            layers.append(layer := ({}, []))
        ends, members = layer
        ends[key] = note.off
        members.append(note)
    return [members for _, members in layers]
