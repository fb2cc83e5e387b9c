"""The model that comes with the code: its name, its size, and that it separates a leading voice from its chords."""

import json
import re
import sys

import numpy as np
import pytest
from amb.tokenizer.midi import Part, write_midi

import amb
import finetune
from amb import checkpoint, tokenizer
from amb.__main__ import main

SCALE = np.array([0, 2, 4, 5, 7, 9, 11])


def write_song(path, rng, bars=16) -> tuple[list, list]:
    """A voice over broken chords in a random key, in one track: (start, pitch) of the voice and of the chords."""
    key, degree, voice, chords = int(rng.integers(-5, 6)), 7, [], []
    for bar in range(bars):
        root = int(rng.choice([0, 3, 4, 5]))
        triad = [48 + key + int(SCALE[(root + step) % 7]) + 12 * ((root + step) // 7) for step in (0, 2, 4)]
        chords += [(1920 * bar + 240 * n, 200, triad[(0, 1, 2, 1)[n % 4]]) for n in range(8)]
        beats = rng.choice([240, 480, 480, 960], size=8).cumsum()
        for start, end in zip([0, *beats], beats, strict=False):
            degree = int(np.clip(degree + rng.integers(-2, 3), 4, 15))
            if start < 1920:
                pitch = 60 + key + int(SCALE[degree % 7]) + 12 * (degree // 7)
                voice.append((1920 * bar + int(start), int(min(end, 1920) - start) - 20, pitch))
    notes = np.array(sorted((start, start + length, pitch, 70) for start, length, pitch in voice + chords))
    write_midi([Part("", 0, notes)], [], []).save(path)
    return [[(start, pitch) for start, _, pitch in part] for part in (voice, chords)]


def test_a_name_that_is_no_path_is_a_model_that_comes_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoint.find("small") == checkpoint.SHIPPED / "small" / "model.pt"
    with pytest.raises(checkpoint.CheckpointError, match="^smal does not exist; .* called small$"):
        checkpoint.find("smal")
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "best.pt").touch()
    assert checkpoint.find("small").resolve() == tmp_path / "small" / "best.pt"


def test_it_is_small_and_says_what_it_learned_from():
    folder = checkpoint.SHIPPED / "small"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10e6
    content = checkpoint.load(folder / "model.pt")
    assert set(content) <= {"format", "version", *checkpoint.MODEL, "model"}
    assert {str(value.dtype) for value in content["model"].values() if value.is_floating_point()} == {"torch.float16"}
    pieces = json.loads((folder / "pieces.json").read_text())
    assert len(pieces["train"]) > 1_000
    # POP909's songs and Pianist8's, whose licences allow it
    assert all(re.match(r"\d{3}/|midi/[A-Z][a-z]+/", path) for role in pieces.values() for path in role)
    assert not set(pieces["train"]) & {*pieces["valid"], *pieces["test"]}


def test_it_tells_a_voice_from_its_chords(tmp_path, capsys):
    """Of six random songs together: most of the voice, next to nothing of the chords."""
    rng, called, there = np.random.default_rng(), np.zeros(2), np.zeros(2)
    for _ in range(6):
        parts = write_song(tmp_path / "song.mid", rng)
        assert main(["melody", "small", str(tmp_path / "song.mid"), "--bridge", "--out", str(tmp_path / "m.mid")]) == 0
        notes = tokenizer.read_midi(tmp_path / "m.mid").notes
        melody = set(zip(notes.start.tolist(), notes.pitch.tolist(), strict=True))
        called += [len(melody & set(part)) for part in parts]
        there += [len(part) for part in parts]
    voice, chords = called / there
    assert chords < 0.05 < 0.85 < voice


def test_it_predicts_embeds_and_is_fine_tuned(midi_folder, tmp_path, capsys, monkeypatch):
    files = [str(path) for path in sorted(midi_folder.rglob("*.mid"))[:2]]
    assert main(["predict", "small", *files]) == 0
    assert capsys.readouterr().out.split("|")[1:3] == [" file" + " " * (len(files[0]) - 3), " notes "]
    vectors = amb.load("small", "cpu").embed(files).vectors
    assert vectors.shape == (2, 256)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.1
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--task", "emotion", "--init", "small", "--out", str(tmp_path)])
    _, content = finetune.open_run(finetune.parse_args())
    assert content["paths"]["init"] == str(checkpoint.SHIPPED / "small" / "model.pt")
