"""finetune.py as its users run it: tasks learn, runs resume, wrong use is one line."""

import json
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import finetune
from amb import checkpoint, demo, evaluate, inference, tasks, tokenizer
from tests import scripts
from tests.scripts import ROOT, metrics

start, run = partial(scripts.start, ROOT / "finetune.py"), partial(scripts.run, ROOT / "finetune.py")
QUICK = ["--config", "tiny", "--epochs", "2", "--batch", "4", "--epoch-size", "24", "--device", "cpu"]
TWO_SEEDS = ["--task", "composer", *QUICK, "--mask", "0.12", "--seeds", "2", "--save-every", "3"]


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """48 demo pieces, twelve of each style."""
    return demo.write_corpus(tmp_path_factory.mktemp("finetune") / "demo", pieces=48)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole_run(corpus, cache):
    """Composer with masking, two seeds."""
    folder = cache / "runs" / "composer"
    output = run(*TWO_SEEDS, "--data", corpus, "--cache", cache, "--out", folder)
    assert "majority" in output
    assert "trees" in output
    return folder


def test_a_run_leaves_what_it_promises(whole_run, corpus):
    trainings = {"seed-0", "seed-1"}
    files = {"run.json", "split.json", "report.json", "model.pt", "curves.png", "confusion.png"}
    assert {path.name for path in whole_run.iterdir()} == files | trainings
    for name in trainings:
        content = {path.name for path in (whole_run / name).iterdir()}
        assert content == {"metrics.jsonl", "last.pt", "best.pt", "test.npz", "result.json"}
        assert [line["epoch"] for line in metrics(whole_run / name)] == [1, 2]
    found = report(whole_run)
    assert found["test"]["seeds"] == [0, 1]
    accuracies = [training["test"]["segments"]["accuracy"] for training in found["trainings"]]
    summary = found["test"]["segments"]["accuracy"]
    assert summary == pytest.approx({"mean": np.mean(accuracies), "deviation": np.std(accuracies, ddof=1)})
    kept, best = checkpoint.load(whole_run / "model.pt"), whole_run / f"seed-{found['model']['seed']}"
    assert kept["classes"] == found["classes"] == sorted(demo.STYLES)
    saved, result = np.load(best / "test.npz"), json.loads((best / "result.json").read_text())
    measured = evaluate.measure(saved["log_p"].astype(np.float32), saved["truth"], saved["piece"], kept["classes"])
    assert measured["loss"] == pytest.approx(result["test"]["loss"], abs=2e-3)
    split = json.loads((whole_run / "split.json").read_text())
    everything = [path for role in split.values() for path in role]
    assert sorted(everything) == sorted(path.relative_to(corpus).as_posix() for path in corpus.rglob("*.mid"))
    assert len(set(everything)) == len(everything)
    assert (whole_run / "confusion.png").read_bytes()[:4] == b"\x89PNG"


