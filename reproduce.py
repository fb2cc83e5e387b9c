"""From the public data sets to the whole table of results. Every cell of it is a run of train.py or finetune.py.

    python reproduce.py --data DATA                      all of it: seven hours of a core in bf16, thirty in fp32
    python reproduce.py --data DATA --budget 0.02        a smoke version, a quarter of an hour on two cores
    python reproduce.py --data DATA --only 'composer/*'  some cells; the same command without --only does the others
    python reproduce.py --data DATA --corpus MAESTRO …   with more folders of MIDI to pre-train on

DATA holds POP909, Pianist8, VGMIDI, EMOPIA as their authors publish them, in folders whose names begin so, and maybe
splits/NAME.json; without these, pieces are drawn by a fixed seed. Pre-training reads their training pieces only. Cells
run as OUT/pretrain/OBJECTIVE and OUT/TASK/PRETRAINING-TRAINING-SEED. Finished cells are not run again and interrupted
ones are resumed, if their settings, splits and pre-training are the same: cell.json has their fingerprint.
OUT/results.json, results.md and the pictures are written anew after each cell, from the files of all finished cells.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from amb import data, inference, inspection, plots, splits, tasks, tokenizer
from amb.config import PAPER_FINETUNING, PRESETS, positive
from amb.evaluate import LEVELS, bootstrap, hits, over_seeds, results_table
from amb.files import fingerprint, table, write_json, writing

ROOT = Path(__file__).parent
ENCODING = "octuple"  # of all presets
DATASETS = ("pop909", "pianist8", "vgmidi", "emopia")  # how the folders' names begin, in any case
# Sizes at a budget of 1. A smaller budget has fewer sequences in each epoch; a smoke version also one seed, and a fifth
# of the pieces.
SMOKE = 0.1  # budgets below this are smoke versions
PRETRAINING_SIZE = {"epochs": 10, "epoch_size": 2048, "batch": 8, "valid_size": 128}
NOTES = {"epochs": 6, "epoch_size": 512, "batch": 4, "valid_size": 256}
COMPOSER = {"epochs": 12, "epoch_size": 256, "batch": 2, "valid_size": 128, "notes": 1024}
EMOTION = {"epochs": 8, "epoch_size": 96, "batch": 2, "valid_size": 128, "notes": 1024}
TASKS = {  # task, data set, size, the best published figure (per cent)
    "melody": ("melody", "pop909", NOTES, {"notes": 96.37}),
    "velocity": ("velocity", "pop909", NOTES, {"notes": 51.63}),
    "composer": ("composer", "pianist8", COMPOSER, {"segments": 78.57}),
    "emotion": ("emotion", "vgmidi", EMOTION, {}),
    "emopia": ("emotion", "emopia", EMOTION, {"segments": 67.89}),
}
PRETRAINING = {
    "random": ["--objective", "random"],
    "unfrozen": ["--objective", "adversarial", "--freeze-every", "0"],
    "adversarial": ["--objective", "adversarial", "--freeze-every", "4"],
}
ALL_LAYERS = ("--train-layers", "1000")
TRAINING = {
    "masked": (*ALL_LAYERS, "--mask", str(PAPER_FINETUNING["mask"])),
    "unmasked": (*ALL_LAYERS, "--mask", "0"),
    "linear": ("--train-layers", "0", "--notes", "512"),  # sequence tasks; the encoder is frozen
}
ARMS = [(start, training) for start in ("none", *PRETRAINING) for training in TRAINING]
QUESTIONS = [  # what is worth how much: the arm with it, the arm without it
    *(("pre-training", f"random, {training}", f"none, {training}") for training in TRAINING),
    *(("the adversarial objective", f"adversarial, {training}", f"random, {training}") for training in TRAINING),
    *(("freezing", f"adversarial, {training}", f"unfrozen, {training}") for training in TRAINING),
    *(("masking while fine-tuning", f"{start}, masked", f"{start}, unmasked") for start in ("none", *PRETRAINING)),
    *(("training all layers", f"{start}, unmasked", f"{start}, linear") for start in ("none", *PRETRAINING)),
]


@dataclass(frozen=True)
class Cell:
    """One run: its name, which is its folder below OUT, the script, and what decides its result."""

    name: str
    script: str
    settings: tuple[str, ...]
    data: tuple[Path, ...]  # folders of MIDI
    splits: dict[str, Path]  # the split file of each of them
    start: "Cell | None" = None  # the pre-training it begins with

    def fingerprint(self) -> str:
        """Equal for cells of the same result; where files lie does not matter."""
        contents = {name: file.read_text(encoding="utf-8") for name, file in self.splits.items()}
        return fingerprint(self.script, self.settings, contents, self.start and self.start.fingerprint())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Reproduce the table of results.",
        epilog="Example: python reproduce.py --data DATA --budget 0.02 --only 'composer/none-*'",
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DATA", help="a folder with clones of the data sets")
    add("--out", type=Path, default=Path("runs/reproduce"), metavar="OUT", help="where all runs go")
    add("--corpus", nargs="+", type=Path, default=[], metavar="PATH", help="more folders of MIDI to pre-train on")
    add("--splits", type=Path, metavar="DIR", help="NAME.json of each data set (default: DATA/splits)")
    add("--budget", type=float, default=1.0, help=f"factor on the sequences every run reads (1; < {SMOKE}: smoke)")
    add("--config", choices=PRESETS, default="small", help="preset of the encoder (default: small)")
    add("--seeds", type=positive, metavar="N", help=f"of every fine-tuning (default: 3; budget < {SMOKE}: 1)")
    add("--pretraining-seed", type=int, default=0, metavar="N", help="of every pre-training (0); needs its own OUT")
    add("--only", nargs="+", metavar="PATTERN", help="cells whose names match, like 'composer/none-*'")
    return parser.parse_args()


def find_datasets(folder: Path) -> dict[str, Path]:
    """The folders of the data sets in `folder`. Raises ValueError if there is none."""
    datasets = {}
    for path in sorted(path for path in folder.glob("*") if path.is_dir()):
        for name in (name for name in DATASETS if path.name.lower().startswith(name)):
            main_versions = path / "POP909"  # a clone also has other versions of each song
            datasets.setdefault(name, main_versions if main_versions.is_dir() else path)
    if not datasets:
        raise ValueError(f"{folder} holds no folder that begins with {', '.join(DATASETS)}")
    return datasets


def find_splits(args: argparse.Namespace, datasets: dict[str, Path]) -> dict[str, Path]:
    """The split file of each data set and of each folder of --corpus, all of whose pieces train.

    A data set's is the published one, or one that is drawn, once, into OUT/splits. Smoke versions have a fifth of it.
    """
    lists, folder = {}, args.out / "splits"
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in datasets.items():
        published = (args.splits or args.data / "splits") / f"{name}.json"
        lists[name] = published if published.is_file() else folder / f"{name}.json"
        if not lists[name].is_file():
            task = tasks.TASKS[next(task for task, dataset, *_ in TASKS.values() if dataset == name)]
            store = data.tokenized(source, ENCODING, args.out / "cache", task.view)
            roles = splits.labelled_roles(tasks.read_labels(task, store, source), None, seed=0)[0]
            write_json(lists[name], {role: data.names([store], [roles], role) for role in splits.ROLES})
        if args.budget < SMOKE:
            role_of = splits.read_splits([lists[name]])
            lists[name] = folder / f"{name}-fifth.json"
            fifths = {role: [piece for piece in role_of if role_of[piece] == role][::5] for role in splits.ROLES}
            write_json(lists[name], fifths)
    for source in args.corpus:
        pieces = [f"{source.resolve().name}/{name}" for name, _ in tokenizer.find_midi(source)[0]]
        corpus = f"corpus-{source.resolve().name}"
        lists[corpus] = folder / f"{corpus}.json"
        write_json(lists[corpus], {"train": pieces[:: 5 if args.budget < SMOKE else 1]})
    return lists


def flags(**settings) -> tuple[str, ...]:
    return tuple(text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value)))


def size_flags(size: dict, budget: float) -> tuple[str, ...]:
    epoch_size, valid_size = round(size["epoch_size"] * budget), round(size["valid_size"] * min(budget, 1))
    return flags(**size | {"epoch_size": max(size["batch"], epoch_size), "valid_size": max(16, valid_size)})


def all_cells(args: argparse.Namespace, datasets: dict[str, Path], lists: dict[str, Path]) -> list[Cell]:
    """Pre-trainings first, then the fine-tunings: every cell of one seed before any of the next.

    `lists` are the split files of `find_splits`.
    """
    folders, config, pretrainings = (*datasets.values(), *args.corpus), flags(config=args.config), {}
    for name, objective in PRETRAINING.items():
        settings = (*config, *objective, *flags(seed=args.pretraining_seed), *size_flags(PRETRAINING_SIZE, args.budget))
        pretrainings[name] = Cell(f"pretrain/{name}", "train.py", settings, folders, lists)
    cells = list(pretrainings.values())
    for seed in range(args.seeds or (1 if args.budget < SMOKE else 3)):
        for name, (task, dataset, size, _) in TASKS.items():
            for start, training in ARMS if dataset in datasets else ():
                if training == "linear" and tasks.TASKS[task].level == "note":
                    continue
                settings = flags(task=task) + (config if start == "none" else ())
                settings += (*flags(seed=seed), *size_flags(size, args.budget), *TRAINING[training])
                cell, source = f"{name}/{start}-{training}-{seed}", ((datasets[dataset],), {dataset: lists[dataset]})
                cells.append(Cell(cell, "finetune.py", settings, *source, pretrainings.get(start)))
    return cells


def read_json(file: Path) -> dict:
    """The content of a JSON file; empty if there is none yet."""
    return json.loads(file.read_text()) if file.exists() else {}


def read_record(out: Path, cell: Cell) -> dict:
    """The content of cell.json: fingerprint, seconds so far, finished. Raises ValueError in another cell's folder."""
    folder, new = out / cell.name, {"fingerprint": cell.fingerprint(), "seconds": 0, "finished": False}
    record = read_json(folder / "cell.json") if (folder / "run.json").exists() else new
    if record.get("fingerprint") != new["fingerprint"]:
        raise ValueError(f"{folder} was made with other settings, splits or pre-training: choose another --out")
    return record


