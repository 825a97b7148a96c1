"""What REPA's loss is if every position predicts one vector: the line above which nothing is aligned."""

from collections.abc import Iterator

import torch
import torch.nn as nn
from torch.utils.data import Dataset

from ..data.batch import plain_images
from ..model.utils.repa_loss import constant_prediction_loss, normalised_target_sum
from ..utils.processes import rank, summed, world_size


@torch.no_grad()
def constant_losses(
    repa_module: nn.Module, train: Dataset, val: Dataset | None, n_train: int, n_val: int, batch_size: int,
    num_workers: int, device: torch.device,
) -> dict[str, float]:  # fmt: skip
    """`train/repa_loss_constant` and `val/repa_loss_constant`; each process computes a part of the images.

    The vector is the mean unit target of training images, the best that does not look at the image.

    Args:
        train, val: Datasets; features are read from their caches where they have some.
        n_train: About so many training images are looked at.
        n_val: The first so many validation images are.
    """

    def targets(dataset: Dataset, indices: list[int]) -> Iterator[torch.Tensor]:
        indices = indices[rank() :: world_size()]
        if hasattr(dataset, "cached_features"):
            for start in range(0, len(indices), batch_size):
                yield repa_module.targets(dataset.cached_features(indices[start : start + batch_size]).to(device))
        else:
            for images in plain_images(dataset, indices, batch_size, num_workers):
                yield repa_module.target_features(images.to(device))

    total = torch.zeros(repa_module.encoder_dim, dtype=torch.float64, device=device)
    count = torch.zeros((), device=device)
    for target in targets(train, list(range(0, len(train), max(1, len(train) // n_train)))):
        batch_total, batch_count = normalised_target_sum(target)
        total, count = total + batch_total, count + batch_count
    mean = summed(total) / summed(count)
    # The cosine of each unit target with the direction of their mean averages to the length of that mean.
    losses = {"train/repa_loss_constant": -float(mean.norm())}
    if val is not None and n_val:
        val_total = torch.zeros((), device=device)
        for target in targets(val, list(range(n_val))):
            val_total += constant_prediction_loss(mean, target) * len(target)
        losses["val/repa_loss_constant"] = float(summed(val_total)) / n_val
    return losses
