"""Files as they are found: what other readers play is read; what cannot be used is refused with its reason, quickly."""

import contextlib
import os
import time
import unicodedata

import pytest
from amb.tokenizer import MidiError
from amb.tokenizer.midi import MAX_BYTES
from hypothesis import given, settings
from hypothesis import strategies as st

from amb import tokenizer

ALL = list(tokenizer.ENCODINGS.values())


def refused(midi, data):
    """The reason, which must not depend on the encoding."""
    reasons = set()
    for encoding in ALL:
        with pytest.raises(MidiError) as caught:
            encoding.encode(midi.file(data))
        reasons.add(caught.value.reason)
    assert len(reasons) == 1
    return reasons.pop()


def meta(kind, content=b""):
    return bytes((0xFF, kind, len(content))) + content


def chunk(events):
    return b"MTrk" + len(events).to_bytes(4, "big") + events


def resized(chunk, by):
    """A chunk that says it is longer or shorter than it is."""
    return chunk[:4] + (int.from_bytes(chunk[4:8], "big") + by).to_bytes(4, "big") + chunk[8:]


UNUSED = [
    meta(0x59, b"\x08\x00"), meta(0x59, b"\x00\xff"), meta(0x59), meta(0x51, b"\x07\xa1"), meta(0x58, b"\x03\x02"),
    meta(0x54, b"\xff\x46\x46\x00\x00"), meta(0x54), meta(0x20), meta(0x00, b"\x01"), meta(0x60, b"abc"), meta(0x7E),
    b"\xf0\x05\x7e\x7f\x09\x01\xf7", b"\xf7\x02\xf3\x01", b"\xf2\x01\x02", b"\xf1\x11", b"\xf8", b"\xfe", b"\xf4",
]  # fmt: skip


@pytest.mark.parametrize("unused", UNUSED, ids=bytes.hex)
def test_messages_that_are_never_used_cost_no_note_and_no_time(midi, unused):
    """Also between two notes of which the second relies on running status: mido forgets it, or the message's time."""
    body = b"\x00\x90\x3c\x40\x81\x70\x3c\x00\x00" + unused + b"\x60" + unused + b"\x00\x3e\x40\x81\x70\x3e\x00"
    body += b"\x00\xff\x2f\x00"
    score = tokenizer.read_midi(midi.file(midi.smf(chunk(body))))
    columns = (score.notes.start.tolist(), score.notes.end.tolist(), score.notes.pitch.tolist())
    assert columns == ([0, 336], [240, 576], [60, 62])
    assert not score.damage


def test_what_other_readers_play_is_read_whole(midi):
    one, two = midi.track(*midi.note(0, 480, 60)), midi.track(*midi.note(0, 480, 62))
    other, plain = b"XFIH\x00\x00\x00\x04abcd", midi.smf(one, two)
    for data in (
        b"RIFF\x00\x01\x00\x00RMIDDISP\x03\x00\x00\x00abc\x00data\x00\x01\x00\x00" + plain + b"LIST\x00\x00",
        b"\xef\xbb\xbf" + plain,
        b"\x00" * 128 + plain,
        plain + b"\r\n",
        plain + midi.smf(midi.track(*midi.note(0, 480, 70))),  # a second file is another piece
        b"MThd\x00\x00\x00\x0a" + plain[8:14] + b"more" + plain[14:],
        midi.smf(one, other, two, other, count=2),
        midi.smf(other, one, two, count=2),
        midi.smf(one, two, count=1),
        midi.smf(resized(one, 9), two),
        midi.smf(resized(one, -9), two),
        midi.smf(one, resized(two, 9)),
        midi.smf(one, resized(two, -9)),
        midi.smf(resized(one, -len(one) + 8), two),
        midi.smf(one[:4] + b"\xff\xff\xff\xff" + one[8:], two),
    ):
        score = tokenizer.read_midi(midi.file(data))
        assert (score.notes.pitch.tolist(), score.damage) == ([60, 62], ""), data


