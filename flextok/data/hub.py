"""Images of a Hugging Face dataset: by its name on the Hub, a folder of parquet files, or one of `save_to_disk`."""

import glob
import hashlib
import io
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow.compute
import pyarrow.parquet
import yaml
from PIL import Image

from ..utils.config import ConfigError, nearest
from ..utils.network import reachable
from ..utils.processes import rank
from .images import EXTENSIONS, SPLITS, BrokenImage, ImageDataset, digest, file_ends, load_image, probe
from .labels import natural_key, number_labels

log = logging.getLogger("flextok")

VALIDATION_SPLITS = ("validation", "val", "valid")


def load_splits(
    path: str, name: str | None = None, revision: str | None = None, setting: str = "data_path"
) -> dict[str, Any]:
    """The splits of a dataset, each a map-style `datasets.Dataset`, by name.

    Args:
        path: Name on the Hub, or a folder.
        name: Configuration (subset), where a dataset has several.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ConfigError: It is neither here nor within reach, or nothing that `datasets` reads.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("dataset_name: hf needs the package datasets: pip install datasets") from error
    folder = Path(path)
    if rank() > 0:
        datasets.disable_progress_bars()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(folder)
        elif folder.exists():
            found = datasets.load_dataset(**local_files(folder, name, setting))
        else:
            if not reachable(huggingface_hub.constants.ENDPOINT):  # else each request is repeated for half a minute
                if revision is not None:  # the cache does not say of which revision it is
                    raise ConnectionError(f"{huggingface_hub.constants.ENDPOINT} cannot be reached")
                huggingface_hub.constants.HF_HUB_OFFLINE = True
            found = datasets.load_dataset(path, name, revision=revision)
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError, yaml.YAMLError, datasets.exceptions.DatasetsError) as error:
        at = "" if revision is None else f" --revision {revision}"
        where = "it cannot be read as a dataset (data_config names a configuration)"
        if not folder.exists() and isinstance(error, FileNotFoundError | ConnectionError):
            where = (
                f"there is no folder {path}, and no dataset of this name in the Hugging Face cache or within reach; "
                f"without network, run `hf download {path} --repo-type dataset{at} --local-dir FOLDER` elsewhere, copy "
                "the folder here and set data_path to it"
            )
        raise ConfigError(f"{setting} is {path!r}: {where} ({type(error).__name__}: {str(error)[:300]})") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def local_files(folder: Path, name: str | None, setting: str = "data_path") -> dict[str, Any]:
    """The arguments by which `datasets.load_dataset` takes a folder; the log names files that it leaves out.

    Where there is parquet, it is the data set. Its files belong to the splits that a data card or their names say, and
    all others to train.

    Raises:
        ConfigError: A parquet file is damaged, or the class names of a column differ between two.
    """
    import datasets

    names = sorted(glob.glob("**", root_dir=folder, recursive=True), key=natural_key)  # through links; none hidden
    files = [folder / name for name in names if (folder / name).is_file()]
    parquet = [file for file in files if file.suffix.lower() == ".parquet"]
    card = folder / "README.md"
    has_configs = False
    if card.is_file() and card.read_text(errors="replace").startswith("---"):
        has_configs = "configs" in huggingface_hub.DatasetCard.load(card).data.to_dict()
    if parquet and not has_configs:
        if name not in (None, "default"):
            raise ConfigError(f"data_config is {name!r}, but {folder} has no data card (README.md) with configs")
        splits: dict[str, list[str]] = {}
        for file in parquet:
            splits.setdefault(split_of(file.relative_to(folder)), []).append(glob.escape(str(file)))
        if len(splits) > 1:
            shown = "; ".join(f"{split} has {len(of)} ({Path(of[0]).name})" for split, of in splits.items())
            log.info("%s %s: parquet files by split: %s", setting, folder, shown)
        taken, arguments = set(parquet), dict(path="parquet", data_files=splits)
    else:
        builder = datasets.load_dataset_builder(str(folder), name)
        taken = {Path(file).resolve() for of_split in (builder.config.data_files or {}).values() for file in of_split}
        taken, arguments = {file for file in files if file.resolve() in taken}, dict(path=str(folder), name=name)
    kinds = {file.suffix for file in taken} | {".parquet", *EXTENSIONS}
    left_out = [file for file in files if file not in taken and file.suffix.lower() in kinds]
    if left_out:
        shown = ", ".join(str(file.relative_to(folder)) for file in left_out[:5])
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        log.warning("%s %s: %d files are left out: %s%s", setting, folder, len(left_out), shown, more)
    first: dict[str, tuple[Path, list[str]]] = {}
    for file in (file for file in parquet if file in taken):
        try:
            features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(file))
        except pyarrow.ArrowInvalid as error:
            raise ConfigError(f"{file} cannot be read as parquet ({error}): copy it again") from error
        for column, feature in features.items():
            if isinstance(feature, datasets.ClassLabel):
                other, classes = first.setdefault(column, (file, feature.names))
                if classes != feature.names:
                    raise ConfigError(
                        f"the class names of the column {column} are {classes} in {other}, but {feature.names} in "
                        f"{file}: write the files anew with the same names, in the same order"
                    )
    return arguments


def split_of(file: Path) -> str:
    """The split that the name of a file says, or that of a folder above it; train if none does.

    It is a word of the name, such as `val` of `faces-val-0`; in a folder `data` all that is before `-00000-of-00002`.
    """
    if file.parent.name == "data" and (match := re.match(r"([\w.]+)-\d{5}-of-\d{5}", file.name)):
        return match[1]
    for part in reversed(file.with_suffix("").parts):
        for word in re.split(r"[-._ 0-9]+", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return "train"


def image_column(features: dict[str, Any], wanted: str | None) -> str:
    """The column of images: `wanted`, or the only one of that type; raises ConfigError if there is none such."""
    import datasets

    if wanted is not None:
        if wanted not in features:
            hint = nearest(wanted, features)
            raise ConfigError(f"image_column is {wanted!r}{hint}, but the columns are {', '.join(features)}")
        return wanted
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(images) != 1:
        found = f"{len(images)} columns of images ({', '.join(images)})" if images else "no column of images"
        raise ConfigError(f"the dataset has {found}: set image_column to one of {', '.join(features)}")
    return images[0]


def read_labels(
    rows: Any, column: str | None, title: str, numbers: dict[str, int] | None = None
) -> tuple[np.ndarray | None, dict[str, int] | None]:
    """The class of each row (-1: none), and the number of each class; (None, None) where there are none.

    Args:
        column: Numbers, texts, or a ClassLabel; None: the only ClassLabel.
        title: What the rows are of, for messages.
        numbers: The classes to count by; None: those of a ClassLabel, else by the rule of `number_labels`.

    Raises:
        ConfigError: There is no such column, it is of another type, or has a class that is not among `numbers`.
    """
    import datasets

    features = rows.features
    if column is None:
        labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        if len(labels) != 1:
            if labels:
                log.warning("%s: no classes are read, since %s are ClassLabels: set label_column", title, labels)
            return None, None
        (column,) = labels
    elif column not in features:
        raise ConfigError(
            f"label_column is {column!r}{nearest(column, features)}, but the columns are {', '.join(features)}"
        )
    values = rows.select_columns([column])[:][column]
    if isinstance(features[column], datasets.ClassLabel):
        names = features[column].names
        values = [None if value is None or value < 0 else names[value] for value in values]
        numbers = numbers or {name: i for i, name in enumerate(names)}
    elif not all(
        isinstance(value, int | str | None) or (isinstance(value, float) and not value % 1 > 0) for value in values
    ):
        raise ConfigError(f"label_column is {column!r}, of {features[column]}, expected whole numbers or texts")
    return number_labels(values, title, numbers)


class HubImages(ImageDataset):
    """Rows of a Hugging Face dataset; the other arguments are those of ImageDataset.

    Args:
        rows: A map-style `datasets.Dataset`.
        title: What the rows are of, for messages.
        image_column: Its column of images.
        indices: Which rows, in this order; None: all.
        labels, classes: Class of each of `rows`, and names of the classes; None: none.

    Raises:
        ConfigError: The column holds no images.
    """

    def __init__(
        self,
        rows: Any,
        img_size: int,
        title: str,
        image_column: str,
        indices: Sequence[int] | None = None,
        labels: np.ndarray | None = None,
        classes: Sequence[str] | dict[int, str] | None = None,
        **settings,
    ):
        super().__init__(img_size, **settings)
        import datasets

        self.title, self.column = title, image_column
        self.indices = np.arange(len(rows)) if indices is None else np.asarray(indices)
        self.classes, self.labels = classes, None if labels is None else labels[self.indices]
        only = rows.select_columns([image_column])
        try:
            self.rows = only.cast_column(image_column, datasets.Image(decode=False))
            if len(only):
                self.rows[0]
        except (TypeError, ValueError, NotImplementedError, datasets.exceptions.DatasetsError) as error:
            raise ConfigError(
                f"image_column is {image_column!r}, a column of {rows.features[image_column]}, expected images; the "
                f"columns are {', '.join(rows.features)}"
            ) from error

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Image.Image:
        value = self.rows[int(self.indices[index])][self.column]
        if value is None:
            raise BrokenImage(self.name(index), "the row has no image")
        return load_image(value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"]), self.min_size)

    def name(self, index: int) -> str:
        return f"row {self.indices[index]} of {self.title}"

    def identity(self) -> str:
        """Fingerprint of the sizes of the images in their order, img_size and crop."""
        column = self.rows.data.column(self.column)
        sizes = pyarrow.compute.binary_length(pyarrow.compute.struct_field(column, "bytes"))
        values = pyarrow.compute.fill_null(sizes, -1).to_numpy()[self.indices]  # -1: a file elsewhere
        chosen = hashlib.blake2b(values.astype("<i8").tobytes() + self.indices.astype("<i8").tobytes(), digest_size=8)
        return digest([self.crop_identity, self.column, chosen.hexdigest()])

    def content_probe(self, n: int = 512) -> str:
        """Fingerprint of n images, evenly spread."""
        values = [self.rows[int(i)][self.column] or {} for i in self.indices[:: -(-len(self) // n)]]
        return probe(value.get("bytes") or file_ends(value.get("path") or "") for value in values)
