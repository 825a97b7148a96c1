"""Folders of images: find the files, split them, read any of them as RGB, serve them as tensors in [-1, 1]."""

import errno
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch.utils.data import Dataset

from ..utils.errors import UserError
from ..utils.random import generator, uniform_number

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # no EPS: Pillow would run Ghostscript

# A 20000 x 10000 panorama passes; decoded, it takes 4 bytes per pixel in Pillow.
MAX_PIXELS = 250_000_000
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow itself would refuse from 179 million
# Compressed texts and colour profiles of PNG files: Pillow would refuse an image for one of more than 1 MB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB

CELEBAHQ_SIZE = 30_000
# Sub-folders that hold the images where the folder itself holds none: the second and third are CelebAMask-HQ's.
IMAGE_FOLDERS = ("images", "CelebA-HQ-img", "CelebAMask-HQ/CelebA-HQ-img")

# An image by its index, or (index, optimizer step, position in the global batch of that step).
Item = int | tuple[int, int, int]


class NoReadableImage(UserError, RuntimeError):
    """A dataset of which no file can be read."""


class BrokenImage(Exception):
    """The image file at `path` cannot be read, for `reason`."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = Path(path), reason

    def __str__(self) -> str:
        return f"cannot read the image {self.path}: {self.reason}"


class BrokenFile(NamedTuple):
    """A file that was skipped because it cannot be read, and why."""

    path: str
    reason: str


def _natural_key(name: str) -> tuple:
    """Sort key that compares runs of digits as numbers: a2 < a10."""
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _is_image_file(path: Path) -> bool:
    if path.name.startswith(".") or path.suffix.lower() not in EXTENSIONS:
        return False
    if path.is_symlink() and not path.exists():
        logger.warning("%s is a link to nothing, or to itself: it is left out", path)
    return path.is_file()


def _log_unreadable_folder(error: OSError) -> None:
    logger.warning("cannot read the folder %s (%s): its images are left out", error.filename, error.strerror)


def list_images(folder: str | Path, setting: str = "data_path") -> list[Path]:
    """The image files in `folder` and its sub-folders, in an order that does not depend on the file system.

    If `folder` has no image directly but a sub-folder of IMAGE_FOLDERS, only that sub-folder is taken. Hidden files
    and folders are skipped; linked folders are followed, each real folder once; a broken link is named in the log. The
    order is by number if all stems are numbers (CelebA-HQ: 2.jpg before 10.jpg), else natural (a2 before a10). Where
    images come from sub-folders, the log says from which.

    Raises:
        FileNotFoundError: No such folder, or no image in it.
        NotADirectoryError: `folder` is a file.
    """
    given = root = Path(folder).expanduser()
    if not root.exists():
        raise FileNotFoundError(
            f"{setting} is {root}, which does not exist (working directory: {Path.cwd()}): "
            "set it to the folder that holds your images"
        )
    if not root.is_dir():
        raise NotADirectoryError(f"{setting} is {root}, a file: set it to the folder that holds your images")
    inner = next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), None)
    if inner is not None and not any(_is_image_file(path) for path in root.iterdir()):
        root = inner

    paths, seen = [], set()
    for parent, folders, files in os.walk(root, followlinks=True, onerror=_log_unreadable_folder):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [path for path in (Path(parent, name) for name in files) if _is_image_file(path)]
    if not paths:
        raise FileNotFoundError(
            f"no images in {root} or its sub-folders: expected files that end in {', '.join(EXTENSIONS)}; "
            f"check {setting}"
        )
    _log_sub_folders(given, root, paths, setting)

    by_number = all(path.stem.isdecimal() for path in paths)

    def sort_key(path: Path) -> tuple:
        return int(path.stem) if by_number else 0, _natural_key(path.relative_to(root).as_posix())

    return sorted(paths, key=sort_key)


def _log_sub_folders(given: Path, root: Path, paths: Sequence[Path], setting: str) -> None:
    """Say which sub-folders of `given` the images come from, where that is not plain."""
    if root != given and len([path for path in given.iterdir() if path.is_dir()]) > 1:
        logger.info("%s %s: only the %d images of its folder %s are taken", setting, given, len(paths),
                    root.relative_to(given))  # fmt: skip
    counts = Counter(path.relative_to(root).parts[0] if path.parent != root else "." for path in paths)
    if len(counts) > 1:
        largest = ", ".join(f"{name} ({n})" for name, n in sorted(counts.items(), key=lambda item: -item[1])[:5])
        more = f" and {len(counts) - 5} more" if len(counts) > 5 else ""
        logger.info("%s %s: %d images of all its folders are taken: %s%s", setting, root, len(paths), largest, more)


def split_paths(
    paths: Sequence[Path], dataset_name: str, val_fraction: float, seed: int
) -> tuple[list[Path], list[Path], list[Path]]:
    """Divide `paths` into (train, validation, test), each in the order of `paths`.

    `celebahq` is divided in order, 27000 / 1500 / 1500; another number of files than 30000 gives a warning and the
    same proportions. Any other dataset gets a random validation part, the same for a seed, and no test part.

    Args:
        val_fraction: In [0, 1); above 0, at least one of two or more files is for validation. Unused for `celebahq`.
    """
    n = len(paths)
    if dataset_name == "celebahq":
        if n != CELEBAHQ_SIZE:
            logger.warning(
                "dataset_name is celebahq, which has %d images, but %d were found: splitting them 90/5/5 in order; "
                "set dataset_name: folder to split by val_fraction",
                CELEBAHQ_SIZE,
                n,
            )
        n_test = n // 20
        n_val = max(n_test, 1) if n > 1 else 0
        n_train = n - n_val - n_test
        return list(paths[:n_train]), list(paths[n_train : n_train + n_val]), list(paths[n_train + n_val :])

    n_val = min(max(round(n * val_fraction), 1), n - 1) if val_fraction > 0 and n > 1 else 0
    chosen = set(torch.randperm(n, generator=generator(seed, "split"))[:n_val].tolist())
    train = [path for i, path in enumerate(paths) if i not in chosen]
    return train, [paths[i] for i in sorted(chosen)], []


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale a grey image of more than 8 bits to mode L.

    Unsigned 16-bit files are scaled from 0..65535. In modes I and F, where the file does not say what white is, it
    is the least of 1 (F only), 255 and 65535 that no value exceeds, else the largest value; with negative values, the
    image's own minimum and maximum become black and white.
    """
    values = np.array(image, dtype=np.float32)  # changed in place from here: such images can be huge
    np.nan_to_num(values, copy=False, posinf=0.0, neginf=0.0)
    black, white = min(0.0, float(values.min())), float(values.max())
    if black == 0:
        levels = {"F": (1.0, 255.0, 65535.0), "I": (255.0, 65535.0)}.get(image.mode, (65535.0,))
        white = next((level for level in levels if white <= level), white)
    values -= black
    values *= 255 / ((white - black) or 1.0)
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _grey_to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def load_image(path: str | Path, min_size: int | None = None) -> Image.Image:
    """Read an image file of any mode as 8-bit RGB.

    It is upright by its EXIF tag, transparency is laid over white, and of several frames the first is taken.

    Args:
        min_size: A large JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, with a short side of at least twice this.

    Raises:
        BrokenImage: The file is missing, empty, truncated, no image, or has more than `MAX_PIXELS` pixels.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BrokenImage(path, f"{width} x {height} pixels, more than the limit of {MAX_PIXELS}")
            if min_size is not None:
                image.draft(None, (2 * min_size, 2 * min_size))
            image.load()
            try:
                ImageOps.exif_transpose(image, in_place=True)
            except Exception as error:  # pixels are good without the EXIF block
                logger.debug("damaged EXIF block in %s: %s", path, error)
            return _to_rgb(image)
    except BrokenImage:
        raise
    except UnidentifiedImageError:
        raise BrokenImage(path, "empty, damaged, or not a JPEG, PNG, WebP, BMP, TIFF or GIF image") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError and others
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):  # too many open files: not the image's fault
            raise
        raise BrokenImage(path, f"{type(error).__name__}: {error}") from error


def pixels_to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Turn uint8 [H, W, 3] into float32 [3, H, W] in [-1, 1]."""
    return torch.tensor(pixels).permute(2, 0, 1).float().div(127.5).sub(1).contiguous()


