"""A corpus to a token store: find the files, encode them in parallel, write the words as they come.

Results are taken in the order of the sorted list of files, so the store is the same for any number of workers; only a
few files per worker are ever under way, so memory does not grow with the corpus.
"""

import hashlib
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from subprocess import PIPE, Popen
from threading import Thread
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from .encoding import Encoded
from .midi import MidiError, Score, read_midi
from .registry import load
from .store import Outcome, StoreError, Summary, writing_store

SUFFIXES = (".mid", ".midi", ".rmi", ".kar")
AHEAD = 4  # files under way per worker
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
                if not entry.name.startswith("."):
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
    """What becomes of one file; runs in the workers. Files of one fingerprint have the same notes in the same rhythm.

    What a view hides (its attribute `hides`, names of columns of `Notes`) is a label, and tells files apart, too.
    """
    try:
        encoded, score = encode_file(path, encoding, view)
    except MidiError as error:
        return Outcome(reason=error.reason, detail=error.detail)
    except MemoryError:
        return Outcome(reason="too large", detail="out of memory")
    notes = score.notes.take(encoded.rows)
    rhythm = [field.name not in ("Velocity", "TimeSig", "Tempo") for field in load(encoding).fields]
    hidden = b"".join(getattr(notes, name).tobytes() for name in getattr(view, "hides", ()))
    fingerprint = hashlib.blake2b(encoded.words[:, rhythm].tobytes() + hidden, digest_size=16).digest()
    return Outcome(encoded, fingerprint, notes=notes if origins else None, damage=score.damage)


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

    Pieces with the same notes and rhythm are kept once, the first in sorted order, see `encode_for_store`. An older
    store in `out` is replaced when the new one is complete, never before. `workers` defaults to the cores this process
    may use. `view`, a function at the top level of a module, is as for `encode_file`; `origins` also stores what the
    file said of each word's note.
    Raises StoreError, one line, if a source does not exist, `out` is something else, or no file can be used.
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
            pace = {} if sys.stderr.isatty() else {"delay": QUIET, "mininterval": QUIET, "miniters": 1}
            bar = tqdm(outcomes, total=len(files), unit="file", disable=not progress, **pace)
            for (source, name, _), outcome in zip(files, bar, strict=True):
                store.add(source, name, outcome)
        if not summary.pieces:
            reasons = ", ".join(f"{count} {reason}" for reason, count in summary.skipped.most_common())
            raise StoreError(f"no usable MIDI file in {', '.join(map(str, roots))}: {reasons or 'no MIDI there'}")
    summary.seconds = time.perf_counter() - began
    return summary


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(paths: list[str], encode: Callable[[str], Outcome], workers: int) -> Iterator[Outcome]:
    """The outcome of each file, in order; `encode` is a function of a module, or a `partial` of one.

    Workers are new Python processes that import that module and nothing of the caller's script: forking is unsafe on
    macOS, with threads, and after torch was imported. Raises StoreError if a worker is killed.
    """
    call = pickle.dumps(encode)
    workers = min(workers, len(paths))
    if workers < 2 or b"__main__" in call:  # what a script or notebook defines cannot be imported
        yield from map(encode, paths)
        return
    start = f"import sys; sys.path[:] = {ascii([*map(str, sys.path)])}; from {__name__} import work; work()"
    tasks, outcomes, processes, threads = SimpleQueue(), SimpleQueue(), [], []
    try:
        for _ in range(workers):
            # In a session of its own: Ctrl-C is for this process, which then kills the workers.
            process = Popen([sys.executable, "-c", start], stdin=PIPE, stdout=PIPE, start_new_session=True)
            processes.append(process)
            thread = Thread(target=_attend, args=(process, call, tasks, outcomes), daemon=True)
            thread.start()
            threads.append(thread)
        finished, submitted = {}, 0
        for number in range(len(paths)):
            while submitted < min(len(paths), number + AHEAD * workers):
                tasks.put((submitted, paths[submitted]))
                submitted += 1
            while number not in finished:
                index, outcome = outcomes.get()
                finished[index] = outcome
                if isinstance(outcome, Exception):
                    raise outcome
            yield finished.pop(number)
    finally:
        for process in processes:
            process.kill()
            tasks.put(None)
        for thread in threads:
            thread.join(2)  # a thread that reads a pipe while Python exits would abort it
        for process in processes:
            process.wait()
            with suppress(OSError):  # what was not yet written to it
                process.stdin.close()
            process.stdout.close()


def _attend(process: Popen, call: bytes, tasks: SimpleQueue, outcomes: SimpleQueue) -> None:
    """A thread of the caller: hand tasks to one worker, and its outcomes back, until there is a None."""
    number = -1
    try:
        process.stdin.write(call)
        while task := tasks.get():
            number, path = task
            pickle.dump(path, process.stdin)
            process.stdin.flush()
            outcomes.put((number, pickle.load(process.stdout)))
    except (OSError, EOFError, ValueError, pickle.UnpicklingError):
        error = StoreError("a worker was killed, most likely for want of memory; try fewer --workers")
        outcomes.put((number, error))


def work() -> None:
    """The process of a worker: read the function, then paths from stdin, write outcomes to stdout, until one closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what imported modules print must not get between the outcomes
    with suppress(EOFError, BrokenPipeError):
        encode = pickle.load(sys.stdin.buffer)
        while True:
            path = pickle.load(sys.stdin.buffer)
            try:
                outcome = encode(path)
            except Exception as error:
                outcome = error
            pickle.dump(outcome, channel)
            channel.flush()
