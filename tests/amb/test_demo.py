"""The demo corpus: the same everywhere, and well-formed."""

import hashlib

import numpy as np
import pytest

from amb import demo, tokenizer


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}


def test_a_corpus_is_determined_by_its_seed_and_a_piece_by_its_number(midi_folder, tmp_path):
    """If the digest differs and the change of the notes is meant, raise demo.VERSION and put the new one here."""
    one, other = (contents(demo.write_corpus(tmp_path / str(seed), 8, seed)) for seed in (0, 1))
    assert len(one) == 8
    assert one.items() <= contents(midi_folder).items()
    assert one.keys() == other.keys()
    assert not one.items() & other.items()
    digest = hashlib.sha256(b"".join(one[name] for name in sorted(one))).hexdigest()
    assert (demo.VERSION, digest[:16]) == (3, "269b8ac977206bcc")


def test_pieces_are_balanced_and_well_formed(midi_folder):
    files = sorted(midi_folder.glob("*/*.mid"))
    scores = [tokenizer.read_midi(path) for path in files]
    assert len({tuple(path.stem.split("_")[:2]) for path in files}) == len(files) == 16  # mood and style
    assert all(path.stem.split("_")[1] == path.parent.name for path in files)
    assert len({tuple(score.notes.pitch.tolist()) for score in scores}) == 16
    for notes in (score.notes for score in scores):
        assert list(dict.fromkeys(notes.name)) == ["MELODY", "BRIDGE", "PIANO"]
        assert 200 <= len(notes.pitch) <= 800
        assert 21 <= notes.pitch.min() <= notes.pitch.max() <= 108
        assert (notes.end > notes.start).all()
        order = np.lexsort((notes.start, notes.pitch, notes.track))
        follows = (np.diff(notes.track[order]) == 0) & (np.diff(notes.pitch[order]) == 0)
        assert (notes.start[order][1:] >= notes.end[order][:-1])[follows].all(), "a pitch starts while it still sounds"


def test_a_corpus_is_written_once_and_whole(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)  # an empty folder may be used
    folder = demo.write_corpus(tmp_path / "a" / "b", 2)
    assert len(contents(folder)) == 2
    (tmp_path / "a" / "file").write_text("la")
    with pytest.raises(OSError, match="file cannot be written"):
        demo.write_corpus(tmp_path / "a" / "file", 2)
    monkeypatch.setattr(demo, "compose", lambda *_: 1 / 0)  # composing again would fail
    assert demo.write_corpus(folder, 2) == folder
    with pytest.raises(ZeroDivisionError):
        demo.write_corpus(tmp_path / "a" / "c", 2)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["b", "file"], "nothing is left beside it"
