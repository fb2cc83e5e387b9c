"""Every operation of kernels/, forward and backward, beside what one would write for it with torch.

    python -m benchmarks kernels [--config small | base] [--batch B] [--rounds 7] [--compile] [--out FILE]

Inputs are those the operations meet in training: words of real pieces, and what an untrained encoder of that size makes
of them. On CUDA the Triton kernels are timed, on the CPU the CPU's path; `reference` is the readable form in the
operation's own file, where that is not what the CPU runs anyway. Before the timing, outputs are compared.

For attention, `Hugging Face` builds an L x L x D tensor of distances. `flex` is FlexAttention, compiled, with both
position terms computed beforehand as L x (2L-1) products: the best form of the same maths that we could write on it
(CUDA only). `SDPA, no positions` is PyTorch's attention without any position term: not the same function, but
the floor that libraries reach for plain attention. Attention is timed without dropout, the others with it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from amb.kernels.attention import relative_attention_reference
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from amb import kernels, mask_book
from amb.config import Config
from amb.model import AdversarialMidiBert, compute_dtype, linear
from amb.objective import uniform_weights
from benchmarks.inputs import filled_sequences, open_corpus, parser_of, setting, special_words
from benchmarks.timing import print_table, take_turns, write

OTHER = "SDPA, no positions"  # the only peer that is not the same function


class Op(NamedTuple):
    """One operation on its inputs: `functions` take nothing, ours is the first; `inputs` get gradients."""

    name: str
    inputs: list[Tensor]
    functions: dict[str, Callable[[], Tensor]]


def operations(model: AdversarialMidiBert, words: Tensor, config: Config, dropout: float) -> list[Op]:
    """All operations on the activations that `model` has for words [B, L, F]."""
    encoder, layer, device = model.encoder, model.encoder.layers[0], words.device
    special, sizes = special_words(config, device)
    lengths = torch.full((len(words),), words.shape[1], device=device)
    with torch.no_grad():
        x = encoder_input(encoder, words)
        heads = rearrange(linear(x, layer.query_key_value), "b l (qkv h e) -> qkv b h l e", qkv=3, h=config.heads)
        attended = kernels.relative_attention(*heads, layer.distance)
        y = linear(rearrange(attended, "b h l e -> b l (h e)"), layer.attention_out)
        expanded = linear(x, layer.up, bias=False)
        hidden = encoder(words, lengths)
        scores = model.masker(hidden)
        field_weights = uniform_weights(len(sizes)).to(device)
        out = model.recoverer.out
        book = mask_book.empty_book(*words.shape[:2]).to(device)
        chance = dict(scores=scores, frozen=book, rate=(config.mask_low, config.mask_high), cap=config.mask_cap)
        sample = kernels.adversarial_sample(words, lengths, *special, **chance, seed=1)
        arguments = words, sample.selected, lengths, field_weights, sizes
        note_loss = kernels.masked_lm(hidden, out.weight, out.bias, *arguments).note_loss
    q, k, v = (head.contiguous().requires_grad_() for head in heads)
    distance = layer.distance.detach().to(q.dtype).requires_grad_()
    x, y, expanded, hidden, scores = (t.clone().requires_grad_() for t in (x, y, expanded, hidden, scores))

    attention = {
        "ours": lambda: kernels.relative_attention(q, k, v, distance),
        "reference": lambda: relative_attention_reference(q, k, v, distance),
        "Hugging Face": lambda: eager_attention(q, k, v, distance),
    }
    if device.type == "cuda":
        flex = flex_attention()
        attention["flex, compiled"] = lambda: flex(q, k, v, distance)
    attention[OTHER] = lambda: F.scaled_dot_product_attention(q, k, v) + 0 * distance.sum()

    norm, joint, bias = encoder.norm, layer.attention_norm, layer.up.bias
    embedding = [encoder.words, encoder.projection.weight, encoder.projection.bias, encoder.token_type]
    recover, choice = (hidden, out.weight, out.bias), (sample.selected, sample.changed)
    return [
        Op("relative_attention", [q, k, v, distance], attention),
        Op(
            "compound_embedding",
            [*embedding, norm.weight, norm.bias],
            {
                "ours": lambda: encoder_input(encoder, words, dropout),
                "torch": lambda: look_ups(encoder, words, dropout),
            },
        ),
        Op(
            "residual_layer_norm",
            [x, y, joint.weight, joint.bias],
            {
                "ours": lambda: kernels.residual_layer_norm(x, y, joint.weight, joint.bias, dropout=dropout, seed=1),
                "torch": lambda: layer_norm(x + F.dropout(y, dropout), joint),
            },
        ),
        Op(
            "bias_gelu",
            [expanded, bias],
            {"ours": lambda: kernels.bias_gelu(expanded, bias), "torch": lambda: F.gelu(expanded + bias.to(x.dtype))},
        ),
        Op(
            "masked_lm",
            list(recover),
            {
                "ours": lambda: kernels.masked_lm(*recover, *arguments).loss,
                "torch": lambda: field_losses(*recover, *arguments),
            },
        ),
        Op(
            "masker_loss",
            [scores],
            {
                "ours": lambda: kernels.masker_loss(scores, note_loss, *choice),
                "torch, by sequence": lambda: masker_loss_by_sequence(scores, note_loss, *choice),
            },
        ),
        Op(
            "adversarial_sample",
            [],
            {
                "ours": lambda: kernels.adversarial_sample(words, lengths, *special, **chance, seed=1).words,
                "torch, by sequence": lambda: sample_by_sequence(words, lengths, *special, scores.detach(), config),
            },
        ),
    ]


def encoder_input(encoder, words: Tensor, dropout: float = 0.0) -> Tensor:
    """`compound_embedding` with the projection of its tables, as the encoder uses it."""
    bias, norm = encoder.projection.bias + encoder.token_type, encoder.norm
    return kernels.compound_embedding(
        words, encoder.table(), encoder.offsets, bias, norm.weight, norm.bias, dropout=dropout, seed=1
    )


def look_ups(encoder, words: Tensor, dropout: float) -> Tensor:
    """The paper's embedding: F look-ups a note, scaled, concatenated, projected."""
    tables = encoder.words.split(encoder.sizes)
    parts = [F.embedding(words[..., index], table) for index, table in enumerate(tables)]
    joined = (torch.cat(parts, -1) * math.sqrt(encoder.words.shape[1])).to(encoder.dtype)
    z = linear(joined, encoder.projection) + encoder.token_type.to(joined.dtype)
    return F.dropout(layer_norm(z, encoder.norm), dropout)


