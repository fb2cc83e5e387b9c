"""Trainings survive what faults.py does to them: a few rounds of each fault. By hand: `python tests/faults.py`."""

import pytest

from tests import faults


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data and the uninterrupted runs of all faults."""
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize(
    ("name", "rounds"),
    [("kill_in_write", 1), ("full_disk", 1), ("corrupt", 1), ("store_cut", 1)]
    + [pytest.param(name, 12, marks=pytest.mark.slow) for name in faults.FAULTS],
)
def test_survives(name, rounds, folder):
    losses, _ = faults.repeat(faults.FAULTS[name], rounds, folder, seed=rounds)
    assert not losses
