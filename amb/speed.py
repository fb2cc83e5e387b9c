"""How fast a run is beside what its device can do, where the time goes (--profile), and steps as a CUDA graph."""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import profile, schedule

from amb.config import Config


def speed_line(notes_per_s: float, config: Config, vocabulary: int, device: torch.device, dtype: torch.dtype) -> str:
    """Notes per second, their share of the peak that matrix products reach on this device now, and peak memory."""
    flops = notes_per_s * sequence_flops(config, vocabulary) / config.notes
    peak = matrix_peak(device, dtype)
    memory = peak_memory(device)
    return (
        f"speed: {notes_per_s:,.0f} notes/s, {flops / peak:.0%} of the {peak / 1e12:,.2f} TFLOP/s that "
        f"{str(dtype).removeprefix('torch.')} matrix products reach here"
        + (f"; peak memory {memory / 2**30:.1f} GiB" if memory else "")
    )


def sequence_flops(config: Config, vocabulary: int) -> int:
    """Floating-point operations of the matrix products of a step, for each full sequence in it.

    Nothing is counted twice for being recomputed. Per pass of the encoder and layer 12 d^2 weights, 6 operations a
    note and weight; attention 4 products of L x L x D a head forward (Q K, Q R, K R, P V) and 8 backward; the output
    layers. The adversarial objective has two passes, the random one has one.
    """
    d, notes = config.width, config.notes
    layer = 6 * notes * 12 * d**2 + 12 * 2 * notes**2 * d
    passes = 2 if config.objective == "adversarial" else 1
    return passes * config.layers * layer + 6 * notes * d * vocabulary


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


def peak_memory(device: torch.device) -> int | None:
    """Most bytes held so far: by tensors on a GPU, by the whole process on a CPU; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # Windows has none
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def profiler(run: Path | None):
    """A context manager that profiles steps 4 to 6 into run/trace.json and prints the ten largest operations.

    Call its `.step()` once a step. With `run` None nothing is measured.
    """

    def report(profiler: profile) -> None:
        profiler.export_chrome_trace(str(run / "trace.json"))
        by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=by, row_limit=10, max_name_column_width=60))
        print(f"trace of three steps: {run / 'trace.json'} (open it in Perfetto or chrome://tracing)")

    if run is None:
        return nullcontext(SimpleNamespace(step=lambda: None))
    return profile(schedule=schedule(wait=2, warmup=1, active=3, repeat=1), on_trace_ready=report)


class CudaGraph:
    """`step(*arguments)` recorded once and replayed on copied tensors: the host launches one thing, not hundreds.

    What a step does must not depend on the host: seed, learning rate and data are tensors. The first calls are not
    recorded (kernels are compiled, the optimiser makes its state); nor are calls whose tensors have other shapes or
    whose other arguments differ, such as an epoch's last, smaller batch. A replay's result is valid until the next.
    """

    WARM_UP = 3

    def __init__(self, step: Callable):
        self.step, self.calls, self.inputs, self.output = step, 0, None, None
        self.graph, self.side = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        kinds = [(a.shape, a.dtype) if isinstance(a, Tensor) else a for a in arguments]
        if self.calls <= self.WARM_UP or (self.inputs is not None and kinds != self.kinds):
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                result = self.step(*arguments)
            torch.cuda.current_stream().wait_stream(self.side)
            return result
        if self.inputs is None:
            self.kinds, self.inputs = kinds, [a.clone() if isinstance(a, Tensor) else a for a in arguments]
            with torch.cuda.graph(self.graph, stream=self.side):  # gradients stay on the stream of the warm-up
                self.output = self.step(*self.inputs)
        for recorded, argument in zip(self.inputs, arguments, strict=True):
            if isinstance(recorded, Tensor):
                recorded.copy_(argument, non_blocking=True)
        self.graph.replay()
        return self.output
