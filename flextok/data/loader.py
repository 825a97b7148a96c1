"""From datasets to batches: which image goes into which optimizer step, on which rank, in which micro-batch."""

import atexit
import logging
import math
import multiprocessing.queues
import resource
import signal
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..utils.config import ConfigError
from ..utils.errors import UserError
from ..utils.processes import rank, world_size
from ..utils.random import generator
from .batch import FILLER, Batch, collate
from .digits import Digits
from .images import BrokenFile, ImageFolderDataset, list_images, split_paths
from .photos import PhotoCrops

logger = logging.getLogger(__name__)

SPLIT_SEED = 0  # which images validate does not depend on the run's seed, so that runs of several seeds compare


class GlobalBatchSampler(Sampler):
    """Batch sampler that gives every image of an epoch an address: (optimizer step, position in its global batch).

    One optimizer step takes a window of G = batch_size * accumulation * world_size images of the epoch's permutation.
    A window is divided contiguously, first into micro-batches, then into ranks, so the addresses depend on G alone and
    not on how it is factored. The last window of an epoch may be smaller; it is divided as evenly as possible into
    the fewest micro-batches that hold it, of the same number on every rank. No image is left out, and none comes
    twice: a rank for which none is left in the last window gets an image as a filler, which keeps it in step with the
    others and counts for nothing.

    Iterating yields this rank's micro-batches, each a list of (index, step, position), from the place given by
    `set_state`; a filler is one image at the position FILLER. It does not advance the epoch: call
    `set_state(epoch, 0)` before each.

    Args:
        n_images: Images in the dataset.
        batch_size: Most images in a micro-batch of one rank.
        accumulation: Micro-batches in a full window.
        shuffle: Permute the images in each epoch, by (seed, epoch); else in order.
        seed: The run's seed.
        rank: This process, of `world_size`.
    """

    def __init__(
        self,
        n_images: int,
        batch_size: int,
        accumulation: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if min(n_images, batch_size, accumulation, world_size) < 1:
            raise ValueError(
                f"n_images is {n_images}, batch_size {batch_size}, accumulation {accumulation}, "
                f"world_size {world_size}: each must be at least 1"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}: expected 0 to {world_size - 1}, as world_size is {world_size}")
        self.n_images, self.batch_size, self.accumulation = n_images, batch_size, accumulation
        self.shuffle, self.seed, self.rank, self.world_size = shuffle, seed, rank, world_size
        self.global_batch_size = batch_size * accumulation * world_size
        self.epoch, self.step_in_epoch = 0, 0

        self.steps_per_epoch = math.ceil(n_images / self.global_batch_size)

    def _parts(self, window_size: int) -> int:
        """Micro-batches of all ranks together in a window."""
        return math.ceil(window_size / (self.batch_size * self.world_size)) * self.world_size

    def window_size(self, step_in_epoch: int) -> int:
        """Images in the global batch of a step."""
        if not 0 <= step_in_epoch < self.steps_per_epoch:
            raise IndexError(f"step_in_epoch is {step_in_epoch}: an epoch has {self.steps_per_epoch} steps, from 0")
        return min(self.global_batch_size, self.n_images - step_in_epoch * self.global_batch_size)

    def micro_batches(self, step_in_epoch: int) -> int:
        """Micro-batches in a step, the same number on every rank."""
        return self._parts(self.window_size(step_in_epoch)) // self.world_size

    def set_state(self, epoch: int, step_in_epoch: int) -> None:
        """Let the next iteration start at a step of an epoch; at `steps_per_epoch` nothing of it is left."""
        if epoch < 0 or not 0 <= step_in_epoch <= self.steps_per_epoch:
            raise ValueError(
                f"epoch is {epoch} and step_in_epoch is {step_in_epoch}: expected at least 0, and 0 to "
                f"{self.steps_per_epoch}, the steps of an epoch of {self.n_images} images"
            )
        self.epoch, self.step_in_epoch = epoch, step_in_epoch

    def __len__(self) -> int:
        """Micro-batches of this rank in a whole epoch, wherever the iteration starts."""
        last_step = self.steps_per_epoch - 1
        return last_step * self.accumulation + self.micro_batches(last_step)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch, order = self.epoch, range(self.n_images)
        if self.shuffle:
            order = torch.randperm(self.n_images, generator=generator(self.seed, "epoch", epoch)).tolist()
        for step_in_epoch in range(self.step_in_epoch, self.steps_per_epoch):
            step = epoch * self.steps_per_epoch + step_in_epoch
            start = step_in_epoch * self.global_batch_size
            size = self.window_size(step_in_epoch)
            parts = self._parts(size)
            for part in range(self.rank, parts, self.world_size):
                positions = range(part * size // parts, (part + 1) * size // parts)
                batch = [(order[start + position], step, position) for position in positions]
                yield batch or [(order[start], step, FILLER)]


class LoaderError(UserError, RuntimeError):
    """The processes that load images cannot hand over their batches, or died."""


class _Unsent(NamedTuple):
    """What a worker sends in place of a batch that it could not put into shared memory."""

    reason: str


def _send_reason(queue: multiprocessing.queues.Queue, error: Exception, item: tuple) -> None:
    """Send the reason in place of the batch; by default it is printed and the training process waits for ever."""
    queue.put((item[0], _Unsent(str(error))))


def _prepare_worker(worker_id: int) -> None:
    """Let a loader's process report batches that it cannot send, and leave stop signals to the training process.

    Those go to a whole group of processes, and the training process needs its batches to act on them. A worker whose
    training process is gone ends by itself within seconds (PyTorch looks after that).
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_reason
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


# Parts of what PyTorch and Python say where descriptors or shared memory are used up, or a process was killed.
_NO_FILES = ("too many open files", "items of ancdata")
_NO_MEMORY = ("shared memory", "bus error", "unable to resize file", "no space left on device")
_KILLED = ("exited unexpectedly", "killed by signal", "connectionreset", "connectionrefused", "eoferror")


class BatchLoader(DataLoader):
    """A DataLoader that says what to do where its processes cannot hand over their batches, or died.

    Iterating raises LoaderError then. A batch that is kept holds one file descriptor for each of its large tensors.
    """

    def __init__(self, dataset: Dataset, *arguments: Any, **settings: Any):
        super().__init__(dataset, *arguments, worker_init_fn=_prepare_worker, **settings)
        _loaders.add(self)

    def __iter__(self) -> Iterator:
        try:
            for batch in super().__iter__():
                if isinstance(batch, _Unsent):
                    raise RuntimeError(batch.reason)
                yield batch.map(_unshared) if isinstance(batch, Batch) else batch
        except (RuntimeError, OSError, EOFError) as error:
            advice = self._advice(f"{type(error).__name__}: {error}".lower())
            if isinstance(error, UserError) or self.num_workers == 0 or advice is None:
                raise
            raise LoaderError(
                f"the processes that load images cannot go on: {advice}, or lower num_workers (now {self.num_workers}; "
                "0 loads in the training process)"
            ) from error

    @staticmethod
    def _advice(reason: str) -> str | None:
        """What to do about a failure for this reason; None if it is not one of handing over batches."""
        if any(text in reason for text in _NO_FILES):
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            return f"too many files are open. Raise the limit in the shell (ulimit -n, now {limit})"
        if any(text in reason for text in _NO_MEMORY):
            return "there is no room in the shared memory (/dev/shm). Give a container more (docker run --shm-size=8g)"
        if any(text in reason for text in _KILLED):
            return "one of them was killed, perhaps for want of memory. Give the machine or the container more"
        return None


def _unshared(value: Any) -> Any:
    """A small tensor out of the shared memory, where each costs a file descriptor; anything else as it is."""
    return value.clone() if isinstance(value, torch.Tensor) and value.ndim == 1 and value.is_shared() else value


_loaders: "weakref.WeakSet[DataLoader]" = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """End the loaders' processes before the interpreter sends them SIGTERM and waits for their end."""
    for iterator in [getattr(loader, "_iterator", None) for loader in _loaders]:
        if iterator is not None:
            iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.kill()  # one that hangs


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
    """The loaders of a configuration: training batches by address, validation batches in order (None if no dataset).

    Args:
        config: Has batch_size, accumulation(), val_batch_size (None: batch_size), num_workers and seed.
    """
    processes = dict(rank=rank(), world_size=world_size())
    sampler = GlobalBatchSampler(
        len(train_dataset), config.batch_size, config.accumulation(world_size()), seed=config.seed, **processes
    )
    train_loader = build_loader(train_dataset, sampler, config.num_workers, device)
    if val_dataset is None:
        return train_loader, None
    sampler = GlobalBatchSampler(
        len(val_dataset), config.val_batch_size or config.batch_size, shuffle=False, **processes
    )
    return train_loader, build_loader(val_dataset, sampler, config.num_workers, device)


def build_datasets(config: Any) -> tuple[Dataset, Dataset | None]:
    """The training and the validation dataset of a configuration; no validation dataset if its split is empty.

    Args:
        config: Has dataset_name (`digits`, `photos`, `celebahq`, or any other name for a folder), data_path, val_path,
            img_size, use_augmentation (mirrored images), random_crop, val_fraction, photos_train_crops,
            photos_val_crops, seed, and the settings above.

    Raises:
        ConfigError: No data_path, or a folder of one image, of which none is left to validate.
        FileNotFoundError, NotADirectoryError: There is no such folder, or no image in it.
    """
    if config.dataset_name == "photos":
        train = PhotoCrops(
            "train", config.img_size, config.photos_train_crops, flip=config.use_augmentation, seed=config.seed
        )
        return train, PhotoCrops("val", config.img_size, config.photos_val_crops) if config.photos_val_crops else None

    if config.dataset_name == "digits":
        train = Digits("train", config.img_size, flip=config.use_augmentation, seed=config.seed)
        return train, Digits("val", config.img_size)

    if not config.data_path:
        raise ConfigError(
            f"data_path is {config.data_path!r}, but dataset_name is {config.dataset_name!r}: set data_path to the "
            "folder that holds your images, or dataset_name to digits or photos"
        )
    paths = list_images(config.data_path)
    if config.val_path:
        train_paths, val_paths = paths, list_images(config.val_path, "val_path")
    else:
        train_paths, val_paths, _ = split_paths(paths, config.dataset_name, config.val_fraction, SPLIT_SEED)
        if not val_paths and config.val_fraction > 0:
            raise ConfigError(
                f"data_path is {config.data_path}, which holds {len(paths)} image: too few to keep one for validation; "
                "add images, or set val_fraction: 0 to train without validation"
            )
    train = ImageFolderDataset(
        train_paths, config.img_size, flip=config.use_augmentation, random_crop=config.random_crop, seed=config.seed
    )
    return train, ImageFolderDataset(val_paths, config.img_size, seed=config.seed) if val_paths else None


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

    @property
    def count(self) -> int:
        return len(self.reasons)

    def add(self, files: Iterable[BrokenFile]) -> None:
        """Take note of a batch's `broken` files.

        Raises:
            TooManyBrokenFiles: With this, more than max(1, 1 % of the images) are broken.
        """
        for path, reason in files:
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
