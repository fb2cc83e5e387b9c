"""How fast the tokenizer is: encode beside `mido.MidiFile` alone on the same files, and a store with 1 … N workers.

    python -m benchmarks tokenizer PATH [--files 60] [--rounds 7] [--workers 1 2] [--out result.json]

The first is in notes per second of processor time on one core, the two taken in turns, so that what else the machine
does falls on both; the ratio is the median of the rounds' ratios. The second is in notes per second of elapsed time.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mido

from amb import tokenizer
from benchmarks.timing import spread, write


def processor_seconds(function: Callable[[str], object], paths: list[str]) -> float:
    """What `function` costs on all of `paths`, without time that other processes had."""
    began = time.process_time()
    for path in paths:
        function(path)
    return time.process_time() - began


def encode_beside_mido(paths: list[str], rounds: int) -> dict[str, dict]:
    """Notes per second of mido alone and of both encodings, and their ratio to mido: median, lowest, highest."""
    encodings = {name: encoding.encode for name, encoding in tokenizer.ENCODINGS.items()}
    notes = sum(len(tokenizer.load("octuple").encode(path)) for path in paths)
    seconds = {name: [] for name in ("mido.MidiFile", *encodings)}
    for number in range(rounds):
        turn = [("mido.MidiFile", mido.MidiFile), *encodings.items()]
        for name, function in turn if number % 2 else reversed(turn):
            seconds[name].append(processor_seconds(function, paths))
    baseline = seconds["mido.MidiFile"]
    return {
        name: {
            "notes_per_second": spread([notes / second for second in taken]),
            "ratio_to_mido": spread([alone / second for alone, second in zip(baseline, taken, strict=True)]),
        }
        for name, taken in seconds.items()
    }


def store_by_workers(source: Path, workers: list[int], rounds: int) -> dict[str, dict]:
    """Notes per second of `build_store` and the speed-up over the first count of workers, taken in turns."""
    rates = {count: [] for count in workers}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for count in workers:
                summary = tokenizer.build_store(source, Path(folder, "store"), workers=count, progress=False)
                rates[count].append(summary.notes / summary.seconds)
    first = rates[workers[0]]
    return {
        f"store, {count} worker{'s' * (count > 1)}": {
            "notes_per_second": spread(taken),
            "speed_up": spread([rate / alone for rate, alone in zip(taken, first, strict=True)]),
        }
        for count, taken in rates.items()
    }


def table(results: dict[str, dict]) -> str:
    """The results as lines of text."""
    out = io.StringIO()
    print(f"{'':<18}{'notes/s':>10}   {'lowest … highest':<20}{'ratio':>7}   lowest … highest", file=out)
    for name, row in results.items():
        rate, ratio = row.values()
        between = f"{rate['lowest']:,.0f} … {rate['highest']:,.0f}"
        line = f"{name:<18}{rate['median']:>10,.0f}   {between:<20}{ratio['median']:>7.2f}"
        print(f"{line}   {ratio['lowest']:.2f} … {ratio['highest']:.2f}", file=out)
    return out.getvalue()


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
    found = [path for _, path in tokenizer.find_midi(options.path)[0]] if options.path.is_dir() else []
    if not found:
        raise ValueError(f"{options.path} is no folder with MIDI files")
    if not found:
        parser.error(f"no .mid or .midi below {options.path}")
    results = encode_beside_mido(found[:: max(1, len(found) // options.files)], options.rounds)
    if options.store_rounds:
        results |= store_by_workers(options.path, options.workers, options.store_rounds)
    print(table(results))
    write(options.out, results)
