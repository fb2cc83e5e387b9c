"""A corpus to a token store: find the files, encode them in parallel, write the words as they come.

Results are taken in the order of the sorted list of files, so the store is the same for any number of workers; only a
few files per worker are ever under way, so memory does not grow with the corpus.
"""

import hashlib
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from .encoding import Encoded
from .midi import MidiError, Score, read_midi
from .registry import load
from .store import Outcome, StoreError, Summary, writing_store

SUFFIXES = (".mid", ".midi")
AHEAD = 4  # files under way per worker

View = Callable[[Score], tuple[Score, np.ndarray]]


def find_midi(root: str | Path) -> tuple[list[tuple[str, str]], list[tuple[str, str, str]]]:
    """All .mid and .midi files below `root` at any depth, and the folders that cannot be read.

    Returns [(name, path)], sorted by name: the path relative to `root`, with forward slashes, and the path to open;
    and [(name, reason, detail)]. A folder that links lead to more than once is read once, so loops end.
    `root` may also be a file, whatever its suffix; its name is then the file's own.
    """
    root = Path(root)
    if not root.is_dir():
        return [(root.name, str(root))], []
    files, unread, seen, todo = [], [], set(), [("", str(root))]
    while todo:
        name, folder = todo.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            unread.append((name or ".", "unreadable", f"folder: {error.strerror}"))
            continue
        for entry in reversed(entries):  # the last one in is the first one out
            below = f"{name}/{entry.name}" if name else entry.name
            if os.path.isdir(entry.path):
                todo.append((below, entry.path))
            elif entry.name.lower().endswith(SUFFIXES):
                files.append((below, entry.path))
    return sorted(files), sorted(unread)


def encode_file(source: str | Path | BinaryIO, encoding: str, view: View | None = None) -> tuple[Encoded, Score]:
    """The words of a MIDI file as `view` shows it, and the score as the file has it, to which `Encoded.rows` refer.

    `view` gives the score that the words may show of the one in the file, and for each of its notes the row of the
    original. Raises MidiError, with a reason in few words, for anything that cannot be used.
    """
    score = read_midi(source)
    viewed, rows = view(score) if view else (score, None)
    encoded = load(encoding).encode_score(viewed)
    return (encoded if rows is None else encoded._replace(rows=rows[encoded.rows])), score


def encode_for_store(path: str, encoding: str, view: View | None, origins: bool) -> Outcome:
    """What becomes of one file; runs in the workers. The fingerprint is of the sequence of (instrument, pitch)."""
    try:
        encoded, score = encode_file(path, encoding, view)
    except MidiError as error:
        return Outcome(reason=error.reason, detail=error.detail)
    except MemoryError:
        return Outcome(reason="too large", detail="out of memory")
    columns = [field.name in ("Instrument", "Pitch") for field in load(encoding).fields]
    fingerprint = hashlib.blake2b(encoded.words[:, columns].tobytes(), digest_size=16).digest()
    return Outcome(encoded, fingerprint, notes=score.notes.take(encoded.rows) if origins else None)


def build_store(
    sources: str | Path | Iterable[str | Path],
    out: str | Path,
    encoding: str = "octuple",
    workers: int | None = None,
    progress: bool = True,
    view: View | None = None,
    origins: bool = False,
) -> Summary:
    """Tokenize all MIDI files below `sources` (folders or files) into a new store in folder `out`.

    Pieces with the same sequence of instrument and pitch are kept once, the first in sorted order. An older store in
    `out` is replaced when the new one is complete, never before. `workers` defaults to the cores this process may use.
    `view`, a function at the top level of a module, is as for `encode_file`; `origins` also stores what the file said
    of each word's note. Raises StoreError, one line, if a source does not exist, `out` is something else, or no file
    can be used.
    """
    load(encoding)
    began = time.perf_counter()
    roots = [Path(source) for source in ([sources] if isinstance(sources, str | Path) else sources)]
    for root in roots:
        if not os.path.exists(root):
            raise StoreError(f"{root} does not exist")
    workers = cores() if workers is None else workers
    if workers < 1:
        raise StoreError(f"{workers} workers are too few")
    summary = Summary(Path(os.path.realpath(out)), encoding)
    with writing_store(summary, [root.resolve().as_posix() for root in roots], origins) as store:
        files = []
        for source, root in enumerate(roots):
            midi, unread = find_midi(root)
            files += ((source, name, path) for name, path in midi)
            for problem in unread:
                store.skip(source, *problem)
        encode = partial(encode_for_store, encoding=encoding, view=view, origins=origins)
        with closing(run([path for _, _, path in files], encode, workers)) as outcomes:
            bar = tqdm(outcomes, total=len(files), unit="file", disable=None if progress else True)
            for (source, name, _), outcome in zip(files, bar, strict=True):
                store.add(source, name, outcome)
        if not summary.pieces:
            reasons = ", ".join(f"{count} {reason}" for reason, count in summary.skipped.most_common())
            raise StoreError(
                f"no usable MIDI file in {', '.join(map(str, roots))}: {reasons or 'no .mid or .midi there'}"
            )
    summary.seconds = time.perf_counter() - began
    return summary


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _leave_signals_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run(paths: list[str], encode: Callable[[str], Outcome], workers: int) -> Iterator[Outcome]:
    """The outcome of each file, in order. Raises StoreError if a worker is killed."""
    if workers == 1 or len(paths) < 2:
        yield from map(encode, paths)
        return
    # Forking takes milliseconds and does not import the caller's main module again; workers use numpy and mido only.
    fork = "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if fork else None)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(workers, len(paths)), context, _leave_signals_to_parent)
    under_way, todo = deque(), iter(paths)
    try:
        while True:
            while len(under_way) < workers * AHEAD and (path := next(todo, None)) is not None:
                under_way.append(pool.submit(encode, path))
            if not under_way:
                break
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise StoreError("a worker was killed, most likely for want of memory; try fewer --workers") from None
    except BaseException:
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()  # not to wait for the files under way
        raise
    finally:
        pool.shutdown(cancel_futures=True)
