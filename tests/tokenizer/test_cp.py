"""The cp encoding: its dictionary, limits and two rules. Words and round trips are in test_properties.py."""

import numpy as np
import pytest

from amb import tokenizer

CP = tokenizer.load("cp")


def encode(midi, *tracks, **header):
    return CP.encode(midi.file(midi.smf(*(midi.track(*events) for events in tracks), **header))).tolist()


def test_dictionary():
    fields = [(field.name, field.values, field.size) for field in CP.fields]
    assert fields == [("Bar", 2, 4), ("Position", 16, 18), ("Pitch", 86, 88), ("Duration", 64, 66)]
    assert CP.pad.tolist() == [2, 16, 86, 64]
    assert CP.mask.tolist() == [3, 17, 87, 65]
    assert CP.eos is None
    assert CP.fields[0].eos is None
    assert (CP.fields[CP.pitch_field].name, CP.pitch_range) == ("Pitch", (0, 85))
    assert tokenizer.load("midibert").fields == CP.fields


def test_pitch_range(midi):
    notes = [event for pitch in (21, 22, 107, 108) for event in midi.note(0, 480, pitch)]
    encoded = CP.encode_score(tokenizer.read_midi(midi.file(midi.smf(midi.track(*notes)))))
    assert encoded.words[:, 2].tolist() == [0, 85]
    assert sum(encoded.dropped.values()) == 2
    with pytest.raises(tokenizer.MidiError, match="no notes"):
        encode(midi, midi.note(0, 480, 21))


def test_decode_keeps_the_order_within_a_position(again):
    """Falling pitches, a pitch twice, and a note inside a longer one of its pitch: each takes another track."""
    words = np.array([[0, 0, 50, 63], [1, 0, 40, 0], [1, 0, 40, 9], [1, 1, 50, 0], [1, 1, 49, 0]])
    assert again(CP, words).tolist() == words.tolist()
