"""Token stores: what is written, and that nothing damaged or hostile is opened."""

import json
import shutil

import numpy as np
import pytest
from amb.tokenizer import StoreError

from amb import tokenizer


@pytest.fixture
def corpus(tmp_path, midi):
    """Three pieces, the middle one of two segments, a duplicate, and two files that cannot be used."""
    folder = tmp_path / "corpus"
    (folder / "b" / "deep").mkdir(parents=True)
    one, three = (midi.smf(midi.track(*midi.note(0, 480, pitch), *midi.note(480, 900, 50))) for pitch in (60, 62))
    two = midi.smf(midi.track(*midi.note(0, 480, 61), *midi.note(300 * 1920, 300 * 1920 + 480, 61)))
    same = midi.smf(midi.track((0, midi.tempo(400_000)), *midi.note(0, 480, 60, 3), *midi.note(480, 900, 50)))
    (folder / "a.mid").write_bytes(one)
    (folder / "b" / "two.MIDI").write_bytes(two)
    (folder / "b" / "deep" / "three.mid").write_bytes(three)
    (folder / "z.mid").write_bytes(same)
    (folder / "text.mid").write_text("not MIDI at all")
    (folder / "b" / "empty.mid").write_bytes(midi.smf(midi.track()))
    (folder / "notes.txt").write_text("no suffix, not looked at")
    return folder


def build(source, out, encoding="octuple", workers=1, **options):
    return tokenizer.build_store(source, out, encoding, workers, progress=False, **options)


def reports(store):
    """(path, reason, detail) of the lines of skipped.jsonl."""
    lines = [json.loads(line) for line in (store / "skipped.jsonl").read_text().splitlines()]
    return [(line["path"], line["reason"], line["detail"]) for line in lines]


def paths(store):
    return [piece.path for piece in tokenizer.open_store(store).pieces]


@pytest.fixture
def store(corpus, tmp_path):
    build(corpus, tmp_path / "store")
    return tmp_path / "store"


def test_contents(corpus, store):
    opened = tokenizer.open_store(store)
    assert paths(store) == ["a.mid", "b/deep/three.mid", "b/two.MIDI"]
    assert [(piece.offset, piece.notes) for piece in opened.pieces] == [(0, 2), (2, 2), (4, 2)]
    octuple = tokenizer.load("octuple")
    assert np.array_equal(opened.words, np.concatenate([octuple.encode(corpus / path) for path in paths(store)]))
    assert isinstance(opened.words, np.memmap)
    assert (opened.words.dtype, opened.words.flags.writeable) == (np.uint16, False)
    assert opened.segments.tolist() == [[0, 2], [2, 2], [4, 1], [5, 1]]
    assert opened.encoding == "octuple"
    assert opened.meta["sources"] == [corpus.as_posix()]
    assert opened.meta["skipped"] == {"no notes": 1, "not MIDI": 1, "duplicate": 1}
    assert np.array_equal(np.fromfile(store / "words.bin", "<u2"), opened.words.ravel())
    reasons = [("b/empty.mid", "no notes"), ("text.mid", "not MIDI"), ("z.mid", "duplicate")]
    assert [report[:2] for report in reports(store)] == reasons
    assert reports(store)[2][2] == "of a.mid"


def test_what_became_of_each_file_is_counted(corpus, tmp_path):
    (corpus / "cut.mid").write_bytes((corpus / "a.mid").read_bytes()[:-13])
    store = build([corpus, corpus / "a.mid"], tmp_path / "out", "cp")
    assert (store.encoding, len(store.pieces), len(store.segments), len(store.words)) == ("cp", 4, 4, 7)
    assert store.meta["skipped"] == {"no notes": 1, "not MIDI": 1, "duplicate": 2}
    assert store.meta["damaged"] == 1
    assert ("cut.mid", "used in part", "track 1: cut off") in reports(tmp_path / "out")


