"""How fast a run is, and beside what the device could do; with `train.py --profile`, where the time goes."""

import resource
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from amb.config import Config


def speed_line(notes_per_s: float, config: Config, vocabulary: int, device: torch.device, dtype: torch.dtype) -> str:
    """Notes per second, their share of the peak that matrix products reach on this device now, and peak memory."""
    flops = notes_per_s * step_flops(config, 1, vocabulary) / config.notes
    peak = matrix_peak(device, dtype)
    name = str(dtype).removeprefix("torch.")
    return (
        f"speed: {notes_per_s:,.0f} notes/s, {flops / peak:.0%} of the {peak / 1e12:,.2f} TFLOP/s that {name} matrix "
        f"products reach here; peak memory {peak_memory(device) / 2**30:.1f} GiB"
    )


def step_flops(config: Config, batch: int, vocabulary: int) -> float:
    """Floating-point operations of the matrix products of a step on `batch` full sequences.

    None is counted twice for being computed again. Per pass of the encoder and layer 12 d^2 weights, 6 operations a
    note and weight; attention 4 products of L x L x D a head forward (Q K, Q R, K R, P V) and 8 backward; the output
    layers. The adversarial objective has two passes, the random one has one.
    """
    d, notes = config.width, batch * config.notes
    layer = 6 * notes * 12 * d**2 + 12 * 2 * batch * config.notes**2 * d
    passes = 2 if config.objective == "adversarial" else 1
    return float(passes * config.layers * layer + 6 * notes * d * vocabulary)


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large square matrix product on random data: the best of five after a warm-up."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _Off:
    """Stands in for a profiler when none is wanted."""

    def step(self) -> None:
        pass


@contextmanager
def trace(run: Path | None):
    """Profile steps 4 to 6 of a run into run/trace.json and print the ten largest; call `.step()` once a step.

    With `run` None nothing is measured.
    """
    if run is None:
        yield _Off()
        return
    cuda = torch.cuda.is_available()

    def report(profiler: profile) -> None:
        profiler.export_chrome_trace(str(run / "trace.json"))
        by = "self_device_time_total" if cuda else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=by, row_limit=10, max_name_column_width=60))
        print(f"trace of three steps: {run / 'trace.json'} (open it in Perfetto or chrome://tracing)")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    plan = schedule(wait=2, warmup=1, active=3, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=report) as profiler:
        yield profiler
