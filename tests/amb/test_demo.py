"""The demo corpus: the same everywhere, well-formed, and with labels that can be learned but not simply read off."""

import json
from collections import Counter

import mido
import numpy as np
import pytest

from amb import demo

TRACKS = ["MELODY", "BRIDGE", "PIANO"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return demo.write_corpus(tmp_path_factory.mktemp("demo") / "corpus")


@pytest.fixture(scope="module")
def pieces(corpus):
    """[(style, mood, file, notes)], notes being rows of track, start, end, pitch, velocity in ticks."""
    found = []
    for path in sorted(corpus.glob("*/*.mid")):
        file, notes = mido.MidiFile(path), []
        for index, track in enumerate(file.tracks):
            now, sounding = 0, {}
            for message in track:
                now += message.time
                if message.type not in ("note_on", "note_off"):
                    continue
                if message.type == "note_on" and message.velocity:
                    assert message.note not in sounding, "a pitch starts while it still sounds"
                    sounding[message.note] = now, message.velocity
                else:
                    start, velocity = sounding.pop(message.note)
                    assert now > start
                    notes.append((index - 1, start, now, message.note, velocity))
            assert not sounding, "a note never ends"
        mood, style, _ = path.stem.split("_")
        assert style == path.parent.name
        found.append((style, mood, file, np.array(sorted(notes, key=lambda note: note[1:]))))
    return found


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}


def bar_ticks(file):
    metre = next(message for message in file.tracks[0] if message.type == "time_signature")
    return 4 * file.ticks_per_beat * metre.numerator // metre.denominator


def tempos(file):
    return [mido.tempo2bpm(message.tempo) for message in file.tracks[0] if message.type == "set_tempo"]


