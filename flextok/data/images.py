"""Images: find the files of a folder, split them, read any of them as RGB, serve them as tensors in [-1, 1]."""

import errno
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch.utils.data import Dataset

from ..utils.errors import UserError
from ..utils.random import generator, uniform_number
from .labels import natural_key

logger = logging.getLogger(__name__)

KNOWN = Image.registered_extensions()  # format by extension; loads Pillow's plugins
# No EPS: Pillow would run Ghostscript. AVIF only where Pillow has it.
FORMATS = tuple(form for form in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF") if form in Image.OPEN)
EXTENSIONS = tuple(end for end, form in KNOWN.items() if form in FORMATS)
# Files that look like images, but are not read: what else Pillow knows, and what it does not.
OTHER_IMAGES = {end for end, form in KNOWN.items() if form not in (*FORMATS, "MPEG", "PDF", "HDF5")} | set(
    ".avif .heic .heif .jxl .svg .exr .hdr .raw .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf".split()
)
OTHER_IMAGES -= set(EXTENSIONS)

# A 20000 x 10000 panorama passes; decoded, it takes 4 bytes per pixel in Pillow.
MAX_PIXELS = 250_000_000
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow itself would refuse from 179 million
# Compressed texts and colour profiles of PNG files: Pillow would refuse an image for one of more than 1 MB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB

CELEBAHQ_SIZE = 30_000
# Sub-folders that hold the images where the folder itself holds none: the second and third are CelebAMask-HQ's.
IMAGE_FOLDERS = ("images", "CelebA-HQ-img", "CelebAMask-HQ/CelebA-HQ-img")

# Words by which folders and files are told to be splits of a data set.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}

# An image by its index, or (index, optimizer step, position in the global batch of that step).
Item = int | tuple[int, int, int]


class NoReadableImage(UserError, RuntimeError):
    """A dataset of which no file can be read."""


class BrokenImage(Exception):
    """The image file at `path` cannot be read, for `reason`."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"cannot read the image {path}: {reason}")
        self.path, self.reason = path, reason


class BrokenFile(NamedTuple):
    """An image that was skipped because it cannot be read: its name in the dataset, why, and its index there."""

    path: str
    reason: str
    index: int | None = None


def _is_image_file(path: Path) -> bool:
    if path.name.startswith(".") or path.suffix.lower() not in EXTENSIONS:
        return False
    if path.is_symlink() and not path.exists():
        logger.warning("%s is a link to nothing, or to itself: it is left out", path)
    return path.is_file()


def list_images(folder: str | Path, setting: str = "data_path") -> list[Path]:
    """The image files in `folder` and its sub-folders, in an order that does not depend on the file system.

    If `folder` has no image directly but a sub-folder of IMAGE_FOLDERS, only that sub-folder is taken. Hidden files
    and folders are skipped; linked folders are followed, each real folder once; a broken link is named in the log. The
    order is by number if all stems are numbers (CelebA-HQ: 2.jpg before 10.jpg), else natural (a2 before a10). Where
    images come from sub-folders, the log says from which. Image files of a format that is not read are counted there.

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

    def log_unreadable(error: OSError) -> None:
        logger.warning("cannot read the folder %s (%s): its images are left out", error.filename, error.strerror)

    paths, seen, others = [], set(), []
    for parent, folders, files in os.walk(root, followlinks=True, onerror=log_unreadable):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [path for path in (Path(parent, name) for name in files) if _is_image_file(path)]
        others += [Path(parent, name) for name in files if Path(name).suffix.lower() in OTHER_IMAGES and name[0] != "."]
    if others:
        kinds = Counter(path.suffix.lower() for path in others).most_common()
        logger.warning(
            "%s %s: %d files are left out, of formats that are not read: %s (such as %s); convert them, e.g. to .png",
            setting, root, len(others), ", ".join(f"{n} {kind}" for kind, n in kinds), min(others).relative_to(root),
        )  # fmt: skip
    if not paths:
        raise FileNotFoundError(
            f"no images in {root} or its sub-folders: expected files that end in {', '.join(EXTENSIONS)}; "
            f"check {setting}"
        )

    if root != given and sum(path.is_dir() for path in given.iterdir()) > 1:
        inner_name = root.relative_to(given)
        logger.info("%s %s: only the %d images of its folder %s are taken", setting, given, len(paths), inner_name)
    counts = Counter(path.relative_to(root).parts[0] if path.parent != root else "." for path in paths)
    if len(counts) > 1:
        largest = ", ".join(f"{name} ({n})" for name, n in sorted(counts.items(), key=lambda item: -item[1])[:5])
        more = f" and {len(counts) - 5} more" if len(counts) > 5 else ""
        logger.info("%s %s: %d images of all its folders are taken: %s%s", setting, root, len(paths), largest, more)

    by_number = all(path.stem.isdecimal() for path in paths)

    def sort_key(path: Path) -> tuple:
        return int(path.stem) if by_number else 0, natural_key(path.relative_to(root).as_posix())

    return sorted(paths, key=sort_key)


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

    train, val = split_indices(n, val_fraction, seed)
    return [paths[i] for i in train], [paths[i] for i in val], []


def split_indices(n: int, val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Which of n images train and which validate, each in order: a random part, the same for a seed."""
    n_val = min(max(round(n * val_fraction), 1), n - 1) if val_fraction > 0 and n > 1 else 0
    val = torch.randperm(n, generator=generator(seed, "split"))[:n_val].tolist()
    chosen = set(val)
    return [i for i in range(n) if i not in chosen], sorted(val)


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


def load_image(path: str | Path | IO[bytes], min_size: int | None = None) -> Image.Image:
    """Read an image file, or what a file object holds, of any mode as 8-bit RGB.

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
        raise BrokenImage(path, "empty, damaged, or not a JPEG, PNG, WebP, BMP, TIFF, GIF or AVIF image") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError and others
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):  # too many open files: not the image's fault
            raise
        raise BrokenImage(path, f"{type(error).__name__}: {error}") from error


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
    pixels = torch.tensor(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box)))
    return pixels.permute(2, 0, 1).float().div(127.5).sub(1).contiguous()


