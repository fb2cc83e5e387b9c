"""Pictures (extra `plot`): curves of metrics, confusions, results, bias, and piano rolls."""

import os
import sys
import warnings
from collections.abc import Callable
from functools import cache, reduce, wraps
from operator import getitem
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from amb import tokenizer
from amb.files import read_metrics, writing

BAR = 0.8  # thickness of a note, in semitones
COLOURS = ("#d55e00", "#0072b2", "0.78")  # of MELODY, BRIDGE and the rest: told apart by the colour-blind


def picture(draw: Callable[..., None]) -> Callable[..., bool]:
    """Makes a drawing function one that ends no run: it returns whether it drew, and one line says why it did not."""

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


@cache  # a reason is said once, and not after every epoch
def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def subplots(rows: int, columns: int, size: tuple[float, float]):
    """A figure and its axes, [rows, columns], without pyplot's state and windows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure, out: Path, dpi: int = 110) -> None:
    """Write a PNG, whole or not at all: a picture that is open in a viewer is never half there."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # names may hold $
    with writing(out) as file:
        figure.savefig(file, dpi=dpi, format="png", pil_kwargs={"optimize": True})


class Panel(NamedTuple):
    title: str
    lines: dict[str, tuple[str, ...]]  # by label: "step" or "epoch", then the keys to the value in such a line
    axis: dict = {}  # for Axes.set


VALIDATION = [Panel(f"validation {name}", {name: ("epoch", "valid", name)}) for name in ("accuracy", "loss")]


@picture
def curves(runs: dict[str, Path], panels: list[Panel], out: Path, x: str = "step", title: str = "") -> None:
    """Curves over steps or epochs (`x`) of runs, {name: metrics.jsonl}, into a PNG.

    One run has a colour for each line of a panel. Several runs have a colour for each name up to the first comma, and
    panels of one line.
    """
    figure, axes = subplots(1, len(panels), (5.2 * len(panels), 4.2))
    groups = list(dict.fromkeys(name.split(",")[0] for name in runs))
    for axis, panel in zip(axes.flat, panels, strict=True):
        for name, file in runs.items():
            metrics, group = read_metrics(file), name.split(",")[0]
            for number, (label, (kind, *keys)) in enumerate(panel.lines.items()):
                label, colour = (label, number) if len(runs) == 1 else (group, groups.index(group))
                values = [reduce(getitem, keys, entry) for entry in metrics[kind]]
                style = {"color": f"C{colour}", "marker": "o" if kind == "epoch" else "", "ms": 3, "lw": 1}
                axis.plot([entry[x] for entry in metrics[kind]], values, label=label, **style)
        axis.set(title=panel.title, xlabel=x, **panel.axis)
        axis.grid(alpha=0.3)
        handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))  # one a label
        if len(handles) > 1:
            axis.legend(handles.values(), handles, fontsize=8)
    figure.suptitle(title)
    save(figure, out)


@picture
def draw_run(run: Path, encoding: tokenizer.Encoding, words: np.ndarray, scores: np.ndarray) -> None:
    """run/curves.png and run/masker.png of a pre-training.

    words [n, F] of a validation sequence, without PAD; scores [n], the masker's probabilities.
    """
    losses = {"recovery, training": ("step", "recovery"), "recovery, validation": ("epoch", "valid", "loss")}
    losses |= {"masker, training": ("step", "masker")}
    fields = {field.name: ("epoch", "valid", "masked", field.name) for field in encoding.fields}
    panels = [
        Panel("loss", losses, {"ylim": (0, None)}),
        Panel("validation accuracy on masked notes", fields, {"ylim": (0, 1)}),
        Panel("share of frozen notes", {"frozen": ("epoch", "frozen")}, {"ylim": (0, None)}),
    ]
    curves({"": run / "metrics.jsonl"}, panels, run / "curves.png")
    figure, ((axis,),) = subplots(1, 1, (15, 4.8))
    played = encoding.is_note(words)
    draw_masker(figure, axis, encoding.timeline(words[played]), scores[played])
    axis.set(title="the masker's view of a validation piece")
    save(figure, run / "masker.png")


@picture
def draw_finetuning(run: Path, report: dict) -> None:
    """run/curves.png and run/confusion.png of a fine-tuning run."""
    trainings, unit = report["trainings"], "notes" if report["level"] == "note" else "pieces"
    runs = {f"seed {each['seed']}": run / f"seed-{each['seed']}" / "metrics.jsonl" for each in trainings}
    curves(runs, VALIDATION, run / "curves.png", "epoch", f"{report['task']}: validation on clean input")
    kept = next(each["test"] for each in trainings if each["seed"] == report["model"]["seed"])
    confusion = kept[unit]["confusion"], report["classes"]
    draw_confusions({f"{report['task']}, test {unit}": confusion}, run / "confusion.png")


