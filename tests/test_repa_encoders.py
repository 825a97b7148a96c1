"""Encoders besides DINOv2: timm's models, their sizes, layouts and weights; EfficientNet-Lite0; files and dtypes."""

import re
from pathlib import Path

import hub_standin
import numpy as np
import pytest
import skimage.data
import timm
import torch
import torch.nn.functional as F
from helpers import cut_off_network
from safetensors.torch import save_file
from skimage.transform import resize as skimage_resize

from flextok.model.utils.repa_encoders import EncoderFacts, EncoderUnavailable, encoder_dtype
from flextok.model.utils.repa_loss import (
    check_encoder_settings,
    encoder_facts,
    encoder_weights_file,
    known_encoders,
    load_encoder,
)
from flextok.utils import dtypes
from flextok.utils.files import file_digest

ROOT = Path(__file__).resolve().parents[1]

VIT, CONVNEXT = "test_vit.r160_in1k", "test_convnext.r160_in1k"  # of 0.4 and 0.3 M parameters, at 160 px

# Some models are younger than the oldest timm that the requirements admit, or compute in bf16 only since then.
newest_timm = pytest.mark.skipif(
    tuple(int(part) for part in timm.__version__.split(".")[:3] if part.isdigit()) < (1, 0, 31),
    reason="needs a newer timm",
)

# One small model per kind of feature layout: name, size, dim, grid. None: the size in timm's data config.
LAYOUTS = [
    ("test_vit", None, 64, (10, 10)),  # a class token
    ("test_vit3", 96, 96, (6, 6)),  # register tokens, attention pooling
    ("vit_xsmall_patch16_clip_224.tinyclip_yfcc15m", 64, 256, (4, 4)),  # a norm before the blocks
    ("vit_small_patch16_dinov3.lvd1689m", 64, 384, (4, 4)),  # class and register tokens, rotary embedding
    ("eva02_tiny_patch14_224", 56, 192, (4, 4)),
    ("deit_tiny_distilled_patch16_224", 64, 192, (4, 4)),  # two prefix tokens
    ("hiera_tiny_224", 128, 768, (4, 4)),  # tokens that are unrolled inside
    ("gmlp_ti16_224", 64, 128, (4, 4)),  # no prefix token
    pytest.param("efficientformer_l1", None, 448, (7, 7), marks=newest_timm),  # tokens without a declared prefix
    ("test_mambaout", None, 64, (5, 5)),  # channels last
    ("test_convnext", None, 64, (5, 5)),
    ("test_efficientnet", 64, 256, (2, 2)),  # a convolution behind the last stage
    ("resnet18", 128, 512, (4, 4)),
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
    arguments = {} if image_size is None else {"img_size": image_size}
    try:
        state = build(name, **arguments).state_dict()
    except TypeError:
        state = build(name).state_dict()
    torch.save(state, folder / "weights.pth")
    return load_encoder(f"timm:{name}", weights=str(folder / "weights.pth"), image_size=image_size, dtype=dtype)


# What comes out.


@pytest.mark.parametrize("name, size, dim, grid", LAYOUTS)
def test_features_keep_rows_and_columns_and_bf16_is_close_to_fp32(name, size, dim, grid, tmp_path):
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
    encoder.model.bfloat16()
    encoder.dtype = torch.bfloat16
    assert F.cosine_similarity(encoder(images), features, dim=1).mean() > 0.99


def test_vit_features_equal_a_forward_pass_by_hand(tmp_path):
    encoder = with_random_weights(VIT, tmp_path)
    model, config = build(VIT), timm.models.get_pretrained_cfg(VIT)
    images = make_images(2, 160)
    pixels = (images.numpy().transpose(0, 2, 3, 1) / 2 + 0.5 - np.array(config.mean)) / np.array(config.std)
    tokens = model.forward_features(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float())
    features = encoder(images)
    assert tokens.shape == (2, 101, 64)
    for row, column in ((0, 0), (2, 7), (9, 3)):
        expected = tokens[:, 1 + 10 * row + column]
        torch.testing.assert_close(features[:, :, row, column], expected, atol=1e-5, rtol=1e-4)


def test_the_statistics_are_those_the_model_was_trained_with():
    facts = encoder_facts("timm:vit_base_patch16_clip_224.openai")
    assert facts.mean == (0.48145466, 0.4578275, 0.40821073) and facts.std == (0.26862954, 0.26130258, 0.27577711)
    assert encoder_facts("timm:vit_base_patch16_siglip_224.webli").mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("pit_ti_224", r"\[1, 1, 256\]"),  # the class token alone
        ("volo_d1_224", r"\[1, 197, 384\]"),  # a class token that timm does not declare
        ("crossvit_tiny_240", "in a list"),
        pytest.param("efficientvim_m1", "in a list", marks=newest_timm),
    ],
)
def test_models_without_a_feature_grid_are_refused_by_name(name, shape):
    with pytest.raises(
        ValueError, match=f"timm:{name} cannot be used .*gives features {shape}, .* no grid: choose a model whose"
    ):
        encoder_facts(f"timm:{name}")


