"""The setting `flow`: other draws of noise levels, token counts and conditions than the model's own config says."""

import inspect
import json

import pytest
import torch
from helpers import make_draws, make_images, make_noise, save_tiny_vae, tiny_config, tiny_model
from test_modules import assert_uniform, draw_sigmas, normal_cdf_of_logit
from tiny_runs import make_trainer, same, settings

from flextok import FlexTokFromHub
from flextok.evaluation.subjects import load_subject
from flextok.flextok_wrapper import PARTS, load_model_from_safetensors
from flextok.flextok_wrapper import WEIGHTS_NAME as WEIGHTS
from flextok.model.builder import build_config, with_flow, with_fsq_levels
from flextok.training.config import FlowSettings, TrainConfig
from flextok.training.models import interpolate_posembs, load_model
from flextok.utils.checkpoint import load_metadata
from flextok.utils.random import RANDOM_KEY

pytestmark = pytest.mark.usefixtures("no_curves")
FLOW = dict(
    keep_k_mode="pow2", null_condition_prob=0.6, logit_normal_sigmas=True, logit_normal_mean=-0.4, logit_normal_std=0.8,
    mode_scale=0.0, stratified_sigmas=True, shift=2.0,
)  # fmt: skip


# The draws


@pytest.mark.parametrize("mean, std", [(-0.4, 1.0), (0.5, 0.3)])
def test_logit_normal_sigmas_have_the_given_mean_and_std(mean, std):
    sigmas = draw_sigmas(ln=True, ln_mean=mean, ln_std=std)
    logits = ((sigmas / (1 - sigmas)).log() - mean) / std
    assert_uniform(normal_cdf_of_logit(logits.sigmoid()))


@pytest.mark.parametrize("shift", [3.0, 0.5])
@pytest.mark.parametrize("options", [dict(), dict(ln=True), dict(mode_scale=0.25)], ids=str)
def test_shifted_sigmas_are_the_others_under_the_formula(shift, options):
    sigmas = draw_sigmas(**options)
    torch.testing.assert_close(
        draw_sigmas(**options, shift=shift), shift * sigmas / (1 + (shift - 1) * sigmas), rtol=1e-6, atol=1e-7
    )


def test_the_sampler_takes_shifted_steps():
    """Euler steps between the shifted times, computed independently from the decoder's velocities."""
    shift = 3.0
    model = FlexTokFromHub(with_flow(tiny_config(), shift=shift))
    model.load_state_dict(tiny_model().state_dict())
    model.eval()
    quants = model.encode({"rgb": make_images(2)})["enc_registers_quant"]
    x = noise = make_noise(2, 48, 8, 8)
    times = [shift * t / (1 + (shift - 1) * t) for t in (1, 2 / 3, 1 / 3, 0)]
    for t, t_next in zip(times, times[1:]):
        inputs = {"enc_registers_quant": quants, "vae_latents_noised": x, "timesteps": torch.full((2,), t)}
        with torch.no_grad():
            x = x - (t - t_next) * model.decoder(inputs)["vae_latents_reconst"]
    sampled = model.pipeline({"enc_registers_quant": quants, "flow_noise": noise}, timesteps=3)["vae_latents_reconst"]
    torch.testing.assert_close(sampled, x, rtol=1e-4, atol=1e-5)


# The model's config


def test_every_setting_reaches_the_model():
    model = FlexTokFromHub(with_flow(tiny_config(), **FLOW))
    noise, decoder = model.flow_matching_noise_module, model.decoder.module_dict
    assert FLOW == dict(
        keep_k_mode=decoder["dec_nested_dropout"].size_sampling_mode,
        null_condition_prob=decoder["dec_latent_dropout"].dropout_prob,
        logit_normal_sigmas=noise.ln, logit_normal_mean=noise.ln_mean, logit_normal_std=noise.ln_std,
        mode_scale=noise.mode_scale, stratified_sigmas=noise.stratisfied, shift=noise.shift,
    )  # fmt: skip
    assert model.pipeline.shift == 2.0
    assert list(inspect.signature(with_flow).parameters)[1:] == list(FlowSettings.model_fields) == list(FLOW)


