"""The kernels as they are launched, as machine code: what must stay true of the binaries, with no GPU to run them.

Those of attention are in test_attention_machine_code.py.
"""

import pytest

KERNELS = {"embedding": 3, "layer_norm": 2, "masked_lm": 3, "sampling": 1}
# programs that a multiprocessor should hold: fewer are too few rows in flight to hide the latency of memory
PROGRAMS = {"embedding": 2, "layer_norm": 3, "masked_lm": 2, "sampling": 1}


@pytest.mark.parametrize("op", KERNELS)
def test_machine_code(op, static_rows):
    rows = static_rows(op)
    assert {row["failure"] for row in rows} == {""}
    assert len({row["kernel"] for row in rows}) >= KERNELS[op]
    assert {row["target"] for row in rows} == {"sm_80", "sm_90"}
    for row in rows:
        assert row["stack"] == 0, row
        assert row["shared"] <= {"sm_80": 163, "sm_90": 227}[row["target"]] * 1024
        assert row["programs"] >= PROGRAMS[op], row
    products = {row["kernel"] for row in rows if row["tensor"] and row["dtype"] == "bf16"}
    if op in ("embedding", "masked_lm"):
        assert products
        assert not [row for row in rows if row["kernel"] in products and row["dtype"] == "bf16" and not row["tensor"]]
