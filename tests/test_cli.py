"""The command line as users call it, in processes of its own."""

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from PIL import Image
from processes import ROOT, Script
from tiny_runs import run_main, settings

from flextok.utils.config import ConfigError
from flextok.utils.errors import UserError


def call(*arguments, **settings) -> Script:
    return Script(ROOT / "train_flextok.py", *arguments, **settings).wait()


def config_file(folder, **changes) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings(checkpoint_dir=str(folder / "runs"), **changes)))
    return file


def test_help_names_every_option_without_importing_torch():
    code = (
        "import sys; sys.argv = ['train_flextok.py', '--help']; sys.modules['torch'] = None; "
        "exec(open('train_flextok.py').read())"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    for option in ("--config", "--set", "--resume", "--device", "--max-steps", "--check", "--run-dir"):
        assert option in result.stdout


def test_a_run_from_another_folder_ends_with_where_everything_is(tmp_path):
    result = call("--config", config_file(tmp_path), "--max-steps", 2, "--run-dir", tmp_path / "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for word in ("model", "trained", "frozen", "photos", "efficientnet_lite0", str(tmp_path / "run")):
        assert word in result.stdout
    closing = result.stdout.split("Done: 2 steps.")[1]
    for name in ("pictures", "curves.png", "metrics.jsonl", "export"):
        assert (tmp_path / "run" / name).exists() and str(tmp_path / "run" / name) in closing


def test_check_knows_the_published_model_without_network_and_writes_and_loads_nothing(tmp_path):
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "timm.py").write_text("raise ImportError('--check must not load an encoder')")
    for i in range(3):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{i}.jpg")
    overrides = (f"data_path={tmp_path}", "dataset_name=celebahq", "use_repa=true", f"checkpoint_dir={tmp_path}/runs")
    result = call("--config", ROOT / "configs/train_celebahq.yaml", "--check",
                  *(word for override in overrides for word in ("--set", override)),
                  HF_HUB_OFFLINE="1", PYTHONPATH=str(blocked))  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "encoder 287.33 M trained, decoder 578.59 M trained, vae 83.82 M frozen" in result.stdout
    assert "dinov2_vitl14" in result.stdout and "37x37 x 1024" in result.stdout
    assert "run folder" in result.stdout and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"repa_encoder_dim": 768}, "repa_encoder_dim is 768, but efficientnet_lite0 gives 1280: set 1280 or null"),
        ({"repa_encoder_type": "dinov2_vitl"}, "repa_encoder_type is 'dinov2_vitl'"),
        ({"repa_image_size": 100}, "takes multiples of 32"),
        ({"repa_encoder_weights": "nowhere.pth"}, "nothing at nowhere.pth"),
        ({"model": {"preset": "d12-d12", "vae_hub_path": None}}, "frozen VAE of random weights is of no use"),
        ({"model": {"preset": "d12-d13"}}, "there is no preset 'd12-d13' (did you mean 'd12-d12'?)"),
        ({"model": {"encoder_depth": "four"}}, "model: "),
        ({"model": {**settings()["model"], "img_size": 16}}, "img_size 32 does not fit the model"),
        ({"repa_layers": [1, 3]}, "the decoder has the layers 0 to 2"),
        ({"dataset_name": "folder"}, "set data_path to the folder that holds your images"),
        ({"img_size": 36}, "img_size is 36, expected a multiple of 8"),
        ({"dataset_name": "folder", "data_path": "/nowhere"}, "/nowhere"),
        ({"model": None, "model_name": "./nowhere"}, "there is no file or folder ./nowhere"),
    ],
)
def test_bad_settings_are_refused_before_any_work(tmp_path, changes, message):
    with pytest.raises((UserError, OSError), match=re.escape(message)):
        run_main(tmp_path, check=True, **changes)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "cuda"], "use --device cpu"),
        (["--device", "gpu"], "--device is 'gpu', expected cpu, cuda or cuda:N"),
        (["--max-steps", "0"], "--max-steps is 0"),
        (["--resume", "nowhere.pt"], "there is no checkpoint at nowhere.pt"),
        (["--set", "batch_size=many"], "batch_size is 'many'"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_1(tmp_path, arguments, message):
    result = call("--config", config_file(tmp_path), "--check", *arguments, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 1
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def test_an_unreachable_hub_model_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    with pytest.raises(ConfigError, match="neither a folder, nor in the Hugging Face cache, nor can it be downloaded"):
        run_main(tmp_path, model=None, model_name="EPFL-VILAB/flextok_d12_d12_in1k", use_repa=False)
    assert list((tmp_path / "runs").iterdir()) == []  # nothing was written


def test_wandb_without_login_goes_offline_and_gets_the_metrics(tmp_path):
    """No key, no terminal, no network: the run neither asks nor waits."""
    config = config_file(tmp_path, use_wandb=True, use_repa=False)
    environment = {"WANDB_API_KEY": None, "WANDB_MODE": None, "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    result = call("--config", config, "--max-steps", 1, "--run-dir", tmp_path / "run", **environment)
    assert result.returncode == 0, result.stderr
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb")) and "offline" in result.stderr


def test_a_run_without_the_wandb_package_still_trains(tmp_path):
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "wandb.py").write_text("raise ImportError('No module named wandb')")
    config = config_file(tmp_path, use_wandb=True, use_repa=False)
    result = call("--config", config, "--max-steps", 1, "--run-dir", tmp_path / "run", PYTHONPATH=str(blocked))
    assert result.returncode == 0, result.stderr
    assert "wandb is not installed" in result.stderr and (tmp_path / "run" / "metrics.jsonl").stat().st_size


def test_wandb_gets_the_documented_names_and_one_run_id_across_a_resume(tmp_path):
    """A stand-in package records the calls, whose signatures are W&B's own."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "wandb.py").write_text(
        textwrap.dedent("""
        import json, os
        def note(*what):
            with open(os.environ["WANDB_NOTES"], "a") as file:
                file.write(json.dumps(what, default=str) + "\\n")
        class Settings:
            def __init__(self, **settings): pass
        class Image:
            def __init__(self, path): assert os.path.isfile(path)
        class Run:
            dir, id = "/tmp/none", None
            def define_metric(self, name, step_metric=None): note("define", name, step_metric)
            def log(self, metrics): note("log", metrics)
            def finish(self): note("finish")
        def login(prompt, verify): return True
        def setup(settings):
            return type("Setup", (), {"settings": type("Found", (), {"mode": os.environ["WANDB_MODE"]})})
        def init(project, name, tags, config, id, dir, mode, resume, settings):
            note("init", project, name, tags, id, mode, resume, config["use_repa"])
            Run.id = id or "abc123"
            return Run()
    """)
    )
    notes = tmp_path / "notes.jsonl"
    environment = dict(PYTHONPATH=str(package), WANDB_NOTES=str(notes), WANDB_MODE="offline")
    config = config_file(tmp_path, use_wandb=True, wandb_project="p", wandb_tags=["t"])
    for steps, resume in ((1, []), (2, ["--resume", "latest"])):
        result = call("--config", config, "--max-steps", steps, "--run-dir", tmp_path / "run", *resume, **environment)
        assert result.returncode == 0, result.stderr
    calls = [json.loads(line) for line in notes.read_text().splitlines()]
    assert [c for c in calls if c[0] == "init"] == [
        ["init", "p", "tiny", ["t"], None, "offline", "allow", True],
        ["init", "p", "tiny", ["t"], "abc123", "offline", "allow", True],
    ]
    logged = [c[1] for c in calls if c[0] == "log"]
    assert [m["train/step"] for m in logged if "train/loss" in m] == [1, 2]
    assert any("visualizations/flexible_length" in m for m in logged)
    names = {key for m in logged for key in m}
    assert {"train/loss", "train/flow_loss", "train/repa_loss", "train/repa_weight", "train/lr", "train/grad_norm",
            "train/images_per_second", "train/data_wait", "train/epoch", "val/loss", "val/flow_loss",
            "val/repa_loss"} <= names  # fmt: skip


@pytest.mark.parametrize("login", ["localhost:9", "api.wandb.ai"])
def test_wandb_is_asked_for_its_server_and_login(tmp_path, login):
    """`wandb login --host` leaves the server in W&B's settings file, and the key in netrc under its name and port."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        (tmp_path / ".config" / "wandb").mkdir(parents=True)
        (tmp_path / ".config" / "wandb" / "settings").write_text(f"[default]\nbase_url = http://localhost:{port}\n")
        machine = f"machine {login.replace(':9', f':{port}')} login user password {'a' * 40}\n"
        (tmp_path / "netrc").write_text(machine)
        os.chmod(tmp_path / "netrc", 0o600)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
        code = "import wandb; from flextok.training.monitor import wandb_mode; print(wandb_mode(wandb))"
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.split()[-1] == ("online" if login == "localhost:9" else "offline"), result.stderr
