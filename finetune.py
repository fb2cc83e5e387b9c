"""Mask fine-tuning. Read top to bottom: settings, labelled data, one training per seed, the report.

    python finetune.py --task composer                                        the demo corpus, from scratch, minutes
    python finetune.py --task melody --data POP909 --init runs/small-adversarial
    python finetune.py --task sequence --data my/midi --init runs/small-adversarial       a folder per class
    python finetune.py --task note --data my/midi --init runs/small-adversarial           labels are track names
    python finetune.py --resume runs/melody                                   go on as if nothing had happened
    torchrun --standalone --nproc_per_node=8 finetune.py --task melody …      one process per GPU, the same result

Tasks: melody, velocity (a class per note), composer, emotion (per sequence), and your own labels: note, sequence.
A run folder holds model.pt, self-contained (encoding, classes, settings, weights), report.json with every figure,
split.json and, with matplotlib, curves.png and confusion.png. Below it lies a folder per training, unmasked-0 or, with
--mask, masked-0 for seed 0: metrics.jsonl, last.pt, best.pt, test.npz (log-probabilities on the test set). Resuming
works as in train.py. Masking while fine-tuning is the paper's (--mask 0.12, --paper); it is off, for it has not helped
so far: docs/results.md.
"""

import argparse
import json
import math
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from amb import archive, baselines, checkpoint, data, demo, evaluate, parallel, plots, splits, tasks, tokenizer
from amb.config import PRESETS, Config, Finetuning, add_flags, given, paper_settings, positive, to_dict
from amb.mask_finetuning import finetune_loss
from amb.metrics import MetricsFile
from amb.model import Classifier, compute_dtype
from amb.objective import part_seed
from amb.report import print_report, summarise
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

OF_THE_MACHINE = "resume", "cache", "device", "save_every"  # what may be given anew with --resume
DEMO_EPOCHS = 5  # the demo is there to be looked at: minutes on two cores
OF_SEQUENCES = {"notes": 1024, "batch": 2}  # verdicts on long segments are surer; as many notes a step as 8 x 256


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a pre-trained encoder on labelled MIDI.")
    parser.add_argument("--task", choices=tasks.TASKS, help="what to learn")
    parser.add_argument(
        "--data", type=Path, metavar="PATH", help="the data set: a folder, .zip or .tar.gz (default: a demo)"
    )
    parser.add_argument("--labels", type=Path, metavar="CSV", help="for sequence: path,label instead of class folders")
    parser.add_argument("--split", type=Path, metavar="FILE", help="JSON lists train, valid, test (default: drawn)")
    parser.add_argument("--init", metavar="RUN", help="pre-training run or checkpoint (default: none)")
    parser.add_argument("--config", choices=PRESETS, help="model where --init is none (default: small)")
    parser.add_argument("--encoding", choices=tokenizer.ENCODINGS, help="words where --init is none (default: octuple)")
    parser.add_argument("--out", type=Path, metavar="RUN", help="run folder (default: runs/TASK)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue the run in this folder")
    parser.add_argument("--no-mask", action="store_true", help="hide no notes while training (--mask 0)")
    parser.add_argument("--compare-mask", action="store_true", help="train with and without masking, for one picture")
    parser.add_argument("--no-transpose", action="store_true", help="do not transpose while training (--transpose 0)")
    parser.add_argument("--paper", action="store_true", help="the paper's settings where no flag says otherwise")
    parser.add_argument("--freeze", action="store_true", help="train the head alone (--train-layers 0)")
    parser.add_argument("--seeds", type=positive, metavar="N", help="trainings, of seeds SEED, SEED + 1 … (default: 1)")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="where tokenized folders are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 …")
    parser.add_argument("--save-every", type=positive, default=200, metavar="STEPS", help="steps between checkpoints")
    add_flags(parser, Finetuning, "settings")
    return parser.parse_args()


