"""Small training runs on the photographs, for the trainer's tests."""

import argparse
import functools
import json
from pathlib import Path

import torch
import yaml

import train_flextok
from flextok.data import photos
from flextok.data.batch import Batch
from flextok.data.loader import build_loaders
from flextok.data.precompute import precompute
from flextok.data.sources import build_datasets
from flextok.training.config import TrainConfig
from flextok.training.models import load_model

SETTINGS = dict(
    model=dict(
        encoder_depth=2, decoder_depth=3, encoder_width=64, decoder_width=64, head_dim=32, n_registers=8, vae="pixel",
        vae_factor=4, fsq_levels=[8, 5, 5], null_condition_prob=0.3,
    ),
    dataset_name="photos", img_size=32, photos_train_crops=22, photos_val_crops=6, num_workers=0,
    num_epochs=2, batch_size=4, learning_rate=1e-3, warmup_steps=2, min_lr=1e-5, use_amp=False,
    use_repa=True, repa_encoder_type="efficientnet_lite0", repa_image_size=64, repa_target_size=[4, 4],
    repa_projector_hidden=32, repa_lr=1e-3,
    log_every=1, visualize_every=0, inference_steps=2, num_vis_images=2, vis_token_counts=[1, 8], use_wandb=False,
    readout_weight=0.0,
)  # fmt: skip

photos.load_image = functools.cache(photos.load_image)  # ten large photographs, for each run anew

TIMING = ("train/images_per_second", "train/data_wait", "train/memory_gb")  # metrics that differ from run to run


def draw_no_curves(patch=setattr) -> None:
    """Leave out the end of a run that takes longest: the curves."""
    patch(train_flextok, "save_curves", lambda *_: None)


def settings(**changes) -> dict:
    return {**SETTINGS, **changes}


def make_trainer(run_dir=None, device="cpu", **changes) -> train_flextok.FlexTokTrainer:
    """A trainer as `main` builds it."""
    config = TrainConfig.from_dict(settings(**changes))
    model, datasets = load_model(config), build_datasets(config)
    datasets = precompute(config, *datasets, model, torch.device(device))
    train_loader, val_loader = build_loaders(config, *datasets, device)
    return train_flextok.FlexTokTrainer(config, model, train_loader, val_loader, device, run_dir)


def first_batch(trainer) -> Batch:
    trainer.train_loader.batch_sampler.set_state(0, 0)
    return next(iter(trainer.train_loader))


def run_main(folder: Path, *, max_steps=None, resume=None, run_dir=None, check=False, overrides=(), **changes) -> None:
    """`python train_flextok.py` in this process, with a config file of the tiny settings."""
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings(checkpoint_dir=str(folder / "runs"), **changes)))
    train_flextok.main(
        argparse.Namespace(
            config=str(file), overrides=list(overrides), resume=resume, device="cpu", max_steps=max_steps, check=check,
            run_dir=None if run_dir is None else str(run_dir),
        )
    )  # fmt: skip


def whole_and_parts(folder: Path, stop: int, max_steps: int, **changes) -> tuple[dict, dict]:
    """The last checkpoints of a run to `max_steps`, and of one that was stopped at `stop` and resumed."""
    run_main(folder, run_dir=folder / "whole", max_steps=max_steps, **changes)
    run_main(folder, run_dir=folder / "parts", max_steps=stop, **changes)
    run_main(folder, run_dir=folder / "parts", max_steps=max_steps, resume="latest", **changes)
    return read_latest(folder / "whole"), read_latest(folder / "parts")


def read_metrics(run_dir: Path, timing: bool = False) -> list:
    """The records of metrics.jsonl, without what depends on the clock."""
    records = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if timing or k not in TIMING} for record in records]


def read_latest(run_dir: Path) -> dict:
    return torch.load(Path(run_dir) / "checkpoints" / "latest.pt", weights_only=True)


def same(a, b) -> bool:
    """Whether two trees of tensors and plain values are bit-identical."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
