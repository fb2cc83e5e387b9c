"""Use a trained model: MIDI files in, predictions and embeddings out, on clean input, as in fine-tuning's evaluation.

Files are read as for training: the task's view of the score, the encoding, and `data.cut` for sequences of L notes.
Sequences of many pieces are batched by length, so that there is little PAD. A piece's prediction is the mean of its
sequences' log-probabilities, its embedding the mean over its notes; neither depends on the rest of the batch.
"""

import copy
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from amb import checkpoint, data, evaluate, tasks, tokenizer
from amb.config import Config
from amb.model import Classifier, Encoder, Masker, Recoverer, compute_dtype
from amb.tokenizer import MidiError, Notes, Score
from amb.tokenizer.midi import MAX_BYTES
from amb.training import about, open_device

BATCH = {"cpu": 1 << 11, "cuda": 1 << 15}  # words in a batch, PAD included: a CPU gains nothing from more
WINDOW = 8  # batches' worth of pieces held at a time, to choose sequences of like lengths from


class File(NamedTuple):
    """A MIDI file to read."""

    name: str  # what to call it: a file in an archive is ARCHIVE/PATH
    path: str
    below: str  # its path below the folder or archive


Sources = str | Path | Iterable[str | Path | File]  # files, folders and archives; "-" is standard input


class Piece(NamedTuple):
    """One file as words, [n] of them, and as notes, [N] of them; n < N where the encoding drops notes.

    A file that cannot be used has no words, and `error` is the reason.
    """

    file: str
    words: np.ndarray = ()  # uint16 [n, F], as the model's task may see them; no EOS, no PAD
    rows: np.ndarray = ()  # int64 [n], the row of `notes` that each word stands for
    notes: Notes | None = None  # all notes of the file that end, as the file has them
    seconds: np.ndarray = ()  # float64 [n], when each word's note starts
    segments: np.ndarray = ()  # int64, how many words each run between two restarts of Bar has
    dropped: dict[str, int] = {}  # notes that have no word, by reason
    damage: str = ""  # what of the file could not be read; the notes are those before
    error: str = ""


@dataclass(frozen=True)
class Prediction:
    """A fine-tuned model's answer for a file. If the file cannot be used, `error` is the reason and arrays are None."""

    file: str
    classes: tuple[str, ...]
    notes: int = 0  # that the model saw
    log_p: np.ndarray | None = None  # float64 [C], the mean over `parts`; for note tasks [N, C], NaN for dropped notes
    span: tuple[float, ...] = ()  # of a part, the seconds at which its first and its last note start, in three digits
    parts: list["Prediction"] = field(default_factory=list)  # in sequence tasks, the answer for each of its sequences
    dropped: dict[str, int] = field(default_factory=dict)  # as in `Piece`, as is `damage`
    damage: str = ""
    error: str = ""

    @property
    def labels(self) -> np.ndarray:
        """For note tasks int64 [N], indices into `classes`, -1 for a dropped note."""
        return np.where(np.isnan(self.log_p[:, 0]), -1, self.log_p.argmax(axis=1))

    @property
    def probabilities(self) -> np.ndarray | None:
        """float64 [C], sum 1: of the piece's class, or for note tasks the share of the notes of each class."""
        if self.log_p is None:
            return None
        if self.log_p.ndim == 2:
            p = np.bincount(self.labels + 1, minlength=len(self.classes) + 1)[1:]
        else:
            p = np.exp(self.log_p - self.log_p.max())
        return p / p.sum()

    @property
    def label(self) -> str | None:
        """The most probable class; for note tasks, the most frequent one."""
        return None if self.log_p is None else self.classes[int(self.probabilities.argmax())]

    def record(self, segments: bool = False) -> dict:
        """As plain values: for note tasks the share of the notes of each class."""
        values = dict(zip(self.classes, self.probabilities.round(6).tolist(), strict=True))
        if self.log_p.ndim == 2:
            return {"notes": self.notes, "shares": values, "dropped": self.dropped}
        record = {"class": self.label, "probabilities": values, "notes": self.notes}
        if segments:
            record["segments"] = [{"start": p.span[0], "end": p.span[1], **p.record()} for p in self.parts]
        return record


