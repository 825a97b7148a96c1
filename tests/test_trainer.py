"""The trainer: losses, what they train, optimizer and schedules, validation, checkpoints, resume."""

import builtins
import math
import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from processes import Script
from tiny_runs import first_batch, make_trainer, read_latest, read_metrics, run_main, same, settings
from torch._dynamo.testing import CompileCounter
from torch.utils.data import DataLoader, Dataset

import train_flextok
from flextok import FlexTokFromHub
from flextok.training import monitor
from flextok.training.config import TrainConfig, load_config
from flextok.training.models import load_model
from flextok.training.runs import new_run_dir
from flextok.utils.checkpoint import CheckpointError
from flextok.utils.config import ConfigError, instantiate
from flextok.utils.errors import UserError
from flextok.utils.random import RANDOM_KEY, BatchRandom


@pytest.fixture(scope="module")
def trainer():
    """A trainer for tests that do not change it."""
    trainer = make_trainer()
    trainer.model.train()
    return trainer


# --------------------------------------------------------------------------------------------------------------- losses


def test_flow_loss_is_the_velocity_error_of_an_independent_computation(trainer):
    batch = first_batch(trainer)
    random = BatchRandom(0, 0, batch.position, 4)
    data = trainer.model({"rgb": batch.images, RANDOM_KEY: random})
    sigma = data["sigmas"].view(-1, 1, 1, 1)
    latents = 0.5 * F.pixel_unshuffle(batch.images, 4)
    assert torch.allclose(data["vae_latents_noised"], sigma * data["flow_noise"] + (1 - sigma) * latents, atol=1e-6)
    expected = sum(
        ((data["vae_latents_reconst"][i] - (data["flow_noise"][i] - latents[i])) ** 2).sum().item() for i in range(4)
    )
    loss = trainer.compute_loss(batch, random)["flow_loss"].item()
    assert loss == pytest.approx(expected / latents.numel(), rel=1e-5)


def test_repa_loss_is_that_of_an_independent_computation(trainer):
    batch = first_batch(trainer)
    captured = {}
    block = trainer.model.decoder.module_dict["dec_transformer"].blocks[1]
    handle = block.register_forward_hook(lambda module, args, out: captured.update(layer=out.detach()))
    losses = trainer.compute_loss(batch)
    handle.remove()
    patches = captured["layer"][:, :16].view(4, 4, 4, -1)  # 4x4 patches come before the 8 registers
    first, second, third = (
        layer for layer in trainer.repa_module.projector.modules() if isinstance(layer, torch.nn.Linear)
    )
    projected = third(F.silu(second(F.silu(first(patches)))))  # the grid is the target size: nothing to resize
    target = trainer.repa_module.encoder(batch.images)  # 2x2
    target = F.interpolate(target, (4, 4), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    cosines = [
        torch.dot(p, t) / (p.norm() * t.norm()) for p, t in zip(projected.reshape(-1, 1280), target.reshape(-1, 1280))
    ]
    assert len(cosines) == 64
    assert losses["repa_loss"].item() == pytest.approx(-sum(cosines).item() / 64, abs=1e-5)
    assert losses["loss"].item() == pytest.approx((losses["flow_loss"] + losses["repa_loss"]).item(), abs=1e-6)


def test_repa_weight_scales_the_repa_loss():
    trainer = make_trainer(repa_weight=0.25)
    losses = trainer.compute_loss(first_batch(trainer))
    assert losses["loss"].item() == pytest.approx((losses["flow_loss"] + 0.25 * losses["repa_loss"]).item(), abs=1e-6)
    assert losses["repa_loss"].item() != 0


def test_a_plain_tensor_of_images_is_a_batch(trainer):
    batch = first_batch(trainer)
    assert torch.equal(trainer.compute_loss(batch.images)["loss"], trainer.compute_loss(batch)["loss"])


def test_the_documented_dummy_batch_runs(trainer):
    dummy_batch = torch.randn(2, 3, 32, 32).clamp(-1, 1)
    with torch.no_grad():
        metrics = trainer.compute_loss(dummy_batch)
    assert all(math.isfinite(metrics[name].item()) for name in ("loss", "flow_loss", "repa_loss"))


@pytest.mark.parametrize("batch", [torch.zeros(3, 32, 32), torch.zeros(2, 1, 32, 32), {"image": [1]}, "images"])
def test_a_batch_that_is_no_images_is_refused(trainer, batch):
    with pytest.raises((ValueError, TypeError), match=r"expected a tensor \[B, 3, H, W\]"):
        trainer.compute_loss(batch)


def test_images_that_do_not_fit_the_patch_grid_are_refused(trainer):
    with pytest.raises(ValueError, match="multiple"):
        trainer.compute_loss(torch.zeros(2, 3, 36, 36))


def test_repa_loss_is_zero_only_without_repa():
    trainer = make_trainer(use_repa=False)
    losses = trainer.compute_loss(first_batch(trainer))
    assert losses["repa_loss"].item() == 0 and torch.equal(losses["loss"], losses["flow_loss"])


def test_a_missing_activation_is_an_error_and_not_a_zero_loss():
    trainer = make_trainer()
    trainer.model.decoder.module_dict["dec_transformer"].intermediate_layers = []
    with pytest.raises(KeyError, match="dec_packed_seq_repa_layer"):
        trainer.compute_loss(first_batch(trainer))


def test_a_model_that_keeps_no_layer_for_repa_is_refused():
    model = settings()["model"] | {"repa_layers": []}
    with pytest.raises(ConfigError, match="use_repa is true, but"):
        make_trainer(model=model)


def test_first_flow_loss_is_bit_identical_with_and_without_repa():
    losses = [make_trainer(use_repa=use_repa) for use_repa in (True, False)]
    losses = [trainer.compute_loss(first_batch(trainer))["flow_loss"] for trainer in losses]
    assert torch.equal(*losses)


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
    run_main(tmp_path, run_dir=tmp_path / "run", use_repa=False, max_steps=2)
    metrics = read_metrics(tmp_path / "run")
    assert not any("repa" in key for record in metrics for key in record)


@pytest.mark.parametrize("use_ema", [False, True])
def test_a_step_does_not_synchronize(use_ema, tmp_path, monkeypatch):
    """From the batch to the new weights, no value is read back."""
    trainer = make_trainer(tmp_path, use_ema=use_ema, gradient_accumulation_steps=2)
    micro_batches = [first_batch(trainer), first_batch(trainer)]
    reads, before = [], trainer.model.encoder.state_dict()["module_dict.enc_to_latents.proj.weight"].clone()
    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "numpy", "cpu"):
        original = getattr(torch.Tensor, name)

        def read(tensor, *args, name=name, original=original):
            reads.append(name)
            return original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, read)
    monkeypatch.setattr(torch, "is_nonzero", lambda *_: reads.append("is_nonzero"))
    for _ in range(3):
        trainer.train_step(micro_batches)
    assert reads == []
    monkeypatch.undo()
    assert not torch.equal(trainer.model.encoder.state_dict()["module_dict.enc_to_latents.proj.weight"], before)