def open_run(args: argparse.Namespace) -> tuple[Path, dict]:
    """The run's folder and what its run.json says: from the command line, or from the folder to resume."""
    if args.resume:
        refuse_settings(args, OF_THE_MACHINE)
        try:
            content = json.loads((args.resume / "run.json").read_text())
            Finetuning(**content["settings"]), Config(**content["config"]), tasks.TASKS[content["task"]]
            return args.resume, content
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{args.resume} is not a run folder: it has no usable run.json") from None
    if not args.task:
        raise ValueError(f"say which --task: {', '.join(tasks.TASKS)}")
    if args.labels and args.task != "sequence":
        raise ValueError("--labels goes with --task sequence")
    paper = paper_settings(Finetuning)
    changes = {} if args.data else {"epochs": DEMO_EPOCHS}
    changes |= OF_SEQUENCES if tasks.TASKS[args.task].level == "sequence" else {}
    changes |= {"mask": paper["mask"]} if args.compare_mask else {}
    changes |= paper if args.paper else {}
    changes |= given(args, Finetuning)
    changes |= {"mask": 0.0} if args.no_mask else {}
    changes |= {"transpose": 0} if args.no_transpose else {}
    changes |= {"train_layers": 0} if args.freeze else {}
    settings = Finetuning(**changes)
    if args.compare_mask and not settings.mask:
        raise ValueError("--compare-mask needs notes to hide: drop --no-mask or --mask 0")
    if args.init in (None, "none"):
        init, preset = None, PRESETS[args.config or "small"]
        config = Config(**{**preset, **({"encoding": args.encoding} if args.encoding else {})})
    elif args.config or args.encoding:
        raise ValueError("--config and --encoding come with the checkpoint: give them with --init none only")
    else:
        init = checkpoint.find(args.init)
        config = checkpoint.config_of(checkpoint.load(init), init)
    if 0 < settings.reach < config.reach:
        raise ValueError(f"--reach {settings.reach} is less than the encoder's own, {config.reach}")
    config = replace(config, reach=settings.reach or config.reach)
    run = args.out or unused(Path("runs") / args.task)
    refuse_used(run)
    paths = {"data": args.data, "labels": args.labels, "split": args.split, "init": init, "cache": args.cache}
    return run, {
        "task": args.task,
        "arms": ["masked", "unmasked"] if args.compare_mask else ["masked" if settings.mask else "unmasked"],
        "seeds": args.seeds or 1,
        "settings": to_dict(settings),
        "config": to_dict(config),
        "paths": {name: str(path.resolve()) if path else None for name, path in paths.items()},
    }


