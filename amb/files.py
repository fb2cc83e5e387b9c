"""Files that are there whole or not at all, errors of writing that name the file, fingerprints, and printed tables."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np


def fingerprint(*things) -> str:
    """12 hex digits that differ between contents: a SHA-256 over bytes, arrays, and whatever JSON can hold."""
    sha = hashlib.sha256()
    for thing in things:
        raw = isinstance(thing, bytes | np.ndarray)
        sha.update(np.ascontiguousarray(thing).data if raw else json.dumps(thing).encode())
    return sha.hexdigest()[:12]


@contextmanager
def naming(path: Path):
    """An OSError in the block, which writes `path`, becomes one whose line names the file and the reason."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save hides it
        if not isinstance(reason, OSError):
            raise
        raise OSError(f"{path} cannot be written: {reason.strerror or reason}") from None


@contextmanager
def writing(path: Path):
    """A binary file beside `path`, flushed to the disk and renamed into its place when the block ends well.

    Beside it means always under the same name, so that what a killed process leaves there is overwritten by the next
    to write `path`; two that write it at once are not kept apart.
    """
    beside = path.with_name(f".{path.name}.part")
    with naming(path):
        try:
            with open(beside, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


def write_json(path: Path, content: dict) -> None:
    """Write it whole or not at all."""
    with writing(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def read_metrics(path: Path) -> dict[str, list[dict]]:
    """All lines of a metrics file by kind: {"step": [...], "epoch": [...]}."""
    kinds = {"step": [], "epoch": []}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        kinds[entry["kind"]].append(entry)
    return kinds


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table that also reads in a terminal: first column to the left, others to the right, None empty."""
    lines = [["" if cell is None else str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (padded[0], rule, *padded[1:]))
