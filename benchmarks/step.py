"""A whole adversarial pre-training step: ours beside the same step with Hugging Face's BertModel as the encoder.

    python -m benchmarks step [--config small] [--batch B] [--rounds 5] [--data STORE] [--out FILE]

Masker and recoverer passes, selection, losses, backward, clipping and AdamW on the same batch of real words: the
fullest sequences of the demo corpus, or of `--data`. The peer is that of peer.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from amb import mask_book
from amb.config import Config
from amb.model import AdversarialMidiBert, compute_dtype
from amb.objective import pretrain_loss, uniform_weights
from amb.speed import matrix_peak, step_flops
from benchmarks.inputs import longest_sequences, open_corpus, parser_of, setting, special_words
from benchmarks.peer import HuggingFaceEncoder
from benchmarks.timing import print_table, take_turns, write


def step_of(model: AdversarialMidiBert, words: Tensor, lengths: Tensor, config: Config) -> Callable[[], None]:
    """A function that takes one training step of `model` on words [B, L, F] with lengths [B]."""
    device = words.device
    special, sizes = special_words(config, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, fused=True)
    weights = uniform_weights(len(sizes)).to(device)
    book = mask_book.empty_book(*words.shape[:2]).to(device)

    def step() -> None:
        loss = pretrain_loss(model, words, lengths, book, special, weights, config, seed=1)
        optimizer.zero_grad(set_to_none=True)
        loss.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()

    return step


def model_of(config: Config, device: torch.device, dtype: str = "auto", peer: bool = False) -> AdversarialMidiBert:
    """Ours, or ours with the peer's encoder, which stays fp32."""
    _, sizes = special_words(config, device)
    if not peer:
        return AdversarialMidiBert(config, sizes, compute_dtype(dtype, device)).to(device).train()
    model = AdversarialMidiBert(config, sizes)
    model.encoder = HuggingFaceEncoder(config, sizes)
    return model.to(device).train()


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of("step", __doc__, rounds=5)
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16"), help="of ours; the peer is fp32")
    options = parser.parse_args(arguments)
    device, config, batch = setting(options)
    with open_corpus(options.data, config.encoding) as store:
        words, lengths = map(torch.from_numpy, longest_sequences(store, config.notes, batch))
    words, lengths = words.to(device), lengths.to(device)

    ours, theirs = (model_of(config, device, options.dtype, peer) for peer in (False, True))
    functions = {
        "ours": step_of(ours, words, lengths, config),
        "Hugging Face": step_of(theirs, words, lengths, config),
    }
    results = take_turns(functions, options.rounds, device)
    notes = int(lengths.sum())
    print_table(f"one step of {options.config}: {batch} x {config.notes} ({notes:,} notes), {device}", results)
    flops = step_flops(config, batch, sum(ours.encoder.sizes))
    peak = matrix_peak(device, ours.encoder.dtype)
    print(f"{flops / 1e12:.3f} TFLOP a step; large {ours.encoder.dtype} products reach {peak / 1e12:,.2f} TFLOP/s here")
    for name, row in results.items():
        seconds = row["seconds"]["median"]
        print(f"{name}: {notes / seconds:,.0f} notes/s, {flops / seconds / peak:.0%} of that")
    figures = {"notes": notes, "flops": flops, "peak_flops_per_second": peak, "timings": results}
    write(options.out, {"config": options.config, "batch": batch, "length": config.notes, **figures})
