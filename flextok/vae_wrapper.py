"""Images to latents and back."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from .utils.batching import dense_batches
from .utils.config import ConfigError
from .utils.dtypes import parse_dtype, precision
from .utils.random import BatchRandom

# The architecture of the published VAEs (`EPFL-VILAB/flextok_vae_c4|c8|c16`).
AUTOENCODER_KL = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
)


class StableDiffusionVAE(nn.Module):
    """A diffusers AutoencoderKL (`.vae`): images [B, 3, H, W] in [-1, 1] <-> latents [B, C, H / 8, W / 8].

    Args:
        images_read_key, vae_latents_write_key: What `encode` reads and writes.
        vae_latents_read_key, images_reconst_write_key: What `decode` reads and writes.
        vae_kl_loss_write_key: Where `encode` writes the KL divergence of a VAE that is not frozen: [] fp32, the mean
            over images, in nats per image.
        scaling_factor: Latents are the VAE's own times this; None: the number in the VAE's own config.
        dtype_override: Precision of the VAE, whatever autocast is in force; None: follow autocast.
        hf_hub_path: Hub name (with `@revision` to pin one) or folder of the VAE's weights; None: random weights, to be
            loaded or trained.
        sample_posterior: Latents are a sample of the posterior; otherwise its mode.
        compile_encode_fn: Encode through torch.compile.
        force_vae_encode: Encode even if the data_dict already holds latents.
        frozen: No parameter is trained.
        load_weights: Whether hf_hub_path is read for weights, or for the architecture alone.
    """

    def __init__(
        self,
        images_read_key: str,
        vae_latents_read_key: str,
        vae_latents_write_key: str,
        images_reconst_write_key: str,
        vae_kl_loss_write_key: str = "vae_kl_loss",
        latent_channels: int = 16,
        scaling_factor: float | None = None,
        dtype_override: str | None = "fp32",
        hf_hub_path: str | None = None,
        sample_posterior: bool = True,
        learnable_logvar: bool = False,
        logvar_init: float = 0.0,
        compile_encode_fn: bool = False,
        force_vae_encode: bool = True,
        frozen: bool = False,
        load_weights: bool = True,
    ):
        super().__init__()
        self.images_read_key = images_read_key
        self.vae_latents_write_key = vae_latents_write_key
        self.vae_latents_read_key = vae_latents_read_key
        self.images_reconst_write_key = images_reconst_write_key
        self.vae_kl_loss_write_key = vae_kl_loss_write_key
        self.latent_channels = latent_channels
        self.dtype_override = parse_dtype(dtype_override)
        self.sample_posterior = sample_posterior
        self.force_vae_encode = force_vae_encode
        self.frozen = frozen
        self.hf_hub_path, self.vae = self._build(hf_hub_path, latent_channels, load_weights)
        self.scaling_factor = self.vae.config.scaling_factor if scaling_factor is None else scaling_factor
        if learnable_logvar:
            self.logvar = nn.Parameter(torch.tensor(float(logvar_init)))
        if frozen:
            self.requires_grad_(False)
        self._encode = torch.compile(self.vae.encode) if compile_encode_fn else self.vae.encode

    @staticmethod
    def _build(path: str | None, latent_channels: int, load_weights: bool) -> tuple[str | None, nn.Module]:
        """Path of the VAE without a revision, and its model."""
        from diffusers import AutoencoderKL  # imported here: slow, and pixel models do not need it

        if path is None:
            return None, AutoencoderKL(**AUTOENCODER_KL, latent_channels=latent_channels)
        is_local, revision = Path(path).is_dir(), None
        if not is_local:
            path, _, revision = path.partition("@")
        at = {} if is_local else {"revision": revision or None}
        if not load_weights:  # they come from elsewhere: its architecture, where it can be had without waiting
            try:
                config = AutoencoderKL.load_config(path, **({**at, "local_files_only": True} if at else {}))
                return path, AutoencoderKL.from_config(config)
            except (OSError, ValueError):
                return path, AutoencoderKL(**AUTOENCODER_KL, latent_channels=latent_channels)
        try:
            vae = AutoencoderKL.from_pretrained(path, low_cpu_mem_usage=False, **at)
        except (OSError, ValueError) as error:
            raise RuntimeError(
                f"the VAE {path!r} is neither a folder, nor in the Hugging Face cache, nor can it be downloaded "
                f"({error}): download it elsewhere (`hf download {path}`) and copy the folder, or the cache, here"
            ) from error
        if vae.config.latent_channels != latent_channels:
            raise ValueError(
                f"latent_channels is {latent_channels}, but the VAE {path!r} has {vae.config.latent_channels}"
            )
        return path, vae

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent in each dimension."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def train(self, mode: bool = True) -> "StableDiffusionVAE":
        return super().train(mode and not self.frozen)

    def _no_grad_if_frozen(self):
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen)

    @dense_batches
    def encode(self, data_dict: dict) -> dict:
        """Write latents [B, C, H / 8, W / 8] of images [B, 3, H, W], unless they are there and not to be replaced.

        Raises:
            ValueError: Images that are not floats, or of another shape.
        """
        if not self.force_vae_encode and self.vae_latents_write_key in data_dict:
            return data_dict
        posterior = self._posterior(data_dict[self.images_read_key])
        if not self.frozen:
            data_dict[self.vae_kl_loss_write_key] = posterior.kl().mean()
        moments = torch.stack([posterior.mode(), posterior.std], dim=1)
        data_dict[self.vae_latents_write_key] = self.latents_from_moments(moments, data_dict)
        return data_dict

    def moments(self, images: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation of the posterior of images [B, 3, H, W]: float32 [B, 2, C, H / 8, W / 8]."""
        posterior = self._posterior(images)
        return torch.stack([posterior.mode(), posterior.std], dim=1).float()

    def latents_from_moments(self, moments: torch.Tensor, data_dict: dict) -> torch.Tensor:
        """Latents float32 [B, C, H / 8, W / 8] from what `moments` gives: a sample by address, or the mode."""
        latents, std = moments.unbind(dim=1)
        if self.sample_posterior:
            noise = BatchRandom.of(data_dict, moments).normal("vae_posterior", latents.shape[1:])
            latents = latents + std * noise.to(latents.dtype)
        return latents.float() * self.scaling_factor

    def _posterior(self, images: torch.Tensor):
        """The diagonal Gaussian of images, in this module's precision."""
        _check_images(images, self.downsample_factor)
        with self._no_grad_if_frozen(), precision(images.device, self.dtype_override):
            return self._encode(images.to(self.dtype_override or images.dtype)).latent_dist

    @dense_batches
    def decode(self, data_dict: dict) -> dict:
        """Write images [B, 3, H, W], in about [-1, 1], of latents [B, C, H / 8, W / 8]."""
        latents = data_dict[self.vae_latents_read_key] / self.scaling_factor
        with self._no_grad_if_frozen(), precision(latents.device, self.dtype_override):
            images = self.vae.decode(latents.to(self.dtype_override or latents.dtype)).sample
        data_dict[self.images_reconst_write_key] = images.float()
        return data_dict

    def loss(self, data_dict: dict, kl_weight: float) -> torch.Tensor:
        """Mean squared reconstruction error plus weighted KL divergence of images, of a VAE that is trained.

        Leaves detached latents in the data_dict: what is computed from them later trains other modules alone.
        """
        self.encode(data_dict)
        latents, images = data_dict[self.vae_latents_write_key], data_dict[self.images_read_key]
        reconstruction = self.decode({self.vae_latents_read_key: latents})[self.images_reconst_write_key]
        data_dict[self.vae_latents_write_key] = latents.detach()
        return F.mse_loss(reconstruction, images.float()) + kl_weight * data_dict[self.vae_kl_loss_write_key]


