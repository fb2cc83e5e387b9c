"""Pictures of a run (extra `plot`): its curves, and a piano roll coloured by what the masker thinks of each note."""

from pathlib import Path

import numpy as np
import torch

from amb import tokenizer
from amb.evaluate import LEVELS, kept_training
from amb.files import read_metrics, writing


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    return True


def draw_curves(metrics: Path, out: Path) -> None:
    """Losses, masked accuracy per field and share of frozen notes over the steps of metrics.jsonl, into a PNG."""
    from matplotlib import pyplot as plt

    lines = read_metrics(metrics)
    steps, epochs = lines["step"], lines["epoch"]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    left.plot([s["step"] for s in steps], [s["recovery"] for s in steps], label="recovery, training", lw=0.8)
    left.plot(
        [e["step"] for e in epochs], [e["valid"]["loss"] for e in epochs], "o-", label="recovery, validation", ms=3
    )
    if any(s["masker"] for s in steps):
        left.plot([s["step"] for s in steps], [s["masker"] for s in steps], label="masker, training", lw=0.8)
    left.set(title="loss", xlabel="step", yscale="log")
    for name in epochs[0]["valid"]["masked"] if epochs else ():
        middle.plot([e["step"] for e in epochs], [e["valid"]["masked"][name] for e in epochs], "o-", label=name, ms=3)
    middle.set(title="validation accuracy on masked notes", xlabel="step", ylim=(0, 1))
    right.plot([e["step"] for e in epochs], [e["frozen"] for e in epochs], "o-", ms=3, color="tab:blue")
    right.set(title="share of frozen notes", xlabel="step", ylim=(0, None))
    for axis in (left, middle):
        axis.legend(fontsize=8)
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    _save(figure, out)


def draw_finetuning(run: Path, report: dict) -> None:
    """run/curves.png and run/confusion.png of a fine-tuning run. Nothing without matplotlib."""
    if not available():
        return
    curves = {
        f"seed {training['seed']}": run / f"seed-{training['seed']}" / "metrics.jsonl"
        for training in report["trainings"]
    }
    draw_learning(curves, f"{report['task']}: validation on clean input", run / "curves.png")
    kept = kept_training(report)
    unit = "notes" if report["level"] == "note" else "pieces"
    title = f"{report['task']}, test {unit}"
    draw_confusion(np.array(kept["test"][unit]["confusion"]), report["classes"], title, run / "confusion.png")


def draw_learning(curves: dict[str, Path], title: str, out: Path) -> None:
    """Validation accuracy and loss by epoch of several trainings (name: metrics.jsonl), into a PNG.

    Trainings whose names agree up to the first comma share a colour; a dot marks each one's best epoch.
    """
    from matplotlib import pyplot as plt

    colours = {name.split(",")[0]: None for name in curves}
    colours = {name: f"C{number}" for number, name in enumerate(colours)}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    labelled = set()
    for name, file in curves.items():
        epochs, group = read_metrics(file)["epoch"], name.split(",")[0]
        numbers = [epoch["epoch"] for epoch in epochs]
        best = max(range(len(epochs)), key=lambda n: (epochs[n]["valid"]["accuracy"], -epochs[n]["valid"]["loss"]))
        for axis, figure_name in zip(axes, ("accuracy", "loss"), strict=True):
            values = [epoch["valid"][figure_name] for epoch in epochs]
            label = None if (axis, group) in labelled else group
            axis.plot(numbers, values, color=colours[group], lw=1.2, alpha=0.8, label=label)
            axis.plot(numbers[best], values[best], "o", color=colours[group], ms=5)
            labelled.add((axis, group))
            axis.set(title=figure_name, xlabel="epoch")
            axis.grid(alpha=0.3)
    axes[0].legend(fontsize=9)
    figure.suptitle(title)
    _save(figure, out)


def draw_confusion(matrix: np.ndarray, classes: list[str], title: str, out: Path) -> None:
    """A confusion matrix [C, C], rows true: colours are shares of the row, numbers are counts; into a PNG."""
    from matplotlib import pyplot as plt

    side = 2.5 + 0.6 * len(classes)
    figure, axis = plt.subplots(figsize=(side + 1, side), layout="constrained")
    image = _confusion(axis, matrix, classes, title)
    figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.8)
    _save(figure, out)


def draw_confusions(table: dict, out: Path) -> None:
    """Of every task (reproduce.py: collect) the arm of best validation accuracy, its seeds together, into a PNG."""
    from matplotlib import pyplot as plt

    if not table:
        return
    figure, axes = plt.subplots(1, len(table), figsize=(5.6 * len(table), 5.4), layout="constrained", squeeze=False)
    for axis, (name, found) in zip(axes.flat, table.items(), strict=True):
        arm = max(found["arms"], key=lambda arm: found["arms"][arm]["valid"]["mean"])
        unit = LEVELS[found["level"]][-1]
        matrix = np.array(found["arms"][arm][unit]["confusion"])
        _confusion(axis, matrix, found["classes"], f"{name}: {arm}; test {unit}")
    _save(figure, out)


def _confusion(axis, matrix: np.ndarray, classes: list[str], title: str):
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    for (row, column), count in np.ndenumerate(matrix if len(classes) <= 20 else np.zeros((0, 0))):
        colour = "white" if shares[row, column] > 0.6 else "black"
        axis.text(column, row, f"{count:,}", ha="center", va="center", color=colour, fontsize=8)
    axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(len(classes)), classes, fontsize=8)
    axis.set(title=title, xlabel="predicted", ylabel="true")
    return image


