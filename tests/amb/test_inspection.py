"""Inspections: every note is hidden once, the figures are what they say, frozen notes are the run's own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from amb.kernels.sampling import unpack_bits

import amb
from amb import checkpoint, data, demo, frozen, inspection, mask_book, tokenizer
from amb.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Ten demo pieces."""
    return demo.write_corpus(tmp_path_factory.mktemp("corpus") / "midi", pieces=10)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """A pre-training run of two steps that froze notes."""
    base = tmp_path_factory.mktemp("run")
    flags = ["--config=tiny", "--epochs=1", "--epoch-size=8", "--valid-size=4", "--device=cpu", "--cache"]
    command = [sys.executable, ROOT / "train.py", *flags, base / "cache", "--data", corpus, "--out", base / "run"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, cwd=ROOT)
    return base / "run"


@pytest.fixture(scope="module")
def model(run):
    return amb.load(run, "cpu")


def test_every_note_is_hidden_once_among_a_seventh(model, corpus):
    piece = model.encode(min(corpus.rglob("*.mid")))
    view = inspection.inspect(model, piece)
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
    clean = torch.from_numpy(piece.words[rows].astype(np.int64))[None]
    scores = model.masker(model.encoder(clean, torch.tensor([len(rows)])))[0].numpy()
    np.testing.assert_allclose(view.scores[rows], scores, atol=1e-5)
    would = view.would_freeze[rows]
    assert would.sum() == int(0.2 * len(rows))
    assert scores[would].min() >= scores[~would].max() - 1e-6


def test_bias_in_numbers():
    encoding = tokenizer.load("cp")
    words = np.zeros((10, 4), dtype=np.int64)
    words[:, 2] = [5, 5, 5, 5, 9, 9, 7, 1, 2, 3]  # half of the notes: 5 and one of 9
    recovered = words.copy()
    recovered[:, 2] = [5, 5, 5, 0, 9, 0, 5, 9, 2, 0]
    bar, _, pitch, _ = inspection.bias(encoding, words, recovered)
    assert (bar.frequent, bar.rare, bar.frequent_accuracy) == (1, 0, 1)
    assert np.isnan(bar.rare_accuracy)
    assert np.isnan(bar.rare_as_frequent)
    assert pitch == ("Pitch", 2, 4, pytest.approx(4 / 6), pytest.approx(1 / 4), pytest.approx(2 / 4))


def test_half_is_enough_to_be_frequent():
    assert np.flatnonzero(inspection.frequent_values(np.array([3, 3, 1, 2]), 5)).tolist() == [3]
    assert np.flatnonzero(inspection.frequent_values(np.array([4]), 5)).tolist() == [4]
    assert np.flatnonzero(inspection.frequent_values(np.array([0, 1, 2]), 5)).tolist() == [0, 1]


def test_frozen_notes_are_those_of_the_runs_book(run, corpus, model, tmp_path):
    saved, trained = checkpoint.load(run / "last.pt"), json.loads((run / "pieces.json").read_text())
    found = {}
    for role in ("train", "valid"):
        for name in trained[role]:
            piece = model.encode(corpus / name)
            found[name] = frozen.frozen_notes(run, piece)
            assert (found[name] is None) == (role == "valid")
            assert role == "valid" or len(found[name]) == len(piece.words)
    assert sum(flags.sum() for flags in found.values() if flags is not None) > 100
    # the whole book, in the order of the store, is what the pieces have
    store = tokenizer.open_store(next((run.parent / "cache").glob("midi-octuple-*")))
    roles = ["train" if piece.path in trained["train"] else "valid" for piece in store.pieces]
    cut = data.cut([store], [roles], "train", 64)
    lengths = torch.arange(64) < torch.from_numpy(cut.count)[:, None]
    book = unpack_bits(saved["book"], 64)[lengths].numpy()
    together = np.concatenate([found[piece.path] for piece in store.pieces if found[piece.path] is not None])
    assert (together == book).all()
    assert 0 <= mask_book.frozen_count(saved["book"]) - together.sum() <= len(cut)  # an EOS may be frozen too
    # the piece is known by its words, wherever it lies; without the data nothing is known
    shutil.copy(corpus / trained["train"][0], tmp_path / "moved.mid")
    assert (frozen.frozen_notes(run, model.encode(tmp_path / "moved.mid")) == found[trained["train"][0]]).all()
    shutil.copytree(run, tmp_path / "run")
    content = json.loads((run / "run.json").read_text())
    content["data"]["cache"] = str(tmp_path / "elsewhere")
    (tmp_path / "run" / "run.json").write_text(json.dumps(content))
    assert frozen.frozen_notes(tmp_path / "run", model.encode(tmp_path / "moved.mid")) is None


def test_inspect_prints_figures_and_draws_a_page(run, model, corpus, tmp_path, capsys):
    saved = checkpoint.load(run / "best.pt")
    del saved["format"], saved["version"]
    saved["config"] = saved["config"] | {"objective": "random"}
    checkpoint.save(tmp_path / "random.pt", saved)
    (tmp_path / "bad.mid").write_bytes(b"")
    trained = json.loads((run / "pieces.json").read_text())["train"]
    files = [str(corpus / trained[0]), str(tmp_path / "bad.mid"), str(corpus / trained[1])]
    page = tmp_path / "page.png"
    assert main(["inspect", str(run), *files, "--beside", str(tmp_path / "random.pt"), "--out", str(page)]) == 0
    out, err = capsys.readouterr()
    assert "bad.mid" in err
    assert page.read_bytes()[:4] == b"\x89PNG"
    assert f"frozen in {files[0]} by this run" in out
    pieces = [model.encode(files[0]), model.encode(files[2])]
    recovered = np.concatenate([inspection.inspect(model, piece).recovered for piece in pieces])
    table = inspection.bias(model.encoding, np.concatenate([piece.words for piece in pieces]), recovered)
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert lines["Duration"][3] == f"{table[4].frequent_accuracy:.1%}"
    assert lines["Duration"][4] == f"{table[4].rare_accuracy:.1%}"
    assert lines["Duration"][3:6] == lines["Duration"][6:9]  # the same weights
    assert amb.load(tmp_path / "random.pt", "cpu").config.objective == "random"
    assert inspection.inspect(amb.load(tmp_path / "random.pt", "cpu"), pieces[0]).scores is None
    # alone, the random one has no masker to show; a piece that only validated has no frozen state
    assert main(["inspect", str(tmp_path / "random.pt"), files[0], "--out", str(page)]) == 0
    unseen = corpus / json.loads((run / "pieces.json").read_text())["valid"][0]
    assert main(["inspect", str(run), str(unseen)]) == 0
    assert "would be frozen" in capsys.readouterr().out
