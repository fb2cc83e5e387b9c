"""The encoder in its various forms, and heads. Beside Hugging Face's BertModel it is in test_published.py."""

import pytest
import torch

from amb.config import PRESETS, Config
from amb.model import AdversarialMidiBert, Encoder, LinearClassifier, statistics

SIZES = (20, 14, 9, 33)


def settings(**changes) -> Config:
    return Config(**{**PRESETS["tiny"], "notes": 24, "reach": 32, "dropout": 0.0, "attention_dropout": 0.0, **changes})


def random_words(batch: int, length: int) -> torch.Tensor:
    return torch.stack([torch.randint(size, (batch, length)) for size in SIZES], -1)


def test_sequences_beyond_the_reach_are_encoded_in_windows():
    model = Encoder(settings(), SIZES).eval()  # of 32 words
    words = random_words(3, 70)
    whole = model(words, torch.tensor([70, 30, 48]))
    assert whole.shape[:2] == (3, 70)
    assert torch.isfinite(whole).all()
    for first, last in ((0, 32), (32, 64), (64, 70)):
        alone = model(words[:1, first:last], torch.tensor([last - first]))
        torch.testing.assert_close(whole[:1, first:last], alone, rtol=1e-5, atol=1e-5)
    short = model(words[2:, :48], torch.tensor([48]))  # in other company, and less padded
    torch.testing.assert_close(whole[2, :48], short[0], rtol=1e-5, atol=1e-5)


def test_recomputing_gives_the_same_bits_and_keeps_less():
    model = Encoder(settings(dropout=0.2, attention_dropout=0.2), SIZES).train()
    words, lengths = random_words(2, 24), torch.tensor([24, 20])
    results = []
    for model.recompute in (False, True):
        kept = {}

        def keep(x, kept=kept):
            kept[x.data_ptr()] = x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            hidden = model(words, lengths, 5)
        gradients = torch.autograd.grad(hidden.square().sum(), list(model.parameters()), allow_unused=True)
        results.append((sum(kept.values()), hidden, *gradients))
    (much, *plain), (little, *again) = results
    assert little < much / 3
    assert all(map(torch.equal, plain, again))


def test_a_compiled_encoder_gives_the_same_numbers():
    encoder = Encoder(settings(layers=1), SIZES).train()
    words, lengths = random_words(2, 16), torch.tensor([16, 7])
    results = []
    for function in (encoder, torch.compile(encoder, backend="aot_eager")):
        out = function(words, lengths, seed=3)
        results.append([out, *torch.autograd.grad(out.square().sum(), encoder.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_statistics_are_those_of_the_notes_alone():
    states, lengths = [torch.randn(3, 10, 4), torch.randn(3, 10, 4)], torch.tensor([10, 4, 1])
    got = statistics(states, lengths).view(3, 2, 3, 4)
    for row, n in enumerate(lengths):
        for layer, hidden in enumerate(states):
            notes = hidden[row, :n]
            step = notes.diff(dim=0).square().sum(0).div(max(1, n - 1)).sqrt()
            torch.testing.assert_close(got[row, layer], torch.stack([notes.mean(0), notes.std(0, correction=0), step]))


@pytest.mark.parametrize("class_weights", [None, torch.tensor([1.0, 3.0, 0.5])])
def test_a_linear_head_becomes_the_logistic_regression(class_weights):
    linear_model = pytest.importorskip("sklearn.linear_model")
    head, generator = LinearClassifier(settings(), 3), torch.Generator().manual_seed(0)
    vectors = 5 + 0.1 * torch.randn(60, head.inputs, generator=generator)
    vectors[:, 7] = 2.0  # a constant
    labels = torch.randint(3, (60,), generator=generator)
    logits = head.fit(vectors, labels, class_weights, strength=0.01)
    states, by_hand = vectors[:, : head.states], vectors[:, head.states :]
    cuts = by_hand.sort(0)[0][[0, 7, 15, 22, 30, 37, 44, 52, 59]]
    scaled = [5 * ((by_hand - a) / (b - a)).clamp(0, 1) for a, b in zip(cuts, cuts[1:], strict=False)]
    scaled = torch.cat([(states - states.mean(0)) / states.std(0, correction=0).clamp(min=1e-4), *scaled], 1).double()
    weights = None if class_weights is None else dict(enumerate(class_weights.tolist()))
    model = linear_model.LogisticRegression(C=0.01, class_weight=weights, tol=1e-8, max_iter=1000).fit(scaled, labels)
    expected = torch.from_numpy(model.predict_proba(scaled)).float()
    torch.testing.assert_close(logits.softmax(-1), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("preset", "millions"), [("small", 3.9), ("base", 89.7)])
def test_parameter_counts_are_those_of_the_docstrings(preset, millions):
    with torch.device("meta"):
        model = AdversarialMidiBert(Config(**PRESETS[preset]), (262, 134, 135, 262, 134, 38, 260, 55))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
