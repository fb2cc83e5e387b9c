"""What the tests of kernels compare with."""

import torch
from amb.kernels import philox
from torch import Tensor


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def kernel_mask(shape: torch.Size, probability: float, seed: int | Tensor, stream: int, like: Tensor) -> Tensor:
    """Multipliers 0 or 1/(1-p) as the Triton kernels draw them; the last axis is the column, the others the row."""
    columns = torch.arange(shape[-1], device=like.device)
    rows = torch.arange(shape[:-1].numel(), device=like.device)[:, None]
    draws = torch.stack(philox.philox(seed, columns // 4, rows, stream, philox.DROPOUT.value), -1)
    draws = draws.gather(-1, (columns % 4).expand(len(rows), -1)[..., None])[..., 0]
    keep = (draws >= philox.fixed_point(probability)).view(shape)
    return keep.to(like.dtype).mul_(1 / (1 - probability))
