"""A cache on disk of values computed once per image: features of a frozen encoder, latents of a frozen VAE.

A folder holds `records.bin`, an array [n_images, flips, *shape] of raw values, `done.bin`, one byte per image (missing,
stored, unreadable), and `meta.json`, which says what the values are of. Every process maps the same files: readers
share one copy in the page cache. For Linux and macOS.
"""

import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from ..utils.errors import UserError
from ..utils.files import write_atomically
from .images import NoReadableImage

FORMAT = 1
META, RECORDS, DONE = "meta.json", "records.bin", "done.bin"
MISSING, STORED, UNREADABLE = 0, 1, 2  # states of an image, bytes of done.bin

RESERVE = 64 * 2**20  # bytes that a new cache leaves free on the disk
NO_SUPPORT = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENOLCK)  # file systems without locks, or reservation
REMEDY = "use those settings again, or set cache_dir to another folder (or delete this one if nothing else uses it)"


class CacheError(UserError, RuntimeError):
    """A cache that cannot be made, does not fit what is asked of it, or is damaged."""


def record_bytes(shape: Sequence[int], dtype: str = "float16") -> int:
    """Bytes of one record: one image, one flip."""
    return math.prod(shape) * np.dtype(dtype).itemsize


def cache_bytes(n_images: int, flips: int, shape: Sequence[int], dtype: str = "float16") -> int:
    """Bytes on disk of a whole cache, which are all reserved when it is created."""
    return n_images * (flips * record_bytes(shape, dtype) + 1)


def readable_size(n_bytes: float) -> str:
    """A number of bytes in decimal units: 1.5 MB."""
    units = ["kB", "MB", "GB", "TB"]
    while n_bytes >= 1e6 and len(units) > 1:
        n_bytes, units = n_bytes / 1000, units[1:]
    return f"{n_bytes / 1000:.1f} {units[0]}"


def check_space(folder: Path, needed: int) -> None:
    """CacheError if the disk of `folder` lacks room; what another process has just reserved in it counts as room."""
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(parent).free  # asked before the next line: what is reserved in between counts twice
    free += sum((folder / name).stat().st_blocks * 512 for name in (RECORDS, DONE) if (folder / name).exists())
    if needed + RESERVE > free:
        raise CacheError(
            f"a cache in {folder} needs {readable_size(needed)}, but the disk has {readable_size(free)} free, of which "
            f"{readable_size(RESERVE)} stay free: make room, or set cache_dir to a folder on a larger disk"
        )


def _supported(function: Callable, *arguments: Any) -> bool:
    """Call a function of the file system; False if it does not have it."""
    try:
        function(*arguments)
    except OSError as error:
        if error.errno not in NO_SUPPORT:
            raise
        return False
    return True


def _sync_data(fd: int) -> None:
    getattr(os, "fdatasync", os.fsync)(fd)  # macOS has fsync alone


def _reserve(path: Path, size: int) -> None:
    """Make a file of zeros whose space on disk is taken, where the file system can do that."""
    with open(path, "wb") as file:
        if not (hasattr(os, "posix_fallocate") and _supported(os.posix_fallocate, file.fileno(), 0, size)):
            os.ftruncate(file.fileno(), size)
        os.fsync(file.fileno())


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


