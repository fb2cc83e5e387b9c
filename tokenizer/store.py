"""Token stores: the words of many pieces on disk, memory-mappable and safe to open whoever made them.

A store is a folder:

    words.npy      uint16 [N, F], the words of all pieces, one after the other, as `encode` returns them
    pieces.jsonl   a line per piece: source (index into meta's sources), path below it, offset, notes
    segments.npy   int64 [S, 2], (offset, notes) of every run between two restarts of Bar, in order
    meta.json      format, version, encoding, fields (name, values, size), totals, the sources
    skipped.jsonl  a line per file left out: source, path, reason, detail

and, if it was built with `origins`, what the file said of each word's note, for labels:

    velocity.npy   uint8 [N]
    track.npy      uint16 [N], index into meta's "tracks", the names of all tracks
"""

import json
import os
import weakref
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .encoding import Encoding
from .registry import ENCODINGS

FORMAT, VERSION = "adversarial-midibert token store", 1


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
    segments: np.ndarray
    meta: dict
    velocity: np.ndarray | None = None  # of origins: uint8 [N]
    track: np.ndarray | None = None  # uint16 [N], index into `tracks`
    file: FileIO | None = None  # words.npy, for `read`; None if `words` are in memory

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
            self.file.seek(self.words.offset + start * words.strides[0])
            if self.file.readinto(words) != words.nbytes:
                raise StoreError(f"{self.path}/words.npy ends before word {start + count:,}; it did not when opened")
        if (words >= [field.values for field in ENCODINGS[self.encoding].fields]).any():
            raise StoreError(f"{self.path / 'words.npy'} holds ids outside their fields, at word {start:,} or later")
        return words


def describe(encoding: Encoding) -> list[dict]:
    """The fields of an encoding as meta.json holds them."""
    return [{"name": field.name, "values": field.values, "size": field.size} for field in encoding.fields]


def is_store(path: Path) -> bool:
    """Whether a folder says of itself that it is a token store, of whatever version."""
    try:
        return json.loads((path / "meta.json").read_bytes()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def open_store(path: str | Path) -> Store:
    """Open the store in folder `path` and check all of it but the words, which `Store.read` checks as they are read.

    Nothing in it is trusted or executed, and opening takes no longer for more words.
    Raises StoreError, one line that names the file and what is wrong with it.
    """
    path = Path(path)
    if not os.path.isdir(path):
        raise StoreError(f"{path} is not a folder" if os.path.exists(path) else f"{path} does not exist")
    meta = _open_meta(path / "meta.json")
    encoding = ENCODINGS[meta["encoding"]]
    words = _open_npy(path / "words.npy", np.dtype("<u2"), (meta["notes"], len(encoding.fields)))
    segments = np.array(_open_npy(path / "segments.npy", np.dtype("<i8"), (meta["segments"], 2)))
    _check_cover(path / "segments.npy", segments, meta["notes"])
    pieces = _open_pieces(path / "pieces.jsonl", meta)
    starts = np.array([piece.offset for piece in pieces])
    if not np.isin(starts, segments[:, 0]).all():
        raise StoreError(f"{path / 'segments.npy'} has a segment that spans two pieces")
    origins = {}
    if "tracks" in meta:
        for name, dtype, values in (("velocity", "u1", 128), ("track", "<u2", len(meta["tracks"]))):
            origins[name] = _open_npy(path / f"{name}.npy", np.dtype(dtype), (meta["notes"],))
            if origins[name].max() >= values:
                raise StoreError(f"{path / name}.npy holds {origins[name].max()}, expected less than {values}")
    file = FileIO(path / "words.npy")
    store = Store(path, encoding.name, words, pieces, segments, meta, **origins, file=file)
    weakref.finalize(store, file.close)
    return store


def _open_meta(path: Path) -> dict:
    try:
        meta = json.loads(path.read_bytes())
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}; is this a token store?") from None
    except (ValueError, RecursionError):
        raise StoreError(f"{path} is not JSON") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise StoreError(f"{path} does not belong to a token store")
    if meta.get("version") != VERSION:
        raise StoreError(
            f"{path} is of format version {meta.get('version')!r}, this code reads {VERSION}: tokenize again"
        )
    if not isinstance(meta.get("encoding"), str) or meta["encoding"] not in ENCODINGS:
        raise StoreError(f"{path} names an unknown encoding, {meta.get('encoding')!r}")
    if meta.get("fields") != describe(ENCODINGS[meta["encoding"]]):
        raise StoreError(f"{path} lists other fields than {meta['encoding']} has")
    totals = [meta.get(key) for key in ("pieces", "segments", "notes")]
    if any(type(total) is not int or total < 1 for total in totals) or totals != sorted(totals):
        raise StoreError(f"{path} has totals that cannot be: pieces, segments, notes = {totals}")
    sources = meta.get("sources")
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        raise StoreError(f"{path} has no list of sources")
    tracks = meta.get("tracks", [])
    if not isinstance(tracks, list) or not all(isinstance(track, str) for track in tracks):
        raise StoreError(f"{path} has tracks that are not names")
    return meta


def _open_npy(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError, SyntaxError, OverflowError, MemoryError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: {str(error).splitlines()[0] if str(error) else 'truncated'}") from None
    if (
        not isinstance(array, np.ndarray)
        or array.dtype != dtype
        or array.shape != shape
        or not array.flags.c_contiguous
    ):
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "something else"
        raise StoreError(f"{path} holds {found}, not {dtype} {list(shape)} as meta.json says")
    return array


def _check_cover(path: Path, spans: np.ndarray, notes: int) -> None:
    """Spans (offset, length) must lie end to end and cover all words."""
    offsets, lengths = spans.T
    if (
        offsets[0] != 0
        or (lengths < 1).any()
        or (lengths > notes).any()
        or (np.append(offsets[1:], notes) != offsets + lengths).any()
    ):
        raise StoreError(f"{path} does not cover the {notes:,} words end to end")


def _open_pieces(path: Path, meta: dict) -> list[Piece]:
    pieces, sources = [], len(meta["sources"])
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                entry = json.loads(line)
                source, name, offset, notes = entry["source"], entry["path"], entry["offset"], entry["notes"]
                pieces.append(Piece(source, name, offset, notes))
                if not type(source) is type(offset) is type(notes) is int:
                    raise ValueError
                if not (0 <= source < sources and 0 <= offset < 1 << 48 and 0 <= notes < 1 << 48):
                    raise ValueError
                if name.startswith("/") or ".." in name.split("/"):
                    raise ValueError
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StoreError(f"{path} is damaged in line {len(pieces) or 1} or the next") from None
    if len(pieces) != meta["pieces"]:
        raise StoreError(f"{path} lists {len(pieces)} pieces, meta.json says {meta['pieces']}")
    _check_cover(path, np.array([(piece.offset, piece.notes) for piece in pieces]), meta["notes"])
    return pieces
