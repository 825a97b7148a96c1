"""The benchmarks of image loading and start-up; no test depends on how long anything takes."""

import argparse
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import settings

from flextok import vae_wrapper
from flextok.benchmark import data, startup
from flextok.model.builder import build_config
from flextok.utils.errors import UserError
from flextok.vae_wrapper import StableDiffusionVAE

CPU = torch.device("cpu")


def arguments(module, *options):
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    module.add_arguments(parser)
    return parser.parse_args(options)


def test_both_ways_of_loading_give_nearly_the_same_images(capsys):
    threads = torch.get_num_threads()
    options = ("--source-size", "128", "--image-size", "32", "--files", "2", "--rounds", "2", "--wait-steps", "0")
    result = data.run(arguments(data, *options), CPU, torch.float32)
    assert torch.get_num_threads() == threads
    rates = result["images_per_second"]
    assert len(rates) == 6 and all(len(values) == 2 for values in rates.values())
    assert all(
        result[name][1] <= result[name][0] <= result[name][2] for name in ("ratio", "ratio_parquet", "ratio_shards")
    )
    difference = result["difference"]
    assert 0 < difference["mean"] <= difference["largest_mean_of_a_file"] < 2
    assert difference["mean"] < difference["maximum"] < 30
    printed = capsys.readouterr().out
    assert "ours / datasets, parquet" in printed and "mean absolute" in printed


def test_waiting_is_measured_for_images_and_for_cached_latents(monkeypatch):
    model = {**settings()["model"], "vae": "stable_diffusion", "patch_size": 2, "latent_channels": 4}
    monkeypatch.setattr(
        data, "preset_config", lambda preset, **_: build_config(img_size=64, vae_hub_path=None, **model)
    )
    small = dict(block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
    monkeypatch.setattr(vae_wrapper, "AUTOENCODER_KL", {**vae_wrapper.AUTOENCODER_KL, **small})
    encoded, moments = [], StableDiffusionVAE.moments
    monkeypatch.setattr(StableDiffusionVAE, "moments", lambda vae, x: encoded.append(len(x)) or moments(vae, x))
    options = arguments(data, "--source-size", "96", "--image-size", "64", "--wait-steps", "2", "--num-workers", "0")
    shares = data.waiting(options, 3, CPU, torch.float32)
    assert len(shares) == 2 and all(0 <= share <= 1 for share in shares)
    assert encoded == [3] * 4  # two batches, mirrored and not, for the cache; none when it is read


def test_jpegs_are_the_centres_of_photographs_mirrored_beyond_their_ends(tmp_path, monkeypatch):
    paths = data.write_jpegs(tmp_path, 12, 64)
    images = [Image.open(path) for path in paths]
    assert all((image.format, image.size, image.mode) == ("JPEG", (64, 64), "RGB") for image in images)
    assert len({path.read_bytes() for path in paths}) == 12
    grey = np.linspace(0, 255, 64).astype(np.uint8)[:, None, None].repeat(64, 1).repeat(3, 2)  # brighter downwards
    monkeypatch.setattr(data, "load_image", lambda path: grey)
    expected = {32: grey[16:48, 16:48], 96: np.concatenate([grey, grey[:31:-1]]).repeat(2, axis=1)[:, :96]}
    for size, pixels in expected.items():
        (path,) = data.write_jpegs(tmp_path, 1, size)
        assert np.abs(np.asarray(Image.open(path)).astype(int) - pixels).max() < 12  # JPEG's own error


def test_difference_is_in_units_of_a_255th():
    a = [torch.full((3, 2, 2), -1.0), torch.zeros(3, 2, 2)]
    b = [torch.full((3, 2, 2), -1.0), torch.zeros(3, 2, 2)]
    b[1][0, 0, 0] = 2 / 255
    values = data.difference(a, b)
    assert values["maximum"] == pytest.approx(1)
    assert values["largest_mean_of_a_file"] == pytest.approx(1 / 12)
    assert values["mean"] == pytest.approx(1 / 24)


def test_plain_loading_scales_crops_and_normalises(tmp_path):
    Image.new("RGB", (40, 20), (255, 0, 51)).save(tmp_path / "wide.png")
    image = data.plain_transform(10)(Image.open(tmp_path / "wide.png"))
    assert image.shape == (3, 10, 10)
    assert image[:, 0, 0].tolist() == pytest.approx([1, -1, -0.6], abs=1e-6)


def test_help_of_the_trainer_imports_no_torch():
    modules = startup.imported_modules(*startup.HELP)
    assert "argparse" in modules
    assert not [name for name in modules if name.split(".")[0] in ("torch", "numpy", "flextok")]


def training_that(run_dir, what):
    """A command that writes metrics like a run's, and would then go on for long."""
    code = f"import pathlib, time; p = pathlib.Path({str(run_dir)!r}); p.mkdir(); f = open(p / 'metrics.jsonl', 'w', 1)"
    return [sys.executable, "-c", f"{code}; {what}"]


def test_the_first_step_ends_the_measurement_and_the_process(tmp_path):
    lines = r"""f.write('{"train/constant": 1}\n'); time.sleep(0.3); f.write('{"train/loss": 1}\n'); time.sleep(600)"""
    seconds = startup.seconds_to_first_step(training_that(tmp_path / "run", lines), tmp_path / "run")
    assert 0.3 < seconds < 60


def test_a_run_without_a_step_is_an_error_with_its_output(tmp_path):
    command = training_that(tmp_path / "run", "raise SystemExit('no such config')")
    with pytest.raises(UserError, match="before its first step:\nno such config"):
        startup.seconds_to_first_step(command, tmp_path / "run")
