"""Values that frozen networks give for an image, computed once: REPA's encoder features and the VAE's latents.

They are computed for each training image and, where images are mirrored, for its mirror image (the features of a
mirrored image are not the mirrored features). On disk they are a RecordCache; a CachedDataset reads it batch by batch,
in the loader's workers; CachedValues serves a training step, and computes and stores what is not there yet.
"""

import dataclasses
import functools
import hashlib
import logging
import math
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import nn
from torch.utils.data import Dataset

from ..utils.config import ConfigError
from .images import Item, collate, drawn_flip
from .record_cache import RecordCache, cache_bytes, check_space, readable_size, record_bytes

logger = logging.getLogger(__name__)

MAX_WRITES = 4  # batches that wait for the disk; a slower one slows the filling instead of taking memory
FEATURES, LATENTS = "features", "latents"  # kinds of values; also their keys in a batch


class CachedDataset(Dataset):
    """A dataset whose batches carry cached values, and no images where everything that a step needs is cached.

    Items are those of the dataset within; those with an address (index, step, position) go through `collate`, which
    adds `split` and, where all records of the batch are stored, `features` [B, gh, gw, C] and `latents`
    [B, 2, C, h, w] (mean and std), read from the memory map in one copy.

    Args:
        dataset: ImageFolderDataset or PhotoCrops.
        split: `train` or `val`.
    """

    def __init__(self, dataset: Dataset, split: str):
        self.dataset, self.split = dataset, split
        self.caches: Dict[str, RecordCache] = {}
        self.needed_until: Dict[str, float] = {}
        self.images_until = math.inf

    def use(self, needed_until: Dict[str, float], images_until: float) -> None:
        """Say what steps need: values of each kind before a step (default: always), images before a step."""
        self.needed_until, self.images_until = needed_until, images_until

    def __len__(self) -> int:
        return len(self.dataset)

    @functools.cached_property
    def fingerprint(self) -> Dict[str, str]:
        """What the images are, for a cache's key; looks at every file, so once in a run."""
        return {"images": self.dataset.identity(), "files": self.dataset.content_probe()}

    def identity(self) -> str:
        return self.fingerprint["images"]

    def _needed(self, step: int) -> Dict[str, RecordCache]:
        return {name: cache for name, cache in self.caches.items() if step < self.needed_until.get(name, math.inf)}

    def __getitem__(self, item: Item) -> dict:
        if not isinstance(item, tuple):
            return self.dataset[item]
        index, step, position = item
        caches = self._needed(step).values()
        for cache in self.caches.values():  # what could not be read when the cache was filled is not tried again
            index = int(cache.resolve([index])[0])
        item = (index, step, position)
        if step < self.images_until or not all(cache.stored([index]).all() for cache in caches):
            return {**self.dataset[item], "item": item}
        flip = self.dataset.flip and drawn_flip(self.dataset.seed, step, position)
        return {"index": index, "position": position, "flip": flip, "broken": (), "item": item}

    def collate(self, items: Sequence[dict]) -> dict:
        """Join items (see `flextok.data.images.collate`), with the values that are stored."""
        if any("image" in item for item in items):  # all or none: some records may still be missing
            items = [
                item if "image" in item else {**self.dataset[item["item"]], "item": item["item"]} for item in items
            ]
        batch = {**collate(items), "split": self.split}
        for name, cache in self._needed(items[0]["item"][1]).items():
            if cache.stored(batch["index"]).all():
                batch[name] = cache.read(batch["index"], batch["flip"])
        return batch


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """Where the cache of one kind of values of one split is, and what it must be."""

    folder: Path
    key: Dict[str, Any]
    n_images: int
    flips: int
    shape: Tuple[int, ...]
    dtype: str

    def open(self) -> Optional[RecordCache]:
        """The cache, or None if there is none yet; raises CacheError for one of something else."""
        return RecordCache.open(*self._arguments())

    def is_complete(self) -> bool:
        """Whether there is a cache and nothing is missing; raises CacheError as `open` does."""
        cache = self.open()
        return cache is not None and cache.complete

    def describe(self) -> str:
        """Where it is, its size, and what is missing; raises CacheError as `open` does."""
        cache = self.open()
        missing = self.n_images if cache is None else len(cache.missing())
        record = readable_size(record_bytes(self.shape, self.dtype))
        images = f"{self.n_images} images x {self.flips} flips" if self.flips > 1 else f"{self.n_images} images"
        state = f"{missing} images to compute" if missing else "complete"
        return f"{self.folder}: {images} x {record} = {readable_size(self.nbytes)}, {state}"

    def create(self) -> RecordCache:
        return RecordCache.create(*self._arguments())

    def _arguments(self) -> tuple:
        optional = ("weights",)  # the file may be on another machine than the cache is used on
        return self.folder, self.key, self.n_images, self.flips, self.shape, self.dtype, optional

    @property
    def nbytes(self) -> int:
        return cache_bytes(self.n_images, self.flips, self.shape, self.dtype)


