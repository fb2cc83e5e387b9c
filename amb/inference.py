"""A trained model at work: MIDI files in, predictions and embeddings out, on clean input, as fine-tuning evaluates.

Files are read as for training: the task's view of the score, the encoding, and `data.cut` for sequences of L notes.
Sequences of many pieces are batched by length, so little is PAD. A piece's prediction is the mean of its sequences'
log-probabilities, its embedding the mean over its notes; neither depends on the rest of the batch.
"""

import copy
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
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
from amb.training import open_device

FEW_FILES = 8  # read before a pool of processes would have started
BATCH = {"cpu": 1 << 11, "cuda": 1 << 15}  # words in a batch, PAD included: a CPU gains nothing from more
WINDOW = 8  # batches' worth of pieces held at a time, to choose sequences of like lengths from


class File(NamedTuple):
    """A MIDI file to read."""

    name: str  # what to call it: a file in an archive is ARCHIVE/PATH
    path: str
    below: str  # its path below the folder or archive that was given


Sources = str | Path | Iterable[str | Path | File]  # files, folders and archives; "-" is standard input


class Piece(NamedTuple):
    """One file as words, [n] of them, and as notes, [N] of them; n < N where the encoding drops notes."""

    file: str
    words: np.ndarray  # uint16 [n, F], as the model's task may see them; no EOS, no PAD
    rows: np.ndarray  # int64 [n], the row of `notes` that each word stands for
    notes: Notes  # all notes of the file that end, as the file has them
    seconds: np.ndarray  # float64 [n], when each word's note starts
    segments: np.ndarray  # int64, how many words each run between two restarts of Bar has
    dropped: dict[str, int]  # notes that have no word, by reason
    damage: str  # what of the file could not be read; the notes are those before
    error: str = ""


class Failure(NamedTuple):
    """A file that cannot be used, and why, in few words."""

    file: str
    error: str
    words: tuple = ()
    dropped: dict[str, int] = {}
    damage: str = ""


@dataclass(frozen=True)
class Prediction:
    """A fine-tuned model's answer for a file. If the file cannot be used, `error` says why and arrays are None."""

    file: str
    classes: tuple[str, ...]
    level: str
    notes: int = 0  # that the model saw
    log_p: np.ndarray | None = None  # float64 [C], the mean of `segments`; for note tasks [N, C], NaN for dropped notes
    segments: np.ndarray | None = None  # float64 [S, C], log-probabilities of the piece's sequences
    spans: np.ndarray | None = None  # float64 [S, 2], the seconds at which the first and the last note of each start
    counts: np.ndarray | None = None  # int64 [S], the notes of each
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
        if self.level == "note":
            p = np.bincount(self.labels + 1, minlength=len(self.classes) + 1)[1:]
        else:
            p = np.exp(self.log_p - self.log_p.max())
        return p / p.sum()

    @property
    def label(self) -> str | None:
        """The most probable class; for note tasks, the most frequent one."""
        return None if self.log_p is None else self.classes[int(self.probabilities.argmax())]

    @property
    def parts(self) -> Iterator[tuple[float, float, int, str, np.ndarray]]:
        """Of each of the piece's sequences: its span in seconds (3 digits), its notes, class and probabilities [C]."""
        spans, counts = self.spans.round(3).tolist(), self.counts.tolist()
        for (start, end), count, p in zip(spans, counts, np.exp(self.segments), strict=True):
            yield start, end, count, self.classes[int(p.argmax())], p


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
    vectors: np.ndarray  # float32 [P, d], the mean over the piece's notes
    counts: np.ndarray  # int64 [P], how many notes that were
    skipped: list[Failure]
    notes: NoteEmbeddings | None

    @classmethod
    def collect(cls, outcomes: Iterable[tuple], width: int, notes: BinaryIO | None = None) -> "Embeddings":
        """All of `Trained.each_embedding`; vectors of notes go into the file `notes`: memory may not hold them."""
        names, vectors, counts, skipped, columns = [], [], [], [], []
        for outcome, states in outcomes:
            if outcome.error:
                skipped.append(outcome)
                continue
            if notes:
                notes.write(states)
                rows = outcome.notes.take(outcome.rows)
                number = np.full(len(states), len(names))
                columns.append((number, outcome.seconds, rows.start, rows.pitch, rows.track))
            names.append(outcome.file)
            vectors.append(states.mean(axis=0, dtype=np.float64))
            counts.append(len(states))
        of_notes = None
        if columns:
            notes.flush()
            states = np.memmap(notes, np.float32, mode="c", shape=(sum(counts), width))
            of_notes = NoteEmbeddings(states, *map(np.concatenate, zip(*columns, strict=True)))
        stacked = np.array(vectors, np.float32).reshape(len(names), width)
        return cls(names, stacked, np.array(counts, np.int64), skipped, of_notes)


