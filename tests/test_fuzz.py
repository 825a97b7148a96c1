"""Damaged and hostile configs and checkpoints: only documented errors, and nothing in them is run."""

import contextlib
import json
import pickle

import pytest
import torch
from helpers import tiny_config, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from tiny_runs import make_trainer
from tiny_runs import settings as run_settings

from flextok import FlexTokFromHub
from flextok.data.sources import build_datasets
from flextok.training.config import TrainConfig, load_config
from flextok.training.models import load_model
from flextok.utils.checkpoint import CheckpointError
from flextok.utils.config import ConfigError

STATE = tiny_model().state_dict()
LOADERS = {"config.json": FlexTokFromHub.from_pretrained, "run.yaml": lambda folder: load_config(folder / "run.yaml")}
TEXTS = {
    "config.json": json.dumps(tiny_config()),
    "run.yaml": "batch_size: 8\nmodel:\n  head_dim: 2\nrepa_layers: [1]\n",
}


@pytest.mark.parametrize("name", LOADERS)
@settings(deadline=None, derandomize=True, max_examples=60, database=None, suppress_health_check=list(HealthCheck))
@given(start=st.floats(0, 1), end=st.floats(0, 1), piece=st.text(max_size=3))
def test_a_file_of_which_a_piece_is_missing_or_replaced_is_read_or_refused(tmp_path_factory, name, start, end, piece):
    folder, text = tmp_path_factory.getbasetemp(), TEXTS[name]
    save_file(STATE, folder / "model.safetensors")
    damaged = text[: int(start * len(text))] + piece + text[int(end * len(text)) :]
    (folder / name).write_bytes(damaged.encode(errors="surrogatepass"))
    with contextlib.suppress(ConfigError, CheckpointError):
        LOADERS[name](folder)


@pytest.fixture(scope="module")
def trainer_and_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder, use_repa=False, use_ema=True)
    trainer.train(max_steps=1)
    return trainer, folder / "checkpoints" / "latest.pt"


@pytest.mark.parametrize(
    "place, value",
    [
        *(((key,), None) for key in ("global_step", "model_state_dict")),
        (("optimizer_state_dict", "state", 0, "exp_avg"), torch.zeros(3)),
        (("ema_model_state_dict", "decoder.module_dict.dec_to_patches.proj.weight"), torch.zeros(1)),
        (("model_state_dict", "vae.more"), "text"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_checkpoint_that_lacks_something_or_holds_what_does_not_fit_is_refused(
    trainer_and_checkpoint, tmp_path, place, value
):
    trainer, path = trainer_and_checkpoint
    checkpoint = node = torch.load(path, weights_only=True)
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    if value is None:
        del node[place[-1]]
    torch.save(checkpoint, tmp_path / "latest.pt")
    with pytest.raises(CheckpointError, match=place[0] if value is None else "latest.pt"):
        trainer.load_checkpoint(tmp_path / "latest.pt")


def test_nothing_in_a_model_or_data_folder_is_run(tmp_path):
    trap = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"

    class Trap:
        def __reduce__(self):
            return exec, (trap,)

    folder, images = tmp_path / "model", tmp_path / "images"
    tiny_model().save_pretrained(folder)
    images.mkdir()
    for name in ("hubconf.py", "__init__.py", "flextok.py"):
        (folder / name).write_text(trap)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    Image.new("RGB", (32, 32)).save(images / "0.png")
    (images / "9.jpg").write_bytes(pickle.dumps(Trap()))
    config = TrainConfig.from_dict(
        run_settings(model=None, model_name=str(folder), dataset_name="folder", data_path=str(images),
                     val_fraction=0.0, use_repa=False)
    )  # fmt: skip
    dataset, _ = build_datasets(config)
    assert len(dataset) == 2 and dataset[1]["index"] == 0
    load_model(config)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError):
        load_model(config)
    (folder / "config.yaml").write_text(f"a: !!python/object/apply:os.system ['touch {tmp_path}/ran']")
    with pytest.raises(ConfigError):
        load_config(folder / "config.yaml")
    assert not (tmp_path / "ran").exists()
