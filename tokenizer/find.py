"""Find the MIDI files below a folder, at any depth, whatever its links do."""

import os
from pathlib import Path

SUFFIXES = (".mid", ".midi")


def find_midi(root: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str, str]]]:
    """All .mid and .midi files below `root`, and the folders that cannot be read.

    Returns [(name, path)], sorted by name: the path relative to `root`, with forward slashes, and the path to open;
    and [(name, reason, detail)]. A folder that links lead to more than once is read once, so loops end.
    `root` may also be a file, whatever its suffix; its name is then the file's own.
    """
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
            if _is_folder(entry):
                todo.append((below, entry.path))
            elif entry.name.lower().endswith(SUFFIXES):
                files.append((below, entry.path))
    return sorted(files), sorted(unread)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