def test_a_file_that_is_cut_off_gives_its_whole_events(midi):
    data = midi.smf(midi.track(*midi.note(0, 480), *midi.note(480, 960, 62)))
    for length in range(4, len(data)):
        whole = (length >= 22 + 9) + (length >= 22 + 18)
        if not whole:
            assert refused(midi, data[:length]) == "damaged"
        else:
            score = tokenizer.read_midi(midi.file(data[:length]))
            assert len(score.notes.pitch) == whole
            assert score.damage.startswith("track 1: ")


def test_damage_costs_its_track_only_what_follows(midi):
    good, bad = midi.track(*midi.note(0, 480, 60)), midi.track(*midi.note(0, 480, 62), (480, b"\xff\x01\x7f"))
    score = tokenizer.read_midi(midi.file(midi.smf(good, bad, good, count=5)))
    assert score.notes.pitch.tolist() == [60, 62, 60]
    assert score.damage == "track 2: its last 8 bytes cannot be read; 2 of 5 tracks are missing"


def alone(midi, *events, **header):
    """One track of these events and a quarter note."""
    return midi.smf(midi.track(*events, *midi.note(0, 480)), **header)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda midi: b"", "not MIDI"),
        (lambda midi: b"Dear reader,\nthis is a text file.\n", "not MIDI"),
        (lambda midi: b"RIFF....RMID", "not MIDI"),
        (lambda midi: b"MThd" + bytes(MAX_BYTES), "too large"),
        (lambda midi: alone(midi, division=-25 * 256 + 40), "SMPTE time"),
        (lambda midi: alone(midi, division=0), "damaged"),
        (lambda midi: alone(midi, kind=2), "type 2"),
        (lambda midi: alone(midi, kind=7), "damaged"),
        (lambda midi: midi.smf(), "no notes"),
        (lambda midi: midi.smf(midi.track(), count=65535), "damaged"),
        (lambda midi: midi.smf(midi.track((0, midi.tempo(1)), (0, midi.off(60)))), "no notes"),
        (lambda midi: midi.smf(midi.track((0, midi.on(60)), (5, midi.on(61)))), "no notes"),  # never end
        (lambda midi: midi.smf(midi.track((0, midi.on(60))), midi.track((9, midi.off(60)))), "no notes"),
        (lambda midi: alone(midi, (0, midi.signature(0, 2))), "absurd time signature"),
        (lambda midi: alone(midi, (0, midi.signature(4, 32))), "absurd time signature"),
        (lambda midi: alone(midi, (0, midi.signature(255, 255))), "absurd time signature"),
        (lambda midi: alone(midi, (0, midi.tempo(0))), "absurd tempo"),
        # lengths that claim gigabytes, deltas of too many bytes, and of too many ticks
        (lambda midi: b"MThd\xff\xff\xff\xff" + alone(midi)[8:], "damaged"),
        (lambda midi: midi.smf(midi.track((0, b"\xff\x01\xff\xff\xff\x7f"))), "damaged"),
        (lambda midi: midi.smf(midi.track((0, b"\xf0\xff\xff\xff\x7f"))), "damaged"),
        (lambda midi: midi.smf(chunk(b"\xff" * 5000 + b"\x7f" + midi.on(60) + b"\x10" + midi.off(60))), "damaged"),
        (lambda midi: midi.smf(chunk(b"\xff" * 8 + b"\x7f" + midi.on(60) + b"\x10" + midi.off(60))), "absurd time"),
    ],
)
def test_refused(midi, data, reason):
    assert refused(midi, data(midi)) == reason


def test_signature_outside_the_table(midi):
    """3/128 cannot be halved. Only octuple has time signatures, and only one that is in force matters."""
    late, now = (alone(midi, (tick, midi.signature(3, 7))) for tick in (960, 0))
    octuple, cp, _ = ALL
    assert len(octuple.encode(midi.file(late))) == len(cp.encode(midi.file(now))) == 1
    with pytest.raises(MidiError, match="absurd time signature"):
        octuple.encode(midi.file(now))


