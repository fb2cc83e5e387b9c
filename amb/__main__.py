"""amb: use trained models from a shell. `amb --help`, `amb COMMAND --help`; the same as `python -m amb`.

A command is a function: its arguments stand above it, its docstring is its help. Results go to stdout or into a file,
all else to stderr; errors are raised and printed as one line. torch is imported when a command runs, so that
`amb --help` answers at once.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from inspect import cleandoc
from pathlib import Path

import numpy as np
from tqdm import tqdm

import amb
from amb.config import positive
from amb.files import writing
from amb.table import table

COMMANDS: dict[str, tuple[Callable[[Namespace], None], tuple]] = {}


def flag(*names: str, **options) -> tuple:
    """An argument of a command, as `add_argument` takes it."""
    return names, options


def command(*flags: tuple) -> Callable:
    """Makes a function of parsed arguments a command with these flags; the last paragraph of its help is an example."""

    def register(function: Callable[[Namespace], None]) -> Callable[[Namespace], None]:
        COMMANDS[function.__name__] = function, flags
        return function

    return register


MODEL = flag("checkpoint", type=Path, metavar="MODEL", help="a run, a checkpoint, or `small`")
FILES = flag("files", type=Path, nargs="+", metavar="MIDI", help="files and folders")
SONG = flag("midi", type=Path, metavar="MIDI", help="the file to work on")
OUT = flag("--out", type=Path, required=True, metavar="FILE", help="the file to write")
WORKERS = flag("--workers", type=positive, metavar="N", help="processes that read files")
COMPUTE = (
    flag("--device", metavar="NAME", help="cpu, cuda, cuda:1 … (default: a GPU if there is)"),
    flag("--dtype", choices=("fp32", "bf16", "auto"), default="fp32", help="compute type (default: fp32)"),
)


@command(
    MODEL,
    FILES,
    flag("--segments", action="store_true", help="also the class of each sequence of notes within a piece"),
    flag("--json", action="store_true", help="a JSON object a line instead of a table"),
    WORKERS,
    *COMPUTE,
)
def predict(args: Namespace) -> None:
    """The class of each piece: composer, emotion, your own.

    A checkpoint of a note task (melody, velocity, note) gives each piece's share of notes of each class.

    example: amb predict small my/midi
    """
    from amb import inference

    model = amb.load(args.checkpoint, args.device, args.dtype)
    by_note = bool(model.task) and model.task.level == "note"
    if args.segments and by_note:
        raise ValueError(f"{model.path} labels notes ({model.task.name}), so its pieces have no --segments")
    files = inference.find(args.files)
    progress, rows = Progress(len(files), model.device), []
    for prediction in model.each_prediction(files, args.workers):
        progress.count(prediction.file, prediction.notes, prediction.error)
        if prediction.error:
            continue
        if args.json:
            progress.bar.write(json.dumps(as_json(prediction, model.task.name, args.segments)), file=sys.stdout)
            continue
        label = f"{prediction.notes:,}" if by_note else prediction.label
        rows.append([shown(prediction.file), label, *map(percent, prediction.probabilities)])
        for log_p, span in zip(prediction.segments, prediction.spans, strict=True) if args.segments else ():
            label = prediction.classes[int(log_p.argmax())]
            rows.append([f"  {minutes(span[0])} - {minutes(span[1])}", label, *map(percent, np.exp(log_p))])
    progress.finish("predicted")
    if not args.json:
        print(table(["file", "notes" if by_note else "class", *model.classes], rows))


def as_json(prediction, task: str, segments: bool) -> dict:
    """One prediction as plain values: for note tasks the share of the notes of each class."""

    def by_class(values: np.ndarray) -> dict[str, float]:
        return dict(zip(prediction.classes, values.round(6).tolist(), strict=True))

    file, values, notes = {"file": prediction.file, "task": task}, by_class(prediction.probabilities), prediction.notes
    if prediction.level == "note":
        return file | {"notes": notes, "shares": values, "dropped": prediction.dropped}
    line = file | {"class": prediction.label, "probabilities": values, "notes": notes}
    if segments:
        parts = zip(prediction.spans.round(3).tolist(), prediction.counts.tolist(), prediction.segments, strict=True)
        line["segments"] = [
            {"start": start, "end": end, "notes": count, "class": prediction.classes[int(log_p.argmax())]}
            | {"probabilities": by_class(np.exp(log_p))}
            for (start, end), count, log_p in parts
        ]
    return line


@command(
    MODEL,
    SONG,
    OUT,
    flag("--bridge", action="store_true", help="with the melody also BRIDGE, what leads where no voice sings"),
    flag("--split", action="store_true", help="all notes, in tracks MELODY, BRIDGE and PIANO"),
    *COMPUTE,
)
def melody(args: Namespace) -> None:
    """The melody as a track of its own.

    Timing, tempos, signatures, velocities and pedals are the file's own.

    example: amb melody small song.mid --out melody.mid
    """
    from amb.tokenizer import PERCUSSION, edit

    if args.bridge and args.split:
        raise ValueError("--bridge and --split exclude each other")
    model, score, piece, prediction = perform(args, "melody")
    labels, names = prediction.labels, list(prediction.classes)
    unseen, drums = labels < 0, piece.notes.instrument == PERCUSSION
    rest = names.index("PIANO")
    labels = np.where(unseen | drums, rest, labels)
    if args.split:
        out = edit.split(score, labels, names, endless_part=rest)
    else:
        leading = ("MELODY", "BRIDGE") if args.bridge else ("MELODY",)
        taken = np.isin(labels, [names.index(name) for name in leading])
        out = edit.split(score, np.where(taken, 0, -1), ["MELODY"])
    write_midi(out, args.out)
    counts = {name: (labels == number).sum() for number, name in enumerate(names)}
    print(f"{args.out}: of {len(labels):,} notes " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    if counts["BRIDGE"] > counts["MELODY"] and not (args.bridge or args.split):
        print("most of what leads is called BRIDGE, as where no voice sings: --bridge takes it too")
    for reason, count in {"percussion": int(drums.sum()), **prediction.dropped}.items():
        if count:
            print(f"taken for accompaniment: {count:,} notes ({reason})")
    extra = len(out.tracks) - 1 - (len(names) if args.split else 1)
    if extra:
        print(f"{extra} further tracks of the same names hold notes that overlap others of their pitch and channel")


@command(
    MODEL,
    SONG,
    OUT,
    flag("--bins", action="store_true", help="the middle of the most probable bin (default: the expected velocity)"),
    *COMPUTE,
)
def velocity(args: Namespace) -> None:
    """Predicted dynamics for a flat file.

    Nothing else in the file changes.

    example: python finetune.py --task velocity --out runs/velocity && \\
        amb velocity runs/velocity song.mid --out alive.mid
    """
    from amb.tokenizer import edit

    model, score, piece, prediction = perform(args, "velocity")
    centres = np.array([(int(low) + int(high) + 1) // 2 for low, high in (c.split("-") for c in prediction.classes)])
    seen = prediction.labels >= 0
    predicted = centres[prediction.labels[seen]] if args.bins else np.rint(np.exp(prediction.log_p[seen]) @ centres)
    predicted = predicted.clip(1, 127).astype(np.int64)
    velocities = np.zeros(len(seen), dtype=np.int64)  # 0: as it is
    velocities[seen] = predicted
    write_midi(edit.set_velocities(score, velocities), args.out)
    before = piece.notes.velocity[seen]
    print(
        f"{args.out}: {len(predicted):,} notes have velocities {predicted.min()} to {predicted.max()}, "
        f"mean {predicted.mean():.1f} (before: {before.min()} to {before.max()})"
    )
    for reason, count in prediction.dropped.items():
        print(f"left as they were: {count:,} notes ({reason})")
    return 0


def perform(args: Namespace, task: str) -> tuple:
    """What `melody` and `velocity` begin with: the model, the file's score, the piece, the notes' prediction."""
    from amb.tokenizer import read_midi

    check_out(args.out, args.midi)
    model = amb.load(args.checkpoint, args.device, args.dtype)
    if not model.task or model.task.name != task:
        raise ValueError(
            f"{model.path} is {model.about()}: `amb {task}` needs one fine-tuned with finetune.py --task {task}"
        )
    try:
        score, piece = read_midi(args.midi), model.encode(args.midi)
    except ValueError as error:
        raise ValueError(f"{args.midi}: {error}") from None
    return model, score, piece, model.predict_pieces([piece])[0]


@command(
    MODEL,
    FILES,
    OUT,
    flag("--layer", type=int, default=-1, metavar="N", help="0: embedding, 1 …: layers, -1: the last (default: -1)"),
    flag("--notes", action="store_true", help="also a vector for each note"),
    WORKERS,
    *COMPUTE,
)
def embed(args: Namespace) -> None:
    """A vector for each piece, into an .npz file.

    np.load reads it without pickle: names [P], vectors [P, d], counts [P] (notes of each piece); with --notes also
    note_vectors [N, d] and note_piece, note_seconds, note_start, note_pitch, note_track [N].

    example: amb embed small my/midi --out vectors.npz
    """
    from amb import inference

    check_out(args.out)
    model = amb.load(args.checkpoint, args.device, args.dtype)
    files = inference.find(args.files)
    progress = Progress(len(files), model.device)

    def counted():
        for outcome, states in model.each_embedding(files, args.layer, args.workers):
            progress.count(outcome.file, 0 if states is None else len(states), getattr(outcome, "reason", ""))
            yield outcome, states

    with tempfile.TemporaryFile(dir=args.out.parent) as file:
        embeddings = inference.Embeddings.collect(counted(), model.config.width, file if args.notes else None)
        progress.finish("embedded")
        arrays = {"names": np.array(embeddings.names), "vectors": embeddings.vectors, "counts": embeddings.counts}
        if embeddings.notes:
            arrays |= {f"note_{name}": column for name, column in embeddings.notes._asdict().items()}
        with writing(args.out) as out:
            np.savez(out, **arrays)
    print(f"{args.out}: " + ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items()))


@command(
    MODEL,
    FILES,
    flag("--out", type=Path, metavar="PNG", help="the picture to write (default: numbers alone)"),
    flag("--beside", type=Path, metavar="MODEL", help="a second model to compare with"),
    *COMPUTE,
)
def inspect(args: Namespace) -> None:
    """What pre-training learned of a piece, as a page of pictures and numbers.

    The picture shows the beginning of the first file; the numbers are of all files together.

    example: python train.py --out runs/trial && amb inspect runs/trial song.mid --out page.png
    """
    from amb import inference, inspection, mask_book, plots

    if args.out:
        check_out(args.out)
        if not plots.available():
            raise ValueError("--out needs matplotlib: pip install matplotlib (the extra `plot`)")
    models = [amb.load(path, args.device, args.dtype) for path in (args.checkpoint, args.beside) if path]
    encoding = models[0].encoding
    if models[-1].encoding != encoding:
        raise ValueError(f"{args.beside} reads {models[-1].encoding.name} words, {args.checkpoint} {encoding.name}")
    files, pieces, views = inference.find(args.files), [], [[] for _ in models]
    progress = Progress(len(files), models[0].device)
    for outcome in inference.read_all(files, encoding.name):
        if isinstance(outcome, inference.Failure):
            progress.count(outcome.file, 0, outcome.reason)
            continue
        for model, seen in zip(models, views, strict=True):
            seen.append(inspection.inspect(model, outcome))
        pieces.append(outcome)
        progress.count(outcome.file, len(outcome.words), "")
    progress.finish("inspected")
    objectives = {model.config.objective for model in models}
    names = [model.config.objective if len(objectives) == len(models) else str(model.path) for model in models]
    views = dict(zip(names, map(inspection.join, views), strict=True))
    tables = {
        name: inspection.recovery_by_frequency(view.true, view.recovered, encoding) for name, view in views.items()
    }
    first, view = pieces[0], views[names[0]]
    print(
        "every note was hidden once, one in seven at a time: share that was restored, of the tenth of the notes whose"
    )
    print("true values are the rarest, and of the tenth whose values are the commonest")
    rows = [
        [field.name, *(percent(recovery[row, end]) for recovery in tables.values() for end in (0, -1))]
        for row, field in enumerate(encoding.fields)
    ]
    print(table(["field", *(f"{name}: {end}" for name in names for end in ("rarest", "commonest"))], rows))
    frozen = mask_book.frozen_notes(models[0].path.parent / "book.npz", first.file, len(first.words))
    if frozen is not None:
        print(f"frozen in {first.file} by this run: {frozen.mean():.1%} of the notes")
    elif view.scores is not None:
        print("frozen notes: this run's mask book is not about the piece; the picture marks what would be frozen")
    if args.out:
        shown_notes = np.flatnonzero(view.sequence[: len(first.words)] == 0)
        plots.draw_inspection(first.file, encoding, views, shown_notes, tables, frozen, args.out)
        print(f"picture: {args.out}")


@command(
    flag("source", type=Path, metavar="FILE", help="published weights, or a checkpoint"),
    OUT,
    flag(
        "--to",
        choices=("checkpoint", "published", "half"),
        default="checkpoint",
        help="what to write (default: checkpoint)",
    ),
)
def convert(args: Namespace) -> None:
    """Published weights to a checkpoint, and back; a checkpoint in half precision.

    Published files are read as data, never run. Half precision leaves out what only training needs.

    example: amb convert small --to published --out small.pth
    """
    from amb import checkpoint, published

    source = checkpoint.find(args.source)
    check_out(args.out, source)
    ways = {"checkpoint": published.convert, "published": published.export, "half": checkpoint.halve}
    ways[args.to](source, args.out)
    print(published.describe(args.out))


@command(MODEL)
def info(args: Namespace) -> None:
    """What a file is.

    A run folder, a checkpoint, or published weights.

    example: amb info small
    """
    from amb import checkpoint, published

    print(published.describe(checkpoint.find(args.checkpoint)))


class Progress:
    """A bar over files on stderr (if that is a terminal), results on stdout, and what was skipped."""

    def __init__(self, files: int, device):
        self.bar = tqdm(total=files, unit="file", dynamic_ncols=True, disable=None)
        self.device, self.notes, self.pieces, self.skipped = device, 0, 0, 0
        self.began = time.perf_counter()

    def count(self, file: str, notes: int, error: str) -> None:
        if error:
            self.skipped += 1
            self.bar.write(f"skipped {shown(file)}: {error}", file=sys.stderr)
        else:
            self.pieces += 1
            self.notes += notes
        self.bar.update()

    def finish(self, did: str) -> None:
        """Say how fast it went. Raises ValueError if no file was usable."""
        self.bar.close()
        took = time.perf_counter() - self.began
        skipped = f", {self.skipped:,} skipped" if self.skipped else ""
        if not self.pieces:
            raise ValueError(f"no usable MIDI file{skipped}")
        speed = f"{self.pieces / took:.1f} pieces/s, {self.notes / took:,.0f} notes/s on {self.device}"
        done = f"{did} {self.pieces:,} piece{'s' * (self.pieces > 1)}, {self.notes:,} notes"
        print(f"{done} in {took:.1f} s ({speed}){skipped}", file=sys.stderr)


def check_out(out: Path, source: Path | None = None) -> None:
    """Raise ValueError, before any work is done, where `out` cannot be written or is the file to be read."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; give a file")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    if source is not None and out.exists() and source.exists() and out.samefile(source):
        raise ValueError(f"--out {out} is the file to be read; give another")


