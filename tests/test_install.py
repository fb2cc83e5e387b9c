"""Installed, the project claims no name but `amb`; and it runs where there is no Triton, as on macOS and Windows."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from amb import demo
from tests.scripts import ROOT


def run_without(command: list, folder: Path, path: Path) -> None:
    """`python COMMAND` in a folder, with `path` and what is installed to import from; it must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, command)]
    process = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_a_wheel_works_beside_packages_called_kernels_and_tokenizer(tmp_path):
    """Whichever is installed first: the files of the wheel and theirs have no folder in common."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    places = ["egg_info", "--egg-base", tmp_path, "build", "--build-base", tmp_path / "build"]  # none in the checkout
    build = [sys.executable, "setup.py", "-q", *places, "bdist_wheel", "--dist-dir", tmp_path]
    subprocess.run(build, cwd=ROOT, check=True, env=environment, capture_output=True)
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    assert sorted(path.name.split("-")[0] for path in site.iterdir()) == ["adversarial_midibert", "amb"]
    for name in ("kernels", "tokenizer"):
        (site / name).mkdir()
        (site / name / "__init__.py").write_text("MINE = True\n")

    song = next(demo.write_corpus(tmp_path / "midi", pieces=16).rglob("*.mid"))
    train = "--config tiny --epochs 1 --epoch-size 8 --valid-size 8 --device cpu --out run".split()  # noqa: SIM905
    commands = (
        ["-m", "amb", "melody", "small", song, "--out", "melody.mid"],
        [ROOT / "train.py", *train, "--data", tmp_path / "midi"],
        ["-c", "import kernels, tokenizer, amb.kernels, amb.tokenizer; assert kernels.MINE and tokenizer.MINE"],
    )
    for command in commands:
        run_without(command, elsewhere, site)
    assert (elsewhere / "melody.mid").is_file()
    assert (elsewhere / "run" / "best.pt").is_file()


def test_everything_runs_without_triton_and_unix_modules(tmp_path):
    """Importing one of these fails, as it does on Windows (and `triton` on macOS)."""
    block = "import sys\nfor name in ('triton', 'resource', 'fcntl'):\n    sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(block + f"sys.path.append({str(ROOT)!r})\n")
    midi = demo.write_corpus(tmp_path / "midi", pieces=48)
    song, quick = next(midi.rglob("*.mid")), "--epochs 1 --epoch-size 8 --valid-size 8 --device cpu".split()  # noqa: SIM905
    commands = (
        [ROOT / "train.py", "--config", "tiny", *quick, "--data", midi, "--out", "run"],
        [ROOT / "finetune.py", "--task", "composer", "--init", "run", *quick, "--data", midi, "--out", "composer"],
        ["-m", "amb", "melody", "small", song, "--out", "melody.mid"],
        ["-m", "amb", "embed", "small", song, "--out", "vectors.npz"],
        ["-m", "amb", "info", "composer"],
    )
    for command in commands:
        run_without(command, tmp_path, tmp_path)
