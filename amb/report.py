"""The report of a fine-tuning run: figures by seed, mean and deviation, baselines beside; as JSON and as a table."""

from pathlib import Path

import numpy as np

LEVELS = {"note": ("notes",), "sequence": ("segments", "pieces")}
FIGURES = ("accuracy", "macro_f1")


def summarise(about: dict, results: list[dict], best: dict, baselines: dict) -> dict:
    """Everything report.json holds. `arms`: test figures over the seeds, mean and (n - 1) deviation."""
    arms = {}
    for arm in dict.fromkeys(result["arm"] for result in results):
        own = [result for result in results if result["arm"] == arm]
        epochs = [result["best_epoch"] for result in own]
        arms[arm] = {"seeds": len(own), "best_epoch": spread(epochs)}
        for unit in LEVELS[about["level"]]:
            arms[arm][unit] = {name: spread([result["test"][unit][name] for result in own]) for name in FIGURES}
    kept = {"arm": best["arm"], "seed": best["seed"]}
    return {**about, "arms": arms, "baselines": baselines, "model": kept, "trainings": results}


def spread(values: list[float]) -> dict:
    """Mean and deviation of a sample; the deviation of a single value is None."""
    return {"mean": float(np.mean(values)), "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def kept_training(report: dict) -> dict:
    """The training whose weights are model.pt."""
    return next(t for t in report["trainings"] if all(t[key] == value for key, value in report["model"].items()))


def print_report(run: Path, report: dict) -> None:
    """The test figures as a table, the kept model's classes, and where to look further."""
    units = LEVELS[report["level"]]
    columns = [(unit, name) for unit in units for name in FIGURES]
    print(f"\n{report['task']}, test set: {report['pieces']['test']} pieces; clean input, nothing masked")
    print(f"{'':<22}" + "".join(f"{unit + ' ' + name.replace('macro_f1', 'F1'):>20}" for unit, name in columns))
    for arm, figures in report["arms"].items():
        seeds = f"{arm}, {figures['seeds']} seed{'s' * (figures['seeds'] > 1)}"
        print(f"{seeds:<22}" + "".join(f"{percent(figures[unit][name]):>20}" for unit, name in columns))
    for name, figures in report["baselines"].items():
        if figures is not None:
            print(f"{name:<22}" + "".join(f"{figures[unit][figure]:>20.1%}" for unit, figure in columns))
    if "trees" in report["baselines"] and report["baselines"]["trees"] is None:
        print("trees: not measured; pip install scikit-learn (the extra `baselines`)")
    kept = kept_training(report)
    print(
        f"kept: {run / 'model.pt'} ({kept['arm']}, seed {kept['seed']}, epoch {kept['best_epoch']} of {kept['epochs']})"
    )
    print(f"{units[-1] + ':':<22}{'precision':>10}{'recall':>10}{'F1':>10}{'count':>10}")
    for name, row in kept["test"][units[-1]]["classes"].items():
        print(f"{name[:21]:<22}{row['precision']:>10.1%}{row['recall']:>10.1%}{row['f1']:>10.1%}{row['count']:>10,}")
    print(
        f"more: {run / 'report.json'}" + (f", {run}/curves.png, confusion.png" if (run / "curves.png").exists() else "")
    )
    for name, figures in report["baselines"].items():
        for unit in units:
            if figures is not None and kept["test"][unit]["accuracy"] <= figures[unit]["accuracy"]:
                print(f"the model kept is NOT better than the {name} baseline by {unit}")


def percent(value: dict) -> str:
    """`81.2 ± 0.4 %`, or without deviation."""
    deviation = "" if value["deviation"] is None else f" ± {100 * value['deviation']:.1f}"
    return f"{100 * value['mean']:.1f}{deviation} %"
