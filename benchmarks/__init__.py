"""Side-by-side measurements: `python -m benchmarks tokenizer | kernels | step | device | pack | report`.

Nothing else imports this package. The peers come with `pip install -e ".[bench]"`.
"""
