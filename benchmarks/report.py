"""All results in one table and one picture: `python -m benchmarks report [--results FOLDER] [--docs FILE]`.

Reads every JSON of `benchmarks/results`, draws docs/images/benchmarks.png, prints the table, and puts it between the
marks of docs/benchmarks.md: no figure there is typed by hand. A ratio above 1 says that the peer takes longer.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
MARKS = "<!-- python -m benchmarks report -->", "<!-- end of report -->"


class Row(NamedTuple):
    """A line of the table. `ratio`: the peer's time over ours (median, lowest, highest), None where none is meant."""

    group: str
    what: str
    ours: str
    peer: str
    theirs: str
    ratio: dict[str, float] | None = None


def read(folder: Path) -> dict[str, dict]:
    """Each JSON of a folder by its name."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def rows(name: str, results: dict) -> Iterator[Row]:
    """The lines of one result; the first word of its name says which measurement it is."""
    kind = name.split("-")[0]
    yield from {
        "tokenizer": tokenizer_rows, "kernels": kernels_rows, "step": step_rows,
        "inference": inference_rows, "scale": scale_rows, "store": store_rows,
    }[kind](results)  # fmt: skip


def tokenizer_rows(results: dict) -> Iterator[Row]:
    rate = {name: f"{row['notes_per_second']['median']:,.0f} notes/s" for name, row in results.items()}
    for name, row in results.items():
        if name != "mido.MidiFile" and "ratio_to_mido" in row:
            mido = rate["mido.MidiFile"]
            yield Row("tokenizer", f"encode, {name}", rate[name], "mido.MidiFile alone", mido, row["ratio_to_mido"])
    stores = [name for name in results if name.startswith("store")]
    for name in stores[1:]:
        yield Row("tokenizer", name, rate[name], stores[0], rate[stores[0]], results[name]["speed_up"])


def timed(group: str, what: str, timings: dict) -> Iterator[Row]:
    """A line per peer of `take_turns`."""
    (_, mine), *others = timings.items()
    for peer, row in others:
        yield Row(group, what, duration(mine["seconds"]), peer, duration(row["seconds"]), row["ratio"])


def kernels_rows(results: dict) -> Iterator[Row]:
    for name, timings in results["operations"].items():
        yield from timed(f"kernels, {size(results)}", name, timings)


def step_rows(results: dict) -> Iterator[Row]:
    yield from timed("training step", size(results), results["timings"])
    if "flops" in results:
        least = (
            results["flops"] / results["peak_flops_per_second"]
        )  # seconds for the matrix products alone, at their peak
        ours, theirs = (least / row["seconds"]["median"] for row in results["timings"].values())
        best = f"{theirs:.0%}: nothing here is more than {1 / theirs:.1f} times as fast"
        yield Row("training step", f"{size(results)}: share of the matrix peak", f"{ours:.0%}", "Hugging Face", best)


def inference_rows(results: dict) -> Iterator[Row]:
    for name, timings in results["timings"].items():
        what = f"{name}, {results['config']}: {results['pieces']} pieces, L = {results['length']:,}"
        for row in timed("inference", what, timings):
            yield row._replace(ratio=None) if row.peer.startswith("ours") else row


def scale_rows(results: dict) -> Iterator[Row]:
    for name, point in results["points"].items():
        group = "step as work grows"
        if not point["timings"]:
            yield Row(group, name, point["skipped"]["ours"], "Hugging Face", point["skipped"]["Hugging Face"])
        elif point["skipped"]:
            mine = duration(point["timings"]["ours"]["seconds"])
            yield Row(group, name, mine, "Hugging Face", f"not run: {point['skipped']['Hugging Face']}")
        else:
            yield from timed(group, name, point["timings"])


def store_rows(results: dict) -> Iterator[Row]:
    large, small = results["large"], results["small"]
    group, beside = f"store of {large['notes']:,} notes", f"store of {small['notes']:,} notes"
    pairs = [("first step after", f"{store['seconds_to_first_step']:.1f} s") for store in (large, small)]
    yield Row(group, pairs[0][0], pairs[0][1], beside, pairs[1][1])
    for key, what in (("VmRSS", "peak resident memory"), ("RssAnon", "of it not of files")):
        mine, other = (f"{store['peak_bytes'][key] / 1e6:,.0f} MB" for store in (large, small))
        yield Row(group, what, mine, beside, other)
    yield Row(group, "mask book", f"{8 * results['book_bytes_per_place']:.2f} bits a note and PAD", "", "")
    for name, rates in results.get("batches", {}).items():
        made, used = (rates[key]["median"] for key in ("batches_notes_per_second", "step_notes_per_second"))
        yield Row(group, f"{name}: making batches", f"{made:,.0f} notes/s", f"{name}: steps", f"{used:,.0f} notes/s")


def size(results: dict) -> str:
    length = f" × {results['length']:,}" if "length" in results else ""
    return f"{results['config']}, {results['batch']}{length}"


def duration(seconds: dict[str, float]) -> str:
    """Median and, in brackets, lowest and highest, in a unit that suits them."""
    factor, unit = (1, "s") if seconds["median"] >= 1 else (1e3, "ms")
    values = [factor * seconds[key] for key in ("median", "lowest", "highest")]
    median, low, high = (f"{value:,.3g}" if value < 100 else f"{value:,.0f}" for value in values)
    return f"{median} {unit} ({low} … {high})"


def markdown(found: dict[str, dict]) -> str:
    """The table of all results, and what each was measured on."""
    lines = ["| | | ours | peer | theirs | times as long as ours |", "|---|---|---|---|---|---|"]
    for name, result in found.items():
        for row in rows(name, result["results"]):
            ratio = "" if row.ratio is None else between(row.ratio)
            lines.append(f"| {row.group} | {row.what} | {row.ours} | {row.peer} | {row.theirs} | {ratio} |")
    lines += ["", "| result | device | torch | commit | load when it began |", "|---|---|---|---|---|"]
    for name, result in found.items():
        machine = result["machine"]
        device = f"{machine['device']}, {machine['cpu']}" if "threads" in machine["device"] else machine["device"]
        link = f"[{name}](../benchmarks/results/{name}.json)"
        lines.append(f"| {link} | {device} | {machine['torch']} | {machine['commit']} | {machine.get('load', '–')} |")
    return "\n".join(lines)


def between(ratio: dict[str, float]) -> str:
    """The median ratio and its range; bold where we win in every round."""
    text = f"{ratio['median']:.2f}"
    return f"{f'**{text}**' if ratio['lowest'] > 1 else text} ({ratio['lowest']:.2f} … {ratio['highest']:.2f})"


def draw(found: dict[str, dict], out: Path) -> None:
    """Every ratio with its spread on one logarithmic axis: right of the line we are faster, left of it the peer is."""
    from matplotlib import pyplot as plt

    compared = [row for name, result in found.items() for row in rows(name, result["results"]) if row.ratio]
    figure, axis = plt.subplots(figsize=(11, 1.2 + 0.24 * len(compared)), layout="constrained")
    for place, row in enumerate(compared):
        ratio = row.ratio
        colour = "tab:blue" if ratio["median"] >= 1 else "tab:red"
        axis.plot([ratio["lowest"], ratio["highest"]], [place, place], color=colour, lw=2, alpha=0.5)
        axis.plot(ratio["median"], place, "o", color=colour, ms=5)
        axis.annotate(f"{ratio['median']:.2g}", (ratio["median"], place), (0, 4), textcoords="offset points",
                      fontsize=7, ha="center")  # fmt: skip
    axis.axvline(1, color="black", lw=1)
    labels = [f"{row.group}: {row.what}  —  {row.peer}" for row in compared]
    axis.set_yticks(range(len(compared)), labels, fontsize=8)
    axis.set_ylim(len(compared) - 0.4, -0.6)
    axis.set(xscale="log", xlabel="the peer's time, ours being 1 (median, lowest to highest); red: the peer is faster")
    ticks = [
        tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if axis.get_xlim()[0] < tick < axis.get_xlim()[1]
    ]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3, axis="x")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--picture", type=Path, default=DOCS / "images" / "benchmarks.png")
    parser.add_argument("--docs", type=Path, default=DOCS / "benchmarks.md", help="the page whose table is replaced")
    options = parser.parse_args(arguments)
    found = read(options.results)
    if not found:
        parser.error(f"no results in {options.results}")
    draw(found, options.picture)
    table = markdown(found)
    print(table)
    page = options.docs.read_text(encoding="utf-8")
    first, last = map(re.escape, MARKS)
    text = f"{MARKS[0]}\n{table}\n{MARKS[1]}"
    page, changed = re.subn(f"{first}.*{last}", lambda _: text, page, flags=re.DOTALL)
    if changed != 1:
        raise SystemExit(f"{options.docs} has no place for the table: {MARKS[0]} … {MARKS[1]}")
    options.docs.write_text(page, encoding="utf-8")
