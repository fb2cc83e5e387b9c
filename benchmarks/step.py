"""A whole adversarial pre-training step: ours beside the same step with Hugging Face's BertModel as the encoder.

    python -m benchmarks step [--config small] [--rounds 5] [--data STORE] [--only ours | peer] [--out FILE]

Masker and recoverer passes, selection, losses, backward, clipping and AdamW on the same batch of real words without
PAD, of the demo corpus or of `--data`; on CUDA ours also as a CUDA graph. The peer computes under autocast in our
dtype, on a CPU also in fp32, on CUDA also compiled. Its backward keeps L x L x D numbers of each layer: what does not
fit into a GPU's memory is tried with half the sequences. Ratios are of the time for a note.
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
from amb.config import Config
from amb.model import AdversarialMidiBert
from amb.objective import Vocabulary, pretrain_loss, uniform_weights
from amb.speed import CudaGraph, matrix_peak, sequence_flops
from benchmarks.timing import DEVICE, parse_sizes, take_turns, write


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

    def table(self) -> None:
        """`amb.model.Encoder` projects its tables once a step."""

    def forward(self, words: Tensor, lengths: Tensor, *_: object) -> Tensor:
        parts = [field(words[..., index]) * math.sqrt(field.embedding_dim) for index, field in enumerate(self.fields)]
        mask = torch.arange(words.shape[1], device=words.device) < lengths[:, None]
        with torch.autocast(words.device.type, self.dtype, enabled=self.dtype != torch.float32):
            embedded = self.projection(torch.cat(parts, -1))
            return self.bert(inputs_embeds=embedded, attention_mask=mask).last_hidden_state


def real_words(path: Path | None, config: Config) -> Tensor:
    """Words [B, L, F] of real pieces without PAD, from one piece on into the next: of a token store, of a folder of
    MIDI, or of the demo corpus."""
    with tempfile.TemporaryDirectory() as folder:
        if path is None or not tokenizer.is_store(path):
            source = path or demo.write_corpus(Path(folder, "midi"), 64)
            path = Path(folder, "store")
            tokenizer.build_store([source], path, config.encoding, workers=1, progress=False)
        words = tokenizer.open_store(path).words
        rows = np.asarray(words[np.arange(config.batch * config.notes) % len(words)], dtype=np.int64)
        return torch.from_numpy(rows.reshape(config.batch, config.notes, -1))


def step_of(model: AdversarialMidiBert, words: Tensor, config: Config, graph: bool = False) -> Callable[[], None]:
    """A function that takes one training step of `model` on words [B, L, F] without PAD, or replays a CUDA graph."""
    lengths = torch.full((len(words),), words.shape[1], device=DEVICE)
    special = Vocabulary.of(tokenizer.load(config.encoding), DEVICE)
    rate = torch.tensor(config.lr, device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), rate, fused=True, capturable=graph)
    weights = uniform_weights(words.shape[2]).to(DEVICE)
    book = mask_book.empty_book(*words.shape[:2]).to(DEVICE)

    def step() -> None:
        loss = pretrain_loss(model, words, lengths, book, special, weights, config, seed=1)
        optimizer.zero_grad(set_to_none=True)
        loss.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()

    return CudaGraph(step) if graph else step


def fitting_step(model: AdversarialMidiBert, words: Tensor, config: Config) -> tuple[Callable[[], None], int]:
    """A step on all sequences, or on half as many until they fit into a GPU's memory; and how many these are."""
    step = step_of(model, words, config)
    try:
        step()
        return step, len(words)
    except torch.OutOfMemoryError:
        if len(words) == 1:
            raise
    # not in the handler: the exception holds the tensors of the step
    model.zero_grad()
    torch.cuda.empty_cache()
    return fitting_step(model, words[: len(words) // 2], config)


def models_of(who: str | None, config: Config, sizes: tuple[int, ...], dtype: torch.dtype) -> dict[str, nn.Module]:
    """Ours and the peers, or only one side, by name."""
    models = {} if who == "peer" else {"ours": AdversarialMidiBert(config, sizes, dtype)}
    peers = [(dtype, False), (dtype, True)] if DEVICE.type == "cuda" else [(torch.float32, False), (dtype, False)]
    for number_type, compiled in () if who == "ours" else dict.fromkeys(peers):
        name = f"Hugging Face, {str(number_type).removeprefix('torch.')}{', compiled' * compiled}"
        models[name] = AdversarialMidiBert(config, sizes)
        encoder = HuggingFaceEncoder(config, sizes, number_type)
        models[name].encoder = torch.compile(encoder) if compiled else encoder
    return {name: model.to(DEVICE).train() for name, model in models.items()}


def main(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("--data", type=Path, help="a token store or folder of MIDI; default: the demo corpus")
    parser.add_argument("--only", choices=("ours", "peer"), help="default: both, in turns")
    options, config, dtype = parse_sizes(parser, arguments)
    words = real_words(options.data, config).to(DEVICE)
    sizes = tokenizer.load(config.encoding).sizes
    title = f"a step of {options.config}, {config.batch} x {config.notes}, {dtype}"
    models = models_of(options.only, config, sizes, dtype)
    steps = {name: fitting_step(model, words, config) for name, model in models.items()}
    if DEVICE.type == "cuda" and "ours" in steps:
        batch = steps["ours"][1]
        steps["ours, CUDA graph"] = step_of(models["ours"], words[:batch], config, graph=True), batch
    flops, peak = sequence_flops(config, sum(sizes)), matrix_peak(DEVICE, dtype)
    first = next(iter(steps.values()))[1]
    rows = take_turns({name: step for name, (step, _) in steps.items()}, options.rounds)
    for row in rows:
        row["batch"] = batch = steps[row[""]][1]
        row["times the first"] = {which: ratio * first / batch for which, ratio in row["times the first"].items()}
        sequences = 1e3 * batch / row["ms"]["median"]  # a second
        row["notes/s"], row["share of the matrix peak"] = sequences * config.notes, sequences * flops / peak
    work = f"{config.batch * flops / 1e12:.3f} TFLOP, matrix peak {peak / 1e12:.2f} TFLOP/s"
    write(options.out, {f"{title}; {work}": rows})