def test_data_wait_is_the_share_of_time_that_the_loop_waits_for_batches(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])
    clock = monitor.Monitor(tmp_path, 0, 2)

    def batches():
        for _ in range(2):
            now[0] += 3.0
            yield "batch"

    for _ in clock.waiting_for(batches()):
        now[0] += 10.0
        clock.step(images=13)
        with clock.paused():
            now[0] += 1000.0
    assert clock.rates() == {"train/images_per_second": 1.0, "train/data_wait": 6 / 26}
    clock.close()


def test_blocks_are_compiled_once_and_without_graph_breaks(tmp_path, monkeypatch):
    """A graph for the encoder's blocks and one for the decoder's, and nothing more after the second step."""
    graphs = CompileCounter()

    def compile_with(module):
        module._compiled_call_impl = torch.compile(module._call_impl, backend=graphs)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_with)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer = make_trainer(tmp_path, compile=True)
    compiled = []
    for _ in range(5):
        trainer.train_step([first_batch(trainer)])
        compiled.append(graphs.frame_count)
    assert compiled[0] == 2 and compiled[1] == compiled[-1]
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compile_without_a_compiler_is_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match="compile is true, but there is no C\\+\\+ compiler"):
        make_trainer(compile=True)


def test_compute_loss_is_a_function_of_seed_step_and_position_alone(trainer):
    batch = first_batch(trainer)
    loss = trainer.compute_loss(batch)["loss"]
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    assert torch.equal(trainer.compute_loss(batch)["loss"], loss)
    assert torch.equal(torch.get_rng_state(), state)  # the global random state is not even read
    trainer.global_step += 1
    assert not torch.equal(trainer.compute_loss(batch)["loss"], loss)
    trainer.global_step -= 1


# ------------------------------------------------------------------------------------------------ what is being trained


def test_repa_reaches_projector_and_first_two_decoder_layers_and_not_the_encoder():
    trainer = make_trainer()
    for block in trainer.model.decoder.module_dict["dec_transformer"].blocks:  # adaLN-zero gates would hide attn, mlp
        torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.02)
    trainer.model.train()
    trainer.compute_loss(first_batch(trainer))["repa_loss"].backward()
    blocks = trainer.model.decoder.module_dict["dec_transformer"].blocks
    for block in blocks[:2]:
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in blocks[2].parameters())
    assert all(p.grad.abs().sum() > 0 for p in trainer.repa_module.projector.parameters())
    assert all(p.grad is None and not p.requires_grad for p in trainer.repa_module.encoder.parameters())
    assert not trainer.repa_module.encoder.training


