"""`python -m benchmarks NAME [options]`: run one of the measurements; `--help` after the name lists its options."""

import importlib
import sys

MEASUREMENTS = ("tokenizer", "kernels", "step", "inference", "scale", "report")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in MEASUREMENTS:
        sys.exit(f"usage: python -m benchmarks {{{','.join(MEASUREMENTS)}}} [options]")
    try:
        importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks: {error}")