# Before anything is loaded.


def test_facts_of_every_kind_of_encoder():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = EncoderFacts(1024, 14, 518, 304_368_640, (37, 37), mean, std)
    assert encoder_facts("dinov2_vitl14") == expected
    assert encoder_facts("dinov2_vitl14", 224) == expected._replace(image_size=224, grid=(16, 16))
    assert encoder_facts("efficientnet_lite0", 96).grid == (3, 3)
    assert encoder_facts("timm:vit_large_patch14_reg4_dinov2.lvd142m") == expected._replace(
        # timm's model has no mask token, and no position for the class token.
        parameters=known_encoders()["dinov2_vitl14_reg"].parameters - 2 * 1024
    )
    assert not any(name.startswith("timm") for name in known_encoders())


def test_facts_need_no_network_no_memory_and_no_random_numbers(hf_cache, monkeypatch):
    state, builds, create = torch.random.get_rng_state(), [], timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kw: builds.append(create(*args, **kw)) or builds[-1])
    for _ in range(2):
        assert encoder_facts("timm:vit_giant_patch14_dinov2.lvd142m", 56).parameters > 1.1e9
    assert len(builds) == 1 and all(parameter.is_meta for parameter in builds[0].parameters())
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_model_that_the_meta_device_refuses_is_run_on_the_cpu(monkeypatch):
    forward = timm.models.ResNet.forward_features

    def without_meta(model, images):
        images.sum().item()
        return forward(model, images)

    monkeypatch.setattr(timm.models.ResNet, "forward_features", without_meta)
    state = torch.random.get_rng_state()
    assert encoder_facts("timm:test_resnet.r160_in1k").grid == (5, 5)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "name, size, reason",
    [
        ("vit_tiny_patch16_224", 200, "divisible by patch size"),
        pytest.param("swin_tiny_patch4_window7_224", 200, "7x7 features do not divide 200 px", marks=newest_timm),
        ("hiera_tiny_224", 200, "invalid"),
        ("resnet18", 110, "4x4 features do not divide 110 px"),
        ("mixer_s16_224", 100, "6x6 features do not divide 100 px"),
    ],
)
def test_sizes_that_a_model_cannot_take_are_found_before_loading(name, size, reason, hf_cache):
    with pytest.raises(ValueError, match=f"timm:{name} cannot be used with repa_image_size {size}: .*{reason}"):
        check_encoder_settings(f"timm:{name}", None, size)


def test_a_wrong_dim_names_both_numbers():
    check_encoder_settings(f"timm:{VIT}", 64, None)
    with pytest.raises(ValueError, match=f"repa_encoder_dim is 768, but timm:{VIT} gives 64: set 64 or null"):
        check_encoder_settings(f"timm:{VIT}", 768, None)


@pytest.mark.parametrize(
    "name, advice",
    [
        ("vit_base_patch16_clip_225.openai", "does not have: use timm:vit_base_patch16_clip_224.openai or"),
        ("vit_base_patch16_clip_224.opnai", "does not have: use timm:vit_base_patch16_clip_224.openai or"),
        ("vit_small_patch16_224_dino", "does not have: use timm:vit_small_patch16_224.dino or"),  # renamed
        ("", "does not have: use timm:NAME"),
        ("hf-hub:timm/vit_tiny_patch16_224", "does not have"),
        ("local-dir:/models/vit", "does not have"),
    ],
)
def test_unknown_names_and_tags_name_the_nearest_and_schemes_are_refused(name, advice, hf_cache):
    for function in (encoder_facts, load_encoder, encoder_weights_file):
        with pytest.raises(ValueError, match=f"repa_encoder_type is 'timm:{name}', .*{advice}"):
            function(f"timm:{name}")


