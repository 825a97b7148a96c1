"""What REPA's loss is for predictions that ignore the image: what is aligned lies below them.

The decoder's features know where they are, and encoder features share much at each place (the corners of photographs,
the middle of faces), so that a projector which ignores the image can still predict a vector for each position.
"""

import torch
import torch.nn as nn
from torch.utils.data import Dataset

from ..data.batch import plain_images
from ..model.utils.repa_loss import unit_target_sum
from ..utils.output import with_progress
from ..utils.processes import rank, summed, world_size


@torch.no_grad()
def constant_losses(
    repa_module: nn.Module, datasets: dict[str, Dataset], indices: dict[str, list[int]], batch_size: int,
    num_workers: int, device: torch.device,
) -> dict[str, float]:  # fmt: skip
    """By split, `SPLIT/repa_loss_constant`, of the best vector for each position, and `SPLIT/repa_loss_mean`, of the
    best vector for all of them. The best vectors are the mean unit targets of the training images.

    Several processes have to call this together; each computes a part of the images.

    Args:
        datasets: By split; features are read from their caches where they have some.
        indices: By split, `train` first, which images are looked at.
    """

    def mean_unit_target(split: str) -> torch.Tensor:  # float64 [C, H, W]
        dataset, own = datasets[split], indices[split][rank() :: world_size()]
        if hasattr(dataset, "cached_features"):
            chunks = (own[start : start + batch_size] for start in range(0, len(own), batch_size))
            targets = (repa_module.targets(dataset.cached_features(chunk).to(device)) for chunk in chunks)
        else:
            images = plain_images(dataset, own, batch_size, num_workers)
            targets = (repa_module.target_features(batch.to(device)) for batch in images)
        shape = (repa_module.encoder_dim, *repa_module.target_size)
        total = torch.zeros(shape, dtype=torch.float64, device=device)
        for target in with_progress(targets, len(own), f"constant REPA predictions, {split}"):
            total += unit_target_sum(target)
        return summed(total) / len(indices[split])

    losses, predictions = {}, {}
    for split in indices:
        mean = mean_unit_target(split)
        if not predictions:
            predictions = {"constant": mean, "mean": mean.mean((1, 2), keepdim=True)}
        for name, vectors in predictions.items():
            # The mean cosine with a fixed vector is the product of its direction and the mean unit target.
            cosine = (nn.functional.normalize(vectors, dim=0) * mean).sum(0).mean()
            losses[f"{split}/repa_loss_{name}"] = -float(cosine)
    return losses
