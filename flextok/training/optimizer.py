"""The optimizer of a run, and the schedule of its learning rates."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from ..model.trunks.transformers import TransformerBlock
from ..utils.config import ConfigError
from .config import TrainConfig

log = logging.getLogger("flextok")

NO_DECAY, ADAMW = ".no_decay", ".adamw"  # what follows the name of a part in those of its further groups


def build_optimizer(config: TrainConfig, parts: dict[str, nn.Module], device: torch.device) -> torch.optim.Optimizer:
    """The optimizer, with a named group and a learning rate for each trained part.

    With `decay_all: false` what is not decayed is in a group of its own, `encoder.no_decay` and so on; with Muon the
    transformers' matrices are in `encoder`, and what AdamW trains of it in `encoder.adamw`.

    Args:
        parts: Modules by the name of their group; those that `config` does not train are left out.

    Raises:
        ConfigError: An optimizer that this machine does not have.
    """
    groups = []
    for part, lr in config.learning_rates().items():
        matrices = hidden_matrices(parts[part]) if config.optimizer == "muon" else set()
        for name, parameters in sorted(grouped(part, parts[part], matrices, config.decay_all).items()):
            group = {"name": name, "params": [*parameters.values()], "parameter_names": [*parameters], "lr": lr}
            group["weight_decay"] = 0.0 if name.endswith(NO_DECAY) else config.weight_decay
            if config.optimizer == "muon":
                group["muon"] = name == part and len(matrices) > 0
            groups.append(group)
    adam: dict[str, Any] = dict(betas=tuple(config.betas), eps=config.eps)
    if config.optimizer != "adamw8bit":
        adam["fused"] = device.type in ("cuda", "cpu")
    return optimizer_class(config.optimizer, device)(groups, **adam)


def optimizer_class(name: str, device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    """The class for a value of the setting `optimizer`; raises ConfigError for one that this machine does not have."""
    instead = "or set optimizer: adamw"
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"optimizer is muon, which PyTorch has from 2.9 on, but this is {torch.__version__}: update it, {instead}"
        )
    if name == "adamw8bit":
        if device.type != "cuda":
            raise ConfigError(
                f"optimizer is adamw8bit, which needs CUDA, but the device is {device}: find one, {instead}"
            )
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ConfigError(
                f"optimizer is adamw8bit, which needs bitsandbytes ({error}): pip install bitsandbytes, {instead}"
            ) from error
        return type("AdamW8bit", (SkippedOnTheHost, AdamW8bit), {})
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "muon": MuonAdamW}[name]


def hidden_matrices(module: nn.Module) -> set[nn.Parameter]:
    """The matrices of attention and MLP in a module's transformer blocks."""
    blocks = [block for block in module.modules() if isinstance(block, TransformerBlock)]
    return {p for block in blocks for layer in (block.attn, block.mlp) for p in layer.parameters() if p.ndim == 2}


def grouped(
    part: str, module: nn.Module, matrices: set[nn.Parameter], decay_all: bool
) -> dict[str, dict[str, nn.Parameter]]:
    """The trained parameters of a part by group, and there by name, `PART.NAME`.

    Args:
        matrices: Those that Muon trains.
    """
    groups: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        group = part
        if parameter not in matrices:
            is_weight = name.split(".")[-1] == "weight" and parameter.ndim > 1  # of a linear layer or convolution
            if not (decay_all or is_weight):
                group += NO_DECAY
            elif matrices:
                group += ADAMW
        groups.setdefault(group, {})[f"{part}.{name}"] = parameter
    return groups


class MuonAdamW(torch.optim.Optimizer):
    """Muon (arXiv 2502.16982) for the transformers' matrices, fused AdamW for all else.

    Muon's steps have the size of AdamW's (`match_rms_adamw`), so that they share learning rate and weight decay; its
    momentum is 0.95, with Nesterov's look-ahead. Moments are one state dict. As with fused AdamW, a step with
    `found_inf` 1 leaves weights and moments as they were, without waiting for the device: Muon's weights are copied
    for that, and taken back.

    Args:
        groups: Each with the key `muon`: whether it is Muon's.
        adam: Settings of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], **adam: Any):
        self.muon = torch.optim.Muon(
            [group for group in groups if group["muon"]], momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW([group for group in groups if not group["muon"]], **adam)
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for optimizer in (self.muon, self.adamw):  # of a state and of groups that may have been loaded since
            optimizer.state = self.state
            optimizer.param_groups = [g for g in self.param_groups if g["muon"] == (optimizer is self.muon)]
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            self.adamw.step()
            self.muon.step()
            return
        self.adamw.found_inf = found_inf
        self.adamw.step()
        del self.adamw.found_inf
        matrices = [p for group in self.muon.param_groups for p in group["params"] if p.grad is not None]
        before = [p.clone() for p in matrices]
        for p in matrices:  # a gradient that is the momentum itself leaves the momentum as it is
            p.grad.copy_(torch.where(found_inf > 0, self.state[p].get("momentum_buffer", p.new_zeros(())), p.grad))
        self.muon.step()
        for p, value in zip(matrices, before):
            p.copy_(torch.where(found_inf > 0, value, p))


class SkippedOnTheHost:
    """For optimizers that do not look at `found_inf` on the device: a step waits for it, and is left out if it is 1."""

    def step(self, closure: Callable[[], float] | None = None) -> None:
        if not bool(getattr(self, "found_inf", False)):
            super().step()


def build_schedule(
    config: TrainConfig, optimizer: torch.optim.Optimizer, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up to each group's rate, then `scheduler` down to min_lr, reached at the last step."""
    last, warmup, groups = total_steps - 1, config.warmup_steps, optimizer.param_groups
    low = [group["name"] for group in groups if config.scheduler != "none" and group["lr"] <= config.min_lr]
    flat = dict.fromkeys(name.split(".")[0] for name in low)
    if flat:
        log.warning("min_lr is %g, no less than the learning rate of %s: it does not fall after the warm-up",
                    config.min_lr, ", ".join(flat))  # fmt: skip
    if warmup > last:
        log.warning("warmup_steps is %d, but the run has %d steps: the learning rate never leaves its warm-up",
                    warmup, total_steps)  # fmt: skip
    start = warmup  # of the fall
    if config.scheduler == "wsd":
        decay = config.decay_steps or math.ceil(total_steps / 10)
        start = max(warmup, last - decay)
        if warmup + decay > last:
            log.warning("decay_steps is %d, but %d of the run's %d steps are left after the warm-up: there is no "
                        "stable part", decay, max(0, total_steps - warmup), total_steps)  # fmt: skip

    def factor(step: int, base_lr: float) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, max(0, step - start) / max(1, last - start))
        cosine, linear = 0.5 * (1 + math.cos(math.pi * progress)), 1 - progress
        remaining = {"cosine": cosine, "linear": linear, "wsd": linear, "none": 1.0}[config.scheduler]
        return remaining + (1 - remaining) * config.min_lr / base_lr

    factors = [lambda step, lr=group["lr"]: factor(step, lr) for group in groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
