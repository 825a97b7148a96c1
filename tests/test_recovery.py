"""What a run survives: kills at any moment, signals, a full disk, damaged checkpoints, steps that are not finite."""

import contextlib
import math
import os
import resource
import signal
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from processes import Script, start
from tiny_runs import (
    draw_no_curves,
    make_trainer,
    read_latest,
    read_metrics,
    run_main,
    same,
    settings,
)

import train_flextok
from flextok.training import checkpoints, monitor
from flextok.training.guard import Stopped
from flextok.utils.checkpoint import CheckpointError
from flextok.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("no_curves")
LAST_STEP = 8  # two epochs
CHANGES = dict(use_repa=False, photos_train_crops=14, save_every_steps=1, use_ema=True, val_token_images=2)


def train(folder: Path, run_dir: Path, max_steps: int = LAST_STEP) -> None:
    """A run, or what is left of it."""
    run_main(folder, run_dir=run_dir, resume="latest", max_steps=max_steps, **CHANGES)


def outcome(run_dir: Path) -> dict:
    checkpoint = read_latest(run_dir)
    checkpoint.pop("config")  # paths
    return checkpoint


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, no_curves):
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder, folder / "run")
    return outcome(folder / "run"), read_metrics(folder / "run")


def assert_as_uninterrupted(run_dir: Path, uninterrupted) -> None:
    """Weights, moments, averages and metrics, bit for bit; each step's losses once."""
    expected, metrics = uninterrupted
    assert same(outcome(run_dir), expected)
    assert read_metrics(run_dir) == metrics
    assert [record["step"] for record in metrics if "train/loss" in record] == list(range(1, LAST_STEP + 1))


def train_and_die(folder: Path, run_dir: Path, moment: str, n_saves: int = 1) -> None:
    """Kill the run in a step, or within a writing of a checkpoint: half-way, before or after the renaming."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # no progress bars
    begun = 0

    def die_if(now: str) -> None:
        if begun == n_saves and now == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def save(checkpoint, path):
        nonlocal begun
        begun += 1
        original(checkpoint, path)
        if begun == n_saves and moment == "half-way":
            os.truncate(path, path.stat().st_size // 2)
        die_if("half-way")

    def rename(source, target):
        die_if("before the renaming" if Path(target).name == "latest.pt" else "")
        replace(source, target)
        die_if("after the renaming" if Path(target).name == "latest.pt" else "")

    def link_and_die(source, target):
        link(source, target)
        die_if("after previous.pt")

    def step(self, *arguments):
        die_if("in a step")
        return train_step(self, *arguments)

    original, replace, link = torch.save, os.replace, checkpoints.link_checkpoint
    train_step, train_flextok.FlexTokTrainer.train_step = train_flextok.FlexTokTrainer.train_step, step
    torch.save, os.replace, checkpoints.link_checkpoint = save, rename, link_and_die
    train(folder, run_dir)


def killed(*arguments) -> None:
    process = start(train_and_die, *arguments)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path, uninterrupted):
    run_dir = tmp_path / "run"
    killed(tmp_path, run_dir, "half-way")
    assert not (run_dir / "checkpoints" / "latest.pt").exists()  # it starts again
    for moment, step in (
        ("in a step", 2), ("after previous.pt", 3), ("half-way", 4), ("before the renaming", 5),
        ("after the renaming", 7),
    ):  # fmt: skip
        killed(tmp_path, run_dir, moment, 2)
        assert read_latest(run_dir)["global_step"] == step
    with open(run_dir / "metrics.jsonl", "a") as file:  # what it logged since its last checkpoint, the end cut off
        file.write('{"step": 8, "train/loss": 7.0}\n{"step": 9, "train/lo')
    train(tmp_path, run_dir)
    assert_as_uninterrupted(run_dir, uninterrupted)
    assert list((run_dir / "checkpoints").glob(".*")) == []  # no temporary file is left


# ------------------------------------------------------------------------------------------------------------- signals


SIGNAL_IN_A_STEP = """
import os, sys, time, train_flextok
train_step = train_flextok.FlexTokTrainer.train_step
signum = int(sys.argv.pop())
def step(self, micro_batches):
    if self.global_step == 1 and signum:
        for _ in range(2):  # torchrun passes on what its workers get themselves
            os.killpg(os.getpgrp(), signum)
        time.sleep(1)  # for a loading process that dies of it
    return train_step(self, micro_batches)
