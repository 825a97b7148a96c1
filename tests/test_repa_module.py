"""REPA: the projector and the loss, the module around them, DINOv2 and how it is found and loaded."""

import math
import re
from pathlib import Path

import hub_standin
import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from helpers import cut_off_network
from torch import nn

from flextok.model.utils.repa_encoders import EncoderFacts, EncoderUnavailable, FrozenEncoder
from flextok.model.utils.repa_loss import (
    REPAModule,
    REPAProjector,
    known_encoders,
    load_encoder,
    projector_parameters,
)
from flextok.training.config import TrainConfig
from flextok.training.models import check_repa_settings
from flextok.utils.config import ConfigError


@pytest.fixture
def hub_dir(tmp_path, monkeypatch):
    """An empty torch.hub cache that TORCH_HOME names, on a machine without network."""
    cut_off_network(monkeypatch, tmp_path / "torch")
    return tmp_path / "torch" / "hub"


@pytest.fixture
def cached_hub(hub_dir):
    """`hub_dir` with the stand-in repository and the weights of dinov2_vits14."""
    hub_standin.write_repository(hub_dir / hub_standin.FOLDER)
    hub_standin.write_weights(hub_dir, "dinov2_vits14")
    return hub_dir


class Pixels(nn.Module):
    """An encoder without preprocessing: a 1x1 convolution of 8x8 average pooled images."""

    name, dim = "pixels", 12

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, self.dim, 1)

    def forward(self, images):
        return self.mix(F.avg_pool2d(images, 8))


@pytest.fixture
def repa():
    return REPAModule(decoder_dim=10, target_size=(7, 6), hidden_dim=16, encoder=Pixels())


def make_images(batch=2, size=64, seed=3):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def make_features(*shape, seed=4):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The loss and the projector, against NumPy.


def numpy_bilinear(x, height, width):
    """Bilinear resize of [h, w, C] with pixel centres at half-integers, position by position."""
    h, w, _ = x.shape
    out = np.zeros((height, width, x.shape[2]))
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * h / height - 0.5, 0), h - 1)
            z = min(max((j + 0.5) * w / width - 0.5, 0), w - 1)
            y0, z0 = int(y), int(z)
            y1, z1 = min(y0 + 1, h - 1), min(z0 + 1, w - 1)
            top = x[y0, z0] * (1 - (z - z0)) + x[y0, z1] * (z - z0)
            bottom = x[y1, z0] * (1 - (z - z0)) + x[y1, z1] * (z - z0)
            out[i, j] = top * (1 - (y - y0)) + bottom * (y - y0)
    return out


def numpy_projector(x, projector):
    weights = {key: value.double().numpy() for key, value in projector.state_dict().items()}
    for index, layer in enumerate((0, 2, 4)):
        x = weights[f"layers.{layer}.weight"] @ x + weights[f"layers.{layer}.bias"]
        if index < 2:
            x = x / (1 + np.exp(-x))
    return x


@pytest.mark.parametrize("project_when", ["after_resize", "before_resize"])
def test_loss_equals_a_position_by_position_computation(project_when):
    repa = REPAModule(10, target_size=(7, 6), hidden_dim=16, encoder=Pixels(), project_when=project_when)
    nn.init.normal_(repa.projector.layers[2].bias)
    features, images = make_features(2, 4, 5, 10), make_images()
    steps = [lambda x: numpy_bilinear(x, 7, 6), lambda x: np.apply_along_axis(numpy_projector, 2, x, repa.projector)]
    encoded = repa.encoder(images).detach().double().permute(0, 2, 3, 1).numpy()
    cosines = []
    for x, target in zip(features.double().numpy(), encoded):
        for step in steps if project_when == "after_resize" else reversed(steps):
            x = step(x)
        target = numpy_bilinear(target, 7, 6)
        cosines.append((x * target).sum(2) / (np.linalg.norm(x, axis=2) * np.linalg.norm(target, axis=2)))
    loss = repa(features, images)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(-np.mean(cosines), abs=1e-6)


