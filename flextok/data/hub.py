"""Images of a Hugging Face dataset: by its name on the Hub, a folder of parquet files, or one of `save_to_disk`."""

import hashlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow.compute
from PIL import Image

from ..utils.config import ConfigError, nearest
from ..utils.network import reachable
from ..utils.processes import rank
from .images import BrokenImage, ImageDataset, digest, file_ends, load_image, probe

log = logging.getLogger("flextok")

VALIDATION_SPLITS = ("validation", "val", "valid")


def load_splits(path: str, name: str | None = None, revision: str | None = None) -> dict[str, Any]:
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
            found = datasets.load_dataset(str(folder), name)
        else:
            if not reachable(huggingface_hub.constants.ENDPOINT):  # else each request is repeated for half a minute
                if revision is not None:  # the cache does not say of which revision it is
                    raise ConnectionError(f"{huggingface_hub.constants.ENDPOINT} cannot be reached")
                huggingface_hub.constants.HF_HUB_OFFLINE = True
            found = datasets.load_dataset(path, name, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        at = "" if revision is None else f" --revision {revision}"
        where = "it cannot be read as a dataset (data_config names a configuration)"
        if not folder.exists() and isinstance(error, FileNotFoundError | ConnectionError):
            where = (
                f"there is no folder {path}, and no dataset of this name in the Hugging Face cache or within reach; "
                f"without network, run `hf download {path} --repo-type dataset{at} --local-dir FOLDER` elsewhere, copy "
                "the folder here and set data_path to it"
            )
        raise ConfigError(f"data_path is {path!r}: {where} ({type(error).__name__}: {str(error)[:300]})") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


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
    rows: Any, column: str | None, classes: list[str] | None = None
) -> tuple[np.ndarray | None, list[str] | None]:
    """The class of each row (-1: none), and the names of the classes; (None, None) where there are none.

    Args:
        column: Numbers, texts, or a ClassLabel; None: the only ClassLabel.
        classes: The classes to count by; None: those of the column, texts and numbers sorted.

    Raises:
        ConfigError: There is no such column, it is of another type, or has a class that is not among `classes`.
    """
    import datasets

    features = rows.features
    if column is None:
        labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        if len(labels) != 1:
            return None, None
        (column,) = labels
    elif column not in features:
        raise ConfigError(
            f"label_column is {column!r}{nearest(column, features)}, but the columns are {', '.join(features)}"
        )
    values = rows.select_columns([column])[:][column]
    names = list(features[column].names) if isinstance(features[column], datasets.ClassLabel) else None
    if names is None:
        if not all(isinstance(value, int | str | None) for value in values):
            raise ConfigError(f"label_column is {column!r}, of {features[column]}, expected whole numbers or texts")
        found = sorted({value for value in values if value is not None})
        numbers = {value: i for i, value in enumerate(found)}
        values, names = [numbers.get(value) for value in values], [str(value) for value in found]
    labels = np.array([-1 if value is None else value for value in values])
    if classes is None:
        return labels, names
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise ConfigError(f"the validation images have the class {unknown[0]!r}, which the training images do not have")
    order = np.array([classes.index(name) for name in names] + [-1])  # the last for -1
    return order[labels], classes


class HubImages(ImageDataset):
    """Rows of a Hugging Face dataset; the other arguments are those of ImageDataset.

    Args:
        rows: A map-style `datasets.Dataset`.
        title: What the rows are of, for messages.
        image_column, label_column: Columns; None: found by their types.
        indices: Which rows, in this order; None: all.
        classes: Names of the classes; None: those that are found.

    Raises:
        ConfigError: There is no such column, or it holds no images.
    """

    def __init__(
        self,
        rows: Any,
        img_size: int,
        title: str,
        image_column: str,
        label_column: str | None = None,
        indices: Sequence[int] | None = None,
        classes: list[str] | None = None,
        **settings,
    ):
        super().__init__(img_size, **settings)
        import datasets

        self.title, self.column = title, image_column
        self.indices = np.arange(len(rows)) if indices is None else np.asarray(indices)
        labels, self.classes = read_labels(rows, label_column, classes)
        self.labels = None if labels is None else labels[self.indices]
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
