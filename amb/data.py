"""From token stores to batches: which pieces train and which validate, sequences of L words, transposition.

Nothing is loaded whole: words stay on the disk, and a batch reads its own rows only. A sequence is the next L words
of a segment, whose last word is EOS (in encodings that have one); the last sequence of a segment is filled with PAD.
"""

import os
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np

from amb import tokenizer
from amb.files import fingerprint
from amb.tokenizer import find_midi

MEMBERS = (*tokenizer.SUFFIXES, ".csv")  # what is taken out of an archive
LARGEST_MEMBER, LARGEST_ARCHIVE = 8 << 20, 4 << 30  # bytes, unpacked; the tokenizer takes no larger MIDI files


def open_sources(paths: Iterable[str | Path], encoding: str, cache: Path) -> list[tokenizer.Store]:
    """Open token stores; tokenize folders and archives of MIDI into `cache` first, once for each state they are in.

    Raises ValueError in one line for a path that is missing, holds no usable MIDI, or is a store of another encoding.
    """
    stores = []
    for path in map(Path, paths):
        is_store = tokenizer.is_store(path)
        store = tokenizer.open_store(path) if is_store else tokenized(midi_folder(path, cache), encoding, cache)
        if store.encoding != encoding:
            raise ValueError(f"{path} is a store of {store.encoding} words: add --encoding {store.encoding}")
        stores.append(store)
    return stores


def midi_folder(path: Path, cache: Path) -> Path:
    """The folder of MIDI at this path: itself, or an archive unpacked into `cache`. Raises ValueError without one."""
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if is_archive(path):
        return unpacked(path, cache)
    if not path.is_dir():
        raise ValueError(f"{path} is neither a folder nor an archive")
    if tokenizer.is_store(path):
        raise ValueError(f"{path} is a token store: give the folder of MIDI files that it was made of")
    return path


def is_archive(path: Path) -> bool:
    with suppress(OSError):  # of a file that cannot be read; reading it says so
        return path.is_file() and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path))
    return False


def unpacked(path: Path, cache: Path) -> Path:
    """The folder below `cache` with the MIDI and csv files of a .zip or .tar.gz, made once for each of its states.

    Raises ValueError, naming the archive, if it is damaged, too large, or holds no such file.
    """
    state = fingerprint([str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns])
    folder = cache / f"{path.name.split('.')[0]}-{state}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".unpacked-") as beside:
        try:
            left_out = _unpack(path, Path(beside, "files"))
            Path(beside, "files").rename(folder)
        except Exception as error:  # whatever zipfile, tarfile and their decompressors raise
            raise ValueError(f"{path} cannot be unpacked: {error}") from None
    for reason, count in left_out.items():
        print(f"{path}: {count:,} files left out: {reason}", file=sys.stderr)
    return folder


def _unpack(path: Path, folder: Path) -> Counter[str]:
    """Write the archive's MIDI and csv files into the folder, never outside it. How many were left out, by reason."""
    left_out, total, zipped = Counter(), 0, zipfile.is_zipfile(path)
    with zipfile.ZipFile(path) if zipped else tarfile.open(path) as archive:
        for member in archive.infolist() if zipped else archive:
            name, size = (member.filename, member.file_size) if zipped else (member.name, member.size)
            name = PureWindowsPath(name)  # splits at slashes and backslashes, and parses drives
            if name.suffix.lower() not in MEMBERS or "__MACOSX" in name.parts or (zipped and member.is_dir()):
                continue
            if name.anchor or ".." in name.parts:
                left_out["their names lead outside the archive"] += 1
            elif not (zipped or member.isfile()):
                left_out["links, not files"] += 1
            elif not 0 < size <= LARGEST_MEMBER:
                left_out[f"empty, or larger than {LARGEST_MEMBER >> 20} MiB"] += 1
            else:
                total += size
                if total > LARGEST_ARCHIVE:
                    raise ValueError(f"it holds more than {LARGEST_ARCHIVE >> 30} GiB")
                target = folder.joinpath(*name.parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) if zipped else archive.extractfile(member) as file:
                    target.write_bytes(file.read())
    if not total:
        raise ValueError("it holds no MIDI file")
    return left_out


