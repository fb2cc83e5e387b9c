"""Write a token store: beside its place, as the words come, and renamed into place when it is complete."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .encoding import Encoded
from .registry import load
from .store import StoreError, is_store

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


class Origins(NamedTuple):
    """What the file said of each word's note."""

    velocity: np.ndarray  # uint8 [notes]
    track: np.ndarray  # int64 [notes], index into `names`
    names: list[str]


class Outcome(NamedTuple):
    """What became of one file: its words and their fingerprint, or the reason why there are none."""

    encoded: Encoded | None = None
    fingerprint: bytes = b""
    reason: str = ""
    detail: str = ""
    origins: Origins | None = None


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
    folder: Path,
    names: list[tuple[int, str]],
    outcomes: Iterable[Outcome],
    problems: list,
    summary: Summary,
    origins: bool = False,
) -> list[str]:
    """Write words, segments, pieces and skipped files as the outcomes come; counts go to `summary`.

    With `origins`, also each note's velocity and track; returns the tracks' names. Raises StoreError if those are more
    than a column can hold.
    """
    first: dict[bytes, str] = {}
    tracks: dict[str, int] = {}
    with ExitStack() as stack:
        words = stack.enter_context(Column(folder / "words.npy", "<u2", len(load(summary.encoding).fields)))
        segments = stack.enter_context(Column(folder / "segments.npy", "<i8", 2))
        if origins:
            velocity = stack.enter_context(Column(folder / "velocity.npy", "|u1"))
            track = stack.enter_context(Column(folder / "track.npy", "<u2"))
        pieces, skipped = (stack.enter_context(open(folder / f"{name}.jsonl", "w")) for name in ("pieces", "skipped"))

        def skip(source: int, name: str, reason: str, detail: str) -> None:
            summary.skipped[reason] += 1
            skipped.write(json.dumps({"source": source, "path": name, "reason": reason, "detail": detail}) + "\n")

        for problem in problems:
            skip(*problem)
        for (source, name), (encoded, fingerprint, reason, detail, origin) in zip(names, outcomes, strict=True):
            if encoded is None:
                skip(source, name, reason, detail)
                continue
            if fingerprint in first:
                skip(source, name, "duplicate", f"of {first[fingerprint]}")
                continue
            first[fingerprint] = name
            words.append(encoded.words)
            offsets = summary.notes + np.cumsum(encoded.segments) - encoded.segments
            segments.append(np.stack((offsets, encoded.segments), axis=1))
            if origins:
                velocity.append(origin.velocity)
                track.append(np.array([tracks.setdefault(name, len(tracks)) for name in origin.names])[origin.track])
                if len(tracks) > 1 << 16:
                    raise StoreError(f"the files have more than {1 << 16:,} different track names")
            entry = {"source": source, "path": name, "offset": summary.notes, "notes": len(encoded.words)}
            pieces.write(json.dumps(entry) + "\n")
            summary.pieces += 1
            summary.segments += len(encoded.segments)
            summary.notes += len(encoded.words)
            summary.dropped.update(encoded.dropped)
    summary.dropped = +summary.dropped  # reasons that no note had go
    return list(tracks)


class Column:
    """An .npy file that grows: rows of `shape` (none: numbers) appended, the header (version 1.0) written last."""

    def __init__(self, path: Path, dtype: str, *shape: int):
        self.path, self.dtype, self.shape, self.rows = path, dtype, shape, 0

    def __enter__(self) -> "Column":
        self.file = open(self.path, "wb")
        self.file.write(bytes(HEADER))
        return self

    def append(self, rows: np.ndarray) -> None:
        self.file.write(rows.astype(self.dtype).tobytes())
        self.rows += len(rows)

    def __exit__(self, *_) -> None:
        description = {"descr": self.dtype, "fortran_order": False, "shape": (self.rows, *self.shape)}
        magic = np.lib.format.magic(1, 0) + (HEADER - 10).to_bytes(2, "little")
        with self.file:
            self.file.seek(0)
            self.file.write(magic + repr(description).encode("ascii").ljust(HEADER - 11) + b"\n")
