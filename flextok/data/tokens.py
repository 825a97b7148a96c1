"""Tokenize a data set: what an autoregressive model is trained on.

    python -m flextok.data.tokens --model runs/NAME --data /path/to/images --output tokens

Each image becomes `tokens` [views, L]: the image itself, or several crops of it, and their mirror images. They are
written in shards, with `meta.json`, which says what they are of, and `names.json`, the names of the images by index;
`TokenShards` reads them. Stopped, the same command goes on after the last finished shard. Under torchrun each process
takes every world_size-th shard.
"""

import argparse
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..evaluation.subjects import load_subject
from ..training.config import TrainConfig, load_config
from ..training.models import set_vae_dtype
from ..utils.config import ConfigError
from ..utils.devices import chosen_device
from ..utils.dtypes import autocast_dtype, name_of, precision
from ..utils.errors import UserError, run_command
from ..utils.files import write_atomically
from ..utils.modules import weights_digest
from ..utils.plain import read_json_object
from ..utils.processes import from_first, gathered, joined, load_one_process_first, rank, world_size
from ..utils.random import RANDOM_KEY, TOKENS_STEP, BatchRandom
from .caching import fingerprint
from .images import BrokenFile
from .loader import BatchLoader
from .sources import build_datasets
from .token_shards import FORMATS, META, NAMES, TokenShards, import_pyarrow, shard_path, token_dtype, write_shard

__all__ = ["TokenShards", "main"]

log = logging.getLogger("flextok")

CROPS = ("centre", "top left", "top right", "bottom left", "bottom right")
CROP_SCALE = 1.1  # side of the image of which several crops are taken, in sides of a crop
MAY_DIFFER = ("model", "data_path")  # of one and the same data: names and places; `weights` and `images` tell


