"""amb: use trained models from a shell. `amb --help`, `amb COMMAND --help`; the same as `python -m amb`.

A command is a function: its arguments stand above it, its docstring is its help. Results go to stdout or into files,
all else to stderr; errors are raised and printed as one line. torch is imported when a command runs, so that
`amb --help` answers at once.
"""

import argparse
import json
import os
import re
import signal
import sys
import time
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from inspect import cleandoc
from pathlib import Path

import numpy as np
from tqdm import tqdm

import amb
from amb import tokenizer
from amb.config import positive
from amb.files import table, writing
from amb.tokenizer import edit

LEADING = re.compile("vocal|voice|lead|melod|chant", re.IGNORECASE)  # what people call the track of the melody
REPORT_EVERY = 30  # seconds between lines of progress off a terminal
percent = "{:.1%}".format
LAYOUT = argparse.RawDescriptionHelpFormatter
PARSER = argparse.ArgumentParser(
    prog="amb",
    description="Use trained models. MODEL is a run folder of train.py or finetune.py, a checkpoint, or `small`,\n"
    "the model for melody and embeddings that comes with the code.",
    epilog="example: amb melody small song.mid",
    formatter_class=LAYOUT,
)
SONGS = "\n\na folder of songs: python -c \"from amb import demo; demo.write_corpus('songs', 16)\""
COMMANDS = PARSER.add_subparsers(dest="command", required=True, metavar="COMMAND")


def flag(*names: str, **options) -> tuple:
    """An argument of a command, as `add_argument` takes it."""
    return names, options


def command(*flags: tuple) -> Callable:
    """Makes the function below it a command with these flags. Its docstring is the help: summary, text, example."""

    def register(function: Callable[[Namespace], int | None]) -> Callable:
        text, _, example = cleandoc(function.__doc__).rpartition("\n\n")
        about = {"help": text.splitlines()[0], "description": text, "epilog": example + SONGS * ("songs" in example)}
        parser = COMMANDS.add_parser(function.__name__, **about, formatter_class=LAYOUT)
        parser.set_defaults(run=function)
        for names, options in flags:
            parser.add_argument(*names, **options)
        return function

    return register


OUT = flag("--out", type=Path, required=True, metavar="FILE", help="the file to write")
WORKERS = flag("--workers", type=positive, metavar="N", help="processes that read files")
READ = (
    flag("checkpoint", type=Path, metavar="MODEL", help="a run, a checkpoint, or `small`"),
    flag("files", nargs="+", metavar="MIDI", help="files, folders, archives, or - for standard input"),
    flag("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps … (default: a GPU of CUDA if there is one)"),
    flag("--dtype", choices=("fp32", "bf16", "auto"), help="compute type (default: fp32, on a GPU auto)"),
)
REWRITE = (
    *READ,
    flag("--out", type=Path, metavar="FILE", help="the file to write (default: SONG.COMMAND.mid beside SONG.mid)"),
    flag("--out-dir", type=Path, metavar="DIR", help="the folder to write to, for several files"),
)


@command(
    *READ,
    WORKERS,
    flag("--segments", action="store_true", help="also the class of each sequence of notes within a piece"),
    flag("--json", action="store_true", help="a JSON object a line instead of a table"),
)
def predict(args: Namespace) -> None:
    """The class of each piece: composer, emotion, or your labels.

    A checkpoint of a note task (melody, velocity, note) gives each piece's share of notes of each class.

    example: amb predict small songs
    """
    from amb import inference

    model = amb.load(args.checkpoint, args.device, args.dtype)
    by_note = bool(model.task) and model.task.level == "note"
    if args.segments and by_note:
        raise ValueError(f"{model.path} labels notes ({model.task.name}), so its pieces have no --segments")
    rows = []
    with inference.opened(args.files) as files:
        progress = Progress(len(files), model.device)
        for prediction in model.each_prediction(files, args.workers):
            progress.count(prediction, prediction.notes)
            if not prediction.error:
                record = {"file": prediction.file, "task": model.task.name, **prediction.record(args.segments)}
                rows += as_rows(record)
                if args.json:
                    progress.bar.write(json.dumps(record), file=sys.stdout)
    progress.finish("predicted")
    if not args.json:
        print(table(["file", "notes" if by_note else "class", *model.classes], rows))


