"""Pre-train Adversarial-MidiBERT. Read top to bottom: settings, data, model, loop, an epoch's end, the closing table.

    python train.py --config small                              a demo corpus of our own, minutes on a laptop
    python train.py --config small --data POP909 Pianist8/midi  folders of MIDI (tokenized once) or token stores
    python train.py --resume runs/small-adversarial             go on as if nothing had happened
    torchrun --standalone --nproc_per_node=8 train.py …         one process per GPU, the same result (amb/parallel.py)

A run folder holds run.json (settings and data), pieces.json (who trains, who validates), metrics.jsonl, last.pt and
best.pt and, with matplotlib, curves.png and masker.png. Everything random in a step is a function of (seed, step), so
a checkpoint needs no generator states and a resumed run repeats the uninterrupted one, on a CPU to the last bit.
"""

import argparse
import hashlib
import json
import math
import signal
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from amb import checkpoint, cuda_graph, data, demo, mask_book, parallel, plots, profiling, splits, tokenizer
from amb.config import PRESETS, Config, add_flags, from_flags, positive, to_dict
from amb.metrics import MetricsFile, Tally, read_metrics
from amb.model import AdversarialMidiBert, compute_dtype
from amb.objective import (
    StepLoss,
    Words,
    add_up,
    count,
    field_weights,
    part_seed,
    pretrain_loss,
    random_loss,
    uniform_weights,
)
from amb.runs import (
    Interrupted,
    Interruptible,
    learning_rate,
    open_device,
    refuse_settings,
    refuse_used,
    unused,
    write_json,
)

OF_THE_MACHINE = (  # what may be given anew with --resume
    "resume", "cache", "device", "save_every", "log_every", "micro_batch", "recompute", "cuda_graph", "profile",
)  # fmt: skip
VALIDATION_SEED = 1 << 62  # far from any step's


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pre-train Adversarial-MidiBERT.")
    parser.add_argument(
        "--data", nargs="+", metavar="PATH", help="folders or archives of MIDI, or token stores (default: a demo)"
    )
    parser.add_argument("--split", nargs="+", metavar="FILE", help="JSON lists train, valid, test of pieces")
    parser.add_argument("--out", type=Path, metavar="RUN", help="run folder (default: runs/CONFIG-OBJECTIVE)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue the run in this folder")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="where tokenized folders are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 …")
    parser.add_argument("--save-every", type=positive, default=200, metavar="STEPS", help="steps between checkpoints")
    parser.add_argument("--log-every", type=positive, default=10, metavar="STEPS", help="steps between metrics")
    parser.add_argument("--micro-batch", type=positive, metavar="N", help="sequences computed at a time (default: all)")
    parser.add_argument("--recompute", action="store_true", help="keep no activations inside layers: saves memory")
    parser.add_argument("--cuda-graph", action="store_true", help="record a step on the GPU and replay it")
    parser.add_argument("--profile", action="store_true", help="trace three steps into RUN/trace.json")
    parser.add_argument("--config", choices=PRESETS, help="preset (default: small)")
    add_flags(parser, Config, "settings (override the preset)")
    return parser.parse_args()


