"""Any model of timm as a REPA encoder: its own forward_features, data config, weights and checkpoint filter."""

import contextlib
import difflib
import functools
import logging
import math
import os
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch import nn

from .repa_encoders import (
    TIMM,
    EncoderFacts,
    EncoderUnavailable,
    Family,
    hub_dir,
    import_timm,
    read_weights,
)

logger = logging.getLogger(__name__)

# Where timm's training scripts and others keep the weights in a checkpoint, first the averaged ones.
_NESTED_WEIGHTS = ("state_dict_ema", "model_ema", "state_dict", "model")


class _TimmProbe(NamedTuple):
    facts: EncoderFacts
    arguments: Dict[str, Any]  # of timm.create_model, for this image size


def _timm_features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    features = _timm_grid(model, model.forward_features(images))
    if features is None:
        raise ValueError(f"{type(model).__name__} gives no feature grid for images {list(images.shape)}")
    return features


def _timm_grid(model: nn.Module, features: Any) -> Optional[torch.Tensor]:
    """What `forward_features` gave for square images as [B, dim, gh, gw]; None unless it is a grid of positions.

    Tokens [B, N, dim] are a square grid in row-major order after the prefix (class and register) tokens.
    """
    if not isinstance(features, torch.Tensor):
        return None
    if features.dim() == 3:
        patches = features[:, getattr(model, "num_prefix_tokens", 0) :]
        side = math.isqrt(patches.shape[1])
        if side * side != patches.shape[1]:
            return None
        features = patches.transpose(1, 2).unflatten(2, (side, side))
    elif features.dim() == 4 and getattr(model, "output_fmt", "NCHW") == "NHWC":
        features = features.permute(0, 3, 1, 2)
    if features.dim() != 4 or features.shape[1] != model.num_features or min(features.shape[2:]) < 2:
        return None
    return features


def _timm_config(name: str) -> Any:
    """timm's pretrained config of `timm:NAME`; raises ValueError for a name or tag that timm does not have."""
    timm, model_name = import_timm(name), name.removeprefix(TIMM)
    if any(sign in model_name for sign in ":/\\"):
        raise ValueError(
            f"repa_encoder_type is {name!r}, but only timm's own models are taken: use timm:NAME with a NAME of "
            "timm.list_pretrained(), and repa_encoder_weights for weights of your own"
        )
    if model_name.partition(".")[0] in timm.list_models():
        with contextlib.suppress(RuntimeError):  # a wrong tag
            return timm.models.get_pretrained_cfg(model_name, allow_unregistered=False)
    replacement = timm.models.get_deprecated_models().get(model_name)
    names = [*timm.list_models(include_tags=True), *timm.list_models()]
    nearest = [replacement] if replacement else difflib.get_close_matches(model_name, names, n=3, cutoff=0.4)
    raise ValueError(
        f"repa_encoder_type is {name!r}, which timm {timm.__version__} does not have: use "
        + (" or ".join(TIMM + near for near in nearest) or "timm:NAME with a NAME of timm.list_pretrained()")
    )


