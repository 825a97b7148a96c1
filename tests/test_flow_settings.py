"""The setting `flow`: other draws of noise levels, token counts and conditions than the model's own config says."""

import inspect
import json

import pytest
import torch
from helpers import make_draws, make_images, make_noise, tiny_config, tiny_model
from test_modules import assert_uniform, draw_sigmas, normal_cdf_of_logit
from tiny_runs import first_batch, make_trainer, run_main, same, settings

from flextok import FlexTokFromHub
from flextok.model.builder import build_config, with_flow
from flextok.training.config import FlowSettings, TrainConfig, load_config
from flextok.training.models import load_model
from flextok.utils.config import ConfigError
from flextok.utils.random import RANDOM_KEY

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


@pytest.mark.parametrize("options", [dict(shift=100.0), dict(shift=0.01), dict(ln=True, ln_std=20.0)], ids=str)
def test_extreme_sigmas_stay_inside_the_open_interval(options):
    sigmas = draw_sigmas(**options)
    assert 0 < sigmas.min() and sigmas.max() < 1


@pytest.mark.parametrize("shift", [3.0, 0.5])
def test_the_sampler_takes_shifted_steps(shift):
    """Euler steps between the shifted times, computed independently from the decoder's velocities."""
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


def test_null_leaves_the_config_as_it_is_and_each_setting_changes_itself_alone():
    config = build_config()
    assert with_flow(config) == config == build_config()
    text = json.dumps(config)
    assert "shift" not in text.replace("scale_and_shift", "") and "ln_mean" not in text
    for name, value in FLOW.items():
        changed = with_flow(config, **{name: value})
        assert changed != config
        assert changed["encoder"] == config["encoder"] and changed["vae"] == config["vae"]
    assert with_flow(config, null_condition_prob=0.1) == build_config(null_condition_prob=0.1)


@pytest.mark.parametrize("name, module", [("keep_k_mode", "nested"), ("null_condition_prob", "latent")])
def test_a_setting_for_a_module_that_the_model_lacks_is_refused(name, module):
    config = tiny_config()
    del config["decoder"]["module_dict"][f"dec_{module}_dropout"]
    with pytest.raises(ConfigError, match=f"flow.{name} is .*, but the model's decoder has no"):
        with_flow(config, **{name: FLOW[name]})
    assert with_flow(config, shift=2.0)["pipeline"]["shift"] == 2.0


# A run


def test_without_flow_or_with_an_empty_one_the_first_losses_are_the_same():
    plain, empty = make_trainer(use_repa=False), make_trainer(use_repa=False, flow={})
    assert plain.model.config == empty.model.config
    batch = first_batch(plain)
    for trainer in (plain, empty):
        trainer.model.train()
    assert same(plain.compute_loss(batch), empty.compute_loss(batch))


@pytest.mark.parametrize("loaded", [True, False])
def test_a_run_trains_with_them_and_its_export_holds_them(tmp_path, loaded):
    changes = dict(use_repa=False, flow=FLOW)
    original = load_model(TrainConfig.from_dict(settings(use_repa=False)))
    if loaded:
        original.save_pretrained(tmp_path / "published")
        changes.update(model=None, model_name=str(tmp_path / "published"), readout_weight=0.0)
    trainer = make_trainer(tmp_path / "run", **changes)
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


def test_a_resume_without_them_has_the_models_own_and_says_so(tmp_path, caplog):
    path = make_trainer(tmp_path, use_repa=False, flow={"null_condition_prob": 1.0}).save_checkpoint()
    trainer = make_trainer(tmp_path, use_repa=False)
    with caplog.at_level("INFO", "flextok"):
        trainer.load_checkpoint(path)
    assert "resume: flow was {" in caplog.text and "and is now None" in caplog.text
    assert trainer.model.decoder.module_dict["dec_latent_dropout"].dropout_prob == 0.3


def test_the_summary_names_them(tmp_path, capsys):
    run_main(tmp_path, check=True, overrides=["flow.null_condition_prob=0.1", "flow.shift=3"])
    assert "flow          null_condition_prob 0.1, shift 3.0" in capsys.readouterr().out


# The YAML


@pytest.mark.parametrize(
    "flow, message",
    [
        ({"shfit": 2}, "unknown setting: 'flow.shfit' (did you mean 'shift'?)"),
        ({"shift": 0}, "flow.shift is 0, expected more than 0 or null"),
        ({"shift": "3"}, "flow.shift is '3', expected a number or null: remove the quotes"),
        ({"null_condition_prob": 1.5}, "flow.null_condition_prob is 1.5, expected at most 1 or null"),
        (
            {"keep_k_mode": "pow"},
            "flow.keep_k_mode is 'pow', expected one of uniform, pow2, uniform_pow2 or null (did you mean 'pow2'?)",
        ),
        (3, "flow is 3, expected a mapping or null"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(flow, message):
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_dict({"flow": flow})
    assert str(error.value) == message


def test_settings_can_be_given_on_the_command_line_and_survive_a_file(tmp_path):
    (tmp_path / "a.yaml").write_text("dataset_name: photos\nflow:\n  shift: 3\n")
    config = load_config(tmp_path / "a.yaml", ["flow.null_condition_prob=0.1", "flow.keep_k_mode=pow2"])
    assert config.flow == FlowSettings(shift=3.0, null_condition_prob=0.1, keep_k_mode="pow2")
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert load_config(tmp_path / "a.yaml", ["flow=null"]).flow is None


@pytest.mark.parametrize(
    "overrides, start",
    [
        (["flow.logit_normal_mean=-0.4"], "flow.logit_normal_mean and _std do nothing"),
        (["flow.logit_normal_sigmas=true", "flow.mode_scale=1"], "flow.mode_scale does nothing"),
        (["flow.mode_scale=3"], "flow.mode_scale is 3"),
        (["flow.logit_normal_sigmas=true", "flow.logit_normal_mean=-0.4"], None),
    ],
)
def test_settings_without_effect_get_a_warning(tmp_path, caplog, overrides, start):
    (tmp_path / "a.yaml").write_text("dataset_name: photos\n")
    load_config(tmp_path / "a.yaml", overrides)
    assert [message.startswith(start or "-") for message in caplog.messages] == [True] * (start is not None)
