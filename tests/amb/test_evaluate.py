"""Figures beside scikit-learn's, segments to pieces beside a loop; the bootstrap where its answer is known."""

import numpy as np
import pytest
from sklearn import metrics

from amb import evaluate


@pytest.mark.parametrize("missing", [(), (2,), (0, 3)])
def test_figures_agree_with_scikit_learn(missing):
    rng = np.random.default_rng(len(missing))
    truth = rng.integers(0, 5, 500)
    predicted = np.where(rng.random(500) < 0.6, truth, rng.integers(0, 5, 500))
    if not missing:
        predicted[predicted == 1] = 0  # a class that is never the answer
    counted = ~np.isin(truth, missing) & ~np.isin(predicted, missing)
    figures = evaluate.scores(np.where(counted, truth, -1), predicted, "abcde")
    truth, predicted = truth[counted], predicted[counted]
    assert figures["confusion"] == metrics.confusion_matrix(truth, predicted, labels=range(5)).tolist()
    assert figures["accuracy"] == pytest.approx(metrics.accuracy_score(truth, predicted))
    assert figures["macro_f1"] == pytest.approx(metrics.f1_score(truth, predicted, average="macro", zero_division=0))
    expected = metrics.precision_recall_fscore_support(truth, predicted, labels=range(5), zero_division=0)
    for number, name in enumerate("abcde"):
        assert list(figures["classes"][name]) == ["precision", "recall", "f1", "count"]
        assert list(figures["classes"][name].values()) == pytest.approx([column[number] for column in expected])


def test_pieces_are_the_mean_of_their_segments_log_probabilities():
    rng, label_of = np.random.default_rng(4), {3: 0, 8: 1, 9: 1, 12: 2}
    piece = rng.permutation(np.repeat([3, 8, 9, 12], [1, 5, 2, 4]))
    truth = np.array([label_of[number] for number in piece])
    log_p = np.log(rng.dirichlet(np.ones(3), len(piece)))
    mean, labels = evaluate.by_piece(log_p, truth, piece)
    assert mean == pytest.approx(np.stack([log_p[piece == number].mean(axis=0) for number in label_of]))
    assert labels.tolist() == list(label_of.values())
    figures = evaluate.measure(log_p, truth, piece, "abc")
    assert (figures["pieces"]["count"], figures["segments"]["count"]) == (4, 12)
    assert figures["accuracy"] == figures["segments"]["accuracy"]
    assert evaluate.headline(figures)["pieces"] == {key: figures["pieces"][key] for key in ("accuracy", "macro_f1")}


def test_notes_are_counted_one_by_one_and_only_where_they_have_a_label():
    rng = np.random.default_rng(5)
    truth, log_p = rng.integers(-1, 3, (4, 20)), np.log(rng.dirichlet(np.ones(3), (4, 20)))
    figures, counted = evaluate.measure(log_p, truth, np.arange(4), "abc"), truth >= 0
    assert figures["notes"]["count"] == counted.sum()
    assert figures["accuracy"] == pytest.approx((log_p.argmax(-1) == truth)[counted].mean())
    assert figures["loss"] == pytest.approx(metrics.log_loss(truth[counted], np.exp(log_p[counted]), labels=range(3)))


def test_right_answers_by_piece(tmp_path):
    rng, piece, rows = np.random.default_rng(0), np.array([4, 4, 9, 9, 9]), (slice(0, 2), slice(2, 5))

    def hits(level, shape, truth):
        log_p = rng.normal(size=(*shape, 3)).astype(np.float16)
        np.savez(tmp_path / "test.npz", log_p=log_p, truth=truth, piece=piece)
        right = log_p.argmax(-1) == truth
        return log_p, right, evaluate.hits(tmp_path / "test.npz", level)

    log_p, right, answers = hits("sequence", (5,), np.array([1, 1, 0, 0, 0]))
    means = [log_p[row].astype(float).mean(0).argmax() for row in rows]
    assert [column.tolist() for column in answers["segments"]] == [[right[row].sum() for row in rows], [2, 3]]
    assert [column.tolist() for column in answers["pieces"]] == [[means[0] == 1, means[1] == 0], [1, 1]]
    truth = rng.integers(-1, 3, size=(5, 6))
    _, right, answers = hits("note", (5, 6), truth)
    counts = [[array[row].sum() for row in rows] for array in (right & (truth >= 0), truth >= 0)]
    assert [column.tolist() for column in answers["notes"]] == counts


def test_a_difference_in_every_piece_is_significant_and_none_is_not():
    counts = np.full(40, 10.0)
    base = np.random.default_rng(1).integers(3, 8, size=40).astype(float)
    better = evaluate.bootstrap(base[None] + 1, base[None], counts)
    assert better["mean"] == better["low"] == better["high"] == pytest.approx(0.1)
    assert better["p"] == 0
    same = evaluate.bootstrap(base[None], base[None], counts)
    assert (same["mean"], same["p"]) == (0, 1)


def test_the_interval_is_that_of_pieces():
    """Its width follows the deviation of a mean over 50 pieces, whatever their numbers of notes."""
    gaps = np.random.default_rng(2).normal(2, 10, size=50)
    answer = evaluate.bootstrap(50 + gaps[None], np.full((1, 50), 50.0), np.full(50, 100.0))
    assert answer["mean"] == pytest.approx(gaps.mean() / 100)
    assert (answer["high"] - answer["low"]) / 2 == pytest.approx(1.96 * gaps.std() / np.sqrt(50) / 100, rel=0.05)


def test_the_interval_is_also_that_of_seeds():
    """Every piece alike: all that varies is the seed, of the first training alone."""
    levels = np.array([40.0, 50.0, 63.0])
    answer = evaluate.bootstrap(np.repeat(levels[:, None], 50, axis=1), np.full((2, 50), 50.0), np.full(50, 100.0))
    assert answer["mean"] == pytest.approx(levels.mean() / 100 - 0.5)
    assert (answer["low"], answer["high"]) == pytest.approx((-0.1, 0.13))  # thrice the same seed: one draw in 27
    assert 0.2 < answer["p"] < 1


def test_a_report_names_what_beats_it(tmp_path, capsys):
    rng, results, piece = np.random.default_rng(6), [], np.repeat(np.arange(10), 4)
    truth = rng.integers(0, 2, 10)[piece]
    for seed in (0, 1):
        measured = evaluate.measure(np.log(rng.dirichlet(np.ones(2), 40)), truth, piece, "ab")
        results.append({"seed": seed, "best_epoch": 2 + seed, "epochs": 4, "valid": measured, "test": measured})
    perfect = evaluate.measure(np.log(np.eye(2) * 0.98 + 0.01)[truth], truth, piece, "ab")
    about = {"task": "composer", "level": "sequence", "pieces": {"test": 10}}
    about |= {"test": evaluate.over_seeds(results, "sequence"), "baselines": {"majority": perfect, "trees": None}}
    report = about | {"model": {"seed": results[1]["seed"]}, "trainings": results}
    accuracies = [result["test"]["segments"]["accuracy"] for result in results]
    expected = {"mean": np.mean(accuracies), "deviation": np.std(accuracies, ddof=1)}
    assert report["test"]["segments"]["accuracy"] == pytest.approx(expected)
    evaluate.print_report(tmp_path, report)
    printed = capsys.readouterr().out
    for part in (evaluate.percent(expected), "| *majority*", "kept: ", "(seed 1, epoch 3 of 4)",
                 "pip install scikit-learn", "NOT better than the majority baseline by pieces"):  # fmt: skip
        assert part in printed
