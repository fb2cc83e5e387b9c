"""The mask book's invariants, and its update beside a slow, obvious one."""

import numpy as np
import pytest
import torch
from amb.kernels.philox import fixed_point, philox
from amb.kernels.sampling import unpack_bits

from amb import data, mask_book

RATE = (0.1, 0.3)


@pytest.mark.parametrize("unfreeze", [0.0, 0.1, 0.5])
def test_update_equals_the_obvious_one(unfreeze):
    """Row by row, so it does not depend on the batch; what is no note is never frozen."""
    batch, length = 6, 40
    scores, lengths = torch.rand(batch, length), torch.tensor([40, 40, 33, 10, 3, 1])
    before = (torch.rand(batch, length) < 0.3) & (torch.arange(length) < lengths[:, None])
    rows, indices = mask_book.pack_bits(before), torch.tensor([4, 0, 9, 100, 7, 2])
    after = mask_book.update(rows, indices, scores, lengths, rate=RATE, unfreeze=unfreeze, seed=3)
    count, after = mask_book.frozen_count(after), unpack_bits(after, length)
    assert count == int(after.sum()) > 0
    for b in range(batch):
        share, release, _, _ = (int(draw) for draw in philox(3, 0, int(indices[b]), 0, 0))
        low, high = (fixed_point(r) for r in RATE)
        rho = (low + share * (high - low) / 2**32) / 2**32
        unfrozen = [i for i in range(int(lengths[b])) if not before[b, i]]
        hopeless = sorted(unfrozen, key=lambda i: -scores[b, i].item())[: int(rho * len(unfrozen))]
        frozen = {i for i in range(length) if before[b, i]} | set(hopeless)
        for note in range(length):
            draw = int(philox(3, note, int(indices[b]), 1, 0)[0]) / 2**32
            kept = note in frozen and draw >= release / 2**32 * unfreeze - 1e-9
            assert bool(after[b, note]) == kept, (b, note)


def test_a_saved_book_is_about_the_files_that_were_trained_on(store, midi_folder, tmp_path):
    roles = ["valid" if number == 3 else "train" for number in range(len(store.pieces))]
    cut = data.cut([store], [roles], "train", 50)
    flags = torch.rand(len(cut), 50, generator=torch.manual_seed(0)) < 0.3
    mask_book.save(tmp_path / "book.npz", mask_book.pack_bits(flags), cut)
    assert not flags[torch.from_numpy(cut.count < 50)].all(), "sequences that are not full should be among them"
    for number, piece in enumerate(store.pieces):
        notes = mask_book.frozen_notes(tmp_path / "book.npz", midi_folder / piece.path, piece.notes)
        if roles[number] == "valid":
            assert notes is None
            continue
        rows = np.flatnonzero(cut.piece == number)
        assert len(rows) > 1
        assert notes.tolist() == [flag for row in rows for flag in flags[row, : cut.count[row]].tolist()]
    # a copy elsewhere of the same name below it is known, another number of words or another name is not
    piece = store.pieces[0]
    assert mask_book.frozen_notes(tmp_path / "book.npz", tmp_path / "x" / piece.path, piece.notes) is not None
    assert mask_book.frozen_notes(tmp_path / "book.npz", tmp_path / "x" / piece.path, piece.notes + 1) is None
    assert mask_book.frozen_notes(tmp_path / "book.npz", tmp_path / "y.mid", piece.notes) is None


def test_a_damaged_book_is_refused_and_a_missing_one_is_about_nothing(tmp_path):
    book = tmp_path / "book.npz"
    assert mask_book.frozen_notes(book, "a.mid", 5) is None
    for arrays in ({"paths": np.array([{}], dtype=object)}, {"paths": np.array(["a.mid"])}):
        np.savez(book, **arrays)
        with pytest.raises(ValueError, match="book.npz is damaged"):
            mask_book.frozen_notes(book, "a.mid", 5)
