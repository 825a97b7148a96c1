"""REPA: pull a decoder's activations towards the features of a frozen vision encoder (arXiv 2410.06940).

From top to bottom: the trained projector, the frozen encoder (DINOv2 from torch.hub; the others are in
repa_encoders.py), the module that holds both, and the loss. Decoder features of one layer or several are resized to the
target grid and projected to the encoder's channels, each layer by a projector of its own; the loss is minus the mean
cosine similarity with the encoder's features of the same images.
"""

import difflib
import functools
import logging
import warnings
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from zipfile import BadZipFile

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ...utils.config import ConfigError
from ...utils.modules import count_parameters
from ...utils.processes import load_one_process_first
from ...utils.random import generator as addressed_generator
from .repa_encoders import (
    EFFICIENTNET,
    TIMM,
    EncoderFacts,
    EncoderUnavailable,
    FrozenEncoder,
    efficientnet_features,
    efficientnet_weights,
    load_efficientnet,
    load_timm,
    read_weights,
    timm_facts,
    timm_features,
    timm_weights,
    torch_hub_file,
)

logger = logging.getLogger(__name__)

# Vectors shorter than this are not stretched to unit length: a zero vector has similarity 0.
NORM_EPS = 1e-6


# The projector.


class REPAProjector(nn.Module):
    """Three linear layers with SiLU between them, decoder_dim -> hidden_dim -> hidden_dim -> encoder_dim.

    Args:
        decoder_dim: Input channels.
        encoder_dim: Output channels.
        hidden_dim: Width between the layers.
        generator: CPU generator of the initial weights (Xavier uniform; biases are 0). Default: a fixed one. The
            global random state is neither read nor changed.
    """

    def __init__(
        self, decoder_dim: int, encoder_dim: int, hidden_dim: int = 2048, generator: torch.Generator | None = None
    ):
        super().__init__()
        linears = [
            nn.utils.skip_init(nn.Linear, inputs, outputs)
            for inputs, outputs in ((decoder_dim, hidden_dim), (hidden_dim, hidden_dim), (hidden_dim, encoder_dim))
        ]
        self.layers = nn.Sequential(linears[0], nn.SiLU(), linears[1], nn.SiLU(), linears[2])
        _initialise(linears, generator)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project [..., decoder_dim], channels last, to [..., encoder_dim]."""
        return self.layers(features)


class REPAConvProjector(nn.Module):
    """One 3x3 convolution, decoder_dim -> encoder_dim: iREPA's projector, which mixes neighbours (arXiv 2512.10794).

    Zeros are around the grid, which keeps its size. Arguments as REPAProjector's; there is no hidden layer.
    """

    def __init__(
        self, decoder_dim: int, encoder_dim: int, hidden_dim: int = 2048, generator: torch.Generator | None = None
    ):
        super().__init__()
        self.conv = nn.utils.skip_init(nn.Conv2d, decoder_dim, encoder_dim, kernel_size=3, padding=1)
        _initialise([self.conv], generator)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project [B, h, w, decoder_dim] to [B, h, w, encoder_dim]."""
        return self.conv(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


PROJECTORS: dict[str, type[nn.Module]] = {"mlp": REPAProjector, "conv": REPAConvProjector}


def projector_parameters(decoder_dim: int, encoder_dim: int, projector: str = "mlp", hidden_dim: int = 2048) -> int:
    """Number of parameters of a projector; builds none."""
    with torch.device("meta"):
        return count_parameters(PROJECTORS[projector](decoder_dim, encoder_dim, hidden_dim))


def _initialise(layers: Sequence[nn.Module], generator: torch.Generator | None) -> None:
    generator = generator or addressed_generator(0, "repa_projector")
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)


# The frozen encoder: DINOv2 (arXiv 2304.07193; `_reg`: with four register tokens, arXiv 2309.16588) from torch.hub.
# GitHub and the weights server are asked only for what is not on this machine, the GitHub API and its rate limit never.