@dataclass(frozen=True)
class Trained:
    """A checkpoint, loaded; made by `load`. What the file does not hold (a classifier, a masker) is None.

    Nothing changes it after `load`, so threads may share one.
    """

    path: Path
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
        """A MIDI file as this model may see it. Raises MidiError, with a reason in few words."""
        return read_piece(file, self.encoding.name, self.view)

    def predict(self, files: Sources, workers: int | None = None) -> list[Prediction]:
        """The class of each piece, or of each of its notes, of files, folders and archives, in order.

        `workers`: processes that read files, see `read_all`. Raises ValueError if the model is not fine-tuned.
        """
        return list(self.each_prediction(files, workers))

    def each_prediction(self, files: Sources, workers: int | None = None) -> Iterator[Prediction]:
        """`predict`, one by one, for any number of files in bounded memory."""
        if not self.task:
            needs = f"predicting needs a fine-tuned one (finetune.py --task … --init {self.path})"
            raise ValueError(f"{self.path} is {self.about()}: {needs}")
        for outcome, prediction in self._each(files, workers, self.predict_pieces):
            yield prediction or Prediction(outcome.file, self.classes, self.task.level, error=outcome.error)

    def predict_pieces(self, pieces: list[Piece]) -> list[Prediction]:
        """Predictions for pieces that `encode` made."""
        cut = sequences(pieces, self.encoding.name, self.notes)
        log_p = self._answers(cut, partial(evaluate.log_probabilities, self.classifier)).astype(np.float64)
        return [self._prediction(piece, cut, number, log_p) for number, piece in enumerate(pieces)]

    def _prediction(self, piece: Piece, cut: data.Sequences, number: int, log_p: np.ndarray) -> Prediction:
        first, segments, spans, counts = cut.stores[0].pieces[number].offset, None, None, None
        if self.task.level == "note":
            mean = np.full((len(piece.notes.pitch), len(self.classes)), np.nan)
            mean[piece.rows] = log_p[first : first + len(piece.words)]
        else:
            rows = cut.piece == number
            start, counts, segments = cut.start[rows] - first, cut.count[rows], log_p[rows]
            spans = np.stack([piece.seconds[start], piece.seconds[start + counts - 1]], axis=1)
            mean = segments.mean(axis=0)
        about = self.classes, self.task.level, len(piece.words)
        return Prediction(piece.file, *about, mean, segments, spans, counts, piece.dropped, piece.damage)

    def embed(self, files: Sources, layer: int = -1, notes: bool = False, workers: int | None = None) -> Embeddings:
        """A vector for each piece of files, folders and archives, and with `notes` for each of its notes.

        layer: 0 is the embedding of the words, 1 … N the output of that layer of the encoder, -1 the last, -2 the one
        before. Files that cannot be used are left out, and listed. Raises ValueError if there is no such layer.
        """
        with tempfile.TemporaryFile() if notes else nullcontext() as file:
            return Embeddings.collect(self.each_embedding(files, layer, workers), self.config.width, file)

    def each_embedding(
        self, files: Sources, layer: int = -1, workers: int | None = None
    ) -> Iterator[tuple[Piece, np.ndarray] | tuple[Failure, None]]:
        """Each piece with its notes' hidden states, float32 [n, d] in the order of its words; or a Failure."""
        count = len(self.encoder.layers)
        if not -count - 1 <= layer <= count:
            raise ValueError(f"there is no layer {layer}: 0 is the embedding, 1 to {count} the layers, -1 the last one")
        encoder = copy.copy(self.encoder)  # the same weights, without the layers above
        encoder._modules = {**self.encoder._modules, "layers": self.encoder.layers[: layer % (count + 1)]}
        yield from self._each(files, workers, partial(self._hidden_states, encoder))

    def _hidden_states(self, encoder: Encoder, pieces: list[Piece]) -> list[np.ndarray]:
        cut = sequences(pieces, self.encoding.name, self.notes)
        return np.split(self._answers(cut, encoder), [piece.offset for piece in cut.stores[0].pieces[1:]])

    def _each(self, files: Sources, workers: int | None, answer: Callable[[list[Piece]], list]) -> Iterator[tuple]:
        """Each file's Piece with its answer, or its Failure with None, in the order of the files."""
        with opened(files) as listed:
            outcomes, window, words = read_all(listed, self.encoding.name, self.view, workers), [], 0
            for number, outcome in enumerate(outcomes):
                window.append(outcome)
                words += len(outcome.words)
                if words >= WINDOW * self.batch_words or len(window) == 1000 or number == len(listed) - 1:
                    pieces = [outcome for outcome in window if not outcome.error]
                    answers = iter(answer(pieces) if pieces else [])
                    yield from [(outcome, None if outcome.error else next(answers)) for outcome in window]
                    window, words = [], 0

    @torch.inference_mode()
    def _answers(self, cut: data.Sequences, model: Callable[[Tensor, Tensor], Tensor]) -> np.ndarray:
        """The model's answers, float32: one row a word [words, C] if it gives [B, L, C], one a sequence if [B, C]."""
        rows, answers = [], []
        for numbers, words, lengths in self.batches(cut):
            out = model(words, lengths).float().cpu().numpy()
            if out.ndim == 3:
                places, filled = cut.places(numbers)
                numbers, out = places[filled], out[filled[:, : out.shape[1]]]
            rows.append(numbers)
            answers.append(out)
        return np.concatenate(answers)[np.argsort(np.concatenate(rows))]

    def batches(self, cut: data.Sequences) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """Sequences of like lengths together, as long as the longest: numbers, words [B, L, F], lengths [B]."""
        order = np.argsort(-cut.lengths, kind="stable")
        while len(order):
            longest = int(cut.lengths[order[0]])
            numbers, order = np.split(order, [max(1, self.batch_words // longest)])
            words, lengths = cut.batch(numbers)
            words = np.ascontiguousarray(words[:, :longest])
            words = tasks.hide(self.task, self.encoding, words) if self.task else words
            yield numbers, torch.from_numpy(words).to(self.device), torch.from_numpy(lengths).to(self.device)


def load(path: str | Path, device: str | None = None, dtype: str | None = None) -> Trained:
    """See `amb.load`."""
    if dtype not in (None, "fp32", "bf16", "auto"):
        raise ValueError(f"dtype is {dtype!r}: choose one of fp32, bf16, auto")
    device = open_device(device or ("cuda" if torch.cuda.is_available() else "cpu"), torch.float32)
    path = checkpoint.find(path)
    content = checkpoint.load(path)
    config = checkpoint.config_of(content, path)
    encoding = tokenizer.load(config.encoding)
    if content.get("fields") != [[f.name, f.values, f.size] for f in encoding.fields]:
        raise checkpoint.CheckpointError(f"{path} lists other fields than {encoding.name} has")
    sizes = tuple(f.size for f in encoding.fields)
    number_type = compute_dtype(dtype or ("auto" if device.type == "cuda" else "fp32"), device)
    heads = dict.fromkeys(("recoverer", "masker", "classifier"))
    kind, task, classes, notes = content.get("kind"), None, (), config.notes
    if kind == "finetune":
        task, classes, notes = _task_of(content, path)
        weights = checkpoint.weights_of(content, "", path)
        linear = "head.classify.weight" in weights
        heads["classifier"] = Classifier(config, sizes, task.level, len(classes), number_type, linear)
        checkpoint.load_weights(heads["classifier"], weights, path)
        encoder = heads["classifier"].encoder
    elif kind == "pretrain":
        encoder = Encoder(config, sizes, number_type)
        checkpoint.load_encoder(encoder, content, path)
        for name, head in (("recoverer", Recoverer(config, sizes)), ("masker", Masker(config))):
            if state := checkpoint.weights_of(content, f"{name}.", path):
                checkpoint.load_weights(head, state, path)
                heads[name] = head
    else:
        raise checkpoint.CheckpointError(f"{path} is of a kind that this code does not know: {kind!r}")
    for module in filter(None, (encoder, *heads.values())):
        module.to(device).eval().requires_grad_(False)
    return Trained(path, config, encoding, notes, device, encoder, **heads, task=task, classes=classes)


def _task_of(content: dict, path: Path) -> tuple[tasks.Task, tuple[str, ...], int]:
    name, classes, notes = (content.get(key) for key in ("task", "classes", "notes"))
    named = isinstance(classes, list) and len(classes) > 1 and all(isinstance(label, str) for label in classes)
    if not isinstance(name, str) or name not in tasks.TASKS or not named:
        raise checkpoint.CheckpointError(f"{path} does not say which of this program's tasks it was fine-tuned for")
    if not isinstance(notes, int) or notes < 1:
        raise checkpoint.CheckpointError(f"{path} has sequences of {notes!r} notes")
    return tasks.TASKS[name], tuple(classes), notes


def read_piece(source: str | Path | BinaryIO, encoding: str, view: Callable | None = None) -> Piece:
    """One MIDI file, by a path or as a binary file object. Raises MidiError, with a reason in few words."""
    name = getattr(source, "name", "") if hasattr(source, "read") else os.fspath(source)
    return _piece(name, *tokenizer.encode_file(source, encoding, view))


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

    A source that is missing or holds no MIDI stays in the list; `read_all` makes a Failure of it. Raises ValueError,
    in one line, for an archive that cannot be unpacked.
    """
    with ExitStack() as stack:
        files = []
        for source in [sources] if isinstance(sources, str | Path | File) else sources:
            if isinstance(source, File):
                files.append(source)
                continue
            root = Path(source)
            if str(source) == "-":
                root = Path(stack.enter_context(tempfile.TemporaryDirectory()), "stdin.mid")
                root.write_bytes(sys.stdin.buffer.read(MAX_BYTES + 1))  # the tokenizer refuses what is longer
            elif data.is_archive(root):
                root = data.unpacked(root, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            listed = tokenizer.find_midi(root)[0] or [(root.name, str(root))]
            files += [File(path.replace(str(root), str(source), 1), path, below) for below, path in listed]
        yield files


def read_all(
    files: list[File], encoding: str, view: Callable | None = None, workers: int | None = None
) -> Iterator[Piece | Failure]:
    """Each file in order, read by `workers` processes (by default one per core that this process may use).

    A file that cannot be used becomes a Failure; the rest goes on. This process reads a few files itself.
    """
    workers = 1 if len(files) < FEW_FILES else workers or tokenizer.cores()
    read = partial(tokenizer.outcome_of, encoding=encoding, view=view)
    for file, outcome in zip(files, tokenizer.run([file.path for file in files], read, workers), strict=True):
        if outcome.encoded:
            yield _piece(file.name, outcome.encoded, outcome.score)
        elif os.path.isdir(file.path):
            yield Failure(file.name, "a folder without .mid or .midi files")
        else:
            yield Failure(file.name, str(MidiError(outcome.reason, outcome.detail)))


def sequences(pieces: list[Piece], encoding: str, notes: int) -> data.Sequences:
    """The sequences of up to `notes` words that fine-tuning's evaluation would cut these pieces into.

    `.piece` is the index into `pieces`, `.start` counts words of all pieces together; see `data.Sequences`.
    """
    lengths = np.concatenate([piece.segments for piece in pieces])
    segments = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1)
    words = np.concatenate([piece.words for piece in pieces])
    starts = np.cumsum([0, *(len(piece.words) for piece in pieces)]).tolist()
    listed = [tokenizer.Piece(0, p.file, start, len(p.words)) for p, start in zip(pieces, starts, strict=False)]
    store = tokenizer.Store(Path(), encoding, words, listed, segments, {})
    return data.cut([store], [["read"] * len(pieces)], "read", notes, even=True)