class RecordCache:
    """Records of images: `flips` arrays of `shape` for each. Made by `open` or `create`.

    Any number of processes may read and write one cache. A record is there for other processes once its writer has
    flushed; a process killed at any moment loses only what it had not flushed. Pickled, it is opened again by its path.

    Attributes:
        flips: Records per image in the files, which is what `write` takes; perhaps more than `open` was asked for.
    """

    def __init__(self, folder: Path, n_images: int, flips: int, shape: Sequence[int], dtype: str):
        self.folder, self.n_images, self.flips = folder, n_images, flips
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self._image_bytes = flips * record_bytes(shape, dtype)
        for name, size in ((RECORDS, n_images * self._image_bytes), (DONE, n_images)):
            found = os.path.getsize(folder / name) if (folder / name).exists() else 0
            if found != size:
                raise CacheError(
                    f"{folder / name} is damaged: it has {found} bytes, expected {size}: delete {folder} to start anew"
                )
        rows = (n_images * flips, math.prod(shape))
        self._records = np.asarray(np.memmap(folder / RECORDS, self.dtype, "r", shape=rows))
        self._done = np.asarray(np.memmap(folder / DONE, np.uint8, "r"))
        self._pending = np.zeros(n_images, np.uint8)  # states that are not in done.bin yet
        self._files: dict = {}  # opened for writing when first needed: a reader's folder may be read-only

    @classmethod
    def open(
        cls, folder: str | Path, key: dict, n_images: int, flips: int, shape: Sequence[int],
        dtype: str = "float16", optional: Collection[str] = (),
    ) -> Optional["RecordCache"]:  # fmt: skip
        """The cache in `folder`, None if there is none (or only what a killed `create` left).

        Args:
            key: Everything that the values depend on, a flat dict of JSON values.
            flips: 1, or 2 with mirrored images; the cache may have more.
            optional: Fields of `key` that are compared only where they are known (not None) on both sides.

        Raises:
            CacheError: There is one that is damaged, or of other settings.
        """
        folder = Path(folder).expanduser().absolute()
        path = folder / META
        try:
            found = json.loads(path.read_bytes())
            version, found_flips, found_key = found["format"], found["flips"], dict(found["key"])
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CacheError(f"cannot read {path}: {error.strerror}: check cache_dir") from error
        except (ValueError, TypeError, KeyError) as error:
            raise CacheError(
                f"{path} is damaged or not of a cache: set cache_dir to another folder, or delete {folder}"
            ) from error
        if version != FORMAT:
            raise CacheError(f"the cache in {folder} has format {version}, expected {FORMAT}: {REMEDY}")

        asked = json.loads(json.dumps(key))
        fields = [("n_images", found.get("n_images"), n_images), ("shape", found.get("shape"), list(shape))]
        fields += [("dtype", found.get("dtype"), dtype), ("flips", found_flips, max(flips, found_flips))]
        for name in sorted(found_key.keys() | asked.keys()):
            was, now = found_key.get(name), asked.get(name)
            if name not in optional or (was is not None and now is not None):
                fields.append((name, was, now))
        differences = [f"{name} was {was!r}, now {now!r}" for name, was, now in fields if was != now]
        if differences:
            raise CacheError(f"the cache in {folder} is of other settings: {'; '.join(differences)}: {REMEDY}")
        return cls(folder, n_images, found_flips, shape, dtype)

    @classmethod
    def create(
        cls, folder: str | Path, key: dict, n_images: int, flips: int, shape: Sequence[int],
        dtype: str = "float16", optional: Collection[str] = (),
    ) -> "RecordCache":  # fmt: skip
        """Make a cache without records and reserve its space on disk; the arguments are those of `open`.

        Several processes may create one cache at the same time: one makes it, the others open it.

        Raises:
            CacheError: No room for it (checked before anything is written), the folder cannot be written, or it holds
                a cache of other settings.
        """
        folder = Path(folder).expanduser().absolute()
        arguments = (folder, key, n_images, flips, shape, dtype, optional)
        if cache := cls.open(*arguments):
            return cache
        needed = cache_bytes(n_images, flips, shape, dtype)
        check_space(folder, needed)
        meta = {
            "format": FORMAT,
            "n_images": n_images,
            "flips": flips,
            "shape": list(shape),
            "dtype": dtype,
            "key": key,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "create.lock", "ab") as lock:
                _supported(fcntl.flock, lock, fcntl.LOCK_EX)
                if not (folder / META).exists():
                    try:
                        _reserve(folder / RECORDS, needed - n_images)
                        _reserve(folder / DONE, n_images)
                        # With this the cache exists.
                        write_atomically(folder / META, lambda path: path.write_text(json.dumps(meta, indent=2) + "\n"))
                    except BaseException:
                        for name in (META, RECORDS, DONE):
                            (folder / name).unlink(missing_ok=True)
                        raise
                return cls.open(*arguments)
        except OSError as error:
            raise CacheError(
                f"cannot make a cache of {readable_size(needed)} in {folder}: {error.strerror}: "
                "make room or give write permission, or set cache_dir to another folder"
            ) from error

    def __reduce__(self) -> tuple:
        return RecordCache, (self.folder, self.n_images, self.flips, self.shape, self.dtype.name)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return cache_bytes(self.n_images, self.flips, self.shape, self.dtype)

    def _states(self, indices: Any = slice(None)) -> np.ndarray:
        done = self._done[indices]
        return np.where(done, done, self._pending[indices])

    def missing(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Indices from start to stop - 1 of the images that are neither stored nor unreadable, ascending."""
        return start + np.flatnonzero(self._states(slice(start, stop)) == MISSING)

    @property
    def complete(self) -> bool:
        return not self.missing().size

    def resolve(self, index: int) -> int:
        """The image itself, or the next that is not marked as unreadable, cyclically, as ImageDataset takes it.

        Raises:
            NoReadableImage: All are marked.
        """
        for offset in range(self.n_images):
            candidate = (index + offset) % self.n_images
            if self._states(candidate) != UNREADABLE:
                return candidate
        raise NoReadableImage(
            f"none of the {self.n_images} images of the cache in {self.folder} could be read: check data_path, then "
            "delete this folder"
        )

    def read(self, indices: Any, flips: Any = 0) -> torch.Tensor:
        """Copy records from the map into a new tensor [B, *shape].

        Args:
            indices: Images [B], each in 0 to n_images - 1.
            flips: Which record of each, 0 or 1, or False and True; [B] or one for all.

        Raises:
            KeyError: An image is not stored.
        """
        indices, flips = np.asarray(indices, dtype=np.int64), np.asarray(flips, dtype=np.int64)
        absent = indices[self._states(indices) != STORED]
        if absent.size:
            raise KeyError(f"image {absent[0]} is not in the cache in {self.folder}")
        out = torch.empty(len(indices), *self.shape, dtype=getattr(torch, self.dtype.name))
        rows = out.numpy().reshape(len(indices), self._records.shape[1])
        np.take(self._records, indices * self.flips + flips, axis=0, out=rows, mode="clip")  # "raise" would copy twice
        return out

    def write(self, indices: Any, values: torch.Tensor) -> None:
        """Write all records of some images; those that are stored or unreadable already are left as they are.

        Args:
            indices: Images [B].
            values: [B, flips, *shape] in the cache's dtype.

        Raises:
            CacheError: Values are infinite or NaN, or the cache is read-only. Images before that one are written.
            OSError: The disk fails. What was flushed before stays readable.
        """
        rows = values.detach().cpu().contiguous().numpy().reshape(len(indices), self.flips * self._records.shape[1])
        for index, record in zip(np.asarray(indices).tolist(), rows):
            if self._states(index) != MISSING:
                continue
            if not np.isfinite(record).all():
                raise CacheError(
                    f"the values of image {index} are infinite or NaN in {self.dtype.name}, expected finite ones: it "
                    "is not stored; look at what computes them, e.g. with repa_encoder_dtype: fp32"
                )
            # Not through the map, where a full disk would be a signal that ends the process.
            _write_at(self._file(RECORDS).fileno(), memoryview(record).cast("B"), index * self._image_bytes)
            self._pending[index] = STORED

    def unreadable(self) -> np.ndarray:
        """Indices of the images that are marked as unreadable, ascending."""
        return np.flatnonzero(self._states() == UNREADABLE)

    def retry_unreadable(self) -> None:
        """Count the images that are marked as unreadable as missing again."""
        for index in self.unreadable():
            _write_at(self._file(DONE).fileno(), memoryview(bytes([MISSING])), int(index))

    def mark_unreadable(self, indices: Sequence[int]) -> None:
        """Note that the files of these images cannot be read; other processes see it after a flush."""
        for index in indices:
            if self._states(index) == MISSING:
                self._pending[index] = UNREADABLE

    def flush(self) -> None:
        """Make the pending records durable, then mark them as stored.

        If that fails, they are not marked, now or later, and count as missing again.
        """
        pending = np.flatnonzero(self._pending)
        if not pending.size:
            return
        try:
            _sync_data(self._file(RECORDS).fileno())
            done = self._file(DONE).fileno()
            for index in pending[self._done[pending] != STORED]:
                _write_at(done, memoryview(self._pending[index : index + 1]), int(index))
            _sync_data(done)
        finally:
            self._pending[pending] = MISSING  # last, so that what is being flushed can be read meanwhile

    def open_for_writing(self) -> None:
        """Raise CacheError now, rather than at the first write, if the cache is read-only."""
        for name in (RECORDS, DONE):
            self._file(name)

    def _file(self, name: str) -> Any:
        """A file of the folder, unbuffered and writable, kept open."""
        if name not in self._files:
            mode = os.O_RDWR | (os.O_CREAT if name == "claim.lock" else 0)
            try:
                self._files[name] = os.fdopen(os.open(self.folder / name, mode, 0o666), "r+b", buffering=0)
            except OSError as error:
                raise CacheError(
                    f"cannot write to {self.folder / name}: {error.strerror}: give write permission, or set cache_dir "
                    "to another folder"
                ) from error
        return self._files[name]

    @contextmanager
    def claim(self, start: int, stop: int) -> Iterator[bool]:
        """Reserve the images start to stop - 1 for this process; gives whether it got them.

        For processes that fill a cache together: each claims a range, looks which images of it are missing now, and
        writes those. At the end the range is flushed and free again, as it is when the process is killed. Where the
        file system has no locks, every claim succeeds. Claims are of a process: its threads do not exclude each other,
        and it loses them all when another object on the same folder is freed.
        """
        lock, place = self._file("claim.lock"), (stop - start, start)
        try:
            _supported(fcntl.lockf, lock, fcntl.LOCK_EX | fcntl.LOCK_NB, *place)
        except (BlockingIOError, PermissionError):  # another process has some of them: EAGAIN or EACCES, by file system
            yield False
            return
        try:
            yield True
        finally:
            try:
                self.flush()
            finally:
                _supported(fcntl.lockf, lock, fcntl.LOCK_UN, *place)
