"""What is measured on: words of real pieces, never zeros or random numbers."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import tokenizer
from amb import data, demo
from amb.config import PRESETS, Config
from amb.objective import Words


@contextmanager
def open_corpus(path: Path | None, encoding: str = "octuple", pieces: int = 64) -> Iterator[tokenizer.Store]:
    """A token store, a folder of MIDI tokenized for the while, or by default `pieces` pieces of the demo corpus."""
    if path and (path / "meta.json").is_file():
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
    words = Words(
        torch.from_numpy(encoding.mask.astype(np.int64)).to(device),
        torch.tensor([field.values for field in encoding.fields], device=device),
    )
    return words, tuple(field.size for field in encoding.fields)


def preset_batch(name: str, device: torch.device) -> int:
    """The preset's batch; 1 for `base` on a CPU, where a step would take minutes."""
    return 1 if name == "base" and device.type == "cpu" else Config(**PRESETS[name]).batch
