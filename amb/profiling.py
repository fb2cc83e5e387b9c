"""`train.py --profile`: a trace of three steps for Chrome or Perfetto, and the ten largest operations."""

from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule


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
