"""`python -m benchmarks NAME [options]`: run one of the measurements; `--help` after the name lists its options.

`python -m benchmarks report` makes benchmarks/results/README.md of the JSON files there; a folder among them is what
`device` measured on one card, and has a picture of attention.
"""

import argparse
import importlib
import json
import sys
from collections import defaultdict
from itertools import chain
from pathlib import Path

from amb import plots
from benchmarks.timing import text

MEASUREMENTS = ("tokenizer", "kernels", "step", "device", "pack")
RESULTS = Path(__file__).parent / "results"


def report(folder: Path) -> str:
    """All tables of a folder's JSON files in Markdown, each file's with the machine it was measured on."""
    lines = ["# Results of the benchmarks", "", "Made by `python -m benchmarks report`.", ""]
    for file in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        content = json.loads(file.read_text(encoding="utf-8"))
        machine = ", ".join(f"{key} {value}" for key, value in content["machine"].items())
        name = file.relative_to(folder).as_posix()
        lines += [f"## [{name.removesuffix('.json')}]({name})", "", machine, ""]
        for title, rows in content["tables"].items():
            lines += [f"**{title}**", "", text(rows), ""]
    for card in sorted({file.parent for file in folder.glob("*/attention-*.json")}):
        draw_attention(card, card / "attention.png")
        lines += [f"![attention on {card.name}]({card.name}/attention.png)", ""]
    return "\n".join(lines)


@plots.picture
def draw_attention(folder: Path, out: Path) -> None:
    """Milliseconds of forward and backward at each length, of ours and its peers, from `attention-LENGTH.json`."""
    times = defaultdict(dict)
    for file in folder.glob("attention-*.json"):
        for row in chain.from_iterable(json.loads(file.read_text(encoding="utf-8"))["tables"].values()):
            if "ms" in row:  # not a failure
                times[row[""]][int(file.stem.split("-")[1])] = row["ms"]["median"]
    figure = plots.new_figure(4)
    axis = figure.subplots()
    for name, points in times.items():
        axis.plot(*zip(*sorted(points.items()), strict=True), "o-", label=name, linewidth=2 if name == "ours" else 1)
    axis.set(xscale="log", yscale="log", xlabel="notes (as many in a batch)", ylabel="ms, forward and backward")
    for side in (axis.xaxis, axis.yaxis):  # a log scale's labels are formulas, which `save` leaves as text
        side.set_major_formatter("{x:g}")
        side.set_minor_formatter("")
    axis.legend(fontsize="small")
    plots.save(figure, out)


def main(arguments: list[str]) -> None:
    name, *options = arguments or [""]
    if name not in (*MEASUREMENTS, "report"):
        sys.exit(f"usage: python -m benchmarks {{{','.join(MEASUREMENTS)},report}} [options]")
    try:
        if name == "report":
            (RESULTS / "README.md").write_text(report(RESULTS), encoding="utf-8")
            return
        measurement = importlib.import_module(f"benchmarks.{name}")
        parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks {name}",
            description=measurement.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        measurement.main(parser, options)
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