def image_to_tensor(image: Image.Image, size: int, crop: tuple[float, float] = (0.5, 0.5)) -> torch.Tensor:
    """Scale the short side of an RGB image to `size` and crop it to a square: float32 [3, size, size] in [-1, 1].

    The scaling is bicubic and antialiased, up or down.

    Args:
        crop: Relative (x, y) position of the window, 0 (left, top) to 1 (right, bottom), in what the scaled image has
            beyond it, rounded to whole pixels of the result.
    """
    side = min(image.size)
    # Only the window is computed: a 1 x 20000 image scaled as a whole would not fit in memory.
    corner = []
    for length, place in zip(image.size, crop, strict=True):
        offset = round(place * ((length - side) * size // side))
        corner.append(min(offset * side / size, length - side))
    box = (corner[0], corner[1], corner[0] + side, corner[1] + side)
    return pixels_to_tensor(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box)))


def resolve_item(item: Item, n_images: int) -> tuple[int, int, int, bool]:
    """Turn a dataset item into (index, step, position, augment): a plain index has step 0 and no augmentation."""
    if isinstance(item, tuple):
        index, step, position = item
        return range(n_images)[index], step, position, True
    index = range(n_images)[item]
    return index, 0, index, False


def drawn_flip(seed: int, step: int, position: int) -> bool:
    """Whether the image at this address is mirrored, where mirroring is on."""
    return uniform_number(seed, "flip", step, position) < 0.5


