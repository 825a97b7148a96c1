"""Images of WebDataset's tar shards, read in any order by an index that is built once.

The index of a shard says where each image lies in it and what is left out, and lies beside it (`NAME.index.npz`), or in
the cache folder where that is not for writing. It holds the shard's size and time, and is built anew when they change.

Names are read as WebDataset reads them: the key of a sample ends at the first dot of a file's name, what follows is the
kind of the file.
"""

import dataclasses
import functools
import glob
import hashlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import re
import socket
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..utils.config import ConfigError
from ..utils.errors import UserError
from ..utils.processes import from_first
from .images import EXTENSIONS, OTHER_IMAGES, BrokenImage, ImageDataset, digest, load_image, probe
from .labels import natural_key

log = logging.getLogger("flextok")

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
LABEL_KEYS = ("cls", "json")
JSON_LABELS = ("label", "cls", "class")  # in a sample's json, the first that is there
ARCHIVE = re.compile(r"\.(tar|tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
IMAGE_ENDS = OTHER_IMAGES.union(EXTENSIONS)
OTHER_FILES = "other files"  # captions and the like
VERSION = 2


class ShardError(UserError, ValueError):
    """A tar file that cannot be read as a shard of images."""


@dataclasses.dataclass
class ShardIndex:
    """The images of a shard: N keys and labels (empty: none) as bytes, and where each lies.

    `left_out` is a text, JSON: by reason, how many files of the shard are not taken, and the name of one.
    """

    keys: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    left_out: np.ndarray


def shard_paths(shards: str | Sequence[str], setting: str = "data_path") -> list[Path]:
    """The files that a setting means: a path with braces ({000000..000146}), a folder of tars, or a list of either.

    Of a folder those that end in .tar, in any case; the log counts compressed ones, and those of its sub-folders.

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
            if not path.is_dir():
                paths.append(path)
                continue
            names = glob.glob("**", root_dir=path, recursive=True)
            found = [path / name for name in names if ARCHIVE.search(name) and (path / name).is_file()]
            plain = [file for file in found if file.suffix.lower() == ".tar"]
            taken = sorted((file for file in plain if file.parent == path), key=lambda file: natural_key(file.name))
            if len(taken) < len(found):
                log.warning(
                    "%s %s: %d archives are left out (such as %s): %d compressed, which have to be unpacked to plain "
                    ".tar, and %d of sub-folders, which have to be named in a list",
                    setting, path, len(found) - len(taken), min(set(found) - set(taken)).relative_to(path),
                    len(found) - len(plain), len(plain) - len(taken),
                )  # fmt: skip
            paths += taken
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


def members(path: Path) -> Iterator[tuple[int, tarfile.TarInfo, BinaryIO]]:
    """What a tar file holds, or several that were joined: the archive's number, the member, and the open file."""
    with open(path, "rb") as file:
        for archive in itertools.count():
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members.clear()  # type: ignore[attr-defined]  # which would grow with the shard
                    yield archive, member, file
            file.seek(tar.offset)
            block = file.read(tarfile.BLOCKSIZE)
            if block != bytes(tarfile.BLOCKSIZE):  # tarfile ends there without a word
                raise tarfile.ReadError("it ends without the mark of an end")
            while block and not block.strip(b"\0"):
                block = file.read(tarfile.BLOCKSIZE)
            if not block:
                return
            file.seek(-len(block), os.SEEK_CUR)


def read_label(kind: str, content: bytes) -> str:
    """The label in a sample's `cls` or `json`, empty for none; raises ValueError if it cannot be read."""
    if kind == "cls":
        return content.decode().strip()
    entry = json.loads(content)
    entry = entry if isinstance(entry, dict) else {}
    label = next((entry[name] for name in JSON_LABELS if entry.get(name) is not None), "")
    if isinstance(label, dict | list):
        raise ValueError(f"{str(label)[:40]} is neither a number nor a text")
    return "" if label != label else str(label).strip()  # NaN


def read_shard(path: Path) -> ShardIndex:
    """Look through a shard for images and their labels: `cls`, or else `json`; one that cannot be read is none.

    Raises:
        ShardError: It is damaged or compressed, two images have one key, or a name climbs out of its folder.
    """
    places: dict[tuple[int, str], tuple[int, int]] = {}  # of all files, by archive and name
    images: dict[tuple[int, str], tuple[int, int]] = {}  # by archive and key
    labels: dict[str, dict[tuple[int, str], str]] = {kind: {} for kind in LABEL_KEYS}
    left_out: dict[str, list] = {}

    def leave_out(reason: str, name: str) -> None:
        left_out.setdefault(reason, [0, name])[0] += 1

    try:
        for archive, member, file in members(path):
            name = PurePosixPath(member.name)
            if member.isdir() or name.name.startswith("."):
                continue
            if name.is_absolute() or ".." in name.parts:
                raise ShardError(f"{path}: the name {member.name!r} climbs out of its folder: make the shard again")
            place = places.get((archive, member.linkname)) if member.islnk() else (member.offset_data, member.size)
            if place is None or member.issparse() or not (member.isreg() or member.islnk()):
                links = "symbolic links" if member.issym() else "hard links to files that are not there"
                leave_out(links if member.issym() or member.islnk() else "sparse or special files", member.name)
                continue
            places[archive, member.name] = place
            stem, _, kind = name.name.partition(".")
            key, kind = (archive, str(name.with_name(stem))), kind.lower()
            if kind in IMAGE_KEYS:
                if key in images:
                    raise ShardError(f"{path}: two images have the key {key[1]!r}: make the shard again")
                images[key] = place
            elif kind in LABEL_KEYS:
                file.seek(place[0])
                try:
                    labels[kind][key] = read_label(kind, file.read(place[1]))
                except (ValueError, RecursionError) as error:
                    leave_out("labels that cannot be read", f"{member.name}: {error}")
            elif name.suffix.lower() not in IMAGE_ENDS:
                leave_out(OTHER_FILES, member.name)
            elif "." in kind:
                leave_out("images with a second dot in their names, where the key ends at the first dot", member.name)
            else:
                leave_out(f"images that are none of {', '.join(IMAGE_KEYS)}", member.name)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ShardError(
            f"{path} cannot be read as a shard ({type(error).__name__}: {error}): it is cut, damaged or compressed; "
            "copy it again, or unpack it to a plain .tar"
        ) from error
    for key in labels["json"] | labels["cls"]:
        if key not in images:
            leave_out("labels without an image", key[1])
    keys = [os.fsencode(key if archive == 0 else f"{key} of archive {archive + 1}") for archive, key in images]
    texts = [(labels["cls"].get(key) or labels["json"].get(key, "")).encode(errors="replace") for key in images]
    where = np.array(list(images.values()), dtype=np.int64).reshape(-1, 2)
    to_bytes = lambda values: np.array(values, dtype=bytes)  # noqa: E731
    return ShardIndex(to_bytes(keys), to_bytes(texts), where[:, 0], where[:, 1], np.array(json.dumps(left_out)))


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


def load_indices(paths: list[Path], cache_dir: Path, setting: str = "data_path") -> list[ShardIndex]:
    """The index of each shard; those that are missing or old are built first, in parallel, by the first process.

    The log says what is left out of the shards.
    """
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
    left_out: dict[str, list] = {}
    for path, index in zip(paths, indices, strict=True):
        for reason, (n, name) in json.loads(index.left_out.item()).items():
            left_out.setdefault(reason, [0, f"{path.name}/{name}"])[0] += n
    if left_out:
        shown = "; ".join(f"{n} {reason} (such as {name})" for reason, (n, name) in left_out.items())
        level = logging.INFO if left_out.keys() == {OTHER_FILES} else logging.WARNING
        log.log(level, "%s: not taken from the shards are %s", setting, shown)
    return indices


class ShardImages(ImageDataset):
    """Images of tar shards; the other arguments are those of ImageDataset.

    Args:
        paths: The shards.
        index: One for each.
        labels, classes: Class of each image of all shards, and names of the classes; None: none.
        chosen: Which images, in this order, counted over all shards; None: all.
    """

    def __init__(
        self,
        paths: list[Path],
        index: list[ShardIndex],
        img_size: int,
        labels: np.ndarray | None = None,
        classes: Sequence[str] | dict[int, str] | None = None,
        chosen: Sequence[int] | None = None,
        **settings,
    ):
        super().__init__(img_size, **settings)
        self.paths, counts = paths, [len(of_shard.keys) for of_shard in index]
        self.chosen = np.arange(sum(counts)) if chosen is None else np.asarray(chosen)
        join = lambda name: np.concatenate([getattr(of_shard, name) for of_shard in index])[self.chosen]  # noqa: E731
        self.shards = np.repeat(np.arange(len(paths), dtype=np.int32), counts)[self.chosen]
        self.keys, self.offsets, self.sizes = map(join, ("keys", "offsets", "sizes"))
        self.classes, self.labels = classes, None if labels is None else labels[self.chosen]
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
        return f"{self.paths[self.shards[index]]}/{os.fsdecode(self.keys[index])}"

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


def shard_labels(index: list[ShardIndex]) -> list[str]:
    """The label of each image of some shards, empty for none."""
    return [label.decode() for of_shard in index for label in of_shard.labels.tolist()]
