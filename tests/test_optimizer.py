"""Optimizers, their groups and weight decay, the length of a run in steps, and the wsd schedule."""

import math
import sys
import types

import pytest
import torch
from tiny_runs import first_batch, make_trainer, read_latest, read_metrics, run_main, same, whole_and_parts

from flextok.training.config import TrainConfig
from flextok.training.optimizer import build_optimizer, optimizer_class
from flextok.utils.checkpoint import CheckpointError
from flextok.utils.config import ConfigError

HAS_MUON = hasattr(torch.optim, "Muon")
needs_muon = pytest.mark.skipif(not HAS_MUON, reason="PyTorch has Muon from 2.9 on")
CPU = torch.device("cpu")


def groups_of(trainer) -> dict:
    return {group["name"]: group for group in trainer.optimizer.param_groups}


def names_of(trainer) -> dict:
    """Names of parameters by optimizer group."""
    return {name: set(group["parameter_names"]) for name, group in groups_of(trainer).items()}


# Weight decay


def test_decay_spares_all_but_the_weights_of_linear_layers_and_convolutions():
    trainer = make_trainer(decay_all=False, weight_decay=0.1, encoder_lr=3e-4, repa_projector="conv")
    groups, names = groups_of(trainer), names_of(trainer)
    assert list(groups) == [
        "encoder", "encoder.no_decay", "decoder", "decoder.no_decay", "repa_projector", "repa_projector.no_decay"
    ]  # fmt: skip
    for name, group in groups.items():
        assert group["weight_decay"] == (0.0 if name.endswith("no_decay") else 0.1)
        assert group["lr"] == groups[name.removesuffix(".no_decay")]["lr"]
    assert {n for n in names["encoder.no_decay"] if not n.endswith("bias")} == {
        "encoder.module_dict.enc_register_module.registers"
    }
    assert {n for n in names["decoder.no_decay"] if not n.endswith("bias")} == {
        f"decoder.module_dict.{name}" for name in (
            "dec_registers_posemb_module.posembs", "dec_nested_dropout.dropout_mask_token",
            "dec_latent_dropout.nullcond",
        )
    }  # fmt: skip
    assert all(p.ndim > 1 for name, g in groups.items() if not name.endswith("no_decay") for p in g["params"])


def test_by_default_everything_is_decayed_in_one_group_a_part():
    trainer = make_trainer()
    assert {name: g["weight_decay"] for name, g in groups_of(trainer).items()} == {
        "encoder": 0.01, "decoder": 0.01, "repa_projector": 0.01
    }  # fmt: skip
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert names_of(trainer)["encoder"] | names_of(trainer)["decoder"] == set(trained)


def test_the_logged_rate_is_the_decoders(tmp_path):
    trainer = make_trainer(tmp_path, use_repa=False, decay_all=False, decoder_lr=2e-4, warmup_steps=0)
    trainer.train(max_steps=1)
    assert [r["train/lr"] for r in read_metrics(tmp_path) if "train/lr" in r] == [2e-4]


def moments(trainer) -> dict:
    """The state of each parameter in the optimizer by its name."""
    state = trainer.optimizer.state
    return {
        name: dict(state[p])
        for group in trainer.optimizer.param_groups
        for name, p in zip(group["parameter_names"], group["params"])
    }


@pytest.mark.parametrize(
    "before, after, older", [(True, False, True), (True, True, True), (True, False, False), (False, True, False)]
)
def test_a_resume_restores_moments_by_parameter(tmp_path, before, after, older):
    """Also of a checkpoint of older versions, which has one group a part and no names."""
    first = make_trainer(tmp_path / "first", decay_all=before, readout_weight=1.0)
    first.train(max_steps=2)
    path = first.save_checkpoint()
    if older:
        checkpoint = torch.load(path, weights_only=True)
        for group in checkpoint["optimizer_state_dict"]["param_groups"]:
            del group["parameter_names"]
        del checkpoint["config"]["decay_all"]
        torch.save(checkpoint, path)
    second = make_trainer(tmp_path / "second", decay_all=after, readout_weight=1.0)
    second.load_checkpoint(path)
    assert same(moments(first), moments(second)) and len(moments(first)["encoder." + first_name(first)]) == 3
    assert groups_of(second)["encoder"]["lr"] == groups_of(first)["encoder"]["lr"]
    second.train(max_steps=3)