def as_rows(record: dict) -> Iterator[list[str]]:
    """The rows of a file in the table: one of the piece, one of each of its segments."""
    label, values = record.get("class", f"{record['notes']:,}"), record.get("probabilities") or record["shares"]
    yield [shown(record["file"]), label, *map(percent, values.values())]
    for part in record.get("segments", ()):
        span = f"  {minutes(part['start'])} - {minutes(part['end'])}"
        yield [span, part["class"], *map(percent, part["probabilities"].values())]


@command(
    *REWRITE,
    flag("--strict", action="store_true", help="MELODY alone, what a voice would sing"),
    flag("--bridge", action="store_true", help="MELODY and all of BRIDGE, also where both play"),
    flag("--split", action="store_true", help="all notes that end, in tracks MELODY, BRIDGE and PIANO"),
    flag("--track", metavar="NAME", help="the notes of the file's track of that name"),
    flag("--picture", action="store_true", help="also a piano roll of what was taken, as a PNG beside the output"),
)
def melody(args: Namespace) -> None:
    """The leading line as a separate track: MELODY, and BRIDGE in bars that have no MELODY.

    Timing, tempos, signatures, velocities and pedals stay as they are.

    example: amb melody small songs --out-dir melodies
    """
    if sum(map(bool, (args.strict, args.bridge, args.split, args.track))) > 1:
        raise ValueError("--strict, --bridge, --split and --track exclude each other")
    rewrite(args, take_melody)


def take_melody(args: Namespace, out: Path, score, prediction) -> None:
    """`amb melody` for one file."""
    from amb import inference, plots

    names, notes = list(prediction.classes), score.notes
    drums, rest = notes.instrument == tokenizer.PERCUSSION, names.index("PIANO")
    labels = np.where((prediction.labels < 0) | drums, rest, prediction.labels)
    is_melody, is_bridge = (labels == names.index(name) for name in ("MELODY", "BRIDGE"))
    tracks = np.array([shown(name).strip() for name in notes.name])
    if args.track:
        taken = np.char.lower(tracks) == args.track.strip().lower()
        if not taken.any():
            raise ValueError(f"no track is called {args.track!r}: there are {', '.join(np.unique(tracks))}")
    elif args.bridge or args.split:
        taken = is_melody | is_bridge
    else:
        bar = inference.bars(score, notes.start)
        taken = is_melody if args.strict else is_melody | (is_bridge & ~np.isin(bar, bar[is_melody]))
    parts = (labels, names) if args.split else (np.where(taken, 0, -1), ["MELODY"])
    midi = edit.split(score, *parts)
    with writing(out) as file:
        midi.save(file=file)
    counts = ", ".join(f"{(labels == number).sum():,} {name}" for number, name in enumerate(names))
    print(f"{out}: {taken.sum():,} of {len(labels):,} notes{' lead' * args.split}; predicted: {counts}")
    if not args.track:
        print_left_out(tracks, taken, is_bridge, {"percussion": int(drums.sum()), **prediction.dropped})
    if (further := len(midi.tracks) - 1 - len(parts[1])) > 0:
        print(f"{further} further tracks of the same names hold notes that overlap others of their pitch and channel")
    if args.picture:
        roll = notes.start / score.ticks_per_beat, notes.end / score.ticks_per_beat, notes.pitch
        groups = {"MELODY": taken & ~is_bridge, "BRIDGE": taken & is_bridge, "left out": ~taken & ~drums}
        plots.draw_melody(prediction.file, roll, groups, out.with_suffix(".png"))


def print_left_out(tracks: np.ndarray, taken: np.ndarray, is_bridge: np.ndarray, dropped: dict[str, int]) -> None:
    """Print what a predicted melody lacks. By note: its track's name, whether it was taken, whether it is BRIDGE."""
    if left := (is_bridge & ~taken).sum():
        print(f"left out: {left:,} notes of BRIDGE; --bridge takes them too")
    for title in filter(LEADING.search, np.unique(tracks).tolist()):
        inside = tracks == title
        if not inside.all():  # else it is the name of the piece
            counts = f"{(taken & inside).sum():,} of its {inside.sum():,} notes"
            print(f"track {title!r}: {counts}; --track {title!r} takes all")
    print_dropped("neither MELODY nor BRIDGE", dropped)


def print_dropped(what: str, dropped: dict[str, int]) -> None:
    for reason, count in dropped.items():
        if count:
            print(f"{what}: {count:,} notes ({reason})")


