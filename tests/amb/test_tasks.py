"""Labels from small files of each public layout; and that no label can be read from the input."""

import csv
from collections import Counter

import mido
import numpy as np
import pytest
from amb.tokenizer import Score

from amb import data, tasks, tokenizer


def write_midi(path, tracks: dict[str, list[tuple[int, int, int, int]]], programs=()):
    """Tracks of (start, end, pitch, velocity), in ticks at 480 a beat."""
    midi = mido.MidiFile(ticks_per_beat=480)
    for number, (name, notes) in enumerate(tracks.items()):
        track = mido.MidiTrack([mido.MetaMessage("track_name", name=name)])
        if number < len(programs):
            track.append(mido.Message("program_change", program=programs[number], channel=number))
        events = []
        for start, end, pitch, velocity in notes:
            events.append((start, mido.Message("note_on", note=pitch, velocity=velocity, channel=number)))
            events.append((end, mido.Message("note_off", note=pitch, channel=number)))
        now = 0
        for tick, message in sorted(events, key=lambda event: event[0]):
            track.append(message.copy(time=tick - now))
            now = tick
        midi.tracks.append(track)
    path.parent.mkdir(parents=True, exist_ok=True)
    midi.save(path)
    return path


def random_notes(rng, count=40):
    """Notes that do not overlap others of their pitch, so that a file says unambiguously where each one ends."""
    slots = rng.permutation(640)[:count]
    columns = slots // 10 * 240, slots // 10 * 240 + 60 * rng.integers(1, 5, count), slots % 10 + 50
    return list(zip(*(column.tolist() for column in (*columns, rng.integers(1, 128, count))), strict=True))


def labelled(task, folder, tmp_path, encoding="octuple", **kwargs):
    task = tasks.TASKS[task]
    store = data.tokenized(folder, encoding, tmp_path / "cache", task.view)
    return tasks.read_labels(task, store, folder, **kwargs)


def classes_by_path(found):
    return {
        piece.path: None if label < 0 else found.classes[label]
        for piece, label in zip(found.store.pieces, found.of_piece, strict=True)
    }