def test_one_step_changes_every_trained_parameter_and_projector_but_not_the_frozen_encoder(tmp_path):
    trainer = make_trainer(tmp_path)
    projector = [p.clone() for p in trainer.repa_module.projector.parameters()]
    frozen = [p.clone() for p in trainer.repa_module.encoder.parameters()]
    trainer.train(max_steps=1)
    assert all(not torch.equal(a, b) for a, b in zip(projector, trainer.repa_module.projector.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(frozen, trainer.repa_module.encoder.parameters()))


def test_every_trained_parameter_is_in_the_graph_of_every_step():
    trainer = make_trainer(model=settings()["model"] | {"null_condition_prob": 0.0})  # the null token is never used
    trainer.model.train()
    trainer.compute_loss(first_batch(trainer))["loss"].backward()
    named = {**dict(trainer.model.named_parameters()), **dict(trainer.repa_module.named_parameters())}
    assert [name for name, p in named.items() if p.requires_grad and p.grad is None] == []


def test_optimizer_groups_have_their_names_and_rates_and_hold_each_parameter_once():
    trainer = make_trainer(encoder_lr=3e-4, decoder_lr=2e-4, repa_lr=5e-4, warmup_steps=0)
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert list(groups) == ["encoder", "decoder", "repa_projector"]
    assert [group["lr"] for group in groups.values()] == [3e-4, 2e-4, 5e-4]
    assert {id(p) for p in groups["repa_projector"]["params"]} == {
        id(p) for p in trainer.repa_module.projector.parameters()
    }
    held = [id(p) for group in groups.values() for p in group["params"]]
    trained = [p for p in [*trainer.model.parameters(), *trainer.repa_module.parameters()] if p.requires_grad]
    assert sorted(held) == sorted(map(id, trained)) and len(set(held)) == len(held)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_part_that_is_not_trained_stays_as_it_is(tmp_path, part):
    trainer = make_trainer(tmp_path, **{f"train_{part}": False})
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train(max_steps=2)
    changed = {name.split(".")[0] for name, p in trainer.model.named_parameters() if not torch.equal(before[name], p)}
    assert changed == {"encoder", "decoder"} - {part}
    assert part not in [group["name"] for group in trainer.optimizer.param_groups]


def test_clipping_bounds_the_norm_over_model_and_projector_together(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_grad_norm=0.01, optimizer="adam")
    seen = []
    step = trainer.optimizer.step

    def watch(*args, **kwargs):
        gradients = [p.grad.norm() for group in trainer.optimizer.param_groups for p in group["params"]]
        seen.append(torch.stack(gradients).norm().item())
        return step(*args, **kwargs)

    monkeypatch.setattr(trainer.optimizer, "step", watch)
    trainer.train(max_steps=1)
    assert seen == [pytest.approx(0.01, rel=1e-3)]
    assert read_metrics(tmp_path)[1]["train/grad_norm"] > 0.01  # the norm before clipping is what is logged


def test_gradient_checkpointing_changes_no_number(tmp_path):
    gradients = []
    for checkpointing in (False, True):
        trainer = make_trainer(gradient_checkpointing=checkpointing)
        assert trainer.model.encoder.module_dict["enc_transformer"].use_act_checkpoint is checkpointing
        trainer.model.train()
        trainer.compute_loss(first_batch(trainer))["loss"].backward()
        gradients.append([p.grad for p in trainer.trained_parameters])
    assert same(*gradients)


# ---------------------------------------------------------------------------------------------- optimizer and schedules


def rates(**changes) -> list:
    """Learning rates of the decoder group over a run of 12 steps."""
    trainer = make_trainer(use_repa=False, **changes)
    assert trainer.total_steps == 12
    rates = []
    for _ in range(trainer.total_steps):
        rates.append(trainer.optimizer.param_groups[1]["lr"])
        trainer.optimizer.step()
        trainer.scheduler.step()
    return rates


def test_cosine_schedule_warms_up_and_reaches_min_lr_at_the_last_step():
    expected = [5e-4, 1e-3] + [1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * i / 9)) for i in range(10)]
    # warm-up takes 2 steps; the full rate is in force at its end and at the first step after it
    assert rates() == pytest.approx(expected, rel=1e-9)
    assert rates()[-1] == pytest.approx(1e-5)


def test_linear_schedule_reaches_min_lr_at_the_last_step():
    expected = [5e-4, 1e-3] + [1e-5 + (1e-3 - 1e-5) * (1 - i / 9) for i in range(10)]
    assert rates(scheduler="linear") == pytest.approx(expected, rel=1e-9)


def test_schedule_none_keeps_the_rate_after_warm_up():
    assert rates(scheduler="none") == pytest.approx([5e-4] + [1e-3] * 11)


@pytest.mark.parametrize("scheduler", ["cosine", "linear"])
def test_a_min_lr_equal_to_the_rate_is_a_constant_rate_with_one_warning(scheduler, caplog):
    assert rates(scheduler=scheduler, learning_rate=1e-6, min_lr=1e-6) == pytest.approx([5e-7] + [1e-6] * 11)
    warnings = [record.message for record in caplog.records if "min_lr" in record.message]
    assert warnings == ["min_lr is 1e-06, no less than the learning rate of encoder, decoder: it does not fall after "
                        "the warm-up"]  # fmt: skip


def test_each_group_has_its_own_rate_and_ends_at_min_lr():
    trainer = make_trainer(decoder_lr=2e-3, repa_lr=5e-4, warmup_steps=0)
    for _ in range(trainer.total_steps - 1):
        trainer.optimizer.step()
        trainer.scheduler.step()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([1e-5] * 3)


