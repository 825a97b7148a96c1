"""Optimizers, their groups and weight decay, the length of a run in steps, and schedules."""

import math
import sys

import pytest
import torch
from tiny_runs import first_batch, make_trainer, read_latest, read_metrics, run_main, same, whole_and_parts

from flextok.training.optimizer import optimizer_class
from flextok.utils.config import ConfigError

pytestmark = pytest.mark.usefixtures("no_curves")
HAS_MUON = hasattr(torch.optim, "Muon")
needs_muon = pytest.mark.skipif(not HAS_MUON, reason="PyTorch has Muon from 2.9 on")


def groups_of(trainer) -> dict:
    return {group["name"]: group for group in trainer.optimizer.param_groups}


def names_of(trainer) -> dict:
    """Names of parameters by optimizer group."""
    return {name: set(group["parameter_names"]) for name, group in groups_of(trainer).items()}


# Weight decay


# Muon


@needs_muon
def test_muon_trains_the_matrices_of_the_blocks_and_adamw_the_rest():
    trainer = make_trainer(optimizer="muon", decay_all=False, readout_weight=1.0)
    names = names_of(trainer)
    parts = ["encoder", "decoder", "repa_projector", "readout"]
    assert set(names) == {*parts, "encoder.adamw", "decoder.adamw", *(f"{part}.no_decay" for part in parts)}
    for part in ("encoder", "decoder"):
        model = {f"{part}.{n}" for n, p in getattr(trainer.model, part).named_parameters() if p.requires_grad}
        matrices = {n for n in model if ".blocks." in n and (".attn.w" in n or ".attn.proj" in n or ".mlp." in n)}
        assert names[part] == matrices and len(matrices) == 7 * {"encoder": 2, "decoder": 3}[part]
        assert set().union(*(names[n] for n in names if n.split(".")[0] == part)) == model
    assert [g["name"] for g in trainer.optimizer.param_groups if g["muon"]] == ["encoder", "decoder"]


@needs_muon
def test_muons_step_is_that_of_torch_and_the_rest_that_of_adamw():
    settings = dict(use_repa=False, weight_decay=0.1, warmup_steps=0, scheduler="none", use_ema=False)
    trainer = make_trainer(optimizer="muon", **settings)
    named = dict(trainer.model.named_parameters())
    copies = {n: torch.nn.Parameter(p.detach().clone()) for n, p in named.items() if p.requires_grad}
    groups = groups_of(trainer)
    muon_names = groups["encoder"]["parameter_names"] + groups["decoder"]["parameter_names"]
    other_names = [n for n in copies if n not in muon_names]
    references = [
        torch.optim.Muon([copies[n] for n in muon_names], lr=1e-3, weight_decay=0.1, momentum=0.95, nesterov=True,
                         adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([copies[n] for n in other_names], lr=1e-3, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8),
    ]  # fmt: skip
    batch = first_batch(trainer)
    step = trainer.optimizer.step

    def watch(*arguments):
        for name, copy in copies.items():
            copy.grad = named[name].grad.clone()
        return step(*arguments)

    trainer.optimizer.step = watch
    for _ in range(3):
        trainer.train_step([batch])
        for reference in references:
            reference.step()
    for name, copy in copies.items():
        torch.testing.assert_close(named[name].detach(), copy.detach(), rtol=1e-5, atol=1e-7, msg=name)


@needs_muon
def test_a_run_with_muon_is_resumed_bit_for_bit(tmp_path):
    changes = dict(optimizer="muon", decay_all=False, use_ema=True, save_every_steps=0, use_repa=False)
    whole, parts = whole_and_parts(tmp_path, 1, 3, **changes)
    for key in ("model_state_dict", "optimizer_state_dict", "ema_model_state_dict"):
        assert same(whole[key], parts[key]), key


def test_optimizers_that_are_not_there_are_refused_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="optimizer is adamw8bit, which needs CUDA, but the device is cpu"):
        run_main(tmp_path, check=True, overrides=["optimizer=adamw8bit"])
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match="needs bitsandbytes .*pip install bitsandbytes, or set optimizer: adamw"):
        optimizer_class("adamw8bit", torch.device("cuda"))
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ConfigError, match="optimizer is muon, which PyTorch has from 2.9 on, but this is"):
        make_trainer(optimizer="muon")


# The length of a run in steps, and schedules


