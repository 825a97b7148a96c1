"""Encoders besides DINOv2: timm's models, their sizes, layouts and weights; EfficientNet-Lite0; files and dtypes."""

import hub_standin
import numpy as np
import pytest
import timm
import torch
from helpers import cut_off_network

from flextok.model.utils.repa_encoders import EncoderFacts, EncoderUnavailable
from flextok.model.utils.repa_loss import (
    encoder_facts,
    encoder_weights_file,
    known_encoders,
    load_encoder,
)

VIT = "test_vit.r160_in1k"  # of 0.4 M parameters, at 160 px

# One small model per kind of feature layout: name, size, dim, grid. None: the size in timm's data config.
LAYOUTS = [
    ("test_vit", None, 64, (10, 10)),  # a class token
    ("vit_xsmall_patch16_clip_224.tinyclip_yfcc15m", 64, 256, (4, 4)),  # a norm before the blocks
    ("vit_small_patch16_dinov3.lvd1689m", 64, 384, (4, 4)),  # class and register tokens, rotary embedding
    ("test_convnext", None, 64, (5, 5)),
    ("test_efficientnet", 64, 256, (2, 2)),  # a convolution behind the last stage
]


@pytest.fixture
def hf_cache(tmp_path, monkeypatch):
    """An empty cache of the Hugging Face Hub and of torch.hub, on a machine without network."""
    cut_off_network(monkeypatch, tmp_path / "torch")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "hf"


def build(name, seed=0, **arguments):
    """timm's own model with random weights, in which no layer is switched off by its initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, **arguments).eval()
        for parameter in model.parameters():
            if parameter.dim() < 2 and parameter.abs().max() < 1e-3:
                torch.nn.init.normal_(parameter, std=0.02)
    return model


def make_images(batch=1, size=64, seed=3):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def with_random_weights(name, folder, image_size=None, dtype=torch.float32):
    """`timm:NAME` through load_encoder, with random weights of timm's own model from a file."""
    torch.save(build(name).state_dict(), folder / "weights.pth")
    return load_encoder(f"timm:{name}", weights=str(folder / "weights.pth"), image_size=image_size, dtype=dtype)


# What comes out.


@pytest.mark.parametrize("name, size, dim, grid", LAYOUTS)
def test_features_keep_rows_and_columns(name, size, dim, grid, tmp_path):
    encoder = with_random_weights(name, tmp_path, size)
    facts = encoder_facts(f"timm:{name}", size)
    assert (facts.dim, facts.grid) == (dim, grid) == (encoder.dim, encoder.grid)
    assert facts.parameters == sum(parameter.numel() for parameter in encoder.parameters())
    size = encoder.image_size
    images = 0.1 * make_images(size=size)
    features = encoder(images)
    assert features.dtype == torch.float32 and features.shape == (1, dim, *grid)
    step = size // grid[0]
    for row, column in ((0, 0), (0, grid[1] - 1), (grid[0] - 1, 0)):
        changed = images.clone()
        changed[..., row * step : (row + 1) * step, column * step : (column + 1) * step] = make_images(size=step)
        difference = (encoder(changed) - features).norm(dim=1)[0]
        assert divmod(int(difference.argmax()), grid[1]) == (row, column)


