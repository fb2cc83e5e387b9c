"""Write a token store: beside its place, as the words come, and renamed into place when it is complete."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from tokenizer.encoding import Encoded
from tokenizer.registry import load
from tokenizer.store import StoreError, is_store

HEADER = 128  # bytes kept for the .npy header, whose shape is known only when the last word is written


@dataclass
class Summary:
    """What became of a corpus."""

    path: Path
    encoding: str
    pieces: int = 0
    segments: int = 0
    notes: int = 0
    seconds: float = 0.0
    skipped: Counter = field(default_factory=Counter)  # files, by reason
    dropped: Counter = field(default_factory=Counter)  # notes of the pieces kept, by reason


class Outcome(NamedTuple):
    """What became of one file: its words and their fingerprint, or the reason why there are none."""

    encoded: Encoded | None = None
    fingerprint: bytes = b""
    reason: str = ""
    detail: str = ""


@contextmanager
def replacing(out: Path):
    """A new folder beside `out`, put in its place at the end of the block; removed if the block fails.

    Raises StoreError if `out` exists and is neither a store nor an empty folder, or if it cannot be written.
    """
    new, old = (out.parent / f".{out.name}.{role}-{os.getpid()}" for role in ("new", "old"))
    try:
        if out.exists() and not is_store(out) and not (out.is_dir() and not any(out.iterdir())):
            raise StoreError(f"{out} exists and is not a token store; choose another place")
        out.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
        yield new
        if out.exists():
            out.rename(old)
        try:
            new.rename(out)
        except BaseException:
            if old.exists():
                old.rename(out)
            raise
    except OSError as error:
        raise StoreError(f"{out} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write(
    folder: Path, names: list[tuple[int, str]], outcomes: Iterable[Outcome], problems: list, summary: Summary
) -> None:
    """Write words, segments, pieces and skipped files as the outcomes come; counts go to `summary`."""
    first: dict[bytes, str] = {}
    with ExitStack() as stack:
        words, segments = (stack.enter_context(open(folder / f"{name}.npy", "wb")) for name in ("words", "segments"))
        pieces, skipped = (stack.enter_context(open(folder / f"{name}.jsonl", "w")) for name in ("pieces", "skipped"))
        start_npy(words)
        start_npy(segments)

        def skip(source: int, name: str, reason: str, detail: str) -> None:
            summary.skipped[reason] += 1
            skipped.write(json.dumps({"source": source, "path": name, "reason": reason, "detail": detail}) + "\n")

        for problem in problems:
            skip(*problem)
        for (source, name), (encoded, fingerprint, reason, detail) in zip(names, outcomes, strict=True):
            if encoded is None:
                skip(source, name, reason, detail)
                continue
            if fingerprint in first:
                skip(source, name, "duplicate", f"of {first[fingerprint]}")
                continue
            first[fingerprint] = name
            words.write(encoded.words.astype("<u2").tobytes())
            offsets = summary.notes + np.cumsum(encoded.segments) - encoded.segments
            segments.write(np.stack((offsets, encoded.segments), axis=1).astype("<i8").tobytes())
            entry = {"source": source, "path": name, "offset": summary.notes, "notes": len(encoded.words)}
            pieces.write(json.dumps(entry) + "\n")
            summary.pieces += 1
            summary.segments += len(encoded.segments)
            summary.notes += len(encoded.words)
            summary.dropped.update(encoded.dropped)
        finish_npy(words, "<u2", (summary.notes, len(load(summary.encoding).fields)))
        finish_npy(segments, "<i8", (summary.segments, 2))
    summary.dropped = +summary.dropped  # reasons that no note had go


def start_npy(file: BinaryIO) -> None:
    """Leave room for the header; then append the array's bytes, and `finish_npy`."""
    file.write(bytes(HEADER))


def finish_npy(file: BinaryIO, dtype: str, shape: tuple[int, ...]) -> None:
    """Put the .npy header (version 1.0) in the room that `start_npy` left. `dtype` is e.g. "<u2"."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode("ascii")
    magic = np.lib.format.magic(1, 0) + (HEADER - 10).to_bytes(2, "little")
    file.seek(0)
    file.write(magic + text.ljust(HEADER - 11) + b"\n")
