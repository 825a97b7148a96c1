"""Photographs that scikit-image and scikit-learn carry inside their wheels: real images with no download.

Both views of the motorcycle pair show one scene, so only the left one is used. Each photograph is divided by a
vertical line: the left three fifths are for training, the right two fifths for validation.
"""

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from ..utils.random import uniform_number
from .images import ImagesInMemory, load_image

PIP_NAMES = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "coffee": ("skimage", "data/coffee.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg"),
    "ihc": ("skimage", "data/ihc.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
}
MAX_ZOOM = 4  # the largest window has this many times the side of the result


def photo_path(name: str) -> Path:
    """The file of one of `PHOTOS` in the installed package; nothing is imported or downloaded.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    package, file = PHOTOS[name]
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"dataset_name: photos needs a package: pip install {PIP_NAMES[package]}")
    return Path(spec.origin).parent / file


def photo_region(width: int, split: str) -> tuple[int, int]:
    """The columns [left, right) of a photograph of this width that belong to `split`."""
    border = width * 3 // 5
    return (0, border) if split == "train" else (border, width)


class PhotoCrops(ImagesInMemory):
    """A fixed set of square windows of the photographs, scaled to `img_size` and kept in memory as uint8.

    The photographs take turns. The side of a window is uniform between `img_size` and `MAX_ZOOM * img_size`, its place
    uniform in the split's part of the photograph; where that part is narrower, its width is the limit, and a
    smaller window than `img_size` is scaled up. The windows follow from (split, img_size, window_seed) alone, and the
    first n of a larger set are the set of n.

    `names` holds `photo@x,y,side` in pixels of the photograph.

    Args:
        split: `train` or `val`.
        img_size: Side of the result in pixels.
        n_crops: Number of windows.
        flip: Mirror every other image, by address.
        seed: Seed of the flips.
        window_seed: Seed of the windows.
    """

    def __init__(
        self, split: str, img_size: int, n_crops: int, flip: bool = False, seed: int = 0, window_seed: int = 0
    ):
        photos = [(name, load_image(photo_path(name))) for name in PHOTOS]
        names: list[str] = []
        pixels = np.empty((n_crops, img_size, img_size, 3), dtype=np.uint8)
        for i in range(n_crops):
            name, photo = photos[i % len(photos)]
            left, right = photo_region(photo.width, split)
            limit = min(right - left, photo.height)
            smallest, largest = min(img_size, limit), min(MAX_ZOOM * img_size, limit)

            u_side, u_x, u_y = (
                uniform_number(window_seed, f"photos {split} {what}", 0, i) for what in ("side", "x", "y")
            )
            side = smallest + int(u_side * (largest - smallest + 1))
            x = left + int(u_x * (right - left - side + 1))
            y = int(u_y * (photo.height - side + 1))
            # Cropped before scaling, so that the filter sees nothing of the other split.
            window = photo.crop((x, y, x + side, y + side))
            pixels[i] = np.asarray(window.resize((img_size, img_size), Image.Resampling.BICUBIC))
            names.append(f"{name}@{x},{y},{side}")
        super().__init__("photos", pixels, names, flip, seed)
