"""Fill the caches of a training run ahead of it.

    python -m flextok.data.cache_features --config configs/train_celebahq.yaml --set use_repa=true --set repa_cache=true

Computes what the config caches: REPA's encoder features (`repa_cache`), the VAE's latents (`cache_latents`), as a run
does before it trains. Stopped, it goes on where it was. Several processes may fill one cache at once, each on a device
of its own: start the command several times, or under torchrun.
"""

import argparse
import logging
import os

import torch

from ..training.config import load_config
from ..training.models import check_repa_settings, load_model, set_vae_dtype, settled
from ..utils.config import ConfigError
from ..utils.devices import chosen_device
from ..utils.errors import run_command
from .precompute import cache_plans, fill_caches
from .sources import build_datasets


def main(argv: list[str] | None = None) -> None:
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
    if config.repa_cache:
        config.use_repa = True  # an ablation's arms share the cache, whichever config it is filled from
    default = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    device = chosen_device(arguments.device or default)
    if config.repa_cache:
        check_repa_settings(config, device)
    datasets = {
        split: dataset for split, dataset in zip(("train", "val"), build_datasets(config)) if dataset is not None
    }
    model = load_model(config) if config.cache_latents else None
    config = settled(config, model, device)
    if model is not None:
        set_vae_dtype(config, model.vae, device)  # as in training, which the cache's key is of
    plans = cache_plans(config, datasets, model, device)
    if not plans:
        raise ConfigError(
            "the config caches nothing: add --set repa_cache=true (REPA's features) or --set cache_latents=true"
        )
    every = [plan for by_split in plans.values() for plan in by_split.values()]
    print("\n".join(plan.describe() for plan in every), flush=True)
    if arguments.check:
        return
    for plan in every:
        cache = plan.open()
        if cache is not None and len(cache.unreadable()):
            cache.retry_unreadable()
    fill_caches(config, datasets, plans, model, device, arguments.batch_size)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    run_command(main)
