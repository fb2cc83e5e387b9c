"""A corpus to a token store: find the files, encode them in parallel, write the words as they come.

Results are taken in the order of the sorted list of files, so the store is the same for any number of workers; only a
few files per worker are ever under way, so memory does not grow with the corpus.
"""

import os
import pickle
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from subprocess import PIPE, Popen
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from .encoding import Encoded
from .midi import MidiError, Score, read_midi
from .registry import load
from .store import IN_PART, Outcome, Store, StoreError, write_store

SUFFIXES = (".mid", ".midi", ".rmi", ".kar")
AHEAD = 4  # files under way per worker
FILES_PER_WORKER = 8  # at least: starting a worker takes as long as encoding some ten files
QUIET = 30  # seconds between two lines about progress where no terminal shows a bar

View = Callable[[Score], tuple[Score, np.ndarray]]


def find_midi(root: str | Path) -> tuple[list[tuple[str, str]], list[tuple[str, str, str]]]:
    """All MIDI files below `root` by their suffix, at any depth, and the folders that cannot be read.

    Returns [(name, path)], sorted by name: the path relative to `root`, with forward slashes, and the path to open;
    and [(name, reason, detail)]. A folder that links lead to more than once is read once, so loops end.
    Hidden folders are not searched. `root` may also be a file, whatever its suffix; its name is then the file's own.
    """
    root = Path(root)
    if not root.is_dir():
        return [(root.name, str(root))], []
    files, errors, seen = [], [], set()

    def name_of(path: str) -> str:
        return os.path.relpath(path, root).replace(os.sep, "/")

    for folder, below, names in os.walk(root, onerror=errors.append, followlinks=True):
        identity = os.stat(folder)[1:3]  # inode and device
        below[:] = sorted(name for name in below if not name.startswith(".") and identity not in seen)
        if identity not in seen:
            paths = (os.path.join(folder, name) for name in names if name.lower().endswith(SUFFIXES))
            files += ((name_of(path), path) for path in paths)
        seen.add(identity)
    unread = [(name_of(error.filename), "unreadable", f"folder: {error.strerror}") for error in errors]
    return sorted(files), sorted(unread)


def encode_file(source: str | Path | BinaryIO, encoding: str, view: View | None = None) -> tuple[Encoded, Score]:
    """The words of a MIDI file as `view` shows it, and the score as the file has it, to which `Encoded.rows` refer.

    `view` gives the score that the words may show of the one in the file, and for each of its notes the row of the
    original. Raises MidiError, with a reason in few words, for anything that cannot be used.
    """
    score = read_midi(source)
    viewed, rows = view(score) if view else (score, np.arange(len(score.notes.pitch)))
    encoded = load(encoding).encode_score(viewed)
    return encoded._replace(rows=rows[encoded.rows]), score


def outcome_of(path: str, encoding: str, view: View | None) -> Outcome:
    """What becomes of one file; runs in the workers. See `encode_file`."""
    try:
        encoded, score = encode_file(path, encoding, view)
    except MidiError as error:
        return Outcome(reason=error.reason, detail=error.detail)
    except MemoryError:
        return Outcome(reason="too large", detail="out of memory")
    reason = IN_PART if score.damage else ""
    return Outcome(encoded, score._replace(midi=None, pairs=None), reason, score.damage)


def build_store(
    sources: str | Path | Iterable[str | Path],
    out: str | Path,
    encoding: str = "octuple",
    workers: int | None = None,
    progress: bool = True,
    view: View | None = None,
    origins: bool = False,
) -> Store:
    """Tokenize all MIDI files below `sources` (folders or files) into a new store in folder `out`, and open it.

    Pieces with the same notes and rhythm are kept once, the first in sorted order. An older store in `out` is replaced
    when the new one is complete, never before. `workers` defaults to the cores this process may use. `view`, a
    function at the top level of a module, is as for `encode_file`; what it hides (its attribute `hides`, names of
    columns of `Notes`) is a label, in which pieces that are kept once must agree, too. `origins` also stores velocity
    and track of each word's note.
    Raises StoreError, one line, if a source does not exist, `out` is something else, or no file can be used.
    """
    load(encoding)
    roots = [Path(source) for source in ([sources] if isinstance(sources, str | Path) else sources)]
    for root in roots:
        if not os.path.exists(root):
            raise StoreError(f"{root} does not exist")
    workers = cores() if workers is None else workers
    if workers < 1:
        raise StoreError(f"{workers} workers are too few")
    encode = partial(outcome_of, encoding=encoding, view=view)
    with closing(_outcomes(roots, encode, workers, progress)) as outcomes:
        return write_store(out, encoding, roots, outcomes, getattr(view, "hides", ()), origins)


