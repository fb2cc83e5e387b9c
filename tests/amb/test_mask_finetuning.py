"""Hiding notes, the loss of those that stay, and which layers train."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from amb.config import PRESETS, Config
from amb.mask_finetuning import ENCODER, IGNORED, finetune_loss, hide_notes
from amb.model import Classifier

SIZES = (12, 9, 20)
MASK = torch.tensor([size - 1 for size in SIZES])
CONFIG = replace(Config(**PRESETS["tiny"]), dropout=0.0, attention_dropout=0.0)


def random_words(generator, batch=5, notes=30):
    lengths = torch.randint(3, notes + 1, (batch,), generator=generator)
    words = torch.stack([torch.randint(0, size - 2, (batch, notes), generator=generator) for size in SIZES], -1)
    return words, lengths


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(torch.seed() % 2**31)


def model(level, classes=4):
    torch.manual_seed(0)
    return Classifier(CONFIG, SIZES, level, classes)


def test_hidden_notes_are_mask_in_all_fields_and_as_many_as_asked(generator):
    words, lengths = random_words(generator, batch=40)
    hidden_words, hidden = hide_notes(words, lengths, MASK, 0.3, seed=int(lengths.sum()))
    assert hidden.sum(dim=1).tolist() == [int(0.3 * n + 1e-6) for n in lengths.tolist()]
    assert not hidden[torch.arange(30) >= lengths[:, None]].any()
    assert (hidden_words[hidden] == MASK).all()
    assert torch.equal(hidden_words[~hidden], words[~hidden])
    other = hide_notes(words, lengths, MASK, 0.3, seed=1 + int(lengths.sum()))[1]
    assert not torch.equal(hidden, other)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 1.0, 0.5, 2.0])])
def test_masked_padded_and_unlabelled_notes_carry_no_loss(weights, generator):
    """The loss is the mean over exactly the others, whatever labels the rest is given."""
    words, lengths = random_words(generator)
    labels = torch.randint(-1, 4, words.shape[:2], generator=generator)
    labels[torch.arange(30) >= lengths[:, None]] = IGNORED
    classifier = model("note").eval()
    loss, hits, counted = finetune_loss(classifier, words, lengths, labels, MASK, weights, 0.4, seed=5)
    seen, hidden = hide_notes(words, lengths, MASK, 0.4, seed=5)
    keep = ~hidden & (labels != IGNORED)
    logits = classifier(seen, lengths, 5, ENCODER)
    assert loss.item() == pytest.approx(F.cross_entropy(logits[keep], labels[keep], weights).item(), rel=1e-5)
    assert counted == keep.sum()
    assert hits == (logits.argmax(-1)[keep] == labels[keep]).sum()
    changed = torch.where(hidden & (labels != IGNORED), (labels + 1) % 4, labels)
    assert finetune_loss(classifier, words, lengths, changed, MASK, weights, 0.4, seed=5)[0] == loss


def test_a_batch_without_labels_gives_no_loss_and_no_nan(generator):
    words, lengths = random_words(generator)
    classifier = model("note")
    labels = torch.full(words.shape[:2], IGNORED)
    loss, hits, counted = finetune_loss(classifier, words, lengths, labels, MASK, None, 0.1, seed=0)
    loss.backward()
    assert (loss.item(), hits, counted) == (0, 0, 0)
    assert all(p.grad is None or p.grad.isfinite().all() for p in classifier.parameters())


@pytest.mark.parametrize(("train_layers", "trained"), [(0, 0), (1, 1), (2, 2), (5, 2)])
def test_frozen_layers_stay_as_they_are(generator, train_layers, trained):
    words, lengths = random_words(generator)
    classifier = model("sequence")
    classifier.freeze(train_layers)
    loss, *_ = finetune_loss(classifier, words, lengths, torch.tensor([0, 1, 2, 3, 0]), MASK, None, 0.1, seed=0)
    loss.backward()
    layers = classifier.encoder.layers
    moved = [all(p.grad is not None for p in layer.parameters()) for layer in layers]
    assert moved == [index >= len(layers) - trained for index in range(len(layers))]
    assert (classifier.encoder.words.grad is not None) == (train_layers >= len(layers))
    assert all(p.grad is not None for p in classifier.head.parameters())
