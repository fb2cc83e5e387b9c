"""The kernels: what their launches compile to, which needs no GPU, and how fast and how right each operation is.

    python -m benchmarks kernels [--op NAME] [--arch sm_80 sm_90] [--rounds 7] [--check] [--out FILE]
                                 [--config small | base] [--batch B] [--length L] [--dtype fp32]

The first table is the machine code: every operation runs forward and backward on CPU tensors while its launches are
recorded instead of executed, and what Triton would compile for them is compiled and read. The second compares the
operations with peers on random data, without dropout: on CUDA the Triton kernels, on a CPU the CPU's path. Errors are
against the reference in float64, the largest of output and gradients; shares are of the least time that an H100 needs
(3.0 TB/s, 790 bf16 TFLOP/s measured; CUDA only). `--rounds 0` leaves the second table out, `--arch` without a name
the first. `--check` adds errors alone, in every dtype, and on CUDA with dropout.

The attention of `Hugging Face` builds an L x L x D tensor of distances. `flex` is FlexAttention with both position
terms computed beforehand as L x (2L-1) products. `SDPA` is PyTorch's attention without any position term: another
function, but the floor that libraries reach for plain attention.
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

import torch
import triton
from amb.kernels import attention_forward, philox
from amb.kernels.attention_check import TOLERANCE
from amb.kernels.attention_cpu import relative_attention_reference
from amb.kernels.embedding import compound_embedding_reference
from amb.kernels.layer_norm import residual_layer_norm_reference
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from amb import kernels
from amb.config import PRESETS, Config
from amb.model import compute_dtype
from amb.speed import CudaGraph
from benchmarks.timing import take_turns, write

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
# shared memory of a multiprocessor; a program may take 1 KiB less
SHARED_BYTES = {"sm_80": 164 << 10, "sm_86": 100 << 10, "sm_89": 100 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
CHANCES = ("THRESHOLD", "SCALE", "LOW", "SPAN", "MASKED", "CHANGED")  # constants that do not shape the code


class Op(NamedTuple):
    """One operation: `draw(size, dtype)` makes its arguments by name, those with a gradient as leaves; `run`,
    `reference` and `peers` take them. `floor_us(size)` is the least time of forward and backward in bf16 on an H100.

    If there is a `mask`, a GPU's dropout of (shape, probability, seed, stream, like), `run` takes `dropout`, and
    `reference` the mask as `keep`.
    """

    draw: Callable[[Size, torch.dtype], dict[str, Any]]
    run: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    floor_us: Callable[[Size], float]
    mask: Callable[..., Tensor] | None = None
    peers: dict[str, Callable[..., Tensor]] = {}


def activation_us(size: Size) -> float:
    """To move one tensor of activations."""
    return size.batch * size.length * size.width * 2 / 3.0e6


def product_us(size: Size, columns: int) -> float:
    """To multiply the activations by a matrix of so many columns."""
    return 2 * size.batch * size.length * size.width * columns / 790e6


def draw_words(size: Size) -> Tensor:
    return torch.stack([torch.randint(n, (size.batch, size.length)) for n in WORDS], -1)


def draw_attention(size: Size, dtype: torch.dtype) -> dict[str, Tensor]:
    shape = (size.batch, size.length, 3, size.width // size.head, size.head)
    q, k, v = torch.randn(shape).to(dtype).permute(2, 0, 3, 1, 4)
    distance = torch.randn(2 * size.length - 1, size.head).to(dtype)
    return {name: x.requires_grad_() for name, x in zip(("q", "k", "v", "distance"), (q, k, v, distance), strict=True)}


class _Projection(torch.autograd.Function):
    """q, k, v, three views, as the projection [B, L, 3, H, D] that they are of; without copies, as in a model."""

    @staticmethod
    def forward(ctx, q, k, v):
        return q._base.detach()

    @staticmethod
    def backward(ctx, grad):
        return tuple(grad.permute(2, 0, 3, 1, 4))


def attention(q: Tensor, k: Tensor, v: Tensor, distance: Tensor, **options: Any) -> Tensor:
    return kernels.relative_attention(_Projection.apply(q, k, v), distance, **options).transpose(1, 2)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, distance: Tensor, keep: Tensor | None = None) -> Tensor:
    lengths = torch.full((len(q),), q.shape[2], device=q.device)
    return relative_attention_reference(q, k, v, distance, lengths, keep)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, distance: Tensor) -> Tensor:
    """Hugging Face's `relative_key_query`."""
    length, reach = q.shape[2], (distance.shape[0] + 1) // 2
    place = torch.arange(length, device=q.device)
    positions = distance[place[:, None] - place + reach - 1]
    logits = q @ k.mT
    logits = logits + torch.einsum("bhld,lrd->bhlr", q, positions) + torch.einsum("bhrd,lrd->bhlr", k, positions)
    return (logits / math.sqrt(q.shape[-1])).softmax(-1) @ v


