"""Settings of a training run: types, limits, suggestions, YAML, overrides."""

import dataclasses

import pytest

from flextok.training.config import TrainConfig, load_config, parse_yaml
from flextok.utils.config import ConfigError

# Keys that existing configs hold.
DOCUMENTED_KEYS = """model_name train_encoder train_decoder train_vae train_from_scratch fsq_levels
gradient_checkpointing dataset_name data_path img_size use_augmentation num_epochs batch_size val_batch_size
max_val_batches num_workers gradient_accumulation_steps use_amp max_grad_norm optimizer learning_rate encoder_lr
decoder_lr vae_lr betas weight_decay eps scheduler warmup_steps min_lr use_ema ema_decay inference_steps guidance_scale
perform_norm_guidance vis_token_counts checkpoint_dir resume save_every use_wandb wandb_project wandb_run_name
wandb_tags log_every visualize_every use_repa repa_weight repa_encoder_type repa_encoder_dim repa_target_size
repa_lr""".split()


def config(**settings) -> TrainConfig:
    return TrainConfig.from_dict({"dataset_name": "photos", **settings})


def test_every_documented_key_is_a_setting():
    assert set(DOCUMENTED_KEYS) <= {field.name for field in dataclasses.fields(TrainConfig)}


def test_every_setting_says_what_it_means():
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["help"].rstrip().endswith("."), field.name


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"use_rpea": True}, r"unknown setting: 'use_rpea' \(did you mean 'use_repa'\?\)"),
        ({"learning_rate": "1e-4"}, "learning_rate is '1e-4' \\(a string\\), expected a number: remove the quotes"),
        ({"learning_rate": "fast"}, "expected a number$"),
        ({"batch_size": 1.5}, "batch_size is 1.5 .*expected a whole number"),
        ({"batch_size": True}, "batch_size is True .*expected a whole number"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"batch_size": None}, "batch_size is None .*expected a whole number"),
        ({"use_repa": "yes"}, "use_repa is 'yes' .*expected true or false"),
        ({"use_repa": 1}, "expected true or false"),
        ({"betas": [0.9]}, "expected two numbers below 1"),
        ({"betas": [0.9, 1.0]}, "expected two numbers below 1"),
        ({"betas": 0.9}, "expected a list of numbers"),
        ({"repa_target_size": [37]}, r"expected \[height, width\]"),
        ({"repa_target_size": [37, "37"]}, "remove the quotes"),
        ({"repa_weight": 0}, "repa_weight is 0.0, expected more than 0"),
        ({"repa_weight": -1.0}, "expected more than 0"),
        ({"learning_rate": float("nan")}, "expected a finite number"),
        ({"scheduler": "cosin"}, r"scheduler is 'cosin', expected one of cosine, linear, none \(did you mean 'cosine'"),
        ({"optimizer": "sgd"}, "expected one of adamw, adam"),
        ({"train_encoder": False, "train_decoder": False}, "nothing to train"),
        ({"dataset_name": "celebhq", "data_path": "."}, "did you mean 'celebahq'"),
        ({"model": {"encoder_dpeth": 4}}, "model: unknown argument 'encoder_dpeth' .did you mean 'encoder_depth'"),
        ({"disable_gradient_checkpointing": True, "gradient_checkpointing": True}, "contradict each other"),
        ({"fsq_levels": [8, 1]}, "expected at least 2"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_was_expected(settings, message):
    with pytest.raises(ConfigError, match=message):
        config(**settings)


def test_a_constant_schedule_needs_no_room_above_min_lr():
    assert config(scheduler="none", min_lr=1e-4).min_lr == 1e-4


def test_whole_numbers_are_taken_where_numbers_are_meant():
    assert config(repa_weight=1).repa_weight == 1.0 and isinstance(config(repa_weight=1).repa_weight, float)


@pytest.mark.parametrize("disabled", [True, False])
def test_the_older_name_of_gradient_checkpointing_has_the_opposite_sense(disabled):
    assert config(disable_gradient_checkpointing=disabled).gradient_checkpointing is not disabled


@pytest.mark.parametrize(
    "name, known", [("CelebA-HQ", "celebahq"), ("celeba_hq", "celebahq"), ("imagenet", "imagenet")]
)
def test_celebahq_may_be_spelled_in_any_way_and_other_names_are_folders(name, known):
    assert config(dataset_name=name, data_path=".").dataset_name == known


def test_learning_rates_follow_what_is_trained():
    settings = config(learning_rate=3e-4, decoder_lr=2e-4, train_vae=True, vae_lr=1e-5, use_repa=True, repa_lr=5e-4)
    assert settings.learning_rates() == {"encoder": 3e-4, "decoder": 2e-4, "vae": 1e-5, "repa_projector": 5e-4}
    assert config(train_encoder=False).learning_rates() == {"decoder": 1e-4}


@pytest.mark.parametrize(
    "text, value", [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("-2E+3", -2000.0), ("12", 12), ("'1e-4'", "1e-4"), ("1e", "1e")]
)
def test_yaml_numbers_are_those_of_yaml_1_2(text, value):
    parsed = parse_yaml(f"key: {text}")["key"]
    assert parsed == value and type(parsed) is type(value)


def test_a_key_given_twice_is_an_error_with_its_line():
    with pytest.raises(ConfigError, match="line 2: 'use_repa' is given twice"):
        parse_yaml("use_repa: true\nuse_repa: false\n")


def test_yaml_cannot_name_python_objects():
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_yaml("key: !!python/object/apply:os.getcwd []")


def test_overrides_replace_settings_of_the_file_and_reach_into_the_model(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("dataset_name: photos\nuse_repa: false\nmodel:\n  encoder_depth: 4\n")
    settings = load_config(file, ["use_repa=true", "repa_lr=2e-4", "model.decoder_depth=3", "repa_target_size=[8, 8]"])
    assert settings.use_repa is True and settings.repa_lr == 2e-4 and settings.repa_target_size == [8, 8]
    assert settings.model == {"encoder_depth": 4, "decoder_depth": 3}


@pytest.mark.parametrize("override", ["use_repa", "=true"])
def test_an_override_without_key_or_value_is_refused(tmp_path, override):
    file = tmp_path / "a.yaml"
    file.write_text("dataset_name: photos\n")
    with pytest.raises(ConfigError, match="expected key=value"):
        load_config(file, [override])


@pytest.mark.parametrize("text, message", [("- 1\n", "expected a mapping"), ("a: [1\n", "not valid YAML")])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path, text, message):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"broken.yaml.*{message}"):
        load_config(file)


