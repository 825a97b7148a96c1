"""REPA's options in a training run: several layers, projectors, automatic grid, schedule and stop."""

import math
import shutil
import weakref

import pytest
import torch
from tiny_runs import first_batch, make_trainer, read_latest, read_metrics, run_main, same, settings, whole_and_parts

from flextok.model.utils.repa_loss import auto_target_size
from flextok.training.config import TrainConfig
from flextok.utils.checkpoint import CheckpointError
from flextok.utils.config import ConfigError

CHEAP = dict(val_token_images=0, photos_val_crops=2, repa_constant_images=4, inference_steps=1, vis_token_counts=[1])

# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(repa_layers=[1, 1]), r"repa_layers is \[1, 1\], expected different layers"),
        (dict(repa_target_size="automatic"), "repa_target_size is 'automatic', expected a list of .* or auto"),
        (dict(repa_projector="mpl"), "repa_projector is 'mpl', expected one of mlp, conv"),
        (dict(repa_encoder_dtype="fp16"), "repa_encoder_dtype is fp16, which a CPU .* set fp32, bf16 or auto"),
        (dict(repa_spatial_norm=True, repa_image_size=32), "grid of 1x1, which has no spread over positions"),
        (dict(repa_cooldown_steps=5), "repa_cooldown_steps is 5, but repa_stop is null"),
        (dict(repa_stop=0), "repa_stop is 0, expected at least 1"),
    ],
)
def test_bad_options_are_refused_before_training(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_main(tmp_path, **changes)
    assert not (tmp_path / "runs").exists()


# --------------------------------------------------------------------------------------------- projector, grid, target


def test_options_train_and_resume_exactly(tmp_path):
    options = dict(repa_projector="conv", repa_spatial_norm=True, repa_project="before_resize", repa_layers=[0, 1])
    whole, parts = whole_and_parts(tmp_path, 2, 4, repa_target_size=[7, 5], **options, **CHEAP)
    for key in ("model_state_dict", "optimizer_state_dict", "repa_module_state_dict"):
        assert same(whole[key], parts[key]), key
    losses = [r["train/repa_loss"] for r in read_metrics(tmp_path / "whole") if "train/repa_loss" in r]
    assert losses[-1] < losses[0] - 0.01


def test_settings_reach_the_projector_and_the_targets():
    plain = make_trainer(repa_projector_hidden=48).repa_module
    assert plain.projector.layers[2].in_features == 48
    assert (plain.spatial_norm, plain.project_when) == (None, "after_resize")
    changed = make_trainer(
        repa_projector="conv", repa_spatial_norm=True, repa_spatial_norm_gamma=0.25, repa_project="before_resize",
        repa_encoder_dtype="bf16",
    ).repa_module  # fmt: skip
    assert changed.projector.conv.kernel_size == (3, 3)
    assert (changed.spatial_norm, changed.project_when) == (0.25, "before_resize")
    assert changed.load_encoder().dtype == torch.bfloat16


@pytest.mark.parametrize("image_size, grid", [(64, (4, 4)), (224, (7, 7))])
def test_automatic_target_size_is_the_finer_of_encoder_and_decoder(image_size, grid):
    trainer = make_trainer(repa_target_size="auto", repa_image_size=image_size)
    assert trainer.repa_module.target_size == grid
    assert trainer.compute_loss(first_batch(trainer))["repa_loss"].isfinite()
    assert auto_target_size((2, 6), (5, 3)) == auto_target_size((5, 3), (6, 2)) == (5, 3)  # of more positions in all
    assert auto_target_size((1, 9), (2, 4)) == (1, 9) and auto_target_size((3, 3), (2, 5)) == (2, 5)


# ------------------------------------------------------------------------------------------------------------- schedule


def factors(n, **changes):
    config = TrainConfig.from_dict(settings(**changes))
    return [config.repa_weight_factor(step) for step in range(n)]


def test_weight_warms_up_holds_cools_down_and_stops():
    linear = factors(13, repa_warmup_steps=4, repa_cooldown_steps=4, repa_cooldown="linear", repa_stop=10)
    assert linear == [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0]
    cosine = factors(13, repa_warmup_steps=4, repa_cooldown_steps=4, repa_cooldown="cosine", repa_stop=10)
    expected = [0.5 * (1 + math.cos(math.pi * i / 4)) for i in (1, 2, 3)]
    assert cosine == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, *expected, 0, 0, 0])
    assert factors(5) == [1] * 5
    assert factors(5, repa_stop=3) == [1, 1, 1, 0, 0]