def test_what_is_searched(tmp_path, midi):
    data = midi.smf(midi.track(*midi.note(0, 480)))
    for name in ("a.mid", "b.MIDI", "c.rmi", "d.Kar", "e.txt", ".hidden/f.mid", "g/.h/i.mid", "g/j.mid"):
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).write_bytes(data)
    names = [name for name, _ in tokenizer.find_midi(tmp_path / "top")[0]]
    assert names == ["a.mid", "b.MIDI", "c.rmi", "d.Kar", "g/j.mid"]
    assert [name for name, _ in tokenizer.find_midi(tmp_path / "top" / ".hidden")[0]] == ["f.mid"]


def octave_up(score):
    """A view: everything an octave higher, last note first."""
    rows = np.arange(len(score.notes.pitch))[::-1]
    notes = score.notes.take(rows)
    return score._replace(notes=notes._replace(pitch=notes.pitch + 12)), rows


octave_up.hides = ("velocity",)


@pytest.mark.parametrize("view", [None, octave_up])
@pytest.mark.parametrize("encoding", tokenizer.ENCODINGS)
def test_duplicates_have_the_same_notes_and_rhythm(tmp_path, midi, view, encoding):
    """And the same dynamics, where the view hides these."""
    (tmp_path / "in").mkdir()
    notes = {"a": (0, 480), "length": (0, 960), "loud": (0, 480, 60, 99), "start": (960, 1440), "z": (2, 481)}
    for name, note in notes.items():
        data = midi.smf(midi.track(*midi.note(*note), *midi.note(1920, 2400)))
        (tmp_path / "in" / f"{name}.mid").write_bytes(data)
    build(tmp_path / "in", tmp_path / "out", encoding, view=view)
    kept = ["a.mid", "length.mid", *["loud.mid"] * bool(view), "start.mid"]
    assert paths(tmp_path / "out") == kept


def test_a_store_is_replaced_and_nothing_else(corpus, store):
    build(corpus / "a.mid", store)
    assert paths(store) == ["a.mid"]
    with pytest.raises(StoreError, match="not a token store"):
        build(corpus, corpus)
    (store / "text.mid").write_text("?")
    with pytest.raises(StoreError, match="no usable MIDI file.*1 not MIDI"):
        build(store / "text.mid", store)
    assert paths(store) == ["a.mid"]  # the old one is still there
    assert sorted(path.name for path in store.parent.iterdir()) == ["corpus", "store"]


def test_links(corpus, store, tmp_path):
    """Loops end; a link that leads nowhere is reported; a link to a folder outside is followed."""
    (corpus / "b" / "up").symlink_to(corpus)
    (corpus / "self").symlink_to(corpus / "self")
    (corpus / "gone.mid").symlink_to(corpus / "nowhere")
    (tmp_path / "outside").mkdir()
    (corpus / "a.mid").rename(tmp_path / "outside" / "moved.mid")
    (corpus / "linked").symlink_to(tmp_path / "outside")
    counts = build(corpus, store).meta["skipped"]
    assert "linked/moved.mid" in paths(store)
    assert counts == {"no notes": 1, "not MIDI": 1, "duplicate": 1, "unreadable": 1}


def edit(store, **changes):
    path = store / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_piece(store, **changes):
    pieces = json.loads((store / "store.json").read_text())["pieces"]
    edit(store, pieces=[pieces[0] | changes, *pieces[1:]])


def put_text(store):
    shutil.rmtree(store)
    store.write_text("")


