"""The shipped attention kernels as machine code: what must stay true of the binaries, with no GPU to run them."""

import pytest
from amb.kernels.static import SHARED_LIMIT

# programs per multiprocessor that the tiles were chosen for, at D = 64
DESIGNED = {
    "position_scores": {"sm_80": 4, "sm_90": 4},
    "attend": {"sm_80": 2, "sm_90": 4},
    "score_gradient": {"sm_80": 2, "sm_90": 2},
    "input_gradient": {"sm_80": 4, "sm_90": 4},
    "table_gradient": {"sm_80": 4, "sm_90": 4},
    "delta": {"sm_80": 8, "sm_90": 8},
}


@pytest.fixture(scope="module")
def rows(static_rows):
    return static_rows("attention")


def test_every_width_compiles_for_both_chips(rows):
    assert {(r["kernel"].split()[0], r["target"]) for r in rows} == {(k, t) for k, d in DESIGNED.items() for t in d}
    compiled = {tuple(r["kernel"].split()[1:3]) for r in rows}
    assert compiled == {(f"D={width}", dtype) for width in (32, 64, 128) for dtype in ("bf16", "fp32")}
    assert not [r["failure"] for r in rows if r["failure"]]


def test_no_spills(rows):
    assert not {(r["kernel"], r["target"]): r["stack_bytes"] for r in rows if r["stack_bytes"]}


def test_tensor_cores_do_the_products(rows):
    products = [r for r in rows if "bf16" in r["kernel"] and not r["kernel"].startswith("delta")]
    assert all(r["tensor_instructions"] for r in products)


def test_shared_memory_fits(rows):
    assert all(r["shared_bytes"] <= SHARED_LIMIT[r["target"]][1] for r in rows)


def test_designed_occupancy(rows):
    for row in rows:
        name, width, dtype = row["kernel"].split()[:3]
        designed = DESIGNED[name][row["target"]] if (width, dtype) == ("D=64", "bf16") else 1
        assert row["programs_per_sm"] >= designed, row