def test_a_missing_config_lists_those_there_are(tmp_path):
    with pytest.raises(ConfigError, match="there is no config file .*quickstart.yaml"):
        load_config(tmp_path / "no.yaml")


def test_a_config_survives_the_way_through_a_dict():
    settings = config(use_repa=True, model={"encoder_depth": 3})
    assert TrainConfig.from_dict(settings.to_dict()) == settings


USERS_OWN = """
model_name: EPFL-VILAB/flextok_d18_d18_in1k
disable_gradient_checkpointing: false
data_path: ./data/celeba_hq
learning_rate: 1.0e-6
encoder_lr: 1.0e-6
decoder_lr: 1.0e-6
vae_lr: 1.0e-6
min_lr: 1.0e-6
scheduler: cosine
warmup_steps: 200
betas: [0.9, 0.999]
val_batch_size: 64
max_val_batches: null
checkpoint_dir: ./checkpoints/celebahq_ft
save_every: 1
use_ema: false
ema_decay: 0.999
inference_steps: 20
vis_token_counts: [1, 2, 3, 4, 16, 256]
use_repa: false
repa_weight: 1.0
repa_encoder_type: 'dinov2_vitl14'
repa_encoder_dim: 1024
repa_target_size: [37, 37]
repa_lr: 1.0e-4
"""


def test_a_config_that_people_have_is_valid_as_it_is(tmp_path):
    (tmp_path / "own.yaml").write_text(USERS_OWN)
    config = load_config(tmp_path / "own.yaml")
    assert config.gradient_checkpointing and config.vis_token_counts == [1, 2, 3, 4, 16, 256]
    assert config.learning_rates() == {"encoder": 1e-6, "decoder": 1e-6}
    assert load_config(tmp_path / "own.yaml", ["use_repa=true"]).learning_rates()["repa_projector"] == 1e-4