def test_the_conv_projector_is_a_3x3_convolution_with_zeros_around():
    repa = REPAModule(10, target_size=(4, 5), encoder=Pixels(), projector="conv")
    features = make_features(1, 4, 5, 10)
    assert sum(p.numel() for p in repa.projector.parameters()) == 12 * 10 * 9 + 12
    assert projector_parameters(10, 12, "conv") == 12 * 10 * 9 + 12
    weight = repa.projector.conv.weight.detach().numpy()  # [12, 10, 3, 3]
    padded = np.pad(features[0].numpy(), ((1, 1), (1, 1), (0, 0)))
    for i, j in ((0, 0), (3, 4), (1, 2)):
        expected = np.einsum("ocij,ijc->o", weight, padded[i : i + 3, j : j + 3])
        np.testing.assert_allclose(repa.project(features)[0, :, i, j].detach().numpy(), expected, atol=1e-5)


def test_targets_are_normalised_over_positions_on_the_encoders_grid_before_they_are_resized():
    repa, images = REPAModule(10, target_size=(7, 6), encoder=Pixels(), spatial_norm=0.6), make_images()
    x = repa.encoder(images)[1].double().numpy()
    normed = (x - 0.6 * x.mean((1, 2), keepdims=True)) / (x.std((1, 2), ddof=1, keepdims=True) + 1e-6)
    expected = numpy_bilinear(normed.transpose(1, 2, 0), 7, 6)
    np.testing.assert_allclose(repa.target_features(images)[1].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_several_layers_have_a_projector_each_and_the_loss_is_the_mean(repa):
    three = REPAModule(10, target_size=(7, 6), hidden_dim=16, encoder=repa.encoder, n_layers=3)
    features, images = make_features(2, 4, 5, 30), make_images()
    losses = three.layer_losses(features, three.target_features(images))
    assert torch.equal(losses[0], repa(features[..., :10], images))  # the first is the same however many follow
    assert not torch.equal(three.projector[0].layers[0].weight, three.projector[1].layers[0].weight)
    assert three(features, images).item() == pytest.approx(sum(loss.item() for loss in losses) / 3)
    with pytest.raises(ValueError, match=r"\[B, h, w, 30\], but got \[2, 4, 5, 20\]"):
        three(features[..., :20], images)


def test_the_encoder_is_loaded_by_a_call_and_freed_and_features_make_targets_without_it(cached_hub):
    repa = REPAModule(10, "dinov2_vits14", image_size=28, hidden_dim=16)
    assert repa.encoder_dim == 384 and not repa.has_encoder
    encoder = repa.load_encoder()
    assert repa.encoder is encoder is repa.load_encoder()
    features, target = repa.encoder_features(make_images()), repa.target_features(make_images())
    repa.free_encoder()
    assert not repa.has_encoder and torch.equal(repa.targets(features), target)
    with pytest.raises(RuntimeError, match="dinov2_vits14 is not loaded: .* repa_module.load_encoder"):
        repa.target_features(make_images())
    assert repa.to("meta").load_encoder().pixel_mean.is_meta  # it goes where the projector is


def test_projector_has_the_documented_widths_and_initialisation():
    projector = REPAProjector(1152, 1024)
    assert sum(p.numel() for p in projector.parameters()) == 8_655_872
    for layer, (inputs, outputs) in zip((0, 2, 4), ((1152, 2048), (2048, 2048), (2048, 1024)), strict=True):
        linear = projector.layers[layer]
        bound = math.sqrt(6 / (inputs + outputs))
        assert linear.weight.shape == (outputs, inputs)
        assert 0.99 * bound < linear.weight.abs().max() <= bound
        assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
        assert (linear.bias == 0).all()


# The encoder is a guest.


def test_mode_casts_and_autocast_do_not_reach_the_encoder(cached_hub):
    encoder = load_encoder("dinov2_vits14", image_size=28)
    expected = encoder(make_images())
    repa = REPAModule(10, target_size=(2, 2), encoder=encoder, hidden_dim=16).train().double()
    assert repa.projector.layers[0].weight.dtype == torch.float64
    assert not any(module.training for module in encoder.modules())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        target = repa.target_features(make_images().requires_grad_(True))
    assert torch.equal(target, expected) and not target.requires_grad


# What the encoder sees.


def show_pixels(size, mean, std):
    """An encoder whose features are the pixels that its model gets."""
    facts = EncoderFacts(3, 1, size, 0, (size, size), mean, std)
    return FrozenEncoder("pixels", nn.Identity(), lambda model, pixels: model(pixels), facts)


def test_images_are_resized_bicubically_and_normalised():
    mean, std = (0.2, 0.4, 0.6), (0.5, 0.25, 0.125)
    encoder = show_pixels(20, mean, std)
    photograph = skimage.data.chelsea()[50:250, 100:300] / 255
    images = torch.from_numpy(photograph).permute(2, 0, 1)[None] * 2 - 1
    seen = encoder(images)
    assert seen.shape == (1, 3, 20, 20)
    # Reference: bicubic (a = -0.5) weights of a kernel stretched by the scale, row by row.
    weights = np.zeros((20, 200))
    for i in range(20):
        t = np.abs((np.arange(200) + 0.5) / 10 - (i + 0.5))
        near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
        weights[i] = np.where(t < 1, near, np.where(t < 2, far, 0))
    weights /= weights.sum(1, keepdims=True)
    resized = np.einsum("iy,jx,yxc->ijc", weights, weights, photograph)
    expected = (resized - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(seen[0].permute(1, 2, 0).numpy(), expected, atol=1e-4)


def test_dinov2_sees_518_pixels_with_imagenet_statistics_and_gives_37x37_positions(cached_hub):
    encoder = load_encoder("dinov2_vits14")
    with pytest.raises(ValueError, match=r"takes images \[B, 3, H, W\], but got \[2, 1, 28, 28\]"):
        encoder(torch.zeros(2, 1, 28, 28))
    images = make_images(1, 518)
    features = encoder(images)
    assert features.shape == (1, 384, 37, 37) and encoder.grid == (37, 37) and encoder.image_size == 518
    weights = hub_standin.make_weights("dinov2_vits14")
    pixels = images[0].double().numpy() / 2 + 0.5
    pixels = (pixels - np.array([[[0.485]], [[0.456]], [[0.406]]])) / np.array([[[0.229]], [[0.224]], [[0.225]]])
    patch = pixels[:, 3 * 14 : 4 * 14, 30 * 14 : 31 * 14]  # row 3, column 30
    token = np.einsum("oyxz,yxz->o", weights["patch_embed.weight"].double().numpy(), patch)
    token += weights["patch_embed.bias"].double().numpy()
    token = (token - token.mean()) / np.sqrt(token.var() + 1e-5)
    np.testing.assert_allclose(features[0, :, 3, 30].numpy(), token, atol=1e-4)


# Where DINOv2 comes from.


@pytest.mark.parametrize("name", [name for name in known_encoders() if name.startswith("dinov2")])
def test_every_dinov2_name_loads_its_own_weights_from_the_cache_without_network(name, hub_dir, recwarn):
    hub_standin.write_repository(hub_dir / hub_standin.FOLDER)
    hub_standin.write_weights(hub_dir, name, seed=5)
    encoder = load_encoder(name, image_size=28)
    assert encoder.name == name and encoder.dim == known_encoders()[name].dim
    assert encoder(make_images(1)).shape == (1, encoder.dim, 2, 2)
    expected = hub_standin.make_weights(name, seed=5)
    assert set(encoder.model.state_dict()) == set(expected)
    assert all(torch.equal(value, expected[key]) for key, value in encoder.model.state_dict().items())
    assert not [warning for warning in recwarn if "xFormers" in str(warning.message)]


def test_local_folder_and_weights_file_need_no_network_and_no_cache(hub_dir, tmp_path):
    repo = hub_standin.write_repository(tmp_path / "my dinov2")
    torch.save(hub_standin.make_weights("dinov2_vitb14", seed=7), tmp_path / "b.pth")
    repa = REPAModule(
        10, "dinov2_vitb14", 768, image_size=28, encoder_repo=str(repo), encoder_weights=str(tmp_path / "b.pth"),
        encoder_trust=True,
    )  # fmt: skip
    expected = hub_standin.make_weights("dinov2_vitb14", seed=7)["patch_embed.weight"]
    assert torch.equal(repa.load_encoder().model.patch_embed.weight, expected)
    assert not hub_dir.exists()


@pytest.mark.parametrize("revision", [None, "e1277af"])
def test_an_empty_cache_is_filled_from_the_network_once(hub_dir, monkeypatch, revision):
    servers = hub_standin.FakeServers("dinov2_vits14_reg", revision or "main")
    monkeypatch.setattr(torch.hub, "urlopen", servers.urlopen)
    first = load_encoder("dinov2_vits14_reg", revision=revision)
    assert servers.requests == list(servers.answers)  # nothing but the archive and the weights: no GitHub API
    assert (hub_dir / f"facebookresearch_dinov2_{revision or 'main'}" / "hubconf.py").is_file()
    again = load_encoder("dinov2_vits14_reg", revision=revision)
    assert len(servers.requests) == 2
    assert torch.equal(first.model.patch_embed.weight, again.model.patch_embed.weight)
    (hub_dir / "checkpoints" / hub_standin.weights_file("dinov2_vits14_reg")).unlink()
    load_encoder("dinov2_vits14_reg", revision=revision)
    assert servers.requests[2:] == list(servers.answers)[1:]  # the weights alone


def test_without_cache_and_network_one_error_says_what_to_copy_where_and_following_it_makes_it_work(hub_dir):
    repa = REPAModule(10, "dinov2_vitb14_reg", hidden_dim=16)
    with pytest.raises(EncoderUnavailable) as error:
        repa.load_encoder()
    message = str(error.value)
    for part in ("no network in this test", "GitHub", f"torch.hub cache, {hub_dir} (TORCH_HOME moves it)",
                 "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
                 "repa_encoder_repo", "repa_encoder_weights"):  # fmt: skip
        assert part in message, part
    repository, weights = re.findall(r", to (\S+)$", message, flags=re.MULTILINE)
    hub_standin.write_repository(Path(repository))
    Path(weights).parent.mkdir(exist_ok=True)
    torch.save(hub_standin.make_weights("dinov2_vitb14_reg"), weights)
    assert repa.load_encoder().dim == 768


def test_the_code_of_a_folder_is_run_only_if_it_is_trusted(cached_hub, tmp_path):
    repo = hub_standin.write_repository(cached_hub / "somebody_dinov2_main")  # beside torch.hub's own copy
    with open(repo / "hubconf.py", "a") as file:
        file.write(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ConfigError, match=rf"runs {re.escape(str(repo))}/hubconf.py .*set repa_encoder_trust: true"):
        load_encoder("dinov2_vits14", repo=str(repo))
    config = TrainConfig(use_repa=True, repa_encoder_type="dinov2_vits14", repa_encoder_repo=str(repo))
    with pytest.raises(ConfigError, match="set repa_encoder_trust: true"):  # at the start, before any loading
        check_repa_settings(config, torch.device("cpu"))
    config.repa_encoder_trust = True
    check_repa_settings(config, torch.device("cpu"))
    assert not (tmp_path / "ran").exists()
    load_encoder("dinov2_vits14", repo=str(repo), trust=True)
    assert (tmp_path / "ran").exists()
    load_encoder("dinov2_vits14", repo=str(cached_hub / hub_standin.FOLDER))  # that copy needs no trust
