"""The scripts as their users run them, the metrics that they leave, and what several tests write and compare."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from subprocess import PIPE

import torch

from amb import parallel, tokenizer

ROOT = Path(__file__).parents[1]


def start(*command, env: dict[str, str] | None = None, **kwargs) -> subprocess.Popen:
    """`python COMMAND` on one thread, and not in Triton's interpreter; `env`: variables to add."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1"} | (env or {})
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, env=environment, text=True, stdout=PIPE, stderr=PIPE, **kwargs)


def run(*command, status: int = 0, **kwargs) -> str:
    """What it printed, stdout before stderr; it must end with `status`."""
    process = start(*command, **kwargs)
    out, err = process.communicate(timeout=500)
    assert process.returncode == status, out + err
    return out + err


def call(script, monkeypatch, *arguments) -> int:
    """The same in this process: the exit status of an imported script."""
    name = f"{script.__name__}.py"
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return parallel.run_script(name, script.main, script.parse_args())


def metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl so far, without speeds, which differ from run to run."""
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{key: value for key, value in line.items() if key != "speed"} for line in lines]


def wait_for_lines(folder: Path, count: int, *processes: subprocess.Popen) -> None:
    """Until a run's metrics.jsonl has so many lines; the processes must not end before."""
    deadline = time.monotonic() + 200
    while len(metrics(folder)) < count:
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def different(a, b, where: str = "", tolerance: float = 0.0) -> str:
    """Where two contents differ, or their numbers by more than a relative tolerance; "" if they do not."""
    if type(a) is not type(b):
        return f"{where}: {a!r:.40} {b!r:.40}"
    if isinstance(a, dict) and a.keys() == b.keys():
        return next(filter(None, (different(a[key], b[key], f"{where}/{key}", tolerance) for key in a)), "")
    if isinstance(a, list | tuple) and len(a) == len(b):
        return different(dict(enumerate(a)), dict(enumerate(b)), where, tolerance)
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        if tolerance and a.is_floating_point() and a.shape == b.shape:
            same = (a - b).norm() <= tolerance * (b.norm() + 0.01)
    else:
        same = a == b or isinstance(a, float) and abs(a - b) <= tolerance * (abs(b) + 0.01)
    return "" if same else f"{where}: {a!r:.40} {b!r:.40}"


class Evil:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def bag(notes: tokenizer.Notes, rows=slice(None)) -> Counter:
    """The notes of these rows, in no order."""
    columns = notes.start, notes.end, notes.pitch, notes.velocity, notes.channel
    return Counter(zip(*(column[rows].tolist() for column in columns), strict=True))
