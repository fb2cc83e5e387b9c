"""Time several functions in turns, so that other load on the machine falls on all of them; compare by ratio.

Every measurement makes rows, dictionaries from a column's name to text, a number or a spread of several rounds; they
are printed as a table and written as JSON with the machine they were measured on.
"""

import argparse
import ctypes
import dataclasses
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from amb.config import PRESETS, Config
from amb.files import table, write_json
from amb.model import compute_dtype

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TURN = 0.05  # seconds
WARM_UP = 2  # calls that a turn begins with: glibc's malloc adapts its thresholds to the first
LOAD = os.getloadavg()[0]  # the machine's when the program began


def parse_sizes(
    parser: argparse.ArgumentParser, arguments: list[str]
) -> tuple[argparse.Namespace, Config, torch.dtype]:
    """The options, those below among them; the preset with its batch and length as asked for; and the dtype."""
    parser.add_argument("--config", choices=PRESETS, default="small", help="sizes; default: small")
    parser.add_argument("--batch", type=int, help="sequences; default: the preset's, for base on a CPU 1")
    parser.add_argument("--length", type=int, help="notes in a sequence; default: the preset's")
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=5, help="of timing; default: 5")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args(arguments)
    config = Config(**PRESETS[options.config])
    batch = options.batch or (1 if options.config == "base" and DEVICE.type == "cpu" else config.batch)
    notes = options.length or config.notes
    config = dataclasses.replace(config, batch=batch, notes=notes, reach=max(notes, config.reach))
    return options, config, compute_dtype(options.dtype, DEVICE)


def take_turns(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict]:
    """Milliseconds per call of each function, and how many times slower it is than the first: spreads of the rounds.

    A turn is as many calls as fill `TURN` seconds, after a warm-up. Ratios are taken round by round.
    """
    taken = {name: [] for name in functions}
    for number in range(rounds):
        for name in list(functions) if number % 2 else reversed(functions):
            taken[name].append(1e3 * _turn(functions[name]))
    first = taken[next(iter(functions))]
    return {
        name: {"ms": spread(turns), "times the first": spread([t / f for t, f in zip(turns, first, strict=True)])}
        for name, turns in taken.items()
    }


def _turn(function: Callable[[], object]) -> float:
    """Seconds per call: 1, 2, 4 … calls on end, waiting for the device after each group, until `TURN` has passed."""
    gc.collect()
    # memory that one function has freed would be missing for the next
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc
        trim(0)
    for _ in range(WARM_UP):
        function()
    wait()
    began, count, group = time.perf_counter(), 0, 1
    while True:
        for _ in range(group):
            function()
        wait()
        count, group = count + group, 2 * group
        if (passed := time.perf_counter() - began) >= TURN:
            return passed / count


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def text(rows: list[dict]) -> str:
    """Rows as a table, a column for each name that any of them has; a spread as median (lowest … highest)."""
    head = list(dict.fromkeys(name for row in rows for name in row))
    return table(head, [[_cell(row.get(name)) for name in head] for row in rows])


def _cell(value: object) -> object:
    if isinstance(value, dict):
        return "{} ({} … {})".format(*map(_cell, value.values()))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return value


def write(path: Path | None, tables: dict[str, list[dict]]) -> None:
    """Print the tables by their titles; with a path, write them as JSON, with the machine."""
    for title, rows in tables.items():
        print(f"\n{title}\n\n{text(rows)}")
    if path is None:
        return
    cuda = DEVICE.type == "cuda"
    machine = {
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "load": round(LOAD, 2),
        "commit": subprocess.getoutput("git rev-parse --short HEAD 2>/dev/null") or "unknown",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"machine": machine, "tables": tables})