def tokenized(folder: Path, encoding: str, cache: Path, view=None) -> tokenizer.Store:
    """The tokens, kept below `cache`, of a folder of MIDI in its present state; through a `view`, with their origins.

    See `tokenizer.build_store`.
    """
    state = [encoding, str(folder.resolve()), view and view.__name__]
    for name, path in find_midi(folder)[0]:
        with suppress(OSError):  # a link that leads nowhere: the store lists it as unreadable
            info = os.stat(path)
            state.append([name, info.st_size, info.st_mtime_ns])
    store = cache / f"{folder.resolve().name}-{encoding}-{fingerprint(state)}"
    if not tokenizer.is_store(store):
        tokenizer.build_store([folder], store, encoding, view=view, origins=view is not None)
    return tokenizer.open_store(store)


def unused(stores: list[tokenizer.Store]) -> list[str]:
    """What tokenizing could not use, with counts by reason: a line for each store where there is something."""
    lines = []
    for store in stores:
        counts = [f"{count:,} files ({reason})" for reason, count in Counter(store.meta["skipped"]).most_common()]
        counts += [f"{store.meta['damaged']:,} files in part (damaged)"] if store.meta["damaged"] else []
        counts += [f"{count:,} notes ({reason})" for reason, count in Counter(store.meta["dropped"]).most_common()]
        if counts:
            sources, listed = ", ".join(store.meta["sources"]), store.path / "skipped.jsonl"
            lines.append(f"not used of {sources}: {', '.join(counts)}; listed in {listed}")
    return lines


