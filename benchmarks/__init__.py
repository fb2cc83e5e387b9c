"""Side-by-side measurements: `python -m benchmarks tokenizer | kernels | step`, and `report` of their results.

Never imported by anything else. The peers come with `pip install -e ".[bench]"`.
"""
