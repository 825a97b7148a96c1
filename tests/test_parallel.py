"""Several processes against one: the same losses, gradients, draws and checkpoints; and what happens when one dies."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from parallel_runs import PLAIN, RUNS, STEPS, WITH_ALL, train_briefly
from PIL import Image
from processes import ROOT, Script, step_is_logged
from tiny_runs import make_trainer, read_latest, read_metrics, settings

from flextok.benchmark.processes import free_port
from flextok.training.config import TrainConfig
from flextok.utils.config import ConfigError


def together(*command, nodes: int = 1) -> list[Script]:
    """Two processes as torchrun starts them, on one node or on a node each."""
    environment = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(free_port()))
    environment["LOCAL_WORLD_SIZE"] = str(2 // nodes)
    return [Script(*command, RANK=str(i), LOCAL_RANK=str(i // nodes), **environment) for i in range(2)]


def finished(processes: list[Script], exit_code: int = 0) -> str:
    """What the processes of a job printed."""
    outputs = [process.wait(300).stdout + process.stderr for process in processes]
    assert [process.returncode for process in processes] == [exit_code] * len(processes), "".join(outputs)[-5000:]
    return "".join(outputs)


def torchrun(*arguments) -> Script:
    nodes = ("--standalone", "--nproc-per-node", "2")
    return Script("-m", "torch.distributed.run", *nodes, *arguments, PYTHONPATH=f"{ROOT}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, no_curves):
    """All RUNS with two processes, and their counterparts with one."""
    folder = tmp_path_factory.mktemp("parallel")
    one = {
        "all": train_briefly(folder / "one", **WITH_ALL),
        "plain": train_briefly(folder / "one-plain", **PLAIN),
    }
    one["resumed"] = train_briefly(folder / "one-resumed", STEPS + 2, Path(one["all"]["checkpoint"]), **WITH_ALL)
    finished(together(ROOT / "tests" / "parallel_runs.py", folder))
    return one, torch.load(folder / "results.pt", weights_only=False)


def counterpart(one: dict, name: str) -> dict:
    return one["plain" if name.endswith("compiled") else "all"]


def relative_error(given: dict, expected: dict) -> float:
    assert given.keys() == expected.keys()
    difference = sum(float((given[name] - expected[name]).double().square().sum()) for name in expected)
    return (difference / sum(float(value.double().square().sum()) for value in expected.values())) ** 0.5


def loss_error(given: list, expected: list) -> float:
    assert len(given) == len(expected) >= 2
    return max(abs(a - b) / abs(b) for a, b in zip(given, expected))


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_with_half_the_batch_are_one(runs, name):
    one, two = runs
    expected = counterpart(one, name)
    assert relative_error(two[name]["gradients"], expected["gradients"]) < 1e-5
    assert loss_error(two[name]["losses"], expected["losses"]) < 1e-5
    assert two[name]["validation"] == pytest.approx(expected["validation"], rel=1e-5)
    assert two[name]["draws"] == expected["draws"]  # they do not depend on how images are spread
    assert len(two[name]["draws"]) > 2 * STEPS


@pytest.mark.parametrize("name", RUNS)
def test_checkpoints_have_the_format_of_one_process(runs, name):
    one, two = runs
    given, expected = (
        torch.load(run[key], weights_only=True)
        for run, key in ((two[name], "checkpoint"), (counterpart(one, name), "checkpoint"))
    )
    differences = []

    def compare(a, b, path=""):
        if isinstance(b, torch.Tensor):
            assert type(a) is torch.Tensor and a.shape == b.shape and a.dtype == b.dtype, path
            if b.is_floating_point() and b.numel():
                differences.append((a - b).abs().max() / b.abs().max().clamp(min=1e-8))
        elif isinstance(b, dict):
            assert a.keys() == b.keys(), path
            for key in b:
                compare(a[key], b[key], f"{path}.{key}")
        elif isinstance(b, list):
            assert len(a) == len(b), path
            for i, (x, y) in enumerate(zip(a, b)):
                compare(x, y, f"{path}[{i}]")

    compare({**given, "config": None}, {**expected, "config": None})
    assert len(differences) > 100 and max(differences) < 1e-4


@pytest.mark.parametrize("name", ["ddp, spoiled", "fsdp, spoiled"])
def test_a_step_that_is_not_finite_in_one_process_changes_nothing_in_any(runs, name):
    _, two = runs
    assert two[name]["changed"] == [[True, False, True]] * 2
    assert two[name]["skipped"] == [1, 1]
    assert two[name]["named"] == two[name]["shown"] and len(two[name]["shown"]) == 4  # the images of both processes


def test_fsdp_in_bf16_is_ddp_in_bf16(runs):
    """What stays in fp32 under autocast (registers, positional tables, the residual stream) does so under both."""
    _, two = runs
    assert relative_error(two["fsdp, bf16"], two["ddp, bf16"]) < 1e-3


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_checkpoint_of_one_process_goes_on_in_two_and_the_other_way_round(runs, name, tmp_path):
    one, two = runs
    assert loss_error(two[f"{name}, resumed"]["losses"], one["resumed"]["losses"]) < 1e-5
    back = train_briefly(tmp_path, STEPS + 2, Path(two[name]["checkpoint"]), **WITH_ALL)
    assert loss_error(back["losses"], one["resumed"]["losses"]) < 1e-5


# ------------------------------------------------------------------------------------------------- whole runs, torchrun


def arguments(folder: Path, *options, **changes) -> list:
    file = folder / "tiny.yaml"
    changes = dict(num_epochs=4, batch_size=2, global_batch_size=4, save_every_steps=2, use_repa=False) | changes
    file.write_text(yaml.safe_dump(settings(checkpoint_dir=str(folder / "runs"), **changes)))
    script = ROOT / "train_flextok.py"
    return [script, "--config", file, "--device", "cpu", "--run-dir", folder / "run", *options]


def logged_steps(folder: Path) -> list[int]:
    return [record["step"] for record in read_metrics(folder / "run") if "train/loss" in record]


@pytest.mark.parametrize("parallel, nodes", [("ddp", 2), ("fsdp", 1)])
def test_a_job_of_two_fills_a_cache_together_and_trains_from_it_and_one_process_goes_on(tmp_path, parallel, nodes):
    changes = dict(repa_cache=True, repa_encoder_dtype="fp32", cache_dir=str(tmp_path / "cache"), use_repa=True)
    command = arguments(tmp_path, "--max-steps", "2", parallel=parallel, **changes)
    output = finished(together(*command, nodes=nodes))
    assert output.count("run folder") == 1 and output.count("Done: 2 steps") == 1  # process 0 speaks for all
    assert f"2 processes ({parallel})" in output and "features, train: 100%" in output, output[-5000:]
    (done,) = (tmp_path / "cache").glob("*/features-*/train/done.bin")
    assert set(done.read_bytes()) == {1}
    assert (tmp_path / "run" / "export" / "model.safetensors").exists() and read_latest(tmp_path / "run")
    alone = arguments(tmp_path, "--resume", "latest", "--max-steps", "4", batch_size=4, **changes)
    assert Script(*alone).wait().returncode == 0
    assert logged_steps(tmp_path) == [1, 2, 3, 4]


def test_broken_images_of_all_processes_are_named_and_counted_together(tmp_path):
    """Each process meets 2 % of them broken or fewer; together they are too many."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(40):
        Image.new("RGB", (40, 40), (6 * i, 0, 0)).save(folder / f"{i:02}.png")
    broken = [folder / f"{i:02}.png" for i in (3, 17)]
    for path in broken:
        path.write_bytes(b"broken")
    changes = dict(dataset_name="folder", data_path=str(folder), val_fraction=0, num_epochs=2)
    output = finished(together(*arguments(tmp_path, **changes)), exit_code=1)
    assert "2 of 40 images cannot be read, more than 1 %" in output
    for path in broken:
        assert output.count(f"cannot read the image {path}: ") == 1
    assert read_latest(tmp_path / "run")["global_step"] >= 1


