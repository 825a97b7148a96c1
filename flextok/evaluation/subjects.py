"""What is evaluated, and on which images."""

import dataclasses
from pathlib import Path
from typing import Optional

import torch
from torch import nn
from torch.utils.data import Dataset

from ..data.digits import Digits
from ..data.images import ImageFolderDataset, list_images
from ..data.photos import PhotoCrops
from ..flextok_wrapper import CONFIG_NAME, FlexTok, FlexTokFromHub, load_model_from_safetensors
from ..training.checkpoints import BEST, LATEST, read_checkpoint
from ..training.config import TrainConfig
from ..training.export import load_trained_model
from ..training.models import build_repa_module, check_repa_model
from ..utils.checkpoint import CheckpointError
from ..utils.config import ConfigError
from ..utils.random import generator


@dataclasses.dataclass
class Subject:
    """A model to evaluate, with what its training left if it is a checkpoint."""

    name: str
    model: FlexTok
    averaged: bool = False  # whether its weights are the moving average
    config: TrainConfig | None = None  # of its training
    projector_state: dict | None = None  # of its REPA module

    @property
    def img_size(self) -> int:
        """Side in pixels of the images that the model was built for."""
        return self.model.pipeline.default_size()[0] * self.model.vae.downsample_factor

    def repa_module(self, device: torch.device) -> nn.Module | None:
        """The REPA module that it was trained with, its encoder not loaded yet; None if there is none."""
        if self.projector_state is None:
            return None
        module = build_repa_module(self.config, self.model, device)
        module.load_state_dict(self.projector_state)
        return module

    @property
    def aligned_layers(self) -> list[int]:
        """Decoder layers that its training aligned; empty without REPA."""
        return [] if self.projector_state is None else check_repa_model(self.model, self.config.repa_layers)


def load_subject(checkpoint: str, averaged: bool = True) -> Subject:
    """The model that `checkpoint` means: a run folder, a training checkpoint, an export, a file, or a Hub name.

    Of a run folder the latest checkpoint is taken; of a checkpoint the averaged weights, if it has any.

    Raises:
        FileNotFoundError, CheckpointError, ConfigError: Nothing there, or not a model.
    """
    path = Path(checkpoint).expanduser()
    if path.is_dir() and not (path / CONFIG_NAME).is_file():
        candidates = [path / "checkpoints" / LATEST, path / "checkpoints" / BEST, path / LATEST]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"--checkpoint: the folder {path} is neither a run (checkpoints/{LATEST}) nor an export ({CONFIG_NAME})"
            )
        path = found
    if path.suffix == ".pt":
        return _load_checkpoint(path, checkpoint, averaged)
    if path.is_file():
        return Subject(checkpoint, load_model_from_safetensors(path).eval())
    is_hub_name = checkpoint.count("/") == 1 and not path.parent.is_dir()
    if not path.is_dir() and (path.is_absolute() or checkpoint.startswith(".") or not is_hub_name):
        raise FileNotFoundError(f"--checkpoint: there is nothing at {path}, and it is no Hub name (owner/model)")
    try:
        return Subject(checkpoint, FlexTokFromHub.from_pretrained(str(path) if path.is_dir() else checkpoint).eval())
    except OSError as error:
        raise ConfigError(
            f"--checkpoint: {checkpoint!r} is neither a folder, nor in the Hugging Face cache, nor can it be "
            f"downloaded ({error})"
        ) from error


def _load_checkpoint(path: Path, name: str, averaged: bool) -> Subject:
    checkpoint = read_checkpoint(path)
    try:
        config = TrainConfig.from_dict(checkpoint["config"])
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{path} holds no settings that can be read: {error}") from error
    return Subject(
        name,
        load_trained_model(path, averaged).eval(),
        averaged and bool(checkpoint.get("ema_model_state_dict")),
        config,
        checkpoint.get("repa_module_state_dict"),
    )


@dataclasses.dataclass
class ImageSet:
    """Images to evaluate on, with class labels where there are classes."""

    name: str
    dataset: Dataset
    labels: list[int] | None = None  # per image
    classes: list[str] | None = None
    train: Optional["ImageSet"] = None  # other images of the same classes, to fit probes to

    def __len__(self) -> int:
        return len(self.dataset)


def load_images(data: str, img_size: int, n_images: int | None) -> ImageSet:
    """The images of a folder, scikit-learn's validation digits, or crops of the photographs that wheels carry.

    Classes are a folder's sub-folders (of at least two, with two images or more each), digits or photographs. A
    folder's odd images of each class are evaluated and its even ones fitted to only where probes are; every image is
    evaluated for reconstruction.

    Args:
        n_images: At most so many, a random choice that is the same each time; None: all (`photos`: 256).
    """
    if data == "digits":
        test = _digits("val", img_size, n_images)
        test.train = _digits("train", img_size, None)
        return test
    if data == "photos":
        test = _photos("val", img_size, n_images or 256)
        test.train = _photos("train", img_size, len(test))
        return test
    paths = list_images(data)
    if n_images is not None and n_images < len(paths):
        chosen = torch.randperm(len(paths), generator=generator(0, "evaluation images"))[:n_images]
        paths = [paths[i] for i in sorted(chosen.tolist())]
    images = ImageSet(data, ImageFolderDataset(paths, img_size))
    names = [path.parent.name for path in paths]
    classes = sorted(set(names))
    if len(classes) > 1 and min(map(names.count, classes)) >= 2:
        images.classes, images.labels = classes, [classes.index(name) for name in names]
    return images


def _digits(split: str, img_size: int, n: int | None) -> ImageSet:
    dataset = Digits(split, img_size)
    dataset.pixels, dataset.names = dataset.pixels[:n], dataset.names[:n]
    return ImageSet("digits", dataset, dataset.labels[:n], dataset.classes)


def _photos(split: str, img_size: int, n: int) -> ImageSet:
    dataset = PhotoCrops(split, img_size, n)
    names = [name.split("@")[0] for name in dataset.names]
    classes = sorted(set(names))
    return ImageSet("photos", dataset, [classes.index(name) for name in names], classes)