@dataclass(frozen=True)
class Material:
    """What every training of a run shares. `truth` has labels by role: [S] for sequence tasks, [S, L] for notes."""

    task: tasks.Task
    config: Config
    encoding: tokenizer.Encoding
    labelled: tasks.Labelled
    parts: dict[str, data.Sequences]
    truth: dict[str, np.ndarray]
    init: Path | None  # the pre-trained checkpoint's file
    start: dict | None  # and content
    device: torch.device

    def train_batch(self, numbers: np.ndarray, settings: Finetuning, seed: int) -> tuple[np.ndarray, ...]:
        """Random windows of these training sequences' segments, transposed: words [B, L, F], lengths [B], labels."""
        rng, part = np.random.default_rng(seed), self.parts["train"]
        if settings.fixed:
            (words, lengths), labels = part.batch(numbers), self.truth["train"][numbers]
        else:
            part = part.cropped(numbers, rng)
            (words, lengths), labels = part.batch(np.arange(len(numbers))), tasks.labels_of(self.labelled, part)
        longest = lengths.max()
        words = data.transpose(words[:, :longest], self.encoding, settings.transpose, rng.random(len(words)))
        labels = labels[:, :longest] if labels.ndim == 2 else labels
        return tasks.hide(self.task, self.encoding, words), lengths, labels

    def batches(self, role: str, numbers: np.ndarray, size: int):
        """Clean batches on the host, as long as their longest sequence: numbers, words [B, L, F], lengths [B]."""
        for first in range(0, len(numbers), size):
            some = numbers[first : first + size]
            words, lengths = self.parts[role].batch(some)
            yield some, tasks.hide(self.task, self.encoding, words[:, : lengths.max()]), lengths

    def to_device(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        return [torch.from_numpy(np.ascontiguousarray(array)).to(self.device) for array in arrays]


def finetune(args: argparse.Namespace) -> int:
    run, content = parallel.once(open_run, args)
    device = open_device(args.device)
    task, config = tasks.TASKS[content["task"]], Config(**content["config"])
    settings = Finetuning(**content["settings"])
    paths = {name: path and Path(path) for name, path in content["paths"].items()}
    notes = settings.notes or settings.reach or config.notes

    # labelled data: MIDI -> a token store with labels -> whole pieces to train, validate or test -> sequences
    with parallel.leader_first():
        folder = paths["data"] or demo.write_corpus(paths["cache"] / f"demo-{demo.VERSION}")
        if archive.is_archive(folder):
            folder = archive.unpack(folder, paths["cache"])
        if not folder.is_dir():
            raise ValueError(
                f"{folder} " + ("is neither a folder nor an archive" if folder.exists() else "does not exist")
            )
        if tokenizer.is_store(folder):
            raise ValueError(f"{folder} is a token store: labels come with the MIDI files it was made of")
        origins = task.level == "note"
        store = tokenizer.open_store(data.tokenized(folder, config.encoding, paths["cache"], task.view, origins))
    labelled = tasks.read_labels(task, store, folder, paths["labels"])
    roles, absent = splits.labelled_roles(labelled, paths["split"], settings.seed)
    absent += labelled.absent
    parts = {role: data.cut([store], [roles], role, notes, even=True) for role in splits.ROLES}
    pieces = {role: data.names([store], [roles], role) for role in splits.ROLES}
    fingerprint = tasks.fingerprint(labelled)
    if args.resume:
        if json.loads((run / "split.json").read_text()) != pieces or content.get("fingerprint") != fingerprint:
            raise ValueError(f"the data of {run} has changed since it began: it cannot be resumed")
    elif parallel.leads():
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "split.json", pieces)
        write_json(run / "run.json", content | {"fingerprint": fingerprint})
    truth = {role: tasks.labels_of(labelled, part) for role, part in parts.items()}
    start = checkpoint.load(paths["init"]) if paths["init"] else None
    material = Material(
        task, config, tokenizer.load(config.encoding), labelled, parts, truth, paths["init"], start, device
    )
    seen = splits.seen_by(paths["init"], pieces)
    describe(run, content, material, pieces, absent, seen)

    # one training per arm and seed; those already done keep their result
    results = []
    for arm in content["arms"]:
        for seed in range(settings.seed, settings.seed + content["seeds"]):
            folder = run / f"{arm}-{seed}"
            if not (folder / "result.json").exists():
                own = replace(settings, seed=seed, mask=settings.mask if arm == "masked" else 0.0)
                try:
                    train_once(folder, own, material, notes, args.save_every)
                except Interrupted:
                    print(f"interrupted; saved. Go on with: python finetune.py --resume {run}")
                    return 130
                except (OSError, tokenizer.StoreError) as error:
                    hint = f"when that is mended, go on with: python finetune.py --resume {run}"
                    raise ValueError(f"{error}; {hint}") from None
            results.append({"arm": arm, "seed": seed, **json.loads(parallel.once((folder / "result.json").read_text))})
    if not parallel.leads():
        return 0

    # the model to keep, the figures to compare it with, the report
    best = max(results, key=lambda result: (result["valid"]["accuracy"], -result["valid"]["loss"]))
    checkpoint.copy(run / f"{best['arm']}-{best['seed']}" / "best.pt", run / "model.pt")
    measured = baselines.measure(parts, truth, labelled.classes, task.level, paths["cache"])
    about = {"task": task.name, "level": task.level, "classes": labelled.classes, "notes": notes}
    about |= {"pieces": {role: len(names) for role, names in pieces.items()}, "absent": absent, "pretraining": seen}
    report = summarise(content | about, results, best, measured)
    write_json(run / "report.json", report)
    plots.draw_finetuning(run, report)
    print_report(run, report)
    return 0


