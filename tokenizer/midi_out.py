"""Notes, tempi and time signatures to a MIDI file that players and sequencers show well."""

from operator import itemgetter
from typing import NamedTuple

import mido
import numpy as np

from .midi import PERCUSSION, PERCUSSION_CHANNEL


class Part(NamedTuple):
    """One track to be written: notes of one instrument, [start, end, pitch, velocity] in ticks, in order of start."""

    name: str
    instrument: int
    notes: np.ndarray


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
    midi.tracks.append(_track(sorted(conductor, key=itemgetter(0))))
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
        midi.tracks.append(_track(head + [(tick, message) for tick, _, message in events]))
    return midi


def _track(events: list) -> mido.MidiTrack:
    """A track from (tick, message) in time order."""
    track, now = mido.MidiTrack(), 0
    for tick, message in events:
        track.append(message.copy(time=tick - now))
        now = tick
    track.append(mido.MetaMessage("end_of_track"))
    return track