class NoteEmbeddings(NamedTuple):
    """One row a note that has a word: by piece, within a piece in the order of the words."""

    vectors: np.ndarray  # float32 [notes, d]
    piece: np.ndarray  # int64, index into the pieces' names
    seconds: np.ndarray  # float64, when the note starts
    start: np.ndarray  # int64, the same in the file's ticks
    pitch: np.ndarray  # int64, MIDI pitch
    track: np.ndarray  # int64, index of the track in the file


class Embeddings(NamedTuple):
    """Vectors of P pieces, in the order of the files; `skipped` are the files that cannot be used."""

    names: list[str]
    vectors: np.ndarray  # float32 [P, d], the mean over the piece's notes; of all layers [P, 3 (N + 1) d]
    counts: np.ndarray  # int64 [P], how many notes that were
    skipped: list[Piece]
    notes: NoteEmbeddings | None


@dataclass(frozen=True)
class Trained:
    """A checkpoint, loaded; made by `load`. What the file does not hold (a classifier, a masker) is None."""

    path: Path
    config: Config
    encoding: tokenizer.Encoding
    notes: int  # L, notes per sequence
    device: torch.device
    encoder: Encoder
    recoverer: Recoverer | None = None
    masker: Masker | None = None
    classifier: Classifier | None = None
    task: tasks.Task | None = None
    classes: tuple[str, ...] = ()

    @property
    def view(self) -> Callable | None:
        return self.task and self.task.view

    @property
    def batch_words(self) -> int:
        return BATCH.get(self.device.type, BATCH["cpu"])

    def about(self) -> str:
        """What the file holds, in a few words."""
        if self.task:
            return f"a model fine-tuned for {self.task.name} ({', '.join(self.classes)})"
        return "a pre-trained model" if self.recoverer else "a pre-trained encoder alone"

    def encode(self, file: str | Path | BinaryIO) -> Piece:
        """A MIDI file, by its path or as a binary file object, as this model may see it.

        Raises MidiError, with a reason in few words.
        """
        name = getattr(file, "name", "") if hasattr(file, "read") else os.fspath(file)
        return _piece(name, *tokenizer.encode_file(file, self.encoding.name, self.view))

    def read(self, files: list[File], workers: int | None = None) -> Iterator[Piece]:
        """Each file in order, read by `workers` processes (by default one per core that this process may use).

        One that cannot be used becomes a Piece with an error; the rest goes on. This process reads a few files itself.
        """
        read = partial(tokenizer.outcome_of, encoding=self.encoding.name, view=self.view)
        outcomes = tokenizer.run([file.path for file in files], read, workers or tokenizer.cores())
        for file, outcome in zip(files, outcomes, strict=True):
            if outcome.encoded:
                yield _piece(file.name, outcome.encoded, outcome.score)
            else:
                yield Piece(file.name, error=str(MidiError(outcome.reason, outcome.detail)))

    def predict(self, files: Sources, workers: int | None = None) -> list[Prediction]:
        """The class of each piece, or of each of its notes, of files, folders and archives, in order.

        `workers`: processes that read files, see `read`. Raises ValueError if the model is not fine-tuned.
        """
        return list(self.each_prediction(files, workers))

    def each_prediction(self, files: Sources, workers: int | None = None) -> Iterator[Prediction]:
        """`predict`, one by one, for any number of files in bounded memory."""
        if not self.task:
            needs = f"predicting needs a fine-tuned one (finetune.py --task … --init {self.path})"
            raise ValueError(f"{self.path} is {self.about()}: {needs}")
        for outcome, prediction in self._each(files, workers, self.predict_pieces):
            yield prediction or Prediction(outcome.file, self.classes, error=outcome.error)

    def predict_pieces(self, pieces: list[Piece]) -> list[Prediction]:
        """Predictions for pieces that `encode` made."""
        cut = self.sequences(pieces)
        log_p = self.answers(cut, partial(evaluate.log_probabilities, self.classifier)).astype(np.float64)
        return [self._prediction(piece, cut, number, log_p) for number, piece in enumerate(pieces)]

    def _prediction(self, piece: Piece, cut: data.Sequences, number: int, log_p: np.ndarray) -> Prediction:
        about, first = (piece.file, self.classes), cut.stores[0].pieces[number].offset
        if self.task.level == "note":
            answer, parts = np.full((len(piece.notes.pitch), len(self.classes)), np.nan), []
            answer[piece.rows] = log_p[first : first + len(piece.words)]
        else:
            rows = np.flatnonzero(cut.piece == number)
            ends = np.stack([cut.start[rows], cut.start[rows] + cut.count[rows] - 1], axis=1) - first
            spans, counts, answer = piece.seconds[ends].round(3).tolist(), cut.count[rows].tolist(), log_p[rows]
            parts = [Prediction(*about, *part) for part in zip(counts, answer, map(tuple, spans), strict=True)]
            answer = answer.mean(axis=0)
        return Prediction(*about, len(piece.words), answer, parts=parts, dropped=piece.dropped, damage=piece.damage)

    def embed(
        self,
        files: Sources,
        layer: int | None = -1,
        notes: bool = False,
        workers: int | None = None,
        count: Callable[[Piece], None] = lambda outcome: None,
    ) -> Embeddings:
        """A vector for each piece of files, folders and archives, and with `notes` for each of its notes.

        layer: 0 is the embedding of the words, 1 … N the output of that layer of the encoder, -1 the last, -2 the one
        before; None the `statistics` of all, mean over the piece's sequences. Files that cannot be used are left out,
        and listed; `count` is called with each outcome. Vectors of notes lie in a temporary file, because memory may
        not hold them. Raises ValueError if there is no such layer, or for notes with None.
        """
        layers, width, model = len(self.encoder.layers), self.config.width, self.encoder.statistics
        if layer is None:
            width *= 3 * (layers + 1)
            if notes:
                raise ValueError("notes have vectors of one layer, not of all")
        elif -layers - 1 <= layer <= layers:
            model = copy.copy(self.encoder)  # the same weights, without the layers above
            model._modules = {**model._modules, "layers": model.layers[: layer % (layers + 1)]}
        else:
            raise ValueError(f"there is no layer {layer}: 0 is the embedding, 1 to {layers} the layers, -1 the last")
        names, vectors, counts, skipped, columns, of_notes = [], [], [], [], [], None
        with tempfile.TemporaryFile() as file:
            for outcome, states in self._each(files, workers, partial(self._by_piece, model)):
                count(outcome)
                if outcome.error:
                    skipped.append(outcome)
                    continue
                if notes:
                    file.write(states)
                    rows = outcome.notes.take(outcome.rows)
                    piece = np.full(len(states), len(names))
                    columns.append((piece, outcome.seconds, rows.start, rows.pitch, rows.track))
                names.append(outcome.file)
                vectors.append(states.mean(axis=0, dtype=np.float64))
                counts.append(len(outcome.words))
            if columns:
                file.flush()
                states = np.memmap(file, np.float32, mode="c", shape=(sum(counts), width))
                of_notes = NoteEmbeddings(states, *map(np.concatenate, zip(*columns, strict=True)))
        stacked = np.array(vectors, np.float32).reshape(len(names), width)
        return Embeddings(names, stacked, np.array(counts, np.int64), skipped, of_notes)

    def _by_piece(self, model: Callable[[Tensor, Tensor], Tensor], pieces: list[Piece]) -> list[np.ndarray]:
        """The `answers` of each piece, float32: a row for each of its words, or for each of its sequences."""
        cut = self.sequences(pieces)
        rows = self.answers(cut, model)
        piece = cut.piece if len(rows) == len(cut) else np.repeat(cut.piece, cut.count)
        return np.split(rows, np.flatnonzero(np.diff(piece)) + 1)

    def _each(self, files: Sources, workers: int | None, answer: Callable[[list[Piece]], list]) -> Iterator[tuple]:
        """Each file's Piece with its answer, None if it cannot be used, in the order of the files."""
        with opened(files) as listed:
            window, words = [], 0
            for number, outcome in enumerate(self.read(listed, workers)):
                window.append(outcome)
                words += len(outcome.words)
                if words >= WINDOW * self.batch_words or len(window) == 1000 or number == len(listed) - 1:
                    pieces = [outcome for outcome in window if not outcome.error]
                    answers = iter(answer(pieces) if pieces else [])
                    yield from [(outcome, None if outcome.error else next(answers)) for outcome in window]
                    window, words = [], 0

    def sequences(self, pieces: list[Piece]) -> data.Sequences:
        """The sequences that fine-tuning's evaluation would cut these pieces into, as of one store.

        `.piece` is the index into `pieces`, `.start` counts words of all pieces together.
        """
        lengths = np.concatenate([piece.segments for piece in pieces])
        segments = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1)
        words = np.concatenate([piece.words for piece in pieces])
        starts = np.cumsum([0, *(len(piece.words) for piece in pieces)]).tolist()
        listed = [tokenizer.Piece(0, p.file, start, len(p.words)) for p, start in zip(pieces, starts, strict=False)]
        store = tokenizer.Store(Path(), self.encoding.name, words, listed, segments, {})
        return data.cut([store], [["read"] * len(pieces)], "read", self.notes, even=True)

    @torch.inference_mode()
    def answers(
        self, cut: data.Sequences, model: Callable[[Tensor, Tensor], Tensor], hidden: np.ndarray | None = None
    ) -> np.ndarray:
        """What `model` makes of words [B, L, F] and lengths [B], float32: [words, C] if it returns [B, L, C], one row
        a word, or [S, C] if it returns [B, C].

        hidden: bool [words], which of them are MASK. Sequences of like lengths make a batch, as long as its longest.
        """
        rows, answers = [], []
        order = np.argsort(-cut.lengths, kind="stable")
        while len(order):
            longest = int(cut.lengths[order[0]])
            numbers, order = np.split(order, [max(1, self.batch_words // longest)])
            words, lengths = cut.batch(numbers)
            places, filled = cut.places(numbers)
            places = places[filled]
            if hidden is not None:
                words[filled] = np.where(hidden[places, None], self.encoding.mask, words[filled])
            words = np.ascontiguousarray(words[:, :longest])
            words = tasks.hide(self.task, self.encoding, words) if self.task else words
            out = model(torch.from_numpy(words).to(self.device), torch.from_numpy(lengths).to(self.device))
            out = out.float().cpu().numpy()
            rows.append(places if out.ndim == 3 else numbers)
            answers.append(out[filled[:, :longest]] if out.ndim == 3 else out)
        return np.concatenate(answers)[np.argsort(np.concatenate(rows))]


def load(path: str | Path, device: str | None = None, dtype: str | None = None) -> Trained:
    """See `amb.load`."""
    if dtype not in (None, "fp32", "bf16", "auto"):
        raise ValueError(f"dtype is {dtype!r}: choose one of fp32, bf16, auto")
    device = open_device(device or ("cuda" if torch.cuda.is_available() else "cpu"), torch.float32)
    path = checkpoint.find(path)
    content = checkpoint.load(path)
    config = checkpoint.config_of(content, path)
    encoding = tokenizer.load(config.encoding)
    if content.get("fields") != about(config)["fields"]:
        raise checkpoint.CheckpointError(f"{path} lists other fields than {encoding.name} has")
    number_type = compute_dtype(dtype or ("auto" if device.type == "cuda" else "fp32"), device)
    kind, notes, labelled = content.get("kind"), config.notes, {}
    if kind == "finetune":
        with checkpoint.reading(path):
            task, classes, notes = tasks.TASKS[content["task"]], tuple(map(str, content["classes"])), content["notes"]
            if notes < 1:  # a sequence has at least one
                raise ValueError
        labelled, weights = {"task": task, "classes": classes}, checkpoint.weights_of(content, "", path)
        linear = "head.centre" in weights
        classifier = Classifier(config, encoding.sizes, task.level, len(classes), number_type, linear)
        checkpoint.load_weights(classifier, weights, path)
        modules = {"encoder": classifier.encoder, "classifier": classifier}
    elif kind == "pretrain":
        modules = {"encoder": Encoder(config, encoding.sizes, number_type)}
        checkpoint.load_encoder(modules["encoder"], content, path)
        for name, head in (("recoverer", Recoverer(config, encoding.sizes)), ("masker", Masker(config))):
            if state := checkpoint.weights_of(content, f"{name}.", path):
                checkpoint.load_weights(head, state, path)
                modules[name] = head
    else:
        raise checkpoint.CheckpointError(f"{path} is of an unknown kind, {kind!r}")
    for module in modules.values():
        module.to(device).eval().requires_grad_(False)
    return Trained(path, config, encoding, notes, device, **modules, **labelled)


def _piece(name: str, encoded: tokenizer.Encoded, score: Score) -> Piece:
    dropped = {reason: count for reason, count in encoded.dropped.items() if count}
    times = seconds(score, score.notes.start[encoded.rows])
    return Piece(name, encoded.words, encoded.rows, score.notes, times, encoded.segments, dropped, score.damage)


def seconds(score: Score, ticks: np.ndarray) -> np.ndarray:
    """When each of `ticks` is reached, in seconds, under the score's tempos; float64, the shape of `ticks`."""
    at, tempo = np.array([(0, 500_000), *score.tempos]).T
    pace = tempo / score.ticks_per_beat / 1e6
    begun = np.append(0, np.cumsum(np.diff(at) * pace[:-1]))
    last = np.searchsorted(at, ticks, side="right") - 1
    return begun[last] + (ticks - at[last]) * pace[last]


def bars(score: Score, ticks: np.ndarray) -> np.ndarray:
    """The bar that each of `ticks` lies in, int64, under the score's time signatures; a signature begins a bar."""
    ticks = ticks + score.ticks_per_beat / 32  # as the words round: a note just before the bar line is of the next bar
    at, numerator, denominator = np.array([(0, 4, 4), *score.signatures]).T
    length = 4 * numerator / denominator * score.ticks_per_beat
    begun = np.append(0, np.cumsum(np.ceil(np.diff(at) / length[:-1])))
    last = np.searchsorted(at, ticks, side="right") - 1
    return (begun[last] + (ticks - at[last]) // length[last]).astype(np.int64)


@contextmanager
def opened(sources: Sources) -> Iterator[list[File]]:
    """The MIDI files of `sources` in that order, folders and archives sorted and at any depth; until the block ends.

    A source that is missing or holds no MIDI stays in the list, as does a folder that cannot be read; `Trained.read`
    gives the reason. Raises ValueError, in one line, for an archive that cannot be unpacked.
    """
    with ExitStack() as stack:
        files = []
        for source in [sources] if isinstance(sources, str | Path | File) else sources:
            if isinstance(source, File):
                files.append(source)
                continue
            root = named = Path(source)
            if str(source) == "-":
                root = Path(stack.enter_context(tempfile.TemporaryDirectory()), "stdin.mid")
                root.write_bytes(sys.stdin.buffer.read(MAX_BYTES + 1))  # the tokenizer refuses what is longer
            elif data.is_archive(root):
                root = data.unpacked(root, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            listed, unread = tokenizer.find_midi(root)
            listed += [(below, str(root / below)) for below, *_ in unread]
            listed = listed or [(root.name, str(root))]
            files += [File(path.replace(str(root), str(named), 1), path, below) for below, path in listed]
        yield files
