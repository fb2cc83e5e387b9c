"""Installed, the project claims no name but `amb`, and it runs where there is no Triton, as on macOS and Windows."""

import os
import subprocess
import sys
import zipfile

from amb import demo
from tests.scripts import ROOT, run


def test_a_wheel_works_beside_packages_called_kernels_and_tokenizer(tmp_path):
    """Whichever is installed first: the files of the wheel and theirs have no folder in common. And without Triton."""
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
    # importing one of these fails, as it does on Windows (and `triton` on macOS)
    block = "import sys\nfor name in ('triton', 'resource', 'fcntl'):\n    sys.modules[name] = None\n"
    (site / "sitecustomize.py").write_text(block)

    midi = demo.write_corpus(tmp_path / "midi", pieces=48)
    song, quick = next(midi.rglob("*.mid")), "--epochs 1 --epoch-size 8 --valid-size 8 --device cpu".split()  # noqa: SIM905
    use = "import sys, kernels, tokenizer, amb.kernels, amb.tokenizer; assert kernels.MINE and tokenizer.MINE\n"
    use += "amb.load('small').embed(sys.argv[1]); amb.load('composer').predict(sys.argv[1])"
    for command in (
        [ROOT / "train.py", "--config", "tiny", *quick, "--data", midi, "--out", "run"],
        [ROOT / "finetune.py", "--task", "composer", "--init", "run", *quick, "--data", midi, "--out", "composer"],
        ["-m", "amb", "melody", "small", song, "--out", "melody.mid"],
        ["-c", use, song],
    ):
        run(*command, cwd=elsewhere, env={"PYTHONPATH": str(site)})
