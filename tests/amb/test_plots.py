"""Pictures are drawn for all names and environments; where they cannot be, there is one line."""

import json
import sys

import numpy as np
import pytest

from amb import plots, tokenizer

NAMES = ["$", r"$\\frac{1$", "$a_b$ and 5 $", "_hidden", "旋律", "two\nlines", "x" * 200]
OCTUPLE = tokenizer.load("octuple")


@pytest.fixture(autouse=True)
def _fresh_reasons():
    plots._say.cache_clear()


@pytest.fixture
def metrics(tmp_path):
    """The metrics of a run of two epochs."""
    masked = {field.name: 0.0 for field in OCTUPLE.fields}
    lines = []
    for epoch in (1, 2):
        lines.append({"kind": "step", "step": epoch, "recovery": 3.0 / epoch, "masker": 0.0})
        valid = {"loss": 2.0 / epoch, "accuracy": 0.3 * epoch, "masked": masked}
        lines.append({"kind": "epoch", "step": epoch, "epoch": epoch, "valid": valid, "frozen": 0.0})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "metrics.jsonl"


def draw_all(metrics) -> list[bool]:
    """Every kind of picture; whether it was drawn."""
    folder = metrics.parent
    rng, fields = np.random.default_rng(0), [field.name for field in OCTUPLE.fields]
    words = np.stack([rng.integers(0, min(field.values, 9), 40) for field in OCTUPLE.fields], axis=1)
    runs = dict.fromkeys(NAMES, metrics)
    figures = {"accuracy": {"mean": 0.5, "deviation": None}}
    arms = {name: {"notes": figures} for name in NAMES}
    bias = {"recovery_by_frequency": rng.random((len(OCTUPLE.fields), 10)).tolist()}
    table = {NAMES[0]: {"arms": arms, "baselines": {"majority": {"notes": {"accuracy": 0.2}}, "trees": None}}}
    notes = (np.arange(200.0), np.arange(200.0) + 2, 60 + np.arange(200) % 12)
    taken = np.arange(200) % 3 == 0
    return [
        plots.curves(runs, plots.VALIDATION, folder / "curves.png", "epoch", NAMES[0]),
        plots.draw_run(folder, OCTUPLE, words, rng.random(40), np.arange(40) < 9),
        plots.draw_confusion(NAMES[0], np.eye(len(NAMES), dtype=int), NAMES, folder / "confusion.png"),
        plots.draw_results(table, folder / "results.png"),
        plots.draw_bias({"fields": fields, "runs": dict.fromkeys(NAMES, bias)}, folder / "b.png"),
        plots.draw_melody(NAMES[0], notes, {"MELODY": taken, "left out": ~taken}, folder / "m.png"),
    ]


def test_whatever_names_and_backend(metrics, monkeypatch, capsys):
    monkeypatch.delenv("DISPLAY", raising=False)
    for backend in ("module://matplotlib_inline.backend_inline", "no such thing"):
        monkeypatch.setenv("MPLBACKEND", backend)
        assert plots.curves({"a": metrics}, plots.VALIDATION, metrics.parent / "a.png")
    monkeypatch.setenv("MPLBACKEND", "TkAgg")
    assert all(draw_all(metrics))
    for name in ("curves", "masker", "confusion", "results", "b", "m"):
        assert (metrics.parent / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert capsys.readouterr() == ("", "")


def test_without_matplotlib_one_line_says_so(metrics, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not any(draw_all(metrics))
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == 1
    assert "pip install matplotlib" in err


def test_where_a_picture_cannot_be_written_one_line_says_so(metrics, capsys):
    (metrics.parent / "curves.png").mkdir()
    assert not plots.curves({"a": metrics}, plots.VALIDATION, metrics.parent / "curves.png")
    assert not plots.curves({"a": metrics}, plots.VALIDATION, metrics.parent / "no" / "curves.png")
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2
    assert all(line.startswith("no picture: ") and "curves.png cannot be written" in line for line in err)
