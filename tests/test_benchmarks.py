"""Each measurement at its smallest: it runs, and writes the JSON that the report reads."""

import json
import sys
import zipfile

import pytest
import torch
from amb.tokenizer import ENCODINGS, build_store

import train
from amb import demo
from amb.config import PRESETS, Config
from benchmarks import __main__ as command
from benchmarks import device, kernels, pack, step
from tests import scripts


@pytest.fixture(scope="module")
def midi(tmp_path_factory):
    return demo.write_corpus(tmp_path_factory.mktemp("midi"), 8)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Where all tests of this file write, and what the last one reports."""
    return tmp_path_factory.mktemp("results")


def tables_of(path) -> dict[str, list[dict]]:
    content = json.loads(path.read_text())
    assert {"device", "torch", "commit", "load"} <= set(content["machine"])
    for rows in content["tables"].values():
        for spread in (cell for row in rows for cell in row.values() if isinstance(cell, dict)):
            assert 0 < spread["lowest"] <= spread["median"] <= spread["highest"]
    return content["tables"]


def test_tokenizer(midi, results):
    out = results / "tokenizer-demo.json"
    command.main(["tokenizer", str(midi), "--files", "2", "--rounds", "1", "--out", str(out)])
    assert [row[""] for row in tables_of(out)["encode"]] == ["mido.MidiFile", *ENCODINGS]


def test_what_a_launch_compiles_to(tmp_path):
    """Recorded, not run; a kernel that needs more registers than it may have has a stack."""
    script = """
import torch, triton, triton.language as tl
from benchmarks.kernels import compiled, recorded_launches
@triton.jit
def multiply(a, b, c, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)), i[:, None] < n)
with recorded_launches('sm_90') as launches:
    a = torch.zeros(128, 128, dtype=torch.bfloat16)
    for options in ({"num_warps": 4}, {"num_warps": 4}, {"num_warps": 1, "maxnreg": 64}):
        multiply[(1,)](a, a, a.float(), 5, BLOCK=64, **options)
