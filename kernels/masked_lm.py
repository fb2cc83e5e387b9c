"""The recoverer's output layers and loss: F linear layers and their cross-entropies, weighted (method, step 4).

c_f(note)  = -log softmax(W_f h + b_f)[true value]
L_mlm      = sum_f w_f (mean of c_f over the selected notes + mean of c_f over all notes that are not PAD)
note loss  = sum_f w_f c_f          (what the masker's target is made from; no gradient)

The logits [B L, sum V_f] are the largest tensor of the step if built, so the kernels never build them (Wijmans et al.
2024, cut cross-entropy). Forward keeps one logsumexp per note and field while it walks the field's vocabulary in
tiles. Backward computes each tile again, as dlogits = g (softmax - one-hot) with g = dL/dc, into a scratch of bounded
size, CHUNK notes at a time, from which two plain products give dhidden = dlogits W and dW = dlogits^T hidden.
Every sum is in a fixed order. Blocks of PAD notes are skipped.

Floor: flops. 2 B L d sum V_f in forward, three times that in backward.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import resolve, tl, triton

CHUNK = 16384  # notes whose dlogits exist at a time
STAGES = 3  # tiles in flight to shared memory
# Notes N, vocabulary entries V and depth K of a tile, for 16-bit numbers and for fp32, which runs on the ordinary
# multipliers. V = 64 because most fields are a little over a multiple of it.
BLOCKS = {
    "forward": ({"N": 128, "V": 64, "K": 64}, {"N": 32, "V": 64, "K": 16}),
    "dlogits": ({"N": 128, "V": 64, "K": 64}, {"N": 32, "V": 64, "K": 32}),
}


class MaskedLM(NamedTuple):
    """`loss` scalar; `note_loss` [B, L] fp32, 0 at PAD; `correct_selected`, `correct_valid` [F] int64 hits."""

    loss: Tensor
    note_loss: Tensor
    correct_selected: Tensor
    correct_valid: Tensor


def masked_lm(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    words: Tensor,
    selected: Tensor,
    lengths: Tensor,
    field_weights: Tensor,
    sizes: tuple[int, ...],
    *,
    counts: Tensor | None = None,
    implementation: str | None = None,
) -> MaskedLM:
    """Weighted recovery loss of all fields.

    hidden [B, L, d]; weight [sum V_f, d] and bias [sum V_f], the F output layers stacked in field order with `sizes`
    (V_0 ... V_{F-1}); words [B, L, F] the true words; selected [B, L] bool; lengths [B] notes per sequence;
    field_weights [F], summing to 1. Gradients flow from `loss` to hidden, weight and bias. The weight is cast to
    hidden's dtype for the products. Where these sequences are part of a larger batch, `counts` [2] is how many notes
    are selected and how many valid in the whole: the parts' losses then add up.
    """
    if resolve(hidden, implementation) == "triton":
        with torch.cuda.device_of(hidden):
            cost, hit = _FieldCosts.apply(hidden, weight, bias, words, lengths, sizes)
        return weigh(cost, hit, selected, lengths, field_weights, counts)
    # notes flat and classes last: cross_entropy over [B, V, L] is several times slower on the CPU
    logits = F.linear(hidden.flatten(0, 1), weight.to(hidden.dtype), bias.to(hidden.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    fields = list(zip(logits.split(sizes, dim=-1), words.flatten(0, 1).unbind(-1), strict=True))
    cost = torch.stack([F.cross_entropy(scores, target, reduction="none") for scores, target in fields], -1)
    hit = torch.stack([scores.detach().argmax(-1) == target for scores, target in fields], -1)
    return weigh(cost.view(words.shape), hit.view(words.shape), selected, lengths, field_weights, counts)


def weigh(
    cost: Tensor, hit: Tensor, selected: Tensor, lengths: Tensor, field_weights: Tensor, counts: Tensor | None
) -> MaskedLM:
    """From cost and hit [B, L, F]: means over the selected and over the valid notes, for which `counts` may stand."""
    valid = torch.arange(cost.shape[1], device=cost.device) < lengths[:, None]
    groups = torch.stack([selected, valid])
    counts = groups.sum((1, 2)) if counts is None else counts
    share = groups / counts.clamp(min=1)[:, None, None]
    correct = (hit & groups[..., None]).sum((1, 2))
    return MaskedLM(
        loss=(cost * share.sum(0)[..., None] * field_weights).sum(),
        note_loss=(cost.detach() * field_weights).sum(-1) * valid,
        correct_selected=correct[0],
        correct_valid=correct[1],
    )


@triton.jit
def valid_notes(note, lengths, notes, length):
    """Which of the flat note numbers exist and are not PAD."""
    return (note % length < tl.load(lengths + note // length, note < notes, 0)) & (note < notes)


@triton.jit
def tile_logits(hidden, weight, bias, note, valid, column, exists, width, K: tl.constexpr):
    """h W^T + b of one tile [notes, columns], in fp32; only b where no note of the tile is valid."""
    logits = tl.zeros([note.shape[0], column.shape[0]], tl.float32)
    depth = tl.where(tl.max(valid.to(tl.int32), 0) > 0, width, 0)
    for start in range(0, depth, K):
        k = start + tl.arange(0, K)
        at = note[:, None].to(tl.int64) * width + k[None, :]
        h = tl.load(hidden + at, valid[:, None] & (k[None, :] < width), 0.0)
        w = tl.load(weight + column[None, :] * width + k[:, None], exists[None, :] & (k[:, None] < width), 0.0)
        logits = tl.dot(h, w, logits, input_precision="ieee")
    return logits + tl.load(bias + column, exists, 0.0).to(tl.float32)[None, :]


@triton.jit
def masked_lm_forward(
    hidden, weight, bias, words, lengths, tiles, cost, hit, lse, notes, length, width, fields,
    N: tl.constexpr, V: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One field, which is one of `tiles`, of one block of notes: walk the field's vocabulary."""
    field = tl.program_id(0)
    note = tl.program_id(1) * N + tl.arange(0, N)
    valid = valid_notes(note, lengths, notes, length)
    first, end = tl.load(tiles + 4 * field + 2), tl.load(tiles + 4 * field + 3)
    at = note.to(tl.int64) * fields + field
    target = first + tl.load(words + at, valid, 0).to(tl.int32)
    best = tl.full([N], float("-inf"), tl.float32)
    best_column = tl.zeros([N], tl.int32)
    total = tl.zeros([N], tl.float32)
    at_target = tl.zeros([N], tl.float32)
    last = tl.where(tl.max(valid.to(tl.int32), 0) > 0, end, first)
    for start in range(first, last, V):
        column = start + tl.arange(0, V)
        logits = tile_logits(hidden, weight, bias, note, valid, column, column < end, width, K)
        logits = tl.where(column[None, :] < end, logits, float("-inf"))
        top = tl.max(logits, 1)
        top_column = tl.min(tl.where(logits == top[:, None], column[None, :], end), 1)
        best_column = tl.where(top > best, top_column, best_column)  # a tie stays with the earlier column
        new = tl.maximum(best, top)
        total = total * tl.exp(best - new) + tl.sum(tl.exp(logits - new[:, None]), 1)
        best = new
        at_target += tl.sum(tl.where(column[None, :] == target[:, None], logits, 0.0), 1)
    logsumexp = best + tl.log(total)
    tl.store(lse + at, tl.where(valid, logsumexp, 0.0), note < notes)
    tl.store(cost + at, tl.where(valid, logsumexp - at_target, 0.0), note < notes)
    tl.store(hit + at, (valid & (best_column == target)).to(tl.uint8), note < notes)


