"""Images of WebDataset's tar shards, read in any order by an index that is built once.

The index of a shard says where each image lies in it, and lies beside it (`NAME.index.npz`), or in the cache folder
where that is not for writing. It holds the shard's size and time, and is built anew when they change.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import socket
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..utils.config import ConfigError
from ..utils.errors import UserError
from ..utils.processes import from_first
from .images import BrokenImage, ImageDataset, digest, load_image, probe

log = logging.getLogger("flextok")

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
LABEL_KEYS = ("cls", "json")
JSON_LABELS = ("label", "cls", "class")  # in a sample's json, the first that is there
VERSION = 1


class ShardError(UserError, ValueError):
    """A tar file that cannot be read as a shard of images."""


@dataclasses.dataclass
class ShardIndex:
    """The images of a shard, or of several: N keys and labels as bytes, and where each lies in which file."""

    keys: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray


def shard_paths(shards: str | Sequence[str], setting: str = "data_path") -> list[Path]:
    """The files that a setting means: a path with braces ({000000..000146}), a folder of tars, or a list of either.

    Raises:
        ConfigError, FileNotFoundError: Not files on this machine, or not there.
    """
    paths: list[Path] = []
    for text in [shards] if isinstance(shards, str) else shards:
        if "://" in text or text.startswith("pipe:"):
            raise ConfigError(
                f"{setting} is {text}: shards are read in any order, so they have to be files; mount or copy them"
            )
        for path in map(Path, expanded(os.path.expanduser(text), setting)):
            paths += sorted(path.glob("*.tar")) if path.is_dir() else [path]
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        what = f"{missing[0]} and {len(missing) - 1} more" if len(missing) > 1 else (missing or [shards])[0]
        raise FileNotFoundError(f"{setting}: there are no shards {what}; expected tar files, or folders that hold some")
    return list(dict.fromkeys(paths))


def expanded(text: str, setting: str) -> list[str]:
    """The paths that braces in a path stand for."""
    if "{" not in text:
        return [text]
    try:
        import braceexpand
    except ImportError as error:
        raise ConfigError(f"{setting} is {text}, whose braces need a package: pip install braceexpand") from error
    try:
        return list(braceexpand.braceexpand(text))
    except ValueError as error:
        raise ConfigError(
            f"{setting} is {text}: {error}; expected braces as in train-{{000000..000146}}.tar"
        ) from error


def read_shard(path: Path) -> ShardIndex:
    """Look through a tar file for images and their labels.

    Raises:
        ShardError: It is damaged or compressed, two samples have one key, or a name climbs out of its folder.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # which would grow with the shard
                name = PurePosixPath(member.name)
                if not member.isfile() or name.name.startswith("."):
                    continue
                if name.is_absolute() or ".." in name.parts:
                    raise ShardError(f"{path}: the name {member.name!r} climbs out of its folder: make the shard again")
                stem, _, kind = name.name.partition(".")
                key, kind = str(name.with_name(stem)), kind.lower()
                if kind in IMAGE_KEYS:
                    if key in images:
                        raise ShardError(f"{path}: two samples have the key {key!r}: make the shard again")
                    images[key] = member.offset_data, member.size
                elif kind in LABEL_KEYS:
                    tar.fileobj.seek(member.offset_data)
                    label = tar.fileobj.read(member.size).decode()
                    if kind == "json":
                        entry = json.loads(label)
                        entry = entry if isinstance(entry, dict) else {}
                        label = next((entry[name] for name in JSON_LABELS if name in entry), None)
                    if label is not None:
                        labels[key] = str(label).strip()
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile ends there without a word
                raise tarfile.ReadError("it ends without the mark of an end")
    except (tarfile.TarError, OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ShardError(
            f"{path} cannot be read as a shard ({type(error).__name__}: {error}): it is cut, damaged or compressed; "
            "copy it again, or unpack it to a plain .tar"
        ) from error
    places = np.array(list(images.values()), dtype=np.int64).reshape(-1, 2)
    texts = [[key.encode() for key in images], [labels.get(key, "").encode() for key in images]]
    keys, values = (np.array(text, dtype=bytes) for text in texts)
    return ShardIndex(keys, values, places[:, 0], places[:, 1])


def index_file(path: Path, cache_dir: Path) -> Path:
    """Where the index of a shard is written: beside it, or in the cache folder."""
    if os.access(path.parent, os.W_OK):
        return path.with_name(f"{path.name}.index.npz")
    return cache_dir / "shards" / f"{digest([str(path.resolve().parent)])}" / f"{path.name}.index.npz"


def load_index(path: Path, cache_dir: Path) -> ShardIndex | None:
    """The index of a shard, if it is there and of this shard as it is."""
    for file in dict.fromkeys([path.with_name(f"{path.name}.index.npz"), index_file(path, cache_dir)]):
        try:
            with np.load(file, allow_pickle=False) as stored:
                if stored["of"].tolist() == _state(path):
                    return ShardIndex(*(stored[field.name] for field in dataclasses.fields(ShardIndex)))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # not there, or cut
            continue
    return None


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [VERSION, status.st_size, status.st_mtime_ns]


def build_index(path: Path, cache_dir: Path) -> None:
    """Write the index of a shard."""
    state, index, file = _state(path), read_shard(path), index_file(path, cache_dir)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")  # runs may start side by side
    with open(temporary, "wb") as output:
        np.savez(output, of=np.array(state), **vars(index))
    os.replace(temporary, file)


def load_indices(paths: list[Path], cache_dir: Path) -> list[ShardIndex]:
    """The index of each shard; those that are missing or old are built first, in parallel, by the first process."""

    found = {path: load_index(path, cache_dir) for path in paths}
    missing = [path for path, index in found.items() if index is None]

    def build_missing() -> None:
        if missing:
            build = functools.partial(build_index, cache_dir=cache_dir)
            with multiprocessing.Pool(min(os.cpu_count() or 1, len(missing))) as pool:
                for _ in tqdm(pool.imap_unordered(build, missing), "index of shards", len(missing), unit="shard"):
                    pass

    from_first(build_missing)
    found.update({path: load_index(path, cache_dir) for path in missing})
    indices = [index for index in found.values() if index is not None]
    if len(indices) < len(paths):
        path = next(path for path, index in found.items() if index is None)
        raise ShardError(f"the index of {path} cannot be read: process 0 wrote it where this one has no access")
    if not any(len(index.keys) for index in indices):
        others = "" if len(paths) == 1 else f" and {len(paths) - 1} more"
        raise ShardError(f"{paths[0]}{others} hold no images: expected files {', '.join(IMAGE_KEYS)}")
    return indices


class ShardImages(ImageDataset):
    """Images of tar shards; the other arguments are those of ImageDataset.

    Args:
        paths: The shards.
        index: One for each.
        classes: Names of the classes; None: none.
        chosen: Which images, in this order, counted over all shards; None: all.

    Raises:
        ConfigError: There are labels that are not among `classes`.
    """

    def __init__(
        self,
        paths: list[Path],
        index: list[ShardIndex],
        img_size: int,
        classes: list[str] | None = None,
        chosen: Sequence[int] | None = None,
        **settings,
    ):
        super().__init__(img_size, **settings)
        self.paths, counts = paths, [len(of_shard.keys) for of_shard in index]
        self.chosen = np.arange(sum(counts)) if chosen is None else np.asarray(chosen)
        join = lambda name: np.concatenate([getattr(of_shard, name) for of_shard in index])[self.chosen]  # noqa: E731
        self.shards = np.repeat(np.arange(len(paths), dtype=np.int32), counts)[self.chosen]
        self.keys, self.offsets, self.sizes, labels = map(join, ("keys", "offsets", "sizes", "labels"))
        self.classes, self.labels = classes, None if classes is None else numbered(labels, classes)
        self._files: dict[int, int] = {}  # descriptors of the shards read last

    def __len__(self) -> int:
        return len(self.keys)

    def _bytes(self, index: int, size: int | None = None) -> bytes:
        shard = int(self.shards[index])
        if shard not in self._files:
            if len(self._files) >= 64:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
        return os.pread(self._files[shard], size or int(self.sizes[index]), int(self.offsets[index]))

    def read(self, index: int) -> Image.Image:
        content = self._bytes(index)
        if len(content) < self.sizes[index]:
            raise BrokenImage(self.name(index), "its shard has become shorter")
        return load_image(io.BytesIO(content), self.min_size)

    def name(self, index: int) -> str:
        return f"{self.paths[self.shards[index]]}/{self.keys[index].decode()}"

    def identity(self) -> str:
        """Fingerprint of names and sizes of the shards, which images, img_size and crop."""
        shards = [f"{path.name} {path.stat().st_size}" for path in self.paths]
        chosen = hashlib.blake2b(self.chosen.astype("<i8").tobytes(), digest_size=8).hexdigest()
        return digest([self.crop_identity, *shards, chosen])

    def content_probe(self, n: int = 512) -> str:
        """Fingerprint of the first 4 kB of n images, evenly spread."""
        return probe(self._bytes(i, min(4096, int(self.sizes[i]))) for i in range(0, len(self), -(-len(self) // n)))

    def __getstate__(self) -> dict:
        return {**vars(self), "_files": {}}


def class_names(index: list[ShardIndex]) -> list[str] | None:
    """The classes of all images of some shards: whole numbers in their order, else names, sorted; None without labels.

    An image without a label means that there are none.
    """
    labels = sorted(set(itertools.chain.from_iterable(np.unique(of_shard.labels).tolist() for of_shard in index)))
    if b"" in labels:
        return None
    texts = [label.decode() for label in labels]
    if all(text.isdecimal() and len(text) < 6 and text == str(int(text)) for text in texts):
        return [str(i) for i in range(max(map(int, texts)) + 1)]
    return texts


def numbered(labels: np.ndarray, classes: list[str]) -> np.ndarray:
    """Labels as numbers of `classes`; raises ConfigError for one that is not among them."""
    names, places = np.unique(labels, return_inverse=True)
    numbers = {name.encode(): i for i, name in enumerate(classes)}
    unknown = [name.decode() for name in names.tolist() if name not in numbers]
    if unknown:
        raise ConfigError(f"the label {unknown[0]!r} of val_path is none of the {len(classes)} classes of data_path")
    return np.array([numbers[name] for name in names.tolist()], dtype=np.int32)[places]
