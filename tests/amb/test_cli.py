"""`amb` as its users run it: printed results, written files, messages about mistakes."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import mido
import numpy as np
import pytest
import torch

import amb
from amb import __main__ as cli
from amb import checkpoint, inference, tasks, tokenizer
from amb.__main__ import main
from tests import scripts
from tests.scripts import ROOT, bag


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
    """A demo piece with drums, a note after beat 4,096, and one that never ends, which has no word."""
    midi = mido.MidiFile(folder / "0.mid")
    hit = [mido.Message(kind, channel=9, note=38, velocity=99, time=100) for kind in ("note_on", "note_off")]
    drums = mido.MidiTrack([mido.Message("note_on", note=33, velocity=3, time=7), *hit * 9])
    late = mido.Message("note_on", note=50, velocity=9, time=4096 * midi.ticks_per_beat + 10)
    midi.tracks += [drums, mido.MidiTrack([late, mido.Message("note_off", note=50, time=9)])]
    midi.type = 1
    midi.save(tmp_path / "song.mid")
    return tmp_path / "song.mid"


def run(capsys, *arguments, status=0) -> tuple[list[str], list[str]]:
    assert main([str(argument) for argument in arguments]) == status
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return out.splitlines(), err.splitlines()


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
    assert err[-2].startswith("predicted 3 pieces")
    assert err[-1].startswith("2 files skipped: 1 ")


def test_predict_as_json_is_what_python_gives(models, folder, capsys):
    expected = [p for p in amb.load(models["composer"], "cpu").predict(folder) if not p.error]
    out, _ = run(capsys, "predict", models["composer"], folder, "--json", "--segments", "--device", "cpu")
    for line, prediction in zip(map(json.loads, out), expected, strict=True):
        assert (line["file"], line["class"]) == (prediction.file, prediction.label)
        assert list(line["probabilities"].values()) == pytest.approx(prediction.probabilities, abs=1e-5)
        assert len(line["segments"]) == len(prediction.parts) > 1
        assert sum(part["notes"] for part in line["segments"]) == line["notes"] == prediction.notes
    out, _ = run(capsys, "predict", models["melody"], folder, "--json")
    for line in map(json.loads, out):
        assert sum(line["shares"].values()) == pytest.approx(1, abs=1e-5)
    out, _ = run(capsys, "predict", models["melody"], folder)
    assert cells(out[0]) == ["file", "notes", "MELODY", "BRIDGE", "PIANO"]


def test_melody_writes_the_notes_that_are_predicted(models, song, tmp_path, capsys, monkeypatch):
    """By default MELODY, and BRIDGE in bars without MELODY; bars counted here by the words."""
    model, rng = amb.load(models["melody"], "cpu"), np.random.default_rng(0)
    source, piece = tokenizer.read_midi(song), model.encode(song)
    bar = np.full(len(source.notes.pitch), -1)
    bar[piece.rows] = piece.words[:, 0] + 256 * np.repeat(np.arange(len(piece.segments)), piece.segments)
    # in every other bar no melody
    labels = np.where(bar % 2, rng.integers(0, 3, len(bar)), rng.integers(1, 3, len(bar)))
    log_p = np.where(bar[:, None] < 0, np.nan, np.log(0.1 + np.eye(3)[labels]))
    prediction = (inference.Prediction("", model.classes, len(piece.words), log_p, dropped=piece.dropped),)
    monkeypatch.setattr(inference.Trained, "predict_pieces", lambda *_: prediction)
    expected = np.where((bar < 0) | (source.notes.channel == 9), 2, labels)
    leads = (expected == 0) | (expected == 1) & ~np.isin(bar, bar[expected == 0])
    assert (expected == 0).sum() < leads.sum() < (expected <= 1).sum()
    for flag, notes in (((), leads), (["--strict"], expected == 0), (["--bridge"], expected <= 1)):
        out, _ = run(capsys, "melody", models["melody"], song, *flag, "--out", tmp_path / "out.mid")
        written = tokenizer.read_midi(tmp_path / "out.mid")
        assert bag(written.notes) == bag(source.notes, notes)
        assert set(written.notes.name) == {"MELODY"}
        assert written.unclosed == 0
        assert (written.ticks_per_beat, written.tempos) == (source.ticks_per_beat, source.tempos)
        assert f"{notes.sum():,} of {len(notes):,} notes" in out[0]
        assert any("9 notes (percussion)" in line for line in out)
        left = ((expected == 1) & ~notes).sum()
        assert any(line.startswith(f"left out: {left:,} notes of BRIDGE") for line in out) == bool(left)
    run(capsys, "melody", models["melody"], song, "--out", tmp_path / "split.mid", "--split")
    split = tokenizer.read_midi(tmp_path / "split.mid")
    assert split.unclosed == 0
    for number, name in enumerate(tasks.TASKS["melody"].classes):
        assert bag(split.notes, split.notes.name == name) == bag(source.notes, expected == number)


def test_melody_speaks_of_tracks_that_are_called_so_and_takes_them(models, song, tmp_path, capsys, monkeypatch):
    midi = mido.MidiFile(song)
    midi.tracks[-2].insert(0, mido.MetaMessage("track_name", name="drums"))
    midi.tracks[-1].insert(0, mido.MetaMessage("track_name", name=" Lead Vocals"))
    midi.save(song)
    monkeypatch.chdir(tmp_path)
    notes = tokenizer.read_midi(song).notes
    out, _ = run(capsys, "melody", models["melody"], "song.mid", "--picture")
    assert out[0].startswith("song.melody.mid: ")
    assert any(
        "track 'Lead Vocals': " in line and f"of its {(notes.name == 'Lead Vocals').sum()} notes" in line
        for line in out
    )
    assert not any("'drums'" in line for line in out)
    assert Path("song.melody.png").read_bytes()[:4] == b"\x89PNG"
    run(capsys, "melody", models["melody"], "song.mid", "--track", "lead vocals", "--out", "lead.mid")
    assert bag(tokenizer.read_midi("lead.mid").notes) == bag(notes, notes.name == "Lead Vocals")
    _, err = run(capsys, "melody", models["melody"], "song.mid", "--track", "oboe", "--out", "oboe.mid", status=2)
    assert "no track is called 'oboe': there are " in err[0]
    assert "drums" in err[0]
    assert not Path("oboe.mid").exists()


def test_folders_archives_and_standard_input(models, folder, tmp_path, capsys, monkeypatch):
    """All commands take them; what an archive holds is named after it, and nothing is left of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    os.mkdir("temporary")
    files = [folder / f"{number}.mid" for number in range(3)]
    with zipfile.ZipFile("songs.zip", "w") as archive:
        for file in files:
            archive.write(file, f"set/{file.name}")
    run(capsys, "embed", models["pretrain"], "songs.zip", "--out", "zip.npz", "--notes")
    run(capsys, "embed", models["pretrain"], *files, "--out", "files.npz")
    archived, expected = np.load("zip.npz"), np.load("files.npz")
    assert archived["names"].tolist() == [f"songs.zip/set/{file.name}" for file in files]
    assert (archived["vectors"] == expected["vectors"]).all()
    out, _ = run(capsys, "predict", models["composer"], "songs.zip", "--json")
    assert [json.loads(line)["file"] for line in out] == archived["names"].tolist()
    for source, out, below in (("songs.zip", "a", "a/set"), (folder, "b", "b")):
        _, err = run(capsys, "melody", models["melody"], source, "--out-dir", out)
        assert sorted(Path(out).rglob("*.mid")) == [Path(below, f"{number}.melody.mid") for number in range(3)]
        assert ("2 files skipped" in err[-1]) == (source == folder)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(files[0].read_bytes())))
    run(capsys, "melody", models["melody"], "-")
    assert Path("stdin.melody.mid").read_bytes() == Path("b/0.melody.mid").read_bytes()
    assert not os.listdir("temporary")
    _, err = run(capsys, "melody", models["melody"], folder, status=2)
    assert "5 files: say where to write with either --out or, for several, --out-dir" in err[0]
    _, err = run(capsys, "melody", models["melody"], files[0], files[0], "--out-dir", "x", status=2)
    assert "written twice" in err[0]


