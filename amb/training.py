"""What train.py and finetune.py do alike around their losses: the run folder, its state, batches, interruption."""

import argparse
import itertools
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from amb import checkpoint, parallel, tokenizer
from amb.config import PRESETS, Config, positive
from amb.files import naming

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def about(config: Config) -> dict:
    """The settings of a model and the fields of its words, as checkpoints hold them."""
    fields = tokenizer.load(config.encoding).fields
    return {"config": asdict(config), "fields": [[field.name, field.values, field.size] for field in fields]}


class Tally:
    """Sums over steps of the tensors that a loss function returns, kept on the device: no step waits for the host.

    `sums` has the names of the NamedTuple that was added.
    """

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, step: NamedTuple) -> None:
        for name, value in step._asdict().items():
            value = value.detach().double() if value.is_floating_point() else value
            self.sums[name] = self.sums.get(name, 0) + value
        self.steps += 1

    def mean(self, name: str) -> float:
        """Mean per step."""
        return self.sums[name].item() / self.steps

    def require_finite(self, run: Path) -> None:
        """Raise ValueError if the loss of a step was not finite: its sum then is not, either."""
        if not self.sums["loss"].isfinite():
            raise ValueError(
                f"the loss is not finite; {run}/last.pt holds an earlier step: "
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
        """Bytes written so far, flushed to the disk, so that a checkpoint may record this number."""
        with naming(self.path), open(self.path, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def rewind(self, size: int) -> None:
        """Remove what was written after `size` bytes. Raises ValueError if the file is shorter than that."""
        if parallel.leads():
            with naming(self.path), open(self.path, "ab") as file:
                if file.tell() < size:
                    raise ValueError(f"{self.path} is shorter than its checkpoint records: it was changed by hand")
                file.truncate(size)


@dataclass(kw_only=True)
class State:
    """All that a step changes: a run that resumes from what was saved goes on to the same bits."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    tally: Tally = field(default_factory=Tally)  # of this epoch
    epoch: int = 0  # finished epochs
    step: int = 0
    in_epoch: int = 0  # steps of this epoch
    stale: int = 0  # epochs in a row that improved neither validation loss nor accuracy
    lowest_loss: float = math.inf
    highest_accuracy: float = -math.inf
    best: tuple[float, ...] = ()  # `end_epoch`'s order of the best epoch
    best_epoch: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)  # what else changes, saved under these names

    COUNTERS = "epoch", "step", "in_epoch", "stale", "lowest_loss", "highest_accuracy", "best", "best_epoch"

    device = property(lambda self: next(self.model.parameters()).device)

    def save(self, run: Path, about: dict, metrics: MetricsFile, name: str = "last.pt") -> None:
        """Write run/NAME: the weights, which `about` describes, and in last.pt all that the training goes on from."""
        if parallel.leads():
            content = about | {"model": self.model.state_dict()}
            if name == "last.pt":
                content |= {"optimizer": self.optimizer.state_dict(), "tally": dict(vars(self.tally)), **self.tensors}
                content |= {"progress": {name: getattr(self, name) for name in self.COUNTERS}}
                content |= {"metrics_bytes": metrics.size()}
            checkpoint.save(run / name, content)

    def resume(self, run: Path, metrics: MetricsFile, otherwise: str) -> None:
        """Go on from run/last.pt.

        Raises CheckpointError if it is of another model, and, adding what to do `otherwise`, if it is damaged or of
        another version.
        """
        path = run / "last.pt"
        try:
            saved = checkpoint.load(path, self.device)
            if set(saved.get("progress", ())) != set(self.COUNTERS):
                raise checkpoint.CheckpointError(f"{path} holds no training that this version can go on with")
        except checkpoint.CheckpointError as error:
            raise checkpoint.CheckpointError(f"{error}; {otherwise}") from None
        checkpoint.load_weights(self.model, saved["model"], path)
        self.optimizer.load_state_dict(saved["optimizer"])
        vars(self.tally).update(saved["tally"])
        vars(self).update(saved["progress"], tensors={name: saved[name] for name in self.tensors})
        metrics.rewind(saved["metrics_bytes"])

    def count_step(self, loss: NamedTuple) -> None:
        self.tally.add(loss)
        self.step, self.in_epoch = self.step + 1, self.in_epoch + 1

    def end_epoch(self, loss: float, accuracy: float, order: tuple[float, ...]) -> bool:
        """Count an epoch with this validation; return whether it is the best so far, the highest in `order`."""
        improved = loss < self.lowest_loss or accuracy > self.highest_accuracy
        self.stale = 0 if improved else self.stale + 1
        self.lowest_loss = min(loss, self.lowest_loss)
        self.highest_accuracy = max(accuracy, self.highest_accuracy)
        self.epoch, self.in_epoch, self.tally = self.epoch + 1, 0, Tally()
        better = order > self.best
        if better:
            self.best, self.best_epoch = order, self.epoch
        return better


class Interrupts:
    """In a `with` block, Ctrl-C and SIGTERM wait for the next `pause()`, which raises `parallel.Interrupted`.

    If one of several processes catches a signal, all of them stop, at the same `pause()`. A signal after the last
    `pause()` is raised again at the end of the block. An OSError or StoreError becomes a ValueError that also says how
    to go on.
    """

    def __init__(self, run: Path):
        self.run, self.caught = run, []

    def __enter__(self) -> "Interrupts":
        self.previous = [signal.signal(number, lambda number, _: self.caught.append(number)) for number in SIGNALS]
        return self

    def pause(self) -> None:
        if parallel.any_of(bool(self.caught)):
            raise parallel.Interrupted(self.run)

    def __exit__(self, _, error: BaseException | None, __) -> None:
        for number, handler in zip(SIGNALS, self.previous, strict=True):
            signal.signal(number, handler)
        if isinstance(error, OSError | tokenizer.StoreError):
            raise ValueError(f"{error}; when that is mended, go on with --resume {self.run}") from None
        if self.caught and not isinstance(error, parallel.Interrupted):
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


def progress_bar(total: int, done: int, name: str | None = None) -> tqdm:
    """A bar over steps, which also says how long the rest will take. Off a terminal: a line every half minute."""
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(
        total=total, initial=done, desc=name, unit="step", dynamic_ncols=True, smoothing=0.05, mininterval=interval,
        disable=not parallel.leads(),
    )  # fmt: skip


def open_device(name: str, dtype: torch.dtype = torch.float64) -> torch.device:
    """The device of that name; "cuda" is the GPU of this process.

    Raises ValueError, in one line, without it, or if it lacks the dtype: training sums in float64, mps has none.
    """
    if name == "cuda" and parallel.size > 1:
        name = f"cuda:{parallel.local_rank}"
    try:
        torch.zeros(1, device=name, dtype=dtype)
    except (RuntimeError, AssertionError, TypeError):  # what torch raises without the device, its driver, the dtype
        number = str(dtype).removeprefix("torch.")
        raise ValueError(f"--device {name}: no such device here, or it has no {number}; try --device cpu") from None
    device = torch.device(name)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def run_parser(description: str, example: str) -> argparse.ArgumentParser:
    """A parser with the flags of any training, whose help ends with an example."""
    parser = argparse.ArgumentParser(description=description, epilog=f"Example: {example}")
    add = parser.add_argument
    add("--out", type=Path, metavar="RUN", help="folder of the new run (default: a new one in runs/)")
    add("--resume", type=Path, metavar="RUN", help="continue the run in this folder")
    add("--config", choices=PRESETS, help="preset of the model (default: small)")
    add("--cache", type=Path, default=Path("runs/cache"), help="where tokenized folders are kept")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 …")
    add("--save-every", type=positive, default=200, metavar="STEPS", help="steps between checkpoints")
    return parser


@contextmanager
def saved_run(args: argparse.Namespace, may_change: tuple[str, ...]) -> Iterator[dict]:
    """The content of run.json in the run to resume.

    Raises ValueError, in one line, if it is no run, if the block cannot use it, or if the command line gives a flag
    that a resumed run may not change.
    """
    for name, value in vars(args).items():
        if value not in (None, False) and name not in may_change:
            raise ValueError(f"--resume takes its settings from the run: drop --{name.replace('_', '-')}")
    try:
        yield json.loads((args.resume / "run.json").read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{args.resume} is not a run folder: its run.json cannot be read") from None
    except (ValueError, KeyError, TypeError) as error:
        error = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{args.resume} cannot be resumed with this run.json and these flags: {error}") from None


def new_run(out: Path | None, name: str) -> Path:
    """The folder of a new run: `out`, or the first of runs/NAME, runs/NAME-2 … that does not exist.

    Raises ValueError if `out` holds a run.
    """
    if out and (out / "run.json").exists():
        raise ValueError(f"{out} holds a run: continue it with --resume {out}, or choose another --out")
    numbered = (Path("runs", f"{name}-{number}" if number > 1 else name) for number in itertools.count(1))
    return out or next(path for path in numbered if not path.exists())
