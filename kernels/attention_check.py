"""The attention kernels against the reference at their first use on a device, for a dtype and a width of heads.

The PTX trusts a register layout that Triton chooses, and with another it would be silently wrong.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from . import philox
from .attention_backward import backward
from .attention_forward import forward, kind, ptx_fits, spellings

# relative, in norm: rounding is up to 6e-3 in bfloat16 and 3e-7 in float32, a wrong rotation 1
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}


def usable(q: Tensor, dropout: float, reference: Callable[..., Tensor]) -> bool:
    """Whether the kernels agree with the reference, in PTX or else with `tl.gather`, which later calls then use.

    Warns, once, where they do not. Reads results back: the first use must not be in the capture of a CUDA graph.
    """
    case, failures = kind(q, dropout), []
    for ptx in (True, False, None) if case not in spellings else ():
        if ptx and not ptx_fits(q):
            continue
        spellings[case] = ptx
        with torch.cuda.device_of(q):
            failure = None if ptx is None else disagreement(q, dropout, reference)
        if not failure:
            break
        failures.append(f"{'in PTX' if ptx else 'with tl.gather'}: {failure}")
    if failures:
        instead = "the PyTorch reference" if spellings[case] is None else "the slower tl.gather"
        heads = f"{q.dtype} heads of width {q.shape[3]} on {q.device}"
        warnings.warn(f"attention kernels, {heads}: {'; '.join(failures)}; {instead} is used", stacklevel=3)
    return spellings[case] is not None


@torch.inference_mode(False)
@torch.enable_grad()
def disagreement(like: Tensor, dropout: float, reference: Callable[..., Tensor]) -> str | None:
    """What is wrong with forward or backward of a tiny case, specialised as real calls are, so compiled for them."""
    options = {"generator": torch.Generator(like.device).manual_seed(0), "device": like.device}
    q, k, v, grad = torch.randn(4, 2, 1, 80, like.shape[3], **options).to(like.dtype)
    table = torch.randn(191, like.shape[3], **options).to(like.dtype)
    lengths, seed = (torch.tensor(x, device=like.device) for x in ([79, 41], [2**40 + 11]))
    stream = 5
    exact = [x.double().requires_grad_() for x in (q, k, v, table)]
    keep = philox.attention_mask((2, 1, 80, 80), dropout, seed, stream, exact[0]) if dropout else None
    out = reference(*exact, lengths, keep)
    expected = [out, *torch.autograd.grad(out, exact, grad.double())]
    try:
        out, logsumexp = forward(q, k, v, table, lengths, seed, dropout, stream)
        results = [out, *backward(grad, q, k, v, table, lengths, seed, out, logsumexp, dropout, stream)]
        errors = [((x - y).norm() / y.norm()).item() for x, y in zip(results, expected, strict=True)]
    except Exception as error:  # the compiler, the assembler and the driver raise many kinds
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"
    if all(error <= TOLERANCE[like.dtype] for error in errors):  # false for NaN
        return None
    return "relative errors of out, dq, dk, dv, dR " + " ".join(f"{error:.1e}" for error in errors)
