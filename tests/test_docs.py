"""The code that the documentation shows does what the documentation says."""

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def test_the_worked_example_of_the_method_gives_its_numbers(capsys):
    code, output = re.search(
        r"```python\n(.*?)```\n\n```\n(.*?)```", (DOCS / "method.md").read_text("utf-8"), re.S
    ).groups()
    exec(code, {})
    assert capsys.readouterr().out == output


@pytest.mark.slow
def test_the_tour_runs(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((DOCS / "tour.ipynb").read_text("utf-8"))["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["selected"].sum() >= names["masked"].sum() > 0