@picture
def draw_confusions(tables: dict[str, tuple[list, list[str]]], out: Path) -> None:
    """Confusions {title: (matrix [C, C], rows true; classes)}, into a PNG.

    Colours are shares of the row, numbers are counts. Nothing without a table.
    """
    if not tables:
        return
    figure, axes = subplots(1, len(tables), (5.6 * len(tables), 5.4))
    for axis, (title, (matrix, classes)) in zip(axes.flat, tables.items(), strict=True):
        matrix = np.array(matrix)
        shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        for (row, column), count in np.ndenumerate(matrix if len(classes) <= 20 else np.zeros((0, 0))):
            colour = "white" if shares[row, column] > 0.6 else "black"
            axis.text(column, row, f"{count:,}", ha="center", va="center", color=colour, fontsize=8)
        axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right", fontsize=8)
        axis.set_yticks(range(len(classes)), classes, fontsize=8)
        axis.set(title=title, xlabel="predicted", ylabel="true")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    save(figure, out)


@picture
def draw_results(table: dict, out: Path) -> None:
    """Test accuracy of every arm of every task (reproduce.py: collect), baselines as lines, into a PNG."""
    panels = [
        (name, unit)
        for name, task in table.items()
        for unit in ("notes", "segments", "pieces")
        if unit in next(iter(task["arms"].values()))
    ]
    if not panels:
        return
    figure, axes = subplots(len(panels), 1, (8, 3.4 * len(panels)))
    lines = {}
    for (axis,), (name, unit) in zip(axes, panels, strict=True):
        arms, baselines = table[name]["arms"], table[name]["baselines"]
        spreads = [arm[unit]["accuracy"] for arm in arms.values()]
        means, deviations = ([100 * (spread[key] or 0) for spread in spreads] for key in ("mean", "deviation"))
        axis.errorbar(means, range(len(arms)), xerr=deviations, fmt="o", capsize=3)
        for style, (baseline, scores) in zip((":", "--"), baselines.items(), strict=False):
            if scores:
                lines[baseline] = axis.axvline(100 * scores[unit]["accuracy"], color="black", ls=style, lw=1)
        axis.set_yticks(range(len(arms)), list(arms))
        axis.invert_yaxis()
        axis.grid(alpha=0.3, axis="x")
        axis.set(title=f"{name}: {unit}, accuracy in %")
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=max(1, len(lines)))
    save(figure, out)


@picture
def draw_bias(measured: dict, out: Path) -> None:
    """Recovery by frequency of the true value and the distance of the marginals, field by field, into a PNG.

    `measured` is reproduce.py's bias.json.
    """
    fields, runs = measured["fields"], measured["runs"]
    figure, ((above,), (below,)) = subplots(2, 1, (13, 9))
    draw_recovery(above, fields, {name: np.array(run["recovery_by_frequency"]) for name, run in runs.items()})
    above.set(title="share of the hidden notes restored")
    for number, (name, run) in enumerate(runs.items()):
        places = np.arange(len(fields)) + 0.8 * (number + 0.5) / len(runs) - 0.4
        below.bar(places, run["marginal_distance_hopeless"], width=0.8 / len(runs), label=name)
    below.set_xticks(range(len(fields)), fields)
    below.set(title="distance of the marginals, most hopeless notes")
    save(figure, out)


def draw_recovery(axis, fields: list[str], tables: dict[str, np.ndarray]) -> None:
    """Recovery by frequency of several models, {name: [F, 10]}: for each field a curve from rarest to commonest."""
    for number, (name, table) in enumerate(tables.items()):
        for place, row in enumerate(table):
            label = None if place else name
            axis.plot(place + np.linspace(-0.4, 0.4, len(row)), row, "o-", ms=3, color=f"C{number}", label=label)
    axis.set_xticks(range(len(fields)), fields)
    axis.set(
        ylim=(0, 1.05), ylabel="restored", xlabel="in each field from the rarest tenth of the notes to the commonest"
    )
    axis.grid(axis="y", alpha=0.3)
    axis.legend()


Notes = tuple[np.ndarray, np.ndarray, np.ndarray]  # of each note start and end in beats, and MIDI pitch


def draw_notes(axis, notes: Notes, rows=slice(None), array: np.ndarray | None = None, **style):
    """The notes of these rows as bars, coloured by `array` [n] or in a style of matplotlib's; the collection."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    start, end, pitch = (column[rows] for column in notes)
    lengths = np.maximum(end - start, 0.1)
    boxes = [Rectangle((x, y - BAR / 2), w, BAR) for x, y, w in zip(start, pitch, lengths, strict=True)]
    collection = PatchCollection(boxes, **style)
    if array is not None:
        collection.set_array(array[rows])
    axis.add_collection(collection)
    axis.set_xlim(notes[0].min() - 1, notes[1].max() + 1)
    axis.set_ylim(notes[2].min() - 2, notes[2].max() + 2)
    axis.set(xlabel="beat", ylabel="MIDI pitch")
    return collection


def draw_masker(figure, axis, notes: Notes, scores: np.ndarray, frozen: np.ndarray | None = None) -> None:
    """A piano roll coloured by the masker's probabilities [n]; frozen notes, bool [n], have red frames."""
    collection = draw_notes(axis, notes, array=scores, cmap="viridis")
    figure.colorbar(collection, ax=axis, label="masker: probability that the note is hopeless", pad=0.01)
    if frozen is not None:
        draw_notes(axis, notes, frozen, facecolor="none", edgecolor="red", lw=1.3)