@dataclass(frozen=True)
class Sequences:
    """Sequences of up to L words, by number: where each one's words lie. Arrays of S entries."""

    stores: list[tokenizer.Store]
    notes: int  # L
    store: np.ndarray  # which store
    piece: np.ndarray  # which of its pieces
    start: np.ndarray  # first word
    count: np.ndarray  # words to take
    ends: np.ndarray  # whether an EOS word follows them

    def __len__(self) -> int:
        return len(self.start)

    @property
    def encoding(self) -> tokenizer.Encoding:
        return tokenizer.load(self.stores[0].encoding)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [S]: words in each sequence, EOS included, PAD not."""
        return self.count + self.ends

    def read(self, number: int) -> np.ndarray:
        """The notes of one sequence, uint16 [n, F], without EOS and PAD."""
        return self.stores[self.store[number]].read(int(self.start[number]), int(self.count[number]))

    def cropped(self, numbers: np.ndarray, rng: np.random.Generator) -> "Sequences":
        """For each of these sequences a random window of the segment it is in: L words, or all if there are fewer.

        Numbered anew, from 0. Every place of the window is as likely; an EOS follows only a whole segment.
        """
        stores, before, space = self.store[numbers], np.empty(len(numbers), int), np.empty(len(numbers), int)
        for index, store in enumerate(self.stores):
            here = np.flatnonzero(stores == index)
            segment = np.searchsorted(store.segments[:, 0], self.start[numbers[here]], side="right") - 1
            before[here], space[here] = store.segments[segment].T
        whole = np.minimum(space, self.notes)
        start = before + rng.integers(0, space - whole, endpoint=True)
        ends = (self.encoding.eos is not None) & (whole < self.notes)
        return Sequences(self.stores, self.notes, stores, self.piece[numbers], start, whole, ends)

    def places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where a batch's words lie in their stores, int64 [B, L], and which of these places are notes, bool [B, L]."""
        steps = np.arange(self.notes)
        return self.start[numbers][:, None] + steps, steps < self.count[numbers][:, None]

    def batch(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Words int64 [B, L, F], padded, and lengths int64 [B] of the sequences with these numbers."""
        shape = len(numbers), self.notes, len(self.encoding.fields)
        words = np.broadcast_to(self.encoding.pad, shape).astype(np.int64)
        for row, number in enumerate(numbers):
            words[row, : self.count[number]] = self.read(number)
        ended = np.flatnonzero(self.ends[numbers])
        if len(ended):  # never in cp, which has no EOS
            words[ended, self.count[numbers][ended]] = self.encoding.eos
        return words, self.lengths[numbers]


def cut(
    stores: list[tokenizer.Store], roles: list[list[str]], role: str, notes: int, even: bool = False, least: int = 1
) -> Sequences:
    """The sequences of all pieces with this role, but for those of fewer than `least` words, EOS not counted.

    A segment's sequences are the next `notes` words each, the last one what is left (method, Compound tokens). `even`
    makes as many of them, but of lengths that differ by one word at most: no verdict then rests on a handful of notes.
    """
    has_eos = tokenizer.load(stores[0].encoding).eos is not None
    columns = []
    for index, (store, of_piece) in enumerate(zip(stores, roles, strict=True)):
        offsets = np.array([piece.offset for piece in store.pieces])
        piece = np.searchsorted(offsets, store.segments[:, 0], side="right") - 1
        chosen = np.array(of_piece)[piece] == role
        segments, piece = store.segments[chosen], piece[chosen]
        cuts = -(-segments[:, 1] // notes)
        segment = np.repeat(np.arange(len(segments)), cuts)
        nth = np.arange(len(segment)) - np.repeat(cuts.cumsum() - cuts, cuts)
        whole, parts = segments[segment, 1], cuts[segment]
        first, after = (nth * whole // parts, (nth + 1) * whole // parts) if even else (nth * notes, (nth + 1) * notes)
        count = np.minimum(after, whole) - first
        ends = (nth == parts - 1) & (count < notes)
        columns.append((np.full(len(segment), index), piece[segment], segments[segment, 0] + first, count, ends))
    columns = [np.concatenate(column) for column in zip(*columns, strict=True)]
    store, piece, start, count, ends = (column[columns[3] >= least] for column in columns)
    return Sequences(stores, notes, store, piece, start, count, ends & has_eos)


def transpose(words: np.ndarray, encoding: tokenizer.Encoding, largest: int, draws: np.ndarray) -> np.ndarray:
    """Shift each sequence's pitches by one random interval within ±`largest` semitones that keeps them all in range.

    words int [B, L, F], draws [B] in [0, 1) -> a new array; percussion and special ids stay as they are.
    """
    low, high = encoding.pitch_range
    pitch = words[..., encoding.pitch_field]
    pitched = (pitch >= low) & (pitch <= high)
    down = np.minimum(np.where(pitched, pitch, high).min(axis=1) - low, largest)
    up = np.minimum(high - np.where(pitched, pitch, low).max(axis=1), largest)
    shift = np.floor(draws * (up + down + 1)).astype(np.int64) - down
    shifted = words.copy()
    shifted[..., encoding.pitch_field] += shift[:, None] * pitched
    return shifted


def most_frequent_baseline(train: Sequences, valid: Sequences) -> np.ndarray:
    """float [F]: accuracy, on the validation words, of always naming the training words' most frequent value.

    Counted over 1,024 sequences of each, spread evenly.
    """
    counts = []
    for sequences in (train, valid):
        numbers = np.unique(np.linspace(0, len(sequences) - 1, min(1024, len(sequences))).astype(int))
        words, lengths = sequences.batch(numbers)
        words = words[np.arange(sequences.notes) < lengths[:, None]]
        fields = enumerate(sequences.encoding.fields)
        counts.append([np.bincount(words[:, index], minlength=field.size) for index, field in fields])
    return np.array([of_valid[of_train.argmax()] / of_valid.sum() for of_train, of_valid in zip(*counts, strict=True)])


def epoch_order(sequences: int, epoch_size: int, epoch: int, seed: int) -> np.ndarray:
    """Which sequences an epoch visits, in order: int64 [epoch_size].

    Epochs cut one endless stream of shuffled passes over the data, so every sequence comes once before any comes twice.
    """
    first, last = epoch * epoch_size, (epoch + 1) * epoch_size
    passes = range(first // sequences, -(-last // sequences))
    stream = np.concatenate([np.random.default_rng([seed, number]).permutation(sequences) for number in passes])
    return stream[first - passes[0] * sequences :][:epoch_size]


def sample(sequences: int, most: int, seed: int) -> np.ndarray:
    """The sequences that validate after an epoch: int64, `most` of them, drawn; all, if `most` is 0 or no fewer."""
    if 0 < most < sequences:
        return np.random.default_rng(seed).permutation(sequences)[:most]
    return np.arange(sequences)


def names(stores: list[tokenizer.Store], roles: list[list[str]], role: str) -> list[str]:
    """The paths of all pieces with this role, each below its store's source."""
    return [
        piece.path
        for store, of_piece in zip(stores, roles, strict=True)
        for piece, of_this in zip(store.pieces, of_piece, strict=True)
        if of_this == role
    ]
