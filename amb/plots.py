"""Pictures (extra `plot`): curves of metrics, confusions, results, bias, and piano rolls.

They are 8 inches wide: at 800 pixels, the width of a README, text of 9 points is 12 pixels high. No legend lies over a
curve, and colours are those of Okabe and Ito, distinct for the colour-blind.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache, reduce, wraps
from operator import getitem
from pathlib import Path

import numpy as np
from tqdm import tqdm

from amb import tokenizer
from amb.files import read_metrics, writing

WIDTH = 8  # inches
BLUE, VERMILION, GREEN, BLACK, GREY = "#0072b2", "#d55e00", "#009e73", "#000000", "0.8"
COLOURS = (BLUE, VERMILION, GREEN, "#cc79a7", "#e69f00", "#56b4e9", BLACK, "#999999")


def picture(draw: Callable[..., None]) -> Callable[..., bool]:
    """A drawing function whose errors end no run: it returns whether it drew, and prints a line if it did not."""

    @wraps(draw)
    def drawn(*args, **kwargs) -> bool:
        os.environ.pop("MPLBACKEND", None)  # a notebook's, which may not be installed here
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of glyphs that no font has
                draw(*args, **kwargs)
            return True
        except ImportError:
            _say("no picture: pip install matplotlib (the extra `plot`)")
        except Exception as error:  # whatever matplotlib or the disk raises
            _say(f"no picture: {type(error).__name__} {error}".splitlines()[0])
        return False

    return drawn


@cache  # once, and not after every epoch
def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def new_figure(height: float):
    """A figure, without pyplot's state and windows."""
    from matplotlib.figure import Figure

    return Figure((WIDTH, height), layout="constrained")


