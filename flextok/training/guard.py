"""What lets a run end well: steps that are not finite change nothing, and signals stop it with a checkpoint."""

import contextlib
import itertools
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ..utils.errors import UserError
from ..utils.processes import gathered, largest, world_size

log = logging.getLogger("flextok")


class AskedToStop(BaseException):
    """A signal asked the run to stop; no Exception, which code that reads images may catch."""


class Stopped(Exception):
    """A signal asked the run to stop, and it has written a checkpoint; `exit_code` is 128 plus the signal's number."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


class StopRequest:
    """Notes SIGTERM and SIGINT instead of dying of them; a SIGINT more than a second later interrupts at once."""

    def __init__(self):
        self.signum: int | None = None
        self._since = 0.0
        self._waiting = False

    def _note(self, signum: int, frame: Any) -> None:
        if self.signum is None:
            self.signum, self._since = signum, time.monotonic()
        elif signum == signal.SIGINT and time.monotonic() - self._since > 1:  # not one that torchrun passes on
            raise KeyboardInterrupt
        if self._waiting and world_size() == 1:
            raise AskedToStop

    @contextlib.contextmanager
    def listening(self):
        if threading.current_thread() is not threading.main_thread():  # others cannot set handlers
            yield
            return
        previous = {signum: signal.signal(signum, self._note) for signum in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
            self.signum = None  # whoever trains again, in a notebook, has not been asked to stop

    @contextlib.contextmanager
    def waiting(self):
        """While the run waits for a batch, which may never come, a signal raises AskedToStop at once.

        Not with several processes, of which the others may be in a step: there torchrun ends those that do not stop.
        """
        if self.signum is not None and world_size() == 1:
            raise AskedToStop
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def interruptible(self, batches: Iterable) -> Iterator:
        """The batches of a loader; a signal ends the wait for one that does not come."""
        batches = iter(batches)
        while True:
            with self.waiting():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def raise_if_set(self, device: torch.device) -> None:
        """Raise AskedToStop if any process was asked to stop; every process has to call this. Synchronizes."""
        asked = self.signum is not None
        if world_size() > 1:
            asked = bool(largest(torch.tensor(float(asked), device=device)))
        if asked:
            raise AskedToStop


class StepGuard:
    """Which steps are skipped because their loss or gradient is not finite, and whether a process was asked to stop.

    Both are decided on the device, for all processes at once, and read on the host one step late: nothing waits for a
    step's end, and the host runs at most one step ahead of the device.

    Args:
        device: Where the losses are.
        stop_request: This process's.
        max_nonfinite_steps: So many skipped steps in a row are let pass.
        scale: Gives the loss scale of fp16: while it is above 1, overflows are what it learns from.
    """

    def __init__(
        self,
        device: torch.device,
        stop_request: StopRequest,
        max_nonfinite_steps: int,
        scale: Callable[[], float] = lambda: 1.0,
    ):
        self.device, self.stop_request, self.max_nonfinite_steps = device, stop_request, max_nonfinite_steps
        self.scale = scale
        self.skipped, self.skipped_in_a_row = 0, 0
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(2, 2, pin_memory=on_gpu)
        self._events = [torch.cuda.Event() if on_gpu else None for _ in range(2)]
        self._flags = torch.zeros(2, device=device)
        self._pending: tuple[int, Callable[[], list[str]]] | None = None  # step and the names of its images

    def check(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """1 on the device if the step is to be skipped, in any process; else 0."""
        finite = loss.isfinite() & grad_norm.isfinite()
        stop = torch.full((), float(self.stop_request.signum is not None), device=self.device)
        self._flags = largest(torch.stack([1 - finite.float(), stop]))
        return self._flags[0]

    @contextlib.contextmanager
    def skipping(self, optimizer: torch.optim.Optimizer, skip: torch.Tensor):
        """Inside, a step of a fused optimizer leaves weights and moments as they are where `skip` is 1."""
        optimizer.found_inf = skip
        try:
            yield
        finally:
            del optimizer.found_inf

    def after_step(self, step: int, names: Callable[[], list[str]]) -> bool:
        """Read the flags of the step before, and send those of this one; returns whether a process was asked to stop.

        Args:
            step: Number of this step, from 1.
            names: Gives the names of this process's images in it.

        Raises:
            UserError: More than max_nonfinite_steps in a row.
        """
        stop = self.read()
        slot = step % 2
        self._host[slot].copy_(self._flags, non_blocking=True)
        if self._events[slot] is not None:
            self._events[slot].record(torch.cuda.current_stream(self.device))
        self._pending = (step, names)
        if world_size() == 1:  # nobody else has to agree
            stop = self.stop_request.signum is not None
        return stop

    def read(self) -> bool:
        """Wait for the flags that are on their way, and act on them, as `after_step` does."""
        if self._pending is None:
            return False
        (step, names), self._pending = self._pending, None
        if self._events[step % 2] is not None:
            self._events[step % 2].synchronize()
        skipped, stop = self._host[step % 2].tolist()
        if not skipped:
            self.skipped_in_a_row = 0
            return bool(stop)
        self.skipped += 1
        images = ", ".join(itertools.chain(*gathered(names()))) or "unknown"
        log.warning("step %d changed nothing: its loss or gradient is not finite; images: %s", step, images)
        if self.scale() <= 1:
            self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.max_nonfinite_steps:
            raise NotFinite(step, self.skipped_in_a_row, self.max_nonfinite_steps)
        return bool(stop)


class NotFinite(UserError):
    """Too many steps in a row were skipped, up to `step`; the first of them was `first`."""

    def __init__(self, step: int, n: int, limit: int):
        super().__init__(
            f"{n} steps in a row, up to step {step}, had a loss or gradient that is not finite (max_nonfinite_steps: "
            f"{limit})"
        )
        self.first = step - n + 1

    def advice(self, saved_step: int | None) -> str:
        """What to do, where the last checkpoint of the run is of a step (None: there is none)."""
        if saved_step is None or saved_step >= self.first:
            return "latest.pt is not from before: branch off an older one (--run-dir) with a smaller learning rate"
        return f"latest.pt, of step {saved_step}, is from before: go on from it with a smaller learning rate"
