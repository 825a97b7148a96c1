"""From datasets to batches: loaders that survive what their processes meet."""

import itertools
import logging
import multiprocessing.queues
import multiprocessing.util
import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from ..utils.config import ConfigError
from ..utils.errors import UserError
from ..utils.processes import gathered, rank, world_size
from .batch import Batch, chosen_to_validate, collate
from .images import BrokenFile
from .sampler import GlobalBatchSampler

logger = logging.getLogger(__name__)


class LoaderError(UserError, RuntimeError):
    """The processes that load images cannot hand over their batches, or died."""


class _Unsent(NamedTuple):
    """What a worker sends in place of a batch that it could not put into shared memory."""

    reason: str


def _send_reason(queue: multiprocessing.queues.Queue, error: Exception, item: tuple) -> None:
    """Send the reason in place of the batch; by default it is printed and the training process waits for ever."""
    queue.put((item[0], _Unsent(str(error))))


def _end_if_asked() -> None:
    """Wait for a SIGTERM of the training process, and end."""
    training_process = multiprocessing.parent_process().pid
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != training_process:
        pass
    os._exit(0)


def _prepare_worker(worker_id: int) -> None:
    """Let a loader's process report batches that it cannot send, and leave stop signals to the training process.

    Those go to a whole group of processes, and the training process needs its batches to act on them.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_reason
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS cannot tell whose a signal is
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_if_asked, daemon=True).start()


def _end(workers: list[multiprocessing.Process]) -> None:
    """End processes, also one that is stopped (SIGSTOP, a stalled network disk), for which Python would wait at the
    exit for ever."""
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(1)
        worker.kill()


# Parts of what PyTorch and Python say where descriptors or shared memory are used up, or a process was killed; what to
# do then.
_ADVICE = {
    "too many open files|items of ancdata": "too many files are open. Raise the limit in the shell (ulimit -n)",
    "shared memory|bus error|unable to resize file|no space left on device": (
        "there is no room in the shared memory (/dev/shm). Give a container more (docker run --shm-size=8g)"
    ),
    "exited unexpectedly|killed by signal|connectionreset|connectionrefused|eoferror": (
        "one of them was killed, perhaps for want of memory. Give the machine or the container more"
    ),
}


class BatchLoader(DataLoader):
    """A DataLoader that says what to do where its processes cannot hand over their batches, or died.

    Iterating raises LoaderError then. A batch that is kept holds one file descriptor for each of its large tensors.
    """

    def __init__(self, dataset: Dataset, *arguments: Any, **settings: Any):
        super().__init__(dataset, *arguments, worker_init_fn=_prepare_worker, **settings)

    def _get_iterator(self) -> Any:
        iterator = super()._get_iterator()
        if self.num_workers > 0:
            # Also at the exit; and as part of a cycle of garbage the iterator has lost its queues when it wants to tell
            # the workers to end.
            multiprocessing.util.Finalize(iterator, _end, [iterator._workers], exitpriority=1)
            if threading.current_thread() is threading.main_thread():
                # PyTorch would raise the death of a worker anywhere in the program; the wait for its batch finds it too
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return iterator

    def __iter__(self) -> Iterator:
        try:
            for batch in super().__iter__():
                if isinstance(batch, _Unsent):
                    raise RuntimeError(batch.reason)
                yield batch.map(_unshared) if isinstance(batch, Batch) else batch
        except (RuntimeError, OSError, EOFError) as error:
            text = f"{type(error).__name__}: {error}"
            if isinstance(error, UserError):  # a worker's comes with its traceback, the message last
                raise type(error)(text.rpartition(f"{type(error).__name__}: ")[2].strip()) from error
            advice = next((advice for parts, advice in _ADVICE.items() if re.search(parts, text.lower())), None)
            if self.num_workers == 0 or advice is None:
                raise
            raise LoaderError(
                f"the processes that load images cannot go on: {advice}, or lower num_workers (now {self.num_workers}; "
                "0 loads in the training process)"
            ) from error


def end_workers(loader: DataLoader) -> None:
    """End a loader's processes; its next iteration starts others."""
    if isinstance(loader, BatchLoader):
        loader._iterator = None


