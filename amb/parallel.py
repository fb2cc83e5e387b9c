"""Several processes that train as one: each computes its rows of every batch, and sums are taken over all of them.

    torchrun --standalone --nproc_per_node=8 train.py --config base …

torchrun starts one process per GPU and says which is which in RANK, WORLD_SIZE and LOCAL_RANK. Without these there is a
world of one, and nothing below does anything. A batch stays the whole batch: losses are divided by counts over all of
it, so that the SUM of the processes' losses and gradients is what one process would compute, up to the order of
additions. CUDA tensors are summed by NCCL in the GPU's stream, which no process waits for, CPU tensors by Gloo.

No DistributedDataParallel: it takes means where we need sums, and wraps one forward of one module, where a step here
runs the encoder twice and keeps its heads outside.

Rows of a batch that are computed apart, here or in turns by one process, are told from each other by `first_row`, where
they begin in the batch: what they draw at random depends on that.

Two rules keep processes together. All go through the same loops as often: a process whose share of a batch is empty
computes with no rows. And only the leader, rank 0, writes files and prints. If one process ends, so do all: each waits
for the last word of its left neighbour, and where a connection closes without one, that neighbour has died.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

rank, size, local_rank = 0, 1, 0

MEETING = timedelta(minutes=10)  # all must have come by then
PATIENCE = timedelta(days=7)  # the others may wait for the leader to tokenize; a death is noticed at once, not by this
BUCKET = 1 << 23  # numbers summed at a time: of the gradients, no more than this is in memory twice
FINISHED, FAILED = 1, 2  # last words: all is well; it is not, and the reason has been printed
_listener, _neighbours, _ending = None, None, threading.Lock()


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that the environment speaks of until the block ends; leave when all have come there.

    Raises ValueError, in one line, if the environment is incomplete or the others cannot be met.
    """
    global rank, size, local_rank, _listener, _neighbours
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        store, me, all_of_us = next(dist.rendezvous("env://", timeout=MEETING))
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        dist.init_process_group(backend, store=store, rank=me, world_size=all_of_us, timeout=PATIENCE)
        _neighbours = dist.new_group(backend="gloo", timeout=PATIENCE)
    except RuntimeError as error:
        raise ValueError(f"the processes did not meet: {str(error).splitlines()[0]}") from None
    rank, size, local_rank = me, all_of_us, int(os.environ.get("LOCAL_RANK", me))
    if not leads():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    _listener = threading.Thread(target=_listen, daemon=True)
    _listener.start()
    yield
    _tell(FINISHED)
    _listener.join()
    dist.destroy_process_group()


def leads() -> bool:
    """Whether this is the process that writes and prints."""
    return rank == 0


def share(count: int) -> slice:
    """Which rows of a batch of `count` are this process's; none, where there are more processes than rows."""
    return slice(count * rank // size, count * (rank + 1) // size)


def add(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors, in place; the same bits in each."""
    if size > 1:
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            _lost(error)
    return tensor


def totals(*tensors: Tensor) -> list[Tensor]:
    """Sums of several small tensors over all processes, in one exchange; shapes and dtypes stay."""
    if size == 1:
        return list(tensors)
    flat = add(torch.cat([tensor.detach().double().flatten() for tensor in tensors]))
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Put the sum over all processes in place of each gradient.

    A parameter without one must be without one everywhere: what has gradients depends on the settings, not on the data.
    """
    bucket = []
    for parameter in [p for p in parameters if size > 1 and p.grad is not None]:
        bucket.append(parameter)
        if sum(p.numel() for p in bucket) >= BUCKET:
            _sum_bucket(bucket)
            bucket = []
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(bucket: list[Tensor]) -> None:
    flat = add(torch.cat([parameter.grad.flatten() for parameter in bucket]))
    for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
        parameter.grad = part.view_as(parameter)


def any_of(flag: bool) -> bool:
    """Whether any process says so: the same answer in all of them. Hosts wait for each other, not for their GPUs."""
    return flag if size == 1 else bool(add(torch.tensor(int(flag))))


def once(function: Callable, *arguments: Any) -> Any:
    """What `function(*arguments)` returns in the leader, which alone calls it. The result must be small."""
    result = [function(*arguments) if leads() else None]
    if size > 1:
        try:
            dist.broadcast_object_list(result, device=torch.device("cpu"))
        except RuntimeError as error:
            _lost(error)
    return result[0]


@contextmanager
def leader_first() -> Iterator[None]:
    """The leader goes through the block before the others, who find on the disk what it has put there."""
    if not leads():
        any_of(False)
    yield
    if leads():
        any_of(False)


def fail(message: str, status: int) -> int:
    """Print a line to stderr, unless another process has said it, and return the exit status.

    In a larger world this does not return: the process ends at once, whatever its GPU is waiting for.
    """
    if size > 1:
        if not leads():
            _listener.join(3)  # what goes wrong everywhere is the leader's to tell
        _end(message, status)
    print(message, file=sys.stderr)
    return status


def _listen() -> None:
    """Wait for the left neighbour's last word, and end as it did."""
    word = torch.zeros(1)
    try:
        dist.recv(word, (rank - 1) % size, group=_neighbours)
    except RuntimeError as error:
        _end(_died(error), 1)
    if word != FINISHED:
        _end(None, 1)


def _tell(word: int) -> None:
    """Say the last word to the right neighbour."""
    with suppress(RuntimeError):  # it may have ended first
        sent = dist.isend(torch.full((1,), float(word)), (rank + 1) % size, group=_neighbours)
        sent.wait(timedelta(seconds=5))


def _lost(error: RuntimeError) -> None:
    """An exchange failed: the listener hears why and ends the process, unless nobody has died."""
    _listener.join(10)
    _end(_died(error), 1)


def _died(error: RuntimeError) -> str:
    reason = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]
    return (
        f"\n{Path(sys.argv[0]).name}: another of the {size} processes is lost, so all end ({reason}); "
        "--resume goes on from the last checkpoint"
    )


def _end(message: str | None, status: int) -> None:
    _ending.acquire()  # never released: the first thread to come here ends the process
    if message:
        print(message, file=sys.stderr, flush=True)
    _tell(FAILED)
    sys.stdout.flush()
    os._exit(status)