def train_once(folder: Path, settings: Finetuning, material: Material, notes: int, save_every: int) -> None:
    """One training to its end, from the start or from folder/last.pt; then folder/result.json. Raises Interrupted."""
    device, training = material.device, material.parts["train"]
    config, encoding, task = material.config, material.encoding, material.task
    classes = material.labelled.classes

    # model and optimiser
    torch.manual_seed(settings.seed)
    sizes = tuple(field.size for field in encoding.fields)
    model = Classifier(config, sizes, task.level, len(classes), compute_dtype(settings.dtype, device)).to(device)
    if material.start:
        checkpoint.load_encoder(model.encoder, material.start, material.init)
    model.freeze(settings.train_layers)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    mask_word = torch.from_numpy(encoding.mask.astype(np.int64)).to(device)
    class_weights = None
    if settings.class_weights:
        class_weights = torch.from_numpy(tasks.inverse_frequency(material.truth["train"], len(classes))).to(device)

    # the state beside the weights
    progress = {"epoch": 0, "step": 0, "in_epoch": 0, "stale": 0, "best_loss": math.inf, "best": (-1.0, 0.0)}
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # losses, steps, hits, labels of this epoch
    metrics = MetricsFile(folder / "metrics.jsonl")
    if (folder / "last.pt").exists():
        resumed = checkpoint.load_last(folder, device, "put back a copy, or delete it to start this training anew")
        checkpoint.load_weights(model, resumed["model"], folder / "last.pt")
        optimizer.load_state_dict(resumed["optimizer"])
        progress, sums = resumed["progress"], resumed["sums"]
        metrics.rewind(resumed["metrics_bytes"])
    elif parallel.leads():
        folder.mkdir(exist_ok=True)
        metrics.rewind(0)

    def save(name: str) -> None:
        if not parallel.leads():
            return
        state = {
            "kind": "finetune",
            "config": to_dict(config),
            "fields": [[field.name, field.values, field.size] for field in encoding.fields],
            "task": task.name,
            "classes": list(classes),
            "notes": notes,
            "settings": to_dict(settings),
            "model": model.state_dict(),
        }
        if name == "last.pt":
            state |= {"optimizer": optimizer.state_dict(), "progress": dict(progress), "sums": sums}
            state |= {"metrics_bytes": metrics.size()}
        checkpoint.save(folder / name, state)

    interruptible = Interruptible()

    def predict(role: str, numbers: np.ndarray) -> np.ndarray:
        """Log-probabilities on clean input, [S, C], or for note tasks [S, L, C], zeros beyond a sequence's end."""
        by_length = numbers[np.argsort(-material.parts[role].lengths[numbers], kind="stable")]
        shape = (notes, len(classes)) if task.level == "note" else (len(classes),)
        log_p = np.zeros((len(material.parts[role]), *shape), dtype=np.float32)
        for some, words, lengths in material.batches(role, by_length, 2 * settings.batch):
            interruptible.pause()
            rows = parallel.share(len(some))
            out = evaluate.log_probabilities(model, *material.to_device(words[rows], lengths[rows])).cpu().numpy()
            log_p[(some[rows], slice(out.shape[1])) if task.level == "note" else some[rows]] = out
        parallel.add(torch.from_numpy(log_p))  # each sequence is in one process's share
        return log_p[numbers]

    def measure(role: str, numbers: np.ndarray) -> tuple[dict, np.ndarray]:
        log_p = predict(role, numbers)
        piece = material.parts[role].piece[numbers]
        return evaluate.measure(log_p, material.truth[role][numbers], piece, classes), log_p

    # the loop
    held_out = data.some(len(material.parts["valid"]), settings.valid_size, seed=0)  # the same for all trainings
    epoch_size = settings.epoch_size or len(training)
    steps = math.ceil(epoch_size / settings.batch)
    interruptible.start()
    bar = tqdm(
        total=steps * settings.epochs,
        initial=progress["step"],
        desc=folder.name,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 30,
        disable=not parallel.leads(),
    )
    clock, seen, over = time.perf_counter(), 0, False
    try:
        while progress["epoch"] < settings.epochs and progress["stale"] < settings.patience:
            model.train()
            order = data.epoch_order(len(training), epoch_size, progress["epoch"], settings.seed)
            while progress["in_epoch"] < steps:
                interruptible.pause()
                numbers = order[progress["in_epoch"] * settings.batch :][: settings.batch]
                step_seed = (settings.seed << 32) + progress["step"]
                words, lengths, labels = material.train_batch(numbers, settings, step_seed)
                seen += int(lengths.sum())
                rows = parallel.share(len(numbers))  # all of them, if this is the only process
                words, lengths, labels = material.to_device(words[rows], lengths[rows], labels[rows].astype(np.int64))
                torch.manual_seed(part_seed(step_seed, rows.start))  # the head's; all else takes the seed itself
                loss, hits, counted = finetune_loss(
                    model, words, lengths, labels, mask_word, class_weights, settings.mask, step_seed, rows.start
                )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                parallel.sum_gradients(trained)
                torch.nn.utils.clip_grad_norm_(trained, settings.clip)
                rate = learning_rate(settings, progress["step"], steps * settings.epochs)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()

                loss, hits, counted = parallel.totals(loss.detach(), hits, counted)
                sums = sums + torch.stack([loss, torch.ones_like(loss), hits, counted]).double()
                progress["step"] += 1
                progress["in_epoch"] += 1
                bar.update()
                if progress["step"] % save_every == 0:
                    require_finite(sums, folder, progress["step"])
                    save("last.pt")

            # an epoch's end: validate on clean input, remember the best
            require_finite(sums, folder, progress["step"])
            speed = seen / (time.perf_counter() - clock)
            held, _ = measure("valid", held_out)
            progress["epoch"] += 1
            progress["in_epoch"] = 0
            train = {"loss": (sums[0] / sums[1]).item(), "accuracy": (sums[2] / sums[3]).item()}
            metrics.write(
                {
                    "kind": "epoch",
                    "epoch": progress["epoch"],
                    "step": progress["step"],
                    "train": train,
                    "valid": evaluate.headline(held),
                    "speed": {"notes_per_s": round(speed)},
                }
            )
            sums = torch.zeros_like(sums)
            accuracy, loss_now = held["accuracy"], held["loss"]
            improved = accuracy > progress["best"][0] or loss_now < progress["best_loss"]
            progress["stale"] = 0 if improved else progress["stale"] + 1
            progress["best_loss"] = min(loss_now, progress["best_loss"])
            if (accuracy, -loss_now) > progress["best"]:
                progress |= {"best": (accuracy, -loss_now), "best_epoch": progress["epoch"]}
                save("best.pt")
            save("last.pt")
            bar.set_postfix_str(f"valid {accuracy:.1%}, best {progress['best'][0]:.1%}, {speed:,.0f} notes/s")
            clock, seen = time.perf_counter(), 0

        # the end: the best epoch's weights on all of the validation set and, for the first time, on the test set
        over = True
        with parallel.leader_first():
            best = checkpoint.load(folder / "best.pt", device)
        checkpoint.load_weights(model, best["model"], folder / "best.pt")
        valid, _ = measure("valid", np.arange(len(material.parts["valid"])))
        test, log_p = measure("test", np.arange(len(material.parts["test"])))
    except Interrupted:
        if not over:  # else the model is the best epoch's, and nothing is left to save
            save("last.pt")
        raise
    finally:
        bar.close()
        interruptible.stop()
    if not parallel.leads():
        return
    part = material.parts["test"]
    checkpoint.save_arrays(
        folder / "test.npz",
        log_p=log_p.astype(np.float16),
        truth=material.truth["test"],
        piece=part.piece,
        start=part.start,
    )
    epochs = {"best_epoch": progress["best_epoch"], "epochs": progress["epoch"]}
    write_json(folder / "result.json", {**epochs, "valid": valid, "test": test})