def rates(**changes) -> list:
    """Learning rates of the decoder at each step of a run."""
    trainer = make_trainer(use_repa=False, **changes)
    rates = []
    for _ in range(trainer.total_steps):
        rates.append(groups_of(trainer)["decoder"]["lr"])
        trainer.optimizer.step()
        trainer.scheduler.step()
    return rates


def test_max_steps_ends_run_and_schedule_whatever_the_epochs(tmp_path):
    trainer = make_trainer(tmp_path, use_repa=False, max_steps=8, num_epochs=1)  # an epoch has 6 steps
    trainer.train()
    assert trainer.global_step == trainer.total_steps == 8
    records = read_metrics(tmp_path)
    assert [r["train/epoch"] for r in records if "train/epoch" in r] == [0] * 6 + [1] * 2
    assert [r["train/lr"] for r in records if "train/lr" in r][-1] == pytest.approx(1e-5)
    assert [r["step"] for r in records if "val/flow_loss" in r] == [6, 8]
    assert read_latest(tmp_path)["global_step"] == 8


def test_a_run_shorter_than_an_epoch_has_a_best_checkpoint_and_logs_the_decoders_rate(tmp_path):
    trainer = make_trainer(tmp_path, use_repa=False, decay_all=False, decoder_lr=2e-4, warmup_steps=0, max_steps=1)
    trainer.train()
    assert torch.load(tmp_path / "checkpoints" / "best.pt", weights_only=True)["global_step"] == 1
    assert [r["train/lr"] for r in read_metrics(tmp_path) if "train/lr" in r] == [2e-4]


COSINE = [1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * i / 9)) for i in range(10)]
LINEAR = [1e-5 + (1e-3 - 1e-5) * (1 - i / 9) for i in range(10)]


@pytest.mark.parametrize("scheduler, after", [("cosine", COSINE), ("linear", LINEAR), ("none", [1e-3] * 10)])
def test_schedules_warm_up_and_reach_min_lr_at_the_last_step(scheduler, after):
    # warm-up takes 2 steps; the full rate is in force at its end and at the first step after it
    assert rates(scheduler=scheduler) == pytest.approx([5e-4, 1e-3, *after], rel=1e-9)


def test_wsd_warms_up_stays_and_decays_linearly_over_the_last_steps(caplog):
    decay = [1e-5 + (1e-3 - 1e-5) * left / 4 for left in (4, 3, 2, 1, 0)]
    assert rates(scheduler="wsd", decay_steps=4) == pytest.approx([5e-4] + [1e-3] * 6 + decay)
    assert rates(scheduler="wsd") == rates(scheduler="wsd", decay_steps=2)  # null: a tenth of 12, rounded up
    late = [1e-5 + (1e-3 - 1e-5) * left / 9 for left in range(9, -1, -1)]
    assert not caplog.messages
    assert rates(scheduler="wsd", decay_steps=99) == pytest.approx([5e-4, 1e-3] + late)  # begins after the warm-up
    assert caplog.messages == [
        "decay_steps is 99, but 10 of the run's 12 steps are left after the warm-up: there is no stable part"
    ]


def test_a_run_is_prolonged_from_the_stable_part_as_if_it_had_been_that_long(tmp_path, caplog):
    changes = dict(use_repa=False, scheduler="wsd", decay_steps=3, save_every_steps=0, use_ema=True)
    whole, short = dict(max_steps=10), dict(max_steps=7)
    make_trainer(tmp_path / "whole", **changes, **whole).train()
    make_trainer(tmp_path / "short", **changes, **short).train(max_steps=4)  # the last before the decay
    trainer = make_trainer(tmp_path / "short", **changes, **whole)
    with caplog.at_level("INFO", "flextok"):
        trainer.load_checkpoint(tmp_path / "short" / "checkpoints" / "latest.pt")
    assert "resume: max_steps was 7 and is now 10" in caplog.text
    trainer.train()
    runs = [read_latest(tmp_path / name) for name in ("whole", "short")]
    for key in ("model_state_dict", "optimizer_state_dict", "ema_model_state_dict", "global_step"):
        assert same(runs[0][key], runs[1][key]), key
    rates = [[r["train/lr"] for r in read_metrics(tmp_path / n) if "train/lr" in r] for n in ("whole", "short")]
    assert rates[0] == rates[1] and rates[0][:7] == pytest.approx([5e-4] + [1e-3] * 6)
