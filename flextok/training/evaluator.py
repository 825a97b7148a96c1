"""What a run measures between its steps: losses of validation images, use of the tokens, reconstructions."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn as nn
from torch.utils.data import DataLoader

from ..data.batch import Batch, plain_images, spread
from ..flextok_wrapper import FlexTok
from ..utils.dtypes import precision
from ..utils.modules import evaluating
from ..utils.output import with_progress
from ..utils.processes import summed, world_size
from ..utils.random import VALIDATION_STEP, BatchRandom
from .config import TrainConfig
from .ema import EMA
from .guard import StopRequest
from .pictures import flexible_length
from .token_use import mean_image, measure_tokens, psnr

VALIDATION_SEED = 0  # validation draws the same numbers in every run, so that curves compare across runs


class Evaluator:
    """Measures a model in training: with its averages if there are any, in the training's precision, not compiled.

    A signal cuts each measurement short, with AskedToStop. Several processes have to call its methods together.

    Args:
        train_loader, val_loader: Those of the trainer; without val_loader pictures are of training images.
        autocast_dtype: Precision of the training; None: fp32.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: FlexTok,
        ema: EMA | None,
        train_loader: DataLoader,
        val_loader: DataLoader | None,
        stop_request: StopRequest,
        device: torch.device,
        autocast_dtype: torch.dtype | None,
    ):
        self.config, self.model, self.ema, self.device, self.autocast_dtype = config, model, ema, device, autocast_dtype
        self.train_loader, self.val_loader, self.stop_request = train_loader, val_loader, stop_request
        self.batch_size = config.val_batch_size or config.batch_size
        n = len(val_loader.dataset) if val_loader is not None else 0
        self.n_images = config.n_val_images(n)  # that all processes together validate on, each once
        self.n_token_images = min(config.val_token_images, n)
        self.counts = sorted({min(k, model.n_registers) for k in config.vis_token_counts})  # of tokens, in pictures
        self._mean_image: torch.Tensor | None = None

    @functools.cached_property
    def validated(self) -> list:
        """Which images validations take: how many, and of what data."""
        identity = getattr(self.val_loader and self.val_loader.dataset, "identity", None)
        return [self.n_images, identity and identity()]

    @property
    def compared(self) -> dict[str, Any]:
        """What has to be the same for two values of `best_metric` to compare."""
        config, metric = self.config, self.config.best_metric
        names = ["best_metric"]
        if metric in ("val/loss", "val/repa_loss"):
            names += ["use_repa", "repa_weight", "repa_encoder_type"]
        if metric.startswith("val/psnr"):
            names += ["num_psnr_images", "num_vis_images", "psnr_guidance_scale", "perform_norm_guidance"]
            names += ["inference_steps"]
        if metric.startswith(("val/codes", "val/flow_loss_")):
            names += ["val_token_images"]
        return {"images": self.validated, **{name: getattr(config, name) for name in names}}

    @property
    def constants_of(self) -> dict[str, Any]:
        """What `constant_losses` depend on."""
        names = ["encoder_type", "image_size", "target_size", "spatial_norm", "spatial_norm_gamma", "constant_images"]
        return {"images": self.validated, **{name: getattr(self.config, f"repa_{name}") for name in names}}

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        averaged = self.ema.swapped_in() if self.ema is not None else contextlib.nullcontext()
        # Validation and pictures come in shapes and modes of their own, each of which would be compiled again.
        eager = torch.compiler.set_stance("force_eager") if self.config.compile else contextlib.nullcontext()
        with torch.no_grad(), averaged, evaluating(self.model), eager, precision(self.device, self.autocast_dtype):
            yield

    def _stoppable(self, batches: Iterable) -> Iterator:
        for batch in self.stop_request.interruptible(batches):
            self.stop_request.raise_if_set(self.device)
            yield batch

    def losses(self, compute_loss: Callable[[Batch, BatchRandom], dict]) -> tuple[dict[str, float], list]:
        """Mean of each loss over the validation images as `val/NAME`; and the files of this process that are broken.

        Noise, noise levels and token counts are the same each time.
        """
        sums: dict[str, torch.Tensor] = {}
        done, broken = 0, []
        with self._mode():
            for batch in self._stoppable(self.val_loader):
                if done >= self.n_images:  # of a loader that is not of build_loaders
                    break
                batch = Batch.of(batch)
                if len(batch) > (left := self.n_images - done) and batch.position is None:  # likewise
                    batch = batch.map(lambda tensor, left=left: tensor[:left])
                positions = torch.arange(len(batch)) if batch.position is None else batch.position
                positions = (positions + done).to(self.device)
                random = BatchRandom(VALIDATION_SEED, VALIDATION_STEP, positions, self.n_images)
                for name, value in compute_loss(batch, random).items():
                    sums[name] = sums.get(name, 0.0) + value * batch.size
                done += batch.size if world_size() == 1 else self.val_loader.batch_sampler.global_batch_size
                broken += batch.broken
        n = done if world_size() == 1 else self.n_images
        return {f"val/{name}": float(summed(value)) / n for name, value in sums.items()}, broken

    def tokens(self, title: str | None = None) -> tuple[dict[str, float], torch.Tensor | None]:
        """How `val_token_images` validation images use their tokens, and those tokens [N, L]; in each process.

        Args:
            title: Of a progress bar; None: no bar.
        """
        n = self.n_token_images
        if n == 0:
            return {}, None
        dataset = self.val_loader.dataset
        with self._mode():
            images = self._stoppable(plain_images(dataset, spread(n, len(dataset)), self.batch_size))
            images = with_progress(images, n, title)
            metrics, tokens = measure_tokens(self.model, images, n, VALIDATION_SEED, self.device)
        return {f"val/{name}": value for name, value in metrics.items()}, tokens

    def constant_losses(self, repa_module: nn.Module) -> dict[str, float]:
        """REPA's losses of predictions that ignore the image, by W&B key: see `constant_prediction`."""
        from .constant_prediction import constant_losses  # a run without REPA needs none of it

        train, val = self.train_loader.dataset, self.val_loader and self.val_loader.dataset
        indices = {"train": spread(min(self.config.repa_constant_images, len(train)), len(train))}
        if self.n_images:
            sampler = self.val_loader.batch_sampler
            indices["val"] = list(getattr(sampler, "images", range(self.n_images)))
        return constant_losses(
            repa_module, {"train": train, "val": val}, indices, self.config.batch_size, self.config.num_workers,
            self.device,
        )  # fmt: skip

    def reconstructions(self) -> tuple[dict[str, torch.Tensor], dict[int, float], float]:
        """Reconstructions by number of tokens, with `guidance_scale` for the picture, `psnr_guidance_scale` for PSNR.

        Returns:
            The columns of the picture by title, [num_vis_images, 3, H, W] in [-1, 1]; mean PSNR in dB of
            `num_psnr_images` by token count; and that of the mean training image.
        """
        config, dataset = self.config, (self.val_loader or self.train_loader).dataset
        n_pictured = min(config.num_vis_images, len(dataset))
        n = min(max(n_pictured, config.num_psnr_images or 0), len(dataset))
        measured = self._columns(spread(n, len(dataset)), config.psnr_guidance_scale)
        if config.guidance_scale == config.psnr_guidance_scale:
            pictured = {title: column[spread(n_pictured, n)] for title, column in measured.items()}
        else:
            pictured = self._columns(spread(n_pictured, len(dataset)), config.guidance_scale)
        if self._mean_image is None:
            self._mean_image = mean_image(self.train_loader.dataset, config.batch_size).to(self.device)
        originals = measured["original"]
        psnrs = [float(psnr(column, originals).mean()) for column in list(measured.values())[1:-1]]
        return pictured, dict(zip(self.counts, psnrs)), float(psnr(self._mean_image, originals).mean())

    def _columns(self, indices: list[int], guidance_scale: float) -> dict[str, torch.Tensor]:
        """Columns of a picture of some images."""
        config, dataset = self.config, (self.val_loader or self.train_loader).dataset
        images = plain_images(dataset, indices, max(config.num_vis_images, self.batch_size))
        with self._mode():
            return flexible_length(
                self.model, self._stoppable(images), self.counts, VALIDATION_SEED, self.device,
                lambda: self.stop_request.raise_if_set(self.device), timesteps=config.inference_steps,
                guidance_scale=guidance_scale, perform_norm_guidance=config.perform_norm_guidance,
            )  # fmt: skip
