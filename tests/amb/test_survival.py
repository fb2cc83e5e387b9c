"""Trainings survive faults: one round of the commonest, and many of each with -m slow.

A fault is a function (number, folder, rng). It breaks a `tiny` training at a random moment, resumes it, and asserts
that the checkpoint was whole all the time, that one line said what happened (kill -9 aside), and that the run ended
equal to an uninterrupted one in `folder`, to the last bit but for speed, with no file more and without pictures.
"""

import json
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from amb import checkpoint, demo, tokenizer
from tests.scripts import ROOT, different

PRELOADED = ["torch._dynamo", "amb.plots", "amb.model", "amb.baselines", "amb.tokenizer"]
TINY = ["--config", "tiny", "--device", "cpu", "--save-every", "1"]
SHORT = ["--notes", "32", "--epoch-size", "12", "--batch", "4", "--epochs", "2", "--valid-size", "4"]
TRAIN = [*TINY, *SHORT, "--reach", "32", "--log-every", "1"]
FINETUNE = [*TINY, *SHORT, "--task", "velocity", "--mask", "0.12"]
LARGEST = 3_000_000  # bytes, a little more than any file of these runs


class Forked:
    """A script in a process forked from one that has imported torch; `before()` is called in it first."""

    def __init__(self, script: str, arguments: list, before: Callable | None = None):
        os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # of multiprocessing, when a process is killed
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        self.streams = [read for read, _ in pipes]
        inside = [write for _, write in pipes]
        self.process = context.Process(target=_inside, args=(script, [*map(str, arguments)], *inside, before))
        self.process.start()
        for write in inside:
            write.close()

    def runs_after(self, seconds: float) -> bool:
        self.process.join(seconds)
        return self.process.exitcode is None

    def limit_files(self, size: int) -> None:
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def finish(self) -> tuple[int, str, str]:
        """Status, negative for a signal, and output of a process that ends by itself."""
        if hangs := self.runs_after(300):
            self.process.kill()
            self.process.join(10)
        texts = []
        for stream in self.streams:
            with open(stream.fileno(), "rb", closefd=False) as file:
                texts.append(file.read().decode())
            stream.close()
        assert not hangs, f"still running after 300 s: {texts}"
        return self.process.exitcode, *texts


def _inside(script: str, arguments: list[str], out, err, before) -> None:
    for number, stream in ((1, out), (2, err)):
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.pop("TRITON_INTERPRET", None)
    sys.argv = [script, *arguments]
    sys.modules["matplotlib"] = None
    if before:
        before()
    runpy.run_path(str(ROOT / script), run_name="__main__")


def assert_line(script: str, status: int, out: str, err: str, *words: str) -> None:
    """A script ended with status 2 and one line on stderr that contains all words."""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith(f"{script}: ")]
    assert (status, len(lines)) == (2, 1), out + err
    assert "Traceback" not in err, err
    assert err.rstrip().endswith(lines[0]), err
    assert all(word in lines[0] for word in words), lines


# what is done in the process, before the script


