"""What a run survives: kills at any moment, signals, a full disk, damaged checkpoints, steps that are not finite."""

import io
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import processes
import pytest
import torch
import yaml
from PIL import Image
from processes import ROOT, Script, start, step_is_logged
from tiny_runs import first_batch, make_trainer, read_latest, read_metrics, run_main, same, settings

import train_flextok
from flextok.training import checkpointer, checkpoints, monitor
from flextok.training.guard import Stopped
from flextok.utils.checkpoint import CheckpointError
from flextok.utils.errors import UserError

N_KILLS = 4
LAST_STEP = 12
CHANGES = dict(use_repa=False, photos_train_crops=22, num_epochs=4, save_every_steps=1, use_ema=True)


def train(folder: Path, run_dir: Path, **changes) -> None:
    """A run, or what is left of it."""
    torch.set_num_threads(1)
    os.close(2)  # no progress bars
    os.open(os.devnull, os.O_WRONLY)
    run_main(folder, run_dir=run_dir, resume="latest", max_steps=LAST_STEP, **{**CHANGES, **changes})


def outcome(run_dir: Path) -> dict:
    checkpoint = read_latest(run_dir)
    checkpoint.pop("config")  # paths
    return checkpoint


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    begun = time.monotonic()
    process = start(train, folder, folder / "run")
    process.join()
    assert process.exitcode == 0
    return outcome(folder / "run"), read_metrics(folder / "run"), time.monotonic() - begun


def assert_as_uninterrupted(run_dir: Path, uninterrupted) -> None:
    """Weights, moments, averages and metrics, bit for bit; each step's losses once."""
    expected, metrics, _ = uninterrupted
    assert same(outcome(run_dir), expected)
    assert read_metrics(run_dir) == metrics
    assert [record["step"] for record in metrics if "train/loss" in record] == list(range(1, LAST_STEP + 1))


def test_runs_killed_at_random_moments_end_as_if_they_had_not_been(tmp_path, uninterrupted):
    draw, kills, run = random.Random(0), 0, 0
    while kills < N_KILLS:
        run_dir = tmp_path / f"run-{run}"
        process = start(train, tmp_path, run_dir)
        process.join(draw.uniform(0.0, 0.8) * uninterrupted[2])
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            if (run_dir / "checkpoints" / "latest.pt").exists():
                read_latest(run_dir)
        else:
            assert process.exitcode == 0
            assert_as_uninterrupted(run_dir, uninterrupted)
            shutil.rmtree(run_dir)
            run += 1
    process = start(train, tmp_path, run_dir)
    process.join()
    assert_as_uninterrupted(run_dir, uninterrupted)
    assert list((run_dir / "checkpoints").glob(".*")) == []  # no temporary file is left


def train_and_die(folder: Path, run_dir: Path, moment: str) -> None:
    """Kill the run within its fifth writing of a checkpoint: half-way, before or after the renaming."""
    count = [0]

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def save(checkpoint, path):
        count[0] += 1
        if count[0] == 5 and moment == "half-way":
            original(checkpoint, path)
            with open(path, "rb+") as file:
                file.truncate(path.stat().st_size // 2)
            die()
        original(checkpoint, path)

    original, replace, link = torch.save, os.replace, checkpoints.link_checkpoint

    def rename(source, target):
        if count[0] == 5 and moment == "before the renaming" and Path(target).name == "latest.pt":
            die()
        replace(source, target)
        if count[0] == 5 and moment == "after the renaming" and Path(target).name == "latest.pt":
            die()

    def link_and_die(source, target):
        link(source, target)
        if count[0] == 5 and moment == "after previous.pt":
            die()

    torch.save, os.replace, checkpoints.link_checkpoint = save, rename, link_and_die
    train(folder, run_dir)


@pytest.mark.parametrize("moment", ["after previous.pt", "half-way", "before the renaming", "after the renaming"])
def test_a_kill_while_a_checkpoint_is_written(tmp_path, uninterrupted, moment):
    process = start(train_and_die, tmp_path, tmp_path / "run", moment)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert read_latest(tmp_path / "run")["global_step"] == (5 if moment == "after the renaming" else 4)
    process = start(train, tmp_path, tmp_path / "run")
    process.join()
    assert_as_uninterrupted(tmp_path / "run", uninterrupted)


# ------------------------------------------------------------------------------------------------------------- signals


def launch(folder: Path, *options, num_epochs=4, **changes) -> Script:
    file = folder / "tiny.yaml"
    changes = {**CHANGES, "num_epochs": num_epochs, **changes}
    file.write_text(yaml.safe_dump(settings(checkpoint_dir=str(folder / "runs"), **changes)))
    return processes.train(file, "--run-dir", folder / "run", "--resume", "latest", *options)


@pytest.mark.parametrize("signum, num_workers", [(signal.SIGTERM, 2), (signal.SIGINT, 0)])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path, uninterrupted, signum, num_workers):
    run_dir = tmp_path / "run"
    process = launch(tmp_path, save_every_steps=0, num_workers=num_workers, num_epochs=400)
    process.wait_until(lambda: step_is_logged(run_dir, 2))
    process.send_signal(signum)
    process.wait(60)
    assert process.returncode == 128 + signum
    step = read_latest(run_dir)["global_step"]
    assert step >= 2 and f"stopped by {signum.name} after step {step}" in process.stderr
    assert "Traceback" not in process.stderr
    steps = [record["step"] for record in read_metrics(run_dir) if "train/loss" in record]
    assert steps == list(range(1, step + 1))
    assert launch(tmp_path, "--max-steps", step + 2, num_epochs=400).wait().returncode == 0
    steps = [record["step"] for record in read_metrics(run_dir) if "train/loss" in record]
    assert steps == list(range(1, step + 3))