def flex_attention(q: Tensor, k: Tensor, v: Tensor, distance: Tensor) -> Tensor:
    """FlexAttention with precomputed position products, to be compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    length, reach = q.shape[2], (distance.shape[0] + 1) // 2
    band = distance[reach - length : reach + length - 1]
    scale = 1 / math.sqrt(q.shape[-1])
    from_query, from_key = q @ band.T * scale, k @ band.T * scale

    def add_positions(score, b, h, i, j):
        return score + from_query[b, h, i, i - j + length - 1] + from_key[b, h, j, i - j + length - 1]

    return flex_attention(q, k, v, score_mod=add_positions)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, distance: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v) + 0 * distance.sum()


def attention_peers() -> dict[str, Callable[..., Tensor]]:
    peers = {"Hugging Face": eager_attention}
    peers["SDPA, flash"] = partial(plain_attention, backend=SDPBackend.FLASH_ATTENTION)
    if torch.cuda.is_available():
        peers["SDPA, cuDNN"] = partial(plain_attention, backend=SDPBackend.CUDNN_ATTENTION)
        peers["flex, compiled"] = torch.compile(flex_attention)
    return peers


def draw_embedding(size: Size, dtype: torch.dtype) -> dict[str, Tensor]:
    words = draw_words(size)
    offsets = torch.tensor([0, *WORDS[:-1]]).cumsum(0)
    table = torch.randn(sum(WORDS), size.width).to(dtype).requires_grad_()
    bias, weight, norm_bias = (torch.randn(size.width, requires_grad=True) for _ in range(3))
    return dict(words=words, table=table, offsets=offsets, bias=bias, weight=weight, norm_bias=norm_bias)


def draw_layer_norm(size: Size, dtype: torch.dtype) -> dict[str, Tensor]:
    x, y = (torch.randn(size[:3]).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(size.width, requires_grad=True) for _ in range(2))
    return dict(x=x, y=y, weight=weight, bias=bias)


def draw_masked_lm(size: Size, dtype: torch.dtype) -> dict[str, Any]:
    return dict(
        hidden=torch.randn(size[:3]).to(dtype).requires_grad_(),
        weight=(torch.randn(sum(WORDS), size.width) * size.width**-0.5).requires_grad_(),
        bias=torch.randn(sum(WORDS)).requires_grad_(),
        words=draw_words(size),
        selected=torch.rand(size.batch, size.length) < 0.15,
        lengths=torch.full((size.batch,), size.length),
        field_weights=torch.rand(len(WORDS)).softmax(0),
        sizes=WORDS,
    )


def masked_lm_loss(**arguments: Any) -> Tensor:
    return kernels.masked_lm(**arguments).loss


def draw_sampling(size: Size, dtype: torch.dtype) -> dict[str, Tensor]:
    values = torch.tensor(WORDS) - 1
    return dict(
        words=draw_words(size),
        lengths=torch.randint(size.length // 2, size.length + 1, (size.batch,)),
        mask_word=values,
        values=values,
        scores=torch.rand(size.batch, size.length),
        frozen=torch.randint(256, (size.batch, -(-size.length // 8)), dtype=torch.uint8),
    )


def sampled_words(**arguments: Any) -> Tensor:
    return kernels.adversarial_sample(**arguments, seed=1).words


def operations() -> dict[str, Op]:
    columns = sum(WORDS)
    return {
        "attention": Op(
            draw_attention, attention, attention_reference, lambda size: 15 * product_us(size, size.length),
            philox.attention_mask, attention_peers(),
        ),
        "embedding": Op(
            draw_embedding, kernels.compound_embedding, partial(compound_embedding_reference, eps=1e-12),
            lambda size: 3 * activation_us(size) + product_us(size, columns), philox.row_mask,
        ),
        "layer_norm": Op(
            draw_layer_norm, kernels.residual_layer_norm, partial(residual_layer_norm_reference, eps=1e-12),
            lambda size: 8 * activation_us(size), philox.row_mask,
        ),
        "masked_lm": Op(
            draw_masked_lm, masked_lm_loss, partial(masked_lm_loss, implementation="reference"),
            lambda size: 4 * product_us(size, columns),
        ),
        "sampling": Op(
            draw_sampling, sampled_words, partial(sampled_words, implementation="reference"),
            lambda size: 2 * size.batch * size.length * len(WORDS) * 8 / 3.0e6,
        ),
    }  # fmt: skip


def results(function: Callable[..., Tensor], arguments: dict[str, Any], grad: Tensor | None = None) -> list[Tensor]:
    """The output, and the gradients of all that requires them for `grad` (default: ones) of the output."""
    out = function(**arguments)
    leaves = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
    if not leaves:
        return [out]
    grad = torch.ones_like(out) if grad is None else grad.to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def relative_errors(
    op: Op, function: Callable[..., Tensor], dtype: torch.dtype, device: torch.device, size: Size, dropout: float = 0.0
) -> dict[str, float]:
    """Relative errors in norm of the output and of each argument's gradient, against the reference in float64."""
    with device:
        arguments = op.draw(size, dtype)
    exact = {
        name: x.detach().double().requires_grad_(x.requires_grad) if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in arguments.items()
    }
    out = op.reference(**exact)
    grad, reference = torch.randn(out.shape, device=device).to(dtype), op.reference
    if not out.dim():  # a mean: fp16 cannot hold its gradients
        grad *= size.batch * size.length
    if dropout:
        shape = out.shape if op.mask is philox.row_mask else (*out.shape[:3], size.length)
        keep = op.mask(shape, dropout, 1, 0, out)
        function, reference = partial(function, dropout=dropout, seed=1), partial(reference, keep=keep)
    pairs = zip(results(function, arguments, grad), results(reference, exact, grad), strict=True)
    names = ["out", *(name for name, x in exact.items() if torch.is_tensor(x) and x.requires_grad)]
    return {
        name: ((x.double() - y).norm() / y.double().norm()).item() for name, (x, y) in zip(names, pairs, strict=False)
    }


