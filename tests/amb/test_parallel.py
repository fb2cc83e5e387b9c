"""Several processes, as torchrun starts them but without its own seconds: stopped, resumed, killed, as one."""

import json
import signal
import socket
import subprocess
from pathlib import Path

import pytest

import finetune
import train
from amb import checkpoint, parallel
from tests import scripts
from tests.scripts import ROOT, different, metrics, wait_for_lines

# No dropout: each process draws its own. The last batch has one row for up to three processes, the book is updated
# after both epochs, and the last validation batch has two rows.
MODEL = {"notes": 32, "reach": 32, "dropout": 0.0, "attention_dropout": 0.0}
SETTINGS = {**MODEL, "dtype": "fp32", "epoch_size": 21, "epochs": 2, "valid_size": 6}
TINY = ["--config", "tiny", "--device", "cpu", "--log-every", "1", "--save-every", "2"]
TINY += [word for name, value in SETTINGS.items() for word in ("--" + name.replace("_", "-"), str(value))]
STEPS = 12


def start(count: int, *command) -> list[subprocess.Popen]:
    """`count` processes of one world; plain ones, without its variables, if it is one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(count):
        world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(scripts.start(*command, env=world if count > 1 else {}))
    return processes


def finish(processes: list[subprocess.Popen], status: int | None = 0, seconds: float = 300) -> list[tuple[str, str]]:
    """What each process printed, to stdout and to stderr; all must end with `status`, if one is given."""
    try:
        output = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    statuses = [process.returncode for process in processes]
    assert status is None or set(statuses) == {status}, (statuses, output)
    return output


def run(count: int, *command, status: int = 0) -> list[tuple[str, str]]:
    return finish(start(count, *command), status)


def assert_same_run(ours: Path, theirs: Path) -> None:
    """The same files; figures and states to 1e-5 relative."""
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    assert not different(metrics(ours), metrics(theirs), tolerance=1e-5)
    ours, theirs = (checkpoint.load(folder / "last.pt") for folder in (ours, theirs))
    for key in {"model", "optimizer", "progress", "field_weights", "book", "tally"} & theirs.keys():
        assert not different(ours[key], theirs[key], key, tolerance=1e-5)


@pytest.fixture(scope="module")
def whole_run(store, tmp_path_factory) -> Path:
    """One process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert scripts.call(train, patch, *TINY, "--data", store.path, "--out", folder) == 0
    epochs = [line for line in metrics(folder) if line["kind"] == "epoch"]
    assert epochs[0]["frozen"] > 0
    assert epochs[0]["frozen"] != epochs[1]["frozen"]
    assert epochs[-1]["step"] == STEPS
    return folder


def test_a_run_goes_on_in_other_numbers_of_processes_with_the_result_of_one(whole_run, midi_folder, tmp_path):
    """Also where the MIDI is not yet tokenized: the leader does it, the others wait."""
    folder, cache = tmp_path / "run", tmp_path / "cache"
    arguments = [*TINY, "--data", midi_folder, "--cache", cache, "--out", folder]
    for count, lines, how in ((2, 3, signal.SIGTERM), (1, 8, signal.SIGINT)):
        processes = start(count, ROOT / "train.py", *arguments)
        wait_for_lines(folder, lines, *processes)
        processes[-1].send_signal(how)  # a signal to one process stops all
        output = finish(processes, 130)
        assert f"--resume {folder}" in output[0][0]
        assert not any("Traceback" in err for _, err in output)
        assert lines <= len(metrics(folder)) < len(metrics(whole_run))
        arguments = ["--resume", folder, "--log-every", "1", "--device", "cpu"]
    (out, _), *others = run(3, ROOT / "train.py", *arguments)
    assert "3 processes on cpu" in out
    assert "most frequent" in out
    assert others == [("", "")] * 2  # only the leader prints
    assert_same_run(folder, whole_run)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_dead_process_ends_all_with_a_line_each(store, tmp_path, victim):
    folder = tmp_path / "run"
    processes = start(2, ROOT / "train.py", *TINY, "--data", store.path, "--out", folder)
    wait_for_lines(folder, 3, *processes)
    processes[victim].kill()
    output = finish(processes, None, seconds=60)
    assert [process.returncode for process in processes] == [-9 if rank == victim else 2 for rank in range(2)]
    for err in (err for rank, (_, err) in enumerate(output) if rank != victim):
        assert err.count("train.py: another of the 2 processes has ended") == 1, err
        assert "--resume" in err
        assert "Traceback" not in err
    assert 2 <= checkpoint.load(folder / "last.pt")["progress"]["step"] <= STEPS


def test_what_is_wrong_is_one_line(tmp_path):
    (_, leader), (_, other) = finish(start(2, ROOT / "train.py", *TINY, "--data", tmp_path / "nowhere"), 2)
    assert leader.count("train.py: ") == leader.count("nowhere does not exist") == 1, leader
    assert "Traceback" not in leader + other


@pytest.mark.parametrize("task", ["velocity", pytest.param("emotion", marks=pytest.mark.slow)])
def test_fine_tuning_in_several_processes(task, midi_folder, save_model, tmp_path, monkeypatch):
    pretrained = save_model(tmp_path / "pretrained.pt", changes=MODEL)
    command = ["--task", task, "--init", pretrained, "--data", midi_folder, "--class-weights", "--epochs", "2",
               "--batch", "4", "--epoch-size", "17", "--valid-size", "5", "--dtype", "fp32",
               "--cache", tmp_path / "cache", "--device", "cpu", "--mask", "0.12"]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    assert scripts.call(finetune, monkeypatch, *command, "--out", one) == 0
    assert run(2, ROOT / "finetune.py", *command, "--out", two)[1:] == [("", "")]
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert_same_run(two / "seed-0", one / "seed-0")
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (two, one))
    assert not different(ours["trainings"], theirs["trainings"], tolerance=1e-5)


@pytest.mark.slow
def test_torchrun_itself(whole_run, store, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run(1, *launcher, ROOT / "train.py", *TINY, "--data", store.path, "--out", tmp_path / "run")
    assert_same_run(tmp_path / "run", whole_run)


def test_a_world_that_never_met_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="RANK"), parallel.joined():
        pass
    assert parallel.run_script("x.py", lambda _: 0, None) == 2
    assert capsys.readouterr().err.startswith("x.py: ")


def test_shares_cover_a_batch(monkeypatch):
    for size, count in ((1, 5), (2, 5), (3, 2), (8, 64), (7, 0)):
        monkeypatch.setattr(parallel, "size", size)
        shares = []
        for rank in range(size):
            monkeypatch.setattr(parallel, "rank", rank)
            shares.append(range(count)[parallel.share(count)])
        assert [row for share in shares for row in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