def test_what_is_absurd_and_met_by_no_note_is_left_out(midi):
    absurd = [(480, midi.tempo(0)), (480, midi.signature(0, 2)), (500, midi.signature(4, 255))]
    mended = [(520, midi.tempo(400_000)), (520, midi.signature(3, 2))]
    notes = [*midi.note(0, 600), *midi.note(520, 600)]
    score = tokenizer.read_midi(midi.file(midi.smf(midi.track(*absurd, *mended, *notes))))
    assert (score.tempos, score.signatures) == ([(520, 400_000)], [(520, 3, 4)])
    for tick in (480, 519):
        with pytest.raises(MidiError, match="absurd"):
            tokenizer.read_midi(midi.file(midi.smf(midi.track(*absurd, *mended, *notes, *midi.note(tick, 600)))))


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("旋律".encode(), "旋律"),
        ("Mélodie".encode(), "Mélodie"),
        ("Mélodie".encode("latin1"), "Mélodie"),
        (unicodedata.normalize("NFD", "Mélodie").encode(), "Mélodie"),
        (b"MELODY\0", "MELODY"),
        (b" a\nb\x1b[31m\x07 ", "ab[31m"),
    ],
)
def test_track_names(midi, raw, name):
    data = midi.smf(midi.track((0, meta(3, raw)), *midi.note(0, 480)))
    assert tokenizer.read_midi(midi.file(data)).notes.name.tolist() == [name]


@pytest.mark.parametrize(
    "chunks",
    [
        b"MTrk" + (1 << 22).to_bytes(4, "big") + b"\xff" * (1 << 22),  # one number: mido would take hours over it
        *(chunk * 300_000 for chunk in (b"abcd\0\0\0\0", b"MTrk\0\0\0\0", b"MTrk\xff\xff\xff\xff", b"\0" * 8)),
    ],
    ids=["number", "other", "empty", "endless", "unnamed"],
)
def test_refused_within_seconds(midi, chunks):
    began = time.process_time()
    assert refused(midi, midi.smf(chunks)) in ("damaged", "no notes")
    assert time.process_time() - began < 10


def test_many_starts_of_one_pitch_take_linear_time(midi):
    events = b"\x00\x90\x3c\x40" + b"\x00\x3c\x40" * 40_000 + b"\x00\x3c\x00" * 40_001
    assert len(ALL[0].encode(midi.file(midi.smf(chunk(events))))) == 40_001


def test_data_bytes_above_127_are_clipped(midi):
    data = midi.smf(midi.track((0, b"\x90\x3c\xff"), (480, midi.off(60))))
    assert ALL[0].encode(midi.file(data))[0, 5] == 31


def test_unreadable_paths(tmp_path):
    os.mkfifo(tmp_path / "pipe.mid")
    (tmp_path / "loop.mid").symlink_to("loop.mid")
    for path in (tmp_path, tmp_path / "pipe.mid", tmp_path / "loop.mid", tmp_path / "missing.mid"):
        with pytest.raises(MidiError, match=r"^unreadable \(.+\)$"):
            ALL[0].encode(path)


@given(data=st.binary(max_size=400), at=st.integers(0, 100))
@settings(max_examples=300, deadline=None)
def test_nothing_but_midi_errors(midi, data, at):
    """A good file with bytes put over it or behind its header is encoded or refused, never a traceback."""
    good = midi.smf(midi.track((0, midi.tempo(400_000)), (0, midi.signature(3, 2)), *midi.note(0, 480)))
    for damaged in (data, good[:22] + data, good[:at] + data[: len(good)] + good[at + len(data) :]):
        for encoding in ALL:
            with contextlib.suppress(MidiError):
                words = encoding.encode(midi.file(damaged))
                assert (words < [field.values for field in encoding.fields]).all()