def first_name(trainer) -> str:
    return next(name for name, p in trainer.model.encoder.named_parameters() if p.requires_grad)


def test_a_checkpoint_that_lacks_names_or_parameters_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, use_repa=False)
    path = trainer.save_checkpoint()
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["optimizer_state_dict"]["param_groups"][0]["parameter_names"][0] = "encoder.unknown"
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match="trained with other parameters"):
        trainer.load_checkpoint(path)


# Muon


@needs_muon
@pytest.mark.parametrize("decay_all", [True, False])
def test_muon_trains_the_matrices_of_the_blocks_and_adamw_the_rest(decay_all):
    trainer = make_trainer(optimizer="muon", decay_all=decay_all, readout_weight=1.0)
    names = names_of(trainer)
    parts = ["encoder", "decoder", "repa_projector", "readout"]
    expected = {*parts, "encoder.adamw", "decoder.adamw"} | (set() if decay_all else {f"{p}.no_decay" for p in parts})
    assert set(names) == expected
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
@pytest.mark.parametrize("first", [0, 2])
def test_a_step_of_muon_that_is_not_finite_changes_nothing(tmp_path, first):
    trainer = make_trainer(tmp_path, use_ema=True, optimizer="muon")
    batch, original = first_batch(trainer), trainer.compute_loss

    def compute_loss(*arguments):
        losses = original(*arguments)
        if trainer.global_step == first:
            losses["loss"] = losses["loss"] * math.nan
        return losses

    trainer.compute_loss = compute_loss

    def state():
        tree = [trainer.model.state_dict(), trainer.optimizer.state_dict()["state"], trainer.ema.averages]
        return torch.utils._pytree.tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, tree)

    states = [state()]
    for _ in range(4):
        trainer.train_step([batch])
        states.append(state())
    if first == 0:  # there are no moments before
        assert same(states[1][::2], states[0][::2])
        assert not any(m.any() for s in states[1][1].values() for m in s.values())
    else:
        assert same(states[first + 1], states[first])
    assert not same(states[first], states[-1]) and all(v.isfinite().all() for v in states[-1][0].values())


@needs_muon
def test_a_step_of_muon_does_not_synchronize(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, optimizer="muon", use_ema=True)
    batch, reads = first_batch(trainer), []
    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "numpy", "cpu"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, *a, n=name, o=original: reads.append(n) or o(t, *a))
    for _ in range(2):
        trainer.train_step([batch])
    assert reads == []


@needs_muon
def test_a_run_with_muon_is_resumed_bit_for_bit(tmp_path):
    changes = dict(optimizer="muon", decay_all=False, use_ema=True, save_every_steps=0, use_repa=False)
    whole, parts = whole_and_parts(tmp_path, 3, 6, **changes)
    for key in ("model_state_dict", "optimizer_state_dict", "ema_model_state_dict"):
        assert same(whole[key], parts[key]), key


def test_optimizers_that_are_not_there_are_refused_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="optimizer is adamw8bit, which needs CUDA, but the device is cpu"):
        run_main(tmp_path, check=True, overrides=["optimizer=adamw8bit"])
    with pytest.raises(ConfigError, match="optimizer is adamw8bit, which needs CUDA, but the device is cpu"):
        make_trainer(optimizer="adamw8bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match="needs bitsandbytes .*pip install bitsandbytes, or set optimizer: adamw"):
        optimizer_class("adamw8bit", torch.device("cuda"))
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ConfigError, match="optimizer is muon, which PyTorch has from 2.9 on, but this is"):
        make_trainer(optimizer="muon")


