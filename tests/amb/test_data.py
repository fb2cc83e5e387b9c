"""Sequences and transposition, each beside what a loop would do; archives are unpacked once, inside their folder."""

import io
import os
import tarfile
import zipfile

import numpy as np
import pytest

from amb import data, demo, splits, tokenizer

OCTUPLE = tokenizer.load("octuple")


def cut_all(stores, notes, **kwargs):
    return data.cut(stores, [["train"] * len(store.pieces) for store in stores], "train", notes, **kwargs)


@pytest.mark.parametrize("notes", [64, 97, 2048, "a segment"])
def test_sequences_are_the_next_words_of_each_segment(store, notes):
    """Every segment's words and EOS, L at a time, padded; a lone EOS is left out."""
    notes = int(store.segments[0, 1]) if notes == "a segment" else notes
    sequences, expected, counts = cut_all([store], notes), [], []
    for offset, count in store.segments.tolist():
        words = [*store.words[offset : offset + count].tolist(), OCTUPLE.eos.tolist()]
        rows = [words[start : start + notes] for start in range(0, count, notes)]
        counts += map(len, rows)
        expected += [row + [OCTUPLE.pad.tolist()] * (notes - len(row)) for row in rows]
    words, lengths = sequences.batch(np.arange(len(sequences)))
    assert words.tolist() == expected
    assert lengths.tolist() == counts == sequences.lengths.tolist()
    longer = cut_all([store], notes, least=40)
    assert longer.start.tolist() == sequences.start[sequences.count >= 40].tolist()


def test_several_stores_mix_and_rows_come_as_asked(store, tmp_path):
    tokenizer.build_store([demo.write_corpus(tmp_path / "more", 3, seed=5)], tmp_path / "s", workers=1, progress=False)
    stores = [store, tokenizer.open_store(tmp_path / "s")]
    mixed, (one, other) = cut_all(stores, 128), (cut_all([each], 128) for each in stores)
    assert len(mixed) == len(one) + len(other)
    words, _ = mixed.batch(np.array([len(mixed) - 1, 0, len(one)]))
    expected = [
        *other.batch(np.array([len(other) - 1]))[0],
        *one.batch(np.array([0]))[0],
        *other.batch(np.array([0]))[0],
    ]
    assert np.array_equal(words, expected)


def test_cropped_sequences_are_windows_of_the_same_segment(store):
    rng, sequences = np.random.default_rng(0), cut_all([store, store], 100)
    numbers = rng.integers(0, len(sequences), 300)
    cropped = sequences.cropped(numbers, rng)
    assert np.array_equal(cropped.piece, sequences.piece[numbers])
    assert np.array_equal(cropped.store, sequences.store[numbers])
    firsts, lengths = store.segments.T
    segment = np.searchsorted(firsts, sequences.start[numbers], side="right") - 1
    assert np.array_equal(cropped.count, np.minimum(100, lengths[segment]))
    assert (firsts[segment] <= cropped.start).all()
    assert (cropped.start + cropped.count <= (firsts + lengths)[segment]).all()
    assert np.array_equal(cropped.ends, lengths[segment] < 100)
    words, _ = cropped.batch(np.arange(300))
    assert np.array_equal(words[7, :50], store.words[cropped.start[7] :][:50])
    again = sequences.cropped(np.full(400, 3), rng).start
    spread = lengths[0] - 100
    assert again.min() < firsts[0] + 0.1 * spread
    assert abs(again.mean() - firsts[0] - spread / 2) < 0.1 * spread


@pytest.mark.parametrize("notes", [17, 100, 256])
def test_even_sequences_are_as_many_and_of_equal_lengths(store, notes):
    plain, even = cut_all([store], notes), cut_all([store], notes, even=True)
    assert np.array_equal(plain.piece, even.piece)
    assert even.count.max() <= notes
    assert np.array_equal(even.start[1:], (even.start + even.count)[:-1])  # end to end, over all pieces
    for piece in set(even.piece.tolist()):  # of one segment each
        assert np.ptp(even.count[even.piece == piece]) <= 1
    last = np.append(np.diff(even.piece) > 0, True)
    assert np.array_equal(even.ends, last & (even.count < notes))


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
    assert np.array_equal(np.delete(shifted, field, -1), np.delete(words, field, -1))
    assert shifts == set(range(-11, 12))


