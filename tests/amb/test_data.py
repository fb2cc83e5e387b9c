"""Sequences, splits and transposition, each beside what a loop would do."""

import numpy as np
import pytest

from amb import data, demo, splits, tokenizer

OCTUPLE = tokenizer.load("octuple")


def cut_slowly(store, notes):
    """Every segment's words and EOS, L at a time, padded; a lone EOS is left out."""
    rows = []
    for offset, count in store.segments.tolist():
        words = [*store.words[offset : offset + count].tolist(), OCTUPLE.eos.tolist()]
        for start in range(0, count, notes):
            row = words[start : start + notes]
            rows.append((row + [OCTUPLE.pad.tolist()] * (notes - len(row)), len(row)))
    return rows


@pytest.mark.parametrize("notes", [64, 97, 2048])
def test_sequences_are_the_next_words_of_each_segment(store, notes):
    sequences = data.cut([store], [["train"] * len(store.pieces)], "train", notes)
    words, lengths = sequences.batch(np.arange(len(sequences)))
    expected = cut_slowly(store, notes)
    assert len(expected) == len(sequences)
    assert words.tolist() == [row for row, _ in expected]
    assert lengths.tolist() == [count for _, count in expected] == sequences.lengths.tolist()


def test_a_segment_that_fills_its_last_sequence_makes_no_lone_eos(store):
    notes = int(store.segments[0, 1])
    sequences = data.cut([store], [["train"] + ["unused"] * (len(store.pieces) - 1)], "train", notes)
    words, lengths = sequences.batch(np.array([0]))
    assert len(sequences) == 1
    assert lengths[0] == notes
    assert np.array_equal(words[0], store.words[:notes])


def test_several_stores_mix_and_rows_come_as_asked(store, tmp_path):
    tokenizer.build_store([demo.write_corpus(tmp_path / "more", 3, seed=5)], tmp_path / "s", workers=1, progress=False)
    other = tokenizer.open_store(tmp_path / "s")
    roles = [["train"] * len(store.pieces), ["train"] * 3]
    mixed = data.cut([store, other], roles, "train", 128)
    alone = [data.cut([s], [r], "train", 128) for s, r in zip((store, other), roles, strict=True)]
    assert len(mixed) == sum(map(len, alone))
    pick = np.array([len(mixed) - 1, 0, len(alone[0])])
    words, _ = mixed.batch(pick)
    assert np.array_equal(words[0], alone[1].batch(np.array([len(alone[1]) - 1]))[0][0])
    assert np.array_equal(words[1], alone[0].batch(np.array([0]))[0][0])
    assert np.array_equal(words[2], alone[1].batch(np.array([0]))[0][0])


def test_cropped_sequences_are_windows_of_the_same_segment(store):
    rng = np.random.default_rng(0)
    sequences = data.cut([store, store], [["train"] * len(store.pieces)] * 2, "train", 100)
    numbers = rng.integers(0, len(sequences), 300)
    cropped = sequences.cropped(numbers, rng)
    assert np.array_equal(cropped.piece, sequences.piece[numbers])
    assert np.array_equal(cropped.store, sequences.store[numbers])
    firsts, lengths = store.segments.T
    for number, start, count, ends in zip(numbers, cropped.start, cropped.count, cropped.ends, strict=True):
        segment = np.searchsorted(firsts, sequences.start[number], side="right") - 1
        assert count == min(100, lengths[segment])
        assert firsts[segment] <= start <= firsts[segment] + lengths[segment] - count
        assert ends == (lengths[segment] < 100)
    words, _ = cropped.batch(np.arange(300))
    assert np.array_equal(words[7, :50], store.words[cropped.start[7] :][:50])
    again = np.stack([sequences.cropped(np.array([3]), rng).start for _ in range(400)])
    spread = lengths[np.searchsorted(firsts, sequences.start[3], side="right") - 1] - 100
    assert again.min() < sequences.start[0] + 0.1 * spread
    assert abs(again.mean() - firsts[0] - spread / 2) < 0.1 * spread


def test_even_sequences_are_as_many_and_of_equal_lengths(store):
    for notes in (17, 100, 256):
        plain, even = (data.cut([store], [["train"] * len(store.pieces)], "train", notes, e) for e in (False, True))
        assert len(plain) == len(even)
        assert np.array_equal(plain.piece, even.piece)
        assert even.count.max() <= notes
        assert np.array_equal(even.start[1:], (even.start + even.count)[:-1])  # end to end, over all pieces
        for piece in set(even.piece.tolist()):  # of one segment each
            assert np.ptp(even.count[even.piece == piece]) <= 1
        last = np.append(np.diff(even.piece) > 0, True)
        assert np.array_equal(even.ends, last & (even.count < notes))


