"""What train.py and finetune.py do alike around their losses: the run folder, its state, batches, interruption."""

import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from amb import checkpoint, parallel
from amb.files import naming

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Tally:
    """Sums over steps of the tensors that a loss function returns, kept on the device: no step waits for the host.

    `sums` has the names of the NamedTuple that was added; `first_bad` is the first step (from 0) whose `loss` was not
    finite.
    """

    def __init__(self, device: torch.device):
        self.sums: dict[str, Tensor] = {}
        self.steps, self.first_bad = 0, torch.full((), 2**62, device=device)

    def add(self, step: NamedTuple) -> None:
        finite = step.loss.isfinite()
        self.first_bad = torch.where(finite, self.first_bad, self.first_bad.clamp(max=self.steps))
        for name, value in step._asdict().items():
            value = value.detach().double() if value.is_floating_point() else value
            self.sums[name] = self.sums[name] + value if self.steps else value
        self.steps += 1

    def mean(self, name: str) -> float:
        """Mean per step."""
        return self.sums[name].item() / self.steps

    def require_finite(self, step: int, run: Path) -> None:
        """Raise ValueError if a loss was not finite; `step` is how many steps the run has taken."""
        if self.first_bad < self.steps:
            bad = step - (self.steps - int(self.first_bad)) + 1
            raise ValueError(
                f"the loss of step {bad:,} is not finite; {run}/last.pt holds an earlier step: "
                f"go back to it with --resume, or start anew with a lower --lr"
            )