def test_a_process_that_dies_ends_the_job(tmp_path):
    job = torchrun(*arguments(tmp_path, num_epochs=1000))
    job.wait_until(lambda: step_is_logged(tmp_path / "run", 3))
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    job.wait()
    assert job.returncode not in (0, None)
    assert "exitcode" in job.stderr and "-9" in job.stderr  # torchrun's table says who died of what
    assert read_latest(tmp_path / "run")["global_step"] >= 2


def test_a_signal_stops_all_processes_with_one_checkpoint(tmp_path):
    job = torchrun(*arguments(tmp_path, num_epochs=1000, save_every_steps=0, photos_train_crops=400))
    job.wait_until(lambda: step_is_logged(tmp_path / "run", 3))
    job.send_signal(signal.SIGTERM)  # torchrun passes it on
    job.wait()
    checkpoint = read_latest(tmp_path / "run")
    assert f"stopped by SIGTERM after step {checkpoint['global_step']}" in job.stderr
    assert checkpoint["global_step"] >= 3


# ------------------------------------------------------------------------------------------------------------- settings


def test_global_batch_size_sets_the_accumulation():
    config = TrainConfig.from_dict(settings(batch_size=2, global_batch_size=12))
    assert [config.accumulation(n) for n in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(ConfigError, match="global_batch_size is 12, .* there are 4 processes .* multiple of 8"):
        config.accumulation(4)


def test_the_same_global_batch_is_taken_at_a_resume_however_it_is_divided(tmp_path):
    path = make_trainer(tmp_path, batch_size=4, use_repa=False).save_checkpoint()
    make_trainer(batch_size=2, gradient_accumulation_steps=2, use_repa=False).load_checkpoint(path)
    make_trainer(batch_size=1, global_batch_size=4, use_repa=False).load_checkpoint(path)
