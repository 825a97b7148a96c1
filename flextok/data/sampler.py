"""Which image goes into which optimizer step, on which rank, in which micro-batch."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from ..utils.random import generator
from .batch import FILLER


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
        images: The images, by their index in the dataset, or their number for all of it.
        batch_size: Most images in a micro-batch of one rank.
        accumulation: Micro-batches in a full window.
        shuffle: Permute the images in each epoch, by (seed, epoch); else in order.
        seed: The run's seed.
        rank: This process, of `world_size`.
    """

    def __init__(
        self,
        images: int | Sequence[int],
        batch_size: int,
        accumulation: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.images = range(images) if isinstance(images, int) else images
        self.n_images, self.batch_size, self.accumulation = len(self.images), batch_size, accumulation
        self.shuffle, self.seed, self.rank, self.world_size = shuffle, seed, rank, world_size
        self.global_batch_size = batch_size * accumulation * world_size
        self.epoch, self.step_in_epoch = 0, 0
        self.steps_per_epoch = math.ceil(self.n_images / self.global_batch_size)

    def _parts(self, window_size: int) -> int:
        """Micro-batches of all ranks together in a window."""
        return math.ceil(window_size / (self.batch_size * self.world_size)) * self.world_size

    def window_size(self, step_in_epoch: int) -> int:
        """Images in the global batch of a step."""
        return min(self.global_batch_size, self.n_images - step_in_epoch * self.global_batch_size)

    def micro_batches(self, step_in_epoch: int) -> int:
        """Micro-batches in a step, the same number on every rank."""
        return self._parts(self.window_size(step_in_epoch)) // self.world_size

    def set_state(self, epoch: int, step_in_epoch: int) -> None:
        """Let the next iteration start at a step of an epoch; at `steps_per_epoch` nothing of it is left."""
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
                batch = [(self.images[order[start + position]], step, position) for position in positions]
                yield batch or [(self.images[order[start]], step, FILLER)]
