"""Relative attention, forward and backward, beside the same maths by other means.

    python -m benchmarks attention [--batch 32] [--heads 12] [--notes 1024] [--width 64] [--rounds 7] [--out FILE]

`eager` is Hugging Face's form (an L x L x D tensor of distances, three einsums). `flex` is FlexAttention, compiled,
with both position terms computed beforehand as L x (2L-1) products and read by its score function: the best form of the
same maths that we could write on it (CUDA only). `sdpa, no positions` is PyTorch's attention without any position
term: not the same function, but the floor that libraries reach for plain attention.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from benchmarks.timing import print_table, take_turns, write


def eager(q: Tensor, k: Tensor, v: Tensor, distance: Tensor) -> Tensor:
    """Hugging Face's `relative_key_query`."""
    length, reach = q.shape[2], (distance.shape[0] + 1) // 2
    place = torch.arange(length, device=q.device)
    positions = distance[place[:, None] - place + reach - 1]
    logits = q @ k.mT
    logits = logits + torch.einsum("bhld,lrd->bhlr", q, positions) + torch.einsum("bhrd,lrd->bhlr", k, positions)
    return (logits / math.sqrt(q.shape[-1])).softmax(-1) @ v


def plain(q: Tensor, k: Tensor, v: Tensor, distance: Tensor) -> Tensor:
    """No positions; the table takes part with weight 0, so that it has a gradient like the others'."""
    return F.scaled_dot_product_attention(q, k, v) + 0 * distance.sum()


def flex() -> "callable":
    """FlexAttention with precomputed position products."""
    from torch.nn.attention.flex_attention import flex_attention

    @torch.compile
    def attend(q: Tensor, k: Tensor, v: Tensor, distance: Tensor) -> Tensor:
        length, reach = q.shape[2], (distance.shape[0] + 1) // 2
        band = distance[reach - length : reach + length - 1]
        scale = 1 / math.sqrt(q.shape[-1])
        from_query, from_key = q @ band.T * scale, k @ band.T * scale

        def add_positions(score, b, h, i, j):
            return score + from_query[b, h, i, i - j + length - 1] + from_key[b, h, j, i - j + length - 1]

        return flex_attention(q, k, v, score_mod=add_positions)

    return attend


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks attention", description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--batch", type=int, default=32 if cuda else 2)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--notes", type=int, default=1024)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args(arguments)
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    shape = options.batch, options.heads, options.notes, options.width
    inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    table = torch.randn(2 * options.notes - 1, options.width, device=device, dtype=dtype) * 0.3
    inputs.append(table.requires_grad_())
    direction = torch.randn(shape, device=device, dtype=dtype)

    peers = {"ours": kernels.relative_attention, "eager (Hugging Face)": eager}
    if cuda:
        peers["flex (compiled)"] = flex()
    peers["sdpa, no positions"] = plain

    def both(attention):
        return lambda: torch.autograd.grad(attention(*inputs), inputs, direction)

    results = take_turns({name: both(attention) for name, attention in peers.items()}, options.rounds, device)
    print_table(f"attention forward + backward, B H L D = {shape}, {dtype}, {device}", results)
    write(options.out, {"shape": shape, "dtype": str(dtype), "timings": results})
