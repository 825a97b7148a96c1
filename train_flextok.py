"""Train or fine-tune a FlexTok image tokenizer (arXiv 2502.13967), with or without REPA (arXiv 2410.06940).

    python train_flextok.py --config configs/train_celebahq.yaml

One file, read from top to bottom: command line, trainer (set-up, losses, a step, what follows it, validation,
checkpoints), start-up.
"""

import argparse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a FlexTok image tokenizer, with or without REPA.")
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="YAML file of settings (see configs/)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override a setting, e.g. --set use_repa=true; repeatable")  # fmt: skip
    add("--resume", metavar="PATH|latest", help="continue from a checkpoint, a run folder, or this config's newest run "
        "(starts afresh if there is none)")  # fmt: skip
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--max-steps", type=int, metavar="N", help="stop after optimizer step N; schedules stay as they are")
    add("--check", action="store_true", help="check config and data, print the summary, load no weights")
    add("--run-dir", metavar="DIR", help="folder of this run (default: by name and date under checkpoint_dir)")
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # before the heavy imports: --help and typing errors answer at once

import contextlib
import functools
import itertools
import logging
import math
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from flextok.data.batch import Batch
from flextok.data.loader import (
    BrokenFiles,
    LoaderError,
    TooManyBrokenFiles,
    build_loaders,
    check_loader,
    end_workers,
    image_names,
)
from flextok.data.sampler import GlobalBatchSampler
from flextok.data.sources import build_datasets
from flextok.flextok_wrapper import FlexTokFromHub
from flextok.training.checkpointer import Checkpointer, restore_trainer, trainer_state
from flextok.training.config import TrainConfig, load_config
from flextok.training.distributed import check_parallel, data_parallel, full, full_state, shard, sync_gradients
from flextok.training.ema import EMA
from flextok.training.evaluator import Evaluator
from flextok.training.guard import AskedToStop, NotFinite, StepGuard, Stopped, StopRequest
from flextok.training.models import (
    build_readout,
    build_repa_module,
    check_repa_model,
    check_repa_settings,
    compile_blocks,
    load_model,
    model_without_weights,
    select_trained_parameters,
    set_vae_dtype,
    settled,
)
from flextok.training.monitor import Monitor, wandb_settings
from flextok.training.optimizer import build_optimizer, build_schedule, optimizer_class
from flextok.training.pictures import save_curves, save_grid
from flextok.training.runs import find_run, new_run_dir, prepare_run_dir, removed_if_empty, run_of, stored_config
from flextok.training.summary import closing_words, summary
from flextok.training.token_use import TokenWarnings, check_best_metric, more_is_better, tokens_warning
from flextok.utils.config import ConfigError
from flextok.utils.devices import chosen_device, return_freed_memory
from flextok.utils.dtypes import autocast_dtype, precision
from flextok.utils.errors import UserError, only_warned
from flextok.utils.memory import PeakMemory
from flextok.utils.output import steadfast_output
from flextok.utils.processes import from_first, gathered, joined, load_one_process_first, rank, summed, world_size
from flextok.utils.random import RANDOM_KEY, BatchRandom

log = logging.getLogger("flextok")

CACHED_FEATURES, LAYER_LOSSES = "repa_cached_features", "repa_layer_losses"  # in the data_dict


