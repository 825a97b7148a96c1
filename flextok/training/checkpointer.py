"""What a checkpoint holds, and how a run continues from it, with any number of processes.

The format is that of one process. Sharded tensors are gathered for writing; for reading, process 0 alone reads the file
and the others get each tensor from it.
"""

import contextlib
import itertools
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from ..utils.checkpoint import CheckpointError, check_weights, load_weights
from ..utils.errors import UserError
from ..utils.processes import from_first, rank
from .checkpoints import (
    BEST,
    EPOCH,
    LATEST,
    link_checkpoint,
    prune_checkpoints,
    readable_checkpoint,
    save_checkpoint,
)
from .distributed import from_rank_0, full_state, without_values

log = logging.getLogger("flextok")

# What a model's config says of it that the shapes of its weights may not show.
STRUCTURE = (
    "levels", "patch_sizes", "factor", "coefficients", "whitening", "head_dim", "max_sizes", "posemb_type", "mask_mode",
    "scaling_factor",
)  # fmt: skip

NEW_RUN = "or start a new run with model: null and model_name set to the run's export"
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # of an optimizer, of their parameter's shape


class Checkpointer:
    """The checkpoints of a run: `latest.pt`, `previous.pt`, `best.pt` and those of epochs that are kept."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.saved_step: int | None = None

    def save(self, state: dict) -> Path:
        """Write latest.pt atomically; every process has to call this."""
        state = full_state(state)
        from_first(lambda: save_checkpoint(state, self.folder / LATEST))
        self.saved_step = state["global_step"]
        return self.folder / LATEST

    def keep_best(self) -> None:
        """Make the latest checkpoint the best."""
        from_first(lambda: link_checkpoint(self.folder / LATEST, self.folder / BEST))

    def keep_epoch(self, epoch: int, keep_last: int | None) -> None:
        """Keep the latest checkpoint as that of an epoch, one of the last `keep_last` (None: all)."""

        def keep() -> None:
            link_checkpoint(self.folder / LATEST, self.folder / EPOCH.format(f"{epoch:04d}"))
            prune_checkpoints(self.folder, keep_last)

        from_first(keep)


def trainer_state(trainer: Any) -> dict:
    """What a checkpoint of a FlexTokTrainer holds: plain values and tensors, of which FSDP's are sharded."""
    epoch, step_in_epoch = divmod(trainer.global_step, trainer.steps_per_epoch)
    with_repa = trainer.repa_module is not None
    return {
        "epoch": epoch,
        "step_in_epoch": step_in_epoch,
        "global_step": trainer.global_step,
        "global_batch_size": trainer.global_batch_size,
        "model_state_dict": trainer.model.state_dict(),
        "model_config": getattr(trainer.model, "config", None),
        "optimizer_state_dict": trainer.optimizer.state_dict(),
        "scheduler_state_dict": trainer.scheduler.state_dict(),
        "scaler_state_dict": trainer.scaler.state_dict(),
        "ema_model_state_dict": trainer.ema.state_dict() if trainer.ema is not None else None,
        "repa_module_state_dict": trainer.repa_module.state_dict() if with_repa else None,
        "repa_layers": trainer.repa_layers if with_repa else None,
        "readout_state_dict": trainer.readout.state_dict() if trainer.readout is not None else None,
        "start_tokens": trainer.start_tokens,
        "best_val_loss": trainer.best_val_loss,
        "validation": trainer.evaluator.compared,
        "constant_losses": trainer.constant_losses,
        "constants_of": trainer.evaluator.constants_of if with_repa else None,
        "nonfinite_steps": trainer.guard.skipped,
        "config": trainer.config.to_dict(),
        "data": trainer.data_identity,
        "wandb_id": trainer.wandb_id,
    }


def restore_trainer(trainer: Any, path: Path) -> str:
    """Bring a FlexTokTrainer to where a checkpoint was written; process 0 alone reads it. Returns the file read.

    If the file is a latest.pt that is damaged, the newest beside it that is not is taken.

    Raises:
        FileNotFoundError, CheckpointError: Not there, unreadable, or of another run; in all processes.
    """
    checkpoint: dict = {}

    def read() -> tuple[dict, str]:
        nonlocal checkpoint
        found, checkpoint = readable_checkpoint(path)
        with _errors_of(str(found)):
            check_resumable(trainer, checkpoint, str(found))
        return without_values(checkpoint), str(found)

    outline, source = from_first(read)
    with _errors_of(source):
        _restore(trainer, checkpoint if rank() == 0 else outline, source)
    return source


