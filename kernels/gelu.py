"""Bias and exact GELU in one pass: gelu(x + b), gelu(z) = z * (1 + erf(z / sqrt 2)) / 2 (Hendrycks & Gimpel, 2016).

Backward: dz = dout * (Phi(z) + z * phi(z)) with Phi, phi the standard normal's distribution and density.

Floor: memory. Forward reads x and writes out; backward reads x and dout and writes dx. Only x is kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .dispatch import resolve
from .static import CHECKED, PAPER, Case, DeviceCase, Size, training_cases

ROWS, COLUMNS = 8, 512  # one tile
PARTIALS = 176  # programs per block of columns that share the bias's gradient: 8 for each of an H100's SMs at 4d = 3072


def bias_gelu(x: Tensor, bias: Tensor, *, implementation: str | None = None) -> Tensor:
    """gelu(x + bias): x [..., n], bias [n] -> [..., n] of x's dtype."""
    if resolve(x, implementation) == "triton":
        return _forward(x, bias)
    return bias_gelu_reference(x, bias)


def bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """The equation above, as PyTorch says it."""
    return F.gelu(x + bias.to(x.dtype))


@triton.jit
def phi_of(z):
    """The standard normal's distribution function."""
    return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)


@triton.jit
def bias_gelu_forward(x, bias, out, rows, width, R: tl.constexpr, C: tl.constexpr):
    row = tl.program_id(1) * R + tl.arange(0, R)
    column = tl.program_id(0) * C + tl.arange(0, C)
    tile = (row[:, None] < rows) & (column[None, :] < width)
    at = row[:, None].to(tl.int64) * width + column[None, :]
    b = tl.load(bias + column, column < width, 0.0).to(tl.float32)
    z = tl.load(x + at, tile, 0.0).to(tl.float32) + b[None, :]
    tl.store(out + at, z * phi_of(z), tile)


@triton.jit
def bias_gelu_backward(grad, x, bias, dx, partials, rows, width, R: tl.constexpr, C: tl.constexpr):
    """partials [programs, width]: each program's share of dbias, summed later in a fixed order."""
    column = tl.program_id(0) * C + tl.arange(0, C)
    b = tl.load(bias + column, column < width, 0.0).to(tl.float32)
    dbias = tl.zeros([C], tl.float32)
    for start in range(tl.program_id(1) * R, rows, tl.num_programs(1) * R):
        row = start + tl.arange(0, R)
        tile = (row[:, None] < rows) & (column[None, :] < width)
        at = row[:, None].to(tl.int64) * width + column[None, :]
        z = tl.load(x + at, tile, 0.0).to(tl.float32) + b[None, :]
        slope = phi_of(z) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
        dz = tl.load(grad + at, tile, 0.0).to(tl.float32) * slope
        tl.store(dx + at, dz, tile)
        dbias += tl.sum(dz, 0)
    tl.store(partials + tl.program_id(1) * width + column, dbias, column < width)


@torch.library.custom_op("kernels::bias_gelu", mutates_args=())
def _forward(x: Tensor, bias: Tensor) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    rows, width = x.shape[:-1].numel(), x.shape[-1]
    grid = (triton.cdiv(width, COLUMNS), triton.cdiv(rows, ROWS))
    bias_gelu_forward[grid](x, bias, out, rows, width, ROWS, COLUMNS)
    return out


@_forward.register_fake
def _(x, bias):
    return x.new_empty(x.shape)


@torch.library.custom_op("kernels::bias_gelu_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    rows, width = x.shape[:-1].numel(), x.shape[-1]
    grid = (triton.cdiv(width, COLUMNS), min(triton.cdiv(rows, ROWS), PARTIALS))
    partials = x.new_empty(grid[1], width, dtype=torch.float32)
    bias_gelu_backward[grid](grad, x, bias, dx, partials, rows, width, ROWS, COLUMNS)
    return dx, partials.sum(0).to(bias.dtype)


@_backward.register_fake
def _(grad, x, bias):
    return x.new_empty(x.shape), torch.empty_like(bias)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):
    return _backward(grad, *ctx.saved_tensors)


_forward.register_autograd(_differentiate, setup_context=_save)


def static_cases() -> list[Case]:
    """At 4d of the paper's model and the small one; floors for 32 x 1,024 notes in bf16 at 3.0 TB/s."""
    signature = dict.fromkeys(("x", "out", "grad", "dx"), "*bf16") | dict.fromkeys(("bias", "partials"), "*fp32")
    signature |= {"rows": "i32:16", "width": "i32:16"}
    options = {"R": ROWS, "C": COLUMNS}
    activation_us = 32 * 1024 * 3072 * 2 / 3.0e6
    return [
        Case("bias_gelu_forward 4d=3072", bias_gelu_forward, signature, options, floor_us=2 * activation_us),
        Case("bias_gelu_backward 4d=3072", bias_gelu_backward, signature, options, floor_us=3 * activation_us),
    ]


def device_cases(device: torch.device | str = "cuda", timed: Size = PAPER, checked: Size = CHECKED) -> list[DeviceCase]:
    """At four times the width. Floors: 2 activations moved forward, 3 backward, at 3.0 TB/s."""

    def draw(size: Size) -> dict[str, Tensor]:
        x = torch.randn(size.batch, size.length, 4 * size.width, dtype=torch.bfloat16, device=device)
        bias = torch.randn(4 * size.width, device=device)
        return {"x": x.requires_grad_(), "bias": bias.requires_grad_()}

    activation_us = timed.batch * timed.length * 4 * timed.width * 2 / 3.0e6
    floors_us = (2 * activation_us, 3 * activation_us)
    return training_cases(bias_gelu, bias_gelu_reference, draw, floors_us, timed, checked)