def cut(path, size=-1):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist"),
        (put_text, "is not a folder"),
        (lambda s: (s / "store.json").unlink(), "store.json cannot be read.*is this a token store"),
        (lambda s: (s / "store.json").write_text("{"), "is not JSON"),
        (lambda s: (s / "store.json").write_text("[" * 100_000), "is not JSON"),
        (lambda s: edit(s, format="x"), "does not belong to a token store"),
        (lambda s: edit(s, version=3), "of version 3, not 2"),
        (lambda s: edit(s, encoding="remi"), "unknown encoding, 'remi'"),
        (lambda s: edit(s, encoding=["cp"]), "unknown encoding"),
        (lambda s: edit(s, encoding="cp"), "lists other fields than cp has"),
        (lambda s: edit(s, sources=None), "damaged after piece 0"),
        (lambda s: edit(s, tracks=[1]), "damaged after piece 0"),
        (lambda s: edit(s, pieces=[]), "damaged after piece 0"),
        (lambda s: edit(s, pieces=[{"source": 0}]), "damaged after piece 0"),
        (lambda s: edit_piece(s, source=9), "damaged after piece 0"),
        (lambda s: edit_piece(s, path="../../etc/passwd"), "damaged after piece 0"),
        (lambda s: edit_piece(s, path="/etc/passwd"), "damaged after piece 0"),
        (lambda s: edit_piece(s, segments=[2, 0]), "damaged after piece 0"),
        (lambda s: edit_piece(s, segments=[True, 1]), "damaged after piece 0"),
        (lambda s: edit_piece(s, segments=[]), "damaged after piece 0"),
        (lambda s: edit_piece(s, segments=[10**30]), "words.bin has 96 bytes, not 16,0"),
        (lambda s: (s / "words.bin").unlink(), "words.bin cannot be read"),
        (lambda s: cut(s / "words.bin"), "words.bin has 95 bytes"),
    ],
)
def test_damaged_stores_are_refused_in_one_line(store, damage, message):
    damage(store)
    with pytest.raises(StoreError, match=message) as caught:
        tokenizer.open_store(store)
    assert "\n" not in str(caught.value)
    assert str(store) in str(caught.value)


def test_words_are_checked_as_they_are_read(store):
    changed = tokenizer.open_store(store).words.copy()
    changed[3, 2] += 200
    changed.tofile(store / "words.bin")
    opened = tokenizer.open_store(store)
    read = opened.read(0, 3)
    assert np.array_equal(read, changed[:3])
    assert (read.dtype, read.flags.writeable) == (np.uint16, True)
    with pytest.raises(StoreError, match="words.bin holds ids outside their fields, at word 2 or later"):
        opened.read(2, 2)
    cut(store / "words.bin")
    with pytest.raises(StoreError, match=r"words.bin ends before word 6; it did not when opened"):
        opened.read(4, 2)


def test_origins_are_of_the_notes_that_the_words_came_from(tmp_path, midi):
    names = (0, midi.name("RIGHT")), (9, midi.name("other"))  # the first one counts
    tracks = (
        midi.track((0, midi.name("LEFT")), *midi.note(0, 480, 40, 11), *midi.note(480, 960, 41, 12)),
        midi.track(*names, *midi.note(0, 480, 70, 21), *midi.note(960, 1200, 71, 22)),
    )
    (tmp_path / "a.mid").write_bytes(midi.smf(*tracks))
    (tmp_path / "b.mid").write_bytes(midi.smf(*tracks[1:], *tracks[1:]))
    build(tmp_path, tmp_path / "store", workers=2, view=octave_up, origins=True)
    store = tokenizer.open_store(tmp_path / "store")
    assert store.words[:, 3].tolist() == [52, 82, 53, 83, 82, 82, 83, 83]
    assert store.velocity.tolist() == [11, 21, 12, 22, 21, 21, 22, 22]
    assert [store.tracks[number] for number in store.track] == ["LEFT", "RIGHT"] * 2 + ["RIGHT"] * 4
    build(tmp_path / "a.mid", tmp_path / "plain")
    assert tokenizer.open_store(tmp_path / "plain").velocity is None
    for name, dtype, value in (("track", "<u2", 2), ("velocity", "u1", 200)):  # velocity is checked first
        np.full(8, value, dtype).tofile(tmp_path / "store" / f"{name}.bin")
        with pytest.raises(StoreError, match=rf"{name}\.bin holds {value}"):
            tokenizer.open_store(tmp_path / "store")
    np.full(8, 100, "u1").tofile(tmp_path / "store" / "velocity.bin")
    (tmp_path / "store" / "track.bin").unlink()
    with pytest.raises(StoreError, match=r"track\.bin cannot be read"):
        tokenizer.open_store(tmp_path / "store")
