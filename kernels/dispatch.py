"""Which implementation of an operation runs.

An explicit argument wins, then the environment variable AMB_KERNELS, then the device: Triton on CUDA, the PyTorch
reference elsewhere. Under `TRITON_INTERPRET=1` "triton" also works on CPU tensors, slowly: that is how it is tested.
"""

import os

from torch import Tensor

IMPLEMENTATIONS = ("reference", "triton")


def resolve(tensor: Tensor, choice: str | None = None) -> str:
    """Return "reference" or "triton" for an operation on `tensor`.

    Raises ValueError for a name that is neither.
    """
    choice = choice or os.environ.get("AMB_KERNELS") or ("triton" if tensor.is_cuda else "reference")
    if choice not in IMPLEMENTATIONS:
        raise ValueError(f"kernels: implementation {choice!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    return choice