def test_off_a_terminal_progress_is_reported_and_what_was_left_out_is_counted(
    models, folder, song, capsys, monkeypatch
):
    monkeypatch.setattr(cli, "REPORT_EVERY", 0)
    _, err = run(capsys, "predict", models["melody"], folder, song)
    assert sum(" of 6 files, " in line for line in err) == 6
    assert err[-2].startswith("2 files skipped: ")
    assert err[-1] == "1 notes left out: 1 never ends"


@pytest.mark.filterwarnings("ignore:for encoder")
def test_a_backend_that_lacks_an_operation_gets_one_line(models, folder, tmp_path, capsys):
    """`meta` can do nothing that gives a number; on a CPU an error is a fault of ours, and is shown whole."""
    for command in (("predict", models["composer"], folder), ("embed", "small", folder, "--out", tmp_path / "x.npz")):
        out, err = run(capsys, *command, "--device", "meta", status=2)
        assert not out
        lines = [line for line in err if not line.startswith("skipped ")]
        assert len(lines) == 1
        assert lines[0].startswith("amb: --device meta cannot do this; try --device cpu (")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("bins", [True, False])
def test_velocity_writes_predicted_velocities(bins, models, song, tmp_path, capsys):
    (prediction,) = amb.load(models["velocity"], "cpu").predict(song)
    centres, seen = np.array([16, 40, 56, 72, 88, 112]), prediction.labels >= 0
    expected = tokenizer.read_midi(song).notes.velocity.copy()
    predicted = centres[prediction.labels] if bins else np.rint(np.exp(np.nan_to_num(prediction.log_p)) @ centres)
    expected[seen] = predicted[seen]
    out, _ = run(capsys, "velocity", models["velocity"], song, "--out", tmp_path / "v.mid", *["--bins"] * bins)
    assert "left as they were: 1 notes" in "".join(out)
    source, notes = tokenizer.read_midi(song).notes, tokenizer.read_midi(tmp_path / "v.mid").notes
    assert notes.velocity.tolist() == expected.tolist()
    assert (notes.start == source.start).all()
    assert len(set(expected.tolist())) > 2


