"""What pre-training has learned of a piece: which notes the masker holds for hopeless, which the recoverer restores.

Each note of the piece is hidden once, with a seventh of its sequence at a time (the share that training hides), in all
its fields, and restored from the others. That gives a recovery of every note, and so the bias in numbers: how much
better frequent values are recovered than rare ones, and how often a rare value is taken for a frequent one.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from amb import pieces, tokenizer
from amb.inference import Trained
from amb.kernels import top_k
from amb.pieces import Piece

GROUPS = 7  # 1/7 = 14.3 %, near the 15 % of training
SEED = 0


class Inspection(NamedTuple):
    """One model's view of one piece, row for row with `piece.words` [n, F]."""

    scores: np.ndarray | None  # float32 [n], the masker's probability that the note is hopeless; None without a masker
    would_freeze: np.ndarray | None  # bool [n], the notes that an update of the mask book would freeze
    recovered: np.ndarray  # int64 [n, F], the most probable values when the note is hidden
    group: np.ndarray  # int64 [n], which notes were hidden together: 0 … 6, anew in each sequence
    sequence: np.ndarray  # int64 [n], the sequence that each word is in
    chances: np.ndarray | None  # float16 [n, sum of the fields' values], the recoverer's probabilities, if asked for


class Bias(NamedTuple):
    """Recovery in one field. Frequent: the fewest values that make up half of the notes; rare: all others."""

    field: str
    frequent: int  # how many values are frequent
    rare: int
    frequent_accuracy: float  # of the notes that have a frequent value; NaN where there are none
    rare_accuracy: float
    rare_as_frequent: float  # share of the notes with a rare value that are taken for a frequent one


def inspect(trained: Trained, piece: Piece, chances: bool = False) -> Inspection:
    """Masker and recoverer on one piece. Raises ValueError if the checkpoint has no recoverer."""
    if not trained.recoverer:
        raise ValueError(
            f"{trained.path} is {trained.about()}: inspecting needs a pre-trained model with its heads (train.py)"
        )
    cut = pieces.sequences([piece], trained.encoding.name, trained.notes)
    count = len(piece.words)
    trusted = trained.masker is not None and trained.config.objective == "adversarial"
    scores = np.zeros(count, dtype=np.float32)
    would_freeze = np.zeros(count, dtype=bool)
    recovered = np.zeros(piece.words.shape, dtype=np.int64)
    group, sequence = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    values = sum(field.values for field in trained.encoding.fields)
    all_chances = np.zeros((count, values), dtype=np.float16) if chances else None
    with torch.inference_mode():
        for numbers, words, lengths in trained.batches(cut):
            rows, filled = cut.places(numbers)
            real = torch.from_numpy(filled[:, : words.shape[1]]).to(words.device)
            rows = rows[filled]
            groups = _groups(numbers, cut.count[numbers], words.shape[1])
            group[rows], sequence[rows] = groups[real.cpu().numpy()], np.repeat(numbers, cut.count[numbers])
            best = torch.zeros_like(words)
            some = torch.zeros((*words.shape[:2], values if chances else 0), device=words.device)
            for hidden, logits in _recoveries(trained, words, lengths, torch.from_numpy(groups).to(words.device)):
                best[hidden] = torch.stack([one[hidden].argmax(-1) for one in logits], -1)
                if chances:
                    some[hidden] = torch.cat([one[hidden].float().softmax(-1) for one in logits], -1)
            recovered[rows] = best[real].cpu().numpy()
            if chances:
                all_chances[rows] = some[real].cpu().numpy()
            if trusted:
                score = trained.masker(trained.encoder(words, lengths))
                share = (trained.config.mask_low + trained.config.mask_high) / 2
                frozen = top_k(score, real, (share * real.sum(1, keepdim=True)).long())
                scores[rows], would_freeze[rows] = score[real].cpu().numpy(), frozen[real].cpu().numpy()
    masker = (scores, would_freeze) if trusted else (None, None)
    return Inspection(*masker, recovered, group, sequence, all_chances)


def _groups(numbers: np.ndarray, counts: np.ndarray, length: int) -> np.ndarray:
    """int64 [B, length]: a random group for each note of the sequences with these numbers, groups of equal size."""
    groups = np.zeros((len(numbers), length), dtype=np.int64)
    for row, (number, count) in enumerate(zip(numbers.tolist(), counts.tolist(), strict=True)):
        order = np.random.default_rng([SEED, number]).permutation(count)
        groups[row, order] = np.arange(count) % GROUPS
        groups[row, count:] = -1
    return groups


def _recoveries(trained: Trained, words, lengths, groups) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    """For each group which notes are hidden, bool [B, L], and by field the ordinary values' logits, [B, L, values]."""
    mask = torch.from_numpy(trained.encoding.mask.astype(np.int64)).to(words.device)
    for number in range(GROUPS):
        hidden = groups == number
        logits = trained.recoverer(trained.encoder(torch.where(hidden[..., None], mask, words), lengths))
        yield hidden, [one[..., : field.values] for one, field in zip(logits, trained.encoding.fields, strict=True)]


def bias(encoding: tokenizer.Encoding, words: np.ndarray, recovered: np.ndarray) -> list[Bias]:
    """How recovery depends on a value's frequency among these words: words, recovered int [n, F], for each field."""
    table = []
    for field, true, answer in zip(encoding.fields, words.T, recovered.T, strict=True):
        is_frequent = frequent_values(true, field.values)
        frequent, hit = is_frequent[true], true == answer
        table.append(
            Bias(
                field.name,
                int(is_frequent.sum()),
                len(np.unique(true[~frequent])),
                _mean(hit[frequent]),
                _mean(hit[~frequent]),
                _mean(is_frequent[answer[~frequent]]),
            )
        )
    return table


def frequent_values(values: np.ndarray, size: int) -> np.ndarray:
    """bool [size]: the fewest values that make up at least half of `values`; of equals, the lower."""
    counts = np.bincount(values, minlength=size)
    order = np.argsort(-counts, kind="stable")
    needed = np.searchsorted(np.cumsum(counts[order]), len(values) / 2) + 1
    chosen = np.zeros(size, dtype=bool)
    chosen[order[:needed]] = True
    return chosen


def _mean(flags: np.ndarray) -> float:
    return float(flags.mean()) if len(flags) else float("nan")
