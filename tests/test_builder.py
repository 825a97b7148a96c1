"""Configs of new models: published sizes, what each argument changes, what is refused."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from helpers import make_draws, make_images, tiny_config, tiny_model

from flextok import FlexTokFromHub
from flextok.model.builder import build_config, preset_config, with_fsq_levels
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


def test_presets_have_the_published_graph():
    config = preset_config("d18-d28")
    encoder, decoder = config["encoder"]["module_dict"], config["decoder"]["module_dict"]
    assert list(encoder) == [
        "enc_channels_to_last", "enc_patch_emb", "enc_posemb_module", "enc_register_module", "enc_seq_packer",
        "enc_transformer", "enc_unpacker", "enc_to_latents",
    ]  # fmt: skip
    assert list(decoder) == [
        "dec_from_latents", "dec_registers_posemb_module", "dec_nested_dropout", "dec_latent_dropout",
        "dec_noise_channels_to_last", "dec_noise_patch_emb", "dec_patches_posemb_module", "dec_seq_packer",
        "dec_time_embedder", "dec_transformer", "dec_unpacker", "dec_repa_unpacker", "dec_to_patches",
        "dec_channels_to_first",
    ]  # fmt: skip
    assert encoder["enc_transformer"]["dim"] == 1152 and encoder["enc_transformer"]["depth"] == 18
    assert decoder["dec_transformer"]["dim"] == 1792 and decoder["dec_transformer"]["depth"] == 28
    assert encoder["enc_seq_packer"]["mask_mode"] == "causal_last" and decoder["dec_seq_packer"]["mask_mode"] == "full"
    assert encoder["enc_posemb_module"]["max_sizes"] == decoder["dec_patches_posemb_module"]["max_sizes"] == [16, 16]
    assert encoder["enc_register_module"]["n_max"] == 256
    assert decoder["dec_transformer"]["intermediate_layers"] == [1]
    assert config["regularizer"]["levels"] == [8, 8, 8, 5, 5, 5]


def test_latents_and_activations_of_a_published_size_have_the_published_shapes():
    model = meta_model(preset_config("d12-d12"))
    data_dict = model.encoder({"vae_latents": torch.empty(2, 16, 32, 32, device="meta")})
    assert data_dict["enc_registers"].shape == (2, 256, 6)
    assert model.vae.downsample_factor == 8 and model.n_registers == 256
    data_dict = model.decoder(
        {
            "enc_registers_quant": torch.empty(2, 256, 6, device="meta"),
            "vae_latents_noised": torch.empty(2, 16, 32, 32, device="meta"),
            "timesteps": torch.empty(2, device="meta"),
        }
    )
    assert data_dict["vae_latents_reconst"].shape == (2, 16, 32, 32)
    assert data_dict["dec_patches_repa_layer"].shape == (2, 16, 16, 768)


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
    "vae": ("stable_diffusion", lambda m: "stable_diffusion" if hasattr(m.vae, "vae") else "pixel"),
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
NEEDS_STABLE_DIFFUSION = {"latent_channels", "vae_hub_path"}
NEEDS_DCT = {"dct_coefficients", "dct_whitening"}


def test_the_table_of_effects_covers_every_argument():
    assert EFFECTS.keys() | NEEDS_STABLE_DIFFUSION | NEEDS_DCT == inspect.signature(build_config).parameters.keys()


@pytest.mark.parametrize("argument", sorted(EFFECTS.keys() - {"vae"}))
def test_each_argument_reaches_the_model(argument):
    value, read = EFFECTS[argument]
    model = FlexTokFromHub(tiny_config(**{argument: value}))
    assert read(model) == value
    assert read(FlexTokFromHub(tiny_config())) != value
    data_dict = model({"rgb": make_images(1, *[64 if argument == "img_size" else 32] * 2), RANDOM_KEY: make_draws(1)})
    assert data_dict["vae_latents_reconst"].shape == data_dict["vae_latents"].shape


def test_the_kind_of_vae_and_its_channels_reach_the_model():
    model = meta_model(tiny_config(vae="stable_diffusion", latent_channels=4))
    assert EFFECTS["vae"][1](model) == "stable_diffusion" and EFFECTS["vae"][1](tiny_model()) == "pixel"
    assert model.vae.vae.config.latent_channels == model.pipeline.out_channels == 4
    assert model.encoder.module_dict["enc_patch_emb"].channels_in == 4


def test_several_repa_layers_are_joined_and_none_leaves_none():
    images = {"rgb": make_images(2)}
    assert tiny_model(repa_layers=[0, 1])(dict(images))["dec_patches_repa_layer"].shape == (2, 4, 4, 128)
    assert "dec_patches_repa_layer" not in tiny_model(repa_layers=[])(dict(images))


@pytest.mark.parametrize(
    "sizes",
    [
        dict(encoder_depth=0),
        dict(n_registers=0),
        dict(patch_size=0),
        dict(vae_factor=0),
        dict(img_size=36),
        dict(patch_size=3),
        dict(encoder_width=80),
        dict(decoder_width=80),
        dict(head_dim=0),
        dict(head_dim=33, encoder_width=66, decoder_width=66),
        dict(repa_layers=[2]),
        dict(repa_layers=[-1]),
        dict(vae="stable_diffusion", latent_channels=0),
        dict(vae="stable_diffusion", img_size=40),
        dict(vae="vqgan"),
    ],
    ids=str,
)
def test_sizes_that_make_no_model_are_refused(sizes):
    with pytest.raises(ConfigError):
        tiny_config(**sizes)


@pytest.mark.parametrize(
    "settings",
    [
        dict(fsq_levels=[]),
        dict(fsq_levels=[8, 1]),
        dict(keep_k_mode="random"),
        dict(null_condition_prob=1.5),
        dict(encoder_head_init="ones"),
        dict(vae_scaling_factor=0.0),
    ],
    ids=str,
)
def test_settings_that_make_no_model_are_refused_when_it_is_built(settings):
    with pytest.raises(ConfigError):
        FlexTokFromHub(tiny_config(**settings))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tiny_config(img_size=36), "img_size is 36, expected a multiple of 8"),
        (lambda: tiny_config(decoder_width=80), "decoder_width is 80, expected a multiple of head_dim 32"),
        (lambda: preset_config("d12_d12"), "'d12_d12'.*did you mean 'd12-d12'.*d18-d28"),
    ],
)
def test_what_does_not_fit_is_named_with_what_was_expected(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_preset_arguments_can_be_overridden():
    config = preset_config("d12-d12", n_registers=64, decoder_depth=3, decoder_width=192)
    assert config["encoder"]["module_dict"]["enc_register_module"]["n_max"] == 64
    assert config["decoder"]["module_dict"]["dec_transformer"]["depth"] == 3


@pytest.mark.parametrize("config", [preset_config("d12-d12"), tiny_config(fsq_levels=(4, 4), repa_layers=(0,))])
def test_configs_survive_json(config):
    assert json.loads(json.dumps(config)) == config


def test_new_fsq_levels_change_only_two_layers():
    config = tiny_config()
    changed, fresh = with_fsq_levels(config, [4, 4, 4])
    assert config == tiny_config()
    assert changed == tiny_config(fsq_levels=[4, 4, 4])
    assert fresh == ["encoder.module_dict.enc_to_latents", "decoder.module_dict.dec_from_latents"]
    old, new = FlexTokFromHub(config).state_dict(), FlexTokFromHub(changed).state_dict()
    assert old.keys() == new.keys()
    reshaped = {name for name in old if old[name].shape != new[name].shape}
    assert reshaped == {
        "encoder.module_dict.enc_to_latents.proj.weight",
        "encoder.module_dict.enc_to_latents.proj.bias",
        "decoder.module_dict.dec_from_latents.proj.weight",
    }


def test_new_fsq_levels_take_over_the_weights_of_the_other_layers():
    trained = tiny_model().state_dict()
    config, fresh = with_fsq_levels(tiny_config(), [4, 4, 4])
    model = FlexTokFromHub(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_weights(model, trained, fresh=fresh)
    for name, value in model.state_dict().items():
        expected = before if name.startswith(tuple(fresh)) else trained
        assert torch.equal(value, expected[name]), name


def test_new_fsq_levels_need_layers_around_the_quantiser():
    config = tiny_config()
    del config["decoder"]["module_dict"]["dec_from_latents"]
    with pytest.raises(ConfigError, match="fsq_levels"):
        with_fsq_levels(config, [4, 4])


def test_a_pixel_model_trains_from_scratch():
    torch.manual_seed(0)
    model = FlexTokFromHub(tiny_config()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        data_dict = model({"rgb": make_images(4), RANDOM_KEY: make_draws(4)})
        target = data_dict["flow_noise"] - data_dict["vae_latents"]
        loss = (data_dict["vae_latents_reconst"] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    latent_variance = model.vae.scaling_factor**2 / 3  # of uniform pixels in [-1, 1]
    assert losses[0] == pytest.approx(1 + latent_variance, rel=0.05)  # the velocity starts at 0
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("style, n_distinct", [("xavier", 4), ("zero", 1)])
def test_the_heads_start_decides_whether_images_start_with_tokens_of_their_own(style, n_distinct):
    torch.manual_seed(0)
    tokens = torch.cat(FlexTokFromHub(tiny_config(encoder_head_init=style)).tokenize(make_images(4)))
    assert len(tokens.unique(dim=0)) == n_distinct


def arguments_of(config, path: str = "") -> dict:
    """Arguments by the place in a config where a `_target_` gets them."""
    found = {}
    if isinstance(config, dict):
        if "_target_" in config:
            found[path, config["_target_"]] = {key for key in config if not key.startswith("_")}
        for key, value in config.items():
            found.update(arguments_of(value, f"{path}.{key}"))
    return found


def test_exports_have_every_argument_of_the_published_config():
    """Constructors of the published package have arguments without defaults, which its own configs all give."""
    reference = Path(__file__).parent / "golden" / "tiny" / "reference.json"
    published = arguments_of(json.loads(reference.read_text())["config"])
    built = arguments_of(build_config())
    for place, arguments in published.items():
        if place[0]:  # the top is a FlexTok there, its parts here
            assert arguments <= built[place], place
    heads = [arguments for (_, target), arguments in built.items() if target.endswith("Head")]
    assert len(heads) == 2 and all("use_mup_readout" in arguments for arguments in heads)


def test_dct_coefficients_set_the_channels():
    model = FlexTokFromHub(tiny_config(vae="dct", dct_coefficients=[5, 2]))
    assert model.vae.latent_channels == model.pipeline.out_channels == 9


@pytest.mark.parametrize("coefficients", [[0, 1], [17, 0], [4, -1], [4], 4, [4, 1.5]])
def test_dct_coefficients_that_a_block_does_not_have_are_refused(coefficients):
    with pytest.raises(ConfigError, match="dct_coefficients is .*expected two whole numbers.*1 to 16"):
        build_config(vae="dct", vae_factor=4, patch_size=1, img_size=32, dct_coefficients=coefficients)
