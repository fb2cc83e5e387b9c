"""Side-by-side measurements: `python -m benchmarks tokenizer | kernels | step | inference | scale`, and `report`.

Never imported by anything else. The peers come with `pip install -e ".[bench]"`.
"""
