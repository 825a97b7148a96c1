"""The datasets of a configuration: folders, CelebA-HQ, the Hub, parquet, tar shards, and small sets for trying out."""

import logging
from pathlib import Path
from typing import Any

from ..utils.config import ConfigError
from .digits import Digits
from .images import IMAGE_FOLDERS, SPLITS, ImageDataset, ImageFolderDataset, list_images, split_indices, split_paths
from .labels import class_names, number_labels
from .photos import PhotoCrops

log = logging.getLogger("flextok")

SPLIT_SEED = 0  # which images validate does not depend on the run's seed, so that runs of several seeds compare


def build_datasets(config: Any) -> tuple[ImageDataset, ImageDataset | None]:
    """The training and the validation dataset of a configuration; no validation dataset if its split is empty.

    Args:
        config: TrainConfig; its settings under `Data` are used, and its seed.

    Raises:
        ConfigError: No data_path, one image alone, of which none is left to validate, or data of another form.
        FileNotFoundError, NotADirectoryError: There is no such folder, or no image in it.
    """
    train_settings = dict(
        flip=config.use_augmentation, crop=config.crop, crop_scale=config.crop_scale, crop_ratio=config.crop_ratio,
        seed=config.seed,
    )  # fmt: skip
    if config.crop.startswith("random"):
        train_settings["cached_crops"] = config.cache_crops
    val_settings = dict(crop=config.crop if config.crop == "adm" else "center", seed=config.seed)
    size, name = config.img_size, config.dataset_name
    if name == "photos":
        n_val = config.photos_val_crops
        train = PhotoCrops("train", size, config.photos_train_crops, flip=config.use_augmentation, seed=config.seed)
        return train, PhotoCrops("val", size, n_val) if n_val else None
    if name == "digits":
        return Digits("train", size, flip=config.use_augmentation, seed=config.seed), Digits("val", size)
    if not config.data_path:
        raise ConfigError(
            f"data_path is {config.data_path!r}, but dataset_name is {name!r}: set data_path to the folder that holds "
            "your images, or dataset_name to digits or photos"
        )
    if name == "webdataset":
        return shard_datasets(config, train_settings, val_settings)
    for setting in ("data_path", "val_path"):
        if isinstance(getattr(config, setting), list):
            raise ConfigError(f"{setting} is a list, which dataset_name: {name} does not take: set it to one folder")
    if name == "hf":
        return hub_datasets(config, train_settings, val_settings)

    paths = list_images(config.data_path)
    if config.val_path:
        val_paths = list_images(config.val_path, "val_path")
        train_paths = without_validation(paths, val_paths)
    else:
        train_paths, val_paths, _ = split_paths(paths, name, config.val_fraction, SPLIT_SEED)
        check_split(config, len(paths), len(val_paths))
    root = class_root(paths, config.data_path)
    if name in ("folder", "imagefolder"):
        check_splits(paths if name == "imagefolder" else train_paths, root, name)
    if name == "imagefolder":
        _, numbers = number_labels(class_folders(paths, root), "data_path")
        val_root = class_root(val_paths, config.val_path) if config.val_path else root
        for of_split, title, files, folder in (
            (train_settings, "data_path", train_paths, root),
            (val_settings, "val_path", val_paths, val_root),
        ):
            labels, _ = number_labels(class_folders(files, folder), title, numbers)
            of_split |= dict(classes=class_names(numbers), labels=labels)
    train = ImageFolderDataset(train_paths, size, **train_settings)
    return train, ImageFolderDataset(val_paths, size, **val_settings) if val_paths else None


def without_validation(paths: list[Path], val_paths: list[Path]) -> list[Path]:
    """The files that do not validate; where val_path lies in data_path the log says how many are left out."""

    def file(path: Path) -> tuple[int, int]:  # the same through links
        status = path.stat()
        return status.st_dev, status.st_ino

    validating = set(map(file, val_paths))
    train = [path for path in paths if file(path) not in validating]
    if not train:
        raise ConfigError("val_path holds all that data_path does: there is nothing left to train on")
    if len(train) < len(paths):
        log.warning("val_path lies in data_path: its %d files are not trained on", len(paths) - len(train))
    return train


def check_split(config: Any, n: int, n_val: int) -> None:
    """Raise ConfigError where a validation part is asked for and one image is all there is."""
    if n_val == 0 and config.val_fraction > 0:
        raise ConfigError(
            f"data_path is {config.data_path}, which holds {n} image: too few to keep one for validation; add images, "
            "or set val_fraction: 0 to train without validation"
        )


def class_root(paths: list[Path], given: str) -> Path:
    """The folder whose sub-folders are the classes: the one that was given, or its `images`, if all files are there."""
    root = Path(given).expanduser()
    inner = [root / name for name in IMAGE_FOLDERS]
    return next((folder for folder in inner if all(folder in path.parents for path in paths)), root)


