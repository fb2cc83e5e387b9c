"""The encoder beside Hugging Face's BertModel, and what padding may not do."""

import math

import pytest
import torch
from torch import nn

from amb.config import PRESETS, Config
from amb.model import AdversarialMidiBert, Encoder, LinearClassifier, statistics
from benchmarks.step import HuggingFaceEncoder

pytest.importorskip("transformers")
SIZES = (20, 14, 9, 33)


def settings(**changes) -> Config:
    return Config(**{**PRESETS["tiny"], "notes": 24, "reach": 32, "dropout": 0.0, "attention_dropout": 0.0, **changes})


def random_words(batch: int, length: int) -> torch.Tensor:
    return torch.stack([torch.randint(size, (batch, length)) for size in SIZES], -1)


@torch.no_grad()
def hugging_face_twin(ours: Encoder, config: Config) -> nn.Module:
    """A BertModel with the same weights; its inputs are embeddings, which the test makes the paper's way."""
    peer = HuggingFaceEncoder(config, SIZES).to(ours.words.dtype)
    peer.bert.embeddings.token_type_embeddings.weight[0] = ours.token_type
    peer.bert.embeddings.LayerNorm.load_state_dict(ours.norm.state_dict())
    for layer, theirs in zip(ours.layers, peer.bert.encoder.layer, strict=True):
        attention = theirs.attention.self
        parts = layer.query_key_value.weight.chunk(3), layer.query_key_value.bias.chunk(3)
        for target, weight, bias in zip((attention.query, attention.key, attention.value), *parts, strict=True):
            target.weight.copy_(weight)
            target.bias.copy_(bias)
        attention.distance_embedding.weight.copy_(layer.distance)
        theirs.attention.output.dense.load_state_dict(layer.attention_out.state_dict())
        theirs.attention.output.LayerNorm.load_state_dict(layer.attention_norm.state_dict())
        theirs.intermediate.dense.load_state_dict(layer.up.state_dict())
        theirs.output.dense.load_state_dict(layer.down.state_dict())
        theirs.output.LayerNorm.load_state_dict(layer.output_norm.state_dict())
    return peer.bert


def paper_embedding(ours: Encoder, words: torch.Tensor) -> torch.Tensor:
    """F embeddings of size e, times sqrt(e), concatenated and projected: the paper's form of our projected table."""
    e = ours.words.shape[1]
    parts = [table[words[..., f]] for f, table in enumerate(ours.words.split(ours.sizes))]
    return ours.projection(torch.cat(parts, -1) * math.sqrt(e))


@pytest.mark.parametrize("length", [1, 17, 24])
def test_outputs_and_gradients_equal_hugging_face(length):
    config = settings()
    ours = Encoder(config, SIZES, torch.float64).double().train()
    for parameter in ours.parameters():  # initial biases are zero: a test on them would see nothing
        nn.init.normal_(parameter, std=0.2)
    twin = hugging_face_twin(ours, config)
    words, lengths = random_words(3, length), torch.tensor([length, max(1, length - 5), 1])
    valid = torch.arange(length) < lengths[:, None]

    hidden = ours(words, lengths)
    expected = twin(inputs_embeds=paper_embedding(ours, words), attention_mask=valid.double()).last_hidden_state
    torch.testing.assert_close(hidden[valid], expected[valid], rtol=1e-9, atol=1e-9)

    direction = torch.randn_like(hidden) * valid[..., None]
    ours_by_name = dict(ours.named_parameters())
    mine = dict(zip(ours_by_name, torch.autograd.grad((hidden * direction).sum(), ours_by_name.values()), strict=True))
    shared = [ours.words, ours.projection.weight, twin.encoder.layer[0].attention.self.distance_embedding.weight]
    shared += [twin.encoder.layer[1].attention.self.key.weight, twin.encoder.layer[1].output.dense.bias]
    theirs = torch.autograd.grad((expected * direction).sum(), shared)
    keys = mine["layers.1.query_key_value.weight"].chunk(3)[1]
    names = mine["words"], mine["projection.weight"], mine["layers.0.distance"], keys, mine["layers.1.down.bias"]
    for gradient, reference in zip(names, theirs, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-9)


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
    vectors = 5 + 0.1 * torch.randn(60, head.classify.in_features, generator=generator)
    vectors[:, 7] = 2.0  # a constant
    labels = torch.randint(3, (60,), generator=generator)
    logits = head.fit(vectors, labels, class_weights, strength=0.01)
    scaled = ((vectors - vectors.mean(0)) / vectors.std(0, correction=0).clamp(min=1e-4)).double().numpy()
    scaled[:, head.states :] *= 4
    weights = None if class_weights is None else dict(enumerate(class_weights.tolist()))
    expected = linear_model.LogisticRegression(C=0.01, class_weight=weights, tol=1e-8, max_iter=1000)
    expected = torch.from_numpy(expected.fit(scaled, labels).predict_proba(scaled)).float()
    torch.testing.assert_close(logits.softmax(-1), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("preset", "millions"), [("small", 3.9), ("base", 89.7)])
def test_parameter_counts_are_those_of_the_docstrings(preset, millions):
    with torch.device("meta"):
        model = AdversarialMidiBert(Config(**PRESETS[preset]), (262, 134, 135, 262, 134, 38, 260, 55))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
