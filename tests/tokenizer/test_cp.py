"""The cp encoding: its dictionary, and encodings worked out by hand. Round trips are in test_properties.py."""

import numpy as np
import pytest

from amb import tokenizer

CP = tokenizer.load("cp")
NEW, CONTINUE = 0, 1


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


def test_bars_and_positions(midi):
    """Bars have 1,920 ticks whatever the file says; an empty bar leaves no trace."""
    notes = [event for tick in (0, 480, 1920, 5760) for event in midi.note(tick, tick + 480)]
    places = [word[:2] for word in encode(midi, [(0, midi.signature(3, 2))], notes)]
    assert places == [[NEW, 0], [CONTINUE, 4], [NEW, 0], [NEW, 0]]


@pytest.mark.parametrize(
    ("start", "ticks", "expected"),
    [
        # starts snap, ties down, and the note moves as a whole: tick 1,861 is nearest to the next bar
        (60, 240, (NEW, 0, 3)), (61, 240, (NEW, 1, 3)), (180, 240, (NEW, 1, 3)), (1859, 240, (NEW, 15, 3)),
        (1860, 240, (NEW, 15, 3)), (1861, 240, (NEW, 0, 3)),
        # 60 ticks is Duration 0; nearest, ties down
        (0, 0, (NEW, 0, 0)), (0, 90, (NEW, 0, 0)), (0, 91, (NEW, 0, 1)), (0, 150, (NEW, 0, 1)), (0, 151, (NEW, 0, 2)),
        (0, 3840, (NEW, 0, 63)), (0, 100_000, (NEW, 0, 63)),
    ],
)  # fmt: skip
def test_starts_and_durations(midi, start, ticks, expected):
    bar, position, pitch, duration = encode(midi, midi.note(start, start + ticks))[0]
    assert (bar, position, duration) == expected
    assert pitch == 38


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


def test_midibert_is_cp_with_two_rules_more(midi):
    """96 ticks of 96 a beat are 96 of 480; the last start is 480, so that the grid ends at 360."""
    data = midi.smf(midi.track(*midi.note(0, 96, 60), *midi.note(96, 192, 61), *midi.note(480, 576, 62)), division=96)
    midibert = tokenizer.load("midibert")
    assert midibert.encode(midi.file(data)).tolist() == [[0, 0, 38, 1], [1, 1, 39, 1], [1, 3, 40, 1]]
    assert CP.encode(midi.file(data)).tolist() == [[0, 0, 38, 7], [1, 4, 39, 7], [0, 4, 40, 7]]
    assert midibert.fields == CP.fields
