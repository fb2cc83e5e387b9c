"""Splits: by piece, stratified, honest about what the pre-training saw."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from amb import data, splits


def test_roles_without_a_split_are_by_piece_and_seed(store):
    first, again, other = (splits.assign_roles([store], [], 0.25, seed)[0] for seed in (1, 1, 2))
    assert first == again != other
    assert first.count("valid") == 4
    assert set(first) == {"train", "valid"}


def test_roles_from_split_files(store, tmp_path):
    paths = [piece.path for piece in store.pieces]
    split = tmp_path / "split.json"
    file_name = paths[0].split("/")[1]
    split.write_text(json.dumps({"train": [file_name, paths[1]], "valid": [paths[2]], "test": [paths[3]], "labels": 3}))
    roles = splits.assign_roles([store], [split], 0.1, 0)[0]
    assert roles[:4] == ["train", "train", "valid", "test"]
    assert set(roles[4:]) == {"unused"}
    assert data.names([store], [roles], "valid") == [paths[2]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "not JSON"),
        ("[]", "not a split"),
        ('{"train": 3}', "not a split"),
        ('{"train": ["a.mid"], "valid": ["a.mid"]}', "gives a.mid to both"),
        ('{"train": ["a.mid"], "valid": ["b.mid"]}', "no piece is left to train on"),
    ],
)
def test_bad_splits_are_one_line(store, tmp_path, text, message):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        splits.assign_roles([store], [tmp_path / "split.json"], 0.1, 0)
    assert "\n" not in str(error.value)


def test_the_versions_of_a_song_stay_on_one_side():
    names = [f"{n:03}/{n:03}.mid" for n in range(40)] + [
        f"{n:03}/versions/{n:03}-v{v}.mid" for n in range(40) for v in (1, 2)
    ]
    stores = [SimpleNamespace(pieces=[SimpleNamespace(path=name) for name in names])] * 2
    roles = splits.assign_roles(stores, [], 0.25, 7)
    held_out = [{name[:3] for name, role in zip(names, of, strict=True) if role == "valid"} for of in roles]
    trained = [{name[:3] for name, role in zip(names, of, strict=True) if role == "train"} for of in roles]
    assert sum(map(len, held_out)) == 20
    assert not any(one & other for one, other in zip(held_out, trained, strict=True))


def roles_by_class(labels, roles):
    return {label: Counter(np.array(roles)[labels == label].tolist()) for label in np.unique(labels)}


def test_a_drawn_split_is_stratified_by_piece_and_seed():
    rng = np.random.default_rng(1)
    labels = rng.choice(4, 200, p=[0.1, 0.2, 0.3, 0.4])
    labels[:7] = -1
    own = [str(number) for number in range(200)]
    first, again, other = (splits.draw(labels, own, "abcd", seed) for seed in (3, 3, 4))
    assert first == again != other
    assert set(first[:7]) == {"unused"}
    for label, counts in roles_by_class(labels, first).items():
        if label >= 0:
            tenth = max(1, round(0.1 * counts.total()))
            assert (counts["test"], counts["valid"]) == (tenth, tenth)


def test_groups_stay_together():
    rng = np.random.default_rng(2)
    groups = [f"game {number}" for number in rng.integers(0, 40, 150)]
    labels = rng.integers(0, 3, 150)
    roles = splits.draw(labels, groups, "abc", 0)
    for group in set(groups):
        assert len({role for role, of in zip(roles, groups, strict=True) if of == group}) == 1
    assert {"train", "valid", "test"} == set(roles)


def test_small_classes():
    two = splits.draw(np.array([0, 0, 1, 1, 1]), list("abcde"), ["x", "y"], 0)
    assert Counter(two[:2]) == {"train": 1, "test": 1}
    assert Counter(two[2:]) == {"train": 1, "valid": 1, "test": 1}
    with pytest.raises(ValueError, match="class 'y' has one piece"):
        splits.draw(np.array([0, 0, 1]), list("abc"), ["x", "y"], 0)
    with pytest.raises(ValueError, match="class 'y' has 2 pieces, all of one group"):
        splits.draw(np.array([0, 0, 1, 1]), list("abcc"), ["x", "y"], 0)
    with pytest.raises(ValueError, match="class 'y' has one piece"):  # in a group that is mostly of the other class
        splits.draw(np.array([0, 0, 1] + [0] * 8), list("aaabcdefghi"), ["x", "y"], 0)


def test_a_draw_leaves_pieces_to_every_role():
    def roles(labels):
        store = SimpleNamespace(pieces=[SimpleNamespace(path=f"{n}.mid") for n in range(len(labels))])
        own = [piece.path for piece in store.pieces]
        labelled = SimpleNamespace(store=store, of_piece=np.array(labels), groups=own, classes=["x", "y"])
        return splits.labelled_roles(labelled, None, 0)[0]

    assert set(roles([0, 0, 0, 1, 1])) == set(splits.ROLES)
    for few in ([0, 0], [0, 0, 1, 1]):
        with pytest.raises(ValueError, match="so few leaves no labelled piece to validate on"):
            roles(few)


def test_what_the_pre_training_saw_is_found_whatever_folder_the_paths_begin_at(tmp_path):
    before = {"train": ["POP909/001/001.mid", "x.mid"], "valid": ["Bach/one.mid"], "test": []}
    now = {"train": ["Bach/one.mid"], "valid": ["a/x.mid"], "test": ["001/001.mid", "002/001.mid", "new.mid"]}
    (tmp_path / "pieces.json").write_text(json.dumps(before))
    seen = splits.seen_by(tmp_path / "best.pt", now)
    assert seen["train"] == {"train": [], "valid": ["a/x.mid"], "test": ["001/001.mid"]}
    assert seen["valid"]["train"] == ["Bach/one.mid"]
    lines = splits.doubts(["gone.mid"], seen, True)
    assert len(lines) == 4
    assert "gone.mid" in lines[0]
    assert "trained on 1 pieces that now test, 001/001.mid" in lines[1]
    assert splits.seen_by(tmp_path / "elsewhere" / "best.pt", now) is None
    assert "not known" in splits.doubts([], None, True)[0]
    assert splits.doubts([], splits.seen_by(None, now), False) == []