(plain, usage), (_, spilling) = (compiled(*launch, "sm_90") for launch in launches.values())
assert plain.metadata.num_warps == 4 and usage["tensor"] > 0 and usage["stack"] == 0 and spilling["stack"] > 0
"""
    path = tmp_path / "launch.py"  # Triton reads a kernel's source from its file
    path.write_text(script)
    scripts.run("-W", "ignore", path, env={"PYTHONPATH": str(scripts.ROOT)})


def test_packed_stores_come_back_to_the_bit(midi, tmp_path):
    stores = [tmp_path / name for name in ("octuple", "cp")]
    for store in stores:
        build_store([midi], store, store.name, workers=1, origins=store.name == "cp", progress=False)
    command.main(["pack", *map(str, stores), "--out", str(tmp_path / "packed")])
    command.main(["pack", str(tmp_path / "packed"), "--out", str(tmp_path / "again")])
    for store in stores:
        files = {file.name: file.read_bytes() for file in store.iterdir()}
        assert files == {file.name: file.read_bytes() for file in (tmp_path / "again" / store.name).iterdir()}
    size = (tmp_path / "packed").stat().st_size
    assert size < 0.25 * sum((store / "words.bin").stat().st_size for store in stores)


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil/x", "store/words.bin.0", "store/encrypted", "no store"])
def test_a_packed_file_may_be_hostile(name, tmp_path):
    path = tmp_path / "packed"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"no xz")
        archive.filelist[0].flag_bits |= name == "store/encrypted"
    with pytest.raises(ValueError, match="packed cannot be unpacked"):
        pack.unpack(path, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_device(midi, results, tmp_path, monkeypatch, capsys):
    """Every stage, in this process; pytest is left out."""

    def in_process(arguments, seconds, log):
        assert seconds > 0
        log.write_text("12 passed\n")
        if arguments[0] == "train.py":
            return scripts.call(train, monkeypatch, *arguments[1:], "--epochs", 1, "--epoch-size", 12)
        if arguments[1] == "benchmarks":
            command.main(list(map(str, arguments[2:])))
        return 0

    pytest.importorskip("transformers")
    assert all((scripts.ROOT / name).exists() for name in device.TESTS if name.startswith("tests/"))
    out, packed = results / "card", tmp_path / "packed"
    build_store([midi], tmp_path / "store", workers=1, progress=False)
    pack.pack([tmp_path / "store"], packed)
    monkeypatch.setattr(device, "execute", in_process)
    monkeypatch.setattr(kernels, "CHECKED", (kernels.Size(2, 40, 64), kernels.Size(3, 17, 96, 32)))
    tiny = ["--config", "tiny", "--lengths", "24", "--rounds", "1", "--minutes", "30"]
    arguments = ["device", *tiny, "--batch", "2", "--out", str(out), "--data", str(packed)]
    command.main(arguments)
    names = ["correctness", "tests", "operations", "attention-24"]
    names += ["step-tiny-ours", "step-tiny-peer", "profile", "training"]
    tables = {name: next(iter(tables_of(out / f"{name}.json").values())) for name in names}
    assert {row["verdict"] for row in tables["correctness"]} == {"right"}
    assert {row["dtype"] for row in tables["correctness"]} == {"float32", "float16", "bfloat16"}
    assert tables["tests"][0]["last line"] == "12 passed"
    attention = {row[""]: row for row in tables["attention-24"]}
    assert list(attention) == ["ours", "reference", "Hugging Face", "SDPA, flash", "ours, dropout 0.1"]
    assert attention["ours"]["times the first"]["median"] == 1
    assert all(attention[name]["error"] < 2e-2 for name in ("ours", "reference", "Hugging Face"))
    assert (out / "profile-run" / "trace.json").exists()
    assert (out / "train" / "best.pt").exists()
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if line.endswith(" s")] == names
    command.main(arguments)
    assert capsys.readouterr().out.count("there already") == len(names)


def test_wrong_results_end_the_check(monkeypatch):
    monkeypatch.setattr(kernels, "TOLERANCE", {torch.float32: 0.0})
    with pytest.raises(SystemExit, match="benchmarks: wrong results: layer_norm"):
        command.main(["kernels", "--op", "layer_norm", "--arch", "--rounds", "0", "--check"])


def test_stages_end_in_time_and_fail_alone(tmp_path, monkeypatch, capsys):
    def stages(*_):
        yield "wrong", 60, ["-c", "raise SystemExit('nothing works')"]
        yield "endless", 6, ["-c", "import time; time.sleep(60)"]
        yield "right", 60, ["-c", "print('all is well')"]
        yield "late", -1, ["-c", ""]

    monkeypatch.setattr(device, "stages", stages)
    monkeypatch.setattr(device, "AFTER", 60)  # no time is left for training
    command.main(["device", "--minutes", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for words in ("wrong: FAILED (1)", "nothing works", "endless: OUT OF TIME", "right: done", "late: no time left"):
        assert words in printed
    assert [file.name for file in tmp_path.glob("*.json")] == ["right.json"]
    assert tables_of(tmp_path / "right.json")["right"][0]["last line"] == "all is well"


def test_wrong_use_is_one_line(tmp_path, monkeypatch):
    for arguments in (["tokenizer", tmp_path / "nowhere"], ["step", "--data", tmp_path / "nowhere"]):
        with pytest.raises(SystemExit, match="benchmarks: .*nowhere"):
            command.main(list(map(str, arguments)))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="benchmarks: .*not installed"):
        command.main(["step", "--config", "tiny", "--only", "peer"])


def test_a_peer_without_relative_positions_is_refused(monkeypatch):
    """transformers 5 takes `position_embedding_type` and ignores it."""
    transformers = pytest.importorskip("transformers")
    settings = transformers.BertConfig
    monkeypatch.setattr(
        transformers, "BertConfig", lambda **changes: settings(**changes | {"position_embedding_type": "absolute"})
    )
    with pytest.raises(ValueError, match="no relative positions"):
        step.HuggingFaceEncoder(Config(**PRESETS["tiny"]), (9, 5))


def test_report(results, monkeypatch):
    """Of what the tests above wrote; and the page in the repository is that of the repository's results."""
    assert command.report(command.RESULTS) == (command.RESULTS / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(command, "RESULTS", results)
    command.main(["report"])
    text = (results / "README.md").read_text(encoding="utf-8")
    assert all(f"({file.name})" in text for file in results.glob("*.json"))
    assert "(card/profile.json)" in text
    assert (results / "card" / "attention.png").exists()
