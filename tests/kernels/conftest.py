import functools
import json
from collections.abc import Callable

import pytest
import torch

from tests import scripts


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels are tested: the GPU if there is one, else the CPU, in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def static_rows(tmp_path_factory) -> Callable[[str], list[dict]]:
    """`static_rows("attention")`: the machine code that `python -m benchmarks kernels` reports of an operation."""

    @functools.cache
    def rows(op: str) -> list[dict]:
        file = tmp_path_factory.mktemp("static") / f"{op}.json"
        command = ["-W", "ignore", "-m", "benchmarks", "kernels", "--op", op, "--rounds", 0, "--out", file]
        scripts.run(*command, cwd=scripts.ROOT)
        return json.loads(file.read_text())["tables"]["machine code"]

    return rows
