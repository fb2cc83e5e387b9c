"""Paired bootstrap: exact where the answer is known, and pieces, not notes, are what is drawn."""

import numpy as np
import pytest

from amb import compare


def test_right_answers_by_piece(tmp_path):
    rng = np.random.default_rng(0)
    piece = np.array([4, 4, 9, 9, 9])
    log_p, truth = rng.normal(size=(5, 3)).astype(np.float16), np.array([1, 1, 0, 0, 0])
    np.savez(tmp_path / "test.npz", log_p=log_p, truth=truth, piece=piece, start=np.arange(5))
    found = compare.hits(tmp_path / "test.npz", "sequence")
    right = log_p.argmax(1) == truth
    assert found["segments"][0].tolist() == [right[:2].sum(), right[2:].sum()]
    assert found["segments"][1].tolist() == [2, 3]
    means = [log_p[:2].astype(float).mean(0), log_p[2:].astype(float).mean(0)]
    assert found["pieces"][0].tolist() == [means[0].argmax() == 1, means[1].argmax() == 0]
    assert found["pieces"][1].tolist() == [1, 1]

    log_p, truth = rng.normal(size=(5, 6, 3)).astype(np.float16), rng.integers(-1, 3, size=(5, 6))
    np.savez(tmp_path / "notes.npz", log_p=log_p, truth=truth, piece=piece, start=np.arange(5))
    right, counts = compare.hits(tmp_path / "notes.npz", "note")["notes"]
    for index, rows in enumerate((slice(0, 2), slice(2, 5))):
        assert counts[index] == (truth[rows] >= 0).sum()
        assert right[index] == (log_p[rows].argmax(-1) == truth[rows]).sum()


def test_a_difference_in_every_piece_is_significant_and_none_is_not():
    counts = np.full(40, 10.0)
    base = np.random.default_rng(1).integers(3, 8, size=40).astype(float)
    better = compare.bootstrap(base[None] + 1, base[None], counts)
    assert better.mean == better.low == better.high == pytest.approx(0.1)
    assert better.p == 0
    same = compare.bootstrap(base[None], base[None], counts)
    assert (same.mean, same.p) == (0, 1)


def test_the_interval_is_that_of_pieces():
    """As wide as the deviation of a mean over 50 pieces says, however many notes they have."""
    rng = np.random.default_rng(2)
    gaps = rng.normal(2, 10, size=50)
    found = compare.bootstrap(50 + gaps[None], np.full((1, 50), 50.0), np.full(50, 100.0))
    expected = 1.96 * gaps.std() / np.sqrt(50) / 100
    assert found.mean == pytest.approx(gaps.mean() / 100)
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.05)


def test_the_interval_is_also_that_of_seeds():
    """Every piece alike: all that varies is the seed, of the first training alone."""
    levels = np.array([40.0, 50.0, 63.0])
    found = compare.bootstrap(np.repeat(levels[:, None], 50, axis=1), np.full((2, 50), 50.0), np.full(50, 100.0))
    assert found.mean == pytest.approx(levels.mean() / 100 - 0.5)
    assert (found.low, found.high) == pytest.approx((-0.1, 0.13))  # thrice the same seed: one draw in 27
    assert 0.2 < found.p < 1


def test_no_difference_is_rarely_called_significant():
    rng = np.random.default_rng(3)
    called, found = 0, 0
    for seed in range(100):
        first, second = rng.binomial(20, 0.6, size=(2, 1, 30)).astype(float)
        called += compare.bootstrap(first, second, np.full(30, 20.0), seed).p < 0.05
        found += compare.bootstrap(first + rng.binomial(2, 0.9, size=30), second, np.full(30, 20.0), seed).p < 0.05
    assert called <= 12
    assert found >= 60  # a true difference of nine points, three of its deviations


def test_a_damaged_file_is_one_line_that_names_it(tmp_path):
    for content in (b"", b"PK\x03\x04 cut short"):
        (tmp_path / "test.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"test\.npz is damaged"):
            compare.hits(tmp_path / "test.npz", "note")
