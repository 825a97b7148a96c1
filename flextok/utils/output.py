"""Output that cannot end a run: a closed pipe, a full disk under a log, a terminal that knows no UTF-8."""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tqdm.auto import tqdm

from .processes import rank


class SteadfastStream:
    """A text stream that drops what it cannot write; from the first failure on, everything."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._stream, method)(*arguments)
        except (OSError, ValueError):
            try:  # what is still buffered goes nowhere, also at the interpreter's end
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
            except (OSError, ValueError, AttributeError):
                pass
            return None

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")


def steadfast_output() -> None:
    """Let no failure of stdout or stderr end this program; characters that they lack become question marks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None:
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
            setattr(sys, name, SteadfastStream(stream))


def with_progress(batches: Iterable[torch.Tensor], n: int, title: str | None) -> Iterator[torch.Tensor]:
    """The batches, with a progress bar of n images while they are used; without a title there is none."""
    with tqdm(total=n, unit="img", desc=title, leave=False, dynamic_ncols=True, disable=not title or rank() > 0) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
