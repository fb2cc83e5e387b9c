"""python -m amb.tokenizer SRC… --out DIR [--encoding octuple|cp|midibert] [--workers N]"""

import argparse
import signal
import sys

from .build import SUFFIXES, build_store
from .registry import ENCODINGS
from .store import StoreError, Summary


def main(arguments: list[str] | None = None) -> int:
    """Tokenize a corpus from the command line. Returns the exit status: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m amb.tokenizer", description="MIDI files into a token store.")
    kinds = ", ".join(SUFFIXES)
    parser.add_argument("sources", nargs="+", metavar="SRC", help=f"files, or folders with {kinds} at any depth")
    parser.add_argument("--out", required=True, metavar="DIR", help="the store to write; an older one is replaced")
    parser.add_argument("--encoding", choices=list(ENCODINGS), default="octuple", help="default: octuple")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: one per core")
    options = parser.parse_args(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold bytes that no terminal can show
    try:
        summary = build_store(options.sources, options.out, options.encoding, options.workers)
    except StoreError as error:
        print(f"error: {error}".replace("\n", "\\n"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print_summary(summary)
    return 0


def print_summary(summary: Summary) -> None:
    """What became of the files and notes, a line each."""
    print(f"{summary.encoding} store: {summary.path}")
    for name in ("pieces", "segments", "notes"):
        print(f"{name:<14}{getattr(summary, name):>12,}")
    print(f"{'seconds':<14}{summary.seconds:>12,.1f}")
    for name, counts in (("files skipped", summary.skipped), ("notes dropped", summary.dropped)):
        print(f"{name:<14}{counts.total():>12,}")
        for reason, count in counts.most_common():
            print(f"{'':<14}{count:>12,}  {reason}")
    print(f"{'used in part':<14}{summary.damaged:>12,}")
    if summary.skipped or summary.damaged:
        print(f"these files: {summary.path / 'skipped.jsonl'}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` cleans up like Ctrl-C
    sys.exit(main())