def test_embed_writes_what_numpy_reads_without_pickle(models, folder, tmp_path, capsys):
    out, err = run(capsys, "embed", models["pretrain"], folder, "--out", tmp_path / "x.npz", "--notes", "--layer", "1")
    assert any("embedded 3 pieces" in line and "pieces/s" in line for line in err)
    expected = amb.load(models["pretrain"], "cpu").embed(folder, layer=1, notes=True)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        assert arrays["names"].tolist() == expected.names == [f"{folder}/{n}.mid" for n in range(3)]
        assert (arrays["vectors"] == expected.vectors).all()
        assert (arrays["counts"] == np.bincount(arrays["note_piece"])).all()
        for name in ("vectors", "seconds", "start", "pitch", "track"):
            assert (arrays[f"note_{name}"] == getattr(expected.notes, name)).all()
    run(capsys, "embed", models["pretrain"], folder, "--out", tmp_path / "x.npz", "--layer", "all")
    assert np.load(tmp_path / "x.npz")["vectors"].shape == (3, 9 * expected.vectors.shape[1])
    assert os.listdir(tmp_path) == ["x.npz"]


def test_info_describes_a_midi_file(song, capsys, monkeypatch):
    out, _ = run(capsys, "info", song)
    notes = tokenizer.read_midi(song).notes
    assert out[0] == f"{song}: MIDI file"
    assert out[1].split() == ["notes", f"{len(notes.pitch):,},", "and", "1", "that", "never", "end"]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(song.read_bytes())))
    piped, _ = run(capsys, "info", "-")
    assert piped[1:] == out[1:]


