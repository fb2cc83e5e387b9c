"""From the public data sets to the whole table of results. Every cell is a run of train.py or finetune.py.

    python reproduce.py --data DATA                      all of it: seven hours of a core in bf16, thirty in fp32
    python reproduce.py --data DATA --budget 0.02        a smoke version, a quarter of an hour on two cores
    python reproduce.py --data DATA --only 'composer/*'  some cells; the same command without --only does the others
    python reproduce.py --data DATA --table              no runs: the table and pictures of what there is

DATA holds POP909, Pianist8, VGMIDI, EMOPIA as their authors publish them, in folders whose names begin so, and maybe
splits/NAME.json; without these, pieces are drawn by a fixed seed. Pre-training sees their training pieces only. Cells
run as OUT/pretrain/OBJECTIVE and OUT/TASK/PRETRAINING-TRAINING-SEED; finished ones are not run again and interrupted
ones are resumed, if they are made of the same settings, splits and pre-training: cell.json says of what.
OUT/results.json, results.md and the pictures are written anew after each cell, from the files of all finished cells.
"""

import argparse
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from amb import compare, data, inference, inspection, plots, splits, tasks, tokenizer
from amb.config import PRESETS, Finetuning, paper_settings, positive
from amb.files import writing
from amb.report import FIGURES, LEVELS, percent, spread
from amb.runs import write_json

ROOT = Path(__file__).parent
ENCODING = "octuple"  # that of all presets
DATASETS = ("pop909", "pianist8", "vgmidi", "emopia")  # how the folders' names begin, in any case
TASKS = {  # task, data set, the best published figure (per cent)
    "melody": ("melody", "pop909", {"notes": 96.37}),
    "velocity": ("velocity", "pop909", {"notes": 51.63}),
    "composer": ("composer", "pianist8", {"segments": 78.57}),
    "emotion": ("emotion", "vgmidi", {}),
    "emopia": ("emotion", "emopia", {"segments": 67.89}),
}
PRETRAINING = {
    "random": ["--objective", "random"],
    "unfrozen": ["--objective", "adversarial", "--freeze-every", "0"],
    "adversarial": ["--objective", "adversarial", "--freeze-every", "4"],
}
MASKED = ["--mask", str(paper_settings(Finetuning)["mask"])]
TRAINING = {"masked": MASKED, "unmasked": ["--no-mask"], "untransposed": [*MASKED, "--no-transpose"]}
ARMS = [(start, training) for start in ("none", *PRETRAINING) for training in ("masked", "unmasked")]
ARMS.append(("adversarial", "untransposed"))
QUESTIONS = [  # what is worth how much: with it, without it
    *(("pre-training", f"random, {training}", f"none, {training}") for training in ("masked", "unmasked")),
    *(
        ("the adversarial objective", f"adversarial, {training}", f"random, {training}")
        for training in ("masked", "unmasked")
    ),
    *(("freezing", f"adversarial, {training}", f"unfrozen, {training}") for training in ("masked", "unmasked")),
    *(("masking while fine-tuning", f"{start}, masked", f"{start}, unmasked") for start in ("none", *PRETRAINING)),
    ("transposition", "adversarial, masked", "adversarial, untransposed"),
]

# at a budget of 1; a smaller one has fewer sequences in each epoch, and a smoke version one seed, and fewer pieces
SMOKE = 0.1  # what is below
PRETRAINING_SIZE = {"epochs": 10, "epoch_size": 2048, "batch": 8, "valid_size": 128}
OF_NOTES = {"epochs": 6, "epoch_size": 512, "batch": 4, "valid_size": 256}
OF_FEW_PIECES = {"epochs": 8, "epoch_size": 96, "batch": 2, "valid_size": 128, "notes": 1024}
SIZES = {
    "melody": OF_NOTES,
    "velocity": OF_NOTES,
    "composer": {"epochs": 12, "epoch_size": 256, "batch": 2, "valid_size": 128, "notes": 1024},
    "emotion": OF_FEW_PIECES,
    "emopia": OF_FEW_PIECES,
}


