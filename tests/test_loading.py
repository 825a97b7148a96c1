"""Saving and loading: folders, the Hub's cache, single files, damaged files, and weights that do not fit."""

import json
import os
import socket

import pytest
import torch
from helpers import make_images, save_tiny_vae, tiny_config, tiny_model
from safetensors.torch import save_file
from tiny_runs import same, settings

from flextok import FlexTokFromHub
from flextok.flextok_wrapper import PARTS
from flextok.training.config import TrainConfig
from flextok.training.models import load_model
from flextok.utils.checkpoint import (
    CheckpointError,
    load_model_from_safetensors,
    load_pickled,
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
    return same(dict(a.state_dict()), dict(b.state_dict()))


def assert_same_model(loaded, model):
    assert same_weights(loaded, model)
    assert loaded.config == model.config
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded.tokenize(make_images(1))[0], model.tokenize(make_images(1))[0])


# Folders and the Hub


def test_a_saved_folder_loads_as_the_same_model_and_is_saved_as_the_same_again(model, folder, tmp_path):
    loaded = FlexTokFromHub.from_pretrained(str(folder))
    assert_same_model(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (folder / "config.json").read_text()
    first, second = (load_safetensors(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert same(first, second) and first[1] == model.config


def test_the_hubs_cache_is_enough_without_network(model, folder, hub_cache, tmp_path, monkeypatch):
    hub_cache(HUB_NAME, folder)
    assert_same_model(FlexTokFromHub.from_pretrained(HUB_NAME), model)
    assert_same_model(FlexTokFromHub.from_pretrained(HUB_NAME, revision=REVISION), model)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(OSError):
        FlexTokFromHub.from_pretrained(HUB_NAME)
    assert_same_model(FlexTokFromHub.from_pretrained(HUB_NAME, cache_dir=tmp_path / "hub"), model)


def test_what_flow_json_adds_comes_from_the_hub_too(folder, hub_cache):
    (folder / "flow.json").write_text('{"pipeline": {"shift": 3.0}}')
    hub_cache(HUB_NAME, folder)
    config = TrainConfig.from_dict(settings(model=None, model_name=HUB_NAME))
    for model in (FlexTokFromHub.from_pretrained(HUB_NAME), load_model(config)):
        assert model.pipeline.shift == 3.0


def test_a_training_checkpoint_in_place_of_a_model_is_refused_with_the_export_to_give(model, tmp_path):
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "latest.pt"
    checkpoint.parent.mkdir(parents=True)
    torch.save({"model_state_dict": model.state_dict()}, checkpoint)
    config = TrainConfig.from_dict(settings(model=None, model_name=str(checkpoint)))
    model.save_pretrained(run / "export")
    for load in (lambda: FlexTokFromHub.from_pretrained(checkpoint), lambda: load_model(config)):
        with pytest.raises(CheckpointError, match=f"give {run}/export.* -m flextok.training.export {checkpoint} my_mo"):
            load()
    with pytest.raises(FileNotFoundError, match=f"the folder {run} has no model.safetensors, but {run}/export has"):
        FlexTokFromHub.from_pretrained(run)


# Single files


@pytest.mark.parametrize("write", [repr, json.dumps], ids=["python", "json"])
@pytest.mark.parametrize("nested", [False, True], ids=["parts", "under config"])
def test_a_single_file_carries_its_config_as_text(tmp_path, write, nested):
    model = tiny_model()
    assert model.config["encoder"]["module_dict"]["enc_to_latents"]["dtype_override"] is None
    header = {"config": write(model.config)} if nested else {key: write(part) for key, part in model.config.items()}
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt", **header})
    assert_same_model(load_model_from_safetensors(tmp_path / "model.safetensors"), model)


def test_files_that_are_missing_or_lack_a_config_are_refused_with_what_to_do(model, folder):
    for load in (load_safetensors, load_model_from_safetensors, load_pickled):
        with pytest.raises(FileNotFoundError, match="none.safetensors"):
            load(folder / "none.safetensors")
    save_file(model.state_dict(), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="no config in its header.*from_pretrained"):
        load_model_from_safetensors(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="is a file, expected a folder.*: give its folder"):
        FlexTokFromHub.from_pretrained(folder / "model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="neither a config.json nor a config in the header"):
        FlexTokFromHub.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="saved has no model.safetensors$"):
        FlexTokFromHub.from_pretrained(folder)


# Damaged files

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 3512\n"
NO_WEIGHTS = {
    b"": "it is empty",
    POINTER: "it is a pointer of Git LFS: run `git lfs pull`",
    b"<!DOCTYPE html><html>Sign in</html>": "it is a web page: download the file itself",
    b"These are the weights of July.": "copy or download it again",
}


def test_what_torch_save_wrote_is_read_and_nothing_in_it_is_run(tmp_path):
    path = tmp_path / "weights.pt"
    tree = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(1, dtype=torch.long), "more": [1, None, "text"]}
    torch.save(tree, path)
    assert same(load_pickled(path), tree)

    class Call:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"a": Call()}, path)
    with pytest.raises(CheckpointError, match="it holds posix.mkdir, expected tensors and plain values alone"):
        load_pickled(path)
    assert not (tmp_path / "ran").exists()


