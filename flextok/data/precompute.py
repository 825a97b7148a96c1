"""Values that frozen networks give for an image, computed once, before training: encoder features and VAE latents.

They are computed for each training image and, where images are mirrored, for its mirror image (the features of a
mirrored image are not the mirrored features), or for `cache_crops` crops of it. On disk they are a RecordCache; a
PrecomputedDataset reads it batch by batch, in the loader's workers.
"""

import collections
import contextlib
import fcntl
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm

from ..model.utils.repa_encoders import encoder_dtype
from ..model.utils.repa_loss import load_encoder
from ..utils.processes import from_first, is_distributed, rank
from .batch import Batch, collate
from .caching import FEATURES, LATENTS, CachePlan, feature_plans, fingerprint, latent_plans
from .images import Item
from .loader import BatchLoader, BrokenFiles
from .record_cache import CacheError, RecordCache, check_space, readable_size

log = logging.getLogger("flextok")

WAIT_SECONDS = 1  # between looks at what other processes fill
FLUSH_SECONDS = 10  # what a killed process computed since its last flush is computed again


class PrecomputedDataset(Dataset):
    """A dataset whose batches carry cached values, and no images where nothing needs them.

    Items with an address (index, step, position) go through `collate`, which reads the values; a plain index gives the
    image.

    Args:
        dataset: An ImageDataset.
        caches: Complete caches by kind, `latents` and `features`.
        features_until, images_until: Steps from which they are not needed any more.
    """

    def __init__(
        self,
        dataset: Dataset,
        caches: dict[str, RecordCache],
        features_until: float = math.inf,
        images_until: float = math.inf,
    ):
        self.dataset, self.caches = dataset, caches
        self.features_until, self.images_until = features_until, images_until
        if FEATURES in caches:
            self.cached_features = self._cached_features

    def __len__(self) -> int:
        return len(self.dataset)

    def identity(self) -> str:
        return fingerprint(self.dataset)["images"]

    def _resolve(self, index: int) -> int:
        for cache in self.caches.values():  # what could not be read when the cache was filled is not tried again
            index = cache.resolve(index)
        return index

    def __getitem__(self, item: Item) -> dict:
        if not isinstance(item, tuple):
            return self.dataset[item]
        index, step, position = item
        index = self._resolve(index)
        if step < self.images_until:
            return {**self.dataset[index, step, position], "step": step}
        view = self.dataset.drawn_view(step, position)
        return {"index": index, "position": position, "view": view, "broken": (), "step": step}

    def collate(self, items: Sequence[dict]) -> Batch:
        """Join items, with their cached values."""
        batch, views = collate(items), [item["view"] for item in items]
        if LATENTS in self.caches:
            batch.latents = self.caches[LATENTS].read(batch.index, views)  # [B, 2, C, h, w]
        if FEATURES in self.caches and items[0]["step"] < self.features_until:
            batch.features = self.caches[FEATURES].read(batch.index, views).permute(0, 3, 1, 2)  # [B, C, gh, gw]
        return batch

    def _cached_features(self, indices: Sequence[int]) -> torch.Tensor:
        """Features [B, C, gh, gw] of images that are not mirrored."""
        return self.caches[FEATURES].read([self._resolve(i) for i in indices]).permute(0, 3, 1, 2)


def precompute(
    config: Any, train: Dataset, val: Dataset | None, model: nn.Module, device: torch.device
) -> tuple[Dataset, Dataset | None]:
    """Fill the caches that a configuration asks for, and let the datasets serve them; without any they stay.

    Several processes fill them together, each on its device; what was stored before, by whomever, is kept.

    Args:
        config: TrainConfig.
        model: Its VAE computes latents.

    Raises:
        CacheError: A cache of something else is there, a new one does not fit on the disk, or cannot be written.
    """
    datasets = {"train": train} | ({"val": val} if val is not None else {})
    plans = cache_plans(config, datasets, model, device)
    if not plans:
        return train, val
    caches = fill_caches(config, datasets, plans, model, device)
    features_until = config.repa_stop or math.inf
    if LATENTS not in caches:
        images_until = math.inf
    else:
        images_until = features_until if config.use_repa and FEATURES not in caches else 0

    def served(split: str, features_until: float, images_until: float) -> PrecomputedDataset:
        of_split = {kind: by_split[split] for kind, by_split in caches.items()}
        return PrecomputedDataset(datasets[split], of_split, features_until, images_until)

    train = served("train", features_until, images_until)
    return train, served("val", math.inf, math.inf if images_until else 0) if val is not None else None


def cache_plans(
    config: Any, datasets: dict[str, Dataset], model: nn.Module, device: torch.device
) -> dict[str, dict[str, CachePlan]]:
    """The caches that a configuration asks for, by kind and split."""
    plans = {}
    if config.use_repa and config.repa_cache:
        plans[FEATURES] = feature_plans(config, datasets, device)
    if config.cache_latents:
        plans[LATENTS] = latent_plans(config, model, datasets)
    return plans


