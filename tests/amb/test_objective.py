"""One step of the objective beside the method written out note by note."""

import math

import pytest
import torch

from amb import kernels, mask_book
from amb.config import PRESETS, Config
from amb.model import AdversarialMidiBert
from amb.objective import (
    Part,
    Vocabulary,
    add_up,
    dropout_seed,
    field_weights,
    in_parts,
    masker_loss,
    pretrain_loss,
    uniform_weights,
)

VALUES, SIZES = (12, 7, 30), (18, 13, 36)
VOCABULARY = Vocabulary(mask=torch.tensor([13, 8, 31]), values=torch.tensor(VALUES))
PAD = torch.tensor(VALUES)


def build(objective="adversarial", seed=0, **changes):
    torch.manual_seed(seed)
    settings = {**PRESETS["tiny"], "notes": 40, "dropout": 0.0, "attention_dropout": 0.0, "objective": objective}
    config = Config(**{**settings, **changes})
    return AdversarialMidiBert(config, SIZES).train(), config


def batch(lengths, length=40):
    words = torch.stack([torch.randint(values, (len(lengths), length)) for values in VALUES], -1)
    lengths = torch.tensor(lengths)
    words[torch.arange(length) >= lengths[:, None]] = PAD
    return words, lengths


def test_a_step_equals_the_method_written_out():
    model, config = build()
    words, lengths = batch([40, 40, 25, 12, 2])
    book = mask_book.pack_bits(torch.rand(5, 40) < 0.2)
    weights = torch.tensor([0.5, 0.2, 0.3])
    inputs = []
    model.encoder.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    step = pretrain_loss(model, words, lengths, book, VOCABULARY, weights, config, seed=11)

    clean, corrupted = inputs
    assert torch.equal(clean, words)
    scores = model.masker(model.encoder(words, lengths))
    logits = model.recoverer(model.encoder(corrupted, lengths))
    selected_sum, valid_sum = [0.0] * 3, [0.0] * 3
    note_loss = torch.zeros(5, 40)
    # which notes are selected has tests of its own; here it is that these are, and the sums
    sample = kernels.adversarial_sample(words, lengths, *VOCABULARY, scores=scores, frozen=book, seed=11, stream=0)
    assert torch.equal(sample.words, corrupted)
    for b, n in enumerate(lengths.tolist()):
        for i in range(n):
            for f in range(3):
                cost = -logits[f][b, i].log_softmax(-1)[words[b, i, f]].item()
                note_loss[b, i] += weights[f] * cost
                valid_sum[f] += cost
                selected_sum[f] += cost * sample.selected[b, i].item()
    masker = masker_loss_by_loop(scores, note_loss, sample.selected, sample.changed, 0.3).item()
    sums = zip(weights.tolist(), selected_sum, valid_sum, strict=True)
    recovery = sum(w * (s / int(step.selected) + v / int(step.valid)) for w, s, v in sums)
    assert int(step.valid) == int(lengths.sum())
    assert int(step.selected) == int(sample.selected.sum()) > 0
    assert math.isclose(step.recovery.item(), recovery, rel_tol=1e-5)
    assert math.isclose(step.masker.item(), masker, rel_tol=1e-5)
    assert math.isclose(step.loss.item(), recovery + masker, rel_tol=1e-5)


@pytest.mark.parametrize("objective", ["adversarial", "random"])
def test_gradients_reach_what_they_should(objective):
    model, config = build(objective)
    inputs = *batch([40, 40]), mask_book.empty_book(2, 40), VOCABULARY, uniform_weights(3), config
    pretrain_loss(model, *inputs, seed=1).loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("masker") and objective == "random":
            assert parameter.grad is None
        else:
            assert parameter.grad.abs().sum() > 0, name


def test_random_objective_selects_its_share_of_each_sequence():
    model, config = build("random")
    words, lengths = batch([40, 20, 6])
    step = pretrain_loss(model, words, lengths, None, VOCABULARY, uniform_weights(3), config, 5)
    assert int(step.selected) == int(0.15 * 40) + int(0.15 * 20) + int(0.15 * 6)
    assert step.masker.item() == 0


@pytest.mark.parametrize("objective", ["adversarial", "random"])
@pytest.mark.parametrize(("size", "recompute"), [(2, False), (1, True), (5, True)])
def test_parts_of_a_batch_add_up_to_the_whole(objective, size, recompute):
    model, config = build(objective)
    words, lengths = batch([40, 40, 25, 12, 2])
    frozen = mask_book.pack_bits(torch.rand(5, 40) < 0.2)
    weights = torch.tensor([0.5, 0.2, 0.3])
    whole = pretrain_loss(model, words, lengths, frozen, VOCABULARY, weights, config, 9)
    whole.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    model.encoder.recompute = recompute
    parts = []
    for rows, part in in_parts(words, lengths, frozen, config, 9, 0, size):
        inputs = words[rows], lengths[rows], frozen[rows], VOCABULARY, weights, config, 9, part
        parts.append(pretrain_loss(model, *inputs))
        parts[-1].loss.backward()
    for ours, expected in zip(add_up(parts), whole, strict=True):
        torch.testing.assert_close(ours, expected.detach())
    assert len(parts) == math.ceil(5 / size)
    assert part.counts.tolist() == [whole.selected, whole.valid, 5]
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, expected in gradients.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, expected, rtol=1e-4, atol=1e-6)


