"""Token stores: the words of many pieces on disk, memory-mapped. Opening one runs no code, whatever its origin.

A store is a folder:

    words.bin      uint16 little-endian [N, F], the words of all pieces, one after the other, as `encode` returns them
    store.json     format, version, encoding, fields (name, values, size), sources; counts of files skipped and notes
                   dropped, by reason, and of damaged files used in part; the pieces in order, each with its source
                   (index into sources), its path below it, and the lengths of its segments, the runs of words
                   between two restarts of Bar
    skipped.jsonl  a line per file left out or used in part: source, path, reason, detail

and, if it was built with `origins`, velocity and track of each word's note, for labels:

    velocity.bin   uint8 [N]
    track.bin      uint16 little-endian [N], index into "tracks" of store.json, the names of all tracks
"""

import hashlib
import json
import math
import os
import shutil
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .encoding import Encoded
from .midi import Notes, Score
from .registry import ENCODINGS

FORMAT, VERSION = "adversarial-midibert token store", 2
IN_PART = "used in part"  # the reason of a damaged file
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
        if (words >= ENCODINGS[self.encoding].values).any():
            raise StoreError(f"{self.path / 'words.bin'} holds ids outside their fields, at word {start:,} or later")
        return words


def is_store(path: str | Path) -> bool:
    """Whether the store.json of a folder is that of a token store, of whatever version."""
    with suppress(OSError), open(Path(path, "store.json"), "rb") as file:
        return FORMAT.encode() in file.read(200)
    return False


def open_store(path: str | Path) -> Store:
    """Open the store in folder `path` and check all of it but the words, which `Store.read` checks as they are read.

    Nothing in it is trusted or executed, and opening takes no longer for more words.
    Raises StoreError, one line that names the file and what is wrong with it.
    """
    path = Path(path)
    if not os.path.isdir(path):
        raise StoreError(f"{path} is not a folder" if os.path.exists(path) else f"{path} does not exist")
    meta = _read_json(path / "store.json")
    pieces, lengths, offset = [], [], 0
    try:
        if {type(name) for name in (*meta["sources"], *meta.get("tracks", []))} - {str}:
            raise ValueError
        for entry in meta.pop("pieces"):
            source, name, segments = entry["source"], entry["path"], entry["segments"]
            integers = {type(number) for number in (source, *segments)} == {int}
            below = not name.startswith("/") and ".." not in name.split("/")
            if not (integers and below and 0 <= source < len(meta["sources"]) and min(segments) >= 1):
                raise ValueError
            pieces.append(Piece(source, name, offset, sum(segments)))
            lengths += segments
            offset += sum(segments)
        if not pieces:
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise StoreError(f"{path / 'store.json'} is damaged after piece {len(pieces)}") from None
    columns = {"words": _map(path / "words.bin", "<u2", (offset, len(meta["fields"])))}
    if "tracks" in meta:
        for name, values in (("velocity", 128), ("track", len(meta["tracks"]))):
            columns[name] = _map(path / f"{name}.bin", ORIGINS[name], (offset,))
            if columns[name].max() >= values:
                raise StoreError(f"{path / name}.bin holds {columns[name].max()}, expected less than {values}")
    segments = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1)
    file = FileIO(path / "words.bin")
    store = Store(path, meta["encoding"], pieces=pieces, segments=segments, meta=meta, **columns, file=file)
    weakref.finalize(store, file.close)
    return store


def _read_json(path: Path) -> dict:
    """The content of store.json, if it is one of this version with the fields of its encoding."""
    try:
        meta = json.loads(path.read_bytes())
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}; is this a token store?") from None
    except (ValueError, RecursionError):
        raise StoreError(f"{path} is not JSON") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise StoreError(f"{path} does not belong to a token store")
    if meta.get("version") != VERSION:
        raise StoreError(f"{path} is of version {meta.get('version')!r}, not {VERSION}: tokenize again")
    if meta.get("encoding") not in list(ENCODINGS):  # a list, because it may be of a type that cannot be a key
        raise StoreError(f"{path} names an unknown encoding, {meta.get('encoding')!r}")
    if meta.get("fields") != _describe(meta["encoding"]):
        raise StoreError(f"{path} lists other fields than {meta['encoding']} has")
    return meta


