"""Train or fine-tune a FlexTok image tokenizer (arXiv 2502.13967), with or without REPA (arXiv 2410.06940).

    python train_flextok.py --config configs/train_celebahq.yaml

One file, read from top to bottom: command line, trainer (set-up, losses, optimizer, loop, validation, checkpoints),
start-up.
"""

import argparse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a FlexTok image tokenizer, with or without REPA.")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of settings (see configs/)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="override a setting, e.g. --set use_repa=true; repeatable")  # fmt: skip
    parser.add_argument("--resume", metavar="PATH|latest", help="continue from a checkpoint, a run folder, or "
                        "this config's newest run (starts afresh if there is none)")  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument(
        "--max-steps", type=int, metavar="N", help="stop after optimizer step N; schedules stay as they are"
    )
    parser.add_argument(
        "--check", action="store_true", help="check config and data, print the summary, load no weights"
    )
    parser.add_argument(
        "--run-dir", metavar="DIR", help="folder of this run (default: by name and date under checkpoint_dir)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # before the heavy imports: --help and typing errors answer at once

import contextlib
import datetime
import functools
import itertools
import logging
import math
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from flextok.data.loader import BrokenFiles, GlobalBatchSampler, TooManyBrokenFiles, build_datasets, build_loaders
from flextok.flextok_wrapper import FlexTokFromHub
from flextok.training.checkpoints import (
    BEST,
    EPOCH,
    LATEST,
    check_checkpoint,
    check_writable,
    find_checkpoint,
    link_checkpoint,
    prune_checkpoints,
    readable_checkpoint,
    save_checkpoint,
    stored_config,
)
from flextok.training.config import TrainConfig, load_config, write_config
from flextok.training.ema import EMA
from flextok.training.guard import AskedToStop, LateFlags, Stopped, StopRequest
from flextok.training.logs import MetricsLog
from flextok.training.models import (
    build_readout,
    build_repa_module,
    check_image_size,
    check_repa_model,
    check_repa_settings,
    known_model_config,
    load_model,
    set_vae_dtype,
    settled,
)
from flextok.training.parallel import exchanging, full, replicate, shard, sharded_like, whole
from flextok.training.pictures import save_curves, save_grid
from flextok.training.summary import summary, what_was_learned
from flextok.training.token_use import (
    POSITIONS,
    code_metrics,
    flow_loss_names,
    flow_losses,
    psnr,
    reconstructions,
    tokens_warning,
)
from flextok.utils.checkpoint import CheckpointError, check_weights, load_weights
from flextok.utils.config import ConfigError, nearest
from flextok.utils.devices import chosen_device, return_freed_memory
from flextok.utils.dtypes import autocast_dtype, precision
from flextok.utils.errors import UserError
from flextok.utils.modules import count_parameters, evaluating
from flextok.utils.processes import (
    from_first,
    gathered,
    joined,
    largest,
    load_one_process_first,
    rank,
    summed,
    world_size,
)
from flextok.utils.random import RANDOM_KEY, BatchRandom

if TYPE_CHECKING:
    from flextok.data.caching import CachedValues

log = logging.getLogger("flextok")

VALIDATION_SEED = 0  # validation draws the same numbers in every run, so that curves compare across runs
MEAN_IMAGES = 1000  # training images, about, whose mean pictures are compared with
EXPORT = "export"
PROJECTOR_GROUP = "repa_projector"  # its optimizer group
CACHED_FEATURES, LAYER_LOSSES = "repa_cached_features", "repa_layer_losses"  # in the data_dict


class FlexTokTrainer:
    """Trains a FlexTok model.

    Args:
        config: Settings, a TrainConfig or a dict of its fields.
        model: FlexTokFromHub (a plain FlexTok trains too, but cannot be exported).
        train_loader: Batches of images: dicts of flextok.data, or [B, 3, H, W] in [-1, 1] (alone or first in a tuple).
        val_loader: Likewise, for validation; may be None.
        device: Where to train.
        run_dir: Where the run writes; None: by name and date under `checkpoint_dir`. Made when first written to.
    """

    def __init__(
        self,
        config: Union[TrainConfig, dict],
        model: FlexTokFromHub,
        train_loader: DataLoader,
        val_loader: Optional[DataLoader],
        device: Union[str, torch.device],
        run_dir: Optional[Path] = None,
    ):
        config = config if isinstance(config, TrainConfig) else TrainConfig.from_dict(config)
        self.device = torch.device(device)
        self.config = settled(config, model, self.device)
        if self.device.type == "cpu" and self.config.gradient_checkpointing:
            return_freed_memory()
        self.model = model.to(self.device)
        if self.device.type == "cuda":
            self.model.vae.to(memory_format=torch.channels_last)  # in which its convolutions are fast
        self.train_loader, self.val_loader = train_loader, val_loader
        self.run_dir = Path(run_dir) if run_dir is not None else default_run_dir(self.config)
        self.metrics_log: Optional[MetricsLog] = None

        self._select_trained_parameters()
        self.use_repa, self.repa_weight, self.repa_module = self.config.use_repa, self.config.repa_weight, None
        self.repa_ended = False  # from step `repa_stop` on
        if self.use_repa:
            transformer = self.model.decoder.module_dict["dec_transformer"]
            self.repa_layers = transformer.intermediate_layers = check_repa_model(self.model, self.config.repa_layers)
            self.repa_module = build_repa_module(self.config, self.model, self.device)
        self.projectors = self.repa_module.projectors if self.use_repa else []
        self.readout = build_readout(self.config, self.model)
        self.readouts = [] if self.readout is None else [self.readout.to(self.device)]
        self.feature_cache: "Optional[CachedValues]" = None  # opened when training starts
        self.latent_cache: "Optional[CachedValues]" = None
        self.autocast_dtype = autocast_dtype(self.device) if self.config.use_amp else None
        if self.config.parallel == "fsdp":
            shard(self._parts(), self.device, self.autocast_dtype)
        self.optimizer = self._build_optimizer()  # after the REPA module: its projector is trained too
        if world_size() > 1 and not isinstance(train_loader.batch_sampler, GlobalBatchSampler):
            raise ConfigError("with several processes the loaders are those of flextok.data.loader.build_loaders")
        self.accumulation = self.config.accumulation(world_size())
        self.global_batch_size = self.config.batch_size * self.accumulation * world_size()
        self.steps_per_epoch = -(-len(train_loader) // self.accumulation)
        self.total_steps = self.config.num_epochs * self.steps_per_epoch
        self.scheduler = self._build_scheduler()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast_dtype == torch.float16)
        self.ema = EMA(self.model, self.config.ema_decay) if self.config.use_ema else None
        if self.config.compile:
            self.model.encoder.compile()
            self.model.decoder.compile()
        self.losses = self._parallel_losses()

        self.global_step = 0  # optimizer steps done
        self.best_val_loss = math.inf  # of best_metric; its negative where more is better
        self.latest: Dict[str, float] = {}  # the last value of each metric
        self.token_warnings = {"codes": "", "psnr": ""}  # what is wrong with the tokens, if anything, by what shows it
        self._pictured: Optional[int] = None  # step of the last picture
        self.start_tokens: Optional[torch.Tensor] = None  # of the model that a fine-tuning started from
        self.constant_losses: Optional[Dict[str, float]] = None
        self.validation_due = False  # after the last step, but not done
        self.late_flags, self.stop_request = LateFlags(2, self.device), StopRequest()
        self._saved: Optional[Tuple[int, bool]] = None  # step of the last checkpoint, and its validation_due
        self.nonfinite_steps, self.nonfinite_in_a_row = 0, 0
        self._restart_clock()
        self.wandb_id: Optional[str] = None
        self.data_identity = self._data_identity()
        self.broken_files, self.broken_since = BrokenFiles(max(1, len(train_loader.dataset))), []
        self.broken_val_files = BrokenFiles(max(1, len(val_loader.dataset) if val_loader is not None else 1))
        self._check_best_metric()

    # ------------------------------------------------------------------------------------------------------- set-up

    def _select_trained_parameters(self) -> None:
        config, model = self.config, self.model
        for name, module in (("encoder", model.encoder), ("decoder", model.decoder)):
            module.requires_grad_(getattr(config, f"train_{name}"))
            for submodule in module.modules():
                if getattr(submodule, "posemb_type", None) == "sincos":
                    submodule.requires_grad_(False)  # a table, not a weight
                if hasattr(submodule, "use_act_checkpoint"):
                    submodule.use_act_checkpoint = config.gradient_checkpointing
        model.vae.frozen = not config.train_vae
        set_vae_dtype(config, model.vae, self.device)
        model.vae.force_vae_encode = False  # a trained VAE's latents come from its own loss; others are never there
        if config.train_vae and count_parameters(model.vae) == 0:
            raise ConfigError("train_vae is true, but this model's VAE has no parameters")
        for parameter_name, parameter in model.vae.named_parameters():
            parameter.requires_grad_(config.train_vae and parameter_name != "logvar")  # which plays no part in any loss

    def _parallel_losses(self) -> torch.nn.Module:
        """`compute_loss` as a module whose backward pass exchanges the gradients of several processes."""
        modules = [self.model, *([] if self.repa_ended else self.projectors), *self.readouts]
        compute = lambda *arguments: self.compute_loss(*arguments)  # noqa: E731 (also one that was put in its place)
        return replicate([] if self.config.parallel == "fsdp" else modules, compute)

    def _build_optimizer(self) -> torch.optim.Optimizer:
        parts = {"encoder": self.model.encoder, "decoder": self.model.decoder, "vae": self.model.vae}
        if self.use_repa:
            parts[PROJECTOR_GROUP] = self.repa_module.projector
        if self.readout is not None:
            parts["readout"] = self.readout
        groups = [
            {"name": name, "params": [p for p in parts[name].parameters() if p.requires_grad], "lr": lr}
            for name, lr in self.config.learning_rates().items()
        ]
        config = self.config
        optimizer = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
        settings = dict(betas=tuple(config.betas), eps=config.eps, weight_decay=config.weight_decay)
        return optimizer(groups, fused=self.device.type in ("cuda", "cpu"), **settings)

    @property
    def trained_parameters(self) -> List[torch.nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _build_scheduler(self) -> torch.optim.lr_scheduler.LRScheduler:
        """Linear warm-up to each group's rate, then its course down to min_lr, reached at the last step."""
        config, last = self.config, self.total_steps - 1
        warmup = config.warmup_steps
        flat = [g["name"] for g in self.optimizer.param_groups if config.scheduler != "none" and g["lr"] <= config.min_lr]
        if flat:
            log.warning("min_lr is %g, no less than the learning rate of %s: it does not fall after the warm-up",
                        config.min_lr, ", ".join(flat))  # fmt: skip
        if warmup > last:
            log.warning("warmup_steps is %d, but the run has %d steps: the learning rate never leaves its warm-up",
                        warmup, self.total_steps)  # fmt: skip

        def course(base_lr: float):
            def factor(step: int) -> float:
                if step < warmup:
                    return (step + 1) / warmup
                progress = min(1.0, (step - warmup) / max(1, last - warmup))
                remaining = {
                    "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "none": 1.0,
                }[config.scheduler]  # fmt: skip
                return remaining + (1 - remaining) * config.min_lr / base_lr

            return factor

        return torch.optim.lr_scheduler.LambdaLR(self.optimizer, [course(g["lr"]) for g in self.optimizer.param_groups])

    # ------------------------------------------------------------------------------------------------------- losses

    def autocast(self):
        return precision(self.device, self.autocast_dtype)

    def compute_loss(self, batch, random: Optional[BatchRandom] = None) -> Dict[str, torch.Tensor]:
        """Losses of one batch, as scalars on the device; nothing here waits for the device.

        Args:
            batch: Images [B, 3, H, W] in [-1, 1], or a batch of the loader.
            random: The batch's random draws; None: those of the current step, for a global batch of this one alone.

        Returns:
            `loss` (what is minimised), `flow_loss`, `repa_loss` (0 if `use_repa` is false), `vae_loss` if the VAE is
            trained, and in training `readout_loss` if there is a read-out.
        """
        n = batch_size(batch)
        random = random or self._batch_random(batch, n, 0, n)
        model, noise_module = self.model, self.model.flow_matching_noise_module
        data_dict, images = {RANDOM_KEY: random}, None
        if has_images(batch):
            images = data_dict[model.vae.images_read_key] = batch_images(batch).to(self.device, non_blocking=True)
        if not model.training:
            data_dict.update(self._validation_token_counts(random))
        self._read_caches(batch, images, data_dict)
        with self.autocast():
            losses = {}
            if self.config.train_vae:
                losses["vae_loss"] = self._vae_loss(data_dict, images)
            data_dict = model(data_dict)
        velocity = data_dict[noise_module.noise_write_key] - data_dict[noise_module.clean_images_read_key]
        flow_loss = F.mse_loss(data_dict[model.pipeline.reconst_write_key].float(), velocity.float())
        loss = flow_loss + losses.get("vae_loss", 0.0)
        if self.readout is not None and model.training:
            latents, quants = data_dict[noise_module.clean_images_read_key], data_dict[model.regularizer.quants_write_key]
            losses["readout_loss"] = self.readout(quants, latents, random)
            loss = loss + self.readout_weight_in_force * losses["readout_loss"]
        repa_loss = torch.zeros((), device=self.device)
        if self.repa_active:
            repa_loss = self.compute_repa_loss(data_dict, images)
            loss = loss + self.repa_weight_in_force * repa_loss
            if len(self.repa_layers) > 1:
                losses.update(data_dict[LAYER_LOSSES])
        return {"loss": loss, "flow_loss": flow_loss, "repa_loss": repa_loss, **losses}

    @property
    def repa_active(self) -> bool:
        """Whether steps compute the REPA loss: `use_repa`, before `repa_stop`."""
        return self.use_repa and not self.repa_ended

    @property
    def repa_weight_in_force(self) -> float:
        """Weight of the REPA loss at the current step, by its schedule."""
        return self.repa_weight * self.config.repa_weight_factor(self.global_step)

    @property
    def readout_weight_in_force(self) -> float:
        """Weight of the read-out's loss at the current step."""
        return self.config.readout_weight if self.global_step < (self.config.readout_steps or math.inf) else 0.0

    def compute_repa_loss(self, data_dict: dict, images: Optional[torch.Tensor]) -> torch.Tensor:
        """Minus the mean cosine similarity of projected decoder features and the frozen encoder's, fp32, in [-1, 1].

        With several layers it is the mean of their losses, which are left in the data_dict.

        Args:
            data_dict: As FlexTok's forward pass leaves it; with the encoder's features, if they were cached.
            images: The same images, [B, 3, H, W] in [-1, 1]; not needed with cached features.

        Raises:
            KeyError: The forward pass left no decoder features.
        """
        transformer = self.model.decoder.module_dict["dec_transformer"]
        unpacker = self.model.decoder.module_dict["dec_repa_unpacker"]
        intermediate_features = data_dict[transformer.intermediate_layer_write_key]  # [B, N, layers * D]
        decoder_features = unpacker(data_dict)[unpacker.write_keys[0]]  # [B, h, w, layers * D]: without registers
        if CACHED_FEATURES in data_dict:
            target_features = self.repa_module.targets(data_dict[CACHED_FEATURES])  # [B, encoder_dim, H, W]
        else:
            target_features = self.repa_module.target_features(images)
        if intermediate_features.shape[0] != target_features.shape[0]:
            raise ValueError(
                f"{len(intermediate_features)} images went through the decoder, but "
                f"{len(target_features)} came for REPA"
            )
        with self.autocast():
            losses = self.repa_module.layer_losses(decoder_features, target_features)
        data_dict[LAYER_LOSSES] = {f"repa_loss_layer_{i}": loss for i, loss in zip(self.repa_layers, losses)}
        return torch.stack(losses).mean()

    def _read_caches(self, batch, images: Optional[torch.Tensor], data_dict: dict) -> None:
        """Put what the caches hold for a batch into its data_dict: latents, and the features that REPA aligns with."""
        if not (isinstance(batch, dict) and "split" in batch):
            return
        if self.latent_cache is not None:
            moments = self.latent_cache(batch, images, self.device)
            vae = self.model.vae
            data_dict[vae.vae_latents_write_key] = vae.latents_from_moments(moments, data_dict)
        if self.feature_cache is not None and self.repa_active:
            features = self.feature_cache(batch, images, self.device)  # [B, gh, gw, encoder_dim]
            data_dict[CACHED_FEATURES] = features.permute(0, 3, 1, 2)

    def _vae_loss(self, data_dict: dict, images: torch.Tensor) -> torch.Tensor:
        """Reconstruction and KL loss of a trained VAE; leaves detached latents, so that the flow loss ends there."""
        vae = self.model.vae
        vae.encode(data_dict)
        latents = data_dict[vae.vae_latents_write_key]
        reconstruction = vae.decode({vae.vae_latents_read_key: latents})[vae.images_reconst_write_key]
        data_dict[vae.vae_latents_write_key] = latents.detach()
        loss = F.mse_loss(reconstruction.float(), images.float())
        return loss + self.config.vae_kl_weight * data_dict[vae.vae_kl_loss_write_key]

    def _batch_random(self, batch, n: int, offset: int, global_batch_size: int) -> BatchRandom:
        """Draws of a batch with n images of this step's global batch, from `offset` on if it does not say which."""
        positions = (
            batch["position"] if isinstance(batch, dict) and "position" in batch else torch.arange(offset, offset + n)
        )
        positions = positions.to(self.device, non_blocking=True)
        return BatchRandom(self.config.seed, self.global_step, positions, global_batch_size)

    def _validation_token_counts(self, random: BatchRandom) -> dict:
        """Kept tokens per image in validation: drawn as in training, by address."""
        return {
            module.eval_keep_k_read_key: module.sample_keep_k(random, self.model.n_registers)
            for module in self.model.decoder.modules()
            if hasattr(module, "sample_keep_k")
        }

    # --------------------------------------------------------------------------------------------------------- loop

    def train(self, max_steps: Optional[int] = None) -> None:
        """Train to the last epoch, or to optimizer step `max_steps`; then validate, draw pictures and export."""
        last_step = min(self.total_steps, max_steps if max_steps is not None else self.total_steps)
        self._prepare_frozen_networks()  # first: what it refuses leaves no run folder behind
        self._open_log()
        progress = tqdm(total=last_step, initial=self.global_step, unit="step", dynamic_ncols=True, smoothing=0.05,
                        disable=rank() > 0)  # fmt: skip
        self._restart_clock()
        try:
            if self.global_step == 0 and self._fine_tunes():
                self.start_tokens = self._validate_tokens()[1]
            if self.feature_cache is None or (self.global_step == 0 and self._cache_is_complete()):
                self._log_constant_losses()
            with self.stop_request.listening():
                try:
                    if self.validation_due:
                        self._after_step()
                    while self.global_step < last_step:
                        epoch = self.global_step // self.steps_per_epoch
                        for window in self._windows(epoch, self.global_step % self.steps_per_epoch):
                            self._train_step(window, epoch, progress)
                            if self.global_step >= last_step:
                                break
                    self._finish()
                except AskedToStop:
                    self._stop()
        finally:
            progress.close()
            try:
                self._flush_caches()
            finally:
                if self.metrics_log is not None:
                    self.metrics_log.close()
                self.metrics_log = None

    def _windows(self, epoch: int, first_step: int) -> Iterator[List]:
        """The batches of each optimizer step of an epoch, from its step `first_step` on; the last may have fewer."""
        sampler = self.train_loader.batch_sampler
        skip = first_step * self.accumulation
        if isinstance(sampler, GlobalBatchSampler):
            sampler.set_state(epoch, first_step)
            skip = 0
        window = []
        for i, batch in enumerate(self._timed(self.train_loader)):
            if i < skip:
                continue
            window.append(batch)
            if len(window) == self.accumulation:
                yield window
                window = []
        if window:
            yield window

    def _timed(self, batches: Iterable) -> Iterator:
        """The batches, with the time that is spent waiting for them counted."""
        start = time.perf_counter()
        for batch in batches:
            self._seconds_waited += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def update(self, window: List) -> Tuple[Dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """One optimizer step on this process's batches of a global batch.

        Returns:
            Their part in the mean losses of the global batch, the norm of its gradients, and flags [2] on the device,
            the largest of all processes: 1 if the step was skipped, and 1 if a process was asked to stop. A step whose
            loss or gradient is not finite leaves weights, moments and averages as they were.
        """
        self.model.train()
        sizes = [batch_size(batch) for batch in window]
        total = sum(sizes)
        if world_size() > 1:
            total = self.train_loader.batch_sampler.window_size(self.global_step % self.steps_per_epoch)
        means: Dict[str, torch.Tensor] = {}
        for i, (batch, size) in enumerate(zip(window, sizes)):
            random = self._batch_random(batch, size, sum(sizes[:i]), total)
            share = size / total  # every image of the step weighs the same, also in a last, smaller batch
            with exchanging(self.losses, self._parts(), i == len(window) - 1):
                losses = self.losses(batch, random)
                # The exchange takes the mean over processes, but theirs are parts of a sum.
                self.scaler.scale(losses["loss"] * (share * world_size())).backward()
            for name, value in losses.items():
                means[name] = means.get(name, 0.0) + value.detach() * share
        self.scaler.unscale_(self.optimizer)
        max_norm = self.config.max_grad_norm or math.inf
        grad_norm = full(torch.nn.utils.clip_grad_norm_(self.trained_parameters, max_norm))
        finite = means["loss"].isfinite()
        if (
            not self.scaler.is_enabled()
        ):  # with fp16 the scaler skips steps whose gradients overflow, as a matter of course
            finite = finite & grad_norm.isfinite()
        stop = torch.full((), float(self.stop_request.signum is not None), device=self.device)
        flags = largest(torch.stack([1 - finite.float(), stop]))
        self.optimizer.found_inf = flags[0]  # the fused kernels leave everything as it is where this is 1
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.global_step, skip=flags[0])
        return means, grad_norm, flags

    def _parts(self) -> List[torch.nn.Module]:
        return [self.model.encoder, self.model.decoder, *self.projectors, *self.readouts]

    def _train_step(self, window: List, epoch: int, progress: tqdm) -> None:
        config = self.config
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        lr = rates.get("decoder", next(iter(rates.values())))
        means, grad_norm, flags = self.update(window)
        repa_weight = self.repa_weight_in_force if self.repa_active else 0.0
        self.global_step += 1
        step = self.global_step
        self._images_since += sum(map(batch_size, window)) * world_size()
        stops = self._note_flags(self.late_flags.exchange(flags, (step, window)))

        progress.update(1)
        if step % config.log_every == 0:
            self._log_step(means, grad_norm, lr, repa_weight, epoch, progress)
        if self.repa_active and step >= (self.config.repa_stop or math.inf):
            self._end_repa()
        if world_size() == 1:  # nobody else has to agree
            stops = self.stop_request.signum is not None
        self.broken_since += [path for b in window if isinstance(b, dict) for path in b.get("broken", ())]
        self._after_step(stops)

    def _after_step(self, stops: bool = False) -> None:
        """Validate, save and draw where this step is one to do so after, and leave if a process was asked to stop.

        A validation that a signal cuts short is due: the checkpoint says so, and the resumed run begins with it.

        Args:
            stops: Whether a process was asked to stop; the same in all.
        """
        config, step = self.config, self.global_step
        end_of_epoch = step % self.steps_per_epoch == 0
        epoch = step // self.steps_per_epoch
        validates = end_of_epoch or (config.val_every_steps and step % config.val_every_steps == 0)
        saves = end_of_epoch or (config.save_every_steps and step % config.save_every_steps == 0)
        keeps = end_of_epoch and config.save_every and epoch % config.save_every == 0
        self.validation_due = bool(validates and self.val_loader is not None)
        with self._clock_stopped():
            if validates or saves:
                stops = self._note_flags(self.late_flags.pop()) or stops
                self._flush_caches()
                if not stops:
                    self._validate_and_save(EPOCH.format(f"{epoch:04d}") if keeps else None)
            if config.visualize_every and step % config.visualize_every == 0 and not stops:
                self.visualize()
            if world_size() == 1 or validates or saves or step % config.log_every == 0:  # the others have to be asked
                broken, self.broken_since = self.broken_since, []
                self._note_broken(broken, self.broken_files)
            if stops:
                self._stop()

    def _note_flags(self, late: Optional[Tuple[List[float], Tuple[int, List]]]) -> bool:
        """Count a step that was skipped, and name its images; returns whether a process was asked to stop.

        Raises:
            UserError: More than `max_nonfinite_steps` in a row.
        """
        if late is None:
            return False
        (skipped, stop), (step, window) = late
        if not skipped:
            self.nonfinite_in_a_row = 0
            return bool(stop)
        self.nonfinite_steps += 1
        self.nonfinite_in_a_row += 1
        names = itertools.chain(*gathered([name for batch in window for name in self._image_names(batch)]))
        log.warning("step %d changed nothing: its loss or gradient is not finite; images: %s", step,
                    ", ".join(names) or "unknown")  # fmt: skip
        if self.nonfinite_in_a_row > self.config.max_nonfinite_steps:
            raise UserError(
                f"{self.nonfinite_in_a_row} steps in a row, up to step {step}, had a loss or gradient that is not "
                f"finite (max_nonfinite_steps: {self.config.max_nonfinite_steps}): the checkpoints in "
                f"{self.run_dir / 'checkpoints'} are from before; go on from one of them with a smaller learning rate"
            )
        return bool(stop)

    def _image_names(self, batch) -> List[str]:
        """File names (or numbers, for images that are no files) of a batch's images."""
        if not (isinstance(batch, dict) and "index" in batch) or batch_size(batch) == 0:
            return []
        dataset = self.train_loader.dataset
        paths = getattr(getattr(dataset, "dataset", dataset), "paths", None)
        return [str(paths[i]) if paths is not None else f"number {i}" for i in batch["index"].tolist()]

    def _raise_if_asked_to_stop(self) -> None:
        """Raise AskedToStop if any process was asked to; every process has to call this.

        Between the batches of a validation, not between steps: with several processes it waits for the device.
        """
        asked = self.stop_request.signum is not None
        if world_size() > 1:
            asked = bool(largest(torch.tensor(float(asked), device=self.device)))
        if asked:
            raise AskedToStop

    def _stop(self) -> None:
        """Write a checkpoint, unless this step has one, and leave."""
        signum = next(signum for signum in gathered(self.stop_request.signum) if signum is not None)
        if self._saved != (self.global_step, self.validation_due):
            self._flush_caches()
            self.save_checkpoint()
        raise Stopped(signum, f"stopped by {signal.Signals(signum).name} after step {self.global_step}: the checkpoint "
                      f"is written, --resume latest goes on from it")  # fmt: skip

    def _end_repa(self) -> None:
        """End the alignment for good: free the encoder, take the projector out of the optimizer's work."""
        self.repa_ended = True
        self.repa_module.requires_grad_(False)
        optimizer, names = self.optimizer, [group["name"] for group in self.optimizer.param_groups]
        i = names.index(PROJECTOR_GROUP)
        for parameter in optimizer.param_groups.pop(i)["params"]:
            optimizer.state.pop(parameter, None)
        for values in (self.scheduler.base_lrs, self.scheduler.lr_lambdas):
            values.pop(i)
        self.losses = self._parallel_losses()
        self._free_encoder()
        log.info("step %d: REPA ends (repa_stop), its encoder is freed", self.global_step)

    def _free_encoder(self) -> None:
        self.repa_module.encoder = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # once in a run: what the encoder took goes back to the device

    def _validate_and_save(self, keep_as: Optional[str] = None) -> None:
        """Write the latest checkpoint, after a validation if one is due; the best and kept ones are links to it."""
        best = False
        if self.validation_due:
            metrics = self.validate()
            if self.config.best_metric.startswith("val/psnr"):
                self.visualize()
                metrics = self.latest
            self.validation_due = False
            more_is_better = self.config.best_metric.startswith(("val/psnr", "val/codes"))
            value = metrics.get(self.config.best_metric, math.nan) * (-1 if more_is_better else 1)
            best = value < self.best_val_loss
            if best:
                self.best_val_loss = value
        if self.feature_cache is not None and self.global_step % self.steps_per_epoch == 0:
            self._use_complete_cache()
        self.save_checkpoint()
        if rank() == 0:
            folder = self.run_dir / "checkpoints"
            for name in [BEST] * best + [keep_as] * (keep_as is not None):
                link_checkpoint(folder / LATEST, folder / name)
            prune_checkpoints(folder, self.config.keep_last)

    def _note_broken(self, paths: List[str], broken_files: BrokenFiles) -> None:
        """Name files that could not be read, of all processes; too many end the run, with a checkpoint."""
        try:
            broken_files.add(itertools.chain(*gathered(paths)))
        except TooManyBrokenFiles:
            self.save_checkpoint()
            raise

    def _log_step(
        self, means: dict, grad_norm: torch.Tensor, lr: float, repa_weight: float, epoch: int, progress: tqdm
    ) -> None:
        """The one place of a step that waits for the device."""
        if not self.repa_active:
            means = {name: value for name, value in means.items() if name != "repa_loss"}
        metrics = {f"train/{name}": float(summed(value)) for name, value in means.items()}
        seconds = time.perf_counter() - self._clock
        metrics.update({
            "train/lr": lr,
            "train/grad_norm": float(grad_norm),
            "train/images_per_second": self._images_since / seconds,
            "train/data_wait": self._seconds_waited / seconds,
            "train/epoch": epoch,
            "train/skipped_steps": self.nonfinite_steps,
        })  # fmt: skip
        if self.use_repa:
            metrics["train/repa_weight"] = repa_weight
        self._restart_clock()
        self._write_metrics(metrics)
        postfix = {"loss": f"{metrics['train/loss']:.4f}", "flow": f"{metrics['train/flow_loss']:.4f}"}
        if self.repa_active:
            postfix["repa"] = f"{metrics['train/repa_loss']:.4f}"
        progress.set_postfix({**postfix, "lr": f"{lr:.1e}", "img/s": f"{metrics['train/images_per_second']:.1f}"})

    def _restart_clock(self) -> None:
        self._clock, self._images_since, self._seconds_waited = time.perf_counter(), 0, 0.0

    @contextlib.contextmanager
    def _clock_stopped(self):
        """Keep what happens between steps (validation, pictures, checkpoints) out of the rates."""
        start = time.perf_counter()
        yield
        self._clock += time.perf_counter() - start

    def _finish(self) -> None:
        if self.global_step % self.steps_per_epoch:  # stopped in mid-epoch; `best` is left to the ends of epochs
            self.save_checkpoint()
            self.validate()
        if self._pictured != self.global_step:
            self.visualize()
        if isinstance(self.model, FlexTokFromHub):
            self.export()
        else:
            log.warning("no export: the model was not built from a config by FlexTokFromHub")
        if self.metrics_log is not None:
            self.metrics_log.file.flush()
            save_curves(self.metrics_log.path, self.run_dir / "curves.png")

    # -------------------------------------------------------------------------------------- frozen networks, caches

    def _prepare_frozen_networks(self) -> None:
        """Open the caches, and load the REPA encoder unless it has nothing to do: here, not in mid-training."""
        config = self.config
        if self.repa_active and self.global_step >= (config.repa_stop or math.inf):
            self._end_repa()
        caches_features = self.repa_active and config.repa_cache
        if config.cache_latents or caches_features:
            self._open_caches(caches_features)
        if caches_features and self._cache_is_complete():
            self._free_encoder()
        elif self.repa_active and self.repa_module.encoder is None:
            raise ConfigError("the REPA encoder was freed, but its features are needed: build a new trainer")

    def _open_caches(self, caches_features: bool) -> None:
        from flextok.data import caching

        datasets = {"train": self.train_loader.dataset, "val": getattr(self.val_loader, "dataset", None)}
        datasets = {split: dataset for split, dataset in datasets.items() if dataset is not None}
        for dataset in datasets.values():
            if not isinstance(dataset, caching.CachedDataset):
                raise ConfigError(
                    f"cache_latents and repa_cache need the datasets of flextok.data.loader.build_datasets, but the "
                    f"loader has a {type(dataset).__name__}"
                )
        if self.config.cache_latents and self.latent_cache is None:
            plans = caching.latent_plans(self.config, self.model, datasets)
            self.latent_cache = caching.CachedValues(
                caching.LATENTS, datasets, plans, caching.latent_moments(self.model.vae)
            )
        if caches_features and self.feature_cache is None:
            plans = caching.feature_plans(self.config, datasets, self.device)
            if not all(plan.is_complete() for plan in plans.values()):
                self.repa_module.encoder  # loaded first: the cache's key says which weights it comes from
                plans = caching.feature_plans(self.config, datasets, self.device)
            features = caching.encoder_features(self.repa_module.encoder_features)
            self.feature_cache = caching.CachedValues(caching.FEATURES, datasets, plans, features)
        stop = math.inf if self.config.repa_stop is None else self.config.repa_stop
        encoder_needs_images = self.use_repa and not caches_features
        images_until = math.inf if self.latent_cache is None else stop if encoder_needs_images else 0
        datasets["train"].use({caching.LATENTS: math.inf, caching.FEATURES: stop}, images_until)
        if "val" in datasets:
            needs_images = self.latent_cache is None or (encoder_needs_images and self.repa_active)
            datasets["val"].use({}, math.inf if needs_images else 0)

    def _flush_caches(self) -> None:
        for cache in (self.latent_cache, self.feature_cache):
            if cache is not None:
                cache.flush()

    def _cache_is_complete(self) -> bool:
        """Whether the cache holds all features, for all processes, when each has flushed what it computed."""
        gathered(None)
        n_val = 0 if self.val_loader is None else self._n_val_images()
        return all(gathered(self.feature_cache.has("train") and self.feature_cache.has("val", n_val)))

    def _use_complete_cache(self) -> None:
        """Once all features are there the encoder has nothing left to do."""
        self._flush_caches()
        if self.repa_active and self._cache_is_complete():
            self._log_constant_losses()
            if self.repa_module._encoder is not None:
                log.info("step %d: the feature cache is complete, the REPA encoder is freed", self.global_step)
            self._free_encoder()

    # --------------------------------------------------------------------------------------------------- validation

    def _averaged_weights(self):
        return self.ema.swapped_in() if self.ema is not None else contextlib.nullcontext()

    @torch.no_grad()
    def validate(self) -> Dict[str, float]:
        """Mean losses over the validation images, with the same noise, timesteps and token counts each time."""
        if self.val_loader is None:
            return {}
        sums: Dict[str, torch.Tensor] = {}
        n, broken = 0, []
        total = self._n_val_images()
        sampler = self.val_loader.batch_sampler
        with self._evaluating():
            for i, batch in enumerate(self._val_batches()):
                self._raise_if_asked_to_stop()
                size = batch_size(batch)
                positions = torch.arange(n, n + size)
                if world_size() > 1:  # of the i-th global batch this process has a part
                    positions = i * sampler.global_batch_size + batch["position"]
                random = BatchRandom(VALIDATION_SEED, -1, positions.to(self.device), total)
                for name, value in self.compute_loss(batch, random).items():
                    sums[name] = sums.get(name, 0.0) + value * size
                n += size
                broken += batch.get("broken", ()) if isinstance(batch, dict) else ()
        self._note_broken(broken, self.broken_val_files)
        metrics = {
            f"val/{name}": float(summed(value)) / total
            for name, value in sums.items()
            if name != "repa_loss" or self.repa_active
        }
        token_metrics, tokens = self._validate_tokens()
        metrics.update(token_metrics)
        if self.start_tokens is not None and tokens is not None and tokens.shape == self.start_tokens.shape:
            metrics["val/codes_kept"] = float((tokens == self.start_tokens).float().mean())
        self._write_metrics(metrics)
        self._warn_of_tokens("codes", tokens_warning(tokens))
        return metrics

    @torch.no_grad()
    def _validate_tokens(self) -> Tuple[Dict[str, float], Optional[torch.Tensor]]:
        """Metrics of the tokens of `val_token_images` images, spread over the validation set, and those tokens [N, L].

        Each process computes them all: they are few.
        """
        n = 0 if self.val_loader is None else min(self.config.val_token_images, len(self.val_loader.dataset))
        if n == 0:
            return {}, None
        model, sums, tokens = self.model, {}, []
        images = torch.utils.data.Subset(self.val_loader.dataset, spread(n, len(self.val_loader.dataset)))
        with self._evaluating():
            for batch in plain_batches(images, self.config.val_batch_size or self.config.batch_size, 0):
                self._raise_if_asked_to_stop()
                first = sum(map(len, tokens))
                positions = torch.arange(first, first + len(batch), device=self.device)
                random = BatchRandom(VALIDATION_SEED, -3, positions, n)
                data_dict = {model.vae.images_read_key: batch.to(self.device), RANDOM_KEY: random}
                encoded = model.encode(data_dict)
                tokens.append(encoded[model.regularizer.tokens_write_key])
                for name, value in flow_losses(model, encoded, random).items():
                    sums[name] = sums.get(name, 0.0) + value * len(batch) / n
        tokens = torch.cat(tokens).cpu()
        metrics = {name: float(value) for name, value in sums.items()}
        metrics.update(code_metrics(tokens, model.regularizer.codebook_size))
        return {f"val/{name}": value for name, value in metrics.items()}, tokens

    def _fine_tunes(self) -> bool:
        """Whether the run starts from codes that someone may have built on."""
        config = self.config
        return config.model is None and not config.train_from_scratch and config.fsq_levels is None

    def _warn_of_tokens(self, shown_by: str, warning: str) -> None:
        """Say what is wrong with the tokens, once the warm-up is over, and not again until it was right."""
        if self.global_step >= self.config.warmup_steps:
            if warning and not self.token_warnings[shown_by]:
                log.warning("step %d: %s", self.global_step, warning)
            self.token_warnings[shown_by] = warning

    def _check_best_metric(self) -> None:
        """Raise ConfigError unless validations log `best_metric`."""
        config, n = self.config, self.model.n_registers
        names = ["loss", "flow_loss", *["vae_loss"] * config.train_vae, *["repa_loss"] * config.use_repa]
        if config.val_token_images:
            names += flow_loss_names(n) + [f"codes_{what}_{p}" for what in ("distinct", "entropy") for p in POSITIONS]
            names += ["codes_kept"] * self._fine_tunes()
        names = [f"val/{name}" for name in names + [f"psnr_k{k}" for k in self.vis_token_counts]]
        if config.best_metric not in names:
            raise ConfigError(
                f"best_metric is {config.best_metric}, which this run does not log{nearest(config.best_metric, names)}: "
                f"expected one of {', '.join(names)}"
            )

    @property
    def vis_token_counts(self) -> List[int]:
        """Token counts of pictures: those of the settings, up to what the model has."""
        return sorted({min(k, self.model.n_registers) for k in self.config.vis_token_counts})

    @contextlib.contextmanager
    def _evaluating(self):
        """Evaluation mode with the averaged weights, in the training's precision, not compiled."""
        with self._averaged_weights(), evaluating(self.model), self._uncompiled(), self.autocast():
            yield

    def _n_val_images(self) -> int:
        """Images that all processes together validate on, each once."""
        config, n = self.config, len(self.val_loader.dataset)
        if config.max_val_batches is None:
            return n
        return min(n, config.max_val_batches * (config.val_batch_size or config.batch_size) * world_size())

    def _val_batches(self) -> Iterator:
        return itertools.islice(self.val_loader, self.config.max_val_batches)

    def _uncompiled(self):
        """Validation and pictures come in shapes and modes of their own, each of which would be compiled anew."""
        return torch.compiler.set_stance("force_eager") if self.config.compile else contextlib.nullcontext()

    @torch.no_grad()
    def _log_constant_losses(self) -> None:
        """Log once what REPA's loss is if every position predicts the mean normalised target of the training set."""
        if not self.repa_active or self.constant_losses is not None or self.config.repa_constant_images == 0:
            return
        from flextok.model.utils.repa_loss import constant_prediction_loss, normalised_target_sum

        log.info(
            "measuring what a constant prediction scores (repa_constant_images: %d)", self.config.repa_constant_images
        )
        n = len(self.train_loader.dataset)
        stride = max(1, n // self.config.repa_constant_images)
        total, count = 0.0, 0
        for target in self._targets("train", range(0, n, stride)):
            batch_total, batch_count = normalised_target_sum(target)
            total, count = total + batch_total, count + batch_count
        mean = total / count
        # The cosine of each unit target with the direction of their mean averages to the length of that mean.
        self.constant_losses = {"train/repa_loss_constant": -float(mean.norm())}
        if self.val_loader is not None:
            val_total, n = 0.0, self._n_val_images()
            for target in self._targets("val", range(n)):
                val_total += float(constant_prediction_loss(mean, target)) * len(target)
            self.constant_losses["val/repa_loss_constant"] = val_total / n
        self._write_metrics(self.constant_losses)

    def _targets(self, split: str, indices: Sequence[int]) -> Iterator[torch.Tensor]:
        """REPA's targets [B, encoder_dim, H, W] of some images as they are, from the cache if there is one."""
        if self.feature_cache is not None:
            for some in torch.tensor(indices).split(self.config.batch_size):
                features = self.feature_cache.read(split, some).to(self.device)
                yield self.repa_module.targets(features.permute(0, 3, 1, 2))
            return
        loader = self.train_loader if split == "train" else self.val_loader
        images = torch.utils.data.Subset(loader.dataset, indices)
        for batch in plain_batches(images, self.config.batch_size, self.config.num_workers):
            yield self.repa_module.target_features(batch.to(self.device))

    @torch.no_grad()
    def visualize(self) -> Optional[Path]:
        """Write the flexible-length grid: VAE reconstruction | k tokens ... | original."""
        loader = self.val_loader or self.train_loader
        model, vae, config, counts = self.model, self.model.vae, self.config, self.vis_token_counts
        n_pictured = min(config.num_vis_images, len(loader.dataset))
        n = min(max(n_pictured, config.num_psnr_images or 0), len(loader.dataset))
        sampler = dict(
            timesteps=config.inference_steps, guidance_scale=config.guidance_scale,
            perform_norm_guidance=config.perform_norm_guidance,
        )  # fmt: skip
        subset = torch.utils.data.Subset(loader.dataset, spread(n, len(loader.dataset)))
        rows: Dict[str, List[torch.Tensor]] = {}
        with self._evaluating():
            for images in plain_batches(subset, max(n_pictured, config.val_batch_size or config.batch_size), 0):
                images, first = images.to(self.device), sum(map(len, rows.get("original", [])))
                random = BatchRandom(VALIDATION_SEED, -2, torch.arange(first, first + len(images), device=self.device))
                encoded = model.encode({vae.images_read_key: images, RANDOM_KEY: random})
                latents = encoded[vae.vae_latents_write_key]
                decoded = vae.decode({vae.vae_latents_read_key: latents})[vae.images_reconst_write_key]
                rows.setdefault("VAE", []).append(decoded.clamp(-1, 1))
                noise = random.normal("picture", latents.shape[1:])
                for k, images_of_k in reconstructions(
                    model, encoded, noise, counts, self._raise_if_asked_to_stop, **sampler
                ):
                    rows.setdefault(f"{k} token{'s' if k > 1 else ''}", []).append(images_of_k)
                rows.setdefault("original", []).append(images)
        columns = {title: torch.cat(parts) for title, parts in rows.items()}
        psnrs = [float(psnr(column, columns["original"]).mean()) for column in columns.values()][1:-1]
        metrics = {f"val/psnr_k{k}": value for k, value in zip(counts, psnrs)}
        mean_image = self._mean_image().expand_as(columns["original"])
        metrics["val/psnr_mean_image"] = float(psnr(mean_image, columns["original"]).mean())
        self._write_metrics(metrics)
        self._pictured = self.global_step
        self._warn_of_tokens("psnr", tokens_warning(psnr_by_count=dict(zip(counts, psnrs))))
        path = self.run_dir / "pictures" / f"flexible_length_{self.global_step:07d}.png"
        if rank() == 0:
            try:
                save_grid([column[spread(n_pictured, n)] for column in columns.values()], list(columns), path)
            except OSError as error:
                log.warning("the picture %s cannot be written: %s", path, error)
                return None
        if self.metrics_log is not None:
            self.metrics_log.picture("visualizations/flexible_length", path, self.global_step)
        return path

    @functools.cache  # noqa: B019 (one trainer, one image)
    def _mean_image(self) -> torch.Tensor:
        """Mean of up to 1,000 training images, [1, 3, H, W]: what a decoder without tokens can hope for."""
        dataset = self.train_loader.dataset
        indices = range(0, len(dataset), max(1, len(dataset) // MEAN_IMAGES))
        batches = plain_batches(torch.utils.data.Subset(dataset, indices), self.config.batch_size, 0)
        total = sum(batch.sum(dim=0, keepdim=True, dtype=torch.float64) for batch in batches)
        return (total / len(indices)).float().to(self.device)

    # -------------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self) -> Path:
        """Write checkpoints/latest.pt, atomically, in the format of one process; the one before is previous.pt."""
        self._note_flags(self.late_flags.pop())
        path = self.run_dir / "checkpoints" / LATEST
        checkpoint = {
            "epoch": self.global_step // self.steps_per_epoch,
            "step_in_epoch": self.global_step % self.steps_per_epoch,
            "global_step": self.global_step,
            "global_batch_size": self.global_batch_size,
            "model_state_dict": self.model.state_dict(),
            "model_config": getattr(self.model, "config", None),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.scheduler.state_dict(),
            "scaler_state_dict": self.scaler.state_dict(),
            "ema_model_state_dict": self.ema.state_dict(self.model) if self.ema is not None else None,
            "repa_module_state_dict": self.repa_module.state_dict() if self.use_repa else None,
            "repa_layers": self.repa_layers if self.use_repa else None,
            "readout_state_dict": self.readout.state_dict() if self.readout is not None else None,
            "start_tokens": self.start_tokens,
            "best_val_loss": self.best_val_loss,
            "constant_losses": self.constant_losses,
            "nonfinite_steps": self.nonfinite_steps,
            "validation_due": self.validation_due,
            "config": self.config.to_dict(),
            "data": self.data_identity,
            "random_state": torch.get_rng_state(),
            "wandb_id": self.wandb_id,
        }
        checkpoint = whole(checkpoint)  # by all processes, as each has a part of what FSDP divides
        if rank() == 0:
            if self.metrics_log is not None:
                self.metrics_log.sync()
            save_checkpoint(checkpoint, path)
        self._saved = (self.global_step, self.validation_due)
        return path

    def load_checkpoint(self, path: Union[str, Path]) -> None:
        """Continue from a checkpoint: weights, optimizer, schedule, averages and place in the data.

        Learning rates and other settings of the optimizer and the schedule are those of the config given now; what
        differs from the checkpoint's is logged.

        Raises:
            FileNotFoundError, CheckpointError: Not there, unreadable, or of another model, optimizer, seed or dataset.
        """
        path, checkpoint = readable_checkpoint(Path(path))
        check_checkpoint(checkpoint, str(path))
        try:
            self._load_checkpoint(checkpoint, path)
        except UserError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{path} cannot be continued: {type(error).__name__}: {error}") from error

    def _load_checkpoint(self, checkpoint: dict, path: Union[str, Path]) -> None:
        if checkpoint["data"] != self.data_identity:
            raise CheckpointError(
                f"{path} was trained on other data ({checkpoint['data']}; now {self.data_identity}), so it cannot be "
                "continued: restore the data and its settings, or start a new run with model_name set to "
                "the run's export"
            )
        now, then = self.config.to_dict(), checkpoint["config"]
        for key in ("seed", "optimizer"):
            if now[key] != then.get(key):
                raise CheckpointError(
                    f"{path} was trained with {key} {then.get(key)}, now it is {now[key]}: set it back to continue"
                )
        images = checkpoint.get("global_batch_size") or then["batch_size"] * then["gradient_accumulation_steps"]
        if images != self.global_batch_size:
            raise CheckpointError(
                f"{path} was trained with {images} images per optimizer step, now it is {self.global_batch_size} "
                f"(batch_size {self.config.batch_size} x gradient_accumulation_steps {self.accumulation} x "
                f"{world_size()} processes): set global_batch_size: {images} to continue"
            )
        for key in now:
            if now[key] != then.get(key):
                log.info("resume: %s was %s and is now %s", key, then.get(key), now[key])
        if self.use_repa != (checkpoint["repa_module_state_dict"] is not None):
            was = "with" if checkpoint["repa_module_state_dict"] is not None else "without"
            raise CheckpointError(
                f"{path} was trained {was} REPA: set use_repa accordingly, or start a new run from its export"
            )
        if (self.readout is None) != (checkpoint.get("readout_state_dict") is None):
            raise CheckpointError(
                f"{path} was trained with readout_weight {then.get('readout_weight', 0.0)}, now it is "
                f"{self.config.readout_weight}: set it back, or null, to continue; readout_steps ends it"
            )
        self.global_step = checkpoint["global_step"]
        weights, sharded = checkpoint["model_state_dict"], self.model.state_dict()
        weights = {key: sharded_like(value, sharded.get(key)) for key, value in weights.items()}
        load_weights(self.model, weights, str(path))
        if self.use_repa and PROJECTOR_GROUP not in [
            g.get("name") for g in checkpoint["optimizer_state_dict"]["param_groups"]
        ]:
            if checkpoint["global_step"] < (self.config.repa_stop or math.inf):
                raise CheckpointError(
                    f"{path} is from after the end of REPA (repa_stop {then.get('repa_stop')}), which is for good, but "
                    f"repa_stop is now {self.config.repa_stop}: set it back to continue"
                )
            self._end_repa()
        if self.use_repa:
            self._load_projector(checkpoint, str(path))
        if self.readout is not None:
            sharded = self.readout.state_dict()
            state = {key: sharded_like(value, sharded.get(key)) for key, value in checkpoint["readout_state_dict"].items()}
            load_weights(self.readout, state, f"{path} (readout)")
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            optimizer_state = checkpoint["optimizer_state_dict"]
            for i, parameter in enumerate(self.trained_parameters):
                values = optimizer_state["state"].get(i, {})
                values.update({key: sharded_like(value, parameter) for key, value in values.items()})
            self.optimizer.load_state_dict(optimizer_state)
        except ValueError as error:
            raise CheckpointError(f"{path} was trained with other parameters: {error}") from error
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                if value.shape not in (parameter.shape, ()):
                    raise CheckpointError(
                        f"{path}: {name} of the optimizer is {list(value.shape)} for a parameter "
                        f"{list(parameter.shape)}"
                    )
        base_lrs = self.scheduler.base_lrs
        self.scheduler.load_state_dict({**checkpoint["scheduler_state_dict"], "base_lrs": base_lrs})
        for group, setting, base_lr, course in zip(
            self.optimizer.param_groups, settings, base_lrs, self.scheduler.lr_lambdas
        ):
            group.update(setting, lr=base_lr * course(self.scheduler.last_epoch))
        if checkpoint["scaler_state_dict"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint["scaler_state_dict"])
        if self.ema is not None:
            averages = checkpoint["ema_model_state_dict"] or checkpoint["model_state_dict"]
            self.ema.load_state_dict(check_weights(self.model, averages, f"{path} (averages)"))
        if then.get("best_metric", "val/flow_loss") == self.config.best_metric:
            self.best_val_loss = checkpoint["best_val_loss"]
        tokens = checkpoint.get("start_tokens")
        self.start_tokens = tokens if isinstance(tokens, torch.Tensor) else None
        self.constant_losses = checkpoint["constant_losses"]
        self.nonfinite_steps = int(checkpoint.get("nonfinite_steps", 0))
        self.validation_due = bool(checkpoint.get("validation_due", False))
        self.wandb_id = checkpoint.get("wandb_id")
        torch.set_rng_state(checkpoint["random_state"])

    def _load_projector(self, checkpoint: dict, source: str) -> None:
        was = (checkpoint.get("repa_layers", self.repa_layers), checkpoint["config"].get("repa_encoder_type"))
        now = (self.repa_layers, self.config.repa_encoder_type)
        if was != now and self.repa_active:
            raise CheckpointError(
                f"{source} aligned layers {was[0]} with {was[1]}, now it is {now[0]} with {now[1]}: set repa_layers "
                "and repa_encoder_type back to continue, or start a new run from its export"
            )
        try:
            sharded = self.repa_module.state_dict()
            state = checkpoint["repa_module_state_dict"].items()
            self.repa_module.load_state_dict({key: sharded_like(value, sharded.get(key)) for key, value in state})
        except RuntimeError as error:
            raise CheckpointError(
                f"{source} holds another REPA projector: set repa_projector, repa_projector_hidden, repa_layers and "
                f"the encoder back to continue, or start a new run from its export ({error})"
            ) from error

    def _data_identity(self) -> Dict[str, Union[str, int]]:
        """What must be the same for a resume to go on where the data was left."""
        identity = getattr(self.train_loader.dataset, "identity", None)
        return {"dataset": identity() if identity is not None else "unknown", "steps_per_epoch": self.steps_per_epoch}

    def export(self, folder: Optional[Path] = None) -> Path:
        """Write config.json and model.safetensors (averaged weights if there are any) for from_pretrained."""
        folder = folder or self.run_dir / EXPORT
        with self._averaged_weights():
            state_dict = whole(self.model.state_dict())
            if rank() == 0:
                self.model.save_pretrained(folder, state_dict=state_dict)
        return folder

    # ------------------------------------------------------------------------------------------------------ logging

    def _open_log(self) -> None:
        config = self.config
        if rank() > 0:
            return
        check_writable(self.run_dir / "checkpoints")
        write_config(self.run_dir, config)
        settings = None
        if config.use_wandb:
            settings = dict(
                project=config.wandb_project, name=config.wandb_run_name or self.run_dir.name, tags=config.wandb_tags,
                config=config.to_dict(), id=self.wandb_id,
            )  # fmt: skip
        self.metrics_log = MetricsLog(self.run_dir, self.global_step if self.global_step else None, settings)
        self.wandb_id = self.metrics_log.wandb_id or self.wandb_id

    def _write_metrics(self, metrics: Dict[str, float]) -> None:
        self.latest.update(metrics)
        if self.metrics_log is not None:
            self.metrics_log.write(metrics, self.global_step)


# ----------------------------------------------------------------------------------------------------------- helpers


def has_images(batch) -> bool:
    """False for a batch of which everything that a step needs is cached."""
    return not isinstance(batch, dict) or "image" in batch


def batch_size(batch) -> int:
    """Images of a batch that count."""
    if isinstance(batch, dict) and batch.get("filler"):
        return 0
    return len(batch_images(batch)) if has_images(batch) else len(batch["index"])


def batch_images(batch) -> torch.Tensor:
    """The images [B, 3, H, W] of a batch: a dict with `image`, a tuple that begins with them, or the tensor itself."""
    if isinstance(batch, dict):
        batch = batch["image"]
    elif isinstance(batch, (list, tuple)) and not (len(batch) > 1 and getattr(batch[1], "ndim", 0) == 4):
        batch = batch[0]
    if not isinstance(batch, torch.Tensor) or batch.ndim != 4 or batch.shape[1] != 3:
        given = list(batch.shape) if isinstance(batch, torch.Tensor) else type(batch).__name__
        raise ValueError(f"a batch of images is {given}, expected a tensor [B, 3, H, W] in [-1, 1]")
    return batch


def plain_batches(dataset, batch_size: int, num_workers: int) -> Iterator[torch.Tensor]:
    """Images of a dataset in order and without augmentation, [B, 3, H, W]."""
    loader = DataLoader(dataset, batch_size, num_workers=num_workers, collate_fn=list, generator=torch.Generator())
    for items in loader:
        yield torch.stack([item_image(item) for item in items])


def spread(n: int, total: int) -> List[int]:
    """n indices, evenly spread over a dataset of `total` images, whose order may be one of kinds."""
    return [i * total // n for i in range(n)]


def item_image(item) -> torch.Tensor:
    """The image [3, H, W] of an item: a dict with `image`, a tuple that begins with it, or the tensor itself."""
    if isinstance(item, dict):
        return item["image"]
    return item[0] if isinstance(item, (list, tuple)) else item


def run_name(config: TrainConfig) -> str:
    return config.wandb_run_name or "flextok"


def default_run_dir(config: TrainConfig) -> Path:
    folder = Path(config.checkpoint_dir) / f"{run_name(config)}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    candidates = (folder if i == 1 else folder.with_name(f"{folder.name}-{i}") for i in itertools.count(1))
    return next(candidate for candidate in candidates if not candidate.exists())


# ---------------------------------------------------------------------------------------------------------- start-up


def main(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    if config.wandb_run_name is None:
        config.wandb_run_name = Path(arguments.config).stem
    if arguments.max_steps is not None and arguments.max_steps < 1:
        raise ConfigError(f"--max-steps is {arguments.max_steps}, expected at least 1")
    device = chosen_device(arguments.device)
    with joined(device):
        run(arguments, config, device)


def run_folder(arguments: argparse.Namespace, config: TrainConfig) -> Tuple[Path, Optional[Path]]:
    """The folder of this run, and the checkpoint that it continues from, if there is one."""
    run_dir = Path(arguments.run_dir) if arguments.run_dir is not None else None
    resume = arguments.resume or config.resume
    checkpoint = None
    if resume is not None:
        checkpoint = find_checkpoint(resume, run_dir, Path(config.checkpoint_dir), run_name(config), config.use_repa)
        if checkpoint is None:
            log.info("resume: %s finds no checkpoint, this is a new run", resume)
        elif run_dir is None and checkpoint.parent.name == "checkpoints":
            run_dir = checkpoint.parent.parent
    if run_dir is None:
        run_dir = default_run_dir(config)
    begun = (run_dir / "metrics.jsonl").exists() and (resume is None or any((run_dir / "checkpoints").glob("*.pt")))
    if begun and (checkpoint is None or checkpoint.resolve().parent.parent != run_dir.resolve()):
        raise ConfigError(
            f"--run-dir {run_dir} holds a run already: continue it with --resume latest, or name another folder"
        )
    return run_dir, checkpoint


def run(arguments: argparse.Namespace, config: TrainConfig, device: torch.device) -> None:
    if rank() > 0:
        log.setLevel(logging.ERROR)  # the first process speaks for all
    run_dir, checkpoint = from_first(lambda: run_folder(arguments, config))
    if config.use_repa:
        check_repa_settings(config, device)
    resumed = stored_config(checkpoint) if checkpoint is not None else None
    train_dataset, val_dataset = build_datasets(config)
    model_config = known_model_config(config)
    with torch.device("meta"):
        skeleton = None
        if model_config is not None:
            model_config["vae"].pop("hf_hub_path", None)
            skeleton = FlexTokFromHub(model_config)
    if skeleton is not None:
        check_image_size(skeleton, config.img_size)
        if config.use_repa:
            check_repa_model(skeleton, config.repa_layers)
    config = settled(config, skeleton, device, resumed)
    if rank() == 0:
        print(summary(config, skeleton, train_dataset, val_dataset, device, run_dir, checkpoint), flush=True)
    if arguments.check:
        return

    train_loader, val_loader = build_loaders(config, train_dataset, val_dataset, device)
    model = load_one_process_first(lambda: load_model(config))
    trainer = FlexTokTrainer(config, model, train_loader, val_loader, device, run_dir)
    if checkpoint is not None:
        trainer.load_checkpoint(checkpoint)
    trainer.train(arguments.max_steps)
    if rank() == 0:
        print(f"""
Done: {trainer.global_step} steps.{what_was_learned(trainer.latest, trainer.token_warnings)}
  pictures   {run_dir / "pictures"}
  curves     {run_dir / "curves.png"}
  metrics    {run_dir / "metrics.jsonl"}
  model      {run_dir / EXPORT}   (FlexTokFromHub.from_pretrained loads it)""")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    try:
        main(ARGUMENTS)
    except (UserError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        print("interrupted: the checkpoints that are there stay as they are", file=sys.stderr)
        sys.exit(130)
