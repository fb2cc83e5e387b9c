"""Print lines, tokens and long functions of the Python files; exit with 1 where they are beyond the budget.

The numbers are lowered with the code. Raising one takes a line in the commit message that says why.
"""

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

# where the code is; it is to come down to 8,800 lines, 78,000 tokens and 6,200 lines of tests
LINES, TOKENS, TEST_LINES, AMB_FILES = 9_804, 87_916, 6_200, 22
LONGEST, LONGEST_MAIN, LONGEST_KERNEL = 60, 90, 120
NOT_COUNTED = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
}  # fmt: skip


def long_functions(tree: ast.Module) -> list[str]:
    """`name: lines` of every function longer than its kind may be."""
    long = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            limit = LONGEST_KERNEL if kernel else LONGEST_MAIN if node.name == "main" else LONGEST
            size = node.end_lineno - node.lineno + 1
            long += [f"{node.name}: {size} lines, at most {limit}"] if size > limit else []
    return long


def main() -> int:
    root = Path(__file__).parents[1]
    names = subprocess.run(["git", "-C", root, "ls-files", "*.py"], capture_output=True, text=True, check=True).stdout
    lines, tokens, files, long = Counter(), Counter(), Counter(), []
    for name in names.split():
        text, folder = (root / name).read_text(encoding="utf-8"), name.split("/")[0] if "/" in name else "scripts"
        lines[folder] += text.count("\n")
        files[folder] += 1
        if folder != "tests":
            read = tokenize.generate_tokens(io.StringIO(text).readline)
            tokens[folder] += sum(token.type not in NOT_COUNTED for token in read)
            long += [f"{name}: {line}" for line in long_functions(ast.parse(text))]
    for folder in sorted(lines):
        print(f"{folder:<12}{files[folder]:>4} files{lines[folder]:>8,} lines{tokens[folder]:>9,} tokens")
    tests = lines.pop("tests")
    totals = {
        "lines outside tests": (lines.total(), LINES), "tokens outside tests": (tokens.total(), TOKENS),
        "lines of tests": (tests, TEST_LINES), "files of amb": (files["amb"], AMB_FILES),
    }  # fmt: skip
    for what, (count, limit) in totals.items():
        print(f"{what}: {count:,} of {limit:,}")
    print(*long, sep="\n")
    return int(bool(long) or any(count > limit for count, limit in totals.values()))


if __name__ == "__main__":
    sys.exit(main())
