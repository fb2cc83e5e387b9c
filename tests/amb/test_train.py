"""train.py as its users run it: whole runs, interrupted runs, wrong use."""

import json
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest

import finetune
import train
from amb import checkpoint, tokenizer
from tests import scripts
from tests.scripts import ROOT, metrics

TINY = "--config tiny --epoch-size 24 --epochs 3 --valid-size 8 --log-every 1 --device cpu".split()  # noqa: SIM905


start, run = partial(scripts.start, ROOT / "train.py"), partial(scripts.run, ROOT / "train.py")


@pytest.fixture(scope="module")
def whole_run(store, tmp_path_factory) -> Path:
    """An uninterrupted adversarial run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    output = run(*TINY, "--data", store.path, "--out", folder)
    assert "most frequent" in output
    assert re.search(r"speed: [\d,]+ notes/s, \d+% of the \d+\.\d\d TFLOP/s .*; peak memory \d\.\d GiB", output)
    return folder


def test_a_run_leaves_what_it_promises(whole_run, store):
    content = {path.name for path in whole_run.iterdir()}
    files = {"run.json", "pieces.json", "metrics.jsonl", "last.pt", "best.pt", "book.npz", "curves.png", "masker.png"}
    assert content == files
    lines = metrics(whole_run)
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 19))
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    assert epochs[-1]["frozen"] > 0
    for part in ("train", "valid"):
        assert epochs[-1][part]["loss"] < epochs[0][part]["loss"]
    assert sum(epochs[-1]["field_weights"]) == pytest.approx(1)
    pieces = json.loads((whole_run / "pieces.json").read_text())
    assert sorted(pieces["train"] + pieces["valid"]) == sorted(piece.path for piece in store.pieces)
    assert not set(pieces["train"]) & set(pieces["valid"])
    best = checkpoint.load(whole_run / "best.pt")
    assert [field[0] for field in best["fields"]] == [field.name for field in tokenizer.load("octuple").fields]
    assert (whole_run / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("script", [train, finetune])
def test_the_help_ends_with_an_example(script, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        scripts.call(script, monkeypatch, "--help")
    *_, example = capsys.readouterr().out.splitlines()
    assert example.startswith(f"Example: python {script.__name__}.py --")


def test_an_interrupted_run_resumes_as_if_nothing_had_happened(whole_run, store, tmp_path, monkeypatch):
    """The other ways in which a run may end are in test_survival.py."""
    folder = tmp_path / "run"
    process = start(*TINY, "--data", store.path, "--out", folder, "--save-every", "4")
    scripts.wait_for_lines(folder, 10, process)  # in the second epoch
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 130, out + err
    assert f"--resume {folder}" in out
    assert "Traceback" not in err
    assert len(metrics(folder)) < len(metrics(whole_run))
    assert scripts.call(train, monkeypatch, "--resume", folder, "--log-every", 1, "--device", "cpu") == 0
    assert metrics(folder) == metrics(whole_run)
    resumed, whole = (checkpoint.load(f / "last.pt") for f in (folder, whole_run))
    assert not scripts.different(resumed | {"metrics_bytes": 0}, whole | {"metrics_bytes": 0})


def test_a_run_is_extended_and_ended_early_with_its_report(whole_run, store, tmp_path, monkeypatch, capsys):
    """--resume with other --epochs, and the data in another place; other data are refused."""
    folder, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(whole_run, folder)
    shutil.copytree(store.path, moved)
    for epochs in (4, 1):
        arguments = "--resume", folder, "--epochs", epochs, "--data", moved, "--device", "cpu"
        assert scripts.call(train, monkeypatch, *arguments) == 0
        assert "of 4 (best.pt)" in capsys.readouterr().out
        assert [line["epoch"] for line in metrics(folder) if line["kind"] == "epoch"] == [1, 2, 3, 4]


def test_a_folder_of_midi_cp_random_masking_and_the_profile(midi_folder, tmp_path):
    output = run(
        *TINY, "--epochs", "1", "--objective", "random", "--encoding", "cp", "--micro-batch", "3", "--recompute",
        "--data", midi_folder, "--cache", tmp_path / "cache", "--out", tmp_path / "run", "--profile",
    )  # fmt: skip
    (epoch,) = (line for line in metrics(tmp_path / "run") if line["kind"] == "epoch")
    assert epoch["frozen"] == epoch["train"]["masker"] == 0
    assert "Self CPU" in output
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())
    assert any("mm" in event.get("name", "") for event in trace["traceEvents"])


def test_the_readmes_command_runs_without_data(tmp_path, monkeypatch):
    """`python train.py --config small` in a folder with one such run, cut short: the demo corpus, a numbered run."""
    (tmp_path / "runs" / "small-adversarial").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    quick = "--config", "small", "--epochs", 1, "--epoch-size", 8, "--valid-size", 8
    assert scripts.call(train, monkeypatch, *quick) == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "cache", "small-adversarial", "small-adversarial-2",
    }  # fmt: skip


def test_a_loss_that_is_not_finite_stops_the_run(store, tmp_path, monkeypatch, capsys):
    arguments = *TINY, "--lr", "1e30", "--warmup", "0", "--data", store.path, "--out", tmp_path / "run"
    assert scripts.call(train, monkeypatch, *arguments) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is not finite" in line
    assert f"{tmp_path / 'run' / 'last.pt'} holds an earlier step" in line
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert all(weight.isfinite().all() for weight in state["model"].values())


def test_wrong_use_is_one_line(whole_run, store, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    shutil.copytree(store.path, broken)
    with open(broken / "words.bin", "r+b") as file:
        file.truncate(1000)
    content = json.loads((whole_run / "run.json").read_text())
    shape, changed = tmp_path / "shape", tmp_path / "changed"
    for folder, setting in ((shape, {"width": 32}), (changed, {"valid_share": 0.5})):
        shutil.copytree(whole_run, folder)
        (folder / "run.json").write_text(json.dumps(content | {"config": content["config"] | setting}))
    damaged = tmp_path / "damaged"
    shutil.copytree(whole_run, damaged)
    (damaged / "last.pt").write_bytes(b"nonsense")
    cases = {
        ("--data", tmp_path / "nowhere"): "does not exist",
        ("--data", tmp_path / "empty"): "empty",
        ("--data", broken): "words.bin",
        ("--data", store.path, "--encoding", "cp"): "--encoding octuple",
        ("--notes", "2000"): "raise --reach",
        ("--width", "100", "--heads", "3"): "does not split",
        ("--data", store.path, "--split", tmp_path / "no.json"): "no.json",
        ("--data", store.path, "--out", whole_run): "--resume",
        ("--resume", tmp_path / "empty"): "not a run folder",
        ("--resume", whole_run, "--lr", "3"): "drop --lr",
        ("--resume", whole_run, "--epochs", "0"): "epochs is 0",
        ("--seed", "3000000000"): "seed is 3000000000",
        ("--resume", shape): "another shape",
        ("--resume", changed): "the data of .*changed has changed since it began",
        ("--resume", damaged): "last.pt is damaged",
        ("--device", "cuda:7"): "no such device",
        ("--device", "cpu", "--cuda-graph"): "on a GPU",
    }
    monkeypatch.chdir(tmp_path)
    for arguments, message in cases.items():
        settings = [] if "--resume" in arguments else ["--config", "tiny", "--cache", tmp_path / "cache"]
        assert scripts.call(train, monkeypatch, *settings, *arguments) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("train.py: ")
        assert re.search(message, line), (arguments, line)
