"""Small FlexTok models and inputs that several test files use."""

import math
import socket

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from flextok import FlexTokFromHub
from flextok.model.builder import build_config
from flextok.utils.random import BatchRandom

N_REGISTERS = 8
LATENT_SHAPE = (48, 8, 8)


def tiny_config(**overrides) -> dict:
    """A pixel model: 32 x 32 images, latents 48 x 8 x 8, 16 patches, 8 registers, two blocks of width 64 each way."""
    arguments = dict(
        encoder_depth=2, decoder_depth=2, encoder_width=64, decoder_width=64, head_dim=32, n_registers=N_REGISTERS,
        img_size=32, vae="pixel", vae_factor=4,
    )  # fmt: skip
    return build_config(**{**arguments, **overrides})


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every trained parameter random values, so that no layer that starts at zero hides an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                std = 1 / math.sqrt(parameter.shape[1]) if parameter.ndim == 2 else 0.3
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module


def tiny_model(seed: int = 0, **overrides) -> FlexTokFromHub:
    """The model of `tiny_config`, random and in evaluation mode."""
    return randomise(FlexTokFromHub(tiny_config(**overrides)), seed).eval()


def tiny_model_that_draws(**overrides) -> FlexTokFromHub:
    """A `tiny_model` with every option on that draws random numbers in training; in training mode."""
    config = tiny_config(null_condition_prob=0.3, **overrides)
    config["regularizer"].update(drop_quant_p=0.3, corrupt_tokens_p=0.5, apply_corrupt_tokens_p=0.5)
    config["encoder"]["module_dict"]["enc_register_module"]["n_min"] = 4
    for part, name in (("encoder", "enc_transformer"), ("decoder", "dec_transformer")):
        config[part]["module_dict"][name].update(drop=0.1, drop_path_rate=0.3)
    return randomise(FlexTokFromHub(config)).train()


def make_images(n: int, height: int = 32, width: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def pillow_square(file, size: int = 32, crop: str = "center", place: float = 0.5, window=None) -> torch.Tensor:
    """A square of an image file by Pillow and numpy alone, [3, size, size] in [-1, 1]: all of it scaled, then cropped.

    `place` is where along the longer side the square lies, 0 to 1. Large JPEGs are decoded at a reduced size, no less
    than twice `size`, but not for `adm`, nor where `window` gives a box for the size of an image, which is scaled.
    """
    image = Image.open(file)
    if crop != "adm" and window is None:
        image.draft("RGB", (2 * size, 2 * size))
    image = ImageOps.exif_transpose(image).convert("RGB")
    if window is not None:
        image, x, y = image.resize((size, size), Image.Resampling.BICUBIC, box=window(image.size)), 0, 0
    elif crop == "adm":
        while min(image.size) // 2 >= size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        image = image.resize([round(n * size / min(image.size)) for n in image.size], Image.Resampling.BICUBIC)
        x, y = ((n - size) // 2 for n in image.size)
    else:
        side = min(image.size)
        whole = [n * size // side for n in image.size]
        image = image.resize(whole, Image.Resampling.BICUBIC, box=(0, 0, *(n * side / size for n in whole)))
        x, y = (round(place * (n - size)) for n in whole)
    pixels = np.asarray(image)[y : y + size, x : x + size].astype(np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def make_noise(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_draws(n: int, seed: int = 7, step: int = 3) -> BatchRandom:
    return BatchRandom(seed, step, torch.arange(n), n)


def pack(batch: torch.Tensor, container: str) -> torch.Tensor | list[torch.Tensor]:
    """A batch as it is, or as a list of [1, ...]."""
    return batch if container == "batch" else list(batch.split(1))


def unpack(value: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """The inverse of `pack`."""
    return value if isinstance(value, torch.Tensor) else torch.cat(value)


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of a module by parameter name; parameters without one are left out."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def cut_off_network(monkeypatch, torch_home) -> None:
    """A machine without network, with an empty torch.hub cache in the folder `torch_home`."""

    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(torch_home))


def save_tiny_vae(folder, seed: int = 0, **options):
    """Write a random diffusers AutoencoderKL of 8 channels, 4 latent channels and scaling factor 0.5; returns it."""
    from diffusers import AutoencoderKL  # imported here: slow, and most tests do not need it

    arguments = dict(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(**{**arguments, **options}).eval()
    vae.save_pretrained(folder)
    return vae
