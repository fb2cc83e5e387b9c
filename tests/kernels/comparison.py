"""What the tests of kernels compare, and with what."""

import torch
from amb.kernels import relative_attention
from torch import Tensor


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def gradients(function, inputs, grad):
    """The output for `inputs` as leaves, and their gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def attend(q, k, v, *others, **options):
    """`relative_attention` of q, k, v [B, H, L, D] -> [B, H, L, D]"""
    qkv = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4)
    return relative_attention(qkv, *others, **options).transpose(1, 2)