@pytest.mark.parametrize(
    "name, settings, message",
    [
        (f"timm:{VIT}", dict(repo="here"), f"repa_encoder_repo is here, but timm:{VIT} takes no repository"),
        (f"timm:{VIT}", dict(weights="w.pth", revision="v1"), "repa_encoder_revision is v1, .* has no revisions"),
        ("efficientnet_lite0", dict(revision="v1"), "repa_encoder_revision is v1, .* has no revisions"),
    ],
)
def test_settings_that_have_no_use_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(name, **settings)


# Weights.


@pytest.fixture(scope="module")
def vit_state():
    return build(VIT, seed=5).state_dict()


def assert_loaded(encoder, state):
    """The encoder holds `state` without its classifier."""
    own = encoder.model.state_dict()
    assert set(own) == {key for key in state if not key.startswith(("head.weight", "head.bias", "head.fc."))}
    assert all(torch.equal(value, state[key]) for key, value in own.items())


@pytest.mark.parametrize("form", ["pth", "safetensors", "state_dict", "model", "averaged", "no head", "other head"])
def test_weights_files_of_every_form_load(form, vit_state, tmp_path):
    path, state = tmp_path / "weights.pth", dict(vit_state)
    if form == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    elif form == "averaged":
        others = {key: value + 1 for key, value in state.items()}
        torch.save({"state_dict": others, "state_dict_ema": state, "epoch": 3}, path)
    elif form in ("state_dict", "model"):
        torch.save({form: {f"module.{key}": value for key, value in state.items()}}, path)
    elif form == "no head":
        torch.save({key: value for key, value in state.items() if not key.startswith("head.")}, path)
    elif form == "other head":
        torch.save(state | {"head.weight": torch.zeros(7, 64), "head.bias": torch.zeros(7)}, path)
    else:
        torch.save(state, path)
    before = torch.random.get_rng_state()
    encoder = load_encoder(f"timm:{VIT}", weights=str(path))
    assert torch.equal(before, torch.random.get_rng_state())
    assert_loaded(encoder, vit_state)
    assert encoder_weights_file(f"timm:{VIT}", weights=str(path)) == path


def test_a_model_trained_without_classifier_takes_a_file_with_one(tmp_path):
    state = build("vit_small_patch14_dinov2.lvd142m").state_dict()
    assert not any(key.startswith("head.") for key in state)
    torch.save(state | {"head.weight": torch.zeros(7, 384), "head.bias": torch.zeros(7)}, tmp_path / "tuned.pth")
    encoder = load_encoder("timm:vit_small_patch14_dinov2.lvd142m", weights=str(tmp_path / "tuned.pth"), image_size=28)
    assert_loaded(encoder, state)


def test_a_file_in_the_publisher_s_own_naming_loads_without_its_classifier(tmp_path):
    state = build(CONVNEXT, seed=8).state_dict()
    published = {}
    for key, value in state.items():  # as in facebookresearch/ConvNeXt
        key = key.replace("stem.0", "downsample_layers.0.0").replace("stem.1", "downsample_layers.0.1")
        key = re.sub(r"stages.(\d).blocks.(\d)", r"stages.\1.\2", key)
        key = re.sub(r"stages.(\d).downsample.(\d)", r"downsample_layers.\1.\2", key)
        key = key.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv").replace("head.fc", "head")
        published[key.replace("head.norm", "norm")] = value
    torch.save({"model": published}, tmp_path / "published.pth")
    assert_loaded(load_encoder(f"timm:{CONVNEXT}", weights=str(tmp_path / "published.pth")), state)


def test_position_embeddings_are_adapted_as_timm_adapts_them(vit_state, tmp_path):
    torch.save(vit_state, tmp_path / "vit.pth")
    encoder = load_encoder(f"timm:{VIT}", weights=str(tmp_path / "vit.pth"), image_size=96)
    images = make_images(size=96)
    model = timm.create_model(VIT, dynamic_img_size=True).eval()
    model.load_state_dict(vit_state)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in encoder.facts[-2:])
    expected = model.forward_features(((images + 1) / 2 - mean) / std)[:, 1:].transpose(1, 2).reshape(1, 64, 6, 6)
    torch.testing.assert_close(encoder(images), expected, atol=1e-5, rtol=1e-4)


