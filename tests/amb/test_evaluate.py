"""Figures beside scikit-learn's, segments to pieces beside a loop; the bootstrap where its answer is known."""

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


def test_right_answers_by_piece(tmp_path):
    rng = np.random.default_rng(0)
    piece = np.array([4, 4, 9, 9, 9])
    log_p, truth = rng.normal(size=(5, 3)).astype(np.float16), np.array([1, 1, 0, 0, 0])
    np.savez(tmp_path / "test.npz", log_p=log_p, truth=truth, piece=piece, start=np.arange(5))
    found = evaluate.hits(tmp_path / "test.npz", "sequence")
    right = log_p.argmax(1) == truth
    assert found["segments"][0].tolist() == [right[:2].sum(), right[2:].sum()]
    assert found["segments"][1].tolist() == [2, 3]
    means = [log_p[:2].astype(float).mean(0), log_p[2:].astype(float).mean(0)]
    assert found["pieces"][0].tolist() == [means[0].argmax() == 1, means[1].argmax() == 0]
    assert found["pieces"][1].tolist() == [1, 1]

    log_p, truth = rng.normal(size=(5, 6, 3)).astype(np.float16), rng.integers(-1, 3, size=(5, 6))
    np.savez(tmp_path / "notes.npz", log_p=log_p, truth=truth, piece=piece, start=np.arange(5))
    right, counts = evaluate.hits(tmp_path / "notes.npz", "note")["notes"]
    for index, rows in enumerate((slice(0, 2), slice(2, 5))):
        assert counts[index] == (truth[rows] >= 0).sum()
        assert right[index] == (log_p[rows].argmax(-1) == truth[rows]).sum()


def test_a_difference_in_every_piece_is_significant_and_none_is_not():
    counts = np.full(40, 10.0)
    base = np.random.default_rng(1).integers(3, 8, size=40).astype(float)
    better = evaluate.bootstrap(base[None] + 1, base[None], counts)
    assert better["mean"] == better["low"] == better["high"] == pytest.approx(0.1)
    assert better["p"] == 0
    same = evaluate.bootstrap(base[None], base[None], counts)
    assert (same["mean"], same["p"]) == (0, 1)


def test_the_interval_is_that_of_pieces():
    """As wide as the deviation of a mean over 50 pieces says, however many notes they have."""
    rng = np.random.default_rng(2)
    gaps = rng.normal(2, 10, size=50)
    found = evaluate.bootstrap(50 + gaps[None], np.full((1, 50), 50.0), np.full(50, 100.0))
    expected = 1.96 * gaps.std() / np.sqrt(50) / 100
    assert found["mean"] == pytest.approx(gaps.mean() / 100)
    assert (found["high"] - found["low"]) / 2 == pytest.approx(expected, rel=0.05)


def test_the_interval_is_also_that_of_seeds():
    """Every piece alike: all that varies is the seed, of the first training alone."""
    levels = np.array([40.0, 50.0, 63.0])
    found = evaluate.bootstrap(np.repeat(levels[:, None], 50, axis=1), np.full((2, 50), 50.0), np.full(50, 100.0))
    assert found["mean"] == pytest.approx(levels.mean() / 100 - 0.5)
    assert (found["low"], found["high"]) == pytest.approx((-0.1, 0.13))  # thrice the same seed: one draw in 27
    assert 0.2 < found["p"] < 1


def test_a_damaged_file_is_one_line_that_names_it(tmp_path):
    for content in (b"", b"PK\x03\x04 cut short"):
        (tmp_path / "test.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"test\.npz is damaged"):
            evaluate.hits(tmp_path / "test.npz", "note")


def test_a_report_summarises_its_seeds_and_names_what_beats_it(tmp_path, capsys):
    rng, results = np.random.default_rng(6), []
    truth, piece = rng.integers(0, 2, 40), np.repeat(np.arange(10), 4)
    truth = truth[piece]
    for seed in (0, 1):
        log_p = np.log(rng.dirichlet(np.ones(2), 40))
        measured = evaluate.measure(log_p, truth, piece, "ab")
        results.append({"seed": seed, "best_epoch": 2 + seed, "epochs": 4, "valid": measured, "test": measured})
    perfect = evaluate.measure(np.log(np.eye(2) * 0.98 + 0.01)[truth], truth, piece, "ab")
    about = {"task": "composer", "level": "sequence", "pieces": {"test": 10}}
    report = evaluate.summarise(about, results, results[1], {"majority": perfect, "trees": None})
    accuracies = [result["test"]["segments"]["accuracy"] for result in results]
    expected = {"mean": np.mean(accuracies), "deviation": np.std(accuracies, ddof=1)}
    assert report["test"]["segments"]["accuracy"] == pytest.approx(expected)
    assert evaluate.kept_training(report) is results[1]
    evaluate.print_report(tmp_path, report)
    out = capsys.readouterr().out
    assert evaluate.percent(expected) in out
    assert "| *majority*" in out
    assert "kept: " in out
    assert "(seed 1, epoch 3 of 4)" in out
    assert "pip install scikit-learn" in out
    assert "NOT better than the majority baseline by pieces" in out
