"""Which learning rate adapts a tokenizer and keeps its codes? A stand-in: digits 0 to 4, then 5 to 9.

    python -m flextok.evaluation.finetuning

pre-trains the quick start's model (without REPA) on the digits 0 to 4, fine-tunes it on 5 to 9 at several learning
rates, and prints a table: flow loss on new validation digits, share of the codes that stayed, PSNR from all tokens.
"""

import argparse
import sys
from pathlib import Path

import torch

from ..data.digits import Digits
from ..data.loader import build_loaders
from ..flextok_wrapper import FlexTokFromHub
from ..training.config import TrainConfig, load_config
from ..training.models import load_model
from ..training.token_use import psnr
from ..utils.errors import run_command

ROOT = Path(__file__).parents[2]
OLD, NEW = range(5), range(5, 10)
RATES = (1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)


def digits_of(split: str, img_size: int, classes: range) -> Digits:
    """The digits of some classes."""
    digits = Digits(split, img_size)
    chosen = [i for i, label in enumerate(digits.labels) if label in classes]
    digits.pixels = digits.pixels[chosen]
    digits.names, digits.labels = ([values[i] for i in chosen] for values in (digits.names, digits.labels))
    return digits


def trainer_of(config: TrainConfig, classes: range, run_dir: Path):
    sys.path.insert(0, str(ROOT))
    from train_flextok import FlexTokTrainer

    train, val = (digits_of(split, config.img_size, classes) for split in ("train", "val"))
    train_loader, val_loader = build_loaders(config, train, val, "cpu")
    return FlexTokTrainer(config, load_model(config), train_loader, val_loader, "cpu", run_dir)


def look(model: FlexTokFromHub, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tokens of images, and the PSNR of their reconstructions from all of them, in dB."""
    tokens = model.tokenize(images)
    reconstructed = model.detokenize(tokens, timesteps=10, generator=torch.Generator().manual_seed(0),
                                     vae_image_sizes=images.shape[-1] // model.vae.downsample_factor)  # fmt: skip
    return {"tokens": torch.cat(tokens), "psnr": psnr(reconstructed.clamp(-1, 1), images).mean()}


def settings_of(steps: int, n_images: int, **changes) -> TrainConfig:
    config = load_config(ROOT / "configs" / "quickstart.yaml").to_dict()
    steps_per_epoch = -(-n_images // config["batch_size"])
    config.update(use_repa=False, max_val_batches=None, num_epochs=-(-steps // steps_per_epoch), visualize_every=0)
    config["learning_rate"] = 1e-3  # of the pre-training
    return TrainConfig.from_dict({**config, **changes})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flextok.evaluation.finetuning", description="Rates of fine-tuning."
    )
    parser.add_argument("--steps", type=int, default=900, metavar="N", help="steps of pre-training (default: 900)")
    parser.add_argument("--tuning-steps", type=int, default=300, metavar="N", help="of fine-tuning (default: 300)")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, metavar="LR", help="default: 1e-6 to 1e-3")
    parser.add_argument("--output", type=Path, default=Path("finetuning"), metavar="DIR", help="default: finetuning")
    arguments = parser.parse_args(argv)

    n = {classes: len(digits_of("train", 16, classes)) for classes in (OLD, NEW)}
    first = trainer_of(settings_of(arguments.steps, n[OLD]), OLD, arguments.output / "pretrained")
    first.train()
    export = arguments.output / "pretrained" / "export"
    images = {
        name: torch.stack([item["image"] for item in digits_of("val", first.config.img_size, classes)])
        for name, classes in (("new", NEW), ("old", OLD))
    }
    start = {name: look(FlexTokFromHub.from_pretrained(export), some) for name, some in images.items()}
    rows = ["| learning rate | flow loss, new digits | codes kept, new | codes kept, old | PSNR, new | PSNR, old |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for rate in (None, *arguments.rates):
        changes = {} if rate is None else dict(learning_rate=rate, min_lr=rate / 100)
        config = settings_of(
            arguments.tuning_steps, n[NEW], model=None, model_name=str(export), warmup_steps=20, **changes
        )
        trainer = trainer_of(config, NEW, arguments.output / f"tuned_{rate}")
        if rate is not None:
            trainer.train()
        after = {name: look(trainer.model, some) for name, some in images.items()}
        kept = {name: (after[name]["tokens"] == start[name]["tokens"]).float().mean() for name in images}
        rows.append(
            f"| {'not fine-tuned' if rate is None else f'{rate:g}'} | {trainer.validate()['val/flow_loss']:.4f} | "
            f"{kept['new']:.1%} | {kept['old']:.1%} | {after['new']['psnr']:.2f} dB | {after['old']['psnr']:.2f} dB |"
        )
    print("\n".join(rows))


if __name__ == "__main__":
    run_command(main)