train_flextok.FlexTokTrainer.train_step = step
train_flextok.command_line(train_flextok.parse_arguments())
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_of_a_job_ends_the_run_after_its_step_with_a_checkpoint(tmp_path, signum):
    """As Slurm, a terminal or torchrun send it: to the group, also to the processes that load images."""
    run_dir, script = tmp_path / "run", tmp_path / "signal.py"
    script.write_text(SIGNAL_IN_A_STEP)
    changes = CHANGES | dict(save_every_steps=0, num_workers=2, batch_size=1, gradient_accumulation_steps=4)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings(checkpoint_dir=str(tmp_path / "runs"), **changes)))
    options = ["--config", tmp_path / "tiny.yaml", "--device", "cpu", "--run-dir", run_dir, "--resume", "latest"]
    process = Script(script, *options, int(signum), new_session=True).wait()
    assert process.returncode == 128 + signum, process.stderr
    assert f"stopped by {signum.name} after step 1" in process.stderr
    assert "Traceback" not in process.stderr and read_latest(run_dir)["global_step"] == 1
    process = Script(script, *options, "--max-steps", "4", 0).wait()
    assert process.returncode == 0
    assert not any(word in process.stderr for word in ("Traceback", "Exception", "killed"))
    assert [record["step"] for record in read_metrics(run_dir) if "train/loss" in record] == [1, 2, 3, 4]


STOPPED_WORKER = """
import multiprocessing, os, signal, train_flextok
train_step = train_flextok.FlexTokTrainer.train_step
def step(self, micro_batches):
    if self.global_step == 1:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGTERM)
    return train_step(self, micro_batches)
train_flextok.FlexTokTrainer.train_step = step
train_flextok.command_line(train_flextok.parse_arguments())
"""


def test_a_loading_process_that_is_stopped_does_not_keep_the_program_alive(tmp_path):
    (tmp_path / "stopped.py").write_text(STOPPED_WORKER)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings(**CHANGES | dict(num_workers=2))))
    options = ["--config", tmp_path / "tiny.yaml", "--device", "cpu", "--run-dir", tmp_path / "run"]
    process = Script(tmp_path / "stopped.py", *options).wait(60)
    assert process.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM after step 1" in process.stderr
    assert read_latest(tmp_path / "run")["global_step"] == 1


def test_a_signal_in_a_validation_or_picture_is_heard_at_once(tmp_path, uninterrupted, monkeypatch):
    """SIGTERM comes while the validation after step 4 computes a loss, and while the last picture is sampled."""
    run_dir, trainer_class, signal_at = tmp_path / "run", train_flextok.FlexTokTrainer, None
    compute_loss, decode = trainer_class.compute_loss, train_flextok.FlexTokFromHub.decode

    def validation_loss(self, *arguments):
        if signal_at == self.global_step == 4 and not self.model.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(self, *arguments)

    def picture(self, *arguments, **settings):
        if signal_at == LAST_STEP:
            os.kill(os.getpid(), signal.SIGTERM)
        return decode(self, *arguments, **settings)

    monkeypatch.setattr(trainer_class, "compute_loss", validation_loss)
    monkeypatch.setattr(train_flextok.FlexTokFromHub, "decode", picture)
    for signal_at in (4, LAST_STEP):
        with pytest.raises(Stopped, match=f"stopped by SIGTERM after step {signal_at}") as stopped:
            train(tmp_path, run_dir)
        assert stopped.value.exit_code == 128 + signal.SIGTERM
        assert read_latest(run_dir)["global_step"] == signal_at
        last = read_metrics(run_dir)[-1]
        assert last["step"] == signal_at and ("val/loss" in last) == (signal_at == LAST_STEP)
    signal_at = None
    train(tmp_path, run_dir)
    assert_as_uninterrupted(run_dir, uninterrupted)


# --------------------------------------------------------------------------------- full disks, damaged checkpoints