def _unshared(tensor: torch.Tensor) -> torch.Tensor:
    """A small tensor out of the shared memory, where each costs a file descriptor; a large one as it is."""
    return tensor.clone() if tensor.ndim == 1 and tensor.is_shared() else tensor


def build_loader(
    dataset: Dataset, sampler: GlobalBatchSampler, num_workers: int, device: str | torch.device
) -> DataLoader:
    """A loader of the sampler's micro-batches, collated; pinned memory on CUDA only.

    Batches do not depend on `num_workers`. PyTorch gives each worker one thread. With workers, up to two batches per
    worker are read ahead.
    """
    return BatchLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=getattr(dataset, "collate", collate),
        pin_memory=torch.device(device).type == "cuda",
        persistent_workers=num_workers > 0,
        prefetch_factor=2 if num_workers > 0 else None,
        generator=torch.Generator(),  # else every epoch would draw the workers' seed from the global random state
    )


def build_loaders(
    config: Any, train_dataset: Dataset, val_dataset: Dataset | None, device: str | torch.device
) -> tuple[DataLoader, DataLoader | None]:
    """The loaders of a configuration: training batches by address, and batches of the images that each validation
    takes (None without a dataset)."""
    processes = dict(rank=rank(), world_size=world_size())
    sampler = GlobalBatchSampler(
        len(train_dataset), config.batch_size, config.accumulation(world_size()), seed=config.seed, **processes
    )
    train_loader = build_loader(train_dataset, sampler, config.num_workers, device)
    if val_dataset is None:
        return train_loader, None
    sampler = GlobalBatchSampler(
        chosen_to_validate(config.n_val_images(len(val_dataset)), len(val_dataset)),
        config.val_batch_size or config.batch_size,
        shuffle=False,
        **processes,
    )
    return train_loader, build_loader(val_dataset, sampler, config.num_workers, device)


def check_loader(loader: DataLoader, global_batch_size: int) -> None:
    """Raise ConfigError unless a training loader serves an optimizer step with so many images of all processes."""
    sampler = loader.batch_sampler
    if isinstance(sampler, GlobalBatchSampler):
        if sampler.global_batch_size != global_batch_size:
            raise ConfigError(
                f"the training loader gives {sampler.global_batch_size} images an optimizer step, but the settings "
                f"{global_batch_size}: build both from one config"
            )
    elif world_size() > 1:
        raise ConfigError("with several processes the loaders are those of flextok.data.loader.build_loaders")


def image_names(dataset: Dataset, indices: Iterable[int]) -> list[str]:
    """What a person finds images by: their names, or numbers if the dataset has no names."""
    name = getattr(getattr(dataset, "dataset", dataset), "name", "number {}".format)
    return [name(i) for i in indices]


class TooManyBrokenFiles(UserError, RuntimeError):
    """More image files cannot be read than a run tolerates."""


class BrokenFiles:
    """Counts the different files that could not be read, and names each once in the log, with the reason.

    More than 1 % of the dataset's files stop the run; one file never does, however small the dataset.

    Args:
        n_images: Images in the dataset.
    """

    def __init__(self, n_images: int):
        self.n_images = n_images
        self.reasons: dict[str, str] = {}  # by path
        self._new: list[BrokenFile] = []

    @property
    def count(self) -> int:
        return len(self.reasons)

    def note(self, files: Iterable[BrokenFile]) -> None:
        """Take note of a batch's `broken` files."""
        self._new += files

    def report(self) -> None:
        """`add` what all processes have noted; each of them has to call this."""
        new, self._new = self._new, []
        self.add(itertools.chain(*gathered(new)))

    def add(self, files: Iterable[BrokenFile]) -> None:
        """Name and count files.

        Raises:
            TooManyBrokenFiles: With them, more than max(1, 1 % of the images) are broken.
        """
        for path, reason, _ in files:
            if path not in self.reasons:
                self.reasons[path] = reason
                logger.warning("cannot read the image %s: %s; another takes its place", path, reason)
        if self.count > max(1, self.n_images / 100):
            shown = "\n".join(f"{path}: {reason}" for path, reason in list(self.reasons.items())[:20])
            more = f"\nand {self.count - 20} more" if self.count > 20 else ""
            raise TooManyBrokenFiles(
                f"{self.count} of {self.n_images} images cannot be read, more than 1 %: "
                f"repair or remove them, then start again\n{shown}{more}"
            )
