"""What a run reports: sums kept on the device over many steps, and a file of JSON lines that a resumed run rewinds."""

import json
import os
from pathlib import Path

import torch

from amb import parallel
from amb.files import naming
from amb.objective import StepLoss


class Tally:
    """Sums over steps, kept on the device so that no step waits for the host.

    `losses` [3]: loss, its recovery and masker parts; `correct_selected`, `correct_valid` [F] hits; `selected`,
    `valid` notes counted; `steps`; `first_bad` the first step (from 0) whose loss was not finite.
    """

    def __init__(self, fields: int, device: torch.device):
        self.losses = torch.zeros(3, dtype=torch.float64, device=device)
        self.correct_selected, self.correct_valid = torch.zeros(2, fields, dtype=torch.int64, device=device)
        self.selected, self.valid, self.steps = torch.zeros(3, dtype=torch.int64, device=device)
        self.first_bad = torch.full((), 2**62, device=device)

    def add(self, step: StepLoss) -> None:
        losses = torch.stack([step.loss.detach(), step.recovery, step.masker]).double()
        self.first_bad = torch.where(losses.isfinite().all(), self.first_bad, self.first_bad.minimum(self.steps))
        self.losses = self.losses + losses
        for name in ("correct_selected", "correct_valid", "selected", "valid"):
            setattr(self, name, getattr(self, name) + getattr(step, name))
        self.steps = self.steps + 1

    def require_finite(self, step: int, run: Path) -> None:
        """Raise ValueError if a loss was not finite; `step` is how many steps the run has taken."""
        if self.first_bad < self.steps:
            bad = step - int(self.steps - self.first_bad) + 1
            raise ValueError(
                f"the loss of step {bad:,} is not finite; {run}/last.pt holds an earlier step: "
                f"go back to it with --resume {run}, or start anew with a lower --lr"
            )

    def loss(self) -> float:
        """Mean loss per step."""
        return (self.losses[0] / self.steps).item()

    def accuracy(self) -> float:
        """Share of the selected notes recovered, mean over fields."""
        return (self.correct_selected / self.selected.clamp(min=1)).mean().item()

    def summary(self, encoding) -> dict:
        """Mean losses, and accuracy per field over the selected notes (`masked`) and over all but PAD (`all`)."""
        names = [field.name for field in encoding.fields]
        masked = (self.correct_selected / self.selected.clamp(min=1)).tolist()
        every = (self.correct_valid / self.valid.clamp(min=1)).tolist()
        losses = (self.losses / self.steps.clamp(min=1)).tolist()
        return {
            **dict(zip(("loss", "recovery", "masker"), losses, strict=True)),
            "accuracy": self.accuracy(),
            "masked": dict(zip(names, masked, strict=True)),
            "all": dict(zip(names, every, strict=True)),
        }

    def state(self) -> dict:
        return dict(vars(self))

    def load(self, state: dict) -> None:
        vars(self).update(state)


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
        """Bytes written so far, flushed to the disk: what a checkpoint remembers must outlive the machine too."""
        if not self.path.exists():
            return 0
        with naming(self.path), open(self.path, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def rewind(self, size: int) -> None:
        """Forget what was written after `size` bytes. Raises ValueError if the file is shorter than that."""
        written = self.path.stat().st_size if self.path.exists() else 0
        if written < size:
            raise ValueError(f"{self.path} is shorter than its checkpoint says: it was changed by hand")
        if size < written and parallel.leads():
            with naming(self.path), open(self.path, "r+b") as file:
                file.truncate(size)


def read_metrics(path: Path) -> dict[str, list[dict]]:
    """All lines of a metrics file by kind: {"step": [...], "epoch": [...]}."""
    kinds = {"step": [], "epoch": []}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        kinds[entry["kind"]].append(entry)
    return kinds
