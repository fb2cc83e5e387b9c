"""What is measured on: words of real pieces, never zeros or random numbers."""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from amb import data, demo, tokenizer
from amb.config import PRESETS, Config
from amb.objective import Words


def parser_of(name: str, about: str, rounds: int) -> argparse.ArgumentParser:
    """The options of a measurement of one preset at one batch size; `setting` reads them."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=about.splitlines()[0])
    parser.add_argument("--config", choices=PRESETS, default="small", help="sizes (default: small)")
    parser.add_argument("--batch", type=int, help="sequences (default: the preset's, 1 for base on a CPU)")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--data", type=Path, help="a token store or folder of MIDI (default: the demo corpus)")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    return parser


def setting(options: argparse.Namespace) -> tuple[torch.device, Config, int]:
    """Where to measure, and at what sizes: device, settings, sequences in a batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, Config(**PRESETS[options.config]), options.batch or preset_batch(options.config, device)


@contextmanager
def open_corpus(path: Path | None, encoding: str = "octuple", pieces: int = 64) -> Iterator[tokenizer.Store]:
    """A token store, a folder of MIDI tokenized for the while, or by default `pieces` pieces of the demo corpus."""
    if path and tokenizer.is_store(path):
        yield tokenizer.open_store(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = path or demo.write_corpus(Path(folder, "midi"), pieces)
        tokenizer.build_store([source], Path(folder, "store"), encoding, workers=1, progress=False)
        yield tokenizer.open_store(Path(folder, "store"))


def longest_sequences(store: tokenizer.Store, notes: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Words [B, L, F] and lengths [B] of the `batch` fullest sequences of a store."""
    sequences = data.cut([store], [["train"] * len(store.pieces)], "train", notes)
    return sequences.batch(np.argsort(-sequences.lengths, kind="stable")[:batch])


def filled_sequences(store: tokenizer.Store, notes: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Words [B, L, F] and lengths [B], all of them L: consecutive words, from one piece on into the next."""
    rows = np.arange(batch * notes) % len(store.words)
    words = store.words[rows].reshape(batch, notes, -1).astype(np.int64)
    return words, np.full(batch, notes)


def special_words(config: Config, device: torch.device) -> tuple[Words, tuple[int, ...]]:
    """What the objective must know of the encoding, and V_f of each field."""
    encoding = tokenizer.load(config.encoding)
    return Words.of(encoding, device), tuple(field.size for field in encoding.fields)


def preset_batch(name: str, device: torch.device) -> int:
    """The preset's batch; 1 for `base` on a CPU, where a step would take minutes."""
    return 1 if name == "base" and device.type == "cpu" else Config(**PRESETS[name]).batch