@contextlib.contextmanager
def _errors_of(source: str) -> Iterator[None]:
    """Let what a checkpoint of other content makes fail be a CheckpointError."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{source} cannot be continued: {type(error).__name__}: {error}") from error


def check_resumable(trainer: Any, checkpoint: dict, source: str) -> None:
    """Raise CheckpointError unless a trainer can continue from a checkpoint; log the settings that differ."""
    config, then, step = trainer.config, checkpoint.get("config") or {}, checkpoint.get("global_step")
    if not isinstance(step, int) or step < 0:
        raise CheckpointError(f"{source}: global_step is {step!r}, expected a number of steps")
    images = checkpoint.get("global_batch_size")
    if images is None and "batch_size" in then:
        images = then["batch_size"] * then["gradient_accumulation_steps"]
    was, now = structure(checkpoint.get("model_config")), structure(getattr(trainer.model, "config", None))
    differ = sorted(key for key in was.keys() & now.keys() if was[key] != now[key])  # an older version may say less
    facts = [  # what, what it was (None: not known), what it is, what to do
        ("images per optimizer step", images, trainer.global_batch_size, f"set global_batch_size: {images}"),
        ("seed", then.get("seed"), config.seed, "set it back to continue"),
        ("optimizer", then.get("optimizer"), config.optimizer, f"set it back, {NEW_RUN}"),
        ("the model's structure", {k: was[k] for k in differ}, {k: now[k] for k in differ},
         f"set `model` and img_size back, {NEW_RUN}"),
        ("data", checkpoint.get("data"), trainer.data_identity, f"restore the data and its settings, {NEW_RUN}"),
    ]  # fmt: skip
    goes_on = step < (config.repa_stop or math.inf)
    if config.use_repa and goes_on and checkpoint.get("repa_module_state_dict") is not None:
        encoder = config.repa_encoder_type
        aligned = checkpoint.get("repa_layers") or trainer.repa_layers, then.get("repa_encoder_type", encoder)
        facts.append(("repa_layers and repa_encoder_type", aligned, (trainer.repa_layers, encoder),
                      f"set them back, {NEW_RUN}"))  # fmt: skip
        if step >= (then.get("repa_stop") or math.inf):
            raise CheckpointError(
                f"{source} is from after the end of REPA (repa_stop {then.get('repa_stop')}), which is for good, but "
                f"repa_stop is now {config.repa_stop}: set it back to continue"
            )
    for what, before, after, advice in facts:
        if before not in (None, after):
            raise CheckpointError(f"{source} was trained with {what} {before}, now it is {after}: {advice}")
    aligns = config.use_repa and then.get("use_repa")  # else _restore says what becomes of the projector
    for key, value in config.to_dict().items() if then else ():
        was = then.get(key, type(config).model_fields[key].default)  # what an older version did not know
        if value != was and (aligns or "repa" not in key):
            log.info("resume: %s was %s and is now %s", key, was, value)


def _restore(trainer: Any, checkpoint: dict, source: str) -> None:
    trainer.global_step = step = checkpoint["global_step"]
    restore_weights(trainer.model, checkpoint["model_state_dict"], source)
    optimizer_state = checkpoint.get("optimizer_state_dict") or {"state": {}, "param_groups": []}
    if not optimizer_state["param_groups"]:
        log.warning("resume: %s holds no optimizer_state_dict: all moments start empty", source)
    projector = (
        f"{source} holds another REPA projector: set repa_projector, repa_projector_hidden, repa_layers and the "
        "encoder back; it"
    )
    kept = {"encoder", "decoder", "vae"}
    for part, module, key, name, what, source_of_part in (
        ("repa_projector", trainer.repa_module, "repa_module_state_dict", "REPA", "projector", projector),
        ("readout", trainer.readout, "readout_state_dict", "the read-out", "linear layer", f"{source} (readout)"),
    ):
        state = checkpoint.get(key)
        if module is not None and state is not None:
            restore_weights(module, state, source_of_part)
            kept.add(part)
        elif module is not None:
            log.info("resume: %s is on, but the checkpoint of step %d holds no %s: a new one is made from the seed, "
                     "with empty moments; its weight is scheduled by the run's step", name, step, what)  # fmt: skip
        elif state is not None:
            log.info("resume: %s is off, but was on at step %d: the checkpoint's %s and its moments are dropped",
                     name, step, what)  # fmt: skip
    restore_optimizer(trainer.optimizer, trainer.parts, kept, optimizer_state, source)
    rates = {group["name"]: group["lr"] for group in optimizer_state["param_groups"]}
    scheduler, groups = trainer.scheduler, trainer.optimizer.param_groups  # the schedule is a function of the step
    for group, base_lr, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas):
        group["lr"] = base_lr * factor(step)
        was = rates.get(group["name"], group["lr"])
        if not math.isclose(was, group["lr"], rel_tol=1e-6):
            log.info("resume: the learning rate of %s was %.3g and is now %.3g", group["name"], was, group["lr"])
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    scheduler._last_lr = [group["lr"] for group in groups]
    if checkpoint.get("scaler_state_dict") and trainer.scaler.is_enabled():
        trainer.scaler.load_state_dict(checkpoint["scaler_state_dict"])
    if trainer.ema is not None:
        averages = checkpoint.get("ema_model_state_dict")
        if averages is None:
            log.info("resume: the checkpoint holds no averages: they start from its weights at step %d", step)
        averages = averages or checkpoint["model_state_dict"]
        trainer.ema.load_state_dict(check_weights(trainer.model, averages, f"{source} (averages)"))
    elif checkpoint.get("ema_model_state_dict") is not None:
        log.info("resume: use_ema is off: the checkpoint's averages are dropped, its weights go on")
    trainer.best_val_loss = checkpoint.get("best_val_loss", math.inf)
    if checkpoint.get("validation") != trainer.evaluator.compared and math.isfinite(trainer.best_val_loss):
        log.info("resume: validation measures something else than before: best.pt is chosen anew")
        trainer.best_val_loss = math.inf
    tokens = checkpoint.get("start_tokens")
    trainer.start_tokens = None
    if isinstance(tokens, torch.Tensor):  # broadcast where the others can get it, looked at on the CPU
        trainer.start_tokens = from_rank_0(tokens, next(trainer.model.parameters())).cpu()
    same_constants = checkpoint.get("constants_of") == trainer.evaluator.constants_of
    trainer.constant_losses = checkpoint.get("constant_losses") if same_constants and trainer.use_repa else None
    trainer.latest.update(trainer.constant_losses or {})
    trainer.guard.skipped = int(checkpoint.get("nonfinite_steps", 0))
    trainer.wandb_id = checkpoint.get("wandb_id")


def structure(model_config: dict | None) -> dict[str, Any]:
    """What a model's config says of its structure, by path."""

    def leaves(tree: dict, path: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{path}{key}.")
            elif key in STRUCTURE:
                yield path + key, list(value) if isinstance(value, tuple) else value

    return dict(leaves(model_config or {}))


def restore_weights(module: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load a module's weights, as `load_weights` does, from a checkpoint of `load_checkpoint`."""
    state, own = check_weights(module, state, source), module.state_dict()
    load_weights(module, {key: from_rank_0(value, own[key]) for key, value in state.items()}, source)


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parts: dict[str, nn.Module], kept: set[str], state: dict, source: str
) -> None:
    """Load an optimizer's moments by the names of its parameters; its groups and their settings stay as they are now.

    Only those of the parts in `kept` are loaded.

    A parameter that the checkpoint does not have starts from nothing. Older checkpoints have no names: there each part
    is one group, of its trained parameters in their order.

    Raises:
        CheckpointError: The checkpoint has other parameters.
    """
    named = [zip(group["parameter_names"], group["params"]) for group in optimizer.param_groups]
    own = dict(itertools.chain(*named))
    in_order = [f"{part}.{name}" for part, module in parts.items() for name, _ in module.named_parameters()]
    moments = {}
    for group in state["param_groups"]:
        if group["name"].split(".")[0] not in kept:
            continue
        of_part = [name for name in in_order if name in own and name.startswith(f"{group['name']}.")]
        names = group.get("parameter_names", of_part)
        if len(names) != len(group["params"]) or not own.keys() >= set(names):
            raise CheckpointError(
                f"{source} was trained with other parameters ({group['name']}: {len(group['params'])}; now "
                f"{len(of_part)}): set train_encoder, train_decoder and train_vae back, or start a new run from its "
                "export"
            )
        moments.update({name: state["state"].get(i, {}) for name, i in zip(names, group["params"])})
    restored = {}
    for index, (name, parameter) in enumerate(own.items()):
        for key, value in moments.get(name, {}).items():
            given = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            if key in MOMENTS and given != list(parameter.shape):
                raise CheckpointError(f"{source}: the {key} of {name} is {given}, expected {list(parameter.shape)}")
            if key == "step" and given not in ([], "int"):
                raise CheckpointError(f"{source}: the step of {name} is {given}, expected a number")
        if moments.get(name):
            restored[index] = {key: from_rank_0(value, parameter) for key, value in moments[name].items()}
    optimizer.load_state_dict({"state": restored, "param_groups": optimizer.state_dict()["param_groups"]})
