"""Counter-based random numbers (Philox 4x32-10; Salmon et al., SC 2011), the same on every device.

A draw is a pure function of (seed, stream, row, column): nothing is stored between forward and backward, the order of
blocks does not matter, and the PyTorch reference and the Triton kernels agree bit for bit. Probabilities are compared
and scaled as 32-bit fixed point, never as floats, so that no rounding mode can tell two devices apart.

`stream` numbers the uses within one step (which layer, which dropout), `seed` numbers the step.
"""

import torch
from torch import Tensor

_KEY_STEP = (0x9E3779B9, 0xBB67AE85)
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_MASK = 0xFFFFFFFF


def philox(seed: int | Tensor, *counter: int | Tensor) -> list[Tensor]:
    """Four 32-bit draws (as int64 tensors in [0, 2^32)) for each broadcast counter (c0, c1, c2, c3).

    `seed` is a 64-bit integer: its low and high words are the Philox key. Equals `tl.philox(seed, c0, c1, c2, c3)`.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, dtype=torch.int64) for c in counter))
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        hi0, lo0 = _multiply(c0, _MULTIPLIER[0])
        hi1, lo1 = _multiply(c2, _MULTIPLIER[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _KEY_STEP[0]) & _MASK, (k1 + _KEY_STEP[1]) & _MASK
    return [c0, c1, c2, c3]


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of a 32 x 32-bit product, in int64 (by halves: the product itself may not fit)."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16)
    total = high + (low >> 16)
    return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)


def fixed_point(probability: float) -> int:
    """A probability in [0, 1] as a threshold for 32-bit draws: `draw < fixed_point(p)` happens with probability p."""
    return min(round(probability * 2**32), _MASK)


def generator(seed: int | Tensor, stream: int, device: torch.device) -> torch.Generator:
    """torch's own generator for one (seed, stream): what the reference's dropout uses, where Philox would be slow."""
    mixed = (int(seed) * 0x9E3779B97F4A7C15 + stream * 0xBF58476D1CE4E5B9) & (2**63 - 1)
    return torch.Generator(device).manual_seed(mixed)


def dropout_mask(shape: torch.Size, probability: float, seed: int | Tensor, stream: int, like: Tensor) -> Tensor:
    """Multipliers 0 or 1/(1-p) of the given shape, of the dtype and on the device of `like`."""
    mask = torch.empty(shape, dtype=like.dtype, device=like.device)
    keep = 1.0 - probability
    return mask.bernoulli_(keep, generator=generator(seed, stream, like.device)).div_(keep)
