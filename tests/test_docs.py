"""The code that the documentation shows does what the documentation says."""

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def test_the_worked_example_of_the_method_gives_its_numbers(capsys):
    page = (DOCS / "method.md").read_text("utf-8")
    code, output = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", page, re.S).groups()
    exec(code, {})
    assert capsys.readouterr().out == output


@pytest.mark.slow
def test_the_tour_runs(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((DOCS / "tour.ipynb").read_text("utf-8"))["cells"]
    exec("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"), {})
