"""An inspection as one picture that explains itself (extra `plot`): the masker's view, the recovery, the bias."""

from pathlib import Path

import numpy as np

from amb import checkpoint
from amb.inference import Trained
from amb.inspection import Bias, Inspection
from amb.pieces import Piece

RIGHT, WRONG, GUESS = "tab:green", "black", "tab:red"


def draw(
    views: list[tuple[str, Trained, Inspection, list[Bias]]], piece: Piece, frozen: np.ndarray | None, out: Path
) -> None:
    """The first sequence of `piece` as one or two models see it, with their bias over all pieces inspected, as a PNG.

    views: name, model, inspection of `piece` and bias of each model; frozen: bool [n], the first model's mask book, or
    None for what its masker would freeze.
    """
    from matplotlib import pyplot as plt

    first = [np.flatnonzero(view.sequence == 0) for _, _, view, _ in views]
    figure, axes = plt.subplots(
        len(views) + 2, 1, figsize=(15, 4.2 * (len(views) + 2)), layout="constrained", gridspec_kw={"hspace": 0.06}
    )
    name, trained, view, _ = views[0]
    _draw_masker(figure, axes[0], name, trained, view, piece, first[0], frozen)
    for axis, rows, (name, trained, view, _) in zip(axes[1:], first, views, strict=False):
        _draw_recovery(axis, name, trained, view, piece, rows)
    _draw_bias(axes[-1], [(name, table) for name, _, _, table in views])
    figure.suptitle(f"{piece.file or 'a piece'}: what pre-training makes of its first {len(first[0])} notes", size=15)
    try:
        with checkpoint.writing(out) as file:
            figure.savefig(file, dpi=75, format="png", pil_kwargs={"optimize": True})
    finally:
        plt.close(figure)


def _draw_masker(figure, axis, name, trained, view, piece, rows, frozen) -> None:
    boxes = _boxes(axis, trained, piece, rows)
    if view.scores is None:
        _add(axis, boxes, facecolor="0.6")
        _explain(axis, f"{name}: the notes. This model was trained on random masking: it has no masker to ask.")
        return
    roll = _add(axis, boxes, array=view.scores[rows], cmap="viridis")
    figure.colorbar(roll, ax=axis, label="masker: probability that the note is hopeless", pad=0.01)
    outlined = (view.would_freeze if frozen is None else frozen)[rows]
    _add(axis, [box for box, on in zip(boxes, outlined, strict=True) if on], facecolor="none", edgecolor="red", lw=1.3)
    state = "the run has frozen" if frozen is not None else "the masker would freeze next (its book was not found)"
    _explain(
        axis,
        f"{name}: which notes cannot be guessed? Each bar is a note. Bright: the masker expects that nobody could "
        f"restore it from the others;\ndark: its context determines it. Red frames: notes that {state}, so that they "
        "are no longer practised, for all they could teach is habit.",
    )


def _draw_recovery(axis, name, trained, view, piece, rows) -> None:
    boxes = _boxes(axis, trained, piece, rows)
    encoding = trained.encoding
    column = encoding.pitch_field
    hidden = view.group[rows] == 0
    true, answer = piece.words[rows, column].astype(int), view.recovered[rows, column]
    right = hidden & (true == answer)
    wrong = hidden & ~right
    pick = [[box for box, on in zip(boxes, flags, strict=True) if on] for flags in (~hidden, right, wrong)]
    _add(axis, pick[0], facecolor="0.85")
    _add(axis, pick[1], facecolor=RIGHT)
    _add(axis, pick[2], facecolor="none", edgecolor=WRONG, lw=1.2)
    guessed = piece.words[rows].astype(np.int64)
    guessed[:, column] = answer
    start, end, pitch = encoding.timeline(guessed)
    for x, y, was in zip(start[wrong], pitch[wrong], encoding.timeline(piece.words[rows])[2][wrong], strict=True):
        axis.plot([x, x], [was, y], color=GUESS, lw=0.7, alpha=0.6)
    axis.plot(start[wrong], pitch[wrong], "x", color=GUESS, ms=5)
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, *pitch[wrong] - 2, low), max(high, *pitch[wrong] + 2, high))
    _explain(
        axis,
        f"{name}: one note in seven was hidden, and restored from the grey ones. Green: the right pitch came back "
        f"({right.sum()} of {hidden.sum()}).\n"
        "Black frame: a true note in whose place another pitch was given, the red cross.",
    )


def _draw_bias(axis, tables: list[tuple[str, list[Bias]]]) -> None:
    width = 0.8 / (2 * len(tables))
    for number, (name, table) in enumerate(tables):
        places = np.arange(len(table)) - 0.4 + (2 * number + 0.5) * width
        colour = f"C{number}"
        axis.bar(
            places, [row.frequent_accuracy for row in table], width, color=colour, label=f"{name}, frequent values"
        )
        axis.bar(
            places + width, [row.rare_accuracy for row in table], width, color=colour, alpha=0.45,
            label=f"{name}, rare values",
        )  # fmt: skip
        for x, row in zip(places + width, table, strict=True):
            if not np.isnan(row.rare_as_frequent):
                axis.plot([x - width / 2, x + width / 2], [row.rare_as_frequent] * 2, color="black", lw=1.5)
    axis.plot([], [], color="black", lw=1.5, label="rare values taken for a frequent one")
    axis.set_xticks(range(len(tables[0][1])), [row.field for row in tables[0][1]])
    axis.set(ylim=(0, 1.05), ylabel="share of hidden notes", xlim=(-0.6, len(tables[0][1]) - 0.4))
    axis.grid(axis="y", alpha=0.3)
    axis.legend(ncols=len(tables) + 1, fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.08))
    _explain(
        axis,
        "Bias: every note was hidden once. Solid: how often a field is restored where its value is frequent (the "
        "fewest values that make up half of the notes);\npale: where it is rare. The taller the step down, and the "
        "higher the black line, the more the model answers with habit instead of context.",
    )


def _boxes(axis, trained: Trained, piece: Piece, rows: np.ndarray) -> list:
    from matplotlib.patches import Rectangle

    start, end, pitch = trained.encoding.timeline(piece.words[rows])
    axis.set_xlim(start.min() - 1, end.max() + 1)
    axis.set_ylim(pitch.min() - 2, pitch.max() + 2)
    axis.set(xlabel="beat", ylabel="MIDI pitch")
    lengths = np.maximum(end - start, 0.1)
    return [Rectangle((x, y - 0.4), w, 0.8) for x, y, w in zip(start, pitch, lengths, strict=True)]


def _add(axis, boxes: list, array=None, **style):
    from matplotlib.collections import PatchCollection

    collection = PatchCollection(boxes, **style)
    if array is not None:
        collection.set_array(array)
    axis.add_collection(collection)
    return collection


def _explain(axis, text: str) -> None:
    axis.set_title(text, loc="left", size=11)
