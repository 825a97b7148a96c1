"""How much memory a process takes at most, by device."""

import os
import threading
import weakref
from pathlib import Path

import torch

STATM = Path("/proc/self/statm")  # of Linux: sizes in pages, the second is what is resident, the third its mapped files
SECONDS = 0.05  # between two looks


class PeakMemory:
    """The most memory in use since this object was made.

    On CUDA: what PyTorch's allocator has handed out on the device. On CPUs: the process's own memory, to which pages of
    mapped files (weights, caches) and shared memory do not count; looked at every 50 ms by a thread, on Linux only.
    """

    def __init__(self, device: torch.device):
        self.device, self._peak, is_over = device, [0], threading.Event()
        if device.type == "cuda":
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(device)
        elif STATM.exists():
            weakref.finalize(self, is_over.set)
            threading.Thread(target=_watch, args=(self._peak, is_over), daemon=True).start()

    def read(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if not STATM.exists():
            return None
        _look(self._peak)
        return self._peak[0]


def _look(peak: list[int]) -> None:
    _, resident, of_files, *_ = map(int, STATM.read_text().split())
    peak[0] = max(peak[0], (resident - of_files) * os.sysconf("SC_PAGE_SIZE"))


def _watch(peak: list[int], is_over: threading.Event) -> None:
    while not is_over.wait(SECONDS):
        _look(peak)
