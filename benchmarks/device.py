"""All that is to be measured on a GPU at hand for a few minutes: each stage a process of its own, then training.

    python -m benchmarks device --minutes 6 --out DIR [--data FILE | STORE …]

A stage leaves DIR/STAGE.json when it ends and its output in DIR/STAGE.log; it is stopped when its time is over. One
that fails is reported and passed over, one that has its JSON is not run again. Training takes what time is left, on
token stores or on one file of them (`python -m benchmarks pack`), and leaves its run in DIR/train.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from amb.config import PRESETS
from benchmarks import pack
from benchmarks.timing import write

NOTES = 16384  # in a batch of the attention stages, at every length
TESTS = ("tests/kernels", "tests/amb/test_cuda_graph.py", "tests/amb/test_objective.py", "-k", "not machine_code")
AFTER = 20  # seconds that a stage has to save what it has done
EPOCHS = 10  # of training: each may leave weights


def stages(options: argparse.Namespace, batch: int, stores: list[Path]) -> Iterator[tuple[str, int, list]]:
    """Name, seconds at most in six minutes, and `python` arguments of each stage before training, in order."""
    measure = ["-m", "benchmarks", "kernels", "--arch", "--rounds", options.rounds]
    largest = ["--config", options.config[-1]]
    yield "correctness", 60, [*measure[:-1], 0, "--check"]
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    yield "tests", 120, ["-m", "pytest", "-q", *workers, *options.tests]
    yield "operations", 90, [*measure, *largest, "--batch", batch]
    for length in options.lengths:
        shape = ["--length", length, "--batch", max(1, NOTES // length)]
        yield f"attention-{length}", 60, [*measure, *largest, "--op", "attention", *shape]
    step = ["-m", "benchmarks", "step", *["--data"] * bool(stores), *stores[:1]]
    step += ["--rounds", options.rounds, "--batch", batch, "--config"]
    for who, seconds, more in (("ours", 60, []), ("peer", 100, ["--compile"] if torch.cuda.is_available() else [])):
        for config in options.config:
            yield f"step-{config}-{who}", seconds, [*step, config, "--only", who, *more]
    yield "profile", 45, [*step, options.config[-1], "--only", "ours", "--profile"]


def training(options: argparse.Namespace, batch: int, stores: list[Path], seconds: float) -> list:
    """The `python` arguments of a run of the first configuration whose schedule ends within so many seconds."""
    if (options.out / "train" / "run.json").exists():
        return ["train.py", "--resume", options.out / "train"]
    config, speed = options.config[0], 2e5  # notes per second, if they were not measured
    measured = options.out / f"step-{config}-ours.json"
    if measured.exists():
        (rows,) = json.loads(measured.read_text(encoding="utf-8"))["tables"].values()
        speed = rows[-1]["notes/s"]  # the CUDA graph's, where there is one
    notes = {"notes": 1024, **PRESETS[config]}["notes"]
    epoch = max(batch, int(0.7 * seconds * speed / notes / EPOCHS))
    command = ["train.py", "--config", config, "--out", options.out / "train", "--cache", options.out / "cache"]
    command += ["--batch", batch, "--epochs", EPOCHS, "--epoch-size", epoch, "--valid-size", 256]
    return [*command, *["--data"] * bool(stores), *stores, *["--cuda-graph"] * torch.cuda.is_available()]


def execute(command: list, seconds: float, log: Path) -> int:
    """The exit status of a `python` command; after its time SIGINT, which training takes as its end, then SIGKILL."""
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        for number, patience in ((signal.SIGINT, seconds), (signal.SIGKILL, AFTER), (signal.SIGKILL, None)):
            try:
                return process.wait(patience)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, number)


def run(name: str, command: list, seconds: float, out: Path, ends: tuple[int, ...] = (0,)) -> None:
    """Run a stage that has not left its JSON yet, and say in a line what became of it."""
    file, log, began = out / f"{name}.json", out / f"{name}.log", time.perf_counter()
    if file.exists() or seconds < 1:
        print(f"{name}: {'there already' if file.exists() else 'no time left'}")
        return
    status = execute(command, seconds, log)
    taken = time.perf_counter() - began
    last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    if status in ends and not file.exists():
        write(file, {name: [{"seconds": taken, "exit status": status, "last line": last}]})
    verdict = "done" if file.exists() else "OUT OF TIME" if taken > seconds else f"FAILED ({status}), {log}: {last}"
    print(f"{name}: {verdict}, {taken:.0f} s", flush=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks device", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=6, help="for all; default: 6")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="what to train on (default: the demo corpus)")
    parser.add_argument("--config", nargs="+", choices=PRESETS, default=["small", "base"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096], help="of attention")
    parser.add_argument("--rounds", type=int, default=5, help="of timing; default: 5")
    parser.add_argument("--batch", type=int, help="sequences (default: 32; on a CPU 4)")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="what pytest is given")
    options = parser.parse_args(arguments)
    ends = time.perf_counter() + 60 * options.minutes
    batch = options.batch or (32 if torch.cuda.is_available() else 4)
    options.out.mkdir(parents=True, exist_ok=True)
    packed = len(options.data) == 1 and options.data[0].is_file()
    stores = pack.unpack(options.data[0], options.out / "stores") if packed else options.data
    for name, limit, command in stages(options, batch, stores):
        if command[1] == "benchmarks":
            command += ["--out", options.out / f"{name}.json"]
        run(name, command, min(limit * options.minutes / 6, ends - time.perf_counter()), options.out)
    if (left := ends - time.perf_counter() - AFTER) > 0:
        run("training", training(options, batch, stores, left), left, options.out, ends=(0, 130))
