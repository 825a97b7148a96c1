"""Where the caches of a run are, and what they must be: REPA's encoder features and the VAE's latents."""

import dataclasses
import functools
import json
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
from ..utils.modules import weights_digest
from .record_cache import META, RecordCache, cache_bytes, readable_size, record_bytes

FEATURES, LATENTS = "features", "latents"  # kinds of values


@functools.cache
def fingerprint(dataset: Dataset) -> dict[str, str]:
    """What a dataset's images are, for a cache's key; looks at every file, once."""
    return {"images": dataset.identity(), "files": dataset.content_probe()}


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """Where the cache of one kind of values of one split is, and what it must be: the arguments of RecordCache."""

    folder: Path
    key: dict[str, Any]
    n_images: int
    flips: int
    shape: tuple[int, ...]
    dtype: str
    optional: tuple[str, ...] = ("weights",)  # the file may be on another machine than the cache is used on

    def open(self) -> RecordCache | None:
        """The cache, or None if there is none yet; raises CacheError for one of something else."""
        return RecordCache.open(**vars(self))

    def create(self) -> RecordCache:
        return RecordCache.create(**vars(self))

    @property
    def nbytes(self) -> int:
        return cache_bytes(self.n_images, self.flips, self.shape, self.dtype)

    def describe(self) -> str:
        """Where it is, its size, and what is missing; raises CacheError as `open` does."""
        cache = self.open()
        missing = self.n_images if cache is None else len(cache.missing())
        record = readable_size(record_bytes(self.shape, self.dtype))
        images = f"{self.n_images} images x {self.flips} views" if self.flips > 1 else f"{self.n_images} images"
        state = f"{missing} images to compute" if missing else "complete"
        return f"{self.folder}: {images} x {record} = {readable_size(self.nbytes)}, {state}"


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
    return _plans(datasets, feature_folder(config), key, (*facts.grid, facts.dim), "float16")


def stored_encoder_dtype(config: Any) -> str | None:
    """What the features in the run's cache were computed in, such as `float32`; None if there is no cache."""
    try:
        return json.loads((feature_folder(config) / "train" / META).read_bytes())["key"]["dtype"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def latent_plans(config: Any, model: nn.Module, datasets: dict[str, Dataset]) -> dict[str, CachePlan]:
    """The caches of the VAE's latent distributions, mean and std [2, C, h, w], in float32, by split."""
    vae = model.vae
    if not hasattr(vae, "moments"):
        raise ConfigError("cache_latents is true, but this model's VAE computes nothing (vae: pixel): set it to false")
    side = config.img_size // vae.downsample_factor
    key = {"vae": weights_digest(vae.vae), "dtype": str(vae.dtype_override)}
    folder, shape = f"{LATENTS}-{vae.latent_channels}x{side}x{side}", (2, vae.latent_channels, side, side)
    return _plans(datasets, data_folder(config, folder), key, shape, "float32")


def data_folder(config: Any, name: str) -> Path:
    """The folder `name` of the caches of a run's data."""
    path = config.data_path[0] if isinstance(config.data_path, list) else config.data_path
    source = config.dataset_name if path is None else Path(path).resolve().name if Path(path).exists() else path
    names = [re.sub(r"[^\w.-]+", "_", part) for part in (f"{source}-{config.img_size}px", name)]
    return Path(config.cache_dir, *names)


def feature_folder(config: Any) -> Path:
    facts = encoder_facts(config.repa_encoder_type, config.repa_image_size)
    return data_folder(config, f"{FEATURES}-{config.repa_encoder_type}-{facts.image_size}px")


def _plans(datasets: dict[str, Dataset], folder: Path, key: dict, shape, dtype) -> dict[str, CachePlan]:
    return {
        split: CachePlan(
            folder / split, {**key, **fingerprint(dataset)}, len(dataset), dataset.n_views, tuple(shape), dtype
        )
        for split, dataset in datasets.items()
    }
