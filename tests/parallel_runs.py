"""Short trainings in one process or several, in fp64, for tests/test_parallel.py; torchrun runs this file."""

import itertools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from tiny_runs import settings

import train_flextok
from flextok.data.loader import build_datasets, build_loaders
from flextok.training import parallel
from flextok.training.config import TrainConfig
from flextok.training.models import load_model
from flextok.utils.processes import gathered, joined, rank, world_size

STEPS = 20
GLOBAL_BATCH = 4
CPU = torch.device("cpu")


class InDouble(nn.Module):
    """The pixel VAE, with latents in fp64."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def __getattr__(self, name):
        return getattr(super().__getattr__("vae"), name) if name != "vae" else super().__getattr__("vae")

    def encode(self, data_dict: dict) -> dict:
        data_dict = self.vae.encode(data_dict)
        key = self.vae.vae_latents_write_key
        data_dict[key] = data_dict[key].double()
        return data_dict


def build(run_dir: Path, **changes) -> train_flextok.FlexTokTrainer:
    """A trainer of the tiny settings in fp64, with GLOBAL_BATCH images a step whatever the number of processes.

    The last steps of an epoch and of a validation have one image, for one of the processes.
    """
    changes = dict(batch_size=GLOBAL_BATCH // world_size(), global_batch_size=GLOBAL_BATCH, num_epochs=8) | changes
    changes |= dict(photos_train_crops=4 * GLOBAL_BATCH + 1, photos_val_crops=GLOBAL_BATCH + 1)
    config = TrainConfig.from_dict(settings(**changes))
    train_loader, val_loader = build_loaders(config, *build_datasets(config), CPU)
    model = load_model(config).double()
    model.vae = InDouble(model.vae)
    quants = model.regularizer.quants_write_key  # computed in fp32
    model.regularizer.register_forward_hook(lambda *call: call[2].update({quants: call[2][quants].double()}))
    builders = {name: getattr(train_flextok, name) for name in ("build_repa_module", "build_readout")}
    for name, original in builders.items():
        double = lambda *arguments, original=original: (module := original(*arguments)) and module.double()  # noqa: E731
        setattr(train_flextok, name, double)
    try:
        return train_flextok.FlexTokTrainer(config, model, train_loader, val_loader, CPU, run_dir)
    finally:
        for name, original in builders.items():
            setattr(train_flextok, name, original)


def train_briefly(run_dir: Path, steps: int = STEPS, resume: Path = None, **changes) -> dict:
    """Losses of each step, gradients of the first, draws by image, the validation, and the checkpoint at the end."""
    trainer = build(run_dir, **changes)
    if resume is not None:
        trainer.load_checkpoint(resume)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    for i, projector in enumerate(trainer.projectors):
        names.update({id(p): f"projector.{i}.{name}" for name, p in projector.named_parameters()})
    for readout in trainer.readouts:
        names.update({id(p): f"readout.{name}" for name, p in readout.named_parameters()})
    gradients, draws, losses = {}, {}, []

    def note_draws(module, arguments, output):
        if module.training:
            position = output[train_flextok.RANDOM_KEY].positions
            for j, i in enumerate(position.tolist()):
                noise = float(output["flow_noise"][j].sum())
                draws[trainer.global_step, i] = (float(output["timesteps"][j]), int(output["train_keep_k"][j]), noise)

    trainer.model.decoder.register_forward_hook(note_draws)
    original = torch.nn.utils.clip_grad_norm_

    def note_gradients(parameters, max_norm):
        if not gradients:
            gradients.update({names[id(p)]: parallel.full(p.grad).clone() for p in parameters})
        return original(parameters, max_norm)

    torch.nn.utils.clip_grad_norm_ = note_gradients
    try:
        while trainer.global_step < steps:
            for window in trainer._windows(*divmod(trainer.global_step, trainer.steps_per_epoch)):
                if trainer.global_step < steps:
                    means, _, _ = trainer.update(window)
                    trainer.global_step += 1
                    losses.append(float(train_flextok.summed(means["loss"])))
    finally:
        torch.nn.utils.clip_grad_norm_ = original
    validation = trainer.validate()
    path = trainer.save_checkpoint()
    draws = {key: value for part in gathered(draws) for key, value in part.items()}
    return dict(losses=losses, gradients=gradients, draws=draws, validation=validation, checkpoint=str(path))


def step_that_one_process_spoils(run_dir: Path, **changes) -> dict:
    """A step whose loss is NaN in the last process alone, between two that are good; what changed where in each."""
    trainer = build(run_dir, use_ema=True, **changes)
    original = trainer.compute_loss
    spoiling = False

    def compute_loss(*arguments):
        losses = original(*arguments)
        if spoiling and rank() == world_size() - 1:
            losses["loss"] = losses["loss"] * float("nan")
        return losses

    def state() -> list:
        values = [*trainer.trained_parameters, *trainer.ema.averages]
        values += [value for state in trainer.optimizer.state.values() for value in state.values()]
        return [parallel.local(value).detach().clone() for value in values]

    trainer.compute_loss = compute_loss
    flags, changed, before, shown, warnings = [], [], [], [], []
    train_flextok.log.warning = lambda message, *values: warnings.append(values)
    for i, window in enumerate(itertools.islice(trainer._windows(0, 0), 3)):
        spoiling = i == 1
        flags.append(trainer.update(window)[2].tolist())
        if spoiling:
            shown = [f"number {index}" for part in gathered(window[0]["index"].tolist()) for index in part]
            trainer._note_flags((flags[-1], (1, window)))
        trainer.global_step += 1
        after = state()
        changed.append(len(before) != len(after) or not all(map(torch.equal, before, after)))
        before = after
    del train_flextok.log.warning
    return dict(flags=gathered(flags), changed=gathered(changed), shown=shown, named=warnings[0][1].split(", "))


def without_exchange(modules, compute):
    return parallel.Losses(modules, compute)


RUNS = {
    "ddp": dict(use_repa=False),
    "ddp, accumulated": dict(use_repa=True, batch_size=1, readout_weight=1.0),
    "ddp, checkpointing": dict(use_repa=True, gradient_checkpointing=True, use_ema=True),
    "fsdp": dict(use_repa=False, parallel="fsdp"),
    "fsdp, accumulated": dict(use_repa=True, parallel="fsdp", batch_size=1, readout_weight=1.0),
    "fsdp, checkpointing": dict(use_repa=True, parallel="fsdp", gradient_checkpointing=True, use_ema=True),
    "no exchange": dict(use_repa=False),
    "no exchange, REPA": dict(use_repa=True),
}


def main(folder: Path) -> None:
    results = {}
    for name, changes in RUNS.items():
        train_flextok.replicate = without_exchange if name.startswith("no exchange") else parallel.replicate
        results[name] = train_briefly(folder / name, **changes)
        dist.barrier()
    train_flextok.replicate = parallel.replicate
    # A checkpoint of one process goes on in two.
    for name in ("ddp, checkpointing", "fsdp, checkpointing"):
        results[f"{name}, resumed"] = train_briefly(
            folder / f"{name}, resumed", STEPS + 4, folder / "one" / "checkpoints" / "latest.pt", **RUNS[name]
        )
    for name in ("ddp", "fsdp"):
        spoiled = step_that_one_process_spoils(folder / f"{name}, spoiled", use_repa=True, parallel=name)
        results[f"{name}, spoiled"] = spoiled
    if rank() == 0:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined(CPU):
        main(Path(sys.argv[1]))
