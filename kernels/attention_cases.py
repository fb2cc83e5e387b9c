"""The attention kernels as shipped, for `python -m amb.kernels`: to compile without a GPU, and to time on one."""

import torch
from torch import Tensor

from .attention_backward import (
    delta_kernel,
    input_gradient_kernel,
    score_gradient_kernel,
    table_gradient_kernel,
)
from .attention_forward import attend_kernel, position_scores_kernel
from .attention_launch import COUNTERS, threshold, tiles
from .static import CHECKED, PAPER, Case, DeviceCase, Size, training_cases

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
        (32, "fp32", "fp32"),
        (128, "fp32", "fp32"),
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


def device_cases(device: torch.device | str = "cuda", timed: Size = PAPER, checked: Size = CHECKED) -> list[DeviceCase]:
    """Heads of 64. Floors: 4 products forward, 11 backward."""
    from .attention import relative_attention, relative_attention_reference

    def draw(size: Size) -> dict[str, Tensor]:
        shape = (size.batch, size.length, 3, size.width // 64, 64)
        q, k, v = torch.randn(shape, dtype=torch.bfloat16, device=device).permute(2, 0, 3, 1, 4)
        distance = torch.randn(2 * PAPER.length - 1, 64, dtype=torch.bfloat16, device=device)
        arguments = {"q": q, "k": k, "v": v, "distance": distance}
        return {name: value.requires_grad_() for name, value in arguments.items()}

    product_us = 2 * timed.batch * timed.length**2 * timed.width / 790e6
    floors_us = (4 * product_us, 11 * product_us)
    return training_cases(
        relative_attention, relative_attention_reference, draw, floors_us, timed, checked, dropout=0.1
    )
