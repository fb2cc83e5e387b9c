"""What a page about a pre-trained model shows: every note hidden once, and figures whose answer is known."""

import numpy as np
import pytest
import torch

import amb
from amb import checkpoint, data, inspection, mask_book, tokenizer
from amb.__main__ import main

OCTUPLE = tokenizer.load("octuple")


@pytest.fixture(scope="module")
def run(store, save_model, tmp_path_factory):
    """A pre-trained model and its mask book, which is about all demo pieces but the last."""
    folder = tmp_path_factory.mktemp("run")
    save_model(folder / "best.pt")
    roles = ["train"] * (len(store.pieces) - 1) + ["valid"]
    training = data.cut([store], [roles], "train", 64)
    book = mask_book.pack_bits(torch.rand(len(training), 64) < 0.3)
    mask_book.save(folder / "book.npz", book, training)
    return folder


@pytest.fixture(scope="module")
def model(run):
    return amb.load(run, "cpu")


def test_every_note_is_hidden_once_among_a_seventh(model, midi_folder):
    piece = model.encode(min(midi_folder.rglob("*.mid")))
    view = inspection.inspect(model, piece, chances=True)
    assert (view.true == piece.words).all()
    assert len(piece.words) > 200
    for sequence in np.unique(view.sequence):
        sizes = np.bincount(view.group[view.sequence == sequence], minlength=7)
        assert sizes.max() - sizes.min() <= 1
    # one group of the second sequence by hand, unpadded
    rows = np.flatnonzero(view.sequence == 1)
    hidden = view.group[rows] == 3
    words = torch.from_numpy(piece.words[rows].astype(np.int64))
    words[torch.from_numpy(hidden)] = torch.from_numpy(model.encoding.mask.astype(np.int64))
    logits = model.recoverer(model.encoder(words[None], torch.tensor([len(rows)])))
    for column, (one, field) in enumerate(zip(logits, model.encoding.fields, strict=True)):
        direct = one[0, :, : field.values].argmax(-1).numpy()
        assert (view.recovered[rows[hidden], column] == direct[hidden]).mean() > 0.9  # ties aside
    ends = np.cumsum([field.values for field in model.encoding.fields])
    for column, p in enumerate(np.split(view.chances.astype(np.float32), ends[:-1], axis=1)):
        assert p.sum(1) == pytest.approx(1, abs=5e-3)
        assert p[np.arange(len(p)), view.recovered[:, column]] == pytest.approx(p.max(1), abs=1e-3)
    clean = torch.from_numpy(piece.words[rows].astype(np.int64))[None]
    scores = model.masker(model.encoder(clean, torch.tensor([len(rows)])))[0].numpy()
    np.testing.assert_allclose(view.scores[rows], scores, atol=1e-5)


def words(count):
    rng = np.random.default_rng(0)
    return np.stack([rng.integers(0, min(field.values, 9), size=count) for field in OCTUPLE.fields], axis=1)


def test_recovery_by_frequency():
    """Value 7 makes 60 %, value 3 makes 25 %, three others the rest: the answer 7 is right in six tenths."""
    true = words(1000)
    true[:, 3] = np.repeat([7, 3, 20, 30, 40], [600, 250, 50, 50, 50])
    recovered = true.copy()
    recovered[:, 3] = 7
    table = inspection.recovery_by_frequency(true, recovered, OCTUPLE)
    assert table.shape == (8, 10)
    assert table[3] == pytest.approx([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    assert table[0] == pytest.approx(np.ones(10))
    recovered[:600, 3], recovered[600:850, 3] = 3, 3  # the answer 3, which lies across tenths 2 to 4
    table = inspection.recovery_by_frequency(true, recovered, OCTUPLE)
    assert table[3] == pytest.approx([0, 0.5, 1, 1, 0, 0, 0, 0, 0, 0])


def test_marginal_distance_and_hopeless_notes():
    scores = np.random.default_rng(2).random(50)
    chosen = inspection.most_hopeless(scores)
    assert chosen.sum() == 10
    assert scores[chosen].min() > scores[~chosen].max()

    def chances(answers):
        rows = [np.eye(field.values)[column] for field, column in zip(OCTUPLE.fields, answers.T, strict=True)]
        return np.concatenate(rows, axis=1)

    true = words(400)
    true[:, 3] = np.repeat([60, 62], [300, 100])
    shuffled = chances(true[np.random.default_rng(1).permutation(400)])
    assert inspection.marginal_distance(true, shuffled, OCTUPLE) == pytest.approx(np.zeros(8))  # wrong, and unbiased
    known = np.broadcast_to(chances(true).mean(0), shuffled.shape)  # each value as probable as it is frequent
    assert inspection.marginal_distance(true, known, OCTUPLE) == pytest.approx(np.zeros(8))
    answers = true.copy()
    answers[:, 3] = 60
    assert inspection.marginal_distance(true, chances(answers), OCTUPLE)[3] == pytest.approx(0.25)
    answers[:, 3] = 64
    assert inspection.marginal_distance(true, chances(answers), OCTUPLE)[3] == pytest.approx(1)


def test_inspect_prints_figures_and_draws_a_page(run, model, store, midi_folder, save_model, tmp_path, capsys):
    (tmp_path / "bad.mid").write_bytes(b"")
    first, second, *_, unseen = (str(midi_folder / piece.path) for piece in store.pieces)
    page = tmp_path / "page.png"
    assert main(["inspect", str(run), first, str(tmp_path / "bad.mid"), second, "--out", str(page)]) == 0
    out, err = capsys.readouterr()
    assert "bad.mid" in err
    assert page.read_bytes()[:4] == b"\x89PNG"
    assert f"frozen in {first} by this run" in out
    view = inspection.join([inspection.inspect(model, model.encode(file)) for file in (first, second)])
    table = inspection.recovery_by_frequency(view.true, view.recovered, model.encoding)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    for field, row, line in zip(model.encoding.fields, table, lines[2:], strict=True):
        assert line == [field.name, f"{row[0]:.1%}", f"{row[-1]:.1%}"]
    # a model of random masking has no masker to show; a piece that only validated has no frozen state
    saved = checkpoint.load(save_model(tmp_path / "random.pt"))
    saved = {key: saved[key] for key in saved if key not in ("format", "version")}
    checkpoint.save(tmp_path / "random.pt", saved | {"config": saved["config"] | {"objective": "random"}})
    assert main(["inspect", str(tmp_path / "random.pt"), first, "--out", str(page)]) == 0
    assert main(["inspect", str(run), unseen]) == 0
    assert "frozen in" not in capsys.readouterr().out
