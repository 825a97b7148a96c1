"""Hostile configs and checkpoints: only documented errors, nothing run or imported, little memory for small files."""

import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from helpers import tiny_config, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_runs import make_trainer
from tiny_runs import settings as run_settings

from flextok import FlexTokFromHub
from flextok.training.checkpoints import find_checkpoint, read_checkpoint
from flextok.training.config import TrainConfig, load_config, parse_yaml
from flextok.training.export import load_trained_model
from flextok.training.models import known_model_config, load_model
from flextok.utils.checkpoint import (
    CheckpointError,
    build_model,
    load_model_from_safetensors,
    load_safetensors,
    parse_metadata,
)
from flextok.utils.config import ALLOWED_TARGETS, MAX_MODULES, MAX_VALUES, ConfigError, instantiate, shown

DOCUMENTED = (ConfigError, CheckpointError, FileNotFoundError)
FIXED = settings(
    deadline=None, derandomize=True, max_examples=150, database=None, suppress_health_check=list(HealthCheck)
)

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


ALLOWED_IMPORTS = {"hypothesis", "torch", "diffusers", "safetensors", "encodings", "huggingface_hub", "numpy", "yaml"}


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
    st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from([*WORDS, *sorted(ALLOWED_TARGETS)])
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
                node[key] = draw(st.one_of(TREES, NUMBERS, st.sampled_from(sorted(ALLOWED_TARGETS))))
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
    ["[", "]", "{", "}", ": ", "- ", "\n", "  ", "&a ", "*a", "<<", "? ", "!!", "!!python/object/apply:os.system ",
     "'", '"', "#", "|", ">", "---\n", "...", "%YAML 1.2\n", "1e400", "0x", "1_000", ".nan", ".inf", "2026-99-99",
     "2026-01-01", "12:30:45", "!!int ", "!!float ", "!!bool ", "!!timestamp ", "!!map ", "!!set ", "!!omap ",
     "!!binary ", "\0", "\x85", "batch_size", "model", "img_size", "9" * 5000, "=", "~", ","]
)  # fmt: skip


@settings(FIXED, max_examples=600)
@given(st.lists(st.one_of(YAML_PIECES, st.text(max_size=4)), max_size=12).map("".join))
def test_any_yaml_is_read_or_refused(text):
    if not ends_in_documented_error(parse_yaml, text):
        ends_in_documented_error(TrainConfig.from_dict, parse_yaml(text))
    parse_metadata(text)


