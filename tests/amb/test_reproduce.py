"""reproduce.py on demo pieces that lie as the public data sets do."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from amb import demo

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    demo.write_corpus(folder / "Pianist8" / "midi", pieces=40)
    return folder


def reproduce(datasets, out, *arguments, status=0) -> str:
    command = [sys.executable, ROOT / "reproduce.py", "--data", datasets, "--out", out, "--config", "tiny", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_cell_is_run_once_and_gives_the_table(datasets, tmp_path):
    cell = ("--budget", "0.02", "--only", "composer/none-masked-*", "composer/random-*")
    said = reproduce(datasets, tmp_path, *cell)
    assert "composer/none-masked-0 done" in said
    assert "composer/random-masked-0 waits for" in said
    assert re.search(r"\| none, masked \| 1 \| \d+ \| [\d.]+ % \| [\d.]+ % \| [\d.]+ % \| [\d.]+ % \|", said)
    assert "| *trees* |" in said
    assert "| *published* | | | 78.6 % |" in said
    table = json.loads((tmp_path / "results.json").read_text())
    report = json.loads((tmp_path / "composer" / "none-masked-0" / "report.json").read_text())
    arm = table["tasks"]["composer"]["arms"]["none, masked"]
    assert arm["segments"]["accuracy"]["mean"] == report["trainings"][0]["test"]["segments"]["accuracy"]
    assert (tmp_path / "results.png").stat().st_size > 10_000
    drawn = json.loads((tmp_path / "splits" / "pianist8.json").read_text())
    assert len(drawn["test"]) == len(drawn["valid"]) == 8  # of each style one
    seconds = table["seconds"]
    assert "done" not in reproduce(datasets, tmp_path, *cell)
    assert json.loads((tmp_path / "seconds.json").read_text()) == seconds


@pytest.mark.slow
def test_all_of_it(datasets, tmp_path):
    """Pre-trainings, every arm and seed, the bias, the pictures; then the table alone."""
    said = reproduce(datasets, tmp_path, "--budget", "0.01", "--seeds", "2", "--jobs", "2")
    assert "failed" not in said
    table = json.loads((tmp_path / "results.json").read_text())
    assert len(table["tasks"]["composer"]["arms"]) == 9
    for name, arm in table["tasks"]["composer"]["arms"].items():
        assert arm["seeds"] == [0, 1]
        assert ("difference" in arm["pieces"]) == (name != "adversarial, masked")
    assert set(table["bias"]["runs"]) == {"random", "unfrozen", "adversarial"}
    pieces = json.loads((tmp_path / "pretrain" / "adversarial" / "pieces.json").read_text())
    drawn = json.loads((tmp_path / "splits" / "pianist8.json").read_text())
    assert sorted(pieces["train"]) == sorted(drawn["train"])
    for name in ("results", "pretraining", "bias"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    again = reproduce(datasets, tmp_path, "--table")
    assert "| adversarial, untransposed | 2 |" in again


def test_wrong_use_is_one_line(datasets, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no folder" in reproduce(tmp_path / "empty", tmp_path / "out", status=2)
    assert "no cell matches nothing" in reproduce(datasets, tmp_path / "out", "--only", "nothing", status=2)