@pytest.mark.parametrize("encoding", ["octuple", "cp"])
def test_melody_labels_follow_their_notes(tmp_path, encoding):
    rng = np.random.default_rng(0)
    tracks = {name: random_notes(rng) for name in ("MELODY", "BRIDGE", "PIANO", "chords")}
    # one pitch range per track, so that labels can be checked by pitch
    tracks = {
        name: [(s, e, 30 + 15 * i + p % 15, v) for s, e, p, v in notes]
        for i, (name, notes) in enumerate(tracks.items())
    }
    write_midi(tmp_path / "POP909" / "001" / "001.mid", tracks, programs=(1, 2, 3, 4))
    found = labelled("melody", tmp_path / "POP909", tmp_path, encoding)
    assert found.classes == ("MELODY", "BRIDGE", "PIANO")
    field = tokenizer.load(encoding).pitch_field
    pitch = found.store.words[:, field].astype(int) + (22 if encoding == "cp" else 0)
    assert np.array_equal(found.labels, np.where(pitch < 75, (pitch - 30) // 15, -1))
    sequences = data.cut([found.store], [["train"]], "train", 64)
    labels = tasks.labels_of(found, sequences)
    words, lengths = sequences.batch(np.arange(len(sequences)))
    notes = tokenizer.load(encoding).is_note(words)
    assert np.array_equal(labels[notes], found.labels)
    assert (labels[~notes] == -1).all()


@pytest.mark.parametrize("encoding", ["octuple", "cp"])
def test_neither_instrument_nor_order_carries_the_track(tmp_path, encoding):
    """The same notes, dealt to tracks and programs in two ways, give the same words in the same order."""
    rng = np.random.default_rng(1)
    notes = random_notes(rng, 300)
    words = []
    for deal in range(2):
        owner = rng.integers(0, 3, len(notes))
        tracks = {
            name: [note for note, of in zip(notes, owner, strict=True) if of == number]
            for number, name in enumerate(rng.permutation(["MELODY", "BRIDGE", "PIANO"]).tolist())
        }
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
        score, rows = tasks.without_tracks(Score(480, notes, [], [], 0))
        encoded = tokenizer.load("octuple").encode_score(score)
        first.update(notes.name[rows[encoded.rows]][::2].tolist())
    assert 0.42 < first["MELODY"] / first.total() < 0.58


def test_percussion_stays_percussion(tmp_path):
    tracks = {str(number): [(0, 240, 40, 64)] for number in range(10)}  # the tenth channel is percussion
    score, _ = tasks.without_tracks(tokenizer.read_midi(write_midi(tmp_path / "drums.mid", tracks)))
    assert sorted(score.notes.instrument.tolist()) == [0] * 9 + [128]


@pytest.mark.parametrize("encoding", ["octuple", "cp"])
def test_velocities_cannot_be_read_from_the_input(tmp_path, encoding):
    """Permuting the true velocities changes the labels and nothing that a model sees."""
    rng = np.random.default_rng(2)
    notes = random_notes(rng, 300)
    found = []
    for number in range(2):
        velocity = rng.permutation([note[3] for note in notes]).tolist()
        folder = tmp_path / str(number)
        write_midi(folder / "a.mid", {"": [(*note[:3], v) for note, v in zip(notes, velocity, strict=True)]})
        found.append(labelled("velocity", folder, tmp_path, encoding))
    task, words = tasks.TASKS["velocity"], tokenizer.load(encoding)
    first, second = (data.cut([f.store], [["train"]], "train", 128).batch(np.arange(3))[0] for f in found)
    assert np.array_equal(first, second)
    seen = tasks.hide(task, words, first)
    names = [field.name for field in words.fields]
    if "Velocity" in names:
        column, field = seen[..., names.index("Velocity")], words.fields[names.index("Velocity")]
        assert set(column.ravel().tolist()) == {field.mask, field.eos, field.pad}
        rest = [index for index, name in enumerate(names) if name != "Velocity"]
        assert np.array_equal(seen[..., rest], first[..., rest])
    assert not np.array_equal(found[0].labels, found[1].labels)
    edges = np.array([32, 48, 64, 80, 96])
    assert Counter(found[0].labels.tolist()) == Counter((edges <= v).sum() for *_, v in notes)


@pytest.mark.parametrize(("task", "kept"), [("velocity", "abc"), ("note", "ac")])
def test_duplicates_have_the_same_notes_and_rhythm_and_labels(task, kept, tmp_path):
    """b has other dynamics than a, c another rhythm, d no difference."""
    notes = random_notes(np.random.default_rng(10))
    loud, slow = [(s, e, p, 100) for s, e, p, _ in notes], [(2 * s, 2 * e, p, v) for s, e, p, v in notes]
    for name, rows in {"a": notes, "b": loud, "c": slow, "d": notes}.items():
        half = len(rows) // 2
        write_midi(tmp_path / "midi" / f"{name}.mid", {"left": rows[:half], "right": rows[half:]})
    found = labelled(task, tmp_path / "midi", tmp_path)
    assert "".join(piece.path[0] for piece in found.store.pieces) == kept


def test_hide_leaves_other_tasks_alone():
    words = np.arange(16).reshape(2, 8)
    assert tasks.hide(tasks.TASKS["melody"], tokenizer.load("octuple"), words) is words


def test_composers_are_folders_wherever_the_path_points(tmp_path):
    rng = np.random.default_rng(3)
    for name in ("Bach/a.mid", "Bach/deep/b.mid", "Satie/c.mid"):
        write_midi(tmp_path / "Pianist8" / "midi" / name, {"": random_notes(rng)})
    for folder in (tmp_path / "Pianist8", tmp_path / "Pianist8" / "midi"):
        found = labelled("composer", folder, tmp_path)
        assert found.classes == ("Bach", "Satie")
        assert [found.classes[label] for label in found.of_piece] == ["Bach", "Bach", "Satie"]
    write_midi(tmp_path / "Pianist8" / "midi" / "stray.mid", {"": random_notes(rng)})
    with pytest.raises(ValueError, match=r"stray\.mid is in no class folder"):
        labelled("composer", tmp_path / "Pianist8", tmp_path)


def test_emopia_names_and_clips(tmp_path):
    rng = np.random.default_rng(4)
    names = [
        "Q1_0vLPYiPN7qY_0.mid",
        "Q1_0vLPYiPN7qY_1.mid",
        "Q4_0vLPYiPN7qY_2.mid",
        "Q3_abcdefghijk_0.mid",
        "other.mid",
    ]
    for name in names:
        write_midi(tmp_path / "EMOPIA" / "midis" / name, {"": random_notes(rng)})
    found = labelled("emotion", tmp_path / "EMOPIA", tmp_path)
    assert classes_by_path(found) == {f"midis/{name}": name[:2] if name[0] == "Q" else None for name in names}
    by_path = dict(zip((piece.path for piece in found.store.pieces), found.groups, strict=True))
    assert len({by_path[f"midis/{name}"] for name in names[:3]}) == 1
    assert len(set(found.groups)) == 3


@pytest.mark.parametrize("below", ["", "labelled", "labelled/midi"])
def test_vgmidis_table(tmp_path, below):
    rng = np.random.default_rng(5)
    rows = [  # the piece in two phrases that agree, one that disagrees, and the four quadrants
        ("Zelda", "Z_A", 0, 1, 1), ("Zelda", "Z_A", 1, 1, 1), ("Zelda", "Z_B", 0, 1, 1), ("Zelda", "Z_B", 1, -1, 1),
        ("Mario", "M_C", 0, -1, 1), ("Mario", "M_D", 0, -1, -1), ("Mario", "M_E", 0, 1, -1),
    ]  # fmt: skip
    root = tmp_path / "vgmidi"
    for name in ("Z_A", "Z_B", "M_C", "M_D", "M_E", "M_unlisted"):
        write_midi(root / "labelled" / "midi" / f"{name}.mid", {"": random_notes(rng)})
    with open(root / "vgmidi_labelled.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "game", "midi", "valence", "arousal"])
        for game, stem, phrase, valence, arousal in rows:
            table.writerow([1, game, f"labelled/phrases/{stem}_{phrase}.mid", valence, arousal])
    found = labelled("emotion", root / below, tmp_path)
    by_stem = {path.split("/")[-1][:-4]: label for path, label in classes_by_path(found).items()}
    assert by_stem == {"Z_A": "Q1", "Z_B": None, "M_C": "Q2", "M_D": "Q3", "M_E": "Q4", "M_unlisted": None}
    assert Counter(found.groups)["Mario"] == 3
    (root / "vgmidi_labelled.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not VGMIDI's table"):
        labelled("emotion", root / below, tmp_path)


def test_own_labels_from_a_csv(tmp_path):
    rng = np.random.default_rng(6)
    for name in ("a.mid", "b/c.mid", "d.mid"):
        write_midi(tmp_path / "midi" / name, {"": random_notes(rng)})
    file = tmp_path / "labels.csv"
    file.write_text("path,label\na.mid,sad\nb/c.mid,glad\n")
    found = labelled("sequence", tmp_path / "midi", tmp_path, csv_file=file)
    assert classes_by_path(found) == {"a.mid": "sad", "b/c.mid": "glad", "d.mid": None}
    assert found.absent == []
    file.write_text("path,label\na.mid,sad\nb/c.mid,glad\nbroken.mid,sad\n")
    assert labelled("sequence", tmp_path / "midi", tmp_path, csv_file=file).absent == ["broken.mid"]
    for text, message in {
        "path,label\nnope.mid,sad\n": "names none of the usable MIDI files of the data: nope.mid",
        "path,label\na.mid,sad\na.mid,glad\n": "labels a.mid both",
        "path|label\na.mid|sad\n": "line 2: expected the columns path and label",
        "path,label\na.mid\n": "line 2",
        "path,label\na.mid,sad\n": "needs two classes",
        "": "it has no rows",
    }.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            labelled("sequence", tmp_path / "midi", tmp_path, csv_file=file)
        assert "\n" not in str(error.value)
    file.write_bytes(b"path,label\n\xff\xfe,1\n")
    with pytest.raises(ValueError, match="UTF-8"):
        labelled("sequence", tmp_path / "midi", tmp_path, csv_file=file)
    with pytest.raises(ValueError, match="cannot be read"):
        labelled("sequence", tmp_path / "midi", tmp_path, csv_file=tmp_path / "no.csv")


WRITTEN = {  # how people and spreadsheets write one table
    "byte-order mark": ("path,label\na.mid,sad\nb/c.mid,glad\n", "utf-8-sig"),
    "utf-16": ("path,label\na.mid,sad\nb/c.mid,glad\n", "utf-16"),
    "semicolons": ("path;label;\na.mid;sad;\nb/c.mid;glad;\n;;\n", "utf-8"),
    "tabs": ("path\tlabel\na.mid\tsad\nb/c.mid\tglad\n", "utf-8"),
    "sep line": ("sep=,\npath,label\na.mid,sad\nb/c.mid,glad\n", "utf-8"),
    "spaces, capitals": ("Path, Label\na.mid , sad\nb/c.mid, glad\n", "utf-8"),
    "carriage returns": ("path,label\ra.mid,sad\rb/c.mid,glad\r", "utf-8"),
    "backslashes": ("path,label\na.mid,sad\nb\\c.mid,glad\n", "utf-8"),
    "absolute": ("path,label\n/data/midi/a.mid,sad\nC:\\midi\\b\\c.mid,glad\n", "utf-8"),
    "no suffix": ("path,label\na,sad\nb/c,glad\n", "utf-8"),
    "names only": ("path,label\na.mid,sad\nc.mid,glad\n", "utf-8"),
}


@pytest.fixture(scope="module")
def two_pieces(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("two"), np.random.default_rng(6)
    for name in ("a.mid", "b/c.mid"):
        write_midi(folder / "midi" / name, {"": random_notes(rng)})
    return folder


@pytest.mark.parametrize("how", WRITTEN)
def test_a_csv_is_read_however_it_is_written(how, two_pieces, tmp_path):
    text, encoding = WRITTEN[how]
    (tmp_path / "labels.csv").write_bytes(text.encode(encoding))
    found = labelled("sequence", two_pieces / "midi", two_pieces, csv_file=tmp_path / "labels.csv")
    assert classes_by_path(found) == {"a.mid": "sad", "b/c.mid": "glad"}
    assert found.absent == []


def test_a_csv_may_say_what_belongs_together(two_pieces, tmp_path):
    (tmp_path / "labels.csv").write_text("path,label,group\na.mid,sad,waltz\nb/c.mid,glad,\n")
    found = labelled("sequence", two_pieces / "midi", two_pieces, csv_file=tmp_path / "labels.csv")
    assert found.groups == ["waltz", "b/c.mid"]


def test_classes_that_do_not_train_are_left_out_and_said(tmp_path):
    rng = np.random.default_rng(9)
    for number, tracks in enumerate((("MELODY", "PIANO"), ("MELODY", "PIANO"), ("MELODY", "BRIDGE"), ("BRIDGE",))):
        write_midi(tmp_path / "midi" / f"{number}.mid", {name: random_notes(rng) for name in tracks})
    found, roles = labelled("melody", tmp_path / "midi", tmp_path), ["train", "valid", "test", "test"]
    kept, new_roles, remarks = tasks.without_untrained(found, roles)
    assert kept.classes == ("MELODY", "PIANO")
    assert new_roles == ["train", "valid", "test", "unused"]
    assert remarks == [
        "class 'BRIDGE' has no note to train on: the model does not have it, and the 80 notes of it do not count"
    ]
    assert np.array_equal(kept.labels, np.array([0, -1, 1, -1])[found.labels])
    assert tasks.without_untrained(kept, new_roles) == (kept, new_roles, [])
    with pytest.raises(ValueError, match="no note of PIANO is left to train on"):
        tasks.without_untrained(kept, ["unused", "unused", "train", "unused"])

    for name in ("x/a.mid", "x/b.mid", "y/c.mid", "z/d.mid"):
        write_midi(tmp_path / "folders" / name, {"": random_notes(rng)})
    found = labelled("sequence", tmp_path / "folders", tmp_path)
    kept, roles, remarks = tasks.without_untrained(found, ["train", "valid", "test", "train"])
    assert (kept.classes, roles) == (("x", "z"), ["train", "valid", "unused", "train"])
    assert kept.of_piece.tolist() == [0, 0, -1, 1]
    assert "class 'y' has no piece to train on" in remarks[0]


def test_own_note_labels_are_track_names(tmp_path):
    rng = np.random.default_rng(7)
    write_midi(tmp_path / "midi" / "a.mid", {"left": random_notes(rng), "right ": random_notes(rng)})
    write_midi(tmp_path / "midi" / "b.mid", {"": random_notes(rng)})
    found = labelled("note", tmp_path / "midi", tmp_path)
    assert found.classes == ("left", "right")
    assert found.of_piece.tolist() == [0, -1]
    with pytest.raises(ValueError, match="no track is named MELODY or BRIDGE or PIANO; tracks there: 'left'"):
        labelled("melody", tmp_path / "midi", tmp_path)


def test_versions_of_one_song_are_one_group(tmp_path):
    rng = np.random.default_rng(8)
    for name in ("001/001.mid", "001/versions/001-v1.mid", "002/002.mid"):
        write_midi(tmp_path / "POP909" / name, {"MELODY": random_notes(rng), "PIANO": random_notes(rng)})
    found = labelled("melody", tmp_path / "POP909", tmp_path)
    assert found.groups == ["001", "001", "002"]


def test_class_weights_average_to_one_over_the_labels():
    labels = np.array([[0, 0, 0, 1], [-1, -1, 2, 2]])
    weights = tasks.inverse_frequency(labels, 4)
    assert weights[[0, 1, 2]].tolist() == pytest.approx([2 / 3, 2, 1])
    assert weights[labels[labels >= 0]].mean() == pytest.approx(1)