def checked_rows(name: str, op: Op, device: torch.device) -> list[dict]:
    """A row of errors for each dtype, size and, on CUDA, with and without dropout."""
    rows = []
    for dtype, size, dropout in itertools.product(TOLERANCE, CHECKED, (0.0, 0.1)):
        if dropout and (op.mask is None or device.type == "cpu"):
            continue
        errors = relative_errors(op, op.run, dtype, device, size, dropout)
        worst = max(errors, key=errors.get)
        rows.append({"op": name, "dtype": str(dtype).removeprefix("torch."), "notes": f"{size.batch} x {size.length}"})
        right = all(error <= TOLERANCE[dtype] for error in errors.values())  # false for NaN
        rows[-1] |= {"dropout": dropout, "error": errors[worst], "of": worst, "verdict": "right" if right else "WRONG"}
    return rows


@contextmanager
def recorded_launches(target: str) -> Iterator[dict[str, tuple[ASTSource, dict]]]:
    """Triton launches in the block are not run: they are kept, each once, as what Triton would compile for them on a
    device such as sm_90, and the options it would take.

    Raises RuntimeError under TRITON_INTERPRET, where kernels have no machine code.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("machine code needs a process without TRITON_INTERPRET")
    launches, run, capability = {}, triton.JITFunction.run, attention_forward.capability
    backend = make_backend(GPUTarget("cuda", 90, 32))  # the types of arguments are the same for all

    def record(kernel, *arguments, grid, warmup, **named):
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, types, options = binder(*arguments, **named)
        _, signature, constants, attributes = kernel._pack_args(backend, named, bound, types, options)
        options = {name: value for name, value in named.items() if name not in kernel.arg_names}
        key = str((kernel.__name__, signature, constants, attributes, options))
        launches[key] = ASTSource(kernel, signature, constants, attributes), options

    triton.JITFunction.run = record
    attention_forward.capability = lambda _: divmod(int(target[3:]), 10)
    try:
        yield launches
    finally:
        triton.JITFunction.run, attention_forward.capability = run, capability


def compiled_rows(name: str, dtype: torch.dtype, target: str) -> list[dict]:
    """A row of each kernel that an operation launches in training at any of the sizes `COMPILED`."""
    op = operations()[name]
    run = partial(op.run, implementation="triton", **{"dropout": 0.1} if op.mask else {})
    with recorded_launches(target) as launches:
        for size in COMPILED:
            results(run, op.draw(size, dtype))
    return [compiled_row(name, *launch, target) for launch in launches.values()]


def compiled_row(name: str, source: ASTSource, options: dict, target: str) -> dict:
    """Registers and stack bytes are a thread's (a stack is spilling), shared bytes a program's; tensor instructions
    are counted in the code; programs are those that registers, shared memory and warps let a multiprocessor hold."""
    kernel = source.fn
    constants = {kernel.arg_names[path[0]]: value for path, value in source.constants.items()}
    shown = " ".join(f"{key}={constants[key]}" for key in constants if key.isupper() and key not in CHANCES)
    dtype = next(kind[1:] for kind in source.signature.values() if re.match(r"\*(bf|fp)", kind))  # of the first tensor
    binary = triton.compile(source, target=GPUTarget("cuda", int(target[3:]), 32), options=options)
    registers, stack, tensor = read_cubin(binary.asm["cubin"])
    warps, shared = binary.metadata.num_warps, binary.metadata.shared
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    by_memory = SHARED_BYTES.get(target, SHARED_BYTES["sm_90"]) // (shared + 1024)
    return {
        "op": name, "kernel": kernel.__name__, "dtype": dtype, "constants": shown, "target": target, "warps": warps,
        "stages": binary.metadata.num_stages, "registers": registers, "stack": stack, "shared": shared,
        "tensor": tensor, "programs": min(by_registers, by_memory, 64 // warps, 32),
    }  # fmt: skip


def read_cubin(cubin: bytes) -> tuple[int, int, int]:
    """Registers, bytes of stack and tensor-core instructions."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", run.stdout)
    return int(usage[1]), int(usage[2]), len(re.findall(r"\b(?:HGMMA|HMMA|QGMMA|IGMMA|IMMA|DMMA)\b", run.stdout))