def feature_plans(config: Any, datasets: Dict[str, CachedDataset], device: torch.device) -> Dict[str, CachePlan]:
    """The caches of REPA's encoder features [gh, gw, C], in float16, by split; loads nothing."""
    from ..model.utils.repa_encoders import encoder_dtype, encoder_facts, encoder_weights_file, file_digest

    name = config.repa_encoder_type
    facts = encoder_facts(name, config.repa_image_size)
    weights = encoder_weights_file(
        name, config.repa_encoder_repo, config.repa_encoder_weights, config.repa_encoder_revision
    )
    key = {
        "encoder": name,
        "revision": config.repa_encoder_revision,
        "weights": None if weights is None else file_digest(weights),
        "dtype": str(encoder_dtype(config.repa_encoder_dtype, device)).removeprefix("torch."),
        "image_size": facts.image_size,
        "mean": list(facts.mean),
        "std": list(facts.std),
        "resize": "bicubic, antialiased",
    }
    folder = f"{FEATURES}-{name}-{facts.image_size}px"
    return _plans(config, datasets, folder, key, (*facts.grid, facts.dim), "float16")


def latent_plans(config: Any, model: nn.Module, datasets: Dict[str, CachedDataset]) -> Dict[str, CachePlan]:
    """The caches of the VAE's latent distributions, mean and std [2, C, h, w], in float32, by split."""
    vae = model.vae
    if not hasattr(vae, "moments"):
        raise ConfigError("cache_latents is true, but this model's VAE computes nothing (vae: pixel): set it to false")
    side = config.img_size // vae.downsample_factor
    shape = (2, vae.latent_channels, side, side)
    key = {"vae": _tensors_digest(vae.vae), "dtype": str(vae.dtype_override)}
    return _plans(config, datasets, f"{LATENTS}-{vae.latent_channels}x{side}x{side}", key, shape, "float32")


