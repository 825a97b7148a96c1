"""Saving and loading: folders, the Hub's cache, single files, old key names, and weights that do not fit."""

import json
import socket

import pytest
import torch
import yaml
from helpers import make_images, make_noise, save_tiny_vae, tiny_config, tiny_model
from safetensors import safe_open
from safetensors.torch import save_file

from flextok import FlexTokFromHub
from flextok.flextok_wrapper import PARTS
from flextok.utils.checkpoint import (
    CheckpointError,
    load_model_from_safetensors,
    load_safetensors,
    load_weights,
    save_safetensors,
)
from flextok.utils.config import ConfigError
from flextok.vae_wrapper import AUTOENCODER_KL

HUB_NAME = "some-lab/flextok-tiny"
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def offline(monkeypatch):
    """No network, as huggingface_hub's HF_HUB_OFFLINE and the sockets have it; the attempts to use it."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return attempts


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, offline):
    """A function that puts files into a cache of the Hub's layout, where huggingface_hub looks for it."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def fill(name, source):
        repository = cache / ("models--" + name.replace("/", "--"))
        snapshot = repository / "snapshots" / REVISION
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(REVISION)
        for file in source.iterdir():
            (snapshot / file.name).write_bytes(file.read_bytes())
        return snapshot

    return fill


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def assert_same_model(loaded, model):
    assert same_weights(loaded, model)
    assert loaded.config == model.config
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded.tokenize(make_images(1))[0], model.tokenize(make_images(1))[0])


# Folders and the Hub


def test_a_saved_folder_loads_as_the_same_model(model, folder):
    assert_same_model(FlexTokFromHub.from_pretrained(folder), model)
    assert_same_model(FlexTokFromHub.from_pretrained(str(folder)), model)


def test_saving_a_loaded_model_writes_the_same_again(folder, tmp_path):
    FlexTokFromHub.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (folder / "config.json").read_text()
    first, second = (load_safetensors(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert first[1] == second[1] and first[0].keys() == second[0].keys()
    assert all(torch.equal(first[0][key], second[0][key]) for key in first[0])


def test_the_saved_config_has_the_six_parts_and_nothing_else(tmp_path):
    config = {"_target_": "flextok.flextok_wrapper.FlexTok", "note": "more keys", **tiny_config()}
    FlexTokFromHub(config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.keys() == set(PARTS)
    assert saved == {**tiny_config(), "pipeline": {**tiny_config()["pipeline"], "_partial_": True}}


def test_the_saved_weights_carry_the_config_in_their_header(model, folder):
    assert load_safetensors(folder / "model.safetensors")[1] == model.config
    (folder / "config.json").unlink()
    assert_same_model(FlexTokFromHub.from_pretrained(folder), model)


def test_a_config_under_the_key_config_loads(model, folder):
    (folder / "config.json").write_text(json.dumps({"config": model.config}))
    assert_same_model(FlexTokFromHub.from_pretrained(folder), model)


def test_the_config_file_decides_over_the_header(model, folder):
    config = json.loads((folder / "config.json").read_text())
    config["decoder"]["module_dict"]["dec_latent_dropout"]["dropout_prob"] = 0.7
    (folder / "config.json").write_text(json.dumps(config))
    loaded = FlexTokFromHub.from_pretrained(folder)
    assert loaded.decoder.module_dict["dec_latent_dropout"].dropout_prob == 0.7


def test_the_hubs_cache_is_enough_without_network(model, folder, hub_cache):
    hub_cache(HUB_NAME, folder)
    assert_same_model(FlexTokFromHub.from_pretrained(HUB_NAME), model)
    assert_same_model(FlexTokFromHub.from_pretrained(HUB_NAME, revision=REVISION), model)


def test_a_config_nested_on_the_hub_loads(model, folder, hub_cache):
    (folder / "config.json").write_text(json.dumps({"config": model.config}))
    hub_cache(HUB_NAME, folder)
    assert_same_model(FlexTokFromHub.from_pretrained(HUB_NAME), model)


def test_another_cache_folder_can_be_named(model, folder, hub_cache, tmp_path, monkeypatch):
    hub_cache(HUB_NAME, folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(OSError):
        FlexTokFromHub.from_pretrained(HUB_NAME)
    assert_same_model(FlexTokFromHub.from_pretrained(HUB_NAME, cache_dir=tmp_path / "hub"), model)


def test_a_folder_without_weights_is_refused_with_the_path(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        FlexTokFromHub.from_pretrained(folder)


def test_a_folder_without_any_config_is_refused(model, folder):
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="neither a config.json nor a config in the header"):
        FlexTokFromHub.from_pretrained(folder)


def test_a_config_that_builds_something_else_is_refused_on_loading(folder):
    config = json.loads((folder / "config.json").read_text())
    config["regularizer"] = {"_target_": "os.system", "command": "true"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="'os.system' is not allowed"):
        FlexTokFromHub.from_pretrained(folder)


# Single files


def with_none_as_text(value):
    """A tree in which None is the text `None`, as YAML writers of Python values leave it."""
    if isinstance(value, dict):
        return {key: with_none_as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_none_as_text(item) for item in value]
    return "None" if value is None else value


def as_yaml(value):
    return yaml.safe_dump(value, sort_keys=False)


@pytest.mark.parametrize(
    "write",
    [repr, json.dumps, as_yaml, lambda part: as_yaml(with_none_as_text(part)).replace("'None'", "None")],
    ids=["python", "json", "yaml", "yaml with None"],
)
@pytest.mark.parametrize("nested", [False, True], ids=["parts", "under config"])
def test_a_single_file_carries_its_config_as_text(tmp_path, write, nested):
    model = tiny_model(mode_scale=None)
    assert model.config["flow_matching_noise_module"]["mode_scale"] is None
    header = {"config": write(model.config)} if nested else {key: write(part) for key, part in model.config.items()}
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt", **header})
    loaded = load_model_from_safetensors(tmp_path / "model.safetensors")
    assert_same_model(loaded, model)
    assert loaded.device.type == "cpu"


def test_metadata_round_trips_through_the_header(tmp_path):
    metadata = {"a": None, "b": {"c": [1, 2.5, True, None, "text"]}, "d": "None of these", "e": 3, "f": "plain"}
    tensors = {"x": make_noise(2, 3), "y": torch.arange(3)}
    save_safetensors(tensors, tmp_path / "file.safetensors", metadata)
    loaded, read = load_safetensors(tmp_path / "file.safetensors")
    assert read == metadata
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[key], tensors[key]) for key in tensors)
    assert load_safetensors(tmp_path / "file.safetensors", return_metadata=False).keys() == tensors.keys()


def test_a_file_without_config_is_refused_with_what_to_do(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match="no config in its header.*from_pretrained"):
        load_model_from_safetensors(tmp_path / "bare.safetensors")


def test_a_missing_file_is_refused_with_its_path(tmp_path):
    for load in (load_safetensors, load_model_from_safetensors):
        with pytest.raises(FileNotFoundError, match="none.safetensors"):
            load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 300, 0.5, -1], ids=str)