@triton.jit
def masked_lm_dlogits(
    hidden, weight, bias, words, lengths, tiles, grad, lse, dlogits,
    first_note, notes, length, width, fields, stride,
    N: tl.constexpr, V: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One tile of dlogits [notes from first_note on, stride]; `tiles` holds each tile's field, first column and the
    columns of its field."""
    tile = tiles + tl.program_id(0) * 4
    field, start, first, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    row = tl.program_id(1) * N + tl.arange(0, N)
    note = first_note + row
    valid = valid_notes(note, lengths, notes, length)
    column = start + tl.arange(0, V)
    at = note.to(tl.int64) * fields + field
    target = first + tl.load(words + at, valid, 0).to(tl.int32)
    logits = tile_logits(hidden, weight, bias, note, valid, column, column < end, width, K)
    softmax = tl.exp(logits - tl.load(lse + at, valid, float("inf"))[:, None])
    onehot = tl.where(column[None, :] == target[:, None], 1.0, 0.0)
    out = tl.load(grad + at, valid, 0.0)[:, None] * (softmax - onehot)
    exists = (note[:, None] < notes) & (column[None, :] < end)
    tl.store(dlogits + row[:, None].to(tl.int64) * stride + column[None, :], out, exists)


class _FieldCosts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, words, lengths, sizes):
        """Cost [B, L, F] fp32, and whether the likeliest word is the true one, bool [B, L, F]."""
        hidden, words = hidden.contiguous(), words.contiguous()
        cost, lse = words.new_empty(2, *words.shape, dtype=torch.float32)
        hit = torch.empty_like(words, dtype=torch.bool)
        notes, blocks = hidden.shape[:-1].numel(), BLOCKS["forward"][hidden.dtype == torch.float32]
        masked_lm_forward[(len(sizes), triton.cdiv(notes, blocks["N"]))](
            hidden, weight.to(hidden.dtype).contiguous(), bias, words, lengths,
            tiles(sizes, max(sizes), hidden.device), cost, hit.view(torch.uint8), lse,
            notes, words.shape[1], hidden.shape[-1], len(sizes), **blocks, num_stages=STAGES,
        )  # fmt: skip
        ctx.save_for_backward(hidden, weight, bias, words, lengths, lse)
        ctx.sizes = sizes
        ctx.mark_non_differentiable(hit)
        return cost, hit

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, bias, words, lengths, lse = ctx.saved_tensors
        grad, hidden_rows = grad.contiguous(), hidden.flatten(0, 1)
        vocabulary, width = weight.shape
        notes, blocks = len(hidden_rows), BLOCKS["dlogits"][hidden.dtype == torch.float32]
        stride = triton.cdiv(vocabulary, 16) * 16  # whole vectors for both products; the columns beyond stay 0
        padded = F.pad(weight.to(hidden.dtype), (0, 0, 0, stride - vocabulary))
        dhidden = torch.empty_like(hidden_rows)
        dweight = weight.new_zeros(stride, width, dtype=torch.float32)
        dbias = bias.new_zeros(stride, dtype=torch.float32)
        scratch = hidden.new_zeros(min(notes, CHUNK), stride)
        table = tiles(ctx.sizes, blocks["V"], hidden.device)
        for first in range(0, notes, CHUNK):
            chunk = slice(first, min(first + CHUNK, notes))
            dlogits = scratch[: chunk.stop - first]
            masked_lm_dlogits[(len(table), triton.cdiv(len(dlogits), blocks["N"]))](
                hidden, padded, bias, words, lengths, table, grad, lse, dlogits,
                first, chunk.stop, words.shape[1], width, len(ctx.sizes), stride, **blocks, num_stages=STAGES,
            )  # fmt: skip
            torch.mm(dlogits, padded, out=dhidden[chunk])
            dweight += dlogits.T @ hidden_rows[chunk]
            dbias += dlogits.sum(0, dtype=torch.float32)
        return dhidden.view_as(hidden), dweight[:vocabulary], dbias[:vocabulary], None, None, None


# Cached, because copying a list to the device would make every step wait for it.
@functools.lru_cache
def tiles(sizes: tuple[int, ...], step: int, device: torch.device) -> Tensor:
    """[T, 4] field, first column of the tile, first and last + 1 column of the field."""
    spans = [(field, sum(sizes[:field]), sum(sizes[: field + 1])) for field in range(len(sizes))]
    rows = [(field, start, first, end) for field, first, end in spans for start in range(first, end, step)]
    return torch.tensor(rows, dtype=torch.int32, device=device)
