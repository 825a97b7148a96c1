"""Where the caches of a run are, and what they must be: REPA's encoder features and the VAE's latents."""

import dataclasses
import functools
import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ..model.utils.repa_encoders import encoder_dtype
from ..model.utils.repa_loss import encoder_facts, encoder_weights_file
from ..utils.config import ConfigError
from ..utils.files import file_digest
from .record_cache import RecordCache, cache_bytes, readable_size, record_bytes

FEATURES, LATENTS = "features", "latents"  # kinds of values


@functools.cache
def fingerprint(dataset: Dataset) -> dict[str, str]:
    """What a dataset's images are, for a cache's key; looks at every file, once."""
    return {"images": dataset.identity(), "files": dataset.content_probe()}


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """Where the cache of one kind of values of one split is, and what it must be."""

    folder: Path
    key: dict[str, Any]
    n_images: int
    flips: int
    shape: tuple[int, ...]
    dtype: str

    def open(self) -> RecordCache | None:
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


def feature_plans(config: Any, datasets: dict[str, Dataset], device: torch.device) -> dict[str, CachePlan]:
    """The caches of REPA's encoder features [gh, gw, C], in float16, by split; loads nothing."""
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


def latent_plans(config: Any, model: nn.Module, datasets: dict[str, Dataset]) -> dict[str, CachePlan]:
    """The caches of the VAE's latent distributions, mean and std [2, C, h, w], in float32, by split."""
    vae = model.vae
    if not hasattr(vae, "moments"):
        raise ConfigError("cache_latents is true, but this model's VAE computes nothing (vae: pixel): set it to false")
    side = config.img_size // vae.downsample_factor
    shape = (2, vae.latent_channels, side, side)
    key = {"vae": _tensors_digest(vae.vae), "dtype": str(vae.dtype_override)}
    return _plans(config, datasets, f"{LATENTS}-{vae.latent_channels}x{side}x{side}", key, shape, "float32")


def _plans(config: Any, datasets: dict[str, Dataset], folder: str, key: dict, shape, dtype) -> dict[str, CachePlan]:
    source = Path(config.data_path).resolve().name if config.data_path is not None else config.dataset_name
    plans = {}
    for split, dataset in datasets.items():
        flips = 2 if dataset.flip else 1
        path = Path(config.cache_dir, _slug(f"{source}-{config.img_size}px"), _slug(folder), split)
        plans[split] = CachePlan(path, {**key, **fingerprint(dataset)}, len(dataset), flips, tuple(shape), dtype)
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
