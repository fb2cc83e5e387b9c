"""Pre-train Adversarial-MidiBERT. Read from `main` down: data, model, loop; then one step, one epoch's end, the table.

    python train.py --config small                              the demo corpus, minutes on a laptop
    python train.py --config small --data POP909 Pianist8/midi  folders of MIDI (tokenized once) or token stores
    python train.py --resume runs/small-adversarial             continue an interrupted run
    torchrun --standalone --nproc_per_node=8 train.py …         one process per GPU, the same result (amb/parallel.py)

A run folder holds run.json (settings and data), pieces.json (which pieces train, validate, test), metrics.jsonl,
last.pt, best.pt, book.npz (the frozen notes) and, with matplotlib, curves.png and masker.png. Everything random in a
step is a function of (seed, step): a checkpoint needs no generator states, and a resumed run repeats the uninterrupted
one, on a CPU to the last bit.
"""

import argparse
import math
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amb import data, demo, mask_book, objective, parallel, plots, speed, splits, tokenizer, training
from amb.config import PRESETS, Config, add_flags, flags_given, positive
from amb.files import fingerprint, read_metrics, table, write_json
from amb.model import AdversarialMidiBert, compute_dtype
from amb.objective import StepLoss, Vocabulary
from amb.training import State, Tally

# flags that a resumed run may change: where its data are, how many epochs it has, and what does not change its result
RESUME_FLAGS = (
    "resume", "data", "epochs", "cache", "device",
    "save_every", "log_every", "micro_batch", "recompute", "cuda_graph", "profile",
)  # fmt: skip
VALIDATION_SEED = 1 << 62  # far from the seeds of steps


def parse_args() -> argparse.Namespace:
    parser = training.run_parser("Pre-train Adversarial-MidiBERT.", "python train.py --config small --epochs 1")
    add = parser.add_argument
    add("--data", nargs="+", metavar="PATH", help="folders or archives of MIDI, or token stores (default: a demo)")
    add("--split", nargs="+", metavar="FILE", help="JSON lists train, valid, test of pieces (default: drawn)")
    add("--log-every", type=positive, default=10, metavar="STEPS", help="steps between metrics")
    add("--micro-batch", type=positive, metavar="N", help="sequences computed at a time (default: all)")
    add("--recompute", action="store_true", help="keep no activations inside layers: saves memory")
    add("--cuda-graph", action="store_true", help="record a step on the GPU and replay it")
    add("--profile", action="store_true", help="trace three steps into RUN/trace.json")
    add_flags(parser, Config, "settings (override the preset)")
    return parser.parse_args()


def open_run(args: argparse.Namespace) -> tuple[Path, dict]:
    """The run's folder and the content of its run.json: from the command line, or from the folder to resume."""
    paths = {name: [str(Path(path).resolve()) for path in getattr(args, name) or []] for name in ("data", "split")}
    if args.resume:
        with training.saved_run(args, RESUME_FLAGS) as content:
            if "task" in content:
                raise ValueError("it is a run of finetune.py")
            content["config"] = asdict(Config(**content["config"] | flags_given(args, Config)))
            content["paths"]["data"] = paths["data"] or content["paths"]["data"]
        return args.resume, content
    config = Config(**PRESETS[args.config or "small"] | flags_given(args, Config))
    run = training.new_run(args.out, f"{args.config or 'small'}-{config.objective}")
    return run, {"config": asdict(config), "paths": paths | {"cache": str(args.cache.resolve())}}


@dataclass(frozen=True)
class Corpus:
    """The sequences to train and validate on, and the pieces that they come from, by role."""

    training: data.Sequences
    validation: data.Sequences
    held_out: np.ndarray  # the numbers of the validation sequences used after each epoch
    pieces: dict[str, list[str]]
    remarks: list[str]  # what could not be used, and what was decided about the split
    fingerprint: str

    @classmethod
    def open(cls, config: Config, paths: dict) -> "Corpus":
        cache = Path(paths["cache"])
        with parallel.leader_first():  # MIDI files -> token stores, once
            sources = paths["data"] or [demo.write_corpus(cache / f"demo-{demo.VERSION}")]
            stores = data.open_sources(sources, config.encoding, cache)
        roles, remarks = splits.assign_roles(stores, paths["split"], config.valid_share, config.seed)
        parts = [data.cut(stores, roles, role, config.notes) for role in ("train", "valid")]
        pieces = {role: data.names(stores, roles, role) for role in splits.ROLES}
        held_out = data.sample(len(parts[1]), config.valid_size, config.seed)
        arrays = (array for part in parts for array in (part.store, part.start, part.count))
        return cls(*parts, held_out, pieces, data.unused(stores) + remarks, fingerprint(pieces, *arrays))


