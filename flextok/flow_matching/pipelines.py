"""Sampling: from noise to latents along the velocity that the decoder predicts."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from einops import repeat
from tqdm.auto import tqdm

from ..model.preprocessors.patching import PatchEmbedder
from ..model.utils.posembs import PositionalEmbeddingAdder
from ..utils.batching import as_batch_tensor, dense_batches, select_images
from ..utils.modules import evaluating
from .noise_modules import shifted

APG_MOMENTUM = -0.5
APG_NORM_THRESHOLD = 2.5
ONE_BATCH_ON = ("cuda",)  # types of devices on which the two passes of guidance are faster as one batch; not on CPUs

Sizes = int | tuple[int, int] | Sequence[int | tuple[int, int]]


class AdaptiveProjectedGuidance:
    """APG (arXiv 2410.02416, algorithm 1) with eta 0: one instance per sampling call.

    Takes the velocities [B, C, h, w] with and without the condition and the guidance scale; gives the guided velocity.
    """

    def __init__(self):
        self.running = 0.0  # the guidance of all steps so far, with momentum

    def __call__(self, v_cond: torch.Tensor, v_uncond: torch.Tensor, scale: float) -> torch.Tensor:
        self.running = (v_cond - v_uncond) + APG_MOMENTUM * self.running
        dims = tuple(range(1, v_cond.ndim))
        norm = torch.linalg.vector_norm(self.running, dim=dims, keepdim=True)
        difference = self.running * (APG_NORM_THRESHOLD / norm.clamp(min=1e-12)).clamp(max=1.0)
        direction = v_cond.double()
        direction = direction / torch.linalg.vector_norm(direction, dim=dims, keepdim=True).clamp(min=1e-12)
        parallel = (difference.double() * direction).sum(dim=dims, keepdim=True) * direction
        return v_cond + (scale - 1) * (difference.double() - parallel).to(v_cond.dtype)


class MinRFPipeline:
    """Euler sampler of a rectified flow (arXiv 2209.03003), from noise at t = 1 to latents at t = 0.

    Args:
        model: The decoder: predicts the velocity (noise - clean).
        noise_read_key: Start noise [B, C, h, w], if the data_dict has it; else it is given in the call, or drawn.
        target_sizes_read_key: Sizes of the latents, (h, w) per image; None: the `vae_image_sizes` of the call.
        latents_read_key: The condition; gives the number of images.
        timesteps_read_key, noised_images_read_key, reconst_write_key: Where the decoder reads t and x_t, and writes
            the velocity; the sampled latents end under reconst_write_key.
        out_channels: C.
        shift: Time shift of the steps, as that of MinRFNoiseModule in training; 1: steps of equal size.
    """

    def __init__(
        self,
        model: nn.Module,
        noise_read_key: str | None = None,
        target_sizes_read_key: str | None = None,
        latents_read_key: str = "enc_registers_quant",
        timesteps_read_key: str = "timesteps",
        noised_images_read_key: str = "vae_latents_noised",
        reconst_write_key: str = "vae_latents_reconst",
        out_channels: int = 4,
        shift: float = 1.0,
    ):
        self.model = model
        self.out_channels = out_channels
        self.noise_read_key = noise_read_key
        self.target_sizes_read_key = target_sizes_read_key
        self.latents_read_key = latents_read_key
        self.timesteps_read_key = timesteps_read_key
        self.noised_images_read_key = noised_images_read_key
        self.reconst_write_key = reconst_write_key
        self.shift = shift

    def default_size(self) -> tuple[int, int]:
        """Latent size (h, w) that the decoder was built for: its positional table times its patches."""
        patches = [m.patch_sizes for m in self.model.modules() if isinstance(m, PatchEmbedder)]
        tables = [m.max_sizes for m in self.model.modules() if isinstance(m, PositionalEmbeddingAdder)]
        tables = [sizes for sizes in tables if len(sizes) == 2]
        if not patches or not tables:
            raise ValueError("vae_image_sizes is needed: the decoder's config does not tell the size of its latents")
        return tables[0][0] * patches[0][0], tables[0][1] * patches[0][1]

    def _noise(
        self, data_dict: dict, sizes: Sizes | None, generator: torch.Generator | None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Start noise [B, C, h, w], or a list of [1, C, h, w] if the sizes differ."""
        if self.noise_read_key is not None and data_dict.get(self.noise_read_key) is not None:
            return data_dict[self.noise_read_key]
        latents = data_dict[self.latents_read_key]
        n = len(latents)
        device = latents[0].device
        if self.target_sizes_read_key is not None and data_dict.get(self.target_sizes_read_key) is not None:
            sizes = data_dict[self.target_sizes_read_key]
        sizes = _sizes_per_image(self.default_size() if sizes is None else sizes, n)
        draw_on = device if generator is None else generator.device

        def draw(n: int, size: tuple[int, int]) -> torch.Tensor:
            return torch.randn(n, self.out_channels, *size, generator=generator, device=draw_on).to(device)

        return draw(n, sizes[0]) if len(set(sizes)) == 1 else [draw(1, size) for size in sizes]

    @torch.no_grad()
    def __call__(
        self,
        data_dict: dict,
        timesteps: int = 25,
        generator: torch.Generator | None = None,
        vae_image_sizes: Sizes | None = None,
        verbose: bool = False,
        guidance_scale: float | Callable[[float], float] = 1.0,
        perform_norm_guidance: bool = False,
        noise: torch.Tensor | Sequence[torch.Tensor] | None = None,
    ) -> dict:
        """Sample latents [B, C, h, w] for the condition in `data_dict`, whose values are batches or lists of [1, ...].

        Args:
            timesteps: Number of Euler steps.
            generator: Source of the start noise; None: torch's global state.
            vae_image_sizes: Size of the latents: an int, (h, w), or one of these per image; None: what the decoder was
                built for.
            guidance_scale: g, or a function of t; 1 means no guidance and one decoder pass a step instead of two.
            perform_norm_guidance: APG instead of classifier-free guidance.
            verbose: Show a progress bar.
            noise: Start noise [B, C, h, w], or a list of [1, C, h, w]; None: what noise_read_key names, or drawn.
        """
        if timesteps < 1:
            raise ValueError(f"timesteps is {timesteps}, expected at least 1")
        noise = self._noise(data_dict, vae_image_sizes, generator) if noise is None else noise
        data_dict[self.noised_images_read_key] = noise
        with evaluating(self.model):
            return self._sample(data_dict, timesteps, verbose, guidance_scale, perform_norm_guidance)

    @dense_batches
    def _sample(
        self,
        data_dict: dict,
        timesteps: int,
        verbose: bool,
        guidance_scale: float | Callable[[float], float],
        perform_norm_guidance: bool,
    ) -> dict:
        x = data_dict[self.noised_images_read_key]
        guide = AdaptiveProjectedGuidance() if perform_norm_guidance else classifier_free_guidance
        predict = DecoderPasses(self, data_dict)
        for i in tqdm(range(timesteps, 0, -1), desc="sampling", disable=not verbose):
            t, t_next = shifted(i / timesteps, self.shift), shifted((i - 1) / timesteps, self.shift)
            scale = guidance_scale(t) if callable(guidance_scale) else guidance_scale
            if scale == 1.0:
                velocity = predict(x, t, (False,))
            elif x.device.type in ONE_BATCH_ON:
                conditional, unconditional = predict(x, t, (False, True)).chunk(2)
                velocity = guide(conditional, unconditional, scale)
            else:
                velocity = guide(predict(x, t, (False,)), predict(x, t, (True,)), scale)
            velocity = velocity.to(x.dtype)
            x = x - (velocity / timesteps if self.shift == 1.0 else velocity * (t - t_next))
        data_dict[self.reconst_write_key] = x
        return data_dict