def _outcomes(
    roots: list[Path], encode: Callable[[str], Outcome], workers: int, progress: bool
) -> Iterator[tuple[int, str, Outcome]]:
    """The outcome of each file, and of each folder that cannot be read, with the index of its root and its path."""
    files = []
    for source, root in enumerate(roots):
        midi, unread = find_midi(root)
        files += ((source, name, path) for name, path in midi)
        yield from ((source, name, Outcome(reason=reason, detail=detail)) for name, reason, detail in unread)
    with closing(run([path for _, _, path in files], encode, workers)) as outcomes:
        pace = {} if sys.stderr.isatty() else {"delay": QUIET, "mininterval": QUIET, "miniters": 1}
        bar = tqdm(outcomes, total=len(files), unit="file", disable=not progress, **pace)
        for (source, name, _), outcome in zip(files, bar, strict=True):
            yield source, name, outcome


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(paths: list[str], encode: Callable[[str], Outcome], workers: int) -> Iterator[Outcome]:
    """The outcome of each file, in order; `encode` is a function of a module, or a `partial` of one.

    Workers are new Python processes that import that module and nothing of the caller's script: forking is unsafe on
    macOS, with threads, and after torch was imported. Raises what `encode` raises; StoreError if a worker is killed.
    """
    workers = min(workers, len(paths) // FILES_PER_WORKER)
    if workers < 2 or b"__main__" in pickle.dumps(encode):  # what a script or notebook defines cannot be imported
        yield from map(encode, paths)
        return
    start = f"import sys; sys.path[:] = {ascii([*map(str, sys.path)])}; from {__name__} import work; work()"
    processes, idle, threads = [], SimpleQueue(), ThreadPoolExecutor(workers)
    try:
        for _ in range(workers):
            # In a new session: Ctrl-C reaches this process only, which then kills the workers.
            process = Popen([sys.executable, "-c", start], stdin=PIPE, stdout=PIPE, start_new_session=True)
            processes.append(process)
            idle.put(process)
        waiting, under_way = iter(paths), deque()
        while True:
            for path in islice(waiting, AHEAD * workers - len(under_way)):
                under_way.append(threads.submit(_ask, idle, encode, path))
            if not under_way:
                break
            yield under_way.popleft().result()
    finally:
        for process in processes:
            process.kill()
        threads.shutdown(cancel_futures=True)
        for process in processes:
            with suppress(OSError), process:  # closes its pipes, to which not all may have been written, and waits
                pass


def _ask(idle: SimpleQueue, encode: Callable[[str], Outcome], path: str) -> Outcome:
    """The outcome of one file, from a worker that is idle."""
    process = idle.get()
    try:
        pickle.dump((encode, path), process.stdin)
        process.stdin.flush()
        outcome = pickle.load(process.stdout)
    except (OSError, EOFError, pickle.UnpicklingError):
        raise StoreError("a worker was killed, most likely for want of memory; try fewer --workers") from None
    finally:
        idle.put(process)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def work() -> None:
    """The process of a worker: read functions and paths from stdin, write outcomes to stdout, until one closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what imported modules print must not get between the outcomes
    with suppress(EOFError, BrokenPipeError):
        while True:
            encode, path = pickle.load(sys.stdin.buffer)
            try:
                outcome = encode(path)
            except Exception as error:
                outcome = error
            pickle.dump(outcome, channel)
            channel.flush()