def test_a_run_with_loading_processes_ends_at_once_and_without_noise(tmp_path):
    process = launch(tmp_path, "--max-steps", "8", num_workers=2).wait()
    assert process.returncode == 0
    assert not any(word in process.stderr for word in ("Traceback", "Exception", "killed"))


SLOW_STEPS = """
import time, train_flextok
train_step = train_flextok.FlexTokTrainer.train_step
def slow_step(self, micro_batches):
    print("step begins", flush=True)
    time.sleep(4)
    return train_step(self, micro_batches)
train_flextok.FlexTokTrainer.train_step = slow_step
train_flextok.command_line(train_flextok.parse_arguments())
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_of_a_job_leaves_the_loading_ones_at_work(tmp_path, signum):
    """As Slurm, a terminal or torchrun send it: to the group. A step that lasts longer still gets its batches."""
    (tmp_path / "slow.py").write_text(SLOW_STEPS)
    changes = dict(CHANGES, save_every_steps=0, num_workers=2, batch_size=1, gradient_accumulation_steps=11)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings(checkpoint_dir=str(tmp_path / "runs"), **changes)))
    options = ["--config", tmp_path / "tiny.yaml", "--device", "cpu", "--run-dir", tmp_path / "run"]
    process = Script(tmp_path / "slow.py", *options, new_session=True)
    process.wait_until(lambda: "step begins" in process.stdout)
    for _ in range(2):  # torchrun passes on what its workers get themselves
        os.killpg(process.pid, signum)
    process.wait()
    assert process.returncode == 128 + signum, process.stderr
    assert read_latest(tmp_path / "run")["global_step"] == 1 and "Traceback" not in process.stderr


def train_and_be_asked_to_stop(folder: Path, run_dir: Path, step: int, where: str) -> None:
    """SIGTERM comes while the validation after a step computes a loss, or while its picture is sampled."""
    trainer_class = train_flextok.FlexTokTrainer
    compute_loss, decode = trainer_class.compute_loss, train_flextok.FlexTokFromHub.decode

    def validation_loss(self, *arguments):
        if where == "validation" and not self.model.training and self.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(self, *arguments)

    def picture(self, *arguments, **settings):
        if where == "picture":
            os.kill(os.getpid(), signal.SIGTERM)
        return decode(self, *arguments, **settings)

    trainer_class.compute_loss, train_flextok.FlexTokFromHub.decode = validation_loss, picture
    try:
        train(folder, run_dir)
    except Stopped as stopped:
        (folder / "message").write_text(str(stopped))
        sys.exit(stopped.exit_code)


@pytest.mark.parametrize("step, where", [(6, "validation"), (LAST_STEP, "validation"), (LAST_STEP, "picture")])
def test_a_signal_in_a_validation_or_picture_is_heard_at_once(tmp_path, uninterrupted, step, where):
    run_dir = tmp_path / "run"
    process = start(train_and_be_asked_to_stop, tmp_path, run_dir, step, where)
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert f"stopped by SIGTERM after step {step}" in (tmp_path / "message").read_text()
    checkpoint = read_latest(run_dir)
    assert checkpoint["global_step"] == step
    last = read_metrics(run_dir)[-1]
    assert last["step"] == step and ("val/loss" in last) == (where == "picture")
    process = start(train, tmp_path, run_dir)
    process.join()
    assert process.exitcode == 0
    assert_as_uninterrupted(run_dir, uninterrupted)


# --------------------------------------------------------------------------------- full disks, damaged checkpoints


def train_on_a_full_disk(folder: Path, run_dir: Path, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # no file can grow beyond it
    try:
        train(folder, run_dir)
    except UserError as error:
        (folder / "message").write_text(str(error))
        sys.exit(3)


def test_a_full_disk_leaves_the_last_checkpoint_and_says_what_to_do(tmp_path, uninterrupted):
    run_dir = tmp_path / "run"
    process = start(train_in_part, tmp_path, run_dir, 6)
    process.join()
    files = run_dir / "checkpoints"
    before = {path.name: path.read_bytes() for path in files.iterdir()}
    process = start(train_on_a_full_disk, tmp_path, run_dir, len(before["latest.pt"]) // 2)
    process.join()
    assert process.exitcode == 3
    message = (tmp_path / "message").read_text()
    assert "cannot write" in message and "GB free" in message and "--resume latest" in message
    after = {path.name: path.read_bytes() for path in files.iterdir()}
    assert after["latest.pt"] == before["latest.pt"] and not any(name.startswith(".") for name in after)
    process = start(train, tmp_path, run_dir)
    process.join()
    assert_as_uninterrupted(run_dir, uninterrupted)


def train_in_part(folder: Path, run_dir: Path, n_kept: int) -> None:
    """A run that is killed after some checkpoints."""
    original, count = checkpoints.save_checkpoint, [0]

    def save(*arguments):
        original(*arguments)
        count[0] += 1
        if count[0] == n_kept:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpointer.save_checkpoint = save
    train(folder, run_dir)


@pytest.mark.parametrize("damage", ["cut", "zeros"])
def test_a_damaged_latest_checkpoint_gives_way_to_the_one_before(tmp_path, uninterrupted, damage):
    run_dir = tmp_path / "run"
    process = start(train_in_part, tmp_path, run_dir, 6)
    process.join()
    latest = run_dir / "checkpoints" / "latest.pt"
    content = latest.read_bytes()
    latest.unlink()  # previous.pt is another file, but best.pt may be this one
    latest.write_bytes({"cut": content[: len(content) // 2], "zeros": bytes(len(content))}[damage])
    process = start(train, tmp_path, run_dir)
    process.join()
    assert process.exitcode == 0
    assert_as_uninterrupted(run_dir, uninterrupted)


def train_and_die_in_the_next_save(folder: Path, run_dir: Path) -> None:
    os_replace = os.replace

    def rename(source, target):
        if Path(target).name == "latest.pt":
            os.kill(os.getpid(), signal.SIGKILL)
        os_replace(source, target)

    os.replace = rename
    train(folder, run_dir)


def test_a_damaged_checkpoint_never_takes_the_place_of_the_one_before(tmp_path, uninterrupted):
    """Neither where the run that goes on from the one before is killed within its first save."""
    run_dir = tmp_path / "run"
    process = start(train_in_part, tmp_path, run_dir, 6)
    process.join()
    latest = run_dir / "checkpoints" / "latest.pt"
    content = latest.read_bytes()
    latest.unlink()
    latest.write_bytes(content[:-100])
    process = start(train_and_die_in_the_next_save, tmp_path, run_dir)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process = start(train, tmp_path, run_dir)
    process.join()
    assert process.exitcode == 0
    assert_as_uninterrupted(run_dir, uninterrupted)


def test_the_checkpoint_before_is_used_with_a_warning_and_others_never(tmp_path, caplog):
    trainer = make_trainer(tmp_path, use_repa=False)
    path = trainer.save_checkpoint()
    trainer.global_step = 7
    trainer.save_checkpoint()
    path.write_bytes(b"no checkpoint")
    found, checkpoint = checkpoints.readable_checkpoint(path)
    assert found.name == "previous.pt" and checkpoint["global_step"] == 0
    assert "not a readable checkpoint" in caplog.text and "Going on from" in caplog.text
    named = path.rename(path.with_name("epoch_0001.pt"))
    with pytest.raises(CheckpointError, match="epoch_0001.pt .* is not a readable checkpoint"):
        checkpoints.readable_checkpoint(named)  # a file that was asked for by name is not replaced by another


def save_as_nobody(run_dir: Path, may_enter: bool) -> None:
    """Try to write a checkpoint where it is not allowed; root has to become someone else for that."""
    if may_enter:  # by a relative path: the folders above are not for others
        os.chdir(run_dir)
    trainer = make_trainer(Path(".") if may_enter else run_dir, use_repa=False)
    run_dir.chmod(0o555)
    (run_dir / "checkpoints").chmod(0o555 if may_enter else 0o000)
    torch.save({}, io.BytesIO())  # imports what it needs while that may be read
    if os.getuid() == 0:
        os.setuid(65534)
    try:
        trainer.save_checkpoint()
    except UserError as error:
        sys.exit(3 if "cannot write" in str(error) and "Permission denied" in str(error) else 4)


@pytest.mark.parametrize("may_enter", [True, False])
def test_a_folder_that_is_not_for_writing_is_a_clear_error_and_keeps_what_it_holds(tmp_path, may_enter):
    path = make_trainer(tmp_path, use_repa=False).save_checkpoint()
    before = path.read_bytes()
    process = start(save_as_nobody, tmp_path, may_enter)
    process.join()
    for folder in (path.parent, tmp_path):
        folder.chmod(0o755)
    assert process.exitcode == 3
    assert [file.name for file in path.parent.iterdir()] == ["latest.pt"] and path.read_bytes() == before


def test_a_file_where_the_run_folder_should_be_is_a_clear_error(tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    trainer = make_trainer(tmp_path / "run", use_repa=False)
    with pytest.raises(UserError, match="cannot write in .*checkpoints: .*--run-dir"):
        trainer.save_checkpoint()
    with pytest.raises(UserError, match="cannot write in .*checkpoints: .*--run-dir"):  # not after hours of training
        trainer.train(max_steps=1)
    assert trainer.global_step == 0


def test_a_picture_that_cannot_be_written_costs_no_training(tmp_path, caplog):
    (tmp_path / "pictures").write_text("a file where the folder should be")
    trainer = make_trainer(tmp_path, use_repa=False, visualize_every=1)
    trainer.train(max_steps=2)
    assert trainer.global_step == 2 and "picture" in caplog.text and "cannot be written" in caplog.text


def test_a_checkpoint_that_is_kept_twice_leaves_no_temporary_file(tmp_path):
    (tmp_path / "latest.pt").write_bytes(b"latest")
    for _ in range(2):
        checkpoints.link_checkpoint(tmp_path / "latest.pt", tmp_path / "best.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "latest.pt"]


def test_checkpoints_of_epochs_are_pruned(tmp_path):
    run_main(tmp_path, run_dir=tmp_path / "run", use_repa=False, num_epochs=5, save_every=1, keep_last=2)
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"latest.pt", "previous.pt", "best.pt", "epoch_0004.pt", "epoch_0005.pt"}


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


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, monkeypatch, optimizer):
    poisoned(monkeypatch, {2})
    trainer = make_trainer(tmp_path, use_ema=True, optimizer=optimizer)
    batch = first_batch(trainer)

    def state():
        tree = [trainer.model.state_dict(), trainer.optimizer.state_dict()["state"], trainer.ema.averages]
        return [*tree, trainer.repa_module.state_dict()]

    states = []
    for _ in range(4):
        trainer.train_step([batch])
        states.append(torch.utils._pytree.tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, state()))
    assert same(states[2], states[1])
    assert not same(states[1], states[0]) and not same(states[3], states[2])


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


def test_too_many_in_a_row_end_the_run_and_a_finite_one_starts_the_count_anew(tmp_path, monkeypatch):
    poisoned(monkeypatch, {1, 2, 4, 5, 7, 8, 9})
    trainer = make_trainer(tmp_path, use_repa=False, max_nonfinite_steps=2, save_every_steps=1, num_epochs=9)
    with pytest.raises(UserError, match="3 steps in a row, up to step 10, .* latest.pt is not from before"):
        trainer.train()
    assert read_latest(tmp_path)["global_step"] == 9
    assert all(value.isfinite().all() for value in read_latest(tmp_path)["model_state_dict"].values())


def test_a_divergence_names_the_checkpoint_from_before(tmp_path, monkeypatch):
    poisoned(monkeypatch, set(range(7, 40)))
    trainer = make_trainer(tmp_path, use_repa=False, max_nonfinite_steps=2, save_every_steps=0, num_epochs=9)
    with pytest.raises(UserError, match="latest.pt, of step 6, is from before: go on from it with a smaller"):
        trainer.train()


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


class NoBatch(torch.utils.data.Dataset):
    """Images of which the tenth never comes."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        while i == 10:
            time.sleep(0.1)
        return torch.zeros(3, 32, 32)


