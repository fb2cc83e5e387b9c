import pytest
import torch
from amb.kernels import masker_loss
from amb.kernels.masker_loss import _forward, masker_loss_reference


def inputs(batch, length, device="cpu", share_selected=0.5):
    scores = torch.rand(batch, length, device=device, requires_grad=True)
    note_loss = 3 * torch.rand(batch, length, device=device)
    selected = torch.rand(batch, length, device=device) < share_selected
    changed = selected & (torch.rand(batch, length, device=device) < 0.9)
    return scores, note_loss, selected, changed


def by_loop(scores, note_loss, selected, changed, share=0.3):
    total = 0.0
    for b in range(len(scores)):
        notes = [i for i in range(scores.shape[1]) if changed[b, i]]
        m = min(int(selected[b].sum()) * round(1000 * share) // 1000, len(notes) // 2)
        hardest = sorted(notes, key=lambda i: (-note_loss[b, i].item(), i))[:m]
        easiest = sorted(notes, key=lambda i: (note_loss[b, i].item(), i))[:m]
        if m:
            total = (
                total + sum((scores[b, i] - 1) ** 2 for i in hardest) / m + sum(scores[b, i] ** 2 for i in easiest) / m
            )
    return total / len(scores)


@pytest.mark.parametrize(("batch", "length"), [(3, 40), (1, 2), (4, 1), (2, 150)])
def test_kernel_and_reference_against_a_loop(batch, length, device):
    scores, note_loss, selected, changed = inputs(batch, length, device)
    exact = scores.detach().double().requires_grad_()
    truth = by_loop(exact, note_loss, selected, changed)
    expected = torch.zeros_like(exact)
    if isinstance(truth, torch.Tensor):
        expected = torch.autograd.grad(truth, exact)[0]
    for implementation in ("triton", "reference"):
        loss = masker_loss(scores, note_loss, selected, changed, implementation=implementation)
        torch.testing.assert_close(loss.item(), float(torch.as_tensor(truth).detach()), rtol=1e-5, atol=1e-6)
        gradient = torch.autograd.grad(2 * loss, scores)[0]
        torch.testing.assert_close(gradient.double(), 2 * expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share_selected", [0.0, 0.05, 0.1])
def test_few_notes(share_selected, device):
    arguments = inputs(8, 20, device, share_selected)
    kernel, reference = (masker_loss(*arguments, implementation=name) for name in ("triton", "reference"))
    torch.testing.assert_close(kernel, reference)
    both = (torch.autograd.grad(loss, arguments[0])[0] for loss in (kernel, reference))
    torch.testing.assert_close(*both)


def test_ties_go_to_the_earlier_note(device):
    scores, note_loss, selected, changed = inputs(4, 60, device)
    note_loss = (note_loss * 2).floor() - 3  # few different values, negative ones and zero among them
    kernel, reference = (
        torch.autograd.grad(masker_loss(scores, note_loss, selected, changed, implementation=name), scores)[0]
        for name in ("triton", "reference")
    )
    assert torch.equal(kernel != 0, reference != 0)
    torch.testing.assert_close(kernel, reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores(dtype, device):
    scores, *rest = inputs(2, 30, device)
    scores = scores.detach().to(dtype).requires_grad_()
    loss = masker_loss(scores, *rest, implementation="triton")
    gradient = torch.autograd.grad(loss, scores)[0]
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    exact = masker_loss_reference(scores.detach().double(), *rest, 0.3)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


def test_no_sequences_cost_nothing(device):
    for implementation in ("triton", "reference"):
        scores, *rest = inputs(0, 12, device)
        loss = masker_loss(scores, *rest, implementation=implementation)
        loss.backward()
        assert loss.item() == 0
        assert scores.grad.shape == (0, 12)


def test_floor_of_the_share_is_exact(device):
    """0.3 x 10 notes are 3, although 0.3 in floating point is a little less."""
    scores = torch.full((1, 10), 0.5, device=device, requires_grad=True)
    note_loss = torch.arange(10.0, device=device)[None]
    everything = torch.ones(1, 10, dtype=torch.bool, device=device)
    for implementation in ("triton", "reference"):
        loss = masker_loss(scores, note_loss, everything, everything, implementation=implementation)
        gradient = torch.autograd.grad(loss, scores)[0]
        assert (gradient != 0).sum() == 6


def test_registered(device):
    torch.library.opcheck(_forward, (*inputs(2, 16, device), 300))


@pytest.mark.parametrize("row", range(4))
def test_machine_code(row, static_rows):
    report = static_rows("masker_loss")[row]
    assert not report["failure"]
    assert report["stack_bytes"] == 0