@command(
    *REWRITE,
    flag("--bins", action="store_true", help="the middle of the most probable bin (default: the expected velocity)"),
)
def velocity(args: Namespace) -> None:
    """Predicted dynamics for a file without dynamics.

    Nothing else in the file changes.

    example: python finetune.py --task velocity --out runs/velocity && amb velocity runs/velocity songs --out-dir alive
    """
    rewrite(args, set_velocities)


def set_velocities(args: Namespace, out: Path, score, prediction) -> None:
    """`amb velocity` for one file."""
    centres = np.array([(sum(map(int, name.split("-"))) + 1) // 2 for name in prediction.classes])
    seen = prediction.labels >= 0
    predicted = centres[prediction.labels[seen]] if args.bins else np.rint(np.exp(prediction.log_p[seen]) @ centres)
    velocities = np.zeros(len(seen), dtype=np.int64)  # 0: as it is
    velocities[seen] = predicted.clip(1, 127)
    with writing(out) as file:
        edit.set_velocities(score, velocities).save(file=file)
    before, after = score.notes.velocity[seen], velocities[seen]
    print(
        f"{out}: {len(after):,} notes have velocities {after.min()} to {after.max()}, "
        f"mean {after.mean():.1f} (before: {before.min()} to {before.max()})"
    )
    print_dropped("left as they were", prediction.dropped)


def rewrite(args: Namespace, work: Callable) -> None:
    """`work(args, out, score, prediction)` for each usable file: `melody` and `velocity`."""
    from amb import inference

    model = amb.load(args.checkpoint, args.device, args.dtype)
    if not model.task or model.task.name != args.command:
        needs = f"`amb {args.command}` needs one fine-tuned with finetune.py --task {args.command}"
        raise ValueError(f"{model.path} is {model.about()}: {needs}")
    with inference.opened(args.files) as files:
        if len(files) > 1 and not args.out_dir or args.out and args.out_dir:
            raise ValueError(f"{len(files):,} files: say where to write with either --out or, for several, --out-dir")
        outs = Counter(out_for(args, file) for file in files)
        if (twice := outs.most_common(1)[0])[1] > 1:
            raise ValueError(f"{twice[0]} would be written twice, for files of the same name")
        for file, out in zip(files, outs, strict=True):
            check_out(out, Path(file.path))
        progress = Progress(len(files), model.device)
        for file, out in zip(files, outs, strict=True):
            try:
                piece = model.encode(file.path)._replace(file=file.name)
                work(args, out, tokenizer.read_midi(file.path), *model.predict_pieces([piece]))
                progress.count(piece._replace(dropped={}))  # `work` printed what was dropped
            except ValueError as error:
                progress.count(inference.Piece(file.name, error=str(error)))
        progress.finish("rewrote")


def out_for(args: Namespace, file) -> Path:
    """Where the rewritten file goes; its folder below --out-dir is made."""
    below = Path(file.below).with_suffix(f".{args.command}.mid")
    if args.out_dir:
        (args.out_dir / below).parent.mkdir(parents=True, exist_ok=True)
        return args.out_dir / below
    return args.out or Path(file.name).parent / below.name


def layer(text: str) -> int | None:
    return None if text == "all" else int(text)


@command(
    *READ,
    OUT,
    flag("--layer", type=layer, default=-1, metavar="N", help="0: embedding, 1 …: layers, -1: the last (default), all"),
    flag("--notes", action="store_true", help="also a vector for each note"),
    WORKERS,
)
def embed(args: Namespace) -> None:
    """A vector for each piece, into an .npz file.

    np.load reads it without pickle: names [P], vectors [P, d], counts [P] (notes of each piece); with --notes also
    note_vectors [N, d] and note_piece, note_seconds, note_start, note_pitch, note_track [N]. `--layer all` gives the
    mean, deviation and step from note to note of every layer, which tell pieces apart better.

    example: amb embed small songs --out vectors.npz
    """
    from amb import inference

    check_out(args.out)
    model = amb.load(args.checkpoint, args.device, args.dtype)
    with inference.opened(args.files) as files:
        progress = Progress(len(files), model.device)
        embeddings = model.embed(files, args.layer, args.notes, args.workers, progress.count)
    progress.finish("embedded")
    arrays = {"names": np.array(embeddings.names), "vectors": embeddings.vectors, "counts": embeddings.counts}
    if embeddings.notes:
        arrays |= {f"note_{name}": column for name, column in embeddings.notes._asdict().items()}
    with writing(args.out) as out:
        np.savez(out, **arrays)
    print(f"{args.out}: " + ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items()))


@command(*READ, flag("--out", type=Path, metavar="PNG", help="the picture to write (default: numbers alone)"))
def inspect(args: Namespace) -> int:
    """What pre-training learned of a piece, in numbers and as a picture.

    The picture shows the beginning of the first file; the numbers are of all files together.

    example: python train.py --out runs/trial && amb inspect runs/trial songs --out page.png
    """
    from amb import inference, inspection, mask_book, plots

    if args.out:
        check_out(args.out)
    model = amb.load(args.checkpoint, args.device, args.dtype)
    pieces, views = [], []
    with inference.opened(args.files) as files:
        progress = Progress(len(files), model.device)
        for outcome in model.read(files):
            if not outcome.error:
                views.append(inspection.inspect(model, outcome))
                pieces.append(outcome)
            progress.count(outcome)
    progress.finish("inspected")
    every, first, encoding = inspection.join(views), pieces[0], model.encoding
    recovery = inspection.recovery_by_frequency(every.true, every.recovered, encoding)
    print("share of the notes restored, each hidden once, one in seven at a time: of the tenth of the notes")
    print("with the rarest values, and of the tenth with the commonest")
    rows = zip(encoding.names, recovery, strict=True)
    print(table(["field", "rarest", "commonest"], [[name, *map(percent, row[[0, -1]])] for name, row in rows]))
    frozen = mask_book.frozen_notes(model.path.parent / "book.npz", first.file, len(first.words))
    if frozen is not None:
        print(f"frozen in {first.file} by this run: {percent(frozen.mean())} of the notes")
    if args.out:
        if not plots.draw_inspection(first.file, encoding, views[0], frozen, recovery, args.out):
            return 2
        print(f"picture: {args.out}")
    return 0


@command(
    flag("source", type=Path, metavar="FILE", help="published weights, or a checkpoint"),
    OUT,
    flag("--to", choices=("checkpoint", "published", "half"), default="checkpoint", help="default: checkpoint"),
)
def convert(args: Namespace) -> None:
    """Published weights to a checkpoint, and back; a checkpoint in half precision.

    Published files are read as data, never run. Half precision leaves out what only training needs.

    example: amb convert small --to half --out small.pt
    """
    from amb import checkpoint, published

    source = checkpoint.find(args.source)
    check_out(args.out, source)
    ways = {"checkpoint": published.convert, "published": published.export, "half": checkpoint.halve}
    ways[args.to](source, args.out)
    print(published.describe(args.out))


@command(flag("file", metavar="FILE", help="a run, a checkpoint, published weights, `small`, or a MIDI file"))
def info(args: Namespace) -> None:
    """What a file is.

    A run folder with its data and the figures it reached, a checkpoint, published weights, or a MIDI file.

    example: amb info small
    """
    from amb import checkpoint, inference, published

    path = Path(args.file)
    midi = False
    if path.is_file():
        with path.open("rb") as file:
            midi = file.read(4) == b"MThd"
    if not midi and args.file != "-" and path.suffix.lower() not in tokenizer.SUFFIXES:
        print("\n".join([published.describe(checkpoint.find(path)), *about_run(path)]))
        return
    with inference.opened(args.file) as (file,):
        try:
            score = tokenizer.read_midi(file.path)
        except tokenizer.MidiError as error:
            raise ValueError(f"{args.file}: {error}") from None
    tracks = Counter(zip(score.notes.track.tolist(), map(shown, score.notes.name), strict=True))
    endless = f", and {score.unclosed:,} that never end" * bool(score.unclosed)
    print(f"{args.file}: MIDI file")
    print(f"  notes       {len(score.notes.pitch):,}{endless}")
    print("  tracks      " + ", ".join(f"{title} ({count:,})" for (_, title), count in sorted(tracks.items())))
    print("  length      " + minutes(inference.seconds(score, score.notes.end).max()))
    if score.damage:
        print(f"  damaged     {score.damage}")


def about_run(run: Path) -> Iterator[str]:
    """Data, epochs and figures of a run folder, as far as its files hold them."""
    from amb.files import read_metrics

    with suppress(OSError, ValueError, LookupError, TypeError):  # no run, or its files are not what they were
        data = json.loads((run / "run.json").read_text("utf-8"))["paths"]["data"] or ["the demo corpus"]
        yield f"  data        {', '.join(map(shown, [data] if isinstance(data, str) else data))}"  # finetune.py has one
        if (run / "report.json").exists():
            report = json.loads((run / "report.json").read_text("utf-8"))
            kept = next(each for each in report["trainings"] if report["model"].items() <= each.items())
            epochs, best = kept["epochs"], kept["best_epoch"]
            figures = {f"test {unit}": of["accuracy"] for unit, of in kept["test"].items() if isinstance(of, dict)}
        else:
            lines = read_metrics(run / "metrics.jsonl")["epoch"]
            line = min(lines, key=lambda line: line["valid"]["loss"])
            epochs, best = len(lines), line["epoch"]
            figures = {"masked notes in validation": line["valid"]["accuracy"], "frozen": line["frozen"]}
        yield f"  epochs      {epochs}, of which {best} is the best"
        yield f"  reached     {', '.join(f'{name} {percent(value)}' for name, value in figures.items())}"


class Progress:
    """A bar over files on stderr, or a line every half minute if that is no terminal; and what was not used."""

    def __init__(self, files: int, device):
        self.bar = tqdm(total=files, unit="file", dynamic_ncols=True, disable=None)
        self.files, self.device, self.pieces, self.notes = files, device, 0, 0
        self.skipped, self.dropped = Counter(), Counter()
        self.began = self.reported = time.perf_counter()

    def count(self, outcome, notes: int | None = None) -> None:
        """A file is done: a Piece or a Prediction, and how many notes were used (by default: its words)."""
        if outcome.error:
            self.skipped[outcome.error.split(" (")[0].split(":")[0]] += 1
            self.bar.write(f"skipped {shown(outcome.file)}: {outcome.error}", file=sys.stderr)
        elif outcome.damage:
            self.bar.write(f"used in part {shown(outcome.file)}: {outcome.damage}", file=sys.stderr)
        self.pieces += not outcome.error
        self.notes += len(outcome.words) if notes is None else notes
        self.dropped.update(outcome.dropped)
        self.bar.update()
        if self.bar.disable and time.perf_counter() > self.reported + REPORT_EVERY:
            self.reported, done = time.perf_counter(), self.pieces + self.skipped.total()
            print(f"{done:,} of {self.files:,} files, {self.notes:,} notes", file=sys.stderr)

    def finish(self, did: str) -> None:
        """Print how fast it went and what was not used. Raises ValueError if no file was usable."""
        self.bar.close()
        took = time.perf_counter() - self.began
        if not self.pieces:
            raise ValueError(f"no usable MIDI file; skipped: {listed(self.skipped) or 'none'}")
        speed = f"{self.pieces / took:.1f} pieces/s, {self.notes / took:,.0f} notes/s on {self.device}"
        done = f"{did} {self.pieces:,} piece{'s' * (self.pieces > 1)}, {self.notes:,} notes"
        print(f"{done} in {took:.1f} s ({speed})", file=sys.stderr)
        for what, reasons in (("files skipped", self.skipped), ("notes left out", self.dropped)):
            if reasons:
                print(f"{reasons.total():,} {what}: {listed(reasons)}", file=sys.stderr)


def listed(reasons: Counter) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())