def test_cp_has_no_eos(midi_folder, tmp_path):
    tokenizer.build_store([midi_folder], tmp_path / "cp", "cp", workers=1, progress=False)
    cp = tokenizer.open_store(tmp_path / "cp")
    sequences = data.cut([cp], [["train"] * len(cp.pieces)], "train", 100)
    words, lengths = sequences.batch(np.arange(len(sequences)))
    assert lengths.sum() == len(cp.words)
    assert words.shape[2] == 4


@pytest.mark.parametrize("name", ["octuple", "cp"])
def test_transposition_moves_all_pitches_of_a_sequence_by_one_interval_that_fits(name):
    encoding, rng = tokenizer.load(name), np.random.default_rng(0)
    low, high = encoding.pitch_range
    field, shifts = encoding.pitch_field, set()
    words = np.stack([rng.integers(0, f.values, (200, 30)) for f in encoding.fields], -1)
    words[..., field] = rng.integers(40, 60, (200, 30))
    words[:, -4:] = encoding.pad
    words[:50, 3, field] = high - 2  # at most two up
    words[50:100, 4, field] = low  # none down
    if name == "octuple":
        words[100:, 5, field] = 128 + 36  # percussion
    shifted = data.transpose(words, encoding, 11, rng.random(200))
    for row in range(200):
        moving = (words[row, :, field] >= low) & (words[row, :, field] <= high)
        difference = shifted[row, :, field] - words[row, :, field]
        (shift,) = set(difference[moving].tolist())
        assert not difference[~moving].any()
        assert -11 <= shift <= 11
        assert low <= shifted[row, moving, field].min() <= shifted[row, moving, field].max() <= high
        assert row >= 50 or shift <= 2
        assert not 50 <= row < 100 or shift >= 0
        shifts.add(shift)
    others = [index for index in range(len(encoding.fields)) if index != field]
    assert np.array_equal(shifted[..., others], words[..., others])
    assert shifts == set(range(-11, 12))


def test_epochs_cut_one_stream_of_whole_passes():
    stream = np.concatenate([data.epoch_order(10, 7, epoch, seed=3) for epoch in range(10)])
    for number in range(7):
        assert sorted(stream[10 * number : 10 * number + 10]) == list(range(10))
    assert sorted(data.epoch_order(10, 10, 4, 0)) == list(range(10))
    assert data.epoch_order(10, 25, 0, 0).shape == (25,)


def test_baseline_is_the_share_of_the_training_sets_most_frequent_value(store):
    roles = splits.assign_roles([store], [], 0.25, 0)[0]
    train, valid = (data.cut([store], roles, role, 64) for role in ("train", "valid"))
    baseline = data.most_frequent_baseline(train, valid)
    words = {}
    for role, sequences in (("train", train), ("valid", valid)):
        batch, lengths = sequences.batch(np.arange(len(sequences)))
        words[role] = np.concatenate([row[:n] for row, n in zip(batch, lengths, strict=True)])
    for field, share in enumerate(baseline):
        mode = np.bincount(words["train"][:, field]).argmax()
        assert share == pytest.approx((words["valid"][:, field] == mode).mean())


def test_folders_are_tokenized_once_and_stores_taken_as_they_are(midi_folder, store, tmp_path, monkeypatch):
    first = data.open_sources([midi_folder, store.path], "octuple", tmp_path)
    monkeypatch.setattr(tokenizer, "build_store", None)  # a second tokenization would fail
    again = data.open_sources([midi_folder], "octuple", tmp_path)
    assert np.array_equal(first[0].words, again[0].words)
    assert first[1].path == store.path


def test_sources_that_cannot_be_used_are_one_line(store, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        data.open_sources([tmp_path / "nowhere"], "octuple", tmp_path)
    with pytest.raises(ValueError, match="store of octuple words: add --encoding octuple"):
        data.open_sources([store.path], "cp", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no") as error:
        data.open_sources([tmp_path / "empty"], "octuple", tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_some_sequences_are_drawn_once_each():
    assert data.sample(10, 0, seed=1).tolist() == data.sample(10, 10, seed=1).tolist() == list(range(10))
    drawn = data.sample(1000, 50, seed=1)
    assert len(set(drawn.tolist())) == 50
    assert drawn.tolist() == data.sample(1000, 50, seed=1).tolist() != data.sample(1000, 50, seed=2).tolist()
