"""A trained model at work: predictions and embeddings of MIDI files, on clean input, as fine-tuning evaluates.

A piece is cut into sequences of L notes as in training; those of many pieces are batched by length, so little is PAD. A
piece's prediction is the mean of its sequences' log-probabilities, its embedding the mean over its notes. Neither
depends on what else is in the batch. Nothing here changes a model after `load`: threads may share one.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amb import checkpoint, evaluate, pieces, tasks, tokenizer
from amb.config import Config
from amb.model import Classifier, Encoder, Masker, Recoverer, compute_dtype
from amb.pieces import Failure, Piece
from amb.results import Embeddings, NoteEmbeddings, Prediction, note_columns
from amb.training import open_device

BATCH = {"cpu": 1 << 11, "cuda": 1 << 15}  # words in a batch, PAD included: a CPU gains nothing from more
WINDOW = 8  # batches' worth of pieces held at a time, to choose sequences of like lengths from


@dataclass(frozen=True)
class Trained:
    """A checkpoint, loaded; made by `load`. What the file does not hold (a classifier, a masker) is None."""

    path: Path
    kind: str  # "pretrain" or "finetune"
    config: Config
    encoding: tokenizer.Encoding
    notes: int  # L, notes per sequence
    device: torch.device
    encoder: Encoder
    recoverer: Recoverer | None
    masker: Masker | None
    classifier: Classifier | None
    task: tasks.Task | None
    classes: tuple[str, ...]

    def about(self) -> str:
        """What the file holds, in a few words."""
        if self.task:
            return f"a model fine-tuned for {self.task.name} ({', '.join(self.classes)})"
        return "a pre-trained model" if self.recoverer else "a pre-trained encoder alone"

    def encode(self, file: str | Path) -> Piece:
        """A MIDI file as this model may see it. Raises MidiError, with a reason in few words."""
        return pieces.read(file, self.encoding.name, self.task and self.task.view)

    def predict(self, files: str | Path | Iterable[str | Path], workers: int | None = None) -> list[Prediction]:
        """The class of each piece, or of each of its notes, of files and of all MIDI below folders, in order.

        `workers`: processes that read files, see `pieces.read_all`. Raises ValueError if the model is not fine-tuned.
        """
        return list(self.each_prediction(pieces.find(files), workers))

    def each_prediction(self, files: list[str], workers: int | None = None) -> Iterator[Prediction]:
        """`predict`, one by one, for any number of files in bounded memory."""
        if not self.task:
            raise ValueError(
                f"{self.path} is {self.about()}: predicting needs a fine-tuned one "
                f"(finetune.py --task … --init {self.path})"
            )
        for window in self._read(files, workers):
            usable = [outcome for outcome in window if isinstance(outcome, Piece)]
            predictions = iter(self.predict_pieces(usable))
            for outcome in window:
                if isinstance(outcome, Piece):
                    yield next(predictions)
                else:
                    yield Prediction(outcome.file, self.classes, self.task.level, error=outcome.reason)

    def predict_pieces(self, read: list[Piece]) -> list[Prediction]:
        """Predictions for pieces that `encode` made."""
        if not read:
            return []
        cut = pieces.sequences(read, self.encoding.name, self.notes)
        by_note = self.task.level == "note"
        log_p = np.empty((len(cut.stores[0].words) if by_note else len(cut), len(self.classes)))
        with torch.inference_mode():
            for numbers, words, lengths in self.batches(cut):
                out = evaluate.log_probabilities(self.classifier, words, lengths).double().cpu().numpy()
                if by_note:
                    rows, filled = cut.places(numbers)
                    log_p[rows[filled]] = out[filled[:, : out.shape[1]]]
                else:
                    log_p[numbers] = out
        return [self._gather(piece, cut, index, log_p) for index, piece in enumerate(read)]

    def _gather(self, piece: Piece, cut, index: int, log_p: np.ndarray) -> Prediction:
        first = cut.stores[0].pieces[index].offset
        common = dict(classes=self.classes, level=self.task.level, notes=len(piece.words), dropped=piece.dropped)
        if self.task.level == "note":
            of_note = np.full((len(piece.notes.pitch), len(self.classes)), np.nan)
            of_note[piece.rows] = log_p[first : first + len(piece.words)]
            return Prediction(piece.file, log_p=of_note, **common)
        own = np.flatnonzero(cut.piece == index)
        start, counts = cut.start[own] - first, cut.count[own]
        spans = np.stack([piece.seconds[start], piece.seconds[start + counts - 1]], axis=1)
        segments = log_p[own]
        return Prediction(
            piece.file, log_p=segments.mean(axis=0), segments=segments, spans=spans, counts=counts, **common
        )

    def embed(
        self,
        files: str | Path | Iterable[str | Path],
        layer: int = -1,
        notes: bool = False,
        workers: int | None = None,
    ) -> Embeddings:
        """A vector for each piece of files and folders, and with `notes` for each of its notes.

        layer: 0 is the embedding of the words, 1 … N what that layer of the encoder gives, -1 the last, -2 the one
        before. Files that cannot be used are left out, and listed. Raises ValueError if there is no such layer.
        """
        names, vectors, counts, skipped, per_note = [], [], [], [], []
        for outcome, states in self.each_embedding(pieces.find(files), layer, workers):
            if isinstance(outcome, Failure):
                skipped.append(outcome)
                continue
            if notes:
                per_note.append(note_columns(outcome, states, len(names)))
            names.append(outcome.file)
            vectors.append(states.mean(axis=0, dtype=np.float64))
            counts.append(len(states))
        stacked = np.array(vectors, dtype=np.float32).reshape(len(names), self.config.width)
        together = NoteEmbeddings(*map(np.concatenate, zip(*per_note, strict=True))) if per_note else None
        return Embeddings(names, stacked, np.array(counts, dtype=np.int64), skipped, together)

    def each_embedding(
        self, files: list[str], layer: int = -1, workers: int | None = None
    ) -> Iterator[tuple[Piece, np.ndarray] | tuple[Failure, None]]:
        """Each piece with its notes' hidden states, float32 [n, d] in the order of its words; or a Failure."""
        encoder = self.up_to(layer)
        for window in self._read(files, workers):
            usable = [outcome for outcome in window if isinstance(outcome, Piece)]
            states = iter(self.hidden_states(encoder, usable))
            for outcome in window:
                yield (outcome, next(states)) if isinstance(outcome, Piece) else (outcome, None)

    def up_to(self, layer: int) -> Encoder:
        """The encoder without the layers above `layer`, on the same weights. Raises ValueError if there is none."""
        count = len(self.encoder.layers)
        if not -count - 1 <= layer <= count:
            raise ValueError(f"there is no layer {layer}: 0 is the embedding, 1 to {count} the layers, -1 the last one")
        part = copy.copy(self.encoder)
        part._modules = {**self.encoder._modules, "layers": self.encoder.layers[: layer % (count + 1)]}
        return part

    def hidden_states(self, encoder: Encoder, read: list[Piece]) -> list[np.ndarray]:
        """For each piece float32 [n, d], the hidden state of each word."""
        if not read:
            return []
        cut = pieces.sequences(read, self.encoding.name, self.notes)
        states = np.empty((len(cut.stores[0].words), self.config.width), dtype=np.float32)
        with torch.inference_mode():
            for numbers, words, lengths in self.batches(cut):
                rows, filled = cut.places(numbers)
                out = encoder(words, lengths).float().cpu().numpy()
                states[rows[filled]] = out[filled[:, : out.shape[1]]]
        return np.split(states, [piece.offset for piece in cut.stores[0].pieces[1:]])

    def batches(self, cut) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """Sequences of like lengths together, as long as the longest: numbers, words [B, L, F], lengths [B]."""
        order = np.argsort(-cut.lengths, kind="stable")
        while len(order):
            longest = int(cut.lengths[order[0]])
            numbers, order = np.split(order, [max(1, self.batch_words // longest)])
            words, lengths = cut.batch(numbers)
            words = words[:, :longest]
            if self.task:
                words = tasks.hide(self.task, self.encoding, words)
            yield (
                numbers,
                torch.from_numpy(np.ascontiguousarray(words)).to(self.device),
                torch.from_numpy(lengths).to(self.device),
            )

    def _read(self, files: list[str], workers: int | None) -> Iterator[list[Piece | Failure]]:
        outcomes = pieces.read_all(files, self.encoding.name, self.task and self.task.view, workers)
        return pieces.windows(outcomes, WINDOW * self.batch_words)

    @property
    def batch_words(self) -> int:
        return BATCH.get(self.device.type, BATCH["cpu"])


def load(path: str | Path, device: str | None = None, dtype: str = "fp32") -> Trained:
    """See `amb.load`."""
    if dtype not in ("fp32", "bf16", "auto"):
        raise ValueError(f"dtype is {dtype!r}: choose one of fp32, bf16, auto")
    device = open_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = checkpoint.find(path)
    content = checkpoint.load(path, device)
    config = checkpoint.config_of(content, path)
    encoding = tokenizer.load(config.encoding)
    if content.get("fields") != [[field.name, field.values, field.size] for field in encoding.fields]:
        raise checkpoint.CheckpointError(f"{path} lists other fields than {encoding.name} has")
    sizes = tuple(field.size for field in encoding.fields)
    number_type = compute_dtype(dtype, device)
    heads = {"recoverer": None, "masker": None, "classifier": None}
    task, classes, notes = None, (), config.notes
    if content.get("kind") == "finetune":
        task, classes, notes = _task_of(content, config, path)
        whole = Classifier(config, sizes, task.level, len(classes), number_type).to(device)
        checkpoint.load_weights(whole, checkpoint.weights_of(content, "", path), path)
        encoder, heads["classifier"] = whole.encoder, whole
    elif content.get("kind") == "pretrain":
        encoder = whole = Encoder(config, sizes, number_type).to(device)
        checkpoint.load_encoder(encoder, content, path)
        for name, head in (("recoverer", Recoverer), ("masker", Masker)):
            if state := checkpoint.weights_of(content, f"{name}.", path):
                heads[name] = head(config, sizes) if head is Recoverer else head(config)
                checkpoint.load_weights(heads[name].to(device), state, path)
                heads[name].eval().requires_grad_(False)
    else:
        raise checkpoint.CheckpointError(f"{path} is of a kind that this code does not know: {content.get('kind')!r}")
    whole.eval().requires_grad_(False)
    kind = content["kind"]
    return Trained(path, kind, config, encoding, notes, device, encoder, **heads, task=task, classes=classes)


def _task_of(content: dict, config: Config, path: Path) -> tuple[tasks.Task, tuple[str, ...], int]:
    name, classes, notes = (content.get(key) for key in ("task", "classes", "notes"))
    named = isinstance(classes, list) and len(classes) > 1 and all(isinstance(label, str) for label in classes)
    if not isinstance(name, str) or name not in tasks.TASKS or not named:
        raise checkpoint.CheckpointError(f"{path} does not say which of this program's tasks it was fine-tuned for")
    if not isinstance(notes, int) or notes < 1:
        raise checkpoint.CheckpointError(f"{path} has sequences of {notes!r} notes")
    return tasks.TASKS[name], tuple(classes), notes
