"""Files rewritten: every note of the output is a note of the source, to the tick."""

import io

import numpy as np
import pytest
from amb.tokenizer import edit

from amb import tokenizer
from tests.scripts import bag


@pytest.fixture
def messy(midi) -> tokenizer.Score:
    """Two pianos on one channel whose notes of one pitch nest, drums, pedals, a tempo map, notes that never end."""
    key, note = b"\xff\x59\x02\xfd\x00", midi.note
    conductor = (0, midi.tempo(600_000)), (0, midi.signature(3, 2)), (0, key), (777, midi.tempo(431_234))
    right = (
        *((0, midi.name("right")), (0, midi.program(3)), (5, b"\xb0\x40\x7f"), (500, b"\xb0\x40\x00")),
        *note(0, 400, 60, 90),
        *note(100, 100, 62, 41),  # without length
        *note(101, 333, 60, 17),  # overlaps the first of its pitch
        *note(400, 500, 60, 33),
        (450, midi.on(70, 0)),  # ends nothing
        (600, midi.on(64, 99)),  # never ends
        (1 << 27, b"\xff\x2f\x00"),
    )
    left = (
        *((0, midi.name("left")), (99, b"\xb0\x40\x40"), (650, midi.tempo(555_555))),
        *note(50, 90, 60, 50),  # inside the other piano's
        *note(89, 601, 70, 51),
        *note(620, 700, 64, 52),
        *note(800, 1201, 40, 53),
        (1 << 40, b"\xff\x01\x04late"),
    )
    drums = [event for tick in range(0, 1000, 97) for event in note(tick, tick + 7, 36, 100, 9)]
    tracks = (conductor, right, left, drums, ((33, b"\xb0\x42\x7f"),))
    return tokenizer.read_midi(midi.file(midi.smf(*(midi.track(*events) for events in tracks), division=97)))


def again(midi_file) -> tokenizer.Score:
    file = io.BytesIO()
    midi_file.save(file=file)
    return tokenizer.read_midi(io.BytesIO(file.getvalue()))


def events_of(midi_file, *kinds) -> list:
    """(tick, message without its time) of these kinds, of all tracks, in time order."""
    events = []
    for track in midi_file.tracks:
        tick = 0
        for message in track:
            tick += message.time
            if message.type in kinds:
                events.append((tick, message.copy(time=0)))
    return sorted(events, key=lambda event: event[0])


@pytest.mark.parametrize("seed", range(8))
def test_split_holds_every_note_exactly_once_in_its_part(messy, seed):
    part = np.random.default_rng(seed).integers(0, 3, len(messy.notes.pitch))
    if seed == 0:
        part[:] = 2  # everything meets in one part
    names = ["旋律", "BRIDGE", "PIANO"]
    out = again(edit.split(messy, part, names))
    assert set(out.notes.name) <= set(names)
    for number, name in enumerate(names):
        assert bag(out.notes, out.notes.name == name) == bag(messy.notes, part == number)
    assert (out.unclosed, messy.unclosed) == (0, 1)
    assert (out.ticks_per_beat, out.tempos, out.signatures) == (97, messy.tempos, messy.signatures)
    assert max(sum(message.time for message in track) for track in out.midi.tracks) == 1201  # not the far future


def test_a_part_is_one_track_unless_notes_of_a_pitch_collide(messy):
    names = [track.name for track in edit.split(messy, np.zeros(len(messy.notes.pitch), int), ["MELODY"]).tracks]
    assert names == ["", "MELODY", "MELODY"]  # `left` has a note inside one of `right`
    of_right = np.where(messy.notes.name == "right", 0, -1)
    out = edit.split(messy, of_right, ["MELODY"])
    assert [track.name for track in out.tracks] == ["", "MELODY"]
    assert bag(again(out).notes) == bag(messy.notes, of_right == 0)
    empty = edit.split(messy, np.full(len(messy.notes.pitch), -1), ["MELODY"])
    assert [track.name for track in empty.tracks] == ["", "MELODY"]
    assert not events_of(empty, "note_on", "note_off")


def test_a_part_takes_along_what_shapes_its_sound(messy):
    out = edit.split(messy, np.where(messy.notes.name == "right", 0, -1), ["MELODY"])
    metas = ("set_tempo", "time_signature", "key_signature")
    assert events_of(out, *metas) == events_of(messy.midi, *metas)
    controls = [(tick, message.control, message.value) for tick, message in events_of(out, "control_change")]
    assert controls == [(5, 64, 127), (33, 66, 127), (500, 64, 0)]  # not the pedal of `left`
    assert [message.program for _, message in events_of(out, "program_change")] == [3]
    drums = edit.split(messy, np.where(messy.notes.channel == 9, 0, -1), ["DRUMS"])
    assert not events_of(drums, "control_change")


@pytest.mark.parametrize("kind", [0, 1])
def test_velocities_change_and_nothing_else(messy, kind):
    """A file that says type 0 and has several tracks becomes one of type 1: mido does not write the former."""
    messy.midi.type = kind
    before = [list(track) for track in messy.midi.tracks]
    new = np.random.default_rng(1).integers(1, 128, len(messy.notes.pitch))
    new[3] = 0  # keeps its own
    out = edit.set_velocities(messy, new)
    assert out.type == 1
    assert again(out).notes.velocity.tolist() == np.where(new, new, messy.notes.velocity).tolist()
    for old, changed in zip(before, out.tracks, strict=True):
        old = [message for message in old if message.type != "end_of_track" and message.time < 1 << 27]
        changed = [message for message in changed if message.type != "end_of_track"]
        mute = [[m.copy(velocity=1) if m.type == "note_on" and m.velocity else m for m in t] for t in (old, changed)]
        assert mute[0] == mute[1]
    assert [list(track) for track in messy.midi.tracks] == before