def train_and_wait(folder: Path) -> None:
    os.close(2)
    os.open(os.devnull, os.O_WRONLY)
    base = make_trainer(use_repa=False)
    loader = torch.utils.data.DataLoader(NoBatch(), 4, num_workers=1)
    trainer = train_flextok.FlexTokTrainer(base.config, base.model, loader, None, "cpu", folder)
    try:
        trainer.train()
    except Stopped as stopped:
        os._exit(stopped.exit_code)


def test_a_signal_ends_a_run_that_waits_for_a_batch(tmp_path):
    process = start(train_and_wait, tmp_path)
    while not step_is_logged(tmp_path, 2):
        assert process.is_alive()
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 128 + signal.SIGTERM and read_latest(tmp_path)["global_step"] == 2


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
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings(checkpoint_dir=str(tmp_path / "rüns"), use_repa=False)))
    reader, writer = os.pipe()
    os.close(reader)
    outputs = {"closed pipe": writer, "full disk": os.open("/dev/full", os.O_WRONLY), "ascii": None}
    command = [sys.executable, "train_flextok.py", "--config", file, "--device", "cpu", "--max-steps", "2"]
    process = subprocess.run(
        [*map(str, command), "--run-dir", str(tmp_path / "rün")], cwd=ROOT, timeout=120, stdout=outputs[output],
        stderr=outputs[output], env={**os.environ, **({"PYTHONIOENCODING": "ascii"} if output == "ascii" else {})},
    )  # fmt: skip
    os.close(writer)
    assert process.returncode == 0
    assert (tmp_path / "rün" / "export" / "model.safetensors").exists()


