"""The encoder and its heads, read top to bottom: words -> embedding -> N post-LN layers -> a head.

Symbols: B sequences, L notes, F fields per note, V_f vocabulary of field f, d width, H heads, D = d/H, P reach.
Weights are fp32; `Encoder.dtype` is the compute type of the matrix products, statistics and losses stay fp32.
The operations that take most time are those of `kernels/`; (seed, stream) select the random numbers that each draws.
"""

import math

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from amb import kernels, tokenizer
from amb.baselines import features
from amb.config import Config


class _Cast(torch.autograd.Function):
    """Weights in x's dtype, one launch for all; their gradients likewise. A small model's step waits for launches."""

    @staticmethod
    def forward(ctx, x, *weights):
        ctx.dtype = weights[0].dtype
        return _copies(weights, x.dtype)

    @staticmethod
    def backward(ctx, *grads):
        return None, *_copies(grads, ctx.dtype)


def _copies(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
    torch._foreach_copy_(copies, tensors)
    return copies


class Layer(nn.Module):
    """One post-LN Transformer layer with relative attention (method, Encoder step 3).

    Parameters: 12 d^2 + 13 d, and a distance table of (2P-1) x D shared by the heads.
    """

    def __init__(self, config: Config):
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.attention_dropout, self.hidden_dropout = config.attention_dropout, config.dropout
        self.query_key_value = nn.Linear(d, 3 * d)
        self.distance = nn.Parameter(torch.empty(2 * config.reach - 1, d // config.heads))
        self.attention_out = nn.Linear(d, d)
        self.attention_norm = nn.LayerNorm(d, eps=1e-12)
        self.up = nn.Linear(d, 4 * d)
        self.down = nn.Linear(4 * d, d)
        self.output_norm = nn.LayerNorm(d, eps=1e-12)

    def forward(self, x: Tensor, lengths: Tensor, seed: int | Tensor, stream: int) -> Tensor:
        """x [B, L, d] -> [B, L, d]; uses the streams `stream` to `stream + 2`."""
        products = (self.query_key_value, self.attention_out, self.up, self.down)
        weights = [weight for product in products for weight in (product.weight, product.bias)]
        if x.dtype != weights[0].dtype:
            weights = _Cast.apply(x, *weights)
        query_key_value, attention_out, up, down = zip(weights[::2], weights[1::2], strict=True)
        qkv = F.linear(x, *query_key_value).unflatten(-1, (3, self.heads, -1))
        dropout = self.attention_dropout * self.training
        attended = kernels.relative_attention(qkv, self.distance, lengths, dropout=dropout, seed=seed, stream=stream)
        attended = F.linear(attended.flatten(2), *attention_out)
        x = self._join(x, attended, self.attention_norm, seed, stream + 1)
        return self._join(x, F.linear(F.gelu(F.linear(x, *up)), *down), self.output_norm, seed, stream + 2)

    def _join(self, x: Tensor, y: Tensor, norm: nn.LayerNorm, seed: int | Tensor, stream: int) -> Tensor:
        dropout = self.hidden_dropout * self.training
        return kernels.residual_layer_norm(
            x, y, norm.weight, norm.bias, eps=norm.eps, dropout=dropout, seed=seed, stream=stream
        )


class Encoder(nn.Module):
    """Compound words [B, L, F] -> hidden states [B, L, d] (method, Encoder steps 1 to 3).

    Parameters, octuple (sum V_f = 1,280, F = 8): (1280 + 8 d) e + 4 d for the embedding and, per layer,
    12 d^2 + 13 d + (2P-1) D. `base`: 88.5 M, `small`: 3.5 M.
    """

    def __init__(self, config: Config, sizes: tuple[int, ...], dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype, self.sizes, self.dropout, self.reach = dtype, tuple(sizes), config.dropout, config.reach
        d, e = config.width, config.field_width
        self.words = nn.Parameter(torch.empty(sum(sizes), e))
        self.projection = nn.Linear(len(sizes) * e, d)
        self.token_type = nn.Parameter(torch.empty(d))
        self.norm = nn.LayerNorm(d, eps=1e-12)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.recompute = False  # keep a layer's input alone for backward, and compute the rest again
        offsets = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        self.register_buffer("offsets", offsets, persistent=False)
        self.apply(_initialise)
        nn.init.normal_(self.words, std=1 / math.sqrt(e))
        nn.init.normal_(self.token_type, std=0.02)

    def table(self) -> Tensor:
        """All fields' embeddings, times sqrt(e), projected: [sum V_f, d]. Once per step, not once per note."""
        e = self.words.shape[1]
        words = math.sqrt(e) * self.words
        parts = zip(words.split(self.sizes), self.projection.weight.split(e, dim=1), strict=True)
        return torch.cat([rows @ weight.T for rows, weight in parts])

    def forward(
        self, words: Tensor, lengths: Tensor, seed: int | Tensor = 0, stream: int = 0, table: Tensor | None = None
    ) -> Tensor:
        """words [B, L, F] integers, lengths [B] notes that are not PAD -> [B, L, d]; values at PAD mean nothing."""
        return self.states(words, lengths, seed, stream, table)[-1]

    def states(
        self, words: Tensor, lengths: Tensor, seed: int | Tensor = 0, stream: int = 0, table: Tensor | None = None
    ) -> list[Tensor]:
        """The embedding and the output of each layer, N + 1 of [B, L, d]. Arguments as for `forward`.

        Dropout draws from (seed, stream ... stream + 3 N) in training mode. Longer sequences than the distance tables
        reach are encoded in windows of `reach` words, whatever else is in the batch. `table` is `self.table()` where
        it is known already.
        """
        if words.shape[1] > self.reach:
            return self._in_windows(words, lengths, seed, stream)
        dropout = self.dropout * self.training
        table = (self.table() if table is None else table).to(self.dtype)
        bias = self.projection.bias + self.token_type
        norm = self.norm
        x = kernels.compound_embedding(
            words, table, self.offsets, bias, norm.weight, norm.bias,
            eps=norm.eps, dropout=dropout, seed=seed, stream=stream,
        )  # fmt: skip
        states = [x]
        for index, layer in enumerate(self.layers):
            arguments = states[-1], lengths, seed, stream + 1 + 3 * index
            if self.recompute and torch.is_grad_enabled():
                states.append(checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False))
            else:
                states.append(layer(*arguments))
        return states

    def statistics(self, words: Tensor, lengths: Tensor) -> Tensor:
        """The `statistics` of all states, fp32 [B, 3 (N + 1) d]."""
        return statistics(self.states(words, lengths), lengths)

    def _in_windows(self, words: Tensor, lengths: Tensor, seed: int | Tensor, stream: int) -> list[Tensor]:
        notes = words.shape[1]
        size = self.reach
        count = -(-notes // size)
        windows = rearrange(F.pad(words, (0, 0, 0, count * size - notes)), "b (n w) f -> (b n) w f", n=count)
        inside = lengths[:, None] - size * torch.arange(count, device=lengths.device)
        # a window of PAD alone attends to one note: the softmax over no notes would be NaN
        states = self.states(windows, inside.clamp(1, size).flatten(), seed, stream)
        return [rearrange(hidden, "(b n) w d -> b (n w) d", n=count)[:, :notes] for hidden in states]


class Recoverer(nn.Module):
    """F output layers d -> V_f, stacked: weight [sum V_f, d], bias [sum V_f]. `kernels.masked_lm` applies them."""

    def __init__(self, config: Config, sizes: tuple[int, ...]):
        super().__init__()
        self.sizes = tuple(sizes)
        self.out = nn.Linear(config.width, sum(sizes))
        self.apply(_initialise)

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """hidden [..., d] -> F tensors of logits [..., V_f]."""
        weight, bias = self.out.weight.to(hidden.dtype), self.out.bias.to(hidden.dtype)
        return F.linear(hidden, weight, bias).split(self.sizes, dim=-1)


def _two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs)).apply(_initialise)


class Masker(nn.Module):
    """How hard each note is to recover: dropout, d -> 256, ReLU, -> 1, sigmoid; hidden [B, L, d] -> [B, L] fp32."""

    def __init__(self, config: Config):
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.score = _two_layers(config.width, 256, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.score(self.dropout(hidden.float())).squeeze(-1).sigmoid()


class TokenClassifier(nn.Module):
    """One class per note: dropout, d -> 256, ReLU, -> C: hidden [B, L, d] -> logits [B, L, C] fp32."""

    def __init__(self, config: Config, classes: int):
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.classify = _two_layers(config.width, 256, classes)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.classify(self.dropout(hidden.float()))


class SequenceClassifier(nn.Module):
    """One class per sequence: r = 4 attention poolings W2 tanh(W1 h) (da = 128) over its notes, r d -> 256, ReLU, -> C.

    hidden [B, L, d], lengths [B] -> logits [B, C] fp32; PAD is never attended.
    """

    def __init__(self, config: Config, classes: int):
        super().__init__()
        w1, w2 = nn.Linear(config.width, 128, bias=False), nn.Linear(128, 4, bias=False)
        self.attend = nn.Sequential(w1, nn.Tanh(), w2).apply(_initialise)
        self.dropout = nn.Dropout(config.dropout)
        self.classify = _two_layers(4 * config.width, 256, classes)

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        hidden = hidden.float()
        padding = torch.arange(hidden.shape[1], device=hidden.device) >= lengths[:, None]
        weights = self.attend(hidden).masked_fill(padding[..., None], -torch.inf).softmax(dim=1)
        pooled = rearrange(weights.mT @ hidden, "b r d -> b (r d)")
        return self.classify(self.dropout(pooled))


def statistics(states: list[Tensor], lengths: Tensor) -> Tensor:
    """Of each layer's states the mean, the deviation and the root mean square of the step from note to note.

    N + 1 of [B, L, d], lengths [B] -> fp32 [B, 3 (N + 1) d].
    """
    parts, counts = [], lengths[:, None, None]
    for hidden in states:
        hidden = hidden.float()
        filled = torch.arange(hidden.shape[1], device=hidden.device)[:, None] < counts
        mean = (hidden * filled).sum(1, keepdim=True) / counts
        variance = ((hidden - mean) * filled).square().sum(1) / counts[:, 0]
        step = (hidden.diff(dim=1) * filled[:, 1:]).square().sum(1) / (counts[:, 0] - 1).clamp(min=1)
        parts += [mean[:, 0], variance.sqrt(), step.sqrt()]
    return torch.cat(parts, dim=1)


class LinearClassifier(nn.Module):
    """One class per sequence, linear in the `statistics` of all layers' states and in the words' hand-made features.

    A feature's range is cut at its quantiles into `PIECES`, each with a weight of its own, because its effect is
    seldom proportional. Features count `WEIGHT` times as much as statistics, because there are fewer of them.
    """

    PIECES, WEIGHT = 8, 5.0

    def __init__(self, config: Config, classes: int):
        super().__init__()
        self.encoding = tokenizer.load(config.encoding)
        self.states = 3 * (config.layers + 1) * config.width
        by_hand = len(features(np.zeros((1, len(self.encoding.fields)), np.uint16), self.encoding))
        self.inputs = self.states + by_hand
        self.register_buffer("centre", torch.zeros(self.states))
        self.register_buffer("spread", torch.ones(self.states))
        self.register_buffer("knots", torch.zeros(self.PIECES + 1, by_hand))
        self.classify = nn.Linear(self.states + self.PIECES * by_hand, classes)

    def vectors(self, of_states: Tensor, words: Tensor) -> Tensor:
        """The encoder's statistics [B, 3 (N + 1) d] and the features of words [B, L, F]: fp32 [B, K]."""
        rows = [row[self.encoding.is_note(row)] for row in words.cpu().numpy()]
        by_hand = torch.from_numpy(np.stack([features(row, self.encoding) for row in rows]))
        return torch.cat([of_states, by_hand.to(words.device)], dim=1)

    def columns(self, vectors: Tensor) -> Tensor:
        """What it is linear in: statistics with a deviation of 1, and how far each feature is through each piece."""
        statistic, feature = vectors[:, : self.states], vectors[:, self.states :]
        low, high = self.knots[:-1], self.knots[1:]
        through = ((feature[:, None] - low) / (high - low).clamp(min=1e-4)).clamp(0, 1)
        return torch.cat([(statistic - self.centre) / self.spread, self.WEIGHT * through.flatten(1)], dim=1)

    def forward(self, vectors: Tensor) -> Tensor:
        """vectors [B, K] -> logits [B, C] fp32."""
        return self.classify(self.columns(vectors))

    @torch.no_grad()
    def fit(self, vectors: Tensor, labels: Tensor, class_weights: Tensor | None, strength: float) -> Tensor:
        """Become the logistic regression of the columns of `vectors` [S, K] with labels [S]; returns logits [S, C].

        It minimises `strength` times the sum of the cross-entropies + half the sum of the squared weights.
        """
        statistic, feature = vectors[:, : self.states], vectors[:, self.states :]
        self.centre.copy_(statistic.mean(0))
        self.spread.copy_(statistic.std(0, correction=0).clamp(min=1e-4))  # half precision holds it
        ranks = torch.linspace(0, len(vectors) - 1, self.PIECES + 1).round().long()
        self.knots.copy_(feature.sort(dim=0).values[ranks])
        columns, parameters = self.columns(vectors), tuple(self.classify.requires_grad_().parameters())
        nn.init.zeros_(self.classify.weight)
        optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

        @torch.enable_grad()
        def loss() -> Tensor:
            optimizer.zero_grad()
            cost = F.cross_entropy(self.classify(columns), labels, class_weights, reduction="sum")
            penalised = strength * cost + self.classify.weight.square().sum() / 2
            penalised.backward()
            return penalised

        optimizer.step(loss)
        return self.classify(columns)


class AdversarialMidiBert(nn.Module):
    """What pre-training trains: one encoder shared by recoverer and masker. `small` 3.9 M, `base` 89.7 M parameters."""

    def __init__(self, config: Config, sizes: tuple[int, ...], dtype: torch.dtype = torch.float32):
        super().__init__()
        self.encoder = Encoder(config, sizes, dtype)
        self.recoverer = Recoverer(config, sizes)
        self.masker = Masker(config)


class Classifier(nn.Module):
    """What fine-tuning trains: the encoder and the head of a task's level ("note" or "sequence").

    words [B, L, F], lengths [B] -> logits, [B, L, C] or [B, C]. The lowest layers may be frozen: `freeze`. A frozen
    encoder has a `linear` head for sequences.
    """

    def __init__(
        self, config: Config, sizes: tuple[int, ...], level: str, classes: int, dtype=torch.float32, linear=False
    ):
        super().__init__()
        self.encoder = Encoder(config, sizes, dtype)
        self.level, self.linear = level, linear
        of_sequences = LinearClassifier if linear else SequenceClassifier
        self.head = {"note": TokenClassifier, "sequence": of_sequences}[level](config, classes)

    def freeze(self, train_layers: int) -> None:
        """Leave only the topmost `train_layers` layers of the encoder to train, and the head; all, if it has fewer."""
        layers = list(self.encoder.layers)
        if train_layers < len(layers):
            self.encoder.requires_grad_(False)
            for layer in layers[len(layers) - train_layers :]:
                layer.requires_grad_(True)

    def forward(self, words: Tensor, lengths: Tensor, seed: int | Tensor = 0, stream: int = 0) -> Tensor:
        if self.linear:
            return self.head(self.vectors(words, lengths))
        hidden = self.encoder(words, lengths, seed, stream)
        return self.head(hidden) if self.level == "note" else self.head(hidden, lengths)

    def vectors(self, words: Tensor, lengths: Tensor) -> Tensor:
        """What a linear head sees, fp32 [B, K]."""
        return self.head.vectors(self.encoder.statistics(words, lengths), words)


def compute_dtype(choice: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 on CUDA and on CPUs with instructions for it (AMX, AVX512-BF16), fp32 elsewhere."""
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    fast = choice == "bf16" or (choice == "auto" and (device.type == "cuda" or native))
    return torch.bfloat16 if fast else torch.float32


def _initialise(module: nn.Module) -> None:
    """BERT's initialisation: normal(0, 0.02) weights, zero biases; distance tables from normal(0, 0.5).

    With 0.02 the distances hardly change the first attention maps, and the model learns to copy neighbours much later.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, Layer):
        nn.init.normal_(module.distance, std=0.5)
