"""Trainings survive what faults.py does to them: a round of the commonest faults, and many of each with -m slow."""

import numpy as np
import pytest

from tests.faults import FAULTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data and the uninterrupted runs of all faults."""
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize(
    ("name", "rounds"),
    [(name, 1) for name in ("kill_in_write", "full_disk", "corrupt", "store_cut")]
    + [pytest.param(name, 12, marks=pytest.mark.slow) for name in FAULTS],
)
def test_survives(name, rounds, folder):
    rng = np.random.default_rng(rounds)
    for number in range(rounds):
        FAULTS[name](number, folder, rng)
