"""Time several functions in turns, so that what else the machine does falls on all of them; compare by ratio."""

import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

TURN = 0.05
UNCOUNTED = 2  # calls that a turn begins with: malloc learns from the first which sizes are worth keeping
LOAD = os.getloadavg()[0]  # what else the machine was doing when the program began


def take_turns(functions: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, dict]:
    """Seconds per call of each function, and how many times slower it is than the first: median, lowest, highest.

    A turn is as many calls as fill `TURN` seconds, after those that are not counted. Ratios are taken round by round.
    Memory is given back between turns, or what one has freed would be missing for the other.
    """
    seconds = {name: [] for name in functions}
    for number in range(rounds):
        for name in list(functions) if number % 2 else list(reversed(functions)):
            seconds[name].append(_turn(functions[name], device))
    first = seconds[next(iter(functions))]
    return {
        name: {
            "seconds": spread(taken),
            "ratio": spread([t / f for t, f in zip(taken, first, strict=True)]),
        }
        for name, taken in seconds.items()
    }


def _turn(function: Callable[[], object], device: torch.device) -> float:
    """Seconds per call: 1, 2, 4 … calls on end, waiting for the device after each group, until `TURN` has passed."""
    _give_back()
    for _ in range(UNCOUNTED):
        function()
    _wait(device)
    began, count, group = time.perf_counter(), 0, 1
    while True:
        for _ in range(group):
            function()
        _wait(device)
        count, group = count + group, 2 * group
        if (passed := time.perf_counter() - began) >= TURN:
            return passed / count


def _give_back() -> None:
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc
        trim(0)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def print_table(title: str, results: dict[str, dict]) -> None:
    """The results of `take_turns` as lines of text."""
    print(title)
    print(f"{'':<34}{'ms':>10}   {'lowest … highest':<24}{'times the first':>16}")
    for name, row in results.items():
        taken, ratio = row["seconds"], row["ratio"]
        between = f"{1e3 * taken['lowest']:,.1f} … {1e3 * taken['highest']:,.1f}"
        print(f"{name:<34}{1e3 * taken['median']:>10,.1f}   {between:<24}{ratio['median']:>16.2f}")


def write(path: Path | None, results: dict) -> None:
    """The results as JSON, with what they were measured on; nothing if no path is given."""
    if path is None:
        return
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    cuda = torch.cuda.is_available()
    machine = {
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "load": round(LOAD, 2),
        "commit": git.stdout.strip() or "unknown",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