def test_truncated_files_are_refused_with_path_and_size(folder, length):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    content = content[: int(len(content) * length)] if isinstance(length, float) else content[:length]
    path.write_bytes(content)
    for load in (load_safetensors, load_model_from_safetensors, lambda p: FlexTokFromHub.from_pretrained(p.parent)):
        with pytest.raises(CheckpointError, match=rf"model.safetensors \({len(content)} bytes\).*truncated"):
            load(path)


@pytest.mark.parametrize("content", [b"\x08" + bytes(7) + b"not json", b"\xff" * 64, b"PK\x03\x04" + bytes(100)])
def test_files_of_another_kind_are_refused(tmp_path, content):
    (tmp_path / "other.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_safetensors(tmp_path / "other.safetensors")


@pytest.mark.parametrize("target", ["save_file", "os.replace"])
def test_a_crash_while_saving_leaves_the_previous_file(folder, monkeypatch, target):
    path = folder / "model.safetensors"
    before = path.read_bytes()

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"flextok.utils.checkpoint.{target}", crash)
    with pytest.raises(KeyboardInterrupt):
        save_safetensors({"x": torch.zeros(1)}, path)
    assert path.read_bytes() == before
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


# Names and shapes of weights


@pytest.mark.parametrize("wrapper", ["_checkpoint_wrapped_module.", "_orig_mod."])
def test_keys_of_wrapped_modules_load(model, folder, wrapper):
    tensors = {
        key.replace("blocks.0.", f"blocks.0.{wrapper}").replace("blocks.1.", f"blocks.1.{wrapper}"): value
        for key, value in model.state_dict().items()
    }
    assert sum(wrapper in key for key in tensors) > 20
    save_file(tensors, folder / "model.safetensors")
    assert_same_model(FlexTokFromHub.from_pretrained(folder), model)


def test_saving_removes_the_names_of_wrappers(tmp_path):
    save_safetensors({"a._checkpoint_wrapped_module.b": torch.zeros(1), "_orig_mod.c": torch.zeros(1)}, tmp_path / "f")
    with safe_open(tmp_path / "f", "pt") as file:
        assert set(file.keys()) == {"a.b", "c"}


def test_everything_that_does_not_fit_is_listed_and_the_model_is_untouched(model):
    state_dict = {key: value + 1 for key, value in model.state_dict().items()}
    keys = [key for key in state_dict if key.endswith("weight")]
    missing, misshaped, unexpected = keys[:3], keys[3:6], ["decoder.extra.weight", "vae.vae.quant_conv.bias", "other"]
    for key in missing:
        del state_dict[key]
    for key in misshaped:
        state_dict[key] = torch.zeros(7, 5)
    state_dict.update({key: torch.zeros(2) for key in unexpected})
    target = tiny_model(seed=1)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_weights(target, state_dict, source="the old run")
    message = str(error.value)
    assert "the old run" in message and "9 problems" in message
    for key in missing:
        assert f"missing: {key} {list(before[key].shape)}" in message
    for key in unexpected:
        assert f"unexpected: {key} [2]" in message
    for key in misshaped:
        assert f"shape of {key}: [7, 5] given, {list(before[key].shape)} expected" in message
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_weights_for_other_sizes_are_refused_from_a_folder(model, folder):
    config = json.loads((folder / "config.json").read_text())
    config["decoder"]["module_dict"]["dec_transformer"]["depth"] = 1
    config["decoder"]["module_dict"]["dec_transformer"]["intermediate_layers"] = [0]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"unexpected: decoder\.module_dict\.dec_transformer\.blocks\.1\."):
        FlexTokFromHub.from_pretrained(folder)


