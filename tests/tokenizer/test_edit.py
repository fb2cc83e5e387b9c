"""Predictions written back: every note of the output is a note of the source, to the tick."""

import io
from collections import Counter

import mido
import numpy as np
import pytest
from amb.tokenizer import edit

from amb import tokenizer

FIELDS = ("start", "end", "pitch", "velocity", "channel")


def message(kind, time=0, **values):
    return mido.Message(kind, time=time, **values)


def track(name: str, events: list) -> mido.MidiTrack:
    """From (tick, message) in time order."""
    made, now = mido.MidiTrack([mido.MetaMessage("track_name", name=name)]), 0
    for tick, event in events:
        made.append(event.copy(time=tick - now))
        now = tick
    return made


def played(start, end, pitch, velocity=64, channel=0) -> list:
    on = message("note_on", note=pitch, velocity=velocity, channel=channel)
    return [(start, on), (end, message("note_off", note=pitch, channel=channel))]


def in_order(*groups) -> list:
    return sorted((event for group in groups for event in group), key=lambda event: event[0])


@pytest.fixture
def messy() -> mido.MidiFile:
    """Two pianos on one channel whose notes of one pitch nest, drums, pedals, a tempo map, notes that never end."""
    conductor = track(
        "conductor",
        [
            (0, mido.MetaMessage("set_tempo", tempo=600_000)),
            (0, mido.MetaMessage("time_signature", numerator=3, denominator=4)),
            (0, mido.MetaMessage("key_signature", key="Eb")),
            (777, mido.MetaMessage("set_tempo", tempo=431_234)),
        ],
    )
    right = in_order(
        [(0, message("program_change", program=3)), (5, message("control_change", control=64, value=127))],
        played(0, 400, 60, 90),
        played(100, 100, 62, 41),  # without length
        played(101, 333, 60, 17),  # overlaps the first of its pitch
        played(400, 500, 60, 33),
        [(450, message("note_on", note=70, velocity=0))],  # ends nothing
        [(500, message("control_change", control=64, value=0))],
        [(600, message("note_on", note=64, velocity=99))],  # never ends
    )
    left = in_order(
        played(50, 90, 60, 50),  # inside the other piano's
        played(89, 601, 70, 51),
        played(620, 700, 64, 52),
        [(99, message("control_change", control=64, value=64))],
        [(650, mido.MetaMessage("set_tempo", tempo=555_555))],
        played(800, 1201, 40, 53),
    )
    drums = in_order(*(played(tick, tick + 7, 36, 100, 9) for tick in range(0, 1000, 97)))
    pedal = track("pedal of channel 0", [(33, message("control_change", control=66, value=127))])
    midi = mido.MidiFile(type=1, ticks_per_beat=97)
    midi.tracks += [conductor, track("right", right), track("left", left), track("drums", drums), pedal]
    return midi


def saved(midi: mido.MidiFile) -> bytes:
    file = io.BytesIO()
    midi.save(file=file)
    return file.getvalue()


def score(midi: mido.MidiFile) -> tokenizer.Score:
    return tokenizer.read_midi(io.BytesIO(saved(midi)))


def bag(notes: tokenizer.Notes, rows=slice(None)) -> Counter:
    return Counter(zip(*(getattr(notes, field)[rows].tolist() for field in FIELDS), strict=True))


def events_of(midi: mido.MidiFile, kinds) -> list:
    """(tick, message without its time) of these kinds, of all tracks, in time order."""
    found = []
    for one in midi.tracks:
        tick = 0
        for event in one:
            tick += event.time
            if event.type in kinds:
                found.append((tick, event.copy(time=0)))
    return sorted(found, key=lambda pair: pair[0])


