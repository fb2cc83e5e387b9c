"""A whole adversarial pre-training step: ours beside the same step with Hugging Face's BertModel as the encoder.

    python -m benchmarks step [--config small] [--batch B] [--rounds 5] [--data STORE] [--out FILE]

Masker and recoverer passes, selection, losses, backward, clipping and AdamW on the same batch of real words (the demo
corpus unless a token store is given). The peer is `BertModel` (`relative_key_query`, transformers 4) on the paper's
embedding: F look-ups per note, concatenated and projected.
"""

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import tokenizer
from amb import data, demo, mask_book
from amb.config import PRESETS, Config
from amb.model import AdversarialMidiBert, compute_dtype
from amb.objective import Words, pretrain_loss, uniform_weights
from benchmarks.timing import print_table, take_turns, write


class HuggingFaceEncoder(nn.Module):
    """The same function as `amb.model.Encoder`, out of transformers' parts."""

    def __init__(self, config: Config, sizes: tuple[int, ...]):
        from transformers import BertConfig, BertModel

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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks step", description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=PRESETS, default="small")
    parser.add_argument("--batch", type=int, help="sequences (default: the preset's, 2 for base on a CPU)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16"), help="of ours; the peer is fp32")
    parser.add_argument("--data", type=Path, help="a token store of octuple words (default: the demo corpus)")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = Config(**PRESETS[options.config])
    batch = options.batch or (2 if options.config == "base" and device.type == "cpu" else config.batch)

    encoding = tokenizer.load(config.encoding)
    sizes = tuple(field.size for field in encoding.fields)
    words = Words(
        torch.from_numpy(encoding.mask.astype(np.int64)).to(device),
        torch.tensor([field.values for field in encoding.fields], device=device),
    )
    inputs = [torch.from_numpy(array).to(device) for array in longest_sequences(options.data, config, batch)]
    book = mask_book.empty_book(batch, config.notes).to(device)

    def step(model: nn.Module):
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, fused=True)
        weights = uniform_weights(len(sizes)).to(device)

        def run() -> None:
            loss = pretrain_loss(model, *inputs, book, words, weights, config, seed=1)
            optimizer.zero_grad(set_to_none=True)
            loss.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()

        return run

    ours = AdversarialMidiBert(config, sizes, compute_dtype(options.dtype, device)).to(device).train()
    theirs = AdversarialMidiBert(config, sizes).to(device).train()
    theirs.encoder = HuggingFaceEncoder(config, sizes).to(device)
    results = take_turns({"ours": step(ours), "Hugging Face": step(theirs)}, options.rounds, device)
    notes = int(inputs[1].sum())
    print_table(f"one step of {options.config}: {batch} x {config.notes} ({notes:,} notes), {device}", results)
    flops = step_flops(config, batch, sum(sizes))
    peak = matrix_peak(device, ours.encoder.dtype)
    print(f"{flops / 1e12:.3f} TFLOP a step; large {ours.encoder.dtype} products reach {peak / 1e12:,.2f} TFLOP/s here")
    for name, row in results.items():
        seconds = row["seconds"]["median"]
        print(f"{name}: {notes / seconds:,.0f} notes/s, {flops / seconds / peak:.0%} of that")
    figures = {"notes": notes, "flops": flops, "peak_flops_per_second": peak, "timings": results}
    write(options.out, {"config": options.config, "batch": batch, **figures})


def step_flops(config: Config, batch: int, vocabulary: int) -> float:
    """Floating-point operations of a step's matrix products, none counted twice for being computed again.

    Per pass and layer 12 d^2 weights, 6 operations a note and weight; attention 4 products of L x L x D a head
    forward (Q K, Q R, K R, P V) and 8 backward. Masker and recoverer passes, output layers for the latter.
    """
    d, notes = config.width, batch * config.notes
    layer = 6 * notes * 12 * d**2 + 12 * 2 * batch * config.notes**2 * d
    return 2.0 * config.layers * layer + 6 * notes * d * vocabulary


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large square matrix product on random data: best of five after a warm-up."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timing = take_turns({"product": lambda: a @ b}, 5, device)
    return 2 * size**3 / timing["product"]["seconds"]["lowest"]


def longest_sequences(path: Path | None, config: Config, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Words [B, L, F] and lengths [B] of the `batch` fullest sequences of a store, or of the demo corpus."""
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            path = Path(folder, "store")
            tokenizer.build_store([demo.write_corpus(Path(folder, "midi"), 64)], path, workers=1, progress=False)
        store = tokenizer.open_store(path)
        sequences = data.cut([store], [["train"] * len(store.pieces)], "train", config.notes)
        return sequences.batch(np.argsort(-sequences.lengths, kind="stable")[:batch])
