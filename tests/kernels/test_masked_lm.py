import sys

import pytest
import torch
from amb.kernels import masked_lm

from tests.kernels.comparison import assert_close

SIZES = (70, 5, 64, 65)


def inputs(batch, length, width, sizes, dtype, lengths, device="cpu"):
    hidden = torch.randn(batch, length, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(sum(sizes), width, device=device) / width**0.5).requires_grad_()
    bias = torch.randn(sum(sizes), device=device, requires_grad=True)
    words = torch.stack([torch.randint(0, size, (batch, length), device=device) for size in sizes], -1)
    lengths = torch.tensor(lengths, device=device)
    valid = torch.arange(length, device=device) < lengths[:, None]
    selected = (torch.rand(batch, length, device=device) < 0.4) & valid
    return hidden, weight, bias, words, selected, lengths, torch.rand(len(sizes), device=device).softmax(0), sizes


def loss_and_gradients(arguments, implementation):
    out = masked_lm(*arguments, implementation=implementation)
    return out, torch.autograd.grad(out.loss, arguments[:3])


def in_float64(hidden, weight, bias, words, selected, lengths, field_weights, sizes):
    """The same inputs as the kernel multiplies them, as float64 leaves."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight.to(hidden.dtype), bias)]
    return *leaves, words, selected, lengths, field_weights.double(), sizes


@pytest.mark.parametrize(
    ("shape", "sizes", "dtype", "lengths"),
    [
        ((2, 9, 24), SIZES, torch.float32, [9, 3]),
        ((1, 1, 16), (3,), torch.float32, [1]),
        ((3, 50, 40), SIZES, torch.float32, [50, 0, 1]),
        ((2, 33, 70), (262, 38), torch.float32, [20, 33]),
        ((2, 70, 72), SIZES, torch.bfloat16, [64, 1]),
        ((2, 9, 24), SIZES, torch.float16, [9, 5]),
    ],
)
def test_kernel_against_float64(shape, sizes, dtype, lengths, device):
    arguments = inputs(*shape, sizes, dtype, lengths, device)
    out, grads = loss_and_gradients(arguments, "triton")
    reference, exact = loss_and_gradients(in_float64(*arguments), "reference")
    assert_close((out.loss.detach(), out.note_loss), (reference.loss.detach(), reference.note_loss), 1e-5)
    assert not out.note_loss.requires_grad
    assert torch.equal(out.correct_selected, reference.correct_selected)
    assert torch.equal(out.correct_valid, reference.correct_valid)
    assert_close(grads, exact, {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype])


def test_chunks_add_up(device, monkeypatch):
    monkeypatch.setattr(sys.modules["amb.kernels.masked_lm"], "CHUNK", 32)
    arguments = inputs(2, 45, 24, (70, 5), torch.float32, [45, 20], device)
    _, grads = loss_and_gradients(arguments, "triton")
    assert_close(grads, loss_and_gradients(in_float64(*arguments), "reference")[1], 1e-5)


def test_ties_go_to_the_first_entry(device):
    """All logits equal: the likeliest word is entry 0 of each field, also where a field spans several tiles."""
    hidden, weight, bias, words, *rest = inputs(1, 8, 16, (130, 4), torch.float32, [8], device)
    words[0, :3] = 0
    out = masked_lm(hidden, torch.zeros_like(weight), torch.ones_like(bias), words, *rest, implementation="triton")
    assert torch.equal(out.correct_valid, (words == 0).sum((0, 1)))


def test_nothing_selected(device):
    arguments = list(inputs(2, 5, 16, (4, 3), torch.float32, [5, 2], device))
    arguments[4] = torch.zeros_like(arguments[4])
    out = masked_lm(*arguments, implementation="triton")
    reference = masked_lm(*arguments, implementation="reference")
    torch.testing.assert_close(out.loss, reference.loss)
    assert out.correct_selected.tolist() == [0, 0]


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_parts_of_a_batch_add_up(implementation, device):
    """With the counts of the whole batch, the losses and gradients of its parts, one of them empty, are sums."""
    arguments = inputs(4, 12, 16, (7, 3), torch.float32, [12, 5, 0, 9], device)
    hidden, weight, bias, words, selected, lengths, *rest = arguments
    whole, grads = loss_and_gradients(arguments, implementation)
    counts = torch.stack([selected.sum(), lengths.sum()])
    parts = [
        masked_lm(
            hidden[rows], weight, bias, words[rows], selected[rows], lengths[rows], *rest,
            counts=counts, implementation=implementation,
        )
        for rows in (slice(0, 1), slice(1, 1), slice(1, 4))
    ]  # fmt: skip
    total = sum(part.loss for part in parts)
    torch.testing.assert_close(total, whole.loss)
    assert_close(torch.autograd.grad(total, arguments[:3]), grads, 1e-5)
    for name in ("correct_selected", "correct_valid"):
        assert torch.equal(sum(getattr(part, name) for part in parts), getattr(whole, name))


def test_pad_gets_no_gradient_and_same_bits_each_time(device):
    arguments = inputs(2, 20, 16, (70, 5), torch.float32, [20, 4], device)
    first, again = (loss_and_gradients(arguments, "triton")[1] for _ in range(2))
    assert all(map(torch.equal, first, again))
    assert not first[0][1, 4:].any()
