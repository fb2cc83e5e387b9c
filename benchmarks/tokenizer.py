"""How fast the tokenizer is: encode beside `mido.MidiFile` alone on the same files.

python -m benchmarks tokenizer PATH [--files 60] [--rounds 5] [--out result.json]
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mido
from amb.tokenizer import find_midi

from amb import tokenizer
from benchmarks.timing import take_turns, write


def each(function: Callable[[str], object], paths: list[str]) -> None:
    for path in paths:
        function(path)


def main(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("path", type=Path, help="a folder of MIDI files")
    parser.add_argument("--files", type=int, default=60, help="so many, evenly spaced; default: 60")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args(arguments)
    paths = [path for _, path in find_midi(options.path)[0]] if options.path.is_dir() else []
    if not paths:
        raise ValueError(f"{options.path} is no folder with MIDI files")
    paths = paths[:: max(1, len(paths) // options.files)]
    notes = sum(len(tokenizer.load("octuple").encode(path)) for path in paths)
    functions = {"mido.MidiFile": mido.MidiFile}
    functions |= {name: encoding.encode for name, encoding in tokenizer.ENCODINGS.items()}
    rows = take_turns({name: partial(each, function, paths) for name, function in functions.items()}, options.rounds)
    rates = [{"": name, **row, "notes/s": 1e3 * notes / row["ms"]["median"]} for name, row in rows.items()]
    write(options.out, {"encode": rates})
