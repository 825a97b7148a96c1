"""Data: from large JPEGs to normalised tensors, the plain way and ours; and how long training waits for batches."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from train_flextok import FlexTokTrainer

from ..data.images import ImageFolderDataset, load_image
from ..data.loader import build_datasets, build_loaders
from ..data.photos import PHOTOS, photo_path
from ..data.precompute import precompute
from ..flextok_wrapper import FlexTokFromHub
from ..model.builder import preset_config
from ..training.config import TrainConfig
from ..training.monitor import Monitor
from .timing import alternate, at_least_1, ratio, report_ratios, spread, synchronize

QUALITY = 90
SPEED_TARGET, DIFFERENCE_TARGET, WAIT_TARGET = 1.8, 0.6, 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source-size", type=at_least_1, default=1024, help="side of the JPEGs (default: %(default)s)")
    parser.add_argument("--image-size", type=at_least_1, default=256, help="side of the tensors (default: %(default)s)")
    parser.add_argument("--num-workers", type=int, default=2, help="loading processes (default: %(default)s)")
    parser.add_argument("--files", type=at_least_1, default=24, help="number of JPEGs (default: %(default)s)")
    parser.add_argument("--preset", default="d12-d12", help="model that waits for batches (default: %(default)s)")
    parser.add_argument("--wait-steps", type=int, default=10, metavar="N", help="its steps; 0: skip (default: 10)")


def square(pixels: np.ndarray, size: int) -> np.ndarray:
    """The centre of an image uint8 [H, W, 3] as [size, size, 3]: cropped, or continued by mirroring where it ends."""
    height, width = (min(length, size) for length in pixels.shape[:2])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    centre = pixels[top : top + height, left : left + width]
    return np.pad(centre, ((0, size - height), (0, size - width), (0, 0)), mode="symmetric")


def write_jpegs(folder: Path, n_files: int, size: int) -> list[Path]:
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


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> dict:
    """How far images in [-1, 1] differ, in units of 1/255 of their range."""
    differences = [(x - y).abs() * 127.5 for x, y in zip(a, b)]
    means = [values.mean().item() for values in differences]
    return {
        "mean": sum(means) / len(means),
        "largest_mean_of_a_file": max(means),
        "maximum": max(values.max().item() for values in differences),
    }


def waiting(arguments: argparse.Namespace, batch_size: int, device: torch.device, dtype: torch.dtype) -> list[float]:
    """Shares of the time that a training waits for batches: of images, and with `cache_latents` of cached latents."""
    shares = []
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images")
        images.mkdir()
        write_jpegs(images, arguments.wait_steps * batch_size, arguments.source_size)
        model = FlexTokFromHub(preset_config(arguments.preset, vae_hub_path=None))
        for cache_latents in (False, True):
            config = TrainConfig.from_dict(dict(
                model=dict(preset=arguments.preset), data_path=str(images), val_fraction=0,
                img_size=arguments.image_size, batch_size=batch_size, num_workers=arguments.num_workers,
                cache_dir=folder,
                cache_latents=cache_latents,
                use_amp=dtype != torch.float32, use_wandb=False, log_every=arguments.wait_steps, num_epochs=1,
            ))  # fmt: skip
            datasets = build_datasets(config)
            if cache_latents:
                datasets = precompute(config, *datasets, model, device)
            loader, _ = build_loaders(config, *datasets, device)
            trainer = FlexTokTrainer(config, model, loader, None, device, Path(folder, str(cache_latents)))
            trainer.monitor = Monitor(trainer.run_dir, 0, trainer.total_steps)
            for micro_batches in trainer.rest_of_epoch():
                trainer.train_step(micro_batches)
            synchronize(device)
            shares.append(trainer.monitor.rates()["train/data_wait"])
            trainer.monitor.close()
    return shares


def run(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    """All measurements as plain numbers; prints them. Loading is one process, one thread, on the CPU."""
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
    if arguments.wait_steps:
        batch_size = arguments.batch_sizes[0]
        result["waiting"] = waiting(arguments, batch_size, device, dtype)
        reached = "yes" if result["waiting"][1] < WAIT_TARGET else "NO"
        print(f"{arguments.preset}, batch {batch_size}: share of the time that training waits for batches")
        print(f"  {'of images, through the VAE':<46} {result['waiting'][0]:9.4f}")
        print(f"  {'of latents from the cache':<46} {result['waiting'][1]:9.4f}  below {WAIT_TARGET}: {reached}")
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