def test_accumulated_batches_give_the_gradient_of_one_large_batch(tmp_path):
    """Same images, noise, timesteps and token counts, also in the last, incomplete window of the epoch."""
    steps = []
    for batch_size, accumulation in ((16, 1), (4, 4)):
        trainer = make_trainer(tmp_path / str(batch_size), batch_size=batch_size,
                               gradient_accumulation_steps=accumulation, num_epochs=1)  # fmt: skip
        assert trainer.total_steps == 2  # 22 images: 16 and 6
        trainer.train()
        steps.append([r for r in read_metrics(trainer.run_dir) if "train/loss" in r])
    for one, many in zip(*steps):
        assert one["train/loss"] == pytest.approx(many["train/loss"], rel=1e-5)
        assert one["train/grad_norm"] == pytest.approx(many["train/grad_norm"], rel=1e-4)


def test_a_run_leaves_no_loading_processes(tmp_path):
    trainer = make_trainer(tmp_path, use_repa=False, num_workers=2)
    trainer.train(max_steps=2)
    assert not multiprocessing.active_children()
    trainer.train(max_steps=8)  # goes on with new ones, in mid-epoch
    whole = make_trainer(tmp_path / "whole", use_repa=False)
    whole.train(max_steps=8)
    assert same(dict(trainer.model.state_dict()), dict(whole.model.state_dict()))
    assert not multiprocessing.active_children()


def test_an_epoch_trains_on_every_image_once(tmp_path):
    trainer = make_trainer(tmp_path, batch_size=5, gradient_accumulation_steps=2)
    seen = []
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda batch, random=None: (
        (seen.extend(batch.index.tolist()) if trainer.model.training else None) or compute_loss(batch, random)
    )
    trainer.train(max_steps=trainer.steps_per_epoch)
    assert sorted(seen) == list(range(22))


def test_ema_follows_its_formula_and_serves_validation_and_export(tmp_path):
    trainer = make_trainer(tmp_path, use_ema=True, ema_decay=0.5)
    name = "decoder.module_dict.dec_to_patches.proj.weight"
    parameter = dict(trainer.model.named_parameters())[name]
    expected = parameter.detach().clone()
    update = trainer.ema.update

    def watch(step, skip):
        decay = min(0.5, (1 + step) / (10 + step))
        expected.mul_(decay).add_(parameter.detach(), alpha=1 - decay)
        update(step, skip)

    trainer.ema.update = watch
    trainer.train(max_steps=6)
    average = trainer.ema.state_dict()[name]
    assert torch.allclose(average, expected, atol=1e-7) and not torch.equal(average, parameter)
    checkpoint = read_latest(tmp_path)
    assert torch.equal(checkpoint["ema_model_state_dict"][name], average)
    assert checkpoint["ema_model_state_dict"].keys() == checkpoint["model_state_dict"].keys()
    exported = FlexTokFromHub.from_pretrained(tmp_path / "export")
    assert torch.equal(exported.state_dict()[name], average)
    assert torch.equal(trainer.model.state_dict()[name], checkpoint["model_state_dict"][name])  # swapped back


# ----------------------------------------------------------------------------------------------------------- validation


def test_validation_repeats_exactly_and_does_not_depend_on_batch_size_or_seed():
    trainer = make_trainer()
    first = trainer.validate()
    torch.manual_seed(99)
    trainer.global_step = 7
    assert trainer.validate() == first
    other = make_trainer(val_batch_size=3)
    assert other.validate()["val/flow_loss"] == pytest.approx(first["val/flow_loss"], rel=1e-5)
    assert {"val/loss", "val/flow_loss", "val/repa_loss", "val/flow_loss_k1", "val/flow_loss_t0.5"} < set(first)


def test_limited_validation_covers_the_same_images_as_its_constant_and_all_noise_levels(tmp_path):
    model = settings()["model"] | {"stratified_sigmas": True}
    trainer = make_trainer(
        tmp_path, model=model, photos_val_crops=20, max_val_batches=2, val_batch_size=4, val_token_images=0
    )
    seen, sigmas = [], []
    target_features, forward = trainer.repa_module.target_features, trainer.model.decoder.forward
    trainer.repa_module.target_features = lambda images: seen.append(images) or target_features(images)
    trainer.model.decoder.forward = lambda data: sigmas.append(data["sigmas"]) or forward(data)
    trainer.validate()
    validated = torch.cat(seen)
    assert len(validated) == 8
    bins = (torch.cat(sigmas).sort(descending=True).values * 8).tolist()
    assert max(bins) > 6 and min(bins) < 2
    seen.clear()
    trainer.model.decoder.forward = forward
    trainer.train(max_steps=1)
    assert torch.equal(torch.cat(seen)[22:30], validated)  # after the 22 training images that the constant is fitted to


def test_validation_images_do_not_depend_on_the_seed():
    names = [make_trainer(seed=seed).val_loader.dataset.names for seed in (0, 1)]
    assert names[0] == names[1]


def test_a_run_without_validation_images_trains(tmp_path):
    run_main(tmp_path, run_dir=tmp_path / "run", max_steps=1, photos_val_crops=0)
    assert not any("val/loss" in record for record in read_metrics(tmp_path / "run"))


