"""Images of another size than a model was made for: positional tables resized to its patch grid."""

import json
import re

import pytest
import torch
from helpers import make_images, randomise, tiny_model
from tiny_runs import read_latest, read_metrics, run_main, settings

from flextok import FlexTokFromHub
from flextok.evaluation.subjects import load_subject
from flextok.model.utils.posembs import PositionalEmbedding
from flextok.training.config import TrainConfig
from flextok.training.models import load_model
from flextok.utils.checkpoint import CheckpointError
from flextok.utils.config import ConfigError

PUBLISHED = TrainConfig.model_fields["model_name"].default
TABLES = {"encoder": "enc_posemb_module", "decoder": "dec_patches_posemb_module"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model for images of 32 px, that is 4 x 4 patches."""
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    return path


def loaded(folder, **changes) -> FlexTokFromHub:
    return load_model(TrainConfig.from_dict(settings(model=None, model_name=str(folder), **changes)))


@pytest.mark.parametrize("posemb_type", ["sincos", "learnable_sum", "learnable_prod"])
@pytest.mark.parametrize("sizes", [[4, 6], [8, 12], [2, 3]])
def test_a_resized_table_is_what_interpolation_gives(posemb_type, sizes):
    module = randomise(PositionalEmbedding(8, [4, 6], posemb_type, "interpolate"))
    expected = module(sizes)
    trained = module.posembs.requires_grad
    module.resize(sizes)
    torch.testing.assert_close(module(sizes), expected, rtol=1e-6, atol=1e-6)
    assert module.max_sizes == sizes and module.posembs.requires_grad == trained
    assert PositionalEmbedding(8, sizes, posemb_type).posembs.shape == module.posembs.shape


def test_training_at_twice_the_size_from_a_folder_and_using_its_export(folder, tmp_path):
    changes = dict(model=None, model_name=str(folder), img_size=64, posemb_scaling="interpolate", use_repa=False,
                   photos_val_crops=2, val_token_images=0)  # fmt: skip
    run = tmp_path / "run"
    run_main(tmp_path, max_steps=1, run_dir=run, **changes)
    with pytest.raises(CheckpointError, match=r"max_sizes': \[8, 8\]\}, now it is .*: set `model` and img_size back"):
        run_main(tmp_path, max_steps=2, run_dir=run, resume="latest", **{**changes, "img_size": 48})
    run_main(tmp_path, max_steps=2, run_dir=run, resume="latest", **changes)
    assert [record["step"] for record in read_metrics(run) if "train/loss" in record] == [1, 2]
    weights = read_latest(run)["model_state_dict"]
    table = tiny_model().encoder.module_dict["enc_posemb_module"].posembs
    expected = torch.nn.functional.interpolate(table, size=(8, 8), mode="bilinear", align_corners=True)
    assert torch.equal(weights["encoder.module_dict.enc_posemb_module.posembs"], expected)  # a table, not a weight

    config = json.loads((run / "export" / "config.json").read_text())
    for part, name in TABLES.items():
        entry = config[part]["module_dict"][name]
        assert entry["posemb_scaling"] == "interpolate" and entry["max_sizes"] == [8, 8]
    assert config["decoder"]["module_dict"]["dec_registers_posemb_module"]["posemb_scaling"] == "absolute"
    model = FlexTokFromHub.from_pretrained(run / "export")
    for size in (64, 32):
        tokens = model.tokenize(make_images(2, size, size))
        assert model.detokenize(tokens, vae_image_sizes=size // 4, timesteps=1).shape == (2, 3, size, size)
    assert model.detokenize(tokens, timesteps=1).shape == (2, 3, 64, 64)
    assert load_subject(str(run)).img_size == load_subject(str(run / "export")).img_size == 64


def test_larger_images_are_refused_without_the_setting(folder, tmp_path):
    message = "img_size 64 does not fit the model: the positional embeddings reach to [4, 4] positions, but the input "
    with pytest.raises(ConfigError, match=re.escape(message) + ".*set posemb_scaling: interpolate"):
        run_main(tmp_path, check=True, model=None, model_name=str(folder), img_size=64)
