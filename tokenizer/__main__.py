"""python -m amb.tokenizer SRC… --out DIR [--encoding octuple|cp] [--workers N]"""

import argparse
import signal
import sys

from .build import build_store
from .registry import ENCODINGS
from .store import StoreError
from .store_writer import Summary


def main(arguments: list[str] | None = None) -> int:
    """Tokenize a corpus from the command line. Returns the exit status: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m amb.tokenizer", description="MIDI files into a token store.")
    parser.add_argument(
        "sources", nargs="+", metavar="SRC", help="folders with .mid and .midi files at any depth, or files"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="the store to write; an older store there is replaced"
    )
    parser.add_argument("--encoding", choices=list(ENCODINGS), default="octuple", help="default: octuple")
    parser.add_argument("--workers", type=positive, metavar="N", help="processes; default: one per core")
    options = parser.parse_args(arguments)
    try:
        summary = build_store(options.sources, options.out, options.encoding, options.workers)
    except StoreError as error:
        print(printable(f"error: {error}".replace("\n", "\\n")), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(printable(table(summary)))
    return 0


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def printable(text: str) -> str:
    """File names may hold bytes that no terminal can show."""
    return text.encode(sys.stdout.encoding or "utf-8", "backslashreplace").decode(sys.stdout.encoding or "utf-8")


def table(summary: Summary) -> str:
    """The summary as lines of text."""
    rows = [
        ("pieces", summary.pieces, ""),
        ("segments", summary.segments, ""),
        ("notes", summary.notes, f"{summary.notes / max(summary.seconds, 1e-9):,.0f}/s, {summary.seconds:.1f} s"),
        ("files skipped", summary.skipped.total(), ""),
        *(("", count, reason) for reason, count in summary.skipped.most_common()),
        ("notes dropped", summary.dropped.total(), ""),
        *(("", count, reason) for reason, count in summary.dropped.most_common()),
    ]
    width = max(len(f"{count:,}") for _, count, _ in rows)
    lines = [f"{label:<14}{count:>{width},}  {remark}".rstrip() for label, count, remark in rows]
    where = f"{summary.encoding} store: {summary.path}"
    return "\n".join([where, *lines] + [f"skipped files: {summary.path / 'skipped.jsonl'}"] * bool(summary.skipped))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` cleans up like Ctrl-C
    sys.exit(main())
