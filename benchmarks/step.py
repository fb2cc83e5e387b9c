"""A whole adversarial pre-training step: ours beside the same step with Hugging Face's BertModel as the encoder.

    python -m benchmarks step [--config small] [--batch B] [--length L] [--rounds 5] [--data STORE] [--out FILE]
                              [--only ours | peer] [--compile] [--profile]

Masker and recoverer passes, selection, losses, backward, clipping and AdamW on the same batch of real words without
PAD, of the demo corpus or of `--data`; on CUDA ours also as a CUDA graph. The peer computes under autocast in our
dtype, on a CPU also in fp32. Its backward keeps L x L x D numbers of each layer: what does not fit into a GPU's memory
is tried with half the sequences. Ratios are of the time for a note.
"""

import argparse
import math
import tempfile
from collections.abc import Callable
from itertools import product
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from amb import demo, mask_book, tokenizer
from amb.config import PRESETS, Config
from amb.model import AdversarialMidiBert, compute_dtype
from amb.objective import Vocabulary, pretrain_loss, uniform_weights
from amb.speed import CudaGraph, matrix_peak, step_flops
from benchmarks.timing import take_turns, wait, write


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


def real_words(path: Path | None, encoding: str, batch: int, length: int) -> Tensor:
    """Words [B, L, F] of real pieces without PAD, from one piece on into the next: of a token store, of a folder of
    MIDI, or of the demo corpus."""
    with tempfile.TemporaryDirectory() as folder:
        if path is None or not tokenizer.is_store(path):
            source = path or demo.write_corpus(Path(folder, "midi"), 64)
            path = Path(folder, "store")
            tokenizer.build_store([source], path, encoding, workers=1, progress=False)
        words = tokenizer.open_store(path).words
        rows = np.asarray(words[np.arange(batch * length) % len(words)], dtype=np.int64)
        return torch.from_numpy(rows.reshape(batch, length, -1))


def step_of(model: AdversarialMidiBert, words: Tensor, config: Config, graph: bool = False) -> Callable[[], None]:
    """A function that takes one training step of `model` on words [B, L, F] without PAD, or replays a CUDA graph."""
    device = words.device
    lengths = torch.full((len(words),), words.shape[1], device=device)
    special = Vocabulary.of(tokenizer.load(config.encoding), device)
    rate = torch.tensor(config.lr, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), rate, fused=True, capturable=graph)
    weights = uniform_weights(words.shape[2]).to(device)
    book = mask_book.empty_book(*words.shape[:2]).to(device)

    def step() -> None:
        loss = pretrain_loss(model, words, lengths, book, special, weights, config, seed=1)
        optimizer.zero_grad(set_to_none=True)
        loss.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()

    return CudaGraph(step) if graph else step


def fitting_step(model: AdversarialMidiBert, words: Tensor, config: Config) -> tuple[Callable[[], None], int]:
    """A step on all sequences, or on half as many until they fit into a GPU's memory; and how many these are."""
    while True:
        step = step_of(model, words, config)
        try:
            step()
            return step, len(words)
        except torch.OutOfMemoryError:
            if len(words) == 1:
                raise
        words = words[: len(words) // 2]
        model.zero_grad()
        torch.cuda.empty_cache()


def largest(step: Callable[[], None], device: torch.device) -> list[dict]:
    """The ten kernels of a GPU, or operations of a CPU, in which a step spends most of its time."""
    step()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]) as profiler:
        step()
        wait(device)
    by = attrgetter("self_device_time_total" if device.type == "cuda" else "self_cpu_time_total")
    events = [event for event in profiler.key_averages() if event.device_type.name == device.type.upper()]
    if not events:
        raise ValueError(f"the profiler saw nothing run on {device}")
    events.sort(key=by, reverse=True)
    total = sum(map(by, events)) or 1
    return [{"": e.key[:70], "calls": e.count, "ms": by(e) / 1e3, "share": by(e) / total} for e in events[:10]]


def models_of(options: argparse.Namespace, config: Config, sizes: tuple[int, ...], device: torch.device) -> dict:
    """Ours and the peers, by name."""
    dtype = compute_dtype(options.dtype, device)
    models = {} if options.only == "peer" else {"ours": AdversarialMidiBert(config, sizes, dtype)}
    dtypes = [] if options.only == "ours" else [dtype] if device.type == "cuda" else [torch.float32, dtype]
    for number_type, compiled in product(dict.fromkeys(dtypes), (False, True)[: 1 + options.compile]):
        name = f"Hugging Face, {str(number_type).removeprefix('torch.')}{', compiled' * compiled}"
        models[name] = AdversarialMidiBert(config, sizes)
        encoder = HuggingFaceEncoder(config, sizes, number_type)
        models[name].encoder = torch.compile(encoder) if compiled else encoder
    return {name: model.to(device).train() for name, model in models.items()}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks step", description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=PRESETS, default="small", help="sizes (default: small)")
    parser.add_argument("--batch", type=int, help="sequences (default: the preset's; for base on a CPU 1)")
    parser.add_argument("--length", type=int, help="notes in a sequence (default: the preset's)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16"), help="of ours")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, help="a token store or folder of MIDI (default: the demo corpus)")
    parser.add_argument("--only", choices=("ours", "peer"), help="default: both, in turns")
    parser.add_argument("--compile", action="store_true", help="the peer also under torch.compile")
    parser.add_argument("--profile", action="store_true", help="instead, where a step of ours spends its time")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = Config(**PRESETS[options.config])
    length = options.length or config.notes
    config = Config(**PRESETS[options.config] | {"notes": length, "reach": max(length, config.reach)})
    batch = options.batch or (1 if options.config == "base" and device.type == "cpu" else config.batch)
    words = real_words(options.data, config.encoding, batch, length).to(device)
    sizes = tokenizer.load(config.encoding).sizes

    models, steps = models_of(options, config, sizes, device), {}
    if options.profile:
        step = step_of(models["ours"], words, config)
        write(options.out, {f"ten largest of a step of {options.config}, {batch} x {length}": largest(step, device)})
        return
    for name, model in models.items():
        steps[name] = fitting_step(model, words, config)
    if device.type == "cuda" and "ours" in steps:
        steps["ours, CUDA graph"] = step_of(models["ours"], words, config, graph=True), batch
    dtype = compute_dtype(options.dtype, device)
    flops, peak = step_flops(config, 1, sum(sizes)), matrix_peak(device, dtype)
    rows, first = [], next(iter(steps.values()))[1]
    for name, row in take_turns({name: step for name, (step, _) in steps.items()}, options.rounds, device).items():
        fits = steps[name][1]
        ratio = {which: value * first / fits for which, value in row["times the first"].items()}
        rate = fits / row["ms"]["median"] * 1e3  # sequences per second
        more = {"times the first": ratio, "notes/s": rate * length, "share of the matrix peak": rate * flops / peak}
        rows.append({"": name, "batch": fits} | row | more)
    title = f"a step of {options.config}, {batch} x {length}, {dtype}; {batch * flops / 1e12:.3f} TFLOP"
    write(options.out, {f"{title}, matrix peak {peak / 1e12:.2f} TFLOP/s": rows})
