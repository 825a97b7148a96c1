"""Fill the caches of a training run ahead of it.

    python -m flextok.data.cache_features --config configs/train_celebahq.yaml --set use_repa=true --set repa_cache=true

Computes what the config caches: REPA's encoder features (`repa_cache`), the VAE's latents (`cache_latents`). A run that
was stopped goes on where it was. Several processes may fill one cache at once, each on a device of its own: start the
command several times, or under torchrun.
"""

import argparse
import collections
import contextlib
import fcntl
import logging
import os
import time
from pathlib import Path
from typing import Any, Callable, Deque, Dict, Iterator, List, Optional, Tuple

import torch
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm

from ..model.utils.repa_encoders import encoder_dtype, load_encoder
from ..training.config import TrainConfig, load_config
from ..training.models import check_repa_settings, load_model, set_vae_dtype
from ..utils.config import ConfigError
from ..utils.devices import chosen_device
from ..utils.errors import run_command
from .caching import (
    FEATURES,
    LATENTS,
    CachedDataset,
    CachedValues,
    encoder_features,
    feature_plans,
    latent_moments,
    latent_plans,
)
from .images import collate
from .loader import BrokenFiles, build_datasets
from .record_cache import RecordCache, check_space, readable_size

logger = logging.getLogger(__name__)

WAIT_SECONDS = 1
FLUSH_SECONDS = 10  # what a killed process computed since its last flush is computed again


class MissingBatches(Sampler):
    """Batches of the images that a cache lacks, each claimed for this process until it is released.

    What another process works on is left out.
    """

    def __init__(self, cache: RecordCache, batch_size: int):
        self.cache, self.batch_size = cache, batch_size
        self.claims: Deque[contextlib.ExitStack] = collections.deque()

    def __iter__(self) -> Iterator[List[int]]:
        for start in range(0, self.cache.n_images, self.batch_size):
            stop = min(start + self.batch_size, self.cache.n_images)
            if not len(self.cache.missing(start, stop)):
                continue
            claim = contextlib.ExitStack()
            claimed = claim.enter_context(self.cache.claim(start, stop))
            missing = self.cache.missing(start, stop)  # some may have been stored in between
            if claimed and len(missing):
                self.claims.append(claim)
                yield missing.tolist()
            else:
                claim.close()

    def any_free(self) -> bool:
        """Whether a range lacks images and no other process works on it."""
        for index in self.cache.missing()[:: self.batch_size]:
            with self.cache.claim(int(index), int(index) + 1) as claimed:
                if claimed:
                    return True
        return False

    def release(self, n: int) -> None:
        """Release the claims of the first n batches that are still held."""
        for _ in range(n):
            self.claims.popleft().close()


def fill(values: CachedValues, dataset: CachedDataset, batch_size: int, num_workers: int, device: torch.device) -> None:
    """Compute and store what the cache of a split lacks."""
    cache = values.caches[dataset.split]
    cache.retry_unreadable()
    broken = BrokenFiles(len(dataset))
    batches = MissingBatches(cache, batch_size)
    loader = DataLoader(
        dataset.dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=collate,
        pin_memory=device.type == "cuda", generator=torch.Generator(),
    )  # fmt: skip
    done, flushed = 0, time.monotonic()
    with tqdm(total=cache.n_images, unit="img", desc=f"{values.name}, {dataset.split}", dynamic_ncols=True) as progress:

        def show():
            stored = cache.n_images - len(cache.missing())
            progress.set_postfix_str(readable_size(stored * cache.nbytes / cache.n_images), refresh=False)
            progress.update(stored - progress.n)

        show()
        progress.unpause()  # what was there before is not part of the rate
        while True:
            try:
                for batch in loader:
                    broken.add(batch["broken"])
                    values({**batch, "split": dataset.split}, batch["image"].to(device, non_blocking=True), device)
                    done += 1
                    if time.monotonic() - flushed > FLUSH_SECONDS:
                        values.flush()
                        batches.release(done)
                        done, flushed = 0, time.monotonic()
                    if values.failure is not None:
                        raise values.failure
                    show()
            finally:
                values.flush()
                batches.release(len(batches.claims))
            done = 0
            show()
            while not batches.any_free():  # for what other processes work on; if one dies, its part is done here
                if cache.complete:
                    return
                time.sleep(WAIT_SECONDS)


def cache_plans(config: TrainConfig, datasets: Dict[str, CachedDataset], device: torch.device) -> Tuple[dict, Any]:
    """The caches that a config asks for, by kind and split, and the model if one of them needs it."""
    plans, model = {}, None
    if config.repa_cache:
        check_repa_settings(config, device)
        plans[FEATURES] = feature_plans(config, datasets, device)
    if config.cache_latents:
        model = load_model(config)
        set_vae_dtype(config, model.vae, device)
        plans[LATENTS] = latent_plans(config, model, datasets)
    if not plans:
        raise ConfigError(
            "the config caches nothing: add --set repa_cache=true (REPA's features) or --set cache_latents=true"
        )
    return plans, model


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process is within, by a lock file in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".load.lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def load_features(config: TrainConfig, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function from images to what the feature cache stores."""
    with one_at_a_time(Path(config.cache_dir)):  # the first downloads, the others find it there
        encoder = load_encoder(
            config.repa_encoder_type, config.repa_encoder_repo, config.repa_encoder_weights, config.repa_image_size,
            config.repa_encoder_revision, encoder_dtype(config.repa_encoder_dtype, device), config.repa_encoder_trust,
        )  # fmt: skip
    return encoder_features(encoder.to(device))


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flextok.data.cache_features",
        description="Fill the feature cache (repa_cache) and the latent cache (cache_latents) of a training run.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="override a setting; repeatable")  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda:LOCAL_RANK if there is one)")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="images per pass (default: the config's batch_size)"
    )
    parser.add_argument("--check", action="store_true", help="print the sizes and what is missing, compute nothing")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise ConfigError(f"--batch-size is {arguments.batch_size}, expected at least 1")
    default = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    device = chosen_device(arguments.device or default)
    datasets = {
        split: dataset if isinstance(dataset, CachedDataset) else CachedDataset(dataset, split)
        for split, dataset in zip(("train", "val"), build_datasets(config))
        if dataset is not None
    }
    plans, model = cache_plans(config, datasets, device)
    every = [plan for by_split in plans.values() for plan in by_split.values()]
    print("\n".join(plan.describe() for plan in every), flush=True)
    new = [plan for plan in every if plan.open() is None]
    if new:
        check_space(new[0].folder, sum(plan.nbytes for plan in new))
    if arguments.check:
        return

    for name in plans:
        compute = latent_moments(model.to(device).vae) if name == LATENTS else load_features(config, device)
        if name == FEATURES:
            plans[name] = feature_plans(config, datasets, device)  # now the weights are here, and named in the key
        values = CachedValues(name, datasets, plans[name], compute)
        for dataset in datasets.values():
            fill(values, dataset, arguments.batch_size or config.batch_size, config.num_workers, device)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    run_command(main)