def test_validating_by_hand_writes_no_checkpoint_also_after_training(tmp_path):
    trainer = make_trainer(tmp_path, use_repa=False)
    trainer.validate()
    assert not (tmp_path / "checkpoints").exists()
    trainer.train(max_steps=1)
    assert trainer.validate()["val/flow_loss"] > 0


def test_validation_trains_nothing_and_restores_training_mode(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.train()
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.validate()
    assert same(before, trainer.model.state_dict()) and trainer.model.decoder.training


def test_validation_draws_token_counts_and_drops_no_condition():
    trainer = make_trainer(val_token_images=0)
    seen = []
    forward = trainer.model.decoder.forward
    trainer.model.decoder.forward = lambda data: seen.append(data) or forward(data)
    trainer.validate()
    counts = torch.cat([data["eval_keep_k"] for data in seen])
    assert len(set(counts.tolist())) > 1 and counts.min() >= 1 and counts.max() <= 8
    assert all("eval_dropout_mask" not in data for data in seen)


def test_constant_prediction_is_logged_once_and_is_what_a_constant_scores(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train(max_steps=2)
    logged = [record for record in read_metrics(tmp_path) if "val/repa_loss_constant" in record]
    assert len(logged) == 1 and logged[0]["step"] == 0
    unit = {}
    for split, dataset in (("train", trainer.train_loader.dataset), ("val", trainer.val_loader.dataset)):
        images = torch.stack([dataset[i]["image"] for i in range(len(dataset))])
        target = trainer.repa_module.target_features(images).permute(0, 2, 3, 1).reshape(-1, 1280)
        unit[split] = target / target.norm(dim=1, keepdim=True)
    mean = unit["train"].mean(0)
    for split, target in unit.items():
        expected = -(target @ (mean / mean.norm())).mean().item()
        assert logged[0][f"{split}/repa_loss_constant"] == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoint_has_the_documented_keys_and_nothing_of_the_frozen_encoder(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train(max_steps=1)
    checkpoint = read_latest(tmp_path)  # weights_only=True
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
    size = (tmp_path / "checkpoints" / "latest.pt").stat().st_size
    assert size < 4 * 3 * weights * 1.02 + 200_000  # weights, two moments, and little else
    assert TrainConfig.from_dict(checkpoint["config"]) == trainer.config


def test_a_failure_while_writing_leaves_the_last_checkpoint_loadable(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer.save_checkpoint()
    before = (tmp_path / "checkpoints" / "latest.pt").read_bytes()
    save = torch.save

    def disk_full(value, path):
        save(value, path)
        with open(path, "rb+") as file:
            file.truncate(1000)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    trainer.global_step = 5
    with pytest.raises(UserError, match="cannot write .*No space left on device"):
        trainer.save_checkpoint()
    assert (tmp_path / "checkpoints" / "latest.pt").read_bytes() == before
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["latest.pt"]


def test_kept_checkpoints_do_not_change_with_the_latest(tmp_path):
    run_main(tmp_path, run_dir=tmp_path / "run", save_every=1, use_repa=False)
    folder = tmp_path / "run" / "checkpoints"
    steps = {p.name: torch.load(p, weights_only=True)["global_step"] for p in folder.iterdir()}
    assert steps["epoch_0001.pt"] == 6 and steps["epoch_0002.pt"] == 12 and steps["latest.pt"] == 12
    losses = {r["step"]: r["val/flow_loss"] for r in read_metrics(tmp_path / "run") if "val/flow_loss" in r}
    assert steps["best.pt"] == min(losses, key=losses.get)


RESUMED = dict(use_ema=True, ema_decay=0.9, batch_size=2, gradient_accumulation_steps=2, save_every_steps=0)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_main(folder, run_dir=folder / "run", **RESUMED)
    return folder / "run"


@pytest.mark.parametrize("stop", [4, 6, 9])
def test_resume_continues_bit_for_bit(tmp_path, whole_run, stop):
    """In mid-epoch, at an epoch's end, and in the second epoch; EMA, augmentation and accumulation included."""
    run_main(tmp_path, run_dir=tmp_path / "parts", max_steps=stop, **RESUMED)
    torch.manual_seed(stop)  # whatever the global random state is
    run_main(tmp_path, run_dir=tmp_path / "parts", resume="latest", **RESUMED)
    whole, parts = read_latest(whole_run), read_latest(tmp_path / "parts")
    for key in whole:
        if key != "config":
            assert same(whole[key], parts[key]), key
    # the run that was stopped drew a picture when it stopped, and in mid-epoch validated once more
    ending = [("val/psnr_k1", True), ("val/flow_loss", stop % 6)]
    extra = [r for r in read_metrics(tmp_path / "parts") if r["step"] == stop and any(k in r and e for k, e in ending)]
    assert [r for r in read_metrics(tmp_path / "parts") if r not in extra] == read_metrics(whole_run)


def test_resume_cuts_metrics_back_to_the_checkpoint(tmp_path):
    run_main(tmp_path, run_dir=tmp_path / "run", max_steps=4, use_repa=False)
    metrics = tmp_path / "run" / "metrics.jsonl"
    with open(metrics, "a") as file:  # what a run logs between its last checkpoint and a kill
        file.write('{"step": 5, "train/loss": 7.0}\n{"step": 6, "train/lo')
    run_main(tmp_path, run_dir=tmp_path / "run", max_steps=6, resume="latest", use_repa=False)
    records = read_metrics(tmp_path / "run")
    assert [r["step"] for r in records if "train/loss" in r] == [1, 2, 3, 4, 5, 6]
    assert all(r.get("train/loss") != 7.0 for r in records)


def test_resume_latest_finds_the_newest_run_of_this_config_or_starts_afresh(tmp_path):
    run_main(tmp_path, max_steps=2, resume="latest", use_repa=False)
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("tiny-")
    run_main(tmp_path, max_steps=3, resume="latest", use_repa=False)
    assert list((tmp_path / "runs").iterdir()) == [run] and read_latest(run)["global_step"] == 3


def test_a_run_folder_in_use_is_not_overwritten(tmp_path):
    run_main(tmp_path, run_dir=tmp_path / "run", max_steps=1, use_repa=False)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="holds a run already"):
        run_main(tmp_path, run_dir=tmp_path / "run", max_steps=1, use_repa=False)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_run_killed_before_its_first_checkpoint_starts_again_by_the_same_command(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "train/loss": 7.0}\n')
    run_main(tmp_path, run_dir=tmp_path / "run", max_steps=2, resume="latest", use_repa=False)
    records = [r for r in read_metrics(tmp_path / "run") if "train/loss" in r]
    assert [r["step"] for r in records] == [1, 2] and records[0]["train/loss"] != 7.0


def test_one_run_is_not_continued_in_the_folder_of_another(tmp_path):
    for name in ("a", "b"):
        run_main(tmp_path, run_dir=tmp_path / name, max_steps=1, use_repa=False)
    before = (tmp_path / "a" / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="holds a run already"):
        run_main(tmp_path, run_dir=tmp_path / "a", resume=str(tmp_path / "b"), use_repa=False)
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == before


def test_latest_is_of_the_same_arm_with_or_without_repa(tmp_path):
    run_main(tmp_path, max_steps=1, use_repa=False)
    run_main(tmp_path, max_steps=1, use_repa=True, resume="latest")
    run_main(tmp_path, max_steps=2, use_repa=False, resume="latest")
    steps = [read_latest(run)["global_step"] for run in sorted((tmp_path / "runs").iterdir())]
    assert steps == [2, 1]


def test_runs_started_in_the_same_second_get_folders_of_their_own(tmp_path):
    config = TrainConfig.from_dict(settings(checkpoint_dir=str(tmp_path)))
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: new_run_dir(config), range(24)))
    assert len(set(folders)) == 24 and all(folder.is_dir() for folder in folders)


def test_latest_is_of_this_experiment_and_not_of_one_whose_name_begins_alike(tmp_path):
    run_main(tmp_path, max_steps=1, use_repa=False, wandb_run_name="tiny-2-20260101-120000")
    run_main(tmp_path, max_steps=1, use_repa=False, wandb_run_name="tiny", resume="latest")
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_the_run_folder_holds_the_config_in_force(tmp_path):
    run_main(tmp_path, run_dir=tmp_path / "run", max_steps=1, overrides=["use_repa=false", "learning_rate=3e-4"])
    config = load_config(tmp_path / "run" / "config.yaml")
    assert config.learning_rate == 3e-4 and config.use_repa is False and config.model == settings()["model"]


def test_settings_changed_at_a_resume_are_in_force_and_named(tmp_path, caplog):
    path = make_trainer(tmp_path).save_checkpoint()
    trainer = make_trainer(tmp_path, learning_rate=4e-4, weight_decay=0.5, warmup_steps=0)
    with caplog.at_level("INFO", "flextok"):
        trainer.load_checkpoint(path)
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert groups["decoder"]["lr"] == 4e-4 and groups["decoder"]["weight_decay"] == 0.5
    assert "weight_decay was 0.01 and is now 0.5" in caplog.text


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, use_repa=False, save_every_steps=2, max_nonfinite_steps=1)
    trainer.train(max_steps=2)
    before = (tmp_path / "checkpoints" / "latest.pt").read_bytes()
    with torch.no_grad():
        next(trainer.model.decoder.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="2 steps in a row, up to step 4, had a loss or gradient that is not finite"):
        trainer.train(max_steps=8)
    assert (tmp_path / "checkpoints" / "latest.pt").read_bytes() == before


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 1}, "trained with seed 0, now it is 1"),
        ({"optimizer": "adam"}, "trained with optimizer adamw"),
        ({"photos_train_crops": 20}, "trained with data .* restore the data"),
        ({"use_repa": False}, "trained with use_repa True, now it is False"),
        ({"train_encoder": False}, "other parameters"),
        ({"batch_size": 2}, "images per optimizer step 4, now it is 2: set global_batch_size: 4"),
        ({"model": {**settings()["model"], "fsq_levels": [5, 8, 5]}}, "structure .*levels': \\[8, 5, 5\\]"),
        ({"model": {**settings()["model"], "decoder_depth": 2, "repa_layers": [1]}}, "not the model's, e.g. decoder"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, changes, message):
    trainer = make_trainer(tmp_path)
    path = trainer.save_checkpoint()
    with pytest.raises(CheckpointError, match=message):
        make_trainer(tmp_path, **changes).load_checkpoint(path)


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_a_truncated_checkpoint_is_refused(tmp_path, size):
    trainer = make_trainer(tmp_path)
    path = trainer.save_checkpoint()
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=f"{size} bytes.*not a readable checkpoint"):
        trainer.load_checkpoint(path)