def check_out(out: Path, source: Path | None = None) -> None:
    """Raise ValueError, before any work is done, where `out` cannot be written or is the file to be read."""
    if out.exists() and not out.is_file():  # a device would be replaced by a file
        raise ValueError(f"--out {out} is {'a folder' if out.is_dir() else 'no regular file'}; give a file")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    if source is not None and out.exists() and source.exists() and out.samefile(source):
        raise ValueError(f"--out {out} is the file to be read; give another")


def shown(name: str) -> str:
    """A name on one line of a terminal, whatever characters it holds."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))


def minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def main(arguments: list[str] | None = None) -> int:
    """Run a command. The exit status: 0, 2 for a user's mistake (one line on stderr), 130 for Ctrl-C."""
    args = PARSER.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # file names may hold bytes that no terminal can show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if arguments is None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` cleans up like Ctrl-C
    warnings.filterwarnings("ignore", "Detected pickle protocol")  # torch's, of files that are refused a moment later
    try:
        return args.run(args) or 0
    except BrokenPipeError:  # `amb predict … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        message, status = str(error), 2
    except (RuntimeError, TypeError) as error:  # a GPU's: no memory, or no such operation
        device = vars(args).get("device") or "cpu"
        if device.startswith("cpu"):
            raise
        reason = str(error).strip().splitlines()[0]
        message, status = f"--device {device} cannot do this; try --device cpu ({reason})", 2
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    print(f"amb: {message}".replace("\n", " "), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
