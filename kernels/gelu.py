"""Bias and exact GELU in one pass: gelu(x + b), gelu(z) = z * (1 + erf(z / sqrt 2)) / 2 (Hendrycks & Gimpel, 2016)."""

from torch import Tensor
from torch.nn import functional as F


def bias_gelu(x: Tensor, bias: Tensor, *, implementation: str | None = None) -> Tensor:
    """gelu(x + bias): x [..., n], bias [n] -> [..., n] of x's dtype."""
    return bias_gelu_reference(x, bias)


def bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """The equation above, as PyTorch says it."""
    return F.gelu(x + bias.to(x.dtype))
