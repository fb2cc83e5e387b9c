import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels are tested: the GPU if there is one, else the CPU, in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
