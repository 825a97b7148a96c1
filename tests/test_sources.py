"""Sources of images: Hugging Face datasets, tar shards, folders of classes; how images are cropped."""

import io
import json
import os
import tarfile

import datasets
import numpy as np
import pytest
import torch
import webdataset
import yaml
from PIL import Image
from processes import train
from tiny_runs import make_trainer, read_latest, read_metrics, run_main, same, settings

from flextok.benchmark.processes import free_port
from flextok.data.images import ImageFolderDataset, adm_image, image_to_tensor, random_window
from flextok.data.shards import ShardImages, class_names, load_indices, shard_paths
from flextok.data.sources import build_datasets
from flextok.training.config import TrainConfig
from flextok.utils.config import ConfigError
from flextok.utils.errors import UserError

N = 24


def picture(i: int, size=(40, 36)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def encoded(i: int) -> bytes:
    buffer = io.BytesIO()
    picture(i).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module", autouse=True)
def hub_cache(tmp_path_factory):
    """No tests of a machine's own cache, and none that writes there."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        yield


def rows(n: int, first: int = 0) -> "datasets.Dataset":
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "id": datasets.Value("string"),
    }
    values = {
        "image": [{"bytes": encoded(first + i), "path": None} for i in range(n)], "label": [i % 2 for i in range(n)],
        "id": [f"n{i}" for i in range(n)],
    }  # fmt: skip
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def write_parquet(folder, n=N, n_val=0):
    folder.mkdir(exist_ok=True)
    rows(n).to_parquet(folder / "train-00000-of-00001.parquet")
    if n_val:
        rows(n_val, first=100).to_parquet(folder / "validation-00000-of-00001.parquet")
    return dict(dataset_name="hf", data_path=str(folder))


def write_shards(folder, n=N, per_shard=10, label=lambda i: {"cls": i % 3}):
    folder.mkdir(exist_ok=True)
    with webdataset.ShardWriter(f"{folder}/train-%06d.tar", maxcount=per_shard, verbose=0) as writer:
        for i in range(n):
            writer.write({"__key__": f"{i:05}", "png": encoded(i), **label(i)})
    return dict(dataset_name="webdataset", data_path=f"{folder}/train-{{000000..{(n - 1) // per_shard:06}}}.tar")


def write_classes(folder, n=N):
    for i in range(n):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / "ab"[i % 2] / f"{i:03}.png")
    return dict(dataset_name="imagefolder", data_path=str(folder))


SOURCES = {"parquet": write_parquet, "shards": write_shards, "classes": write_classes}


def built(**changes):
    return build_datasets(TrainConfig.from_dict({"img_size": 32, "use_augmentation": False, **changes}))


@pytest.mark.parametrize("write", SOURCES.values(), ids=SOURCES)
def test_every_image_is_served_once_as_from_a_file(tmp_path, write):
    train, val = built(**write(tmp_path / "data"), val_fraction=0.25)
    assert (len(train), len(val)) == (18, 6)
    served = {d[i]["image"].numpy().tobytes() for d in (train, val) for i in range(len(d))}
    assert served == {image_to_tensor(picture(i), 32).numpy().tobytes() for i in range(N)}
    assert len({train.name(i) for i in range(18)}) == 18
    again, _ = built(**write(tmp_path / "again"), val_fraction=0.25)
    assert again.identity() == train.identity() and again.content_probe() == train.content_probe()
    assert train.identity() != val.identity() and train.content_probe() != val.content_probe()


@pytest.mark.parametrize("write", SOURCES.values(), ids=SOURCES)
def test_a_run_resumes_exactly_and_fills_a_cache(tmp_path, write):
    changes = dict(write(tmp_path / "data"), repa_cache=True, cache_dir=str(tmp_path / "cache"), num_epochs=1,
                   num_workers=2, repa_encoder_dtype="fp32", val_fraction=0.1)  # fmt: skip
    run_main(tmp_path, run_dir=tmp_path / "whole", **changes)
    run_main(tmp_path, run_dir=tmp_path / "parts", max_steps=2, **changes)
    run_main(tmp_path, run_dir=tmp_path / "parts", resume="latest", **changes)
    whole, parts = (read_latest(tmp_path / name) for name in ("whole", "parts"))
    assert same(whole["model_state_dict"], parts["model_state_dict"]) and whole["global_step"] == 6
    losses = [
        [r["train/loss"] for r in read_metrics(tmp_path / name) if "train/loss" in r] for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    run_main(tmp_path, run_dir=tmp_path / "uncached", **{**changes, "repa_cache": False, "num_workers": 0})
    uncached = [r["train/loss"] for r in read_metrics(tmp_path / "uncached") if "train/loss" in r]
    assert uncached == pytest.approx(losses[0], rel=1e-3)  # features are cached in fp16


@pytest.mark.parametrize("write", SOURCES.values(), ids=SOURCES)
def test_two_processes_are_one(tmp_path, write):
    changes = dict(write(tmp_path / "data"), use_repa=False, num_epochs=1, global_batch_size=4)
    losses = []
    for n, batch_size in ((1, 4), (2, 2)):
        folder = tmp_path / f"of {n}"
        folder.mkdir()
        (folder / "tiny.yaml").write_text(yaml.safe_dump(settings(**{**changes, "batch_size": batch_size})))
        job = dict(WORLD_SIZE=str(n), MASTER_ADDR="localhost", MASTER_PORT=str(free_port()), LOCAL_WORLD_SIZE=str(n))
        options = [folder / "tiny.yaml", "--run-dir", folder / "run"]
        for process in [train(*options, RANK=str(i), LOCAL_RANK=str(i), **job) for i in range(n)]:
            assert process.wait().returncode == 0, process.stderr
        losses.append([r["train/loss"] for r in read_metrics(folder / "run") if "train/loss" in r])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 6


@pytest.mark.parametrize("write", SOURCES.values(), ids=SOURCES)
def test_labels_and_classes(tmp_path, write):
    train, val = built(**write(tmp_path / "data"), val_fraction=0.25)
    assert train.classes == val.classes and {train.label(i) for i in range(18)} == set(range(len(train.classes)))
    expected = {image_to_tensor(picture(i), 32).numpy().tobytes(): i % len(train.classes) for i in range(N)}
    assert all(d.label(i) == expected[d[i]["image"].numpy().tobytes()] for d in (train, val) for i in range(len(d)))


# ------------------------------------------------------------------------------------------------------ Hugging Face


def test_a_validation_split_is_found_or_named(tmp_path):
    settings = write_parquet(tmp_path / "data", n_val=5)
    train, val = built(**settings)
    assert (len(train), len(val)) == (N, 5)
    assert len(built(**settings, train_split="validation", val_split="train")[1]) == N
    other = write_parquet(tmp_path / "other", n=3)["data_path"]
    assert len(built(**settings, val_path=other)[1]) == 3
    with pytest.raises(ConfigError, match="train_split and val_split are both 'train'"):
        built(**settings, val_split="train")
    assert len(built(**settings, train_split="validation")[0]) == 4  # the rest of it validates
    rows(7).save_to_disk(tmp_path / "one")
    train, val = built(dataset_name="hf", data_path=str(tmp_path / "one"), val_fraction=0, label_column="id")
    assert len(train) == 7 and val is None and train.classes == [f"n{i}" for i in range(7)] and train.label(3) == 3


def test_classes_of_all_splits_are_those_of_the_training_one(tmp_path):
    for name, chosen in (("known", [4, 2, 5]), ("unknown", [8])):
        settings = write_parquet(tmp_path / name, n=6)
        rows(9).select(chosen).to_parquet(tmp_path / name / "validation-00000-of-00001.parquet")
    known = dict(settings, data_path=str(tmp_path / "known"), label_column="id")
    train, val = built(**known)
    assert train.classes == val.classes == [f"n{i}" for i in range(6)]
    assert [val.label(i) for i in range(3)] == [4, 2, 5]
    with pytest.raises(ConfigError, match="the validation images have the class 'n8'"):
        built(**settings, label_column="id")


def test_the_identity_of_rows_is_of_their_images_and_not_of_their_storage(tmp_path):
    rows(N).save_to_disk(tmp_path / "one")
    rows(N).save_to_disk(tmp_path / "four", num_shards=4)
    rows(N).select(range(N - 1, -1, -1)).save_to_disk(tmp_path / "reversed")
    names = ("one", "four", "reversed")
    one, four, back = (built(dataset_name="hf", data_path=str(tmp_path / name), val_fraction=0)[0] for name in names)
    assert one.content_probe() == four.content_probe() != back.content_probe()
    assert one.identity() == four.identity()


def test_a_broken_row_is_skipped_and_named(tmp_path):
    values = [{"bytes": encoded(0), "path": None}, {"bytes": b"broken", "path": None}, None]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": values}, features=features).save_to_disk(tmp_path / "data")
    train, _ = built(dataset_name="hf", data_path=str(tmp_path / "data"), val_fraction=0)
    first, second = train[1]["broken"]
    assert train[1]["index"] == 0 and "row 1 of" in first.path and "not a JPEG" in first.reason
    assert second.reason == "the row has no image"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_column": "label"}, "image_column is 'label', a column of ClassLabel.*expected images"),
        (
            {"image_column": "imgae"},
            r"image_column is 'imgae' \(did you mean 'image'\?\), but the columns are image, label",
        ),
        ({"label_column": "lable"}, r"label_column is 'lable' \(did you mean 'label'\?\)"),
        ({"train_split": "training"}, "train_split is 'training', but .* has the splits train"),
        ({"val_split": "test"}, "val_split is 'test', but .* has the splits train"),
        ({"data_path": "someone/no-such-dataset"}, "no folder someone/no-such-dataset, and no dataset.*hf download"),
        ({"data_path": ["a", "b"]}, "data_path is a list"),
    ],
)
def test_a_dataset_that_does_not_fit_is_a_clear_error(tmp_path, changes, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://localhost:9")  # nobody is there
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        built(**{**write_parquet(tmp_path / "data"), **changes})


def test_a_folder_without_data_and_a_dataset_without_images_are_clear_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty': it cannot be read as a dataset"):
        built(dataset_name="hf", data_path=str(tmp_path / "empty"))
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(ConfigError, match="no column of images: set image_column to one of text"):
        built(dataset_name="hf", data_path=str(tmp_path / "text"))


# ------------------------------------------------------------------------------------------------------------ shards


def index_of(folder, tmp_path):
    paths = shard_paths(str(folder))
    return paths, load_indices(paths, tmp_path / "cache")


def test_an_index_is_built_once_and_anew_when_its_shard_changes(tmp_path, monkeypatch):
    write_shards(tmp_path / "data")
    paths, _ = index_of(tmp_path / "data", tmp_path)
    assert all(path.with_name(f"{path.name}.index.npz").is_file() for path in paths)
    monkeypatch.setattr("flextok.data.shards.read_shard", lambda path: 1 / 0)
    index_of(tmp_path / "data", tmp_path)
    monkeypatch.undo()
    write_shards(tmp_path / "data", n=12)
    train, _ = built(dataset_name="webdataset", data_path=[str(path) for path in paths[:2]], val_fraction=0)
    assert len(train) == 12 and torch.equal(train[11]["image"], image_to_tensor(picture(11), 32))


@pytest.mark.skipif(os.getuid() == 0, reason="everything is writable for root")
def test_the_index_of_shards_in_a_folder_that_is_not_for_writing_is_in_the_cache(tmp_path):
    write_shards(tmp_path / "data")
    (tmp_path / "data").chmod(0o555)
    assert len(index_of(tmp_path / "data", tmp_path)[1]) == 3
    (tmp_path / "data").chmod(0o755)
    assert len(list((tmp_path / "cache").rglob("*.index.npz"))) == 3


@pytest.mark.parametrize(
    "label, classes",
    [
        (lambda i: {"json": {"label": ["b", "a"][i % 2]}}, ["a", "b"]),
        (lambda i: {"cls": 2 * (i % 2)}, ["0", "1", "2"]),
        (lambda i: {"cls": f"{5 * (i % 2):03}"}, ["000", "005"]),
        (lambda i: {"json": [1, 2]}, None),
        (lambda i: {"txt": "a caption"}, None),
    ],
)
def test_labels_are_numbers_or_names_in_cls_or_json(tmp_path, label, classes):
    train, val = built(**write_shards(tmp_path / "data", label=label))
    assert train.classes == val.classes == classes
    assert {train.label(i) for i in range(len(train))} == ({None} if classes is None else {0, len(classes) - 1})


def write_tar(path, names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(encoded(0))
            tar.addfile(member, io.BytesIO(encoded(0)))


@pytest.mark.parametrize(
    "names, message",
    [
        (["a.png", "b.png", "a.png"], "two samples have the key 'a'"),
        (["../a.png"], "climbs out of its folder"),
        (["/a.png"], "climbs out of its folder"),
        (["a.txt"], "hold no images: expected files jpg, jpeg, png, webp"),
    ],
)
def test_a_tar_that_is_no_shard_is_refused_by_name(tmp_path, names, message):
    write_tar(tmp_path / "x.tar", names)
    with pytest.raises(UserError, match=rf"x\.tar.*{message}"):
        built(dataset_name="webdataset", data_path=str(tmp_path / "x.tar"))


def test_a_shard_that_is_cut_is_refused_and_costs_nothing(tmp_path):
    settings = write_shards(tmp_path / "data")
    shard = tmp_path / "data" / "train-000001.tar"
    content = shard.read_bytes()
    header = content.index(b"00015.png")
    damaged = content[:header] + b"x" + bytes(200) + content[header + 201 :]
    for cut in (content[: len(content) // 2], content[:header], content[: header + 200], damaged):
        shard.write_bytes(cut)
        with pytest.raises(UserError, match="train-000001.tar cannot be read as a shard .*copy it again"):
            built(**settings)
    shard.write_bytes(content)
    assert len(built(**settings, val_fraction=0)[0]) == N


@pytest.mark.parametrize(
    "path, message",
    [
        ("nowhere-{0..3}.tar", "there are no shards nowhere-0.tar and 3 more"),
        ("https://x/{0..3}.tar", "mount or copy"),
        ("train-{000..146.tar", "expected braces as in"),
    ],
)
def test_shards_that_are_not_there_are_named(path, message):
    with pytest.raises((UserError, OSError), match=message):
        built(dataset_name="webdataset", data_path=path)


def test_labels_of_validation_shards_have_to_be_known(tmp_path):
    settings = write_shards(tmp_path / "train", label=lambda i: {"cls": "ab"[i % 2]})
    val = write_shards(tmp_path / "val", n=4, label=lambda i: {"cls": "c"})["data_path"]
    with pytest.raises(ConfigError, match="the label 'c' of val_path is none of the 2 classes"):
        built(**settings, val_path=val)


# ------------------------------------------------------------------------------------------------------ class folders


def test_validation_images_are_never_trained_on_and_classes_are_those_of_all(tmp_path, caplog):
    settings = write_classes(tmp_path / "data" / "images")
    (tmp_path / "data" / "images" / "c").mkdir()
    picture(99).save(tmp_path / "data" / "images" / "c" / "99.png")
    train, val = built(**settings | dict(data_path=str(tmp_path / "data")), val_fraction=0.9)
    assert train.classes == val.classes == ["a", "b", "c"] and len(train) + len(val) == N + 1
    inside = dict(settings, dataset_name="folder", val_path=str(tmp_path / "data" / "images" / "b"))
    train, val = built(**inside)
    assert len(train) == 13 and len(val) == 12 and not set(train.paths) & set(val.paths)
    assert "its 12 files are not trained on" in caplog.text
    with pytest.raises(ConfigError, match="nothing left to train on"):
        built(**settings, val_path=settings["data_path"])
    with pytest.raises(ConfigError, match="val_path is a list, which dataset_name: imagefolder does not take"):
        built(**settings, val_path=["a"])


def test_images_beside_the_class_folders_are_refused(tmp_path):
    settings = write_classes(tmp_path / "data")
    picture(0).save(tmp_path / "data" / "x.png")
    with pytest.raises(ConfigError, match=r"x\.png lies in .* itself: expected a sub-folder for each"):
        built(**settings)
    (tmp_path / "data" / "x.png").unlink()
    (tmp_path / "val" / "c").mkdir(parents=True)
    picture(0).save(tmp_path / "val" / "c" / "0.png")
    with pytest.raises(ConfigError, match="val_path has the class c, which data_path has no folder of"):
        built(**settings, val_path=str(tmp_path / "val"))


# ------------------------------------------------------------------------------------------------------------- crops


def test_adm_crop_halves_by_box_and_then_scales(tmp_path):
    image = picture(0, size=(200, 136))
    given = np.asarray(adm_image(image, 32), dtype=float)
    halved = np.asarray(image, dtype=float).reshape(68, 2, 100, 2, 3).mean((1, 3)) + 0.5
    halved = np.floor(halved).reshape(34, 2, 50, 2, 3).mean((1, 3)) + 0.5  # 136 -> 68 -> 34, which is less than 2 * 32
    scaled = Image.fromarray(halved.astype(np.uint8)).resize((round(50 * 32 / 34), 32), Image.Resampling.BICUBIC)
    expected = np.asarray(scaled.crop((7, 0, 39, 32)), dtype=float)
    assert given.shape == (32, 32, 3) and np.abs(given - expected).max() <= 4  # Pillow rounds in between


def test_random_windows_have_the_area_and_shape_that_is_asked_for():
    numbers = np.random.default_rng(0)
    for width, height in ((300, 200), (200, 300)):
        for _ in range(200):
            left, top, right, bottom = random_window(
                (width, height), (0.25, 0.5), (0.5, 2), lambda name: numbers.random()
            )
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert 0.24 < (right - left) * (bottom - top) / (width * height) < 0.51
            assert 0.48 < (right - left) / (bottom - top) < 2.1
    assert random_window((1000, 10), (0.9, 1.0), (0.75, 1.33), lambda name: 0.5) == (494, 0, 507, 10)


@pytest.mark.parametrize("crop", ["center", "adm", "random", "random_resized"])
def test_crops_follow_from_seed_step_and_position_alone(tmp_path, crop):
    picture(0, size=(90, 50)).save(tmp_path / "0.png")
    dataset = ImageFolderDataset([tmp_path / "0.png"], 32, crop=crop, seed=1)
    images = [dataset[0, step, 3]["image"] for step in range(6)]
    assert (len({image.numpy().tobytes() for image in images}) > 3) == crop.startswith("random")
    assert torch.equal(dataset[0, 2, 3]["image"], images[2]) and images[0].shape == (3, 32, 32)
    assert torch.equal(dataset[0]["image"], dataset[0]["image"])
    others = {ImageFolderDataset([tmp_path / "0.png"], 32, crop=c).identity() for c in ("center", "adm", "random")}
    assert len(others | {ImageFolderDataset([tmp_path / "0.png"], 32, crop="random_resized").identity()}) == 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_cached_crops_are_those_that_are_served(tmp_path, num_workers):
    """With the encoder's features cached, and the images' own crops, losses are those of computing the features."""
    changes = dict(write_classes(tmp_path / "data"), crop="random_resized", cache_crops=3, num_workers=num_workers,
                   cache_dir=str(tmp_path / "cache"), repa_cache=True, repa_encoder_dtype="fp32", num_epochs=3,
                   val_fraction=0.1)  # fmt: skip
    trainer = make_trainer(tmp_path / "run", **changes)
    dataset = trainer.train_loader.dataset
    assert dataset.caches["features"].flips == 3
    seen = {dataset[5, step, 2]["view"]: dataset[5, step, 2]["image"] for step in range(30)}
    assert seen.keys() == {0, 1, 2} and len({image.numpy().tobytes() for image in seen.values()}) == 3
    batch = dataset.collate([dataset[5, step, 2] for step in range(4)])
    features = trainer.repa_module.load_encoder() and trainer.repa_module.encoder(batch.images)
    assert torch.allclose(batch.features.float(), features, rtol=1e-2, atol=1e-2)
    trainer.train(max_steps=8)
    again = make_trainer(tmp_path / "again", **changes)
    again.train(max_steps=8)
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "again")


def test_the_older_setting_of_random_crops_is_taken():
    assert TrainConfig.from_dict({"random_crop": True}).crop == "random"
    assert TrainConfig.from_dict({"random_crop": False, "crop": "adm"}).crop == "adm"
    with pytest.raises(ConfigError, match="random_crop is true, but crop is adm"):
        TrainConfig.from_dict({"random_crop": True, "crop": "adm"})


def test_crops_that_change_train_and_validate_in_the_centre(tmp_path):
    trainer = make_trainer(tmp_path / "run", **write_classes(tmp_path / "data"), crop="random_resized", use_repa=False)
    trainer.train(max_steps=2)
    assert trainer.val_loader.dataset.crop == "center" and trainer.global_step == 2


def test_a_million_images_of_shards_take_little_memory(tmp_path):
    from flextok.data.shards import ShardIndex

    n, shards = 1_000_000, 100
    keys = np.array([f"n{i:08}" for i in range(n // shards)], dtype=bytes)
    index = ShardIndex(keys, np.full(len(keys), b"17"), np.arange(len(keys)) * 10_000, np.full(len(keys), 9_000))
    paths = []
    for i in range(shards):
        paths.append(tmp_path / f"{i}.tar")
        paths[-1].touch()
    dataset = ShardImages(paths, [index] * shards, 32, class_names([index] * shards))
    held = sum(value.nbytes for value in vars(dataset).values() if isinstance(value, np.ndarray))
    assert len(dataset) == n and held < 60e6, f"{held / 1e6:.0f} MB"
    assert dataset.name(123_456).endswith("12.tar/n00003456") and dataset.classes[dataset.label(0)] == "17"
    assert json.dumps(dataset.identity())