def test_epochs_cut_one_stream_of_whole_passes():
    stream = np.concatenate([data.epoch_order(10, 7, epoch, seed=3) for epoch in range(10)])
    assert np.array_equal(np.sort(stream.reshape(7, 10)), np.tile(np.arange(10), (7, 1)))
    assert sorted(data.epoch_order(10, 10, 4, 0)) == list(range(10))
    assert data.epoch_order(10, 25, 0, 0).shape == (25,)


def test_baseline_is_the_share_of_the_training_sets_most_frequent_value(store):
    roles, _ = splits.assign_roles([store], [], 0.25, 0)
    parts = [data.cut([store], roles, role, 64) for role in ("train", "valid")]
    train, valid = (np.concatenate([part.read(number) for number in range(len(part))]) for part in parts)
    ends = int(parts[1].ends.sum())
    for field, share in enumerate(data.most_frequent_baseline(*parts)):
        right = (valid[:, field] == np.bincount(train[:, field]).argmax()).sum()
        assert share == pytest.approx(right / (len(valid) + ends))


def test_folders_are_tokenized_once_and_stores_taken_as_they_are(midi_folder, store, tmp_path, monkeypatch):
    first = data.open_sources([midi_folder, store.path], "octuple", tmp_path)
    monkeypatch.setattr(tokenizer, "build_store", None)  # a second tokenization would fail
    again = data.open_sources([midi_folder], "octuple", tmp_path)
    assert np.array_equal(first[0].words, again[0].words)
    assert first[1].path == store.path


def test_some_sequences_are_drawn_once_each():
    assert data.sample(10, 0, seed=1).tolist() == data.sample(10, 10, seed=1).tolist() == list(range(10))
    drawn = data.sample(1000, 50, seed=1)
    assert len(set(drawn.tolist())) == 50
    assert drawn.tolist() == data.sample(1000, 50, seed=1).tolist() != data.sample(1000, 50, seed=2).tolist()


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as out:
        for name, content in files.items():
            out.writestr(name, content)


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as out:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link.mid")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        out.addfile(link)


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_only_midi_and_csv_of_an_archive_inside_the_folder(tmp_path, write, capsys):
    files = {name: os.urandom(50) for name in ("set/a.mid", "set/deep/b.MIDI", "labels.csv", "set/Op. 3: Nr. 1.mid")}
    bad = {name: b"x" for name in ("../out.mid", "/abs.mid", "run.py", "a/../../c.mid", "__MACOSX/a.mid", "C:/d.mid")}
    source, cache = tmp_path / "set.archive", tmp_path / "cache"
    write(source, files | bad | {"empty.mid": b"", "huge.mid": bytes(data.LARGEST_MEMBER + 1)})
    folder = data.midi_folder(source, cache)
    assert "4 files left out: their names lead outside" in (err := capsys.readouterr().err)
    assert "2 files left out: empty, or larger" in err
    assert ("1 files left out: links" in err) == (write is write_tar)
    unpacked = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert unpacked == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "set.archive"]
    assert list(cache.iterdir()) == [folder]
    (folder / "mark").write_text("")
    assert (data.midi_folder(source, cache) / "mark").exists()  # not unpacked again


def test_sources_that_cannot_be_used_are_one_line(store, tmp_path):
    write_zip(tmp_path / "other.zip", {"readme.txt": "nothing"})
    write_zip(tmp_path / "cut.zip", {f"{number}.mid": os.urandom(5000) for number in range(5)})
    content = bytearray((tmp_path / "cut.zip").read_bytes())
    content[100:9000] = bytes(8900)
    (tmp_path / "cut.zip").write_bytes(content)
    (tmp_path / "text.zip").write_text("no archive")
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "nowhere", "does not exist"),
        (store.path, "store of octuple words: add --encoding octuple"),
        (tmp_path / "empty", "empty"),
        (tmp_path / "other.zip", "other.zip cannot be unpacked: it holds no MIDI file"),
        (tmp_path / "cut.zip", "cut.zip cannot be unpacked"),
        (tmp_path / "text.zip", "neither a folder nor an archive"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            data.open_sources([path], "cp", tmp_path / "cache")
        assert "\n" not in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []
