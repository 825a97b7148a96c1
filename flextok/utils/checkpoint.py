"""Weights in safetensors files, with the config of the model in the file's header or beside it."""

import ast
import json
import logging
import mmap
import os
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import ConfigError, check_tree, shown
from .errors import UserError
from .files import write_atomically
from .plain import parse_yaml

log = logging.getLogger(__name__)
PathLike = Union[str, os.PathLike]

MAX_METADATA = 1_000_000  # characters of one value in a safetensors header; a config has ten thousand
MAX_PARAMETERS = 10_000_000_000  # of a model; the largest published one has 1.4 billion, and 84 million in its VAE

# What torch.save writes for tensors and plain values. Others that weights_only allows take a size and make as many
# bytes of it (bytearray, torch.Tensor), or tensors without any.
_PICKLED = re.compile(
    r"collections (OrderedDict|Counter)|_codecs encode|(builtins|__builtin__) (set|complex)"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch\.nn\.parameter Parameter"
    r"|torch (\w+Storage|Size|device|bool|bfloat16|u?int\d+|float\d+\w*|complex\d+)"
)


class CheckpointError(UserError, RuntimeError):
    """Weights that cannot be read, or that do not fit the model."""


def clean_key(key: str) -> str:
    """A parameter's name without what gradient checkpointing and torch.compile wrappers insert."""
    return key.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def save_safetensors(
    state_dict: Dict[str, torch.Tensor], save_path: PathLike, metadata_dict: Optional[Dict[str, Any]] = None
) -> None:
    """Write a state dict, and `metadata_dict` (e.g. the config) into the header, each value as a Python literal.

    The file is written under a temporary name, flushed and renamed: a crash leaves the previous file.
    """
    metadata = {"format": "pt", **{key: repr(value) for key, value in (metadata_dict or {}).items()}}
    tensors = {clean_key(key): value.detach().cpu().contiguous() for key, value in state_dict.items()}

    def write(path: Path) -> None:
        save_file(tensors, path, metadata=metadata)
        umask = os.umask(0)
        os.umask(umask)
        path.chmod(0o666 & ~umask)  # safetensors makes files for their owner alone

    write_atomically(Path(save_path), write)


def parse_metadata(text: str) -> Any:
    """A value of a safetensors header: a Python, JSON or YAML literal, `None` for null; else the text itself."""
    if len(text) > MAX_METADATA:
        return text
    for parse in (ast.literal_eval, json.loads, parse_yaml):
        try:
            value = parse(text)
            check_tree(value)
            return _none_for_null(value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # ValueError: ConfigError too
            continue
    return text


def _none_for_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _none_for_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_none_for_null(item) for item in value]
    return None if value == "None" else value


