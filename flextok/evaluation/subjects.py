"""What is evaluated, and on which images."""

import dataclasses
import re
from pathlib import Path
from typing import Optional

import torch
from torch import nn
from torch.utils.data import Subset

from ..data.digits import Digits
from ..data.images import ImageDataset, ImageFolderDataset, digest, list_images
from ..data.labels import class_names, number_labels
from ..data.photos import PhotoCrops
from ..data.sources import build_datasets
from ..flextok_wrapper import CONFIG_NAME, FlexTok, FlexTokFromHub, load_model_from_safetensors
from ..training.checkpoints import BEST, LATEST, read_checkpoint
from ..training.config import TrainConfig, load_config
from ..training.export import load_trained_model
from ..training.models import build_repa_module, check_repa_model
from ..utils.checkpoint import CheckpointError
from ..utils.config import ConfigError
from ..utils.random import generator

N_PROBE_IMAGES = 5000  # of a config file's training images, to fit probes to


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

    def repa_module(self, device: torch.device, dtype: str) -> nn.Module | None:
        """The REPA module that it was trained with, its encoder, not loaded yet, in `dtype`; None if there is none."""
        if self.projector_state is None:
            return None
        config = self.config.model_copy(update={"repa_encoder_dtype": dtype})
        module = build_repa_module(config, self.model, device)
        module.load_state_dict(self.projector_state)
        return module

    @property
    def aligned_layers(self) -> list[int]:
        """Decoder layers that its training aligned; empty without REPA."""
        return [] if self.projector_state is None else check_repa_model(self.model, self.config.repa_layers)


def load_subject(checkpoint: str, averaged: bool = True, option: str = "--checkpoint") -> Subject:
    """The model that `checkpoint` means: a run folder, a training checkpoint, an export, a file, or a Hub name.

    Of a run folder the latest checkpoint is taken; of a checkpoint the averaged weights, if it has any. Errors name it
    by `option`.

    Raises:
        FileNotFoundError, CheckpointError, ConfigError: Nothing there, or not a model.
    """
    path = Path(checkpoint).expanduser()
    if path.is_dir() and not (path / CONFIG_NAME).is_file():
        candidates = [path / "checkpoints" / LATEST, path / "checkpoints" / BEST, path / LATEST]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"{option}: the folder {path} is neither a run (checkpoints/{LATEST}) nor an export ({CONFIG_NAME})"
            )
        path = found
    if path.suffix == ".pt":
        state = read_checkpoint(path)
        try:
            config = TrainConfig.from_dict(state["config"])
        except (KeyError, ConfigError) as error:
            raise CheckpointError(f"{path} holds no settings that can be read: {error}") from error
        has_average = averaged and bool(state.get("ema_model_state_dict"))
        model = load_trained_model(path, averaged).eval()
        return Subject(checkpoint, model, has_average, config, state.get("repa_module_state_dict"))
    if path.is_file():
        return Subject(checkpoint, load_model_from_safetensors(path).eval())
    is_hub_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+", checkpoint) and not path.parent.is_dir()
    if not path.is_dir() and not is_hub_name:
        raise FileNotFoundError(f"{option}: there is nothing at {path}, and it is no Hub name (owner/model)")
    try:
        return Subject(checkpoint, FlexTokFromHub.from_pretrained(str(path) if path.is_dir() else checkpoint).eval())
    except OSError as error:
        raise ConfigError(
            f"{option}: {checkpoint!r} is neither a folder, nor in the Hugging Face cache, nor can it be "
            f"downloaded ({error})"
        ) from error


class Part(Subset):
    """Some images of a dataset; `indices` are their numbers in it."""

    def identity(self) -> str:
        return digest([self.dataset.identity(), *map(str, self.indices)])


@dataclasses.dataclass
class ImageSet:
    """Images to evaluate on, with class labels where there are classes.

    An image is addressed by its row in this set, its random draws by its number in the whole data set (`indices`).
    """

    name: str
    dataset: Part
    labels: list[int] | None = None  # per image, -1 for none
    classes: dict[int, str] | None = None  # names by label, of those that occur
    train: Optional["ImageSet"] = None  # other images of the same classes, to fit probes to

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def indices(self) -> list[int]:
        return list(self.dataset.indices)


def load_images(data: str, img_size: int, n_images: int | None, n_train: int = N_PROBE_IMAGES) -> ImageSet:
    """The images of a folder, scikit-learn's validation digits, crops of the photographs that wheels carry, or those on
    which a config file (FILE.yaml) validates, whatever their source.

    Classes are the folders in a folder, digits or photographs. Probes are fitted to training digits or photographs; of
    a folder to every other image of each class.

    Args:
        n_images: At most so many, a random choice that is the same each time; None: all (`photos`: 256). Of `photos`
            so many crops, each drawn at random.
        n_train: Of the images that probes are fitted to.
    """
    if data == "digits":
        test, train = (_of(data, Digits(split, img_size), n) for split, n in (("val", n_images), ("train", n_train)))
    elif data == "photos":
        n = n_images or 256
        test, train = _photos("val", img_size, n), _photos("train", img_size, min(n, n_train))
    elif data.endswith(".yaml"):
        config = load_config(data)
        fit, val = build_datasets(config.model_copy(update={"img_size": img_size, "crop": fixed_crop(config.crop)}))
        if val is None:
            raise ConfigError(f"--data: {data} keeps no images for validation: set val_fraction or val_path")
        test, train = _of(data, val, n_images), _of(data, fit, n_train)
    else:
        return _of(data, _folder(data, img_size), n_images)
    return test if train.labels is None else dataclasses.replace(test, train=train)


def fixed_crop(crop: str) -> str:
    """How images are cropped that are not to change."""
    return "center" if crop.startswith("random") else crop


def _of(name: str, dataset: ImageDataset, n: int | None) -> ImageSet:
    """At most n images of a dataset, a random choice that is the same each time, with their classes."""
    indices = list(range(len(dataset)))
    if n is not None and n < len(dataset):
        indices = sorted(torch.randperm(len(dataset), generator=generator(0, "evaluation images"))[:n].tolist())
    labels = [-1 if (label := dataset.label(i)) is None else label for i in indices]
    found = sorted(set(labels) - {-1})
    if dataset.classes is None or not found:
        return ImageSet(name, Part(dataset, indices))
    return ImageSet(name, Part(dataset, indices), labels, {label: class_name(dataset, label) for label in found})


def class_name(dataset: ImageDataset, label: int) -> str:
    """The name of a class; of one beyond those that have names, the number that it has in the data."""
    names = dataset.classes if isinstance(dataset.classes, dict) else dict(enumerate(dataset.classes))
    return str(names.get(label, label))


def _folder(data: str, img_size: int) -> ImageFolderDataset:
    """The images of a folder; those of a folder in it are a class, those beside such folders have none."""
    dataset = ImageFolderDataset(list_images(data), img_size)
    folders = [Path(name).parent.as_posix() for name in dataset.names]
    if len(set(folders) - {"."}) > 1:
        dataset.labels, numbers = number_labels([None if name == "." else name for name in folders], data)
        dataset.classes = class_names(numbers)
    return dataset


def _photos(split: str, img_size: int, n: int) -> ImageSet:
    dataset = PhotoCrops(split, img_size, n)
    photos = [name.split("@")[0] for name in dataset.names]
    dataset.classes = sorted(set(photos))
    dataset.labels = [dataset.classes.index(name) for name in photos]
    return _of("photos", dataset, None)