def adm_image(image: Image.Image, size: int) -> Image.Image:
    """The centre of an RGB image as guided-diffusion's evaluations take it (ADM, arXiv 2105.05233).

    Halved by a box filter while its short side is at least twice `size`, scaled to it bicubically, cropped in the
    centre: the images that published FID values of ImageNet refer to.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_window(
    size: tuple[int, int], scale: Sequence[float], ratio: Sequence[float], draw: Callable[[str], float]
) -> tuple[int, int, int, int]:
    """A window (left, top, right, bottom) of random area and shape in an image of `size` (width, height).

    Args:
        scale: Least and largest share of the image's area.
        ratio: Least and largest width / height; log-uniform.
        draw: Gives a number in [0, 1) for a name.
    """
    width, height = size
    for i in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * draw(f"crop/area {i}"))
        shape = ratio[0] * (ratio[1] / ratio[0]) ** draw(f"crop/ratio {i}")
        w, h = round((area * shape) ** 0.5), round((area / shape) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            break
    else:  # an image so long that none fits: the largest window of an allowed shape
        w, h = min(width, max(1, round(height * ratio[1]))), min(height, max(1, round(width / ratio[0])))
    left, top = int(draw("crop/x") * (width - w + 1)), int(draw("crop/y") * (height - h + 1))
    return left, top, left + w, top + h


def digest(lines: Iterable[str]) -> str:
    """A short hexadecimal fingerprint of some lines of text."""
    return hashlib.blake2b(b"".join(os.fsencode(line) + b"\n" for line in lines), digest_size=8).hexdigest()


class ImageDataset(Dataset):
    """Images of some source, scaled and cropped to a square.

    A source is a subclass that says what its images are: `__len__`, `read`, `name`, `identity` and `content_probe`; and
    sets `labels` and `classes`, where there are classes.

    An item is an index, served without augmentation, or `(index, step, position)`, whose flip and crop are drawn at
    that address (see `flextok.utils.random`). It gives a dict:

    - `image`: float32 [3, img_size, img_size] in [-1, 1].
    - `index`: index of the image served. One that cannot be read is replaced by the next that can.
    - `position`: place in the global batch; the index itself for a plain index.
    - `view`: 1 for the mirrored image, or the number of the cached crop; else 0.
    - `broken`: the images that were skipped to serve this item, each a BrokenFile.

    Args:
        img_size: Side of the square in pixels.
        flip: Mirror every other image, by address.
        crop: `center`, the middle of the longer side; `adm`, the same as guided-diffusion scales it; `random`, a
            place along the longer side, by address; `random_resized`, a window of random area and shape, by address.
        crop_scale, crop_ratio: Area and shape of `random_resized` windows, see `random_window`.
        cached_crops: Draw random crops from so many of each image, the same in every run, so that they can be cached.
        seed: The run's seed.

    Attributes:
        labels: Class of each image, -1 for none; None if the images have no classes.
        classes: Name of each class by its number: a list, or a dict where not all numbers occur; None likewise.

    Raises:
        NoReadableImage: On access, if no image can be read.
    """

    labels: Sequence[int] | None = None
    classes: Sequence[str] | dict[int, str] | None = None

    def __init__(
        self,
        img_size: int,
        flip: bool = False,
        crop: str = "center",
        crop_scale: Sequence[float] = (0.8, 1.0),
        crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
        cached_crops: int | None = None,
        seed: int = 0,
    ):
        self.img_size, self.flip, self.crop, self.seed = img_size, flip, crop, seed
        self.crop_scale, self.crop_ratio, self.cached_crops = crop_scale, crop_ratio, cached_crops

    @property
    def min_size(self) -> int | None:
        """What `load_image` may scale a JPEG down to; None where every pixel counts."""
        return self.img_size if self.crop in ("center", "random") else None

    @property
    def crop_identity(self) -> str:
        """How images are scaled and cropped, for `identity`."""
        others = {"adm": " adm", "random_resized": f" random_resized {[*self.crop_scale, *self.crop_ratio]}"}
        cached = f" {self.cached_crops} of each{' or mirrored' if self.flip else ''}" if self.cached_crops else ""
        return f"{self.img_size} {self.crop == 'random'}{others.get(self.crop, '')}{cached}"

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> Image.Image:
        """An image in RGB, of any size; raises BrokenImage if it cannot be read."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What a person finds the image by, without reading it."""
        raise NotImplementedError

    def label(self, index: int) -> int | None:
        """Class of an image, without reading it; None if it has none."""
        label = -1 if self.labels is None else int(self.labels[index])
        return None if label < 0 else label

    def identity(self) -> str:
        """Fingerprint of what the dataset holds and how it is cropped; reads no image."""
        raise NotImplementedError

    def content_probe(self) -> str:
        """Fingerprint of the content of some images, for what `identity` does not see."""
        raise NotImplementedError

    def __getitem__(self, item: Item) -> dict:
        augment = isinstance(item, tuple)
        index, step, position = item if augment else (item, 0, item)
        first = range(len(self))[index]  # an IndexError ends a loop over the dataset
        picture, index, broken = self._readable(first)
        view = self.drawn_view(step, position) if augment else 0
        if not augment:
            image = self._square(picture)
        elif self.cached_crops:
            image = self._cached_crop(picture, index, view)
        else:
            image = self._square(picture, lambda name: uniform_number(self.seed, name, step, position))
            image = image.flip(-1) if view else image
        position = position if augment else first
        return {"image": image, "index": index, "position": position, "view": view, "broken": broken}

    def views(self, index: int, n: int) -> dict:
        """An item as for a plain index, with the first n views of the image, [n, 3, img_size, img_size]."""
        picture, served, broken = self._readable(index)
        if self.cached_crops:
            images = [self._cached_crop(picture, served, i) for i in range(n)]
        else:
            image = self._square(picture)
            images = [image, image.flip(-1)][:n]
        return {"image": torch.stack(images), "index": served, "position": index, "view": 0, "broken": broken}

    @property
    def n_views(self) -> int:
        """How many different images one of the dataset can become, where random crops are cached or there are none."""
        return self.cached_crops or (2 if self.flip else 1)

    def drawn_view(self, step: int, position: int) -> int:
        """Which view is served at an address: the number of the cached crop, or 1 for the mirrored image, else 0."""
        if self.cached_crops:
            return int(uniform_number(self.seed, "cached crop", step, position) * self.cached_crops)
        return int(self.flip and uniform_number(self.seed, "flip", step, position) < 0.5)

    def _readable(self, index: int) -> tuple[Image.Image, int, tuple[BrokenFile, ...]]:
        """An image, or the next that can be read; its index; and those that cannot."""
        broken: list[BrokenFile] = []
        while len(broken) < len(self):
            try:
                return self.read(index), index, tuple(broken)
            except BrokenImage as error:
                broken.append(BrokenFile(self.name(index), error.reason, index))
                index = (index + 1) % len(self)
        raise NoReadableImage(
            f"none of the {len(self)} images of the dataset can be read (the first, {broken[0].path}: "
            f"{broken[0].reason}): check that data_path is still there and holds images"
        )

    def _cached_crop(self, picture: Image.Image, index: int, view: int) -> torch.Tensor:
        """One of an image's crops that are drawn once, mirrored or not, whatever the run's seed."""
        draw = lambda name: uniform_number(0, name, index, view)  # noqa: E731
        image = self._square(picture, draw)
        return image.flip(-1) if self.flip and draw("flip") < 0.5 else image

    def _square(self, picture: Image.Image, draw: Callable[[str], float] | None = None) -> torch.Tensor:
        """An image as [3, img_size, img_size]; without draws its random crops are of the centre."""
        if self.crop == "adm":
            picture = adm_image(picture, self.img_size)
        elif self.crop == "random_resized" and draw is not None:
            box = random_window(picture.size, self.crop_scale, self.crop_ratio, draw)
            picture = picture.resize((self.img_size, self.img_size), Image.Resampling.BICUBIC, box=box)
        place = draw("crop") if self.crop == "random" and draw is not None else 0.5
        return image_to_tensor(picture, self.img_size, (place, place))


