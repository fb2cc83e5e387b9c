"""Pictures: drawn whatever the names and the environment are, and where they cannot be, one line says so."""

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


def draw_all(metrics, names=("a", "b")) -> list[bool]:
    """Every kind of picture; whether it was drawn."""
    folder = metrics.parent
    rng, fields = np.random.default_rng(0), [field.name for field in OCTUPLE.fields]
    words = np.stack([rng.integers(0, min(field.values, 60), 40) for field in OCTUPLE.fields], axis=1)
    runs = dict.fromkeys(names, metrics)
    figures = {"accuracy": {"mean": 0.5, "deviation": None}}
    arms = {name: {"notes": figures} for name in names}
    recovery = rng.random((len(OCTUPLE.fields), 10))
    bias = {"recovery_by_frequency": recovery.tolist(), "marginal_distance_hopeless": [0.1] * len(OCTUPLE.fields)}
    table = {names[0]: {"arms": arms, "baselines": {"majority": {"notes": {"accuracy": 0.2}}, "trees": None}}}
    notes = (np.arange(200.0), np.arange(200.0) + 2, 60 + np.arange(200) % 12)
    taken = np.arange(200) % 3 == 0
    return [
        plots.curves(runs, plots.VALIDATION, folder / "curves.png"),
        plots.curves({names[0]: metrics}, plots.VALIDATION, folder / "curve.png", "epoch", names[0]),
        plots.draw_run(folder, OCTUPLE, words, rng.random(40)),
        plots.draw_confusions({names[0]: (np.eye(len(names), dtype=int), list(names))}, folder / "confusion.png"),
        plots.draw_results(table, folder / "results.png"),
        plots.draw_bias({"fields": fields, "runs": dict.fromkeys(names, bias)}, folder / "b.png"),
        plots.draw_melody(names[0], notes, {"MELODY": taken, "left out": ~taken}, folder / "m.png"),
    ]


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no such thing", "TkAgg"])
def test_whatever_names_and_backend(backend, metrics, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", backend)
    monkeypatch.delenv("DISPLAY", raising=False)
    assert all(draw_all(metrics, NAMES if backend == "TkAgg" else ("a", "b")))
    for name in ("curves", "curve", "masker", "confusion", "results", "b", "m"):
        assert (metrics.parent / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert capsys.readouterr() == ("", "")


def test_without_matplotlib_one_line_says_so(metrics, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not any(draw_all(metrics)[:2])
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
