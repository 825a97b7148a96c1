"""The trainer: losses, what they train, optimizer and schedules, validation, checkpoints, resume."""

import builtins
import copy
import math
import multiprocessing
import os
import signal
import sys

import pytest
import torch
from helpers import make_images, save_tiny_vae
from PIL import Image
from tiny_runs import first_batch, make_trainer, read_latest, read_metrics, run_main, same, settings
from torch._dynamo.testing import CompileCounter
from torch.utils.data import DataLoader, TensorDataset

import train_flextok
from flextok import FlexTokFromHub
from flextok.data.loader import LoaderError
from flextok.training import export
from flextok.training.config import TrainConfig, load_config
from flextok.training.guard import Stopped
from flextok.training.models import load_model
from flextok.utils.checkpoint import CheckpointError
from flextok.utils.config import ConfigError
from flextok.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture(scope="module")
def trainer():
    """A trainer for tests that do not change it."""
    trainer = make_trainer()
    trainer.model.train()
    return trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory, no_curves):
    """A trainer that has done two steps."""
    trainer = make_trainer(tmp_path_factory.mktemp("finished"))
    trainer.train(max_steps=2)
    return trainer


# --------------------------------------------------------------------------------------------------------------- losses


def test_a_plain_tensor_of_images_is_a_batch(trainer):
    batch = first_batch(trainer)
    assert torch.equal(trainer.compute_loss(batch.images)["loss"], trainer.compute_loss(batch)["loss"])
    dummy_batch = torch.randn(2, 3, 32, 32).clamp(-1, 1)  # the documented one
    metrics = trainer.compute_loss(dummy_batch)
    assert all(math.isfinite(metrics[name].item()) for name in ("loss", "flow_loss", "repa_loss"))


@pytest.mark.parametrize("batch", [torch.zeros(3, 32, 32), torch.zeros(2, 1, 32, 32), {"image": [1]}, "images"])
def test_a_batch_that_is_no_images_is_refused(trainer, batch):
    with pytest.raises((ValueError, TypeError), match=r"expected a tensor \[B, 3, H, W\]"):
        trainer.compute_loss(batch)


def test_without_repa_its_loss_is_zero_and_the_first_flow_loss_bit_identical(trainer):
    without = make_trainer(use_repa=False)
    without.model.train()
    losses, with_repa = (some.compute_loss(first_batch(trainer)) for some in (without, trainer))
    assert losses["repa_loss"].item() == 0 and torch.equal(losses["loss"], losses["flow_loss"])
    assert torch.equal(losses["flow_loss"], with_repa["flow_loss"]) and with_repa["repa_loss"].item() != 0


def test_a_missing_activation_is_an_error_and_not_a_zero_loss():
    trainer = make_trainer()
    trainer.model.decoder.module_dict["dec_transformer"].intermediate_layers = []
    with pytest.raises(KeyError, match="dec_packed_seq_repa_layer"):
        trainer.compute_loss(first_batch(trainer))


def test_training_without_repa_never_imports_it(tmp_path, monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if "repa_loss" in name or "repa_encoders" in name:
            raise ImportError(f"{name} is not to be imported")
        return original(name, *args, **kwargs)

    for name in list(sys.modules):
        if "repa_loss" in name or "repa_encoders" in name:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    run_main(tmp_path, run_dir=tmp_path / "run", use_repa=False, max_steps=1)
    metrics = read_metrics(tmp_path / "run")
    assert metrics and not any("repa" in key for record in metrics for key in record)


@pytest.mark.parametrize("optimizer", ["adamw", *["muon"] * hasattr(torch.optim, "Muon")])  # from PyTorch 2.9 on
def test_a_step_does_not_synchronize(optimizer, tmp_path, monkeypatch):
    """From the batch to the new weights and their averages, no value is read back."""
    trainer = make_trainer(tmp_path, use_ema=True, gradient_accumulation_steps=2, optimizer=optimizer)
    micro_batches = [first_batch(trainer), first_batch(trainer)]
    reads, before = [], trainer.model.encoder.state_dict()["module_dict.enc_to_latents.proj.weight"].clone()
    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "numpy", "cpu"):
        original = getattr(torch.Tensor, name)

        def read(tensor, *args, name=name, original=original):
            reads.append(name)
            return original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, read)
    monkeypatch.setattr(torch, "is_nonzero", lambda *_: reads.append("is_nonzero"))
    for _ in range(2):
        trainer.train_step(micro_batches)
    assert reads == []
    monkeypatch.undo()
    assert not torch.equal(trainer.model.encoder.state_dict()["module_dict.enc_to_latents.proj.weight"], before)


