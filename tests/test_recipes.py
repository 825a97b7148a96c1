"""The recipes of README_RECIPES.md, each with a small model and a few images."""

import re

import pytest
import torch
import yaml
from processes import ROOT
from test_sources import picture, write_shards
from tiny_runs import SETTINGS, read_metrics, run_main

from flextok import FlexTokFromHub
from flextok.training.config import TrainConfig
from flextok.training.models import load_model

TEXT = (ROOT / "README_RECIPES.md").read_text()
RECIPES = dict(re.findall(r"## ([^\n]+)\n(?:(?!\n## ).)*?```yaml\n(.*?)```", TEXT, flags=re.DOTALL))

# What is small for all of them; those of large models are replaced by these where the recipe has them.
TOY = {key: SETTINGS[key] for key in ("repa_encoder_type", "repa_image_size", "repa_target_size", "num_workers")}
TOY |= dict(use_wandb=False, num_epochs=1, warmup_steps=1, use_amp=False, inference_steps=2, num_vis_images=2,
            vis_token_counts=[1, 64], visualize_every=0, batch_size=2, img_size=32)  # fmt: skip
SMALLER = dict(
    img_size=lambda size: size // 8, batch_size=lambda n: 2, global_batch_size=lambda n: 4, max_steps=lambda n: 4,
    decay_steps=lambda n: 2, model=lambda model: SETTINGS["model"], repa_stop=lambda n: 3,
    repa_warmup_steps=lambda n: 1, repa_cooldown_steps=lambda n: 1, repa_image_size=lambda size: TOY["repa_image_size"],
    repa_encoder_type=lambda name: TOY["repa_encoder_type"], cache_latents=lambda _: False,  # of `vae: pixel`
)  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small model in the form of a published one."""
    folder = tmp_path_factory.mktemp("published")
    load_model(TrainConfig.from_dict({**SETTINGS, "seed": 5})).save_pretrained(folder)
    return folder


def test_the_recipes_are_found():
    assert len(RECIPES) == 9


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_runs_at_toy_size(tmp_path, published, title):
    recipe = yaml.safe_load(RECIPES[title])
    TrainConfig.from_dict(recipe)  # as it is printed
    images = tmp_path / "images"
    images.mkdir()
    for i in range(12):
        picture(i, size=(70, 64)).save(images / f"{i}.png")
    toy = {key: SMALLER[key](value) if key in SMALLER else value for key, value in recipe.items()}
    if recipe.get("dataset_name") == "webdataset":
        toy["data_path"] = write_shards(tmp_path / "train", n=12)["data_path"]
        toy["val_path"] = write_shards(tmp_path / "val", n=4)["data_path"]
    else:
        toy |= dict(dataset_name="folder", data_path=str(images), val_fraction=0.3)
    if "model" not in recipe:
        toy |= dict(model_name=str(published), model=None)
    if "best_metric" in recipe:
        toy["best_metric"] = "val/psnr_k8"  # of the small model's 8 tokens
    before = {path: path.read_bytes() for path in published.iterdir()}
    settings = {**TOY, "model": None, "use_repa": False, "readout_weight": None, **toy}
    settings["cache_dir"] = str(tmp_path / "cache")
    overrides = [f"max_steps={settings.pop('max_steps', 4)}"]
    run_main(tmp_path, run_dir=tmp_path / "run", overrides=overrides, **settings)
    losses = [record["train/loss"] for record in read_metrics(tmp_path / "run") if "train/loss" in record]
    assert len(losses) == 4 and all(loss is not None for loss in losses)
    model = FlexTokFromHub.from_pretrained(tmp_path / "run" / "export")
    side = settings["img_size"]
    tokens = model.tokenize(torch.zeros(1, 3, side, side))
    assert model.detokenize(tokens, timesteps=2)[0].shape[-1] == side
    assert {path: path.read_bytes() for path in published.iterdir()} == before