def save(figure, out: Path) -> None:
    """Write a PNG, whole or not at all: a picture that is open in a viewer is never half there."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # names may hold $
        text.set_fontsize(9)
    with writing(out) as file:
        figure.savefig(file, dpi=150, format="png", pil_kwargs={"optimize": True})


Panels = dict[str, dict[str, tuple[str, ...]]]  # by title, by label: "step" or "epoch", then keys into such a line

VALIDATION = {f"validation {name}": {name: ("epoch", "valid", name)} for name in ("accuracy", "loss")}


@picture
def curves(
    runs: dict[str, Path], panels: Panels, out: Path, x: str = "step", title: str = "", levels: dict | None = None
) -> None:
    """Curves over steps or epochs (`x`) of runs, {name: metrics.jsonl}, into a PNG.

    Panels of several lines have a colour for each of them, panels of one line a colour for each run. The first panel
    has horizontal lines at `levels`, {label: value}.
    """
    figure = new_figure(4.2)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for (label, level), style in zip((levels or {}).items(), (":", "--"), strict=False):
        axes[0].axhline(level, color=BLACK, ls=style, lw=1, label=label)
    for axis, (name, lines) in zip(axes, panels.items(), strict=True):
        for number, (run, file) in enumerate(runs.items()):
            metrics = read_metrics(file)
            for place, (label, (kind, *keys)) in enumerate(lines.items()):
                label, colour = (label, place) if len(lines) > 1 else (run, number)
                values = [reduce(getitem, keys, entry) for entry in metrics[kind]]
                style = {"color": COLOURS[colour % 8], "marker": "o" if kind == "epoch" else "", "ms": 3, "lw": 1}
                axis.plot([entry[x] for entry in metrics[kind]], values, label=label, **style)
        axis.set(title=name, xlabel=x, ylim=(0, None))
        axis.grid(alpha=0.3)
        handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))  # one a label
        if len(handles) > 1:
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "ncols": 1 + (len(handles) > 4)}
            axis.legend(handles.values(), handles, **place, handlelength=1, columnspacing=1, frameon=False)
    figure.suptitle(title)
    save(figure, out)


@picture
def draw_run(
    run: Path, encoding: tokenizer.Encoding, words: np.ndarray, scores: np.ndarray, frozen: np.ndarray
) -> None:
    """run/curves.png and run/masker.png of a pre-training.

    words [n, F] of a training sequence, without PAD; scores [n], the masker's probabilities; frozen bool [n].
    """
    losses = {"recoverer, training": ("step", "recovery"), "recoverer, validation": ("epoch", "valid", "loss")}
    losses |= {"masker, training": ("step", "masker")}
    fields = {name: ("epoch", "valid", "masked", name) for name in encoding.names}
    panels = {"loss": losses, "accuracy on masked notes, validation": fields}
    panels |= {"share of frozen notes": {"frozen": ("epoch", "frozen")}}
    curves({"": run / "metrics.jsonl"}, panels, run / "curves.png")
    played = encoding.is_note(words)
    notes = encoding.timeline(words[played])
    figure = new_figure(roll_height(notes))
    draw_masker(figure, notes, scores[played], frozen[played])
    save(figure, run / "masker.png")


@picture
def draw_finetuning(run: Path, report: dict) -> None:
    """run/curves.png and run/confusion.png of a fine-tuning run."""
    trainings = report["trainings"]
    kept = next(each["test"] for each in trainings if each["seed"] == report["model"]["seed"])
    first, *_, unit = [name for name, of in kept.items() if isinstance(of, dict)] * 2  # notes, or segments and pieces
    runs = {f"seed {each['seed']}": run / f"seed-{each['seed']}" / "metrics.jsonl" for each in trainings}
    levels = {f"{name}, test": of[first]["accuracy"] for name, of in report["baselines"].items() if of}
    panels = {
        title: {"training": ("epoch", "train", name), "validation": ("epoch", "valid", name)}
        for title, name in ((f"accuracy, {first}", "accuracy"), ("loss", "loss"))
    }
    curves(runs, panels, run / "curves.png", "epoch", f"{report['task']}: {len(runs)} trainings", levels)
    title, matrix = f"{report['task']}, test {unit}", np.array(kept[unit]["confusion"])
    draw_confusion(title, matrix, report["classes"], run / "confusion.png")


@picture
def draw_confusion(title: str, matrix: np.ndarray, classes: list[str], out: Path) -> None:
    """A confusion [C, C], rows true, into a PNG: colours are shares of the row, numbers are counts."""
    figure = new_figure(4.6)
    axis = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    for (row, column), count in np.ndenumerate(matrix if len(classes) <= 20 else np.zeros((0, 0))):
        colour = "white" if shares[row, column] > 0.6 else "black"
        axis.text(column, row, f"{count:,}", ha="center", va="center", color=colour)
    axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axis.set_yticks(range(len(classes)), classes)
    axis.set(title=title, xlabel="predicted", ylabel="true")
    save(figure, out)


@picture
def draw_results(table: dict, out: Path) -> None:
    """Test accuracy of every arm of every task (reproduce.py: collect), baselines as lines, into a PNG."""
    arms = {name: task["arms"] for name, task in table.items()}
    units = ("notes", "segments", "pieces")
    panels = [(name, unit) for name in table for unit in units if unit in next(iter(arms[name].values()))]
    if not panels:
        return
    figure, lines = new_figure(3.2 * len(panels)), {}
    for axis, (name, unit) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        spreads = [arm[unit]["accuracy"] for arm in arms[name].values()]
        means, deviations = ([100 * (spread[key] or 0) for spread in spreads] for key in ("mean", "deviation"))
        axis.errorbar(means, range(len(spreads)), xerr=deviations, fmt="o", capsize=3, color=BLUE)
        for style, (baseline, figures) in zip((":", "--"), table[name]["baselines"].items(), strict=False):
            if figures:
                lines[baseline] = axis.axvline(100 * figures[unit]["accuracy"], color=BLACK, ls=style, lw=1)
        axis.set_yticks(range(len(spreads)), list(arms[name]))
        axis.invert_yaxis()
        axis.grid(alpha=0.3, axis="x")
        axis.set(title=f"{name}: {unit}, accuracy in %")
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=max(1, len(lines)))
    save(figure, out)


@picture
def draw_bias(measured: dict, out: Path) -> None:
    """Recovery by frequency of several models (bias.json of reproduce.py), into a PNG."""
    figure = new_figure(4)
    recoveries = {name: run["recovery_by_frequency"] for name, run in measured["runs"].items()}
    draw_recovery(figure, measured["fields"], recoveries)
    save(figure, out)


def draw_recovery(figure, fields: list[str], recoveries: dict[str, list]) -> None:
    """For each field and model a curve from the rarest tenth of the notes to the commonest."""
    axis = figure.subplots()
    for colour, (name, table) in zip(COLOURS, recoveries.items(), strict=False):
        for place, row in enumerate(table):
            label = "" if place else name
            axis.plot(place + np.linspace(-0.4, 0.4, len(row)), row, "o-", ms=3, color=colour, label=label)
    axis.set_xticks(range(len(fields)), fields)
    axis.set(title="share of hidden notes restored, from those with the rarest values of a field to the commonest")
    axis.set(ylim=(0, 1.05))
    axis.grid(axis="y", alpha=0.3)
    if len(recoveries) > 1:
        figure.legend(loc="outside lower center", ncols=len(recoveries))


Notes = tuple[np.ndarray, np.ndarray, np.ndarray]  # of each note start and end in beats, and MIDI pitch


def line_length(notes: Notes) -> int:
    """How many beats of a piano roll make a line: all, or at most 32, or more where that made over twelve lines."""
    beats = np.ceil(notes[1].max())
    return int(min(beats, max(32, np.ceil(beats / 12))))


def roll_height(notes: Notes) -> float:
    """Of a piano roll, in inches."""
    return 0.9 + 1.5 * np.ceil(notes[1].max() / line_length(notes))


def lines(figure, notes: Notes) -> Iterator[tuple]:
    """The axes of a piano roll, one below the other, each with the notes that sound in it, bool [n]."""
    (start, end, pitch), beats = notes, line_length(notes)
    for number, axis in enumerate(figure.subplots(int(np.ceil(end.max() / beats)), 1, squeeze=False)[:, 0]):
        first, last = number * beats, (number + 1) * beats
        axis.set(xlim=(first, last), ylim=(pitch.min() - 2, pitch.max() + 2), ylabel="MIDI pitch")
        yield axis, (start < last) & (end > first)
    axis.set_xlabel("beat")


def draw_notes(axis, notes: Notes, rows: np.ndarray, **style):
    """The notes of these rows, bool [n], as bars; the collection of matplotlib's."""
    start, end, pitch = (column[rows] for column in notes)
    return axis.hlines(pitch, start, np.maximum(end, start + 0.1), **{"lw": 3} | style)


