"""Cost as work grows: notes per second of a training step against notes, batch and model size, ours and the peer.

    python -m benchmarks scale [--config small] [--rounds 3] [--seconds 60] [--memory GB] [--out FILE] [--resume]
    python -m benchmarks scale --store [--notes 100000000]      a token store of that size: see large_store.py

The step is that of `benchmarks.step` on sequences without PAD. A point is left out, and the table says why, where
one step would take more than `--seconds` (by the point before it) or the peer more memory than `--memory`: backward
needs L x L x D numbers of each of its layers. FILE is written after each point, and points that it holds already are
not measured again: an interrupted run goes on. Delete it to start over.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from amb.config import PRESETS, Config
from benchmarks.inputs import filled_sequences, open_corpus
from benchmarks.peer import HuggingFaceEncoder  # noqa: F401  says what is missing before anything is measured
from benchmarks.step import model_of, step_of
from benchmarks.timing import take_turns, write

HERE = Path(__file__).parent
LENGTHS, BATCHES = (256, 512, 1024, 2048, 4096), (1, 2, 4, 8, 16, 32)
MODELS = ("2 x 128", "4 x 256", "6 x 512", "12 x 768")


@dataclasses.dataclass(frozen=True)
class Point:
    """`axis` is what grows from one point to the next: "length", "batch" or "model"."""

    axis: str
    model: str  # N x d
    notes: int  # L
    batch: int

    @property
    def name(self) -> str:
        return f"{self.axis}: {self.model}, L = {self.notes:,}, B = {self.batch}"

    def config(self) -> Config:
        layers, width = map(int, self.model.split(" x "))
        shape = dict(layers=layers, width=width, heads=width // 64, notes=self.notes, reach=self.notes)
        return Config(**{**PRESETS["small"], **shape, "batch": self.batch})


def points(model: str, lengths: list[int], batches: list[int], models: list[str], notes: int) -> list[Point]:
    """Lengths at `notes` notes a step, batches at the shortest length, models at the shortest length and batch 4."""
    shortest = min(lengths)
    return [
        *(Point("length", model, length, max(1, notes // length)) for length in lengths),
        *(Point("batch", model, shortest, batch) for batch in batches),
        *(Point("model", name, shortest, 4) for name in models),
    ]


def peer_bytes(config: Config, batch: int) -> float:
    """Memory that backward needs of the peer's attention: two passes, per layer the distances [L, L, D] and five
    tensors [B, H, L, L]; and while they are made three [L, L, D] more."""
    distances = 4 * config.notes**2 * config.width // config.heads
    squares = 4 * batch * config.heads * config.notes**2
    return 2 * config.layers * (distances + 5 * squares) + 3 * distances


def work(point: Point) -> float:
    """Operations of a step, up to a factor."""
    config = point.config()
    return config.layers * point.batch * point.notes * (12 * config.width**2 + 2 * point.notes * config.width)


def free_memory(device: torch.device) -> float:
    """Bytes that a step may take: of the GPU, or of the machine what no other process uses."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024.0 * int(lines["MemAvailable"].split()[0])


def measure(point: Point, before: dict | None, store, device: torch.device, options) -> dict:
    """The timings of one point, and why the peer's are missing. `before` is the last point of the same axis."""
    config = point.config()
    words, lengths = (torch.from_numpy(x).to(device) for x in filled_sequences(store, point.notes, point.batch))
    row = dataclasses.asdict(point) | {"skipped": {}}
    functions = {}
    for name, peer in (("ours", False), ("Hugging Face", True)):
        reason = ""
        if peer and peer_bytes(config, point.batch) > options.memory * 1e9:
            reason = f"needs about {peer_bytes(config, point.batch) / 1e9:,.0f} GB"
        elif before and name not in before["timings"]:
            reason = "like the point before"
        elif before:
            predicted = before["timings"][name]["seconds"]["median"] * work(point) / before["work"]
            if predicted > options.seconds:
                reason = f"would take about {predicted:,.0f} s a step"
        if reason:
            row["skipped"][name] = reason
        else:
            functions[name] = step_of(model_of(config, device, peer=peer), words, lengths, config)
    row["timings"] = take_turns(functions, options.rounds, device) if functions else {}
    return row | {"step_notes": int(lengths.sum()), "work": work(point)}


