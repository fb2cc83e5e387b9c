"""The mask book: which notes of the training set are frozen, one bit a note (method, step 7).

A frozen note is one that the masker found hopeless: it is not selected for masking any more, until it is unfrozen by
chance. The book is a uint8 tensor [sequences, ceil(L / 8)], lowest bit first, as `kernels.adversarial_sample` reads
it. A run keeps it in last.pt and, with the pieces that its sequences are of, in book.npz.
"""

from pathlib import Path, PurePath

import numpy as np
import torch
from torch import Tensor

from amb.checkpoint import reading, save_arrays
from amb.kernels import philox, top_k
from amb.kernels.sampling import draw_count, unpack_bits


def empty_book(sequences: int, notes: int) -> Tensor:
    """A book in which nothing is frozen: uint8 [sequences, ceil(notes / 8)]."""
    return torch.zeros(sequences, (notes + 7) // 8, dtype=torch.uint8)


def pack_bits(flags: Tensor) -> Tensor:
    """bool [B, L] -> uint8 [B, ceil(L / 8)], lowest bit first (the inverse of `kernels.sampling.unpack_bits`)."""
    padded = torch.nn.functional.pad(flags, (0, -flags.shape[1] % 8)).unflatten(1, (-1, 8))
    return (padded.to(torch.uint8) << torch.arange(8, device=flags.device)).sum(-1).to(torch.uint8)


def update(
    rows: Tensor, indices: Tensor, scores: Tensor, lengths: Tensor, *, rate: tuple, unfreeze: float, seed: int
) -> Tensor:
    """Freeze what the masker finds most hopeless, then unfreeze by chance; return the new rows.

    rows uint8 [B, ceil(L / 8)]; indices [B], the rows' places in the book (they number the random draws, so that the
    result does not depend on how the book is cut into batches); scores [B, L] of the masker; lengths [B].
    Per sequence: freeze the floor(rho * unfrozen) highest-scoring unfrozen notes, rho ~ U(rate); then let each frozen
    note go with probability u ~ U(0, unfreeze).
    """
    length = scores.shape[1]
    sequence, note = indices[:, None], torch.arange(length, device=scores.device)
    share, release, _, _ = philox.philox(seed, 0, sequence, 0, 0)
    draw = philox.philox(seed, note, sequence, 1, 0)[0]
    frozen = unpack_bits(rows, length)
    unfrozen = ~frozen & (note < lengths[:, None])
    frozen |= top_k(scores, unfrozen, draw_count(share, unfrozen.sum(1, keepdim=True), rate))
    frozen &= draw >= (release * philox.fixed_point(unfreeze)) >> 32
    return pack_bits(frozen)


def frozen_count(book: Tensor) -> int:
    """How many notes are frozen."""
    return sum(int(((book >> bit) & 1).sum()) for bit in range(8))


def save(path: Path, book: Tensor, sequences) -> None:
    """Write the book with the pieces that it is about, as an .npz: the paths of P pieces below their sources, and for
    each of S sequences the index of its piece, its first word in that piece, its number of words, and its bits.

    sequences: the `data.Sequences` that the book's rows are about. Raises OSError naming the file.
    """
    first = np.cumsum([0, *(len(store.pieces) for store in sequences.stores)])  # pieces of all stores numbered through
    pieces = [piece for store in sequences.stores for piece in store.pieces]
    paths, offsets = np.array([piece.path for piece in pieces]), np.array([piece.offset for piece in pieces])
    piece = first[sequences.store] + sequences.piece
    start = sequences.start - offsets[piece]
    save_arrays(path, paths=paths, piece=piece, start=start, count=sequences.count, bits=book.cpu().numpy())


def frozen_notes(path: Path, midi: str | Path, words: int) -> np.ndarray | None:
    """bool [words]: which words of a MIDI file are frozen by the book in this file; None if it is not about that file.

    The file must end in the path that training gave it and have as many words. Raises CheckpointError for a damaged
    book.
    """
    if not path.exists():
        return None
    parts = Path(midi).resolve().parts
    with reading(path), np.load(path, allow_pickle=False) as book:
        paths, piece, count, bits = (book[name] for name in ("paths", "piece", "count", "bits"))
        for number in np.flatnonzero([parts[-len(PurePath(name).parts) :] == PurePath(name).parts for name in paths]):
            rows = np.flatnonzero(piece == number)  # in the order of their starts
            if count[rows].sum() == words:
                flags = unpack_bits(torch.from_numpy(bits[rows]), 8 * bits.shape[1]).numpy()
                return flags[np.arange(flags.shape[1]) < count[rows, None]]
    return None
