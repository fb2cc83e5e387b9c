"""The attention kernels as Triton compiles them, without a GPU: the layouts that their PTX trusts, and no spills.

`python -m tests.kernels.test_attention_machine_code [all]` prints what is tested; not in Triton's interpreter.
"""

import json
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product

import pytest

from tests import scripts
from tests.kernels import ptx

KERNELS = {"attend", "delta", "score_gradient", "input_gradient", "table_gradient"}
CASES = [*product(("sm_90", "sm_80"), ("bfloat16",), (64, 16), (0.1,))]
ALL = [
    *product(("sm_90", "sm_80"), ("bfloat16",), (64, 32, 16), (0.0, 0.1)),
    *product(("sm_90", "sm_80"), ("float32",), (64, 32), (0.1,)),
    ("sm_90", "bfloat16", 128, 0.1),
]


def compiled(target: str, dtype: str, width: int, dropout: float) -> list[dict]:
    import torch

    from benchmarks import kernels

    with kernels.recorded_launches(target) as launches:
        arguments = kernels.draw_attention(kernels.Size(1, 1024, 12 * width, width), getattr(torch, dtype))
        kernels.results(partial(kernels.attention, dropout=dropout, implementation="triton"), arguments)
    rows = []
    for source, options in launches.values():
        binary, usage = kernels.compiled(source, options, target)
        row = {"kernel": source.fn.__name__.removesuffix("_kernel"), "width": width, "dtype": dtype, "target": target}
        texts = {"layouts": layouts(binary.asm["ttgir"]), "words": words(binary.asm["ptx"])}
        rows.append(row | {"dropout": dropout} | usage | texts)
    return rows


def print_product_layouts():
    """Of 64 x 64 on four warps: sm_90's, sm_80's."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    def layouts():
        hopper: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
        ampere: gl.constexpr = gl.NVMMADistributedLayout([2, 0], warps_per_cta=[4, 1], instr_shape=[16, 8])
        gl.static_print(gl.to_linear_layout(hopper, [64, 64]))
        gl.static_print(gl.to_linear_layout(ampere, [64, 64]))

    layouts.__globals__["gl"] = gl
    triton.knobs.compilation.always_compile = True  # what comes from the cache prints nothing
    triton.compile(GluonASTSource(gluon.jit(layouts), {}, {}), target=GPUTarget("cuda", 90, 32))
    triton.knobs.compilation.always_compile = False


def layouts(ttgir: str) -> list[str]:
    """Of every operand and result of every inline PTX."""
    names = dict(re.findall(r"^(#\w+) = #ttg\.(.*)$", ttgir, re.MULTILINE))
    lines = [line for line in ttgir.splitlines() if "elementwise_inline_asm" in line]
    return [names[name] for line in lines for name in re.findall(r"tensor<64x64x\w+, (#\w+)>", line)]


def words(ptx: str) -> list[list[int]]:
    """Of each skew: which accumulators of a wgmma, lower and upper half, word 2 t + h is rounded from."""
    halves = {x: (low, high) for x, high, low in re.findall(r"cvt\.rn\.f16x2\.f32\s+(%\w+), (%\w+), (%\w+);", ptx)}
    accumulators = re.findall(r"wgmma\.mma_async\S*\s*\{([^}]*)\}", ptx)
    place = {x.strip(): i for registers in accumulators for i, x in enumerate(registers.split(","))}
    skews = [text for text in re.split("// end inline asm", ptx) if "selp.b32 y0_0" in text]
    found = []
    for text in skews:
        for h, t, far, near in re.findall(r"selp\.b32 y(\d)_(\d+), (%\w+), (%\w+), w0;", text):
            for octet, x in ((int(t) + int(h), near), (int(t) + int(h) + 2, far)):
                if x in halves and all(y in place for y in halves[x]):
                    found.append([2 * (octet % 8) + int(h), *(place[y] for y in halves[x])])
    return found


@pytest.fixture(scope="module", params=["", pytest.param("all", marks=pytest.mark.slow)])
def printed(request):
    command = ["-W", "ignore", "-m", "tests.kernels.test_attention_machine_code", *request.param.split()]
    return scripts.run(*command, cwd=scripts.ROOT)


@pytest.fixture(scope="module")
def rows(printed):
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def test_every_operand_of_the_ptx_has_the_layout_it_trusts(rows):
    trusted = {
        "sm_90": "versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 64, 16]",
        "sm_80": "versionMajor = 2, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 8]",
    }
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert bool(row["layouts"]) == (row["kernel"] != "delta" and row["dtype"] == "bfloat16")
        for layout in row["layouts"]:
            assert layout == f"nvidia_mma<{{{trusted[row['target']]}}}>", row


def test_both_layouts_are_the_simulator_s(printed):
    """Row and column that each bit of a register's number stands for, of a thread's in its warp, and of a warp's."""
    printed = re.findall(r"reg_bases=(.*), lane_bases=(.*), warp_bases=(.*), block_bases=\[\]", printed)
    assert len(printed) == 2
    registers = [[int(x[0]) for x in ptx.places(1 << bit)] for bit in range(5)]
    threads = [[int(x[1 << bit]) for x in ptx.places(0)] for bit in range(7)]
    for bases in printed:
        assert [json.loads(x) for x in bases] == [registers, threads[:5], threads[5:]]


def test_the_words_of_a_skew_are_the_accumulators_in_order(rows):
    checked = [word for row in rows if row["kernel"] == "attend" for word in row["words"]]
    assert len(checked) >= 50
    for word, low, high in checked:
        assert (low, high) == (2 * word, 2 * word + 1)


def test_no_spills(rows):
    """None up to D = 64 on sm_90 and, forward, on sm_80."""
    for row in rows:
        known = 64 if row["width"] == 128 else 128 if row["target"] == "sm_80" and row["kernel"] != "attend" else 0
        assert row["stack"] <= known, row


if __name__ == "__main__":
    print_product_layouts()
    with ProcessPoolExecutor() as pool:
        for some in pool.map(compiled, *zip(*(ALL if sys.argv[1:] else CASES), strict=True)):
            print(*map(json.dumps, some), sep="\n", flush=True)