@FIXED
@given(st.binary(max_size=60))
def test_any_bytes_in_a_config_file_are_read_or_refused(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    ends_in_documented_error(load_config, file)


def alias_bomb(wrap="[{}]", levels=9, width=9):
    lines = ["a0: &a0 [" + ",".join(["lol"] * width) + "]"]
    lines += [f"a{i}: &a{i} [" + ",".join([f"*a{i - 1}"] * width) + "]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


def merge_bomb(levels=30, width=9):
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [" + ",".join([f"*a{i - 1}"] * width) + "]}" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "nested too deeply"),
        ("{a: " * 5000, "nested too deeply"),
        ("- " * 5000, "nested too deeply"),
        ("a: " + "[" * 40 + "]" * 40, "nested deeper than 32"),
        (alias_bomb(), f"more than {MAX_VALUES} values"),
        ("&a [*a]", "nested deeper"),
        ("a: &a {b: *a}", "nested deeper"),
        ("a: &t " + "x" * 1_000_000 + "\nb: [" + ",".join(["*t"] * 1000) + "]", "characters"),
        (merge_bomb(), "line 2: `<<` merges nothing"),
        ("batch_size: 1\nbatch_size: 2", "line 2: 'batch_size' is given twice"),
        ("? [1]\n: 2", "unhashable"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: 0x" + "f" * 6000, "24000 bits"),
        ("a: 2026-99-99", "not valid YAML"),
        ("a: !!bool 7", "not valid YAML"),
        ("a: !!timestamp 7", "not valid YAML"),
        ("a: !!int ''", "not valid YAML"),
        ("a: !!map [1, 2]", "not valid YAML"),
        ("a: !!python/object/apply:os.system [true]", "not valid YAML"),
        ("a: !!python/name:os.system", "not valid YAML"),
        ("a: \0", "not valid YAML"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_hostile_yaml_is_refused_with_what_is_wrong(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse_yaml(text)
    assert len(str(error.value)) < 3000
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="config.yaml"):
        load_config(tmp_path / "config.yaml")
    assert find_checkpoint("latest", None, tmp_path, "run", True) is None


def test_an_alias_that_is_no_bomb_is_read():
    assert parse_yaml("a: &s [1, 2]\nb: *s\nc: 2026-01-02\nd: .nan\n")["b"] == [1, 2]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"batch_size": 16**6000}, "batch_size: a whole number of 24001 bits"),
        ({"learning_rate": 10**400}, "learning_rate: a whole number of 1329 bits"),
        ({"learning_rate": float("inf")}, "finite"),
        ({"wandb_tags": [["x" * 10**6] * 9] * 9}, "wandb_tags: more than 100000 values or 10000000 characters"),
        ({"x" * 10**6: 1}, "unknown setting"),
        ({16**6000: 1}, "unknown setting"),
        ({str(i): 1 for i in range(10_000)}, "and 9980 more"),
    ],
    ids=["int", "float", "inf", "long", "long key", "int key", "many keys"],
)
def test_messages_about_enormous_settings_are_short(values, message):
    with pytest.raises(ConfigError, match=message) as error:
        TrainConfig.from_dict(values)
    assert len(str(error.value)) < 10_000


def test_a_bomb_is_shown_in_a_few_words():
    bomb = ["x"] * 9
    for _ in range(30):
        bomb = [bomb] * 9
    assert len(shown(bomb)) < 50_000 and shown(16**6000) == "a int that is too long to show"


# Model configs of enormous sizes


TRANSFORMER = ("decoder", "module_dict", "dec_transformer")
HUGE = {
    "dim": (*TRANSFORMER, "dim", 10**9),
    "dim of 16 GB": (*TRANSFORMER, "dim", 64 * 1024),
    "depth": (*TRANSFORMER, "depth", 10**9),
    "heads": (*TRANSFORMER, "head_dim", 0),
    "mlp": (*TRANSFORMER, "mlp_ratio", float("inf")),
    "registers": ("encoder", "module_dict", "enc_register_module", "n_max", 10**9),
    "positions": ("encoder", "module_dict", "enc_posemb_module", "max_sizes", [10**6, 10**6]),
    "many positions": ("encoder", "module_dict", "enc_posemb_module", "max_sizes", [10**4, 10**4]),
    "levels": ("regularizer", "levels", [10**9] * 3),
    "many levels": ("regularizer", "levels", [2] * 50_000),
    "patches": ("encoder", "module_dict", "enc_patch_emb", "patch_sizes", [2**31, 2**31]),
    "modules": ("encoder", "module_dict", {f"m{i}": {} for i in range(10**5)}),
}


@pytest.mark.parametrize("change", HUGE.values(), ids=HUGE.keys())
def test_enormous_sizes_in_a_config_end_in_an_error(tmp_path, change):
    config = tiny_config()
    *parents, key, value = change
    node = config
    for parent in parents:
        node = node[parent]
    node[key] = value
    with pytest.raises(DOCUMENTED):
        build_model(config, STATE)
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DOCUMENTED):
        FlexTokFromHub.from_pretrained(tmp_path)
    with pytest.raises(DOCUMENTED):
        load_model(TrainConfig.from_dict(run_settings(model=None, model_name=str(tmp_path))))


@pytest.mark.parametrize("name", ["dim of 16 GB", "registers", "many positions"])
def test_sizes_are_compared_with_the_weights_before_anything_is_allocated(name):
    config = tiny_config()
    *parents, key, value = HUGE[name]
    node = config
    for parent in parents:
        node = node[parent]
    node[key] = value
    with pytest.raises(DOCUMENTED, match="does not fit the model|asks for [0-9]+ parameters"):
        build_model(config, STATE)


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