class ImageFolderDataset(ImageDataset):
    """Image files; the other arguments are those of ImageDataset.

    Args:
        labels, classes: Class of each file, and their names; None: there are no classes.

    Attributes:
        paths: The files.
        names: The same, relative to their common folder.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        img_size: int,
        labels: Sequence[int] | None = None,
        classes: Sequence[str] | dict[int, str] | None = None,
        **settings,
    ):
        super().__init__(img_size, **settings)
        self.paths, self.labels, self.classes = [Path(path) for path in paths], labels, classes
        root = os.path.commonpath([path.parent for path in self.paths])
        self.names = [Path(os.path.relpath(path, root)).as_posix() for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Image.Image:
        return load_image(self.paths[index], self.min_size)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def identity(self) -> str:
        """Fingerprint of names and sizes of files, img_size and crop; a file that is gone has size -1."""
        sizes = [path.stat().st_size if path.exists() else -1 for path in self.paths]
        return digest([self.crop_identity, *map("{} {}".format, self.names, sizes)])

    def content_probe(self, n: int = 512) -> str:
        """Fingerprint of the first and last 4 kB of n files, evenly spread, beyond names and sizes."""
        return probe(file_ends(path) for path in self.paths[:: -(-len(self) // n)])


def probe(contents: Iterable[bytes]) -> str:
    """Fingerprint of some contents."""
    return digest(hashlib.blake2b(content, digest_size=8).hexdigest() for content in contents)


def file_ends(path: str | Path, size: int = 4096) -> bytes:
    """The first and the last bytes of a file; nothing if it is gone."""
    try:
        with open(path, "rb") as file:
            first = file.read(size)
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            return first + file.read(size)
    except OSError:
        return b""


class ImagesInMemory(ImageDataset):
    """Square images kept in memory as uint8.

    Args:
        kind: What the images are, in a word.
        pixels: uint8 [N, S, S, 3].
        names: What each image is, N texts; with the size they are the set's identity.
        flip, seed: As for ImageDataset.
    """

    def __init__(self, kind: str, pixels: np.ndarray, names: Sequence[str], flip: bool = False, seed: int = 0):
        super().__init__(pixels.shape[1], flip, seed=seed)
        self.kind, self.pixels, self.names = kind, pixels, list(names)

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def name(self, index: int) -> str:
        return self.names[index]

    def identity(self) -> str:
        """Fingerprint of names and img_size."""
        return digest([f"{self.kind} {self.img_size}", *self.names])

    def content_probe(self) -> str:
        """Fingerprint of the pixels of the first images."""
        return probe([self.pixels[:10].tobytes()])