def digest(lines: Iterable[str]) -> str:
    """A short hexadecimal fingerprint of some lines of text."""
    hasher = hashlib.blake2b(digest_size=8)
    for line in lines:
        hasher.update(os.fsencode(line) + b"\n")
    return hasher.hexdigest()


class ImageFolderDataset(Dataset):
    """Image files, scaled and cropped to a square.

    An item is an index, served without augmentation, or `(index, step, position)`, whose flip and crop are drawn at
    that address (see `flextok.utils.random`). It gives a dict:

    - `image`: float32 [3, img_size, img_size] in [-1, 1].
    - `index`: index of the image served. A file that cannot be read is replaced by the next one that can.
    - `position`: place in the global batch; the index itself for a plain index.
    - `flip`: whether the image is mirrored.
    - `broken`: the files that were skipped to serve this item, each a BrokenFile.

    Args:
        paths: Image files; at least one.
        img_size: Side of the square in pixels.
        flip: Mirror every other image, by address.
        random_crop: Place the square by address along the longer side; else in the centre.
        seed: The run's seed.

    Raises:
        RuntimeError: On access, if no file of the dataset can be read.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        img_size: int,
        flip: bool = False,
        random_crop: bool = False,
        seed: int = 0,
    ):
        self.paths = [Path(path) for path in paths]
        self.img_size, self.flip, self.random_crop, self.seed = img_size, flip, random_crop, seed
        root = os.path.commonpath([path.parent for path in self.paths])
        self.names = [Path(os.path.relpath(path, root)).as_posix() for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: Item) -> dict:
        first, step, position, augment = resolve_item(item, len(self))
        index, picture, broken = self._read_from(first)
        place = uniform_number(self.seed, "crop", step, position) if augment and self.random_crop else 0.5
        flip = augment and self.flip and drawn_flip(self.seed, step, position)
        image = image_to_tensor(picture, self.img_size, (place, place))
        return {
            "image": image.flip(-1) if flip else image,
            "index": index,
            "position": position,
            "flip": flip,
            "broken": broken,
        }

    def _read_from(self, first: int) -> tuple[int, Image.Image, tuple[BrokenFile, ...]]:
        """The first readable image at or after `first`, cyclically: (index, image, files skipped)."""
        broken = []
        for offset in range(len(self)):
            index = (first + offset) % len(self)
            try:
                return index, load_image(self.paths[index], self.img_size), tuple(broken)
            except BrokenImage as error:
                broken.append(BrokenFile(str(error.path), error.reason))
        raise NoReadableImage(
            f"none of the {len(self)} images of the dataset can be read (the first, {broken[0].path}: "
            f"{broken[0].reason}): check that data_path is still there and holds images"
        )

    def identity(self) -> str:
        """Fingerprint of what the dataset holds: names and sizes of files, img_size, random_crop. Reads no file."""
        settings = f"{self.img_size} {self.random_crop}"
        files = zip(self.names, self.paths, strict=True)
        return digest([settings, *(f"{name} {_file_size(path)}" for name, path in files)])

    def content_probe(self, n: int = 512) -> str:
        """Fingerprint of the first and last 4 kB of n files, evenly spread, beyond names and sizes."""
        chosen = range(0, len(self), -(-len(self) // n))
        return digest(hashlib.blake2b(_file_ends(self.paths[i]), digest_size=8).hexdigest() for i in chosen)


def _file_ends(path: Path, size: int = 4096) -> bytes:
    """The first and the last bytes of a file; nothing if it is gone."""
    try:
        with open(path, "rb") as file:
            first = file.read(size)
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            return first + file.read(size)
    except OSError:
        return b""


def _file_size(path: Path) -> int:
    """Bytes in a file, -1 if it is gone."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


class ImagesInMemory(Dataset):
    """Images kept in memory as uint8; items and their dicts are those of `ImageFolderDataset`.

    `index` is always the one asked for, `broken` is empty.

    Args:
        pixels: uint8 [N, S, S, 3].
        names: What each image is, N texts; with the size they are the set's identity.
        flip: Mirror every other image, by address.
        seed: Seed of the flips.
    """

    kind: str  # what the images are, in a word

    def __init__(self, pixels: np.ndarray, names: Sequence[str], flip: bool = False, seed: int = 0):
        self.pixels, self.names, self.flip, self.seed = pixels, list(names), flip, seed
        self.img_size = pixels.shape[1]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, item: Item) -> dict:
        index, step, position, augment = resolve_item(item, len(self))
        flip = augment and self.flip and drawn_flip(self.seed, step, position)
        image = pixels_to_tensor(self.pixels[index])
        return {
            "image": image.flip(-1) if flip else image,
            "index": index,
            "position": position,
            "flip": flip,
            "broken": (),
        }

    def identity(self) -> str:
        """Fingerprint of what the dataset holds: names and img_size."""
        return digest([f"{self.kind} {self.img_size}", *self.names])

    def content_probe(self) -> str:
        """Fingerprint of the pixels of the first images."""
        return digest([hashlib.blake2b(self.pixels[:10].tobytes(), digest_size=8).hexdigest()])
