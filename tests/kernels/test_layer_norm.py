import pytest
import torch
from amb.kernels import philox, residual_layer_norm
from amb.kernels.layer_norm import residual_layer_norm_reference

from tests.kernels.comparison import assert_close, gradients


def inputs(shape, dtype, device):
    x, y = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], device=device) for _ in range(2))
    return x, y, weight, bias


@pytest.mark.parametrize(
    ("shape", "dtype", "dropout"),
    [
        ((2, 5, 24), torch.float32, 0.0),
        ((3, 11, 100), torch.float32, 0.3),
        ((1, 1, 768), torch.float32, 0.1),
        ((700, 5), torch.float32, 0.5),
        ((3, 7, 256), torch.bfloat16, 0.1),
        ((2, 9, 40), torch.float16, 0.0),
    ],
)
def test_kernel_against_float64(shape, dtype, dropout, device):
    arguments, grad = inputs(shape, dtype, device), torch.randn(shape, device=device).to(dtype)
    chance = {"dropout": dropout, "seed": 2**33 + 5, "stream": 3, "implementation": "triton"}
    keep = philox.row_mask(grad.shape, dropout, 2**33 + 5, 3, grad.double()) if dropout else None
    results = gradients(lambda *x: residual_layer_norm(*x, **chance), arguments, grad)
    assert results[0].dtype == dtype
    doubles = [x.double() for x in arguments]
    exact = gradients(lambda *x: residual_layer_norm_reference(*x, 1e-12, keep), doubles, grad)
    assert_close(results, exact, {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype])


def test_strided_inputs_and_gradients(device):
    arguments = *torch.randn(2, 24, 6, device=device).mT, *torch.randn(2, 24, device=device)
    grad = torch.randn(24, device=device).expand(6, 24)
    kernel, reference = (
        gradients(lambda *x, name=name: residual_layer_norm(*x, implementation=name), arguments, grad)
        for name in ("triton", "reference")
    )
    assert_close(kernel, reference, 1e-5)


def test_same_seed_same_bits(device):
    arguments, grad = inputs((5, 48), torch.float32, device), torch.randn(5, 48, device=device)

    def run(seed):
        chance = {"dropout": 0.2, "seed": seed, "stream": 1, "implementation": "triton"}
        return gradients(lambda *x: residual_layer_norm(*x, **chance), arguments, grad)

    first, again, other = run(4), run(torch.tensor([4], device=device)), run(5)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])
