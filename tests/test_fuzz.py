"""Hostile configs and checkpoints: only documented errors, nothing run or imported, little memory for small files."""

import json
import os
import pickle
import resource
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_config, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from tiny_runs import make_trainer
from tiny_runs import settings as run_settings

from flextok import FlexTokFromHub
from flextok.data.sources import build_datasets
from flextok.flextok_wrapper import build_model, load_model_from_safetensors
from flextok.training.checkpoints import REQUIRED
from flextok.training.config import TrainConfig, load_config
from flextok.training.models import known_model_config, load_model
from flextok.utils.checkpoint import CheckpointError, parse_metadata
from flextok.utils.config import ALLOWED_TARGETS, ConfigError, instantiate
from flextok.utils.plain import parse_yaml

DOCUMENTED = (ConfigError, CheckpointError, FileNotFoundError)
FIXED = settings(
    deadline=None, derandomize=True, max_examples=100, database=None, suppress_health_check=list(HealthCheck)
)

ALLOWED_IMPORTS = {"hypothesis", "torch", "diffusers", "safetensors", "encodings", "huggingface_hub", "numpy", "yaml"}

# Memory that loading may take beyond what the process has: far below what the small files here ask for.
HEADROOM = 4 << 30


@pytest.fixture(autouse=True)
def bounded(tmp_path, monkeypatch):
    """Little memory; no import that was not there before, but of this package; and `os.system` is a trap."""
    from diffusers import AutoencoderKL  # noqa: F401  what loading imports by itself

    FlexTokFromHub(tiny_config())
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(f"os.system({command!r}) was called"))
    before, limits = set(sys.modules), resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + HEADROOM, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    added = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert added <= {"flextok", *ALLOWED_IMPORTS}, added


def ends_in_documented_error(action, *arguments):
    """Whether `action` raised; any error that is not documented goes on."""
    try:
        action(*arguments)
    except DOCUMENTED as error:
        assert len(str(error)) < 100_000
        return True
    return False


# Trees of any kind, with the words that mean something in a config among them.

WORDS = ["_target_", "_partial_", "path", "dim", "depth", "levels", "max_sizes", "module_dict", "config", "encoder",
         "model", "batch_size", "os.system", "hydra.utils.get_method", "builtins.eval"]  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([10**6, 10**9, 2**31, 2**63, 2**64, -(10**9), 10**400, 10**4000]),
    st.floats(),
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([*WORDS, *sorted(ALLOWED_TARGETS)]),
)
KEYS = st.one_of(st.sampled_from(WORDS), st.text(max_size=5), st.integers(0, 9))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)


