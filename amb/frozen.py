"""Which notes of a piece a run of train.py has frozen: from its last.pt, if the data that it trained on is still there.

The mask book numbers sequences, not pieces: the run's data are cut again as train.py cut them, and taken only if
their fingerprint is the run's. Nothing is tokenized for that; a cache that is gone is not made again.
"""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import torch

from amb import checkpoint, data, demo, splits, tokenizer
from amb.config import Config
from amb.kernels.sampling import unpack_bits
from amb.pieces import Piece


def frozen_notes(run: Path, piece: Piece) -> np.ndarray | None:
    """bool [n], which of the piece's words are frozen; None if the run did not train on it or its data are not found.

    The piece is found by its words, wherever its file now lies. Raises CheckpointError if last.pt is damaged.
    """
    if not (run / "last.pt").is_file():
        return None
    saved = checkpoint.load(run / "last.pt")
    try:
        described = json.loads((run / "run.json").read_text(encoding="utf-8"))
        config, sources = Config(**described["config"]), described["data"]
        book, fingerprint = saved["book"], saved["fingerprint"]
        for stores in itertools.product(*_stores(sources, config.encoding)):
            roles = splits.assign_roles(list(stores), sources["split"], config.valid_share, config.seed)
            training, validation = (data.cut(list(stores), roles, role, config.notes) for role in ("train", "valid"))
            listed = {role: data.names(list(stores), roles, role) for role in splits.ROLES}
            about = json.dumps([listed, len(training), len(validation)])
            if hashlib.sha256(about.encode()).hexdigest() == fingerprint:
                return _look_up(book, training, piece, config.notes)
    except (OSError, ValueError, KeyError, TypeError):  # the run's folder or its data are not what they were
        return None
    return None


def _stores(sources: dict, encoding: str) -> list[list[tokenizer.Store]]:
    """For each of the run's sources the token stores that it may have read."""
    cache = Path(sources["cache"])
    kept = [folder for folder in cache.iterdir() if tokenizer.is_store(folder)] if cache.is_dir() else []
    candidates = []
    for path in sources["paths"] or [str((cache / f"demo-{demo.VERSION}").resolve())]:
        itself = tokenizer.is_store(path)
        named = [folder for folder in kept if folder.name.startswith(f"{Path(path).name}-{encoding}-")]
        stores = [tokenizer.open_store(folder) for folder in ([path] if itself else named)]
        candidates.append([store for store in stores if itself or store.meta["sources"] == [path]])
    return candidates


def _look_up(book: torch.Tensor, training: data.Sequences, piece: Piece, notes: int) -> np.ndarray | None:
    for index, store in enumerate(training.stores):
        for number, found in enumerate(store.pieces):
            if found.notes != len(piece.words) or not np.array_equal(
                store.read(found.offset, found.notes), piece.words
            ):
                continue
            rows = np.flatnonzero((training.store == index) & (training.piece == number))
            if not len(rows):
                return None
            flags = unpack_bits(book[torch.from_numpy(rows)], notes).numpy()
            return np.concatenate(
                [row[:count] for row, count in zip(flags, training.count[rows].tolist(), strict=True)]
            )
    return None
