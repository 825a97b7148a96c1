"""Files of weights: safetensors with the model's config in the header, and what torch.save writes."""

import ast
import json
import logging
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import shown
from .errors import UserError
from .files import write_atomically
from .plain import parse_yaml

log = logging.getLogger(__name__)
PathLike = str | os.PathLike


class CheckpointError(UserError, RuntimeError):
    """Weights that cannot be read, or that do not fit the model."""


def __getattr__(name: str) -> Any:
    if name == "load_model_from_safetensors":  # its published place; what builds models is above this module
        from .. import flextok_wrapper

        return flextok_wrapper.load_model_from_safetensors
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def clean_key(key: str) -> str:
    """A parameter's name without what gradient checkpointing and torch.compile wrappers insert."""
    return key.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def save_safetensors(
    state_dict: dict[str, torch.Tensor], save_path: PathLike, metadata_dict: dict[str, Any] | None = None
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
    for parse in (ast.literal_eval, json.loads, parse_yaml):
        try:
            return _none_for_null(parse(text))
        except Exception:  # parsers raise ValueError, SyntaxError, RecursionError, MemoryError and others
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
) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a safetensors file on the CPU: (tensors, metadata), or the tensors alone.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is truncated or not a safetensors file.
    """
    tensors, metadata = _read_safetensors(safetensors_path, with_tensors=True)
    return (tensors, metadata) if return_metadata else tensors


def load_metadata(safetensors_path: PathLike) -> dict[str, Any]:
    """The metadata of a safetensors file, without its tensors; errors as load_safetensors."""
    return _read_safetensors(safetensors_path, with_tensors=False)[1]


def _read_safetensors(path: PathLike, with_tensors: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no safetensors file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()} if with_tensors else {}
            metadata = {key: parse_metadata(value) for key, value in (file.metadata() or {}).items() if key != "format"}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        if zipfile.is_zipfile(path):
            raise CheckpointError(
                f"{path} is a file of torch.save, not of safetensors: {advice_on_training_checkpoint(path)}"
            ) from error
        reason = _known_cause(path) or f"it may be truncated: copy or download it again ({error})"
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as safetensors: {reason}"
        ) from error
    return tensors, metadata


def load_pickled(path: PathLike) -> Any:
    """What torch.save wrote, on the CPU: tensors and plain values, mapped from the file where it allows that.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is damaged, or holds other things than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:  # files of before PyTorch 1.6 are no zip archives and cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # of unpickling a damaged file: of any kind
        reason = _known_cause(path)
        foreign = re.search(r"GLOBAL (\S+)|unrecognized function (.+)", str(error))
        if foreign:
            reason = f"it holds {foreign[1] or foreign[2]}, expected tensors and plain values alone"
        elif reason is None:
            kind = type(error).__name__
            cause = str(error).strip().partition("\n")[0].partition(". ")[0][:200]
            reason = f"it is cut off or damaged, or no file of torch.save: copy or download it again ({kind}: {cause})"
        raise CheckpointError(f"{path} ({path.stat().st_size} bytes) is not a readable checkpoint: {reason}") from error


def _known_cause(path: Path) -> str | None:
    """Why a file holds no weights at all, where its first bytes tell; with what to do."""
    with open(path, "rb") as file:
        start = file.read(200)
    if not start:
        return "it is empty: copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS: run `git lfs pull` where it was cloned, or download the file itself"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page: download the file itself"
    return None


def advice_on_training_checkpoint(path: PathLike) -> str:
    """What to give in place of a training checkpoint where a model is expected."""
    path = Path(path)
    advice = f"make a model of it by `python -m flextok.training.export {path} my_model` and give that folder"
    export = path.parent.parent / "export"
    if export.is_dir():
        return f"if it is a training checkpoint, give {export}, the model that its run exported, or {advice}"
    return f"if it is a training checkpoint, give the folder `export` of its run, or {advice}"


def check_weights(
    model: nn.Module, state_dict: dict[str, torch.Tensor], source: str = "the checkpoint", fresh: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    """The part of a state dict that is a model's to load, by the model's names; arguments and errors as load_weights.

    The model may be on the meta device: names and shapes alone are compared.
    """
    if not isinstance(state_dict, dict):
        raise CheckpointError(f"{source} holds a {type(state_dict).__name__} for weights, expected tensors by name")
    for key, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            kind = type(value).__name__
            raise CheckpointError(f"{source} holds a {kind} at {shown(key)} of its weights, expected tensors by name")
    fresh_keys = tuple(f"{name}." for name in fresh)
    given = {clean_key(key): value for key, value in state_dict.items()}
    given = {key: value for key, value in given.items() if not key.startswith(fresh_keys)}
    expected = model.state_dict()
    if "vae.logvar" not in expected:
        given.pop("vae.logvar", None)  # plays no part in what the VAE computes
    without_vae = not any(key.startswith("vae.") for key in given)
    kept = (*fresh_keys, "vae.") if without_vae else fresh_keys
    needed = [key for key in expected if not key.startswith(kept)]
    problems = {
        "are missing": [f"{key} {list(expected[key].shape)}" for key in needed if key not in given],
        "are not the model's": [f"{key} {list(value.shape)}" for key, value in given.items() if key not in expected],
        "have other shapes": [
            f"{key} {list(given[key].shape)} where the model has {list(expected[key].shape)}"
            for key in needed
            if key in given and given[key].shape != expected[key].shape
        ],
    }
    texts = [f"{len(names)} tensors {what}, e.g. {', '.join(names[:3])}" for what, names in problems.items() if names]
    if texts:
        raise CheckpointError(
            f"{source} does not fit the model: {'; '.join(texts)}. Weights and config must be those of one model"
        )
    return given


def load_weights(
    model: nn.Module, state_dict: dict[str, torch.Tensor], source: str = "the checkpoint", fresh: Sequence[str] = ()
) -> None:
    """Copy a state dict into a FlexTok model; every key must fit. Modules named in `fresh` keep what they have.

    A state dict without any `vae.` key is one that was saved without its VAE: the model keeps the VAE that it has.

    Raises:
        CheckpointError: Missing or unexpected keys, or other shapes: how many, and a few. The model is left as it was.
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