def test_blocks_are_compiled_once_and_without_graph_breaks(tmp_path, monkeypatch):
    """A graph for the encoder's blocks and one for the decoder's, and nothing more after the second step."""
    graphs, compile_module = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend=graphs))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer = make_trainer(tmp_path, compile=True)
    compiled = []
    for _ in range(3):
        trainer.train_step([first_batch(trainer)])
        compiled.append(graphs.frame_count)
    assert compiled[0] == 2 and compiled[1] == compiled[-1]
    assert not torch._dynamo.utils.counters["graph_break"]


# ------------------------------------------------------------------------------------------------ what is being trained


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_part_that_is_not_trained_stays_as_it_is(tmp_path, part):
    trainer = make_trainer(tmp_path, use_repa=False, **{f"train_{part}": False})
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train(max_steps=2)
    changed = {name.split(".")[0] for name, p in trainer.model.named_parameters() if not torch.equal(before[name], p)}
    assert changed == {"encoder", "decoder"} - {part}
    assert part not in [group["name"] for group in trainer.optimizer.param_groups]


def test_a_step_begins_before_its_second_micro_batch_is_loaded(tmp_path):
    """On a GPU the first one computes while the others are loaded."""
    trainer = make_trainer(tmp_path, use_repa=False, batch_size=2, gradient_accumulation_steps=3, val_token_images=0)
    events, read, compute_loss = [], trainer.train_loader.dataset.read, trainer.compute_loss
    trainer.train_loader.dataset.read = lambda index: events.append("image") or read(index)
    trainer.compute_loss = lambda *arguments: events.append("loss") or compute_loss(*arguments)
    trainer.train(max_steps=2)
    assert events[:18] == ["image", "image", "loss"] * 6


def test_a_run_leaves_no_loading_processes_and_goes_on_with_new_ones(tmp_path):
    trainer = make_trainer(tmp_path, use_repa=False, num_workers=2)
    for step in (2, 4):  # in mid-epoch
        trainer.train(max_steps=step)
        assert trainer.global_step == step and not multiprocessing.active_children()


# ----------------------------------------------------------------------------------------------------------- validation


def test_validation_repeats_exactly_and_trains_and_writes_nothing(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.train()
    before = copy.deepcopy(trainer.model.state_dict())
    first = trainer.validate()
    trainer.global_step = 7
    assert trainer.validate() == first
    assert same(before, trainer.model.state_dict()) and trainer.model.decoder.training and not any(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"max_val_batches": 5, "val_batch_size": 8}, {"val_images": 40}])
