"""reproduce.py on demo pieces that lie as the public data sets do."""

import json
import re
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

import reproduce
from amb import demo
from reproduce import all_cells, find_splits
from tests import scripts


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    demo.write_corpus(folder / "Pianist8" / "midi", pieces=40)
    return folder


def read(folder: Path, *names: str) -> dict:
    return json.loads(folder.joinpath(*names).read_text())


@pytest.fixture
def run(datasets, tmp_path, monkeypatch, capsys):
    """reproduce.py in this process: what it printed. Its cells are processes of their own."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def run(*arguments, data=datasets, status=0) -> str:
        words = ["--data", data, "--out", tmp_path / "out", "--config", "tiny", *arguments]
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, words)])
        assert reproduce.main() == status
        return "".join(capsys.readouterr())

    return run


def test_a_cell_is_run_once_gives_the_table_and_a_failed_one_is_told(run, tmp_path):
    out, smoke = tmp_path / "out", ("--budget", "0.02")
    (out / "composer" / "none-unmasked-0" / "split.json").mkdir(parents=True)  # where a cell has to write a file
    said = run(*smoke, "--only", "composer/none-*masked-*", "composer/random-*", status=1)
    assert "composer/none-masked-0 done" in said
    assert "not done: composer/none-unmasked-0, composer/random-" in said
    assert "composer/random-masked-0 needs pretrain/random first" in said
    assert re.search(r"\| none, masked +\| +1 \| +\d+ \|( +[\d.]+ % \|){5}", said)
    assert "| *trees* " in said
    assert re.search(r"\| \*published\* +\|[ |]+ 78.6 % \|", said)
    table = read(out, "results.json")
    report = read(out, "composer", "none-masked-0", "report.json")
    arm, training = table["tasks"]["composer"]["arms"]["none, masked"], report["trainings"][0]
    assert arm["segments"]["accuracy"]["mean"] == training["test"]["segments"]["accuracy"]
    assert arm["valid"]["mean"] == training["valid"]["accuracy"]
    assert (out / "results.png").stat().st_size > 10_000
    drawn = read(out, "splits", "pianist8.json")
    assert len(drawn["test"]) == len(drawn["valid"]) == 4  # of each style one
    used = read(out, "composer", "none-masked-0", "split.json")
    assert sorted(used["train"]) == sorted(drawn["train"][::5])  # a smoke version
    assert " done, " not in run(*smoke, "--only", "composer/none-masked-*")
    assert read(out, "results.json")["seconds"] == table["seconds"]
    other = run("--budget", "0.04", "--only", "composer/none-*", status=2)
    assert "none-masked-0 was made with other settings" in other


@pytest.mark.slow
def test_an_interrupted_cell_goes_on(datasets, run, tmp_path):
    cell = ("--budget", "0.05", "--only", "composer/none-unmasked-0")
    folder = tmp_path / "out" / "composer" / "none-unmasked-0"
    command = scripts.ROOT / "reproduce.py", "--data", datasets, "--out", tmp_path / "out", "--config", "tiny", *cell
    process = scripts.start(*command)
    while not list(folder.glob("*/best.pt")):  # an epoch is over
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on" in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert not read(folder, "cell.json")["finished"]
    assert "composer/none-unmasked-0: goes on" in run(*cell)
    assert read(folder, "cell.json")["finished"]


@pytest.mark.slow
def test_all_of_it(run, tmp_path):
    """Pre-trainings, arms of two of them, two seeds, the bias, the pictures."""
    corpus = demo.write_corpus(tmp_path / "more", pieces=5, seed=1)
    for style in [path for path in corpus.iterdir() if path.is_dir()]:  # not the names of pieces of the data set
        style.rename(corpus / f"more-{style.name}")
    cells = ("--only", "pretrain/*", "composer/random-*", "composer/adversarial-linear-*")
    said, out = run("--budget", "0.01", "--seeds", "2", "--corpus", corpus, *cells), tmp_path / "out"
    assert "failed" not in said
    table = read(out, "results.json")
    arms, answers = (table["tasks"]["composer"][key] for key in ("arms", "differences"))
    assert [arm["seeds"] for arm in arms.values()] == [[0, 1]] * 4
    questions = ["the adversarial objective", "masking while fine-tuning", "training all layers"]
    assert [answer["question"] for answer in answers] == questions
    for answer in answers:
        means = [arms[answer[side]]["pieces"]["accuracy"]["mean"] for side in ("with", "without")]
        assert answer["pieces"]["mean"] == pytest.approx(means[0] - means[1])
        assert answer["pieces"]["low"] <= answer["pieces"]["mean"] <= answer["pieces"]["high"]
    assert set(table["bias"]["runs"]) == {"random", "unfrozen", "adversarial"}
    pieces = read(out, "pretrain", "adversarial", "pieces.json")
    fifth = read(out, "splits", "pianist8-fifth.json")
    assert sorted(pieces["train"]) == sorted([*fifth["train"], "more-barcarolle/Q1_barcarolle_003.mid"])
    for name in ("results", "pretraining", "bias"):
        assert (out / f"{name}.png").stat().st_size > 10_000
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


def test_wrong_use_is_one_line(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no folder" in run(data=tmp_path / "empty", status=2)
    assert "no cell matches nothing" in run("--only", "nothing", status=2)