def check_splits(paths: list[Path], root: Path, dataset_name: str) -> None:
    """Refuse train/, val/ and test/ as classes; warn where images of all of them are trained on."""
    folders = {path.relative_to(root).parts[0] for path in paths if path.parent != root}
    found = {name: SPLITS[name.lower()] for name in sorted(folders) if name.lower() in SPLITS}
    if not {"train"} < set(found.values()):
        return
    of_split = {split: root / name for name, split in found.items()}
    others = [name for name, split in found.items() if split != "train"]
    advice = f"set data_path: {of_split['train']} and val_path: {of_split.get('validation', root / others[0])}"
    if dataset_name == "imagefolder":
        raise ConfigError(f"data_path: the sub-folders {', '.join(found)} of {root} are splits, not classes: {advice}")
    log.warning(
        "data_path %s: the images of its sub-folders %s are trained on, too; %s", root, " and ".join(others), advice
    )


def class_folders(paths: list[Path], root: Path) -> list[str]:
    """The class of each image: the name of the sub-folder of `root` that it is in."""
    for path in paths:
        if path.parent == root:
            raise ConfigError(
                f"dataset_name is imagefolder, but {path.name} lies in {root} itself: expected a sub-folder for each "
                "class; dataset_name: folder takes images without classes"
            )
    return [path.relative_to(root).parts[0] for path in paths]


def hub_datasets(config: Any, train_settings: dict, val_settings: dict) -> tuple[ImageDataset, ImageDataset | None]:
    """Splits of a Hugging Face dataset; without one for validation, val_fraction of the training split."""
    from .hub import VALIDATION_SPLITS, HubImages, image_column, load_splits, read_labels

    splits = load_splits(config.data_path, config.data_config, config.data_revision)
    train_split, val_split, val_splits, val_title = config.train_split, config.val_split, splits, config.data_path
    if config.val_path:
        val_splits, val_title = load_splits(config.val_path, setting="val_path"), config.val_path
        val_split = val_split or (next(iter(val_splits)) if len(val_splits) == 1 else None)
    if val_split is None:
        val_split = next((s for s in VALIDATION_SPLITS if s in val_splits and s != train_split), None)
    for setting, split, found in (("train_split", train_split, splits), ("val_split", val_split, val_splits)):
        if split is not None and split not in found or (split is None and setting == "val_split" and config.val_path):
            raise ConfigError(f"{setting} is {split!r}, but the dataset has the splits {', '.join(found)}")
    if val_split == train_split and not config.val_path:
        raise ConfigError(
            f"train_split and val_split are both {train_split!r}: a run does not validate what it trains on"
        )
    column = image_column(splits[train_split].features, config.image_column)
    title = f"{config.data_path} ({train_split})"
    labels, numbers = read_labels(splits[train_split], config.label_column, title)
    classes = class_names(numbers)

    def images(split: Any, title: str, settings: dict, **others: Any) -> HubImages:
        return HubImages(split, config.img_size, title, column, classes=classes, **settings, **others)

    if val_split is not None and len(val_splits[val_split]):
        val_title, val_labels = f"{val_title} ({val_split})", None
        if numbers is not None:
            val_labels, _ = read_labels(val_splits[val_split], config.label_column, val_title, numbers)
        train = images(splits[train_split], title, train_settings, labels=labels)
        return train, images(val_splits[val_split], val_title, val_settings, labels=val_labels)
    n = len(splits[train_split])
    chosen, val_chosen = split_indices(n, config.val_fraction, SPLIT_SEED)
    check_split(config, n, len(val_chosen))
    val = images(splits[train_split], title, val_settings, labels=labels, indices=val_chosen) if val_chosen else None
    return images(splits[train_split], title, train_settings, labels=labels, indices=chosen), val


def shard_datasets(config: Any, train_settings: dict, val_settings: dict) -> tuple[ImageDataset, ImageDataset | None]:
    """Images of tar shards: those of val_path validate, or val_fraction of those of data_path."""
    from .shards import ShardImages, load_indices, shard_labels, shard_paths

    paths, cache_dir = shard_paths(config.data_path), Path(config.cache_dir)
    val_paths = shard_paths(config.val_path, "val_path") if config.val_path else []
    if val_paths:
        paths = without_validation(paths, val_paths)
    index = load_indices(paths, cache_dir)
    labels, numbers = number_labels(shard_labels(index), "data_path")
    of_train = dict(labels=labels, classes=class_names(numbers), **train_settings)
    if val_paths:
        val_index = load_indices(val_paths, cache_dir, "val_path")
        train = ShardImages(paths, index, config.img_size, **of_train)
        val_labels, _ = number_labels(shard_labels(val_index), "val_path", numbers) if numbers else (None, None)
        val_settings |= dict(labels=val_labels, classes=train.classes)
        return train, ShardImages(val_paths, val_index, config.img_size, **val_settings)
    n = sum(len(of_shard.keys) for of_shard in index)
    chosen, val_chosen = split_indices(n, config.val_fraction, SPLIT_SEED)
    check_split(config, n, len(val_chosen))
    train = ShardImages(paths, index, config.img_size, chosen=chosen, **of_train)
    if not val_chosen:
        return train, None
    val_settings |= dict(labels=labels, classes=train.classes)
    return train, ShardImages(paths, index, config.img_size, chosen=val_chosen, **val_settings)