def measured_rows(name: str, op: Op, size: Size, dtype: torch.dtype, rounds: int, device: torch.device) -> list[dict]:
    """Forward and backward of an operation and its peers, in turns; forward alone where nothing has a gradient."""
    functions = {"ours": op.run, "reference": op.reference, **op.peers}
    if device.type == "cuda" and not op.peers:
        functions["reference, compiled"] = torch.compile(op.reference)
    errors, runs, rows = {}, {}, []
    with device:
        arguments = op.draw(size, dtype)
    if op.mask:
        functions["ours, dropout 0.1"] = partial(op.run, dropout=0.1)
    for key, function in functions.items():
        try:
            if not key.startswith("SDPA") and "dropout" not in key:
                errors[key] = max(relative_errors(op, function, dtype, device, CHECKED[0]).values())
            runs[key] = partial(results, function, arguments)
            if device.type == "cuda":  # launches one by one would wait for Python
                runs[key] = CudaGraph(runs[key])
                for _ in range(CudaGraph.WARM_UP + 1):
                    runs[key]()
        except Exception as error:  # of memory or a compiler: the others are measured all the same
            runs.pop(key, None)
            rows.append({"op": name, "": key, "failure": f"{type(error).__name__}: {str(error)[:80]}"})
    for key, row in take_turns(runs, rounds, device).items():
        share = op.floor_us(size) / 1e3 / row["ms"]["median"] if device.type == "cuda" else None
        rows.append({"op": name, "": key, **row, "error": errors.get(key), "share of floor": share})
    return rows


def main(arguments: list[str]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(prog="python -m benchmarks kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=operations(), nargs="+", default=list(operations()), help="default: all")
    parser.add_argument("--arch", nargs="*", default=["sm_80", "sm_90"], help="compiled for; default: sm_80 sm_90")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    parser.add_argument("--rounds", type=int, default=7, help="of timing, 0: only the machine code; default: 7")
    parser.add_argument("--check", action="store_true", help="a table of errors in every dtype")
    parser.add_argument("--config", choices=PRESETS, default="base" if device.type == "cuda" else "small")
    parser.add_argument("--batch", type=int, help="sequences (default: the preset's; for base on a CPU 1)")
    parser.add_argument("--length", type=int, help="notes in a sequence (default: the preset's)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args(arguments)
    ops, tables = {name: op for name, op in operations().items() if name in options.op}, {}
    if options.arch:
        tasks = list(itertools.product(options.op, (torch.bfloat16, torch.float32), options.arch))
        with ProcessPoolExecutor(options.jobs) as pool:
            rows = [row for rows in pool.map(compiled_rows, *zip(*tasks, strict=True)) for row in rows]
        tables["machine code"] = list({str(row): row for row in rows}.values())  # sampling has but one dtype
    if options.check:
        tables["errors"] = [row for it in ops.items() for row in checked_rows(*it, device)]
    if options.rounds:
        config = Config(**PRESETS[options.config])
        batch = options.batch or (1 if options.config == "base" and device.type == "cpu" else config.batch)
        size = Size(batch, options.length or config.notes, config.width, config.width // config.heads)
        dtype = compute_dtype(options.dtype, device)
        title = f"{size.batch} x {size.length}, width {size.width}, heads of {size.head}, {dtype}, {device}"
        tables[title] = [row for it in ops.items() for row in measured_rows(*it, size, dtype, options.rounds, device)]
    write(options.out, tables)
