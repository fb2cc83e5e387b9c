"""Without a GPU, Triton kernels run in Triton's interpreter. It must be chosen before any kernel is decorated."""

import os

import torch

# one thread for small tensors, here and in the programs that tests start: pytest's workers share the cores
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("TRITON_INTERPRET") == "1":
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    # The interpreter holds bfloat16 as 16-bit integers, and (up to Triton 3.9 at least) its dot multiplies those.
    def widened(x: interpreter.TensorHandle) -> np.ndarray:
        return (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar == tl.bfloat16 else x.data

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(widened(a), widened(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
