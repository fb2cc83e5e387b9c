"""Installed, the project claims no name but `amb`: `kernels` and `tokenizer` are other projects on PyPI."""

import os
import subprocess
import sys
import zipfile

from amb import demo
from tests.scripts import ROOT


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
        process = subprocess.run(
            [sys.executable, *map(str, command)], cwd=elsewhere, env=environment | {"PYTHONPATH": str(site)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
    assert (elsewhere / "melody.mid").is_file()
    assert (elsewhere / "run" / "best.pt").is_file()