def fill_caches(
    config: Any, datasets: dict[str, Dataset], plans: dict[str, dict[str, CachePlan]], model: nn.Module,
    device: torch.device, batch_size: int | None = None,
) -> dict[str, dict[str, RecordCache]]:  # fmt: skip
    """Create what does not exist, compute what is missing, and open all caches for reading, by kind and split."""
    new = [plan for by_split in plans.values() for plan in by_split.values() if plan.open() is None]
    if new:
        check_space(new[0].folder, sum(plan.nbytes for plan in new))

    def is_complete(plan: CachePlan) -> bool:
        cache = plan.open()
        return cache is not None and cache.complete

    caches: dict[str, dict[str, RecordCache]] = {}
    for kind in plans:
        if from_first(lambda kind=kind: all(map(is_complete, plans[kind].values()))):
            caches[kind] = {split: plan.open() for split, plan in plans[kind].items()}
            continue
        if kind == FEATURES:
            compute = load_features(config, device)
            plans[kind] = feature_plans(config, datasets, device)  # now the weights are here, and in the key
        else:
            compute = latent_moments(model.to(device).vae)
        caches[kind] = {split: plan.open() or plan.create() for split, plan in plans[kind].items()}
        for split, cache in caches[kind].items():
            try:
                if not cache.complete:
                    fill(cache, datasets[split], compute, f"{kind}, {split}", batch_size or config.batch_size,
                         config.num_workers, device)  # fmt: skip
            except OSError as error:
                raise CacheError(
                    f"cannot write the cache in {cache.folder}: {error}. What is stored stays: make room, or set "
                    "cache_dir to a folder on a larger disk, then start again"
                ) from error
            if len(cache.unreadable()):
                log.warning(
                    "%d images could not be read when this cache was filled, and others take their places: after a "
                    "repair run python -m flextok.data.cache_features, which tries them again", len(cache.unreadable()),
                )  # fmt: skip
    return caches


class Views(Dataset):
    """The first n views of each image of a dataset."""

    def __init__(self, dataset: Dataset, n: int):
        self.dataset, self.n = dataset, n

    def __getitem__(self, index: int) -> dict:
        return self.dataset.views(index, self.n)


class MissingBatches(Sampler):
    """Batches of the images that a cache lacks, each claimed for this process until it is released.

    What another process works on is left out.
    """

    def __init__(self, cache: RecordCache, batch_size: int):
        self.cache, self.batch_size = cache, batch_size
        self.claims: collections.deque[contextlib.ExitStack] = collections.deque()

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.cache.n_images, self.batch_size):
            stop = min(start + self.batch_size, self.cache.n_images)
            if not len(self.cache.missing(start, stop)):
                continue
            claim = contextlib.ExitStack()
            claimed = claim.enter_context(self.cache.claim(start, stop))
            missing = self.cache.missing(start, stop)  # some may have been stored in between
            if claimed and len(missing):
                self.claims.append(claim)
                yield missing.tolist()
            else:
                claim.close()

    def any_free(self) -> bool:
        """Whether a range lacks images and no other process works on it."""
        for index in self.cache.missing()[:: self.batch_size]:
            with self.cache.claim(int(index), int(index) + 1) as claimed:
                if claimed:
                    return True
        return False

    def release(self, n: int) -> None:
        """Release the claims of the first n batches that are still held."""
        for _ in range(n):
            self.claims.popleft().close()


def fill(
    cache: RecordCache, dataset: Dataset, compute: Callable[[torch.Tensor], torch.Tensor], title: str, batch_size: int,
    num_workers: int, device: torch.device,
) -> None:  # fmt: skip
    """Compute and store what a cache lacks; returns when nothing is missing, whoever stored it.

    Args:
        compute: Images [B, 3, H, W] in [-1, 1] -> values [B, *shape].
    """
    cache.open_for_writing()
    broken, batches = BrokenFiles(len(dataset)), MissingBatches(cache, batch_size)
    loader = BatchLoader(
        Views(dataset, cache.flips), batch_sampler=batches, num_workers=num_workers, collate_fn=collate,
        pin_memory=device.type == "cuda", generator=torch.Generator(),
    )  # fmt: skip
    dtype = getattr(torch, cache.dtype.name)
    limits = torch.finfo(dtype)
    done, flushed = 0, time.monotonic()
    with tqdm(total=cache.n_images, unit="img", desc=title, dynamic_ncols=True, disable=rank() > 0) as progress:

        def show():
            stored = cache.n_images - len(cache.missing())
            progress.set_postfix_str(readable_size(stored * cache.nbytes / cache.n_images), refresh=False)
            progress.update(stored - progress.n)

        show()
        progress.unpause()  # what was there before is not part of the rate
        while True:
            try:
                for batch in loader:
                    broken.add(batch.broken)
                    cache.mark_unreadable([file.index for file in batch.broken])
                    images = batch.images.to(device, non_blocking=True)
                    values = [compute(view) for view in images.unbind(dim=1)]
                    cache.write(batch.index, torch.stack(values, dim=1).clamp(limits.min, limits.max).to(dtype))
                    done += 1
                    if time.monotonic() - flushed > FLUSH_SECONDS:
                        cache.flush()
                        batches.release(done)
                        done, flushed = 0, time.monotonic()
                    show()
            finally:
                cache.flush()
                batches.release(len(batches.claims))
            done = 0
            show()
            while not batches.any_free():  # for what other processes work on; if one dies, its part is done here
                if cache.complete:
                    show()
                    return
                time.sleep(WAIT_SECONDS)


def latent_moments(vae: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a latent cache stores of images, computed in the VAE's own precision, fp32 by default."""

    def compute(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return vae.moments(images)

    return compute


def load_features(config: Any, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a feature cache stores of images: the encoder's features [B, gh, gw, C], channels last."""
    folder = Path(config.cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".load.lock", "ab") as file:
        if not is_distributed():  # of commands started side by side the first downloads, the others find it there;
            fcntl.flock(file, fcntl.LOCK_EX)  # the processes of one job agree by themselves
        encoder = load_encoder(
            config.repa_encoder_type, config.repa_encoder_repo, config.repa_encoder_weights, config.repa_image_size,
            config.repa_encoder_revision, encoder_dtype(config.repa_encoder_dtype, device), config.repa_encoder_trust,
        )  # fmt: skip
    encoder = encoder.to(device)
    return lambda images: encoder(images).float().permute(0, 2, 3, 1)