def test_null_leaves_the_config_as_it_is_and_settings_change_what_they_name_alone():
    config = build_config()
    assert with_flow(config) == config == build_config()
    assert with_flow(config, null_condition_prob=0.1) == build_config(null_condition_prob=0.1)
    changed = with_flow(config, **FLOW)
    assert changed["encoder"] == config["encoder"] and changed["vae"] == config["vae"]


# A run


def test_a_run_of_a_published_model_trains_with_them_and_its_export_holds_them(tmp_path):
    original = load_model(TrainConfig.from_dict(settings(use_repa=False)))
    original.save_pretrained(tmp_path / "published")
    published = dict(model=None, model_name=str(tmp_path / "published"))
    trainer = make_trainer(tmp_path / "run", use_repa=False, flow=FLOW, **published)
    assert same(dict(original.state_dict()), dict(trainer.model.state_dict()))
    trainer.model.train()
    draws = make_draws(4)
    data = trainer.model({"rgb": make_images(4), RANDOM_KEY: draws})
    quantiles = normal_cdf_of_logit(  # of the noise levels before shift, mean and std
        ((data["sigmas"].double() / (2 - data["sigmas"])).logit() + 0.4).div(0.8).sigmoid()
    )
    assert sorted((quantiles * 4).floor().tolist()) == [0, 1, 2, 3]  # stratified
    assert set(data["train_keep_k"].tolist()) <= {1, 2, 4, 8}
    trainer.train(max_steps=1)
    exported = FlexTokFromHub.from_pretrained(tmp_path / "run" / "export")
    assert exported.config == with_flow(original.config, **FLOW) and exported.pipeline.shift == 2.0
    for place in ("export", "export/model.safetensors", "."):  # the last: its checkpoint
        assert load_subject(str(tmp_path / "run" / place)).model.config == exported.config


def test_an_export_holds_nothing_that_the_published_package_refuses_and_loads_here_as_it_was_trained(tmp_path):
    save_tiny_vae(tmp_path / "vae")
    config = tiny_config(vae="stable_diffusion", vae_hub_path=str(tmp_path / "vae"), latent_channels=4, img_size=64)
    config, _ = with_fsq_levels(config, [4, 4])
    plain = FlexTokFromHub(config)
    interpolate_posembs(plain, 128)
    plain.save_pretrained(tmp_path / "export")
    model = FlexTokFromHub(with_flow(plain.config, **FLOW))
    ours = ("logit_normal_mean", "logit_normal_std", "shift")  # the published constructors lack these
    published = with_flow(plain.config, **{name: value for name, value in FLOW.items() if name not in ours})
    assert published != model.config
    model.save_pretrained(tmp_path / "export")
    for saved in (
        json.loads((tmp_path / "export/config.json").read_text()),
        load_metadata(tmp_path / "export" / WEIGHTS),
    ):
        assert saved.keys() == set(PARTS) and saved == published
    trained = TrainConfig.from_dict(settings(model=None, model_name=str(tmp_path / "export"), img_size=128))
    one_file = trained.model_copy(update={"model_name": str(tmp_path / "export" / WEIGHTS)})
    for loaded in (
        FlexTokFromHub.from_pretrained(tmp_path / "export"), load_model_from_safetensors(tmp_path / "export" / WEIGHTS),
        load_model(trained), load_model(one_file),
    ):  # fmt: skip
        assert loaded.config == model.config
        assert loaded.pipeline.shift == loaded.flow_matching_noise_module.shift == 2.0
    plain.save_pretrained(tmp_path / "export")  # over it: nothing of the other model stays
    assert FlexTokFromHub.from_pretrained(tmp_path / "export").config == plain.config
