"""Each measurement at its smallest: it runs, and writes the JSON that the report reads."""

import json

import pytest
import torch

from amb import demo
from benchmarks import inference, kernels, report, scale, step, tokenizer
from tests import scripts

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def midi(tmp_path_factory):
    return demo.write_corpus(tmp_path_factory.mktemp("midi"), 8)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Where all tests of this file write, and what the last one reports."""
    return tmp_path_factory.mktemp("results")


def read(path) -> dict:
    content = json.loads(path.read_text())
    assert {"device", "torch", "commit", "load"} <= set(content["machine"])
    return content["results"]


def require_timings(timings: dict, *names: str) -> None:
    assert list(timings) == list(names)
    for row in timings.values():
        for spread in row.values():
            assert 0 < spread["lowest"] <= spread["median"] <= spread["highest"]
    assert timings[names[0]]["ratio"]["median"] == 1


def test_tokenizer(midi, results):
    out = results / "tokenizer-demo.json"
    tokenizer.main([str(midi), "--files", "2", "--rounds", "1", "--store-rounds", "1", "--out", str(out)])
    assert {"mido.MidiFile", "octuple", "cp", "store, 2 workers"} <= set(read(out))


def test_kernels(midi, results):
    out = results / "kernels-tiny-cpu.json"
    kernels.main(["--config", "tiny", "--batch", "1", "--rounds", "1", "--data", str(midi), "--out", str(out)])
    operations = read(out)["operations"]
    attention = operations["relative_attention"]  # on CUDA there are more
    assert {"ours", "reference", "Hugging Face", kernels.OTHER} <= set(attention)
    require_timings(attention, *attention)
    require_timings(operations["masked_lm"], "ours", "torch")
    assert len(operations) == 7


def test_step(midi, results):
    out = results / "step-tiny-cpu.json"
    step.main(["--config", "tiny", "--batch", "1", "--rounds", "1", "--data", str(midi), "--out", str(out)])
    found = read(out)
    require_timings(found["timings"], "ours", "Hugging Face")
    assert found["notes"] == 64


@pytest.mark.parametrize("source", ["midi", pytest.param("store", marks=pytest.mark.slow)])
def test_inference(source, midi, results, tmp_path):
    data, out = midi, results / "inference-tiny-cpu.json"
    if source == "store":
        data, out = tmp_path / "store", tmp_path / "out.json"
        inference.tokenizer.build_store([midi], data, workers=1, progress=False)
    inference.main(
        ["--config", "tiny", "--pieces", "2", "--rounds", "1", "--data", str(data), "--out", str(out)],
    )
    found = read(out)
    names = ["ours", inference.ALIKE, inference.BY_LENGTH, *(["ours, with reading"] if source == "midi" else [])]
    for name in ("predict", "embed"):
        require_timings(found["timings"][name], *names)
        assert found["largest_difference"][name] < 1e-4


def test_wrong_use_is_one_line(tmp_path):
    for name in ("tokenizer", "step"):
        where = [tmp_path / "nowhere"] if name == "tokenizer" else ["--data", tmp_path / "nowhere"]
        said = scripts.run("-m", "benchmarks", name, *where, cwd=scripts.ROOT, status=1)
        assert said.startswith("benchmarks: "), said
        assert "nowhere" in said
        assert said.count("\n") == 1


def test_results_that_differ_are_not_timed():
    ours, other = torch.zeros(3).numpy(), torch.full((3,), 1e-3).numpy()
    with pytest.raises(SystemExit, match="differ by 1.0e-03"):
        inference.require_agreement({"ours": ours, "peer": other})


@pytest.mark.slow
def test_scale_goes_on_where_it_stopped(midi, results, capsys):
    out, picture = results / "scale-cpu.json", results / "scale.png"
    smallest = ["--model", "1 x 64", "--models", "1 x 64", "--step-notes", "32", "--lengths", "16", "32"]
    where = ["--data", str(midi), "--out", str(out), "--picture", str(picture), "--rounds", "1"]
    scale.main([*smallest, *where, "--batches", "1"])
    before = read(out)["points"]
    assert len(before) == 4
    scale.main([*smallest, *where, "--batches", "1", "2", "--memory", "0", "--resume"])
    after = read(out)["points"]
    assert {name: after[name] for name in before} == before
    new = after["batch: 1 x 64, L = 16, B = 2"]
    assert list(new["timings"]) == ["ours"]
    assert "needs about" in new["skipped"]["Hugging Face"]
    assert picture.stat().st_size > 1000


@pytest.mark.slow
def test_store(midi, results):
    out = results / "store-cpu.json"
    arguments = ["--store", "--notes", "3000", "--steps", "1", "--rounds", "1", "--configs", "tiny"]
    scale.main([*arguments, "--data", str(midi), "--out", str(out)])
    found = read(out)
    assert 3000 <= found["large"]["notes"] < 5000
    assert found["large"]["seconds_to_first_step"] > 0
    assert found["large"]["peak_bytes"]["VmRSS"] >= found["large"]["peak_bytes"]["RssAnon"] > 0
    assert found["book_bytes_per_place"] == pytest.approx(1 / 8)
    assert found["batches"]["tiny"]["step_notes_per_second"]["median"] > 0


def test_report(results, tmp_path, capsys):
    """Of what the tests above wrote, and of the repository's own results."""
    for folder in (results, report.HERE / "results"):
        page, picture = tmp_path / "page.md", tmp_path / "picture.png"
        page.write_text(f"before\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\nafter\n")
        report.main(["--results", str(folder), "--docs", str(page), "--picture", str(picture)])
        text = page.read_text()
        assert text.startswith("before")
        assert text.endswith("after\n")
        assert "old" not in text
        assert all(f"results/{file.name}" in text for file in folder.glob("*.json"))
        assert picture.stat().st_size > 1000


def test_the_page_shows_the_results():
    """docs/benchmarks.md holds the table of the JSON files that are there."""
    page = (report.DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert report.markdown(report.read(report.HERE / "results")) in page
