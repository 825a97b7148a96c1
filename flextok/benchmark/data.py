"""Data: from large JPEGs to normalised tensors, the plain way and ours, of files, parquet and tar shards; and how long
training waits for batches."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from train_flextok import FlexTokTrainer

from ..data.images import ImageFolderDataset, load_image
from ..data.loader import build_loaders
from ..data.photos import PHOTOS, photo_path
from ..data.precompute import precompute
from ..data.sources import build_datasets
from ..flextok_wrapper import FlexTokFromHub
from ..model.builder import preset_config
from ..training.config import TrainConfig
from ..training.monitor import Monitor
from .timing import add_preset, alternate, at_least_1, ratio, report, report_ratios, spread, synchronize

QUALITY = 90
SPEED_TARGET, DIFFERENCE_TARGET, WAIT_TARGET = 1.8, 0.6, 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source-size", type=at_least_1, default=1024, help="side of the JPEGs (default: %(default)s)")
    parser.add_argument("--image-size", type=at_least_1, default=256, help="side of the tensors (default: %(default)s)")
    parser.add_argument("--num-workers", type=int, default=2, help="loading processes (default: %(default)s)")
    parser.add_argument("--files", type=at_least_1, default=24, help="number of JPEGs (default: %(default)s)")
    add_preset(parser)  # that waits for batches
    parser.add_argument("--wait-steps", type=int, default=10, metavar="N", help="its steps; 0: skip (default: 10)")


def write_jpegs(folder: Path, n_files: int, size: int) -> list[Path]:
    """JPEGs of the photographs at their own resolution: not scaled up, so that they are as sharp as a camera's.

    A photograph is cropped to its centre, and where that is too small continued by mirroring.
    """
    paths = [folder / f"{i}.jpg" for i in range(n_files)]
    names = list(PHOTOS)
    for i, path in enumerate(paths):
        pixels = np.asarray(load_image(photo_path(names[i % len(names)])))
        height, width = (min(length, size) for length in pixels.shape[:2])
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        centre = pixels[top : top + height, left : left + width]
        square = np.pad(centre, ((0, size - height), (0, size - width), (0, 0)), mode="symmetric")
        Image.fromarray(np.rot90(square, i // len(names))).save(path, quality=QUALITY)
    return paths


def plain_transform(size: int) -> Callable[[Image.Image], torch.Tensor]:
    """What a tutorial does with a decoded image: torchvision's transforms."""
    return transforms.Compose([
        transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ])  # fmt: skip


def source_arms(folder: Path, paths: list[Path], size: int) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """The same JPEGs as files, as a parquet file and as a tar shard, each read the plain way and ours, in order.

    The plain ways are those of the libraries' documentation: an open file, `datasets` with `with_transform`, and a
    `webdataset` pipeline that decodes to Pillow; all with `plain_transform`.
    """
    import datasets
    import webdataset

    transform, files = plain_transform(size), [path.read_bytes() for path in paths]
    (folder / "parquet").mkdir()
    rows = datasets.Dataset.from_dict({"image": [{"bytes": file, "path": None} for file in files]})
    rows.cast_column("image", datasets.Image()).to_parquet(folder / "parquet" / "train.parquet")
    with webdataset.TarWriter(f"{folder}/train-000000.tar") as writer:
        for i, file in enumerate(files):
            writer.write({"__key__": f"{i:06}", "jpg": file})

    def ours(**settings) -> Callable[[], list[torch.Tensor]]:
        config = dict(img_size=size, val_fraction=0, use_augmentation=False, cache_dir=str(folder / "cache"))
        dataset, _ = build_datasets(TrainConfig.from_dict({**config, **settings}))
        return lambda: [dataset[i]["image"] for i in range(len(dataset))]

    images = ImageFolderDataset(paths, size)
    hub = datasets.load_dataset(str(folder / "parquet"), split="train", cache_dir=str(folder / "hf"))
    hub = hub.with_transform(lambda row: {"image": [transform(image.convert("RGB")) for image in row["image"]]})
    shards = webdataset.WebDataset(f"{folder}/train-000000.tar", shardshuffle=False).decode("pilrgb").to_tuple("jpg")
    return {
        "plain, files": lambda: [transform(Image.open(path).convert("RGB")) for path in paths],
        "ours, files": lambda: [images[i]["image"] for i in range(len(paths))],
        "plain, parquet (datasets)": lambda: [row["image"] for row in hub],
        "ours, parquet": ours(dataset_name="hf", data_path=str(folder / "parquet")),
        "plain, shards (webdataset)": lambda: [transform(image) for (image,) in shards],
        "ours, shards": ours(dataset_name="webdataset", data_path=f"{folder}/train-000000.tar"),
    }


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
                cache_dir=folder, cache_latents=cache_latents,
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            paths = write_jpegs(Path(folder), n_files, arguments.source_size)
            megabytes = sum(path.stat().st_size for path in paths) / n_files / 1e6
            arms = source_arms(Path(folder), paths, size)
            times = alternate(arms, arguments.rounds, torch.device("cpu"))
            differences = difference(arms["plain, files"](), arms["ours, files"]())
    finally:
        torch.set_num_threads(threads)
    rates = {name: [n_files / seconds for seconds in values] for name, values in times.items()}
    result = {
        "source_size": arguments.source_size, "image_size": size, "files": n_files, "megabytes_per_file": megabytes,
        "images_per_second": rates, "difference": differences,
        "ratio": ratio(times["plain, files"], times["ours, files"]),
        "ratio_parquet": ratio(times["plain, parquet (datasets)"], times["ours, parquet"]),
        "ratio_shards": ratio(times["plain, shards (webdataset)"], times["ours, shards"]),
    }  # fmt: skip
    print(f"\n{n_files} JPEGs of {arguments.source_size} px, quality {QUALITY}, {megabytes:.2f} MB each, to tensors of "
          f"{size} px, on one core\n"
          f"images per second, median (smallest to largest) of {arguments.rounds} rounds")  # fmt: skip
    for name, values in rates.items():
        report(name, spread(values), digits=1)
    report_ratios([
        ("ours / plain, files", result["ratio"], -SPEED_TARGET),
        ("ours / datasets, parquet", result["ratio_parquet"], -1.0),
        ("ours / webdataset, shards", result["ratio_shards"], -1.0),
    ])  # fmt: skip
    reached = "yes" if differences["mean"] < DIFFERENCE_TARGET else "NO"
    print("difference of the two results, in units of 1/255")
    print(f"  {'mean absolute':<46} {differences['mean']:9.3f}  below {DIFFERENCE_TARGET}: {reached}")
    print(f"  {'largest mean of one file':<46} {differences['largest_mean_of_a_file']:9.3f}")
    print(f"  {'maximum':<46} {differences['maximum']:9.1f}")
    if arguments.wait_steps:
        batch_size = arguments.batch_sizes[0]
        result["waiting"] = of_images, of_latents = waiting(arguments, batch_size, device, dtype)
        reached = "yes" if of_latents < WAIT_TARGET else "NO"
        print(f"{arguments.preset}, batch {batch_size}: share of the time that training waits for batches")
        print(f"  {'of images, through the VAE':<46} {of_images:9.4f}")
        print(f"  {'of latents from the cache':<46} {of_latents:9.4f}  below {WAIT_TARGET}: {reached}")
    return result