@pytest.mark.parametrize("size", [160, 96])
def test_vit_features_equal_a_forward_pass_by_hand_also_at_another_size(size, tmp_path):
    encoder = with_random_weights(VIT, tmp_path, size)
    model, config = build(VIT, dynamic_img_size=True), timm.models.get_pretrained_cfg(VIT)
    images, side = make_images(2, size), size // 16
    pixels = (images.numpy().transpose(0, 2, 3, 1) / 2 + 0.5 - np.array(config.mean)) / np.array(config.std)
    tokens = model.forward_features(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float())
    features = encoder(images)
    assert tokens.shape == (2, 1 + side**2, 64)
    for row, column in ((0, 0), (2, 4), (side - 1, 3)):
        expected = tokens[:, 1 + side * row + column]
        torch.testing.assert_close(features[:, :, row, column], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name, mean, std",
    [
        ("efficientnet_lite0", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # not ImageNet's
        (f"timm:{LAYOUTS[1][0]}", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),  # CLIP's
        ("timm:test_efficientnet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_the_first_layer_sees_pixels_normalised_with_the_statistics_of_its_training(name, mean, std, tmp_path):
    timm_name = name.removeprefix("timm:")
    encoder = load_encoder(name, image_size=64) if timm_name == name else with_random_weights(timm_name, tmp_path, 64)
    layers, seen = [module for module in encoder.model.modules() if isinstance(module, torch.nn.Conv2d)], []
    layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    encoder(make_images())
    expected = (make_images().numpy().transpose(0, 2, 3, 1) * 0.5 + 0.5 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(seen[0].numpy().transpose(0, 2, 3, 1), expected, atol=1e-5)


# Before anything is loaded.


def test_facts_of_every_kind_of_encoder_need_no_network_and_no_random_numbers(hf_cache):
    state = torch.random.get_rng_state()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = EncoderFacts(1024, 14, 518, 304_368_640, (37, 37), mean, std)
    assert encoder_facts("dinov2_vitl14") == expected
    assert encoder_facts("dinov2_vitl14", 224) == expected._replace(image_size=224, grid=(16, 16))
    assert encoder_facts("efficientnet_lite0", 96).grid == (3, 3)
    # timm's model has no mask token, and no position for the class token.
    parameters = known_encoders()["dinov2_vitl14_reg"].parameters - 2 * 1024
    assert encoder_facts("timm:vit_large_patch14_reg4_dinov2.lvd142m") == expected._replace(parameters=parameters)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "name, advice",
    [
        ("vit_base_patch16_clip_224.opnai", "does not have: use timm:vit_base_patch16_clip_224.openai or"),
        ("vit_small_patch16_224_dino", "does not have: use timm:vit_small_patch16_224.dino or"),  # renamed
    ],
)
def test_unknown_names_and_tags_name_the_nearest(name, advice, hf_cache):
    with pytest.raises(ValueError, match=f"repa_encoder_type is 'timm:{name}', .*{advice}"):
        load_encoder(f"timm:{name}")


# Weights.


@pytest.fixture(scope="module")
def vit_state():
    return build(VIT, seed=5).state_dict()


def assert_loaded(encoder, state):
    """The encoder holds `state` without its classifier."""
    own = encoder.model.state_dict()
    assert set(own) == {key for key in state if not key.startswith(("head.weight", "head.bias", "head.fc."))}
    assert all(torch.equal(value, state[key]) for key, value in own.items())


def test_cached_weights_load_without_network_and_a_revision_pins_them(hf_cache, vit_state):
    pinned_state = build(VIT, seed=6).state_dict()
    main = hub_standin.write_hf_weights(hf_cache, f"timm/{VIT}", vit_state, sha="a" * 40)
    pinned = hub_standin.write_hf_weights(hf_cache, f"timm/{VIT}", pinned_state, revision="b" * 40, sha="b" * 40)
    assert encoder_weights_file(f"timm:{VIT}") == main
    assert encoder_weights_file(f"timm:{VIT}", revision="b" * 40) == pinned
    assert encoder_weights_file(f"timm:{VIT}", revision="c" * 40) is None
    assert_loaded(load_encoder(f"timm:{VIT}"), vit_state)
    assert_loaded(load_encoder("timm:test_vit"), vit_state)  # its default tag
    assert_loaded(load_encoder(f"timm:{VIT}", revision="b" * 40), pinned_state)
    with pytest.raises(EncoderUnavailable, match=f"of revision {'c' * 40} there"):
        load_encoder(f"timm:{VIT}", revision="c" * 40)


def test_missing_weights_are_fetched_from_the_hub_once_and_without_network_an_error_says_what_to_copy_where(
    hf_cache, vit_state, monkeypatch
):
    with pytest.raises(EncoderUnavailable) as error:
        load_encoder(f"timm:{VIT}", revision="v1")
    for said in ("no network in this test", "https://huggingface.co", f"`hf download timm/{VIT} --revision v1`",
                 f" to {hf_cache / f'models--timm--{VIT}'} (HF_HUB_CACHE", "repa_encoder_weights"):  # fmt: skip
        assert said in str(error.value)
    requests = []

    def download(repository, file, revision=None):
        requests.append((repository, file, revision))
        return str(hub_standin.write_hf_weights(hf_cache, repository, vit_state, revision=revision or "main"))

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url: requests.append(url))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for _ in range(2):
        assert_loaded(load_encoder(f"timm:{VIT}", revision="v1"), vit_state)
    url = f"https://huggingface.co/timm/{VIT}/resolve/v1/model.safetensors"
    assert requests == [url, (f"timm/{VIT}", "model.safetensors", "v1")]


# EfficientNet-Lite0, with real weights.


# Dtypes.
