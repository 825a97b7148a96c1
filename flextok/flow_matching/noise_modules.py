"""Noise for rectified-flow training (arXiv 2209.03003)."""

import math
from typing import TypeVar

import torch
import torch.nn as nn

from ..utils.batching import dense_batches, per_image
from ..utils.random import BatchRandom

T = TypeVar("T", float, torch.Tensor)


def shifted(sigma: T, shift: float) -> T:
    """shift * sigma / (1 + (shift - 1) * sigma) of sigmas from 0 to 1 (SD3, arXiv 2403.03206, eq. 23); 1: as it is."""
    return shift * sigma / (1 + (shift - 1) * sigma)


class MinRFNoiseModule(nn.Module):
    """x_t = sigma * noise + (1 - sigma) * clean with one sigma in (0, 1) per image; timesteps = sigmas.

    Args:
        clean_images_read_key, noised_images_write_key: [B, C, H, W].
        timesteps_write_key, sigmas_write_key: fp32 [B].
        ln: Logit-normal sigmas (sigmoid of a normal); otherwise uniform, or by `mode_scale`.
        stratisfied: One quantile bin of the global batch per image, rather than independent draws.
        mode_scale: s in sigma = 1 - u - s * (cos(pi u / 2)^2 - 1 + u) (SD3, arXiv 2403.03206, eq. 20); ignored if `ln`.
        noise_write_key: Where the noise goes, [B, C, H, W].
        noise_read_key: Noise to use instead of drawing it, if the data_dict has it.
        ln_mean, ln_std: Mean and standard deviation of the normal of `ln`.
        shift: Time shift of the sigmas, however they are drawn: see `shifted`.
    """

    def __init__(
        self,
        clean_images_read_key: str,
        noised_images_write_key: str,
        timesteps_write_key: str,
        sigmas_write_key: str,
        ln: bool = True,
        stratisfied: bool = False,
        mode_scale: float | None = 0.0,
        noise_write_key: str = "flow_noise",
        noise_read_key: str | None = None,
        ln_mean: float = 0.0,
        ln_std: float = 1.0,
        shift: float = 1.0,
    ):
        super().__init__()
        self.clean_images_read_key = clean_images_read_key
        self.noised_images_write_key = noised_images_write_key
        self.timesteps_write_key = timesteps_write_key
        self.sigmas_write_key = sigmas_write_key
        self.ln = ln
        self.stratisfied = stratisfied
        self.mode_scale = mode_scale
        self.noise_write_key = noise_write_key
        self.noise_read_key = noise_read_key
        self.ln_mean, self.ln_std, self.shift = ln_mean, ln_std, shift

    def sample_sigmas(self, random: BatchRandom) -> torch.Tensor:
        """fp32 [B] in (0, 1)."""
        u = random.uniform("sigma")
        if self.stratisfied:
            u = (random.positions + u) / random.global_batch_size
        u = u.clamp(1e-7, 1 - 1e-7)
        if self.ln:
            sigmas = (self.ln_mean + self.ln_std * torch.special.ndtri(u)).sigmoid()
        elif self.mode_scale:
            sigmas = 1 - u - self.mode_scale * ((math.pi * u / 2).cos() ** 2 - 1 + u)
        else:
            sigmas = u
        return shifted(sigmas, self.shift).float().clamp(1e-9, 1 - 2**-24)

    @dense_batches
    def forward(self, data_dict: dict) -> dict:
        clean = data_dict[self.clean_images_read_key]
        random = BatchRandom.of(data_dict, clean)
        sigmas = self.sample_sigmas(random)
        noise = data_dict.get(self.noise_read_key) if self.noise_read_key is not None else None
        if noise is None:
            noise = random.normal("flow_noise", clean.shape[1:]).to(clean.dtype)
        sigma = per_image(sigmas, clean).to(clean.dtype)
        data_dict[self.noised_images_write_key] = sigma * noise + (1 - sigma) * clean
        data_dict[self.timesteps_write_key] = sigmas
        data_dict[self.sigmas_write_key] = sigmas
        data_dict[self.noise_write_key] = noise
        return data_dict
