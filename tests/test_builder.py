"""Configs of new models: published sizes, what each argument changes, what is refused."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from helpers import make_draws, make_images, tiny_config, tiny_model

from flextok import FlexTokFromHub
from flextok.model.builder import build_config, preset_config, with_fsq_levels
from flextok.training.models import check_repa_model
from flextok.utils.checkpoint import load_weights
from flextok.utils.config import ConfigError
from flextok.utils.modules import count_parameters
from flextok.utils.random import RANDOM_KEY


def meta_model(config):
    with torch.device("meta"):
        return FlexTokFromHub(config)


@pytest.mark.parametrize(
    "name, encoder, decoder, total",
    [("d12-d12", 85.38, 172.45, 0.34), ("d18-d18", 287.33, 578.59, 0.95), ("d18-d28", 287.33, 2169.74, 2.54)],
)
def test_presets_have_the_published_parameter_counts(name, encoder, decoder, total):
    model = meta_model(preset_config(name))
    assert round(count_parameters(model.encoder) / 1e6, 2) == encoder
    assert round(count_parameters(model.decoder) / 1e6, 2) == decoder
    assert round(count_parameters(model.vae) / 1e6, 2) == 83.82
    assert round(count_parameters(model) / 1e9, 2) == total
    assert model.n_registers == 256 and model.pipeline.default_size() == (32, 32)


def test_a_config_of_the_golden_models_sizes_is_the_published_config():
    """Every module in its order, with every argument: the published constructors have some without defaults."""
    reference = Path(__file__).parent / "golden" / "tiny" / "reference.json"
    published = json.loads(reference.read_text())["config"]
    built = build_config(
        encoder_depth=2, decoder_depth=3, encoder_width=64, decoder_width=96, head_dim=32, n_registers=16, img_size=128,
        latent_channels=4, vae_scaling_factor=0.18215,
    )  # fmt: skip
    assert json.loads(json.dumps(built)) == built
    more = {  # what the published constructors take, too, but this config does not say
        "regularizer": {"drop_quant_p", "corrupt_tokens_p", "min_corrupt_tokens_p", "apply_corrupt_tokens_p"},
        "flow_matching_noise_module": {"stratisfied"},
        "pipeline": {"noise_read_key"},
        "vae": {"hf_hub_path"},
    }

    def compare(expected, found, place):
        assert found.keys() - expected.keys() == more.get(place, set())
        for key, value in expected.items():
            if isinstance(value, dict):
                compare(value, found[key], f"{place}.{key}")
            elif key != "weight_init_style":  # new models start from zero
                assert found[key] == value, f"{place}.{key}"

    for part in published.keys() - {"_target_"}:  # the top is a FlexTok there
        compare(published[part], built[part], part)
    for part in ("encoder", "decoder"):
        assert list(built[part]["module_dict"]) == list(published[part]["module_dict"])


def parts(model):
    return model.encoder.module_dict, model.decoder.module_dict


def init_style(weight):
    std = weight.std().item()
    return "zero" if std == 0 else "trunc_normal" if 0.01 < std < 0.03 else "xavier"


EFFECTS = {
    "encoder_depth": (3, lambda m: len(parts(m)[0]["enc_transformer"].blocks)),
    "decoder_depth": (3, lambda m: len(parts(m)[1]["dec_transformer"].blocks)),
    "encoder_width": (128, lambda m: parts(m)[0]["enc_transformer"].dim),
    "decoder_width": (128, lambda m: parts(m)[1]["dec_transformer"].dim),
    "head_dim": (16, lambda m: parts(m)[1]["dec_transformer"].blocks[0].attn.head_dim),
    "n_registers": (4, lambda m: m.n_registers),
    "fsq_levels": ([3, 4], lambda m: m.regularizer.levels),
    "patch_size": (4, lambda m: parts(m)[1]["dec_to_patches"].patch_sizes[0]),
    "img_size": (64, lambda m: m.pipeline.default_size()[0] * 4),
    "vae_factor": (2, lambda m: m.vae.downsample_factor),
    "vae_scaling_factor": (0.75, lambda m: m.vae.scaling_factor),
    "repa_layers": ([0, 1], lambda m: parts(m)[1]["dec_transformer"].intermediate_layers),
    "keep_k_mode": ("pow2", lambda m: parts(m)[1]["dec_nested_dropout"].size_sampling_mode),
    "null_condition_prob": (0.5, lambda m: parts(m)[1]["dec_latent_dropout"].dropout_prob),
    "logit_normal_sigmas": (True, lambda m: m.flow_matching_noise_module.ln),
    "stratified_sigmas": (True, lambda m: m.flow_matching_noise_module.stratisfied),
    "mode_scale": (1.0, lambda m: m.flow_matching_noise_module.mode_scale),
    "encoder_head_init": ("trunc_normal", lambda m: init_style(parts(m)[0]["enc_to_latents"].proj.weight)),
    "use_act_checkpoint": (True, lambda m: m.decoder.module_dict["dec_transformer"].use_act_checkpoint),
}
OTHER_VAES = {"vae", "latent_channels", "vae_hub_path", "dct_coefficients", "dct_whitening"}


@pytest.mark.parametrize("argument", sorted(inspect.signature(build_config).parameters.keys() - OTHER_VAES))
def test_each_argument_reaches_the_model(argument):
    value, read = EFFECTS[argument]
    model = FlexTokFromHub(tiny_config(**{argument: value}))
    assert read(model) == value
    assert read(FlexTokFromHub(tiny_config())) != value
    data_dict = model({"rgb": make_images(1, *[64 if argument == "img_size" else 32] * 2), RANDOM_KEY: make_draws(1)})
    assert data_dict["vae_latents_reconst"].shape == data_dict["vae_latents"].shape


def test_the_kind_of_vae_and_its_channels_reach_the_model():
    model = meta_model(tiny_config(vae="stable_diffusion", latent_channels=4))
    assert model.vae.vae.config.latent_channels == model.pipeline.out_channels == 4
    assert model.encoder.module_dict["enc_patch_emb"].channels_in == 4
    model = FlexTokFromHub(tiny_config(vae="dct", dct_coefficients=[5, 2]))
    assert model.vae.latent_channels == model.pipeline.out_channels == 9


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(encoder_depth=0), "encoder_depth is 0"),
        (dict(img_size=36), "img_size is 36, expected a multiple of 8"),
        (dict(patch_size=3), "img_size is 32, expected a multiple of 12"),
        (dict(decoder_width=80), "decoder_width is 80, expected a multiple of head_dim 32"),
        (dict(repa_layers=[2]), "repa_layers"),
        (dict(vae="vqgan"), "vae is 'vqgan'"),
        (dict(vae="dct", dct_coefficients=[17, 0]), "dct_coefficients is .*expected two whole numbers.*1 to 16"),
        (dict(fsq_levels=[8, 1]), "levels"),
        (dict(keep_k_mode="random"), "random"),
    ],
    ids=str,
)
def test_settings_that_make_no_model_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        FlexTokFromHub(tiny_config(**settings))


@pytest.mark.parametrize("decoder_depth, layer", [(1, 0), (2, 1), (3, 1)])
def test_the_default_layer_for_repa_exists_at_any_depth(decoder_depth, layer):
    model = tiny_model(decoder_depth=decoder_depth)
    assert check_repa_model(model) == [layer]
    assert "dec_patches_repa_layer" in model({"rgb": make_images(1)})


def test_preset_arguments_can_be_overridden_and_unknown_presets_name_the_nearest():
    config = preset_config("d12-d12", n_registers=64, decoder_depth=3, decoder_width=192)
    assert config["encoder"]["module_dict"]["enc_register_module"]["n_max"] == 64
    assert config["decoder"]["module_dict"]["dec_transformer"]["depth"] == 3
    with pytest.raises(ConfigError, match="'d12_d12'.*did you mean 'd12-d12'.*d18-d28"):
        preset_config("d12_d12")


def test_new_fsq_levels_change_only_two_layers_and_take_over_the_weights_of_the_others():
    config, trained = tiny_config(), tiny_model().state_dict()
    changed, fresh = with_fsq_levels(config, [4, 4, 4])
    assert config == tiny_config()
    assert changed == tiny_config(fsq_levels=[4, 4, 4])
    assert fresh == ["encoder.module_dict.enc_to_latents", "decoder.module_dict.dec_from_latents"]
    model = FlexTokFromHub(changed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_weights(model, trained, fresh=fresh)
    for name, value in model.state_dict().items():
        expected = before if name.startswith(tuple(fresh)) else trained
        assert torch.equal(value, expected[name]), name
