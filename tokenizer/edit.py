"""MIDI files rewritten note by note: ticks, messages and tempo map stay.

`split` sorts the notes of a file into tracks, `set_velocities` gives them new velocities. Both work on the messages
that mido read (`Score.midi`), so that nothing is quantised; notes are the rows of `Score.notes`.
"""

from collections.abc import Iterator, Sequence
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

    tick: int
    track: int
    index: int


def split(score: Score, part: np.ndarray, names: Sequence[str]) -> mido.MidiFile:
    """A type-1 file of the same ticks per beat, with a track of each name, holding the notes of that part.

    part int [N]: for each note of `score` the index of its name, or -1 to leave it out, as notes that never end are.
    Messages of notes stay as they are. The first track has the file's tempos, signatures and keys; a named track also
    has the pedals, programs and bends of its notes' channels: those of the tracks that its notes come from, and of
    tracks that have no notes on such a channel.

    A note-off ends the oldest open note of its pitch in its channel and track. Where notes of several tracks meet in
    one, that could end the wrong one; such a note goes to a further track of the same name.
    """
    midi = score.midi
    messages = dict(sorted(event for number in range(len(midi.tracks)) for event in _placed(midi, number)))
    tracks, pairs = score.notes.track.tolist(), score.pairs.T.tolist()
    ons = list(map(Place, score.notes.start.tolist(), tracks, pairs[0]))
    offs = list(map(Place, score.notes.end.tolist(), tracks, pairs[1]))
    notes = list(zip(ons, offs, np.asarray(part).tolist(), strict=True))

    def source(place: Place) -> tuple[int, int]:
        return place.track, messages[place].channel

    playing = set(map(source, ons))
    out = mido.MidiFile(type=1, ticks_per_beat=midi.ticks_per_beat, charset=midi.charset)
    out.tracks.append(delta_track((at.tick, message) for at, message in messages.items() if message.type in CONDUCTOR))
    for number, name in enumerate(names):
        title = (0, mido.MetaMessage("track_name", name=name.encode("utf-8").decode("latin-1")))  # mido writes latin-1
        for layer in _layers([(on, off) for on, off, of in notes if of == number], messages):
            sources = {source(on) for on, _ in layer}
            channels = {channel for _, channel in sources}
            places = [place for note in layer for place in note]
            places += (
                place
                for place, message in messages.items()
                if message.type in CHANNEL
                and message.channel in channels
                and (source(place) in sources or source(place) not in playing)
            )
            out.tracks.append(delta_track([title, *((place.tick, messages[place]) for place in sorted(places))]))
    return out


def set_velocities(score: Score, velocities: np.ndarray) -> mido.MidiFile:
    """The file with other velocities, int [N], 1 to 127, one for each note of `score`; 0 keeps the note's."""
    ons = zip(score.notes.track.tolist(), score.pairs[:, 0].tolist(), strict=True)
    velocity_of = dict(zip(ons, np.asarray(velocities).tolist(), strict=True))
    midi = score.midi
    kind = 1 if len(midi.tracks) > 1 else midi.type  # some files of type 0 have more; mido does not write that
    out = mido.MidiFile(type=kind, ticks_per_beat=midi.ticks_per_beat, charset=midi.charset)
    for number in range(len(midi.tracks)):
        events = (
            (place.tick, message.copy(velocity=velocity) if (velocity := velocity_of.get(place[1:], 0)) else message)
            for place, message in _placed(midi, number)
        )
        out.tracks.append(delta_track(events))
    return out


def _placed(midi: mido.MidiFile, number: int) -> Iterator[tuple[Place, mido.Message]]:
    """The messages of one track in order, as far as there are notes."""
    tick = 0
    for index, message in enumerate(midi.tracks[number]):
        tick += message.time
        if tick > MAX_TICK:
            break
        yield Place(tick, number, index), message


def _layers(notes: list[tuple[Place, Place]], messages: dict[Place, mido.Message]) -> list[list[tuple[Place, Place]]]:
    """The notes in as few tracks as let each note-off find its note: one, unless notes of several tracks collide."""
    ends, layers = [{}], [[]]  # when the last note of each channel and pitch ends, by layer
    for on, off in sorted(notes):
        key = messages[on].channel, messages[on].note
        layer = next((number for number, end in enumerate(ends) if end.get(key, on) <= off), len(layers))
        if layer == len(layers):
            ends.append({})
            layers.append([])
        ends[layer][key] = off
        layers[layer].append((on, off))
    return layers
