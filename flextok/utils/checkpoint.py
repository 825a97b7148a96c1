"""Weights in safetensors files, with the config of the model in the file's header or beside it."""

import ast
import json
import logging
import os
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import UserError
from .files import write_atomically

log = logging.getLogger(__name__)
PathLike = Union[str, os.PathLike]


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
    for parse in (ast.literal_eval, json.loads, yaml.safe_load):
        try:
            return _none_for_null(parse(text))
        except (ValueError, SyntaxError, RecursionError, MemoryError, yaml.YAMLError):
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
    except (SafetensorError, ValueError, OSError) as error:
        size = Path(safetensors_path).stat().st_size
        raise CheckpointError(
            f"{safetensors_path} ({size} bytes) cannot be read as safetensors: {error}. It may be truncated: copy or "
            "download it again"
        ) from error
    return (tensors, metadata) if return_metadata else tensors


def load_weights(
    model: nn.Module, state_dict: Dict[str, torch.Tensor], source: str = "the checkpoint", fresh: Sequence[str] = ()
) -> None:
    """Copy a state dict into a FlexTok model; every key must fit. Modules named in `fresh` keep what they have.

    A state dict without any `vae.` key is one that was saved without its VAE: the model keeps the VAE that it has.

    Raises:
        CheckpointError: With all missing and unexpected keys and wrong shapes. The model is left as it was.
    """
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
    model.load_state_dict(state_dict, strict=False)
    if (
        without_vae
        and any(key.startswith("vae.") for key in expected)
        and getattr(model.vae, "hf_hub_path", None) is None
    ):
        log.warning(
            "%s holds no VAE weights and the config names none: give latents, not images, to this model", source
        )


def build_model(
    config: dict, state_dict: Dict[str, torch.Tensor], source: str = "the checkpoint", fresh: Sequence[str] = ()
) -> nn.Module:
    """The model of a config with the weights of a state dict, in evaluation mode on the CPU; `fresh` as load_weights.

    The VAE's own weights are fetched (config key `vae.hf_hub_path`) only if the state dict does not hold them.
    """
    from ..flextok_wrapper import FlexTokFromHub, flat_config

    config = flat_config(config)
    vae = config["vae"]
    has_vae = any(clean_key(key).startswith("vae.vae.") for key in state_dict)
    if has_vae and str(vae.get("_target_")).endswith(".StableDiffusionVAE"):
        vae = {**vae, "load_weights": False}
    model = FlexTokFromHub({**config, "vae": vae})
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
