"""Short trainings in one process or several, in fp64, for tests/test_parallel.py; torchrun runs this file."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from tiny_runs import draw_no_curves, read_metrics, settings

import train_flextok
from flextok.data.loader import build_loaders
from flextok.data.sources import build_datasets
from flextok.training import distributed as parallel
from flextok.training import guard
from flextok.training.config import TrainConfig
from flextok.training.models import load_model
from flextok.utils.processes import gathered, joined, rank, world_size

STEPS = 3
GLOBAL_BATCH = 4
CPU = torch.device("cpu")
WITH_ALL = dict(use_repa=True, readout_weight=1.0, use_ema=True)
ONE_BLOCK = settings()["model"] | dict(encoder_depth=1, decoder_depth=1, repa_layers=[0])
PLAIN = dict(
    use_repa=False, photos_train_crops=2 * GLOBAL_BATCH, model=ONE_BLOCK
)  # quick to compile: all batches alike


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
    sizes = dict(batch_size=GLOBAL_BATCH // world_size(), global_batch_size=GLOBAL_BATCH, num_epochs=4)
    sizes |= dict(photos_train_crops=GLOBAL_BATCH + 1, photos_val_crops=GLOBAL_BATCH + 3, repa_image_size=32)
    sizes |= dict(
        val_images=GLOBAL_BATCH + 1, val_token_images=0, repa_constant_images=0, inference_steps=1, vis_token_counts=[8]
    )
    changes = sizes | changes
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
    first_step = trainer.global_step
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    for i, projector in enumerate(trainer.repa_module.projectors if trainer.use_repa else []):
        names.update({id(p): f"projector.{i}.{name}" for name, p in projector.named_parameters()})
    if trainer.readout is not None:
        names.update({id(p): f"readout.{name}" for name, p in trainer.readout.named_parameters()})
    gradients, draws = {}, {}

    def note_draws(module, arguments, output):
        if module.training:
            position = output[train_flextok.RANDOM_KEY].positions
            for j, i in enumerate(position.tolist()):
                noise = float(output["flow_noise"][j].sum())
                draws[trainer.global_step, i] = (float(output["timesteps"][j]), int(output["train_keep_k"][j]), noise)

    def note_gradients(optimizer, arguments, settings):
        if not gradients:
            gradients.update({names[id(p)]: parallel.full(p.grad).clone() for p in trainer.trained_parameters})

    trainer.model.decoder.register_forward_hook(note_draws)
    trainer.optimizer.register_step_pre_hook(note_gradients)
    trainer.train(max_steps=steps)
    validation = trainer.validate()
    if trainer.use_repa:
        trainer.config.repa_constant_images = GLOBAL_BATCH + 1
        validation |= trainer.evaluator.constant_losses(trainer.repa_module)
    draws = {key: value for part in gathered(draws) for key, value in part.items()}
    losses = [r["train/loss"] for r in read_metrics(run_dir) if "train/loss" in r and r["step"] > first_step]
    path = str(run_dir / "checkpoints" / "latest.pt")
    return dict(losses=losses, gradients=gradients, draws=draws, validation=validation, checkpoint=path)


def step_that_one_process_spoils(run_dir: Path, **changes) -> dict:
    """A step whose loss is NaN in the last process alone, between two that are good; what changed where in each."""
    trainer = build(run_dir, use_ema=True, photos_train_crops=2 * GLOBAL_BATCH, **changes)
    original, changed, before, shown, warnings = trainer.compute_loss, [], [], [], []

    def compute_loss(batch, random):
        losses = original(batch, random)
        if trainer.model.training and trainer.global_step == 1:
            name = trainer.train_loader.dataset.name
            shown.extend(name(i) for part in gathered(batch.index.tolist()) for i in part)
            if rank() == world_size() - 1:
                losses["loss"] = losses["loss"] * float("nan")
        return losses

    def note_changes(micro_batches):
        nonlocal before
        losses = step(micro_batches)
        values = [*trainer.trained_parameters, *trainer.ema.averages]
        values += [value for state in trainer.optimizer.state.values() for value in state.values()]
        after = [parallel.local(value).detach().clone() for value in values]
        changed.append(len(before) != len(after) or not all(map(torch.equal, before, after)))
        before = after
        return losses

    step, trainer.compute_loss, trainer.train_step = trainer.train_step, compute_loss, note_changes
    guard.log.warning = lambda message, *values: warnings.append(values)
    trainer.train(max_steps=3)
    del guard.log.warning
    return dict(
        changed=gathered(changed), skipped=gathered(trainer.guard.skipped), shown=shown,
        named=warnings[0][1].split(", "),
    )  # fmt: skip


def first_gradients(run_dir: Path, **changes) -> dict:
    """Gradients of a first step in bf16 autocast, fp32 weights."""
    config = TrainConfig.from_dict(settings(**{**dict(batch_size=GLOBAL_BATCH // world_size()), **changes}))
    train_loader, _ = build_loaders(config, *build_datasets(config), CPU)
    trainer = train_flextok.FlexTokTrainer(config, load_model(config), train_loader, None, CPU, run_dir)
    trainer.autocast_dtype = torch.bfloat16
    gradients = {}
    names = {id(p): name for name, p in trainer.model.named_parameters()}

    def note_gradients(optimizer, arguments, settings):
        gradients.update({
            names[id(p)]: parallel.full(p.grad).clone() for p in trainer.trained_parameters if id(p) in names
        })  # fmt: skip

    trainer.optimizer.register_step_pre_hook(note_gradients)
    trainer.train_loader.batch_sampler.set_state(0, 0)
    trainer.train_step([next(iter(train_loader))])
    return gradients


# Each with two processes, and in one with the whole batch at once.
RUNS = {
    "ddp": dict(WITH_ALL, batch_size=1, gradient_checkpointing=True),
    "ddp, compiled": dict(PLAIN, compile=True),
    "fsdp": dict(WITH_ALL, parallel="fsdp", batch_size=1, visualize_every=1),
    "fsdp, kept": dict(WITH_ALL, parallel="fsdp", batch_size=1, fsdp_accumulation="keep", gradient_checkpointing=True),
    "fsdp, compiled": dict(PLAIN, parallel="fsdp", compile=True),
}


def main(folder: Path) -> None:
    results = {}
    for name, changes in RUNS.items():
        results[name] = train_briefly(folder / name, **changes)
        dist.barrier()
    for name in ("ddp", "fsdp"):
        checkpoint = folder / "one" / "checkpoints" / "latest.pt"
        resumed = train_briefly(folder / f"{name}, resumed", STEPS + 2, checkpoint, **RUNS[name])
        results[f"{name}, resumed"] = resumed
        results[f"{name}, bf16"] = first_gradients(folder / f"{name}, bf16", use_repa=False, parallel=name)
        spoiled = step_that_one_process_spoils(folder / f"{name}, spoiled", use_repa=False, parallel=name)
        results[f"{name}, spoiled"] = spoiled
    if rank() == 0:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    draw_no_curves()
    compile_module = torch.nn.Module.compile  # without a compiler of C++, which takes a minute here
    torch.nn.Module.compile = lambda module: compile_module(module, backend="eager")
    with joined(CPU):
        main(Path(sys.argv[1]))