@contextlib.contextmanager
def full_disk(limit: int):
    """No file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def half_done(tmp_path, uninterrupted):
    """The folder of a run that was killed after its third checkpoint was written."""
    killed(tmp_path, tmp_path / "run", "in a step", 3)
    return tmp_path / "run"


def test_a_full_disk_leaves_the_last_checkpoint_and_says_what_to_do(tmp_path, half_done, uninterrupted):
    files = half_done / "checkpoints"
    before = {path.name: path.read_bytes() for path in files.iterdir()}
    message = r"cannot write .* GB free.*--resume latest"
    with full_disk(len(before["latest.pt"]) // 2), pytest.raises(UserError, match=message):
        train(tmp_path, half_done)
    after = {path.name: path.read_bytes() for path in files.iterdir()}
    assert after["latest.pt"] == before["latest.pt"] and not any(name.startswith(".") for name in after)
    train(tmp_path, half_done)
    assert_as_uninterrupted(half_done, uninterrupted)


@pytest.mark.parametrize("damage", ["cut", "zeros"])
def test_a_damaged_latest_checkpoint_gives_way_to_the_one_before(tmp_path, half_done, uninterrupted, damage, caplog):
    """Also where the run that goes on from the one before is killed within its first save."""
    latest = half_done / "checkpoints" / "latest.pt"
    content = latest.read_bytes()
    latest.unlink()  # previous.pt is another file, but best.pt may be this one
    latest.write_bytes({"cut": content[:-100], "zeros": bytes(len(content))}[damage])
    if damage == "cut":
        killed(tmp_path, half_done, "before the renaming")
    train(tmp_path, half_done)
    assert "not a readable checkpoint" in caplog.text and "Going on from" in caplog.text
    assert_as_uninterrupted(half_done, uninterrupted)


def test_a_damaged_file_that_was_asked_for_by_name_is_not_replaced_by_another(tmp_path):
    trainer = make_trainer(tmp_path, use_repa=False)
    path = trainer.save_checkpoint()
    path.with_name("epoch_0001.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="epoch_0001.pt .* is not a readable checkpoint"):
        trainer.load_checkpoint(path.with_name("epoch_0001.pt"))


def test_a_file_where_the_run_folder_should_be_is_a_clear_error(tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    trainer = make_trainer(tmp_path / "run", use_repa=False)
    with pytest.raises(UserError, match="cannot write in .*checkpoints: .*--run-dir"):  # not after hours of training
        trainer.train(max_steps=1)
    assert trainer.global_step == 0


def test_checkpoints_of_epochs_are_kept_and_pruned(tmp_path):
    changes = dict(use_repa=False, photos_train_crops=8, num_epochs=3, save_every=1, keep_last=2)
    run_main(tmp_path, run_dir=tmp_path / "run", **changes)
    folder = tmp_path / "run" / "checkpoints"
    steps = {path.stem: torch.load(path, weights_only=True)["global_step"] for path in folder.iterdir()}
    losses = {r["step"]: r["val/flow_loss"] for r in read_metrics(tmp_path / "run") if "val/flow_loss" in r}
    best = min(losses, key=losses.get)
    assert steps == {"latest": 6, "previous": 4, "best": best, "epoch_0002": 4, "epoch_0003": 6}


def test_data_that_vanish_end_the_run_with_a_checkpoint(tmp_path):
    for i in range(24):
        Image.new("RGB", (40, 40), (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
    trainer = make_trainer(
        tmp_path / "run", dataset_name="folder", data_path=str(tmp_path), use_repa=False, val_fraction=0, num_epochs=9
    )
    trainer.train(max_steps=2)
    for file in tmp_path.glob("*.png"):
        file.unlink()
    with pytest.raises(UserError, match="none of the 24 images .* data_path is still there"):
        trainer.train(max_steps=20)
    assert read_latest(tmp_path / "run")["global_step"] >= 2


# -------------------------------------------------------------------------------------------------- steps not finite


def poisoned(monkeypatch, steps) -> None:
    """Losses that are NaN at some steps."""
    original = train_flextok.FlexTokTrainer.compute_loss

    def compute_loss(self, *arguments):
        losses = original(self, *arguments)
        if self.model.training and self.global_step in steps:
            losses["loss"] = losses["loss"] * math.nan
        return losses

    monkeypatch.setattr(train_flextok.FlexTokTrainer, "compute_loss", compute_loss)


def test_skipped_steps_are_counted_and_their_images_named(tmp_path, monkeypatch, caplog):
    poisoned(monkeypatch, {2, 4})
    trainer = make_trainer(tmp_path, use_repa=False)
    trainer.train(max_steps=7)
    named = [record.getMessage() for record in caplog.records if "changed nothing" in record.getMessage()]
    assert [message.split(" changed")[0] for message in named] == ["step 3", "step 5"]
    assert len(set(trainer.train_loader.dataset.names) & set(named[0].split("images: ")[1].split(", "))) == 4
    records = [record for record in read_metrics(tmp_path) if "train/loss" in record]
    assert [record["train/skipped_steps"] for record in records] == [0, 0, 0, 1, 1, 2, 2]
    assert records[2]["train/loss"] is None and records[3]["train/loss"] is not None
    assert read_latest(tmp_path)["nonfinite_steps"] == 2


def test_too_many_in_a_row_end_the_run_with_advice(tmp_path, monkeypatch):
    poisoned(monkeypatch, {1, 2, 4, 5, 7, 8, 9})
    trainer = make_trainer(tmp_path, use_repa=False, max_nonfinite_steps=2, val_token_images=0)
    with pytest.raises(UserError, match="3 steps in a row, up to step 10, .* latest.pt, of step 6, is from before"):
        trainer.train()
    checkpoint = read_latest(tmp_path)
    assert checkpoint["global_step"] == 6
    assert all(value.isfinite().all() for value in checkpoint["model_state_dict"].values())


def test_with_fp16_scaling_too_a_gradient_that_is_not_finite_changes_nothing_and_ends_the_run(tmp_path, monkeypatch):
    """While the scale falls it is a matter of course; at a scale of 1 it counts."""
    trainer = make_trainer(tmp_path, use_repa=False, use_ema=True, max_nonfinite_steps=2, num_epochs=9)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    original, poison = trainer.compute_loss, lambda: 2 <= trainer.global_step

    def compute_loss(*arguments):
        losses = original(*arguments)
        if trainer.model.training and poison():
            losses["loss"].register_hook(lambda gradient: gradient * math.nan)
        return losses

    trainer.compute_loss = compute_loss
    with pytest.raises(UserError, match="3 steps in a row, up to step 6"):  # step 3 and those after it halve the scale
        trainer.train()
    assert trainer.guard.skipped == 4 and not hasattr(trainer.optimizer, "found_inf")
    assert all(p.isfinite().all() for p in [*trainer.model.parameters(), *trainer.ema.averages])


# ------------------------------------------------------------------------------------- what is not the run's to die of


def test_a_signal_while_an_image_is_read_is_no_broken_image(tmp_path, monkeypatch, caplog):
    for i in range(12):
        Image.new("RGB", (40, 40), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    trainer = make_trainer(
        tmp_path / "run", dataset_name="folder", data_path=str(tmp_path), use_repa=False, val_fraction=0
    )
    original, reads = Image.open, []

    def read_and_signal(*arguments, **settings):
        reads.append(arguments)
        if len(reads) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **settings)

    monkeypatch.setattr(Image, "open", read_and_signal)
    with pytest.raises(Stopped):
        trainer.train()
    assert "cannot read" not in caplog.text and trainer.global_step == 1 == read_latest(tmp_path / "run")["global_step"]


@pytest.mark.parametrize("output", ["closed pipe", "full disk", "ascii"])
def test_nothing_that_happens_to_the_output_ends_a_run(tmp_path, output):
    file, run_dir = tmp_path / "tiny.yaml", tmp_path / "rün"
    file.write_text(yaml.safe_dump(settings(checkpoint_dir=str(tmp_path / "rüns"), use_repa=False)))
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    options = {
        "closed pipe": dict(outputs=[str(tmp_path / "pipe")] * 2), "full disk": dict(outputs=["/dev/full"] * 2),
        "ascii": dict(PYTHONIOENCODING="ascii"),
    }  # fmt: skip
    command = ["train_flextok.py", "--config", file, "--device", "cpu", "--max-steps", "2", "--run-dir", run_dir]
    process = Script(*command, **options[output])
    process.wait_until(run_dir.exists)
    os.close(reader)
    assert process.wait().returncode == 0
    assert (run_dir / "export" / "model.safetensors").exists()


def train_while_the_disk_is_full(run_dir: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # which may be a file
    draw_no_curves()
    trainer = make_trainer(run_dir, use_repa=False)
    train_step, disk = trainer.train_step, contextlib.ExitStack()

    def step(*arguments):
        if trainer.global_step == 1:
            disk.enter_context(full_disk((run_dir / "metrics.jsonl").stat().st_size + 10))  # part of a record
        if trainer.global_step == 3:
            disk.close()
        return train_step(*arguments)

    trainer.train_step = step
    trainer.train(max_steps=4)


def test_metrics_wait_for_room_on_the_disk(tmp_path):
    process = start(train_while_the_disk_is_full, tmp_path)
    process.join()
    assert process.exitcode == 0
    steps = [record["step"] for record in read_metrics(tmp_path) if "train/loss" in record]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("failing", ["init", "finish", "init hangs", "log exits"])
def test_nothing_that_wandb_does_ends_or_holds_up_a_run(tmp_path, monkeypatch, failing, caplog):
    class Run:
        id, dir = "id", str(tmp_path)

        def define_metric(self, *arguments, **settings): ...

        def log(self, metrics):
            if failing == "log exits":
                sys.exit(1)

        def finish(self):
            if failing == "finish":
                raise RuntimeError("disk full")

    def init(**settings):
        if failing == "init hangs":
            time.sleep(60)
        if failing == "init":
            raise RuntimeError("no such entity")
        return Run()

    setup = types.SimpleNamespace(settings=types.SimpleNamespace(mode="offline"))
    fake = types.SimpleNamespace(init=init, Settings=lambda **settings: settings, Image=str, setup=lambda **_: setup)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(monitor, "WANDB_SECONDS", 0.5)
    trainer = make_trainer(tmp_path / "run", use_repa=False, use_wandb=True)
    trainer.train(max_steps=1)
    assert trainer.global_step == 1 and "W&B" in caplog.text