def test_factories_within_factories_cannot_build_without_end():
    layer = None
    for _ in range(10):  # the activation of each block would be a transformer of a thousand blocks, and so on
        layer = {
            "_target_": "flextok.model.trunks.transformers.FlexTransformer", "_partial_": True, "dim": 64,
            "depth": 1000, "input_seq_read_key": "x", "output_seq_write_key": "x",
            **({"act_layer": layer} if layer else {}),
        }  # fmt: skip
    with torch.device("meta"), pytest.raises(ConfigError, match=f"more than {MAX_MODULES} modules"):
        instantiate({**layer, "_partial_": False})


def test_the_random_state_does_not_notice_that_a_model_is_checked_first():
    config, levels = tiny_config(), [4, 4]
    torch.manual_seed(0)
    expected = FlexTokFromHub(config).state_dict()
    torch.manual_seed(0)
    built = build_model(config, STATE, fresh=["encoder", "decoder"]).state_dict()
    assert levels and all(torch.equal(built[key], expected[key]) for key in expected)


# Weights

STATE = tiny_model().state_dict()
TINY = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(1, dtype=torch.long)}


def safetensors_bytes(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def tensor_header(**changes):
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 99_000_000) + b"{}",
        safetensors_bytes(b"[" * 100_000),
        safetensors_bytes(b"null"),
        safetensors_bytes([]),
        safetensors_bytes(b"\xff\xfe{}"),
        safetensors_bytes({"__metadata__": 3}),
        safetensors_bytes({"__metadata__": {"encoder": {}}}),
        safetensors_bytes(tensor_header(shape=[2**40, 2**40]), bytes(8)),
        safetensors_bytes(tensor_header(shape=[10**10]), bytes(8)),
        safetensors_bytes(tensor_header(shape=[-1]), bytes(8)),
        safetensors_bytes(tensor_header(dtype="F4096"), bytes(8)),
        safetensors_bytes(tensor_header(data_offsets=[0, 2**60]), bytes(8)),
        safetensors_bytes(tensor_header(data_offsets=[8, 0]), bytes(8)),
        safetensors_bytes({**tensor_header(), "b": tensor_header()["a"]}, bytes(8)),
    ],
)  # fmt: skip
def test_hostile_safetensors_headers_are_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    for load in (load_safetensors, load_model_from_safetensors):
        with pytest.raises(CheckpointError, match="model.safetensors"):
            load(tmp_path / "model.safetensors")
    with pytest.raises(DOCUMENTED):
        known_model_config(TrainConfig(model_name=str(tmp_path / "model.safetensors")))


DTYPES = ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "C64", "U64", "X"]


@FIXED
@given(st.sampled_from(DTYPES), st.lists(NUMBERS | st.integers(0, 4), max_size=3), st.lists(NUMBERS, max_size=3))
def test_any_safetensors_header_is_read_or_refused(tmp_path_factory, dtype, shape, offsets):
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    for changes in (dict(dtype=dtype, shape=shape, data_offsets=offsets), dict(dtype=dtype, shape=shape)):
        file.write_bytes(safetensors_bytes(finite(tensor_header(**changes)), bytes(8)))
        ends_in_documented_error(load_model_from_safetensors, file)


