"""Pictures of a run (extra `plot`): its curves, and a piano roll coloured by what the masker thinks of each note."""

from pathlib import Path

import numpy as np
import torch

import tokenizer
from amb.metrics import read_metrics


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
    """Write beside, then rename: a picture that is being looked at is never half there."""
    from matplotlib import pyplot as plt

    beside = out.with_name(f".{out.name}")
    figure.savefig(beside, dpi=110, format="png")
    plt.close(figure)
    beside.replace(out)


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
