"""Token stores: the words of many pieces on disk, memory-mappable and safe to open whoever made them.

A store is a folder:

    words.bin      uint16 little-endian [N, F], the words of all pieces, one after the other, as `encode` returns them
    store.json     format, version, encoding, fields (name, values, size), sources; counts of files skipped and notes
                   dropped, by reason, and of damaged files used in part; the pieces in order, each with its source
                   (index into sources), its path below it, and the lengths of its segments, the runs of words
                   between two restarts of Bar
    skipped.jsonl  a line per file left out or used in part: source, path, reason, detail

and, if it was built with `origins`, what the file said of each word's note, for labels:

    velocity.bin   uint8 [N]
    track.bin      uint16 little-endian [N], index into "tracks" of store.json, the names of all tracks
"""

import json
import os
import shutil
import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

import numpy as np

from .encoding import Encoded, Encoding
from .midi import Notes
from .registry import ENCODINGS

FORMAT, VERSION = "adversarial-midibert token store", 2
ORIGINS = {"velocity": "u1", "track": "<u2"}  # columns of a store built with `origins`


class StoreError(ValueError):
    """A token store that cannot be opened or written; the message is one line and names the file."""


class Piece(NamedTuple):
    """One file's words: `store.words[offset : offset + notes]`."""

    source: int  # index into meta["sources"]
    path: str  # below that source, with forward slashes
    offset: int
    notes: int


@dataclass(frozen=True)
class Store:
    """An open store. `words` is memory-mapped and read-only, `read` copies; see the module's docstring for shapes."""

    path: Path
    encoding: str
    words: np.ndarray
    pieces: list[Piece]
    segments: np.ndarray  # int64 [S, 2], (offset, notes) of all segments in order
    meta: dict  # store.json without the pieces
    velocity: np.ndarray | None = None  # of origins: uint8 [N]
    track: np.ndarray | None = None  # uint16 [N], index into `tracks`
    file: FileIO | None = None  # words.bin, for `read`; None if `words` are in memory

    @property
    def tracks(self) -> list[str]:
        return self.meta.get("tracks", [])

    def read(self, start: int, count: int) -> np.ndarray:
        """A copy of words [start : start + count], uint16 [count, F], every id checked to be inside its field.

        Training reads so, and not through the mapping: what a mapping has read stays in memory, and where the file has
        been cut short meanwhile, touching it kills the process. Raises StoreError in both cases; for one thread.
        """
        words = np.empty((count, self.words.shape[1]), dtype="<u2")
        if self.file is None:
            words[:] = self.words[start : start + count]
        else:
            self.file.seek(start * words.strides[0])
            if self.file.readinto(words) != words.nbytes:
                raise StoreError(f"{self.path}/words.bin ends before word {start + count:,}; it did not when opened")
        if (words >= [field.values for field in ENCODINGS[self.encoding].fields]).any():
            raise StoreError(f"{self.path / 'words.bin'} holds ids outside their fields, at word {start:,} or later")
        return words


def is_store(path: str | Path) -> bool:
    """Whether a folder says of itself that it is a token store, of whatever version."""
    for name in ("store.json", "meta.json"):  # the latter is version 1's
        try:
            with open(Path(path, name), "rb") as file:
                if FORMAT.encode() in file.read(200):
                    return True
        except OSError:
            pass
    return False


def open_store(path: str | Path) -> Store:
    """Open the store in folder `path` and check all of it but the words, which `Store.read` checks as they are read.

    Nothing in it is trusted or executed, and opening takes no longer for more words.
    Raises StoreError, one line that names the file and what is wrong with it.
    """
    path = Path(path)
    if not os.path.isdir(path):
        raise StoreError(f"{path} is not a folder" if os.path.exists(path) else f"{path} does not exist")
    meta, pieces, lengths = _read_json(path / "store.json")
    encoding, notes = ENCODINGS[meta["encoding"]], sum(lengths)
    words = _map(path / "words.bin", "<u2", (notes, len(encoding.fields)))
    segments = np.array([(end - length, length) for end, length in zip(accumulate(lengths), lengths, strict=True)])
    columns = {}
    if "tracks" in meta:
        for name, values in (("velocity", 128), ("track", len(meta["tracks"]))):
            columns[name] = _map(path / f"{name}.bin", ORIGINS[name], (notes,))
            if columns[name].max() >= values:
                raise StoreError(f"{path / name}.bin holds {columns[name].max()}, expected less than {values}")
    file = FileIO(path / "words.bin")
    store = Store(path, encoding.name, words, pieces, segments, meta, **columns, file=file)
    weakref.finalize(store, file.close)
    return store


def _read_json(path: Path) -> tuple[dict, list[Piece], list[int]]:
    """What store.json says, its pieces, and the lengths of all their segments in order."""
    try:
        meta = json.loads(path.read_bytes())
    except OSError as error:
        if is_store(path.parent):
            raise StoreError(f"{path.parent} is a store of version 1, not {VERSION}: tokenize again") from None
        raise StoreError(f"{path} cannot be read: {error.strerror}; is this a token store?") from None
    except (ValueError, RecursionError):
        raise StoreError(f"{path} is not JSON") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise StoreError(f"{path} does not belong to a token store")
    if meta.get("version") != VERSION:
        raise StoreError(f"{path} is of version {meta.get('version')!r}, not {VERSION}: tokenize again")
    encoding = next((encoding for name, encoding in ENCODINGS.items() if name == meta.get("encoding")), None)
    if not encoding:
        raise StoreError(f"{path} names an unknown encoding, {meta.get('encoding')!r}")
    if meta.get("fields") != _describe(encoding):
        raise StoreError(f"{path} lists other fields than {encoding.name} has")
    pieces, lengths, offset = [], [], 0
    try:
        if {type(name) for name in (*meta["sources"], *meta.get("tracks", []))} - {str}:
            raise ValueError
        for entry in meta.pop("pieces"):
            source, name, segments = entry["source"], entry["path"], entry["segments"]
            integers = {type(number) for number in (source, *segments)} == {int}
            if not integers or not 0 <= source < len(meta["sources"]) or min(segments) < 1:
                raise ValueError
            if name.startswith("/") or ".." in name.split("/"):
                raise ValueError
            pieces.append(Piece(source, name, offset, sum(segments)))
            lengths += segments
            offset += sum(segments)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise StoreError(f"{path} is damaged after piece {len(pieces)}") from None
    if not pieces:
        raise StoreError(f"{path} lists no pieces")
    return meta, pieces, lengths


