"""`amb` as its users run it: what it prints, what it writes, what it says of mistakes."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import mido
import numpy as np
import pytest
import torch

import amb
from amb import __main__ as cli
from amb import checkpoint, tasks, tokenizer
from amb.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory, save_model) -> dict[str, str]:
    """Checkpoints of tiny models by task; "pretrain" is a run folder."""
    base = tmp_path_factory.mktemp("models")
    (base / "pretrain").mkdir()
    save_model(base / "pretrain" / "best.pt")
    tasks = {task: str(save_model(base / f"{task}.pt", task)) for task in ("melody", "velocity", "composer")}
    return tasks | {"pretrain": str(base / "pretrain")}


@pytest.fixture(scope="module")
def folder(midi_folder, tmp_path_factory) -> Path:
    """Three demo pieces and two files that cannot be used."""
    folder = tmp_path_factory.mktemp("files")
    for number, path in enumerate(sorted(midi_folder.rglob("*.mid"))[:3]):
        shutil.copy(path, folder / f"{number}.mid")
    (folder / "1b.mid").write_bytes(b"MThd")
    (folder / "bad\nname.mid").write_bytes(b"")
    return folder


@pytest.fixture
def song(folder, tmp_path) -> Path:
    """A demo piece with drums, and with a late note and one that never ends, which have no words."""
    midi = mido.MidiFile(folder / "0.mid")
    late = 480 * 4096 * midi.ticks_per_beat // 480 + 10
    drums = mido.MidiTrack([mido.Message("note_on", note=33, velocity=3, time=7)])
    for _ in range(9):
        drums.append(mido.Message("note_on", channel=9, note=38, velocity=99, time=200))
        drums.append(mido.Message("note_off", channel=9, note=38, time=50))
    far = mido.MidiTrack(
        [mido.Message("note_on", note=50, velocity=9, time=late), mido.Message("note_off", note=50, time=9)]
    )
    midi.tracks += [drums, far]
    midi.type = 1
    midi.save(tmp_path / "song.mid")
    return tmp_path / "song.mid"


def run(capsys, *arguments, status=0) -> tuple[list[str], list[str]]:
    assert main([str(argument) for argument in arguments]) == status
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return out.splitlines(), err.splitlines()


def bag(notes, rows) -> Counter:
    columns = (notes.start, notes.end, notes.pitch, notes.velocity, notes.channel)
    return Counter(zip(*(column[rows].tolist() for column in columns), strict=True))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_predict_prints_a_table_in_the_files_order(models, folder, capsys):
    out, err = run(capsys, "predict", models["composer"], folder)
    assert cells(out[0]) == ["file", "class", "Bach", "Satie", "Weill"]
    assert [cells(line)[0] for line in out[2:]] == [f"{folder}/{n}.mid" for n in range(3)]
    for line in out[2:]:
        assert sum(float(cell[:-1]) for cell in cells(line)[2:]) == pytest.approx(100, abs=0.2)
    assert sum(line.startswith("skipped ") for line in err) == 2
    assert any("bad\\nname.mid" in line for line in err)
    assert err[-1].startswith("predicted 3 pieces")
    assert err[-1].endswith("2 skipped")


def test_predict_as_json_is_what_python_gives(models, folder, capsys):
    found = [p for p in amb.load(models["composer"], "cpu").predict(folder) if not p.error]
    out, _ = run(capsys, "predict", models["composer"], folder, "--json", "--segments", "--device", "cpu")
    for line, prediction in zip(map(json.loads, out), found, strict=True):
        assert (line["file"], line["class"]) == (prediction.file, prediction.label)
        assert list(line["probabilities"].values()) == pytest.approx(prediction.probabilities, abs=1e-5)
        assert len(line["segments"]) == len(prediction.segments) > 1
        assert sum(part["notes"] for part in line["segments"]) == line["notes"] == prediction.notes
    out, _ = run(capsys, "predict", models["melody"], folder, "--json")
    for line in map(json.loads, out):
        assert list(line["shares"]) == ["MELODY", "BRIDGE", "PIANO"]
        assert sum(line["shares"].values()) == pytest.approx(1, abs=1e-5)
    out, _ = run(capsys, "predict", models["melody"], folder)
    assert cells(out[0]) == ["file", "notes", "MELODY", "BRIDGE", "PIANO"]


def test_melody_writes_the_notes_that_are_predicted(models, song, tmp_path, capsys):
    model = amb.load(models["melody"], "cpu")
    (found,) = model.predict(song)
    source = tokenizer.read_midi(song).notes
    expected = np.where((found.labels < 0) | (source.channel == 9), 2, found.labels)
    assert np.unique(expected).tolist() == [0, 1, 2]
    assert (found.labels < 0).sum() == 1
    assert (found.labels != expected).sum() > 1
    out, _ = run(capsys, "melody", models["melody"], song, "--out", tmp_path / "melody.mid")
    assert "9 notes (percussion)" in "".join(out)
    assert "1 notes (starts at position" in "".join(out)
    melody = tokenizer.read_midi(tmp_path / "melody.mid")
    assert bag(melody.notes, slice(None)) == bag(source, expected == 0)
    assert set(melody.notes.name) == {"MELODY"}
    assert melody.ticks_per_beat == tokenizer.read_midi(song).ticks_per_beat
    assert melody.tempos == tokenizer.read_midi(song).tempos
    assert any("--bridge takes it too" in line for line in out) == ((expected == 1).sum() > (expected == 0).sum())
    out, _ = run(capsys, "melody", models["melody"], song, "--out", tmp_path / "lead.mid", "--bridge")
    assert bag(tokenizer.read_midi(tmp_path / "lead.mid").notes, slice(None)) == bag(source, expected <= 1)
    assert not any("--bridge" in line for line in out)
    run(capsys, "melody", models["melody"], song, "--out", tmp_path / "split.mid", "--split")
    assert tokenizer.read_midi(tmp_path / "split.mid").unclosed == 1
    assert melody.unclosed == 0
    split = tokenizer.read_midi(tmp_path / "split.mid").notes
    for number, name in enumerate(tasks.MELODY_TRACKS):
        assert bag(split, split.name == name) == bag(source, expected == number)


@pytest.mark.parametrize("bins", [True, False])
def test_velocity_writes_predicted_velocities(bins, models, song, tmp_path, capsys):
    (found,) = amb.load(models["velocity"], "cpu").predict(song)
    centres, seen = np.array([16, 40, 56, 72, 88, 112]), found.labels >= 0
    expected = tokenizer.read_midi(song).notes.velocity.copy()
    predicted = centres[found.labels] if bins else np.rint(np.exp(np.nan_to_num(found.log_p)) @ centres)
    expected[seen] = predicted[seen]
    out, _ = run(capsys, "velocity", models["velocity"], song, "--out", tmp_path / "v.mid", *["--bins"] * bins)
    assert "left as they were: 1 notes" in "".join(out)
    source, notes = tokenizer.read_midi(song).notes, tokenizer.read_midi(tmp_path / "v.mid").notes
    assert notes.velocity.tolist() == expected.tolist()
    assert (notes.start == source.start).all()
    assert len(set(expected.tolist())) > 2


def test_embed_writes_what_numpy_reads_without_pickle(models, folder, tmp_path, capsys):
    out, err = run(capsys, "embed", models["pretrain"], folder, "--out", tmp_path / "x.npz", "--notes", "--layer", "1")
    assert "embedded 3 pieces" in err[-1]
    assert "pieces/s" in err[-1]
    found = amb.load(models["pretrain"], "cpu").embed(folder, layer=1, notes=True)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        assert arrays["names"].tolist() == found.names == [f"{folder}/{n}.mid" for n in range(3)]
        assert (arrays["vectors"] == found.vectors).all()
        assert (arrays["note_vectors"] == found.notes.vectors).all()
        assert (arrays["counts"] == np.bincount(arrays["note_piece"])).all()
        for name in ("seconds", "start", "pitch", "track"):
            assert (arrays[f"note_{name}"] == getattr(found.notes, name)).all()
    assert os.listdir(tmp_path) == ["x.npz"]


def test_vectors_go_straight_into_scikit_learn(models, folder, tmp_path, capsys):
    linear = pytest.importorskip("sklearn.linear_model")
    run(capsys, "embed", models["composer"], folder, "--out", tmp_path / "x.npz")
    arrays = np.load(tmp_path / "x.npz")
    fitted = linear.LogisticRegression().fit(arrays["vectors"], [0, 1, 0])
    assert fitted.predict(arrays["vectors"]).shape == (3,)


def test_info_says_what_a_file_is(models, capsys):
    out, _ = run(capsys, "info", models["composer"])
    assert "composer" in "\n".join(out)
    out, _ = run(capsys, "info", models["pretrain"])
    assert "octuple" in "\n".join(out)


def test_published_weights_and_back(models, tmp_path, capsys):
    run(capsys, "convert", models["pretrain"], "--to", "published", "--out", tmp_path / "p.pth")
    run(capsys, "convert", tmp_path / "p.pth", "--out", tmp_path / "again.pt")
    before, after = amb.load(models["pretrain"], "cpu"), amb.load(tmp_path / "again.pt", "cpu")
    weights = after.encoder.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in before.encoder.state_dict().items())


@pytest.mark.parametrize("kind", ["pretrain", "melody"])
def test_half_precision_is_the_same_model(kind, models, folder, tmp_path, capsys):
    before = amb.load(models[kind], "cpu")
    out, _ = run(capsys, "convert", models[kind], "--to", "half", "--out", tmp_path / "half.pt")
    assert str(tmp_path / "half.pt") in out[0]
    content = checkpoint.load(tmp_path / "half.pt")
    assert {value.dtype for value in content["model"].values()} == {torch.float16}
    after = amb.load(tmp_path / "half.pt", "cpu")
    for name, value in before.encoder.state_dict().items():
        torch.testing.assert_close(after.encoder.state_dict()[name], value.half().float(), rtol=0, atol=0)
    piece = before.encode(folder / "0.mid")
    if kind == "melody":
        shares = [model.predict_pieces([piece])[0].probabilities for model in (before, after)]
        assert np.abs(shares[0] - shares[1]).max() < 1e-2


def test_mistakes_get_one_line_and_status_2(models, folder, song, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save({"format": checkpoint.FORMAT, "run": subprocess.run}, tmp_path / "hostile.pt")
    checkpoint.save(tmp_path / "large.pt", {"model": {"weight": torch.tensor([1e5])}})
    out = tmp_path / "out.mid"
    mistakes = [
        (("predict", tmp_path / "no.pt", folder), "no.pt cannot be read"),
        (("predict", tmp_path / "junk.pt", folder), "junk.pt"),
        (("predict", tmp_path / "hostile.pt", folder), "not loaded"),
        (("predict", tmp_path / "taken", folder), "finished run"),
        (("predict", models["pretrain"], folder), "needs a fine-tuned one"),
        (("predict", models["composer"], folder, "--device", "cuda:99"), "no such device"),
        (("predict", models["melody"], folder, "--segments"), "--segments"),
        (("predict", models["composer"], tmp_path / "taken"), "no usable MIDI file"),
        (("melody", models["composer"], song, "--out", out), "--task melody"),
        (("melody", models["pretrain"], song, "--out", out), "--task melody"),
        (("velocity", models["melody"], song, "--out", out), "--task velocity"),
        (("melody", models["melody"], folder / "1b.mid", "--out", out), "1b.mid: damaged"),
        (("melody", models["melody"], song, "--out", song), "the file to be read"),
        (("melody", models["melody"], song, "--out", tmp_path / "taken"), "is a folder"),
        (("embed", models["pretrain"], folder, "--out", tmp_path / "no" / "x.npz"), "there is no folder"),
        (("embed", models["pretrain"], folder, "--out", out, "--layer", "9"), "no layer 9"),
        (("embed", models["pretrain"], folder / "1b.mid", "--out", out), "no usable MIDI file"),
        (("inspect", models["composer"], song), "needs a pre-trained model"),
        (("inspect", models["pretrain"], folder / "1b.mid"), "no usable MIDI file"),
        (("convert", tmp_path / "no.pth", "--out", out), "no.pth"),
        (("convert", tmp_path / "hostile.pt", "--out", out), "not loaded"),
        (("convert", tmp_path / "large.pt", "--to", "half", "--out", out), "half precision does not hold"),
        (("info", tmp_path / "hostile.pt"), "not loaded"),
    ]
    before = sorted(os.listdir(tmp_path))
    for arguments, message in mistakes:
        printed, err = run(capsys, *arguments, status=2)
        assert not printed, arguments
        lines = [line for line in err if not line.startswith("skipped ")]
        assert len(lines) == 1, (arguments, err)
        assert lines[0].startswith("amb: ")
        assert message in lines[0], (arguments, err)
        assert sorted(os.listdir(tmp_path)) == before, arguments


def test_an_interrupted_command_leaves_nothing(models, folder, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Progress, "count", interrupt)
    run(capsys, "embed", models["pretrain"], folder, "--out", tmp_path / "x.npz", "--notes", status=130)
    assert not os.listdir(tmp_path)


def test_help_and_import_do_not_wait_for_torch():
    code = (
        "import sys, amb\nfrom amb.__main__ import main\ntry: main(['--help'])\nexcept SystemExit as e: print(e.code)\n"
    )
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-2:] == ["0", "False"]
    for command in ("predict", "melody", "velocity", "embed", "inspect", "convert", "info"):
        assert f"\n    {command} " in done.stdout
