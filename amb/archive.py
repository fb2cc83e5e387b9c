"""Data sets as they are downloaded, .zip or .tar.gz: their MIDI and csv files, unpacked once into the cache."""

import hashlib
import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

SUFFIXES = (".mid", ".midi", ".csv")
LARGEST = 8 << 20  # bytes of one file; the tokenizer takes no larger MIDI files
MOST = 4 << 30  # bytes of all


def is_archive(path: Path) -> bool:
    """Whether this is a file that `unpack` reads."""
    return path.is_file() and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path))


def unpack(path: Path, cache: Path) -> Path:
    """The folder below `cache` with the MIDI and csv files of an archive, made once for each state of the archive.

    Nothing is written outside it, whatever the names in the archive; links, larger files and other kinds are left out.
    Raises ValueError, naming the archive, if it is damaged, too large, or holds no such file.
    """
    state = [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
    folder = cache / f"{path.name.split('.')[0]}-{hashlib.sha256(repr(state).encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    beside = cache / f".{folder.name}.{os.getpid()}"
    try:
        total = 0
        for name, size, file in _members(path):
            total += size
            if total > MOST:
                raise ValueError(f"{path} unpacks to more than {MOST >> 30} GiB")
            target = beside / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with file, open(target, "wb") as out:
                shutil.copyfileobj(file, out)
        if not total:
            raise ValueError(f"{path} holds no MIDI file")
        beside.rename(folder)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be unpacked: {error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _members(path: Path) -> Iterator[tuple[PurePosixPath, int, BinaryIO]]:
    """Name, size and content of the files to keep."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = _kept(member.filename, member.file_size)
                if name and not member.is_dir():
                    yield name, member.file_size, archive.open(member)
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                name = _kept(member.name, member.size)
                if name and member.isfile():
                    yield name, member.size, archive.extractfile(member)


def _kept(name: str, size: int) -> PurePosixPath | None:
    path = PurePosixPath(name.replace("\\", "/"))
    inside = not path.is_absolute() and not {"..", "__MACOSX"} & set(path.parts) and ":" not in path.parts[0]
    return path if inside and path.suffix.lower() in SUFFIXES and 0 < size <= LARGEST else None
