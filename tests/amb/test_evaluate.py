"""Figures beside scikit-learn's, and segments to pieces beside a loop."""

import numpy as np
import pytest
from sklearn import metrics

from amb import evaluate


def random_labels(rng, count, classes, missing=()):
    truth = rng.integers(0, classes, count)
    predicted = np.where(rng.random(count) < 0.6, truth, rng.integers(0, classes, count))
    keep = ~np.isin(truth, missing) & ~np.isin(predicted, missing)
    return truth[keep], predicted[keep]


@pytest.mark.parametrize("missing", [(), (2,), (0, 3)])
def test_figures_agree_with_scikit_learn(missing):
    truth, predicted = random_labels(np.random.default_rng(len(missing)), 500, 5, missing)
    if missing == ():
        predicted[:] = np.where(predicted == 1, 0, predicted)  # a class that is never the answer
    names = list("abcde")
    matrix = evaluate.confusion(truth, predicted, 5)
    assert np.array_equal(matrix, metrics.confusion_matrix(truth, predicted, labels=range(5)))
    found = evaluate.scores(matrix, names)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, predicted))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(truth, predicted, average="macro", zero_division=0))
    theirs = metrics.precision_recall_fscore_support(truth, predicted, labels=range(5), zero_division=0)
    for number, name in enumerate(names):
        row = found["classes"][name]
        assert [row[key] for key in ("precision", "recall", "f1", "count")] == pytest.approx(
            [t[number] for t in theirs]
        )


def test_what_has_no_label_does_not_count():
    rng = np.random.default_rng(3)
    truth, predicted = rng.integers(-1, 3, 300), rng.integers(0, 3, 300)
    counted = truth >= 0
    assert np.array_equal(
        evaluate.confusion(truth, predicted, 3), evaluate.confusion(truth[counted], predicted[counted], 3)
    )
    log_p = np.log(rng.dirichlet(np.ones(3), 300))
    assert evaluate.loss(log_p, truth) == pytest.approx(
        metrics.log_loss(truth[counted], np.exp(log_p[counted]), labels=range(3))
    )


def test_pieces_are_the_mean_of_their_segments_log_probabilities():
    rng = np.random.default_rng(4)
    piece = rng.permutation(np.repeat([3, 8, 9, 12], [1, 5, 2, 4]))
    label = {3: 0, 8: 1, 9: 1, 12: 2}
    truth = np.array([label[number] for number in piece])
    log_p = np.log(rng.dirichlet(np.ones(3), len(piece)))
    mean, labels = evaluate.by_piece(log_p, truth, piece)
    for row, number in enumerate((3, 8, 9, 12)):
        assert mean[row] == pytest.approx(log_p[piece == number].mean(axis=0))
        assert labels[row] == label[number]
    found = evaluate.measure(log_p, truth, piece, "abc")
    assert found["pieces"]["count"] == 4
    assert found["segments"]["count"] == 12
    assert found["accuracy"] == found["segments"]["accuracy"]
    assert evaluate.headline(found)["pieces"] == {key: found["pieces"][key] for key in ("accuracy", "macro_f1")}


def test_notes_are_counted_one_by_one():
    rng = np.random.default_rng(5)
    truth = rng.integers(-1, 3, (4, 20))
    log_p = np.log(rng.dirichlet(np.ones(3), (4, 20)))
    found = evaluate.measure(log_p, truth, np.arange(4), "abc")
    assert found["notes"]["count"] == (truth >= 0).sum()
    hits = (log_p.argmax(-1) == truth)[truth >= 0]
    assert found["accuracy"] == pytest.approx(hits.mean())