def test_an_interrupted_run_resumes_as_if_nothing_had_happened(whole_run, corpus, cache, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    process = start(*TWO_SEEDS, "--data", corpus, "--cache", cache, "--out", folder)
    scripts.wait_for_lines(folder / "seed-1", 1, process)  # in the second training
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 130, out + err
    assert f"--resume {folder}" in out
    assert "Traceback" not in err
    assert not (folder / "seed-1" / "result.json").exists()
    assert scripts.call(finetune, monkeypatch, "--resume", folder, "--device", "cpu", "--cache", cache) == 0
    assert report(folder) == report(whole_run)
    assert metrics(folder / "seed-1") == metrics(whole_run / "seed-1")
    assert not scripts.different(*(checkpoint.load(f / "seed-1" / "last.pt")["model"] for f in (folder, whole_run)))


def test_a_run_is_extended_with_its_data_elsewhere(whole_run, corpus, cache, tmp_path, monkeypatch):
    """--resume with more epochs and another --data: the trainings go on, the data must be the same."""
    folder, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(whole_run, folder)
    shutil.copytree(corpus, moved)
    arguments = "--resume", folder, "--epochs", 3, "--data", moved, "--device", "cpu", "--cache", cache
    assert scripts.call(finetune, monkeypatch, *arguments) == 0
    for name in ("seed-0", "seed-1"):
        assert metrics(folder / name)[:2] == metrics(whole_run / name)
        assert len(metrics(folder / name)) == 3
    assert [training["epochs"] for training in report(folder)["trainings"]] == [3, 3]


@pytest.mark.parametrize("task", ["melody", pytest.param("velocity", marks=pytest.mark.slow), "composer"])
def test_tasks_learn(task, corpus, cache, tmp_path, monkeypatch):
    """A hundred-odd steps of `tiny` from scratch are enough to leave the majority behind."""
    epochs = {"melody": 3, "velocity": 8, "composer": 3}[task]
    if task == "velocity":  # what there is to learn of it differs from piece to piece: it takes more pieces
        corpus = demo.write_corpus(tmp_path / "corpus", pieces=120)
    arguments = (
        "--task", task, "--config", "tiny", "--lr", "3e-3", "--epochs", epochs, "--epoch-size", "320",
        "--valid-size", "40", "--notes", "64", "--batch", "8", "--device", "cpu", "--data", corpus, "--cache", cache,
    )  # fmt: skip
    assert scripts.call(finetune, monkeypatch, *arguments, "--out", tmp_path / "run") == 0
    found = report(tmp_path / "run")
    ours, majority = found["trainings"][0]["test"], found["baselines"]["majority"]["accuracy"]
    for figures in (ours, found["baselines"]["trees"]):
        assert figures["accuracy"] > majority + 0.1
    assert found["absent"] == []


def test_of_equally_accurate_epochs_the_one_of_least_loss_is_kept(corpus, cache, tmp_path, monkeypatch):
    figures = iter([(0.5, 0.4), (0.6, 0.6), (0.6, 0.5), (0.6, 0.5), (0.1, 0.1), (0.1, 0.1)])  # the last two: at the end
    real = evaluate.measure

    def measure(*arguments):
        accuracy, loss = next(figures)
        return real(*arguments) | {"accuracy": accuracy, "loss": loss}

    monkeypatch.setattr(evaluate, "measure", measure)
    monkeypatch.setattr("amb.baselines.measure", lambda *_: {})
    arguments = ["--task", "composer", *QUICK, "--data", corpus, "--cache", cache, "--epochs", 4, "--epoch-size", 4]
    assert scripts.call(finetune, monkeypatch, *arguments, "--out", tmp_path / "run") == 0
    result = json.loads((tmp_path / "run" / "seed-0" / "result.json").read_text())
    assert (result["best_epoch"], result["epochs"]) == (3, 4)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--task composer", {"mask": 0.0, "notes": 1024, "batch": 2, "lr": 3e-4}),
        ("--task melody", {"mask": 0.0, "notes": 0, "batch": 8, "lr": 3e-4}),
        ("--task composer --notes 64 --mask 0.2", {"mask": 0.2, "notes": 64, "batch": 2}),
        ("--task melody --paper", {"mask": 0.12, "notes": 1024, "batch": 8, "lr": 2e-5}),
        ("--task emotion --paper --mask 0", {"mask": 0.0, "notes": 1024, "batch": 8}),
    ],
)
def test_settings_where_no_flag_says_otherwise(flags, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["finetune.py", *flags.split(), "--out", str(tmp_path / "run")])
    _, content = finetune.open_run(finetune.parse_args())
    assert {name: content["settings"][name] for name in expected} == expected


def test_own_labels_pre_training_and_probing(corpus, cache, save_model, tmp_path, monkeypatch, capsys):
    """--task sequence with a csv, from a pre-trained run, encoder frozen: its weights stay, the overlap is printed."""
    pretrained = tmp_path / "pretrained"
    pretrained.mkdir()
    weights = checkpoint.load(save_model(pretrained / "best.pt"))["model"]
    paths = sorted(path.relative_to(corpus).as_posix() for path in corpus.rglob("*.mid"))
    (pretrained / "pieces.json").write_text(json.dumps({"train": paths, "valid": [], "test": []}))
    labels = tmp_path / "labels.csv"
    rows = [f"{path},{'low' if i % 2 else 'high'}" for i, path in enumerate(paths)]
    labels.write_text("\n".join(["path,label", *rows]))
    arguments = ("--task", "sequence", "--labels", labels, "--data", corpus, "--cache", cache, "--init", pretrained,
                 "--device", "cpu", "--class-weights", "--lr", "1e-3", "--out", tmp_path / "run")  # fmt: skip
    assert scripts.call(finetune, monkeypatch, *arguments) == 0
    output = capsys.readouterr().out
    assert "note: --lr is not used" in output
    tested = report(tmp_path / "run")["pieces"]["test"]
    assert f"pre-training trained on {tested} pieces that now test" in output
    kept = checkpoint.load(tmp_path / "run" / "model.pt")
    assert (kept["classes"], kept["settings"]["mask"]) == (["high", "low"], 0)
    encoder = [name for name in weights if name.startswith("encoder.")]
    assert not scripts.different(*({name: model[name] for name in encoder} for model in (kept["model"], weights)))
    fitted = metrics(tmp_path / "run" / "seed-0")
    assert len(fitted) == len(finetune.STRENGTHS)
    assert fitted[-1]["train"]["accuracy"] > 0.6  # the labels are random
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    predicted = inference.load(tmp_path / "run", "cpu").predict([corpus / path for path in split["test"]])
    saved = np.load(tmp_path / "run" / "seed-0" / "test.npz")
    expected, _ = evaluate.by_piece(saved["log_p"].astype(np.float32), saved["truth"], saved["piece"])
    np.testing.assert_allclose([prediction.log_p for prediction in predicted], expected, atol=0.02)  # kept as fp16
    arguments = ("--task", "note", "--data", corpus, "--cache", cache, "--init", tmp_path / "run", "--epochs", 1,
                 "--reach", 96, "--epoch-size", 8, "--device", "cpu", "--out", tmp_path / "again")  # fmt: skip
    assert scripts.call(finetune, monkeypatch, *arguments) == 0
    assert "not known" in capsys.readouterr().out
    assert report(tmp_path / "again")["classes"] == ["BRIDGE", "MELODY", "PIANO"]
    further = checkpoint.load(tmp_path / "again" / "model.pt")
    assert (further["config"]["reach"], further["notes"]) == (96, 96)