@pytest.mark.parametrize("seed", range(8))
def test_split_holds_every_note_exactly_once_in_its_part(messy, seed):
    source = score(messy)
    part = np.random.default_rng(seed).integers(0, 3, len(source.notes.pitch))
    if seed == 0:
        part[:] = 2  # everything meets in one part
    out = score(edit.split(score(messy), part, ["MELODY", "BRIDGE", "PIANO"], endless_part=2))
    assert out.ticks_per_beat == 97
    assert set(out.notes.name) <= {"MELODY", "BRIDGE", "PIANO"}
    for number, name in enumerate(("MELODY", "BRIDGE", "PIANO")):
        assert bag(out.notes, out.notes.name == name) == bag(source.notes, part == number)
    assert out.unclosed == source.unclosed == 1
    assert out.tempos == source.tempos
    assert out.signatures == source.signatures


def test_a_part_is_one_track_unless_notes_of_a_pitch_collide(messy):
    count = len(score(messy).notes.pitch)
    names = [t.name for t in edit.split(score(messy), np.zeros(count, int), ["MELODY"]).tracks]
    assert names == ["", "MELODY", "MELODY"]  # `left` has a note inside one of `right`
    of_right = np.where(score(messy).notes.name == "right", 0, -1)
    out = edit.split(score(messy), of_right, ["MELODY"])
    assert [t.name for t in out.tracks] == ["", "MELODY"]
    assert bag(score(out).notes) == bag(score(messy).notes, of_right == 0)


def test_a_part_takes_along_what_shapes_its_sound(messy):
    source = score(messy)
    out = edit.split(score(messy), np.where(source.notes.name == "right", 0, -1), ["MELODY"])
    metas = ("set_tempo", "time_signature", "key_signature")
    assert events_of(out, metas) == events_of(messy, metas)
    controls = [(tick, e.control, e.value) for tick, e in events_of(out, ("control_change",))]
    assert controls == [(5, 64, 127), (33, 66, 127), (500, 64, 0)]  # not the pedal of `left`
    assert [e.program for _, e in events_of(out, ("program_change",))] == [3]
    drums = edit.split(score(messy), np.where(source.notes.channel == 9, 0, -1), ["DRUMS"])
    assert not events_of(drums, ("control_change",))


def test_an_empty_part_is_an_empty_track(messy):
    out = edit.split(score(messy), np.full(len(score(messy).notes.pitch), -1), ["MELODY"])
    assert [t.name for t in out.tracks] == ["", "MELODY"]
    assert not events_of(out, ("note_on", "note_off"))


def test_velocities_change_and_nothing_else(messy):
    source = score(messy)
    new = np.random.default_rng(1).integers(1, 128, len(source.notes.pitch))
    new[3] = 0  # keeps its own
    before = [list(t) for t in source.midi.tracks]
    out = edit.set_velocities(source, new)
    again = score(out)
    assert again.notes.velocity.tolist() == np.where(new, new, source.notes.velocity).tolist()
    assert all((getattr(again.notes, f) == getattr(source.notes, f)).all() for f in FIELDS if f != "velocity")
    sounding = ("note_on",)
    for old, changed in zip(before, out.tracks, strict=True):
        rest = [e for e in old if e.type not in ("note_on", "end_of_track")]
        assert rest == [e for e in changed if e.type not in ("note_on", "end_of_track")]
        assert [e.time for e in old if e.type in sounding] == [e.time for e in changed if e.type in sounding]
    assert [list(t) for t in source.midi.tracks] == before


def test_a_type_0_file_that_has_two_tracks_can_be_written(messy):
    source = score(messy)
    source.midi.type = 0
    assert edit.set_velocities(source, np.full(len(source.notes.pitch), 5)).type == 1


def test_the_far_future_is_not_copied_and_names_are_utf_8(messy):
    messy.tracks[1].append(mido.MetaMessage("end_of_track", time=1 << 27))
    messy.tracks[2].append(mido.MetaMessage("text", text="late", time=1 << 40))
    source = score(messy)
    out = edit.split(source, np.zeros(len(source.notes.pitch), int), ["旋律"])
    for midi in (out, edit.set_velocities(source, np.zeros(len(source.notes.pitch), int))):
        assert max(sum(message.time for message in track) for track in midi.tracks) < 2000
    assert set(score(out).notes.name) == {"旋律"}
