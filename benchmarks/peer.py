"""The peer: Hugging Face's BertModel with relative positions (`relative_key_query`, transformers 4)."""

import math

import torch
from torch import Tensor, nn

from amb.config import Config
from amb.model import Encoder


class HuggingFaceEncoder(nn.Module):
    """The same function as `amb.model.Encoder`, out of transformers' parts, on the paper's embedding.

    Embedding: F look-ups per note, concatenated and projected.
    """

    def __init__(self, config: Config, sizes: tuple[int, ...]):
        try:
            from transformers import BertConfig, BertModel
        except ImportError:
            raise SystemExit('the peer is not installed: pip install -e ".[bench]"') from None
        super().__init__()
        self.fields = nn.ModuleList(nn.Embedding(size, config.field_width) for size in sizes)
        self.projection = nn.Linear(len(sizes) * config.field_width, config.width)
        settings = BertConfig(
            hidden_size=config.width, num_hidden_layers=config.layers, num_attention_heads=config.heads,
            intermediate_size=4 * config.width, max_position_embeddings=config.reach,
            position_embedding_type="relative_key_query", hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.attention_dropout, attn_implementation="eager",
        )  # fmt: skip
        self.bert = BertModel(settings, add_pooling_layer=False)

    def forward(self, words: Tensor, lengths: Tensor, seed: int = 0, stream: int = 0) -> Tensor:
        parts = [field(words[..., index]) * math.sqrt(field.embedding_dim) for index, field in enumerate(self.fields)]
        mask = torch.arange(words.shape[1], device=words.device) < lengths[:, None]
        return self.bert(inputs_embeds=self.projection(torch.cat(parts, -1)), attention_mask=mask).last_hidden_state

    @torch.no_grad()
    def take_weights(self, ours: Encoder) -> "HuggingFaceEncoder":
        """Become the same function of the same weights."""
        for field, rows in zip(self.fields, ours.words.split(ours.sizes), strict=True):
            field.weight.copy_(rows)
        self.projection.load_state_dict(ours.projection.state_dict())
        self.bert.embeddings.token_type_embeddings.weight[0] = ours.token_type
        self.bert.embeddings.LayerNorm.load_state_dict(ours.norm.state_dict())
        for layer, theirs in zip(ours.layers, self.bert.encoder.layer, strict=True):
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
        return self
