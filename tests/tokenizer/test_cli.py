"""`python -m amb.tokenizer` as a user runs it: exit status, output, same bytes for any number of workers, Ctrl-C."""

import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
from amb.tokenizer.__main__ import main

from amb import tokenizer
from tests import scripts
from tests.scripts import ROOT

start, run = (partial(function, "-m", "amb.tokenizer", cwd=ROOT) for function in (scripts.start, scripts.run))


@pytest.fixture
def corpus(tmp_path, midi):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(40):
        notes = [event for n in range(50) for event in midi.note(n * 240, n * 240 + 200, 30 + (n * index) % 60)]
        (folder / f"{index}.mid").write_bytes(midi.smf(midi.track(*notes)))
    (folder / "copy.mid").write_bytes((folder / "7.mid").read_bytes())
    (folder / "bad.mid").write_bytes(b"MThd")
    return folder


def test_same_bytes_for_any_number_of_workers(corpus, tmp_path):
    stores = []
    for workers in (1, 3):
        said = run(corpus, "--out", tmp_path / str(workers), "--encoding", "midibert", "--workers", workers)
        assert "Traceback" not in said
        stores.append({path.name: path.read_bytes() for path in (tmp_path / str(workers)).iterdir()})
    assert stores[0].keys() == {"skipped.jsonl", "store.json", "words.bin"}
    assert stores[0] == stores[1]
    lines = {" ".join(line.split()) for line in said.splitlines()}
    assert {"40 pieces", "40 segments", "2,000 notes", "1 duplicate", "1 damaged"} <= lines


def test_nothing_usable(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for why in ("no MIDI there", "1 not MIDI"):
        assert main([str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
        assert f"error: no usable MIDI file in {tmp_path / 'in'}: {why}\n" in capsys.readouterr().err
        (tmp_path / "in" / "new\nline.mid").write_text("text")
    assert run(tmp_path / "in" / "new\nline.mid", "--out", tmp_path / "out", status=2).count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--out", "x"], "nowhere does not exist"),
        ([".", "--out", "x", "--workers", "0"], "0 workers are too few"),
        (["tokenizer/midi.py", "--out", "tokenizer"], "exists and is not a token store"),
        (["tokenizer/midi.py", "--out", "setup.py/x"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.fixture(scope="module")
def many(tmp_path_factory, midi):
    """1,000 files of 3,000 notes."""
    folder = tmp_path_factory.mktemp("many")
    data = midi.smf(midi.track(*(event for n in range(3000) for event in midi.note(n * 24, n * 24 + 20, 30 + n % 60))))
    for index in range(1000):
        (folder / f"{index}.mid").write_bytes(data)
    return folder


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_nothing(tmp_path, many, workers, kind):
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    arguments = many, "--out", tmp_path / "out", "--workers", workers
    process = start(*arguments, start_new_session=True, preexec_fn=heed)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.glob(".out.new-*/words.bin")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == workers * (workers > 1)
    os.killpg(process.pid, kind) if kind == signal.SIGINT else process.send_signal(kind)
    _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (130, "interrupted; nothing was written\n")
    assert list(tmp_path.iterdir()) == []
    assert not any(Path("/proc", child).exists() for child in children)


NOISY = """
import os, signal
print("printed while it is imported")
def double(path):
    if path == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return int(path) * 2
"""
SCRIPT = """
import sys
sys.modules |= dict.fromkeys(("fcntl", "resource", "torch", "triton"))  # which other systems do not have
import threading, noisy
from amb.tokenizer import run
threading.Thread(target=input, daemon=True).start()
try:
    print(list(run([*map(str, range(19)), LAST], noisy.double, 3)))
except Exception as error:
    print(error)
"""


@pytest.mark.parametrize("last", ["19", "x", "killed"])
def test_workers_of_a_script_without_a_guard(tmp_path, last):
    """They do not run the script again; what a module prints or raises does not get between the results."""
    (tmp_path / "noisy.py").write_text(NOISY)
    (tmp_path / "script.py").write_text(SCRIPT.replace("LAST", repr(last)))
    said = scripts.run(tmp_path / "script.py", env={"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE)
    assert {"19": "36, 38]", "x": "invalid literal", "killed": "a worker was killed"}[last] in said


def test_work_says_something_off_a_terminal(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tokenizer.build, "QUIET", 1e-3)
    tokenizer.build_store(corpus, tmp_path / "out", workers=1)
    assert "/42 [" in capsys.readouterr().err
