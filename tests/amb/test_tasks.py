"""Labels from small files of each public layout; and that no label can be read from the input."""

import csv
from collections import Counter

import numpy as np
import pytest
from amb.tokenizer import midi

from amb import data, tasks, tokenizer

BOTH = pytest.mark.parametrize("encoding", ["octuple", "cp"])


def write_midi(path, tracks: dict[str, np.ndarray], programs=None):
    """Tracks of rows start, end, pitch, velocity, in ticks at 480 a beat."""
    programs = programs or [0] * len(tracks)
    parts = [midi.Part(name, program, notes) for (name, notes), program in zip(tracks.items(), programs, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    midi.write_midi(parts, [], []).save(path)
    return path


def random_notes(rng, count=40):
    """Notes that do not overlap others of their pitch, so that a file says unambiguously where each one ends."""
    slots = rng.permutation(640)[:count]
    start, pitch = slots // 10 * 240, slots % 10 + 50
    return np.stack([start, start + 60 * rng.integers(1, 5, count), pitch, rng.integers(1, 128, count)], axis=1)


def write_corpus(folder, *names, tracks=("",)):
    rng = np.random.default_rng(len(names))
    for name in names:
        write_midi(folder / name, {track: random_notes(rng) for track in tracks})
    return folder


def labelled(task, folder, tmp_path, encoding="octuple", **kwargs):
    task = tasks.TASKS[task]
    return tasks.read_labels(task, data.tokenized(folder, encoding, tmp_path / "cache", task.view), folder, **kwargs)


def classes_by_path(result):
    names = [*result.classes, None]
    return {piece.path: names[label] for piece, label in zip(result.store.pieces, result.of_piece, strict=True)}


@BOTH
def test_melody_labels_follow_their_notes(tmp_path, encoding):
    rng, tracks = np.random.default_rng(0), {}
    for number, name in enumerate(("MELODY", "BRIDGE", "PIANO", "chords")):
        tracks[name] = random_notes(rng)
        tracks[name][:, 2] += 15 * number - 20  # one pitch range per track, so that labels can be checked by pitch
    write_midi(tmp_path / "POP909" / "001" / "001.mid", tracks, programs=(1, 2, 3, 4))
    result = labelled("melody", tmp_path / "POP909", tmp_path, encoding)
    assert result.classes == ("MELODY", "BRIDGE", "PIANO")
    field = tokenizer.load(encoding).pitch_field
    pitch = result.store.words[:, field].astype(int) + (22 if encoding == "cp" else 0)
    assert np.array_equal(result.labels, np.where(pitch < 75, (pitch - 30) // 15, -1))
    sequences = data.cut([result.store], [["train"]], "train", 64)
    labels = tasks.labels_of(result, sequences)
    notes = tokenizer.load(encoding).is_note(sequences.batch(np.arange(len(sequences)))[0])
    assert np.array_equal(labels[notes], result.labels)
    assert (labels[~notes] == -1).all()


@BOTH
def test_neither_instrument_nor_order_carries_the_track(tmp_path, encoding):
    """The same notes, dealt to tracks and programs in two ways, give the same words in the same order."""
    rng, words = np.random.default_rng(1), []
    notes = random_notes(rng, 300)
    for deal in range(2):
        track, names = rng.integers(0, 3, len(notes)), rng.permutation(["MELODY", "BRIDGE", "PIANO"]).tolist()
        tracks = {name: notes[track == number] for number, name in enumerate(names)}
        path = write_midi(tmp_path / f"{deal}.mid", tracks, programs=rng.integers(0, 128, 3).tolist())
        score, rows = tasks.without_tracks(tokenizer.read_midi(path))
        assert np.array_equal(np.sort(rows), np.arange(len(notes)))
        words.append(tokenizer.load(encoding).encode_score(score).words)
    assert np.array_equal(*words)


def test_notes_alike_in_everything_are_shuffled():
    """Melody and accompaniment in unison: the first of two equal words is as often one as the other."""
    first = Counter()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        count = int(rng.integers(20, 60))
        column = np.repeat(rng.permutation(count), 2)
        notes = tokenizer.Notes(
            track=np.tile([0, 1], count), start=column * 480, end=column * 480 + 240, pitch=column % 12 + 60,
            velocity=column * 0 + 64, channel=column * 0, program=column * 0, name=np.tile(["MELODY", "PIANO"], count),
        )  # fmt: skip
        score, rows = tasks.without_tracks(tokenizer.Score(480, notes, [], [], 0))
        encoded = tokenizer.load("octuple").encode_score(score)
        first.update(notes.name[rows[encoded.rows]][::2].tolist())
    assert 0.42 < first["MELODY"] / first.total() < 0.58


def test_percussion_stays_percussion(tmp_path):
    tracks = {name: np.array([[0, 240, 40, 64]]) for name in ("piano", "drums")}
    path = write_midi(tmp_path / "drums.mid", tracks, programs=(5, tokenizer.PERCUSSION))
    score, _ = tasks.without_tracks(tokenizer.read_midi(path))
    assert sorted(score.notes.instrument.tolist()) == [0, 128]


@BOTH
def test_velocities_cannot_be_read_from_the_input(tmp_path, encoding):
    """Permuting the true velocities changes the labels and nothing that a model sees."""
    rng, result = np.random.default_rng(2), []
    notes = random_notes(rng, 300)
    for number in range(2):
        notes[:, 3] = rng.permutation(notes[:, 3])
        write_midi(tmp_path / str(number) / "a.mid", {"": notes})
        result.append(labelled("velocity", tmp_path / str(number), tmp_path, encoding))
    task, words = tasks.TASKS["velocity"], tokenizer.load(encoding)
    first, second = (data.cut([f.store], [["train"]], "train", 128).batch(np.arange(3))[0] for f in result)
    assert np.array_equal(first, second)
    seen = tasks.hide(task, words, first)
    for index, field in enumerate(words.fields):
        if field.name == "Velocity":
            assert set(seen[..., index].ravel().tolist()) == {field.mask, field.eos, field.pad}
        else:
            assert np.array_equal(seen[..., index], first[..., index])
    assert tasks.hide(tasks.TASKS["melody"], words, first) is first
    assert not np.array_equal(result[0].labels, result[1].labels)
    edges = np.array([32, 48, 64, 80, 96])
    assert Counter(result[0].labels.tolist()) == Counter((edges <= velocity).sum() for velocity in notes[:, 3])


def test_composers_are_folders_wherever_the_path_points(tmp_path):
    folder = write_corpus(tmp_path / "Pianist8" / "midi", "Bach/a.mid", "Bach/deep/b.mid", "Satie/c.mid")
    for source in (folder.parent, folder):
        assert list(classes_by_path(labelled("composer", source, tmp_path)).values()) == ["Bach", "Bach", "Satie"]
    write_corpus(folder, "stray.mid")
    with pytest.raises(ValueError, match=r"stray\.mid is in no class folder"):
        labelled("composer", tmp_path / "Pianist8", tmp_path)


def test_emopia_names_and_clips(tmp_path):
    clips = ["Q1_0vLPYiPN7qY_0.mid", "Q1_0vLPYiPN7qY_1.mid", "Q4_0vLPYiPN7qY_2.mid"]
    names = [*clips, "Q3_abcdefghijk_0.mid", "other.mid"]
    result = labelled("emotion", write_corpus(tmp_path / "EMOPIA", *names), tmp_path)
    assert classes_by_path(result) == {name: name[:2] if name[0] == "Q" else None for name in names}
    group_of = dict(zip(classes_by_path(result), result.groups, strict=True))
    assert len({group_of[name] for name in clips}) == 1
    assert len(set(result.groups)) == 3


@pytest.mark.parametrize("below", ["", "labelled", "labelled/midi"])
def test_vgmidis_table(tmp_path, below):
    rows = [  # the piece in two phrases that agree, one that disagrees, and the four quadrants
        ("Zelda", "Z_A", 0, 1, 1), ("Zelda", "Z_A", 1, 1, 1), ("Zelda", "Z_B", 0, 1, 1), ("Zelda", "Z_B", 1, -1, 1),
        ("Mario", "M_C", 0, -1, 1), ("Mario", "M_D", 0, -1, -1), ("Mario", "M_E", 0, 1, -1),
    ]  # fmt: skip
    root, quadrants = (
        tmp_path / "vgmidi",
        {"Z_A": "Q1", "Z_B": None, "M_C": "Q2", "M_D": "Q3", "M_E": "Q4", "M_F": None},
    )
    write_corpus(root / "labelled" / "midi", *(f"{name}.mid" for name in quadrants))
    with open(root / "vgmidi_labelled.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "game", "midi", "valence", "arousal"])
        for game, stem, phrase, valence, arousal in rows:
            table.writerow([1, game, f"labelled/phrases/{stem}_{phrase}.mid", valence, arousal])
    result = labelled("emotion", root / below, tmp_path)
    assert {path.split("/")[-1][:-4]: label for path, label in classes_by_path(result).items()} == quadrants
    assert Counter(result.groups)["Mario"] == 3
    (root / "vgmidi_labelled.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not VGMIDI's table"):
        labelled("emotion", root / below, tmp_path)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("pieces") / "midi", "a.mid", "b/c.mid", "d.mid")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [  # how people and spreadsheets write one table
        ("path,label\na.mid,sad\nb/c.mid,glad\n", "utf-8-sig"),
        ("path,label\na.mid,sad\nb/c.mid,glad\n", "utf-16"),
        ("path;label;\na.mid;sad;\nb/c.mid;glad;\n;;\n", "utf-8"),
        ("path\tlabel\na.mid\tsad\nb/c.mid\tglad\n", "utf-8"),
        ("sep=,\npath,label\na.mid,sad\nb/c.mid,glad\n", "utf-8"),
        ("Path, Label\na.mid , sad\nb/c.mid, glad\n", "utf-8"),
        ("path,label\ra.mid,sad\rb/c.mid,glad\r", "utf-8"),
        ("path,label\na.mid,sad\nb\\c.mid,glad\n", "utf-8"),
        ("path,label\n/data/midi/a.mid,sad\nC:\\midi\\b\\c.mid,glad\n", "utf-8"),
        ("path,label\na,sad\nb/c,glad\n", "utf-8"),
        ("path,label\na.mid,sad\nc.mid,glad\n", "utf-8"),
    ],
)
def test_a_csv_is_read_however_it_is_written(text, encoding, pieces, tmp_path):
    (tmp_path / "labels.csv").write_bytes(text.encode(encoding))
    result = labelled("sequence", pieces, pieces.parent, csv_file=tmp_path / "labels.csv")
    assert classes_by_path(result) == {"a.mid": "sad", "b/c.mid": "glad", "d.mid": None}
    assert result.absent == []


def test_a_csv_may_say_what_belongs_together_and_name_what_is_not_there(pieces, tmp_path):
    (tmp_path / "labels.csv").write_text("path,label,group\na.mid,sad,waltz\nb/c.mid,glad,\nbroken.mid,sad,\n")
    result = labelled("sequence", pieces, pieces.parent, csv_file=tmp_path / "labels.csv")
    assert result.groups == ["waltz", "b/c.mid", "d.mid"]
    assert result.absent == ["broken.mid"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,label\nnope.mid,sad\n", "names none of the usable MIDI files of the data: nope.mid"),
        (b"path,label\na.mid,sad\na.mid,glad\n", "labels a.mid both"),
        (b"path|label\na.mid|sad\n", "line 2: expected the columns path and label"),
        (b"path,label\na.mid\n", "line 2"),
        (b"path,label\na.mid,sad\n", "needs two classes"),
        (b"", "it has no rows"),
        (b"path,label\n\xff\xfe,1\n", "UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_csv_is_one_line(content, message, pieces, tmp_path):
    if content is not None:
        (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        labelled("sequence", pieces, pieces.parent, csv_file=tmp_path / "labels.csv")
    assert "\n" not in str(error.value)


def test_classes_that_do_not_train_are_left_out_and_said(tmp_path):
    for number, tracks in enumerate((("MELODY", "PIANO"), ("PIANO", "MELODY"), ("MELODY", "BRIDGE"), ("BRIDGE",))):
        write_corpus(tmp_path / "midi", *[f"{number}.mid"] * (number + 1), tracks=tracks)
    result, roles = labelled("melody", tmp_path / "midi", tmp_path), ["train", "valid", "test", "test"]
    kept, new_roles, remarks = tasks.without_untrained(result, roles)
    assert kept.classes == ("MELODY", "PIANO")
    assert new_roles == ["train", "valid", "test", "unused"]
    assert remarks == [
        "class 'BRIDGE' has no note to train on: the model does not have it, and the 80 notes of it do not count"
    ]
    assert np.array_equal(kept.labels, np.array([0, -1, 1, -1])[result.labels])
    assert tasks.without_untrained(kept, new_roles) == (kept, new_roles, [])
    with pytest.raises(ValueError, match="no note of PIANO is left to train on"):
        tasks.without_untrained(kept, ["unused", "unused", "train", "unused"])

    result = labelled("sequence", write_corpus(tmp_path / "x", "x/a.mid", "x/b.mid", "y/c.mid", "z/d.mid"), tmp_path)
    kept, roles, remarks = tasks.without_untrained(result, ["train", "valid", "test", "train"])
    assert (kept.classes, roles) == (("x", "z"), ["train", "valid", "unused", "train"])
    assert kept.of_piece.tolist() == [0, 0, -1, 1]
    assert "class 'y' has no piece to train on" in remarks[0]


def test_own_note_labels_are_track_names_and_versions_of_a_song_one_group(tmp_path):
    write_corpus(tmp_path / "midi", "1/1.mid", "1/versions/1-v1.mid", tracks=("left", "right "))
    write_corpus(tmp_path / "midi", "2/2.mid")
    result = labelled("note", tmp_path / "midi", tmp_path)
    assert result.classes == ("left", "right")
    assert result.of_piece.tolist() == [0, 0, -1]
    assert result.groups == ["1", "1", "2"]
    with pytest.raises(ValueError, match="no track is named MELODY or BRIDGE or PIANO; tracks there: 'left'"):
        labelled("melody", tmp_path / "midi", tmp_path)


def test_class_weights_average_to_one_over_the_labels():
    labels = np.array([[0, 0, 0, 1], [-1, -1, 2, 2]])
    weights = tasks.inverse_frequency(labels, 4)
    assert weights[[0, 1, 2]].tolist() == pytest.approx([2 / 3, 2, 1])
    assert weights[labels[labels >= 0]].mean() == pytest.approx(1)