class FlexTokTrainer:
    """Trains a FlexTok model.

    Args:
        config: Settings, a TrainConfig or a dict of its fields.
        model: FlexTokFromHub (a plain FlexTok trains too, but cannot be exported).
        train_loader: Batches of images: those of flextok.data, or [B, 3, H, W] in [-1, 1] (alone or first in a tuple).
        val_loader: Likewise, for validation; may be None.
        device: Where to train.
        run_dir: Where the run writes; None: a new folder by name and date under `checkpoint_dir`.
        load_encoder: Load REPA's encoder now, rather than with the checkpoint that follows.

    Raises:
        ConfigError: Settings that do not fit the model, the loaders, the device or the number of processes.
    """

    def __init__(
        self,
        config: TrainConfig | dict,
        model: FlexTokFromHub,
        train_loader: DataLoader,
        val_loader: DataLoader | None,
        device: str | torch.device,
        run_dir: Path | None = None,
        load_encoder: bool = True,
    ):
        config = config if isinstance(config, TrainConfig) else TrainConfig.from_dict(config)
        self.device = torch.device(device)
        self.config = config = settled(config, model, self.device)
        self.train_loader, self.val_loader, self._run_dir = train_loader, val_loader, run_dir and Path(run_dir)
        self.autocast_dtype = autocast_dtype(self.device) if config.use_amp else None
        check_parallel(config.parallel, self.autocast_dtype)
        if self.device.type == "cpu" and config.gradient_checkpointing:
            return_freed_memory()

        # The model, and what is trained beside it
        self.model = model.to(self.device)
        if self.device.type == "cuda":
            self.model.vae.to(memory_format=torch.channels_last)  # in which its convolutions are fast
        select_trained_parameters(config, self.model, self.device)
        self.use_repa, self.repa_weight, self.repa_module = config.use_repa, config.repa_weight, None
        if self.use_repa:
            transformer = self.model.decoder.module_dict["dec_transformer"]
            self.repa_layers = transformer.intermediate_layers = check_repa_model(self.model, config.repa_layers)
            self.repa_module = build_repa_module(config, self.model, self.device)
        self.readout = build_readout(config, self.model)
        self.parts = {"encoder": model.encoder, "decoder": model.decoder, "vae": model.vae}  # by optimizer group
        if self.use_repa:
            self.parts["repa_projector"] = self.repa_module.projector
        if self.readout is not None:
            self.parts["readout"] = self.readout.to(self.device)

        # Compiled, then divided among the processes, then optimized
        if config.compile:
            compile_blocks(self.model)
        if config.parallel == "fsdp" and world_size() > 1:
            shard(self.parts, self.device)
        self.loss_module = self.build_losses()
        self.optimizer = build_optimizer(config, self.parts, self.device)
        self.accumulation = config.accumulation(world_size())
        self.global_batch_size = config.batch_size * self.accumulation * world_size()
        check_loader(train_loader, self.global_batch_size)
        self.steps_per_epoch = math.ceil(len(train_loader) / self.accumulation)
        self.total_steps = config.total_steps(self.steps_per_epoch)
        self.scheduler = build_schedule(config, self.optimizer, self.total_steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast_dtype == torch.float16)
        self.ema = EMA(self.model, config.ema_decay) if config.use_ema else None

        # Signals and steps that are not finite; validations and pictures; broken images
        self.stop_request = StopRequest()
        scale = lambda: self.scaler.get_scale() if self.scaler.is_enabled() else 1.0  # noqa: E731
        self.guard = StepGuard(self.device, self.stop_request, config.max_nonfinite_steps, scale)
        self.evaluator = Evaluator(
            config, model, self.ema, train_loader, val_loader, self.stop_request, self.device, self.autocast_dtype
        )
        check_best_metric(config, model.n_registers, self.evaluator.counts)
        self.token_warnings = TokenWarnings(config.warmup_steps)
        self.broken_files = BrokenFiles(len(train_loader.dataset))
        self.broken_val_files = BrokenFiles(len(val_loader.dataset) if val_loader is not None else 1)
        self.monitor: Monitor | None = None  # while training

        # Where the run stands, as in checkpoints
        self.global_step = 0  # optimizer steps done
        self.best_val_loss = math.inf  # of best_metric; its negative where more is better
        self.constant_losses: dict[str, float] | None = None  # REPA's losses of predictions without the image
        self.start_tokens: torch.Tensor | None = None  # of the model that a fine-tuning started from
        self.wandb_id: str | None = None

        # Where it stands, not in checkpoints
        self.resumed = self.repa_ended = False
        self.branched_from: Path | None = None  # folder of the run that this one began as
        self.latest: dict[str, float] = {}  # the last value of each metric
        self.validated_step: int | None = None
        self.pictured_step: int | None = None
        self.images_in_step = 0  # of all processes, in the last step
        self.step_indices: list[torch.Tensor] = []  # of this process's images in it, in their dataset
        self.last_rates: dict[str, float] = {}  # by optimizer group, in the last step
        if load_encoder:
            self.load_encoder_if_needed()

    # ------------------------------------------------------------------------------------------------------- set-up

    @property
    def run_dir(self) -> Path:
        if self._run_dir is None:
            self._run_dir = from_first(lambda: new_run_dir(self.config))
        return self._run_dir

    @functools.cached_property
    def checkpointer(self) -> Checkpointer:
        return Checkpointer(self.run_dir / "checkpoints")

    def load_encoder_if_needed(self) -> None:
        """Load REPA's frozen encoder, unless its features are cached or the alignment has ended."""
        if self.repa_active and not self.has_cached_features:
            self.repa_module.load_encoder()

    def build_losses(self) -> torch.nn.Module:
        """`compute_loss` as a module, which DDP wraps: its backward pass reduces gradients over the processes."""
        compute = lambda *arguments: self.compute_loss(*arguments)  # noqa: E731 (also where a user replaced it)
        return data_parallel(compute, {} if self.config.parallel == "fsdp" else self.parts)

    @property
    def trained_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    # ------------------------------------------------------------------------------------------------------- losses

    def autocast(self):
        return precision(self.device, self.autocast_dtype)

    def compute_loss(self, batch, random: BatchRandom | None = None) -> dict[str, torch.Tensor]:
        """Losses of one batch, as scalars on the device; nothing here synchronizes.

        Args:
            batch: Images [B, 3, H, W] in [-1, 1], or a batch of the loader.
            random: The batch's random draws; None: those of the current step, for a global batch of this one alone.

        Returns:
            `loss` (what is minimised), `flow_loss`, `repa_loss` (0 if `use_repa` is false), `vae_loss` if the VAE is
            trained, and in training `readout_loss` if there is a read-out.
        """
        batch, model = Batch.of(batch).to(self.device), self.model
        random = random or self.random_draws(batch, 0, batch.size)
        data_dict = {RANDOM_KEY: random}
        if batch.images is not None:
            data_dict[model.vae.images_read_key] = batch.images
        if batch.latents is not None:
            data_dict[model.vae.vae_latents_write_key] = model.vae.latents_from_moments(batch.latents, data_dict)
        if batch.features is not None:
            data_dict[CACHED_FEATURES] = batch.features
        if not model.training:
            data_dict.update(model.drawn_token_counts(random))
        losses = {}
        with self.autocast():
            if self.config.train_vae:
                losses["vae_loss"] = model.vae.loss(data_dict, self.config.vae_kl_weight)
            data_dict = model(data_dict)
        latents = data_dict[model.flow_matching_noise_module.clean_images_read_key]
        velocity = data_dict[model.flow_matching_noise_module.noise_write_key] - latents
        flow_loss = F.mse_loss(data_dict[model.pipeline.reconst_write_key].float(), velocity.float())
        loss = flow_loss + losses.get("vae_loss", 0.0)
        if self.readout is not None and model.training:
            losses["readout_loss"] = self.readout(data_dict[model.regularizer.quants_write_key], latents, random)
            loss = loss + self.current_readout_weight * losses["readout_loss"]
        repa_loss = torch.zeros((), device=self.device)
        if self.repa_active:
            repa_loss = self.compute_repa_loss(data_dict, batch.images)
            loss = loss + self.current_repa_weight * repa_loss
            if len(self.repa_layers) > 1:
                losses.update(data_dict[LAYER_LOSSES])
        return {"loss": loss, "flow_loss": flow_loss, "repa_loss": repa_loss, **losses}

    def compute_repa_loss(self, data_dict: dict, images: torch.Tensor | None) -> torch.Tensor:
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
            self.repa_module.load_encoder()  # if it is not: a batch from elsewhere, of a run whose features are cached
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

    @property
    def repa_active(self) -> bool:
        """Whether steps compute the REPA loss: `use_repa`, until `end_repa_if_due`."""
        return self.use_repa and not self.repa_ended

    @property
    def has_cached_features(self) -> bool:
        """Whether the encoder's features come with the batches."""
        return hasattr(self.train_loader.dataset, "cached_features")

    @property
    def current_repa_weight(self) -> float:
        return self.repa_weight * self.config.repa_weight_factor(self.global_step) if self.repa_active else 0.0

    @property
    def current_readout_weight(self) -> float:
        return self.config.readout_weight if self.global_step < (self.config.readout_steps or math.inf) else 0.0

    def random_draws(self, batch: Batch, offset: int, global_batch_size: int) -> BatchRandom:
        """Draws of a micro-batch of this step's global batch, from `offset` on if the batch does not say which."""
        positions = torch.arange(offset, offset + len(batch)) if batch.position is None else batch.position
        positions = positions.to(self.device, non_blocking=True)
        return BatchRandom(self.config.seed, self.global_step, positions, global_batch_size)

    # --------------------------------------------------------------------------------------------------------- loop

    def train(self, max_steps: int | None = None) -> None:
        """Train to the last step of the schedule, or stop at `max_steps`; then validate, draw pictures and export.

        Raises:
            Stopped: A signal asked for it; the checkpoint of the last step is written.
            UserError: Too many steps that are not finite, too many broken images, a checkpoint that cannot be written.
        """
        last_step = self.total_steps if max_steps is None else min(max_steps, self.total_steps)
        if self.global_step >= last_step:
            log.warning(
                "there is nothing to train: the run is at step %d and is to end at %d", self.global_step, last_step
            )
        run_dir = self.run_dir
        from_first(lambda: prepare_run_dir(run_dir, self.config, self.branched_from))
        wandb = wandb_settings(self.config, run_dir, self.wandb_id)
        self.monitor = Monitor(run_dir, self.global_step, last_step, wandb)
        self.memory = PeakMemory(self.device)
        self.wandb_id = self.monitor.wandb_id or self.wandb_id
        try:
            self.measure_start()
            with self.stop_request.listening():
                try:
                    if self.resumed:
                        with self.monitor.paused():
                            self.validate_and_draw()  # a checkpoint is written before the validation of its step
                    while self.global_step < last_step:
                        for micro_batches in self.rest_of_epoch():
                            self.after_step(self.train_step(micro_batches))
                            if self.global_step >= last_step:
                                break
                    self.finish()
                    for loader in filter(None, (self.train_loader, self.val_loader)):
                        end_workers(loader)
                except AskedToStop:
                    self.stop()
                except (TooManyBrokenFiles, LoaderError) as error:
                    in_all = isinstance(error, TooManyBrokenFiles) or world_size() == 1  # which save together
                    if in_all and self.checkpointer.saved_step != self.global_step:
                        self.save_checkpoint()
                    raise
        except NotFinite as error:
            raise UserError(f"{error}. {error.advice(self.checkpointer.saved_step)}") from error
        finally:
            self.optimizer.zero_grad(set_to_none=True)  # of a step that was cut off between two micro-batches
            self.monitor.close()
            self.monitor = None

    def rest_of_epoch(self) -> Iterator[Iterable[Batch]]:
        """The micro-batches of each optimizer step of the current epoch, from the current step on.

        Those of `build_loaders` are drawn as the step needs them: the device has the first one while others are loaded.
        """
        epoch, first_step = divmod(self.global_step, self.steps_per_epoch)
        loader, sampler = self.train_loader, self.train_loader.batch_sampler
        in_order = isinstance(sampler, GlobalBatchSampler)
        if in_order:
            sampler.set_state(epoch, first_step)
        skip = 0 if in_order else first_step * self.accumulation
        batches = map(Batch.of, itertools.islice(self.stop_request.interruptible(loader), skip, None))
        batches = iter(self.monitor.waiting_for(batches))
        for step in range(first_step, self.steps_per_epoch):
            if in_order:
                yield itertools.islice(batches, sampler.micro_batches(step))
            elif micro_batches := list(itertools.islice(batches, self.accumulation)):
                yield micro_batches
            else:
                raise UserError(f"the training loader ends before its {len(loader)} batches: its len() has to be right")

    def train_step(self, micro_batches: Iterable[Batch]) -> dict[str, torch.Tensor]:
        """One optimizer step on this process's micro-batches of a global batch; it waits for the device with adamw8bit
        alone.

        Args:
            micro_batches: A list, or an iterator over those that the loader's sampler gives the current step.

        Returns:
            This process's part in the mean losses of the global batch, and `grad_norm`, the norm of all gradients
            before clipping. A step whose loss or gradient is not finite, in any process, leaves weights, moments and
            averages as they were; schedule and step count go on.
        """
        self.model.train()
        step_in_epoch, sampler = self.global_step % self.steps_per_epoch, self.train_loader.batch_sampler
        is_list = isinstance(micro_batches, list)
        n = len(micro_batches) if is_list else sampler.micro_batches(step_in_epoch)
        if is_list and world_size() == 1:
            total = sum(batch.size for batch in micro_batches)
        else:
            total = sampler.window_size(step_in_epoch)
        self.images_in_step, self.step_indices = total, []
        losses: dict[str, torch.Tensor] = {}
        done = 0
        for i, batch in enumerate(micro_batches):
            random = self.random_draws(batch, done, total)
            share = batch.size / total  # every image of the step weighs the same, also in a last, smaller batch
            keep = self.config.fsdp_accumulation == "keep"
            with sync_gradients(self.loss_module, self.parts, i == n - 1, keep):
                batch_losses = self.loss_module(batch, random)
                # The gradient is a sum over images / total; reducing takes a mean over processes: hence their number.
                self.scaler.scale(batch_losses["loss"] * (share * world_size())).backward()
            for name, value in batch_losses.items():
                losses[name] = losses.get(name, 0.0) + value.detach() * share
            done += batch.size
            self.broken_files.note(batch.broken)
            if batch.size and batch.index is not None:
                self.step_indices.append(batch.index)

        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.trained_parameters if p.grad is not None]
        grad_norm = full(torch.nn.utils.get_total_norm(gradients))
        if self.config.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(self.trained_parameters, self.config.max_grad_norm, grad_norm)
        skip = self.guard.check(losses["loss"], grad_norm)  # the optimizer's step leaves all as it is where this is 1
        with self.guard.skipping(self.optimizer, skip):
            self.optimizer.step()
        self.last_rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.global_step, skip)
        self.global_step += 1
        return {**losses, "grad_norm": grad_norm}

    def after_step(self, losses: dict[str, torch.Tensor]) -> None:
        """Log, save, validate and draw where this step is one to do so after.

        Raises:
            AskedToStop: A process was asked to stop.
        """
        config, step = self.config, self.global_step
        self.monitor.step(self.images_in_step)
        indices = self.step_indices
        names = lambda: image_names(self.train_loader.dataset, torch.cat(indices).tolist() if indices else [])  # noqa: E731
        stop = self.guard.after_step(step, names)
        if step % config.log_every == 0:
            self.log_step(losses)
        self.end_repa_if_due()
        end_of_epoch, epoch = step % self.steps_per_epoch == 0, step // self.steps_per_epoch
        with self.monitor.paused():
            if self.validation_due or (config.save_every_steps and step % config.save_every_steps == 0):
                stop = self.guard.read() or stop
                self.save_checkpoint()
                if end_of_epoch and config.save_every and epoch % config.save_every == 0:
                    self.checkpointer.keep_epoch(epoch, config.keep_last)
            if stop:
                raise AskedToStop
            self.validate_and_draw()
            if world_size() == 1 or self.validation_due or step % config.log_every == 0:  # it asks all processes
                self.broken_files.report()

    def log_step(self, losses: dict[str, torch.Tensor]) -> None:
        """Log the step that was just done; synchronizes."""
        step, left_out = self.global_step - 1, {"grad_norm"} if self.repa_active else {"grad_norm", "repa_loss"}
        metrics = {f"train/{name}": float(summed(value)) for name, value in losses.items() if name not in left_out}
        metrics["train/lr"] = self.last_rates.get("decoder", next(iter(self.last_rates.values())))
        metrics["train/grad_norm"] = float(losses["grad_norm"])
        metrics.update(self.monitor.rates())
        if (peak := self.memory.read()) is not None:
            metrics["train/memory_gb"] = peak / 1e9
        metrics["train/epoch"] = step // self.steps_per_epoch
        metrics["train/skipped_steps"] = self.guard.skipped
        if self.use_repa:
            metrics["train/repa_weight"] = self.config.repa_weight_factor(step) * self.repa_weight
        self.log(metrics)
        self.monitor.show(metrics)

    def end_repa_if_due(self) -> None:
        """End the alignment for good at `repa_stop`: free the encoder; the projector gets no gradients any more."""
        if not self.repa_active or self.global_step < (self.config.repa_stop or math.inf):
            return
        self.repa_ended = True
        self.repa_module.requires_grad_(False)
        for parameter in self.repa_module.parameters():
            self.optimizer.state.pop(parameter, None)
        self.repa_module.free_encoder()
        self.loss_module = None  # the gradient buckets of one DDP at a time
        self.loss_module = self.build_losses()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # once in a run: what the encoder took goes back to the device
        log.info("step %d: REPA ends (repa_stop), its encoder is freed", self.global_step)

    def measure_start(self) -> None:
        """Measure, before the first step, what later values are compared with."""
        if self.global_step == 0 and self.config.fine_tunes:
            self.start_tokens = self.evaluator.tokens("tokens before the first step")[1]
        if self.repa_active and self.constant_losses is None and self.config.repa_constant_images:
            self.constant_losses = self.evaluator.constant_losses(self.repa_module)
        if self.repa_active and self.constant_losses is not None:  # metrics.jsonl drops repetitions
            self.latest.update(self.constant_losses)
            self.monitor.log(self.constant_losses, 0)
        self.monitor.restart_clock()

    def finish(self) -> None:
        """What ends a run: a checkpoint, a validation and a picture, unless this step has them, export and curves."""
        self.guard.read()
        if self.checkpointer.saved_step != self.global_step:
            self.save_checkpoint()
        if self.validated_step != self.global_step:  # stopped between validations, which choose `best`
            self.validate()
        if self.pictured_step != self.global_step:
            self.visualize()
        if isinstance(self.model, FlexTokFromHub):
            self.export()
        else:
            log.warning("no export: the model was not built from a config by FlexTokFromHub")
        if rank() == 0:
            self.monitor.sync()
            with only_warned("curves.png"):
                save_curves(self.run_dir / "metrics.jsonl", self.run_dir / "curves.png")

    def stop(self) -> None:
        """Write a checkpoint, unless this step has one, and leave."""
        self.guard.read()  # of the last step
        signum = next(signum for signum in gathered(self.stop_request.signum) if signum is not None)
        if self.checkpointer.saved_step != self.global_step:
            self.save_checkpoint()
        raise Stopped(signum, f"stopped by {signal.Signals(signum).name} after step {self.global_step}: the checkpoint "
                      f"is written, --resume latest goes on from it")  # fmt: skip

    # --------------------------------------------------------------------------------------------------- validation

    @property
    def validation_due(self) -> bool:
        """Whether a checkpoint and a validation follow the current step."""
        step, every = self.global_step, self.config.val_every_steps
        last = step == self.total_steps or step % self.steps_per_epoch == 0  # of the run or of an epoch
        return step > 0 and (last or bool(every and step % every == 0))

    def validate_and_draw(self) -> None:
        """Validate and draw where the current step is one to do so after; the best latest.pt becomes best.pt too."""
        config = self.config
        if self.validation_due and self.val_loader is not None:
            self.validate()
            if config.best_metric.startswith("val/psnr"):
                self.visualize()
            value = self.latest.get(config.best_metric, math.nan) * (-1 if more_is_better(config.best_metric) else 1)
            if value < self.best_val_loss:  # never where it is NaN
                self.best_val_loss = value
                if self.checkpointer.saved_step != self.global_step:
                    self.save_checkpoint()
                self.checkpointer.keep_best()
        due = self.global_step and config.visualize_every and self.global_step % config.visualize_every == 0
        if due and self.pictured_step != self.global_step:
            self.visualize()

    def validate(self) -> dict[str, float]:
        """Measure and log the losses of the validation images, and how `val_token_images` of them use their tokens.

        Returns:
            What was logged, by W&B key; the same noise, timesteps and token counts are drawn each time.
        """
        if self.val_loader is None:
            return {}
        metrics, broken = self.evaluator.losses(self.compute_loss)
        self.broken_val_files.note(broken)
        self.broken_val_files.report()
        if not self.repa_active:
            metrics.pop("val/repa_loss", None)
        token_metrics, tokens = self.evaluator.tokens()
        metrics.update(token_metrics)
        if self.start_tokens is not None and tokens is not None and tokens.shape == self.start_tokens.shape:
            metrics["val/codes_kept"] = float((tokens == self.start_tokens).float().mean())
        self.log(metrics)
        self.validated_step = self.global_step
        self.token_warnings.note(self.global_step, "codes", tokens_warning(tokens))
        return metrics

    def visualize(self) -> Path:
        """Write the flexible-length grid: VAE reconstruction | k tokens ... | original; log PSNR by token count.

        Returns:
            Where process 0 has written it, if the disk let it.
        """
        columns, psnr, psnr_mean_image = self.evaluator.reconstructions()
        metrics = {f"val/psnr_k{k}": value for k, value in psnr.items()}
        self.log({**metrics, "val/psnr_mean_image": psnr_mean_image})
        self.token_warnings.note(self.global_step, "psnr", tokens_warning(psnr_by_count=psnr))
        self.pictured_step = self.global_step
        path = self.run_dir / "pictures" / f"flexible_length_{self.global_step:07d}.png"
        if rank() == 0:
            with only_warned(path):
                save_grid(list(columns.values()), list(columns), path)
                if self.monitor is not None:
                    self.monitor.picture("visualizations/flexible_length", path, self.global_step)
        return path

    # ------------------------------------------------------------------------------------------ checkpoints and logs

    def save_checkpoint(self) -> Path:
        """Write checkpoints/latest.pt, atomically, in the format of one process; the one before is previous.pt."""
        if self.monitor is not None:
            self.monitor.sync()
            self.wandb_id = self.monitor.wandb_id or self.wandb_id
        return self.checkpointer.save(trainer_state(self))

    @functools.cached_property
    def data_identity(self) -> dict[str, str | int]:
        """What must be the same for a resume to go on where the data was left."""
        identity = getattr(self.train_loader.dataset, "identity", None)
        return {"dataset": identity() if identity is not None else "unknown", "steps_per_epoch": self.steps_per_epoch}

    def load_checkpoint(self, path: str | Path) -> None:
        """Continue from a checkpoint: weights, optimizer, schedule, averages and place in the data.

        Learning rates and other settings of the optimizer and the schedule are those of the config given now; what
        differs from the checkpoint's is logged.

        Raises:
            FileNotFoundError, CheckpointError: Not there, unreadable, or of another model, optimizer, seed or dataset.
        """
        source = Path(restore_trainer(self, Path(path)))
        if source.resolve() == (self.checkpointer.folder / "latest.pt").resolve():
            self.checkpointer.saved_step = self.global_step
        if source.resolve().parent != self.checkpointer.folder.resolve():
            self.branched_from, self.wandb_id, self.best_val_loss = run_of(source), None, math.inf
            log.info("resume: a branch from step %d of %s on, with a best.pt and W&B run of its own, and with the "
                     "metrics until there", self.global_step, self.branched_from or source)  # fmt: skip
        self.resumed = True
        self.end_repa_if_due()
        self.load_encoder_if_needed()

    def export(self, folder: Path | None = None) -> Path:
        """Write config.json and model.safetensors (averaged weights if there are any) for from_pretrained."""
        folder = folder or self.run_dir / "export"
        state_dict = full_state(self.ema.state_dict() if self.ema is not None else self.model.state_dict())
        if rank() == 0:
            self.model.save_pretrained(folder, state_dict=state_dict)
        return folder

    def log(self, metrics: dict[str, float]) -> None:
        """Log plain numbers at the current step, to metrics.jsonl and W&B while training."""
        self.latest.update(metrics)
        if self.monitor is not None:
            self.monitor.log(metrics, self.global_step)


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


