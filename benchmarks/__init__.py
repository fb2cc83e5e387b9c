"""Side-by-side measurements: `python -m benchmarks tokenizer | kernels | step`, all that a GPU
is asked for in `device`, and `report` of the results.

Never imported by anything else. The peers come with `pip install -e ".[bench]"`.
"""