def test_export_computes_what_the_trained_model_computes(tmp_path):
    trainer = make_trainer(tmp_path, use_repa=False)
    trainer.train(max_steps=3)
    images = first_batch(trainer).images
    exported = FlexTokFromHub.from_pretrained(tmp_path / "export")
    assert not exported.training
    tokens = exported.tokenize(images)
    assert all(map(torch.equal, tokens, trainer.model.tokenize(images)))
    arguments = dict(timesteps=3, guidance_scale=2.0, perform_norm_guidance=True)
    pictures = [
        m.detokenize(tokens, generator=torch.Generator().manual_seed(0), **arguments) for m in (exported, trainer.model)
    ]
    assert torch.equal(*pictures) and pictures[0].shape == (4, 3, 32, 32)


def test_any_checkpoint_can_be_exported_by_command(tmp_path):
    trainer = make_trainer(tmp_path / "run", use_ema=True, ema_decay=0.5, use_repa=False)
    trainer.train(max_steps=2)
    command = ["-m", "flextok.training.export", tmp_path / "run" / "checkpoints" / "latest.pt"]
    assert Script(*command, tmp_path / "averaged").wait().returncode == 0
    assert Script(*command, tmp_path / "raw", "--raw").wait().returncode == 0
    averaged, raw = (FlexTokFromHub.from_pretrained(tmp_path / name).state_dict() for name in ("averaged", "raw"))
    assert same(dict(raw), dict(trainer.model.state_dict()))
    assert same(dict(averaged), FlexTokFromHub.from_pretrained(tmp_path / "run" / "export").state_dict() | {})
    assert not same(dict(raw), dict(averaged))