def main(args: argparse.Namespace) -> int:
    run, content = parallel.once(open_run, args)
    config = Config(**content["config"])
    device, encoding = training.open_device(args.device), tokenizer.load(config.encoding)
    if args.cuda_graph and (device.type != "cuda" or parallel.size > 1):
        raise ValueError("--cuda-graph is for one process on a GPU")
    corpus = Corpus.open(config, content["paths"])
    if content.setdefault("fingerprint", corpus.fingerprint) != corpus.fingerprint:
        raise ValueError(f"the data of {run} has changed since it began: it cannot be resumed")
    state = new_state(config, encoding, len(corpus.training), device, args)
    metrics = training.MetricsFile(run / "metrics.jsonl")
    save = partial(state.save, run, {"kind": "pretrain", **training.about(config)}, metrics)
    if args.resume:
        state.resume(run, metrics, "put back a copy, or start anew with another --out; best.pt stays usable")
        state.optimizer.param_groups[0]["capturable"] = args.cuda_graph
    describe(run, config, device, state.model, corpus)
    if parallel.leads():
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "pieces.json", corpus.pieces)
    if not args.resume:
        save()
    if parallel.leads():
        write_json(run / "run.json", content | {"unused": corpus.remarks})  # last: a folder that has it can be resumed
        if state.epoch and not state.in_epoch:
            draw(run, state, corpus.training)  # the run may have been killed before it drew them

    steps = math.ceil((config.epoch_size or len(corpus.training)) / config.batch)
    with (
        training.Interrupts(run) as interrupts,
        training.progress_bar(steps * config.epochs, state.step) as bar,
        speed.profiler(run if args.profile and parallel.leads() else None) as profiler,
    ):
        try:
            speeds = train(run, config, corpus, state, metrics, save, interrupts, bar, profiler, args)
        except parallel.Interrupted:
            save()
            raise
    if parallel.leads():
        print_table(encoding, run, data.most_frequent_baseline(corpus.training, corpus.validation))
        if speeds:
            dtype = state.model.encoder.dtype
            print(speed.speed_line(statistics.median(speeds), config, sum(encoding.sizes), device, dtype))
    return 0


def new_state(config: Config, encoding, sequences: int, device: torch.device, args) -> State:
    """A fresh model with its optimiser, uniform field weights w_f, and a mask book in which nothing is frozen."""
    torch.manual_seed(config.seed)
    model = AdversarialMidiBert(config, encoding.sizes, compute_dtype(config.dtype, device)).to(device)
    model.encoder.recompute = args.recompute
    rate = torch.tensor(config.lr, device=device)  # a tensor, because a CUDA graph reads it on the device
    optimizer = torch.optim.AdamW(
        model.parameters(), rate, weight_decay=config.weight_decay, fused=True, capturable=args.cuda_graph
    )
    book, weights = mask_book.empty_book(sequences, config.notes), objective.uniform_weights(len(encoding.fields))
    tensors = {"book": book.to(device), "field_weights": weights.to(device)}
    return State(model=model, optimizer=optimizer, tensors=tensors)


def train(run, config, corpus, state, metrics, save, interrupts, bar, profiler, args) -> list[float]:
    """The epochs that are left; returns the speeds measured, in notes per second. Raises Interrupted."""
    vocabulary = Vocabulary.of(tokenizer.load(config.encoding), state.device)
    step = partial(train_step, state.model, state.optimizer, vocabulary, config, args.micro_batch)
    step = speed.CudaGraph(step) if args.cuda_graph else step
    epoch_size = config.epoch_size or len(corpus.training)
    steps, speeds = math.ceil(epoch_size / config.batch), []
    while state.epoch < config.epochs and state.stale < config.patience:
        state.model.train()
        order = data.epoch_order(len(corpus.training), epoch_size, state.epoch, config.seed)
        clock, notes = time.perf_counter(), 0
        while state.in_epoch < steps:
            interrupts.pause()
            numbers = order[state.in_epoch * config.batch :][: config.batch]
            notes += int(corpus.training.lengths[numbers].sum())
            lr = training.learning_rate(config, state.step, steps * config.epochs)
            state.optimizer.param_groups[0]["lr"].fill_(lr)
            first_row, seed, numbers, words, lengths = read_batch(corpus.training, numbers, config, state)
            frozen, field_weights = state.tensors["book"][numbers], state.tensors["field_weights"]
            loss, norm = step(words, lengths, frozen, field_weights, seed, first_row)  # steps 1 to 6 of the method
            loss = StepLoss(*parallel.totals(*loss))
            state.count_step(loss)
            bar.update()
            profiler.step()
            if state.step % args.log_every == 0 or state.in_epoch == steps:
                state.tally.require_finite(run)
                speeds.append(notes / (time.perf_counter() - clock))
                clock, notes = time.perf_counter(), 0
                line = {"kind": "step", "step": state.step, "lr": lr, "gradient_norm": norm.item()}
                line |= {name: getattr(loss, name).item() for name in ("loss", "recovery", "masker")}
                metrics.write(line | {"speed": {"notes_per_s": round(speeds[-1])}})
                bar.set_postfix_str(f"loss {line['loss']:.3f}, {speeds[-1]:,.0f} notes/s", refresh=False)
            if state.step % args.save_every == 0:
                state.tally.require_finite(run)
                save()
        line, better = end_of_epoch(run, state, corpus, config, vocabulary, interrupts)  # step 7
        metrics.write(line)
        if better:
            save("best.pt")
        save()
        if parallel.leads():
            draw(run, state, corpus.training)
        bar.write(
            f"epoch {state.epoch:>3}: train loss {line['train']['loss']:.3f}, valid loss {line['valid']['loss']:.3f}, "
            f"masked accuracy {line['valid']['accuracy']:.1%}, frozen {line['frozen']:.1%}"
        )
    return speeds


