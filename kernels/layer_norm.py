"""Residual connection, dropout and LayerNorm in one pass (the post-LN Transformer's two joints per layer).

z = x + dropout(y),   n = (z - mean z) / sqrt(var z + eps),   out = n * weight + bias,   over the last axis, in fp32

Backward (Ba et al. 2016), with g = dout * weight:   dz = (g - mean g - n * mean(g n)) / sqrt(var z + eps)

Floor: memory. Forward reads x and y and writes out; backward reads x, y and dout and writes dx and dy. Mean and
deviation are kept (8 bytes a row); the dropout mask is drawn again in backward: counters (column // 4, row, stream).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import resolve, tl, triton
from .philox import dropout_mask, dropout_multipliers, fixed_point, seed_tensor

FORWARD_TILE, BACKWARD_TILE = 4096, 2048  # elements a program holds at a time: several 16-byte loads a thread
PARTIALS = 528  # programs that share the gradients of weight and bias: four for each of an H100's multiprocessors


def residual_layer_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-12,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    stream: int = 0,
    implementation: str | None = None,
) -> Tensor:
    """LayerNorm(x + dropout(y)) over the last axis: x, y [..., d]; weight, bias [d] -> [..., d] of x's dtype."""
    if resolve(x, implementation) == "triton":
        with torch.cuda.device_of(x):
            return _LayerNorm.apply(x, y, weight, bias, eps, dropout, seed_tensor(seed, x.device), stream)
    keep = dropout_mask(y.shape, dropout, seed, stream, y)
    return residual_layer_norm_reference(x, y, weight, bias, eps, keep)


def residual_layer_norm_reference(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float, keep: Tensor | None = None
) -> Tensor:
    """The equation above; `keep` [..., d] holds dropout's multipliers (0 or 1/(1-p))."""
    z = x + (y if keep is None else y * keep)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return F.layer_norm(z, z.shape[-1:], weight.to(z.dtype), bias.to(z.dtype), eps).to(x.dtype)


@triton.jit
def normalize(z, inside, width, eps):
    """Rows of z [R, C], `inside` marking the columns that exist -> n [R, C], mean [R], 1/deviation [R]."""
    mean = tl.sum(tl.where(inside, z, 0.0), 1) / width
    centred = tl.where(inside, z - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / width + eps)
    return centred * rstd[:, None], mean, rstd


@triton.jit
def normalize_backward(grad, n, weight, rstd, width):
    """dz of the rows of one tile: grad = dout, n the normalised rows; both 0 where no column exists."""
    g = grad * weight[None, :]
    return (g - tl.sum(g, 1)[:, None] / width - n * (tl.sum(g * n, 1)[:, None] / width)) * rstd[:, None]


@triton.jit(do_not_specialize=["stream"])
def residual_layer_norm_forward(
    x, y, weight, bias, out, means, rstds, seed, stream, rows, width, eps,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, C)
    inside = column[None, :] < width
    tile = (row[:, None] < rows) & inside
    at = row[:, None].to(tl.int64) * width + column[None, :]
    residual = tl.load(y + at, tile, 0.0).to(tl.float32)
    if THRESHOLD > 0:
        residual *= dropout_multipliers(tl.load(seed), stream, row, 0, THRESHOLD, SCALE, C)
    n, mean, rstd = normalize(tl.load(x + at, tile, 0.0).to(tl.float32) + residual, inside, width, eps)
    w = tl.load(weight + column, column < width, 0.0).to(tl.float32)
    b = tl.load(bias + column, column < width, 0.0).to(tl.float32)
    tl.store(out + at, n * w[None, :] + b[None, :], tile)
    tl.store(means + row, mean, row < rows)
    tl.store(rstds + row, rstd, row < rows)


@triton.jit(do_not_specialize=["stream"])
def residual_layer_norm_backward(
    grad, x, y, weight, means, rstds, dx, dy, partials, seed, stream, rows, width,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """partials [programs, 2, width]: each program's share of dweight and dbias, summed later in a fixed order."""
    column = tl.arange(0, C)
    inside = column[None, :] < width
    w = tl.load(weight + column, column < width, 0.0).to(tl.float32)
    dweight = tl.zeros([C], tl.float32)
    dbias = tl.zeros([C], tl.float32)
    for start in range(tl.program_id(0) * R, rows, tl.num_programs(0) * R):
        row = start + tl.arange(0, R)
        tile = (row[:, None] < rows) & inside
        at = row[:, None].to(tl.int64) * width + column[None, :]
        residual = tl.load(y + at, tile, 0.0).to(tl.float32)
        if THRESHOLD > 0:
            keep = dropout_multipliers(tl.load(seed), stream, row, 0, THRESHOLD, SCALE, C)
            residual *= keep
        z = tl.load(x + at, tile, 0.0).to(tl.float32) + residual
        mean = tl.load(means + row, row < rows, 0.0)
        rstd = tl.load(rstds + row, row < rows, 0.0)
        n = tl.where(tile, (z - mean[:, None]) * rstd[:, None], 0.0)
        g = tl.load(grad + at, tile, 0.0).to(tl.float32)
        dz = normalize_backward(g, n, w, rstd, width)
        tl.store(dx + at, dz, tile)
        if THRESHOLD > 0:
            tl.store(dy + at, dz * keep, tile)
        dweight += tl.sum(g * n, 0)
        dbias += tl.sum(g, 0)
    share = partials + tl.program_id(0) * 2 * width + column
    tl.store(share, dweight, column < width)
    tl.store(share + width, dbias, column < width)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, weight, bias, eps, dropout, seed, stream):
        x, y = x.contiguous(), y.contiguous()
        rows, width = x.shape[:-1].numel(), x.shape[-1]
        out = torch.empty_like(x)
        mean, rstd = x.new_empty(2, rows, dtype=torch.float32)
        options = constexprs(width, dropout, FORWARD_TILE)
        residual_layer_norm_forward[(triton.cdiv(rows, options["R"]),)](
            x, y, weight, bias, out, mean, rstd, seed, stream, rows, width, eps, **options
        )
        ctx.save_for_backward(x, y, weight, mean, rstd, seed)
        ctx.dropout, ctx.stream = dropout, stream
        return out

    @staticmethod
    def backward(ctx, grad):
        x, y, weight, mean, rstd, seed = ctx.saved_tensors
        grad = grad.contiguous()
        rows, width = mean.numel(), x.shape[-1]
        options = constexprs(width, ctx.dropout, BACKWARD_TILE)
        programs = min(triton.cdiv(rows, options["R"]), PARTIALS)
        dx = torch.empty_like(x)
        dy = torch.empty_like(y) if ctx.dropout else dx  # without dropout they are equal, and dy is not written
        partials = x.new_empty(programs, 2, width, dtype=torch.float32)
        residual_layer_norm_backward[(programs,)](
            grad, x, y, weight, mean, rstd, dx, dy, partials, seed, ctx.stream, rows, width, **options
        )
        return dx, dy, *partials.sum(0), None, None, None, None


def constexprs(width: int, dropout: float, tile: int) -> dict:
    """The compile-time side of a launch: dropout's threshold and scale, and rows x columns of about `tile` elements."""
    columns = max(triton.next_power_of_2(width), 16)
    rows = max(tile // columns, 1)
    return dict(THRESHOLD=fixed_point(dropout), SCALE=1 / (1 - dropout), R=rows, C=columns)