class DecoderPasses:
    """The decoder on one data_dict of batches, step after step; what does not depend on the step is computed once."""

    def __init__(self, pipeline: MinRFPipeline, data_dict: dict):
        self.pipeline = pipeline
        self.data_dict = data_dict
        self.fixed: tuple[str, ...] = ()  # names of the modules that run once
        self.arguments: tuple = ()  # of the decoder: the names of those that run in each step; by default all do
        if hasattr(pipeline.model, "split"):
            self.fixed, varying = pipeline.model.split((pipeline.noised_images_read_key, pipeline.timesteps_read_key))
            self.arguments = (varying,)
        self.prepared: dict[tuple[bool, ...], dict] = {}

    def __call__(self, x: torch.Tensor, t: float, nulls: tuple[bool, ...]) -> torch.Tensor:
        """The velocity [len(nulls) * B, C, h, w] at x [B, C, h, w], without the condition where `nulls` is True."""
        pipeline = self.pipeline
        if nulls not in self.prepared:
            inputs = self._inputs(x, nulls)
            self.prepared[nulls] = pipeline.model(inputs, self.fixed) if self.fixed else inputs
        x = repeat(x, "b ... -> (nulls b) ...", nulls=len(nulls))
        data_dict = dict(self.prepared[nulls])
        data_dict[pipeline.noised_images_read_key] = x
        data_dict[pipeline.timesteps_read_key] = torch.full((len(x),), t, device=x.device)
        return pipeline.model(data_dict, *self.arguments)[pipeline.reconst_write_key]

    def _inputs(self, x: torch.Tensor, nulls: tuple[bool, ...]) -> dict:
        """The data_dict with its images once for each of `nulls`."""
        n = len(x)
        inputs = dict(self.data_dict)
        if len(nulls) > 1:
            inputs = select_images(self.data_dict, list(range(n)) * len(nulls), n)
        if any(nulls):
            modules = self.pipeline.model.modules()
            keys = {m.eval_drop_flag_read_key for m in modules if hasattr(m, "eval_drop_flag_read_key")}
            if not keys:
                raise ValueError("guidance_scale needs a decoder with a null condition, and this one has none")
            for key in keys:
                drop = torch.zeros(n, dtype=torch.bool, device=x.device)
                if self.data_dict.get(key) is not None:
                    drop = as_batch_tensor(self.data_dict, key, x, torch.bool)
                inputs[key] = torch.cat([torch.ones_like(drop) if null else drop for null in nulls])
        return inputs


def classifier_free_guidance(v_cond: torch.Tensor, v_uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """v_uncond + scale * (v_cond - v_uncond), all [B, C, h, w] (arXiv 2207.12598)."""
    return v_uncond + scale * (v_cond - v_uncond)


def _sizes_per_image(sizes: Sizes, n: int) -> list[tuple[int, int]]:
    if isinstance(sizes, int):
        return [(sizes, sizes)] * n
    if isinstance(sizes, tuple) and len(sizes) == 2 and all(isinstance(size, int) for size in sizes):
        return [sizes] * n
    if len(sizes) != n:
        raise ValueError(f"vae_image_sizes lists {len(sizes)} sizes for {n} images")
    return [(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])) for size in sizes]
