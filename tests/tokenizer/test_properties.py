"""Any MIDI that hypothesis can think of: the same words as a slow, obvious encoder, and round trips."""

import io
import math
from collections import defaultdict
from fractions import Fraction

import mido
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amb import tokenizer

OCTUPLE = tokenizer.load("octuple")
DURATIONS = [code for code in range(128) for _ in range(2 ** (code // 16))]  # 16 codes each, worth 1, 2, 4, … positions


def slow_read(data):
    """Notes (track, start, end, pitch, velocity, channel, program), tempos and metres by tick, and ticks per beat."""
    file = mido.MidiFile(file=io.BytesIO(data), clip=True)
    notes, tempos, metres = [], [], []
    for number, track in enumerate(file.tracks):
        now, waiting, programs = 0, defaultdict(list), defaultdict(int)
        for message in track:
            now += message.time
            if message.type == "set_tempo":
                tempos.append((now, message.tempo))
            elif message.type == "time_signature":
                metres.append((now, (message.numerator, message.denominator)))
            elif message.type == "program_change":
                programs[message.channel] = message.program
            elif message.type == "note_on" and message.velocity > 0:
                waiting[message.channel, message.note].append((now, message.velocity))
            elif message.type in ("note_on", "note_off") and waiting[message.channel, message.note]:
                start, velocity = waiting[message.channel, message.note].pop(0)
                about = message.note, velocity, message.channel, programs[message.channel]
                notes.append((number, start, now, *about))
    return notes, *(sorted(changes, key=lambda change: change[0]) for changes in (tempos, metres)), file.ticks_per_beat


def slow_encode(data):
    """The rules of docs/tokenizer.md one by one, position by position."""
    notes, tempos, metres, ticks_per_beat = slow_read(data)

    def to_position(tick):
        return round(tick * 16 / ticks_per_beat)

    table = [(n, m) for m in (1, 2, 4, 8, 16, 32, 64) for n in range(1, 2 * m + 1)]

    def reduced(n, m):
        while m > 64:
            n, m = n // 2, m // 2
        while n > 2 * m:
            n //= next(divisor for divisor in range(2, n + 1) if n % divisor == 0)
        return n, m

    last = max(to_position(note[1]) for note in notes)
    places, bar, inside, length = [], 0, 0, None
    for position in range(last + 1):
        metre = [(4, 4), *(value for tick, value in metres if to_position(tick) <= position)][-1]
        tempo = [500_000, *(value for tick, value in tempos if to_position(tick) <= position)][-1]
        n, m = reduced(*metre)
        if inside == 0:
            length = n * 64 // m
        bpm = min(max(60_000_000 / tempo, 16), 256)
        places.append((bar, inside, table.index((n, m)), round(12 * math.log2(bpm / 16))))
        inside += 1
        if inside == length:
            bar, inside = bar + 1, 0

    words = []
    for _, start, end, pitch, velocity, channel, program in notes:
        bar, inside, metre, tempo = places[to_position(start)]
        duration = DURATIONS[min(to_position(end) - to_position(start), len(DURATIONS) - 1)]
        instrument, pitch = (128, pitch + 128) if channel == 9 else (program, pitch)
        words.append((bar, inside, instrument, pitch, duration, velocity // 4, metre, tempo))
    return [(bar % 256, *rest) for bar, *rest in sorted(words)]


def slow_cp(data, published):
    """The nearest point of the grid and the nearest length; see docs/tokenizer.md for the two rules of `published`."""
    read, _, _, ticks_per_beat = slow_read(data)
    scale = Fraction(1 if published else 480, 1 if published else ticks_per_beat)
    notes = [(start * scale, track, pitch, end * scale) for track, start, end, pitch, *_ in read]
    last = math.ceil(max(note[0] for note in notes))
    grid = list(range(0, last if published else last + 120, 120)) or [0]
    lengths = list(range(60, 3841, 60))
    words, last_bar = [], -1
    for start, _, pitch, end in sorted(notes, key=lambda note: note[:3]):
        if 22 <= pitch <= 107:
            # `min` takes the first, the lower, of two that are as near
            snapped = min(grid, key=lambda point: abs(point - start))
            length = min(lengths, key=lambda length: abs(length - (end - start)))
            words.append((int(snapped // 1920 <= last_bar), snapped % 1920 // 120, pitch - 22, length // 60 - 1))
            last_bar = snapped // 1920
    return words


PITCHES = st.sampled_from([0, 21, 59, 60, 61, 108, 127])
CHANNELS = st.sampled_from([0, 0, 0, 1, 9])
METRES = st.sampled_from([(4, 2), (3, 2), (2, 2), (6, 3), (12, 3), (5, 1), (1, 0), (1, 6), (9, 4), (8, 7), (255, 2)])
MESSAGES = st.one_of(
    *(st.tuples(st.just("on"), PITCHES, st.sampled_from(most), CHANNELS) for most in ([1, 3, 4, 64], [0, 3, 64, 127])),
    *(st.tuples(st.just("off"), PITCHES, CHANNELS) for _ in range(2)),
    st.tuples(st.just("program"), st.sampled_from([0, 1, 127]), CHANNELS),
    st.tuples(st.just("tempo"), st.sampled_from([1, 200_000, 500_000, 777_777, 1_000_000, 0xFFFFFF])),
    METRES.map(lambda metre: ("signature", *metre)),
)
DELTAS = st.sampled_from([0, 0, 0, 1, 7, 15, 30, 45, 120, 240, 480, 960, 1920])
TRACKS = st.lists(st.lists(st.tuples(DELTAS, MESSAGES), max_size=40), min_size=1, max_size=3)
DIVISIONS = st.sampled_from([1, 24, 96, 220, 384, 480, 1024, 32767])


def build(midi, tracks, division):
    """Bytes of a file from drawn tracks; a note is always there."""
    chunks = []
    for events in [*tracks, [(0, ("on", 64, 64, 0)), (480, ("off", 64, 0))]]:
        now, absolute = 0, []
        for delta, (kind, *arguments) in events:
            now += delta * division // 480
            absolute.append((now, getattr(midi, kind)(*arguments)))
        chunks.append(midi.track(*absolute))
    return midi.smf(*chunks, division=division)


@given(tracks=TRACKS, division=DIVISIONS, name=st.sampled_from(["octuple", "octuple", "cp", "midibert"]))
@settings(max_examples=300, deadline=None)
def test_same_words_as_the_slow_encoder(midi, tracks, division, name):
    data = build(midi, tracks, division)
    words = [tuple(word) for word in tokenizer.load(name).encode(midi.file(data)).tolist()]
    assert words == (slow_encode(data) if name == "octuple" else slow_cp(data, published=name == "midibert"))


@given(tracks=TRACKS, division=DIVISIONS, encoding=st.sampled_from(list(tokenizer.ENCODINGS.values())))
@settings(max_examples=250, deadline=None)
def test_round_trip(midi, again, tracks, division, encoding):
    """Any file, signatures that change inside a bar too."""
    words = encoding.encode(midi.file(build(midi, tracks, division)))
    assert again(encoding, words).tolist() == words.tolist()


@pytest.mark.filterwarnings("ignore:programs .* share a channel")
@given(data=st.data(), encoding=st.sampled_from(list(tokenizer.ENCODINGS.values())))
@settings(max_examples=100, deadline=None)
def test_any_words_decode(again, data, encoding):
    """Also words that no encoder makes, such as a model's: as many notes come back, and a second time the same.

    A sequencer plays each of them: it lasts a tick or more, and is not inside another of its pitch in its track.
    """
    word = st.tuples(*(st.integers(0, field.values - 1) for field in encoding.fields))
    words = np.array(data.draw(st.lists(word, min_size=1, max_size=30)), dtype=np.uint16)
    once = again(encoding, words)
    duration = [field.name for field in encoding.fields].index("Duration")
    assert sorted(once[:, duration].tolist()) == sorted(words[:, duration].tolist())
    assert again(encoding, once).tolist() == once.tolist()
    for track in encoding.decode(words).tracks:
        now, sounding = 0, {}
        for message in track:
            now += message.time
            if message.type == "note_on":
                assert message.note not in sounding
                sounding[message.note] = now
            elif message.type == "note_off":
                assert now > sounding.pop(message.note)


@given(gaps=st.lists(st.integers(0, 2000), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_round_trip_over_many_segments(midi, again, gaps):
    """Silences of up to 2,000 bars, so that whole segments are empty."""
    bars = np.cumsum(gaps).tolist()
    notes = [event for bar in bars for event in midi.note(bar * 1920, bar * 1920 + 480)]
    words = OCTUPLE.encode(midi.file(midi.smf(midi.track(*notes))))
    assert words[:, 0].tolist() == [bar % 256 for bar in bars]
    assert again(OCTUPLE, words).tolist() == words.tolist()


@pytest.mark.parametrize("name", tokenizer.ENCODINGS)
def test_timeline_is_when_decode_plays_each_word(name, midi):
    encoding = tokenizer.load(name)
    notes = [event for n in range(12) for event in midi.note(240 * n, 240 * n + 60 * (n + 1), 60 + 7 * n % 5)]
    words = encoding.encode(midi.file(midi.smf(midi.track((0, midi.signature(3, 2)), *notes))))
    start, end, pitch = encoding.timeline(words)
    file = io.BytesIO()
    encoding.decode(words).save(file=file)
    again, notes = encoding.encode_with_sources(io.BytesIO(file.getvalue()))
    assert np.array_equal(again, words)
    assert np.array_equal(start, notes.start / 480)
    assert np.array_equal(end, notes.end / 480)
    assert np.array_equal(pitch, notes.pitch)
    assert encoding.timeline(words[:0])[0].size == 0
