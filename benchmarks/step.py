"""A whole adversarial pre-training step: ours beside the same step with Hugging Face's BertModel as the encoder.

    python -m benchmarks step [--config small] [--batch B] [--length L] [--rounds 5] [--data STORE] [--out FILE]

Masker and recoverer passes, selection, losses, backward, clipping and AdamW on the same batch of real words without
PAD, of the demo corpus or of `--data`. The peer computes in fp32, and also under autocast in our dtype if that is
another. Its backward keeps L x L x D numbers of each layer: choose `--batch` so that they fit into memory.
"""

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from amb import demo, mask_book, tokenizer
from amb.config import PRESETS, Config
from amb.model import AdversarialMidiBert, compute_dtype
from amb.objective import Words, pretrain_loss, uniform_weights
from amb.profiling import matrix_peak, step_flops
from benchmarks.timing import take_turns, write


class HuggingFaceEncoder(nn.Module):
    """The same function as `amb.model.Encoder`, out of transformers' parts, on the paper's embedding: F look-ups per
    note, concatenated and projected. The encoder computes under autocast in `dtype`.

    Raises ValueError where transformers is not installed or its BertModel knows no relative positions.
    """

    def __init__(self, config: Config, sizes: tuple[int, ...], dtype: torch.dtype = torch.float32):
        try:
            import transformers
        except ImportError:
            raise ValueError('the peer is not installed: pip install -e ".[bench]"') from None
        super().__init__()
        self.dtype = dtype
        self.fields = nn.ModuleList(nn.Embedding(size, config.field_width) for size in sizes)
        self.projection = nn.Linear(len(sizes) * config.field_width, config.width)
        settings = transformers.BertConfig(
            hidden_size=config.width, num_hidden_layers=config.layers, num_attention_heads=config.heads,
            intermediate_size=4 * config.width, max_position_embeddings=config.reach,
            position_embedding_type="relative_key_query", hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.attention_dropout, attn_implementation="eager",
        )  # fmt: skip
        self.bert = transformers.BertModel(settings, add_pooling_layer=False)
        # transformers 5 drops `position_embedding_type` without a word
        if not hasattr(self.bert.encoder.layer[0].attention.self, "distance_embedding"):
            raise ValueError(f"BertModel of transformers {transformers.__version__} has no relative positions: use 4")

    def forward(self, words: Tensor, lengths: Tensor, seed: int = 0, stream: int = 0) -> Tensor:
        parts = [field(words[..., index]) * math.sqrt(field.embedding_dim) for index, field in enumerate(self.fields)]
        mask = torch.arange(words.shape[1], device=words.device) < lengths[:, None]
        with torch.autocast(words.device.type, self.dtype, enabled=self.dtype != torch.float32):
            embedded = self.projection(torch.cat(parts, -1))
            return self.bert(inputs_embeds=embedded, attention_mask=mask).last_hidden_state


def real_words(path: Path | None, encoding: str, batch: int, length: int) -> Tensor:
    """Words [B, L, F] of real pieces without PAD, from one piece on into the next: of a token store, of a folder of
    MIDI, or of the demo corpus."""
    with tempfile.TemporaryDirectory() as folder:
        if path is None or not (path / "meta.json").is_file():
            source = path or demo.write_corpus(Path(folder, "midi"), 64)
            path = Path(folder, "store")
            tokenizer.build_store([source], path, encoding, workers=1, progress=False)
        words = tokenizer.open_store(path).words
        rows = np.asarray(words[np.arange(batch * length) % len(words)], dtype=np.int64)
        return torch.from_numpy(rows.reshape(batch, length, -1))


def step_of(model: AdversarialMidiBert, words: Tensor, config: Config) -> Callable[[], None]:
    """A function that takes one training step of `model` on words [B, L, F] without PAD."""
    device = words.device
    lengths = torch.full((len(words),), words.shape[1], device=device)
    special = Words.of(tokenizer.load(config.encoding), device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, fused=True)
    weights = uniform_weights(words.shape[2]).to(device)
    book = mask_book.empty_book(*words.shape[:2]).to(device)

    def step() -> None:
        loss = pretrain_loss(model, words, lengths, book, special, weights, config, seed=1)
        optimizer.zero_grad(set_to_none=True)
        loss.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()

    return step


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks step", description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=PRESETS, default="small", help="sizes (default: small)")
    parser.add_argument("--batch", type=int, help="sequences (default: the preset's; for base 8, on a CPU 1)")
    parser.add_argument("--length", type=int, help="notes in a sequence (default: the preset's)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16"), help="of ours")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, help="a token store or folder of MIDI (default: the demo corpus)")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = Config(**PRESETS[options.config])
    length = options.length or config.notes
    config = Config(**PRESETS[options.config] | {"notes": length, "reach": max(length, config.reach)})
    batch = options.batch or (config.batch if options.config != "base" else 8 if device.type == "cuda" else 1)
    words = real_words(options.data, config.encoding, batch, length).to(device)
    sizes = tuple(field.size for field in tokenizer.load(config.encoding).fields)

    ours = AdversarialMidiBert(config, sizes, compute_dtype(options.dtype, device))
    models = {"ours": ours}
    for dtype in dict.fromkeys((torch.float32, ours.encoder.dtype)):
        name = f"Hugging Face, {str(dtype).removeprefix('torch.')}"
        models[name] = AdversarialMidiBert(config, sizes)
        models[name].encoder = HuggingFaceEncoder(config, sizes, dtype)
    steps = {name: step_of(model.to(device).train(), words, config) for name, model in models.items()}
    flops, peak = step_flops(config, batch, sum(sizes)), matrix_peak(device, ours.encoder.dtype)
    rows = []
    for name, row in take_turns(steps, options.rounds, device).items():
        seconds = row["ms"]["median"] / 1e3
        more = {"notes/s": batch * length / seconds, "share of the matrix peak": flops / seconds / peak}
        rows.append({"": name} | row | more)
    title = f"a step of {options.config}, {batch} x {length}, {ours.encoder.dtype}; {flops / 1e12:.3f} TFLOP"
    write(options.out, {f"{title}, matrix peak {peak / 1e12:.2f} TFLOP/s": rows})
