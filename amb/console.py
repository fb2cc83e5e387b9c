"""What the commands of `amb` print: progress, rows of tables, names that fit on a line. Results go to stdout only."""

import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm


class Progress:
    """A bar over files on stderr (if that is a terminal), results on stdout, and what was skipped."""

    def __init__(self, files: int, device):
        self.bar = tqdm(total=files, unit="file", dynamic_ncols=True, disable=None)
        self.device, self.notes, self.pieces, self.skipped = device, 0, 0, 0
        self.began = time.perf_counter()

    def write(self, line: str) -> None:
        self.bar.write(line, file=sys.stdout)

    def done(self, notes: int) -> None:
        self.pieces += 1
        self.notes += notes
        self.bar.update()

    def skip(self, file: str, reason: str) -> None:
        self.skipped += 1
        self.bar.write(f"skipped {shown(file)}: {reason}", file=sys.stderr)
        self.bar.update()

    def finish(self, did: str) -> int:
        """Say how fast it went; the exit status, 2 where no file was usable."""
        self.bar.close()
        took = time.perf_counter() - self.began
        skipped = f", {self.skipped:,} skipped" if self.skipped else ""
        if not self.pieces:
            print(f"amb: no usable MIDI file{skipped}", file=sys.stderr)
            return 2
        speed = f"{self.pieces / took:.1f} pieces/s, {self.notes / took:,.0f} notes/s on {self.device}"
        plural = "s" if self.pieces > 1 else ""
        done = f"{did} {self.pieces:,} piece{plural}, {self.notes:,} notes"
        print(f"{done} in {took:.1f} s ({speed}){skipped}", file=sys.stderr)
        return 0


def check_out(out: Path, source: Path | None = None) -> None:
    """Raise ValueError, before any work is done, where `out` cannot be written or is the file to be read."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; give a file")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    if source is not None and out.exists() and source.exists() and out.samefile(source):
        raise ValueError(f"--out {out} is the file to be read; give another")


def shown(name: str) -> str:
    """A file's name on one line of a terminal, whatever characters it holds."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))


def row(file: str, width: int, label: str, classes, cells) -> str:
    """A line of the table; a long name keeps its end."""
    name = shown(file)
    name = name if len(name) <= width else "…" + name[1 - width :]
    widths = [max(7, len(name)) for name in classes]
    columns = "".join(f"  {cell:>{size}}" for cell, size in zip(cells, widths, strict=True))
    return f"{name:<{width}}  {label:<{max(8, *map(len, classes))}}{columns}"


def percent(values) -> list[str]:
    return [f"{value:.1%}" for value in values]


def minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def titles(models: list) -> list[str]:
    """What to call one or two models: by objective, or where that does not tell them apart, by file."""
    names = [model.config.objective for model in models]
    return names if len(set(names)) == len(names) else [str(model.path) for model in models]


def print_bias(names: list[str], tables: list, notes: int, files: int) -> None:
    """The tables of `inspection.bias`, side by side."""
    print(
        f"recovery of {notes:,} notes of {files} piece{'s' * (files > 1)}: each was hidden once, one in seven at a time"
    )
    print("frequent: the fewest values that make up half of the notes; rare: all others")
    print(f"{'':<11}{'values':>13}" + "".join(f"   {name[-32:]:^32}" for name in names))
    print(f"{'field':<11}{'freq.':>6}{'rare':>7}" + f"   {'frequent':>8}{'rare':>8}{'rare as freq.':>16}" * len(names))
    for rows in zip(*tables, strict=True):
        line = f"{rows[0].field:<11}{rows[0].frequent:>6}{rows[0].rare:>7}"
        for one in rows:
            cells = [one.frequent_accuracy, one.rare_accuracy, one.rare_as_frequent]
            texts = ["–" if np.isnan(cell) else f"{cell:.1%}" for cell in cells]
            line += f"   {texts[0]:>8}{texts[1]:>8}{texts[2]:>16}"
        print(line)