def test_foreign_and_damaged_files_are_refused_with_their_differences(vit_state, tmp_path):
    def load(state):
        torch.save(state, tmp_path / "file.pth")
        load_encoder(f"timm:{VIT}", weights=str(tmp_path / "file.pth"))

    lacking = {key: value for key, value in vit_state.items() if key != "blocks.1.norm1.weight"}
    foreign = build(CONVNEXT).state_dict()
    for state, difference in (
        (lacking, 'Missing key.*"blocks.1.norm1.weight"'),
        (vit_state | {"blocks.9.norm1.weight": torch.zeros(64)}, 'Unexpected key.*"blocks.9.norm1.weight"'),
        (vit_state | {"norm.bias": torch.zeros(3)}, r"size mismatch for norm.bias: .*\[3\].*\[64\]"),
        (foreign, "Missing key.*\n.*Unexpected key"),
    ):
        with pytest.raises(EncoderUnavailable, match=f"file.pth does not hold the weights .*\n?.*{difference}"):
            load(state)
    for foreign in ({"weight": torch.zeros(3)}, {"state_dict": {}}, {"head.bias": torch.zeros(3)}, torch.zeros(3), {}):
        with pytest.raises(
            EncoderUnavailable, match="file.pth(, the weights of| does not hold the weights of) timm:test"
        ):
            load(foreign)
    for file in ("cut.pth", "cut.safetensors"):
        (save_file if file.endswith("tensors") else torch.save)(vit_state, tmp_path / file)
        whole = (tmp_path / file).read_bytes()
        for damaged in (whole[:-1000], b"<html>403</html>", b""):
            (tmp_path / file).write_bytes(damaged)
            with pytest.raises(EncoderUnavailable, match=f"{file}, the weights .* copy it again"):
                load_encoder(f"timm:{VIT}", weights=str(tmp_path / file))
    with pytest.raises(EncoderUnavailable, match="repa_encoder_weights is .*nothing.pth, which is not a file"):
        load_encoder(f"timm:{VIT}", weights=str(tmp_path / "nothing.pth"))


def test_a_weights_file_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"state_dict": {}, "args": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(EncoderUnavailable, match="cannot be read"):
        load_encoder(f"timm:{VIT}", weights=str(tmp_path / "evil.pth"))
    assert not (tmp_path / "touched").exists()


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


def test_weights_on_a_plain_server_are_cached_by_torch_hub(hf_cache, monkeypatch):
    name = "timm:legacy_seresnet18.in1k"
    assert encoder_weights_file(name) is None
    with pytest.raises(
        EncoderUnavailable, match=r"no network in this test.*\n.*copy https://\S+ to \S+checkpoints\S+pth"
    ):
        load_encoder(name)
    state = build("legacy_seresnet18").state_dict()
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, **_: torch.save(state, path))
    encoder = load_encoder(name)
    assert torch.equal(encoder.model.layer0.conv1.weight, state["layer0.conv1.weight"])
    assert encoder_weights_file(name).name == "seresnet18-4bb0ce65.pth"


def test_missing_weights_are_fetched_from_the_hub_once(hf_cache, vit_state, monkeypatch):
    requests = []

    def download(repository, file, revision=None):
        requests.append((repository, file, revision))
        return str(hub_standin.write_hf_weights(hf_cache, repository, vit_state, revision=revision or "main"))

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url: requests.append(url))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert_loaded(load_encoder(f"timm:{VIT}", revision="v1"), vit_state)
    assert_loaded(load_encoder(f"timm:{VIT}", revision="v1"), vit_state)
    url = f"https://huggingface.co/timm/{VIT}/resolve/v1/model.safetensors"
    assert requests == [url, (f"timm/{VIT}", "model.safetensors", "v1")]


def test_without_cache_and_network_one_error_says_what_to_copy_where(hf_cache, vit_state):
    with pytest.raises(EncoderUnavailable) as error:
        load_encoder(f"timm:{VIT}", revision="v1")
    message = str(error.value)
    assert "no network in this test" in message and "https://huggingface.co" in message
    folder = hf_cache / f"models--timm--{VIT}"
    assert f"`hf download timm/{VIT} --revision v1`" in message and f" to {folder} (HF_HUB_CACHE" in message
    assert "repa_encoder_weights" in message
    hub_standin.write_hf_weights(folder.parent, f"timm/{VIT}", vit_state, revision="v1")
    assert_loaded(load_encoder(f"timm:{VIT}", revision="v1"), vit_state)


@newest_timm
def test_a_model_without_pretrained_weights_needs_a_file(hf_cache, tmp_path):
    with pytest.raises(ValueError, match="timm has no pretrained weights for timm:test_vit_relpos: name a file"):
        load_encoder("timm:test_vit_relpos")
    assert encoder_weights_file("timm:test_vit_relpos") is None
    assert with_random_weights("test_vit_relpos", tmp_path).grid == (10, 10)