@picture
def draw_inspection(
    file: str,
    encoding: tokenizer.Encoding,
    views: dict,
    rows: np.ndarray,
    recoveries: dict[str, np.ndarray],
    frozen: np.ndarray | None,
    out: Path,
) -> None:
    """Some notes as one or two models see them, with recovery by frequency over all notes inspected, as a PNG.

    views: {name: inspection.Inspection}; rows: which notes to show; recoveries: by frequency, {name: [F, 10]};
    frozen: bool [n], the notes of the first piece that are in the first model's mask book, or None for what its masker
    would freeze.
    """
    figure, axes = subplots(len(views) + 2, 1, (15, 4.2 * (len(views) + 2)))
    name, view = next(iter(views.items()))
    notes, axis = encoding.timeline(view.true[rows]), axes[0, 0]
    if view.scores is None:
        draw_notes(axis, notes, facecolor="0.6")
        axis.set_title(f"{name}: a model of random masking has no masker")
    else:
        draw_masker(figure, axis, notes, view.scores[rows], (view.would_freeze if frozen is None else frozen)[rows])
        axis.set_title(
            f"{name}: the masker; red frames: notes that {'it would freeze' if frozen is None else 'are frozen'}"
        )
    for (axis,), (name, view) in zip(axes[1:], views.items(), strict=False):
        hidden = view.group[rows] == 0
        right = draw_restored(axis, encoding, view.true[rows], view.recovered[rows], hidden)
        text = f"{right} of {hidden.sum()} hidden notes are restored in pitch (green)"
        axis.set_title(f"{name}: {text}; a cross: the answer in the place of a framed note")
    draw_recovery(axes[-1, 0], [field.name for field in encoding.fields], recoveries)
    axes[-1, 0].set_title("bias: the steeper a curve, the more the model answers with habit")
    figure.suptitle(f"{file}: its first {len(rows)} notes, and the bias over all notes", size=15)
    save(figure, out, dpi=75)


def draw_restored(
    axis, encoding: tokenizer.Encoding, words: np.ndarray, restored: np.ndarray, hidden: np.ndarray
) -> int:
    """A piano roll of words [n, F]: which of the hidden ones, bool [n], were restored in their pitch; how many.

    restored [n, F]: the words that the model gives for hidden ones.
    """
    answers = words.copy()
    answers[:, encoding.pitch_field] = restored[:, encoding.pitch_field]
    notes, (start, _, answer) = encoding.timeline(words), encoding.timeline(answers)
    right = hidden & (answers == words).all(axis=1)
    wrong = hidden & ~right
    draw_notes(axis, notes, ~hidden, facecolor="0.85")
    draw_notes(axis, notes, right, facecolor="tab:green")
    draw_notes(axis, notes, wrong, facecolor="none", edgecolor="black", lw=1.2)
    axis.vlines(start[wrong], notes[2][wrong], answer[wrong], color="tab:red", lw=0.7, alpha=0.6)
    axis.plot(start[wrong], answer[wrong], "x", color="tab:red", ms=5)
    axis.set_ylim(min(notes[2].min(), *answer) - 2, max(notes[2].max(), *answer) + 2)
    return right.sum()


@picture
def draw_melody(file: str, notes: Notes, groups: dict[str, np.ndarray], out: Path) -> None:
    """A piano roll in lines of 64 beats or more, at most twelve lines, into a PNG; a colour for each of `groups`,
    {name: bool [n]}."""
    from matplotlib.patches import Patch

    start, end, _ = notes
    beats = max(64, int(np.ceil(end.max() / 12)))
    lines = max(1, int(np.ceil(end.max() / beats)))
    figure, axes = subplots(lines, 1, (15, 0.6 + 2.2 * lines))
    for number, (axis,) in enumerate(axes):
        inside = (start < (number + 1) * beats) & (end > number * beats)
        for colour, rows in zip(COLOURS, groups.values(), strict=False):
            draw_notes(axis, notes, rows & inside, facecolor=colour)
        axis.set(xlim=(number * beats, (number + 1) * beats), xlabel="beat" if number == lines - 1 else "")
    patches = [Patch(color=colour, label=name) for colour, name in zip(COLOURS, groups, strict=False)]
    figure.legend(handles=patches, loc="outside upper right", ncols=len(groups))
    figure.suptitle(file)
    save(figure, out)
