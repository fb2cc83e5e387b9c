"""Several processes that train as one: each computes its rows of every batch, and sums are taken over all of them.

    torchrun --standalone --nproc_per_node=8 train.py --config base …

torchrun starts one process per GPU, sets RANK, WORLD_SIZE and LOCAL_RANK, and ends the others when one dies. Without
these variables there is one process, and the functions below do nothing. CUDA tensors are summed by NCCL, in the GPU's
stream, CPU tensors by Gloo.

Losses are divided by counts over the whole batch, so that the SUM of the processes' losses and gradients is what one
process would compute, up to the order of additions. DistributedDataParallel takes means, of one module's single
forward pass; a step here runs the encoder twice, so it is not used.

All processes run the same loops equally often: one whose share of a batch is empty computes with no rows. Only the
leader, rank 0, writes files and prints.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

rank, size, local_rank = 0, 1, 0

START_TIMEOUT = timedelta(minutes=10)
WAIT_TIMEOUT = timedelta(days=7)  # the others wait while the leader tokenizes


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, noticed by all processes where their state is whole. Its argument is the run's folder."""


def run_script(name: str, main: Callable[[Any], int], args: Any) -> int:
    """`main(args)` as one of torchrun's processes: the exit status. A user's mistake is one line on stderr and 2."""
    for stream in (sys.stdout, sys.stderr):  # file names may hold characters that a terminal cannot print
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with joined():
            try:
                return main(args)
            except Interrupted as run:
                print(f"interrupted; saved. Go on with: python {name} --resume {run}")
                return 130
    except (ValueError, OSError) as error:
        message, status = f"{name}: {error}", 2
    except KeyboardInterrupt:
        message, status = f"{name}: interrupted before training began; nothing to save", 130
    with suppress(KeyboardInterrupt):
        if not leads():
            time.sleep(3)  # an error of all processes is printed by the leader, and torchrun ends this one meanwhile
        print(message, file=sys.stderr, flush=True)
    if size > 1:
        sys.stdout.flush()
        os._exit(status)  # without waiting for exchanges that will never end
    return status


@contextmanager
def joined() -> Iterator[None]:
    """Join the process group of torchrun's environment variables; leave it when all processes reach the end.

    Raises ValueError, in one line, if the variables are incomplete or the group does not form.
    """
    global rank, size, local_rank
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=WAIT_TIMEOUT)
    except RuntimeError as error:
        raise ValueError(f"the processes did not connect: {str(error).splitlines()[0]}") from None
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    if not leads():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    yield
    any_of(False)
    dist.destroy_process_group()


def leads() -> bool:
    """Whether this is the process that writes and prints."""
    return rank == 0


def share(count: int) -> slice:
    """Which rows of a batch of `count` are this process's; none, where there are more processes than rows."""
    return slice(count * rank // size, count * (rank + 1) // size)


@contextmanager
def exchanging() -> Iterator[None]:
    """An error of an exchange becomes an OSError: another process has ended."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]
        raise OSError(f"another of the {size} processes has ended ({reason})") from None


def add(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors, in place; the same bits in each."""
    if size > 1:
        with exchanging():
            dist.all_reduce(tensor)
    return tensor


def totals(*tensors: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Sums of tensors over all processes, taken in `dtype` in one exchange; shapes and dtypes stay."""
    if size == 1:
        return list(tensors)
    flat = add(torch.cat([tensor.detach().to(dtype).flatten() for tensor in tensors]))
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Put the sum over all processes in place of each gradient.

    A parameter without one must be without one everywhere: what has gradients depends on the settings, not on the data.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if size > 1:
        for gradient, total in zip(gradients, totals(*gradients, dtype=torch.float32), strict=True):
            gradient.copy_(total)


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process: the same answer in all. The hosts wait for each other, not for GPUs."""
    return flag if size == 1 else bool(add(torch.tensor(int(flag))))


def once(function: Callable, *arguments: Any) -> Any:
    """The result of `function(*arguments)`, or its ValueError or OSError; the leader calls it and sends it to all."""
    outcome = [None, None]
    if leads():
        try:
            outcome[0] = function(*arguments)
        except (ValueError, OSError) as error:
            outcome[1] = error
    if size > 1:
        with exchanging():
            dist.broadcast_object_list(outcome, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def leader_first() -> Iterator[None]:
    """The leader goes through the block before the others, who then read what it has written."""
    if not leads():
        any_of(False)
    yield
    if leads():
        any_of(False)
