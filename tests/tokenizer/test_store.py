"""Token stores: what is written, and that nothing damaged or hostile is opened."""

import json

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


@pytest.fixture
def store(corpus, tmp_path):
    tokenizer.build_store(corpus, tmp_path / "store", workers=1, progress=False)
    return tmp_path / "store"


def test_contents(corpus, store):
    opened = tokenizer.open_store(store)
    paths = ["a.mid", "b/deep/three.mid", "b/two.MIDI"]
    assert [(piece.path, piece.offset, piece.notes) for piece in opened.pieces] == list(
        zip(paths, (0, 2, 4), (2, 2, 2), strict=True)
    )
    octuple = tokenizer.load("octuple")
    assert np.array_equal(opened.words, np.concatenate([octuple.encode(corpus / path) for path in paths]))
    assert isinstance(opened.words, np.memmap)
    assert opened.words.dtype == np.uint16
    assert not opened.words.flags.writeable
    assert opened.segments.tolist() == [[0, 2], [2, 2], [4, 1], [5, 1]]
    assert opened.encoding == "octuple"
    assert opened.meta["sources"] == [corpus.as_posix()]
    assert opened.meta["skipped"] == {"no notes": 1, "not MIDI": 1, "duplicate": 1}
    assert np.array_equal(np.fromfile(store / "words.bin", "<u2"), opened.words.ravel())
    skipped = [json.loads(line) for line in (store / "skipped.jsonl").read_text().splitlines()]
    assert [(entry["path"], entry["reason"]) for entry in skipped] == [
        ("b/empty.mid", "no notes"),
        ("text.mid", "not MIDI"),
        ("z.mid", "duplicate"),
    ]
    assert skipped[2]["detail"] == "of a.mid"


def test_summary(corpus, tmp_path):
    summary = tokenizer.build_store([corpus, corpus / "a.mid"], tmp_path / "out", "cp", workers=1, progress=False)
    assert (summary.pieces, summary.segments, summary.notes) == (3, 3, 6)
    assert summary.skipped == {"no notes": 1, "not MIDI": 1, "duplicate": 2}
    assert tokenizer.open_store(tmp_path / "out").encoding == "cp"


def test_what_is_searched(tmp_path, midi):
    data = midi.smf(midi.track(*midi.note(0, 480)))
    for name in ("a.mid", "b.MIDI", "c.rmi", "d.Kar", "e.txt", ".hidden/f.mid", "g/.h/i.mid", "g/j.mid"):
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).write_bytes(data)
    names = [name for name, _ in tokenizer.find_midi(tmp_path / "top")[0]]
    assert names == ["a.mid", "b.MIDI", "c.rmi", "d.Kar", "g/j.mid"]
    assert [name for name, _ in tokenizer.find_midi(tmp_path / "top" / ".hidden")[0]] == ["f.mid"]


def as_it_is(score):
    return score, np.arange(len(score.notes.pitch))


as_it_is.hides = ("velocity",)


@pytest.mark.parametrize("view", [None, as_it_is])
@pytest.mark.parametrize("encoding", tokenizer.ENCODINGS)
def test_duplicates_have_the_same_notes_and_rhythm(tmp_path, midi, view, encoding):
    """And the same dynamics, where the view hides these."""
    (tmp_path / "in").mkdir()
    notes = {"a": (0, 480), "length": (0, 960), "loud": (0, 480, 60, 99), "start": (960, 1440), "z": (2, 481)}
    for name, note in notes.items():
        data = midi.smf(midi.track(*midi.note(*note), *midi.note(1920, 2400)))
        (tmp_path / "in" / f"{name}.mid").write_bytes(data)
    tokenizer.build_store(tmp_path / "in", tmp_path / "out", encoding, 1, progress=False, view=view)
    kept = ["a.mid", "length.mid", *["loud.mid"] * bool(view), "start.mid"]
    assert [piece.path for piece in tokenizer.open_store(tmp_path / "out").pieces] == kept


def test_damaged_files_are_used_in_part_and_listed(corpus, store):
    (corpus / "cut.mid").write_bytes((corpus / "a.mid").read_bytes()[:-13])
    summary = tokenizer.build_store(corpus, store, workers=1, progress=False)
    assert (summary.pieces, summary.damaged) == (4, 1)
    assert tokenizer.open_store(store).meta["damaged"] == 1
    lines = [json.loads(line) for line in (store / "skipped.jsonl").read_text().splitlines()]
    assert ("cut.mid", "used in part", "track 1: cut off") in [(e["path"], e["reason"], e["detail"]) for e in lines]


