"""`python -m benchmarks NAME [options]`: run one of the measurements; `--help` after the name lists its options."""

import sys

from benchmarks import attention, step, tokenizer

MEASUREMENTS = {"tokenizer": tokenizer.main, "attention": attention.main, "step": step.main}


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in MEASUREMENTS:
        sys.exit(f"usage: python -m benchmarks {{{','.join(MEASUREMENTS)}}} [options]")
    MEASUREMENTS[sys.argv[1]](sys.argv[2:])
