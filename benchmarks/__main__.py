"""`python -m benchmarks NAME [options]`: run one of the measurements; `--help` after the name lists its options.

`python -m benchmarks report` prints all of benchmarks/results, and puts it between the marks of docs/benchmarks.md.
"""

import importlib
import json
import re
import sys
from pathlib import Path

from benchmarks.timing import text

MEASUREMENTS = ("tokenizer", "kernels", "step")
RESULTS = Path(__file__).parent / "results"
PAGE = RESULTS.parents[1] / "docs" / "benchmarks.md"
MARKS = "<!-- python -m benchmarks report -->", "<!-- end of report -->"


def report(folder: Path) -> str:
    """All tables of a folder's JSON files in Markdown, each file's with the machine it was measured on."""
    lines = []
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        machine = ", ".join(f"{key} {value}" for key, value in content["machine"].items())
        lines += [f"[{file.stem}](../benchmarks/results/{file.name}): {machine}", ""]
        for title, rows in content["tables"].items():
            lines += [f"**{title}**", "", text(rows), ""]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in (*MEASUREMENTS, "report"):
        sys.exit(f"usage: python -m benchmarks {{{','.join(MEASUREMENTS)},report}} [options]")
    try:
        if arguments[0] != "report":
            importlib.import_module(f"benchmarks.{arguments[0]}").main(arguments[1:])
            return
        tables = report(RESULTS)
        print(tables)
        before, after = (re.escape(mark) for mark in MARKS)
        page = PAGE.read_text(encoding="utf-8")
        new = f"{MARKS[0]}\n{tables}{MARKS[1]}"
        PAGE.write_text(re.sub(f"{before}.*{after}", lambda _: new, page, flags=re.DOTALL), encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