def die_at(count: int, below: str) -> None:
    """kill -9 itself just before the count-th time that it opens for writing, renames or removes a file `below`."""
    left = [count]

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.rename", "os.remove", "os.truncate")) and below in str(arguments[0]):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def die_at_limit() -> None:
    """Let the kernel kill it at the byte with which a file would pass RLIMIT_FSIZE."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


# runs


def data_of(folder: Path) -> Path:
    """The folder, with its demo pieces as MIDI and as a token store."""
    if not (folder / "store").exists():
        demo.write_corpus(folder / "midi", pieces=16)
        tokenizer.build_store([folder / "midi"], folder / "store", workers=1, progress=False)
    return folder


def command(script: str, folder: Path, run: Path, store: Path | None = None) -> list:
    """What starts a run, or continues it if it has begun."""
    if (run / "run.json").exists():
        return ["--resume", run, *TINY[2:], *(["--log-every", "1"] if script == "train.py" else [])]
    if script == "train.py":
        return [*TRAIN, "--data", store or data_of(folder) / "store", "--out", run]
    return [*FINETUNE, "--data", data_of(folder) / "midi", "--cache", folder / "cache", "--out", run]


def whole(script: str, folder: Path) -> Path:
    """An uninterrupted run of a script."""
    run, clock = data_of(folder) / f"whole-{script[:-3]}", folder / f"{script}.seconds"
    if not clock.exists():
        Forked(script, ["--help"]).finish()  # the process that others are forked from imports what it needs
        began = time.monotonic()
        status, out, err = Forked(script, command(script, folder, run)).finish()
        assert status == 0, out + err
        clock.write_text(str(time.monotonic() - began))
    return run


def moment(rng, script: str, folder: Path) -> float:
    """A random number of seconds in which such a process has most likely not ended."""
    whole(script, folder)
    return rng.uniform(0, float((folder / f"{script}.seconds").read_text()))


def fresh(folder: Path, name: str = "run") -> Path:
    shutil.rmtree(folder / name, ignore_errors=True)
    return folder / name


def assert_last_is_whole(run: Path, save_every: int = 1) -> None:
    """Every last.pt is whole, and no more than `save_every` reported steps are younger than it."""
    for path in run.rglob("last.pt"):
        saved = checkpoint.load(path)["progress"]["step"]
        metrics = path.with_name("metrics.jsonl")
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
        reported = max((json.loads(line).get("step", 0) for line in lines), default=0)
        assert reported <= saved + save_every, path


def read(path: Path):
    """A file's content, without what depends on the machine, the clock or the place."""
    if path.suffix == ".pt":
        return {key: value for key, value in checkpoint.load(path).items() if key != "metrics_bytes"}
    if path.suffix == ".jsonl":
        return [{k: v for k, v in json.loads(line).items() if k != "speed"} for line in path.open()]
    if path.suffix == ".npz":
        return {name: array.tolist() for name, array in np.load(path).items()}
    if path.suffix == ".json":
        return {key: value for key, value in json.loads(path.read_text()).items() if key != "paths"}
    return path.read_bytes()


def resume(script: str, folder: Path, run: Path, store: Path | None = None) -> None:
    """To the end, which must be that of the uninterrupted run."""
    status, out, err = Forked(script, command(script, folder, run, store)).finish()
    assert status == 0, out + err
    assert "Traceback" not in err, err
    undisturbed = whole(script, folder)
    files, expected = ({p.relative_to(one) for p in one.rglob("*") if p.is_file()} for one in (run, undisturbed))
    assert files == expected
    for path in sorted(files):
        assert not different(read(run / path), read(undisturbed / path), str(path))


def script_of(number: int) -> str:
    """Which script a round breaks: each third finetune.py."""
    return "finetune.py" if number % 3 == 2 else "train.py"


def log_uniform(rng, low: int, high: int) -> int:
    return int(np.exp(rng.uniform(np.log(low), np.log(high))))


# the faults


def kill_in_write(number: int, folder: Path, rng) -> None:
    """kill -9 just before a file is opened, renamed or removed, or at a random byte of a file being written."""
    script, run = script_of(number), fresh(folder)
    for turn in range(3):
        arguments = command(script, folder, run)
        if (number + turn) % 2:
            process = Forked(script, arguments, partial(die_at, int(rng.integers(1, 30)), str(run)))
        else:
            process = Forked(script, arguments, die_at_limit)
            if process.runs_after(moment(rng, script, folder)):
                process.limit_files(log_uniform(rng, 64, LARGEST))
        status, _, err = process.finish()
        assert status in (0, -signal.SIGKILL, -signal.SIGXFSZ), err
        assert len(list(run.rglob(".*"))) <= 2, "temporary files accumulate"
        assert_last_is_whole(run)
    resume(script, folder, run)


def full_disk(number: int, folder: Path, rng) -> None:
    """No room from a random moment on: files may not grow beyond a random size."""
    script, run = script_of(number), fresh(folder)
    save_every = 100 if number % 4 >= 2 else 1
    process = Forked(script, [*command(script, folder, run), "--save-every", save_every])
    if process.runs_after(moment(rng, script, folder)):
        process.limit_files(log_uniform(rng, 64, LARGEST))
    status, out, err = process.finish()
    if status:
        assert_line(script, status, out, err, str(run), "File too large")
    assert not list(run.rglob(".*"))
    assert_last_is_whole(run, save_every)
    resume(script, folder, run)


