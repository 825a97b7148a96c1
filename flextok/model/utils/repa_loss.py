"""REPA: pull a decoder's activations towards the features of a frozen vision encoder (arXiv 2410.06940).

Decoder features of one layer or several are resized to the target grid and projected to the encoder's channels, each
by a projector of its own; the loss is minus the mean cosine similarity with the encoder's features of the same images.
"""

import functools
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Type

import torch
import torch.nn.functional as F
from torch import nn

from ...utils.random import generator as addressed_generator
from .repa_encoders import (
    FrozenEncoder,
    check_encoder_dim,
    check_encoder_settings,
    device_only,
    encoder_facts,
    load_encoder,
)

# Vectors shorter than this are not stretched to unit length: a zero vector has similarity 0.
NORM_EPS = 1e-6


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
        self, decoder_dim: int, encoder_dim: int, hidden_dim: int = 2048, generator: Optional[torch.Generator] = None
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
        """Project [..., decoder_dim], channels last, to [..., encoder_dim].

        Raises:
            ValueError: If `features` is not one tensor with decoder_dim channels.
        """
        _check_channels(features, self.decoder_dim)
        return self.layers(features)


class REPAConvProjector(nn.Module):
    """One 3x3 convolution, decoder_dim -> encoder_dim: iREPA's projector, which mixes neighbours (arXiv 2512.10794).

    Zeros are around the grid, which keeps its size.

    Args:
        decoder_dim, encoder_dim, generator: As REPAProjector's.
        hidden_dim: Not used: there is no layer between.
    """

    def __init__(
        self, decoder_dim: int, encoder_dim: int, hidden_dim: int = 2048, generator: Optional[torch.Generator] = None
    ):
        super().__init__()
        self.decoder_dim, self.encoder_dim = decoder_dim, encoder_dim
        self.conv = nn.utils.skip_init(nn.Conv2d, decoder_dim, encoder_dim, kernel_size=3, padding=1)
        _initialise([self.conv], generator)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project [B, H, W, decoder_dim] to [B, H, W, encoder_dim].

        Raises:
            ValueError: If `features` is not one tensor of that shape.
        """
        _check_channels(features, self.decoder_dim)
        return self.conv(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


PROJECTORS: Dict[str, Type[nn.Module]] = {"mlp": REPAProjector, "conv": REPAConvProjector}


def projector_parameters(decoder_dim: int, encoder_dim: int, projector: str = "mlp", hidden_dim: int = 2048) -> int:
    """Number of parameters of a projector; builds none."""
    with torch.device("meta"):
        module = PROJECTORS[projector](decoder_dim, encoder_dim, hidden_dim)
    return sum(parameter.numel() for parameter in module.parameters())


def auto_target_size(encoder_grid: Sequence[int], decoder_grid: Sequence[int]) -> Tuple[int, int]:
    """The finer of two grids (H, W), the one with more positions: what `repa_target_size: auto` means."""
    return tuple(max(encoder_grid, decoder_grid, key=lambda grid: grid[0] * grid[1]))


class REPAModule(nn.Module):
    """The REPA loss: a frozen encoder that gives targets, and the trained projector.

    The encoder is a guest. It is loaded when `.encoder` is first asked for, and follows `.to(device)`, but it is no
    submodule: it is in no state dict, parameter list, train mode, cast or DDP bucket, and a checkpoint holds the
    projector alone. `repa.encoder = None` frees it for good; features that were computed before still make targets.

    Args:
        decoder_dim: Channels D of the decoder features of one layer.
        encoder_type: Name of the encoder, `timm:NAME` or one of `known_encoders()`.
        encoder_dim: Channels of the encoder as the caller believes them to be; checked. Default: ask the encoder.
        target_size: Grid (H, W) on which projections and targets are compared.
        image_size: Side in pixels of the encoder's input. Default: the encoder's own.
        encoder_repo, encoder_weights, encoder_revision, encoder_trust: See `load_encoder`.
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
        EncoderUnavailable: On access to `.encoder`, if it is neither on this machine nor within reach.
    """

    def __init__(
        self,
        decoder_dim: int,
        encoder_type: str = "dinov2_vitl14",
        encoder_dim: Optional[int] = None,
        target_size: Sequence[int] = (37, 37),
        image_size: Optional[int] = None,
        encoder_repo: Optional[str] = None,
        encoder_weights: Optional[str] = None,
        encoder_revision: Optional[str] = None,
        hidden_dim: int = 2048,
        seed: int = 0,
        encoder: Optional[nn.Module] = None,
        encoder_dtype: torch.dtype = torch.float32,
        n_layers: int = 1,
        projector: str = "mlp",
        project_when: str = "after_resize",
        spatial_norm: Optional[float] = None,
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
            check_encoder_settings(encoder_type, encoder_dim, image_size)
            self.encoder_name, self.encoder_dim = encoder_type, encoder_facts(encoder_type, image_size).dim
        else:
            check_encoder_dim(encoder_dim, encoder.name, encoder.dim)
            self.encoder_name, self.encoder_dim = encoder.name, encoder.dim
            encoder = encoder.eval().requires_grad_(False)
        self.encoder = encoder
        if encoder is None:
            self._load = functools.partial(
                load_encoder, encoder_type, encoder_repo, encoder_weights, image_size, encoder_revision, encoder_dtype,
                encoder_trust,
            )  # fmt: skip
        self.decoder_dim, self.n_layers = decoder_dim, n_layers
        self.target_size, self.project_when, self.spatial_norm = tuple(target_size), project_when, spatial_norm
        # The first projector is the same however many follow.
        seeds = [addressed_generator(seed, "repa_projector", *([i] if i else [])) for i in range(n_layers)]
        projectors = [PROJECTORS[projector](decoder_dim, self.encoder_dim, hidden_dim, draws) for draws in seeds]
        self.projector = projectors[0] if n_layers == 1 else nn.ModuleList(projectors)

    @property
    def encoder(self) -> Optional[FrozenEncoder]:
        if self._encoder is None and self._load is not None:
            self.encoder = self._load().to(next(self.projector.parameters()).device)
        return self._encoder

    @encoder.setter
    def encoder(self, encoder: Optional[nn.Module]) -> None:
        object.__setattr__(self, "_encoder", encoder)  # no submodule
        self._load: Optional[Callable[[], FrozenEncoder]] = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "encoder":
            object.__setattr__(self, name, value)  # to the property: nn.Module's own would register a submodule
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "REPAModule":
        super()._apply(fn, recurse)
        if self._encoder is not None:
            self._encoder._apply(device_only(fn))
        return self

    @property
    def projectors(self) -> List[nn.Module]:
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
        _check_tensor("decoder features", decoder_features)
        if decoder_features.dim() != 4 or decoder_features.shape[-1] != self.decoder_dim:
            raise ValueError(
                f"decoder features must be [B, h, w, {self.decoder_dim}], but got {list(decoder_features.shape)}"
            )
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
            RuntimeError: The encoder was freed.
        """
        if self.encoder is None:
            raise RuntimeError(f"{self.encoder_name} was freed (repa_module.encoder is None): it gives no features")
        return self.encoder(images).float()

    @torch.no_grad()
    def targets(self, encoder_features: torch.Tensor) -> torch.Tensor:
        """Features on the encoder's grid, [B, encoder_dim, gh, gw], to targets: float32 [B, encoder_dim, H, W]."""
        features = encoder_features.float()
        if self.spatial_norm is not None:
            features = spatially_normalised(features, self.spatial_norm)
        return _resize(features, self.target_size)

    def target_features(self, images: torch.Tensor) -> torch.Tensor:
        """The targets of images [B, 3, H, W] in [-1, 1]: float32 [B, encoder_dim, H, W].

        Raises:
            ValueError: If `images` has another shape.
            RuntimeError: The encoder was freed.
        """
        return self.targets(self.encoder_features(images))

    def loss(self, projected: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Minus the mean cosine similarity of two [B, encoder_dim, H, W]: float32 scalar in [-1, 1]."""
        return negative_cosine_similarity(projected, target)

    def layer_losses(self, decoder_features: torch.Tensor, target: torch.Tensor) -> List[torch.Tensor]:
        """The loss of each aligned layer; `repa_loss` is their mean.

        Args:
            decoder_features: [B, h, w, n_layers * decoder_dim], the layers one after the other in the channels.
            target: [B, encoder_dim, H, W].

        Raises:
            ValueError: If a shape is not as stated, or the two batch sizes differ.
        """
        _check_tensor("decoder features", decoder_features)
        if decoder_features.shape[-1] != self.n_layers * self.decoder_dim:
            raise ValueError(
                f"decoder features are {list(decoder_features.shape)}, expected {self.n_layers} x {self.decoder_dim} "
                "channels, last"
            )
        layers = decoder_features.split(self.decoder_dim, dim=-1)
        return [self.loss(self.project(features, i), target) for i, features in enumerate(layers)]

    def forward(self, decoder_features: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """The REPA loss of decoder features for images [B, 3, H, W] in [-1, 1]; arguments as `layer_losses`.

        Returns:
            Float32 scalar in [-1, 1]; -1 is perfect alignment.

        Raises:
            ValueError: If a shape is not as stated, or the two batch sizes differ.
        """
        return torch.stack(self.layer_losses(decoder_features, self.target_features(images))).mean()

    def extra_repr(self) -> str:
        return f"encoder={self.encoder_name} (frozen, {self.encoder_dim} channels), target_size={self.target_size}"


def spatially_normalised(features: torch.Tensor, gamma: float) -> torch.Tensor:
    """(x - gamma * mean) / (std + 1e-6), mean and std of each channel over the positions of each image.

    What all positions share says little about where things are; iREPA takes it away (arXiv 2512.10794, gamma 0.6).

    Args:
        features: [B, C, h, w].
    """
    std, mean = torch.std_mean(features, dim=(2, 3), keepdim=True)
    return (features - gamma * mean) / (std + 1e-6)


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


def normalised_target_sum(target: torch.Tensor) -> Tuple[torch.Tensor, int]:
    """Sum of the unit target vectors over images and positions, and their number.

    Add both over batches (and ranks); sum / number is the mean that `constant_prediction_loss` takes.

    Args:
        target: [B, C, H, W].

    Returns:
        Float64 [C] and B * H * W.
    """
    with torch.autocast(target.device.type, enabled=False):
        return _unit_vectors(target).sum(dim=(0, 2, 3), dtype=torch.float64), target[:, 0].numel()


def constant_prediction_loss(mean_normalised_target: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The REPA loss of predicting one vector at every position of every image.

    The mean of the unit target vectors is the best such vector: a projector that ignores the image reaches this loss
    and no lower, so alignment is what lies below it.

    Args:
        mean_normalised_target: [C], of any length; only its direction counts.
        target: [B, C, H, W].

    Returns:
        Float32 scalar in [-1, 1].
    """
    return negative_cosine_similarity(mean_normalised_target.view(1, -1, 1, 1).expand_as(target), target)


def _initialise(layers: Sequence[nn.Module], generator: Optional[torch.Generator]) -> None:
    generator = generator or addressed_generator(0, "repa_projector")
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)


def _unit_vectors(features: torch.Tensor) -> torch.Tensor:
    return F.normalize(features.float(), dim=1, eps=NORM_EPS)


def _resize(features: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    """Bilinear resize of [B, C, h, w] to [B, C, *size]."""
    if features.shape[-2:] == size:
        return features
    return F.interpolate(features, size, mode="bilinear", align_corners=False)


def _check_channels(features: torch.Tensor, decoder_dim: int) -> None:
    _check_tensor("decoder features", features)
    if features.shape[-1] != decoder_dim:
        raise ValueError(
            f"decoder features have {features.shape[-1]} channels {list(features.shape)}, but the projector takes "
            f"{decoder_dim}, channels last"
        )


def _check_tensor(what: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        count = f" of {len(value)}" if isinstance(value, (list, tuple)) else ""
        raise ValueError(f"{what} must be one tensor for the whole batch, but got a {type(value).__name__}{count}")
