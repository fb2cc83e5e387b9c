"""The kernels: what their launches compile to, which needs no GPU, and how fast and how right each operation is.

    python -m benchmarks kernels [--op NAME] [--arch sm_80 sm_90] [--rounds 5] [--check] [--config small] [--out FILE]

The first table is the machine code: every operation runs forward and backward on CPU tensors while its launches are
recorded instead of executed, and what Triton would compile for them is compiled and read. The second compares the
operations with peers on random data, without dropout: on CUDA the Triton kernels, on a CPU the CPU's path. Errors are
against the reference in float64, the largest of output and gradients; shares are of the least time that an H100 needs
(3.0 TB/s, 790 bf16 TFLOP/s measured; CUDA only). `--rounds 0` omits the second table, `--arch` without a name the
first. `--check` adds a table of errors in every dtype, on CUDA also with dropout.

The attention of `Hugging Face` builds an L x L x D tensor of distances. `flex` is FlexAttention with both position
terms computed beforehand as L x (2L-1) products. `SDPA` is PyTorch's attention without any position term: another
function, but what libraries reach for plain attention.
"""

import argparse
import itertools
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from amb.kernels import attention_forward, philox
from amb.kernels.attention_check import TOLERANCE
from amb.kernels.attention_cpu import relative_attention_reference
from amb.kernels.embedding import compound_embedding_reference
from amb.kernels.layer_norm import residual_layer_norm_reference
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

from amb import kernels
from amb.speed import CudaGraph
from benchmarks.timing import DEVICE, parse_sizes, take_turns, write

WORDS = (262, 134, 135, 262, 134, 38, 260, 55)  # octuple's, of each field


class Size(NamedTuple):
    """How much an operation computes: sequences, notes each, the model's width and a head's."""

    batch: int
    length: int
    width: int
    head: int = 64


# what is compiled: every width of heads, both widths of models, both lengths that the kernels are tuned for
COMPILED = Size(1, 1024, 768, 64), Size(1, 1024, 256, 32), Size(1, 4096, 256, 128)
CHECKED = Size(2, 500, 256), Size(3, 77, 96, 32)  # where float64 is quick; no multiples of a tile
SHARED_KIB = {"sm_80": 164, "sm_86": 100, "sm_89": 100}  # of a multiprocessor; 228 of any other
CHANCES = ("THRESHOLD", "SCALE", "LOW", "SPAN", "MASKED", "CHANGED")  # constants that do not shape the code

Arguments = dict[str, Any]  # by name
Function = Callable[..., Tensor]


class Op(NamedTuple):
    """One operation: `draw(size, dtype)` makes its arguments, those with a gradient as leaves; `run`, `reference` and
    `peers` take them. `floor_us(size)` is the least time of forward and backward in bf16 on an H100.

    If there is a `mask`, a GPU's dropout of (shape, probability, seed, stream, like), `run` takes `dropout`, and
    `reference` the mask as `keep`.
    """

    draw: Callable[[Size, torch.dtype], Arguments]
    run: Function
    reference: Function
    floor_us: Callable[[Size], float]
    mask: Function | None = None
    peers: dict[str, Function] = {}


def activation_us(size: Size) -> float:
    """To move one tensor of activations."""
    return 2 * math.prod(size[:3]) / 3.0e6


def product_us(size: Size, columns: int) -> float:
    """To multiply the activations by a matrix of so many columns."""
    return 2 * math.prod(size[:3]) * columns / 790e6


def draw_words(size: Size) -> Tensor:
    return torch.stack([torch.randint(n, size[:2]) for n in WORDS], -1)


