"""Handwritten digits that scikit-learn carries inside its wheel: a small problem whose pictures a person can judge."""

import numpy as np
import torch
from PIL import Image

from ..utils.config import ConfigError
from ..utils.random import generator
from .images import ImagesInMemory

N_DIGITS, N_TRAIN = 1797, 1500  # the rest validates
SPLIT_SEED = 0
SIDE, MAX_SIZE = 8, 64  # pixels of the originals; beyond 64 they are blur


class Digits(ImagesInMemory):
    """The 1,797 digits of scikit-learn: 8x8 pixels in 17 levels of grey, enlarged bilinearly.

    1,500 of them train and 297 validate, the same ones whatever the run's seed. `labels` holds the digit in each
    image, `classes` their names.

    Args:
        split: `train` or `val`.
        img_size: Side of the images in pixels, 8 to 64.
        flip: Mirror every other image, by address.
        seed: Seed of the flips.

    Raises:
        ConfigError: An img_size outside of 8 to 64.
        ModuleNotFoundError: scikit-learn is not installed.
    """

    def __init__(self, split: str, img_size: int, flip: bool = False, seed: int = 0):
        if not SIDE <= img_size <= MAX_SIZE:
            raise ConfigError(
                f"img_size is {img_size}, but dataset_name is digits, drawings of {SIDE}x{SIDE} pixels: expected "
                f"{SIDE} to {MAX_SIZE}, e.g. 16"
            )
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ModuleNotFoundError("dataset_name: digits needs scikit-learn: pip install scikit-learn") from error
        data = load_digits()
        order = torch.randperm(N_DIGITS, generator=generator(SPLIT_SEED, "digits"))
        chosen = (order[:N_TRAIN] if split == "train" else order[N_TRAIN:]).sort().values.numpy()
        pixels = np.rint(data.images[chosen] * (255 / data.images.max())).astype(np.uint8)
        size = (img_size, img_size)
        pixels = [Image.fromarray(digit).resize(size, Image.Resampling.BILINEAR).convert("RGB") for digit in pixels]
        super().__init__("digits", np.stack(pixels), [f"digit {i}" for i in chosen], flip, seed)
        self.labels, self.classes = data.target[chosen].tolist(), [str(digit) for digit in range(10)]