def finite(tree):
    """A tree without numbers that JSON's writer refuses."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [finite(value) for value in tree]
    return 0 if isinstance(tree, int) and tree.bit_length() > 4000 else tree


@pytest.mark.parametrize("parts", ["config", "each"])
@pytest.mark.parametrize(
    "text",
    ["{" * 500, "[" * 500, "-" * 100_000 + "1", "{[]: 1}", "{1: {[]: 2}}", "9" * 6000, "0x" + "f" * 6000,
     alias_bomb(), merge_bomb(), "&a {b: *a}", "[1]", "null", "2026-99-99", "{'_target_': 'os.system'}", "(" * 500,
     "1+" * 50_000 + "1"],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_hostile_configs_in_a_header_are_refused(tmp_path, text, parts):
    names = ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline")
    header = {"config": text} if parts == "config" else dict.fromkeys(names, text)
    save_file(STATE, tmp_path / "model.safetensors", metadata=header)
    with pytest.raises(ConfigError):
        load_model_from_safetensors(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError):
        FlexTokFromHub.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"3", b'"text"', b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000,
     b'{"vae": ' + b"9" * 5000 + b"}", b'{"config": {"config": 1}}', b"{", b'{"vae": NaN}',
     b'{"vae": {"_target_": "os.system", "command": "true"}}'],
    ids=lambda content: repr(content[:10]),
)  # fmt: skip
def test_a_hostile_config_json_is_refused_by_every_way_of_loading(tmp_path, content):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(content)
    config = TrainConfig.from_dict(run_settings(model=None, model_name=str(tmp_path)))
    for load in (FlexTokFromHub.from_pretrained, lambda _: known_model_config(config), lambda _: load_model(config)):
        with pytest.raises(ConfigError):
            load(tmp_path)


# Checkpoints of the trainer


def saved(tmp_path, value, **options):
    torch.save(value, tmp_path / "latest.pt", **options)
    return tmp_path / "latest.pt"


def refused(path, message):
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def repacked(path, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    """The archive that torch.save wrote, with its parts changed."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(name, change(name.rpartition("/")[2], data))
    return path


def with_pickle(tmp_path, data):
    path = saved(tmp_path, {"model_state_dict": TINY})
    return repacked(path, lambda name, old: data if name == "data.pkl" else old)


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    path = repacked(saved(tmp_path, {"model_state_dict": {"a": torch.zeros(2**24)}}), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    refused(path, "compressed or overlap")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**6, 10**6),
        torch.zeros(100)[:1].expand(10**9),
        torch.zeros(100).as_strided((50, 9), (1, 5)).expand(10**6, 50, 9),
        torch.empty(10**6, 10**6, device="meta"),
        torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (10**6, 10**6)),
    ],
    ids=["stride 0", "row", "strided", "meta", "sparse"],
)
def test_small_files_of_enormous_tensors_are_refused(tmp_path, tensor):
    path = saved(tmp_path, {"model_state_dict": {"a": tensor}})
    assert path.stat().st_size < 100_000
    refused(path, "not a readable checkpoint")


def test_a_tensor_beyond_its_record_is_refused(tmp_path):
    path = saved(tmp_path, {"model_state_dict": {"a": torch.zeros(200, dtype=torch.uint8)}})
    grown = repacked(
        path, lambda name, data: data.replace(b"K\xc8", b"J\xff\xff\xff\x7f") if name == "data.pkl" else data
    )
    refused(grown, "not a readable checkpoint")


class Reduced:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "value",
    [
        Reduced(os.mkdir, ("ran",)),
        Reduced(eval, ("open('ran', 'w')",)),
        Reduced(bytearray, (10**12,)),
        Reduced(torch.Tensor, (10**5, 10**5)),
        Reduced(torch.storage.UntypedStorage, (10**12,)),
        Reduced(pytest.importorskip, ("this",)),
    ],
    ids=["mkdir", "eval", "bytearray", "Tensor", "UntypedStorage", "foreign"],
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickles_that_call_something_are_refused(tmp_path, monkeypatch, value, legacy):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path, {"model_state_dict": value}, _use_new_zipfile_serialization=not legacy)
    refused(path, "not a readable checkpoint")
    path.write_bytes(pickle.dumps({"model_state_dict": value}))
    refused(path, "not a readable checkpoint")
    assert not (tmp_path / "ran").exists()


def peak_of_reading(path):
    """Peak resident size in bytes that reading a checkpoint adds to a fresh process, and the error."""
    code = (
        "import resource, sys; from pathlib import Path; from flextok.utils.checkpoint import load_pickled\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak()\ntry:\n    load_pickled(Path(sys.argv[1]))\n    error = 'none'\n"
        "except Exception as e:\n    error = type(e).__name__\nprint(peak() - before, error)"
    )
    root = Path(__file__).parent.parent
    output = subprocess.run([sys.executable, "-c", code, path], cwd=root, capture_output=True, text=True, check=True)
    size, error = output.stdout.split()
    return int(size), error