def layer_norm(z: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    return F.layer_norm(z, z.shape[-1:], norm.weight.to(z.dtype), norm.bias.to(z.dtype), norm.eps)


def field_losses(hidden, weight, bias, words, selected, lengths, field_weights, sizes) -> Tensor:
    """Field by field, classes second, as `cross_entropy` wants images, with the hits that are logged."""
    valid = torch.arange(words.shape[1], device=words.device) < lengths[:, None]
    loss, hits = 0.0, []
    parts = zip(weight.split(sizes), bias.split(sizes), strict=True)
    for index, (rows, offset) in enumerate(parts):
        target = words[..., index]
        logits = F.linear(hidden, rows.to(hidden.dtype), offset.to(hidden.dtype)).float().permute(0, 2, 1)
        cost = F.cross_entropy(logits, target, reduction="none")
        means = [(cost * group).sum() / group.sum() for group in (selected, valid)]
        loss = loss + field_weights[index] * sum(means)
        hit = logits.argmax(1) == target
        hits.append([(hit & group).sum() for group in (selected, valid)])
    return loss


def masker_loss_by_sequence(scores: Tensor, note_loss: Tensor, selected: Tensor, changed: Tensor) -> Tensor:
    total = 0.0
    for row in range(len(scores)):
        notes = changed[row].nonzero()[:, 0]
        m = min(int(selected[row].sum()) * 3 // 10, len(notes) // 2)
        if m:
            ranked = notes[note_loss[row, notes].argsort(descending=True)]
            total = total + ((scores[row, ranked[:m]] - 1) ** 2).mean() + (scores[row, ranked[-m:]] ** 2).mean()
    return total / len(scores)


def sample_by_sequence(words, lengths, mask_word, values, scores, config: Config) -> Tensor:
    """The notes with the highest scores: 80 % MASK, 10 % random values."""
    words = words.clone()
    for row, notes in enumerate(lengths.tolist()):
        share = float(torch.empty(()).uniform_(config.mask_low, config.mask_high))
        k = min(int(share * notes), int(config.mask_cap * words.shape[1]))
        chosen = scores[row, :notes].topk(k).indices[torch.randperm(k, device=words.device)]
        masked, replaced, _ = chosen.split([k * 8 // 10, k // 10, k - k * 8 // 10 - k // 10])
        words[row, masked] = mask_word
        for field, count in enumerate(values.tolist()):
            words[row, replaced, field] = torch.randint(count, (len(replaced),), device=words.device)
    return words


def eager_attention(q: Tensor, k: Tensor, v: Tensor, distance: Tensor) -> Tensor:
    """Hugging Face's `relative_key_query`."""
    length, reach = q.shape[2], (distance.shape[0] + 1) // 2
    place = torch.arange(length, device=q.device)
    positions = distance[place[:, None] - place + reach - 1]
    logits = q @ k.mT
    logits = logits + torch.einsum("bhld,lrd->bhlr", q, positions) + torch.einsum("bhrd,lrd->bhlr", k, positions)
    return (logits / math.sqrt(q.shape[-1])).softmax(-1) @ v


def flex_attention() -> Callable[..., Tensor]:
    """FlexAttention with precomputed position products."""
    from torch.nn.attention.flex_attention import flex_attention

    @torch.compile
    def attend(q: Tensor, k: Tensor, v: Tensor, distance: Tensor) -> Tensor:
        length, reach = q.shape[2], (distance.shape[0] + 1) // 2
        band = distance[reach - length : reach + length - 1]
        scale = 1 / math.sqrt(q.shape[-1])
        from_query, from_key = q @ band.T * scale, k @ band.T * scale

        def add_positions(score, b, h, i, j):
            return score + from_query[b, h, i, i - j + length - 1] + from_key[b, h, j, i - j + length - 1]

        return flex_attention(q, k, v, score_mod=add_positions)

    return attend


def training(op: Op) -> dict[str, Callable[[], object]]:
    """Forward and backward of each function of an operation; forward alone where nothing has a gradient."""
    if not op.inputs:
        return op.functions
    with torch.no_grad():
        direction = torch.randn_like(next(iter(op.functions.values()))())

    def both(function: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(), op.inputs, direction)

    return {name: both(function) for name, function in op.functions.items()}


def require_agreement(op: Op) -> None:
    """End the program if a peer computes something else than ours (rounding apart) without dropout."""
    with torch.no_grad():
        outputs = {name: function() for name, function in op.functions.items() if name != OTHER}
    ours = outputs.pop("ours")
    exact = all(tensor.dtype == torch.float32 for tensor in (ours, *op.inputs))
    bound, ours = 1e-3 if exact else 5e-2, ours.double()
    for name, theirs in outputs.items():
        error = float((theirs - ours).norm() / ours.norm())
        if not error < bound:
            raise SystemExit(f"{op.name}: ours and {name} differ by {error:.1e}: there is nothing to compare")


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of("kernels", __doc__, rounds=7)
    parser.add_argument("--compile", action="store_true", help="also the `torch` forms under torch.compile")
    options = parser.parse_args(arguments)
    device, config, batch = setting(options)
    with open_corpus(options.data, config.encoding) as store:
        words = torch.from_numpy(filled_sequences(store, config.notes, batch)[0]).to(device)
    torch.manual_seed(0)
    dtype = compute_dtype("auto", device)
    model = AdversarialMidiBert(config, special_words(config, device)[1], dtype).to(device).eval()

    for op in operations(model, words, config, dropout=0.0):
        if op.inputs:
            require_agreement(op)
    results = {}
    for op in operations(model, words, config, config.dropout):
        if options.compile and "torch" in op.functions:
            op.functions["torch.compile"] = torch.compile(op.functions["torch"])
        results[op.name] = take_turns(training(op), options.rounds, device)
        print_table(f"{op.name}, {options.config}: {batch} x {config.notes}, {dtype}, {device}", results[op.name])
    about = {"config": options.config, "batch": batch, "length": config.notes, "dtype": str(dtype)}
    write(options.out, {**about, "operations": results})
