"""Whether the tokens work: flow loss by token count and noise level, codes in use, reconstructions by token count."""

from typing import Callable, Dict, Iterator, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..evaluation.tokens import code_statistics
from ..utils.random import BatchRandom

NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
POSITIONS = (1, 2, 4)  # whose codes are looked at, counted from 1
LEAST_RISE = 0.1  # dB of PSNR from one token to all of them, below which the others carry nothing


def powers_of_four(n: int) -> List[int]:
    """1, 4, 16 ... up to n, and n itself."""
    return sorted({4**i for i in range(n.bit_length()) if 4**i <= n} | {n})


def flow_loss_names(n_registers: int) -> List[str]:
    return [f"flow_loss_k{k}" for k in powers_of_four(n_registers)] + [f"flow_loss_t{t}" for t in NOISE_LEVELS]


def flow_losses(model: nn.Module, encoded: dict, random: BatchRandom) -> Dict[str, torch.Tensor]:
    """Flow loss of a batch by token count and by noise level, with fixed noise and no sampler.

    `flow_loss_k4` is that from the first 4 tokens, with noise levels drawn as in training; `flow_loss_t0.5` that from
    all tokens at noise level 0.5. Each is one pass of the decoder.

    Args:
        encoded: What `model.encode` gives.
        random: Draws noise and noise levels.
    """
    noise_module, pipeline = model.flow_matching_noise_module, model.pipeline
    latents = encoded[noise_module.clean_images_read_key]
    quants = encoded[model.regularizer.quants_write_key]
    noise = random.normal("flow_noise", latents.shape[1:]).to(latents.dtype)

    def loss(keep_k: int, sigmas: torch.Tensor) -> torch.Tensor:
        sigma = sigmas.view(-1, 1, 1, 1).to(latents.dtype)
        data = {
            pipeline.latents_read_key: quants,
            pipeline.noised_images_read_key: sigma * noise + (1 - sigma) * latents,
            pipeline.timesteps_read_key: sigmas,
            **model.kept_tokens([keep_k] * len(latents)),
        }
        return F.mse_loss(model.decoder(data)[pipeline.reconst_write_key].float(), (noise - latents).float())

    sigmas, n = noise_module.sample_sigmas(random), model.n_registers
    losses = {f"flow_loss_k{k}": loss(k, sigmas) for k in powers_of_four(n)}
    for level in NOISE_LEVELS:
        losses[f"flow_loss_t{level}"] = loss(n, torch.full_like(sigmas, level))
    return losses


def code_metrics(tokens: torch.Tensor, codebook_size: int) -> Dict[str, float]:
    """Share of images with a code of their own, and entropy in bits, at the positions 1, 2 and 4 of tokens [N, L]."""
    statistics = code_statistics(tokens, codebook_size)
    metrics = {}
    for position in (p for p in POSITIONS if p <= tokens.shape[1]):
        metrics[f"codes_distinct_{position}"] = statistics["used"][position - 1] / len(tokens)
        metrics[f"codes_entropy_{position}"] = statistics["entropy_bits"][position - 1]
    return metrics


def reconstructions(
    model: nn.Module, encoded: dict, noise: torch.Tensor, counts: List[int], before_each: Callable[[], None], **sampler
) -> Iterator[Tuple[int, torch.Tensor]]:
    """(k, images [B, 3, H, W]) of a batch from its first k tokens, for each of `counts`.

    Args:
        encoded: What `model.encode` gives.
        noise: The sampler's start, of the latents' shape.
        before_each: Called before each count; may raise.
        sampler: timesteps, guidance_scale and perform_norm_guidance of `model.decode`.
    """
    for k in counts:
        before_each()
        data = {
            model.pipeline.latents_read_key: encoded[model.regularizer.quants_write_key],
            model.pipeline.noise_read_key: noise,
            **model.kept_tokens([k] * len(noise)),
        }
        yield k, model.decode(data, **sampler)[model.vae.images_reconst_write_key].float().clamp(-1, 1)


def psnr(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each image, [B], for images [B, 3, H, W] in [-1, 1] (peak 2)."""
    return -10 * ((images - originals).square().flatten(1).mean(1) / 4).log10()


def tokens_warning(tokens: Optional[torch.Tensor] = None, psnr_by_count: Optional[Dict[int, float]] = None) -> str:
    """What is wrong with the tokens of some images, in plain words; empty if nothing is seen to be.

    Args:
        tokens: Tokens [N, L] of the images.
        psnr_by_count: PSNR in dB of their reconstructions by token count.
    """
    advice = (
        "The decoder works without them. Train longer; if that does not help: readout_weight 1 with a larger readout_lr "
        "(new models), a smaller encoder_lr, or latents of fewer channels (README, 'What makes tokens useful sooner')"
    )
    if tokens is not None and len(tokens) > 1 and bool((tokens == tokens[0]).all()):
        return f"the tokens carry nothing: all {len(tokens)} images have the same code at every position. {advice}"
    if psnr_by_count and max(psnr_by_count) > min(psnr_by_count):
        first, last = min(psnr_by_count), max(psnr_by_count)
        if psnr_by_count[last] < psnr_by_count[first] + LEAST_RISE:
            return (
                f"the tokens carry nothing beyond the first {first}: PSNR does not rise with them "
                f"({psnr_by_count[first]:.2f} dB from {first}, {psnr_by_count[last]:.2f} dB from {last}). {advice}"
            )
    return ""
