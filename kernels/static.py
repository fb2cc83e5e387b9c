"""What a Triton kernel becomes, without a GPU: compile it to machine code and read the registers, the spills, the
shared memory and the tensor-core instructions out of the binary.

Each op lists its shipped configurations as `static_cases() -> list[Case]`, and what can be timed on a GPU as
`device_cases(...) -> list[DeviceCase]`; nothing here knows any op. `python -m amb.kernels` prints the table.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Case(NamedTuple):
    """One shipped configuration of one kernel.

    `signature` maps every argument that is no constexpr to its type, as "*bf16", "i32", "fp32"; ":16" after an integer
    says it is a multiple of 16, and pointers are taken as 16-byte aligned, as torch allocates them. `targets` are
    those it ships for; `floor_us` is the least time at the paper's size on an H100, from flops and bytes (0: unstated).
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    floor_us: float = 0.0
    targets: tuple[str, ...] = ("sm_80", "sm_90")


class DeviceCase(NamedTuple):
    """Something to time on the GPU: `run()` launches it; `error()` is its relative error in norm against float64.

    Inputs are drawn at the first `run()` and at each `error()`: a list of cases holds no memory.
    """

    name: str
    run: Callable[[], Any]
    error: Callable[[], float]
    floor_us: float = 0.0


class Size(NamedTuple):
    """How much a device case computes: sequences, notes each, the model's width, and the words of each field."""

    batch: int
    length: int
    width: int
    words: tuple[int, ...]


PAPER = Size(32, 1024, 768, (262, 134, 135, 262, 134, 38, 260, 55))
CHECKED = PAPER._replace(batch=2, length=500)  # where float64 is quick; no multiple of a tile


def training_cases(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    draw: Callable[[Size], dict[str, Any]],
    floors_us: tuple[float, float],
    timed: Size,
    checked: Size,
    **training: Any,
) -> list[DeviceCase]:
    """Forward, and forward with backward, of `op(**draw(timed), **training)`; `floors_us` are each pass's own.

    `draw` gives arguments by name, with gradients required where they are wanted. The error is that of
    `op(**draw(checked))` against `reference` on the same numbers in float64.
    """
    op = partial(op, implementation="triton")

    @cache
    def prepared() -> tuple[dict[str, Any], Tensor]:
        arguments = draw(timed)
        return arguments, torch.randn_like(op(**arguments))

    def forward() -> Tensor:
        return op(**prepared()[0], **training)

    def both() -> list[Tensor]:
        arguments, grad = prepared()
        return _with_gradients(op(**arguments, **training), arguments, grad)

    def error(count: int | None = None) -> float:
        arguments = draw(checked)
        out = op(**arguments)
        grad = torch.randn_like(out)
        exact = {name: _in_float64(value) for name, value in arguments.items()}
        results = _with_gradients(out, arguments, grad)
        truth = _with_gradients(reference(**exact), exact, grad.double())
        errors = [(a.double() - b).norm() / b.norm() for a, b in zip(results, truth, strict=True)]
        return max(x.item() for x in errors[:count])

    return [
        DeviceCase("forward", forward, partial(error, 1), floors_us[0]),
        DeviceCase("forward and backward", both, error, sum(floors_us)),
    ]


def _with_gradients(out: Tensor, arguments: dict[str, Any], grad: Tensor) -> list[Tensor]:
    leaves = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _in_float64(x: Any) -> Any:
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


class Report(NamedTuple):
    """What the binary says. Registers are per thread; bytes per thread (stack: anything but 0 is spilling) or program.

    `tensor_instructions` counts the instructions in the code, not those executed; `programs_per_sm` is how many
    programs registers, shared memory and warps let reside. A failed compilation leaves zeros and says why in `failure`.
    """

    target: str
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    tensor_instructions: int = 0
    shuffles: int = 0
    programs_per_sm: int = 0
    failure: str = ""


# shared memory in bytes: per multiprocessor, and the most one program may ask for
SHARED_LIMIT = {
    "sm_80": (164 << 10, 163 << 10),
    "sm_86": (100 << 10, 99 << 10),
    "sm_89": (100 << 10, 99 << 10),
    "sm_90": (228 << 10, 227 << 10),
    "sm_100": (228 << 10, 227 << 10),
    "gfx942": (64 << 10, 64 << 10),
}


def static_report(
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    target: str = "sm_90",
    num_warps: int = 4,
    num_stages: int = 2,
) -> Report:
    """Compile one `@triton.jit` kernel for "sm_80", "sm_90", "sm_100", "gfx942", ... and read its machine code.

    Raises RuntimeError where the kernel was decorated under TRITON_INTERPRET=1 (it has no machine code). What the
    compiler refuses is reported in `failure`, not raised.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("compile in a process without TRITON_INTERPRET: an interpreted kernel has no machine code")
    options = {"num_warps": num_warps, "num_stages": num_stages}
    try:
        compiled = triton.compile(_source(kernel, signature, constexprs), target=_target(target), options=options)
    except Exception as error:  # the compiler's passes raise many kinds; a target may simply not be supported
        return Report(target, failure=f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}")
    shared = compiled.metadata.shared
    if target.startswith("sm_"):
        registers, stack, tensor, shuffles = _read_cubin(compiled.asm["cubin"])
        allocated = -(-registers // 8) * 8 * 32 * num_warps
        residents = min(65536 // max(allocated, 1), 64 // num_warps, 32)
    else:
        registers, stack, tensor, shuffles = _read_amdgcn(compiled.asm["amdgcn"])
        residents = min(512 // max(-(-registers // 8) * 8, 1), 8) * 4 // num_warps
    per_multiprocessor, _ = SHARED_LIMIT.get(target, SHARED_LIMIT["sm_90"])
    residents = min(residents, per_multiprocessor // (shared + 1024))
    return Report(target, registers, stack, shared, tensor, shuffles, residents)


def _target(name: str) -> GPUTarget:
    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)


def _source(kernel: Any, signature: dict[str, str], constexprs: dict[str, Any]) -> ASTSource:
    types, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constexprs:
            types[name] = "constexpr"
            continue
        kind, _, divisor = signature[name].partition(":")
        types[name] = kind
        if divisor == "16" or kind.startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature=types, constexprs=constexprs, attrs=attributes)


def _read_cubin(cubin: bytes) -> tuple[int, int, int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", run.stdout)
    tensor = re.findall(r"\b(?:HGMMA|HMMA|QGMMA|IGMMA|IMMA|DMMA|UTC\w*MMA)\b", run.stdout)
    return int(usage[1]), int(usage[2]), len(tensor), len(re.findall(r"\bSHFL\b", run.stdout))


def _read_amdgcn(assembly: str) -> tuple[int, int, int, int]:
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    stack = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    tensor = re.findall(r"\bv_mfma_\w+", assembly)
    shuffles = re.findall(r"\b(?:ds_b?permute\w*|v_permlane\w*)|_dpp\b", assembly)
    return int(registers[1]), int(stack[1]), len(tensor), len(shuffles)