def _describe(encoding: str) -> list[dict]:
    return [{"name": field.name, "values": field.values, "size": field.size} for field in ENCODINGS[encoding].fields]


def _map(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """A file's numbers, mapped read-only, if it is as long as they are."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        if os.path.getsize(path) != size:
            raise StoreError(f"{path} has {os.path.getsize(path):,} bytes, not {size:,} as store.json says")
        return np.memmap(path, dtype, "r", shape=shape)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from None


class Outcome(NamedTuple):
    """What became of one file: its words, or the reason why there are none or why they are only some of them."""

    encoded: Encoded | None = None
    score: Score | None = None  # as the file has it, without its messages
    reason: str = ""
    detail: str = ""


def write_store(
    out: str | Path,
    encoding: str,
    roots: list[Path],
    outcomes: Iterable[tuple[int, str, Outcome]],
    hides: Iterable[str] = (),
    origins: bool = False,
) -> Store:
    """Write a store of `outcomes`, each with the index of its root and its path below it, in place of an older one.

    `hides` are columns of `Notes` in which duplicates must agree; see `build_store`.
    Raises StoreError as `_replacing` does, if there are no words, or if there are too many names of tracks.
    """
    skipped, dropped = Counter(), Counter()  # files and notes by reason
    pieces, firsts, tracks = [], {}, {}  # firsts: fingerprint → the path that had it first
    with _replacing(Path(os.path.realpath(out))) as new, ExitStack() as files:
        names = ("words", *ORIGINS) if origins else ("words",)
        columns = {name: files.enter_context(open(new / f"{name}.bin", "wb")) for name in names}
        listed = files.enter_context(open(new / "skipped.jsonl", "w"))
        for source, path, (encoded, score, reason, detail) in outcomes:
            if encoded:
                notes = score.notes.take(encoded.rows)
                first = firsts.setdefault(_fingerprint(encoding, encoded.words, notes, hides), (source, path))
                if first != (source, path):
                    encoded, reason, detail = None, "duplicate", f"of {first[1]}"
            if reason:
                skipped[reason] += 1
                line = {"source": source, "path": path, "reason": reason, "detail": detail}
                listed.write(json.dumps(line) + "\n")
            if encoded:
                columns["words"].write(encoded.words.astype("<u2").tobytes())
                pieces.append({"source": source, "path": path, "segments": encoded.segments.tolist()})
                dropped.update({reason: count for reason, count in encoded.dropped.items() if count})
            if encoded and origins:
                numbers = [tracks.setdefault(name, len(tracks)) for name in notes.name]
                if len(tracks) > 1 << 16:
                    raise StoreError(f"the files have more than {1 << 16:,} different track names")
                columns["velocity"].write(notes.velocity.astype("u1").tobytes())
                columns["track"].write(np.array(numbers, "<u2").tobytes())
        if not pieces:
            reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
            raise StoreError(f"no usable MIDI file in {', '.join(map(str, roots))}: {reasons or 'no MIDI there'}")
        meta = {"format": FORMAT, "version": VERSION, "encoding": encoding, "fields": _describe(encoding)}
        meta["sources"] = [root.resolve().as_posix() for root in roots]
        meta |= {"damaged": skipped.pop(IN_PART, 0), "skipped": skipped, "dropped": dropped}
        meta |= {"tracks": list(tracks)} if origins else {}
        (new / "store.json").write_text(json.dumps(meta | {"pieces": pieces}) + "\n")
    return open_store(out)


def _fingerprint(encoding: str, words: np.ndarray, notes: Notes, hides: Iterable[str]) -> bytes:
    """Files of one fingerprint have the same notes in the same rhythm, and the same columns `hides` of their notes."""
    rhythm = [name not in ("Velocity", "TimeSig", "Tempo") for name in ENCODINGS[encoding].names]
    hidden = b"".join(getattr(notes, name).tobytes() for name in hides)
    return hashlib.blake2b(words[:, rhythm].tobytes() + hidden, digest_size=16).digest()


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A new folder that takes the place `out` at the end of the block; removed if that fails.

    Raises StoreError if that place is neither free, nor a store, nor an empty folder, or if it cannot be written.
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
        new.rename(out)
    except OSError as error:
        raise StoreError(f"{out} cannot be written: {error.strerror or error}") from None
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