def read_batch(sequences: data.Sequences, numbers: np.ndarray, config: Config, state: State):
    """This process's rows of a batch, transposed: the first row's place in the batch, and on the device the step's
    seed, the sequences' numbers [b], words [b, L, F], lengths [b]. Seeds the heads' dropout."""
    seed = (config.seed << 32) + state.step
    rows = parallel.share(len(numbers))
    draws = np.random.default_rng(seed).random(len(numbers))[rows]
    words, lengths = sequences.batch(numbers[rows])
    if config.transpose:
        words = data.transpose(words, tokenizer.load(config.encoding), config.transpose, draws)
    # torch's generator draws the heads' dropout only; the rest draws from the step's seed
    torch.manual_seed(objective.dropout_seed(seed, objective.Part(rows.start)))
    return rows.start, *training.to_device(state.device, np.array(seed), numbers[rows], words, lengths)


def train_step(
    model, optimizer, vocabulary, config, micro_batch, words, lengths, frozen, field_weights, seed, first_row
) -> tuple[StepLoss, Tensor]:
    """One update from these rows of a batch (method, steps 1 to 6): the losses, and the gradient norm."""
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for rows, part in objective.in_parts(words, lengths, frozen, config, seed, first_row, micro_batch):
        loss = objective.pretrain_loss(
            model, words[rows], lengths[rows], frozen[rows], vocabulary, field_weights, config, seed, part
        )
        loss.loss.backward()
        losses.append(loss)
    parallel.sum_gradients(model.parameters())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimizer.step()
    return objective.add_up(losses), norm


@torch.no_grad()
def end_of_epoch(run, state, corpus, config, vocabulary, interrupts) -> tuple[dict, bool]:
    """Validate, update the mask book and the field weights: the epoch's line of metrics, and whether it is the best."""
    state.model.eval()
    encoding, tensors = tokenizer.load(config.encoding), state.tensors
    held_out = validate(state.model, corpus, config, vocabulary, interrupts)
    # 7. every `freeze_every` epochs, freeze what the masker finds hopeless in the training set
    freezes = config.objective == "adversarial" and config.freeze_every
    if freezes and (state.epoch + 1) % config.freeze_every == 0:
        tensors["book"] = updated_book(tensors["book"], state, corpus.training, config, interrupts)
        if parallel.leads():  # before last.pt: a resumed run would not write it again
            mask_book.save(run / "book.npz", tensors["book"], corpus.training)
    # 4. for the next epoch, weigh each field by the inverse of its accuracy in this one
    sums = state.tally.sums
    tensors["field_weights"] = objective.field_weights(sums["correct_selected"], sums["selected"])
    line = {"kind": "epoch", "epoch": state.epoch + 1, "step": state.step}
    line |= {"train": accuracies(state.tally, encoding), "valid": accuracies(held_out, encoding)}
    line["field_weights"] = tensors["field_weights"].tolist()
    line["frozen"] = mask_book.frozen_count(tensors["book"]) / int(corpus.training.lengths.sum())
    loss = line["valid"]["loss"]
    return line, state.end_epoch(loss, line["valid"]["accuracy"], order=(-loss,))


