"""A corpus to a token store: find the files, encode them in parallel, write the words as they come.

Results are taken in the order of the sorted list of files, so the store is the same for any number of workers; only a
few files per worker are ever under way, so memory does not grow with the corpus.
"""

import hashlib
import json
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

import numpy as np
from tqdm import tqdm

from .find import find_midi
from .midi import MidiError, Score, read_midi
from .registry import load
from .store import FORMAT, VERSION, StoreError, describe
from .store_writer import Origins, Outcome, Summary, replacing, write

AHEAD = 4  # files under way per worker


View = Callable[[Score], tuple[Score, np.ndarray]]


def encode_file(path: str, encoding: str, view: View | None = None, origins: bool = False) -> Outcome:
    """Encode one file; runs in the workers. The fingerprint is of the sequence of (instrument, pitch)."""
    try:
        original = read_midi(path)
        score, rows = view(original) if view else (original, None)
        encoded = load(encoding).encode_score(score)
    except MidiError as error:
        return Outcome(reason=error.reason, detail=error.detail)
    except MemoryError:
        return Outcome(reason="too large", detail="out of memory")
    notes = score.notes.take(encoded.rows)
    sequence = np.stack((notes.instrument, notes.pitch), axis=1).astype(np.uint8)
    outcome = Outcome(encoded, hashlib.blake2b(sequence.tobytes(), digest_size=16).digest())
    if not origins:
        return outcome
    notes = original.notes.take(encoded.rows if rows is None else rows[encoded.rows])
    tracks, track = np.unique(notes.track, return_inverse=True)
    first = np.searchsorted(original.notes.track, tracks)  # notes come by track
    names = [original.notes.name[row] for row in first]
    return outcome._replace(origins=Origins(notes.velocity, track, names))


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
    `view`, a function at the top level of a module, gives the score that the words may show of the one in the file, and
    for each of its notes the row of the original; `origins` also stores what the original said of each word's note.
    Raises StoreError, one line, if a source does not exist, `out` is something else, or no file can be used.
    """
    load(encoding)
    began = time.perf_counter()
    roots = [Path(source) for source in ([sources] if isinstance(sources, str | Path) else sources)]
    for root in roots:
        if not os.path.exists(root):
            raise StoreError(f"{root} does not exist")
    out = Path(os.path.realpath(out))
    workers = workers or cores()
    summary = Summary(out, encoding)
    with replacing(out) as folder:
        files, problems = [], []
        for source, root in enumerate(roots):
            found, unread = find_midi(root)
            files += ((source, name, path) for name, path in found)
            problems += ((source, *problem) for problem in unread)
        encode = partial(encode_file, encoding=encoding, view=view, origins=origins)
        outcomes = run([path for _, _, path in files], encode, workers)
        with (
            closing(outcomes),
            tqdm(outcomes, total=len(files), unit="file", disable=None if progress else True) as bar,
        ):
            names = [(source, name) for source, name, _ in files]
            tracks = write(folder, names, bar, problems, summary, origins)
        if not summary.pieces:
            reasons = ", ".join(f"{count} {reason}" for reason, count in summary.skipped.most_common())
            raise StoreError(
                f"no usable MIDI file in {', '.join(map(str, roots))}: {reasons or 'no .mid or .midi there'}"
            )
        meta = {"format": FORMAT, "version": VERSION, "encoding": encoding, "fields": describe(load(encoding))}
        meta |= {"pieces": summary.pieces, "segments": summary.segments, "notes": summary.notes}
        meta |= {"sources": [root.resolve().as_posix() for root in roots]}
        if origins:
            meta |= {"tracks": tracks}
        (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
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
