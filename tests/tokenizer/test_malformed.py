"""Files that cannot be used: each is refused with its reason, quickly, whatever it claims about itself."""

import contextlib
import os
import random
import time

import pytest
from amb.tokenizer import MidiError
from amb.tokenizer.midi import MAX_BYTES
from hypothesis import example, given, settings
from hypothesis import strategies as st

from amb import tokenizer

BOTH = list(tokenizer.ENCODINGS.values())


def refused(midi, data):
    """The reason, which must not depend on the encoding."""
    reasons = set()
    for encoding in BOTH:
        with pytest.raises(MidiError) as caught:
            encoding.encode(midi.file(data))
        reasons.add(caught.value.reason)
    assert len(reasons) == 1
    return reasons.pop()


def test_not_midi(midi):
    assert refused(midi, b"") == "not MIDI"
    assert refused(midi, b"Dear reader,\nthis is a text file.\n") == "not MIDI"
    assert refused(midi, b"RIFF....RMID") == "not MIDI"


def test_truncated(midi):
    data = midi.smf(midi.track(*midi.note(0, 480)))
    for length in range(4, len(data)):
        assert refused(midi, data[:length]) == "damaged"


def test_random_bytes_behind_a_header(midi):
    head = midi.smf(midi.track())[:22]
    for seed in range(300):
        refused(midi, head + random.Random(seed).randbytes(200))


@pytest.mark.parametrize(
    ("division", "kind", "reason"),
    [(-25 * 256 + 40, 1, "SMPTE time"), (0, 1, "damaged"), (480, 2, "type 2"), (480, 7, "damaged")],
)
def test_headers(midi, division, kind, reason):
    assert refused(midi, midi.smf(midi.track(*midi.note(0, 480)), division=division, kind=kind)) == reason


@pytest.mark.parametrize("count", [2, 16384, 32767])
def test_more_tracks_claimed_than_there_are(midi, count):
    assert refused(midi, midi.smf(midi.track(*midi.note(0, 480)), count=count)) == "damaged"


def test_no_notes(midi):
    assert refused(midi, midi.smf()) == "no notes"
    assert refused(midi, midi.smf(midi.track(), count=65535)) == "no notes"  # −1 to mido
    assert refused(midi, midi.smf(midi.track((0, midi.tempo(1)), (0, midi.off(60))))) == "no notes"
    assert refused(midi, midi.smf(midi.track((0, midi.on(60)), (5, midi.on(61))))) == "no notes"  # never end
    assert refused(midi, midi.smf(midi.track((0, midi.on(60))), midi.track((9, midi.off(60))))) == "no notes"


@pytest.mark.parametrize(("n", "log2_m"), [(0, 2), (4, 32), (255, 255)])
def test_absurd_signatures(midi, n, log2_m):
    data = midi.smf(midi.track((0, midi.signature(n, log2_m)), *midi.note(0, 480)))
    assert refused(midi, data) == "absurd time signature"


def test_signature_outside_the_table(midi):
    """3/128 cannot be halved. Only octuple has time signatures, and only one that is in force matters."""
    late = midi.smf(midi.track(*midi.note(0, 480), (960, midi.signature(3, 7))))
    now = midi.smf(midi.track(*midi.note(0, 480), (0, midi.signature(3, 7))))
    octuple, cp = BOTH
    assert len(octuple.encode(midi.file(late))) == len(cp.encode(midi.file(now))) == 1
    with pytest.raises(MidiError) as caught:
        octuple.encode(midi.file(now))
    assert caught.value.reason == "absurd time signature"


def test_zero_tempo(midi):
    assert refused(midi, midi.smf(midi.track((0, midi.tempo(0)), *midi.note(0, 480)))) == "absurd tempo"


def test_gigantic_times(midi):
    huge = b"\xff" * 5000 + b"\x7f"  # one delta of some 10,000 digits
    events = huge + midi.on(60) + b"\x10" + midi.off(60)
    chunk = b"MTrk" + len(events).to_bytes(4, "big") + events
    assert refused(midi, midi.smf(chunk)) == "absurd time"
    late = midi.smf(midi.track(*midi.note(2**31 - 40, 2**31 - 1)))
    assert len(BOTH[1].encode(midi.file(late))) == 1  # cp has no last position
    unheard = midi.smf(midi.track(*midi.note(0, 480), (2**31, midi.tempo(7))))
    assert len(BOTH[0].encode(midi.file(unheard))) == 1


def test_endless_number(midi):
    """mido would take hours over this one."""
    began = time.perf_counter()
    chunk = b"MTrk" + (1 << 22).to_bytes(4, "big") + b"\xff" * (1 << 22)
    assert refused(midi, midi.smf(chunk)) == "damaged"
    assert time.perf_counter() - began < 2


def test_lengths_that_claim_gigabytes(midi):
    good = midi.track(*midi.note(0, 480))
    assert refused(midi, midi.smf(good[:4] + b"\xff\xff\xff\xff" + good[8:])) == "damaged"
    assert refused(midi, b"MThd\xff\xff\xff\xff" + midi.smf(good)[8:]) == "damaged"
    assert refused(midi, midi.smf(midi.track((0, b"\xff\x01\xff\xff\xff\x7f")))) == "damaged"
    assert refused(midi, midi.smf(midi.track((0, b"\xf0\xff\xff\xff\x7f")))) == "damaged"


def test_too_large(midi):
    assert refused(midi, b"MThd" + bytes(MAX_BYTES)) == "too large"


def test_many_starts_of_one_pitch_take_linear_time(midi):
    ons = b"\x00\x90\x3c\x40" + b"\x00\x3c\x40" * 40_000
    offs = b"\x00\x3c\x00" * 40_001
    chunk = b"MTrk" + len(ons + offs).to_bytes(4, "big") + ons + offs
    assert len(BOTH[0].encode(midi.file(midi.smf(chunk)))) == 40_001


def test_data_bytes_above_127_are_clipped(midi):
    events = (0, b"\x90\x3c\xff"), (480, midi.off(60))
    assert BOTH[0].encode(midi.file(midi.smf(midi.track(*events))))[0, 5] == 31


def test_unreadable_paths(tmp_path):
    os.mkfifo(tmp_path / "pipe.mid")
    (tmp_path / "loop.mid").symlink_to("loop.mid")
    for path in (tmp_path, tmp_path / "pipe.mid", tmp_path / "loop.mid", tmp_path / "missing.mid"):
        with pytest.raises(MidiError) as caught:
            BOTH[0].encode(path)
        assert caught.value.reason == "unreadable"


def test_error_says_reason_and_detail():
    assert str(MidiError("damaged", "EOFError")) == "damaged (EOFError)"
    assert str(MidiError("no notes")) == "no notes"


@given(data=st.binary(max_size=400), at=st.integers(0, 100))
@example(data=b"\xff\x59\x02\x63\x63", at=23)  # a key that does not exist
@settings(max_examples=300, deadline=None)
def test_nothing_but_midi_errors(midi, data, at):
    """A good file with bytes put over it or behind its header is encoded or refused, never a traceback."""
    good = midi.smf(midi.track((0, midi.tempo(400_000)), (0, midi.signature(3, 2)), *midi.note(0, 480)))
    for damaged in (data, good[:22] + data, good[:at] + data[: len(good)] + good[at + len(data) :]):
        for encoding in BOTH:
            with contextlib.suppress(MidiError):
                words = encoding.encode(midi.file(damaged))
                assert (words < [field.values for field in encoding.fields]).all()
