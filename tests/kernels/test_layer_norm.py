import pytest
import torch
from amb.kernels import philox, residual_layer_norm
from amb.kernels.layer_norm import residual_layer_norm_reference

from tests.kernels.comparison import relative_error


def inputs(shape, dtype, device):
    x, y = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(shape[-1], device=device, requires_grad=True) for _ in range(2))
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
    arguments = inputs(shape, dtype, device)
    grad = torch.randn(shape, device=device).to(dtype)
    out = residual_layer_norm(*arguments, dropout=dropout, seed=2**33 + 5, stream=3, implementation="triton")
    out.backward(grad)

    exact = [a.detach().double().requires_grad_() for a in arguments]
    keep = philox.row_mask(out.shape, dropout, 2**33 + 5, 3, exact[0]) if dropout else None
    reference = residual_layer_norm_reference(*exact, 1e-12, keep)
    reference.backward(grad.double())

    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert out.dtype == dtype
    assert relative_error(out.detach(), reference.detach()) < tolerance
    for argument, truth in zip(arguments, exact, strict=True):
        assert argument.grad.dtype == argument.dtype
        assert relative_error(argument.grad, truth.grad) < tolerance


def test_strided_inputs_and_gradients(device):
    x, y = (torch.randn(24, 6, device=device).T.requires_grad_() for _ in range(2))
    weight, bias = torch.randn(24, device=device), torch.randn(24, device=device)
    results = []
    for implementation in ("triton", "reference"):
        out = residual_layer_norm(x, y, weight, bias, implementation=implementation)
        grads = torch.autograd.grad(out.sum(0).square().sum(), (x, y))
        results.append((out, *grads))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_same_seed_same_bits(device):
    x, y, weight, bias = inputs((5, 48), torch.float32, device)

    def run(seed):
        out = residual_layer_norm(x, y, weight, bias, dropout=0.2, seed=seed, stream=1, implementation="triton")
        return out, *torch.autograd.grad(out.square().sum(), (x, y, weight, bias))

    first, again, other = run(4), run(torch.tensor([4], device=device)), run(5)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])
