"""REPA: pull a decoder's activations towards the features of a frozen vision encoder (arXiv 2410.06940).

Decoder features of one layer are resized to the target grid and projected to the encoder's channels; the loss is minus
the mean cosine similarity with the encoder's features of the same images.
"""

from typing import Any, Callable, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from ...utils.random import generator as addressed_generator
from .repa_encoders import (
    FrozenEncoder,
    check_encoder_dim,
    check_encoder_settings,
    device_only,
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
        generator = generator or addressed_generator(0, "repa_projector")
        for linear in linears:
            nn.init.xavier_uniform_(linear.weight, generator=generator)
            nn.init.zeros_(linear.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project [..., decoder_dim], channels last, to [..., encoder_dim].

        Raises:
            ValueError: If `features` is not one tensor with decoder_dim channels.
        """
        _check_tensor("decoder features", features)
        if features.shape[-1] != self.decoder_dim:
            raise ValueError(
                f"decoder features have {features.shape[-1]} channels {list(features.shape)}, but the projector takes "
                f"{self.decoder_dim}, channels last"
            )
        return self.layers(features)


def projector_parameters(decoder_dim: int, encoder_dim: int) -> int:
    """Number of parameters of a REPAProjector; builds none."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in REPAProjector(decoder_dim, encoder_dim).parameters())


class REPAModule(nn.Module):
    """The REPA loss: a frozen encoder that gives targets, and the trained projector.

    The encoder is a guest. `.encoder` follows `.to(device)`, but it is no submodule: it is in no state dict, parameter
    list, train mode, cast or DDP bucket, and a checkpoint holds the projector alone. `repa.encoder = None` frees it.

    Args:
        decoder_dim: Channels D of the decoder features.
        encoder_type: Name of the encoder, one of `known_encoders()`.
        encoder_dim: Channels of the encoder as the caller believes them to be; checked. Default: ask the encoder.
        target_size: Grid (H, W) on which projections and targets are compared.
        image_size: Side in pixels of the encoder's input. Default: the encoder's own.
        encoder_repo, encoder_weights, encoder_revision: See `load_encoder`.
        hidden_dim: Width of the projector.
        seed: Seed of the projector's initial weights.
        encoder: An encoder already loaded, images [B, 3, H, W] -> features [B, dim, gh, gw], with attributes `dim`
            and `name`. The settings that load one are then unused.

    Raises:
        ValueError: For an unknown encoder, or numbers that do not fit it.
        EncoderUnavailable: If the encoder is neither on this machine nor within reach.
    """

    encoder: Optional[FrozenEncoder]

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
    ):
        super().__init__()
        if len(target_size) != 2 or min(target_size) < 1:
            raise ValueError(f"repa_target_size is {list(target_size)}, but must be [height, width], each at least 1")
        if encoder is None:
            check_encoder_settings(encoder_type, encoder_dim, image_size)
            encoder = load_encoder(encoder_type, encoder_repo, encoder_weights, image_size, encoder_revision)
        check_encoder_dim(encoder_dim, encoder.name, encoder.dim)
        self.decoder_dim, self.encoder_dim = decoder_dim, encoder.dim
        self.target_size = tuple(target_size)
        self.encoder = encoder.eval().requires_grad_(False)
        self.projector = REPAProjector(
            decoder_dim, encoder.dim, hidden_dim, addressed_generator(seed, "repa_projector")
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "encoder":
            object.__setattr__(self, name, value)  # nn.Module's own would register it as a submodule
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "REPAModule":
        super()._apply(fn, recurse)
        if self.encoder is not None:
            self.encoder._apply(device_only(fn))
        return self

    def project(self, decoder_features: torch.Tensor) -> torch.Tensor:
        """Resize decoder features to the target grid, then project each position.

        Args:
            decoder_features: [B, h, w, decoder_dim].

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
        resized = _resize(decoder_features.permute(0, 3, 1, 2), self.target_size)
        return self.projector(resized.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    @torch.no_grad()
    def target_features(self, images: torch.Tensor) -> torch.Tensor:
        """The encoder's features of images [B, 3, H, W] in [-1, 1] on the target grid: float32 [B, encoder_dim, H, W].

        Raises:
            ValueError: If `images` has another shape.
        """
        return _resize(self.encoder(images).float(), self.target_size)

    def loss(self, projected: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Minus the mean cosine similarity of two [B, encoder_dim, H, W]: float32 scalar in [-1, 1]."""
        return negative_cosine_similarity(projected, target)

    def forward(self, decoder_features: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """The REPA loss of decoder features [B, h, w, decoder_dim] for images [B, 3, H, W] in [-1, 1].

        Returns:
            Float32 scalar in [-1, 1]; -1 is perfect alignment.

        Raises:
            ValueError: If a shape is not as stated, or the two batch sizes differ.
        """
        return self.loss(self.project(decoder_features), self.target_features(images))

    def extra_repr(self) -> str:
        encoder = None if self.encoder is None else self.encoder.name
        return f"encoder={encoder} (frozen, {self.encoder_dim} channels), target_size={self.target_size}"


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
        cosine = (_unit_vectors(prediction) * _unit_vectors(target)).sum(dim=1)
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


def _unit_vectors(features: torch.Tensor) -> torch.Tensor:
    return F.normalize(features.float(), dim=1, eps=NORM_EPS)


def _resize(features: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    """Bilinear resize of [B, C, h, w] to [B, C, *size]."""
    if features.shape[-2:] == size:
        return features
    return F.interpolate(features, size, mode="bilinear", align_corners=False)


def _check_tensor(what: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        count = f" of {len(value)}" if isinstance(value, (list, tuple)) else ""
        raise ValueError(f"{what} must be one tensor for the whole batch, but got a {type(value).__name__}{count}")
