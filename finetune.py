"""Mask fine-tuning. Read from `main` down: labelled data, one training per seed, the report; then a training.

    python finetune.py --task composer                                        the demo corpus, from scratch, minutes
    python finetune.py --task melody --data POP909 --init runs/small-adversarial
    python finetune.py --task sequence --data my/midi --init runs/small-adversarial       a folder per class
    python finetune.py --task note --data my/midi --init runs/small-adversarial           labels are track names
    python finetune.py --resume runs/melody                                   continue an interrupted run
    torchrun --standalone --nproc_per_node=8 finetune.py --task melody …      one process per GPU, the same result

Tasks: melody, velocity (a class per note), composer, emotion (per sequence); note and sequence take your labels.
A run folder holds model.pt, self-contained (encoding, classes, settings, weights), report.json with every figure,
split.json and, with matplotlib, curves.png and confusion.png. Below it lies a folder per training, seed-0 for seed 0:
metrics.jsonl, last.pt, best.pt, test.npz (log-probabilities on the test set). Resuming works as in train.py. The paper
hides notes while fine-tuning (--mask 0.12, --paper); the default hides none, because it did not help so far
(docs/results.md). For a class per sequence, with --init, the encoder is not trained: `encoded` and `fit_head` make the
head a logistic regression; --train-layers N trains.
"""

import argparse
import json
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from amb import baselines, checkpoint, data, demo, evaluate, parallel, plots, splits, tasks, tokenizer, training
from amb.config import PAPER_FINETUNING, PRESETS, Config, Finetuning, add_flags, flags_given, positive
from amb.files import fingerprint, write_json
from amb.mask_finetuning import TaskLoss, finetune_loss
from amb.model import Classifier, compute_dtype
from amb.objective import Part, dropout_seed
from amb.training import State

# flags that a resumed run may change: where its data are, how many epochs it has, and what does not change its result
RESUME_FLAGS = "resume", "data", "epochs", "cache", "device", "save_every"
DEMO = {"epochs": 5}  # minutes on two cores
SEQUENCE_TASKS = {"notes": 1024, "batch": 2}  # long segments classify better; as many notes a step as 8 x 256
LINEAR = {"notes": 512, "batch": 4, "train_layers": 0}  # sequence tasks, from a pre-trained encoder
STRENGTHS = 0.0003, 0.001, 0.003, 0.01  # of the logistic regression, which validation chooses from
TRAINING_ONLY = {"mask", "transpose", "epochs", "epoch_size", "lr", "warmup", "schedule", "weight_decay", "clip"}


def parse_args() -> argparse.Namespace:
    example = "python finetune.py --task composer --epochs 1"
    parser = training.run_parser("Fine-tune a pre-trained encoder on labelled MIDI.", example)
    add = parser.add_argument
    add("--task", choices=tasks.TASKS, help="what to learn")
    add("--data", type=Path, metavar="PATH", help="the data set: a folder, .zip or .tar.gz (default: a demo)")
    add("--labels", type=Path, metavar="CSV", help="for sequence: path,label instead of class folders")
    add("--split", type=Path, metavar="FILE", help="JSON lists train, valid, test (default: drawn)")
    add("--init", metavar="RUN", help="pre-training run or checkpoint (default: none, a new model)")
    add("--encoding", choices=tokenizer.ENCODINGS, help="words where --init is none (default: octuple)")
    add("--paper", action="store_true", help="the paper's settings where no flag gives another")
    add("--seeds", type=positive, metavar="N", help="trainings, of seeds SEED, SEED + 1 … (default: 1)")
    add_flags(parser, Finetuning, "settings")
    return parser.parse_args()