DINOV2_REPOSITORY = "facebookresearch/dinov2"
DINOV2 = {
    name: EncoderFacts(dim, 14, 518, parameters, (37, 37), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for name, dim, parameters in (
        ("dinov2_vits14", 384, 22_056_576),
        ("dinov2_vitb14", 768, 86_580_480),
        ("dinov2_vitl14", 1024, 304_368_640),
        ("dinov2_vitg14", 1536, 1_136_480_768),
        ("dinov2_vits14_reg", 384, 22_058_112),
        ("dinov2_vitb14_reg", 768, 86_583_552),
        ("dinov2_vitl14_reg", 1024, 304_372_736),
        ("dinov2_vitg14_reg", 1536, 1_136_486_912),
    )
}


def dinov2_weights_url(name: str) -> str:
    """Where a model's weights are published; they are the same for every revision of the code."""
    backbone = name.removesuffix("_reg")
    file = f"{backbone}{'_reg4' if name != backbone else ''}_pretrain.pth"
    return f"https://dl.fbaipublicfiles.com/dinov2/{backbone}/{file}"


def dinov2_folder(revision: str) -> Path:
    """Where torch.hub keeps a revision of the repository."""
    return Path(torch.hub.get_dir()) / f"{DINOV2_REPOSITORY}/{revision}".replace("/", "_")


def check_trust(repo: str, trust: bool) -> None:
    """Raise ConfigError if there is a hubconf.py in the folder `repo` and it may not be run.

    It may with `trust`, or if the folder is torch.hub's own copy of facebookresearch/dinov2.
    """
    folder, own = Path(repo).expanduser().resolve(), dinov2_folder("").resolve()
    is_torch_hubs = folder.parent == own.parent and folder.name.startswith(own.name)
    if not trust and not is_torch_hubs and (folder / "hubconf.py").is_file():
        raise ConfigError(
            f"repa_encoder_repo is {repo}: loading it runs {folder / 'hubconf.py'} and the code beside it with all "
            "your rights. If you know where that code comes from, set repa_encoder_trust: true"
        )


def load_dinov2(name: str, weights: Path, repo: str | None, revision: str | None, trust: bool) -> nn.Module:
    """The pretrained model, on the CPU; `weights` that are no file are fetched. The rest as `load_encoder`."""
    renew = f"put a complete and newer copy of https://github.com/{DINOV2_REPOSITORY} in its place"
    if repo is not None:
        check_trust(repo, trust)
        folder = Path(repo).expanduser()
    else:
        renew += ", or delete the folder, and it is downloaded again"
        refs = [revision] if revision else ["main", "master", "*"]  # any cached revision is better than none
        cached = [path for ref in refs for path in sorted(dinov2_folder("").parent.glob(dinov2_folder(ref).name))]
        folder = next((path for path in cached if (path / "hubconf.py").is_file()), next(iter(cached), None))
    if folder is not None and not (folder / "hubconf.py").is_file():
        raise EncoderUnavailable(f"the copy of DINOv2's repository in {folder} is without hubconf.py: {renew}")

    online = f"{DINOV2_REPOSITORY}:{revision or 'main'}"
    # Locally, or with a branch named and validation skipped, the GitHub API is not asked.
    source = {"source": "local"} if folder is not None else {"skip_validation": True, "trust_repo": True}
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("ignore", message="xFormers")
            model = torch.hub.load(str(folder or online), name, pretrained=not weights.is_file(), **source)
    except (OSError, HTTPException, BadZipFile) as error:
        place, url, file = dinov2_folder(revision or "main"), dinov2_weights_url(name), torch_hub_file(weights.name)
        raise EncoderUnavailable(
            f"{name} could not be loaded: tried the repository at {folder or f'{place} (not there), then GitHub'}, the "
            f"weights at {weights}, else their server; {type(error).__name__}: {error}.\n"
            f"Without network, copy two things into the torch.hub cache, {torch.hub.get_dir()} (TORCH_HOME moves it):\n"
            f"  the folder with hubconf.py of https://github.com/{DINOV2_REPOSITORY}, to {place}\n"
            f"  {url}, to {file}\n"
            "or keep them anywhere and name them in the YAML: repa_encoder_repo (the folder, with repa_encoder_trust: "
            "true, as its code is run), repa_encoder_weights (the file)."
        ) from error
    except Exception as error:  # running the repository's code can raise anything
        raise EncoderUnavailable(
            f"{name} could not be built by the code in {folder or dinov2_folder(revision or 'main')} "
            f"({type(error).__name__}: {error}): it may be incomplete or older than this encoder: {renew}"
        ) from error
    if weights.is_file():
        try:
            model.load_state_dict(read_weights(name, weights))
        except (RuntimeError, TypeError) as error:
            if isinstance(error, EncoderUnavailable):
                raise
            raise EncoderUnavailable(f"{weights} does not hold the weights of {name}: {error}") from error
    return model


def dinov2_features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """[B, dim, gh, gw] of normalised images [B, 3, 14 * gh, 14 * gw]."""
    tokens = model.forward_features(images)["x_norm_patchtokens"]  # [B, gh * gw, dim]
    return rearrange(tokens, "b (h w) d -> b d h w", h=images.shape[2] // 14)


# Encoders by name.


def known_encoders() -> dict[str, EncoderFacts]:
    """Every named encoder, at its own image size; timm's are not among them."""
    return DINOV2 | EFFICIENTNET


def encoder_facts(encoder_type: str, image_size: int | None = None) -> EncoderFacts:
    """What an encoder gives at an image size, by default its own; loads no weights and needs no network.

    Raises:
        ValueError: For an unknown name, a model without a feature grid, or a size that the encoder cannot take.
    """
    if encoder_type.startswith(TIMM):
        return timm_facts(encoder_type, image_size)
    known = known_encoders()
    if encoder_type not in known:
        nearest = difflib.get_close_matches(encoder_type, known, n=3, cutoff=0.4) or list(known)
        raise ValueError(
            f"repa_encoder_type is {encoder_type!r}, which is not a known encoder: use {' or '.join(nearest)}, "
            "or timm:NAME for a model of timm"
        )
    return known[encoder_type].at(encoder_type, image_size)


def encoder_weights_file(
    encoder_type: str, repo: str | None = None, weights: str | None = None, revision: str | None = None
) -> Path | None:
    """The local file that `load_encoder` with these arguments takes its weights from; None if it is not here yet.

    Loads nothing and needs no network. `repo` makes no difference: it holds code.
    """
    path = _weights_path(encoder_type, weights, revision)
    return path if path is not None and path.is_file() else None


def _weights_path(encoder_type: str, weights: str | None, revision: str | None) -> Path | None:
    """Where an encoder's weights are or would be; None if that is not known before they are fetched."""
    if weights is not None:
        return Path(weights).expanduser()
    if encoder_type.startswith(TIMM):
        return timm_weights(encoder_type, revision)
    return efficientnet_weights() if encoder_type in EFFICIENTNET else torch_hub_file(dinov2_weights_url(encoder_type))


def load_encoder(
    encoder_type: str,
    repo: str | None = None,
    weights: str | None = None,
    image_size: int | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    trust: bool = False,
) -> FrozenEncoder:
    """Load a pretrained encoder by name, on the CPU: images [B, 3, H, W] in [-1, 1] -> float32 [B, dim, gh, gw].

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
    facts = encoder_facts(encoder_type, image_size)
    is_timm, is_dinov2 = encoder_type.startswith(TIMM), encoder_type in DINOV2
    if repo is not None and not is_dinov2:
        raise ValueError(f"repa_encoder_repo is {repo}, but {encoder_type} takes no repository: remove it")
    if revision is not None and (repo is not None if is_dinov2 else weights is not None or not is_timm):
        raise ValueError(
            f"repa_encoder_revision is {revision}, but what {encoder_type} is loaded from has no revisions: remove it"
        )
    path = _weights_path(encoder_type, weights, revision)
    if weights is not None and not path.is_file():
        raise EncoderUnavailable(f"repa_encoder_weights is {path}, which is not a file")

    def load() -> nn.Module:
        if is_timm:
            return load_timm(encoder_type, facts.image_size, path, revision)
        if is_dinov2:
            return load_dinov2(encoder_type, path, repo, revision, trust)
        return load_efficientnet(encoder_type, path)

    model = load_one_process_first(load)
    logger.info("%s: weights %s", encoder_type, encoder_weights_file(encoder_type, repo, weights, revision))
    features = timm_features if is_timm else dinov2_features if is_dinov2 else efficientnet_features
    return FrozenEncoder(encoder_type, model, features, facts, dtype)


def check_encoder_settings(encoder_type: str, encoder_dim: int | None, image_size: int | None) -> None:
    """Check settings of an encoder by name, before anything is loaded.

    Raises:
        ValueError: For an unknown name, or a number of channels or an image size that the encoder does not have.
    """
    _check_dim(encoder_dim, encoder_type, encoder_facts(encoder_type, image_size).dim)


def _check_dim(given: int | None, name: str, actual: int) -> None:
    if given is not None and given != actual:
        raise ValueError(f"repa_encoder_dim is {given}, but {name} gives {actual}: set {actual} or null")


def auto_target_size(encoder_grid: Sequence[int], decoder_grid: Sequence[int]) -> tuple[int, int]:
    """The finer of two grids (H, W), the one with more positions: what `repa_target_size: auto` means."""
    return tuple(max(encoder_grid, decoder_grid, key=lambda grid: grid[0] * grid[1]))


# Projector, encoder and loss together.


class REPAModule(nn.Module):
    """The REPA loss: a frozen encoder that gives targets, and the trained projector.

    `.encoder` is there from `load_encoder()` to `free_encoder()`. It is no submodule: it is in no state dict, parameter
    list, train mode, cast or DDP bucket, and a checkpoint holds the projector alone. Features that were computed before
    make targets without it.

    Args:
        decoder_dim: Channels D of the decoder features of one layer.
        encoder_type: Name of the encoder, `timm:NAME` or one of `known_encoders()`.
        encoder_dim: Channels of the encoder as the caller believes them to be; checked. Default: ask the encoder.
        target_size: Grid (H, W) on which projections and targets are compared.
        image_size: Side in pixels of the encoder's input. Default: the encoder's own.
        encoder_repo, encoder_weights, encoder_revision, encoder_trust: See the function `load_encoder`.
        hidden_dim: Width of the projector.
        seed: Seed of the projector's initial weights.
        encoder: An encoder already loaded, images [B, 3, H, W] -> features [B, dim, gh, gw], with attributes `dim`
            and `name`. The settings that load one are then unused.
        encoder_dtype: What the encoder computes in.
        n_layers: Decoder layers that are aligned. With several, `.projector` is a list of one projector each.
        projector: `mlp` or `conv`, see PROJECTORS.
        project_when: `after_resize` to the target grid, as in the paper, or `before_resize`, on the decoder's grid.
        spatial_norm: Gamma of the spatial normalisation of targets, see `spatially_normalised`. Default: none.

    Raises:
        ValueError: For an unknown encoder, or numbers that do not fit it.
    """

    def __init__(
        self,
        decoder_dim: int,
        encoder_type: str = "dinov2_vitl14",
        encoder_dim: int | None = None,
        target_size: Sequence[int] = (37, 37),
        image_size: int | None = None,
        encoder_repo: str | None = None,
        encoder_weights: str | None = None,
        encoder_revision: str | None = None,
        hidden_dim: int = 2048,
        seed: int = 0,
        encoder: nn.Module | None = None,
        encoder_dtype: torch.dtype = torch.float32,
        n_layers: int = 1,
        projector: str = "mlp",
        project_when: str = "after_resize",
        spatial_norm: float | None = None,
        encoder_trust: bool = False,
    ):
        super().__init__()
        self.encoder_name = encoder_type if encoder is None else encoder.name
        self.encoder_dim = encoder_facts(encoder_type, image_size).dim if encoder is None else encoder.dim
        _check_dim(encoder_dim, self.encoder_name, self.encoder_dim)
        self._load = functools.partial(
            load_encoder, self.encoder_name, encoder_repo, encoder_weights, image_size, encoder_revision, encoder_dtype,
            encoder_trust,
        )  # fmt: skip
        self.use_encoder(encoder)
        self.decoder_dim, self.n_layers = decoder_dim, n_layers
        self.target_size, self.project_when, self.spatial_norm = tuple(target_size), project_when, spatial_norm
        # The first projector is the same however many follow.
        generators = [addressed_generator(seed, "repa_projector", *([i] if i else [])) for i in range(n_layers)]
        projectors = [PROJECTORS[projector](decoder_dim, self.encoder_dim, hidden_dim, draws) for draws in generators]
        self.projector = projectors[0] if n_layers == 1 else nn.ModuleList(projectors)

    def load_encoder(self) -> nn.Module:
        """Load `.encoder`, unless it is there, and put it where the projector is; several processes have to together.

        Raises:
            EncoderUnavailable: If it is neither on this machine nor within reach.
        """
        if not self.has_encoder:
            self.use_encoder(self._load())
        return self.encoder.to(next(self.projector.parameters()).device)

    def use_encoder(self, encoder: nn.Module | None) -> None:
        """Take an encoder as `.encoder`; None frees the one that is there."""
        if encoder is not None:
            encoder.eval().requires_grad_(False)
        self.__dict__["_encoder"] = encoder  # `self._encoder = encoder` would make it a submodule

    @property
    def has_encoder(self) -> bool:
        return self._encoder is not None

    @property
    def encoder(self) -> nn.Module:
        """The frozen encoder; raises RuntimeError while it is not loaded."""
        if not self.has_encoder:
            raise RuntimeError(
                f"{self.encoder_name} is not loaded: its features come from the cache (repa_cache), or the alignment "
                "has ended (repa_stop); repa_module.load_encoder() loads it"
            )
        return self._encoder

    def free_encoder(self) -> None:
        """Let go of the encoder and its memory."""
        self.use_encoder(None)

    @property
    def projectors(self) -> list[nn.Module]:
        """The projector of each aligned layer."""
        return [self.projector] if self.n_layers == 1 else list(self.projector)

    def project(self, decoder_features: torch.Tensor, layer: int = 0) -> torch.Tensor:
        """Resize decoder features to the target grid and project each position (`before_resize`: the reverse).

        Args:
            decoder_features: [B, h, w, decoder_dim].
            layer: Which of the aligned layers they are of, from 0.

        Returns:
            [B, encoder_dim, H, W], in bfloat16 or float16 under such an autocast.
        """
        projector = self.projectors[layer]
        if self.project_when == "before_resize":
            return _resize(projector(decoder_features).permute(0, 3, 1, 2), self.target_size)
        resized = _resize(decoder_features.permute(0, 3, 1, 2), self.target_size)
        return projector(resized.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    @torch.no_grad()
    def encoder_features(self, images: torch.Tensor) -> torch.Tensor:
        """The encoder's features of images [B, 3, H, W] in [-1, 1] on its own grid: float32 [B, encoder_dim, gh, gw].

        Raises:
            ValueError: If `images` has another shape.
            RuntimeError: There is no encoder.
        """
        return self.encoder(images).float()

    @torch.no_grad()
    def targets(self, encoder_features: torch.Tensor) -> torch.Tensor:
        """Features on the encoder's grid, [B, encoder_dim, gh, gw], to targets: float32 [B, encoder_dim, H, W]."""
        features = encoder_features.float()
        if self.spatial_norm is not None:
            features = spatially_normalised(features, self.spatial_norm)
        return _resize(features, self.target_size)

    def target_features(self, images: torch.Tensor) -> torch.Tensor:
        """The targets of images [B, 3, H, W] in [-1, 1]: float32 [B, encoder_dim, H, W]; raises as encoder_features."""
        return self.targets(self.encoder_features(images))

    def loss(self, projected: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Minus the mean cosine similarity of two [B, encoder_dim, H, W]: float32 scalar in [-1, 1]."""
        return negative_cosine_similarity(projected, target)

    def layer_losses(self, decoder_features: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
        """The loss of each aligned layer; `repa_loss` is their mean.

        Args:
            decoder_features: [B, h, w, n_layers * decoder_dim], the layers one after the other in the channels.
            target: [B, encoder_dim, H, W].

        Raises:
            ValueError: If a shape is not as stated, or the two batch sizes differ.
        """
        channels = self.n_layers * self.decoder_dim
        if not isinstance(decoder_features, torch.Tensor) or decoder_features.shape[3:] != (channels,):
            given = (
                list(decoder_features.shape) if isinstance(decoder_features, torch.Tensor) else type(decoder_features)
            )
            raise ValueError(f"decoder features must be one tensor [B, h, w, {channels}], but got {given}")
        layers = decoder_features.split(self.decoder_dim, dim=-1)
        return [self.loss(self.project(features, i), target) for i, features in enumerate(layers)]

    def forward(self, decoder_features: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """The REPA loss of decoder features for images [B, 3, H, W] in [-1, 1]; arguments as `layer_losses`.

        Returns:
            Float32 scalar in [-1, 1]; -1 is perfect alignment.
        """
        return torch.stack(self.layer_losses(decoder_features, self.target_features(images))).mean()


def _resize(features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear resize of [B, C, h, w] to [B, C, *size]."""
    if features.shape[-2:] == size:
        return features
    return F.interpolate(features, size, mode="bilinear", align_corners=False)


# The loss.


def negative_cosine_similarity(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Minus the mean over images and positions of the cosine between channel vectors, both [B, C, H, W].

    Returns:
        Scalar in [-1, 1], computed in float32 whatever the autocast. A zero vector counts as 0.

    Raises:
        ValueError: If the shapes differ.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {list(prediction.shape)} and target {list(target.shape)} must have one shape")
    with torch.autocast(prediction.device.type, enabled=False):
        prediction, target = prediction.float(), target.float()
        norms = [features.norm(dim=1).clamp_min(NORM_EPS) for features in (prediction, target)]
        cosine = (prediction * target).sum(dim=1) / (norms[0] * norms[1])
        return -cosine.clamp(-1.0, 1.0).mean()  # rounding alone can leave the range


def spatially_normalised(features: torch.Tensor, gamma: float) -> torch.Tensor:
    """(x - gamma * mean) / (std + 1e-6) of [B, C, h, w], mean and std of each image and channel over its positions.

    What all positions share says little about where things are; iREPA takes it away (arXiv 2512.10794, gamma 0.6).
    """
    std, mean = torch.std_mean(features, dim=(2, 3), keepdim=True)
    return (features - gamma * mean) / (std + 1e-6)


def unit_target_sum(target: torch.Tensor) -> torch.Tensor:
    """Sum over images of the unit vectors of a target [B, C, H, W]: float64 [C, H, W]; divided by the number of images
    it is, at each position, the best prediction that does not depend on the image."""
    with torch.autocast(target.device.type, enabled=False):
        return F.normalize(target.float(), dim=1, eps=NORM_EPS).sum(dim=0, dtype=torch.float64)