def test_a_step_of_8_bit_adamw_that_is_not_finite_is_left_out(monkeypatch):
    stand_in = types.SimpleNamespace(AdamW8bit=type("AdamW8bit", (torch.optim.RMSprop,), {}))
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace(optim=stand_in))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", stand_in)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = optimizer_class("adamw8bit", torch.device("cuda"))([parameter], lr=0.1)
    parameter.grad = torch.ones(3)
    for found_inf, changes in ((1.0, False), (0.0, True)):
        before = parameter.detach().clone()
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        assert torch.equal(before, parameter) is not changes


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"optimizer": "muon", "parallel": "fsdp"}, "optimizer is muon, which needs whole parameters"),
        ({"optimizer": "adamw8bit", "parallel": "fsdp"}, "optimizer is adamw8bit, which needs whole parameters"),
        (
            {"optimizer": "muon", "train_encoder": False, "train_decoder": False, "train_vae": True},
            "train_encoder and train_decoder are false",
        ),
    ],
)
def test_what_an_optimizer_cannot_train_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(settings)


# The length of a run in steps, and wsd


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
    assert rates(max_steps=4)[-1] == pytest.approx(1e-5)
    trainer = make_trainer(tmp_path, use_repa=False, max_steps=8, num_epochs=1)  # an epoch has 6 steps
    trainer.train()
    assert trainer.global_step == trainer.total_steps == 8
    records = read_metrics(tmp_path)
    assert [r["train/epoch"] for r in records if "train/epoch" in r] == [0] * 6 + [1] * 2
    assert [r["step"] for r in records if "val/flow_loss" in r] == [6, 8]
    assert read_latest(tmp_path)["global_step"] == 8


def test_a_run_shorter_than_an_epoch_has_a_best_checkpoint(tmp_path):
    make_trainer(tmp_path, use_repa=False, max_steps=2).train()
    assert torch.load(tmp_path / "checkpoints" / "best.pt", weights_only=True)["global_step"] == 2


def test_the_option_max_steps_stops_early_and_leaves_the_schedule(tmp_path):
    for name, option in (("stopped", 3), ("whole", None)):
        run_main(tmp_path, run_dir=tmp_path / name, max_steps=option, overrides=["max_steps=5"], use_repa=False)
    stopped, whole = ([r for r in read_metrics(tmp_path / n) if "train/lr" in r] for n in ("stopped", "whole"))
    assert len(stopped) == 3 and len(whole) == 5 and stopped == whole[:3]


def test_the_summary_says_what_ends_the_run(tmp_path, capsys):
    run_main(tmp_path, check=True)
    assert "steps         2 epochs x 6 = 12, 4 images each" in capsys.readouterr().out
    run_main(tmp_path, check=True, overrides=["max_steps=8"])
    assert "steps         8 (max_steps), 1.33 epochs of 6, 4 images each" in capsys.readouterr().out


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


def test_prolonging_from_within_the_decay_says_that_the_rate_rises_again(tmp_path, caplog):
    changes = dict(use_repa=False, scheduler="wsd", decay_steps=3)
    make_trainer(tmp_path, **changes, max_steps=5).train()
    trainer = make_trainer(tmp_path, **changes, max_steps=10)
    with caplog.at_level("INFO", "flextok"):
        trainer.load_checkpoint(tmp_path / "checkpoints" / "latest.pt")
    assert "resume: the learning rate of decoder was 1e-05 and is now 0.001" in caplog.text


def test_decay_steps_without_wsd_get_a_warning():
    assert next(TrainConfig.from_dict({"decay_steps": 5}).unwise()).startswith("decay_steps is 5, but scheduler is")
    assert not list(TrainConfig.from_dict({"decay_steps": 5, "scheduler": "wsd"}).unwise())


def test_adam_and_adamw_are_fused_and_of_their_kind():
    for name, kind in (("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)):
        config = TrainConfig.from_dict({"optimizer": name, "train_encoder": False})
        optimizer = build_optimizer(config, {"decoder": torch.nn.Linear(2, 2)}, CPU)
        assert type(optimizer) is kind and optimizer.defaults["fused"]