@dataclass(frozen=True)
class Cell:
    """One run: its name, which is its folder below OUT, the script, and what starts it."""

    name: str
    script: str
    settings: tuple[str, ...]  # flags
    splits: dict[str, Path]  # the split file of each data set that it reads
    sources: tuple[str, ...]  # flags that say where these, the data and the cache lie
    start: "Cell | None"  # the pre-training it begins with

    def made_of(self) -> dict:
        """What has to be the same for a result to be this cell's; where files lie has not."""
        contents = {name: hashlib.sha256(file.read_bytes()).hexdigest()[:12] for name, file in self.splits.items()}
        start = self.start and self.start.made_of()
        return {"script": self.script, "settings": list(self.settings), "splits": contents, "start": start}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Reproduce the table of results.")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DATA", help="a folder with clones of the data sets"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), metavar="OUT", help="where all runs go")
    parser.add_argument("--splits", type=Path, metavar="DIR", help="NAME.json of each data set (default: DATA/splits)")
    parser.add_argument(
        "--budget",
        type=float,
        default=1.0,
        help=f"factor on the sequences every run sees (default: 1; < {SMOKE}: of a fifth of the pieces)",
    )
    parser.add_argument("--config", choices=PRESETS, default="small", help="preset of the encoder (default: small)")
    parser.add_argument(
        "--seeds", type=positive, metavar="N", help=f"of every fine-tuning (default: 3; budget < {SMOKE}: 1)"
    )
    parser.add_argument(
        "--pretraining-seed",
        type=int,
        default=0,
        metavar="N",
        help="of every pre-training (default: 0); needs its own OUT",
    )
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="cells whose names match, like 'composer/none-*'")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="cells at a time (default: 1)")
    parser.add_argument("--table", action="store_true", help="run nothing; write what the finished cells give")
    return parser.parse_args()


def find_datasets(folder: Path) -> dict[str, Path]:
    """The folders of the data sets in `folder`. Raises ValueError if there is none."""
    found = {}
    for path in sorted(path for path in folder.glob("*") if path.is_dir()):
        for name in DATASETS:
            if path.name.lower().startswith(name):
                inner = path / "POP909"  # a clone also has other versions of each song
                found.setdefault(name, inner if inner.is_dir() else path)
    if not found:
        raise ValueError(f"{folder} holds no folder that begins with {', '.join(DATASETS)}")
    return found


def find_splits(args: argparse.Namespace, datasets: dict[str, Path]) -> dict[str, Path]:
    """The split file of each data set: the published one, or one that is drawn, once, into OUT/splits.

    For a smoke version every fifth piece of it.
    """
    found = {}
    for name, folder in datasets.items():
        found[name] = (args.splits or args.data / "splits") / f"{name}.json"
        if not found[name].is_file():
            found[name] = args.out / "splits" / f"{name}.json"
        if not found[name].is_file():
            task = tasks.TASKS[next(task for task, of, _ in TASKS.values() if of == name)]
            origins = task.level == "note"
            store = tokenizer.open_store(data.tokenized(folder, ENCODING, args.out / "cache", task.view, origins))
            labelled = tasks.read_labels(task, store, folder)
            roles, _ = splits.labelled_roles(labelled, None, seed=0)
            pieces = {role: data.names([store], [roles], role) for role in splits.ROLES}
            found[name].parent.mkdir(parents=True, exist_ok=True)
            write_json(found[name], pieces)
        if args.budget < SMOKE:
            role_of = splits.read_splits([found[name]])
            found[name] = args.out / "splits" / f"{name}-fifth.json"
            found[name].parent.mkdir(parents=True, exist_ok=True)
            fifth = {role: [piece for piece in role_of if role_of[piece] == role][::5] for role in splits.ROLES}
            write_json(found[name], fifth)
    return found


