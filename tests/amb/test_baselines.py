"""The majority and the trees: on the same split, and features that see what they claim."""

import numpy as np
import pytest

from amb import baselines, data, tokenizer


@pytest.fixture(scope="module")
def parts(store):
    roles = ["test" if number % 5 == 0 else "train" for number in range(len(store.pieces))]  # of each mood one
    return {role: data.cut([store], [roles], role, 64) for role in ("train", "test")}


def test_the_majority_answers_the_training_sets_commonest_label():
    train, test = np.array([0, 1, 1, -1, -1, -1]), np.array([[0, 1, -1], [1, 1, 0]])
    result = baselines.majority(train, test, np.arange(2), "ab")
    assert result["accuracy"] == pytest.approx(3 / 5)
    assert result["notes"]["classes"]["a"]["recall"] == 0
    assert result["loss"] == pytest.approx(-(2 * np.log(1 / 3) + 3 * np.log(2 / 3)) / 5)


def test_figures_are_kept_for_the_same_words_and_labels_only(parts, tmp_path, monkeypatch):
    truth = {role: np.arange(len(part)) % 2 for role, part in parts.items()}
    result = baselines.measure(parts, truth, "ab", "sequence", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(baselines, "trees", None)
        assert baselines.measure(parts, truth, "ab", "sequence", tmp_path) == result
    others = [
        (parts, truth | {"test": 1 - truth["test"]}, "ab"),
        (parts, truth, "ac"),
        (parts | {"train": parts["test"]}, truth | {"train": truth["test"]}, "ab"),
    ]
    for changed in others:
        monkeypatch.setattr(baselines, "trees", lambda *_: "anew")
        assert baselines.measure(*changed, "sequence", tmp_path)["trees"] == "anew"
    assert len(list(tmp_path.iterdir())) == 4
    assert baselines.measure(*changed, "sequence", tmp_path / "none")["trees"] == "anew"  # cannot be written


def test_trees_of_notes_learn_what_a_chord_shows(parts, tmp_path):
    """The label, whether a note is its chord's highest, is in no field: the trees need their notes' features."""
    truth, rng = {}, np.random.default_rng(0)
    for role, part in parts.items():
        truth[role] = np.full((len(part), part.notes), -1)
        for number, row in enumerate(truth[role]):
            words = part.read(number)
            start, _, pitch = part.encoding.timeline(words)
            highest = [pitch[start == moment].max() for moment in start]
            row[: len(words)] = np.where(rng.random(len(words)) < 0.1, -1, pitch == highest)
    result = baselines.measure(parts, truth, ("below", "top"), "note", tmp_path)
    assert result["trees"]["notes"]["count"] == (truth["test"] >= 0).sum()
    assert result["majority"]["accuracy"] < 0.8
    assert result["trees"]["accuracy"] > 0.97


@pytest.mark.parametrize("name", ["octuple", "cp"])
def test_features_are_finite_and_do_not_transpose(name, midi_folder):
    """Features of notes do not, either, but for the pitch itself."""
    encoding = tokenizer.load(name)
    words = encoding.encode(next(midi_folder.rglob("*.mid")))
    up = data.transpose(words[None].astype(np.int64), encoding, 5, np.ones(1) - 1e-9)[0]
    for part in (words[:1], words[:2], words[::7], up):
        assert np.isfinite(features := baselines.features(part, encoding)).all()
        assert np.isfinite(notes := baselines.note_features(part, encoding)).all()
    whole, of_notes = baselines.features(words, encoding), baselines.note_features(words, encoding)
    assert features.shape == whole.shape
    assert np.allclose(np.sort(whole[13:25]), whole[1:13], atol=1e-6)  # pitch classes, as they are and in order
    assert np.allclose(features[:13], whole[:13], atol=1e-6)
    assert (notes != of_notes).any(axis=0).nonzero()[0].tolist() == [0]
