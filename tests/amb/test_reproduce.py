"""reproduce.py on demo pieces that lie as the public data sets do."""

import json
import re
import signal
import time
from argparse import Namespace
from pathlib import Path

import pytest

from amb import demo
from reproduce import all_cells, find_splits
from tests import scripts
from tests.scripts import ROOT


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    demo.write_corpus(folder / "Pianist8" / "midi", pieces=40)
    return folder


def read(folder: Path, *names: str) -> dict:
    return json.loads(folder.joinpath(*names).read_text())


def command(datasets, out, *arguments) -> tuple:
    return ROOT / "reproduce.py", "--data", datasets, "--out", out, "--config", "tiny", *arguments


def reproduce(datasets, out, *arguments, status=0) -> str:
    return scripts.run(*command(datasets, out, *arguments), status=status)


def test_a_cell_is_run_once_gives_the_table_and_a_failed_one_is_told(datasets, tmp_path):
    cell = ("--budget", "0.02", "--only", "composer/none-masked-*", "composer/random-*")
    said = reproduce(datasets, tmp_path, *cell, status=1)
    assert "composer/none-masked-0 done" in said
    assert "composer/random-masked-0 needs pretrain/random first" in said
    assert re.search(r"\| none, masked +\| +1 \| +\d+ \|( +[\d.]+ % \|){5}", said)
    assert "| *trees* " in said
    assert re.search(r"\| \*published\* +\|[ |]+ 78.6 % \|", said)
    table = read(tmp_path, "results.json")
    report = read(tmp_path, "composer", "none-masked-0", "report.json")
    arm, training = table["tasks"]["composer"]["arms"]["none, masked"], report["trainings"][0]
    assert arm["segments"]["accuracy"]["mean"] == training["test"]["segments"]["accuracy"]
    assert arm["valid"]["mean"] == training["valid"]["accuracy"]
    assert arm["pieces"]["confusion"] == training["test"]["pieces"]["confusion"]
    assert (tmp_path / "results.png").stat().st_size > 10_000
    drawn = read(tmp_path, "splits", "pianist8.json")
    assert len(drawn["test"]) == len(drawn["valid"]) == 4  # of each style one
    used = read(tmp_path, "composer", "none-masked-0", "split.json")
    assert sorted(used["train"]) == sorted(drawn["train"][::5])  # a smoke version
    assert " done, " not in reproduce(datasets, tmp_path, *cell, status=1)
    assert read(tmp_path, "results.json")["seconds"] == table["seconds"]
    other = reproduce(datasets, tmp_path, "--budget", "0.04", "--only", "composer/none-*", status=2)
    assert "none-masked-0 was made with other settings" in other
    (tmp_path / "composer" / "none-unmasked-0" / "split.json").mkdir(parents=True)  # where a cell has to write a file
    failed = reproduce(datasets, tmp_path, "--budget", "0.02", "--only", "composer/none-un*", status=1)
    assert "not done: composer/none-unmasked-0" in failed


@pytest.mark.slow
def test_an_interrupted_cell_goes_on(datasets, tmp_path):
    cell = ("--budget", "0.05", "--only", "composer/none-unmasked-0")
    folder = tmp_path / "composer" / "none-unmasked-0"
    process = scripts.start(*command(datasets, tmp_path, *cell))
    while not list(folder.glob("*/best.pt")):  # an epoch is over
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on" in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert not read(folder, "cell.json")["finished"]
    assert "composer/none-unmasked-0: goes on" in reproduce(datasets, tmp_path, *cell)
    assert read(folder, "cell.json")["finished"]


@pytest.mark.slow
def test_all_of_it(datasets, tmp_path):
    """Pre-trainings, arms of two of them, two seeds, the bias, the pictures."""
    corpus = demo.write_corpus(tmp_path / "more", pieces=5, seed=1)
    cells = ("--only", "pretrain/*", "composer/random-*", "composer/adversarial-linear-*")
    said = reproduce(datasets, tmp_path, "--budget", "0.01", "--seeds", "2", "--corpus", corpus, *cells)
    assert "failed" not in said
    table = read(tmp_path, "results.json")
    arms, answers = (table["tasks"]["composer"][key] for key in ("arms", "differences"))
    assert [arm["seeds"] for arm in arms.values()] == [[0, 1]] * 4
    questions = ["the adversarial objective", "masking while fine-tuning", "training all layers"]
    assert [answer["question"] for answer in answers] == questions
    for answer in answers:
        means = [arms[answer[side]]["pieces"]["accuracy"]["mean"] for side in ("with", "without")]
        assert answer["pieces"]["mean"] == pytest.approx(means[0] - means[1])
        assert answer["pieces"]["low"] <= answer["pieces"]["mean"] <= answer["pieces"]["high"]
    assert set(table["bias"]["runs"]) == {"random", "unfrozen", "adversarial"}
    pieces = read(tmp_path, "pretrain", "adversarial", "pieces.json")
    fifth = read(tmp_path, "splits", "pianist8-fifth.json")
    assert sorted(pieces["train"]) == sorted([*fifth["train"], "barcarolle/Q1_barcarolle_003.mid"])  # a fifth of five
    for name in ("results", "pretraining", "bias"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert re.search(r"\| adversarial, linear +\| +2 \|", said)


def test_pre_trainings_of_another_seed_or_corpus_are_other_cells(tmp_path, midi_folder):
    (tmp_path / "pianist8.json").write_text("{}")
    flags = dict(data=None, splits=tmp_path, out=tmp_path, budget=1.0, config="tiny", seeds=1)

    def cells(seed: int = 0, corpus: tuple[Path, ...] = ()) -> dict:
        args, datasets = Namespace(**flags, pretraining_seed=seed, corpus=corpus), {"pianist8": tmp_path}
        return {cell.name: cell.fingerprint() for cell in all_cells(args, datasets, find_splits(args, datasets))}

    first = cells()
    assert first == cells()
    for other in (cells(seed=1), cells(corpus=(midi_folder,))):
        same = {name for name in first if first[name] == other[name]}
        assert same == {f"composer/none-{training}-0" for training in ("masked", "unmasked", "linear")}
    names = read(tmp_path, "splits", "corpus-midi.json")["train"]
    assert len(names) == 16
    assert names[0].startswith("midi/barcarolle/Q")


def test_wrong_use_is_one_line(datasets, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no folder" in reproduce(tmp_path / "empty", tmp_path / "out", status=2)
    assert "no cell matches nothing" in reproduce(datasets, tmp_path / "out", "--only", "nothing", status=2)
