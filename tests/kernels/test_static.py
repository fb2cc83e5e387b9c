import importlib
import json
import os
import subprocess
import sys

import pytest
import triton
import triton.language as tl
from amb.kernels.static import Size, static_report

OPS = ("attention_cases", "embedding", "gelu", "layer_norm", "masked_lm", "masker_loss", "sampling")
TINY = Size(batch=1, length=40, width=64, words=(11, 5, 70))

SCRIPT = """
import json
import triton
import triton.language as tl
from amb.kernels.static import static_report


@triton.jit
def multiply(a, b, c, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def add(a, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(a + i, tl.load(a + i, mask=i < n) + 1, mask=i < n)


floats = {"a": "*bf16", "b": "*bf16", "c": "*fp32"}
reports = [
    static_report(multiply, floats, {"BLOCK": 64}, "sm_80"),
    static_report(multiply, floats, {"BLOCK": 64}, "sm_90"),
    static_report(multiply, floats, {"BLOCK": 128}, "sm_80", num_warps=1),
    static_report(add, {"a": "*fp32", "n": "i32:16"}, {"BLOCK": 256}, "sm_90"),
    static_report(multiply, floats, {"BLOCK": 48}, "sm_90"),
]
print(json.dumps([r._asdict() for r in reports]))
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    script = tmp_path_factory.mktemp("static") / "kernels_to_read.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-W", "ignore", script], env=environment, capture_output=True, check=True)
    return json.loads(run.stdout)


def test_tensor_cores_registers_and_occupancy(reports):
    ampere, hopper, _, plain, _ = reports
    for report in (ampere, hopper):
        assert report["tensor_instructions"] > 0
        assert report["stack_bytes"] == 0
        assert report["shared_bytes"] > 0
        assert 32 <= report["registers"] <= 255
        assert 1 <= report["programs_per_sm"] <= 16
    assert plain["tensor_instructions"] == plain["shared_bytes"] == 0
    assert plain["programs_per_sm"] == 16


def test_spills_show(reports):
    assert reports[2]["stack_bytes"] > 0


def test_what_the_compiler_refuses_is_said(reports):
    assert "power of 2" in reports[4]["failure"]


def test_an_interpreted_kernel_is_refused():
    @triton.jit
    def nothing(a):
        tl.store(a, 0)

    if isinstance(nothing, triton.JITFunction):
        pytest.skip("a GPU is present: kernels are compiled here")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        static_report(nothing, {"a": "*i32"}, {})


@pytest.mark.parametrize("op", OPS)
def test_what_is_timed_on_a_gpu_runs_and_is_right(op, device):
    cases = importlib.import_module(f"amb.kernels.{op}").device_cases(device, TINY, TINY)
    assert [case.name for case in cases] == (["sample"] if op == "sampling" else ["forward", "forward and backward"])
    for case in cases:
        case.run()
        assert case.floor_us > 0
        assert case.error() <= (0 if op == "sampling" else 2e-2)
