"""Token stores small enough to travel, in one file, and the same stores again, equal to the bit.

    python -m benchmarks pack STORE [STORE …] --out FILE
    python -m benchmarks pack FILE --out FOLDER

The file is a zip of xz streams: of `words.bin` one for each column, in bytes where its values fit into them, the first
two (Bar and Position, which mostly repeat or grow) as differences; all other files as they are.
"""

import argparse
import lzma
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from amb import tokenizer
from amb.files import writing

XZ = [{"id": lzma.FILTER_LZMA2, "preset": 6 | lzma.PRESET_EXTREME, "dict_size": 1 << 26, "lc": 4, "lp": 0, "pb": 0}]
COLUMN, DIFFERENCES = "words.bin.{}", 2


def pack(stores: list[Path], path: Path) -> None:
    """Raises StoreError for what is no token store, ValueError where two have the same name."""
    if len({store.name for store in stores}) < len(stores):
        raise ValueError("two stores have the same name: they would become one")
    parts = {}
    for store in stores:
        for index, column in enumerate(tokenizer.open_store(store).words.T):
            column = column.astype("u1" if column.max(initial=0) < 256 else "<u2")
            if index < DIFFERENCES:
                column = np.diff(column, prepend=column.dtype.type(0))
            parts[f"{store.name}/{COLUMN.format(index)}"] = column
        others = (file for file in store.iterdir() if file.name != "words.bin")
        parts |= {f"{store.name}/{file.name}": file.read_bytes() for file in others}
    with ThreadPoolExecutor() as pool, writing(path) as file, zipfile.ZipFile(file, "w") as archive:
        packed = pool.map(lambda part: lzma.compress(part, filters=XZ), parts.values())
        for name, data in zip(parts, packed, strict=True):
            archive.writestr(name, data)


def unpack(path: Path, folder: Path) -> list[Path]:
    """The stores' folders, below `folder`. Raises ValueError, naming the file, if it is damaged or none of ours."""
    try:
        with zipfile.ZipFile(path) as archive, ThreadPoolExecutor() as pool:
            names = archive.namelist()
            if any(not re.fullmatch(r"[\w.-]*\w[\w.-]*/[\w.-]*\w[\w.-]*", name) for name in names):
                raise ValueError("a name in it is none of a store's files")
            parts = dict(zip(names, pool.map(lzma.decompress, map(archive.read, names)), strict=True))
        stores = sorted({folder / name.split("/")[0] for name in names})
        for store in stores:
            names = [f"{store.name}/{COLUMN.format(index)}" for index in range(len(parts))]
            columns = [parts.pop(name) for name in names if name in parts]
            rows = min(map(len, columns))
            columns = [np.frombuffer(column, "u1" if len(column) == rows else "<u2") for column in columns]
            columns[:DIFFERENCES] = [np.cumsum(column, dtype=column.dtype) for column in columns[:DIFFERENCES]]
            parts[f"{store.name}/words.bin"] = np.stack(columns, 1, dtype="<u2").tobytes()
        for name, data in parts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    except (zipfile.BadZipFile, lzma.LZMAError, RuntimeError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be unpacked: {error}") from None
    return stores


def main(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("paths", type=Path, nargs="+", help="token stores, or one packed file")
    parser.add_argument("--out", type=Path, required=True, help="a file to write, or a folder for the stores")
    options = parser.parse_args(arguments)
    if options.paths[0].is_file():
        print(*unpack(options.paths[0], options.out), sep="\n")
    else:
        pack(options.paths, options.out)
        print(f"{options.out}: {options.out.stat().st_size / 2**20:.1f} MiB")
