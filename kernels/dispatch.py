"""Which implementation of an operation runs, and Triton itself, which only the kernels need.

An explicit argument wins, then the environment variable AMB_KERNELS, then the device: Triton on CUDA; elsewhere "cpu",
which is the PyTorch reference but for attention, which has a faster form. Under `TRITON_INTERPRET=1` "triton" also
works on CPU tensors, slowly: that is how it is tested.
"""

import os

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:

    class _NoTriton:
        """Stands in for triton and triton.language: kernels are defined, and never called."""

        def jit(self, function=None, **_):
            return function or self.jit

        def constexpr(self, value):
            return value

    triton = tl = _NoTriton()

IMPLEMENTATIONS = ("reference", "cpu", "triton")


def resolve(tensor: Tensor, choice: str | None = None) -> str:
    """Return "reference", "cpu" or "triton" for an operation on `tensor`.

    Raises ValueError for a name that is none of these, and for "triton" where Triton is not installed.
    """
    choice = choice or os.environ.get("AMB_KERNELS") or ("triton" if tensor.is_cuda else "cpu")
    if choice not in IMPLEMENTATIONS:
        raise ValueError(f"kernels: implementation {choice!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if choice == "triton" and not hasattr(triton, "__version__"):
        raise ValueError("kernels: Triton is not installed (pip install triton); AMB_KERNELS=reference runs without it")
    return choice