def draw_attention(size: Size, dtype: torch.dtype) -> Arguments:
    shape = (size.batch, size.length, 3, size.width // size.head, size.head)
    q, k, v = (x.requires_grad_() for x in torch.randn(shape).to(dtype).permute(2, 0, 3, 1, 4))
    distance = torch.randn(2 * size.length - 1, size.head).to(dtype).requires_grad_()
    return dict(q=q, k=k, v=v, distance=distance, lengths=torch.full(size[:1], size.length))


class _Projection(torch.autograd.Function):
    """q, k, v, three views, as the projection [B, L, 3, H, D] that they are of; without copies, as in a model."""

    @staticmethod
    def forward(ctx, q, k, v):
        return q._base.detach()

    @staticmethod
    def backward(ctx, grad):
        return tuple(grad.permute(2, 0, 3, 1, 4))


def attention(q, k, v, distance, lengths, **options) -> Tensor:
    return kernels.relative_attention(_Projection.apply(q, k, v), distance, lengths, **options).transpose(1, 2)


def eager_attention(q, k, v, distance, lengths) -> Tensor:
    """Hugging Face's `relative_key_query`, of whole sequences only, as all the peers."""
    place = torch.arange(q.shape[2], device=q.device)
    positions = distance[place[:, None] - place + q.shape[2] - 1]
    logits = q @ k.mT
    logits = logits + torch.einsum("bhld,lrd->bhlr", q, positions) + torch.einsum("bhrd,lrd->bhlr", k, positions)
    return (logits / math.sqrt(q.shape[-1])).softmax(-1) @ v


def flexible_attention(q, k, v, distance, lengths) -> Tensor:
    """FlexAttention with precomputed position products, to be compiled."""
    length, scale = q.shape[2], 1 / math.sqrt(q.shape[-1])
    from_query, from_key = q @ distance.T * scale, k @ distance.T * scale

    def add_positions(score, b, h, i, j):
        return score + from_query[b, h, i, i - j + length - 1] + from_key[b, h, j, i - j + length - 1]

    return flex_attention.flex_attention(q, k, v, score_mod=add_positions)


def plain_attention(q, k, v, distance, lengths, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v) + 0 * distance.sum()  # which needs a gradient


def draw_embedding(size: Size, dtype: torch.dtype) -> Arguments:
    words = draw_words(size)
    offsets = torch.tensor([0, *WORDS[:-1]]).cumsum(0)
    table = torch.randn(sum(WORDS), size.width).to(dtype).requires_grad_()
    bias, weight, norm_bias = (torch.randn(size.width, requires_grad=True) for _ in range(3))
    return dict(words=words, table=table, offsets=offsets, bias=bias, weight=weight, norm_bias=norm_bias)


def draw_layer_norm(size: Size, dtype: torch.dtype) -> Arguments:
    x, y = (torch.randn(size[:3]).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(size.width, requires_grad=True) for _ in range(2))
    return dict(x=x, y=y, weight=weight, bias=bias)


def draw_masked_lm(size: Size, dtype: torch.dtype) -> Arguments:
    return dict(
        hidden=torch.randn(size[:3]).to(dtype).requires_grad_(),
        weight=(torch.randn(sum(WORDS), size.width) * size.width**-0.5).requires_grad_(),
        bias=torch.randn(sum(WORDS)).requires_grad_(), words=draw_words(size),
        selected=torch.rand(size[:2]) < 0.15, lengths=torch.full(size[:1], size.length),
        field_weights=torch.rand(len(WORDS)).softmax(0), sizes=WORDS,
    )  # fmt: skip


def masked_lm_loss(**arguments) -> Tensor:
    return kernels.masked_lm(**arguments).loss


def draw_sampling(size: Size, dtype: torch.dtype) -> Arguments:
    values = torch.tensor(WORDS) - 1
    lengths = torch.randint(size.length // 2, size.length + 1, size[:1])
    frozen = torch.randint(256, (size.batch, -(-size.length // 8)), dtype=torch.uint8)
    words, scores = draw_words(size), torch.rand(size[:2])
    return dict(words=words, lengths=lengths, mask_word=values, values=values, scores=scores, frozen=frozen)


def sampled_words(**arguments) -> Tensor:
    return kernels.adversarial_sample(**arguments, seed=1).words


ATTENTION_PEERS = {"Hugging Face": eager_attention}
ATTENTION_PEERS["SDPA, flash"] = partial(plain_attention, backend=SDPBackend.FLASH_ATTENTION)
if DEVICE.type == "cuda":
    ATTENTION_PEERS["SDPA, cuDNN"] = partial(plain_attention, backend=SDPBackend.CUDNN_ATTENTION)
    ATTENTION_PEERS["flex, compiled"] = torch.compile(flexible_attention)
OPERATIONS = {
    "attention": Op(
        draw_attention, attention, relative_attention_reference, lambda size: 15 * product_us(size, size.length),
        philox.attention_mask, ATTENTION_PEERS,
    ),
    "embedding": Op(
        draw_embedding, kernels.compound_embedding, partial(compound_embedding_reference, eps=1e-12),
        lambda size: 3 * activation_us(size) + product_us(size, sum(WORDS)), philox.row_mask,
    ),
    "layer_norm": Op(
        draw_layer_norm, kernels.residual_layer_norm, partial(residual_layer_norm_reference, eps=1e-12),
        lambda size: 8 * activation_us(size), philox.row_mask,
    ),
    "masked_lm": Op(
        draw_masked_lm, masked_lm_loss, partial(masked_lm_loss, implementation="reference"),
        lambda size: 4 * product_us(size, sum(WORDS)),
    ),
    "sampling": Op(
        draw_sampling, sampled_words, partial(sampled_words, implementation="reference"),
        lambda size: 2 * size.batch * size.length * len(WORDS) * 8 / 3.0e6,
    ),
}  # fmt: skip


def results(function: Function, arguments: Arguments, grad: Tensor | None = None) -> dict[str, Tensor]:
    """The output, and by name the gradients of all that requires them, for `grad` (default: ones) of the output."""
    out = function(**arguments)
    leaves = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}
    if not leaves:
        return {"out": out}
    grad = torch.ones_like(out) if grad is None else grad.to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def relative_errors(op: Op, function: Function, dtype: torch.dtype, size: Size, dropout: float = 0) -> dict[str, float]:
    """Relative errors in norm of the output and of each argument's gradient, against the reference in float64."""
    with DEVICE:
        arguments = op.draw(size, dtype)
    exact = {
        name: x.detach().double().requires_grad_(x.requires_grad) if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in arguments.items()
    }
    out, reference = op.reference(**exact), op.reference
    grad = torch.randn(out.shape, device=DEVICE).to(dtype)
    if not out.dim():  # a mean: fp16 cannot hold its gradients
        grad *= size.batch * size.length
    if dropout:
        shape = out.shape if op.mask is philox.row_mask else (*out.shape[:3], size.length)
        keep = op.mask(shape, dropout, 1, 0, out)
        function, reference = partial(function, dropout=dropout, seed=1), partial(reference, keep=keep)
    ours, exact = results(function, arguments, grad), results(reference, exact, grad)
    return {name: ((x.double() - exact[name]).norm() / exact[name].double().norm()).item() for name, x in ours.items()}


def checked_rows(name: str, op: Op) -> list[dict]:
    """A row of errors for each dtype, size and, on CUDA, with and without dropout."""
    rows, chances = [], (0.0, 0.1) if op.mask and DEVICE.type == "cuda" else (0.0,)
    for dtype, size, dropout in itertools.product(TOLERANCE, CHECKED, chances):
        errors = relative_errors(op, op.run, dtype, size, dropout)
        worst = max(errors, key=errors.get)
        right = all(error <= TOLERANCE[dtype] for error in errors.values())  # false for NaN
        rows.append({
            "op": name, "dtype": str(dtype).removeprefix("torch."), "notes": f"{size.batch} x {size.length}",
            "dropout": dropout, "error": errors[worst], "of": worst, "verdict": "right" if right else "WRONG",
        })  # fmt: skip
    return rows


@contextmanager
def recorded_launches(target: str) -> Iterator[dict[str, tuple[ASTSource, dict]]]:
    """Triton launches in the block are not run. They are kept, each once: what Triton would compile for them on a
    device such as sm_90, and with which options.

    Raises ValueError under TRITON_INTERPRET, where kernels have no machine code.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("machine code needs a process without TRITON_INTERPRET")
    launches = {}
    backend = make_backend(GPUTarget("cuda", 90, 32))  # the types of arguments are the same for all

    def record(kernel, *arguments, grid, warmup, **named):
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, types, options = binder(*arguments, **named)
        _, signature, constants, attributes = kernel._pack_args(backend, named, bound, types, options)
        options = {name: value for name, value in named.items() if name not in kernel.arg_names}
        key = str((kernel.__name__, signature, constants, attributes, options))
        launches[key] = ASTSource(kernel, signature, constants, attributes), options

    capability = divmod(int(target[3:]), 10)
    with (
        patch.object(triton.JITFunction, "run", record),
        patch.object(attention_forward, "capability", lambda _: capability),
    ):
        yield launches


def compiled_rows(name: str, dtype: torch.dtype, target: str) -> list[dict]:
    """A row of each kernel that an operation launches in training at any of the sizes `COMPILED`; programs are those
    that registers, shared memory and warps let a multiprocessor hold."""
    op, rows = OPERATIONS[name], []
    run = partial(op.run, implementation="triton", **{"dropout": 0.1} if op.mask else {})
    with recorded_launches(target) as launches:
        for size in COMPILED:
            results(run, op.draw(size, dtype))
    for source, options in launches.values():
        kernel = source.fn
        constants = {kernel.arg_names[path[0]]: value for path, value in source.constants.items()}
        shown = " ".join(f"{key}={constants[key]}" for key in constants if key.isupper() and key not in CHANCES)
        first = next(kind[1:] for kind in source.signature.values() if re.match(r"\*(bf|fp)", kind))  # tensor's type
        binary, usage = compiled(source, options, target)
        warps = binary.metadata.num_warps
        by_registers = 65536 // (-(-usage["registers"] // 8) * 8 * 32 * warps)
        by_memory = (SHARED_KIB.get(target, 228) << 10) // (usage["shared"] + 1024)  # 1 KiB a program is the driver's
        rows.append({
            "op": name, "kernel": kernel.__name__, "dtype": first, "constants": shown, "target": target,
            "warps": warps, "stages": binary.metadata.num_stages, **usage,
            "programs": min(by_registers, by_memory, 64 // warps, 32),
        })  # fmt: skip
    return rows


def compiled(source: ASTSource, options: dict, target: str) -> tuple[CompiledKernel, dict[str, int]]:
    """The kernel for a device such as sm_90, and what it uses: registers and bytes of stack (which are spills) of a
    thread, bytes of shared memory of a program, and how many tensor-core instructions its code has."""
    binary = triton.compile(source, target=GPUTarget("cuda", int(target[3:]), 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        run = subprocess.run([tool, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", run.stdout).groups())
    tensor = len(re.findall(r"\b(?:HGMMA|HMMA|QGMMA|IGMMA|IMMA|DMMA)\b", run.stdout))
    return binary, dict(registers=registers, stack=stack, shared=binary.metadata.shared, tensor=tensor)


def measured_rows(name: str, op: Op, size: Size, dtype: torch.dtype, rounds: int) -> list[dict]:
    """Forward and backward of an operation and its peers, in turns; forward alone where nothing has a gradient."""
    functions, cuda = {"ours": op.run, "reference": op.reference, **op.peers}, DEVICE.type == "cuda"
    if cuda and not op.peers:
        functions["reference, compiled"] = torch.compile(op.reference)
    if op.mask:
        functions["ours, dropout 0.1"] = partial(op.run, dropout=0.1)
    with DEVICE:
        arguments = op.draw(size, dtype)
    errors, runs, rows = {}, {}, []
    for key, function in functions.items():
        try:
            if not key.startswith("SDPA") and "dropout" not in key:
                errors[key] = max(relative_errors(op, function, dtype, CHECKED[0]).values())
            run = partial(results, function, arguments)
            if cuda:  # launches one by one would wait for Python
                run = CudaGraph(run)
                for _ in range(CudaGraph.WARM_UP + 1):
                    run()
            runs[key] = run
        except Exception as error:  # of memory or a compiler: the others are measured all the same
            rows.append({"op": name, "": key, "failure": f"{type(error).__name__}: {str(error)[:80]}"})
    for key, row in take_turns(runs, rounds).items():
        share = op.floor_us(size) / 1e3 / row["ms"]["median"] if cuda else None
        rows.append({"op": name, "": key, **row, "error": errors.get(key), "share of floor": share})
    return rows


def main(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("--op", choices=OPERATIONS, nargs="+", default=list(OPERATIONS), help="default: all")
    parser.add_argument("--arch", nargs="*", default=["sm_80", "sm_90"], help="compiled for; default: sm_80 sm_90")
    parser.add_argument("--check", action="store_true", help="a table of errors in every dtype")
    options, config, dtype = parse_sizes(parser, arguments)
    ops, tables = [(name, OPERATIONS[name]) for name in options.op], {}
    if options.arch:
        tasks = itertools.product(options.op, (torch.bfloat16, torch.float32), options.arch)
        with ProcessPoolExecutor() as pool:
            rows = [row for rows in pool.map(compiled_rows, *zip(*tasks, strict=True)) for row in rows]
        tables["machine code"] = list({str(row): row for row in rows}.values())  # sampling has but one dtype
    if options.check:
        tables["errors"] = [row for op in ops for row in checked_rows(*op)]
    if options.rounds:
        size = Size(config.batch, config.notes, config.width, config.width // config.heads)
        title = f"{size.batch} x {size.length}, width {size.width}, heads of {size.head}, {dtype}, {DEVICE}"
        tables[title] = [row for op in ops for row in measured_rows(*op, size, dtype, options.rounds)]
    write(options.out, tables)
    if wrong := {row["op"] for row in tables.get("errors", []) if row["verdict"] == "WRONG"}:
        raise ValueError(f"wrong results: {', '.join(sorted(wrong))}")
