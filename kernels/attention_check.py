"""The attention kernels against the reference at their first use on a device, for a dtype and a width of heads.

The PTX is right only in a layout of registers that Triton chooses; in another it would be silently wrong.
"""

import warnings

import torch
from torch import Tensor

from .attention_backward import TritonAttention
from .attention_cpu import relative_attention_reference
from .attention_forward import kind, ptx_fits, spellings
from .philox import attention_mask

# of the types that the kernels compute in: relative, in norm; rounding is up to 6e-3 in bfloat16, a wrong rotation 1
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}


def usable(qkv: Tensor, dropout: float) -> bool:
    """Whether the kernels agree with the reference, in PTX or else with `tl.gather`, which later calls then use.

    Warns, once, where they do not. Reads results back: the first use must not be in the capture of a CUDA graph.
    """
    case, failures = kind(qkv, dropout), []
    for ptx in (True, False, None) if case not in spellings else ():
        if ptx and not ptx_fits(qkv):
            continue
        spellings[case] = ptx
        failure = None if ptx is None else disagreement(qkv, dropout)
        if not failure:
            break
        failures.append(f"{'in PTX' if ptx else 'with tl.gather'}: {failure}")
    if failures:
        instead = "the PyTorch reference" if spellings[case] is None else "the slower tl.gather"
        heads = f"{qkv.dtype} heads of width {qkv.shape[4]} on {qkv.device}"
        warnings.warn(f"attention kernels, {heads}: {'; '.join(failures)}; {instead} is used", stacklevel=3)
    return spellings[case] is not None


@torch.inference_mode(False)
@torch.enable_grad()
def disagreement(like: Tensor, dropout: float) -> str | None:
    """What is wrong with forward or backward of a tiny case, specialised as real calls are, so compiled for them."""
    options = {"generator": torch.Generator(like.device).manual_seed(0), "device": like.device}
    shapes = (2, 80, 3, 1, like.shape[4]), (191, like.shape[4]), (2, 80, 1, like.shape[4])
    qkv, table, grad = (torch.randn(shape, **options).to(like.dtype).requires_grad_() for shape in shapes)
    lengths, seed = (torch.tensor(x, device=like.device) for x in ([79, 41], [2**40 + 11]))
    q, k, v, rows = (x.detach().double().requires_grad_() for x in (*qkv.permute(2, 0, 3, 1, 4), table))
    keep = attention_mask((2, 1, 80, 80), dropout, seed, 5, q) if dropout else None
    exact = relative_attention_reference(q, k, v, rows, lengths, keep).transpose(1, 2)
    *grads, grad_rows = torch.autograd.grad(exact, (q, k, v, rows), grad.double())
    try:
        out = TritonAttention.apply(qkv, table, lengths, seed, dropout, 5)
        grad_qkv, grad_table = torch.autograd.grad(out, (qkv, table), grad)
        pairs = (out, exact), *zip(grad_qkv.permute(2, 0, 3, 1, 4), grads, strict=True), (grad_table, grad_rows)
        errors = [((x - y).norm() / y.norm()).item() for x, y in pairs]
    except Exception as error:  # the compiler, the assembler and the driver raise many kinds
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"
    if all(error <= TOLERANCE[like.dtype] for error in errors):  # false for NaN
        return None
    return "relative errors of out, dq, dk, dv, dR " + " ".join(f"{error:.1e}" for error in errors)
