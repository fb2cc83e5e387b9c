"""python -m amb.tokenizer SRC… --out DIR [--encoding octuple|cp|midibert] [--workers N]"""

import argparse
import signal
import sys
import time

from .build import SUFFIXES, build_store
from .registry import ENCODINGS
from .store import StoreError


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
    began = time.perf_counter()
    try:
        store = build_store(options.sources, options.out, options.encoding, options.workers)
    except StoreError as error:
        print(f"error: {error}".replace("\n", "\\n"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"{store.encoding} store: {store.path}; {time.perf_counter() - began:,.1f} s")
    counts = {"pieces": len(store.pieces), "segments": len(store.segments), "notes": len(store.words)}
    for title, reasons in (("files skipped", store.meta["skipped"]), ("notes dropped", store.meta["dropped"])):
        counts[title] = sum(reasons.values())
        counts |= {f"  {reason}": count for reason, count in sorted(reasons.items(), key=lambda item: -item[1])}
    for title, count in (counts | {"used in part": store.meta["damaged"]}).items():
        print(f"{count:>12,}  {title}")
    if store.meta["skipped"] or store.meta["damaged"]:
        print(f"these files: {store.path / 'skipped.jsonl'}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` cleans up like Ctrl-C
    sys.exit(main())
