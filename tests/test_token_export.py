"""Tokens of a data set in shards: what they are, how they are read, resumed, shared out and refused."""

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from helpers import pillow_square, save_tiny_vae, tiny_model
from PIL import Image
from safetensors.numpy import load_file
from test_parallel import finished, together
from tiny_runs import make_trainer
from torch.utils.data import DataLoader

from flextok.data import tokens as command
from flextok.data.token_shards import TokenShardsError, token_dtype
from flextok.data.tokens import TokenShards
from flextok.utils.errors import UserError

N_IMAGES = 7


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def model_folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Seven pictures of noise, wider than high."""
    path = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (N_IMAGES, 50, 60, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).resize((120, 100)).save(path / f"{i}.png")
    return path


def export(model_folder, output, *options, data=None) -> TokenShards:
    options = [*options, "--data", str(data)] if data is not None else options
    command.main(["--model", str(model_folder), "--output", str(output), "--device", "cpu", "--num-workers", "0",
                  "--batch-size", "4", "--shard-size", "3", *options])  # fmt: skip
    return TokenShards(output)


def all_tokens(shards: TokenShards) -> torch.Tensor:
    return torch.stack([item["tokens"] for item in shards])


def pictures(folder, size=32) -> torch.Tensor:
    return torch.stack([pillow_square(path, size) for path in sorted(folder.iterdir())])


# What the tokens are


def test_tokens_are_those_of_tokenize_in_shards_of_the_smallest_integers(model, model_folder, images, tmp_path, capsys):
    shards = export(model_folder, tmp_path / "tokens", data=images)
    assert "3 of 3 shards to write" in capsys.readouterr().out
    assert torch.equal(all_tokens(shards), torch.cat(model.tokenize(pictures(images)))[:, None])
    assert shards[2]["tokens"].shape == (1, 8) and shards[2]["tokens"].dtype == torch.long
    assert [item["index"] for item in shards] == list(range(N_IMAGES)) and "label" not in shards[0]
    files = [load_file(tmp_path / "tokens" / f"tokens-{i:05}.safetensors") for i in range(3)]
    assert [list(file["tokens"].shape) for file in files] == [[3, 1, 8], [3, 1, 8], [1, 1, 8]]
    assert files[0]["tokens"].dtype == np.uint16 and files[2]["index"].tolist() == [6]
    assert token_dtype(1 << 16) == np.uint16 and token_dtype((1 << 16) + 1) == np.int32
    assert token_dtype(1 << 31) == np.int32 and token_dtype((1 << 31) + 1) == np.int64
    meta = json.loads((tmp_path / "tokens" / "meta.json").read_text())
    assert meta["levels"] == [8, 8, 8, 5, 5, 5] and meta["codebook_size"] == 64_000
    assert meta["tokens_per_image"] == 8 and meta["views"] == ["centre"] and meta["img_size"] == 32
    assert [Path(name).name for name in shards.names] == [f"{i}.png" for i in range(N_IMAGES)]


def test_views_are_crops_and_then_their_mirror_images(model, model_folder, images, tmp_path):
    shards = export(model_folder, tmp_path, "--flips", "--crops", "5", data=images)
    full = pictures(images, 35)
    views = [full[:, :, y : y + 32, x : x + 32] for y, x in [(1, 1), (0, 0), (0, 3), (3, 0), (3, 3)]]
    views += [view.flip(-1) for view in views]
    assert torch.equal(all_tokens(shards), torch.stack([torch.cat(model.tokenize(view)) for view in views], dim=1))
    assert len(shards.meta["views"]) == 10 and shards.meta["views"][-1].endswith(", mirrored")


@pytest.mark.parametrize("form", ["safetensors", "parquet"])
def test_an_image_without_a_label_has_minus_one_and_is_counted(model_folder, images, tmp_path, form):
    labels = ["10", "-1", "9", "", "10", "9", "3"]  # of the first shard's images one, of the second's another
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        for path, label in zip(sorted(images.iterdir()), labels, strict=True):
            tar.add(path, path.name)
            info = tarfile.TarInfo(f"{path.stem}.cls")
            info.size = len(label)
            tar.addfile(info, io.BytesIO(label.encode()))
    data = ["--dataset-name", "webdataset", "--format", form]
    for _ in range(2):  # the second goes on
        shards = export(model_folder, tmp_path / "tokens", *data, data=tmp_path / "data.tar")
        assert [item["label"] for item in shards] == [10, -1, 9, -1, 10, 9, 3] and shards.meta["unlabelled"] == 2
        assert shards.meta["has_labels"] and shards.meta["classes"] == {i: i for i in ("3", "9", "10")}
        next((tmp_path / "tokens").glob("tokens-00001.*")).unlink()


def test_what_a_vae_samples_does_not_depend_on_batches(tmp_path, images):
    save_tiny_vae(tmp_path / "vae")
    model = tiny_model(vae="stable_diffusion", vae_hub_path=str(tmp_path / "vae"), latent_channels=4)
    model.save_pretrained(tmp_path / "model")
    many, one = (
        all_tokens(export(tmp_path / "model", tmp_path / n, "--batch-size", n, "--flips", data=images))
        for n in ("8", "1")
    )
    assert torch.equal(many, one) and not torch.equal(many[:, 0], many[:, 1])


def test_a_run_folder_is_a_model_too(tmp_path, images):
    trainer = make_trainer(tmp_path / "run", use_repa=False, val_token_images=0)
    trainer.save_checkpoint()
    shards = export(tmp_path / "run", tmp_path / "tokens", data=images)
    assert torch.equal(all_tokens(shards)[:, 0], torch.cat(trainer.model.tokenize(pictures(images))))


# Reading


def test_parquet_has_a_row_for_each_view_and_reads_as_the_same(model_folder, images, tmp_path):
    plain = export(model_folder, tmp_path / "plain", "--flips", data=images)
    shards = export(model_folder, tmp_path / "parquet", "--flips", "--format", "parquet", data=images)
    assert torch.equal(all_tokens(shards), all_tokens(plain)) and [item["index"] for item in shards] == list(range(7))
    rows = pyarrow.parquet.read_table(tmp_path / "parquet" / "tokens-00001.parquet").to_pylist()
    assert [(row["index"], row["view"]) for row in rows] == [(i, view) for i in (3, 4, 5) for view in (0, 1)]
    assert rows[3]["tokens"] == plain[4]["tokens"][1].tolist()


def test_shards_are_a_dataset_for_loading_processes_and_refused_where_some_are_missing(model_folder, images, tmp_path):
    shards = export(model_folder, tmp_path, data=images)
    batches = list(DataLoader(shards, batch_size=5, num_workers=2))
    assert torch.equal(torch.cat([batch["tokens"] for batch in batches]), all_tokens(shards))
    (tmp_path / "tokens-00001.safetensors").unlink()
    with pytest.raises(TokenShardsError, match="1 of 3 shards are missing in .*, the first tokens-00001.safetensors"):
        TokenShards(tmp_path)


# Stopping, sharing, refusing


def test_tokens_of_something_else_in_the_folder_are_refused_by_one_sentence(model_folder, images, tmp_path):
    output = tmp_path / "tokens"
    export(model_folder, output, data=images)
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    for model, options, key in ((tmp_path / "other", [], "weights"), (model_folder, ["--flips"], "views")):
        with pytest.raises(UserError, match=f"holds tokens of .* with {key}.*: give another --output"):
            export(model, output, *options, data=images)
    assert len(list(output.glob("tokens-*"))) == 3


def test_only_shards_that_are_missing_are_computed(model_folder, images, tmp_path, capsys):
    """Under other names of the same model and data, too."""
    before = all_tokens(export(model_folder, tmp_path / "tokens", data=images))
    kept, lost = (tmp_path / "tokens" / f"tokens-0000{i}.safetensors" for i in (0, 1))
    changed = kept.stat().st_mtime_ns
    lost.unlink()
    for folder, name in ((model_folder, "model"), (images, "images")):
        (tmp_path / name).symlink_to(folder)
    assert torch.equal(all_tokens(export(tmp_path / "model", tmp_path / "tokens", data=tmp_path / "images")), before)
    assert kept.stat().st_mtime_ns == changed and "1 of 3 shards to write" in capsys.readouterr().out


def test_two_processes_write_the_shards_of_one(model_folder, images, tmp_path):
    alone = all_tokens(export(model_folder, tmp_path / "one", data=images))
    command = ["--model", model_folder, "--data", images, "--output", tmp_path / "two", "--device", "cpu"]
    output = finished(together("-m", "flextok.data.tokens", *command, "--shard-size", "3", "--num-workers", "0"))
    assert torch.equal(all_tokens(TokenShards(tmp_path / "two")), alone)
    assert output.count("tokens of 7 of 7 images") == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "there is nothing to tokenize: give --data FOLDER"),
        (("--data", "/nowhere"), "data_path is /nowhere, which does not exist"),
        (("--dataset-name", "digits", "--model", "./nowhere"), "--model: there is nothing at nowhere"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(model_folder, tmp_path, options, message):
    with pytest.raises((UserError, OSError), match=re.escape(message)):
        export(model_folder, tmp_path / "tokens", *options)
    assert not (tmp_path / "tokens").exists()


def test_codes_above_two_to_the_31_are_exported_as_they_are(images, tmp_path):
    model = tiny_model(fsq_levels=[64, 64, 64, 64, 64, 32])
    model.save_pretrained(tmp_path / "model")
    expected = torch.cat(model.tokenize(pictures(images)))
    assert expected.max() >= 1 << 31
    for form in ("safetensors", "parquet"):
        shards = export(tmp_path / "model", tmp_path / form, "--format", form, data=images)
        assert torch.equal(all_tokens(shards)[:, 0], expected)
