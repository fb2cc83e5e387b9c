"""Checkpoints are whole or absent, and loading one never runs what is in it."""

import os
import pickle
from dataclasses import asdict

import pytest
import torch

from amb import checkpoint
from amb.config import PRESETS, Config
from amb.model import Encoder
from tests.scripts import Evil


def test_half_keeps_what_the_model_is_and_no_state_of_training(tmp_path):
    about = {"kind": "finetune", "config": {}, "fields": [], "task": "melody", "classes": ["a", "b"], "notes": 8}
    model = {"w": torch.randn(3), "count": torch.tensor(7)}
    checkpoint.save(tmp_path / "last.pt", {**about, "model": model, "optimizer": {}, "progress": {}, "settings": {}})
    checkpoint.halve(tmp_path / "last.pt", tmp_path / "half.pt")
    halved = checkpoint.load(tmp_path / "half.pt")
    assert halved.keys() == {"format", "version", "model", *about}
    assert torch.equal(halved["model"]["w"], model["w"].half())
    assert torch.equal(halved["model"]["count"], model["count"])


def test_an_encoder_may_reach_further_than_the_one_it_starts_from(tmp_path):
    """Equal where distances are known; beyond, as at the outermost one. A shorter reach does not fit."""
    configs = [Config(**{**PRESETS["tiny"], "reach": reach}) for reach in (64, 100)]
    old, new = (Encoder(config, (20, 30)).eval() for config in configs)
    model = {f"encoder.{name}": value for name, value in old.state_dict().items()}
    content = {"config": asdict(configs[0]), "model": model}
    checkpoint.load_encoder(new, content, tmp_path)
    words = torch.randint(0, 20, (2, 64, 2))
    lengths = torch.tensor([64, 41])
    assert torch.equal(new(words, lengths)[0], old(words, lengths)[0])
    table, known = new.layers[1].distance, old.layers[1].distance
    assert torch.equal(table, torch.cat([known[:1].expand(36, -1), known, known[-1:].expand(36, -1)]))
    name = "encoder.layers.0.distance"
    for table in (new.layers[0].distance, torch.tensor(1.0), torch.empty(0, 32), torch.zeros(126, 32)):
        bad = content | {"model": model | {name: table}}
        with pytest.raises(checkpoint.CheckpointError, match="another shape: layers.0.distance"):
            checkpoint.load_encoder(old, bad, tmp_path)
        with pytest.raises(checkpoint.CheckpointError, match="another shape: layers.0.distance|is damaged"):
            checkpoint.load_encoder(new, bad, tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="another shape: layers.0.distance"):  # it says 100 and has 64
        checkpoint.load_encoder(new, content | {"config": asdict(configs[1])}, tmp_path)


def test_a_file_comes_back_and_a_failed_save_leaves_it(tmp_path, monkeypatch):
    content = {"model": {"w": torch.randn(3)}, "progress": {"step": 3, "best": float("inf")}, "list": [1, "a"]}
    checkpoint.save(tmp_path / "x.pt", content)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path / "x.pt", {"progress": 2})
    loaded = checkpoint.load(tmp_path / "x.pt")
    assert torch.equal(loaded["model"]["w"], content["model"]["w"])
    assert (loaded["progress"], loaded["list"]) == (content["progress"], content["list"])
    assert os.listdir(tmp_path) == ["x.pt"]


def test_hostile_and_broken_files_are_refused_in_one_line(tmp_path):
    checkpoint.save(tmp_path / "good.pt", {"model": {"w": torch.randn(1000)}})
    whole, evil = (tmp_path / "good.pt").read_bytes(), Evil(tmp_path.parent / "ran")
    for name, content in {
        "code": pickle.dumps(evil), "truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello",
        "noise": os.urandom(5000), "a wrong byte": whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:],
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    (tmp_path / "good.pt").unlink()
    torch.save({"format": checkpoint.FORMAT, "x": evil}, tmp_path / "code in a zip")
    torch.save({"weights": 3}, tmp_path / "another program's")
    torch.save([1, 2], tmp_path / "a list")
    torch.save({"format": checkpoint.FORMAT, "version": 99}, tmp_path / "newer")
    for path in [tmp_path / "missing", tmp_path, *tmp_path.iterdir()]:
        with pytest.raises(checkpoint.CheckpointError, match=path.name) as error:
            checkpoint.load(path)
        assert "\n" not in str(error.value)
    assert not (tmp_path.parent / "ran").exists()