def all_cells(args: argparse.Namespace, datasets: dict[str, Path], lists: dict[str, Path]) -> list[Cell]:
    """Pre-trainings first, then the fine-tunings: every cell of one seed before any of the next."""

    def flags(size: dict) -> tuple[str, ...]:
        scaled = {
            "epoch_size": max(size["batch"], round(size["epoch_size"] * args.budget)),
            "valid_size": max(16, round(size["valid_size"] * min(args.budget, 1))),
        }
        pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in (size | scaled).items())
        return tuple(text for pair in pairs for text in pair)

    cache = ("--cache", str(args.out / "cache"))
    everything = ("--data", *map(str, datasets.values()), "--split", *map(str, lists.values()), *cache)
    pretrainings = {}
    for name, own in PRETRAINING.items():
        settings = ("--config", args.config, *own, "--seed", str(args.pretraining_seed), *flags(PRETRAINING_SIZE))
        pretrainings[name] = Cell(f"pretrain/{name}", "train.py", settings, lists, everything, None)
    cells = list(pretrainings.values())
    for seed in range(args.seeds or (1 if args.budget < SMOKE else 3)):
        for name, (task, dataset, _) in TASKS.items():
            if dataset not in datasets:
                continue
            source = ("--data", str(datasets[dataset]), "--split", str(lists[dataset]), *cache)
            for start, training in ARMS:
                config = ("--config", args.config) if start == "none" else ()
                init = () if start == "none" else ("--init", str(args.out / "pretrain" / start))
                settings = ("--task", task, *config, *TRAINING[training], "--seed", str(seed), *flags(SIZES[name]))
                own, sources = {dataset: lists[dataset]}, (*source, *init)
                name_of_cell = f"{name}/{start}-{training}-{seed}"
                cells.append(Cell(name_of_cell, "finetune.py", settings, own, sources, pretrainings.get(start)))
    return cells