def draw_groups(figure, title: str, notes: Notes, groups: dict[str, tuple[str, np.ndarray]]) -> None:
    """A piano roll with a colour for each of `groups`, {label: (colour, bool [n])}."""
    from matplotlib.lines import Line2D

    for axis, inside in lines(figure, notes):
        for colour, rows in groups.values():
            draw_notes(axis, notes, rows & inside, color=colour)
    handles = [Line2D([], [], color=colour, lw=3, label=label) for label, (colour, _) in groups.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(groups))
    figure.suptitle(title)


def draw_masker(figure, notes: Notes, scores: np.ndarray, frozen: np.ndarray | None) -> None:
    """A piano roll coloured by the masker's probabilities [n]; frozen notes, bool [n], have a frame."""
    axes = []
    for axis, inside in lines(figure, notes):
        if frozen is not None:
            draw_notes(axis, notes, inside & frozen, color=VERMILION, lw=6, capstyle="projecting")
        colours = draw_notes(axis, notes, inside, array=scores[inside], cmap="viridis", clim=(0, scores.max()))
        axes.append(axis)
    figure.colorbar(colours, ax=axes, pad=0.01)
    frames = "; framed notes are frozen" * (frozen is not None)
    figure.suptitle(f"the masker's probability that a note is hopeless{frames}")


@picture
def draw_inspection(file: str, encoding: tokenizer.Encoding, view, frozen, recovery: np.ndarray, out: Path) -> None:
    """The first sequence of a piece, scored and restored, and recovery by frequency [F, 10] of all pieces, as a PNG.

    view: inspection.Inspection of the piece; frozen: bool [n], or None for a piece that did not train.
    """
    shown = view.sequence == 0
    notes, hidden = encoding.timeline(view.true[shown]), view.group[shown] == 0
    right = hidden & (view.recovered == view.true)[shown, encoding.pitch_field]
    heights = [roll_height(notes)] * (1 if view.scores is None else 2) + [3.2]
    figure = new_figure(sum(heights))
    *above, restored, below = figure.subfigures(len(heights), 1, height_ratios=heights)
    for part in above:  # a model of random masking has no masker
        draw_masker(part, notes, view.scores[shown], None if frozen is None else frozen[shown])
    groups = {"hidden and restored": (GREEN, right), "hidden, not restored": (VERMILION, hidden & ~right)}
    title = f"{right.sum()} of {hidden.sum()} notes that were hidden together are restored in pitch"
    draw_groups(restored, title, notes, {"shown": (GREY, ~hidden)} | groups)
    draw_recovery(below, encoding.names, {"": recovery})
    figure.suptitle(f"{file}: the first {len(hidden)} notes")
    save(figure, out)


@picture
def draw_melody(file: str, notes: Notes, groups: dict[str, np.ndarray], out: Path) -> None:
    """A piano roll with a colour for each of three groups, {name: bool [n]}, into a PNG."""
    figure = new_figure(roll_height(notes))
    colours = zip(groups.items(), (VERMILION, BLUE, GREY), strict=False)
    draw_groups(figure, file, notes, {name: (colour, rows) for (name, rows), colour in colours})
    save(figure, out)
