"""Break trainings on purpose, many times, and see what is lost and what is said.

    python tests/faults.py [--rounds 20] [--only kill full_disk …] [--out FILE.json]

Each fault is a function (rounds, folder, rng) -> Counts that starts trainings of the `tiny` preset, breaks them at
random moments and goes on with --resume. A round is survived if the checkpoint was whole all the time, the program said
in one line what had happened (kill -9 aside), and the run ended equal to an uninterrupted one: weights, optimiser,
pictures and metrics.jsonl (but speed) to the last bit, and no file more. `folder` keeps the data and the uninterrupted
runs.

Processes are forked from one that has imported torch and run the script as `python train.py` does: a training takes
about a second. Where a process's first and last moments matter, it is a `python train.py`.
"""

import argparse
import json
import multiprocessing
import os
import pickle
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # of multiprocessing, when a process is killed

import numpy as np  # noqa: E402
import torch  # noqa: E402

from amb import (  # noqa: E402
    checkpoint,
    demo,
    tokenizer,
)

PRELOADED = ["torch._dynamo", "matplotlib.pyplot", "amb.plots", "amb.model", "amb.baselines", "tokenizer"]
TINY = ["--config", "tiny", "--device", "cpu", "--save-every", "1"]
SHORT = ["--notes", "32", "--epoch-size", "12", "--batch", "4", "--epochs", "2", "--valid-size", "4"]
TRAIN = [*TINY, *SHORT, "--reach", "32", "--log-every", "1"]
FINETUNE = [*TINY, *SHORT, "--task", "velocity", "--mask", "0.12"]
LARGEST = 3_000_000  # bytes, a little more than any file of these runs
TMPFS = 12 << 20


class Lost(Exception):
    """Something did not survive; the message says what."""


class Skipped(Exception):
    """The fault cannot be made on this machine."""


@dataclass
class Counts:
    tried: int = 0
    survived: int = 0
    seen: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def repeat(rounds: int, one_round) -> Counts:
    """`one_round(number, seen)` so many times; it raises Lost, and counts in `seen` what happened."""
    counts = Counts()
    for number in range(rounds):
        counts.tried += 1
        try:
            one_round(number, counts.seen)
            counts.survived += 1
        except Lost as lost:
            counts.failures.append(f"round {number}: {lost}")
    return counts


# processes


class Forked:
    """A script in a process forked from one that has imported torch; `before()` is called in it first."""

    def __init__(self, script: str, arguments: list, before=None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        self.streams = [read for read, _ in pipes]
        inside = [write for _, write in pipes]
        self.process = context.Process(target=_inside, args=(script, [*map(str, arguments)], *inside, before))
        self.process.start()
        for write in inside:
            write.close()
        self.pid = self.process.pid

    def wait(self, seconds: float) -> int | None:
        """The status, negative for a signal, or None if it still runs."""
        self.process.join(seconds)
        return self.process.exitcode

    def output(self) -> tuple[str, str]:
        texts = []
        for stream in self.streams:
            with open(stream.fileno(), "rb", closefd=False) as file:
                texts.append(file.read().decode())
            stream.close()
        return tuple(texts)


def _inside(script: str, arguments: list[str], out, err, before) -> None:
    for number, stream in ((1, out), (2, err)):
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.pop("TRITON_INTERPRET", None)
    sys.argv = [script, *arguments]
    if before:
        before()
    if script.endswith(".py"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


class Started:
    """`python train.py …`."""

    def __init__(self, script: str, arguments: list):
        self.files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=self.files[0], stderr=self.files[1])
        self.pid = self.process.pid

    def wait(self, seconds: float) -> int | None:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def output(self) -> tuple[str, str]:
        texts = []
        for file in self.files:
            with file:
                file.seek(0)
                texts.append(file.read())
        return tuple(texts)


def finish(process, seconds: float = 300) -> tuple[int, str, str]:
    """Status and output of a process that ends by itself."""
    status = process.wait(seconds)
    if status is None:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        raise Lost(f"still running after {seconds:.0f} s: {process.output()}")
    return status, *process.output()


def expect_line(script: str, status: int, out: str, err: str, *words: str) -> str:
    """The one line on stderr with which a script ends with status 2; it has to contain all words."""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith(f"{script}: ")]
    if status != 2 or "Traceback" in err or len(lines) != 1 or not err.rstrip().endswith(lines[0]):
        raise Lost(f"status {status} and not one line: {out[-300:]!r} {err[-1500:]!r}")
    if not all(word in lines[0] for word in words):
        raise Lost(f"{words} not in: {lines[0]}")
    return lines[0]