@pytest.mark.parametrize("form", ["bare pickle", "legacy", "PKL"])
def test_small_files_that_ask_for_much_memory_are_refused_before_they_get_it(tmp_path, form):
    value = pickle.dumps(Reduced(bytearray, (1_000_000_000,)), protocol=2)
    path = tmp_path / "latest.pt"
    if form == "bare pickle":
        path.write_bytes(value)
    elif form == "legacy":
        saved(
            tmp_path, {"model_state_dict": Reduced(bytearray, (1_000_000_000,))}, _use_new_zipfile_serialization=False
        )
    else:
        saved(tmp_path, {"model_state_dict": TINY})
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in parts.items():
                is_pickle = name.endswith("data.pkl")
                archive.writestr(name.replace("data.pkl", "data.PKL"), value if is_pickle else data)
    assert path.stat().st_size < 10_000
    size, error = peak_of_reading(path)
    assert error == "CheckpointError" and size < 200e6


def test_weights_of_the_older_format_are_read(tmp_path):
    path = saved(tmp_path, {"model_state_dict": TINY}, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert all(torch.equal(value, TINY[key]) for key, value in read_checkpoint(path)["model_state_dict"].items())


def test_containers_that_hold_themselves_are_read_in_passing(tmp_path):
    bomb = [torch.zeros(1)]
    for _ in range(100):
        bomb = [bomb] * 9
    path = saved(tmp_path, {"model_state_dict": TINY, "model_config": bomb})
    assert read_checkpoint(path)["model_state_dict"].keys() == TINY.keys()
    with pytest.raises(ConfigError):
        load_trained_model(path)
    with pytest.raises(ConfigError, match="more than|deeper"):
        load_trained_model(
            saved(tmp_path, {"model_state_dict": TINY, "model_config": {**tiny_config(), "vae": {"a": bomb}}})
        )


def pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


PICKLE = pickled({"model_state_dict": TINY, "global_step": 3})


@settings(FIXED, max_examples=400)
@given(st.lists(st.tuples(st.integers(0, len(PICKLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_change_of_a_pickle_is_read_or_refused(tmp_path_factory, changes):
    data = bytearray(PICKLE)
    for place, byte in changes:
        data[place] = byte
    ends_in_documented_error(read_checkpoint, with_pickle(tmp_path_factory.getbasetemp(), bytes(data)))


@FIXED
@given(
    st.integers(0, 3),
    st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=3),
    st.floats(0, 1),
)
def test_any_change_of_a_file_is_read_or_refused(tmp_path_factory, kind, changes, kept):
    folder = tmp_path_factory.getbasetemp()
    path, load = folder / "any.pt", read_checkpoint
    if kind == 3:
        path, load = folder / "model.safetensors", load_model_from_safetensors
        save_file(TINY, path, metadata={"encoder": "{}"})
    else:
        torch.save({"model_state_dict": TINY}, path, _use_new_zipfile_serialization=kind > 0)
    data = bytearray(path.read_bytes())
    for place, piece in changes:
        start = int(place * len(data))
        data[start : start + len(piece)] = piece
    path.write_bytes(bytes(data[: int(len(data) * kept)] if kind == 2 else data))
    ends_in_documented_error(load, path)


@FIXED
@given(st.one_of(TREES, st.dictionaries(st.sampled_from(["model_state_dict", "model_config"]), TREES, max_size=2)))
def test_any_value_in_a_checkpoint_is_read_or_refused(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.pt"
    torch.save(value, path)
    ends_in_documented_error(load_trained_model, path)


@pytest.fixture(scope="module")
def trainer_and_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder, use_repa=False, use_ema=True)
    trainer.train(max_steps=1)
    return trainer, torch.load(folder / "checkpoints" / "latest.pt", weights_only=True)


def test_fields_of_a_checkpoint_of_other_types_are_refused(trainer_and_checkpoint, tmp_path):
    trainer, checkpoint = trainer_and_checkpoint
    optional = ("epoch", "step_in_epoch", "model_config", "repa_layers", "wandb_id")
    optional += ("global_batch_size", "nonfinite_steps", "validation_due")  # newer than the first checkpoints
    optional += ("readout_state_dict", "start_tokens")
    needed = [key for key in checkpoint if key not in optional]
    assert len(needed) == 12
    for key in needed:
        without = {name: value for name, value in checkpoint.items() if name != key}
        for changed in (without, {**checkpoint, key: "text"}, {**checkpoint, key: [1]}, {**checkpoint, key: -1}):
            if key == "best_val_loss" and changed.get(key) == -1:
                continue
            with pytest.raises(CheckpointError, match=key):
                trainer.load_checkpoint(saved(tmp_path, changed))
    trainer.load_checkpoint(saved(tmp_path, checkpoint))


@pytest.mark.parametrize(
    "place, value",
    [
        (("optimizer_state_dict", "state", 0, "exp_avg"), torch.zeros(3)),
        (("optimizer_state_dict", "state", 0, "exp_avg"), "text"),
        (("optimizer_state_dict", "state"), [1]),
        (("optimizer_state_dict", "param_groups"), 3),
        (("optimizer_state_dict", "param_groups", 0, "params"), [0]),
        (("scheduler_state_dict", "last_epoch"), "text"),
        (("scheduler_state_dict", "last_epoch"), None),
        (("ema_model_state_dict",), {"a": torch.zeros(1)}),
        (("ema_model_state_dict", "decoder.module_dict.dec_to_patches.proj.weight"), torch.zeros(1)),
        (("model_state_dict", 3), torch.zeros(1)),
        (("model_state_dict", "vae.more"), "text"),
        (("random_state",), torch.zeros(3)),
        (("random_state",), torch.zeros(3, dtype=torch.uint8)),
        (("global_step",), 10**400),
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


def test_nothing_in_a_model_or_data_folder_is_run(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    trap = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    model = tiny_model()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (32, 32), (i, i, i)).save(images / f"{i}.png")
    for place in (folder, tmp_path / "data", images):
        for name in (
            "hubconf.py",
            "setup.py",
            "__init__.py",
            "conftest.py",
            "flextok.py",
            "modeling.py",
            "sitecustomize.py",
        ):
            (place / name).write_text(trap)
        bomb = pickle.dumps(Reduced(exec, (trap,)))
        for name in ("pytorch_model.bin", "model.pt", "data.pkl", "x.npy"):
            (place / name).write_bytes(bomb)
    (images / "9.jpg").write_bytes(bomb)
    loaded = FlexTokFromHub.from_pretrained(folder)
    assert loaded.config == model.config
    config = TrainConfig.from_dict(
        run_settings(model=None, model_name=str(folder), dataset_name="folder", data_path=str(tmp_path / "data"),
                     val_fraction=0.0, use_repa=False)
    )  # fmt: skip
    from flextok.data.loader import build_datasets

    dataset, _ = build_datasets(config)
    assert len(dataset) == 5 and dataset[4]["broken"] == (str(images / "9.jpg"),)
    load_model(config)
    (folder / "model.safetensors").write_bytes(bomb)
    with pytest.raises(CheckpointError):
        load_model(config)
    (folder / "config.json").write_text(
        json.dumps({**model.config, "vae": {"_target_": "os.system", "command": "touch ran"}})
    )
    with pytest.raises(ConfigError, match="'os.system' is not allowed"):
        FlexTokFromHub(known_model_config(config))
    (folder / "config.yaml").write_text(
        yaml.dump({"a": 1}).replace("1", "!!python/object/apply:os.system ['touch ran']")
    )
    with pytest.raises(ConfigError):
        load_config(folder / "config.yaml")
    assert not (tmp_path / "ran").exists()
