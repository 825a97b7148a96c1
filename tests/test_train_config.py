"""Settings of a training run: types, limits, suggestions, YAML, overrides, the schema for editors."""

import json
import logging
from pathlib import Path

import pydantic
import pytest
import yaml

from flextok.training.config import (
    TrainConfig,
    json_schema,
    load_config,
)
from flextok.utils.config import ConfigError
from flextok.utils.plain import parse_yaml

ROOT = Path(__file__).parent.parent
PYDANTIC = tuple(int(part) for part in pydantic.VERSION.split(".")[:2])


def config(**settings) -> TrainConfig:
    return TrainConfig.from_dict({"dataset_name": "photos", **settings})


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "a.yaml"
    path.write_text("dataset_name: photos\nuse_repa: false\nmodel:\n  encoder_depth: 4\n")
    return path


WRONG = [
    ({"use_rpea": True}, "unknown setting: 'use_rpea' (did you mean 'use_repa'?)"),
    ({"learning_rate": "1e-4"}, "learning_rate is '1e-4', expected a number: remove the quotes"),
    ({"learning_rate": 0}, "learning_rate is 0, expected more than 0"),
    ({"batch_size": 1.5}, "batch_size is 1.5, expected a whole number"),
    ({"use_repa": "yes"}, "use_repa is 'yes', expected true or false"),
    ({"betas": [0.9]}, "betas is [0.9], expected at least 2 values"),
    (
        {"scheduler": "cosin"},
        "scheduler is 'cosin', expected one of cosine, linear, wsd, none (did you mean 'cosine'?)",
    ),
    ({"dataset_name": "celebhq"}, "dataset_name is 'celebhq' (did you mean 'celebahq'?); use `folder` for others"),
    ({"flow": {"shfit": 2}}, "unknown setting: 'flow.shfit' (did you mean 'shift'?)"),
    ({"repa_layers": [1, 1]}, "repa_layers is [1, 1], expected different layers, at least one, or null"),
]


@pytest.mark.parametrize("settings, message", WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_setting_is_refused_in_one_sentence(settings, message):
    with pytest.raises(ConfigError) as error:
        config(**settings)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"train_encoder": False, "train_decoder": False}, "nothing to train"),
        ({"model": {"encoder_dpeth": 4}}, "model: unknown argument 'encoder_dpeth' .did you mean 'encoder_depth'"),
        ({"disable_gradient_checkpointing": True, "gradient_checkpointing": True}, "contradict each other"),
        ({"parallel": "fsdp", "train_vae": True}, "a VAE is trained with ddp alone"),
        ({"parallel": "fsdp", "optimizer": "muon"}, "optimizer is muon, which needs whole parameters"),
        ({"cache_latents": True, "random_crop": True}, "cache_latents is true, but crop is random"),
        ({"repa_cache": True, "random_crop": True}, "repa_cache is true, but crop is random"),
        ({"cache_latents": True, "train_vae": True}, "the latents of a VAE that is trained change"),
    ],
)  # fmt: skip
def test_settings_that_cannot_go_together_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        config(**settings)


def test_all_mistakes_are_reported_together_one_per_line():
    with pytest.raises(ConfigError) as error:
        config(batch_size=0, use_rpea=True, betas=[0.9], dataset_name="celebhq")
    assert sorted(line.split()[0] for line in str(error.value).splitlines()) == [
        "batch_size", "betas", "dataset_name", "unknown"
    ]  # fmt: skip


def test_what_is_merely_unwise_is_a_warning(file, caplog, monkeypatch):
    caplog.set_level(logging.WARNING, "flextok")
    overrides = ["use_repa=true", "repa_weight=0", "repa_warmup_steps=8", "repa_stop=5", "flow.mode_scale=3"]
    assert load_config(file, overrides).repa_weight == 0
    names = {"repa_weight", "repa_warmup_steps", "flow.mode_scale"}
    assert {message.split()[0] for message in caplog.messages} == names and len(caplog.messages) == 3
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    load_config(file, overrides)
    monkeypatch.delenv("RANK")
    load_config(file)
    assert not caplog.messages


def test_learning_rates_follow_what_is_trained():
    settings = config(learning_rate=3e-4, decoder_lr=2e-4, train_vae=True, vae_lr=1e-5, use_repa=True, repa_lr=5e-4)
    assert settings.learning_rates() == {"encoder": 3e-4, "decoder": 2e-4, "vae": 1e-5, "repa_projector": 5e-4}
    assert config(train_encoder=False).learning_rates() == {"decoder": 1e-4}


# YAML


@pytest.mark.parametrize("text, value", [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("12", 12), ("'1e-4'", "1e-4")])
def test_yaml_numbers_are_those_of_yaml_1_2(text, value):
    parsed = parse_yaml(f"key: {text}")["key"]
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("- 1\n", "expected a mapping"),
        ("a: [1\n", "not valid YAML.*line 2"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("a: 1\na: 2\n", "line 2: 'a' is given twice"),
    ],
)
def test_a_file_that_is_no_mapping_of_settings_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_bytes(text.encode())
    with pytest.raises(ConfigError, match=f"(?s)broken.yaml.*{message}"):
        load_config(path)


def test_a_missing_config_lists_those_there_are(tmp_path):
    with pytest.raises(ConfigError, match="there is no config file .*quickstart.yaml"):
        load_config(tmp_path / "no.yaml")


# Overrides


def test_overrides_replace_settings_of_the_file_and_reach_into_the_model(file):
    settings = load_config(file, ["use_repa=true", "repa_lr=2e-4", "model.decoder_depth=3", "repa_target_size=[8, 8]"])
    assert settings.use_repa is True and settings.repa_lr == 2e-4 and settings.repa_target_size == [8, 8]
    assert settings.model == {"encoder_depth": 4, "decoder_depth": 3}


@pytest.mark.parametrize(
    "override, value",
    [
        ("data_path=a #1", "a #1"),
        ("data_path='a b'", "a b"),  # quotes around it all are not part of it
        ("wandb_run_name=true", "true"),
        ("wandb_run_name=null", None),
        ("wandb_tags=[a, b]", ["a", "b"]),
    ],
)
def test_text_is_taken_as_it_stands_and_other_overrides_are_yaml(file, override, value):
    assert getattr(load_config(file, [override]), override.partition("=")[0]) == value


@pytest.mark.parametrize("override", ["use_repa", "=true"])
def test_an_override_without_key_or_value_is_refused(file, override):
    with pytest.raises(ConfigError, match="expected key=value"):
        load_config(file, [override])


# Stored configs


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


# The run's folder


# The schema for editors


@pytest.mark.skipif(PYDANTIC < (2, 10), reason="older versions write the same schema in other words")
def test_the_schema_in_configs_is_current():
    committed = json.loads((ROOT / "configs" / "schema.json").read_text())
    assert committed == json_schema(), "python -m flextok.training.config writes it"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_is_valid_and_names_its_schema(path):
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")
    load_config(path)
    schema = json_schema()["properties"]
    values = yaml.safe_load(path.read_text())
    assert set(values) <= set(schema)
    assert set(values.get("model", {})) <= set(schema["model"]["anyOf"][0]["properties"])
