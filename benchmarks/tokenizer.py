"""How fast the tokenizer is: encode beside `mido.MidiFile` alone on the same files, and a store with 1 … N workers.

    python -m benchmarks tokenizer PATH [--files 60] [--rounds 7] [--workers 1 2] [--out result.json]

The first is in notes per second of processor time on one core, the two taken in turns, so that other load on the
machine falls on both; ratios are taken round by round. The second is in notes per second of elapsed time.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mido
from amb.tokenizer import find_midi

from amb import tokenizer
from benchmarks.timing import spread, write


def processor_seconds(function: Callable[[str], object], paths: list[str]) -> float:
    """What `function` costs on all of `paths`, without time that other processes had."""
    began = time.process_time()
    for path in paths:
        function(path)
    return time.process_time() - began


def encode_beside_mido(paths: list[str], rounds: int) -> list[dict]:
    """Notes per second of mido alone and of both encodings, and their ratio to mido's."""
    functions = {"mido.MidiFile": mido.MidiFile}
    functions |= {name: encoding.encode for name, encoding in tokenizer.ENCODINGS.items()}
    notes = sum(len(tokenizer.load("octuple").encode(path)) for path in paths)
    seconds = {name: [] for name in functions}
    for number in range(rounds):
        for name in list(functions) if number % 2 else reversed(functions):
            seconds[name].append(processor_seconds(functions[name], paths))
    return _rates({name: [notes / second for second in taken] for name, taken in seconds.items()})


def store_by_workers(source: Path, workers: list[int], rounds: int) -> list[dict]:
    """Notes per second of `build_store` by the number of workers, and the speed-up over the first."""
    rates = {f"workers: {count}": [] for count in workers}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for count in workers:
                began = time.perf_counter()
                store = tokenizer.build_store(source, Path(folder, "store"), workers=count, progress=False)
                rates[f"workers: {count}"].append(len(store.words) / (time.perf_counter() - began))
    return _rates(rates)


def _rates(rates: dict[str, list[float]]) -> list[dict]:
    first = next(iter(rates.values()))
    return [
        {
            "": name,
            "notes/s": spread(taken),
            "times the first": spread([rate / base for rate, base in zip(taken, first, strict=True)]),
        }
        for name, taken in rates.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Run both measurements, print the table and write JSON if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tokenizer", description="Measure the tokenizer.")
    parser.add_argument("path", type=Path, help="a folder of MIDI files")
    parser.add_argument("--files", type=int, default=60, help="for the first measurement, evenly spaced; default: 60")
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="default: 1 2; none below 1")
    parser.add_argument("--store-rounds", type=int, default=3, help="default: 3; 0 leaves the second measurement out")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args(arguments)
    paths = [path for _, path in find_midi(options.path)[0]] if options.path.is_dir() else []
    if not paths:
        raise ValueError(f"{options.path} is no folder with MIDI files")
    tables = {"encode": encode_beside_mido(paths[:: max(1, len(paths) // options.files)], options.rounds)}
    if options.store_rounds:
        tables["store"] = store_by_workers(options.path, options.workers, options.store_rounds)
    write(options.out, tables)
