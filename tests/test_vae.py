"""Images to latents and back: the AutoencoderKL around diffusers' own, the pixel VAE and the DCT."""

import math

import pytest
import torch
from helpers import make_draws, make_images, make_noise, save_tiny_vae

from flextok.training.config import TrainConfig
from flextok.training.models import set_vae_dtype
from flextok.utils.random import RANDOM_KEY
from flextok.vae_wrapper import BlockDCTVAE, PixelUnshuffleVAE, StableDiffusionVAE

KEYS = dict(
    images_read_key="rgb", vae_latents_read_key="vae_latents_reconst", vae_latents_write_key="vae_latents",
    images_reconst_write_key="rgb_reconst",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def diffusers_vae(folder):
    return save_tiny_vae(folder).requires_grad_(False)


@pytest.fixture
def make_vae(folder, diffusers_vae):
    def make(**options):
        return StableDiffusionVAE(**{**KEYS, "hf_hub_path": folder, "latent_channels": 4, "frozen": True, **options})

    return make


def encoded(vae, images, **more):
    return vae.encode({"rgb": images, **more})["vae_latents"]


def decoded(vae, latents):
    return vae.decode({"vae_latents_reconst": latents})["rgb_reconst"]


def assert_close(value, expected, tolerance=1e-5):
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=tolerance)


# StableDiffusionVAE


@pytest.mark.parametrize("scaling_factor, expected", [(None, 0.5), (0.18215, 0.18215)])
def test_latents_are_the_mode_times_the_scaling_factor(make_vae, diffusers_vae, scaling_factor, expected):
    vae, images = make_vae(sample_posterior=False, scaling_factor=scaling_factor), make_images(2)
    assert_close(encoded(vae, images), diffusers_vae.encode(images).latent_dist.mean * expected)
    latents = make_noise(2, 4, 4, 6)
    assert_close(decoded(vae, latents), diffusers_vae.decode(latents / expected).sample)
    assert vae.downsample_factor == 8


def test_latents_are_a_posterior_sample_that_depends_on_the_address_alone(make_vae, diffusers_vae):
    vae, images, draws = make_vae(), make_images(100), make_draws(100)
    posterior = diffusers_vae.encode(images).latent_dist
    latents = encoded(vae, images, **{RANDOM_KEY: draws})
    noise = (latents / 0.5 - posterior.mean) / (posterior.logvar / 2).exp()
    assert noise.mean().item() == pytest.approx(0, abs=0.06)
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    assert noise.abs().max() < 5
    assert abs(torch.corrcoef(torch.stack([noise[:50].flatten(), noise[50:].flatten()]))[0, 1]) < 0.09
    assert_close(encoded(vae, images[7:8], **{RANDOM_KEY: draws.select([7])}), latents[7:8])
    assert not torch.equal(encoded(vae, images, **{RANDOM_KEY: make_draws(100, step=4)}), latents)


@pytest.mark.parametrize("kind", ["pixel", "stable_diffusion"])
def test_given_latents_are_kept_unless_encoding_is_forced(make_vae, kind):
    make, given = PixelUnshuffleVAE if kind == "pixel" else make_vae, make_noise(2, 4, 4, 4)
    for force in (False, True):
        data_dict = make(force_vae_encode=force).encode({"rgb": make_images(2), "vae_latents": given})
        assert torch.equal(data_dict["vae_latents"], given) != force


def test_a_frozen_vae_trains_nothing_and_stays_in_evaluation_mode(make_vae):
    vae = make_vae().train()
    assert not any(p.requires_grad for p in vae.parameters())
    assert not any(module.training for module in vae.modules())
    data_dict = vae.encode({"rgb": make_images(1).requires_grad_()})
    assert not data_dict["vae_latents"].requires_grad and "vae_kl_loss" not in data_dict


def test_a_trained_vae_gets_gradients_from_latents_images_and_kl(make_vae):
    vae = make_vae(frozen=False).train()
    data_dict = vae.encode({"rgb": make_images(2), RANDOM_KEY: make_draws(2)})
    loss = decoded(vae, data_dict["vae_latents"]).square().mean() + 1e-6 * data_dict["vae_kl_loss"]
    loss.backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_kl_is_that_of_a_diagonal_normal_in_nats_per_image(make_vae, diffusers_vae):
    images = make_images(3)
    posterior = diffusers_vae.encode(images).latent_dist
    mean, variance = posterior.mean.double(), posterior.logvar.double().exp()
    expected = (0.5 * (mean**2 + variance - 1 - variance.log())).sum((1, 2, 3)).mean()
    for given in (images, list(images.split(1))):
        kl = make_vae(frozen=False).encode({"rgb": given})["vae_kl_loss"]
        assert kl.dtype == torch.float32 and kl.ndim == 0
        assert kl.item() == pytest.approx(expected.item(), rel=1e-4)
    larger, vae = make_images(1, 64, 64), make_vae(frozen=False)
    alone = [vae.encode({"rgb": image})["vae_kl_loss"] for image in (*images.split(1), larger)]
    mixed = vae.encode({"rgb": [*images.split(1), larger]})["vae_kl_loss"]
    assert mixed.item() == pytest.approx(torch.stack(alone).mean().item(), rel=1e-5)  # over images, not sizes