def latent_moments(vae: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a latent cache stores of images, computed in the VAE's own precision, fp32 by default."""

    def compute(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return vae.moments(images)

    return compute


def encoder_features(encode: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a feature cache stores of images: an encoder's features [B, C, gh, gw], channels last."""
    return lambda images: encode(images).permute(0, 2, 3, 1)


def _plans(
    config: Any, datasets: Dict[str, CachedDataset], folder: str, key: dict, shape, dtype
) -> Dict[str, CachePlan]:
    source = Path(config.data_path).resolve().name if config.data_path is not None else config.dataset_name
    plans = {}
    for split, dataset in datasets.items():
        flips = 2 if dataset.dataset.flip else 1
        path = Path(config.cache_dir, _slug(f"{source}-{config.img_size}px"), _slug(folder), split)
        plans[split] = CachePlan(path, {**key, **dataset.fingerprint}, len(dataset), flips, tuple(shape), dtype)
    return plans


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def _tensors_digest(module: nn.Module) -> str:
    """Fingerprint of a module's tensors."""
    hasher = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hasher.hexdigest()


class CachedValues:
    """One kind of values of a run's images: from the batch, from the cache, or computed and stored.

    Values are rounded to the cache's dtype also where they were just computed, and a batch of which any record is
    missing is computed as a whole, mirrored and not: so a run that was killed while filling goes on with the same bits.
    They are written by a thread; a disk that turns out full ends the filling, not the training.

    Args:
        name: FEATURES or LATENTS.
        datasets: The CachedDatasets by split; they serve the values from now on.
        plans: Their caches; what does not exist is created.
        compute: Images [B, 3, H, W] in [-1, 1] -> values [B, *shape].

    Raises:
        CacheError: A cache of something else is there, or a new one does not fit on the disk.
    """

    def __init__(
        self,
        name: str,
        datasets: Dict[str, CachedDataset],
        plans: Dict[str, CachePlan],
        compute: Callable[[torch.Tensor], torch.Tensor],
    ):
        self.name, self.datasets, self.compute = name, datasets, compute
        existing = {split: plan.open() for split, plan in plans.items()}  # all are checked before any is created
        new = [plan for split, plan in plans.items() if existing[split] is None]
        if new:
            check_space(new[0].folder, sum(plan.nbytes for plan in new))
        self.caches = {split: existing[split] or plans[split].create() for split in plans}
        for split, cache in self.caches.items():
            if not cache.complete:
                cache.open_for_writing()
            datasets[split].caches[name] = cache
            logger.info("%s cache: %s", name, plans[split].describe())
            if len(cache.unreadable()):
                logger.warning(
                    "%d images could not be read when this cache was filled, and others take their places: after a "
                    "repair run python -m flextok.data.cache_features, which tries them again", len(cache.unreadable()),
                )  # fmt: skip
        self._writer = ThreadPoolExecutor(1)
        self._writes: List[Future] = []
        self.failure: Optional[OSError] = None  # of a write; from then on nothing is stored

    def __call__(self, batch: dict, images: Optional[torch.Tensor], device: torch.device) -> torch.Tensor:
        """The values [B, *shape] of a batch, on the device, in the cache's dtype.

        Args:
            batch: As CachedDataset.collate gives it.
            images: Its images on the device; None if it has none.
        """
        if self.name in batch:
            return batch[self.name].to(device, non_blocking=True)
        cache, index, flip = self.caches[batch["split"]], batch["index"], batch["flip"]
        if batch["broken"]:
            paths = [str(path) for path in self.datasets[batch["split"]].dataset.paths]
            unreadable = [paths.index(path) for path in batch["broken"]]
            self._writes.append(self._writer.submit(cache.mark_unreadable, unreadable))
        stored = torch.as_tensor(cache.stored(index))
        if stored.all():
            return cache.read(index, flip).to(device)
        if self.failure is not None:
            return self._rounded(self.compute(images), cache)
        flip_there = flip.to(device, non_blocking=True)
        upright = torch.where(flip_there[:, None, None, None], images.flip(-1), images)
        both = [self.compute(upright), self.compute(upright.flip(-1))] if cache.flips > 1 else [self.compute(upright)]
        values = self._rounded(torch.stack(both, dim=1), cache)
        self._store(cache, index, values)
        values = values[torch.arange(len(index), device=device), flip_there.long()]
        if stored.any():
            where = stored.nonzero().squeeze(1)  # places, not a mask, with which a GPU would have to be waited for
            values[where.to(device, non_blocking=True)] = cache.read(index[where], flip[where]).to(device)
        return values

    @staticmethod
    def _rounded(values: torch.Tensor, cache: RecordCache) -> torch.Tensor:
        """Values in the cache's dtype; those beyond its range become its largest."""
        dtype = getattr(torch, cache.dtype.name)
        limits = torch.finfo(dtype)
        return values.clamp(limits.min, limits.max).to(dtype)

    def read(self, split: str, indices: torch.Tensor) -> torch.Tensor:
        """Stored values of images that are not mirrored."""
        cache = self.caches[split]
        return cache.read(cache.resolve(indices), torch.zeros(len(indices), dtype=torch.bool))

    def has(self, split: str, n: Optional[int] = None) -> bool:
        """Whether the first n images of a split (default: all) are stored or cannot be read."""
        if split not in self.caches:
            return n == 0
        missing = self.caches[split].missing()
        return len(missing) == 0 or (n is not None and int(missing[0]) >= n)

    def flush(self) -> None:
        """Wait until everything computed so far is safely on the disk."""
        self._collect_writes(at_most=0)
        for cache in self.caches.values():
            self._unless_failed(cache.flush)

    def _store(self, cache: RecordCache, index: torch.Tensor, values: torch.Tensor) -> None:
        self._collect_writes(at_most=MAX_WRITES - 1)
        if self.failure is not None:
            return
        copied = None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(values.device))
            values = host

        def write():
            if copied is not None:
                copied.synchronize()
            cache.write(index, values)

        self._writes.append(self._writer.submit(write))

    def _collect_writes(self, at_most: int) -> None:
        """Wait until no more than so many writes are under way; raises what one raised, unless the disk failed."""
        while self._writes and (len(self._writes) > at_most or self._writes[0].done()):
            self._unless_failed(self._writes.pop(0).result)

    def _unless_failed(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            if self.failure is None:
                logger.warning(
                    "the %s cache cannot grow (%s): nothing more is stored, and what is missing computed each time",
                    self.name, error,
                )  # fmt: skip
            self.failure = error