def validate(model, corpus, config, vocabulary, interrupts) -> Tally:
    """8. The loss of a random 15 % of the held-out notes, the same ones every time, all fields weighted alike."""
    device = vocabulary.mask.device
    config, tally = replace(config, objective="random"), Tally()
    weights = objective.uniform_weights(len(vocabulary.mask)).to(device)
    held_out = training.batches(corpus.validation.batch, corpus.held_out, config.batch, device, interrupts)
    for index, (first_row, _, words, lengths) in enumerate(held_out):
        seed = VALIDATION_SEED + index
        for _, part in objective.in_parts(words, lengths, None, config, seed, first_row):  # all rows: one part
            loss = objective.pretrain_loss(model, words, lengths, None, vocabulary, weights, config, seed, part)
            tally.add(StepLoss(*parallel.totals(*loss)))
    return tally


def updated_book(old: Tensor, state, sequences: data.Sequences, config, interrupts) -> Tensor:
    """The mask book after the masker has scored the whole training set."""
    book, numbers = torch.zeros_like(old), np.arange(len(sequences))
    for _, rows, words, lengths in training.batches(sequences.batch, numbers, config.batch, old.device, interrupts):
        rows = torch.from_numpy(rows).to(old.device)
        scores = state.model.masker(state.model.encoder(words, lengths))
        book[rows] = mask_book.update(
            old[rows], rows, scores, lengths,
            rate=(config.mask_low, config.mask_high), unfreeze=config.unfreeze, seed=config.seed + state.epoch,
        )  # fmt: skip
    return parallel.add(book)  # each sequence is in one process's share


@torch.no_grad()
def draw(run: Path, state: State, sequences: data.Sequences) -> None:
    """The run's pictures: its curves, and the masker's probabilities on the first training sequence."""
    words, lengths = sequences.batch(np.arange(1))
    state.model.eval()
    scores = state.model.masker(state.model.encoder(*training.to_device(state.device, words, lengths)))
    frozen = mask_book.unpack_bits(state.tensors["book"][:1], sequences.notes)
    notes = slice(int(lengths[0]))
    plots.draw_run(
        run, sequences.encoding, words[0, notes], scores[0, notes].cpu().numpy(), frozen[0, notes].cpu().numpy()
    )


def accuracies(tally: Tally, encoding: tokenizer.Encoding) -> dict:
    """Mean losses, and accuracy per field over the selected notes (`masked`, mean `accuracy`) and over all (`all`)."""
    sums, names = tally.sums, encoding.names
    masked = sums["correct_selected"] / sums["selected"].clamp(min=1)
    of_all = sums["correct_valid"] / sums["valid"].clamp(min=1)
    return {
        **{name: tally.mean(name) for name in ("loss", "recovery", "masker")},
        "accuracy": masked.mean().item(),
        "masked": dict(zip(names, masked.tolist(), strict=True)),
        "all": dict(zip(names, of_all.tolist(), strict=True)),
    }


def describe(run: Path, config: Config, device: torch.device, model, corpus: Corpus) -> None:
    """Print what is about to happen, before it takes long."""
    stores, parameters = corpus.training.stores, sum(p.numel() for p in model.parameters())
    pieces, notes = sum(len(store.pieces) for store in stores), sum(len(store.words) for store in stores)
    where = f"{parallel.size} processes on {device.type}" if parallel.size > 1 else device
    print(f"{run}: {config.objective} objective, {parameters / 1e6:.1f} M parameters, {config.dtype} on {where}")
    print(f"data: {pieces:,} pieces, {notes:,} notes, cut into sequences of up to {config.notes} notes:")
    print(f"      {len(corpus.training):,} to train, {len(corpus.held_out):,} to validate")
    print(f"at most {config.epochs} epochs. Ctrl-C saves and stops.")
    for line in corpus.remarks:
        print(f"note: {line}")


def print_table(encoding: tokenizer.Encoding, run: Path, baseline: np.ndarray) -> None:
    """The best epoch's recovery of masked validation notes, beside always naming the most frequent value."""
    epochs = read_metrics(run / "metrics.jsonl")["epoch"]
    best = min(epochs, key=lambda epoch: epoch["valid"]["loss"])
    print(f"\nvalidation, epoch {best['epoch']} of {len(epochs)} (best.pt): recovery of a random 15 % of the notes")
    masked = best["valid"]["masked"]
    rows = [(name, masked[name], share) for name, share in zip(encoding.names, baseline, strict=True)]
    rows.append(("mean", best["valid"]["accuracy"], baseline.mean()))
    print(table(("field", "masked", "most frequent"), [(name, f"{a:.1%}", f"{b:.1%}") for name, a, b in rows]))
    if best["frozen"]:
        print(f"frozen notes: {best['frozen']:.1%}")
    if (run / "curves.png").exists():
        print(f"pictures: {run / 'curves.png'}, {run / 'masker.png'}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    sys.exit(parallel.run_script("train.py", main, parse_args()))
