"""A model at work: `predict` and `embed` beside the same with Hugging Face's BertModel, on the same pieces.

    python -m benchmarks inference [--config small | base] [--pieces N] [--batch 8] [--data PATH] [--out FILE]

Ours is amb.inference, which batches sequences of like lengths. The peer (peer.py, with our weights, and our head for
`predict`) is timed twice: as a plain user has it, `--batch` sequences at a time in the order of the files, padded to L;
and, to tell batches from encoder, with batches of like lengths cut to the longest. The three must agree to 1e-4, or
nothing is timed. Pieces are tokenised beforehand; `with reading` is ours from MIDI files on.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amb import demo, inference, pieces, tasks, tokenizer
from amb.config import PRESETS, Config
from amb.data import Sequences
from amb.model import Classifier
from benchmarks.inputs import special_words
from benchmarks.peer import HuggingFaceEncoder
from benchmarks.timing import print_table, take_turns, write

CLASSES = tuple("ABCDEFGH")
ALIKE, BY_LENGTH = "Hugging Face", "Hugging Face, batched by length"


def untrained(config: Config, device: torch.device) -> inference.Trained:
    """A classifier of pieces with random weights, biases too, ready for inference."""
    torch.manual_seed(0)
    classifier = Classifier(config, special_words(config, device)[1], "sequence", len(CLASSES)).to(device)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    classifier.eval().requires_grad_(False)
    return inference.Trained(
        Path("untrained"), "finetune", config, tokenizer.load(config.encoding), config.notes, device,
        classifier.encoder, None, None, classifier, tasks.TASKS["composer"], CLASSES,
    )  # fmt: skip


def ours(trained: inference.Trained, read: list[pieces.Piece]) -> tuple[Callable[[], np.ndarray], ...]:
    """predict: log-probabilities [P, C]; embed: vectors [P, d]. The windows are those of `Trained.predict`."""

    def windows() -> Iterator[list[pieces.Piece]]:
        return pieces.windows(read, inference.WINDOW * trained.batch_words)

    def predict() -> np.ndarray:
        return np.stack([found.log_p for window in windows() for found in trained.predict_pieces(window)])

    def embed() -> np.ndarray:
        encoder = trained.up_to(-1)
        return np.stack([states.mean(0) for window in windows() for states in trained.hidden_states(encoder, window)])

    return predict, embed


def theirs(
    trained: inference.Trained, read: list[pieces.Piece], batch: int, by_length: bool
) -> tuple[Callable[[], np.ndarray], ...]:
    """The same two functions with the peer's encoder."""
    config, device = trained.config, trained.device
    peer = HuggingFaceEncoder(config, trained.encoder.sizes).to(device).take_weights(trained.encoder).eval()
    cut = pieces.sequences(read, config.encoding, config.notes)
    order = np.argsort(-cut.lengths, kind="stable") if by_length else np.arange(len(cut))

    def batches() -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        for start in range(0, len(order), batch):
            numbers = order[start : start + batch]
            words, lengths = cut.batch(numbers)
            words = words[:, : lengths.max() if by_length else config.notes]
            yield numbers, torch.from_numpy(words).to(device), torch.from_numpy(lengths).to(device)

    @torch.inference_mode()
    def predict() -> np.ndarray:
        log_p = np.empty((len(cut), len(CLASSES)))
        for numbers, words, lengths in batches():
            log_p[numbers] = trained.classifier.head(peer(words, lengths), lengths).log_softmax(-1).cpu().numpy()
        return by_piece(log_p, np.ones(len(cut)), cut)

    @torch.inference_mode()
    def embed() -> np.ndarray:
        sums = np.empty((len(cut), config.width))
        for numbers, words, lengths in batches():
            notes = torch.from_numpy(cut.count[numbers]).to(device)
            inside = torch.arange(words.shape[1], device=device) < notes[:, None]
            sums[numbers] = (peer(words, lengths) * inside[..., None]).sum(1).cpu().numpy()
        return by_piece(sums, cut.count, cut)

    return predict, embed