def test_parts_of_a_batch_drop_differently():
    """The first part's seed is the batch's; all are of 64 bits; on the device as on the host."""
    for seed in (0, 5, (2**31 - 1) << 32):
        seeds = [dropout_seed(seed, Part(row)) for row in range(64)]
        assert seeds[0] == seed
        assert len(set(seeds)) == 64
        assert [dropout_seed(torch.tensor(seed), Part(row)).item() for row in range(1, 64)] == seeds[1:]


def test_field_weights():
    weights = field_weights(torch.tensor([50, 100, 0]), torch.tensor(100))
    torch.testing.assert_close(weights, torch.tensor([2.0, 1.0, 20.0]) / 23)
    torch.testing.assert_close(uniform_weights(4), torch.full((4,), 0.25))


@pytest.mark.parametrize("objective", ["adversarial", pytest.param("random", marks=pytest.mark.slow)])
def test_a_step_on_triton_kernels_equals_the_references(objective, monkeypatch):
    """All kernels of a training step together, interpreted where there is no GPU: same notes, loss and gradients."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, config = build(objective, layers=1, notes=21, reach=24)
    model = model.to(device)
    words, lengths = (x.to(device) for x in batch([21, 9, 1], 21))
    vocabulary = Vocabulary(VOCABULARY.mask.to(device), VOCABULARY.values.to(device))
    frozen = mask_book.pack_bits(torch.rand(3, 21) < 0.2).to(device)
    results = []
    for implementation in ("reference", "triton"):
        monkeypatch.setenv("AMB_KERNELS", implementation)
        model.zero_grad()
        weights = torch.tensor([0.5, 0.2, 0.3], device=device)
        step = pretrain_loss(model, words, lengths, frozen, vocabulary, weights, config, seed=4)
        step.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((step, gradients))
    (step, gradients), (triton_step, triton_gradients) = results
    for ours, reference in zip(triton_step, step, strict=True):
        torch.testing.assert_close(ours.to(reference.dtype), reference, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == triton_gradients.keys()
    for name, reference in gradients.items():
        error = (triton_gradients[name] - reference).norm() / reference.norm().clamp(min=1e-6)
        assert error < 2e-5, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_never_waits_for_the_host():
    model, config = build(dropout=0.1, attention_dropout=0.1)
    model = model.cuda()
    words, lengths = (x.cuda() for x in batch([40, 30]))
    vocabulary = Vocabulary(VOCABULARY.mask.cuda(), VOCABULARY.values.cuda())
    book, weights = mask_book.empty_book(2, 40).cuda(), uniform_weights(3).cuda()
    for seed in range(2):  # the first call compiles
        torch.cuda.set_sync_debug_mode("error" if seed else "default")
        try:
            pretrain_loss(model, words, lengths, book, vocabulary, weights, config, seed).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad.isfinite().all() for p in model.parameters())


def masker_loss_by_loop(scores, note_loss, selected, changed, share):
    total = torch.zeros(())
    for b in range(len(scores)):
        notes = [i for i in range(scores.shape[1]) if changed[b, i]]
        m = min(int(selected[b].sum()) * round(1000 * share) // 1000, len(notes) // 2)
        hardest = sorted(notes, key=lambda i: (-note_loss[b, i].item(), i))[:m]
        easiest = sorted(notes, key=lambda i: (note_loss[b, i].item(), i))[:m]
        if m:
            total = total + ((scores[b, hardest] - 1) ** 2).mean() + (scores[b, easiest] ** 2).mean()
    return total / max(len(scores), 1)


@pytest.mark.parametrize("share_selected", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("batch", "length"), [(3, 40), (4, 1), (0, 12), (1, 10)])
def test_masker_loss_against_a_loop(batch, length, share_selected):
    """Few different losses, so that there are ties; few notes and none; 0.3 x 10 notes are 3."""
    scores = torch.rand(batch, length, requires_grad=True)
    note_loss = torch.randint(4, (batch, length)).float()
    selected = torch.rand(batch, length) < share_selected
    changed = selected & (torch.rand(batch, length) < 0.9)
    arguments = note_loss, selected, changed, 0.3
    losses = [function(scores, *arguments) for function in (masker_loss, masker_loss_by_loop)]
    torch.testing.assert_close(*losses)
    gradients = [
        torch.autograd.grad(loss, scores)[0] if loss.requires_grad else torch.zeros_like(scores) for loss in losses
    ]
    torch.testing.assert_close(*gradients)
