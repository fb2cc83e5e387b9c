"""`train.py --cuda-graph`: a step recorded once and replayed, so that the host launches one thing, not hundreds.

What a step does must not depend on the host: seed, learning rate and data are tensors, and no shape changes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # steps as they are, in which kernels are compiled and the optimiser makes its state


def captured(step: Callable) -> Callable:
    """`step(*arguments)` as a graph: the first calls as they are, then recorded, then replayed on copied tensors.

    Calls whose tensors have other shapes, or whose other arguments differ, run as they are (an epoch's last, smaller
    batch). What a replay returns is valid until the next one.
    """
    graph, inputs, output, calls = torch.cuda.CUDAGraph(), None, None, 0
    side = torch.cuda.Stream()

    def alike(arguments: tuple) -> bool:
        return [_kind(a) for a in arguments] == [_kind(a) for a in inputs]

    def run(*arguments: Any) -> Any:
        nonlocal inputs, output, calls
        if calls < WARM_UP or (inputs is not None and not alike(arguments)):
            calls += 1
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                result = step(*arguments)
            torch.cuda.current_stream().wait_stream(side)
            return result
        if inputs is None:
            inputs = tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)
            with torch.cuda.graph(graph):
                output = step(*inputs)
        for own, given in zip(inputs, arguments, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given, non_blocking=True)
        graph.replay()
        return output

    return run


def _kind(argument: Any) -> Any:
    return (argument.shape, argument.dtype) if isinstance(argument, Tensor) else argument
