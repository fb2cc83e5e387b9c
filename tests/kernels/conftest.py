import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels are tested: the GPU if there is one, else the CPU, in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def static_rows(tmp_path_factory) -> Callable[[str], list[dict]]:
    """`static_rows("attention")`: what `python -m amb.kernels --op attention` reports, from a process of its own."""

    @functools.cache
    def rows(op: str) -> list[dict]:
        file = tmp_path_factory.mktemp("static") / f"{op}.json"
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "-W", "ignore", "-m", "amb.kernels", "--op", op, "--json", str(file)]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return json.loads(file.read_text())["static"]

    return rows