def test_a_store_is_replaced_and_nothing_else(corpus, store):
    tokenizer.build_store(corpus / "a.mid", store, workers=1, progress=False)
    assert len(tokenizer.open_store(store).pieces) == 1
    assert sorted(path.name for path in store.parent.iterdir()) == ["corpus", "store"]
    with pytest.raises(StoreError, match="not a token store"):
        tokenizer.build_store(corpus, corpus, workers=1, progress=False)
    (store / "text.mid").write_text("?")
    with pytest.raises(StoreError, match="no usable MIDI file.*1 not MIDI"):
        tokenizer.build_store(store / "text.mid", store, workers=1, progress=False)
    assert len(tokenizer.open_store(store).pieces) == 1  # the old one is still there
    assert sorted(path.name for path in store.parent.iterdir()) == ["corpus", "store"]


def test_links(corpus, store, tmp_path):
    """Loops end; a link that leads nowhere is reported; a link to a folder outside is followed."""
    (corpus / "b" / "up").symlink_to(corpus)
    (corpus / "self").symlink_to(corpus / "self")
    (corpus / "gone.mid").symlink_to(corpus / "nowhere")
    outside = tmp_path / "outside"
    outside.mkdir()
    (corpus / "a.mid").rename(outside / "moved.mid")
    (corpus / "linked").symlink_to(outside)
    summary = tokenizer.build_store(corpus, store, workers=1, progress=False)
    assert "linked/moved.mid" in [piece.path for piece in tokenizer.open_store(store).pieces]
    assert summary.skipped == {"no notes": 1, "not MIDI": 1, "duplicate": 1, "unreadable": 1}


def test_missing_source(tmp_path):
    with pytest.raises(StoreError, match="nowhere does not exist"):
        tokenizer.build_store(tmp_path / "nowhere", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def edit(store, **changes):
    path = store / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_piece(store, **changes):
    pieces = json.loads((store / "store.json").read_text())["pieces"]
    edit(store, pieces=[pieces[0] | changes, *pieces[1:]])


def cut(path, size=-1):
    path.write_bytes(path.read_bytes()[:size])


def make_version_1(store):
    (store / "store.json").unlink()
    (store / "meta.json").write_text('{\n "format": "adversarial-midibert token store",\n "version": 1}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: (s / "store.json").unlink(), "store.json cannot be read.*is this a token store"),
        (make_version_1, "is a store of version 1, not 2: tokenize again"),
        (lambda s: (s / "store.json").write_text("{"), "is not JSON"),
        (lambda s: (s / "store.json").write_text("[" * 100_000), "is not JSON"),
        (lambda s: (s / "store.json").write_text("[]"), "does not belong to a token store"),
        (lambda s: edit(s, format="x"), "does not belong to a token store"),
        (lambda s: edit(s, version=3), "of version 3, not 2"),
        (lambda s: edit(s, encoding="remi"), "unknown encoding, 'remi'"),
        (lambda s: edit(s, encoding=["cp"]), "unknown encoding"),
        (lambda s: edit(s, encoding="cp"), "lists other fields than cp has"),
        (lambda s: edit(s, sources=None), "damaged after piece 0"),
        (lambda s: edit(s, tracks=[1]), "damaged after piece 0"),
        (lambda s: edit(s, pieces=[]), "lists no pieces"),
        (lambda s: edit(s, pieces=[{"source": 0}]), "damaged after piece 0"),
        (lambda s: edit_piece(s, source=9), "damaged after piece 0"),
        (lambda s: edit_piece(s, path="../../etc/passwd"), "damaged after piece 0"),
        (lambda s: edit_piece(s, path="/etc/passwd"), "damaged after piece 0"),
        (lambda s: edit_piece(s, path=7), "damaged after piece 0"),
        (lambda s: edit_piece(s, segments=[2, 0]), "damaged after piece 0"),
        (lambda s: edit_piece(s, segments=[True, 1]), "damaged after piece 0"),
        (lambda s: edit_piece(s, segments=[]), "damaged after piece 0"),
        (lambda s: edit_piece(s, segments=[10**30]), "words.bin has 96 bytes, not 16,0"),
        (lambda s: edit_piece(s, segments=[3]), "words.bin has 96 bytes, not 112 as store.json says"),
        (lambda s: (s / "words.bin").unlink(), "words.bin cannot be read"),
        (lambda s: cut(s / "words.bin"), "words.bin has 95 bytes"),
        (lambda s: cut(s / "words.bin", 0), "words.bin has 0 bytes"),
    ],
)
def test_damaged_stores_are_refused_in_one_line(store, damage, message):
    damage(store)
    with pytest.raises(StoreError, match=message) as caught:
        tokenizer.open_store(store)
    assert "\n" not in str(caught.value)
    assert str(store) in str(caught.value)


