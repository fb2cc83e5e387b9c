"""What both scripts need around a training loop: the run's folder and device, Ctrl-C, the learning rate."""

import json
import math
import signal
from pathlib import Path

import torch

from amb import parallel
from amb.files import writing

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, noticed at a point where the state is whole."""


class Interruptible:
    """Between `start()` and `stop()`, Ctrl-C and SIGTERM wait for the next `pause()`, which raises Interrupted.

    Of several processes, one that caught a signal stops all of them, at the same `pause()`. A signal that came after
    the last `pause()` is sent once more by `stop()`, to whatever comes next.
    """

    def start(self) -> None:
        self.caught, self.told = [], False
        self.previous = [signal.signal(number, lambda number, _: self.caught.append(number)) for number in SIGNALS]

    def pause(self) -> None:
        if parallel.any_of(bool(self.caught)):
            self.told = True
            raise Interrupted

    def stop(self) -> None:
        for number, handler in zip(SIGNALS, self.previous, strict=True):
            signal.signal(number, handler)
        if self.caught and not self.told:
            signal.raise_signal(self.caught[0])


def refuse_settings(args, allowed: tuple[str, ...]) -> None:
    """Raise ValueError if the command line gives more than `allowed` beside --resume: the rest comes with the run."""
    given = [name for name, value in vars(args).items() if value not in (None, False) and name not in allowed]
    if given:
        raise ValueError(f"--resume takes its settings from the run: drop --{given[0].replace('_', '-')}")


def open_device(name: str) -> torch.device:
    """The device of that name, "cuda" being each process's own GPU. Raises ValueError, in one line, without it."""
    if name == "cuda" and parallel.size > 1:
        name = f"cuda:{parallel.local_rank}"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError):  # what torch raises where it lacks the device, or its driver
        raise ValueError(f"--device {name}: no such device here; try --device cpu") from None
    device = torch.device(name)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def unused(path: Path) -> Path:
    """`path`, or the first of path-2, path-3 … that does not exist."""
    numbered = (path.with_name(f"{path.name}-{n}") for n in range(2, 10_000))
    return next(candidate for candidate in (path, *numbered) if not candidate.exists())


def refuse_used(run: Path) -> None:
    """Raise ValueError if the folder already holds a run."""
    if (run / "run.json").exists():
        raise ValueError(f"{run} holds a run: continue it with --resume {run}, or choose another --out")


def write_json(path: Path, content: dict) -> None:
    """Write it whole or not at all."""
    with writing(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def learning_rate(config, step: int, total: int) -> float:
    """Linear warm-up, then constant, or a cosine that reaches 0 with the last of `total` steps.

    `config` has lr, warmup (steps) and schedule.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, total - config.warmup)))