# EfficientNet-Lite0, with real weights.


@pytest.fixture(scope="module")
def efficientnet():
    return load_encoder("efficientnet_lite0")


def classify(encoder, photograph):
    side = min(photograph.shape[:2])
    top, left = ((length - side) // 2 for length in photograph.shape[:2])
    square = skimage_resize(photograph[top : top + side, left : left + side], (300, 300), anti_aliasing=True)
    features = encoder(torch.from_numpy(square).permute(2, 0, 1)[None].float() * 2 - 1)
    assert features.shape == (1, 1280, 7, 7) and features.min() >= 0 and features.max() <= 6
    return encoder.model.classifier(features.mean((2, 3))).softmax(1)[0]


def test_efficientnet_recognises_photographs(efficientnet):
    cat = classify(efficientnet, skimage.data.chelsea())
    assert 281 <= cat.argmax() <= 285 and cat[281:286].sum() > 0.7
    assert classify(efficientnet, skimage.data.coffee()).argmax() == 967  # espresso


def test_facts_of_efficientnet_are_those_of_timm(efficientnet):
    config, facts = efficientnet.model.default_cfg, known_encoders()["efficientnet_lite0"]
    assert facts == (
        efficientnet.model.num_features,
        32,
        config["input_size"][1],
        sum(p.numel() for p in efficientnet.model.parameters()),
        (7, 7),
        config["mean"],
        config["std"],
    )


def test_efficientnet_takes_multiples_of_its_stride(efficientnet):
    assert load_encoder("efficientnet_lite0", image_size=128)(make_images()).shape == (1, 1280, 4, 4)
    with pytest.raises(ValueError, match="repa_image_size is 100, but efficientnet_lite0 takes .* 32: set 96"):
        load_encoder("efficientnet_lite0", image_size=100)


def test_efficientnet_refuses_foreign_weights(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    with pytest.raises(EncoderUnavailable, match="foreign.pth does not hold the weights of efficientnet_lite0"):
        load_encoder("efficientnet_lite0", weights=str(tmp_path / "foreign.pth"))


# Files and dtypes.


def test_weights_files_of_the_other_encoders(hf_cache, tmp_path):
    assert encoder_weights_file("dinov2_vits14_reg") is None
    path = hub_standin.write_weights(tmp_path / "torch" / "hub", "dinov2_vits14_reg")
    assert encoder_weights_file("dinov2_vits14_reg") == path
    assert encoder_weights_file("dinov2_vits14", weights=str(tmp_path / "nothing.pth")) is None
    assert encoder_weights_file("dinov2_vits14", repo="any", weights=str(path)) == path
    assert encoder_weights_file("efficientnet_lite0").suffix == ".pth"


def test_file_digest_is_blake2b_of_the_whole_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"")
    assert file_digest(path) == "cae66941d9efbd404e4d88758ea67670"
    content = bytes(range(256)) * 40_000  # more than one block
    path.write_bytes(content)
    first = file_digest(path)
    path.write_bytes(content[:-1] + b"\0")
    assert file_digest(path) != first and len(first) == 32


def test_a_bf16_encoder_computes_in_bf16_and_gives_float32(tmp_path):
    encoder = with_random_weights(CONVNEXT, tmp_path, dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in encoder.parameters())
    assert encoder(make_images(size=160)).dtype == torch.float32


@pytest.mark.parametrize("has_bf16, auto", [(True, torch.bfloat16), (False, torch.float32)])
def test_the_dtype_setting_follows_the_device(has_bf16, auto, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16}, raising=False)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16 and not including_emulation
    )
    monkeypatch.setattr(  # whether a CPU is faster in it is measured: tests/test_tokens_in_training.py
        "flextok.model.utils.repa_encoders.faster_in_bf16", lambda device, *_: dtypes.computes_bf16(device)
    )
    for device in (torch.device("cpu"), torch.device("cuda:1")):
        assert dtypes.computes_bf16(device) == has_bf16
        assert encoder_dtype("auto", device) == auto
        assert encoder_dtype("fp32", device) == torch.float32 and encoder_dtype("bf16", device) == torch.bfloat16
    assert encoder_dtype("fp16", torch.device("cuda")) == torch.float16
    with pytest.raises(ValueError, match="repa_encoder_dtype is fp16, which a CPU .* set fp32, bf16 or auto"):
        encoder_dtype("fp16", torch.device("cpu"))