# what is done in the process, before the script


def no_pictures() -> None:
    sys.modules["matplotlib"] = None


def die_at(count: int, below: str, pictures: bool) -> None:
    """kill -9 itself just before the count-th time that it opens for writing, renames or removes a file `below`."""
    if not pictures:
        no_pictures()
    left = [count]

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.rename", "os.remove", "os.truncate")) and below in str(arguments[0]):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def die_at_limit() -> None:
    """Let the kernel kill it at the very byte with which a file would pass RLIMIT_FSIZE."""
    no_pictures()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


# runs


def material(folder: Path) -> Path:
    """The folder, with its demo pieces as MIDI and as a token store."""
    if not (folder / "store").exists():
        demo.write_corpus(folder / "midi", pieces=16)
        tokenizer.build_store([folder / "midi"], folder / "store", workers=1, progress=False)
    return folder


def command(script: str, folder: Path, run: Path, store: Path | None = None) -> list:
    """What starts a run, or goes on with it if there is something to go on with."""
    if (run / "run.json").exists():
        return ["--resume", run, *TINY[2:], *(["--log-every", "1"] if script == "train.py" else [])]
    if script == "train.py":
        return [*TRAIN, "--data", store or material(folder) / "store", "--out", run]
    return [*FINETUNE, "--data", material(folder) / "midi", "--cache", folder / "cache", "--out", run]


def whole(script: str, folder: Path) -> Path:
    """An uninterrupted run of a script. Its pictures come last, so that the time without them is known."""
    run, clock = material(folder) / f"whole-{script[:-3]}", folder / f"{script}.seconds"
    if not clock.exists():
        finish(Forked(script, ["--help"]))  # the process that others are forked from imports what it has to
        for before in (no_pictures, None):
            began = time.monotonic()
            status, out, err = finish(Forked(script, command(script, folder, run), before))
            if status:
                raise RuntimeError(f"{script} does not even run undisturbed: {out}{err}")
            if before:
                clock.write_text(str(time.monotonic() - began))
    return run


def moment(rng, script: str, folder: Path, before=None) -> float:
    """A random number of seconds in which such a process has most likely not ended."""
    whole(script, folder)
    return rng.uniform(0, float((folder / f"{script}.seconds").read_text()) * (1 if before else 2))


def fresh(folder: Path, name: str = "run") -> Path:
    shutil.rmtree(folder / name, ignore_errors=True)
    return folder / name


def check_last(run: Path, save_every: int = 1) -> None:
    """Raise Lost unless every last.pt is whole and no more than `save_every` reported steps are younger than it."""
    for path in run.rglob("last.pt"):
        try:
            saved = checkpoint.load(path)["progress"]["step"]
        except checkpoint.CheckpointError as error:
            raise Lost(str(error)) from None
        metrics = path.with_name("metrics.jsonl")
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
        reported = max((json.loads(line).get("step", 0) for line in lines), default=0)
        if reported > saved + save_every:
            raise Lost(f"{path} is of step {saved}, {reported} had been reported")


