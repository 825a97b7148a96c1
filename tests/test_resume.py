"""What a run that goes on can change: REPA on and off, branches from older checkpoints, checkpoints that lack parts."""

import json
import math

import pytest
import torch
import yaml
from tiny_runs import first_batch, make_trainer, read_latest, read_metrics, run_main, same, settings

from flextok.utils.config import ConfigError

pytestmark = pytest.mark.usefixtures("no_curves")
# With a weight of 0 and no clipping REPA changes nothing of the model, whatever else it does.
SWITCHED = dict(
    photos_train_crops=14, use_ema=True, ema_decay=0.9, val_token_images=2, save_every_steps=0, repa_weight=0.0,
    max_grad_norm=0.0, use_wandb=False,
)  # fmt: skip


def losses(run_dir, name: str = "train/flow_loss") -> dict[int, float]:
    return {record["step"]: record[name] for record in read_metrics(run_dir) if name in record}


def test_repa_is_switched_on_and_off_in_a_run_that_goes_on(tmp_path, caplog):
    """Off, on, off, in mid-epoch: flow losses, weights, moments, averages and schedule are those of a run without."""
    caplog.set_level("INFO", "flextok")
    run_main(tmp_path, run_dir=tmp_path / "whole", use_repa=False, max_steps=7, **SWITCHED)
    run = tmp_path / "parts"
    run_main(tmp_path, run_dir=run, use_repa=False, max_steps=2, **SWITCHED)
    off = read_latest(run)
    off["wandb_id"] = "abc123"
    torch.save(off, run / "checkpoints" / "latest.pt")

    run_main(tmp_path, resume=str(run), use_repa=True, max_steps=5, repa_warmup_steps=10, **SWITCHED)
    assert "REPA is on, but the checkpoint of step 2 holds no projector: a new one is made from the seed" in caplog.text
    on = read_latest(run)
    groups = {group["name"]: group["params"] for group in on["optimizer_state_dict"]["param_groups"]}
    assert {on["optimizer_state_dict"]["state"][i]["step"].item() for i in groups["decoder"]} == {5}
    assert {on["optimizer_state_dict"]["state"][i]["step"].item() for i in groups["repa_projector"]} == {3}
    assert on["wandb_id"] == "abc123" and yaml.safe_load((run / "config.yaml").read_text())["use_repa"] is True

    run_main(tmp_path, resume=str(run / "checkpoints" / "latest.pt"), use_repa=False, max_steps=7, **SWITCHED)
    assert "REPA is off, but was on at step 5: the checkpoint's projector" in caplog.text
    whole, parts = read_latest(tmp_path / "whole"), read_latest(run)
    assert parts["wandb_id"] == "abc123" and parts["repa_module_state_dict"] is None is parts["constant_losses"]
    for key in ("model_state_dict", "optimizer_state_dict", "ema_model_state_dict", "scheduler_state_dict",
                "global_step", "best_val_loss"):  # fmt: skip
        assert same(whole[key], parts[key]), key
    assert losses(run) == losses(tmp_path / "whole")
    assert set(losses(run, "train/repa_loss")) == {3, 4, 5}
    assert [json.loads(line)["step"] for line in open(run / "metrics.jsonl") if "repa_loss_mean" in line] == [0]


def test_a_projector_made_on_the_way_is_that_of_the_start_and_its_weight_goes_by_the_runs_step(tmp_path):
    schedule = dict(repa_warmup_steps=4, repa_weight=1.0, repa_stop=3)
    make_trainer(tmp_path, use_repa=False).train(max_steps=2)
    checkpoint = tmp_path / "checkpoints" / "latest.pt"
    trainer, fresh = make_trainer(tmp_path, **schedule), make_trainer(**schedule)
    trainer.load_checkpoint(checkpoint)
    assert same(dict(trainer.repa_module.state_dict()), dict(fresh.repa_module.state_dict()))
    assert trainer.current_repa_weight == 0.75
    flow_loss = make_trainer(tmp_path, use_repa=False)
    flow_loss.load_checkpoint(checkpoint)
    batch = first_batch(trainer)
    assert torch.equal(*(some.compute_loss(batch)["flow_loss"] for some in (trainer, flow_loss)))
    trainer.train(max_steps=3)
    assert not trainer.repa_active  # repa_stop


@pytest.mark.parametrize("was, now", [(0.0, 1.0), (1.0, 0.0)])
def test_the_read_out_is_switched_likewise(tmp_path, was, now, caplog):
    caplog.set_level("INFO", "flextok")
    make_trainer(tmp_path, use_repa=False, readout_weight=was).train(max_steps=1)
    trainer = make_trainer(tmp_path, use_repa=False, readout_weight=now)
    trainer.load_checkpoint(tmp_path / "checkpoints" / "latest.pt")
    trainer.train(max_steps=2)
    assert ("the read-out is on, but" if now else "the read-out is off, but was on at step 1") in caplog.text
    assert (2 in losses(tmp_path, "train/readout_loss")) == bool(now)


