"""Splits: by piece, stratified, honest about what the pre-training saw."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from amb import data, splits


def write_split(folder, **lists):
    (folder / "split.json").write_text(json.dumps(lists))
    return folder / "split.json"


def stores_of(paths, count=1):
    return [SimpleNamespace(pieces=[SimpleNamespace(path=path) for path in paths])] * count


def labelled(labels, groups=None, paths=None):
    """What `tasks.read_labels` gives, of classes x, y ..."""
    paths = paths or [f"{number}.mid" for number in range(len(labels))]
    classes = list("xyzw")[: max(labels) + 1]
    return SimpleNamespace(
        store=stores_of(paths)[0], of_piece=np.array(labels), groups=groups or paths, classes=classes
    )


def assert_together(groups, roles):
    assert len(set(zip(groups, roles, strict=True))) == len(set(groups))


def test_roles_from_split_files(store, tmp_path):
    paths = [piece.path for piece in store.pieces]
    train = [paths[0].split("/")[1], paths[1]]
    split = write_split(tmp_path, train=train, valid=[paths[2]], test=[paths[3], "gone"], labels=3)
    (roles,), remarks = splits.assign_roles([store], [split], 0.1, 0)
    assert roles == ["train", "train", "valid", "test"] + ["unused"] * (len(paths) - 4)
    assert remarks == ["names in the split or csv that match no usable file: 1 (gone)"]
    assert data.names([store], [roles], "valid") == [paths[2]]
    split.write_text('{"train": ["a"], "validation": ["b"]}', encoding="utf-8-sig")
    assert splits.read_splits([split]) == {"a": "train", "b": "valid"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "not JSON"),
        ("[]", "not a split"),
        ('{"train": 3}', "not a split"),
        ('{"train": ["a.mid"], "valid": ["a.mid"]}', "gives a.mid to both"),
        ('{"train": ["a.mid"], "valid": ["b.mid"]}', "split.json: none of its 2 names is that of a usable file, a.mid"),
        ('{"valid": ["Q1_chorale_000.mid"]}', "split.json leaves no piece to train on"),
    ],
)
def test_bad_splits_are_one_line(store, tmp_path, text, message):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        splits.assign_roles([store], [tmp_path / "split.json"], 0.1, 0)
    assert "\n" not in str(error.value)


def test_the_versions_of_a_song_stay_on_one_side():
    songs = [f"{number:03}" for number in range(40)]
    paths = [path for n in songs for path in (f"{n}/{n}.mid", f"{n}/versions/{n}-v1.mid", f"{n}/versions/{n}-v2.mid")]
    roles, _ = splits.assign_roles(stores_of(paths, 2), [], 0.25, 7)
    for of_store in roles:
        assert_together([path[:3] for path in paths], of_store)
    assert Counter(roles[0] + roles[1]) == {"train": 180, "valid": 60}


def test_a_drawn_split_is_stratified_by_piece_and_seed():
    labels = np.random.default_rng(1).choice(4, 200, p=[0.1, 0.2, 0.3, 0.4])
    labels[:7] = -1
    first, again, other = (splits.labelled_roles(labelled(labels), None, seed)[0] for seed in (3, 3, 4))
    assert first == again != other
    assert set(first[:7]) == {"unused"}
    for label in range(4):
        counts = Counter(np.array(first)[labels == label].tolist())
        assert counts["test"] == counts["valid"] == max(1, round(0.1 * counts.total()))


def test_draws_are_those_of_earlier_versions():
    """For the same seed, pre-trainings and fine-tunings go on with the pieces that they began with."""
    groups = [f"{number}.mid" for number in range(12)]
    assert np.flatnonzero(np.array(splits.draw(groups, {"valid": 0.25}, 5)) == "valid").tolist() == [1, 9, 11]
    roles = splits.labelled_roles(labelled([0, 1, 1] * 4, groups), None, 5)[0]
    assert "".join(role[1] for role in roles) == "errrraarerrr"


def test_small_classes():
    roles = splits.labelled_roles(labelled([0, 0, 1, 1, 1]), None, 0)[0]
    assert Counter(roles[:2]) == {"train": 1, "test": 1}
    assert Counter(roles[2:]) == {"train": 1, "valid": 1, "test": 1}
    of_other_class = "aaabcdefghi"  # the one piece of y is in a group that is mostly of x
    for labels, groups, message in (
        ([0, 0, 1], list("abc"), "class 'y' has one piece"),
        ([0, 0, 1, 1], list("abcc"), "class 'y' has 2 pieces, all of one group"),
        ([0, 0, 1] + [0] * 8, list(of_other_class), "class 'y' has one piece"),
        ([0, 0, 1, 1], None, "so few leaves no labelled piece to validate on"),
    ):
        with pytest.raises(ValueError, match=message):
            splits.labelled_roles(labelled(labels, groups), None, 0)


def test_a_split_without_validation_takes_it_from_the_training_pieces_by_group(tmp_path):
    """In fine-tuning of each class, in pre-training of all."""
    groups = [f"game {number // 4}" for number in range(40)]
    paths = [f"{number // 4}/versions/{number}.mid" for number in range(40)]
    split = write_split(tmp_path, train=paths[:32], test=paths[32:])
    task = labelled([0, 0, 0, 0, 1, 1, 1, 1] * 5, groups, paths)
    (of_store,), of_pretraining = splits.assign_roles([task.store], [split], 0.2, 0)
    for roles, remarks in ((of_store, of_pretraining), splits.labelled_roles(task, split, 0)[::2]):
        assert remarks == [f"{split} has no validation part: 8 of its training pieces validate"]
        assert set(roles[32:]) == {"test"}
        assert Counter(roles[:32]) == {"train": 24, "valid": 8}
        assert_together(groups, roles)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("b/c.mid", "a/b/c.mid"),
        ("a\\b\\c.mid", "a/b/c.mid"),
        ("./b//c.mid", "a/b/c.mid"),
        ("/home/me/data/a/b/c.mid", "b/c.mid"),
        ("C:\\data\\a\\c.mid", "a/c.mid"),
        ("data/c", "c.midi"),
        ("a/b/Op. 10", "b/Op. 10.mid"),
        ("a/\u00c9tude.mid", "a/E\u0301tude.mid"),
        (" a/c.mid ", "a/c.mid"),
    ],
)
def test_names_match_however_they_are_written(name, path):
    assert splits.matches([path, "other.mid"], [name, "nothing.mid"]) == [name, None]


def test_the_longest_name_counts_and_an_ambiguous_one_does_not(tmp_path):
    lists = {"train": ["c.mid", "x/1/d.mid", "e"], "test": ["b/c.mid", "x/2/d.mid"], "valid": ["data/b/b/c.mid"]}
    paths = ["a/b/c.mid", "a/c.mid", "d.mid", "2/d.mid", "b/b/c.mid"]
    roles, absent = splits.roles_of(paths, [write_split(tmp_path, **lists)])
    assert roles == ["test", "train", "unused", "test", "valid"]
    assert absent == ["e", "x/1/d.mid"]


def test_what_the_pre_training_saw_is_found_whatever_folder_the_paths_begin_at(tmp_path):
    before = {"train": ["POP909/001/001.mid", "x.mid"], "valid": ["Bach/one.mid"], "test": []}
    now = {"train": ["Bach/one.mid"], "valid": ["a/x.mid"], "test": ["001/001.mid", "002/001.mid", "new.mid"]}
    (tmp_path / "pieces.json").write_text(json.dumps(before))
    seen = splits.seen_by(tmp_path / "best.pt", now)
    assert seen["train"] == {"train": [], "valid": ["a/x.mid"], "test": ["001/001.mid"]}
    assert seen["valid"]["train"] == ["Bach/one.mid"]
    lines = splits.doubts(["gone.mid"], seen, True)
    assert len(lines) == 4
    assert lines[0] == "names in the split or csv that match no usable file: 1 (gone.mid)"
    assert "trained on 1 pieces that now test, 001/001.mid" in lines[1]
    assert splits.seen_by(tmp_path / "elsewhere" / "best.pt", now) is None
    assert "not known" in splits.doubts([], None, True)[0]
    assert splits.doubts([], splits.seen_by(None, now), False) == []
