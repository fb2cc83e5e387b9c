"""Side-by-side measurements: `python -m benchmarks tokenizer | attention | step`. Never imported by anything."""
