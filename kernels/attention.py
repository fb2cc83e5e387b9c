"""Attention with query- and key-side relative positions (Hugging Face's `relative_key_query`; Huang et al. 2020, M4).

    S_ij = (q_i . k_j + q_i . R[i-j+P-1] + k_j . R[i-j+P-1]) / sqrt(D),   keys j >= length excluded
    P    = dropout(softmax_j S),   out_i = sum_j P_ij v_j

R is one distance table of 2P-1 rows per layer, shared by all heads. Its rows enter as products Q R^T and K R^T of
L x (2L-1); the logit wants column i-j+P-1 of row i, a *skew*. The reference and the CPU's form are in attention_cpu.py,
the Triton kernels in attention_forward.py and attention_backward.py.
"""

import torch
from torch import Tensor

from .attention_backward import TritonAttention
from .attention_check import TOLERANCE, usable
from .attention_cpu import relative_attention_cpu, relative_attention_reference
from .dispatch import resolve
from .philox import dropout_mask, seed_tensor


def relative_attention(
    qkv: Tensor,
    distance: Tensor,
    lengths: Tensor,
    *,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    stream: int = 0,
    implementation: str | None = None,
) -> Tensor:
    """Attend within each sequence's valid notes.

    qkv [B, L, 3, H, D], queries, keys and values of one projection; distance [2P-1, D] with L <= P, row P-1 meaning
    i = j; lengths [B] valid keys per sequence, at least 1 each -> [B, L, H, D], 0 in the rows at or beyond a
    sequence's length. The Triton kernels take D = 16, 32, 64 or 128, float32, bfloat16 or float16, compute in
    qkv's dtype, and draw dropout by position: `seed` may be a tensor of one int64 on the device. Raises ValueError
    where L > P, or for any other D or dtype there.
    """
    batch, length, _, heads, width = qkv.shape
    if 2 * length - 1 > len(distance):
        raise ValueError(f"sequence of {length} notes, but the distance table reaches {(len(distance) + 1) // 2}")
    choice = resolve(qkv, implementation)
    if choice == "triton":
        if width not in (16, 32, 64, 128) or qkv.dtype not in TOLERANCE:
            raise ValueError(f"no attention kernel for {qkv.dtype} heads of width {width}")
        with torch.cuda.device_of(qkv):
            if not qkv.is_cuda or usable(qkv, dropout):
                seed = seed_tensor(seed, qkv.device)
                return TritonAttention.apply(qkv, distance, lengths, seed, dropout, stream)
    keep = dropout_mask((batch, heads, length, length), dropout, seed, stream, qkv)
    # of no sequences at all the reference: its gradients are then zeros, and not None
    attend = relative_attention_cpu if choice == "cpu" and batch else relative_attention_reference
    return attend(*qkv.permute(2, 0, 3, 1, 4), distance, lengths, keep).transpose(1, 2)
