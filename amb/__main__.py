"""amb: use trained models from a shell. `amb --help`, `amb COMMAND --help`; the same as `python -m amb`."""

import argparse
import os
import signal
import sys
import warnings
from pathlib import Path

from amb.config import positive

COMMANDS = {
    "predict": (
        "the class of each piece: composer, emotion, your own",
        "A checkpoint of a note task (melody, velocity, note) gives each piece's share of notes of each class.",
        """\
amb predict runs/composer my/midi
amb predict runs/composer my/midi --segments
amb predict runs/emotion a.mid b.mid --json > emotions.jsonl""",
    ),
    "melody": (
        "the melody as a track of its own",
        "Timing, tempos, signatures, velocities and pedals are the file's own.",
        """\
amb melody small song.mid --out melody.mid
amb melody small song.mid --out melody.mid --bridge
amb melody runs/melody song.mid --out tracks.mid --split""",
    ),
    "velocity": (
        "predicted dynamics for a flat file",
        "Nothing else in the file changes.",
        "amb velocity runs/velocity flat.mid --out alive.mid",
    ),
    "embed": (
        "a vector for each piece, into an .npz file",
        "np.load reads it without pickle: names [P], vectors [P, d], counts [P] (notes of each piece); with --notes "
        "also note_vectors [N, d] and note_piece, note_seconds, note_start, note_pitch, note_track [N].",
        """\
amb embed small my/midi --out vectors.npz
amb embed runs/small-adversarial a.mid --out notes.npz --notes --layer 2""",
    ),
    "inspect": (
        "what pre-training learned of a piece, as a page of pictures and numbers",
        "The picture shows the beginning of the first file; the numbers are of all files together.",
        """\
amb inspect runs/small-adversarial song.mid --out page.png
amb inspect runs/small-adversarial song.mid --beside runs/small-random --out page.png""",
    ),
    "convert": (
        "published weights to a checkpoint, and back; a checkpoint in half precision",
        "Published files are read as data, never run. Half precision leaves out what only training needs.",
        """\
amb convert published.pth --out encoder.pt
amb convert runs/base-adversarial --to published --out mine.pth
amb convert runs/melody --to half --out melody.pt""",
    ),
    "info": ("what a file is", "A run folder, a checkpoint, or published weights.", "amb info runs/composer"),
}


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    examples = "\n".join(f"  {text}" for _, _, lines in COMMANDS.values() for text in lines.splitlines()[:1])
    parser = argparse.ArgumentParser(
        prog="amb",
        description="Use trained models. MODEL is a run folder of train.py or finetune.py, a checkpoint, or `small`: "
        "the model for melody and embeddings that comes with the code.",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {}
    for name, (summary, more, lines) in COMMANDS.items():
        epilog = "examples:\n" + "\n".join(f"  {line}" for line in lines.splitlines())
        parsers[name] = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {more}",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    for name in ("predict", "melody", "velocity", "embed", "inspect", "info"):
        parsers[name].add_argument("checkpoint", type=Path, metavar="MODEL", help="a run, a checkpoint, or `small`")
    for name in ("predict", "embed", "inspect"):
        parsers[name].add_argument("files", type=Path, nargs="+", metavar="MIDI", help="files and folders")
    for name in ("melody", "velocity"):
        parsers[name].add_argument("midi", type=Path, metavar="MIDI", help="the file to work on")
    parsers["convert"].add_argument("source", type=Path, metavar="FILE", help="published weights, or a checkpoint")
    for name in ("melody", "velocity", "embed", "convert"):
        parsers[name].add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write")

    add = parsers["predict"].add_argument
    add("--segments", action="store_true", help="also the class of each sequence of notes within a piece")
    add("--json", action="store_true", help="a JSON object a line instead of a table")
    only = parsers["melody"].add_mutually_exclusive_group()
    only.add_argument(
        "--bridge", action="store_true", help="with the melody also BRIDGE, what leads where no voice sings"
    )
    only.add_argument(
        "--split", action="store_true", help="all notes, in tracks MELODY, BRIDGE and PIANO (default: the melody alone)"
    )
    parsers["velocity"].add_argument(
        "--bins", action="store_true", help="the middle of the most probable bin (default: the expected velocity)"
    )
    add = parsers["embed"].add_argument
    add("--layer", type=int, default=-1, metavar="N", help="0: embedding, 1 …: layers, -1: the last (default: -1)")
    add("--notes", action="store_true", help="also a vector for each note")
    add = parsers["inspect"].add_argument
    add("--out", type=Path, metavar="PNG", help="the picture to write (default: numbers alone)")
    add("--beside", type=Path, metavar="MODEL", help="a second model to compare with")
    parsers["convert"].add_argument(
        "--to",
        choices=("checkpoint", "published", "half"),
        default="checkpoint",
        help="what to write (default: checkpoint)",
    )
    for name in ("predict", "embed"):
        parsers[name].add_argument("--workers", type=positive, metavar="N", help="processes that read files")
    for name in ("predict", "melody", "velocity", "embed", "inspect"):
        parsers[name].add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 … (default: a GPU if there is)")
        parsers[name].add_argument(
            "--dtype", choices=("fp32", "bf16", "auto"), default="fp32", help="compute type (default: fp32)"
        )
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
    from amb import commands

    try:
        return getattr(commands, args.command)(args)
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
