"""train.py as its users run it: whole runs, interrupted runs, wrong use."""

import json
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

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
    assert epochs[-1]["train"]["loss"] < epochs[0]["train"]["loss"]
    assert sum(epochs[-1]["field_weights"]) == pytest.approx(1)
    pieces = json.loads((whole_run / "pieces.json").read_text())
    assert sorted(pieces["train"] + pieces["valid"]) == sorted(piece.path for piece in store.pieces)
    assert not set(pieces["train"]) & set(pieces["valid"])
    best = checkpoint.load(whole_run / "best.pt")
    assert [field[0] for field in best["fields"]] == [field.name for field in tokenizer.load("octuple").fields]
    assert (whole_run / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_same_seed_repeats_a_run_and_another_does_not(whole_run, store, tmp_path):
    run(*TINY, "--data", store.path, "--out", tmp_path / "same")
    assert metrics(tmp_path / "same") == metrics(whole_run)
    run(*TINY, "--data", store.path, "--out", tmp_path / "other", "--seed", "1", "--epochs", "1")
    assert metrics(tmp_path / "other")[0] != metrics(whole_run)[0]


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize(
    "how", [signal.SIGINT, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (signal.SIGTERM, signal.SIGKILL))]
)
def test_an_interrupted_run_resumes_as_if_nothing_had_happened(whole_run, store, tmp_path, how):
    folder = tmp_path / "run"
    process = start(*TINY, "--data", store.path, "--out", folder, "--save-every", "4")
    deadline = time.monotonic() + 200
    while len(metrics(folder) if (folder / "metrics.jsonl").exists() else []) < 10:  # in the second epoch
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    out, err = process.communicate(timeout=200)
    if how == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130, out + err
        assert f"--resume {folder}" in out
        assert "Traceback" not in err
    assert len(metrics(folder)) < len(metrics(whole_run))
    run("--resume", folder, "--log-every", "1", "--device", "cpu")
    assert metrics(folder) == metrics(whole_run)
    ours, theirs = (checkpoint.load(f / "last.pt") for f in (folder, whole_run))
    for key in ("model", "optimizer", "book", "progress", "field_weights"):
        assert equal(ours[key], theirs[key]), key


def test_a_run_is_extended_and_ended_early_with_its_report(whole_run, store, tmp_path):
    """--resume with other --epochs, and the data in another place; other data are refused."""
    folder, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(whole_run, folder)
    shutil.copytree(store.path, moved)
    output = run("--resume", folder, "--epochs", "4", "--data", moved, "--device", "cpu")
    assert "of 4 (best.pt)" in output
    assert [line["epoch"] for line in metrics(folder) if line["kind"] == "epoch"] == [1, 2, 3, 4]
    assert "of 4 (best.pt)" in run("--resume", folder, "--epochs", "1", "--device", "cpu")


def test_what_saves_memory_changes_no_result(store, tmp_path, monkeypatch):
    found = []
    same = ["--dropout", "0", "--attention-dropout", "0", "--epochs", "1", "--dtype", "fp32", "--data", store.path]
    for name, extra in (("whole", []), ("parts", ["--micro-batch", "3", "--recompute"])):
        arguments = [*TINY, *same, *extra, "--out", tmp_path / name]
        assert scripts.call(train, monkeypatch, *arguments) == 0
        found.append([line["loss"] for line in metrics(tmp_path / name) if line["kind"] == "step"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_the_random_objective_is_one_flag(store, tmp_path):
    run(*TINY, "--epochs", "1", "--objective", "random", "--data", store.path, "--out", tmp_path / "run")
    (epoch,) = (line for line in metrics(tmp_path / "run") if line["kind"] == "epoch")
    assert epoch["frozen"] == 0
    assert epoch["train"]["masker"] == 0


def test_midi_folders_cp_and_the_profile(midi_folder, tmp_path):
    output = run(
        *TINY, "--epochs", "1", "--encoding", "cp", "--data", midi_folder, "--cache", tmp_path / "cache",
        "--out", tmp_path / "run", "--profile",
    )  # fmt: skip
    assert "Self CPU" in output
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())
    assert any("mm" in event.get("name", "") for event in trace["traceEvents"])


def test_the_readmes_command_runs_without_data(tmp_path):
    """`python train.py --config small` in an empty folder, cut short: the demo corpus, its cache, a numbered run."""
    run("--config", "small", "--epochs", "1", "--epoch-size", "8", "--valid-size", "8", cwd=tmp_path)
    run("--config", "small", "--epochs", "1", "--epoch-size", "8", "--valid-size", "8", cwd=tmp_path)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "cache",
        "small-adversarial",
        "small-adversarial-2",
    }


def test_a_loss_that_is_not_finite_stops_the_run(store, tmp_path):
    output = run(*TINY, "--lr", "1e30", "--warmup", "0", "--data", store.path, "--out", tmp_path / "run", status=2)
    line = output.strip().splitlines()[-1]
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
    shape = tmp_path / "shape"
    shutil.copytree(whole_run, shape)
    settings = json.loads((shape / "run.json").read_text())
    settings["config"]["width"] = 32
    (shape / "run.json").write_text(json.dumps(settings))
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
        ("--resume", shape): "another shape",
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
        assert message in line, (arguments, line)
    assert "unrecognized arguments" in run("--frobnicate", status=2)


def test_the_data_of_a_resumed_run_must_be_the_same(whole_run, store, tmp_path):
    changed = tmp_path / "run"
    shutil.copytree(whole_run, changed)
    settings = json.loads((changed / "run.json").read_text())
    settings["config"]["valid_share"] = 0.5
    (changed / "run.json").write_text(json.dumps(settings))
    assert "has changed since" in run("--resume", changed, status=2)


def test_validation_loss_falls(store, tmp_path):
    """About a hundred steps of `tiny` on 14 pieces: the recovery of two unseen ones gets better."""
    run("--config", "tiny", "--data", store.path, "--out", tmp_path / "run", "--epochs", "4", "--device", "cpu")
    losses = [line["valid"]["loss"] for line in metrics(tmp_path / "run") if line["kind"] == "epoch"]
    assert losses[-1] < 0.85 * losses[0], losses
