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
from flextok.training.config import FlowSettings, TrainConfig, load_config
from flextok.training.models import interpolate_posembs, load_model
from flextok.utils.checkpoint import load_metadata
from flextok.utils.config import ConfigError
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


def test_a_setting_for_a_module_that_the_model_lacks_is_refused():
    config = tiny_config()
    del config["decoder"]["module_dict"]["dec_nested_dropout"]
    with pytest.raises(ConfigError, match="flow.keep_k_mode is .*, but the model's decoder has no"):
        with_flow(config, keep_k_mode="pow2")


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


# What the published constructors take (`load_weights` and the classes that are ours alone are not among it).
PUBLISHED_ARGUMENTS = {
    "PerSampleOp": "read_key write_key per_sample_op",
    "PatchEmbedder": "input_tensor_list_read_key patches_list_write_key n_patches_write_key patch_sizes channels_in "
    "dim flatten_patches weight_init_style",
    "PositionalEmbeddingAdder": "read_key write_key dim max_sizes posemb_type posemb_scaling posemb_write_key",
    "Registers1D": "input_tensor_list_read_key register_sizes_read_write_key registers_write_key dim n_min n_max "
    "n_eval size_sampling_mode ordering_mode extra_registers_write_key extra_registers_dim",
    "BlockWiseSequencePacker": "input_list_read_keys packed_seq_write_key block_mask_write_key "
    "inner_packed_shapes_write_key outer_packed_shapes_write_key mask_mode max_seq_len pad_to_multiple "
    "emb_packing_fn_write_key per_subseq_embs compile_block_mask return_materialized_mask",
    "SequenceUnpacker": "packed_seq_read_key inner_seq_write_keys inner_packed_shapes_read_key "
    "outer_packed_shapes_read_key",
    "LinearHead": "read_key write_key dim dim_out use_mup_readout weight_init_style norm_layer dtype_override "
    "adaLN_emb_read_key adaLN_packing_fn_read_key adaLN_bias proj_bias",
    "ToPatchesLinearHead": "read_key write_key dim channels_out patch_sizes use_mup_readout weight_init_style "
    "norm_layer dtype_override adaLN_emb_read_key adaLN_packing_fn_read_key adaLN_bias proj_bias",
    "FSQ": "latents_read_key quants_write_key tokens_write_key levels drop_quant_p corrupt_tokens_p "
    "min_corrupt_tokens_p apply_corrupt_tokens_p packed_call",
    "MinRFNoiseModule": "clean_images_read_key noised_images_write_key timesteps_write_key sigmas_write_key ln "
    "stratisfied mode_scale noise_write_key noise_read_key",
    "LinearLayer": "read_key write_key dim_in dim weight_init_style dtype_override proj_bias",
    "MaskedNestedDropout": "read_write_key dim eval_keep_k_read_key train_keep_k_write_key size_sampling_mode",
    "LearnedNullCond": "read_write_key dim eval_drop_flag_read_key dropout_prob replace_with_single_token",
    "TimestepEmbedder": "timesteps_read_key time_embedding_write_key dim frequency_embedding_size weight_init_style "
    "max_timestep temb_as_tokens",
    "FlexTransformer": "input_seq_read_key output_seq_write_key dim depth head_dim mlp_ratio qkv_bias proj_bias "
    "mlp_bias drop drop_path_rate act_layer norm_layer gated_mlp qk_norm use_act_checkpoint weight_init_style "
    "zero_init_query_proj block_mask_read_key score_mod_read_key adaLN_emb_read_key adaLN_packing_fn_read_key "
    "adaLN_expansion rope_forward_read_key intermediate_layer_write_key intermediate_layers",
    "MinRFPipeline": "noise_read_key target_sizes_read_key latents_read_key timesteps_read_key noised_images_read_key "
    "reconst_write_key out_channels",
    "StableDiffusionVAE": "images_read_key vae_latents_read_key vae_latents_write_key images_reconst_write_key "
    "vae_kl_loss_write_key latent_channels scaling_factor dtype_override hf_hub_path sample_posterior learnable_logvar "
    "logvar_init compile_encode_fn force_vae_encode frozen",
    "SequentialModuleDictWrapper": "module_dict",
}


def foreign_arguments(tree, place=""):
    """Places of arguments in a config that the published constructors lack."""
    if not isinstance(tree, dict):
        return []
    target = tree.get("_target_", "").rsplit(".", 1)[-1]
    known = PUBLISHED_ARGUMENTS[target].split() if target and not target.startswith("channels_") else list(tree)
    found = [f"{place}{key}" for key in tree if key not in known and key not in ("_target_", "_partial_")]
    return found + [name for key, value in tree.items() for name in foreign_arguments(value, f"{place}{key}.")]


def test_an_export_holds_nothing_that_the_published_package_refuses_and_loads_here_as_it_was_trained(tmp_path):
    save_tiny_vae(tmp_path / "vae")
    config = tiny_config(vae="stable_diffusion", vae_hub_path=str(tmp_path / "vae"), latent_channels=4, img_size=64)
    config, _ = with_fsq_levels(config, [4, 4])
    plain = FlexTokFromHub(config)
    interpolate_posembs(plain, 128)
    plain.save_pretrained(tmp_path / "export")
    model = FlexTokFromHub(with_flow(plain.config, **FLOW))
    assert foreign_arguments(model.config) == [  # so that the test can fail
        "flow_matching_noise_module.ln_mean", "flow_matching_noise_module.ln_std", "flow_matching_noise_module.shift",
        "pipeline.shift",
    ]  # fmt: skip
    model.save_pretrained(tmp_path / "export")
    for saved in (
        json.loads((tmp_path / "export/config.json").read_text()),
        load_metadata(tmp_path / "export" / WEIGHTS),
    ):
        assert saved.keys() == set(PARTS) and foreign_arguments(saved) == []
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


def test_exports_that_have_the_arguments_in_their_config_load_as_ever(tmp_path):
    model = FlexTokFromHub(with_flow(tiny_config(), **FLOW))
    model.save_pretrained(tmp_path)
    (tmp_path / "flow.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    assert FlexTokFromHub.from_pretrained(tmp_path).config == model.config
    (tmp_path / "flow.json").write_text('{"pipeline": {"shfit": 2}}')
    with pytest.raises(ConfigError, match="flow.json has {'pipeline': {'shfit': 2}}, expected arguments as in .*shift"):
        FlexTokFromHub.from_pretrained(tmp_path)


# The YAML


def test_settings_can_be_given_on_the_command_line_and_survive_a_file(tmp_path):
    (tmp_path / "a.yaml").write_text("dataset_name: photos\nflow:\n  shift: 3\n")
    config = load_config(tmp_path / "a.yaml", ["flow.null_condition_prob=0.1", "flow.keep_k_mode=pow2"])
    assert config.flow == FlowSettings(shift=3.0, null_condition_prob=0.1, keep_k_mode="pow2")
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert load_config(tmp_path / "a.yaml", ["flow=null"]).flow is None