def open_run(args: argparse.Namespace) -> tuple[Path, dict]:
    """The run's folder and the content of its run.json: from the command line, or from the folder to resume."""
    if args.resume:
        with training.saved_run(args, RESUME_FLAGS) as content:
            content["settings"] = asdict(Finetuning(**content["settings"] | flags_given(args, Finetuning)))
            content["paths"]["data"] = str(args.data.resolve()) if args.data else content["paths"]["data"]
            Config(**content["config"]), tasks.TASKS[content["task"]]
        return args.resume, content
    if not args.task:
        raise ValueError(f"say which --task: {', '.join(tasks.TASKS)}")
    if args.labels and args.task != "sequence":
        raise ValueError("--labels goes with --task sequence")
    config, init = model_config(args)
    defaults = {} if args.data else DEMO
    if tasks.TASKS[args.task].level == "sequence":
        defaults = defaults | (LINEAR if init and not (args.train_layers or args.paper) else SEQUENCE_TASKS)
    defaults = defaults | (PAPER_FINETUNING if args.paper else {})
    settings = Finetuning(**defaults | flags_given(args, Finetuning))
    given = flags_given(args, Finetuning).keys() if is_linear(tasks.TASKS[args.task], settings) else set()
    for name in sorted(given & TRAINING_ONLY):
        print(f"note: --{name.replace('_', '-')} is not used: the head is a regression (--train-layers N trains)")
    if 0 < settings.reach < config.reach:
        raise ValueError(f"--reach {settings.reach} is less than that of the encoder, {config.reach}")
    config = replace(config, reach=settings.reach or config.reach)
    paths = {"data": args.data, "labels": args.labels, "split": args.split, "init": init, "cache": args.cache}
    return training.new_run(args.out, args.task), {
        "task": args.task,
        "seeds": args.seeds or 1,
        "settings": asdict(settings),
        "config": asdict(config),
        "paths": {name: str(path.resolve()) if path else None for name, path in paths.items()},
    }


def is_linear(task: tasks.Task, settings: Finetuning) -> bool:
    """Whether the head is fitted, not trained."""
    return task.level == "sequence" and settings.train_layers == 0


def model_config(args: argparse.Namespace) -> tuple[Config, Path | None]:
    """The model's settings, and the checkpoint to start from, if there is one."""
    if args.init in (None, "none"):
        encoding = {"encoding": args.encoding} if args.encoding else {}
        return Config(**PRESETS[args.config or "small"] | encoding), None
    if args.config or args.encoding:
        raise ValueError("--config and --encoding come with the checkpoint: give them with --init none only")
    init = checkpoint.find(args.init)
    return checkpoint.config_of(checkpoint.load(init), init), init


