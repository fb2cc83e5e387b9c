"""Compound-word embedding: F table rows summed per note, bias, LayerNorm and dropout in one pass.

The paper concatenates F embeddings of size e, scales them by sqrt(e) and projects the result to d. The projection of a
concatenation is the sum of its parts' projections, so each field's table is projected once per step (V_f x e by e x d)
and a note is the sum of F rows of size d: the same function, at a cost that does not grow with the number of notes.

    z = bias + sum_f table[offset_f + word_f],   out = dropout(LayerNorm(z))

Backward needs, per table row, the sum of dz over the notes that use it. A few rows are used by nearly every note
(Instrument, TimeSig), most by hardly any, so neither atomics nor one program a row would be fast. As the product
one-hot(words)^T dz the sum is dense work for the tensor cores, takes the same time for all words, and always adds in
the same order. The one-hot matrix [B L, sum V_f] is written out: 84 MB for 32 x 1,024 notes in 16 bits.

Floor: memory. Forward writes out; the table (2 MB) stays in L2, which delivers F rows per note. Backward reads dout
and writes and reads dz. The table's product takes 2 B L d sum V_f flops. Dropout counters: (column // 4, row, stream).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import resolve, tl, triton
from .layer_norm import BACKWARD_TILE, FORWARD_TILE, PARTIALS, constexprs, normalize, normalize_backward
from .philox import dropout_mask, dropout_multipliers, seed_tensor


def compound_embedding(
    words: Tensor,
    table: Tensor,
    offsets: Tensor,
    bias: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-12,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    stream: int = 0,
    implementation: str | None = None,
) -> Tensor:
    """Embed compound words.

    words [B, L, F] integers, word f in [0, V_f); table [sum V_f, d], field f from row `offsets[f]` on, ascending;
    bias [d] (projection bias + token type); weight, norm_bias [d] of the LayerNorm -> [B, L, d] of the table's dtype.
    """
    if resolve(table, implementation) == "triton":
        seed = seed_tensor(seed, table.device)
        with torch.cuda.device_of(table):
            return _Embedding.apply(words, table, offsets, bias, weight, norm_bias, eps, dropout, seed, stream)
    keep = dropout_mask((*words.shape[:2], table.shape[1]), dropout, seed, stream, table)
    return compound_embedding_reference(words, table, offsets, bias, weight, norm_bias, eps, keep)


def compound_embedding_reference(words, table, offsets, bias, weight, norm_bias, eps, keep=None) -> Tensor:
    """The equation above; `keep` [B, L, d] holds dropout's multipliers (0 or 1/(1-p))."""
    rows = (words + offsets).flatten(0, 1)
    z = F.embedding_bag(rows, table, mode="sum").unflatten(0, words.shape[:2]) + bias.to(table.dtype)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    out = F.layer_norm(z, z.shape[-1:], weight.to(z.dtype), norm_bias.to(z.dtype), eps).to(table.dtype)
    return out if keep is None else out * keep


@triton.jit
def gather_sum(words, table, offsets, bias, row, exists, column, width, FIELDS: tl.constexpr):
    """bias + the sum of each note's table rows: [rows, columns] in fp32, added in field order."""
    inside = column < width
    z = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    z += tl.load(bias + column, inside, 0.0).to(tl.float32)[None, :]
    for field in tl.static_range(FIELDS):
        word = tl.load(words + row.to(tl.int64) * FIELDS + field, exists, 0) + tl.load(offsets + field)
        at = word.to(tl.int64)[:, None] * width + column[None, :]
        z += tl.load(table + at, exists[:, None] & inside[None, :], 0.0).to(tl.float32)
    return z


@triton.jit(do_not_specialize=["stream"])
def compound_embedding_forward(
    words, table, offsets, bias, weight, norm_bias, out, means, rstds, seed, stream, rows, width, eps,
    FIELDS: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, C)
    inside = column < width
    z = gather_sum(words, table, offsets, bias, row, row < rows, column, width, FIELDS)
    n, mean, rstd = normalize(z, inside[None, :], width, eps)
    w = tl.load(weight + column, inside, 0.0).to(tl.float32)
    b = tl.load(norm_bias + column, inside, 0.0).to(tl.float32)
    value = n * w[None, :] + b[None, :]
    if THRESHOLD > 0:
        value *= dropout_multipliers(tl.load(seed), stream, row, 0, THRESHOLD, SCALE, C)
    at = row[:, None].to(tl.int64) * width + column[None, :]
    tl.store(out + at, value, (row[:, None] < rows) & inside[None, :])
    tl.store(means + row, mean, row < rows)
    tl.store(rstds + row, rstd, row < rows)