# --------------------------------------------------------------------------------------------------------------- models


def saved_model(folder):
    """A small model with its own weights, as a published checkpoint folder."""
    model = load_model(TrainConfig.from_dict(settings(seed=5)))
    model.save_pretrained(folder)
    return model


def test_fine_tuning_starts_from_the_weights_of_a_folder(tmp_path):
    model = saved_model(tmp_path)
    trainer = make_trainer(model=None, model_name=str(tmp_path))
    assert same(dict(model.state_dict()), dict(trainer.model.state_dict()))


def test_train_from_scratch_keeps_the_architecture_alone(tmp_path):
    model = saved_model(tmp_path)
    fresh = make_trainer(model=None, model_name=str(tmp_path), train_from_scratch=True).model
    assert fresh.config == model.config
    name = "decoder.module_dict.dec_from_latents.proj.weight"
    assert not torch.equal(fresh.state_dict()[name], model.state_dict()[name])


def test_other_fsq_levels_rebuild_the_two_layers_around_the_quantiser_alone(tmp_path):
    model = saved_model(tmp_path)
    trainer = make_trainer(tmp_path / "run", model=None, model_name=str(tmp_path), fsq_levels=[7, 7, 7, 7])
    new, old = trainer.model.state_dict(), model.state_dict()
    rebuilt = {key.rsplit(".", 2)[0] for key in new if not same(new[key], old[key])}
    assert rebuilt == {"encoder.module_dict.enc_to_latents", "decoder.module_dict.dec_from_latents"}
    assert trainer.model.regularizer.codebook_size == 7**4
    trainer.train(max_steps=1)
    exported = FlexTokFromHub.from_pretrained(tmp_path / "run" / "export")
    assert exported.regularizer.levels == [7, 7, 7, 7]


def test_the_same_fsq_levels_rebuild_nothing(tmp_path):
    model = saved_model(tmp_path)
    trainer = make_trainer(model=None, model_name=str(tmp_path), fsq_levels=[8, 5, 5])
    assert same(dict(model.state_dict()), dict(trainer.model.state_dict()))


def test_initial_weights_depend_on_the_seed_and_leave_the_global_random_state():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = make_trainer().model.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(dict(first), dict(make_trainer().model.state_dict()))
    assert not same(dict(first), dict(make_trainer(seed=1).model.state_dict()))