# The VAE in and beside the checkpoint


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    save_tiny_vae(path)
    return path


@pytest.fixture
def small_default_vae(monkeypatch):
    """The VAE that is built where no architecture can be read has 8 channels."""
    small = dict(block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
    monkeypatch.setattr("flextok.vae_wrapper.AUTOENCODER_KL", {**AUTOENCODER_KL, **small})


def vae_config(hub_path):
    return tiny_config(vae="stable_diffusion", vae_hub_path=hub_path, latent_channels=4)


def test_a_model_with_a_vae_round_trips(vae_folder, tmp_path):
    model = FlexTokFromHub(vae_config(str(vae_folder))).eval()
    model.save_pretrained(tmp_path / "saved")
    loaded = FlexTokFromHub.from_pretrained(tmp_path / "saved")
    assert same_weights(loaded, model) and loaded.config == model.config
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved.keys() == set(PARTS)
    assert saved["vae"] == {**vae_config(str(vae_folder))["vae"], "scaling_factor": 0.5}


def test_a_loaded_model_says_which_scaling_factor_its_vae_has(vae_folder, tmp_path):
    config = vae_config(str(vae_folder))
    assert config["vae"]["scaling_factor"] is None
    save_safetensors(FlexTokFromHub(config).state_dict(), tmp_path / "model.safetensors", config)
    loaded = load_model_from_safetensors(tmp_path / "model.safetensors")
    assert loaded.vae.scaling_factor == loaded.config["vae"]["scaling_factor"] == 0.5


def test_a_checkpoint_without_vae_takes_the_vae_that_its_config_names(vae_folder, tmp_path):
    model = FlexTokFromHub(vae_config(str(vae_folder)))
    tensors = {key: value for key, value in model.state_dict().items() if not key.startswith("vae.")}
    save_safetensors(tensors, tmp_path / "model.safetensors", model.config)
    assert same_weights(load_model_from_safetensors(tmp_path / "model.safetensors"), model)


def test_a_checkpoint_without_vae_and_without_its_name_loads_with_a_warning(small_default_vae, tmp_path, caplog):
    model = FlexTokFromHub(vae_config(None))
    tensors = {key: value for key, value in model.state_dict().items() if not key.startswith("vae.")}
    save_safetensors(tensors, tmp_path / "model.safetensors", model.config)
    loaded = load_model_from_safetensors(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded.state_dict()[key], tensors[key]) for key in tensors)
    assert "no VAE weights" in caplog.text


def test_a_part_of_the_vaes_weights_is_not_enough(vae_folder):
    model = FlexTokFromHub(vae_config(str(vae_folder)))
    tensors = dict(model.state_dict())
    del tensors["vae.vae.quant_conv.bias"]
    with pytest.raises(CheckpointError, match=r"1 problems:\n  missing: vae\.vae\.quant_conv\.bias \[8\]"):
        load_weights(model, tensors)


def test_a_vae_inside_the_checkpoint_is_used_and_its_hub_name_not_fetched(tmp_path, hub_cache):
    source = tmp_path / "vae"
    save_tiny_vae(source)
    model = FlexTokFromHub(vae_config(str(source)))
    config = {**model.config, "vae": {**model.config["vae"], "hf_hub_path": "some-lab/vae"}}
    save_safetensors(model.state_dict(), tmp_path / "model.safetensors", config)
    (source / "diffusion_pytorch_model.safetensors").unlink()
    hub_cache("some-lab/vae", source)  # its config.json alone: the architecture, and no weights to fetch
    loaded = load_model_from_safetensors(tmp_path / "model.safetensors")
    assert same_weights(loaded, model)
    assert loaded.config == config


def test_a_vae_inside_the_checkpoint_needs_nothing_from_the_hub(small_default_vae, tmp_path, monkeypatch, offline):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it could ask, and need not
    model = FlexTokFromHub(vae_config(None))
    config = {**model.config, "vae": {**model.config["vae"], "hf_hub_path": "some-lab/vae-that-is-nowhere"}}
    save_safetensors(model.state_dict(), tmp_path / "model.safetensors", config)
    assert same_weights(load_model_from_safetensors(tmp_path / "model.safetensors"), model)
    assert offline == []


def test_a_stray_logvar_of_the_published_vae_is_ignored(model):
    tensors = {**model.state_dict(), "vae.logvar": torch.zeros(())}
    target = tiny_model(seed=1)
    load_weights(target, tensors)
    assert same_weights(target, model)