class Runner:
    """Runs cells, some at a time; each one's OUT/NAME/cell.json says what it is made of, its seconds, and whether it
    is finished."""

    def __init__(self, out: Path, jobs: int):
        self.out, self.jobs, self.lock = out, jobs, threading.Condition()
        self.pending: list[Cell] = []
        self.undecided: set[str] = set()  # the names of those that are pending or running
        self.running: set[subprocess.Popen] = set()
        self.undone: list[str] = []
        self.stopped = False

    def record(self, cell: Cell) -> dict:
        """The content of its cell.json. Raises ValueError where another run is in its folder."""
        folder = self.out / cell.name
        made_of = cell.made_of()
        new = {"made_of": made_of, "seconds": 0, "finished": False}
        found = read_json(folder / "cell.json") if (folder / "run.json").exists() else new
        if found.get("made_of") != made_of:
            raise ValueError(f"{folder} was made with other settings, splits or pre-training: choose another --out")
        return found

    def waiting(self, cells: list[Cell]) -> list[Cell]:
        """Those that are not finished. Raises ValueError as `record`."""
        return [cell for cell in cells if not self.record(cell)["finished"]]

    def run(self, cells: list[Cell]) -> None:
        """Run those that are not finished. Raises KeyboardInterrupt if one was interrupted."""
        self.pending = self.waiting(cells)
        self.undecided = {cell.name for cell in self.pending}
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                for worker in [pool.submit(self._work) for _ in range(self.jobs)]:
                    worker.result()
            except KeyboardInterrupt:
                self.stopped = True
                for process in list(self.running):
                    process.send_signal(signal.SIGINT)
        if self.stopped:
            raise KeyboardInterrupt

    def _work(self) -> None:
        while cell := self._next():
            try:
                self._run(cell)
            finally:
                with self.lock:
                    self.undecided.remove(cell.name)
                    self.lock.notify_all()

    def _next(self) -> Cell | None:
        """The first cell that need not wait for its pre-training; one that has to, once that is over."""
        with self.lock:
            while self.pending and not self.stopped:
                for cell in self.pending:
                    if cell.start is None or cell.start.name not in self.undecided:
                        self.pending.remove(cell)
                        return cell
                self.lock.wait(timeout=1)  # whoever stops tells nobody

    def _run(self, cell: Cell) -> None:
        folder, record = self.out / cell.name, self.record(cell)
        if cell.start and not self.record(cell.start)["finished"]:
            print(f"{cell.name} needs {cell.start.name} first", file=sys.stderr, flush=True)
            self.undone.append(cell.name)
        elif not self.stopped:
            begun = (folder / "run.json").exists()
            arguments = ("--resume", folder) if begun else (*cell.settings, *cell.sources, "--out", folder)
            print(f"{time.strftime('%H:%M')} {cell.name}{': goes on' if begun else ''}", flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "cell.json", record)
            began = time.perf_counter()
            with open(folder.with_name(f"{folder.name}.log"), "a", encoding="utf-8") as log:
                command = [sys.executable, str(ROOT / cell.script), *map(str, arguments)]
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self.environment())
                self.running.add(process)
                status = process.wait()
                self.running.remove(process)
            taken = time.perf_counter() - began
            record |= {"seconds": record["seconds"] + taken, "finished": status == 0}
            write_json(folder / "cell.json", record)
            self._tell(cell, status, taken)

    def environment(self) -> dict[str, str]:
        """That of a cell's process: several at a time share the cores out, or each would wait for all of them."""
        share = max(1, (os.cpu_count() or 1) // self.jobs)
        return ({"OMP_NUM_THREADS": str(share)} if self.jobs > 1 else {}) | os.environ

    def _tell(self, cell: Cell, status: int, seconds: float) -> None:
        with self.lock:
            self.stopped |= status == 130
            if status == 0:
                print(f"{time.strftime('%H:%M')} {cell.name} done, {seconds / 60:.0f} min", flush=True)
                write_table(self.out)
            elif status != 130:
                self.undone.append(cell.name)
                log = f"{self.out / cell.name}.log"
                print(f"{cell.name} failed, status {status}: see {log}", file=sys.stderr, flush=True)


def tokenize(cells: list[Cell], datasets: dict[str, Path], cache: Path) -> None:
    """The token stores of these cells, each once, before several of them want the same one at a time."""
    views = {(dataset, None, False) for cell in cells for dataset in cell.splits if cell.script == "train.py"}
    for cell in cells:
        if cell.script == "finetune.py":
            task = tasks.TASKS[TASKS[cell.name.split("/")[0]][0]]
            views |= {(dataset, task.view, task.level == "note") for dataset in cell.splits}
    for dataset, view, origins in views:
        data.tokenized(datasets[dataset], ENCODING, cache, view, origins)


def collect(out: Path) -> dict:
    """The figures of all finished fine-tunings: {task: {"arms": {arm: …}, "baselines": …}}; see `arm_figures`."""
    table = {}
    for name, (task, _, published) in TASKS.items():
        level = tasks.TASKS[task].level
        arms, report = {}, {}
        for start, training in ARMS:
            folders = sorted((out / name).glob(f"{start}-{training}-[0-9]*/"))
            reports = [folder / "report.json" for folder in folders if (folder / "report.json").exists()]
            if reports:
                arms[f"{start}, {training}"] = arm_figures(reports, level)
                report = read_json(reports[0])
        if arms:
            about = {"level": level, "classes": report["classes"], "published": published}
            about |= {"differences": differences(arms, level)}
            table[name] = about | {"arms": arms, "baselines": report["baselines"]}
    return table


def arm_figures(reports: list[Path], level: str) -> dict:
    """Mean and deviation over the seeds of one arm, the sum of its confusions, right answers by seed and test piece."""
    results = [json.loads(report.read_text())["trainings"][0] for report in reports]
    folders = [
        report.parent / f"{result['arm']}-{result['seed']}" for report, result in zip(reports, results, strict=True)
    ]
    right = [compare.hits(folder / "test.npz", level) for folder in folders]
    figures = {"seeds": [result["seed"] for result in results]}
    figures["best_epoch"] = spread([result["best_epoch"] for result in results])
    figures["valid"] = spread([result["valid"]["accuracy"] for result in results])
    for unit in LEVELS[level]:
        figures[unit] = {name: spread([result["test"][unit][name] for result in results]) for name in FIGURES}
        figures[unit]["confusion"] = np.sum([result["test"][unit]["confusion"] for result in results], axis=0).tolist()
        figures[unit]["hits"] = [each[unit][0].tolist() for each in right]
        figures[unit]["counts"] = right[0][unit][1].tolist()
    return figures


def differences(arms: dict, level: str) -> list[dict]:
    """The answers to QUESTIONS whose arms are there, by paired bootstrap over test pieces and seeds."""
    found = []
    for question, arm, other in QUESTIONS:
        if arm in arms and other in arms:
            answer = {"question": question, "with": arm, "without": other}
            for unit in LEVELS[level]:
                hits = (np.array(arms[name][unit]["hits"]) for name in (arm, other))
                answer[unit] = compare.bootstrap(*hits, np.array(arms[arm][unit]["counts"]))._asdict()
            found.append(answer)
    return found


def measure_bias(out: Path, datasets: dict[str, Path], lists: dict[str, Path], pieces: int) -> None:
    """OUT/bias.json: recovery by frequency and marginals at hopeless notes of all finished pre-trainings.

    Of so many test pieces of all data sets, the same for each run; hopeless is what the adversarial run's masker says.
    Measured again if a run has come.
    """
    records = {name: read_json(out / "pretrain" / name / "cell.json") for name in PRETRAINING}
    starts = [name for name, record in records.items() if record.get("finished")]
    if "adversarial" not in starts or list(read_json(out / "bias.json").get("runs", [])) == starts:
        return
    roles = splits.read_splits(lists.values())
    files = [pair for folder in datasets.values() for pair in tokenizer.find_midi(folder)[0]]
    files = [str(file) for name, file in files if splits.role_of(name, roles) == "test"]
    if not files:
        return
    print("bias of the pre-trained models …", flush=True)
    chosen = [files[number] for number in np.linspace(0, len(files) - 1, min(pieces, len(files))).astype(int)]
    encoding, hopeless, figures = tokenizer.load(ENCODING), None, {}
    for name in sorted(starts, key="adversarial".__ne__):  # first it, whose masker says which notes are hopeless
        trained = inference.load(out / "pretrain" / name)
        view = inspection.join([inspection.inspect(trained, trained.encode(file), chances=True) for file in chosen])
        hopeless = inspection.most_hopeless(view.scores) if hopeless is None else hopeless
        figures[name] = {
            "recovery_by_frequency": inspection.recovery_by_frequency(view.true, view.recovered, encoding).tolist(),
            "marginal_distance": inspection.marginal_distance(view.true, view.chances, encoding).tolist(),
            "marginal_distance_hopeless": inspection.marginal_distance(
                view.true[hopeless], view.chances[hopeless], encoding
            ).tolist(),
        }
    fields, runs = [field.name for field in encoding.fields], {name: figures[name] for name in starts}
    measured = {"pieces": len(chosen), "notes": len(hopeless), "fields": fields, "runs": runs}
    write_json(out / "bias.json", measured)


def markdown(table: dict, seconds: dict) -> str:
    """The table of results.md."""
    lines = []
    for name, found in table.items():
        units = LEVELS[found["level"]]
        head = [f"{unit}, {figure}" for unit in units for figure in ("accuracy", "F1")]
        head = ["pre-training, fine-tuning", "seeds", "best epoch", f"valid, {units[0]}", *head]
        lines += [f"### {name}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for arm, figures in found["arms"].items():
            cells = [str(len(figures["seeds"])), f"{figures['best_epoch']['mean']:.0f}", percent(figures["valid"])]
            cells += [percent(figures[unit][figure]) for unit in units for figure in FIGURES]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
        for baseline, figures in found["baselines"].items():
            if figures:
                cells = [f"{100 * figures[unit][figure]:.1f} %" for unit in units for figure in FIGURES]
                lines.append(f"| *{baseline}* | | | | {' | '.join(cells)} |")
        if found["published"]:
            cells = [f"{found['published'][unit]:.1f} % |" if unit in found["published"] else "|" for unit in units]
            lines.append(f"| *published* | | | | {' | '.join(cells)} |")
        lines += ["", *gap_lines(found["differences"], units), ""]
    hours = sum(seconds.values()) / 3600
    lines.append(
        f"{len(seconds)} runs, {hours:.1f} machine hours (processes, as many cores each as were given to them)."
    )
    return "\n".join(lines) + "\n"


def bias_markdown(measured: dict) -> str:
    """The bias of bias.json as a table: rarest and commonest tenth, and the distance of the marginals."""
    head = ["field", *(f"{run}, {what}" for run in measured["runs"] for what in ("rarest", "commonest", "distance"))]
    lines = [f"### bias: {measured['pieces']} test pieces, {measured['notes']:,} notes", ""]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row, field in enumerate(measured["fields"]):
        cells = []
        for run in measured["runs"].values():
            tenths = run["recovery_by_frequency"][row]
            cells += [f"{tenths[0]:.1%}", f"{tenths[-1]:.1%}", f"{run['marginal_distance_hopeless'][row]:.3f}"]
        lines.append(f"| {field} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", ""])


def gap_lines(answers: list[dict], units: tuple[str, ...]) -> list[str]:
    """The differences as a table: points of accuracy, 95 % interval, p."""
    head = ["what it gives, in points", "between", *units]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)] if answers else []
    for answer in answers:
        gaps = [gap_text(answer[unit]) for unit in units]
        lines.append(f"| {answer['question']} | {answer['with']} – {answer['without']} | {' | '.join(gaps)} |")
    return lines