def _build_timm(name: str, **arguments: Any) -> nn.Module:
    """timm's model with new weights, without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        return import_timm(name).create_model(name.removeprefix(TIMM), **arguments).eval()


def _timm_facts(name: str, image_size: Optional[int]) -> EncoderFacts:
    return _probe_timm(name, image_size).facts


@functools.lru_cache(maxsize=None)
def _probe_timm(name: str, image_size: Optional[int]) -> _TimmProbe:
    """Build `timm:NAME` for an image size, by default its own, and run it once; ValueError if that gives no grid."""
    config = _timm_config(name)
    own_size = config.input_size[1:]
    if image_size is None and own_size[0] != own_size[1]:
        raise ValueError(
            f"{name} was trained on {own_size[0]}x{own_size[1]} px, which is no square: set repa_image_size"
        )
    size = own_size[0] if image_size is None else image_size
    is_own = (size, size) == tuple(own_size)
    model, features, arguments = _run_without_weights(name, size, is_own)
    grid = _timm_grid(model, features)
    if grid is None:
        shape = list(features.shape) if isinstance(features, torch.Tensor) else f"in a {type(features).__name__}"
        raise ValueError(
            f"{name} gives features {shape} for an image of {size} px, which is no grid: choose a model whose "
            "forward_features keeps positions, such as a ViT or a convolutional network"
        )
    _, dim, height, width = grid.shape
    if not is_own and (size % height or size % width):
        raise ValueError(_not_taken(name, size, f"its {height}x{width} features do not divide {size} px"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = EncoderFacts(
        dim, round(size / height), size, parameters, (height, width), tuple(config.mean), tuple(config.std)
    )
    return _TimmProbe(facts, arguments)


def _not_taken(name: str, size: int, reason: Any) -> str:
    return (
        f"repa_image_size is {size}, but {name} does not take it: {reason}; set null or another multiple of its patch "
        "size"
    )


def _run_without_weights(name: str, size: int, is_own: bool) -> Tuple[nn.Module, Any, Dict[str, Any]]:
    """A timm model, what its forward_features gives for one image, and the arguments that make it take the size.

    Raises:
        ValueError: If it takes no image of that size.
    """
    for arguments in [{}] if is_own else [{"dynamic_img_size": True}, {"img_size": size}, {}]:
        try:
            return *_run_on_meta(name, size, arguments), arguments
        except Exception as error:  # models refuse a size in many ways
            is_unknown_keyword = isinstance(error, TypeError) and any(key in str(error) for key in arguments)
            if not is_unknown_keyword:
                raise ValueError(_not_taken(name, size, error)) from error
    raise AssertionError("the last candidate has no keyword")


def _run_on_meta(name: str, size: int, arguments: Dict[str, Any]) -> Tuple[nn.Module, Any]:
    """A timm model without classifier and what its forward_features gives for one image, on the meta device.

    There it takes neither memory nor time. A model that does not work there runs on the CPU, with random weights.
    """
    try:
        return _run(name, size, arguments, "meta")
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error).lower():
            raise
    return _run(name, size, arguments, "cpu")


def _run(name: str, size: int, arguments: Dict[str, Any], device: str) -> Tuple[nn.Module, Any]:
    with torch.device(device), torch.no_grad():
        model = _build_timm(name, **arguments)
        _remove_classifier(model)
        return model, model.forward_features(torch.zeros(1, 3, size, size))


def _remove_classifier(model: nn.Module) -> None:
    if hasattr(model, "reset_classifier"):  # timm's `..._enc` models have no classifier
        model.reset_classifier(0)


@contextlib.contextmanager
def _timm_loads_with(load: Callable[..., None]) -> Iterator[None]:
    """Within, timm.create_model(pretrained=True) calls `load` where it would fetch and load weights.

    That is where timm hands over the function that adapts a checkpoint to a model, which it keeps to itself otherwise.
    """
    from timm.models import _builder

    original, _builder.load_pretrained = _builder.load_pretrained, load
    try:
        yield
    finally:
        _builder.load_pretrained = original


def _load_timm(
    name: str, image_size: int, repo: Optional[str], weights: Optional[str], revision: Optional[str]
) -> nn.Module:
    """A timm model without classifier; the Hub is asked only for what is not on this machine."""
    if repo is not None:
        raise ValueError(f"repa_encoder_repo is {repo}, but the code of {name} is in timm: remove it")
    if weights is not None and revision is not None:
        raise ValueError(
            f"repa_encoder_revision is {revision}, but repa_encoder_weights is a file, {weights}: remove one of the two"
        )
    if weights is None:
        path = _timm_weights_file(name, revision) or _download_timm(name, revision)
    else:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise EncoderUnavailable(f"repa_encoder_weights is {path}, which is not a file")
    state = _unwrapped(read_weights(name, path))

    def load(model: nn.Module, filter_fn: Optional[Callable] = None, strict: bool = True, **_: Any) -> None:
        _load_adapted(name, path, model, _adapted(name, path, model, state, filter_fn), may_have_more=not strict)

    with _timm_loads_with(load):
        model = _build_timm(name, pretrained=True, **_probe_timm(name, image_size).arguments)
    logger.info("%s: weights %s", name, path)
    return model


def _unwrapped(checkpoint: Dict[str, Any]) -> Dict[str, Any]:
    """The state dict in a training checkpoint, without the prefixes of DDP and torch.compile."""
    for key in _NESTED_WEIGHTS:
        if isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    return {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in checkpoint.items()}


def _adapted(
    name: str, path: Path, model: nn.Module, state: Dict[str, Any], filter_fn: Optional[Callable]
) -> Dict[str, Any]:
    """A state dict with the names and shapes that timm gives its tensors for `model`."""
    if filter_fn is None:
        return state
    try:
        try:
            return filter_fn(state, model)
        except TypeError:  # as in timm: some take the state dict alone
            return filter_fn(state)
    except Exception as error:  # filters take the tensors that they look for to be there
        raise EncoderUnavailable(
            f"{path} does not hold the weights of {name}: timm cannot adapt them ({type(error).__name__}: {error})"
        ) from error


def _load_adapted(name: str, path: Path, model: nn.Module, state: Dict[str, Any], may_have_more: bool) -> None:
    """Take the classifier off `model` and load all that is left; a classifier in the file is left out."""
    classifiers = model.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    unused = {f"{key}.{kind}" for key in classifiers for kind in ("weight", "bias")} | set(model.state_dict())
    _remove_classifier(model)
    own = model.state_dict()
    unused -= set(own)
    missing = [key for key in own if key not in state and not key.endswith(".num_batches_tracked")]
    foreign = [] if may_have_more else [key for key in state if key not in own and key not in unused]
    misshapen = [
        f"{key} {list(state[key].shape)} instead of {list(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    differences = [
        f"{len(keys)} {what} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
        for keys, what in ((missing, "missing"), (foreign, "that it does not have"), (misshapen, "of another shape"))
        if keys
    ]
    if differences:
        raise EncoderUnavailable(f"{path} does not hold the weights of {name}; tensors: {', '.join(differences)}")
    model.load_state_dict({key: state[key] for key in own if key in state}, strict=False)


def _hub_files(config: Any) -> Tuple[str, Optional[str], List[str]]:
    """Repository, revision and possible names of a weights file on the Hugging Face Hub, as timm looks for them."""
    repository, _, revision = config.hf_hub_id.partition("@")
    name = config.hf_hub_filename or "pytorch_model.bin"
    return (
        repository,
        revision or None,
        list(dict.fromkeys([name.replace("pytorch_model.bin", "model.safetensors"), name])),
    )


def _timm_weights_file(name: str, revision: Optional[str]) -> Optional[Path]:
    """The cached file of a timm model's own weights; None if there is none."""
    from huggingface_hub import try_to_load_from_cache

    config = _timm_config(name)
    if config.hf_hub_id:
        repository, own_revision, files = _hub_files(config)
        for file in files:
            path = try_to_load_from_cache(repository, file, revision=revision or own_revision)
            if isinstance(path, str):
                return Path(path)
        return None
    if config.url:
        path = _url_file(config.url)
        return path if path.is_file() else None
    return None


