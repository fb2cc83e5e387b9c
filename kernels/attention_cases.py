"""The attention kernels as shipped, for `python -m kernels`: to compile without a GPU, and to time on one."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.attention_backward import (
    delta_kernel,
    input_gradient_kernel,
    score_gradient_kernel,
    table_gradient_kernel,
)
from kernels.attention_forward import attend_kernel, position_scores_kernel
from kernels.attention_launch import COUNTERS, threshold, tiles
from kernels.static import Case, DeviceCase

# one L x L x D product of every head at B = 32, H = 12, L = 1024, D = 64, at an H100's measured 790 bf16 TFLOP/s
PAPER_PRODUCT_US = 2 * 32 * 12 * 1024**2 * 64 / 790e6


# kernel, and its tile products at M = N, the skewed windows' margins left out
KERNELS = {
    "position_scores": (position_scores_kernel, 2),
    "attend": (attend_kernel, 2),
    "score_gradient": (score_gradient_kernel, 3),
    "input_gradient": (input_gradient_kernel, 4),
    "table_gradient": (table_gradient_kernel, 2),
    "delta": (delta_kernel, 0),
}


def static_cases() -> list[Case]:
    """Every kernel as shipped, with dropout. float16 compiles to what bfloat16 does, up to the name of the type."""
    floats = dict.fromkeys(("scale", "multiplier"), "fp32")
    integers = dict.fromkeys(COUNTERS, "i32")
    integers |= dict.fromkeys(("padded", "pitch", "reach"), "i32:16")
    integers |= {f"{group}_{axis}": "i32:16" for group in ("stride", "out", "grad") for axis in "bhl"}
    fixed = {"seed": "*i64", "lengths": "*i32"} | dict.fromkeys(("logsumexp", "delta", "partial"), "*fp32")
    inputs = ("q", "k", "v", "out", "distance", "grad_out", "grad_q", "grad_k", "grad_v")
    cases = []
    for width, dtype, scores in (
        (64, "bf16", "fp16"),
        (32, "bf16", "fp16"),
        (128, "bf16", "fp16"),
        (64, "fp32", "fp32"),
    ):
        chosen = tiles(width, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
        pointers = dict.fromkeys((*inputs, "grad_scores", "grad_transposed"), f"*{dtype}")
        pointers |= dict.fromkeys(("query_scores", "key_scores"), f"*{scores}")
        types = floats | integers | fixed | pointers
        block = min(chosen["score_gradient"][:2])
        for name, (kernel, products) in KERNELS.items():
            tile = chosen[name]
            values = {
                "D": width,
                "M": tile.m,
                "N": tile.n,
                "STRIDE": tile.stride,
                "BLOCK": block,
                "THRESHOLD": threshold(0.1),
            }
            floor = PAPER_PRODUCT_US * products * width / 64 if dtype == "bf16" else 0.0
            cases.append(
                Case(
                    f"{name} D={width} {dtype} {tile.m}x{tile.n}",
                    kernel,
                    {argument: types[argument] for argument in kernel.arg_names if argument in types},
                    {argument: values[argument] for argument in kernel.arg_names if argument in values},
                    tile.warps,
                    tile.stages,
                    floor,
                )
            )
    return cases


def device_cases() -> list[DeviceCase]:
    """Forward, and forward with backward, at the paper's size; the error against float64 at a smaller one."""
    from kernels.attention import relative_attention, relative_attention_reference

    def inputs(batch: int, length: int) -> list[Tensor]:
        projection = torch.randn(batch, length, 3, 12, 64, dtype=torch.bfloat16, device="cuda")
        table = torch.randn(2 * 1024 - 1, 64, dtype=torch.bfloat16, device="cuda")
        return [x.requires_grad_() for x in (*projection.permute(2, 0, 3, 1, 4), table)]

    def both(attention: Callable[..., Tensor], x: list[Tensor]) -> list[Tensor]:
        out = attention(*x)
        return [out, *torch.autograd.grad(out, x, torch.ones_like(out))]

    def error(count: int) -> float:
        x = inputs(1, 500)
        results = both(partial(relative_attention, implementation="triton"), x)
        exact = both(relative_attention_reference, [y.detach().double().requires_grad_() for y in x])
        errors = [(a.double() - b).norm() / b.norm() for a, b in zip(results, exact, strict=True)]
        return max(errors[:count]).item()

    x = inputs(32, 1024)
    attention = partial(relative_attention, dropout=0.1, implementation="triton")
    forward_products, backward_products = 4, 11
    return [
        DeviceCase("forward", lambda: attention(*x), lambda: error(1), forward_products * PAPER_PRODUCT_US),
        DeviceCase(
            "forward and backward",
            lambda: both(attention, x),
            lambda: error(5),
            (forward_products + backward_products) * PAPER_PRODUCT_US,
        ),
    ]
