"""REPA: pull a decoder's activations towards the features of a frozen vision encoder (arXiv 2410.06940).

From top to bottom: the trained projector, the frozen encoder (DINOv2 from torch.hub; the others are in
repa_encoders.py), the module that holds both, and the loss. Decoder features of one layer or several are resized to the
target grid and projected to the encoder's channels, each layer by a projector of its own; the loss is minus the mean
cosine similarity with the encoder's features of the same images.
"""

import difflib
import functools
import logging
import os
import warnings
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from zipfile import BadZipFile

import torch
import torch.nn.functional as F
from torch import nn

from ...utils.config import ConfigError
from ...utils.processes import load_one_process_first
from ...utils.random import generator as addressed_generator
from .repa_encoders import (
    EfficientNetLite0,
    EncoderFacts,
    EncoderFamily,
    EncoderUnavailable,
    FrozenEncoder,
    Timm,
    given_weights,
    read_weights,
    torch_hub_dir,
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
        self.decoder_dim, self.encoder_dim = decoder_dim, encoder_dim
        linears = [
            nn.utils.skip_init(nn.Linear, inputs, outputs)
            for inputs, outputs in ((decoder_dim, hidden_dim), (hidden_dim, hidden_dim), (hidden_dim, encoder_dim))
        ]
        self.layers = nn.Sequential(linears[0], nn.SiLU(), linears[1], nn.SiLU(), linears[2])
        _initialise(linears, generator)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project [..., decoder_dim], channels last, to [..., encoder_dim]; ValueError for anything else."""
        _check_features(features, self.decoder_dim)
        return self.layers(features)


class REPAConvProjector(nn.Module):
    """One 3x3 convolution, decoder_dim -> encoder_dim: iREPA's projector, which mixes neighbours (arXiv 2512.10794).

    Zeros are around the grid, which keeps its size. Arguments as REPAProjector's; there is no hidden layer.
    """

    def __init__(
        self, decoder_dim: int, encoder_dim: int, hidden_dim: int = 2048, generator: torch.Generator | None = None
    ):
        super().__init__()
        self.decoder_dim, self.encoder_dim = decoder_dim, encoder_dim
        self.conv = nn.utils.skip_init(nn.Conv2d, decoder_dim, encoder_dim, kernel_size=3, padding=1)
        _initialise([self.conv], generator)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project [B, h, w, decoder_dim] to [B, h, w, encoder_dim]; ValueError for anything else."""
        _check_features(features, self.decoder_dim)
        return self.conv(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


PROJECTORS: dict[str, type[nn.Module]] = {"mlp": REPAProjector, "conv": REPAConvProjector}


def projector_parameters(decoder_dim: int, encoder_dim: int, projector: str = "mlp", hidden_dim: int = 2048) -> int:
    """Number of parameters of a projector; builds none."""
    with torch.device("meta"):
        module = PROJECTORS[projector](decoder_dim, encoder_dim, hidden_dim)
    return sum(parameter.numel() for parameter in module.parameters())


def _initialise(layers: Sequence[nn.Module], generator: torch.Generator | None) -> None:
    generator = generator or addressed_generator(0, "repa_projector")
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)


# The frozen encoder: DINOv2 (arXiv 2304.07193; `_reg`: with four register tokens, arXiv 2309.16588) from torch.hub.

DINOV2_REPOSITORY = "facebookresearch/dinov2"
DINOV2_WEIGHTS = "https://dl.fbaipublicfiles.com/dinov2"


class DINOv2:
    """The models of facebookresearch/dinov2, an EncoderFamily.

    GitHub and the weights server are asked only for what is not on this machine, the GitHub API and its rate limit
    never.
    """

    known = {
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

    def has(self, name: str) -> bool:
        return name in self.known

    def facts(self, name: str, image_size: int | None) -> EncoderFacts:
        return self.known[name].at(name, image_size)

    def weights_file(self, name: str, revision: str | None) -> Path:
        """Where torch.hub keeps a model's weights, which are the same for every revision of the code."""
        return torch_hub_dir() / "checkpoints" / os.path.basename(self.weights_url(name))

    def weights_url(self, name: str) -> str:
        backbone = name.removesuffix("_reg")
        return f"{DINOV2_WEIGHTS}/{backbone}/{backbone}{'_reg4' if name != backbone else ''}_pretrain.pth"

    def load(
        self, name: str, image_size: int, repo: str | None, weights: str | None, revision: str | None, trust: bool
    ) -> nn.Module:
        if repo is not None and revision is not None:
            raise ValueError(
                f"repa_encoder_revision is {revision}, but repa_encoder_repo is a folder, {repo}, of one revision: "
                "remove one of the two"
            )
        if repo is None:
            folder = _cached_repository(revision)
        else:
            check_trust(repo, trust)
            folder = Path(repo).expanduser()
            if not (folder / "hubconf.py").is_file():
                raise EncoderUnavailable(f"repa_encoder_repo is {folder}, which has no hubconf.py")
        file = given_weights(weights) or self.weights_file(name, revision)
        from_file = file.is_file()
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.filterwarnings("ignore", message="xFormers")
                if folder is not None:
                    model = torch.hub.load(str(folder), name, source="local", pretrained=not from_file)
                else:  # with a branch named and validation skipped, the GitHub API is left out
                    model = torch.hub.load(
                        f"{DINOV2_REPOSITORY}:{revision or 'main'}",
                        name,
                        pretrained=not from_file,
                        skip_validation=True,
                        trust_repo=True,
                    )
        except (OSError, HTTPException, BadZipFile) as error:
            tried = folder or f"{_hub_folder(revision or 'main')} (no hubconf.py there), then GitHub"
            raise EncoderUnavailable(
                f"{name} could not be loaded: tried the repository at {tried}; the weights at "
                f"{file if from_file else f'{file} (no such file), else their server'}; "
                f"{type(error).__name__}: {error}.\n{self.how_to_get(name, revision)}"
            ) from error
        except Exception as error:  # running the repository's code can raise anything
            raise EncoderUnavailable(
                f"{name} could not be built by the code in {folder or _hub_folder(revision or 'main')} "
                f"({type(error).__name__}: {error}): {_RENEW if repo is None else _REPLACE}"
            ) from error
        if from_file:
            state = read_weights(name, file)
            try:
                model.load_state_dict(state)
            except (RuntimeError, TypeError) as error:
                raise EncoderUnavailable(f"{file} does not hold the weights of {name}: {error}") from error
        logger.info("%s: repository %s, weights %s", name, folder or "from GitHub", file)
        return model

    def features(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        tokens = model.forward_features(images)["x_norm_patchtokens"]  # [B, gh * gw, dim]
        return tokens.transpose(1, 2).unflatten(2, (images.shape[2] // 14, images.shape[3] // 14))

    def how_to_get(self, name: str, revision: str | None) -> str:
        return (
            f"Without network, copy two things into the torch.hub cache, {torch_hub_dir()} (TORCH_HOME moves it):\n"
            f"  the folder with hubconf.py of https://github.com/{DINOV2_REPOSITORY}, "
            f"to {_hub_folder(revision or 'main')}\n"
            f"  {self.weights_url(name)}, to {self.weights_file(name, revision)}\n"
            "or keep them anywhere and name them in the YAML: repa_encoder_repo (the folder, with repa_encoder_trust: "
            "true, as its code is run), repa_encoder_weights (the file)."
        )


_REPLACE = (
    "that copy of the repository may be incomplete or older than this encoder. Put a complete and newer copy of "
    f"https://github.com/{DINOV2_REPOSITORY} in its place"
)
_RENEW = f"{_REPLACE}, or delete the folder, and it is downloaded again"  # in torch.hub's cache


def check_trust(repo: str, trust: bool) -> None:
    """Raise ConfigError if there is a hubconf.py in the folder `repo` and it may not be run.

    It may with `trust`, or if the folder is torch.hub's own copy of facebookresearch/dinov2.
    """
    folder = Path(repo).expanduser().resolve()
    own = _hub_folder("").resolve()
    is_torch_hubs = folder.parent == own.parent and folder.name.startswith(own.name)
    if not trust and not is_torch_hubs and (folder / "hubconf.py").is_file():
        raise ConfigError(
            f"repa_encoder_repo is {repo}: loading the encoder runs {folder / 'hubconf.py'} and the Python code beside "
            "it with all your rights, and only torch.hub's own copy of facebookresearch/dinov2 is trusted by itself. "
            "If you know where that code comes from, set repa_encoder_trust: true"
        )


def _hub_folder(revision: str) -> Path:
    """Where torch.hub keeps a revision of the repository."""
    return torch_hub_dir() / f"{DINOV2_REPOSITORY}/{revision}".replace("/", "_")


def _cached_repository(revision: str | None) -> Path | None:
    """The cached repository of `revision`, by default of main, then master, then any other; None without one."""
    folders = [_hub_folder(ref) for ref in ((revision,) if revision else ("main", "master", "*"))]
    for folder in folders:
        for hubconf in sorted(torch_hub_dir().glob(f"{folder.name}/hubconf.py")):
            return hubconf.parent
    incomplete = next((folder for folder in folders if folder.is_dir()), None)
    if incomplete is not None:
        raise EncoderUnavailable(f"the torch.hub cache has {incomplete} without hubconf.py: {_RENEW}")
    return None


# Encoders by name.

FAMILIES: tuple[EncoderFamily, ...] = (DINOv2(), EfficientNetLite0(), Timm())


def known_encoders() -> dict[str, EncoderFacts]:
    """Every named encoder, at its own image size; timm's are not among them."""
    return DINOv2.known | EfficientNetLite0.known


def encoder_facts(encoder_type: str, image_size: int | None = None) -> EncoderFacts:
    """What an encoder gives at an image size, by default its own; loads no weights and needs no network.

    Raises:
        ValueError: For an unknown name, a model without a feature grid, or a size that the encoder cannot take.
        EncoderUnavailable: For timm:NAME without timm.
    """
    return _family(encoder_type).facts(encoder_type, image_size)


def encoder_weights_file(
    encoder_type: str, repo: str | None = None, weights: str | None = None, revision: str | None = None
) -> Path | None:
    """The local file that `load_encoder` with these arguments takes its weights from; None if it is not here yet.

    Loads nothing and needs no network. `repo` makes no difference: it holds code.

    Raises:
        ValueError: For an unknown name.
    """
    family = _family(encoder_type)
    path = family.weights_file(encoder_type, revision) if weights is None else Path(weights).expanduser()
    return path if path is not None and path.is_file() else None


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
    facts, family = encoder_facts(encoder_type, image_size), _family(encoder_type)
    model = load_one_process_first(lambda: family.load(encoder_type, facts.image_size, repo, weights, revision, trust))
    return FrozenEncoder(encoder_type, model, family.features, facts, dtype)


def check_encoder_settings(encoder_type: str, encoder_dim: int | None, image_size: int | None) -> None:
    """Check settings of an encoder by name, before anything is loaded.

    Raises:
        ValueError: For an unknown name, or a number of channels or an image size that the encoder does not have.
        EncoderUnavailable: For timm:NAME without timm.
    """
    _check_dim(encoder_dim, encoder_type, encoder_facts(encoder_type, image_size).dim)


def _check_dim(given: int | None, name: str, actual: int) -> None:
    if given is not None and given != actual:
        raise ValueError(f"repa_encoder_dim is {given}, but {name} gives {actual}: set {actual} or null")


def _family(name: str) -> EncoderFamily:
    for family in FAMILIES:
        if family.has(str(name)):
            return family
    nearest = difflib.get_close_matches(str(name), known_encoders(), n=3, cutoff=0.4) or list(known_encoders())
    raise ValueError(
        f"repa_encoder_type is {name!r}, which is not a known encoder: use {' or '.join(nearest)}, "
        "or timm:NAME for a model of timm"
    )


def auto_target_size(encoder_grid: Sequence[int], decoder_grid: Sequence[int]) -> tuple[int, int]:
    """The finer of two grids (H, W), the one with more positions: what `repa_target_size: auto` means."""
    return tuple(max(encoder_grid, decoder_grid, key=lambda grid: grid[0] * grid[1]))


# Projector, encoder and loss together.


class REPAModule(nn.Module):
    """The REPA loss: a frozen encoder that gives targets, and the trained projector.

    `.encoder` is None until `load_encoder()`, and after `free_encoder()`. It is an attribute but no submodule: it is in
    no state dict, parameter list, train mode, cast or DDP bucket, and a checkpoint holds the projector alone. Features
    that were computed before make targets without it.

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
        if len(target_size) != 2 or min(target_size) < 1:
            raise ValueError(f"repa_target_size is {list(target_size)}, but must be [height, width], each at least 1")
        if projector not in PROJECTORS:
            raise ValueError(f"repa_projector is {projector!r}, expected one of {', '.join(PROJECTORS)}")
        if project_when not in ("after_resize", "before_resize"):
            raise ValueError(f"repa_project is {project_when!r}, expected after_resize or before_resize")
        if encoder is None:
            self.encoder_name, self.encoder_dim = encoder_type, encoder_facts(encoder_type, image_size).dim
        else:
            self.encoder_name, self.encoder_dim = encoder.name, encoder.dim
        _check_dim(encoder_dim, self.encoder_name, self.encoder_dim)
        self._load = functools.partial(
            load_encoder,
            self.encoder_name,
            repo=encoder_repo,
            weights=encoder_weights,
            image_size=image_size,
            revision=encoder_revision,
            dtype=encoder_dtype,
            trust=encoder_trust,
        )
        self.use_encoder(encoder)
        self.decoder_dim, self.n_layers = decoder_dim, n_layers
        self.target_size, self.project_when, self.spatial_norm = tuple(target_size), project_when, spatial_norm
        # The first projector is the same however many follow.
        seeds = [addressed_generator(seed, "repa_projector", *([i] if i else [])) for i in range(n_layers)]
        projectors = [PROJECTORS[projector](decoder_dim, self.encoder_dim, hidden_dim, draws) for draws in seeds]
        self.projector = projectors[0] if n_layers == 1 else nn.ModuleList(projectors)

    def load_encoder(self) -> nn.Module:
        """Load `.encoder`, unless it is there, and put it where the projector is; several processes have to together.

        Raises:
            EncoderUnavailable: If it is neither on this machine nor within reach.
        """
        if self.encoder is None:
            self.use_encoder(self._load())
        return self.encoder.to(next(self.projector.parameters()).device)

    def use_encoder(self, encoder: nn.Module | None) -> None:
        """Take an encoder as `.encoder`; None frees the one that is there."""
        if encoder is not None:
            encoder.eval().requires_grad_(False)
        self.__dict__["encoder"] = encoder  # `self.encoder = encoder` would make it a submodule

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

        Raises:
            ValueError: If `decoder_features` is not one tensor of that shape.
        """
        _check_features(decoder_features, self.decoder_dim, n_dims=4)
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
        if self.encoder is None:
            raise RuntimeError(f"{self.encoder_name} is not loaded or was freed: call repa_module.load_encoder() first")
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
        _check_features(decoder_features, self.n_layers * self.decoder_dim, n_dims=4)
        layers = decoder_features.split(self.decoder_dim, dim=-1)
        return [self.loss(self.project(features, i), target) for i, features in enumerate(layers)]

    def forward(self, decoder_features: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """The REPA loss of decoder features for images [B, 3, H, W] in [-1, 1]; arguments as `layer_losses`.

        Returns:
            Float32 scalar in [-1, 1]; -1 is perfect alignment.
        """
        return torch.stack(self.layer_losses(decoder_features, self.target_features(images))).mean()

    def extra_repr(self) -> str:
        return f"encoder={self.encoder_name} (frozen, {self.encoder_dim} channels), target_size={self.target_size}"


def _resize(features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear resize of [B, C, h, w] to [B, C, *size]."""
    if features.shape[-2:] == size:
        return features
    return F.interpolate(features, size, mode="bilinear", align_corners=False)


def _check_features(features: torch.Tensor, channels: int, n_dims: int | None = None) -> None:
    """Raise ValueError unless decoder features are one tensor [..., channels], with n_dims=4 [B, h, w, channels]."""
    if not isinstance(features, torch.Tensor):
        count = f" of {len(features)}" if isinstance(features, (list, tuple)) else ""
        raise ValueError(
            f"decoder features must be one tensor for the whole batch, but got a {type(features).__name__}{count}"
        )
    if features.shape[-1] != channels or n_dims not in (None, features.dim()):
        shape = "[..., {}]" if n_dims is None else "[B, h, w, {}]"
        raise ValueError(f"decoder features must be {shape.format(channels)}, but got {list(features.shape)}")


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


def normalised_target_sum(target: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Sum of the unit vectors of a target [B, C, H, W] over images and positions, float64 [C], and their number.

    Add both over batches (and ranks); sum / number is the mean that `constant_prediction_loss` takes.
    """
    with torch.autocast(target.device.type, enabled=False):
        unit = F.normalize(target.float(), dim=1, eps=NORM_EPS)
        return unit.sum(dim=(0, 2, 3), dtype=torch.float64), target[:, 0].numel()


def constant_prediction_loss(mean_normalised_target: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The REPA loss of predicting one vector at every position of every image: float32 scalar in [-1, 1].

    The mean of the unit target vectors is the best such vector: a projector that ignores the image reaches this loss
    and no lower, so alignment is what lies below it.

    Args:
        mean_normalised_target: [C], of any length; only its direction counts.
        target: [B, C, H, W].
    """
    return negative_cosine_similarity(mean_normalised_target.view(1, -1, 1, 1).expand_as(target), target)