def test_published_words_are_cut_as_the_published_segments_are(corpus, cache):
    paths = {"data": corpus, "labels": None, "split": None, "cache": cache}
    opened = finetune.Corpus.open(tasks.TASKS["composer"], "midibert", 640, paths, 0)
    pieces = [len(tokenizer.load("midibert").encode(path)) for path in corpus.rglob("*.mid")]
    expected = [count for words in pieces for count in (min(words, 640), words - 640) if count >= 320]
    assert sorted(np.concatenate([part.count for part in opened.parts.values()])) == sorted(expected)
    short = sum(words < 320 for words in pieces)
    assert f"pieces of fewer than 320 words, which are not used: {short}" in opened.remarks


def test_wrong_use_is_one_line(whole_run, corpus, cache, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["nothing.mid"], "valid": [], "test": []}))
    changed = tmp_path / "changed"
    shutil.copytree(whole_run, changed)
    content = json.loads((changed / "run.json").read_text())
    (changed / "run.json").write_text(json.dumps(content | {"fingerprint": "other"}))
    alone = tmp_path / "alone"
    for name in ("a/1.mid", "a/2.mid", "b/3.mid"):
        (alone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sorted(corpus.rglob("*.mid"))[int(name[2])], alone / name)
    some = ["--data", corpus, "--cache", cache, "--out", tmp_path / "new"]
    cases = {
        (): "say which --task",
        ("--task", "melody", "--labels", "x.csv", *some): "--labels goes with --task sequence",
        ("--task", "composer", "--data", tmp_path / "nowhere"): "does not exist",
        ("--task", "composer", "--data", split): "neither a folder nor",
        ("--task", "composer", "--data", next(cache.glob("*/store.json")).parent): "is a token store",
        ("--task", "composer", "--data", tmp_path / "empty"): "no usable MIDI file",
        ("--task", "composer", "--data", alone, "--cache", cache): "class 'b' has one piece",
        ("--task", "composer", "--split", split, *some): "none of its 1 names is that of a usable file",
        ("--task", "composer", "--split", tmp_path / "no.json", *some): "no.json cannot be read",
        ("--task", "composer", "--init", tmp_path / "no.pt", *some): "no.pt does not exist",
        ("--task", "composer", "--init", tmp_path / "empty", *some): "holds neither model.pt nor best.pt",
        ("--task", "composer", "--init", whole_run, "--config", "tiny", *some): "come with the checkpoint",
        ("--task", "composer", "--init", whole_run, "--reach", "32", *some): "--reach 32 is less than",
        ("--task", "composer", "--mask", "1.5", *some): "mask is 1.5",
        ("--task", "composer", "--data", corpus, "--out", whole_run): "holds a run",
        ("--resume", tmp_path / "empty"): "not a run folder",
        ("--resume", changed): "has changed since it began",
        ("--resume", whole_run, "--lr", "1"): "drop --lr",
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for arguments, message in cases.items():
        assert scripts.call(finetune, monkeypatch, *arguments) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("finetune.py: ")
        assert message in line, (arguments, line)
    assert not (tmp_path / "new").exists()