def run(arguments: argparse.Namespace, config: TrainConfig, device: torch.device) -> None:
    if rank() > 0:
        log.setLevel(logging.ERROR)  # the first process speaks for all
    run_dir, checkpoint = from_first(lambda: find_run(config, arguments.resume or config.resume, arguments.run_dir))
    if config.use_repa:
        check_repa_settings(config, device)
    optimizer_class(config.optimizer, device)  # refuses one that is not there, before any work
    resumed = from_first(lambda: stored_config(checkpoint)) if checkpoint is not None else None
    train_dataset, val_dataset = build_datasets(config)
    skeleton = model_without_weights(config)
    config = settled(config, skeleton, device, resumed)  # before the summary; the trainer finds nothing left open
    is_new = run_dir is None and not arguments.check
    if is_new:
        run_dir = from_first(lambda: new_run_dir(config))
    with removed_if_empty(run_dir) if is_new else contextlib.nullcontext():
        datasets = train_dataset, val_dataset
        text = from_first(lambda: summary(config, skeleton, *datasets, device, run_dir, checkpoint))
        if rank() == 0:
            print(text, flush=True)
        if not arguments.check:
            build_and_train(arguments, config, device, run_dir, checkpoint, *datasets)


def build_and_train(
    arguments: argparse.Namespace,
    config: TrainConfig,
    device: torch.device,
    run_dir: Path,
    checkpoint: Path | None,
    train_dataset: Dataset,
    val_dataset: Dataset | None,
) -> None:
    model = load_one_process_first(lambda: load_model(config))
    if config.cache_latents or (config.use_repa and config.repa_cache):
        from flextok.data.precompute import precompute  # a run without caches needs none of it

        set_vae_dtype(config, model.vae, device)  # what latents are computed in
        train_dataset, val_dataset = precompute(config, train_dataset, val_dataset, model, device)
    train_loader, val_loader = build_loaders(config, train_dataset, val_dataset, device)
    trainer = FlexTokTrainer(config, model, train_loader, val_loader, device, run_dir, load_encoder=checkpoint is None)
    if checkpoint is not None:
        trainer.load_checkpoint(checkpoint)
    trainer.train(arguments.max_steps)
    if rank() == 0:
        print(closing_words(trainer.global_step, trainer.latest, trainer.token_warnings.texts, run_dir))


def command_line(arguments: argparse.Namespace) -> None:
    """`main`, with what ends it as an exit code and one line."""
    steadfast_output()
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    try:
        main(arguments)
    except (UserError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        print("interrupted: the checkpoints that are there stay as they are", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    command_line(ARGUMENTS)
