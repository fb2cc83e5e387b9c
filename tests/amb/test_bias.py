"""Bias in numbers, on words whose bias is known."""

import numpy as np
import pytest

from amb import bias, inference, tokenizer

OCTUPLE = tokenizer.load("octuple")


def words(count, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, min(field.values, 9), size=count) for field in OCTUPLE.fields], axis=1)


def test_recovery_by_frequency():
    """Value 7 makes 60 %, value 3 makes 25 %, three others the rest: who knows 7 alone is right in six tenths."""
    true = words(1000)
    true[:, 3] = np.repeat([7, 3, 20, 30, 40], [600, 250, 50, 50, 50])
    recovered = true.copy()
    recovered[:, 3] = 7
    table = bias.recovery_by_frequency(true, recovered, OCTUPLE)
    assert table.shape == (8, 10)
    assert table[3] == pytest.approx([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    assert table[0] == pytest.approx(np.ones(10))
    recovered[:600, 3], recovered[600:850, 3] = 3, 3  # knows 3 alone, which lies across tenths 2 to 4
    assert bias.recovery_by_frequency(true, recovered, OCTUPLE)[3] == pytest.approx([0, 0.5, 1, 1, 0, 0, 0, 0, 0, 0])
    for row in bias.recovery_by_frequency(true, words(1000, 1), OCTUPLE):
        assert 0 <= row.min() <= row.max() <= 1


def test_the_mean_over_the_tenths_is_the_accuracy():
    true, recovered = words(777), words(777, 5)
    recovered[::3] = true[::3]
    table = bias.recovery_by_frequency(true, recovered, OCTUPLE)
    assert table.mean(1) == pytest.approx((true == recovered).mean(0))


def test_marginal_distance():
    def chances(answers):
        rows = [np.eye(field.values)[column] for field, column in zip(OCTUPLE.fields, answers.T, strict=True)]
        return np.concatenate(rows, axis=1)

    true = words(400)
    true[:, 3] = np.repeat([60, 62], [300, 100])
    shuffled = chances(true[np.random.default_rng(1).permutation(400)])
    assert bias.marginal_distance(true, shuffled, OCTUPLE) == pytest.approx(np.zeros(8))  # all wrong, and unbiased
    known = np.broadcast_to(chances(true).mean(0), shuffled.shape)  # each value as probable as it is frequent
    assert bias.marginal_distance(true, known, OCTUPLE) == pytest.approx(np.zeros(8))
    answers = true.copy()
    answers[:, 3] = 60
    assert bias.marginal_distance(true, chances(answers), OCTUPLE)[3] == pytest.approx(0.25)
    answers[:, 3] = 64
    assert bias.marginal_distance(true, chances(answers), OCTUPLE)[3] == pytest.approx(1)


def test_hopeless_notes():
    scores = np.random.default_rng(2).random(50)
    chosen = bias.hopeless(scores)
    assert chosen.sum() == 10
    assert scores[chosen].min() > scores[~chosen].max()


def test_a_model_is_looked_at_on_pieces(save_model, midi_folder, tmp_path):
    trained = inference.load(save_model(tmp_path / "model.pt"))
    files = sorted(map(str, midi_folder.rglob("*.mid")))[:2]
    view = bias.look(trained, files)
    assert view.true.shape == view.recovered.shape == (len(view.scores), 8)
    assert np.array_equal(view.true, np.concatenate([OCTUPLE.encode(file) for file in files]))
    ends = np.cumsum([field.values for field in OCTUPLE.fields])
    by_field = np.split(view.chances.astype(np.float32), ends[:-1], axis=1)
    assert all(part.sum(1) == pytest.approx(1, abs=5e-3) for part in by_field)
    likeliest = np.stack([part.max(1) for part in by_field], 1)
    given = np.stack([part[np.arange(len(part)), view.recovered[:, i]] for i, part in enumerate(by_field)], 1)
    assert given == pytest.approx(likeliest, abs=1e-3)  # the answer is a most probable value, in half precision