def by_piece(values: np.ndarray, weights: np.ndarray, cut: Sequences) -> np.ndarray:
    """Sums of sequences [S, C] to means of their pieces [P, C]."""
    sums = np.zeros((cut.piece.max() + 1, values.shape[1]))
    np.add.at(sums, cut.piece, values)
    return sums / np.bincount(cut.piece, weights)[:, None]


def read_pieces(path: Path, encoding: str, count: int) -> tuple[list[pieces.Piece], list[str]]:
    """`count` pieces, evenly spaced, of a token store or a folder of MIDI; and the files they were read from."""
    if tokenizer.is_store(path):
        store = tokenizer.open_store(path)
        chosen = [store.pieces[index] for index in evenly_spaced(len(store.pieces), count)]
        return [of_store(store, piece) for piece in chosen], []
    files = pieces.find(path)
    files = [files[index] for index in evenly_spaced(len(files), count)]
    read = [found for found in pieces.read_all(files, encoding) if isinstance(found, pieces.Piece)]
    if not read:
        raise SystemExit(f"{path} holds no usable MIDI")
    return read, [piece.file for piece in read]


def evenly_spaced(total: int, count: int) -> list[int]:
    return np.linspace(0, total - 1, min(count, total)).astype(int).tolist()


def of_store(store: tokenizer.Store, piece: tokenizer.Piece) -> pieces.Piece:
    """A piece of a store; what only a MIDI file knows (notes, seconds) is left empty."""
    last = piece.offset + piece.notes
    inside = (store.segments[:, 0] >= piece.offset) & (store.segments[:, 0] < last)
    words = np.array(store.words[piece.offset : last])
    rows, seconds = np.arange(piece.notes), np.zeros(piece.notes)
    return pieces.Piece(piece.path, words, rows, None, seconds, store.segments[inside, 1], {})


def require_agreement(results: dict[str, np.ndarray]) -> float:
    """The largest difference from the first; ends the program where it is above 1e-4."""
    first, *others = results.values()
    error = max(float(np.abs(first - other).max()) for other in others)
    if not error < 1e-4:
        raise SystemExit(f"the results differ by {error:.1e}: there is nothing to compare")
    return error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks inference", description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--config", choices=PRESETS, default="small")
    parser.add_argument("--pieces", type=int, help="default: 40; 4 for base on a CPU, 400 on CUDA")
    parser.add_argument("--batch", type=int, default=8, help="the peer's sequences in a batch (default: 8)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, help="a token store or folder of MIDI (default: the demo corpus)")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if cuda else "cpu")
    config = Config(**PRESETS[options.config])
    count = options.pieces or (400 if cuda else 4 if options.config == "base" else 40)
    trained = untrained(config, device)

    with tempfile.TemporaryDirectory() as folder:
        path = options.data or demo.write_corpus(Path(folder, "midi"), max(count, 8))
        read, files = read_pieces(path, config.encoding, count)
        cut = pieces.sequences(read, config.encoding, config.notes)
        about = {
            "config": options.config, "pieces": len(read), "notes": sum(len(piece.words) for piece in read),
            "sequences": len(cut), "length": config.notes, "filled": float(cut.lengths.mean() / config.notes),
            "peer_batch": options.batch,
        }  # fmt: skip
        print(
            f"{options.config}: {len(read)} pieces, {about['notes']:,} notes in {len(cut)} sequences of up to "
            f"{config.notes}, {about['filled']:.0%} full on average; {device}"
        )
        functions = {
            "ours": ours(trained, read),
            ALIKE: theirs(trained, read, options.batch, by_length=False),
            BY_LENGTH: theirs(trained, read, options.batch, by_length=True),
        }
        results, errors = {}, {}
        for index, name in enumerate(("predict", "embed")):
            mine = {who: both[index] for who, both in functions.items()}
            errors[name] = require_agreement({who: function() for who, function in mine.items()})
            if files:
                mine["ours, with reading"] = lambda name=name: getattr(trained, name)(files)
            results[name] = take_turns(mine, options.rounds, device)
            print_table(f"{name}; results agree to {errors[name]:.0e}", results[name])
    write(options.out, {**about, "largest_difference": errors, "timings": results})
