"""The octuple encoding: its dictionary, and encodings worked out by hand."""

import warnings
from contextlib import nullcontext

import numpy as np
import pytest

from amb import tokenizer

OCTUPLE = tokenizer.load("octuple")
FOUR_FOUR, THREE_FOUR, BPM_120 = 9, 8, 35


def test_dictionary():
    names = ("Bar", "Position", "Instrument", "Pitch", "Duration", "Velocity", "TimeSig", "Tempo")
    values = (256, 128, 129, 256, 128, 32, 254, 49)
    assert [(field.name, field.values) for field in OCTUPLE.fields] == list(zip(names, values, strict=True))
    for field in OCTUPLE.fields:
        assert (field.pad, field.mask, field.eos, field.size) == tuple(field.values + n for n in (0, 1, 3, 6))
    assert OCTUPLE.pad.dtype == np.uint16
    assert (OCTUPLE.fields[OCTUPLE.pitch_field].name, OCTUPLE.pitch_range) == ("Pitch", (0, 127))


def test_unknown_encoding():
    with pytest.raises(ValueError, match="'remi'"):
        tokenizer.load("remi")


@pytest.mark.parametrize(
    ("n", "log2_m", "expected"),
    [
        (4, 2, FOUR_FOUR),  # m = 1, 2 hold 2 + 4 signatures, then 1/4 … 4/4
        (3, 2, THREE_FOUR), (1, 0, 0), (12, 3, 14 + 11), (6, 3, 14 + 5),
        (2, 6, 126 + 1), (128, 6, 253),  # m = 64 begins after 2 + 4 + 8 + 16 + 32 + 64
        (5, 1, 2),  # 5 > 4 and 5 is prime: 1/2
        (9, 2, 6 + 2), (255, 2, 6),  # 9 > 8: 3/4; 255 → 85 → 17 → 1: 1/4
        (8, 7, 126 + 3), (12, 8, 126 + 2),  # 8/128 = 4/64; 12/256 = 6/128 = 3/64
    ],
)  # fmt: skip
def test_time_signatures(midi, n, log2_m, expected):
    data = midi.smf(midi.track((0, midi.signature(n, log2_m)), *midi.note(0, 30)))
    assert OCTUPLE.encode(midi.file(data))[0, 6] == expected


def test_no_note_is_too_late(midi):
    """Beat 4,096 is bar 1,024 of 4/4, Bar 0 of the fifth segment; the last tick there is lies in bar 1,118,481."""
    notes = midi.note(65535 * 30, 65537 * 30, 60) + midi.note(65536 * 30, 65537 * 30, 61) + [(0, midi.on(1))]
    notes += midi.note(2**31 - 8, 2**31 - 1, 62)
    encoded = OCTUPLE.encode_score(tokenizer.read_midi(midi.file(midi.smf(midi.track(*notes)))))
    assert [word[:5] for word in encoded.words.tolist()] == [
        [1023 % 256, 63, 0, 60, 2],
        [0, 0, 0, 61, 1],
        [(2**31 // 1920) % 256, 2**31 // 30 % 64, 0, 62, 0],
    ]
    assert (encoded.segments.tolist(), encoded.dropped) == ([1, 1, 1], {"never ends": 1})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (np.zeros((3, 4), dtype=np.uint16), "integers"),
        (np.array([[0, 0, 0, 0, 0, 0, 0, 55]]), "Tempo"),
        (np.full((1, 8), -1), "Bar"),
    ],
)
def test_decode_checks_words(words, message):
    for method in (OCTUPLE.decode, OCTUPLE.timeline):
        with pytest.raises(ValueError, match=message):
            method(words)


def test_decode_leaves_specials_out():
    word = np.array([0, 0, 0, 60, 16, 16, FOUR_FOUR, BPM_120])
    decoded = OCTUPLE.decode(np.stack((word, OCTUPLE.eos, OCTUPLE.pad)))
    assert sum(message.type == "note_on" for track in decoded.tracks for message in track) == 1
    assert len(OCTUPLE.decode(OCTUPLE.pad[None]).tracks) == 1


def test_decode_plays(midi):
    """What a sequencer sees: tempo, metre, one track per instrument, drums on channel 10, velocities 4·id + 2."""
    words = [[0, 0, 128, 128 + 36, 1, 20, THREE_FOUR, 36], [1, 4, 40, 70, 17, 31, THREE_FOUR, 36]]
    conductor, strings, drums = OCTUPLE.decode(np.array(words)).tracks
    assert [(m.type, m.time) for m in conductor[:-1]] == [("set_tempo", 0), ("time_signature", 0)]
    assert (conductor[0].tempo, conductor[1].numerator, conductor[1].denominator) == (468_750, 3, 4)
    start, end = (message for message in drums if message.type.startswith("note"))
    assert (start.channel, start.note, start.velocity, start.time, end.time) == (9, 36, 82, 0, 30)
    start, end = (message for message in strings if message.type.startswith("note"))
    assert (start.channel, start.note, start.velocity, start.time, end.time) == (0, 70, 126, 52 * 30, 18 * 30)
    assert next(message.program for message in strings if message.type == "program_change") == 40


@pytest.mark.parametrize("programs", [3, 15, 18])
def test_channels_of_programs(midi, again, programs):
    """One each while there are any; a program has a second one, for notes that overlap, only if one is left over."""
    tracks = [midi.track((0, midi.program(n)), *midi.note(0, 480, 60) * (2 if n == 2 else 1)) for n in range(programs)]
    words = OCTUPLE.encode(midi.file(midi.smf(midi.track(*midi.note(0, 480, 36, channel=9)), *tracks)))
    shared = pytest.warns(UserWarning, match="programs 14, 15, 16, 17 share a channel")
    with shared if programs > 15 else nullcontext():
        decoded = OCTUPLE.decode(words)
    used = [(m.program, m.channel) for track in decoded.tracks for m in track if m.type == "program_change"]
    assert {channel for program, channel in used} == set(range(16)) if programs > 3 else {0, 1, 2, 3, 9}
    melodic = sorted(channel for _, channel in used if channel != 9)
    assert len(set(melodic)) == min(programs + 1, 15)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert again(OCTUPLE, words).tolist() == words.tolist()
