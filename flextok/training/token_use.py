"""Whether the tokens work: flow loss by token count and noise level, codes in use, reconstructions by token count."""

import logging
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Dataset

from ..data.batch import plain_images
from ..evaluation.tokens import code_statistics
from ..utils.config import ConfigError, nearest
from ..utils.random import RANDOM_KEY, TOKENS_STEP, BatchRandom
from .config import TrainConfig

log = logging.getLogger("flextok")

NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
POSITIONS = (1, 2, 4)  # whose codes are looked at, counted from 1
MEAN_IMAGES = 1000
LEAST_RISE = 0.1  # dB of PSNR from one token to all of them, below which the others carry nothing


def powers_of_four(n: int) -> list[int]:
    """1, 4, 16 ... up to n, and n itself."""
    return sorted({4**i for i in range(n.bit_length()) if 4**i <= n} | {n})


def metric_names(n_registers: int) -> list[str]:
    """Names of what `measure_tokens` gives for a model of so many registers."""
    names = [f"flow_loss_k{k}" for k in powers_of_four(n_registers)] + [f"flow_loss_t{t}" for t in NOISE_LEVELS]
    return names + [f"codes_{what}_{p}" for what in ("distinct", "entropy") for p in POSITIONS if p <= n_registers]


def flow_losses(model: nn.Module, encoded: dict, random: BatchRandom) -> dict[str, torch.Tensor]:
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


def measure_tokens(
    model: nn.Module, batches: Iterable[torch.Tensor], n: int, seed: int, device: torch.device
) -> tuple[dict[str, float], torch.Tensor]:
    """How n images use their tokens, and those tokens [n, L]: see `flow_losses` and `code_metrics`.

    Args:
        model: In evaluation mode.
        batches: The images [B, 3, H, W] in [-1, 1].
        seed: Seed of noise, noise levels and VAE samples.
    """
    sums: dict[str, torch.Tensor] = {}
    tokens: list[torch.Tensor] = []
    for images in batches:
        first = sum(map(len, tokens))
        random = BatchRandom(seed, TOKENS_STEP, torch.arange(first, first + len(images), device=device), n)
        encoded = model.encode({model.vae.images_read_key: images.to(device), RANDOM_KEY: random})
        tokens.append(encoded[model.regularizer.tokens_write_key])
        for name, value in flow_losses(model, encoded, random).items():
            sums[name] = sums.get(name, 0.0) + value * len(images) / n
    all_tokens = torch.cat(tokens).cpu()
    metrics = {name: float(value) for name, value in sums.items()}
    return {**metrics, **code_metrics(all_tokens, model.regularizer.codebook_size)}, all_tokens


def code_metrics(tokens: torch.Tensor, codebook_size: int) -> dict[str, float]:
    """Distinct codes as a share of the images, and entropy in bits, at the positions 1, 2 and 4 of tokens [N, L]."""
    statistics = code_statistics(tokens, codebook_size)
    metrics = {}
    for position in (p for p in POSITIONS if p <= tokens.shape[1]):
        metrics[f"codes_distinct_{position}"] = statistics["used"][position - 1] / len(tokens)
        metrics[f"codes_entropy_{position}"] = statistics["entropy_bits"][position - 1]
    return metrics


def reconstructions(
    model: nn.Module, encoded: dict, noise: torch.Tensor, counts: list[int], before_each: Callable[[], None], **sampler
) -> Iterator[tuple[int, torch.Tensor]]:
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
            **model.kept_tokens([k] * len(noise)),
        }
        yield k, model.decode(data, noise=noise, **sampler)[model.vae.images_reconst_write_key].float().clamp(-1, 1)


def psnr(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each image, [B], for images [B, 3, H, W] in [-1, 1] (peak 2)."""
    return -10 * ((images - originals).square().flatten(1).mean(1) / 4).log10()


def tokens_warning(tokens: torch.Tensor | None = None, psnr_by_count: dict[int, float] | None = None) -> str:
    """What is wrong with the tokens of some images, in plain words; empty if nothing is seen to be.

    Args:
        tokens: Tokens [N, L] of the images.
        psnr_by_count: PSNR in dB of their reconstructions by token count.
    """
    advice = (
        "The decoder works without them. Train longer; if that does not help: readout_weight 1 with a larger "
        "readout_lr (new models), a smaller encoder_lr, or latents of fewer channels (README_EXPERIMENTS.md)"
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


class TokenWarnings:
    """What is wrong with the tokens, by what shows it (`codes`, `psnr`); in the log when it begins.

    Args:
        first_step: Before it, at the end of the warm-up, tokens need not be good yet.
    """

    def __init__(self, first_step: int):
        self.first_step = first_step
        self.texts: dict[str, str] = {}  # empty where nothing is wrong

    def note(self, step: int, shown_by: str, warning: str) -> None:
        """Take note of what `tokens_warning` says after a step."""
        if step >= self.first_step:
            if warning and not self.texts.get(shown_by):
                log.warning("step %d: %s", step, warning)
            self.texts[shown_by] = warning


def more_is_better(metric: str) -> bool:
    """Whether a metric of the validation is the better the larger it is."""
    return metric.startswith(("val/psnr", "val/codes"))


def check_best_metric(config: TrainConfig, n_registers: int, picture_counts: list[int]) -> None:
    """Raise ConfigError unless the validations of a run log its `best_metric`.

    Args:
        n_registers: Largest number of tokens per image.
        picture_counts: Token counts in pictures.
    """
    names = ["loss", "flow_loss", *["vae_loss"] * config.train_vae, *["repa_loss"] * config.use_repa]
    if config.val_token_images:
        names += metric_names(n_registers) + ["codes_kept"] * config.fine_tunes
    names = [f"val/{name}" for name in names + [f"psnr_k{k}" for k in picture_counts]]
    if config.best_metric not in names:
        raise ConfigError(
            f"best_metric is {config.best_metric}, which this run does not log{nearest(config.best_metric, names)}: "
            f"expected one of {', '.join(names)}"
        )
    if config.use_repa and config.repa_stop is not None and config.best_metric in ("val/loss", "val/repa_loss"):
        log.warning("best_metric is %s, which loses its REPA part at repa_stop: best.pt stays the one of before",
                    config.best_metric)  # fmt: skip


def mean_image(dataset: Dataset, batch_size: int) -> torch.Tensor:
    """Mean of up to 1,000 images of a dataset, [1, 3, H, W]: what a decoder without tokens can hope for."""
    indices = range(0, len(dataset), max(1, len(dataset) // MEAN_IMAGES))
    batches = plain_images(dataset, indices, batch_size)
    total = sum(images.sum(dim=0, keepdim=True, dtype=torch.float64) for images in batches)
    return (total / len(indices)).float()