class PixelUnshuffleVAE(nn.Module):
    """A lossless stand-in for a VAE: each factor x factor block of pixels becomes one latent of 3 * factor^2 channels.

    Nothing is learned, so a model can be trained from scratch with no pretrained weights. Same interface as
    StableDiffusionVAE. Neighbouring pixels say nearly the same, so an image shows through noise that would hide a VAE's
    latents; a small `scaling_factor` on pixels in [-1, 1] moves training to noise levels where the tokens matter.
    """

    def __init__(
        self,
        images_read_key: str = "rgb",
        vae_latents_read_key: str = "vae_latents_reconst",
        vae_latents_write_key: str = "vae_latents",
        images_reconst_write_key: str = "rgb_reconst",
        factor: int = 4,
        scaling_factor: float = 0.5,
        force_vae_encode: bool = True,
    ):
        super().__init__()
        if factor < 1 or scaling_factor <= 0:
            raise ValueError(f"factor is {factor} and scaling_factor {scaling_factor}, expected positive numbers")
        self.images_read_key = images_read_key
        self.vae_latents_write_key = vae_latents_write_key
        self.vae_latents_read_key = vae_latents_read_key
        self.images_reconst_write_key = images_reconst_write_key
        self.downsample_factor = factor
        self.scaling_factor = scaling_factor
        self.force_vae_encode = force_vae_encode
        self.latent_channels = 3 * factor**2
        self.frozen = True

    @dense_batches
    def encode(self, data_dict: dict) -> dict:
        """Images [B, 3, H, W] -> latents [B, latent_channels, H / factor, W / factor]."""
        if not self.force_vae_encode and self.vae_latents_write_key in data_dict:
            return data_dict
        images = data_dict[self.images_read_key]
        _check_images(images, self.downsample_factor)
        data_dict[self.vae_latents_write_key] = self.to_latents(images.float()) * self.scaling_factor
        return data_dict

    @dense_batches
    def decode(self, data_dict: dict) -> dict:
        """Latents [B, latent_channels, h, w] -> images [B, 3, h * factor, w * factor], the inverse of `encode`."""
        latents = data_dict[self.vae_latents_read_key].float() / self.scaling_factor
        data_dict[self.images_reconst_write_key] = self.to_images(latents)
        return data_dict

    def to_latents(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] -> unscaled latents [B, latent_channels, H / factor, W / factor]."""
        return F.pixel_unshuffle(images, self.downsample_factor)

    def to_images(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_latents`."""
        return F.pixel_shuffle(latents, self.downsample_factor)