SCHEDULE = CHEAP | dict(repa_weight=0.5, repa_warmup_steps=2, repa_cooldown_steps=2, repa_stop=5, val_every_steps=4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of seven steps, two of them after the stop."""
    folder = tmp_path_factory.mktemp("whole")
    run_main(folder, run_dir=folder / "run", max_steps=7, **SCHEDULE)
    return folder / "run"


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """The same, stopped after three steps."""
    folder = tmp_path_factory.mktemp("three_steps")
    run_main(folder, run_dir=folder / "run", max_steps=3, **SCHEDULE)
    return folder / "run"


def test_after_the_stop_no_encoder_runs_and_nothing_of_it_is_left(tmp_path, caplog):
    trainer = make_trainer(tmp_path / "run", best_metric="val/loss", **SCHEDULE)
    assert "best_metric is val/loss, which loses its REPA part at repa_stop" in caplog.text
    encoder = weakref.ref(trainer.repa_module.load_encoder())
    trainer.train(max_steps=5)
    assert not trainer.repa_module.has_encoder and encoder() is None
    projector = list(trainer.repa_module.projector.parameters())
    assert not any(p in trainer.optimizer.state for p in projector)
    stopped = [p.detach().clone() for p in projector]
    trainer.train(max_steps=6)
    assert all(map(torch.equal, stopped, projector))


def test_resuming_across_the_stop_is_exact_and_loads_no_encoder_after_it(whole, three_steps, tmp_path, monkeypatch):
    run = shutil.copytree(three_steps, tmp_path / "run")
    run_main(tmp_path, run_dir=run, max_steps=5, resume="latest", **SCHEDULE)
    monkeypatch.setattr("flextok.model.utils.repa_loss.load_encoder", lambda *_, **__: pytest.fail("loaded"))
    run_main(tmp_path, run_dir=run, max_steps=7, resume="latest", **SCHEDULE)
    expected, found = read_latest(whole), read_latest(run)
    for key in expected:
        if key not in ("config", "random_state", "best_val_loss"):
            assert same(expected[key], found[key]), key
    assert found["repa_module_state_dict"]  # the projector stays in the checkpoint
    expected, found = ([r for r in read_metrics(folder) if "train/loss" in r] for folder in (whole, run))
    assert expected == found
    with pytest.raises(CheckpointError, match="after the end of REPA .repa_stop 5., .* repa_stop is now 11"):
        run_main(tmp_path, run_dir=run, resume="latest", **{**SCHEDULE, "repa_stop": 11})


def test_an_earlier_stop_at_a_resume_ends_the_alignment_at_once(three_steps, tmp_path):
    run = shutil.copytree(three_steps, tmp_path / "run")
    changes = {**SCHEDULE, "repa_stop": 2, "repa_warmup_steps": 0}
    run_main(tmp_path, run_dir=run, max_steps=4, resume="latest", **changes)
    steps = [r for r in read_metrics(run) if "train/loss" in r]
    assert [("train/repa_loss" in r) for r in steps] == [True] * 3 + [False]
    trainer = make_trainer(**changes)
    trainer.load_checkpoint(three_steps / "checkpoints" / "latest.pt")
    assert "val/repa_loss" not in trainer.validate()  # also where nothing is trained


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(repa_layers=[2]),
            r"repa_layers and repa_encoder_type \(\[1\], 'efficientnet_lite0'\), now it is \(\[2\]",
        ),
        (dict(repa_projector_hidden=64), "holds another REPA projector: set repa_projector, repa_projector_hidden"),
    ],
)
def test_a_resume_with_another_alignment_is_refused(three_steps, tmp_path, changes, message):
    run = shutil.copytree(three_steps, tmp_path / "run")
    with pytest.raises(CheckpointError, match=message):
        run_main(tmp_path, run_dir=run, resume="latest", **SCHEDULE, **changes)