def full_disk_store(number: int, folder: Path, rng) -> None:
    """Files that may not grow beyond a random size, while MIDI is tokenized for a training."""
    largest = max(path.stat().st_size for path in (data_of(folder) / "store").iterdir())
    size, cache = log_uniform(rng, 16, largest), fresh(folder, "place") / "cache"
    arguments = [*TRAIN, "--data", folder / "midi", "--cache", cache, "--out", fresh(folder)]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    assert_line("train.py", *Forked("train.py", arguments, limit).finish(), str(cache), "File too large")
    assert not list(cache.rglob("*"))
    status, out, err = Forked("train.py", arguments).finish()
    assert status == 0, out + err


def stop(number: int, folder: Path, rng) -> None:
    """SIGTERM, as from a scheduler, and SIGINT, at random moments."""
    script, run = script_of(number), fresh(folder)
    process = Forked(script, command(script, folder, run))
    if process.runs_after(moment(rng, script, folder)):
        os.kill(process.process.pid, (signal.SIGTERM, signal.SIGINT)[number // 2 % 2])
    status, out, err = process.finish()
    assert_last_is_whole(run)
    if run.exists():  # before, it may have been importing
        assert status in (0, 130), out + err
        assert "Traceback" not in err, err
        said = f"--resume {run}" in out or "before training began" in err
        assert said or status == 0, out + err
    resume(script, folder, run)


def damaged(content: bytes, rng) -> bytes:
    """A checkpoint's bytes, cut short or with a wrong bit, anywhere or at the end, where the zip's directory is."""
    data = bytearray(content)
    place = int(rng.choice([rng.integers(len(data)), len(data) - rng.integers(1, 4000)]))
    if rng.random() < 0.3:
        del data[place:]
    else:
        data[place] ^= 1 << int(rng.integers(8))
    return bytes(data)


def corrupt(number: int, folder: Path, rng) -> None:
    """A damaged last.pt: never taken for whole, and a line that says what to do. 20 are loaded for each one resumed."""
    script, run = script_of(number), fresh(folder)
    shutil.copytree(whole(script, folder), run)
    last = run / "last.pt" if script == "train.py" else run / "seed-0" / "last.pt"
    (last.parent / "result.json").unlink(missing_ok=True)
    intact, content = checkpoint.load(last), last.read_bytes()
    for _ in range(20):
        last.write_bytes(damaged(content, rng))
        with suppress(checkpoint.CheckpointError):
            assert not different(checkpoint.load(last), intact)
    last.write_bytes(content[: len(content) // 2])
    result = Forked(script, command(script, folder, run)).finish()
    assert_line(script, *result, str(last), "put back a copy, or")
    last.write_bytes(content)
    resume(script, folder, run)


def store_cut(number: int, folder: Path, rng) -> None:
    """The token store that a training reads is cut short."""
    run, store = fresh(folder), fresh(folder, "store-cut")
    seconds = moment(rng, "train.py", folder)
    shutil.copytree(data_of(folder) / "store", store)
    words, content = store / "words.bin", (store / "words.bin").read_bytes()
    process = Forked("train.py", command("train.py", folder, run, store))
    if process.runs_after(seconds):
        os.truncate(words, int(rng.integers(0, len(content))))
    status, out, err = process.finish()
    if status:
        assert_line("train.py", status, out, err, str(words))
    assert_last_is_whole(run)
    words.write_bytes(content)
    resume("train.py", folder, run, store)


FAULTS = {f.__name__: f for f in (kill_in_write, full_disk, full_disk_store, stop, corrupt, store_cut)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data and the uninterrupted runs of all faults."""
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize(
    ("name", "rounds"),
    [(name, 1) for name in ("kill_in_write", "full_disk", "corrupt", "store_cut")]
    + [pytest.param(name, 12, marks=pytest.mark.slow) for name in FAULTS],
)
def test_survives(name, rounds, folder):
    rng = np.random.default_rng(rounds)
    for number in range(rounds):
        FAULTS[name](number, folder, rng)
