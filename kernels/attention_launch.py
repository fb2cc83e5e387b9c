"""How the attention kernels are launched: tiles, waves of heads, and the scratch they share."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import philox
from .dispatch import triton

LOG2E = math.log2(math.e)
# integers that differ between launches of one step: a kernel is not compiled again for each
COUNTERS = ["first_head", "heads", "wave", "stream"]


class Tile(NamedTuple):
    """A program's block of M rows and N columns; `stride`: distance between its rows, where it skews."""

    m: int
    n: int
    warps: int = 4
    stages: int = 2
    stride: int = 1


def tiles(width: int, dtype: torch.dtype) -> dict[str, Tile]:
    """Shipped tiles by kernel, chosen by static figures (docs/kernels.md). m, n and `stride` are powers of two."""
    if dtype == torch.float32:
        skewing = Tile(32, 32, stride=4)
        return {
            "position_scores": skewing,
            "attend": Tile(32, 16 if width < 64 else 32, warps=8),  # 32 x 32 spills at D = 32 on sm_90
            "score_gradient": Tile(16 if width > 64 else 32, 32),  # and at D = 128 on sm_80
            "input_gradient": skewing,
            "table_gradient": skewing,
            "delta": Tile(64, 1),
        }
    return {
        "position_scores": Tile(64, 64, stages=3, stride=4),
        "attend": Tile(64, 32),
        "score_gradient": Tile(32, 64),
        "input_gradient": Tile(64, 64, stages=3, stride=4),
        "table_gradient": Tile(64, 64, stages=3, stride=8),
        "delta": Tile(64, 1),
    }


# A wave's scratch is two squares a head: enough heads that every multiprocessor holds two programs of 64 rows
ROWS_PER_PROCESSOR = 128


class Launch(NamedTuple):
    """What every kernel of one call shares."""

    heads: int
    total: int
    width: int
    reach: int
    padded: int
    pitch: int
    wave: int
    scale: float
    tiles: dict[str, Tile]

    def waves(self) -> range:
        return range(0, self.total, self.wave)


def plan(q: Tensor, distance: Tensor) -> Launch:
    batch, heads, padded, width = q.shape
    chosen = tiles(width, q.dtype)
    block = max(max(tile.m, tile.n) for tile in chosen.values())
    pitch = triton.cdiv(padded, block) * block
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 2
    wave = max(1, min(batch * heads, ROWS_PER_PROCESSOR * processors // pitch))
    reach = (distance.shape[0] + 1) // 2
    return Launch(heads, batch * heads, width, reach, padded, pitch, wave, 1 / math.sqrt(width), chosen)


def score_squares(q: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    """Scratch [wave, pitch, pitch] for either side's position scores."""
    dtype = torch.float32 if q.dtype == torch.float32 else torch.float16
    scratch = torch.empty(2, launch.wave, launch.pitch, launch.pitch, dtype=dtype, device=q.device)
    return scratch[0], scratch[1]


def empty_heads(q: Tensor) -> Tensor:
    """[B, H, L, D] laid out [B, L, H, D], as the next projection reads it."""
    batch, heads, length, width = q.shape
    return q.new_empty(batch, length, heads, width).transpose(1, 2)


def threshold(dropout: float) -> int:
    return philox.fixed_point(dropout)
