"""One micro-batch: images, what caches hold of them, and where they stand in the optimizer step."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..utils.random import generator
from .images import BrokenFile

FILLER = -1  # position of an image that keeps a process in step with the others and counts for nothing


@dataclasses.dataclass
class Batch:
    """B images of one process.

    Attributes:
        images: [B, 3, H, W] in [-1, 1]; None where latents and features make them unnecessary.
        latents: Mean and standard deviation of the VAE's latents, [B, 2, C, h, w], if they are cached.
        features: The REPA encoder's features, [B, C, gh, gw], if they are cached.
        index: Index of each image in its dataset, long [B]; None if the loader does not say.
        position: Place of each image in the global batch, long [B]; None likewise.
        weight: 1, or 0 for a filler.
        broken: Image files that could not be read and were replaced, each with the reason.
    """

    images: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    features: torch.Tensor | None = None
    index: torch.Tensor | None = None
    position: torch.Tensor | None = None
    weight: float = 1.0
    broken: Sequence[BrokenFile] = ()

    @classmethod
    def of(cls, value: Any) -> "Batch":
        """A batch of any loader: a Batch, a tensor of images, or a tuple that begins with one.

        Raises:
            ValueError: There is no tensor [B, 3, H, W].
        """
        if isinstance(value, Batch):
            return value
        is_list_of_images = isinstance(value, (list, tuple)) and len(value) > 1 and getattr(value[1], "ndim", 0) == 4
        images = value[0] if isinstance(value, (list, tuple)) and not is_list_of_images else value
        if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] != 3:
            given = list(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
            raise ValueError(f"a batch of images is {given}, expected a tensor [B, 3, H, W] in [-1, 1]")
        return cls(images=images)

    def __len__(self) -> int:
        return len(next(t for t in (self.images, self.index, self.latents) if t is not None))

    @property
    def size(self) -> int:
        """Images that count."""
        return len(self) if self.weight else 0

    def to(self, device: torch.device) -> "Batch":
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self.map(torch.Tensor.pin_memory)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The batch with a function applied to each of its tensors."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **{name: function(tensor) for name, tensor in tensors.items()})


def collate(items: Sequence[dict]) -> Batch:
    """Join dataset items (see `flextok.data.images.ImageDataset`) into a Batch."""
    filler = items[0]["position"] == FILLER
    return Batch(
        images=torch.stack([item["image"] for item in items]) if "image" in items[0] else None,
        index=torch.tensor([item["index"] for item in items]),
        position=torch.tensor([0 if filler else item["position"] for item in items]),
        weight=0.0 if filler else 1.0,
        broken=[file for item in items for file in item["broken"]],
    )


def plain_images(
    dataset: Dataset, indices: Sequence[int], batch_size: int, num_workers: int = 0
) -> Iterator[torch.Tensor]:
    """The images of a dataset at some indices, in order and without augmentation, in batches [B, 3, H, W]."""
    subset = torch.utils.data.Subset(dataset, indices)
    yield from DataLoader(
        subset, batch_size, num_workers=num_workers, collate_fn=_stacked_images, generator=torch.Generator()
    )


def _stacked_images(items: Sequence[Any]) -> torch.Tensor:
    """One tensor [B, 3, H, W], and so one file descriptor, for the way out of a loading process."""
    images = [item["image"] if isinstance(item, dict) else item for item in items]
    return torch.stack([image[0] if isinstance(image, (list, tuple)) else image for image in images])


def chosen_to_validate(n: int, total: int) -> list[int]:
    """n indices, evenly spread over a dataset of `total` images, in an order of chance that is always the same.

    Noise levels can go with the place in a batch, and files are often sorted by class: in their own order each class
    would have its own noise levels.
    """
    indices = spread(n, total)
    return [indices[i] for i in torch.randperm(n, generator=generator(0, "validation")).tolist()]


def spread(n: int, total: int) -> list[int]:
    """n indices, evenly spread over a dataset of `total` images, whose order may be one of kinds."""
    return [i * total // n for i in range(n)]