def read(path: Path):
    """A file's content, without what depends on the machine, the clock or the place."""
    if path.suffix == ".pt":
        return {key: value for key, value in checkpoint.load(path).items() if key != "metrics_bytes"}
    if path.suffix == ".jsonl":
        return [{k: v for k, v in json.loads(line).items() if k != "speed"} for line in path.open()]
    if path.suffix == ".npz":
        return {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        return {key: value for key, value in content.items() if key not in ("data", "paths")}
    return path.read_bytes()


def different(a, b, where: str = "") -> str:
    """Where two contents differ, if only in a bit; "" if they do not."""
    if type(a) is not type(b):
        return f"{where}: {a!r:.40} {b!r:.40}"
    if isinstance(a, dict) and a.keys() == b.keys():
        return next(filter(None, (different(a[key], b[key], f"{where}/{key}") for key in a)), "")
    if isinstance(a, list | tuple) and len(a) == len(b):
        return different(dict(enumerate(a)), dict(enumerate(b)), where)
    same = a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return "" if same else f"{where}: {a!r:.40} {b!r:.40}"


def check_same(ours: Path, theirs: Path) -> None:
    """Raise Lost unless two runs are equal. Pictures may be missing in ours."""
    files, wanted = ({p.relative_to(run) for p in run.rglob("*") if p.is_file()} for run in (ours, theirs))
    if files - wanted or any(path.suffix != ".png" for path in wanted - files):
        raise Lost(f"files: {[*map(str, files ^ wanted)]}")
    for path in sorted(files):
        if where := different(read(ours / path), read(theirs / path)):
            raise Lost(f"not as in the uninterrupted run: {path}{where}")


def resume(script: str, folder: Path, run: Path, before=no_pictures, store: Path | None = None) -> None:
    """To the end, which must be that of the uninterrupted run."""
    status, out, err = finish(Forked(script, command(script, folder, run, store), before))
    if status or "Traceback" in err:
        raise Lost(f"resumed with status {status}: {out[-300:]!r} {err[-1500:]!r}")
    check_same(run, whole(script, folder))


def some_script(number: int) -> str:
    return "finetune.py" if number % 3 == 2 else "train.py"


def log_uniform(rng, low: int, high: int) -> int:
    return int(np.exp(rng.uniform(np.log(low), np.log(high))))


# the faults


def kill(rounds: int, folder: Path, rng) -> Counts:
    """kill -9 at random moments, several times in one run."""

    def one_round(number, seen):
        script = some_script(number)
        run, before = fresh(folder), None if number % 4 == 3 else no_pictures
        for _ in range(rng.integers(1, 4)):
            process = Forked(script, command(script, folder, run), before)
            if process.wait(moment(rng, script, folder, before)) is None:
                os.kill(process.pid, signal.SIGKILL)
                seen["killed"] += 1
            status, _, err = finish(process)
            if status not in (0, -signal.SIGKILL):
                raise Lost(f"status {status}: {err[-1500:]!r}")
            check_last(run)
        resume(script, folder, run, before)

    return repeat(rounds, one_round)


def kill_in_write(rounds: int, folder: Path, rng) -> Counts:
    """kill -9 just before a file is opened, renamed or removed, or at a random byte of a file being written."""

    def one_round(number, seen):
        script = some_script(number)
        run, pictures = fresh(folder), number % 4 == 3
        for turn in range(3):
            arguments = command(script, folder, run)
            if (number + turn) % 2:
                process = Forked(script, arguments, partial(die_at, int(rng.integers(1, 30)), str(run), pictures))
            else:
                process = Forked(script, arguments, die_at_limit)
                if process.wait(moment(rng, script, folder, no_pictures)) is None:
                    size = log_uniform(rng, 64, LARGEST)
                    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            status, _, err = finish(process)
            if status not in (0, -signal.SIGKILL, -signal.SIGXFSZ):
                raise Lost(f"status {status}: {err[-1500:]!r}")
            left = [path.name for path in run.rglob(".*")]
            seen["killed" if status else "ended first"] += 1
            seen.update(f"in {name[1:-5]}" for name in left)
            if len(left) > 2:
                raise Lost(f"temporary files accumulate: {left}")
            check_last(run)
        resume(script, folder, run, None if pictures else no_pictures)

    return repeat(rounds, one_round)


def full_disk(rounds: int, folder: Path, rng) -> Counts:
    """No room from a random moment on: files may not grow beyond some size or, where we may mount, a full tmpfs."""
    mounts = can_mount(folder)

    def one_round(number, seen):
        script = some_script(number)
        before = None if number % 4 == 3 else no_pictures
        with Tmpfs(fresh(folder, "disk")) if mounts and number % 2 else plain(fresh(folder, "disk")) as disk:
            run, ballast = disk / "run", disk / "ballast"
            arguments = command(script, folder, run)
            save_every = 100 if number % 4 >= 2 else 1
            arguments += ["--save-every", save_every]
            process = Forked(script, arguments, before)
            if process.wait(moment(rng, script, folder, before)) is None:
                size = log_uniform(rng, 64, LARGEST)
                if mounts and number % 2:
                    fill(ballast, int(rng.choice([0, size])))
                else:
                    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            status, out, err = finish(process)
            seen["it fitted" if status == 0 else "full"] += 1
            if status:
                line = expect_line(script, status, out, err)
                why = [reason for reason in ("No space left on device", "File too large") if reason in line]
                if str(run) not in line or not why:
                    raise Lost(f"not a file and a reason: {line}")
                seen[f"said of {line.split(' cannot')[0].split('/')[-1]}" if " cannot" in line else line] += 1
            if left := [path.name for path in run.rglob(".*")]:
                raise Lost(f"left: {left}")
            check_last(run, save_every)
            ballast.unlink(missing_ok=True)
            resume(script, folder, run, before)

    return repeat(rounds, one_round)


def full_disk_store(rounds: int, folder: Path, rng) -> Counts:
    """Files that may not grow beyond a random size, while MIDI is tokenized by itself, or for a training."""
    store = material(folder) / "store"
    largest = max(path.stat().st_size for path in store.iterdir())

    def one_round(number, seen):
        place, before = fresh(folder, "place"), partial(limit_files, log_uniform(rng, 16, largest))
        place.mkdir()
        if number % 2:
            script, target = "train.py", place / "cache"
            arguments = [*TRAIN, "--data", folder / "midi", "--cache", target, "--out", place / "run"]
        else:
            script, target = "tokenizer", place / "store"
            arguments = [folder / "midi", "--out", target, "--workers", 1 + number // 2 % 2]
        status, out, err = finish(Forked(script, arguments, before))
        seen["full" if status else "it fitted"] += 1
        speaker = "error" if script == "tokenizer" else script
        line = expect_line(speaker, status, out, err, str(target), "File too large")
        if left := [path.name for path in place.rglob("*") if path != target]:
            raise Lost(f"left after {line}: {left}")
        if script == "tokenizer":
            status, out, err = finish(Forked(script, arguments))
            files = [{path.name: path.read_bytes() for path in where.iterdir()} for where in (store, target)]
            if status or files[0] != files[1]:
                raise Lost(f"with room again, status {status}, or another store: {out}{err}")
        else:
            status, out, err = finish(Forked(script, arguments, no_pictures))
            if status:
                raise Lost(f"with room again, status {status}: {out}{err}")
            check_same(place / "run", whole(script, folder))

    return repeat(rounds, one_round)


def read_only(rounds: int, folder: Path, rng) -> Counts:
    """A run folder that cannot be written, from the start or from a random moment on."""
    mounts = can_mount(folder)
    if not mounts and os.geteuid() == 0:
        raise Skipped("root writes everywhere, and we may not mount")

    def one_round(number, seen):
        script = some_script(number)
        with Tmpfs(fresh(folder, "disk")) if mounts else plain(fresh(folder, "disk")) as disk:
            run = disk / "run"
            if number % 3 == 0:
                set_writable(disk, mounts, False)
            process = Forked(script, command(script, folder, run), no_pictures)
            if number % 3 and process.wait(moment(rng, script, folder, no_pictures)) is None:
                set_writable(disk, mounts, False)
            status, out, err = finish(process)
            seen["ended first" if status == 0 else "refused"] += 1
            if status:
                line = expect_line(script, status, out, err, str(run))
                if "Read-only file system" not in line and "Permission denied" not in line:
                    raise Lost(f"no reason: {line}")
            set_writable(disk, mounts, True)
            if left := [path.name for path in run.rglob(".*")]:
                seen.update(f"left {name}" for name in left)
            check_last(run)
            resume(script, folder, run)

    return repeat(rounds, one_round)


def stop(rounds: int, folder: Path, rng) -> Counts:
    """SIGTERM, as from a scheduler, and SIGINT, at random moments from a process's first to its last."""

    def one_round(number, seen):
        script, kind = some_script(number), (signal.SIGTERM, signal.SIGINT)[number // 2 % 2]
        run, before = fresh(folder), None if number % 4 == 3 else no_pictures
        if before:
            process, importing = Forked(script, command(script, folder, run), before), 0
        else:
            process, importing = Started(script, command(script, folder, run)), rng.uniform(0, 8)
        if process.wait(importing + moment(rng, script, folder, before)) is None:
            os.kill(process.pid, kind)
        status, out, err = finish(process)
        check_last(run)
        if status == 130 and "Traceback" not in err:
            saved = "interrupted at step" in out or "interrupted; saved" in out
            if saved and f"--resume {run}" not in out or not saved and "while no training" not in err:
                raise Lost(f"no line that says it: {out[-300:]!r} {err[-500:]!r}")
            seen["130, saved" if saved else "130, not training"] += 1
        elif status == 0 and "Traceback" not in err:
            seen["0, had finished"] += 1
        elif not run.exists():
            seen[f"{status}, while importing"] += 1
        else:
            raise Lost(f"status {status} after {kind.name}: {out[-300:]!r} {err[-1500:]!r}")
        resume(script, folder, run, before)

    return repeat(rounds, one_round)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)


def damaged(content: bytes, rng) -> tuple[str, bytes]:
    """A checkpoint's bytes, damaged in a random way."""
    data, place = bytearray(content), int(rng.integers(len(content)))
    kind = str(rng.choice(["a bit", "bytes", "truncated", "zeros", "moved", "at its end"]))
    if kind == "a bit":
        data[place] ^= 1 << int(rng.integers(8))
    elif kind == "bytes":
        for byte in rng.integers(len(data), size=20):
            data[byte] = int(rng.integers(256))
    elif kind == "truncated":
        del data[place:]
    elif kind == "zeros":
        data[place : place + 4096] = bytes(len(data[place : place + 4096]))
    elif kind == "moved":
        data[place:] = data[place:][::-1]
    else:
        data[-int(rng.integers(1, 4000))] ^= 1 << int(rng.integers(8))  # where the zip's directory is
    return kind, bytes(data)


def corrupt(rounds: int, folder: Path, rng) -> Counts:
    """A damaged last.pt: never taken for whole, and a line that says what to do. 40 are loaded for each one resumed."""

    def one_round(number, seen):
        script = some_script(number)
        run = fresh(folder)
        shutil.copytree(whole(script, folder), run)
        last = run / "last.pt" if script == "train.py" else run / "masked-0" / "last.pt"
        (last.parent / "result.json").unlink(missing_ok=True)
        intact, content = checkpoint.load(last), last.read_bytes()
        for _ in range(40):
            kind, data = damaged(content, rng)
            last.write_bytes(data)
            try:
                same = not different(checkpoint.load(last), intact)
            except checkpoint.CheckpointError as error:
                seen[f"{kind}: refused"] += 1
                if "\n" in str(error) or str(last) not in str(error):
                    raise Lost(f"not a line with the file's name: {error}") from None
            else:
                seen[f"{kind}: made no difference"] += 1
                if not same:
                    raise Lost(f"{kind}: damaged and taken for whole")
        kind = ("random", "empty", "pickle", "pickle in a zip", "best.pt")[number % 5]
        if kind == "random":
            last.write_bytes(content[: len(content) // 2] + rng.bytes(8) + content[len(content) // 2 + 8 :])
        elif kind == "empty":
            last.write_bytes(b"")
        elif kind == "pickle":
            last.write_bytes(pickle.dumps(Hostile()))
        elif kind == "pickle in a zip":
            torch.save({"format": checkpoint.FORMAT, "version": 1, "progress": Hostile()}, last)
        else:
            shutil.copy(last.with_name("best.pt"), last)
        status, out, err = finish(Forked(script, command(script, folder, run), no_pictures))
        expect_line(script, status, out, err, str(last), "put back a copy, or")
        if Path("hostile").exists():
            raise Lost("a hostile checkpoint was run")
        seen[f"{kind}: refused with advice"] += 1
        last.write_bytes(content)
        resume(script, folder, run)

    return repeat(rounds, one_round)


def store_cut(rounds: int, folder: Path, rng) -> Counts:
    """The token store that a training reads is cut short, or replaced by a shorter one."""

    def one_round(number, seen):
        run, store = fresh(folder), fresh(folder, "store-cut")
        seconds = moment(rng, "train.py", folder, no_pictures)
        shutil.copytree(material(folder) / "store", store)
        words, content = store / "words.bin", (store / "words.bin").read_bytes()
        process = Forked("train.py", command("train.py", folder, run, store), no_pictures)
        if process.wait(seconds) is None:
            size = int(rng.integers(0, len(content)))
            if number % 3 == 2:
                (store / "shorter").write_bytes(content[:size])
                os.replace(store / "shorter", words)
            else:
                os.truncate(words, size)
        status, out, err = finish(process)
        seen[f"{'replaced' if number % 3 == 2 else 'cut'}: {'refused' if status else 'ended'}"] += 1
        if status:
            expect_line("train.py", status, out, err, str(words))
        check_last(run)
        words.write_bytes(content)
        resume("train.py", folder, run, store=store)

    return repeat(rounds, one_round)


# disks


class plain:
    """A folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> Path:
        self.folder.mkdir()
        return self.folder

    def __exit__(self, *_) -> None:
        shutil.rmtree(self.folder)


class Tmpfs(plain):
    """A small file system of its own."""

    def __enter__(self) -> Path:
        super().__enter__()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS}", "tmpfs", self.folder], check=True)
        return self.folder

    def __exit__(self, *_) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=True)
        super().__exit__()


def can_mount(folder: Path) -> bool:
    try:
        with Tmpfs(fresh(folder, "disk")):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def fill(ballast: Path, free: int) -> None:
    """Leave so many bytes on the ballast's disk."""
    with open(ballast, "wb", buffering=0) as file:
        while (room := os.statvfs(ballast.parent)).f_bavail * room.f_frsize > free:
            try:
                file.write(bytes(min(1 << 16, room.f_bavail * room.f_frsize - free)))
            except OSError:
                return


def set_writable(disk: Path, mounted: bool, writable: bool) -> None:
    """Let what is below a folder be written, or not."""
    if not mounted:
        for path in (disk, *disk.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200 if writable else path.stat().st_mode & ~0o222)
        return
    mode = "rw" if writable else "ro"
    for _ in range(1000):  # busy while a file is open for writing
        if not subprocess.run(["mount", "-o", f"remount,{mode}", disk], capture_output=True).returncode:
            return
    raise Lost(f"{disk} cannot be made {mode}")


FAULTS = {
    function.__name__: function
    for function in (kill, kill_in_write, full_disk, full_disk_store, read_only, stop, corrupt, store_cut)
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Break trainings on purpose.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="counts as JSON")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        for name in options.only:
            began = time.monotonic()
            try:
                counts = FAULTS[name](options.rounds, Path(folder), np.random.default_rng(options.seed))
            except Skipped as reason:
                print(f"{name}: skipped, {reason}", flush=True)
                continue
            results[name] = vars(counts) | {"seconds": round(time.monotonic() - began)}
            print(f"{name}: {counts.survived} of {counts.tried}", *counts.failures, sep="\n  ", flush=True)
            if options.out:
                options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{'fault':<17}{'tried':>6}{'survived':>10}{'seconds':>9}  seen")
    for name, counts in results.items():
        seen = ", ".join(f"{what} {count}" for what, count in sorted(counts["seen"].items()))
        print(f"{name:<17}{counts['tried']:>6}{counts['survived']:>10}{counts['seconds']:>9}  {seen}")
    return int(any(counts["failures"] for counts in results.values()))


if __name__ == "__main__":
    sys.exit(main())