def test_tables_agree():
    for style in demo.STYLES.values():
        n, m = style.metre
        assert {len(pattern) for pattern in style.melody + style.piano} == {16 * n // m} == {style.bar}
        assert style.bar in demo.FORMS
        chords = set(map(int, "".join(style.harmony.values()))) | {1, 4, 5}
        assert chords <= set(style.harmony), "the walk must be able to go on from every chord"
        assert set("".join(style.piano)) <= set(".-12345678xyzCcH")
    assert all(len(plan) == len(demo.ARCH) == 8 for plan in demo.PLANS)


def test_a_corpus_is_determined_by_its_seed(tmp_path):
    one, same, other = (demo.write_corpus(tmp_path / name, 8, seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert contents(one) == contents(same)
    assert contents(one).keys() == contents(other).keys()
    assert all(contents(one)[name] != contents(other)[name] for name in contents(one))


def test_a_piece_is_the_same_in_a_corpus_of_any_size(corpus, tmp_path):
    few = contents(demo.write_corpus(tmp_path / "few", 3))
    few.pop("demo.json")
    assert len(few) == 3
    assert few.items() <= contents(corpus).items()


def test_default_bytes_are_these(corpus):
    """If this fails and the change of the notes is meant, raise demo.VERSION and put the new digest here."""
    manifest = json.loads((corpus / "demo.json").read_text())
    assert (manifest["version"], manifest["sha256"][:16]) == (1, "ad5db158fa4d548c")


def test_styles_and_moods_are_balanced(pieces):
    counts = Counter((style, mood) for style, mood, _, _ in pieces)
    assert len(pieces) == 160
    assert len(counts) == 32
    assert set(counts.values()) == {5}


def test_pieces_are_well_formed(pieces):
    for _, _, file, notes in pieces:
        assert file.type == 1
        assert [track.name for track in file.tracks[1:]] == TRACKS
        programs = [message.program for track in file.tracks for message in track if message.type == "program_change"]
        assert len(programs) == 3
        assert len(set(programs)) == 1, "the instrument must not tell the track"
        kinds = {message.type for message in file.tracks[0]}
        assert {"time_signature", "key_signature", "set_tempo"} <= kinds
        assert len(tempos(file)) >= 3, "at least the last phrase slows down"
        assert 200 <= len(notes) <= 800
        assert notes[:, 3].min() >= 21
        assert notes[:, 3].max() <= 108
        assert set(notes[:, 0]) == {0, 1, 2}


def test_no_two_pieces_are_duplicates(pieces):
    assert len({tuple(notes[:, 3]) for _, _, _, notes in pieces}) == len(pieces)


def test_most_notes_start_on_the_grid(pieces):
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


@pytest.fixture(scope="module")
def described(pieces):
    """Features that say nothing of tonic or track: tempo, velocity, onsets in the bar, durations, scale over the last
    bass note. Also styles, moods, and the training half: three of each style and mood."""
    rows, seen, train = [], Counter(), []
    for style, mood, file, notes in pieces:
        onsets = np.bincount(notes[:, 1] % bar_ticks(file) // demo.SIXTEENTH, minlength=16) / len(notes)
        lengths = np.bincount(np.minimum((notes[:, 2] - notes[:, 1]) // 60, 32), minlength=33) / len(notes)
        last = notes[notes[:, 1] >= notes[:, 1].max() - bar_ticks(file)]
        scale = np.bincount((notes[:, 3] - last[:, 3].min()) % 12, minlength=12) / len(notes)
        rows.append(np.r_[tempos(file)[0], notes[:, 4].mean(), onsets, lengths, scale])
        seen[style, mood] += 1
        train.append(seen[style, mood] <= 3)
    styles, moods = (np.array([piece[k] for piece in pieces]) for k in (0, 1))
    return np.array(rows), styles, moods, np.array(train)


def test_style_can_be_learned(described):
    rows, styles, _, train = described
    assert nearest_centroid(rows, styles, train) > 0.8  # by chance 0.125


def test_mood_can_be_learned(described):
    rows, _, moods, train = described
    brief = np.c_[rows[:, :2], rows[:, -12:]]
    assert nearest_centroid(brief, moods, train) > 0.6  # by chance 0.25
    loud = np.isin(moods, ["Q1", "Q2"])
    assert 0.8 < nearest_centroid(rows[:, 1:2], loud, train) < 1.0, "learnable, with some overlap"


def test_tracks_are_not_read_from_pitch_alone(pieces):
    notes = np.concatenate([notes for _, _, _, notes in pieces])
    table = np.zeros((3, 128))
    np.add.at(table, (notes[:, 0], notes[:, 3]), 1)
    best, majority = table.max(0).sum() / table.sum(), table.sum(1).max() / table.sum()
    assert majority < 0.55
    assert best < 0.85


def test_velocity_follows_metre_voice_and_phrase(pieces):
    """Given the piece's mean, the note's track, place in the bar and bar of the phrase predict its bin of velocity."""
    rows, targets, louder = [], [], []
    for _, _, file, notes in pieces:
        bar = bar_ticks(file)
        place = (notes[:, 1] + 20) % bar
        down, beat = place < 40, place % (bar // 2 if bar == 1440 else 480) < 40
        louder.append(notes[down, 4].mean() - notes[~down, 4].mean())
        rows.append(np.c_[np.eye(3)[notes[:, 0]], np.eye(8)[(notes[:, 1] + 20) // bar % 8], down, beat])
        targets.append(notes[:, 4] - notes[:, 4].mean())
    design, target = np.concatenate(rows), np.concatenate(targets)
    fitted = design @ np.linalg.lstsq(design, target, rcond=None)[0]
    true = np.concatenate([notes[:, 4] for _, _, _, notes in pieces])
    bins = [np.digitize(velocity, [32, 48, 64, 80, 96]) for velocity in (true, true - target + fitted)]
    assert min(louder) > 0
    assert np.mean(louder) > 6
    majority = np.bincount(bins[0]).max() / len(true)
    assert majority < 0.4
    assert np.mean(bins[0] == bins[1]) > majority + 0.3
    assert set(bins[0]) == set(range(6))


def test_a_corpus_is_kept(tmp_path, monkeypatch):
    folder = demo.write_corpus(tmp_path / "a" / "b", 2)
    assert [path.name for path in folder.parent.iterdir()] == ["b"], "nothing is left beside it"
    monkeypatch.setattr(demo, "compose", None)  # composing again would fail
    assert demo.write_corpus(folder, 2) == folder


def test_an_empty_folder_may_be_used(tmp_path):
    assert len(list(demo.write_corpus(tmp_path, 2).glob("*/*.mid"))) == 2


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "song.txt").write_text("la")
    (tmp_path / "file").write_text("la")
    folder = demo.write_corpus(tmp_path / "demo", 2)
    for path, pieces, seed in ((tmp_path / "mine", 2, 0), (tmp_path / "file", 2, 0), (folder, 3, 0), (folder, 2, 1)):
        with pytest.raises(ValueError, match="is not the demo corpus asked for"):
            demo.write_corpus(path, pieces, seed)
    next(folder.glob("*/*.mid")).write_bytes(b"edited")
    with pytest.raises(ValueError, match="is not the demo corpus asked for"):
        demo.write_corpus(folder, 2)
    assert (tmp_path / "mine" / "song.txt").read_text() == "la"
    for pieces, seed in ((0, 0), (2, -1)):
        with pytest.raises(ValueError, match="at least"):
            demo.write_corpus(tmp_path / "new", pieces, seed)


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "compose", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.write_corpus(tmp_path / "demo", 2)
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path / "demo"), "--pieces", "1"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "demo")
    assert demo.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
