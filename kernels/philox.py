"""Counter-based random numbers (Philox 4x32-10; Salmon et al., SC 2011), the same on every device.

A draw is a pure function of (seed, stream, row, column): nothing is stored between forward and backward, the order of
blocks does not matter, and the PyTorch reference and the Triton kernels agree bit for bit. Probabilities are compared
and scaled as 32-bit fixed point, never as floats, whose rounding may differ between devices.

`stream` numbers the uses within one step (which layer, which dropout), `seed` numbers the step. The counters are
(column, row, stream, kind): `kind` is DROPOUT here, small numbers in sampling.py.
"""

import math

import torch
from torch import Tensor

from .dispatch import tl, triton

# the kind of a dropout draw; one call serves four neighbouring columns: column // 4 is its counter
DROPOUT = tl.constexpr(255)
# attention draws most: Philox 4x32 passes BigCrush from seven rounds on (Salmon et al., SC 2011, table 2)
ATTENTION_ROUNDS = 7

_KEY_STEP = (0x9E3779B9, 0xBB67AE85)
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_MASK = 0xFFFFFFFF


def philox(seed: int | Tensor, *counter: int | Tensor, rounds: int = 10) -> list[Tensor]:
    """Four 32-bit draws (as int64 tensors in [0, 2^32)) for each broadcast counter (c0, c1, c2, c3).

    `seed` is a 64-bit integer: its low and high words are the Philox key. Equals `tl.philox(seed, c0, c1, c2, c3)`.
    """
    device = next((c.device for c in counter if isinstance(c, Tensor)), None)
    words = (c.long() if isinstance(c, Tensor) else torch.full((), c, device=device) for c in counter)
    c0, c1, c2, c3 = torch.broadcast_tensors(*words)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(rounds):
        hi0, lo0 = _multiply(c0, _MULTIPLIER[0])
        hi1, lo1 = _multiply(c2, _MULTIPLIER[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _KEY_STEP[0]) & _MASK, (k1 + _KEY_STEP[1]) & _MASK
    return [c0, c1, c2, c3]


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of a 32 x 32-bit product, in int64."""
    product = a * b  # may wrap to a negative number, whose 64 bits are still those of the product
    return (product >> 32) & _MASK, product & _MASK


def fixed_point(probability: float) -> int:
    """A probability in [0, 1] as a threshold for 32-bit draws: `draw < fixed_point(p)` happens with probability p.

    Rounded up, so that floor(p * n), taken as (fixed_point(p) * n) >> 32, is exact where p * n is a whole number.
    """
    return min(math.ceil(probability * 2**32), _MASK)


def dropout_mask(shape: torch.Size, probability: float, seed: int | Tensor, stream: int, like: Tensor) -> Tensor | None:
    """Multipliers 0 or 1/(1-p) of the given shape, of the dtype and on the device of `like`; None without dropout.

    The references' dropout: torch's generator draws it, because Philox would be slow. Each 64-bit draw is cut into four
    of 16 bits, which on a CPU is four times as fast as `bernoulli_`.
    """
    if not probability:
        return None
    keep = like.new_empty(shape)
    draws = torch.empty((keep.numel() + 3) // 4, dtype=torch.int64, device=keep.device)
    mixed = (int(seed) * 0x9E3779B97F4A7C15 + stream * 0xBF58476D1CE4E5B9) & (2**63 - 1)
    draws.random_(-(2**63), None, generator=torch.Generator(keep.device).manual_seed(mixed))
    draws = draws.view(torch.int16)[: keep.numel()].view(shape)
    return torch.ge(draws, round(probability * 2**16) - 2**15, out=keep).mul_(1 / (1 - probability))


def attention_mask(shape: torch.Size, probability: float, seed: int | Tensor, stream: int, like: Tensor) -> Tensor:
    """Multipliers 0 or 1/(1-p) of the logits [B, H, L, L], as the attention kernels draw them.

    A call's eight draws of 16 bits serve rows i, i + 8 and columns j, j + 1, j + 8, j + 9, which one thread holds in
    the layout of a tensor core's product. The lower half of a word is for the even column.
    """
    batch, heads, length, _ = shape
    head = torch.arange(batch * heads, device=like.device)[:, None, None]
    i, j = torch.arange(length, device=like.device)[:, None], torch.arange(length, device=like.device)
    place = j // 16 * 4 + j % 8 // 2, i // 16 * 8 + i % 8
    words = torch.stack(philox(seed, *place, stream, head, rounds=ATTENTION_ROUNDS))
    word = words.gather(0, (i // 8 % 2 * 2 + j // 8 % 2).expand(1, *words.shape[1:]))[0]
    keep = (word >> j % 2 * 16 & 0xFFFF) >= round(probability * 2**16)
    return keep.view(shape).to(like.dtype) / (1 - probability)


def row_mask(shape: torch.Size, probability: float, seed: int | Tensor, stream: int, like: Tensor) -> Tensor:
    """Multipliers 0 or 1/(1-p) as the other kernels draw them: the last axis is the column, all before it the row."""
    columns = torch.arange(shape[-1], device=like.device)
    rows = torch.arange(math.prod(shape[:-1]), device=like.device)[:, None]
    draws = torch.stack(philox(seed, columns // 4, rows, stream, DROPOUT.value), -1)
    draws = draws.gather(-1, (columns % 4).expand(len(rows), -1)[..., None])[..., 0]
    return (draws >= fixed_point(probability)).view(shape).to(like.dtype) / (1 - probability)


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """The seed as a tensor that a kernel can load, made without synchronisation; a tensor stays what it is."""
    return seed if isinstance(seed, Tensor) else torch.full((1,), seed, dtype=torch.int64, device=device)


@triton.jit
def dropout_multipliers(
    seed, stream, rows, first_column, THRESHOLD: tl.constexpr, SCALE: tl.constexpr, COLUMNS: tl.constexpr
):
    """[len(rows), COLUMNS] multipliers 0 or SCALE for the columns from `first_column` on, a multiple of 4."""
    quads = first_column // 4 + tl.arange(0, COLUMNS // 4)
    a, b, c, d = tl.philox(seed, quads[None, :], rows[:, None], stream, DROPOUT)
    draws = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), rows.shape[0], COLUMNS)
    return tl.where(draws >= THRESHOLD, SCALE, 0.0)