def test_validation_is_of_images_from_all_over_the_set_in_no_order_of_theirs(tmp_path, changes):
    """Files are sorted by class; the images are the same each time, whatever the processes."""
    for i in range(80):
        (tmp_path / "data" / "ab"[i // 40]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (3 * i, 0, 0)).save(tmp_path / "data" / "ab"[i // 40] / f"{i}.png")
    (tmp_path / "more").mkdir()
    Image.new("RGB", (32, 32), (0, 99, 0)).save(tmp_path / "more" / "0.png")
    data = dict(dataset_name="folder", data_path=str(tmp_path / "more"), val_path=str(tmp_path / "data"))
    trainer = make_trainer(use_repa=False, **data, **changes)
    taken = [i for batch in trainer.val_loader for i in batch.index.tolist()]
    assert len(taken) == 40 and sorted(taken) == list(range(0, 80, 2)) != taken
    assert [i for batch in trainer.val_loader for i in batch.index.tolist()] == taken
    assert trainer.config.n_val_images(80) == 40 and trainer.config.n_val_images(30) == 30
    firsts = sum(i < 40 for i in taken[:20])
    assert 5 < firsts < 15  # the first half of the noise levels is not that of the first class


def test_a_run_without_validation_images_trains(tmp_path):
    make_trainer(tmp_path, photos_val_crops=0, use_repa=False).train(max_steps=1)
    assert not any("val/loss" in record for record in read_metrics(tmp_path))


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoint_has_the_documented_keys_and_nothing_of_the_frozen_encoder(finished):
    trainer = finished
    checkpoint = read_latest(trainer.run_dir)  # weights_only=True
    assert set(checkpoint) >= {
        "epoch", "global_step", "model_state_dict", "optimizer_state_dict", "scheduler_state_dict",
        "scaler_state_dict", "ema_model_state_dict", "repa_module_state_dict", "best_val_loss", "config",
    }  # fmt: skip
    projector = trainer.repa_module.projector.state_dict()
    assert set(checkpoint["repa_module_state_dict"]) == {f"projector.{key}" for key in projector}
    frozen = {tuple(p.shape) for p in trainer.repa_module.encoder.parameters() if p.ndim == 4}
    tensors = [*checkpoint["model_state_dict"].values(), *checkpoint["repa_module_state_dict"].values()]
    assert not frozen & {tuple(tensor.shape) for tensor in tensors}
    weights = sum(tensor.numel() for tensor in tensors)
    size = (trainer.run_dir / "checkpoints" / "latest.pt").stat().st_size
    assert size < 4 * 3 * weights * 1.02 + 200_000  # weights, two moments, and little else
    assert TrainConfig.from_dict(checkpoint["config"]) == trainer.config


def test_resume_latest_finds_the_newest_run_of_this_config_or_starts_afresh(tmp_path):
    def run(max_steps, **changes) -> dict:
        run_main(tmp_path, max_steps=max_steps, resume="latest", **changes)
        return {path.name: read_latest(path)["global_step"] for path in (tmp_path / "runs").iterdir()}

    (first,) = run(1, use_repa=False)
    assert first.startswith("tiny-")
    (with_repa,) = run(1, use_repa=True).keys() - {first}  # another arm
    runs = run(1, use_repa=False, wandb_run_name="tiny-2-20260101-120000")  # another experiment: it begins alike
    (other,) = runs.keys() - {first, with_repa}
    assert run(2, use_repa=False) == {first: 2, with_repa: 1, other: 1}
    run_main(tmp_path, run_dir=tmp_path / "runs" / "tiny-20250101-000000", max_steps=1, use_repa=False)
    for name in (first, "tiny-20250101-000000", first):  # whichever was written last
        os.utime(tmp_path / "runs" / name / "checkpoints" / "latest.pt")
        step = read_latest(tmp_path / "runs" / name)["global_step"]
        assert run(step + 1, use_repa=False)[name] == step + 1


def test_a_run_folder_in_use_is_not_overwritten_and_holds_the_config_in_force(tmp_path):
    overrides = ["use_repa=false", "learning_rate=3e-4"]
    for name in ("a", "b"):
        run_main(tmp_path, run_dir=tmp_path / name, max_steps=1, overrides=overrides)
    before = (tmp_path / "a" / "metrics.jsonl").read_text()
    for resume in (None, str(tmp_path / "b")):  # nor is the run of another folder continued there
        with pytest.raises(ConfigError, match="holds a run already"):
            run_main(tmp_path, run_dir=tmp_path / "a", max_steps=2, resume=resume, overrides=overrides)
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == before
    config = load_config(tmp_path / "a" / "config.yaml")
    assert config.learning_rate == 3e-4 and config.use_repa is False and config.model == settings()["model"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 1}, "trained with seed 0, now it is 1"),
        ({"optimizer": "adam"}, "trained with optimizer adamw"),
        ({"photos_train_crops": 20}, "trained with data .* restore the data"),
        ({"train_encoder": False}, "other parameters"),
        ({"batch_size": 2}, "images per optimizer step 4, now it is 2: set global_batch_size: 4"),
        ({"model": {**settings()["model"], "fsq_levels": [5, 8, 5]}}, "structure .*levels': \\[8, 5, 5\\]"),
        ({"model": {**settings()["model"], "decoder_depth": 2, "repa_layers": [1]}}, "not the model's, e.g. decoder"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(finished, changes, message):
    with pytest.raises(CheckpointError, match=message):
        make_trainer(**changes).load_checkpoint(finished.run_dir / "checkpoints" / "latest.pt")


def test_any_checkpoint_can_be_exported_by_command(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "run", use_ema=True, ema_decay=0.5, use_repa=False)
    trainer.train(max_steps=2)
    for options in ([tmp_path / "averaged"], [tmp_path / "raw", "--raw"]):
        command = ["export", tmp_path / "run" / "checkpoints" / "latest.pt", *options]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        export.main()
    averaged, raw = (FlexTokFromHub.from_pretrained(tmp_path / name).state_dict() for name in ("averaged", "raw"))
    assert same(dict(raw), dict(trainer.model.state_dict()))
    assert same(dict(averaged), FlexTokFromHub.from_pretrained(tmp_path / "run" / "export").state_dict() | {})
    assert not same(dict(raw), dict(averaged))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small model with its own weights, and where it lies as a published one does."""
    folder = tmp_path_factory.mktemp("published")
    model = load_model(TrainConfig.from_dict(settings(seed=5)))
    model.save_pretrained(folder)
    return model, str(folder)


def test_fine_tuning_starts_from_the_weights_of_a_folder(published):
    model, folder = published
    trainer = make_trainer(model=None, model_name=folder, fsq_levels=[8, 5, 5], use_repa=False)  # which it has
    assert same(dict(model.state_dict()), dict(trainer.model.state_dict()))


def test_train_from_scratch_keeps_the_architecture_alone(published):
    model, folder = published
    fresh = make_trainer(model=None, model_name=folder, train_from_scratch=True, use_repa=False).model
    assert fresh.config == model.config
    name = "decoder.module_dict.dec_from_latents.proj.weight"
    assert not torch.equal(fresh.state_dict()[name], model.state_dict()[name])


def test_other_fsq_levels_rebuild_the_two_layers_around_the_quantiser_alone(tmp_path, published):
    model, folder = published
    trainer = make_trainer(tmp_path, model=None, model_name=folder, fsq_levels=[7, 7, 7, 7], use_repa=False)
    new, old = trainer.model.state_dict(), model.state_dict()
    rebuilt = {key.rsplit(".", 2)[0] for key in new if not same(new[key], old[key])}
    assert rebuilt == {"encoder.module_dict.enc_to_latents", "decoder.module_dict.dec_from_latents"}
    assert trainer.model.regularizer.codebook_size == 7**4
    assert FlexTokFromHub.from_pretrained(trainer.export()).regularizer.levels == [7, 7, 7, 7]


def test_initial_weights_depend_on_the_seed_and_leave_the_global_random_state():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = make_trainer().model.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(dict(first), dict(make_trainer().model.state_dict()))
    assert not same(dict(first), dict(make_trainer(seed=1).model.state_dict()))


def test_a_trained_vae_learns_from_its_own_loss_alone(tmp_path):
    save_tiny_vae(tmp_path / "vae")
    model = dict(encoder_depth=2, decoder_depth=3, encoder_width=64, decoder_width=64, head_dim=32, n_registers=8,
                 patch_size=1, latent_channels=4, vae_hub_path=str(tmp_path / "vae"))  # fmt: skip
    trainer = make_trainer(model=model, use_repa=False, train_vae=True, vae_lr=1e-4, warmup_steps=0)
    assert {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}["vae"] == 1e-4
    trainer.model.train()
    losses = trainer.compute_loss(first_batch(trainer))
    losses["flow_loss"].backward(retain_graph=True)
    assert all(p.grad is None for p in trainer.model.vae.parameters())
    trainer.config.vae_kl_weight = 1.0
    assert trainer.compute_loss(first_batch(trainer))["vae_loss"] > losses["vae_loss"] + 0.1
    losses["vae_loss"].backward()
    assert all(p.grad is not None for p in trainer.model.vae.parameters())
    assert losses["loss"].item() == pytest.approx((losses["flow_loss"] + losses["vae_loss"]).item())


# ---------------------------------------------------------------------------------------------- other loaders and files


def test_broken_validation_files_are_named_and_too_many_save_the_run_before_they_stop_it(tmp_path, caplog):
    for i in range(10):
        Image.new("RGB", (40, 40), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    changes = dict(dataset_name="folder", data_path=str(tmp_path), val_fraction=0.5, use_ema=True, use_repa=False)
    broken = make_trainer(**changes).val_loader.dataset.paths[:2]
    for path in broken:
        path.write_bytes(b"")
    trainer = make_trainer(tmp_path / "run", **changes)
    with pytest.raises(UserError, match="more than 1 %"):
        trainer.train(max_steps=trainer.steps_per_epoch)
    assert all(path.name in caplog.text for path in broken)
    checkpoint = read_latest(tmp_path / "run")
    assert checkpoint["global_step"] == trainer.steps_per_epoch
    assert same(checkpoint["model_state_dict"], dict(trainer.model.state_dict()))


class Loader(DataLoader):
    """Three batches of images, or an error in place of the third."""

    def __init__(self, length: int = 3, error: Exception | None = None):
        super().__init__(TensorDataset(make_images(10), torch.arange(10)), batch_size=4)
        self.length, self.error = length, error

    def __len__(self):
        return self.length

    def __iter__(self):
        for i, batch in enumerate(super().__iter__()):
            if i == 2 and self.error is not None:
                raise self.error
            yield batch


def trainer_of(loader: DataLoader, run_dir):
    val_loader = DataLoader(TensorDataset(make_images(3, seed=2)))
    config = settings(use_repa=False, save_every_steps=100, dataset_name="folder")
    model = load_model(TrainConfig.from_dict(config))
    return train_flextok.FlexTokTrainer(config, model, loader, val_loader, "cpu", run_dir)


def test_a_loader_with_fewer_batches_than_it_says_is_an_error_and_no_endless_loop(tmp_path):
    with pytest.raises(UserError, match="ends before its 9 batches"):
        trainer_of(Loader(length=9), tmp_path).train()


def test_what_was_trained_before_the_loading_fails_is_saved(tmp_path):
    with pytest.raises(LoaderError):
        trainer_of(Loader(error=LoaderError("one of them was killed")), tmp_path).train()
    assert read_latest(tmp_path)["global_step"] == 2


def test_a_loader_of_another_global_batch_is_refused(trainer):
    with pytest.raises(ConfigError, match="gives 4 images an optimizer step, but the settings 8"):
        config = settings(gradient_accumulation_steps=2)
        train_flextok.FlexTokTrainer(config, trainer.model, trainer.train_loader, None, "cpu")


def test_a_run_that_a_signal_stopped_trains_on_when_it_is_asked_to(tmp_path, monkeypatch):
    trainer = trainer_of(Loader(), tmp_path)
    train_step = trainer.train_step
    monkeypatch.setattr(
        trainer, "train_step", lambda batches: os.kill(os.getpid(), signal.SIGINT) or train_step(batches)
    )
    with pytest.raises(Stopped, match="stopped by SIGINT after step 1"):
        trainer.train()
    monkeypatch.undo()
    trainer.train(max_steps=2)
    assert trainer.global_step == 2


def test_a_run_leaves_pictures_and_metrics_of_the_documented_names(finished):
    with Image.open(finished.run_dir / "pictures" / "flexible_length_0000002.png") as picture:
        assert picture.width > 4 * 128 and picture.height > 2 * 128  # VAE, 1, 8 tokens, original; two images
    records = read_metrics(finished.run_dir, timing=True)
    train = next(r for r in records if "train/loss" in r)
    assert set(train) == {"step"} | {
        f"train/{name}" for name in ("loss", "flow_loss", "repa_loss", "repa_weight", "lr", "grad_norm",
                                     "images_per_second", "data_wait", "memory_gb", "skipped_steps", "epoch", "step")
    }  # fmt: skip
    assert {"val/loss", "val/flow_loss", "val/repa_loss"} <= {key for r in records for key in r}