def run_cell(out: Path, cell: Cell) -> bool:
    """Run a cell, or resume it. False if it failed; raises KeyboardInterrupt if it was interrupted."""
    folder, record = out / cell.name, read_record(out, cell)
    if cell.start and not read_record(out, cell.start)["finished"]:
        print(f"{cell.name} needs {cell.start.name} first", file=sys.stderr, flush=True)
        return False
    begun = (folder / "run.json").exists()
    arguments = (*cell.settings, "--data", *cell.data, "--split", *cell.splits.values(), "--cache", out / "cache")
    arguments += ("--init", out / cell.start.name) if cell.start else ()
    arguments = ("--resume", folder) if begun else (*arguments, "--out", folder)
    print(f"{time.strftime('%H:%M')} {cell.name}{': goes on' if begun else ''}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "cell.json", record)
    began, interrupted, log = time.perf_counter(), False, folder.with_name(f"{folder.name}.log")
    with open(log, "a", encoding="utf-8") as file:
        command = [sys.executable, str(ROOT / cell.script), *map(str, arguments)]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            status = process.wait()
        except KeyboardInterrupt:  # subprocess.run would kill the training before it has saved
            process.send_signal(signal.SIGINT)
            status, interrupted = process.wait(), True
    seconds = time.perf_counter() - began
    write_json(folder / "cell.json", record | {"seconds": record["seconds"] + seconds, "finished": status == 0})
    if interrupted or status == 130:
        raise KeyboardInterrupt
    if status != 0:
        print(f"{cell.name} failed, status {status}: see {log}", file=sys.stderr, flush=True)
        return False
    print(f"{time.strftime('%H:%M')} {cell.name} done, {seconds / 60:.0f} min", flush=True)
    return True


def collect(out: Path) -> dict:
    """The figures of all finished fine-tunings: {task: {"arms": {arm: ...}, "baselines": ...}}; see `arm_figures`."""
    results = {}
    for name, (*_, published) in TASKS.items():
        files = {
            f"{start}, {training}": sorted((out / name).glob(f"{start}-{training}-[0-9]*/report.json"))
            for start, training in ARMS
        }
        arms = {arm: arm_figures(reports) for arm, reports in files.items() if reports}
        if arms:
            report = read_json(files[list(arms)[-1]][0])
            about = {key: report[key] for key in ("level", "classes", "baselines")}
            answers = differences(arms, LEVELS[report["level"]])
            results[name] = about | {"published": published, "differences": answers, "arms": arms}
    return results


def arm_figures(files: list[Path]) -> dict:
    """`over_seeds` of one arm's reports, and right answers by seed and test piece."""
    reports = [read_json(file) for file in files]
    level = reports[0]["level"]
    right = [hits(next(file.parent.glob("*/test.npz")), level) for file in files]
    figures = over_seeds([report["trainings"][0] for report in reports], level)
    for unit in LEVELS[level]:
        figures[unit]["hits"] = [each[unit][0].tolist() for each in right]
        figures[unit]["counts"] = right[0][unit][1].tolist()
    return figures


def differences(arms: dict, units: tuple[str, ...]) -> list[dict]:
    """The answers to QUESTIONS whose arms are there, by paired bootstrap over test pieces and seeds."""
    answers = []
    for question, arm, other in QUESTIONS:
        if arm in arms and other in arms:
            answers.append({"question": question, "with": arm, "without": other})
            for unit in units:
                right = (np.array(arms[name][unit]["hits"]) for name in (arm, other))
                answers[-1][unit] = bootstrap(*right, np.array(arms[arm][unit]["counts"]))
    return answers


def measure_bias(out: Path, datasets: dict[str, Path], lists: dict[str, Path], pieces: int) -> None:
    """OUT/bias.json: recovery by frequency and marginals at hopeless notes of all finished pre-trainings.

    All see the same `pieces` test pieces of all data sets; hopeless is what the adversarial run's masker calls so.
    Measured again if a pre-training has finished since.
    """
    starts = [name for name in PRETRAINING if read_json(out / "pretrain" / name / "cell.json").get("finished")]
    if "adversarial" not in starts or list(read_json(out / "bias.json").get("runs", [])) == starts:
        return
    pairs = [pair for folder in datasets.values() for pair in tokenizer.find_midi(folder)[0]]
    roles, _ = splits.roles_of([name for name, _ in pairs], lists.values())
    files = [str(file) for (_, file), role in zip(pairs, roles, strict=True) if role == "test"]
    if not files:
        return
    print("bias of the pre-trained models ...", flush=True)
    chosen = [files[number] for number in np.linspace(0, len(files) - 1, min(pieces, len(files))).astype(int)]
    encoding, hopeless, figures = tokenizer.load(ENCODING), None, {}
    for name in sorted(starts, key="adversarial".__ne__):  # first the one whose masker says which notes are hopeless
        trained = inference.load(out / "pretrain" / name)
        view = inspection.join([inspection.inspect(trained, trained.encode(file), chances=True) for file in chosen])
        hopeless = inspection.most_hopeless(view.scores) if hopeless is None else hopeless
        recovery = inspection.recovery_by_frequency(view.true, view.recovered, encoding)
        distance = inspection.marginal_distance(view.true[hopeless], view.chances[hopeless], encoding)
        figures[name] = {"recovery_by_frequency": recovery.tolist(), "marginal_distance_hopeless": distance.tolist()}
    fields, runs = encoding.names, {name: figures[name] for name in starts}
    write_json(out / "bias.json", {"pieces": len(chosen), "notes": len(hopeless), "fields": fields, "runs": runs})


def markdown(results: dict, seconds: dict) -> str:
    """The content of results.md: for each task its arms and differences, then the hours."""
    parts = []
    for name, task in results.items():
        about = task["level"], task["arms"], task["baselines"], task["published"]
        parts += [f"### {name}", results_table("pre-training, fine-tuning", *about)]
        if task["differences"]:
            parts.append(differences_table(task["differences"], LEVELS[task["level"]]))
    parts.append(f"{len(seconds)} runs, {sum(seconds.values()) / 3600:.1f} machine hours")
    return "\n\n".join(parts) + "\n"


def differences_table(answers: list[dict], units: tuple[str, ...]) -> str:
    """Points of accuracy, 95 % interval, p: `-2.1 (-5.0 … 0.8), p = 0.16`."""
    rows = [[answer["question"], f"{answer['with']} – {answer['without']}"] for answer in answers]
    for row, answer in zip(rows, answers, strict=True):
        for unit in units:
            low, mean, high = (100 * answer[unit][key] for key in ("low", "mean", "high"))
            chance = "p < 0.01" if answer[unit]["p"] < 0.01 else f"p = {answer[unit]['p']:.2f}"
            row.append(f"{mean:+.1f} ({low:+.1f} … {high:+.1f}), {chance}")
    return table(["gain, in points", "between", *units], rows)


def write_table(out: Path) -> None:
    """results.json, results.md and the pictures, from what is finished."""
    results, measured = collect(out), read_json(out / "bias.json")
    records = {str(file.parent.relative_to(out)): read_json(file) for file in sorted(out.glob("*/*/cell.json"))}
    seconds = {name: record["seconds"] for name, record in records.items() if record["finished"]}
    write_json(out / "results.json", {"tasks": results, "bias": measured, "seconds": seconds})
    with writing(out / "results.md") as file:
        file.write(markdown(results, seconds).encode())
    plots.draw_results(results, out / "results.png")
    metrics = {name: out / "pretrain" / name / "metrics.jsonl" for name in PRETRAINING}
    runs = {name: file for name, file in metrics.items() if file.exists()}
    plots.curves(runs, plots.VALIDATION, out / "pretraining.png")
    if measured:
        plots.draw_bias(measured, out / "bias.png")


def run_cells(args: argparse.Namespace) -> list[str]:
    """Run what is asked for and not finished: the names of the cells that were not done."""
    datasets = find_datasets(args.data)
    lists = find_splits(args, datasets)
    cells = all_cells(args, datasets, lists)
    chosen = [cell for cell in cells if any(fnmatch(cell.name, pattern) for pattern in args.only or ["*"])]
    if not chosen:
        raise ValueError(f"no cell matches {' '.join(args.only)}; they are called like {cells[-1].name}")
    undone = []
    for cell in [cell for cell in chosen if not read_record(args.out, cell)["finished"]]:
        if run_cell(args.out, cell):
            write_table(args.out)
        else:
            undone.append(cell.name)
    measure_bias(args.out, datasets, lists, max(4, round(48 * min(args.budget, 1))))
    return undone


def main() -> int:
    args = parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        undone = run_cells(args)
        write_table(args.out)
        print((args.out / "results.md").read_text(encoding="utf-8"))
        pictures = sorted(file.name for file in args.out.glob("*.png"))
        print(f"more: {args.out}/{', '.join(['results.json', *pictures])}")
        if undone:
            print(f"reproduce.py: not done: {', '.join(undone)}", file=sys.stderr)
        return 1 if undone else 0
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
