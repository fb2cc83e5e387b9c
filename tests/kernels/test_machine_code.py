"""The kernels as they are launched, as machine code: what must stay true of the binaries, with no GPU to run them.

Those of attention are in test_attention_machine_code.py.
"""

import json

import pytest

from tests import scripts

KERNELS = {"embedding": 2, "layer_norm": 2, "masked_lm": 2, "sampling": 1}
# programs that a multiprocessor should hold: fewer are too few rows in flight to hide the latency of memory
PROGRAMS = {"embedding": 2, "layer_norm": 3, "masked_lm": 2, "sampling": 1}


@pytest.mark.parametrize(("target", "shared"), [("sm_90", 227), pytest.param("sm_80", 163, marks=pytest.mark.slow)])
def test_machine_code(target, shared, tmp_path):
    file = tmp_path / "rows.json"
    command = ["-m", "benchmarks", "kernels", "--arch", target, "--rounds", 0, "--out", file, "--op", *KERNELS]
    scripts.run("-W", "ignore", *command, cwd=scripts.ROOT)
    rows = json.loads(file.read_text())["tables"]["machine code"]
    for op, count in KERNELS.items():
        assert len({row["kernel"] for row in rows if row["op"] == op}) >= count
    for row in rows:
        assert row["stack"] == 0, row
        assert row["shared"] <= shared * 1024
        assert row["programs"] >= PROGRAMS[row["op"]], row
        assert row["tensor"] or row["op"] != "masked_lm" or row["dtype"] == "fp32", row