def draw_results(table: dict, out: Path) -> None:
    """Test accuracy of every arm of every task (reproduce.py: collect), baselines as lines, into a PNG."""
    from matplotlib import pyplot as plt

    panels = [(name, unit) for name, found in table.items() for unit in LEVELS[found["level"]]]
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.4 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    lines = {}
    for axis, (name, unit) in zip(axes.flat, panels, strict=False):
        arms, baselines = table[name]["arms"], table[name]["baselines"]
        figures = [arm[unit]["accuracy"] for arm in arms.values()]
        starts = [arm.split(",")[0] for arm in arms]
        colour = {start: f"C{number}" for number, start in enumerate(dict.fromkeys(starts))}
        for row, (start, each) in enumerate(zip(starts, figures, strict=True)):
            error = 100 * (each["deviation"] or 0)
            axis.errorbar(100 * each["mean"], row, xerr=error, fmt="o", color=colour[start], capsize=3)
        for style, (baseline, scores) in zip((":", "--"), baselines.items(), strict=False):
            if scores:
                lines[baseline] = axis.axvline(100 * scores[unit]["accuracy"], color="black", ls=style, lw=1)
        axis.set_yticks(range(len(arms)), list(arms))
        axis.invert_yaxis()
        axis.grid(alpha=0.3, axis="x")
        axis.set(title=f"{name}: {unit}, accuracy in %")
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=max(1, len(lines)))
    _save(figure, out)


def draw_pretrainings(curves: dict[str, Path], out: Path) -> None:
    """Masked validation accuracy and loss by step of several pre-trainings (name: metrics.jsonl), into a PNG."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, file in curves.items():
        epochs = read_metrics(file)["epoch"]
        for axis, value in zip(axes, ("accuracy", "loss"), strict=True):
            axis.plot([e["step"] for e in epochs], [e["valid"][value] for e in epochs], "o-", ms=3, label=name)
            axis.set(title=f"{value} on a random 15 % of the validation notes", xlabel="step")
            axis.grid(alpha=0.3)
    axes[0].legend()
    _save(figure, out)


def draw_bias(measured: dict, out: Path) -> None:
    """Recovery by frequency of the true value, field by field, and the distance of the marginals, into a PNG.

    `measured` is reproduce.py's bias.json.
    """
    from matplotlib import pyplot as plt

    fields, runs = measured["fields"], measured["runs"]
    figure, axes = plt.subplots(3, 3, figsize=(13, 9), layout="constrained")
    for row, (axis, field) in enumerate(zip(axes.flat, fields, strict=False)):
        for name, run in runs.items():
            axis.plot(range(1, 11), run["recovery_by_frequency"][row], "o-", ms=3, label=name)
        axis.set(title=f"{field}: recovery, rarest to commonest tenth", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    last = axes.flat[-1]
    for number, (name, run) in enumerate(runs.items()):
        places = np.arange(len(fields)) + 0.8 * number / len(runs)
        last.bar(places, run["marginal_distance_hopeless"], width=0.8 / len(runs), label=name)
    last.set_xticks(np.arange(len(fields)) + 0.3, fields, rotation=45, fontsize=8)
    last.set(title="distance of the marginals, hopeless notes")
    _save(figure, out)


def draw_roll(words: np.ndarray, scores: np.ndarray, encoding: tokenizer.Encoding, title: str, out: Path) -> None:
    """A piano roll of one sequence, each note coloured by the masker's probability, into a PNG.

    words [n, F], without PAD; scores [n] in (0, 1). Time and pitch are read from the MIDI that the words decode to.
    """
    from matplotlib import pyplot as plt
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    beats, pitches, lengths, scores = _notes(words, scores, encoding)
    figure, axis = plt.subplots(figsize=(15, 4.8), layout="constrained")
    boxes = [Rectangle((x, y - 0.4), max(w, 0.1), 0.8) for x, y, w in zip(beats, pitches, lengths, strict=True)]
    roll = PatchCollection(boxes, cmap="viridis")
    roll.set_array(scores)
    axis.add_collection(roll)
    axis.set(title=title, xlabel="beat", ylabel="MIDI pitch")
    axis.set_xlim(beats.min() - 1, (beats + lengths).max() + 1)
    axis.set_ylim(pitches.min() - 2, pitches.max() + 2)
    figure.colorbar(roll, ax=axis, label="masker: probability that the note is hopeless", pad=0.01)
    _save(figure, out)


def _notes(words: np.ndarray, scores: np.ndarray, encoding: tokenizer.Encoding) -> tuple[np.ndarray, ...]:
    """Start, pitch, length (in beats) and score of each word that is a note."""
    played = encoding.is_note(words)
    start, end, pitch = encoding.timeline(words[played])
    return start, pitch, end - start, scores[played]


def _save(figure, out: Path) -> None:
    """Write it whole or not at all: a picture that is being looked at is never half there."""
    from matplotlib import pyplot as plt

    try:
        with writing(out) as file:
            figure.savefig(file, dpi=110, format="png")
    finally:
        plt.close(figure)


@torch.no_grad()
def draw_run(run: Path, model, sequences, device: torch.device) -> None:
    """run/curves.png and run/masker.png; the roll shows the first validation sequence. Nothing without matplotlib."""
    if not available():
        return
    draw_curves(run / "metrics.jsonl", run / "curves.png")
    words, lengths = sequences.batch(np.arange(1))
    model.eval()
    inputs = torch.from_numpy(words).to(device), torch.from_numpy(lengths).to(device)
    scores = model.masker(model.encoder(*inputs))[0, : lengths[0]].cpu().numpy()
    encoding = tokenizer.load(sequences.stores[0].encoding)
    draw_roll(words[0, : lengths[0]], scores, encoding, "the masker's view of a validation piece", run / "masker.png")
