"""What the tests of kernels compare, and with what."""

import torch
from amb.kernels import relative_attention


def gradients(function, inputs, grad):
    """The output for `inputs` as leaves, and their gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def assert_close(results, exact, tolerance, least=0.0):
    """By norm, relative to the exact or, where that is larger, to `least`."""
    for number, (result, truth) in enumerate(zip(results, exact, strict=True)):
        error, scale = (result.double() - truth).norm().item(), truth.norm().item()
        assert error <= tolerance * max(scale, least), f"{number}: {error:.1e} of {scale:.1e}"


def attend(q, k, v, *others, **options):
    """`relative_attention` of q, k, v [B, H, L, D] -> [B, H, L, D]"""
    qkv = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4)
    return relative_attention(qkv, *others, **options).transpose(1, 2)