@pytest.mark.parametrize(
    "key",
    ["repa_module_state_dict", "optimizer_state_dict", "scheduler_state_dict", "scaler_state_dict", "data", "config",
     "ema_model_state_dict", "readout_state_dict", "best_val_loss", "constant_losses", "model_config", "wandb_id"],
)  # fmt: skip
def test_a_checkpoint_goes_on_without_what_can_be_done_without(tmp_path, key):
    changes = dict(use_ema=True, readout_weight=1.0)
    make_trainer(tmp_path, **changes).train(max_steps=1)
    path = tmp_path / "checkpoints" / "latest.pt"
    checkpoint = read_latest(tmp_path)
    del checkpoint[key]
    torch.save(checkpoint, path)
    trainer = make_trainer(tmp_path, **changes)
    trainer.load_checkpoint(path)
    trainer.train(max_steps=2)
    assert trainer.global_step == 2 and trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_resume_latest_says_how_repa_is_switched(tmp_path, caplog):
    caplog.set_level("INFO", "flextok")
    run_main(tmp_path, max_steps=1, resume="latest", use_repa=False)
    run_main(tmp_path, max_steps=1, resume="latest", use_repa=True, check=True)
    assert (
        "run with REPA, this is a new run (to switch REPA in a run that goes on, give its folder: --resume RUN)"
        in caplog.text
    )


# -------------------------------------------------------------------------------------------------------- going back

EPOCHS = dict(use_repa=False, photos_train_crops=8, num_epochs=4, save_every=1, keep_last=2, val_token_images=2)


def test_an_older_checkpoint_is_not_continued_over_what_came_after_it(tmp_path):
    run = tmp_path / "run"
    run_main(tmp_path, run_dir=run, **EPOCHS)  # 4 epochs of 2 steps
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    older = run / "checkpoints" / "epoch_0003.pt"
    for run_dir in (None, run):
        with pytest.raises(ConfigError, match=r"epoch_0003.pt is of step 6, .* step 8 \(latest.pt\).*--run-dir NEW"):
            run_main(tmp_path, resume=str(older), run_dir=run_dir, **{**EPOCHS, "learning_rate": 1e-4})
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    branch = tmp_path / "branch"
    run_main(tmp_path, resume=str(older), run_dir=branch, **{**EPOCHS, "learning_rate": 1e-4})
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    old, new = losses(run), losses(branch)
    assert list(new) == list(range(1, 9)) and [new[i] for i in range(1, 8)] == [old[i] for i in range(1, 8)]
    assert new[8] != old[8]
    kept = {path.stem: torch.load(path, weights_only=True)["global_step"] for path in branch.glob("checkpoints/*")}
    assert kept.keys() == {"latest", "previous", "best", "epoch_0004"} and kept["epoch_0004"] == kept["latest"] == 8


def test_a_resume_keeps_the_best_value_and_the_wandb_run_where_they_go_on(tmp_path):
    """Not where validation measures something else, nor in a branch."""
    changes = dict(use_repa=False, best_metric="val/psnr_k8")
    first = make_trainer(tmp_path / "run", **changes)
    first.best_val_loss, first.wandb_id = -12.0, "abc123"
    path = first.save_checkpoint()
    for run, other, best, wandb_id in (
        ("run", {}, -12.0, "abc123"),
        ("run", {"psnr_guidance_scale": 2.0}, math.inf, "abc123"),
        ("branch", {}, math.inf, None),
    ):
        trainer = make_trainer(tmp_path / run, **changes, **other)
        trainer.load_checkpoint(path)
        assert (trainer.best_val_loss, trainer.wandb_id) == (best, wandb_id)


def test_pruning_counts_epochs_as_numbers_and_leaves_other_files(tmp_path):
    trainer = make_trainer(tmp_path, use_repa=False)
    trainer.save_checkpoint()
    for name in ("epoch_9998.pt", "epoch_9999.pt", "epoch_0001_mine.pt"):
        (tmp_path / "checkpoints" / name).write_bytes(b"")
    trainer.checkpointer.keep_epoch(10000, 2)
    names = {path.name for path in (tmp_path / "checkpoints").glob("epoch*")}
    assert names == {"epoch_9999.pt", "epoch_10000.pt", "epoch_0001_mine.pt"}


# ------------------------------------------------------------------------------------------- model and model_name


@pytest.mark.parametrize("by", ["file", "command line"])
def test_a_new_model_together_with_the_name_of_one_is_refused(tmp_path, by):
    name = "runs/x/export"
    changes = {"model_name": name} if by == "file" else {"overrides": [f"model_name={name}"]}
    with pytest.raises(ConfigError, match=r"model_name is 'runs/x/export', but model is set too.*--set model=null"):
        run_main(tmp_path, check=True, **changes)
    assert not (tmp_path / "runs").exists()


def test_the_config_that_a_run_leaves_can_be_used_again(tmp_path):
    run_main(tmp_path, run_dir=tmp_path / "run", max_steps=1, use_repa=False)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["model"] == settings()["model"] and "model_name" in written
    assert make_trainer(**{key: written[key] for key in ("model", "model_name")}, use_repa=False)