@pytest.mark.parametrize("override, autocast", [("fp32", True), (None, True), ("bf16", False)])
def test_dtype_override_decides_over_autocast_and_results_are_fp32(make_vae, override, autocast):
    exact, vae = make_vae(sample_posterior=False), make_vae(sample_posterior=False, dtype_override=override)
    images, given = make_images(2), make_noise(1, 4, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        values = encoded(vae, images), decoded(vae, given)
    for value, expected in zip(values, (encoded(exact, images), decoded(exact, given))):
        assert value.dtype == torch.float32 and torch.equal(value, expected) == (override == "fp32")
        assert (value - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    "settings, device, has_bf16, expected",
    [
        ({}, "cuda", True, torch.bfloat16),
        ({}, "cuda", False, torch.float32),
        ({}, "cpu", True, torch.float32),
        ({"use_amp": False}, "cuda", True, torch.float32),
        ({"vae_dtype": "bf16"}, "cpu", False, torch.bfloat16),
        ({"train_vae": True}, "cuda", True, torch.float32),
    ],
)
def test_a_frozen_vae_computes_in_what_vae_dtype_says(make_vae, monkeypatch, settings, device, has_bf16, expected):
    monkeypatch.setattr("flextok.training.models.computes_bf16", lambda device: has_bf16)
    vae = make_vae()
    set_vae_dtype(TrainConfig.from_dict(settings), vae, torch.device(device))
    assert vae.dtype_override == expected


def test_a_revision_of_the_weights_is_pinned_after_an_at_sign(monkeypatch, diffusers_vae):
    asked = []
    monkeypatch.setattr(
        "diffusers.AutoencoderKL.from_pretrained",
        lambda name, revision=None, **_: asked.append((name, revision)) or diffusers_vae,
    )
    for path in ("somebody/vae", "somebody/vae@abc123"):
        assert StableDiffusionVAE(**KEYS, hf_hub_path=path, latent_channels=4).hf_hub_path == "somebody/vae"
    assert asked == [("somebody/vae", None), ("somebody/vae", "abc123")]


def test_weights_that_do_not_fit_or_are_nowhere_are_named(folder, diffusers_vae, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="latent_channels is 16.*has 4"):
        StableDiffusionVAE(**KEYS, hf_hub_path=folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for path in (str(tmp_path / "missing"), "nobody/no-such-vae"):
        with pytest.raises(RuntimeError, match=f"(?s){path}.*hf download"):
            StableDiffusionVAE(**KEYS, hf_hub_path=path)


# PixelUnshuffleVAE


@pytest.mark.parametrize("factor, scaling_factor", [(2, 0.25), (8, 2.0)])
def test_pixel_latents_hold_the_pixels_of_their_block_and_are_exactly_invertible(factor, scaling_factor):
    vae, images = PixelUnshuffleVAE(factor=factor, scaling_factor=scaling_factor), make_images(3, 16, 24)
    latents = encoded(vae, images)
    assert latents.shape == (3, vae.latent_channels, 16 // factor, 24 // factor)
    for row in range(factor):
        for column in range(factor):
            channels = torch.arange(3) * factor**2 + row * factor + column
            assert torch.equal(latents[:, channels], scaling_factor * images[:, :, row::factor, column::factor])
    assert torch.equal(decoded(vae, latents), images)


# BlockDCTVAE


def test_dct_with_all_coefficients_loses_nothing():
    images = make_images(2, 16, 24)
    vae = BlockDCTVAE(factor=4, coefficients=[16, 16], scaling_factor=0.5, whitening=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # without effect
        latents = encoded(vae, images)
    assert latents.shape == (2, 48, 4, 6)
    assert_close(decoded(vae, latents), images)
    assert vae.state_dict() == {}


@pytest.mark.parametrize("whitening", [1.0, 0.5, 0.0])
def test_dct_coefficients_are_those_of_scipy(whitening):
    from scipy.fft import dctn

    image = make_images(1, 8, 8)
    vae = BlockDCTVAE(factor=8, coefficients=[6, 0], whitening=whitening)
    latents = encoded(vae, image).flatten()
    brightness = image[0].sum(0).numpy() / 3**0.5  # the three colours, orthonormal
    expected = dctn(brightness, norm="ortho")
    frequencies = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0)]
    for latent, (u, v) in zip(latents.tolist(), frequencies, strict=True):
        std = 0.8 * 8 / (1 + 1.7 * math.hypot(u, v))
        assert latent == pytest.approx(expected[u, v] / std**whitening, abs=1e-4)