def test_info_shows_data_and_figures_of_runs(models, tmp_path, capsys):
    run_folder = tmp_path / "run"
    shutil.copytree(models["pretrain"], run_folder)
    figures = [{"loss": 3.0, "accuracy": 0.4}, {"loss": 2.0, "accuracy": 0.625}, {"loss": 2.5, "accuracy": 0.5}]
    lines = [{"kind": "epoch", "epoch": n, "valid": valid, "frozen": 0.25} for n, valid in enumerate(figures, 1)]
    (run_folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (run_folder / "run.json").write_text(json.dumps({"paths": {"data": ["/data/my\nsongs"]}}))
    out, _ = run(capsys, "info", run_folder)
    text = "\n".join(out)
    for part in ("/data/my\\nsongs", "3, of which 2 is the best", "62.5%", "frozen 25.0%"):
        assert part in text
    training = {"seed": 1, "epochs": 9, "best_epoch": 4, "test": {"loss": 1, "notes": {"accuracy": 0.9}}}
    report = {"model": {"seed": 1}, "trainings": [training | {"seed": 0, "epochs": 7}, training]}
    (run_folder / "report.json").write_text(json.dumps(report))
    (run_folder / "run.json").write_text(json.dumps({"paths": {"data": None}}))
    text = "\n".join(run(capsys, "info", run_folder)[0])
    for part in ("the demo corpus", "9, of which 4 is the best", "test notes 90.0%"):
        assert part in text
    (run_folder / "run.json").write_text("{")  # the model is still what it is
    assert "octuple" in "\n".join(run(capsys, "info", run_folder)[0])


def test_mistakes_get_one_line_and_status_2(models, folder, song, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with zipfile.ZipFile(tmp_path / "broken.zip", "w", zipfile.ZIP_STORED) as archive:
        archive.write(song, "song.mid")
    (tmp_path / "broken.zip").write_bytes((tmp_path / "broken.zip").read_bytes().replace(b"MTrk", b"MTrx"))
    torch.save({"format": checkpoint.FORMAT, "run": subprocess.run}, tmp_path / "hostile.pt")
    checkpoint.save(tmp_path / "large.pt", {"model": {"weight": torch.tensor([1e5])}})
    os.mkfifo(tmp_path / "pipe")
    out = tmp_path / "out.mid"
    mistakes = [
        (("predict", tmp_path / "no.pt", folder), "no.pt does not exist; a model that comes with the code is called "),
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
        (("melody", models["melody"], folder / "1b.mid", "--out", out), "no usable MIDI file; skipped: 1 damaged"),
        (("melody", models["melody"], song, "--strict", "--track", "x"), "exclude each other"),
        (("melody", models["melody"], song, "--out", out, "--out-dir", tmp_path), "with either --out or"),
        (("embed", models["pretrain"], tmp_path / "broken.zip", "--out", out), "broken.zip cannot be unpacked"),
        (("info", folder / "1b.mid"), "1b.mid: damaged"),
        (("melody", models["melody"], song, "--out", song), "the file to be read"),
        (("melody", models["melody"], song, "--out", tmp_path / "taken"), "is a folder"),
        (("embed", models["pretrain"], folder, "--out", tmp_path / "no" / "x.npz"), "there is no folder"),
        (("embed", models["pretrain"], folder, "--out", tmp_path / "pipe"), "no regular file"),
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
    code = "import sys, amb\nfrom amb.__main__ import main\n"
    code += "try: main(['--help'])\nexcept SystemExit as e: print(e.code, 'torch' in sys.modules)\n"
    said = scripts.run("-c", code, cwd=ROOT)
    assert "\n0 False\n" in said
    for command in ("predict", "melody", "velocity", "embed", "inspect", "convert", "info"):
        assert f"\n    {command} " in said


def test_the_example_of_each_help_works(models, folder, tmp_path, capsys, monkeypatch):
    """With a folder of songs, and what a `python` before it would have made."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "songs")
    shutil.copytree(models["pretrain"], "runs/trial")
    os.mkdir("runs/velocity")
    shutil.copy(models["velocity"], "runs/velocity/model.pt")
    for command in cli.COMMANDS.choices:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        example = text[text.rindex("example: ") + 9 :].splitlines()[0]
        words = shlex.split(example.split("&&")[-1])
        assert words[:2] == ["amb", command]
        run(capsys, *words[1:])


def test_names_that_the_terminal_cannot_show_are_printed_all_the_same(song):
    named = song.rename(song.with_name("旋律 \udcff$.mid"))
    said = scripts.run("-m", "amb", "info", named, cwd=ROOT, env={"PYTHONIOENCODING": "cp1252"})
    assert r"\u65cb\u5f8b" in said
