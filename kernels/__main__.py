"""The static report of every kernel: `python -m amb.kernels [--op NAME] [--arch sm_90 ...] [--json FILE]`.

Needs no GPU. With one, adds each operation's measured time, its share of the floor and its error against float64.
"""

import argparse
import importlib
import json
import os
import pkgutil
import platform
from concurrent.futures import ProcessPoolExecutor

import torch
import triton

from amb import kernels

from .static import Case, Report, static_report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--op", default="", help="only the modules whose name contains this")
    parser.add_argument(
        "--arch", nargs="+", help="such as sm_80 sm_90 sm_100 gfx942 (default: what each case ships for)"
    )
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    options = parser.parse_args()

    names = [m.name for m in pkgutil.iter_modules(kernels.__path__) if options.op in m.name and m.name != "__main__"]
    if not names:
        parser.error(f"no operation is called {options.op}")
    with ProcessPoolExecutor(options.jobs) as pool:
        tasks = [
            (op, i, target)
            for op in names
            for i, case in enumerate(cases(op))
            for target in options.arch or case.targets
        ]
        rows = list(pool.map(report_row, tasks))
    print_table(rows)
    result = {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "static": rows,
    }
    if torch.cuda.is_available():
        result["device"] = torch.cuda.get_device_name()
        result["measured"] = [row for op in names for row in measure(op)]
        print_table(result["measured"])
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


def cases(op: str) -> list[Case]:
    return getattr(importlib.import_module(f"amb.kernels.{op}"), "static_cases", list)()


def report_row(task: tuple[str, int, str]) -> dict:
    """One row of the table. Kernels do not pickle, so a worker is told which case of which op and finds it itself."""
    op, index, target = task
    case = cases(op)[index]
    report: Report = static_report(
        case.kernel, case.signature, case.constexprs, target, case.num_warps, case.num_stages
    )
    return {
        "op": op,
        "kernel": case.name,
        **report._asdict(),
        "warps": case.num_warps,
        "stages": case.num_stages,
        "floor_us": case.floor_us,
    }


def measure(op: str) -> list[dict]:
    rows = []
    for case in getattr(importlib.import_module(f"amb.kernels.{op}"), "device_cases", list)():
        microseconds = 1000 * triton.testing.do_bench(case.run, return_mode="median")
        share = case.floor_us / microseconds
        rows.append(
            {
                "op": op,
                "case": case.name,
                "measured_us": round(microseconds, 1),
                "floor_us": round(case.floor_us, 1),
                "share_of_floor": round(share, 3),
                "relative_error": case.error(),
            }
        )
    return rows


def print_table(rows: list[dict]) -> None:
    if not rows:
        return
    columns = [c for c in rows[0] if any(row[c] != "" for row in rows)]
    text = [columns] + [
        [f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in rows
    ]
    widths = [max(len(line[i]) for line in text) for i in range(len(columns))]
    for number, line in enumerate(text):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


if __name__ == "__main__":
    main()