def speed(row: dict, name: str) -> float | None:
    """Notes per second, by the median; None where it was not measured."""
    timing = row["timings"].get(name)
    return timing and row["step_notes"] / timing["seconds"]["median"]


def draw(rows: dict[str, dict], out: Path) -> None:
    """Notes per second against notes per sequence, and small panels for batch and model size; both axes logarithmic."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), width_ratios=(2, 1, 1), layout="constrained")
    titles = {
        "length": "notes in a sequence (L)",
        "batch": "sequences in a batch (B)",
        "model": "model (layers x width)",
    }
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        own = [row for row in rows.values() if row["axis"] == kind]
        key = {"length": "notes", "batch": "batch", "model": "model"}[kind]
        ticks = [row[key] for row in own]
        for name, colour in (("ours", "tab:blue"), ("Hugging Face", "tab:orange")):
            found = [(place, row) for place, row in enumerate(own) if name in row["timings"]]
            places, speeds = [place for place, _ in found], [speed(row, name) for _, row in found]
            axis.plot(places, speeds, "o-", ms=4, color=colour, label=name)
            for place, row in found:
                seconds = row["timings"][name]["seconds"]
                ends = [row["step_notes"] / seconds[end] for end in ("highest", "lowest")]
                axis.plot([place, place], ends, color=colour, lw=1, alpha=0.6)
        axis.set_xticks(range(len(ticks)), [f"{t:,}" if isinstance(t, int) else t for t in ticks])
        axis.set(xlabel=title, yscale="log")
        axis.grid(alpha=0.3, which="both")
        if own and kind != "model":
            fixed = f"{own[0]['step_notes']:,} notes a step" if kind == "length" else f"L = {own[0]['notes']:,}"
            axis.set_title(f"{own[0]['model']}, {fixed}", fontsize=10)
        elif own:
            axis.set_title(f"L = {own[0]['notes']:,}, B = {own[0]['batch']}", fontsize=10)
    axes[0].set_ylabel("notes per second of training")
    axes[0].legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    if "--store" in arguments:
        from benchmarks import large_store

        large_store.main([argument for argument in arguments if argument != "--store"])
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks scale", description=__doc__.splitlines()[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    parser.add_argument("--store", action="store_true", help="measure a large token store instead; has its own --help")
    parser.add_argument(
        "--model", default="12 x 768" if cuda else "4 x 256", help="layers x width, for all but `model`"
    )
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--batches", type=int, nargs="*", default=BATCHES)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--step-notes", type=int, default=32768 if cuda else 4096, help="in a step, as L grows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60, help="longest step (default: 60)")
    parser.add_argument(
        "--memory", type=float, default=free_memory(device) * 0.6 / 1e9, help="GB for the peer's attention"
    )
    parser.add_argument("--data", type=Path, help="a token store or folder of MIDI (default: the demo corpus)")
    parser.add_argument("--resume", action="store_true", help="keep the points that the file of --out has")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"scale-{device.type}.json")
    parser.add_argument("--picture", type=Path, default=HERE.parent / "docs" / "images" / "scale.png")
    options = parser.parse_args(arguments)
    rows = json.loads(options.out.read_text())["results"]["points"] if options.resume else {}
    with open_corpus(options.data, pieces=160) as store:
        before = None
        for point in points(options.model, options.lengths, options.batches, options.models, options.step_notes):
            if point.name not in rows:
                same = before if before and before["axis"] == point.axis else None
                rows[point.name] = measure(point, same, store, device, options)
                write(options.out, {"points": rows})
            before = rows[point.name]
            said = (f"{name} {speed(before, name):,.0f} notes/s" for name in before["timings"])
            print(f"{point.name}: {', '.join(said)}", *(f"; {n} {why}" for n, why in before["skipped"].items()), sep="")
    draw(rows, options.picture)
    print(f"{options.out}, {options.picture}")
