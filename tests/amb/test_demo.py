"""The demo corpus: the same everywhere, well-formed, and with labels that can be learned but not simply read off."""

import hashlib
from typing import NamedTuple

import numpy as np
import pytest

from amb import demo, tokenizer


class Song(NamedTuple):
    style: str
    mood: str
    bar: int  # ticks
    notes: np.ndarray  # rows of track, start, end, pitch, velocity in ticks


@pytest.fixture(scope="module")
def songs(midi_folder):
    songs = []
    for path in sorted(midi_folder.glob("*/*.mid")):
        score, (mood, style, _) = tokenizer.read_midi(path), path.stem.split("_")
        assert style == path.parent.name
        assert list(dict.fromkeys(score.notes.name)) == ["MELODY", "BRIDGE", "PIANO"]
        columns = [getattr(score.notes, name) for name in ("track", "start", "end", "pitch", "velocity")]
        songs.append(Song(style, mood, demo.STYLES[style].bar * demo.SIXTEENTH, np.stack(columns, axis=1)))
    return songs


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


def test_pieces_are_balanced_and_well_formed(songs):
    assert len({(song.style, song.mood) for song in songs}) == len(songs) == 16
    for track, start, end, pitch, _ in (song.notes.T for song in songs):
        assert 200 <= len(pitch) <= 800
        assert 21 <= pitch.min() <= pitch.max() <= 108
        assert (end > start).all()
        order = np.lexsort((start, pitch, track))
        follows = (np.diff(track[order]) == 0) & (np.diff(pitch[order]) == 0)
        assert (start[order][1:] >= end[order][:-1])[follows].all(), "a pitch starts while it still sounds"
    assert len({tuple(song.notes[:, 3]) for song in songs}) == len(songs), "duplicates"
    starts = np.concatenate([song.notes[:, 1] for song in songs])
    assert 0.75 < np.mean(starts % demo.SIXTEENTH == 0) < 0.98


def test_phrases_return_but_ornaments_do_not(songs):
    """AABA and the like: most notes of bars 1–8 come back eight or sixteen bars later, and not all of them do."""
    shares = []
    for song in songs:
        phrase, melody = 8 * song.bar // demo.SIXTEENTH, song.notes[song.notes[:, 0] == song.notes[:, 0].min()]
        sounds = {(round(start / demo.SIXTEENTH), pitch) for start, pitch in melody[:, [1, 3]].tolist()}
        first = [(start, pitch) for start, pitch in sounds if start < phrase]
        again = [{(start + k * phrase, pitch) for start, pitch in first} & sounds for k in (1, 2)]
        back = {(start - (k + 1) * phrase, pitch) for k, later in enumerate(again) for start, pitch in later}
        shares.append(len(back) / len(first))
    assert 0.75 < np.mean(shares) < 0.97


def test_tracks_are_not_read_from_pitch_alone(songs):
    counts = np.zeros((4, 128))
    for song in songs:
        np.add.at(counts, (song.notes[:, 0], song.notes[:, 3]), 1)
    assert counts.sum(1).max() / counts.sum() < 0.55  # the commonest track
    assert counts.max(0).sum() / counts.sum() < 0.85  # the commonest track of each pitch


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
