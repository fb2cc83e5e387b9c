"""The masker's target and loss (method, step 5).

Among a sequence's changed notes, with m = min(floor(share * k), changed // 2) and k the number selected:

    target 1 for the m notes with the highest recovery loss, 0 for the m with the lowest,
    L_masker = mean over the sequences of ( mean over the first m of (s - 1)^2 + mean over the last m of s^2 )

`changed // 2` only matters for a handful of notes: without it the two groups would overlap.

The kernel gives a sequence to each program, finds both groups as sampling.py finds its notes, and writes the gradient,
2 (s - target) / (m B) in the groups, beside the loss: backward is one multiplication. Floor: launch latency.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import resolve
from .sampling import block_of, highest, order_bits, top_k, warps_of
from .static import CHECKED, PAPER, Case, DeviceCase, Size, training_cases


def masker_loss(
    scores: Tensor,
    note_loss: Tensor,
    selected: Tensor,
    changed: Tensor,
    *,
    share: float = 0.3,
    implementation: str | None = None,
) -> Tensor:
    """Scalar loss of the masker: scores [B, L] in (0, 1); note_loss [B, L]; selected, changed [B, L] bool.

    Gradients flow to the scores only. Ties go to the earlier note in either group. No sequences at all cost 0.
    """
    if resolve(scores, implementation) == "triton":
        return _forward(scores, note_loss.detach(), selected, changed, round(share * 1000))[0]
    return masker_loss_reference(scores, note_loss, selected, changed, share)


def masker_loss_reference(scores: Tensor, note_loss: Tensor, selected: Tensor, changed: Tensor, share: float) -> Tensor:
    """The equation above in tensors over the whole batch."""
    k, available = selected.sum(1, keepdim=True), changed.sum(1, keepdim=True)
    # a product in float32 could fall just below a whole number: share in thousandths keeps the floor exact
    m = torch.minimum(k * round(share * 1000) // 1000, available // 2)
    hardest = top_k(note_loss, changed, m)
    easiest = top_k(-note_loss, changed, m)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    error = hardest * (scores - 1) ** 2 + easiest * scores**2
    return (error.sum(1) / m[:, 0].clamp(min=1)).sum() / max(len(scores), 1)


@triton.jit
def masker_loss_kernel(
    scores, note_loss, selected, changed, loss, grad, batch, length, thousandths, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    note = tl.arange(0, BLOCK)
    inside = note < length
    at = row.to(tl.int64) * length + note
    available = tl.load(changed + at, inside, 0) != 0
    k = tl.sum((tl.load(selected + at, inside, 0) != 0).to(tl.int32), 0)
    m = tl.minimum(k * thousandths // 1000, tl.sum(available.to(tl.int32), 0) // 2)

    cost = tl.load(note_loss + at, inside, 0.0).to(tl.float32)
    hardest = highest(order_bits(cost), note, available, m)
    easiest = highest(order_bits(-cost), note, available, m)
    error = tl.load(scores + at, inside, 0.0).to(tl.float32) - tl.where(hardest, 1.0, 0.0)
    error = tl.where(hardest | easiest, error, 0.0)
    group = tl.maximum(m, 1).to(tl.float32)
    tl.store(loss + row, tl.sum(error * error, 0) / group)
    tl.store(grad + at, 2 * error / (group * batch), inside)


@torch.library.custom_op("kernels::masker_loss", mutates_args=())
def _forward(
    scores: Tensor, note_loss: Tensor, selected: Tensor, changed: Tensor, thousandths: int
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient [B, L]."""
    batch, length = scores.shape
    loss, grad = (scores.new_empty(shape, dtype=torch.float32) for shape in (batch, scores.shape))
    masker_loss_kernel[(batch,)](
        scores.contiguous(), note_loss.contiguous(), selected.contiguous().view(torch.uint8),
        changed.contiguous().view(torch.uint8), loss, grad, batch, length, thousandths,
        BLOCK=block_of(length), num_warps=warps_of(length),
    )  # fmt: skip
    return loss.sum() / max(batch, 1), grad


@_forward.register_fake
def _(scores, note_loss, selected, changed, thousandths):
    return scores.new_empty((), dtype=torch.float32), scores.new_empty(scores.shape, dtype=torch.float32)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    return (ctx.saved_tensors[0] * grad).to(ctx.dtype), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def static_cases() -> list[Case]:
    """1,024 notes (the paper's) and 4,096; floor for 32 sequences of 1,024 notes at 3.0 TB/s."""
    signature = dict.fromkeys(("scores", "note_loss", "loss", "grad"), "*fp32")
    signature |= {"selected": "*u8", "changed": "*u8", "batch": "i32", "length": "i32:16", "thousandths": "i32"}
    floor_us = 32 * 1024 * (4 + 4 + 1 + 1 + 4) / 3.0e6
    return [
        Case(
            f"masker_loss L={length}",
            masker_loss_kernel,
            signature,
            {"BLOCK": block_of(length)},
            num_warps=warps_of(length),
            floor_us=floor_us,
        )
        for length in (1024, 4096)
    ]


def device_cases(device: torch.device | str = "cuda", timed: Size = PAPER, checked: Size = CHECKED) -> list[DeviceCase]:
    """Floors: 14 bytes a note forward, 8 backward, at 3.0 TB/s."""

    def draw(size: Size) -> dict[str, Tensor]:
        scores, note_loss, lots = torch.rand(3, size.batch, size.length, device=device)
        return {
            "scores": scores.requires_grad_(),
            "note_loss": note_loss,
            "selected": lots < 0.5,
            "changed": lots < 0.45,
        }

    notes = timed.batch * timed.length
    reference = partial(masker_loss_reference, share=0.3)
    return training_cases(masker_loss, reference, draw, (14 * notes / 3.0e6, 8 * notes / 3.0e6), timed, checked)