def paths_of(tree, path=()):
    """The places of all values in a tree of dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths_of(value, (*path, key))


PLACES = list(paths_of(tiny_config()))


@st.composite
def damaged_configs(draw):
    """The config of a small model with one to three of its values replaced or taken out."""
    config = tiny_config()
    for _ in range(draw(st.integers(1, 3))):
        *parents, key = draw(st.sampled_from(PLACES))
        node = config
        try:
            for parent in parents:
                node = node[parent]
            if draw(st.booleans()):
                node[key] = draw(TREES)
            else:
                del node[key]
        except (KeyError, IndexError, TypeError):  # gone already
            continue
    return config


# Configs


@FIXED
@given(TREES)
def test_any_tree_is_built_or_refused(tree):
    ends_in_documented_error(instantiate, tree)
    ends_in_documented_error(instantiate, {"_target_": tree})


@FIXED
@given(damaged_configs())
def test_damaged_model_configs_are_built_or_refused_before_anything_large_is_allocated(config):
    ends_in_documented_error(build_model, config, STATE)


@FIXED
@given(st.one_of(TREES, st.dictionaries(st.sampled_from(sorted(TrainConfig().to_dict())), TREES, max_size=3)))
def test_any_settings_are_taken_or_refused(values):
    ends_in_documented_error(TrainConfig.from_dict, values)


YAML_PIECES = st.sampled_from(
    ["[", "]", "{", "}", ": ", "- ", "\n", "  ", "&a ", "*a", "? ", "'", '"', "#", "|", ">", "---\n", "...", "1e400",
     "0x", "1_000", ".nan", ".inf", "2026-99-99", "2026-01-01", "12:30:45", "\0", "\x85", "batch_size", "model",
     "img_size", "=", "~", ","]
)  # fmt: skip


@FIXED
@given(st.lists(st.one_of(YAML_PIECES, st.text(max_size=4)), max_size=12).map("".join))
def test_any_yaml_is_read_or_refused(text):
    if not ends_in_documented_error(parse_yaml, text):
        ends_in_documented_error(TrainConfig.from_dict, parse_yaml(text))
    parse_metadata(text)


# Model configs of enormous sizes


TRANSFORMER = ("decoder", "module_dict", "dec_transformer")
HUGE = {
    "dim": (*TRANSFORMER, "dim", 10**9),
    "dim of 16 GB": (*TRANSFORMER, "dim", 64 * 1024),
    "registers": ("encoder", "module_dict", "enc_register_module", "n_max", 10**9),
    "positions": ("encoder", "module_dict", "enc_posemb_module", "max_sizes", [10**6, 10**6]),
    "levels": ("regularizer", "levels", [10**9] * 3),
}


@pytest.mark.parametrize("name, change", HUGE.items(), ids=HUGE.keys())
def test_enormous_sizes_in_a_config_end_in_an_error(tmp_path, name, change):
    """Where they could be allocated, they are compared with the weights before."""
    config, message = tiny_config(), "does not fit the model" if name in ("dim of 16 GB", "registers") else "."
    *parents, key, value = change
    node = config
    for parent in parents:
        node = node[parent]
    node[key] = value
    with pytest.raises(DOCUMENTED, match=message):
        build_model(config, STATE)
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DOCUMENTED):
        FlexTokFromHub.from_pretrained(tmp_path)
    with pytest.raises(DOCUMENTED):
        load_model(TrainConfig.from_dict(run_settings(model=None, model_name=str(tmp_path))))


@pytest.mark.parametrize(
    "part, value, message",
    [
        ("pipeline", tiny_config()["regularizer"], "pipeline: no sampler can be made of it"),
        ("encoder", {"a": 1}, "encoder is a dict, expected a module"),
        ("vae", {**tiny_config()["pipeline"]}, "vae is a .*, expected a module"),
    ],
)
def test_parts_of_another_kind_are_refused_by_name(part, value, message):
    with pytest.raises(ConfigError, match=message):
        build_model({**tiny_config(), part: value}, STATE)


# Weights

STATE = tiny_model().state_dict()


@pytest.mark.parametrize("parts", ["config", "each"])
@pytest.mark.parametrize("text", ["[1]", "{'_target_': 'os.system'}", "(" * 500])
def test_a_header_that_holds_no_config_is_refused(tmp_path, text, parts):
    names = ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline")
    header = {"config": text} if parts == "config" else dict.fromkeys(names, text)
    save_file(STATE, tmp_path / "model.safetensors", metadata=header)
    for load in (lambda: load_model_from_safetensors(tmp_path / "model.safetensors"),
                 lambda: FlexTokFromHub.from_pretrained(tmp_path)):  # fmt: skip
        with pytest.raises(ConfigError):
            load()


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"{", b'{"config": {"config": 1}}', b'{"vae": NaN}'])
def test_a_config_json_that_holds_no_config_is_refused_by_every_way_of_loading(tmp_path, content):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(content)
    config = TrainConfig.from_dict(run_settings(model=None, model_name=str(tmp_path)))
    for load in (FlexTokFromHub.from_pretrained, lambda _: known_model_config(config), lambda _: load_model(config)):
        with pytest.raises(ConfigError):
            load(tmp_path)


# Checkpoints of the trainer


def saved(tmp_path, value):
    torch.save(value, tmp_path / "latest.pt")
    return tmp_path / "latest.pt"


@pytest.fixture(scope="module")
def trainer_and_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder, use_repa=False, use_ema=True)
    trainer.train(max_steps=1)
    return trainer, torch.load(folder / "checkpoints" / "latest.pt", weights_only=True)


def test_a_checkpoint_that_lacks_something_or_holds_another_type_is_refused(trainer_and_checkpoint, tmp_path):
    trainer, checkpoint = trainer_and_checkpoint
    for key in REQUIRED:
        without = {name: value for name, value in checkpoint.items() if name != key}
        with pytest.raises(CheckpointError, match=key):
            trainer.load_checkpoint(saved(tmp_path, without))
        if key not in ("best_val_loss", "scaler_state_dict"):  # not looked at here
            with pytest.raises(CheckpointError, match="latest.pt"):
                trainer.load_checkpoint(saved(tmp_path, {**checkpoint, key: "text"}))
    trainer.load_checkpoint(saved(tmp_path, checkpoint))


@pytest.mark.parametrize(
    "place, value",
    [
        (("optimizer_state_dict", "state", 0, "exp_avg"), torch.zeros(3)),
        (("optimizer_state_dict", "state", 0, "exp_avg"), "text"),
        (("optimizer_state_dict", "param_groups", 0, "params"), [0]),
        (("scheduler_state_dict", "last_epoch"), "text"),
        (("ema_model_state_dict", "decoder.module_dict.dec_to_patches.proj.weight"), torch.zeros(1)),
        (("model_state_dict", "vae.more"), "text"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_values_in_a_checkpoint_that_do_not_fit_are_refused(trainer_and_checkpoint, tmp_path, place, value):
    trainer, checkpoint = trainer_and_checkpoint
    path = saved(tmp_path, checkpoint)
    changed = torch.load(path, weights_only=True)
    node = changed
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    with pytest.raises(CheckpointError, match="latest.pt"):
        trainer.load_checkpoint(saved(tmp_path, changed))


# Nothing in a folder of data or weights is run


def test_nothing_in_a_model_or_data_folder_is_run(tmp_path):
    trap = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"

    class Trap:
        def __reduce__(self):
            return exec, (trap,)

    model, folder, images = tiny_model(), tmp_path / "model", tmp_path / "data" / "images"
    model.save_pretrained(folder)
    images.mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (32, 32), (i, i, i)).save(images / f"{i}.png")
    for place in (folder, tmp_path / "data", images):
        for name in ("hubconf.py", "__init__.py", "conftest.py", "flextok.py", "modeling.py", "sitecustomize.py"):
            (place / name).write_text(trap)
        for name in ("pytorch_model.bin", "model.pt", "data.pkl", "x.npy"):
            (place / name).write_bytes(pickle.dumps(Trap()))
    (images / "9.jpg").write_bytes(pickle.dumps(Trap()))
    assert FlexTokFromHub.from_pretrained(folder).config == model.config
    config = TrainConfig.from_dict(
        run_settings(model=None, model_name=str(folder), dataset_name="folder", data_path=str(tmp_path / "data"),
                     val_fraction=0.0, use_repa=False)
    )  # fmt: skip
    dataset, _ = build_datasets(config)
    assert len(dataset) == 5 and dataset[4]["index"] == 0
    load_model(config)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError):
        load_model(config)
    (folder / "config.yaml").write_text(f"a: !!python/object/apply:os.system ['touch {tmp_path}/ran']")
    with pytest.raises(ConfigError):
        load_config(folder / "config.yaml")
    assert not (tmp_path / "ran").exists()
