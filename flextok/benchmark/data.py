"""Image loading: from large JPEGs to normalised tensors, the plain way with Pillow and torchvision and ours."""

import argparse
import tempfile
from pathlib import Path
from typing import Callable, List

import numpy as np
import torch
from PIL import Image

from ..data.images import ImageFolderDataset, load_image
from ..data.photos import PHOTOS, photo_path
from .timing import alternate, at_least_1, ratio, report_ratios, spread

QUALITY = 90
SPEED_TARGET, DIFFERENCE_TARGET = 1.8, 0.6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source-size", type=at_least_1, default=1024, help="side of the JPEGs (default: %(default)s)")
    parser.add_argument("--image-size", type=at_least_1, default=256, help="side of the tensors (default: %(default)s)")
    parser.add_argument("--files", type=at_least_1, default=24, help="number of JPEGs (default: %(default)s)")


def square(pixels: np.ndarray, size: int) -> np.ndarray:
    """The centre of an image uint8 [H, W, 3] as [size, size, 3]: cropped, or continued by mirroring where it ends."""
    height, width = (min(length, size) for length in pixels.shape[:2])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    centre = pixels[top : top + height, left : left + width]
    return np.pad(centre, ((0, size - height), (0, size - width), (0, 0)), mode="symmetric")


def write_jpegs(folder: Path, n_files: int, size: int) -> List[Path]:
    """JPEGs of the photographs at their own resolution: not scaled up, so that they are as sharp as a camera's."""
    paths = [folder / f"{i}.jpg" for i in range(n_files)]
    names = list(PHOTOS)
    for i, path in enumerate(paths):
        pixels = square(np.asarray(load_image(photo_path(names[i % len(names)]))), size)
        Image.fromarray(np.rot90(pixels, i // len(names))).save(path, quality=QUALITY)
    return paths


def plain_loader(size: int) -> Callable[[Path], torch.Tensor]:
    """What a tutorial does: the whole image decoded, then torchvision's transforms."""
    from torchvision import transforms

    transform = transforms.Compose([
        transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ])  # fmt: skip
    return lambda path: transform(Image.open(path).convert("RGB"))


def difference(a: List[torch.Tensor], b: List[torch.Tensor]) -> dict:
    """How far images in [-1, 1] differ, in units of 1/255 of their range."""
    differences = [(x - y).abs() * 127.5 for x, y in zip(a, b)]
    means = [values.mean().item() for values in differences]
    return {
        "mean": sum(means) / len(means),
        "largest_mean_of_a_file": max(means),
        "maximum": max(values.max().item() for values in differences),
    }


def run(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    """All measurements as plain numbers; prints them. One process, one thread, on the CPU, whatever the device."""
    size, n_files = arguments.image_size, arguments.files
    plain, threads = plain_loader(size), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            paths = write_jpegs(Path(folder), n_files, arguments.source_size)
            megabytes = sum(path.stat().st_size for path in paths) / n_files / 1e6
            dataset = ImageFolderDataset(paths, size)
            arms = {
                "plain": lambda: [plain(path) for path in paths],
                "ours": lambda: [dataset[i]["image"] for i in range(n_files)],
            }
            times = alternate(arms, arguments.rounds, torch.device("cpu"))
            differences = difference(arms["plain"](), arms["ours"]())
    finally:
        torch.set_num_threads(threads)
    result = {
        "source_size": arguments.source_size,
        "image_size": size,
        "files": n_files,
        "megabytes_per_file": megabytes,
        "images_per_second": {name: [n_files / seconds for seconds in values] for name, values in times.items()},
        "ratio": ratio(times["plain"], times["ours"]),
        "difference": differences,
    }
    report(result)
    return result


def report(result: dict) -> None:
    rates = result["images_per_second"]
    print(
        f"\n{result['files']} JPEGs of {result['source_size']} px, quality {QUALITY}, "
        f"{result['megabytes_per_file']:.2f} MB each, to tensors of {result['image_size']} px, on one core\n"
        f"images per second, median (smallest to largest) of {len(rates['ours'])} rounds"
    )
    for name, values in rates.items():
        print("  {:<46} {:9.1f}  ({:.1f} to {:.1f})".format(name, *spread(values)))
    report_ratios([("ours / plain", result["ratio"], -SPEED_TARGET)])

    values = result["difference"]
    reached = "yes" if values["mean"] < DIFFERENCE_TARGET else "NO"
    print("difference of the two results, in units of 1/255")
    print(f"  {'mean absolute':<46} {values['mean']:9.3f}  below {DIFFERENCE_TARGET}: {reached}")
    print(f"  {'largest mean of one file':<46} {values['largest_mean_of_a_file']:9.3f}")
    print(f"  {'maximum':<46} {values['maximum']:9.1f}")
