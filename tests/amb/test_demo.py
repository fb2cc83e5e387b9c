"""The demo corpus: the same everywhere, well-formed, and with labels that can be learned but not simply read off."""

import hashlib
from collections import Counter

import mido
import numpy as np
import pytest

from amb import demo, tokenizer

TRACKS = ["MELODY", "BRIDGE", "PIANO"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return demo.write_corpus(tmp_path_factory.mktemp("demo") / "corpus", 96)


@pytest.fixture(scope="module")
def pieces(corpus):
    """[(style, mood, file, notes)], notes being rows of track, start, end, pitch, velocity in ticks."""
    pieces = []
    for path in sorted(corpus.glob("*/*.mid")):
        notes = tokenizer.read_midi(path).notes
        mood, style, _ = path.stem.split("_")
        assert style == path.parent.name
        rows = np.stack([notes.track - 1, notes.start, notes.end, notes.pitch, notes.velocity], axis=1)
        pieces.append((style, mood, mido.MidiFile(path), rows[np.lexsort(rows.T[::-1][:4])]))
    return pieces


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}


def bar_ticks(file):
    metre = next(message for message in file.tracks[0] if message.type == "time_signature")
    return 4 * file.ticks_per_beat * metre.numerator // metre.denominator


def first_tempo(file):
    return next(mido.tempo2bpm(message.tempo) for message in file.tracks[0] if message.type == "set_tempo")


def test_a_corpus_is_determined_by_its_seed_and_a_piece_by_its_number(corpus, tmp_path):
    """If the digest differs and the change of the notes is meant, raise demo.VERSION and put the new one here."""
    one, other = (demo.write_corpus(tmp_path / name, 8, seed) for name, seed in (("a", 0), ("b", 1)))
    assert len(contents(one)) == 8
    assert contents(one).items() <= contents(corpus).items()
    assert contents(one).keys() == contents(other).keys()
    assert all(contents(one)[name] != contents(other)[name] for name in contents(one))
    digest = hashlib.sha256(b"".join(contents(one)[name] for name in sorted(contents(one)))).hexdigest()
    assert (demo.VERSION, digest[:16]) == (2, "269b8ac977206bcc")


def test_pieces_are_balanced_and_well_formed(pieces):
    counts = Counter((style, mood) for style, mood, _, _ in pieces)
    assert len(counts) == 16
    assert set(counts.values()) == {6}
    for _, _, file, notes in pieces:
        assert file.type == 1
        assert [track.name for track in file.tracks[1:]] == TRACKS
        assert {message.type for message in file.tracks[0]} >= {"time_signature", "set_tempo"}
        assert 200 <= len(notes) <= 800
        assert notes[:, 3].min() >= 21
        assert notes[:, 3].max() <= 108
        assert set(notes[:, 0]) == {0, 1, 2}
        assert (notes[:, 2] > notes[:, 1]).all()
        same = notes[np.lexsort((notes[:, 1], notes[:, 3], notes[:, 0]))]
        follows = (np.diff(same[:, 0]) == 0) & (np.diff(same[:, 3]) == 0)
        assert (same[1:, 1] >= same[:-1, 2])[follows].all(), "a pitch starts while it still sounds"
    assert len({tuple(notes[:, 3]) for _, _, _, notes in pieces}) == len(pieces), "duplicates"
    starts = np.concatenate([notes[:, 1] for _, _, _, notes in pieces])
    assert 0.75 < np.mean(starts % demo.SIXTEENTH == 0) < 0.98


def test_phrases_return_but_ornaments_do_not(pieces):
    """AABA and the like: most notes of bars 1–8 come back eight or sixteen bars later, and not all of them do."""
    shares = []
    for _, _, file, notes in pieces:
        phrase, melody = 8 * bar_ticks(file), notes[notes[:, 0] == 0]
        sixteenths = {(int(round(start / demo.SIXTEENTH)), pitch) for start, pitch in melody[:, [1, 3]]}
        first = [note for note in sixteenths if note[0] < phrase // demo.SIXTEENTH]
        later = [phrase * k // demo.SIXTEENTH for k in (1, 2)]
        shares.append(np.mean([any((start + shift, pitch) in sixteenths for shift in later) for start, pitch in first]))
    assert 0.75 < np.mean(shares) < 0.97


def nearest_centroid(features, labels, train):
    """Accuracy on the rest of the pieces, by Euclidean distance of standardised features."""
    features = (features - features[train].mean(0)) / (features[train].std(0) + 1e-9)
    names = sorted(set(labels))
    centroids = np.stack([features[train & (labels == name)].mean(0) for name in names])
    distance = ((features[~train, None] - centroids) ** 2).sum(-1)
    return np.mean(np.array(names)[distance.argmin(1)] == labels[~train])


def test_style_and_mood_can_be_learned(pieces):
    """From features that say nothing of tonic or track: tempo, velocity, onsets in the bar, durations, scale over the
    last bass note; the training half is three pieces of each style and mood."""
    rows, count, train = [], Counter(), []
    for style, mood, file, notes in pieces:
        onsets = np.bincount(notes[:, 1] % bar_ticks(file) // demo.SIXTEENTH, minlength=16) / len(notes)
        lengths = np.bincount(np.minimum((notes[:, 2] - notes[:, 1]) // 60, 32), minlength=33) / len(notes)
        last = notes[notes[:, 1] >= notes[:, 1].max() - bar_ticks(file)]
        scale = np.bincount((notes[:, 3] - last[:, 3].min()) % 12, minlength=12) / len(notes)
        rows.append(np.r_[first_tempo(file), notes[:, 4].mean(), onsets, lengths, scale])
        count[style, mood] += 1
        train.append(count[style, mood] <= 3)
    styles, moods = (np.array([piece[k] for piece in pieces]) for k in (0, 1))
    rows, train = np.array(rows), np.array(train)
    assert nearest_centroid(rows, styles, train) > 0.9  # by chance 0.25
    assert nearest_centroid(np.c_[rows[:, :2], rows[:, -12:]], moods, train) > 0.6  # by chance 0.25
    loud = np.isin(moods, ["Q1", "Q2"])
    assert 0.8 < nearest_centroid(rows[:, 1:2], loud, train) < 1.0, "learnable, with some overlap"


def test_tracks_are_not_read_from_pitch_alone(pieces):
    notes = np.concatenate([notes for _, _, _, notes in pieces])
    table = np.zeros((3, 128))
    np.add.at(table, (notes[:, 0], notes[:, 3]), 1)
    best, majority = table.max(0).sum() / table.sum(), table.sum(1).max() / table.sum()
    assert majority < 0.55
    assert best < 0.85


def test_a_corpus_is_written_once_and_whole(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)  # an empty folder may be used
    folder = demo.write_corpus(tmp_path / "a" / "b", 2)
    assert len(contents(folder)) == 2
    assert [path.name for path in folder.parent.iterdir()] == ["b"], "nothing is left beside it"
    monkeypatch.setattr(demo, "compose", lambda *_: 1 / 0)  # composing again would fail
    assert demo.write_corpus(folder, 2) == folder
    with pytest.raises(ZeroDivisionError):
        demo.write_corpus(tmp_path / "a" / "c", 2)
    (tmp_path / "a" / "file").write_text("la")
    monkeypatch.undo()
    with pytest.raises(OSError, match="file cannot be written"):
        demo.write_corpus(tmp_path / "a" / "file", 2)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["b", "file"]
