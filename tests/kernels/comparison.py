"""What the tests of kernels compare with."""

from torch import Tensor


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()