def open_run(args: argparse.Namespace) -> tuple[Path, Config, dict]:
    """The run's folder, settings and data paths: from the command line, or from the folder to resume."""
    if args.resume:
        refuse_settings(args, OF_THE_MACHINE)
        try:
            saved = json.loads((args.resume / "run.json").read_text())
            return args.resume, Config(**saved["config"]), saved["data"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{args.resume} is not a run folder: it has no usable run.json") from None
    config = from_flags(args)
    sources = {
        "paths": [str(Path(path).resolve()) for path in args.data] if args.data else None,
        "split": [str(Path(path).resolve()) for path in args.split or []],
        "cache": str(args.cache.resolve()),
    }
    run = args.out or unused(Path("runs") / f"{args.config or 'small'}-{config.objective}")
    refuse_used(run)
    return run, config, sources


def train(args: argparse.Namespace) -> int:
    run, config, sources = parallel.once(open_run, args)
    device = open_device(args.device)
    if args.cuda_graph and (device.type != "cuda" or parallel.size > 1):
        raise ValueError("--cuda-graph is for one process on a GPU")
    otherwise = "put back a copy, or start anew with another --out; best.pt, if there is one, can still be used"
    resumed = checkpoint.load_last(run, device, otherwise) if args.resume else None

    # data: MIDI -> token stores -> sequences of L words, by piece either for training or for validation
    encoding = tokenizer.load(config.encoding)
    cache = Path(sources["cache"])
    with parallel.leader_first():
        paths = sources["paths"] or [demo.write_corpus(cache / f"demo-{demo.VERSION}")]
        stores = data.open_sources(paths, config.encoding, cache)
    roles = splits.assign_roles(stores, sources["split"], config.valid_share, config.seed)
    training, validation = (data.cut(stores, roles, role, config.notes) for role in ("train", "valid"))
    held_out = data.some(len(validation), config.valid_size, config.seed)
    pieces = {role: data.names(stores, roles, role) for role in ("train", "valid", "test")}
    fingerprint = hashlib.sha256(json.dumps([pieces, len(training), len(validation)]).encode()).hexdigest()

    # model and optimiser
    sizes = tuple(field.size for field in encoding.fields)
    torch.manual_seed(config.seed)
    model = AdversarialMidiBert(config, sizes, compute_dtype(config.dtype, device)).to(device)
    model.encoder.recompute = args.recompute
    rate = torch.tensor(config.lr, device=device)  # on the device, where a CUDA graph can read it
    optimizer = torch.optim.AdamW(
        model.parameters(), rate, weight_decay=config.weight_decay, fused=True, capturable=args.cuda_graph
    )
    words = Words.of(encoding, device)

    # the state beside the weights: where we are, what the last epochs gave, what is frozen
    progress = {"epoch": 0, "step": 0, "in_epoch": 0, "stale": 0, "best_loss": math.inf, "best_accuracy": 0.0}
    weights = uniform_weights(len(sizes)).to(device)
    book = mask_book.empty_book(len(training), config.notes).to(device)
    tally = Tally(len(sizes), device)
    metrics = MetricsFile(run / "metrics.jsonl")
    if resumed:
        if resumed["fingerprint"] != fingerprint:
            raise ValueError(f"the data of {run} has changed since it began: it cannot be resumed")
        checkpoint.load_weights(model, resumed["model"], run / "last.pt")
        optimizer.load_state_dict(resumed["optimizer"])
        rate.fill_(float(optimizer.param_groups[0]["lr"]))
        optimizer.param_groups[0].update(lr=rate, capturable=args.cuda_graph)
        progress, weights, book = resumed["progress"], resumed["field_weights"], resumed["book"]
        tally.load(resumed["tally"])
        metrics.rewind(resumed["metrics_bytes"])
    elif parallel.leads():
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "pieces.json", pieces)

    def save(name: str) -> None:
        if not parallel.leads():
            return
        state = {
            "kind": "pretrain",
            "config": to_dict(config),
            "fields": [[field.name, field.values, field.size] for field in encoding.fields],
            "model": model.state_dict(),
        }
        if name == "last.pt":
            state |= {
                "optimizer": optimizer.state_dict(),
                "progress": dict(progress),
                "field_weights": weights,
                "book": book,
                "tally": tally.state(),
                "metrics_bytes": metrics.size(),
                "fingerprint": fingerprint,
            }
        checkpoint.save(run / name, state)

    interruptible = Interruptible()

    def step(batch, lengths, frozen, weights, seed, first_row) -> tuple[StepLoss, torch.Tensor]:
        """One update from these rows of a batch, all at once or `--micro-batch` at a time: losses and gradient norm."""
        optimizer.zero_grad(set_to_none=True)
        counts, losses = count(batch, lengths, frozen, config, seed, first_row), []
        size = args.micro_batch or max(1, len(batch))
        for start in range(0, max(1, len(batch)), size):  # once without rows, where a process has no share
            part = slice(start, start + size)
            loss = pretrain_loss(
                model, batch[part], lengths[part], frozen[part], words, weights, config, seed, first_row + start, counts
            )
            loss.loss.backward()
            losses.append(loss)
        parallel.sum_gradients(model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        return add_up(losses), norm

    if args.cuda_graph:
        step = cuda_graph.captured(step)

    def batches(sequences: data.Sequences, numbers: np.ndarray):
        """This process's rows of each batch: where they begin in it, their numbers, words and lengths."""
        for start in range(0, len(numbers), config.batch):
            interruptible.pause()
            whole = numbers[start : start + config.batch]
            rows = parallel.share(len(whole))
            batch, lengths = sequences.batch(whole[rows])
            yield rows.start, *to_device(device, whole[rows], batch, lengths)

    @torch.no_grad()
    def validate() -> Tally:
        """Random 15 % of the held-out notes, the same ones every time, uniformly weighted (method, step 8)."""
        model.eval()
        result, uniform = Tally(len(sizes), device), uniform_weights(len(sizes)).to(device)
        for index, (first, _, batch, lengths) in enumerate(batches(validation, held_out)):
            seed = VALIDATION_SEED + index
            loss = random_loss(model, batch, lengths, words, uniform, config, seed, first)
            result.add(StepLoss(*parallel.totals(*loss)))
        return result

    @torch.no_grad()
    def updated_book() -> torch.Tensor:
        """The mask book after one look of the masker at the whole training set (method, step 7)."""
        model.eval()
        new = torch.zeros_like(book)
        for _, numbers, batch, lengths in batches(training, np.arange(len(training))):
            new[numbers] = mask_book.update(
                book[numbers],
                numbers,
                model.masker(model.encoder(batch, lengths)),
                lengths,
                rate=(config.mask_low, config.mask_high),
                unfreeze=config.unfreeze,
                seed=config.seed + progress["epoch"],
            )
        return parallel.add(new)  # each sequence is in one process's share

    # the loop
    epoch_size = config.epoch_size or len(training)
    steps = math.ceil(epoch_size / config.batch)
    describe(run, config, device, model, stores, training, held_out)
    if not resumed:
        save("last.pt")
    if not resumed and parallel.leads():  # last: what has a run.json can be resumed
        write_json(run / "run.json", {"config": to_dict(config), "data": sources})
    if progress["epoch"] and not progress["in_epoch"] and parallel.leads():
        draw(run, model, validation, device)  # the run may have been killed before it came to that
    interruptible.start()
    bar = tqdm(
        total=steps * config.epochs,
        initial=progress["step"],
        unit="step",
        dynamic_ncols=True,
        smoothing=0.05,
        mininterval=0.2 if sys.stderr.isatty() else 30,
        disable=not parallel.leads(),
    )
    clock, seen, lengths_of = time.perf_counter(), 0, training.lengths
    speeds = []
    try:
        with profiling.trace(run if args.profile and parallel.leads() else None) as profiler:
            while progress["epoch"] < config.epochs and progress["stale"] < config.patience:
                model.train()
                order = data.epoch_order(len(training), epoch_size, progress["epoch"], config.seed)
                while progress["in_epoch"] < steps:
                    interruptible.pause()
                    numbers = order[progress["in_epoch"] * config.batch :][: config.batch]
                    seen += int(lengths_of[numbers].sum())
                    step_seed = (config.seed << 32) + progress["step"]
                    rows = parallel.share(len(numbers))  # all of them, if this is the only process
                    draws = np.random.default_rng(step_seed).random(len(numbers))[rows]
                    numbers = numbers[rows]
                    batch, lengths = training.batch(numbers)
                    if config.transpose:
                        batch = data.transpose(batch, encoding, config.transpose, draws)
                    numbers, batch, lengths, seed = to_device(device, numbers, batch, lengths, np.array(step_seed))
                    torch.manual_seed(part_seed(step_seed, rows.start))  # the heads'; all else takes the seed itself
                    lr = learning_rate(config, progress["step"], steps * config.epochs)
                    rate.fill_(lr)

                    loss, norm = step(batch, lengths, book[numbers], weights, seed, rows.start)

                    loss = StepLoss(*parallel.totals(*loss))
                    tally.add(loss)
                    progress["step"] += 1
                    progress["in_epoch"] += 1
                    bar.update()
                    profiler.step()
                    if progress["step"] % args.log_every == 0 or progress["in_epoch"] == steps:
                        tally.require_finite(progress["step"], run)
                        speed, clock, seen = seen / (time.perf_counter() - clock), time.perf_counter(), 0
                        speeds.append(speed)
                        line = {"kind": "step", "step": progress["step"], "lr": lr}
                        line |= {"gradient_norm": norm.item(), "loss": loss.loss.item()}
                        line |= {"recovery": loss.recovery.item(), "masker": loss.masker.item()}
                        metrics.write(line | {"speed": {"notes_per_s": round(speed)}})
                        bar.set_postfix_str(f"loss {loss.loss.item():.3f}, {speed:,.0f} notes/s", refresh=False)
                    if progress["step"] % args.save_every == 0:
                        tally.require_finite(progress["step"], run)
                        save("last.pt")

                # an epoch's end: validate, weigh the fields, freeze, remember the best
                held = validate()
                freezes = config.objective == "adversarial" and config.freeze_every
                if freezes and (progress["epoch"] + 1) % config.freeze_every == 0:
                    book = updated_book()
                    if parallel.leads():
                        mask_book.save(run / "book.npz", book, training)
                progress["epoch"] += 1
                progress["in_epoch"] = 0
                weights = field_weights(tally.correct_selected, tally.selected)
                frozen_share = mask_book.frozen_count(book) / int(training.lengths.sum())
                summary = {
                    "kind": "epoch",
                    "epoch": progress["epoch"],
                    "step": progress["step"],
                    "train": tally.summary(encoding),
                    "valid": held.summary(encoding),
                    "field_weights": weights.tolist(),
                    "frozen": frozen_share,
                }
                metrics.write(summary)
                tally = Tally(len(sizes), device)
                loss_now, accuracy_now = held.loss(), held.accuracy()
                better = loss_now < progress["best_loss"]
                improved = better or accuracy_now > progress["best_accuracy"]
                progress["stale"] = 0 if improved else progress["stale"] + 1
                progress["best_loss"] = min(loss_now, progress["best_loss"])
                progress["best_accuracy"] = max(accuracy_now, progress["best_accuracy"])
                if better:
                    save("best.pt")
                save("last.pt")
                if parallel.leads():
                    draw(run, model, validation, device)
                losses = f"train loss {summary['train']['loss']:.3f}, valid loss {loss_now:.3f}"
                shares = f"masked accuracy {accuracy_now:.1%}, frozen {frozen_share:.1%}"
                bar.write(f"epoch {progress['epoch']:>3}: {losses}, {shares}")
                clock, seen = time.perf_counter(), 0
    except Interrupted:
        save("last.pt")
        bar.close()
        print(f"interrupted at step {progress['step']:,}; saved. Go on with: python train.py --resume {run}")
        return 130
    except (OSError, tokenizer.StoreError) as error:
        raise ValueError(f"{error}; when that is mended, go on with: python train.py --resume {run}") from None
    finally:
        bar.close()
        interruptible.stop()
    if parallel.leads():
        print_table(encoding, run, data.most_frequent_baseline(training, validation))
        if speeds:
            print(profiling.speed_line(statistics.median(speeds), config, sum(sizes), device, model.encoder.dtype))
    return 0


def to_device(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """The arrays as tensors on the device; what goes to a GPU does not wait for it."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type == "cuda":
        tensors = [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    return tensors


@torch.no_grad()
def draw(run: Path, model: AdversarialMidiBert, validation: data.Sequences, device: torch.device) -> None:
    """The run's pictures; the piano roll shows the masker's view of the first validation sequence."""
    words, lengths = validation.batch(np.arange(1))
    model.eval()
    scores = model.masker(model.encoder(*to_device(device, words, lengths)))[0, : lengths[0]].cpu().numpy()
    plots.draw_run(run, tokenizer.load(validation.stores[0].encoding), words[0, : lengths[0]], scores)


def describe(run, config, device, model, stores, training, held_out) -> None:
    """Say what is about to happen, before it takes long."""
    parameters = sum(p.numel() for p in model.parameters())
    pieces, notes = sum(len(store.pieces) for store in stores), sum(len(store.words) for store in stores)
    where = f"{parallel.size} processes on {device.type}" if parallel.size > 1 else device
    print(f"{run}: {config.objective} objective, {parameters / 1e6:.1f} M parameters, {config.dtype} on {where}")
    print(
        f"data: {pieces:,} pieces, {notes:,} notes; {len(training):,} sequences of up to {config.notes} notes to train,"
    )
    print(f"      {len(held_out):,} to validate; at most {config.epochs} epochs. Ctrl-C saves and stops.")


def print_table(encoding: tokenizer.Encoding, run: Path, baseline: np.ndarray) -> None:
    """The best epoch's recovery of masked validation notes, beside always naming the most frequent value."""
    epochs = read_metrics(run / "metrics.jsonl")["epoch"]
    best = min(epochs, key=lambda epoch: epoch["valid"]["loss"])
    print(f"\nvalidation, epoch {best['epoch']} of {len(epochs)} (best.pt): recovery of a random 15 % of the notes")
    print(f"{'field':<12}{'masked':>9}{'most frequent':>15}")
    for field, share in zip(encoding.fields, baseline, strict=True):
        print(f"{field.name:<12}{best['valid']['masked'][field.name]:>9.1%}{share:>15.1%}")
    print(f"{'mean':<12}{best['valid']['accuracy']:>9.1%}{baseline.mean():>15.1%}")
    if best["frozen"]:
        print(f"frozen notes: {best['frozen']:.1%}")
    if (run / "curves.png").exists():
        print(f"pictures: {run / 'curves.png'}, {run / 'masker.png'}")


def main() -> int:
    args = parse_args()
    try:
        with parallel.joined():
            return train(args)
    except (ValueError, OSError) as error:
        return parallel.fail(f"train.py: {error}", 2)
    except KeyboardInterrupt:
        return parallel.fail("interrupted while no training was under way", 130)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    sys.exit(main())
