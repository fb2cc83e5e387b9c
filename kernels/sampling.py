"""Adversarial sampling: which notes to hide, and how (method, steps 1 to 3).

Per sequence, with s' the masker's score where a note is unfrozen and not PAD:

    rho ~ U(rate),   k = min(floor(rho * eligible), floor(cap * L)),   selected = the k notes with the highest s'
    of the selected: 80 % -> MASK in all fields, 10 % -> a random valid value per field, 10 % stay

Without scores every eligible note gets a random one, which is plain random masking. All draws are Philox
counters (note, row, stream, kind), compared as 32-bit integers, so that a seed gives the same notes on every device.
Kind 0 decides what happens to a note (first word) and its random score (second), kind 1 a sequence's rho, kinds 2 and
up the replacements, four fields each.

The kernel gives a sequence to each program. A note's key is its score's bits, order-preserving, above its reversed
number, so all keys differ and the k-th highest is found bit by bit: 48 counts over keys held in registers, no sorting.
Floor: memory, but at 2 MB of words a few microseconds; what counts is one launch, and no synchronisation.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import resolve, tl, triton
from .philox import fixed_point, philox, seed_tensor


class Sample(NamedTuple):
    """`words` [B, L, F] corrupted; `selected` [B, L] bool; `changed` [B, L] bool, the 80 + 10 % among the selected."""

    words: Tensor
    selected: Tensor
    changed: Tensor


def adversarial_sample(
    words: Tensor,
    lengths: Tensor,
    mask_word: Tensor,
    values: Tensor,
    *,
    scores: Tensor | None = None,
    frozen: Tensor | None = None,
    rate: tuple[float, float] = (0.1, 0.3),
    cap: float = 0.15,
    masked: float = 0.8,
    replaced: float = 0.1,
    seed: int | Tensor = 0,
    stream: int = 0,
    first_row: int = 0,
    implementation: str | None = None,
) -> Sample:
    """Select notes and corrupt them.

    words [B, L, F] integers; lengths [B]; mask_word [F]; values [F], the number of ordinary values of each field
    (random replacements are drawn below it); scores [B, L] in [0, 1] or None for random masking; frozen uint8
    [B, ceil(L / 8)], one bit a note, lowest bit first, or None. Ties go to the earlier note. Scores rank as fp32.
    Where these rows are part of a larger batch, `first_row` is the first one's number there: each row then gets what
    it would get in the whole.
    """
    if resolve(words, implementation) == "triton":
        with torch.cuda.device_of(words):
            return _sample(
                words, lengths, mask_word, values, scores, frozen, rate, cap, masked, replaced, seed, stream, first_row
            )
    batch, length, fields = words.shape
    row = first_row + torch.arange(batch, device=words.device)[:, None]
    note = torch.arange(length, device=words.device)[None, :]
    action, order, _, _ = philox(seed, note, row, stream, 0)

    eligible = eligible_notes(lengths, frozen, length)
    k = selected_counts(lengths, frozen, length, rate, cap, seed, stream, first_row)
    selected = top_k(order.double() if scores is None else scores, eligible, k[:, None])

    to_mask = selected & (action < fixed_point(masked))
    changed = selected & (action < fixed_point(masked + replaced))
    groups = [philox(seed, note, row, stream, 2 + group) for group in range((fields + 3) // 4)]
    draws = torch.stack([draw for group in groups for draw in group][:fields], -1)
    random_words = ((draws * values) >> 32).to(words.dtype)
    corrupted = torch.where(changed[..., None], random_words, words)
    return Sample(torch.where(to_mask[..., None], mask_word.to(words.dtype), corrupted), selected, changed)


def selected_counts(
    lengths: Tensor,
    frozen: Tensor | None,
    length: int,
    rate: tuple[float, float],
    cap: float,
    seed: int | Tensor,
    stream: int,
    first_row: int,
) -> Tensor:
    """How many notes `adversarial_sample` selects in each sequence, int64 [B]; scores make no difference."""
    row = first_row + torch.arange(len(lengths), device=lengths.device)
    share = philox(seed, 0, row, stream, 1)[0]
    return draw_count(share, eligible_notes(lengths, frozen, length).sum(1), rate).clamp(max=cap_count(cap, length))


def eligible_notes(lengths: Tensor, frozen: Tensor | None, length: int) -> Tensor:
    """Which notes are neither PAD nor frozen: bool [B, L]."""
    eligible = torch.arange(length, device=lengths.device) < lengths[:, None]
    return eligible if frozen is None else eligible & ~unpack_bits(frozen, length)


def draw_count(draw: Tensor, eligible: Tensor, rate: tuple[float, float]) -> Tensor:
    """floor(rho * eligible) with rho ~ U(rate), in 32-bit fixed point: `draw` holds Philox words."""
    low, high = (fixed_point(r) for r in rate)
    rho = low + ((draw * (high - low)) >> 32)
    return (rho * eligible) >> 32


def cap_count(cap: float, length: int) -> int:
    """floor(cap * length), in thousandths: rounded, the product could fall just below a whole number."""
    return round(cap * 1000) * length // 1000


def top_k(scores: Tensor, eligible: Tensor, k: Tensor) -> Tensor:
    """Mark the k[b] highest-scoring eligible notes of each row: scores [..., B, L], eligible [B, L], k [B, 1] -> bool.

    Ties go to the earlier note; never more than the eligible.
    """
    ranked = scores.detach().masked_fill(~eligible, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(scores.shape[-1], device=scores.device) < k
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, ranked, chosen.expand_as(ranked)) & eligible


def unpack_bits(bits: Tensor, length: int) -> Tensor:
    """uint8 [B, ceil(length / 8)], lowest bit first -> bool [B, length]."""
    return ((bits[..., None] >> torch.arange(8, device=bits.device)) & 1).flatten(1)[:, :length].bool()


@triton.jit
def order_bits(x):
    """fp32 as unsigned integers in the same order, -0 and 0 the same."""
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def highest(bits, note, eligible, k):
    """Mark the k highest of the eligible notes by `bits` (uint32), ties to the earlier note; never more than there are.

    The k-th highest key is the largest number that at least k keys reach: decide its bits from the top.
    """
    key = (bits.to(tl.int64) << 16) | (0xFFFF - note).to(tl.int64)
    key = tl.where(eligible, key, -1)
    threshold = k.to(tl.int64) * 0
    for step in range(48):
        trial = threshold | (tl.cast(1, tl.int64) << (47 - step))
        reach = tl.sum((key >= trial).to(tl.int32), 0)
        threshold = tl.where(reach >= k, trial, threshold)
    return (key >= threshold) & (k > 0)


@triton.jit(do_not_specialize=["stream", "first_row"])
def adversarial_sample_kernel(
    words, lengths, mask_word, values, scores, frozen, out, selected, changed,
    seed, stream, first_row, length, most, frozen_bytes,
    LOW: tl.constexpr, SPAN: tl.constexpr, MASKED: tl.constexpr, CHANGED: tl.constexpr, FIELDS: tl.constexpr,
    RANKED: tl.constexpr, FREEZES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    note = tl.arange(0, BLOCK)
    inside = note < length
    key = tl.load(seed)
    drawn_row = first_row + row
    action, order, _, _ = tl.philox(key, note, drawn_row, stream, 0)
    share, _, _, _ = tl.philox(key, note * 0, drawn_row, stream, 1)

    eligible = inside & (note < tl.load(lengths + row))
    if FREEZES:
        book = tl.load(frozen + row * frozen_bytes + note // 8, inside, 0).to(tl.int32)
        eligible = eligible & (((book >> (note % 8)) & 1) == 0)
    rho = tl.umulhi(share, tl.full([BLOCK], SPAN, tl.uint32)) + tl.full([BLOCK], LOW, tl.uint32)
    count = tl.full([BLOCK], 0, tl.uint32) + tl.sum(eligible.to(tl.int32), 0).to(tl.uint32)
    k = tl.minimum(tl.max(tl.umulhi(rho, count).to(tl.int32), 0), most)
    at = row * length + note
    if RANKED:
        order = order_bits(tl.load(scores + at, inside, 0.0).to(tl.float32))
    chosen = highest(order, note, eligible, k)

    hide = chosen & (action < MASKED)
    change = chosen & (action < CHANGED)
    tl.store(selected + at, chosen.to(tl.uint8), inside)
    tl.store(changed + at, change.to(tl.uint8), inside)
    first = row.to(tl.int64) * length * FIELDS
    for group in tl.static_range((FIELDS + 3) // 4):
        a, b, c, d = tl.philox(key, note, drawn_row, stream, 2 + group)
        for lane in tl.static_range(4):
            field = 4 * group + lane
            if field < FIELDS:
                draw = a if lane == 0 else (b if lane == 1 else (c if lane == 2 else d))
                value = tl.full([BLOCK], 0, tl.uint32) + tl.load(values + field).to(tl.uint32)
                word = tl.load(words + first + (note * FIELDS + field), inside, 0)
                word = tl.where(change, tl.umulhi(draw, value).to(word.dtype), word)
                word = tl.where(hide, tl.load(mask_word + field).to(word.dtype), word)
                tl.store(out + first + (note * FIELDS + field), word, inside)


def _sample(
    words, lengths, mask_word, values, scores, frozen, rate, cap, masked, replaced, seed, stream, first_row
) -> Sample:
    """`adversarial_sample` by the kernel above. Raises ValueError beyond 65,536 notes: a key has 16 bits for them."""
    words, length = words.contiguous(), words.shape[1]
    if length > 1 << 16:
        raise ValueError(f"a sequence of {length} notes; at most 65536 can be ranked")
    corrupted = torch.empty_like(words)
    selected, changed = words.new_empty(2, *words.shape[:2], dtype=torch.bool)
    low, high, masked, changing = map(fixed_point, (*rate, masked, masked + replaced))
    block = max(triton.next_power_of_2(length), 128)
    adversarial_sample_kernel[(len(words),)](
        words, lengths, mask_word, values, words if scores is None else scores.detach().contiguous(),
        words if frozen is None else frozen.contiguous(), corrupted, selected.view(torch.uint8),
        changed.view(torch.uint8), seed_tensor(seed, words.device), stream, first_row, length,
        cap_count(cap, length), 0 if frozen is None else frozen.shape[1],
        LOW=low, SPAN=high - low, MASKED=masked, CHANGED=changing, FIELDS=words.shape[2], RANKED=scores is not None,
        FREEZES=frozen is not None, BLOCK=block, num_warps=min(block // 128, 16),  # which leave a thread 128 registers
    )  # fmt: skip
    return Sample(corrupted, selected, changed)