def test_metrics_wait_for_room_on_the_disk(tmp_path, monkeypatch, caplog):
    trainer = make_trainer(tmp_path, use_repa=False)
    original, full = io.TextIOWrapper.write, [True]

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, text):
            if full[0]:
                raise OSError(28, "No space left on device")
            return self.file.write(text)

        def __getattr__(self, name):
            return getattr(self.file, name)

    opened = monitor.MetricsFile.__init__
    monkeypatch.setattr(
        monitor.MetricsFile, "__init__",
        lambda self, *arguments: opened(self, *arguments) or setattr(self, "_file", Full(self._file)),
    )  # fmt: skip
    after_step = trainer.after_step

    def make_room(*arguments):
        after_step(*arguments)
        full[0] = trainer.global_step < 3

    trainer.after_step = make_room
    trainer.train(max_steps=4)
    assert [r["step"] for r in read_metrics(tmp_path) if "train/loss" in r] == [1, 2, 3, 4]
    assert caplog.text.count("records wait for room") == 1 and original


@pytest.mark.parametrize("failing", ["init", "log", "finish", "init hangs", "log exits"])
def test_nothing_that_wandb_does_ends_or_holds_up_a_run(tmp_path, monkeypatch, failing, caplog):
    class Run:
        id, dir = "id", str(tmp_path)

        def define_metric(self, *arguments, **settings): ...

        def log(self, metrics):
            if failing == "log":
                raise BrokenPipeError("the service is gone")
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

    fake = types.SimpleNamespace(init=init, Settings=lambda **settings: settings, Image=str)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(monitor, "WANDB_SECONDS", 0.5)
    trainer = make_trainer(tmp_path / "run", use_repa=False, use_wandb=True)
    trainer.train(max_steps=2)
    assert trainer.global_step == 2 and "W&B" in caplog.text


def test_wandb_online_without_a_login_is_offline_and_asks_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert monitor.wandb_mode() == "offline"