def _url_file(url: str) -> Path:
    """Where torch.hub keeps what it downloads from a URL."""
    return hub_dir() / "checkpoints" / os.path.basename(url)


def _download_timm(name: str, revision: Optional[str]) -> Path:
    """Fetch a timm model's own weights into the cache of the Hugging Face Hub, or of torch.hub."""
    config = _timm_config(name)
    if not config.has_weights:
        raise ValueError(
            f"timm has no pretrained weights for {name}: name a file of your own, repa_encoder_weights, or choose "
            "another model of timm.list_pretrained()"
        )
    if not config.hf_hub_id and revision is not None:
        raise ValueError(f"repa_encoder_revision is {revision}, but {name} comes from {config.url}: remove it")
    try:
        if config.hf_hub_id:
            return _download_from_hub(config, revision)
        path = _url_file(config.url)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(config.url, str(path), progress=False)
        return path
    except Exception as error:  # of the Hub's client, its HTTP library, the file system
        raise EncoderUnavailable(_how_to_get_timm(name, config, revision, error)) from error


def _download_from_hub(config: Any, revision: Optional[str]) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    repository, own_revision, files = _hub_files(config)
    revision = revision or own_revision
    for file in files:
        try:
            # hf_hub_download alone would retry for half a minute where there is no network.
            get_hf_file_metadata(hf_hub_url(repository, file, revision=revision))
        except EntryNotFoundError:
            if file == files[-1]:
                raise
            continue
        return Path(hf_hub_download(repository, file, revision=revision))
    raise AssertionError("unreachable")


def _how_to_get_timm(name: str, config: Any, revision: Optional[str], error: Exception) -> str:
    problem = f"{name} could not be loaded: "
    last = "or keep the weights anywhere and name the file in the YAML: repa_encoder_weights."
    reason = f"{type(error).__name__}: {error}"
    if not config.hf_hub_id:
        path = _url_file(config.url)
        return (
            f"{problem}tried {path} (no such file), then its server; {reason}.\n"
            f"Without network, copy {config.url} to {path} (TORCH_HOME moves that folder)\n{last}"
        )
    from huggingface_hub import constants

    repository, own_revision, files = _hub_files(config)
    revision = revision or own_revision
    folder = Path(constants.HF_HUB_CACHE) / ("models--" + repository.replace("/", "--"))
    at = f" --revision {revision}" if revision else ""
    return (
        f"{problem}tried the cache of the Hugging Face Hub at {folder} (no {' or '.join(files)} of revision "
        f"{revision or 'main'} there), then {constants.ENDPOINT}; {reason}.\n"
        f"Without network, run `hf download {repository}{at}` where there is one and copy its folder\n"
        f"  {folder.name} (in ~/.cache/huggingface/hub there), to {folder} (HF_HUB_CACHE or HF_HOME moves it)\n{last}"
    )


TIMM_MODELS = Family(_timm_facts, _load_timm, _timm_weights_file, _timm_features)