@triton.jit(do_not_specialize=["stream"])
def compound_embedding_backward(
    grad, words, table, offsets, bias, weight, means, rstds, dz, partials, seed, stream, rows, width,
    FIELDS: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """dz of every note; partials [programs, 3, width]: each program's share of dbias, dweight and dnorm_bias."""
    column = tl.arange(0, C)
    inside = column < width
    w = tl.load(weight + column, inside, 0.0).to(tl.float32)
    dbias = tl.zeros([C], tl.float32)
    dweight = tl.zeros([C], tl.float32)
    dnorm_bias = tl.zeros([C], tl.float32)
    for start in range(tl.program_id(0) * R, rows, tl.num_programs(0) * R):
        row = start + tl.arange(0, R)
        tile = (row[:, None] < rows) & inside[None, :]
        z = gather_sum(words, table, offsets, bias, row, row < rows, column, width, FIELDS)
        mean = tl.load(means + row, row < rows, 0.0)
        rstd = tl.load(rstds + row, row < rows, 0.0)
        n = tl.where(tile, (z - mean[:, None]) * rstd[:, None], 0.0)
        at = row[:, None].to(tl.int64) * width + column[None, :]
        g = tl.load(grad + at, tile, 0.0).to(tl.float32)
        if THRESHOLD > 0:
            g *= dropout_multipliers(tl.load(seed), stream, row, 0, THRESHOLD, SCALE, C)
        d = normalize_backward(g, n, w, rstd, width)
        tl.store(dz + at, d, tile)
        dbias += tl.sum(d, 0)
        dweight += tl.sum(g * n, 0)
        dnorm_bias += tl.sum(g, 0)
    share = partials + tl.program_id(0) * 3 * width + column
    tl.store(share, dbias, inside)
    tl.store(share + width, dweight, inside)
    tl.store(share + 2 * width, dnorm_bias, inside)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, words, table, offsets, bias, weight, norm_bias, eps, dropout, seed, stream):
        words, table = words.contiguous(), table.contiguous()
        rows, width, fields = words.shape[:-1].numel(), table.shape[1], words.shape[-1]
        out = table.new_empty(*words.shape[:-1], width)
        mean, rstd = table.new_empty(2, rows, dtype=torch.float32)
        options = constexprs(width, dropout, FORWARD_TILE)
        compound_embedding_forward[(triton.cdiv(rows, options["R"]),)](
            words, table, offsets, bias, weight, norm_bias, out, mean, rstd, seed, stream, rows, width, eps,
            FIELDS=fields, **options,
        )  # fmt: skip
        ctx.save_for_backward(words, table, offsets, bias, weight, mean, rstd, seed)
        ctx.dropout, ctx.stream = dropout, stream
        return out

    @staticmethod
    def backward(ctx, grad):
        words, table, offsets, bias, weight, mean, rstd, seed = ctx.saved_tensors
        grad = grad.contiguous()
        rows, width, fields = mean.numel(), table.shape[1], words.shape[-1]
        options = constexprs(width, ctx.dropout, BACKWARD_TILE)
        programs = min(triton.cdiv(rows, options["R"]), PARTIALS)
        dz = torch.empty_like(grad)
        partials = table.new_empty(programs, 3, width, dtype=torch.float32)
        compound_embedding_backward[(programs,)](
            grad, words, table, offsets, bias, weight, mean, rstd, dz, partials, seed, ctx.stream, rows, width,
            FIELDS=fields, **options,
        )  # fmt: skip
        onehot = dz.new_zeros(rows, len(table)).scatter_(1, (words + offsets).view(rows, fields), 1)
        dtable = onehot.T @ dz.view(rows, width)
        return None, dtable, None, *partials.sum(0), None, None, None, None
