import math

import pytest
import torch
from amb.kernels import bias_gelu
from amb.kernels.gelu import _forward, bias_gelu_reference


def relative_error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 3, 24), torch.float32),
        ((1, 1, 1), torch.float32),
        ((1, 1, 7), torch.float32),
        ((5, 700), torch.float32),
        ((3, 5, 72), torch.bfloat16),
        ((2, 9, 40), torch.float16),
    ],
)
def test_kernel_against_float64(shape, dtype, device):
    x = (2 * torch.randn(shape, device=device)).to(dtype).requires_grad_()
    bias = torch.randn(shape[-1], device=device, requires_grad=True)
    if x.numel() == 1:  # alone and below zero, it would have hardly a digit left in fp32
        x, bias = (t.detach().abs().requires_grad_() for t in (x, bias))
    grad = torch.randn(shape, device=device).to(dtype)
    out = bias_gelu(x, bias, implementation="triton")
    out.backward(grad)

    exact_x, exact_bias = (t.detach().double().requires_grad_() for t in (x, bias))
    reference = bias_gelu_reference(exact_x, exact_bias)
    reference.backward(grad.double())

    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert out.dtype == dtype
    assert relative_error(out.detach(), reference.detach()) < tolerance
    assert relative_error(x.grad, exact_x.grad) < tolerance
    assert relative_error(bias.grad, exact_bias.grad) < tolerance


def test_reference_against_a_loop():
    x, bias = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    out = bias_gelu_reference(x, bias)
    for r in range(3):
        for c in range(4):
            z = float(x[r, c] + bias[c])
            assert abs(float(out[r, c]) - z * (1 + math.erf(z / math.sqrt(2))) / 2) < 1e-12


def test_more_rows_than_programs(device):
    """Programs take several tiles each; their shares of dbias still add up, to the same bits each time."""
    x, bias = torch.randn(1500, 8, device=device), torch.randn(8, device=device, requires_grad=True)
    out = bias_gelu(x, bias, implementation="triton").square().sum()
    first, again = (torch.autograd.grad(out, bias, retain_graph=True)[0] for _ in range(2))
    exact = torch.autograd.grad(
        bias_gelu_reference(x.double(), b := bias.detach().double().requires_grad_()).square().sum(), b
    )[0]
    assert relative_error(first, exact) < 1e-5
    assert torch.equal(first, again)


def test_registered(device):
    x, bias = (torch.randn(shape, device=device, requires_grad=True) for shape in ((3, 16), (16,)))
    torch.library.opcheck(_forward, (x, bias))


@pytest.mark.parametrize("row", range(4))
def test_machine_code(row, static_rows):
    report = static_rows("gelu")[row]
    assert not report["failure"]
    assert report["stack_bytes"] == 0
    assert report["programs_per_sm"] >= 4