# Typical standard deviations of an image's block coefficients, per pixel of the block's side: brightness and the two
# colour differences at frequency 0; they fall as 1 / (1 + DCT_DECAY * frequency). Measured on emoji.
DCT_STD = (0.8, 0.25, 0.12)
DCT_DECAY = 1.7
# Brightness, red against blue, green against both: orthonormal.
OPPONENT_COLOURS = ((1, 1, 1), (1, 0, -1), (1, -2, 1))


class BlockDCTVAE(PixelUnshuffleVAE):
    """A fixed stand-in for a VAE that compresses: the lowest frequencies of each factor x factor block of pixels.

    Brightness and two colour differences of a block go through an orthonormal two-dimensional DCT; the coefficients of
    lowest frequency are kept, the rest is lost. Nothing is learned. A few numbers per patch are what a small decoder
    can predict, and each has about unit variance, as the latents of a VAE.

    Args:
        factor: Side of a block in pixels.
        coefficients: Kept coefficients of brightness and of each colour difference; [n, 0] is grey.
        whitening: 1: every number has about unit variance, so that all frequencies weigh the same in the losses; 0: the
            numbers as they are, so that they weigh as what one sees, 0.5: between the two, their standard deviations
            to the power of 0.5.
        scaling_factor: Factor on the latents.
    """

    def __init__(
        self,
        images_read_key: str = "rgb",
        vae_latents_read_key: str = "vae_latents_reconst",
        vae_latents_write_key: str = "vae_latents",
        images_reconst_write_key: str = "rgb_reconst",
        factor: int = 8,
        coefficients: Sequence[int] = (10, 3),
        whitening: float = 1.0,
        scaling_factor: float = 1.0,
        force_vae_encode: bool = True,
    ):
        super().__init__(
            images_read_key,
            vae_latents_read_key,
            vae_latents_write_key,
            images_reconst_write_key,
            factor,
            scaling_factor,
            force_vae_encode,
        )
        check_coefficients(coefficients, factor)
        n = torch.arange(factor, dtype=torch.float64)
        dct = (math.pi * n[:, None] * (2 * n + 1) / (2 * factor)).cos() * math.sqrt(2 / factor)
        dct[0] /= math.sqrt(2)
        frequencies = [(u, v) for u in range(factor) for v in range(factor)]
        frequencies.sort(key=lambda uv: (math.hypot(*uv), uv))
        rows, stds = [], []
        counts = (coefficients[0], coefficients[1], coefficients[1])
        for colour, std, count in zip(OPPONENT_COLOURS, DCT_STD, counts, strict=True):
            colour = torch.tensor(colour, dtype=torch.float64)
            for u, v in frequencies[:count]:
                rows.append(torch.einsum("c,i,j->cij", colour / colour.norm(), dct[u], dct[v]).flatten())
                stds.append((std * factor / (1 + DCT_DECAY * math.hypot(u, v))) ** whitening)
        rows = torch.stack(rows)
        stds = torch.tensor(stds, dtype=torch.float64)[:, None]
        self.latent_channels = len(rows)
        self.register_buffer("analysis", (rows / stds).float(), persistent=False)  # [latent_channels, 3 * factor^2]
        self.register_buffer("synthesis", (rows * stds).float(), persistent=False)

    def to_latents(self, images: torch.Tensor) -> torch.Tensor:
        with precision(images.device, torch.float32):
            return torch.einsum("kc,bchw->bkhw", self.analysis, super().to_latents(images))

    def to_images(self, latents: torch.Tensor) -> torch.Tensor:
        with precision(latents.device, torch.float32):
            return super().to_images(torch.einsum("kc,bkhw->bchw", self.synthesis, latents))


def check_coefficients(coefficients: Sequence[int], factor: int, name: str = "coefficients") -> None:
    """Raise ConfigError unless BlockDCTVAE can keep so many coefficients of a block of factor x factor pixels."""
    valid = isinstance(coefficients, (list, tuple)) and [type(n) for n in coefficients] == [int, int]
    if not valid or not 1 <= coefficients[0] <= factor**2 or not 0 <= coefficients[1] <= factor**2:
        raise ConfigError(
            f"{name} is {coefficients}, expected two whole numbers: coefficients of brightness, 1 to {factor**2}, and "
            f"of each colour difference, 0 to {factor**2}"
        )


def _check_images(images: torch.Tensor, factor: int) -> None:
    """Raise ValueError unless images are floats [B, 3, H, W] whose sides are multiples of `factor`."""
    expected = f"expected floats [B, 3, H, W] in [-1, 1] with H and W multiples of {factor}"
    if not isinstance(images, torch.Tensor):
        raise ValueError(f"images are a {type(images).__name__}, {expected}")
    if not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype}, expected floats in [-1, 1]: convert pixels of 0 to 255 by images / 127.5 - 1"
        )
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
        raise ValueError(f"images are {list(images.shape)}, {expected}")