def require_finite(sums: torch.Tensor, folder: Path, step: int) -> None:
    if not sums[0].isfinite():
        raise ValueError(
            f"a loss before step {step:,} was not finite; {folder}/last.pt is older: lower --lr, start anew"
        )


def describe(run: Path, content: dict, material: Material, pieces: dict, absent: list, seen: dict | None) -> None:
    """Say what is about to happen, and what to doubt, before it takes long."""
    counts = ", ".join(f"{len(pieces[role])} {role}" for role in splits.ROLES)
    sequences = "/".join(f"{len(part):,}" for part in material.parts.values())
    origin = content["paths"]["init"] or "scratch (no --init was given)"
    print(
        f"{run}: {material.task.name}, {len(material.labelled.classes)} classes; {counts} pieces, {sequences} sequences"
    )
    print(f"from {origin}, on {material.device}. Ctrl-C saves and stops.")
    for line in splits.doubts(absent, seen, bool(content["paths"]["init"])):
        print(f"note: {line}")


def main() -> int:
    args = parse_args()
    try:
        with parallel.joined():
            return finetune(args)
    except (ValueError, OSError) as error:
        return parallel.fail(f"finetune.py: {error}", 2)
    except KeyboardInterrupt:
        return parallel.fail("interrupted while no training was under way", 130)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    sys.exit(main())