class Crops(Dataset):
    """The crops [crops, 3, size, size] of each image of a dataset: its centre, then its corners.

    An image that cannot be read gives none, but a `broken` file.

    Args:
        dataset: An ImageDataset of the size of the crops, or larger.
        size: Side of the crops in pixels.
        n_crops: 1 to 5.
    """

    def __init__(self, dataset: Dataset, size: int, n_crops: int):
        self.dataset, self.size, self.n_crops = dataset, size, n_crops

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        item = self.dataset[index]
        if item["broken"]:  # another took its place
            return {"index": index, "broken": item["broken"][0]}
        end = item["image"].shape[-1] - self.size
        corners = [(end // 2, end // 2), (0, 0), (0, end), (end, 0), (end, end)][: self.n_crops]
        crops = [item["image"][:, y : y + self.size, x : x + self.size] for y, x in corners]
        return {"index": index, "crops": torch.stack(crops), "broken": None}


def collate_crops(items: Sequence[dict]) -> tuple[list[int], torch.Tensor | None, list[BrokenFile]]:
    """Indices of n images, their crops [n, crops, 3, size, size] (None without any), and the broken files."""
    good = [item for item in items if item["broken"] is None]
    crops = torch.stack([item["crops"] for item in good]) if good else None
    return [item["index"] for item in good], crops, [item["broken"] for item in items if item["broken"] is not None]


class Tokenizer:
    """Images to tokens by a model, in `dtype` autocast (None: fp32).

    What a VAE samples of its posterior is drawn by the image's index and view: tokens do not depend on batches,
    processes or restarts.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype | None, flips: bool):
        self.model, self.device, self.dtype, self.flips = model, device, dtype, flips

    @torch.no_grad()
    def __call__(self, crops: torch.Tensor, index: Sequence[int]) -> np.ndarray:
        """Tokens [n, views, L] of crops [n, crops, 3, S, S]: of each crop, then, with flips, of each mirrored."""
        crops = crops.to(self.device, non_blocking=True)
        views = torch.cat([crops, crops.flip(-1)], dim=1) if self.flips else crops
        n, n_views = views.shape[:2]
        positions = torch.tensor(index)[:, None] * n_views + torch.arange(n_views)
        random = BatchRandom(0, TOKENS_STEP, positions.flatten().to(self.device))
        with precision(self.device, self.dtype):
            data_dict = self.model.encode({self.model.vae.images_read_key: views.flatten(0, 1), RANDOM_KEY: random})
        tokens = data_dict[self.model.regularizer.tokens_write_key].cpu().numpy()
        return tokens.reshape(n, n_views, -1).astype(token_dtype(self.model.regularizer.codebook_size))


def model_digest(model: nn.Module) -> str:
    """Fingerprint of everything that tokens depend on: VAE, encoder and quantiser."""
    config = json.dumps([model.config[part] for part in ("vae", "encoder", "regularizer")], sort_keys=True)
    parts = [config, weights_digest(model.vae), weights_digest(model.encoder)]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def claim_folder(folder: Path, meta: dict[str, Any], names: Callable[[], list[str]]) -> list[int]:
    """Make the folder one of these tokens, unless it is already; gives the shards that are still to be written.

    Raises:
        UserError: It holds tokens of something else.
    """
    file, meta = folder / META, json.loads(json.dumps(meta))  # as it is read: keys are texts
    if file.is_file():
        there = read_json_object(file)
        for key, value in meta.items():
            if there.get(key, value) != value and key not in MAY_DIFFER:
                raise UserError(
                    f"{folder} holds tokens of {there.get('model')} with {key} {there.get(key)!r}, now it is "
                    f"{value!r}: give another --output, or the same model, data and options to go on"
                )
    elif any(folder.glob("tokens-*")):
        raise UserError(f"{folder} holds tokens, but no {META} that says of what: give another --output")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / NAMES, lambda path: path.write_text(json.dumps({"names": names()})))
        write_atomically(file, lambda path: path.write_text(json.dumps(meta, indent=2)))
    return [i for i in range(meta["n_shards"]) if not shard_path(folder, i, meta["format"]).exists()]


def write_tokens(
    folder: Path, meta: dict[str, Any], shards: Sequence[int], crops: Crops, tokenizer: Tokenizer, batch_size: int,
    num_workers: int,
) -> None:  # fmt: skip
    """Compute and write some shards of a folder; images that cannot be read are named in the log and left out."""
    size, n_views, label = meta["shard_size"], len(meta["views"]), crops.dataset.label
    images = {shard: range(shard * size, min((shard + 1) * size, len(crops))) for shard in shards}
    step = max(1, batch_size // n_views)
    batches = {shard: [list(i[at : at + step]) for at in range(0, len(i), step)] for shard, i in images.items()}
    loader = iter(
        BatchLoader(
            crops, batch_sampler=[batch for of_shard in batches.values() for batch in of_shard],
            num_workers=num_workers, collate_fn=collate_crops, pin_memory=tokenizer.device.type == "cuda",
            generator=torch.Generator(),
        )
    )  # fmt: skip
    title = "tokens" if world_size() == 1 else f"tokens, process 0 of {world_size()}"
    total = sum(map(len, images.values()))
    with tqdm(total=total, unit="img", desc=title, dynamic_ncols=True, disable=rank() > 0) as progress:
        for shard in shards:
            indices: list[int] = []
            parts = [np.empty((0, n_views, meta["tokens_per_image"]), token_dtype(meta["codebook_size"]))]
            for _ in batches[shard]:
                index, views, broken = next(loader)
                for path, reason, _ in broken:
                    log.warning("cannot read the image %s: %s; it is left out", path, reason)
                if views is not None:
                    parts.append(tokenizer(views, index))
                indices += index
                progress.update(len(index) + len(broken))
            labels = [-1 if (number := label(i)) is None else number for i in indices]
            file = shard_path(folder, shard, meta["format"])
            write_shard(file, np.concatenate(parts), indices, labels if meta["has_labels"] else None)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flextok.data.tokens", description="Tokenize a data set, for training autoregressive models."
    )
    add = parser.add_argument
    add("--model", required=True, help="run folder, checkpoint, export, .safetensors file or Hub name")
    add("--output", required=True, type=Path, metavar="DIR", help="where the shards go")
    add("--config", metavar="FILE", help="take the data settings of this YAML file, img_size too")
    add("--data", metavar="PATH", help="folder of images: the setting data_path")
    add("--dataset-name", metavar="NAME", help="the setting dataset_name (default: folder, or the config's)")
    add("--split", choices=("train", "val"), help="default: train; without --config all images of a folder")
    add("--flips", action="store_true", help="mirrored images too")
    add("--crops", type=int, default=1, choices=range(1, len(CROPS) + 1), metavar="N",
        help=f"1 (default): the centre; up to 5: {', '.join(CROPS)}, of {CROP_SCALE} times the size")  # fmt: skip
    add("--batch-size", type=int, default=32, metavar="N", help="views per pass (default: 32)")
    add("--shard-size", type=int, default=10_000, metavar="N", help="images per shard (default: 10000)")
    add("--format", choices=FORMATS, default=FORMATS[0], help=f"default: {FORMATS[0]}")
    add("--num-workers", type=int, default=4, metavar="N", help="processes that load images (default: 4)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--fp32", action="store_true", help="no bf16 autocast on GPUs")
    arguments = parser.parse_args(argv)
    for name, least in (("batch_size", 1), ("shard_size", 1), ("num_workers", 0)):
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, expected at least {least}")
    return arguments


def data_settings(arguments: argparse.Namespace) -> TrainConfig:
    """The settings that say which images are tokenized."""
    given = {"data_path": arguments.data, "dataset_name": arguments.dataset_name}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.config is not None:
        return load_config(arguments.config, [f"{name}={value}" for name, value in given.items()])
    if not given:
        raise ConfigError("there is nothing to tokenize: give --data FOLDER, --dataset-name digits or --config FILE")
    if arguments.split is None:
        given["val_fraction"] = 0.0
    return TrainConfig.from_dict(given)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.format == "parquet":
        import_pyarrow()
    config = data_settings(arguments)
    device = chosen_device(arguments.device)
    with joined(device):
        run(arguments, config, device)


def run(arguments: argparse.Namespace, config: TrainConfig, device: torch.device) -> None:
    # The model
    subject = load_one_process_first(lambda: load_subject(arguments.model, option="--model"))
    model = subject.model.to(device)
    img_size = subject.img_size if arguments.config is None else config.img_size
    uses_amp = device.type == "cuda" and bool(config.use_amp) and not arguments.fp32
    if device.type == "cuda":
        model.vae.to(memory_format=torch.channels_last)  # in which its convolutions are fast
    set_vae_dtype(config.model_copy(update={"use_amp": uses_amp}), model.vae, device)
    tokenizer = Tokenizer(model, device, autocast_dtype(device) if uses_amp else None, arguments.flips)
    try:
        tokens_per_image = tokenizer(torch.zeros(1, 1, 3, img_size, img_size), [0]).shape[-1]
    except ValueError as error:
        raise ConfigError(f"img_size {img_size} does not fit the model: {error}") from error

    # The images
    scaled_size = img_size if arguments.crops == 1 else round(CROP_SCALE * img_size)
    train, val = build_datasets(config.model_copy(update={"img_size": scaled_size}))
    dataset = val if arguments.split == "val" else train
    if dataset is None:
        raise ConfigError("--split is val, but the settings leave no image for validation: set val_fraction")
    crops = Crops(dataset, img_size, arguments.crops)

    # What they are, by which a folder is known
    unlabelled = sum(dataset.label(i) is None for i in range(len(dataset)))
    views = list(CROPS[: arguments.crops])
    meta = {
        "model": arguments.model, "weights": model_digest(model), "codebook_size": model.regularizer.codebook_size,
        "levels": list(model.regularizer.levels), "tokens_per_image": tokens_per_image, "img_size": img_size,
        "dtype": "fp32" if tokenizer.dtype is None else name_of(tokenizer.dtype),
        "views": views + [f"{view}, mirrored" for view in views] if arguments.flips else views,
        "format": arguments.format, "shard_size": arguments.shard_size,
        "dataset_name": config.dataset_name, "data_path": config.data_path, "split": arguments.split or "train",
        "n_images": len(dataset), **fingerprint(dataset),
        "has_labels": unlabelled < len(dataset), "unlabelled": unlabelled, "classes": dataset.classes,
        "n_shards": -(-len(dataset) // arguments.shard_size),
    }  # fmt: skip
    names = lambda: [dataset.name(i) for i in range(len(dataset))]  # noqa: E731
    missing = from_first(lambda: claim_folder(arguments.output, meta, names))
    if rank() == 0:
        what = f"{len(dataset)} images x {len(meta['views'])} views of {img_size} px, {tokens_per_image} tokens each"
        to_do = f"{len(missing)} of {meta['n_shards']} shards to write"
        print(f"{what}, {meta['dtype']} on {device}: {to_do}", flush=True)
    shards = missing[rank() :: world_size()]
    write_tokens(arguments.output, meta, shards, crops, tokenizer, arguments.batch_size, arguments.num_workers)
    gathered(None)  # all have written theirs
    if rank() == 0:
        print(f"{arguments.output}: tokens of {len(TokenShards(arguments.output))} of {len(dataset)} images")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    run_command(main)
