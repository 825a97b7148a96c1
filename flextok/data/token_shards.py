"""Tokens of a data set on disk: shards that are written whole or not at all, and a Dataset that reads them."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.numpy import save
from torch.utils.data import Dataset

from ..utils.errors import UserError
from ..utils.files import write_atomically
from ..utils.plain import read_json_object

META, NAMES = "meta.json", "names.json"
FORMATS = ("safetensors", "parquet")


class TokenShardsError(UserError, RuntimeError):
    """A folder of tokens that is not complete."""


def shard_path(folder: Path, shard: int, format: str) -> Path:
    return folder / f"tokens-{shard:05}.{format}"


def token_dtype(codebook_size: int) -> np.dtype:
    """The smallest integers that hold every token; for published models (64,000 codes) uint16."""
    return np.dtype(np.uint16 if codebook_size <= 1 << 16 else np.int32 if codebook_size <= 1 << 31 else np.int64)


def import_pyarrow() -> Any:
    """The module pyarrow, with its parquet; raises ModuleNotFoundError with the line that installs it."""
    try:
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise ModuleNotFoundError("the format parquet needs pyarrow: pip install pyarrow") from error
    return pyarrow


def write_shard(path: Path, tokens: np.ndarray, index: Sequence[int], labels: Sequence[int] | None) -> None:
    """Write the tokens [n, views, L] of n images, with the index and perhaps the label of each.

    Safetensors hold them so; Parquet has a row for each view of each image, in this order: index, view, label, tokens.
    """
    columns = {"index": np.array(index, dtype=np.int64)}
    if labels is not None:
        columns["label"] = np.array(labels, dtype=np.int64)
    if path.suffix == ".safetensors":
        write_atomically(path, lambda file: file.write_bytes(save({"tokens": tokens, **columns})))
        return
    pyarrow, (n, views, length) = import_pyarrow(), tokens.shape
    columns = {name: np.repeat(values, views) for name, values in columns.items()}
    columns["view"] = np.tile(np.arange(views), n)
    rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(tokens.reshape(-1)), length)
    table = pyarrow.table({**columns, "tokens": rows})
    write_atomically(path, lambda file: pyarrow.parquet.write_table(table, file))


class TokenShards(Dataset):
    """The tokens that `python -m flextok.data.tokens` wrote into a folder, one item per image.

    An item is a dict: `tokens` long [views, L], `index` of the image in its data set, and, where there are classes,
    `label`: the data set's own number of its class, or -1 for none. Safetensors are read row by row, Parquet files
    whole, when they are first needed.

    Attributes:
        meta: What the tokens are of: see README_OPERATIONS.md.
        index, labels: Of all images, int64 [N]; labels are None where the data set has no classes.

    Raises:
        FileNotFoundError: The folder holds no tokens.
        TokenShardsError: Shards are missing.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        if not (self.folder / META).is_file():
            raise FileNotFoundError(
                f"{self.folder} has no {META}: expected a folder that python -m flextok.data.tokens wrote"
            )
        self.meta = read_json_object(self.folder / META)
        self.paths = [shard_path(self.folder, i, self.meta["format"]) for i in range(self.meta["n_shards"])]
        missing = [path.name for path in self.paths if not path.is_file()]
        if missing:
            raise TokenShardsError(
                f"{len(missing)} of {len(self.paths)} shards are missing in {self.folder}, the first {missing[0]}: run "
                "the command that wrote the others again, it goes on there"
            )
        index = [self._column(path, "index") for path in self.paths]
        self.index = np.concatenate(index)
        self.labels = None
        if self.meta["has_labels"]:
            self.labels = np.concatenate([self._column(path, "label") for path in self.paths])
        self._starts = [0, *itertools.accumulate(map(len, index))]  # of each shard, in this dataset
        self._open: dict[int, Any] = {}  # tokens [n, views, L] by shard

    def __getstate__(self) -> dict:
        return {**vars(self), "_open": {}}  # a process that loads opens its own files

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict:
        i = range(len(self))[i]
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        if shard not in self._open:
            self._open[shard] = self._tokens(self.paths[shard])
        row = i - self._starts[shard]
        tokens = self._open[shard][row : row + 1][0]
        item = {"tokens": torch.from_numpy(tokens.astype(np.int64)), "index": int(self.index[i])}
        return item if self.labels is None else {**item, "label": int(self.labels[i])}

    @property
    def names(self) -> list[str]:
        """Names of all images of the data set, by index."""
        return read_json_object(self.folder / NAMES)["names"]

    def _column(self, path: Path, name: str) -> np.ndarray:
        """`index` or `label` of each image of a shard."""
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "numpy") as file:
                return file.get_tensor(name)
        table = import_pyarrow().parquet.read_table(path, columns=[name])
        return table[name].to_numpy()[:: len(self.meta["views"])]

    def _tokens(self, path: Path) -> Any:
        """The tokens [n, views, L] of a shard, to take slices of."""
        if path.suffix == ".safetensors":
            return safetensors.safe_open(path, "numpy").get_slice("tokens")
        pyarrow = import_pyarrow()
        tokens = pyarrow.compute.list_flatten(pyarrow.parquet.read_table(path, columns=["tokens"])["tokens"])
        return tokens.to_numpy().reshape(-1, len(self.meta["views"]), self.meta["tokens_per_image"])