@dataclass(frozen=True)
class Corpus:
    """The labelled sequences of a run, by role. `truth` has their labels: [S] for sequence tasks, [S, L] for notes."""

    task: tasks.Task
    encoding: tokenizer.Encoding
    labelled: tasks.Labelled
    parts: dict[str, data.Sequences]
    truth: dict[str, np.ndarray]
    pieces: dict[str, list[str]]
    absent: list[str]  # names in the split or csv file that no usable file has
    remarks: list[str]  # what could not be used, and what to know of the split and the classes

    @classmethod
    def open(cls, task: tasks.Task, encoding: str, notes: int, paths: dict[str, Path | None], seed: int) -> "Corpus":
        with parallel.leader_first():  # MIDI files -> a token store with labels, once
            folder = paths["data"] or demo.write_corpus(paths["cache"] / f"demo-{demo.VERSION}")
            folder = data.midi_folder(folder, paths["cache"])
            store = data.tokenized(folder, encoding, paths["cache"], task.view)
        labelled = tasks.read_labels(task, store, folder, paths["labels"])
        even = encoding != "midibert"  # whose words are cut as the published segments are
        least = 1 if even or task.name != "composer" else notes // 2
        short = np.array([piece.notes < least for piece in store.pieces])
        if short.any():
            labelled = replace(labelled, labels=np.where(short, tasks.IGNORED, labelled.labels))
        roles, absent, remarks = splits.labelled_roles(labelled, paths["split"], seed)
        labelled, roles, untrained = tasks.without_untrained(labelled, roles)
        remarks += [f"pieces of fewer than {least} words, which are not used: {short.sum()}"] * int(short.any())
        parts = {role: data.cut([store], [roles], role, notes, even, least) for role in splits.ROLES}
        truth = {role: tasks.labels_of(labelled, part) for role, part in parts.items()}
        pieces = {role: data.names([store], [roles], role) for role in splits.ROLES}
        absent, remarks = absent + labelled.absent, data.unused([store]) + remarks + untrained
        return cls(task, tokenizer.load(encoding), labelled, parts, truth, pieces, absent, remarks)

    def training_batch(self, numbers: np.ndarray, settings: Finetuning, seed: int) -> tuple[slice, list[np.ndarray]]:
        """Random windows of these training sequences' segments, transposed. This process's rows of the batch, and for
        these words [b, L, F], lengths [b], labels int64 [b] or [b, L]."""
        rng, rows = np.random.default_rng(seed), parallel.share(len(numbers))
        part, numbers = self.parts["train"].cropped(numbers, rng), np.arange(len(numbers))
        draws, longest = rng.random(len(numbers))[rows], part.lengths[numbers].max()
        labels = tasks.labels_of(self.labelled, part, numbers[rows]).astype(np.int64)
        labels = labels[:, :longest] if labels.ndim == 2 else labels
        words, lengths = part.batch(numbers[rows])
        words = data.transpose(words[:, :longest], self.encoding, settings.transpose, draws)
        return rows, [tasks.hide(self.task, self.encoding, words), lengths, labels]

    def clean_batch(self, role: str, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Clean words [b, L, F], as long as the longest sequence of these, and lengths [b]."""
        words, lengths = self.parts[role].batch(numbers)
        return tasks.hide(self.task, self.encoding, words[:, : lengths.max(initial=1)]), lengths


def main(args: argparse.Namespace) -> int:
    run, content = parallel.once(open_run, args)
    device, task = training.open_device(args.device), tasks.TASKS[content["task"]]
    config, settings = Config(**content["config"]), Finetuning(**content["settings"])
    paths = {name: path and Path(path) for name, path in content["paths"].items()}
    notes = settings.notes or settings.reach or config.notes
    corpus = Corpus.open(task, config.encoding, notes, paths, settings.seed)
    labels = fingerprint(corpus.pieces, corpus.labelled.classes, corpus.labelled.labels)
    if content.setdefault("fingerprint", labels) != labels:
        raise ValueError(f"the data of {run} has changed since it began: it cannot be resumed")
    content["unused"] = corpus.remarks
    if parallel.leads():
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "split.json", corpus.pieces)
        write_json(run / "run.json", content)
    seen = splits.seen_by(paths["init"], corpus.pieces)
    describe(run, paths["init"], corpus, device, seen)

    # one training per seed; a finished one keeps its result, unless the number of epochs is given anew
    results = []
    with training.Interrupts(run) as interrupts:
        for seed in range(settings.seed, settings.seed + content["seeds"]):
            folder = run / f"seed-{seed}"
            if args.epochs or not (folder / "result.json").exists():
                of_seed = replace(settings, seed=seed)
                train(folder, of_seed, config, corpus, paths["init"], device, args.save_every, interrupts)
            results.append({"seed": seed, **json.loads(parallel.once((folder / "result.json").read_text))})
    if not parallel.leads():
        return 0

    # the model to keep, the baselines beside it, the report
    best = max(results, key=lambda result: (result["valid"]["accuracy"], -result["valid"]["loss"]))
    checkpoint.copy(run / f"seed-{best['seed']}" / "best.pt", run / "model.pt")
    measured = baselines.measure(corpus.parts, corpus.truth, corpus.labelled.classes, task.level)
    about = {"task": task.name, "level": task.level, "classes": corpus.labelled.classes, "notes": notes}
    about |= {"pieces": {role: len(names) for role, names in corpus.pieces.items()}}
    about |= {"absent": corpus.absent, "pretraining": seen}
    about |= {"test": evaluate.over_seeds(results, task.level), "baselines": measured}
    report = content | about | {"model": {"seed": best["seed"]}, "trainings": results}
    write_json(run / "report.json", report)
    plots.draw_finetuning(run, report)
    evaluate.print_report(run, report)
    return 0


def train(folder: Path, settings: Finetuning, config, corpus: Corpus, init, device, save_every, interrupts) -> None:
    """One training to its end, from the start or from folder/last.pt; then folder/result.json. Raises Interrupted."""
    state, task = new_state(settings, config, corpus, init, device), corpus.task
    metrics = training.MetricsFile(folder / "metrics.jsonl")
    about = {"kind": "finetune", "task": task.name, "classes": list(corpus.labelled.classes), **training.about(config)}
    about |= {"notes": corpus.parts["train"].notes, "settings": asdict(settings)}
    save = partial(state.save, folder, about, metrics)
    if (folder / "last.pt").exists():
        state.resume(folder, metrics, "put back a copy, or delete it to start this training anew")
    elif parallel.leads():
        folder.mkdir(exist_ok=True)
        metrics.rewind(0)
    steps, epochs = math.ceil((settings.epoch_size or len(corpus.parts["train"])) / settings.batch), settings.epochs
    vectors, speed = {}, {}  # vectors of a regression alone, speed of training alone
    if state.model.linear:
        steps, epochs = 1, len(STRENGTHS)
        vectors = encoded(state.model, corpus, settings.batch, interrupts)
    held_out = data.sample(len(corpus.parts["valid"]), settings.valid_size, seed=0)  # the same for all trainings
    with training.progress_bar(steps * epochs, state.step, folder.name) as bar:
        try:
            while state.epoch < epochs and state.stale < settings.patience:
                if state.model.linear:
                    fit_head(state, settings, corpus, vectors["train"])
                else:
                    speed = train_epoch(folder, state, settings, corpus, steps, save, save_every, interrupts, bar)
                valid, _ = measure(state.model, corpus, "valid", held_out, settings.batch, interrupts, vectors)
                sums = {name: value.item() for name, value in state.tally.sums.items()}
                line = {"kind": "epoch", "epoch": state.epoch + 1, "step": state.step}
                line["train"] = {"loss": state.tally.mean("loss"), "accuracy": sums["hits"] / max(1, sums["counted"])}
                line |= {"valid": evaluate.headline(valid), "speed": speed}
                metrics.write(line)
                # the loss also tells strengths apart that answer alike
                order = (-valid["loss"],) if state.model.linear else (valid["accuracy"], -valid["loss"])
                if state.end_epoch(valid["loss"], valid["accuracy"], order):
                    save("best.pt")
                save()
                bar.update(state.step - bar.n)
                bar.set_postfix_str(f"valid {valid['accuracy']:.1%}, best {state.highest_accuracy:.1%}")
        except parallel.Interrupted:
            save()
            raise
    # the best epoch's weights on all of the validation set and, for the first time, on the test set
    with parallel.leader_first():
        best = checkpoint.load(folder / "best.pt", device)
    checkpoint.load_weights(state.model, best["model"], folder / "best.pt")
    result = {"best_epoch": state.best_epoch, "epochs": state.epoch}
    for role in ("valid", "test"):
        numbers = np.arange(len(corpus.parts[role]))
        result[role], log_p = measure(state.model, corpus, role, numbers, settings.batch, interrupts, vectors)
    if parallel.leads():
        test, truth = corpus.parts["test"], corpus.truth["test"]
        arrays = {"log_p": log_p.astype(np.float16), "truth": truth, "piece": test.piece, "start": test.start}
        checkpoint.save_arrays(folder / "test.npz", **arrays)
        write_json(folder / "result.json", result)


def new_state(settings: Finetuning, config: Config, corpus: Corpus, init: Path | None, device: torch.device) -> State:
    """A classifier, with the encoder of the checkpoint `init` or a fresh one, and its optimiser."""
    torch.manual_seed(settings.seed)
    sizes, classes = corpus.encoding.sizes, len(corpus.labelled.classes)
    dtype = compute_dtype(settings.dtype, device)
    model = Classifier(config, sizes, corpus.task.level, classes, dtype, is_linear(corpus.task, settings)).to(device)
    if init:
        checkpoint.load_encoder(model.encoder, checkpoint.load(init), init)
    model.freeze(settings.train_layers)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    return State(model=model, optimizer=optimizer)


def weights_of_classes(settings: Finetuning, corpus: Corpus, device: torch.device) -> Tensor | None:
    if not settings.class_weights:
        return None
    weights = tasks.inverse_frequency(corpus.truth["train"], len(corpus.labelled.classes))
    return training.to_device(device, weights)[0]


def encoded(model: Classifier, corpus: Corpus, batch: int, interrupts) -> dict[str, Tensor]:
    """What the linear head sees of the sequences of each role: fp32 [S, K], on the model's device."""
    tables, device = {}, next(model.parameters()).device
    for role, part in corpus.parts.items():
        shape, numbers = (len(part), model.head.inputs), np.arange(len(part))
        tables[role] = answers(Classifier.vectors, shape, model, corpus, role, numbers, batch, interrupts).to(device)
    return tables


@torch.no_grad()
def fit_head(state: State, settings: Finetuning, corpus: Corpus, vectors: Tensor) -> None:
    """The head becomes a logistic regression, in each epoch of another strength."""
    (labels,) = training.to_device(state.device, corpus.truth["train"])
    class_weights = weights_of_classes(settings, corpus, state.device)
    logits = state.model.head.fit(vectors, labels, class_weights, STRENGTHS[state.epoch])
    hits, counted = (logits.argmax(-1) == labels).sum(), torch.tensor(len(labels))
    state.count_step(TaskLoss(F.cross_entropy(logits, labels), hits, counted))


def train_epoch(folder, state, settings, corpus, steps, save, save_every, interrupts, bar) -> dict:
    """The steps that are left of an epoch; returns its speed. Raises Interrupted."""
    (mask_word,) = training.to_device(state.device, corpus.encoding.mask.astype(np.int64))
    class_weights = weights_of_classes(settings, corpus, state.device)
    weights = state.optimizer.param_groups[0]["params"]  # those that are trained
    sequences = len(corpus.parts["train"])
    order = data.epoch_order(sequences, settings.epoch_size or sequences, state.epoch, settings.seed)
    clock, notes = time.perf_counter(), 0
    state.model.train()
    while state.in_epoch < steps:
        interrupts.pause()
        numbers = order[state.in_epoch * settings.batch :][: settings.batch]
        seed = (settings.seed << 32) + state.step
        rows, batch = corpus.training_batch(numbers, settings, seed)
        words, lengths, labels = training.to_device(state.device, *batch)
        notes += int(batch[1].sum())
        # torch's generator draws the head's dropout only; the rest draws from the step's seed
        torch.manual_seed(dropout_seed(seed, Part(rows.start)))
        # hide a share of the notes (mask fine-tuning) and learn the labels of the others
        loss = finetune_loss(
            state.model, words, lengths, labels, mask_word, class_weights, settings.mask, seed, rows.start
        )
        state.optimizer.zero_grad(set_to_none=True)
        loss.loss.backward()
        parallel.sum_gradients(weights)
        torch.nn.utils.clip_grad_norm_(weights, settings.clip)
        rate = training.learning_rate(settings, state.step, steps * settings.epochs)
        state.optimizer.param_groups[0]["lr"] = rate
        state.optimizer.step()
        state.count_step(TaskLoss(*parallel.totals(*loss)))
        bar.update()
        if state.step % save_every == 0:
            state.tally.require_finite(folder)
            save()
    state.tally.require_finite(folder)
    return {"notes_per_s": round(notes * parallel.size / (time.perf_counter() - clock))}


@torch.no_grad()
def answers(answer, shape, model, corpus: Corpus, role: str, numbers: np.ndarray, batch: int, interrupts) -> Tensor:
    """What `answer` makes of the model and the clean words and lengths of the sequences with these numbers.

    fp32 of that shape, a row for each sequence of the role; zeros in all other rows and beyond a sequence's end.
    """
    model.eval()
    rows_of = torch.zeros(shape)
    by_length = numbers[np.argsort(-corpus.parts[role].lengths[numbers], kind="stable")]
    device, read = next(model.parameters()).device, partial(corpus.clean_batch, role)
    # a bar for what takes longer than half a minute
    with tqdm(total=len(numbers), desc=role, delay=30, mininterval=30, disable=not parallel.leads()) as bar:
        for _, rows, words, lengths in training.batches(read, by_length, 2 * batch, device, interrupts):
            out = answer(model, words, lengths).cpu()
            rows_of[(rows, slice(out.shape[1])) if out.ndim == 3 else rows] = out
            bar.update(len(rows) * parallel.size)
    return parallel.add(rows_of)  # each sequence is in one process's share


def measure(
    model, corpus: Corpus, role: str, numbers: np.ndarray, batch: int, interrupts, vectors: dict[str, Tensor]
) -> tuple[dict, np.ndarray]:
    """`evaluate.measure` on clean input, and the log-probabilities [S, C], or for note tasks [S, L, C], of the
    sequences with these numbers; zeros beyond a sequence's end. `vectors` is what `encoded` made, or empty."""
    classes = corpus.labelled.classes
    if vectors:
        log_p = model.head(vectors[role]).log_softmax(-1).detach().cpu()
    else:
        shape = *corpus.truth[role].shape, len(classes)
        log_p = answers(evaluate.log_probabilities, shape, model, corpus, role, numbers, batch, interrupts)
    log_p = log_p.numpy()[numbers]
    return evaluate.measure(log_p, corpus.truth[role][numbers], corpus.parts[role].piece[numbers], classes), log_p


def describe(run: Path, init: Path | None, corpus: Corpus, device: torch.device, seen: dict | None) -> None:
    """Print what is about to happen, and what to doubt, before it takes long."""
    counts = ", ".join(f"{len(corpus.pieces[role])} {role}" for role in splits.ROLES)
    sequences = "/".join(f"{len(part):,}" for part in corpus.parts.values())
    classes = len(corpus.labelled.classes)
    print(f"{run}: {corpus.task.name}, {classes} classes; {counts} pieces, {sequences} sequences")
    print(f"from {init or 'scratch (no --init was given)'}, on {device}. Ctrl-C saves and stops.")
    for line in splits.doubts(corpus.absent, seen, bool(init)) + corpus.remarks:
        print(f"note: {line}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    sys.exit(parallel.run_script("finetune.py", main, parse_args()))