class MetricsFile:
    """JSON lines, one per report. Only the key `speed` depends on the machine; all else repeats with the seed.

    Of several processes, only the leader writes.
    """

    def __init__(self, path: Path):
        self.path = path

    def write(self, line: dict) -> None:
        if parallel.leads():
            with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def size(self) -> int:
        """Bytes written so far, flushed to the disk: the checkpoint that records this number is flushed, too."""
        if not self.path.exists():
            return 0
        with naming(self.path), open(self.path, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def rewind(self, size: int) -> None:
        """Remove what was written after `size` bytes. Raises ValueError if the file is shorter than that."""
        written = self.path.stat().st_size if self.path.exists() else 0
        if written < size:
            raise ValueError(f"{self.path} is shorter than its checkpoint says: it was changed by hand")
        if size < written and parallel.leads():
            with naming(self.path), open(self.path, "r+b") as file:
                file.truncate(size)


@dataclass(kw_only=True)
class State:
    """All that a step changes: after `load` of what `saved` returned, a run goes on to the same bits."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    tally: Tally  # of this epoch
    epoch: int = 0  # finished epochs
    step: int = 0
    in_epoch: int = 0  # steps of this epoch
    stale: int = 0  # epochs in a row that improved neither validation loss nor accuracy
    lowest_loss: float = math.inf
    highest_accuracy: float = -math.inf
    best: tuple[float, ...] = ()  # `end_epoch`'s order of the best epoch
    best_epoch: int = 0

    COUNTERS = "epoch", "step", "in_epoch", "stale", "lowest_loss", "highest_accuracy", "best", "best_epoch"

    def saved(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "tally": dict(vars(self.tally)),
            "progress": {name: getattr(self, name) for name in self.COUNTERS},
        }

    def load(self, saved: dict, path: Path) -> None:
        """Raises CheckpointError, naming `path`, if this was saved of another model or by another version."""
        if set(saved["progress"]) != set(self.COUNTERS):
            raise checkpoint.CheckpointError(f"{path} is of another version of this program: it cannot be resumed")
        checkpoint.load_weights(self.model, saved["model"], path)
        self.optimizer.load_state_dict(saved["optimizer"])
        vars(self.tally).update(saved["tally"])
        vars(self).update(saved["progress"])

    def end_epoch(self, loss: float, accuracy: float, order: tuple[float, ...]) -> bool:
        """Count an epoch with this validation; return whether it is the best so far, the highest in `order`."""
        improved = loss < self.lowest_loss or accuracy > self.highest_accuracy
        self.stale = 0 if improved else self.stale + 1
        self.lowest_loss = min(loss, self.lowest_loss)
        self.highest_accuracy = max(accuracy, self.highest_accuracy)
        self.epoch, self.in_epoch, self.tally = self.epoch + 1, 0, Tally(self.tally.first_bad.device)
        better = order > self.best
        if better:
            self.best, self.best_epoch = order, self.epoch
        return better


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, noticed at a point where the state is whole."""


class Interrupts:
    """In a `with` block, Ctrl-C and SIGTERM wait for the next `pause()`, which raises Interrupted.

    If one of several processes catches a signal, all of them stop, at the same `pause()`. A signal after the last
    `pause()` is raised again at the end of the block.
    """

    def __enter__(self) -> "Interrupts":
        self.caught, self.stopping = [], False
        self.previous = [signal.signal(number, lambda number, _: self.caught.append(number)) for number in SIGNALS]
        return self

    def pause(self) -> None:
        if parallel.any_of(bool(self.caught)):
            self.stopping = True
            raise Interrupted

    def __exit__(self, *_) -> None:
        for number, handler in zip(SIGNALS, self.previous, strict=True):
            signal.signal(number, handler)
        if self.caught and not self.stopping:
            signal.raise_signal(self.caught[0])


def batches(
    read: Callable[[np.ndarray], tuple[np.ndarray, ...]],
    numbers: np.ndarray,
    size: int,
    device: torch.device,
    interrupts: Interrupts,
) -> Iterator[tuple]:
    """This process's rows of each batch of `size` sequences: the first row's place in the batch, their numbers (array
    [b]), and what `read` returns for these numbers, on the device."""
    for start in range(0, len(numbers), size):
        interrupts.pause()
        batch = numbers[start : start + size]
        rows = parallel.share(len(batch))
        yield rows.start, batch[rows], *to_device(device, *read(batch[rows]))


def to_device(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """The arrays as tensors on the device; the host does not wait for a copy to a GPU."""
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    if device.type == "cuda":
        tensors = [tensor.pin_memory() for tensor in tensors]
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


def learning_rate(config, step: int, total: int) -> float:
    """Linear warm-up, then constant, or a cosine that reaches 0 with the last of `total` steps.

    `config` has lr, warmup (steps) and schedule.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, total - config.warmup)))


class ProgressBar(tqdm):
    """A bar over steps that also prints once how long the rest will take. Off a terminal: a line every half minute."""

    def __init__(self, total: int, done: int, name: str | None = None):
        self.first, self.estimated = None, False
        super().__init__(
            total=total,
            initial=done,
            desc=name,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.05,
            mininterval=0.2 if sys.stderr.isatty() else 30,
            disable=not parallel.leads(),
        )

    def update(self, n: int = 1) -> None:
        super().update(n)
        if self.disable or self.estimated:
            return
        if self.first is None:  # the first step is slower: memory is allocated, kernels are compiled
            self.first = self.n, self.format_dict["elapsed"]
        done, seconds = self.n - self.first[0], self.format_dict["elapsed"] - self.first[1]
        if seconds > 5:
            self.estimated = True
            left = seconds / done * (self.total - self.n)
            self.write(f"about {duration(left)} for the {self.total - self.n:,} steps that are left")


def duration(seconds: float) -> str:
    """`40 s`, `12 min` or `3 h 05 min`."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def open_device(name: str, dtype: torch.dtype = torch.float64) -> torch.device:
    """The device of that name, "cuda" being each process's own GPU.

    Raises ValueError, in one line, without it, or if it lacks the dtype: training sums in float64, mps has none.
    """
    if name == "cuda" and parallel.size > 1:
        name = f"cuda:{parallel.local_rank}"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError):  # what torch raises where it lacks the device, or its driver
        raise ValueError(f"--device {name}: no such device here; try --device cpu") from None
    try:
        torch.zeros(1, device=name, dtype=dtype)
    except (RuntimeError, TypeError):
        raise ValueError(f"--device {name} has no {str(dtype).removeprefix('torch.')}; try --device cpu") from None
    device = torch.device(name)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def saved_run(args, machine_flags: tuple[str, ...]) -> dict:
    """What run.json of the run to resume holds. Raises ValueError, in one line, if it is no run, or if the command
    line gives a flag beside `machine_flags`, which do not change the result: settings come with the run."""
    values = vars(args).items()
    for name in (name for name, value in values if value not in (None, False) and name not in machine_flags):
        raise ValueError(f"--resume takes its settings from the run: drop --{name.replace('_', '-')}")
    try:
        return json.loads((args.resume / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise not_a_run(args.resume) from None


def not_a_run(folder: Path) -> ValueError:
    return ValueError(f"{folder} is not a run folder: it has no usable run.json")


def new_run(out: Path | None, name: str) -> Path:
    """The folder of a new run: `out`, or the first of runs/NAME, runs/NAME-2 … that does not exist.

    Raises ValueError if `out` holds a run.
    """
    if out and (out / "run.json").exists():
        raise ValueError(f"{out} holds a run: continue it with --resume {out}, or choose another --out")
    numbered = (Path("runs") / (f"{name}-{number}" if number > 1 else name) for number in range(1, 10_000))
    return out or next(path for path in numbered if not path.exists())
