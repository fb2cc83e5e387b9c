"""A trained model at work gives what fine-tuning's evaluation gives, whatever else is in the batch."""

import shutil

import numpy as np
import pytest
import torch
from amb.tokenizer.midi import Part, write_midi

import amb
from amb import checkpoint, data, evaluate, inference, tasks, tokenizer
from amb.model import statistics

TASKS = ("melody", "velocity", "composer")


def write_notes(path, *parts) -> None:
    """A file of tracks of rows (start, end, pitch, velocity); a third one is percussion."""
    instruments = 0, 0, tokenizer.PERCUSSION
    tracks = [
        Part("", instrument, np.array(sorted(rows))) for instrument, rows in zip(instruments, parts, strict=False)
    ]
    write_midi(tracks, [], []).save(path)


@pytest.fixture(scope="module")
def folder(midi_folder, tmp_path_factory):
    """Files of all shapes: demo pieces, one note, 48 notes (no room for EOS), 300 bars, several tracks with drums."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    for path in sorted(midi_folder.rglob("*.mid"))[:5]:
        shutil.copy(path, folder)
    write_notes(folder / "one.mid", [(960, 1000, 61, 77)])
    write_notes(folder / "full.mid", [(240 * n, 240 * n + 200, 40 + n, 30 + n) for n in range(48)])
    # bars of 4/4: 300 of them, so two segments
    write_notes(folder / "long.mid", [(1920 * n, 1920 * n + 900, 30 + n % 60, 1 + n % 127) for n in range(300)])
    starts, others = rng.integers(0, 9600, (3, 50)), rng.integers(30, 90, (3, 50, 2))
    parts = [[(s, s + 100, p, v) for s, (p, v) in zip(*part, strict=True)] for part in zip(starts, others, strict=True)]
    write_notes(folder / "tracks.mid", *parts)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, save_model):
    """Of each kind, loaded: by task, None for the pre-trained one."""
    base = tmp_path_factory.mktemp("models")
    models = {task: amb.load(save_model(base / f"{task}.pt", task), "cpu") for task in (None, *TASKS)}
    models["composer in windows"] = amb.load(save_model(base / "windows.pt", "composer", notes=150), "cpu")
    return models


@pytest.mark.parametrize("task", [*TASKS, "composer in windows"])
def test_prediction_is_what_evaluation_on_a_store_gives(task, models, folder, tmp_path):
    """The other way round: store, `data.cut`, one sequence at a time with all its padding, `evaluate`."""
    model = models[task]
    definition = model.task
    view, by_note = definition.view, definition.level == "note"
    out = tmp_path / "store"
    tokenizer.build_store([folder], out, workers=1, progress=False, view=view, origins=by_note)
    store = tokenizer.open_store(out)
    cut = data.cut([store], [["test"] * len(store.pieces)], "test", model.notes, even=True)
    assert not cut.ends.all()
    answers = []
    for number in range(len(cut)):
        words, lengths = cut.batch(np.array([number]))
        words = torch.from_numpy(tasks.hide(definition, model.encoding, words))
        answers.append(evaluate.log_probabilities(model.classifier, words, torch.from_numpy(lengths))[0].numpy())
    predictions = {prediction.file: prediction for prediction in model.predict(folder)}
    assert len(predictions) == len(store.pieces) == 9
    for index, piece in enumerate(store.pieces):
        rows = np.flatnonzero(cut.piece == index)
        prediction = predictions[str(folder / piece.path)]
        if by_note:
            direct = np.concatenate([answers[number][: cut.count[number]] for number in rows])
            read = model.encode(folder / piece.path)
            np.testing.assert_allclose(prediction.log_p[read.rows], direct, atol=1e-5)
            velocities = store.velocity[piece.offset : piece.offset + piece.notes]
            assert (read.notes.velocity[read.rows] == velocities).all()
            share = np.bincount(direct.argmax(axis=1), minlength=len(model.classes)) / len(direct)
            np.testing.assert_allclose(prediction.probabilities, share)
        else:
            segments = np.stack([answers[number] for number in rows])
            np.testing.assert_allclose([part.log_p for part in prediction.parts], segments, atol=1e-5)
            mean, _ = evaluate.by_piece(segments, np.zeros(len(rows), int), np.zeros(len(rows), int))
            np.testing.assert_allclose(prediction.log_p, mean[0], atol=1e-5)
            assert prediction.label == model.classes[mean[0].argmax()]
            assert prediction.probabilities.sum() == pytest.approx(1)
            assert [part.notes for part in prediction.parts] == cut.count[rows].tolist()
    assert len({tuple(p.probabilities.round(5)) for p in predictions.values()}) > 3  # the weights tell files apart


def test_embeddings_depend_on_the_piece_alone(models, folder, monkeypatch):
    model, files = models[None], [str(path) for path in sorted(folder.iterdir())]
    whole = model.embed(files, workers=1)
    assert (whole.names, whole.vectors.shape, whole.vectors.dtype) == (files, (9, 64), np.float32)
    assert np.abs(whole.vectors[0] - whole.vectors[1]).max() > 1e-2
    reverse = model.embed(files[::-1], workers=2)
    assert reverse.names == files[::-1]
    np.testing.assert_allclose(reverse.vectors[::-1], whole.vectors, atol=1e-5)
    for words in (64, 10_000):  # one sequence a batch; all pieces in one window
        monkeypatch.setattr(inference, "BATCH", {"cpu": words})
        np.testing.assert_allclose(model.embed(files).vectors, whole.vectors, atol=1e-5)
    alone = np.concatenate([model.embed(file).vectors for file in files])
    np.testing.assert_allclose(alone, whole.vectors, atol=1e-5)


def test_an_embedding_is_the_mean_over_real_notes(models, folder):
    """By hand: equal segments of at most L words, EOS behind the last if it fits, one pass each, EOS not counted."""
    model = models[None]
    for name in ("one.mid", "long.mid", "tracks.mid"):
        words = tokenizer.load("octuple").encode(folder / name).astype(np.int64)
        states = []
        for run in [words[:256], words[256:]] if name == "long.mid" else [words]:
            bounds = np.linspace(0, len(run), -(-len(run) // 64) + 1).astype(int)
            for start, end in zip(bounds[:-1], bounds[1:], strict=True):
                notes, ends = end - start, end == len(run) and end - start < 64
                part = run[start:end] if not ends else np.concatenate([run[start:], model.encoding.eos[None]])
                part = torch.from_numpy(part.astype(np.int64))[None]
                states.append(model.encoder(part, torch.tensor([part.shape[1]]))[0, :notes].numpy())
        embedded = model.embed(folder / name, notes=True)
        np.testing.assert_allclose(embedded.vectors[0], np.concatenate(states).mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(embedded.notes.vectors, np.concatenate(states), atol=1e-5)
        assert embedded.counts.tolist() == [len(words)]
        assert (embedded.notes.pitch == np.where(words[:, 2] == 128, words[:, 3] - 128, words[:, 3])).all()


def test_layers_are_counted_from_either_end(models, folder):
    model, file = models[None], folder / "tracks.mid"
    every = [model.embed(file, layer).vectors for layer in range(3)]
    for layer, same in ((-1, 2), (-2, 1), (-3, 0)):
        assert (model.embed(file, layer).vectors == every[same]).all()
    assert np.abs(every[0] - every[1]).max() > 1e-3 < np.abs(every[1] - every[2]).max()
    assert len(model.encoder.layers) == 2
    for layer, notes, message in ((3, False, "no layer"), (-4, False, "no layer"), (None, True, "of one layer")):
        with pytest.raises(ValueError, match=message):
            model.embed(file, layer, notes)


def test_statistics_of_all_layers(models, folder):
    model, files = models["composer in windows"], [folder / "long.mid", folder / "one.mid"]
    for file, vector in zip(files, model.embed(files, layer=None).vectors, strict=True):
        cut = model.sequences([model.encode(file)])
        words, lengths = map(torch.from_numpy, cut.batch(np.arange(len(cut))))
        rows = statistics(model.encoder.states(words, lengths), lengths)
        np.testing.assert_allclose(vector, rows.numpy().mean(axis=0), atol=1e-4)


def test_bad_files_stay_in_their_places(models, folder, tmp_path):
    empty, nothing, gone = (tmp_path / name for name in ("empty.mid", "nothing", "gone.mid"))
    empty.write_bytes(b"")
    nothing.mkdir()
    files = [empty, folder / "one.mid", nothing, gone, folder / "full.mid"]
    predictions = models["composer"].predict(files)
    assert [prediction.file for prediction in predictions] == [str(file) for file in files]
    assert [bool(prediction.error) for prediction in predictions] == [True, False, True, True, False]
    assert predictions[0].probabilities is predictions[0].label is None
    embedded = models[None].embed(files)
    assert embedded.names == [str(files[1]), str(files[4])]
    assert [failure.file for failure in embedded.skipped] == [str(files[index]) for index in (0, 2, 3)]
    with pytest.raises(tokenizer.MidiError):
        models[None].encode(files[0])


def test_cp_drops_notes_out_of_its_range_and_says_so(tmp_path, save_model):
    rows = [(480 * n, 480 * n + 100, pitch, 64) for n, pitch in enumerate((10, 60, 120, 70))]
    write_notes(tmp_path / "wide.mid", rows)
    model = amb.load(save_model(tmp_path / "cp.pt", "melody", "cp"), "cpu")
    (prediction,) = model.predict(tmp_path / "wide.mid")
    assert (prediction.labels < 0).tolist() == [True, False, True, False]
    assert (prediction.notes, list(prediction.dropped.values())) == (2, [2])
    assert prediction.probabilities.sum() == pytest.approx(1)


def test_seconds_follow_the_tempos_and_bars_the_signatures():
    signatures = [(900, 3, 4), (900, 2, 4), (1200, 6, 8)]
    score = tokenizer.Score(100, None, [(100, 1_000_000), (100, 250_000), (300, 500_000)], signatures, 0)
    ticks = np.array([0, 396, 398, 799, 800, 899, 900, 1099, 1100, 1199, 1200, 1499, 1500])
    assert inference.bars(score, ticks).tolist() == [0, 0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert inference.seconds(score, np.array([0, 50, 100, 200, 300, 400])).tolist() == [0, 0.25, 0.5, 0.75, 1.0, 1.5]


def test_what_is_no_model_is_refused(models, tmp_path):
    good = checkpoint.load(models["composer"].path)
    del good["format"], good["version"]
    bad = {"fields": [], "task": "juggling", "classes": ["a", "b"], "notes": 0, "kind": "kettle", "model": [1]}
    for key, value in bad.items():
        checkpoint.save(tmp_path / f"{key}.pt", good | {key: value})
    for name in ("missing", *bad):
        with pytest.raises(checkpoint.CheckpointError, match=name):
            amb.load(tmp_path / f"{name}.pt", "cpu")
