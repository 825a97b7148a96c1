"""The processes of a job that torchrun started; without it every function here is that of one process alone."""

import contextlib
import datetime
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import UserError

T = TypeVar("T")

TIMEOUT = datetime.timedelta(minutes=30)  # of one exchange: a checkpoint that one process writes must fit into it
LOAD_TIMEOUT = datetime.timedelta(hours=2)  # what one process may take to download while the others wait


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Be one of torchrun's processes inside the context, with NCCL on CUDA and Gloo on CPUs; else do nothing."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield
        return
    on_gpu = device.type == "cuda"
    settings = {"device_id": device} if on_gpu else {}  # NCCL then connects at once, and knows which GPU is whose
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT, **settings)
    try:
        yield
    finally:
        # Gloo's thread drops the tensors of the last exchange when it gets the interpreter's lock, which older versions
        # of PyTorch hold while they wait for the thread to end: give it a moment.
        time.sleep(0.1)
        dist.destroy_process_group()
        _loading_group.cache_clear()


@functools.cache
def _loading_group() -> dist.ProcessGroup:
    """A group of all processes whose exchanges may outlast the timeout of the training backend: for downloads."""
    return dist.new_group(backend="gloo", timeout=LOAD_TIMEOUT)


def from_first(function: Callable[[], T]) -> T:
    """What `function` gives in process 0, in all processes; a UserError or OSError there is raised in all."""
    if world_size() == 1:
        return function()
    outcome: list = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except (UserError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def largest(tensor: torch.Tensor) -> torch.Tensor:
    """The largest of each element over all processes."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def gathered(value: Any) -> list:
    """The values of all processes, in the order of their ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def load_one_process_first(load: Callable[[], T]) -> T:
    """Call `load` in local rank 0 of each node and then in the other processes, which find its downloads in the cache.

    Every process has to call this. A failure in one is raised in all, so that none is left waiting for it.

    Raises:
        UserError: If `load` failed in another process; in the process itself, what `load` raised.
    """
    if not is_distributed():
        return load()
    is_first = int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0
    result, error = None, None
    for is_turn_of_first in (True, False):
        if is_first == is_turn_of_first:
            try:
                result = load()
            except Exception as exception:
                error = exception
        failures = [None] * dist.get_world_size()
        dist.all_gather_object(
            failures, None if error is None else f"{type(error).__name__}: {error}", _loading_group()
        )
        if any(failures):
            break
    if error is not None:
        raise error
    for i, failure in enumerate(failures):
        if failure is not None:
            raise UserError(f"process {i} could not load what this run needs: {failure}")
    return result
