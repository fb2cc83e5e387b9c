"""All that is to be measured on a GPU at hand for a few minutes: each stage a process of its own, then training.

    python -m benchmarks device --minutes 6 --out DIR [--data FILE | STORE …]

A stage writes DIR/STAGE.log, and DIR/STAGE.json when it ends; it is stopped when its time is over. One that fails is
reported and passed over, one that has its JSON is not run again. Training takes the time that is left, on token stores
or on one file of them (`python -m benchmarks pack`), and leaves its run in DIR/train.
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

from amb.config import PRESETS, Config
from benchmarks import pack
from benchmarks.timing import DEVICE, write

NOTES = 16384  # in a batch of the attention stages, at every length
TESTS = ("tests/kernels", "tests/amb/test_cuda_graph.py", "tests/amb/test_objective.py", "-k", "not machine_code")
AFTER = 20  # seconds that a stage that is stopped has to save its work
EPOCHS = 10  # of training: each may leave weights


def stages(options: argparse.Namespace, stores: list[Path]) -> Iterator[tuple[str, int, list]]:
    """Name, seconds at most in six minutes, and `python` arguments of each stage before training, in order."""
    kernels, rounds = ["-m", "benchmarks", "kernels", "--arch"], ["--rounds", options.rounds]
    largest, batch = ["--config", options.config[-1]], ["--batch", options.batch]
    yield "correctness", 60, [*kernels, "--rounds", 0, "--check"]
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    yield "tests", 120, ["-m", "pytest", "-q", *workers, *TESTS]
    yield "operations", 90, [*kernels, *rounds, *largest, *batch]
    for length in options.lengths:
        shape = ["--length", length, "--batch", max(1, NOTES // length)]
        yield f"attention-{length}", 60, [*kernels, *rounds, *largest, "--op", "attention", *shape]
    step = ["-m", "benchmarks", "step", *["--data"] * bool(stores), *stores[:1], *rounds, *batch]
    for who, seconds in (("ours", 60), ("peer", 100)):
        for config in options.config:
            yield f"step-{config}-{who}", seconds, [*step, "--config", config, "--only", who]
    steps = ["--epochs", 1, "--epoch-size", 6 * options.batch, "--valid-size", options.batch]
    yield "profile", 45, [*train(options, options.config[-1], "profile-run", stores), *steps, "--profile"]


def train(options: argparse.Namespace, config: str, folder: str, stores: list[Path]) -> list:
    """The `python` arguments of a run of `train.py` in that folder of OUT."""
    where = ["--out", options.out / folder, "--cache", options.out / "cache", *["--data"] * bool(stores), *stores]
    return ["train.py", "--config", config, "--batch", options.batch, *where]


def training(options: argparse.Namespace, stores: list[Path], seconds: float) -> list:
    """The `python` arguments of a run of the first configuration whose schedule ends within so many seconds."""
    folder, config = options.out / "train", options.config[0]
    if (folder / "run.json").exists():
        return ["train.py", "--resume", folder]
    speed = 2e5  # notes per second, if they were not measured
    measured = options.out / f"step-{config}-ours.json"
    if measured.exists():
        (rows,) = json.loads(measured.read_text(encoding="utf-8"))["tables"].values()
        speed = rows[-1]["notes/s"]  # the CUDA graph's, where there is one
    epoch = max(options.batch, int(0.7 * seconds * speed / Config(**PRESETS[config]).notes / EPOCHS))
    size = ["--epochs", EPOCHS, "--epoch-size", epoch, "--valid-size", 256]
    return [*train(options, config, "train", stores), *size, *["--cuda-graph"] * (DEVICE.type == "cuda")]


def execute(command: list, seconds: float, log: Path) -> int:
    """The exit status of a `python` command. Its time over, it gets SIGINT, on which training saves, then SIGKILL."""
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
    """Run a stage that has no JSON yet, and print a line about its end; `ends` are the exit statuses of success."""
    file, log, began = out / f"{name}.json", out / f"{name}.log", time.perf_counter()
    if file.exists() or seconds < 1:
        print(f"{name}: {'there already' if file.exists() else 'no time left'}")
        return
    status = execute(command, seconds, log)
    taken = time.perf_counter() - began
    last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    if status in ends and not file.exists():  # of pytest and train.py
        write(file, {name: [{"seconds": taken, "exit status": status, "last line": last}]})
    verdict = "done" if status in ends else "OUT OF TIME" if taken > seconds else f"FAILED ({status}), {log}: {last}"
    print(f"{name}: {verdict}, {taken:.0f} s", flush=True)


def main(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("--minutes", type=float, default=6, help="for all; default: 6")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="what to train on; default: the demo corpus")
    parser.add_argument("--config", nargs="+", choices=PRESETS, default=["small", "base"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096], help="of attention")
    parser.add_argument("--rounds", type=int, default=5, help="of timing; default: 5")
    batch = 32 if DEVICE.type == "cuda" else 4
    parser.add_argument("--batch", type=int, default=batch, help=f"sequences; default here: {batch}")
    options = parser.parse_args(arguments)
    ends = time.perf_counter() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    packed = len(options.data) == 1 and options.data[0].is_file()
    stores = pack.unpack(options.data[0], options.out / "stores") if packed else options.data
    for name, limit, command in stages(options, stores):
        if command[1] == "benchmarks":
            command += ["--out", options.out / f"{name}.json"]
        run(name, command, min(limit * options.minutes / 6, ends - time.perf_counter()), options.out)
    if (left := ends - time.perf_counter() - AFTER) > 0:
        run("training", training(options, stores, left), left, options.out, ends=(0, 130))