def _describe(encoding: Encoding) -> list[dict]:
    return [{"name": field.name, "values": field.values, "size": field.size} for field in encoding.fields]


def _map(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """A file's numbers, mapped read-only, if it is as long as they are."""
    size = np.dtype(dtype).itemsize
    for length in shape:
        size *= length
    try:
        if os.path.getsize(path) != size:
            raise StoreError(f"{path} has {os.path.getsize(path):,} bytes, not {size:,} as store.json says")
        return np.memmap(path, dtype, "r", shape=shape)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from None


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
    damaged: int = 0  # pieces of which the events before the damage are used


class Outcome(NamedTuple):
    """What became of one file: its words and their fingerprint, or the reason why there are none."""

    encoded: Encoded | None = None
    fingerprint: bytes = b""
    reason: str = ""
    detail: str = ""
    notes: Notes | None = None  # what the file said of each word's note, for labels
    damage: str = ""


class Writer:
    """A store that grows file by file: `columns` and `skipped` are its open files, counts go to `summary`."""

    def __init__(self, summary: Summary, columns: dict[str, BinaryIO], skipped: TextIO):
        self.summary, self.columns, self.skipped = summary, columns, skipped
        self.pieces: list[dict] = []
        self.first: dict[bytes, str] = {}  # fingerprint -> the piece that had it first
        self.tracks: dict[str, int] = {}

    def skip(self, source: int, path: str, reason: str, detail: str) -> None:
        """Count a file that cannot be used."""
        self.summary.skipped[reason] += 1
        self.report(source, path, reason, detail)

    def report(self, source: int, path: str, reason: str, detail: str) -> None:
        self.skipped.write(json.dumps({"source": source, "path": path, "reason": reason, "detail": detail}) + "\n")

    def add(self, source: int, path: str, outcome: Outcome) -> None:
        """The words of one file, or why there are none. Raises StoreError if there are too many track names."""
        encoded, summary, notes = outcome.encoded, self.summary, outcome.notes
        if encoded is None:
            self.skip(source, path, outcome.reason, outcome.detail)
            return
        if outcome.fingerprint in self.first:
            self.skip(source, path, "duplicate", f"of {self.first[outcome.fingerprint]}")
            return
        self.first[outcome.fingerprint] = path
        if outcome.damage:
            summary.damaged += 1
            self.report(source, path, "used in part", outcome.damage)
        self.columns["words"].write(encoded.words.astype("<u2").tobytes())
        if "track" in self.columns:
            tracks = [self.tracks.setdefault(name, len(self.tracks)) for name in notes.name]
            if len(self.tracks) > 1 << 16:
                raise StoreError(f"the files have more than {1 << 16:,} different track names")
            self.columns["velocity"].write(notes.velocity.astype("u1").tobytes())
            self.columns["track"].write(np.array(tracks, "<u2").tobytes())
        self.pieces.append({"source": source, "path": path, "segments": encoded.segments.tolist()})
        summary.pieces += 1
        summary.segments += len(encoded.segments)
        summary.notes += len(encoded.words)
        summary.dropped.update({reason: count for reason, count in encoded.dropped.items() if count})

    def describe(self, sources: list[str]) -> dict:
        """What store.json says."""
        summary, encoding = self.summary, ENCODINGS[self.summary.encoding]
        meta = {"format": FORMAT, "version": VERSION, "encoding": encoding.name, "fields": _describe(encoding)}
        meta |= {"sources": sources, "skipped": summary.skipped, "dropped": summary.dropped, "damaged": summary.damaged}
        meta |= {"tracks": list(self.tracks)} if "track" in self.columns else {}
        return meta | {"pieces": self.pieces}


@contextmanager
def writing_store(summary: Summary, sources: list[str], origins: bool):
    """A `Writer` of a folder that takes its place, `summary.path`, at the end of the block; removed if that fails.

    Raises StoreError if that place is neither free, nor a store, nor an empty folder, or if it cannot be written.
    """
    out = summary.path
    new, old = (out.parent / f".{out.name}.{role}-{os.getpid()}" for role in ("new", "old"))
    try:
        if out.exists() and not is_store(out) and not (out.is_dir() and not any(out.iterdir())):
            raise StoreError(f"{out} exists and is not a token store; choose another place")
        out.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
        with ExitStack() as stack:
            names = ["words", *(ORIGINS if origins else ())]
            columns = {name: stack.enter_context(open(new / f"{name}.bin", "wb")) for name in names}
            skipped = stack.enter_context(open(new / "skipped.jsonl", "w"))
            yield (store := Writer(summary, columns, skipped))
        (new / "store.json").write_text(json.dumps(store.describe(sources)) + "\n")
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
