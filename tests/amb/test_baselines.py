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


def test_trees_of_notes_learn_what_a_chord_shows(parts):
    """The label, whether a note is its chord's highest, is in no field: the trees need their notes' features."""
    truth, rng = {}, np.random.default_rng(0)
    for role, part in parts.items():
        truth[role] = np.full((len(part), part.notes), -1)
        for number, row in enumerate(truth[role]):
            words = part.read(number)
            start, _, pitch = part.encoding.timeline(words)
            highest = [pitch[start == moment].max() for moment in start]
            row[: len(words)] = np.where(rng.random(len(words)) < 0.1, -1, pitch == highest)
    result = baselines.measure(parts, truth, ("below", "top"), "note")
    assert result["trees"]["notes"]["count"] == (truth["test"] >= 0).sum()
    assert result["majority"]["accuracy"] < 0.8
    assert result["trees"]["accuracy"] > 0.97


def test_the_key_that_fits_best_tells_major_from_minor():
    major, minor, half_a_beat = (
        np.array([0, 2, 4, 5, 7, 9, 11, 12]),
        np.array([9, 11, 12, 14, 16, 17, 20, 21]),
        np.ones(8) / 2,
    )
    assert baselines.key_fit(62 + major, half_a_beat)[2] > 0.05
    assert baselines.key_fit(50 + minor, half_a_beat)[2] < -0.05
    assert not baselines.key_fit(np.arange(60, 72), np.ones(12)).any()


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
    assert np.allclose(np.sort(whole[16:28]), whole[1:13], atol=1e-6)  # pitch classes, as they are and in order
    assert np.allclose(features[:16], whole[:16], atol=1e-6)
    assert (notes != of_notes).any(axis=0).nonzero()[0].tolist() == [0]