def load_safetensors(
    safetensors_path: PathLike, return_metadata: bool = True
) -> Union[Dict[str, torch.Tensor], Tuple[Dict[str, torch.Tensor], Dict[str, Any]]]:
    """Read a safetensors file on the CPU: (tensors, metadata), or the tensors alone.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is truncated or not a safetensors file.
    """
    if not Path(safetensors_path).is_file():
        raise FileNotFoundError(f"there is no safetensors file at {safetensors_path}")
    try:
        with safe_open(safetensors_path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = {key: parse_metadata(value) for key, value in (file.metadata() or {}).items() if key != "format"}
    except (SafetensorError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError) as error:
        size = Path(safetensors_path).stat().st_size
        raise CheckpointError(
            f"{safetensors_path} ({size} bytes) cannot be read as safetensors: {error}. It may be truncated: copy or "
            "download it again"
        ) from error
    return (tensors, metadata) if return_metadata else tensors


def load_pickled(path: PathLike) -> Any:
    """What torch.save wrote, on the CPU: nothing in the file is run, nor can it take more memory than it has bytes.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is damaged, or holds other things than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path, size)
        else:  # of before PyTorch 1.6
            _check_pickles(path)
        value = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(value, size)
    except Exception as error:  # of unpickling a damaged file: of any kind
        raise CheckpointError(
            f"{path} ({size} bytes) is not a readable checkpoint: {type(error).__name__}: {error}"
        ) from error
    return value


def _check_archive(path: Path, size: int) -> None:
    """Raise ValueError for an archive that is larger unpacked than packed, or pickles other things than `_PICKLED`."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > size:
            raise ValueError("its parts are compressed or overlap, which torch.save does not do")
        for entry in entries:
            if entry.filename.lower().endswith(".pkl"):
                _check_pickle(archive.read(entry))


def _check_pickles(path: Path) -> None:
    """Raise ValueError unless a file begins with the five pickles of the older format, of no other things."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for _ in range(5):  # a magic number, the version, the system, the object, the keys of its storages
            _check_pickle(content)


def _check_pickle(content: Any) -> None:
    """Raise ValueError for a pickle (bytes, or a file at its start) that asks for other things than `_PICKLED`."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "STACK_GLOBAL" or (opcode.name in ("GLOBAL", "INST") and not _PICKLED.fullmatch(argument)):
            raise ValueError(f"it asks for {shown(argument)}, which is no part of a checkpoint")


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors in a tree of containers, each container visited once."""
    stack, seen = [tree], set()
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            stack.extend([*value.keys(), *value.values()] if isinstance(value, dict) else value)


def _check_tensors(tree: Any, size: int) -> None:
    """Raise ValueError for tensors that are larger than the memory they lie in, or that than the file's `size`."""
    storages = {}
    for tensor in _tensors(tree):
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise ValueError(f"it holds a tensor {list(tensor.shape)} that is sparse, quantised or without values")
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise ValueError(f"it holds a tensor {list(tensor.shape)} with only {storage.nbytes()} bytes of values")
    if sum(storages.values()) > size:
        raise ValueError("its tensors are larger than the file")


def check_weights(
    model: nn.Module, state_dict: Dict[str, torch.Tensor], source: str = "the checkpoint", fresh: Sequence[str] = ()
) -> Dict[str, torch.Tensor]:
    """The part of a state dict that is a model's to load, by the model's names; arguments and errors as load_weights.

    The model may be on the meta device: names and shapes alone are compared.
    """
    if not isinstance(state_dict, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state_dict.items()
    ):
        raise CheckpointError(f"{source} holds {shown(state_dict)} for weights, expected tensors by name")
    fresh_keys = tuple(f"{name}." for name in fresh)
    state_dict = {clean_key(key): value for key, value in state_dict.items()}
    state_dict = {key: value for key, value in state_dict.items() if not key.startswith(fresh_keys)}
    expected = model.state_dict()
    if "vae.logvar" not in expected:
        state_dict.pop("vae.logvar", None)  # plays no part in what the VAE computes
    without_vae = not any(key.startswith("vae.") for key in state_dict)
    kept = (*fresh_keys, "vae.") if without_vae else fresh_keys
    needed = [key for key in expected if not key.startswith(kept)]
    problems = [f"missing: {key} {list(expected[key].shape)}" for key in needed if key not in state_dict]
    problems += [f"unexpected: {key} {list(value.shape)}" for key, value in state_dict.items() if key not in expected]
    problems += [
        f"shape of {key}: {list(state_dict[key].shape)} given, {list(expected[key].shape)} expected"
        for key in needed
        if key in state_dict and state_dict[key].shape != expected[key].shape
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit the model, {len(problems)} problems:\n  " + "\n  ".join(problems))
    return state_dict


def load_weights(
    model: nn.Module, state_dict: Dict[str, torch.Tensor], source: str = "the checkpoint", fresh: Sequence[str] = ()
) -> None:
    """Copy a state dict into a FlexTok model; every key must fit. Modules named in `fresh` keep what they have.

    A state dict without any `vae.` key is one that was saved without its VAE: the model keeps the VAE that it has.

    Raises:
        CheckpointError: With all missing and unexpected keys and wrong shapes. The model is left as it was.
    """
    state_dict = check_weights(model, state_dict, source, fresh)
    model.load_state_dict(state_dict, strict=False)
    if (
        not any(key.startswith("vae.") for key in state_dict)
        and any(key.startswith("vae.") for key in model.state_dict())
        and getattr(model.vae, "hf_hub_path", None) is None
    ):
        log.warning(
            "%s holds no VAE weights and the config names none: give latents, not images, to this model", source
        )


def build_model(
    config: dict, state_dict: Dict[str, torch.Tensor], source: str = "the checkpoint", fresh: Sequence[str] = ()
) -> nn.Module:
    """The model of a config with the weights of a state dict, in evaluation mode on the CPU; `fresh` as load_weights.

    The VAE's own weights are fetched (config key `vae.hf_hub_path`) only if the state dict does not hold them. Before
    anything of the config's sizes is allocated, the model is built without memory and compared with the state dict.

    Raises:
        ConfigError: The config cannot be built, or has more than MAX_PARAMETERS parameters.
        CheckpointError: As load_weights.
    """
    from ..flextok_wrapper import FlexTokFromHub, flat_config

    config = flat_config(config)
    vae, unloaded = config["vae"], config["vae"]
    if str(vae.get("_target_")).endswith(".StableDiffusionVAE"):
        unloaded = {**vae, "load_weights": False}
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        skeleton = FlexTokFromHub({**config, "vae": unloaded})
    n_parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    if n_parameters > MAX_PARAMETERS:
        raise ConfigError(f"{source}: the config asks for {n_parameters} parameters, more than {MAX_PARAMETERS}")
    check_weights(skeleton, state_dict, source, fresh)
    has_vae = any(clean_key(key).startswith("vae.vae.") for key in state_dict)
    model = FlexTokFromHub({**config, "vae": unloaded if has_vae else vae})
    model.config["vae"].pop("load_weights", None)
    load_weights(model, state_dict, source, fresh)
    return model.eval()


def load_model_from_safetensors(safetensors_path: PathLike, device: Optional[str] = None) -> nn.Module:
    """Load a single-file FlexTok checkpoint, whose header holds the config; the model comes in evaluation mode.

    Raises:
        FileNotFoundError, CheckpointError: As load_safetensors, or weights and config do not fit each other.
        ConfigError: The config in the header cannot be built.
    """
    tensors, config = load_safetensors(safetensors_path)
    if not config:
        raise CheckpointError(
            f"{safetensors_path} has no config in its header: load it with its config.json, by "
            "FlexTokFromHub.from_pretrained(folder)"
        )
    return build_model(config, tensors, str(safetensors_path)).to(device or "cpu")