def gap_text(gap: dict) -> str:
    """`-2.1 (-5.0 … 0.8), p = 0.16`."""
    low, mean, high = (100 * gap[key] for key in ("low", "mean", "high"))
    chance = "p < 0.01" if gap["p"] < 0.01 else f"p = {gap['p']:.2f}"
    return f"{mean:+.1f} ({low:+.1f} … {high:+.1f}), {chance}"


def read_json(file: Path) -> dict:
    """The content of a file of ours; empty if there is none yet."""
    return json.loads(file.read_text()) if file.exists() else {}


def write_table(out: Path) -> None:
    """results.json, results.md and the pictures, from what is finished."""
    table, measured = collect(out), read_json(out / "bias.json")
    records = {str(file.parent.relative_to(out)): read_json(file) for file in sorted(out.glob("*/*/cell.json"))}
    seconds = {name: record["seconds"] for name, record in records.items() if record["finished"]}
    write_json(out / "results.json", {"tasks": table, "bias": measured, "seconds": seconds})
    with writing(out / "results.md") as file:
        file.write(((bias_markdown(measured) if measured else "") + markdown(table, seconds)).encode())
    runs = {name: out / "pretrain" / name / "metrics.jsonl" for name in PRETRAINING}
    plots.draw_results(table, out / "results.png")
    best = {name: max(task["arms"].items(), key=lambda arm: arm[1]["valid"]["mean"]) for name, task in table.items()}
    unit = {name: LEVELS[task["level"]][-1] for name, task in table.items()}
    confusions = {
        f"{name}: {arm}; test {unit[name]}": (figures[unit[name]]["confusion"], table[name]["classes"])
        for name, (arm, figures) in best.items()
    }
    plots.draw_confusions(confusions, out / "confusion.png")
    runs = {name: file for name, file in runs.items() if file.exists()}
    plots.curves(runs, plots.VALIDATION, out / "pretraining.png")
    if measured:
        plots.draw_bias(measured, out / "bias.png")


@contextmanager
def alone(out: Path):
    """Nobody else works in `out` meanwhile, or two would write one file at once. Raises ValueError if somebody does."""
    with open(out / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another reproduce.py works in {out}: --jobs N is how several cells run at a time"
            raise ValueError(message) from None
        yield


def run_cells(args: argparse.Namespace) -> list[str]:
    """Run what is asked for and not finished, pre-trainings first: the names of the cells that were not done."""
    datasets = find_datasets(args.data)
    lists = find_splits(args, datasets)
    runner = Runner(args.out, args.jobs)
    cells = all_cells(args, datasets, lists)
    chosen = [cell for cell in cells if any(fnmatch(cell.name, pattern) for pattern in args.only or ["*"])]
    if not chosen:
        raise ValueError(f"no cell matches {' '.join(args.only)}; they are called like {cells[-1].name}")
    tokenize(runner.waiting(chosen), datasets, args.out / "cache")
    runner.run(chosen)
    measure_bias(args.out, datasets, lists, max(4, round(48 * min(args.budget, 1))))
    return runner.undone


def main() -> int:
    args = parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with alone(args.out):
            undone = [] if args.table else run_cells(args)
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