# Names and shapes of weights


def test_what_does_not_fit_is_counted_with_examples_and_the_model_is_untouched(model):
    state_dict = {key: value + 1 for key, value in model.state_dict().items()}
    keys = [key for key in state_dict if key.endswith("weight")]
    missing, misshaped = keys[:4], keys[4:9]
    for key in missing:
        del state_dict[key]
    state_dict.update({key: torch.zeros(7, 5) for key in misshaped})
    state_dict["decoder.extra.weight"] = torch.zeros(2)
    target = tiny_model(seed=1)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    message = (
        "the old run .* 4 tensors are missing, .* 1 tensors are not .* 5 tensors have other shapes, .* \\[7, 5\\] where"
    )
    with pytest.raises(CheckpointError, match=message):
        load_weights(target, state_dict, source="the old run")
    assert same(dict(target.state_dict()), before)


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


def without_vae(model):
    return {key: value for key, value in model.state_dict().items() if not key.startswith("vae.")}


def test_a_checkpoint_with_a_vae_round_trips_and_one_without_takes_the_vae_that_its_config_names(vae_folder, tmp_path):
    config = vae_config(str(vae_folder))
    model = FlexTokFromHub(config).eval()
    model.save_pretrained(tmp_path / "saved")
    loaded = FlexTokFromHub.from_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert same_weights(loaded, model) and saved.keys() == set(PARTS)
    assert loaded.config["vae"] == saved["vae"] == {**config["vae"], "scaling_factor": 0.5}
    assert config["vae"]["scaling_factor"] is None
    save_safetensors(without_vae(model), tmp_path / "model.safetensors", config)
    loaded = load_model_from_safetensors(tmp_path / "model.safetensors")
    assert same_weights(loaded, model)
    assert loaded.vae.scaling_factor == loaded.config["vae"]["scaling_factor"] == 0.5
    tensors = dict(model.state_dict())
    del tensors["vae.vae.quant_conv.bias"]  # a part of its weights is not enough
    with pytest.raises(CheckpointError, match=r": 1 tensors are missing, e\.g\. vae\.vae\.quant_conv\.bias \[8\]\. "):
        load_weights(model, tensors)


def test_a_vae_inside_the_checkpoint_is_used_and_its_hub_name_not_fetched(
    small_default_vae, tmp_path, hub_cache, offline, monkeypatch
):
    source = tmp_path / "vae"
    save_tiny_vae(source)
    (source / "diffusion_pytorch_model.safetensors").rename(tmp_path / "weights")
    hub_cache("some-lab/vae", source)  # its config.json alone: the architecture, and no weights to fetch
    (tmp_path / "weights").rename(source / "diffusion_pytorch_model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it could ask, and need not
    for hub_path, name in ((str(source), "some-lab/vae"), (None, "some-lab/vae-that-is-nowhere")):
        model = FlexTokFromHub(vae_config(hub_path))
        config = {**model.config, "vae": {**model.config["vae"], "hf_hub_path": name}}
        save_safetensors(model.state_dict(), tmp_path / "model.safetensors", config)
        loaded = load_model_from_safetensors(tmp_path / "model.safetensors")
        assert same_weights(loaded, model) and loaded.config == config and offline == []