def test_version_1_is_a_store_and_is_replaced(corpus, store):
    make_version_1(store)
    assert tokenizer.is_store(store)
    assert not tokenizer.is_store(corpus)
    tokenizer.build_store(corpus, store, workers=1, progress=False)
    assert len(tokenizer.open_store(store).pieces) == 3
    assert not (store / "meta.json").exists()


def test_words_are_checked_as_they_are_read(store):
    opened = tokenizer.open_store(store)
    read = opened.read(1, 4)
    assert read.dtype == np.uint16
    assert read.flags.writeable
    assert np.array_equal(read, opened.words[1:5])
    cut(store / "words.bin")
    with pytest.raises(StoreError, match=r"words.bin ends before word 6; it did not when opened"):
        opened.read(4, 2)


def test_ids_outside_their_fields_are_not_read(store):
    changed = tokenizer.open_store(store).words.copy()
    changed[3, 2] += 200
    changed.tofile(store / "words.bin")
    opened = tokenizer.open_store(store)
    assert np.array_equal(opened.read(0, 3), changed[:3])
    with pytest.raises(StoreError, match="words.bin holds ids outside their fields, at word 2 or later"):
        opened.read(2, 2)


def test_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for path, message in ((tmp_path / "file", "not a folder"), (tmp_path / "nothing", "does not exist")):
        with pytest.raises(StoreError, match=message):
            tokenizer.open_store(path)


def octave_up(score):
    """A view: everything an octave higher, last note first."""
    rows = np.arange(len(score.notes.pitch))[::-1]
    notes = score.notes.take(rows)
    return score._replace(notes=notes._replace(pitch=notes.pitch + 12)), rows


def test_origins_are_of_the_notes_that_the_words_came_from(tmp_path, midi):
    tracks = (
        midi.track((0, midi.name("LEFT")), *midi.note(0, 480, 40, 11), *midi.note(480, 960, 41, 12)),
        midi.track((0, midi.name("RIGHT")), *midi.note(0, 480, 70, 21), *midi.note(960, 1200, 71, 22)),
    )
    (tmp_path / "a.mid").write_bytes(midi.smf(*tracks))
    (tmp_path / "b.mid").write_bytes(midi.smf(*tracks[1:], *tracks[1:]))
    tokenizer.build_store(tmp_path, tmp_path / "store", workers=2, progress=False, view=octave_up, origins=True)
    store = tokenizer.open_store(tmp_path / "store")
    assert store.words[:, 3].tolist() == [52, 82, 53, 83, 82, 82, 83, 83]
    assert store.velocity.tolist() == [11, 21, 12, 22, 21, 21, 22, 22]
    assert [store.tracks[number] for number in store.track] == ["LEFT", "RIGHT"] * 2 + ["RIGHT"] * 4
    plain = tmp_path / "plain"
    tokenizer.build_store(tmp_path / "a.mid", plain, workers=1, progress=False)
    assert tokenizer.open_store(plain).velocity is None
    for name, dtype, value in (("velocity", "u1", 200), ("track", "<u2", 2)):
        content = (tmp_path / "store" / f"{name}.bin").read_bytes()
        np.full(8, value, dtype).tofile(tmp_path / "store" / f"{name}.bin")
        with pytest.raises(StoreError, match=rf"{name}\.bin holds {value}"):
            tokenizer.open_store(tmp_path / "store")
        (tmp_path / "store" / f"{name}.bin").write_bytes(content)
    (tmp_path / "store" / "track.bin").unlink()
    with pytest.raises(StoreError, match=r"track\.bin cannot be read"):
        tokenizer.open_store(tmp_path / "store")