def test_a_trained_vae_learns_from_its_own_loss_alone(tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4)  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    saved = saved_model(tmp_path / "model")
    config = saved.config
    config["vae"] = {"_target_": "flextok.vae_wrapper.StableDiffusionVAE", "hf_hub_path": str(tmp_path / "vae"),
                     "latent_channels": 4, "images_read_key": "rgb"}  # fmt: skip
    for part, key in (("encoder", "enc_patch_emb"), ("decoder", "dec_noise_patch_emb")):
        config[part]["module_dict"][key]["channels_in"] = 4
    config["decoder"]["module_dict"]["dec_to_patches"]["channels_out"] = config["pipeline"]["out_channels"] = 4
    for part, key in (("encoder", "enc_posemb_module"), ("decoder", "dec_patches_posemb_module")):
        config[part]["module_dict"][key]["max_sizes"] = [8, 8]
    model = FlexTokFromHub(config)
    base = make_trainer(use_repa=False)
    changes = settings(use_repa=False, train_vae=True, vae_lr=1e-4, checkpoint_dir=str(tmp_path))
    trainer = train_flextok.FlexTokTrainer(changes, model, base.train_loader, base.val_loader, "cpu", tmp_path / "run")
    assert [group["name"] for group in trainer.optimizer.param_groups] == ["encoder", "decoder", "vae"]
    trainer.model.train()
    losses = trainer.compute_loss(first_batch(trainer))
    losses["flow_loss"].backward(retain_graph=True)
    assert all(p.grad is None for p in model.vae.parameters())
    losses["vae_loss"].backward()
    assert all(p.grad is not None for p in model.vae.parameters())
    assert losses["loss"].item() == pytest.approx((losses["flow_loss"] + losses["vae_loss"]).item())
    trainer.train(max_steps=2)
    assert "train/vae_loss" in read_metrics(tmp_path / "run")[0]


def test_training_a_vae_without_parameters_is_refused():
    with pytest.raises(ConfigError, match="VAE has no parameters"):
        make_trainer(train_vae=True)


# ---------------------------------------------------------------------------------------------- other loaders and files


class Tensors(Dataset):
    def __init__(self, n):
        self.images = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], i % 2


def test_broken_validation_files_are_named_and_too_many_save_the_run_before_they_stop_it(tmp_path, caplog):
    from PIL import Image

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


def test_any_loader_of_images_trains_and_resumes_exactly(tmp_path):
    def trainer(run_dir):
        loader = DataLoader(Tensors(10), batch_size=4)
        config = settings(use_repa=False, num_epochs=3, save_every_steps=1, dataset_name="folder")  # the loader is ours
        model = load_model(TrainConfig.from_dict(config))
        return train_flextok.FlexTokTrainer(config, model, loader, DataLoader(Tensors(3)), "cpu", run_dir)

    whole = trainer(tmp_path / "whole")
    whole.train()
    assert whole.global_step == 9
    trainer(tmp_path / "parts").train(max_steps=4)
    rest = trainer(tmp_path / "parts")
    rest.load_checkpoint(tmp_path / "parts" / "checkpoints" / "latest.pt")
    rest.train()
    assert same(dict(whole.model.state_dict()), dict(rest.model.state_dict()))


def test_a_model_that_was_not_built_from_a_config_trains_without_export(tmp_path):
    base = make_trainer(use_repa=False)
    config = {"_target_": "flextok.flextok_wrapper.FlexTok", **base.model.config}
    trainer = train_flextok.FlexTokTrainer(
        settings(use_repa=False), instantiate(config), base.train_loader, base.val_loader, "cpu", tmp_path
    )
    trainer.train(max_steps=1)
    assert read_latest(tmp_path)["global_step"] == 1 and not (tmp_path / "export").exists()


def test_metrics_have_the_documented_names(tmp_path):
    run_main(tmp_path, run_dir=tmp_path / "run", max_steps=2)
    records = read_metrics(tmp_path / "run", timing=True)
    train = next(r for r in records if "train/loss" in r)
    assert set(train) == {"step"} | {
        f"train/{name}" for name in ("loss", "flow_loss", "repa_loss", "repa_weight", "lr", "grad_norm",
                                     "images_per_second", "data_wait", "skipped_steps", "epoch", "step")
    }  # fmt: skip
    assert {"val/loss", "val/flow_loss", "val/repa_loss"} <= {key for r in records for key in r}


def test_a_run_leaves_pictures_curves_metrics_and_export(tmp_path):
    from PIL import Image

    run_main(tmp_path, run_dir=tmp_path / "run", max_steps=2)
    with Image.open(tmp_path / "run" / "pictures" / "flexible_length_0000002.png") as picture:
        assert picture.width > 4 * 128 and picture.height > 2 * 128  # VAE, 1, 8 tokens, original; two images
    assert (tmp_path / "run" / "curves.png").stat().st_size > 5000
    assert {"config.json", "model.safetensors"} <= {p.name for p in (tmp_path / "run" / "export").iterdir()}


def test_bf16_autocast_trains_with_losses_close_to_fp32():
    losses = []
    for dtype in (None, torch.bfloat16):
        trainer = make_trainer()
        trainer.autocast_dtype = dtype
        trainer.model.train()
        losses.append(trainer.compute_loss(first_batch(trainer)))
        losses[-1]["loss"].backward()
        assert losses[-1]["loss"].dtype == losses[-1]["repa_loss"].dtype == torch.float32
        assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in trainer.trained_parameters)
    assert losses[0]["flow_loss"].item() == pytest.approx(losses[1]["flow_loss"].item(), rel=0.02)
    assert losses[0]["repa_loss"].item() == pytest.approx(losses[1]["repa_loss"].item(), abs=0.02)