def write_midi(midi, out: Path) -> None:
    """Write a MIDI file, whole or not at all."""
    with writing(out) as file:
        midi.save(file=file)


def shown(name: str) -> str:
    """A file's name on one line of a terminal, whatever characters it holds."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))


def percent(value: float) -> str:
    return f"{value:.1%}"


def minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def parse_args(arguments: list[str] | None) -> Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="amb",
        description="Use trained models. MODEL is a run folder of train.py or finetune.py, a checkpoint, or `small`: "
        "the model for melody and embeddings that comes with the code.",
        epilog="example: amb melody small song.mid --out melody.mid",
        formatter_class=form,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (function, flags) in COMMANDS.items():
        text, _, example = cleandoc(function.__doc__).rpartition("\n\n")
        summary = text.splitlines()[0]
        added = commands.add_parser(name, help=summary, description=text, epilog=example, formatter_class=form)
        for names, options in flags:
            added.add_argument(*names, **options)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run a command. The exit status: 0, 2 for a user's mistake (one line on stderr), 130 for Ctrl-C."""
    args = parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # file names may hold bytes that no terminal can show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if arguments is None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` cleans up like Ctrl-C
    warnings.filterwarnings("ignore", "Detected pickle protocol")  # torch's, of files that are refused a moment later
    function, _ = COMMANDS[args.command]
    try:
        function(args)
        return 0
    except BrokenPipeError:  # `amb predict … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"amb: {error}".replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("amb: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
