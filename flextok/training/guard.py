"""What lets a run end well: signals that ask it to stop, and flags of the device that are read a step late."""

import contextlib
import signal
import threading
import time
from typing import Any, List, Optional, Tuple

import torch


class AskedToStop(Exception):
    """A signal asked the run to stop in the midst of a validation or a picture, which may be left undone."""


class Stopped(Exception):
    """A signal asked the run to stop, and it has written a checkpoint; `exit_code` is 128 plus the signal's number."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


class StopRequest:
    """Notes SIGTERM and SIGINT instead of dying of them; a SIGINT more than a second later interrupts at once."""

    def __init__(self):
        self.signum: Optional[int] = None
        self._since = 0.0

    def _note(self, signum: int, frame: Any) -> None:
        if self.signum is None:
            self.signum, self._since = signum, time.monotonic()
        elif signum == signal.SIGINT and time.monotonic() - self._since > 1:  # not one that torchrun passes on
            raise KeyboardInterrupt

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


class LateFlags:
    """Brings a few numbers of each step from the device to the host, a step late: nothing waits for the step's end.

    The host then runs at most one step ahead of the device.
    """

    def __init__(self, n: int, device: torch.device):
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(2, n, pin_memory=on_gpu)
        self._values = self._host.numpy()  # the same memory
        self._events = [torch.cuda.Event() if on_gpu else None for _ in range(2)]
        self._slot = 0
        self._pending: Optional[Tuple[int, Any]] = None

    def exchange(self, flags: torch.Tensor, note: Any) -> Optional[Tuple[List[float], Any]]:
        """Send the flags [n] of a step on their way, with a note; returns those of the step before, if there is one."""
        previous = self.pop()
        self._slot = 1 - self._slot
        self._host[self._slot].copy_(flags, non_blocking=True)
        if self._events[self._slot] is not None:
            self._events[self._slot].record()
        self._pending = (self._slot, note)
        return previous

    def pop(self) -> Optional[Tuple[List[float], Any]]:
        """The flags that are on their way, and their note; waits for them."""
        if self._pending is None:
            return None
        slot, note = self._pending
        self._pending = None
        if self._events[slot] is not None:
            self._events[slot].synchronize()
        return self._values[slot].tolist(), note
