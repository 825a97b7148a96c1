"""Sources of images: Hugging Face datasets, tar shards, folders of classes; how images are cropped."""

import io
import tarfile

import datasets
import numpy as np
import pytest
import torch
import webdataset
import yaml
from PIL import Image
from processes import train
from tiny_runs import make_trainer, read_metrics, same, settings, whole_and_parts

from flextok.benchmark.processes import free_port
from flextok.data.images import image_to_tensor, random_window
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
    """No test reads or writes a machine's own cache, or draws curves."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        patch.setattr("train_flextok.save_curves", lambda *arguments: None)  # takes longer than the runs here
        yield


def rows(n: int, first: int = 0) -> "datasets.Dataset":
    label = datasets.ClassLabel(names=["cat", "dog"])
    features = {"image": datasets.Image(), "label": label, "id": datasets.Value("string")}
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


def built(**changes):
    return build_datasets(TrainConfig.from_dict({"img_size": 32, "use_augmentation": False, **changes}))


@pytest.mark.parametrize("write", [write_parquet, write_shards], ids=["parquet", "shards"])
def test_a_resumed_run_and_one_of_two_processes_are_the_whole_run(tmp_path, write):
    changes = dict(write(tmp_path / "data", n=12), use_repa=False, num_epochs=1, global_batch_size=4, val_fraction=0.1,
                   val_token_images=0, inference_steps=1, vis_token_counts=[8])  # fmt: skip
    whole, parts = whole_and_parts(tmp_path, 1, 3, num_workers=1, **changes)
    assert same(whole["model_state_dict"], parts["model_state_dict"]) and whole["global_step"] == 3
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(settings(**changes, batch_size=2)))
    job = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(free_port()), LOCAL_WORLD_SIZE="2")
    options = [tmp_path / "two.yaml", "--run-dir", tmp_path / "two"]
    for process in [train(*options, RANK=str(i), LOCAL_RANK=str(i), **job) for i in range(2)]:
        assert process.wait().returncode == 0, process.stderr
    losses = {
        name: [r["train/loss"] for r in read_metrics(tmp_path / name) if "train/loss" in r]
        for name in ("whole", "parts", "two")
    }
    assert losses["whole"] == losses["parts"] and len(losses["whole"]) == 3
    assert losses["two"] == pytest.approx(losses["whole"], rel=1e-4)


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


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_column": "label"}, "image_column is 'label', a column of ClassLabel.*expected images"),
        ({"image_column": "imgae"}, r"image_column is 'imgae' \(did you mean 'image'\?\), but the columns are image,"),
        ({"label_column": "lable"}, r"label_column is 'lable' \(did you mean 'label'\?\)"),
        ({"train_split": "training"}, "train_split is 'training', but .* has the splits train"),
        ({"val_split": "test"}, "val_split is 'test', but .* has the splits train"),
        ({"data_path": "someone/no-such-dataset"}, "no folder someone/no-such-dataset, and no dataset.*hf download"),
    ],
)
def test_a_dataset_that_does_not_fit_is_a_clear_error(tmp_path, changes, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://localhost:9")  # nobody is there
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        built(**{**write_parquet(tmp_path / "data", n=2), **changes})


def test_a_folder_without_data_and_a_dataset_without_images_are_clear_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty': it cannot be read as a dataset"):
        built(dataset_name="hf", data_path=str(tmp_path / "empty"))
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(ConfigError, match="no column of images: set image_column to one of text"):
        built(dataset_name="hf", data_path=str(tmp_path / "text"))


def test_all_parquet_files_of_a_folder_are_the_data_set_whatever_their_names(tmp_path, caplog):
    folder = tmp_path / "data"
    folder.mkdir()
    for i, name in enumerate(["faces-0", "faces-1", "train-extra"]):
        rows(2, first=2 * i).to_parquet(folder / f"{name}.parquet")
    (folder / "previews").mkdir()
    for i in range(5):
        picture(i).save(folder / "previews" / f"{i}.png")
    settings = dict(dataset_name="hf", data_path=str(folder), val_fraction=0)
    train, val = built(**settings)
    assert images_of(train) == [0, 1, 2, 3, 4, 5] and train.classes == ["cat", "dog"] and val is None
    assert "5 files are left out: previews/0.png, " in caplog.text
    rows(3).to_parquet(folder / "faces-val-0.parquet")
    train, val = built(**settings)
    assert (len(train), len(val)) == (6, 3)
    card = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "faces-?.parquet"}]}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\nFaces.\n")
    assert images_of(built(**settings)[0]) == [0, 1, 2, 3]
    assert "7 files are left out: faces-val-0.parquet, " in caplog.text
    rows(2).cast_column("label", datasets.ClassLabel(names=["dog", "cat"])).to_parquet(folder / "faces-2.parquet")
    with pytest.raises(
        ConfigError, match=r"column label are \['cat', 'dog'\] in .*faces-0.*\['dog', .*faces-2.parquet: "
    ):
        built(**settings)


# ------------------------------------------------------------------------------------------------------------ shards


def test_an_index_is_built_once_and_anew_when_its_shard_changes(tmp_path, monkeypatch):
    changes = dict(write_shards(tmp_path / "data"), val_fraction=0)
    assert len(built(**changes)[0]) == N and len(list((tmp_path / "data").glob("*.tar.index.npz"))) == 3
    with monkeypatch.context() as patch:
        patch.setattr("flextok.data.shards.read_shard", lambda path: 1 / 0)
        assert len(built(**changes)[0]) == N
    train, _ = built(**{**changes, **write_shards(tmp_path / "data", n=12)})
    assert len(train) == 12 and torch.equal(train[11]["image"], image_to_tensor(picture(11), 32))


def names_of(dataset):
    """The names of the classes by number."""
    classes = dataset.classes or {}
    return classes if isinstance(classes, dict) else dict(enumerate(classes))


def write_tar(path, *members):
    """A tar of (name, content) of bytes, or of a pair of the type of a link and what it refers to."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            else:
                info.type, info.linkname = content
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return dict(dataset_name="webdataset", data_path=str(path), val_fraction=0)


def images_of(dataset):
    """Which `picture` each image is."""
    numbers = {image_to_tensor(picture(i), 32).numpy().tobytes(): i for i in range(N)}
    return [numbers[dataset[i]["image"].numpy().tobytes()] for i in range(len(dataset))]


def test_files_of_a_shard_that_are_not_taken_are_counted_by_reason_in_each_run(tmp_path, caplog):
    names = ["a.jpg", "lens_1.4.jpg", "lens_2.8.jpg", "b.gif", "c.cls"]
    settings = write_tar(tmp_path / "a.tar", *((name, encoded(i)) for i, name in enumerate(names)), ("d.cls", b"3"))
    for _ in range(2):
        caplog.clear()
        assert images_of(built(**settings)[0]) == [0]
        (line,) = [message for message in caplog.messages if "not taken" in message]
        assert "2 images with a second dot in their names, where the key ends at the first dot" in line
        assert "(such as a.tar/lens_1.4.jpg); 1 images that are none of jpg, jpeg, png, webp" in line
        assert "(such as a.tar/b.gif); 1 labels that cannot be read (such as a.tar/c.cls: 'utf-8' codec" in line
        assert "; 1 labels without an image (such as a.tar/d)" in line
    caplog.clear()
    caplog.set_level("INFO")
    built(**write_shards(tmp_path / "captions", label=lambda i: {"txt": "a caption"}), val_fraction=0)
    (line,) = [record for record in caplog.records if "not taken" in record.message]
    assert "24 other files (such as train-000000.tar/00000.txt)" in line.message and line.levelname == "INFO"


def test_a_folder_of_shards_is_read_whatever_the_case_and_names_what_it_leaves_out(tmp_path, caplog):
    for i, name in enumerate(["2.tar", "10.TAR", "3.tar.gz", "4.tgz", "more/5.tar"]):
        write_tar(tmp_path / name, (f"{i}.png", encoded(i)))
    train, _ = built(dataset_name="webdataset", data_path=str(tmp_path), val_fraction=0)
    assert images_of(train) == [0, 1]
    assert "3 archives are left out (such as 3.tar.gz): 2 compressed" in caplog.text
    assert "and 1 of sub-folders" in caplog.text


def test_a_label_that_cannot_be_read_is_none_and_named(tmp_path, caplog):
    labels = [b'{"label": 3}', b'{"label": ', b'{"label": [1]}', b"{}"]
    members = [(f"{i}.{end}", content) for i in range(4) for end, content in (("png", encoded(i)), ("json", labels[i]))]
    train, _ = built(**write_tar(tmp_path / "a.tar", *members))
    assert images_of(train) == [0, 1, 2, 3] and [train.label(i) for i in range(4)] == [3, None, None, None]
    assert "2 labels that cannot be read (such as a.tar/1.json: Expecting value" in caplog.text


# ------------------------------------------------------------------------------------------------------------ labels


def write_column(folder, values):
    """Parquet with a column `class`."""
    folder.mkdir()
    rows(len(values)).add_column("class", values).to_parquet(folder / "train.parquet")
    return dict(dataset_name="hf", data_path=str(folder), label_column="class")


def write_json(folder, values):
    return write_shards(folder, len(values), label=lambda i: {"json": {"label": values[i]}})


def write_cls(folder, values):
    return write_shards(folder, len(values), label=lambda i: {"txt": ""} if values[i] is None else {"cls": values[i]})


NUMBERS = list(range(12))


@pytest.mark.parametrize("write", [write_cls, write_json, write_column], ids=["cls", "json", "column"])
@pytest.mark.parametrize(
    "values, labels",
    [
        ([*NUMBERS, -1], [*NUMBERS, None]),
        ([*map(float, NUMBERS), None], [*NUMBERS, None]),
        ([*map(str, NUMBERS), ""], [*NUMBERS, None]),
        ([5, 999999, 1234567890123456789], [5, 999999, 1234567890123456789]),
        (["a10", "a2", "b", None], [1, 0, 2, None]),
        (["10", "9", "x"], [1, 0, 2]),
        ([-1, -1], [None, None]),
    ],
    ids=["-1", "floats", "digits", "sparse", "texts", "mixed", "none"],
)
def test_labels_are_the_data_sets_own_numbers_or_texts_in_natural_order(tmp_path, caplog, write, values, labels):
    caplog.set_level("INFO")
    train, _ = built(**write(tmp_path / "data", values), val_fraction=0)
    assert [train.label(i) for i in range(len(train))] == labels
    names = {label: str(value).removesuffix(".0") for label, value in zip(labels, values, strict=True)}
    assert names_of(train) == {label: name for label, name in names.items() if label is not None}
    assert ("texts, numbered in natural order: " in caplog.text) == (values[-1] == "x" or "a2" in values)
    if None in labels and train.classes:
        assert f"1 of {len(labels)} images have no class label" in caplog.text


@pytest.mark.parametrize("order", [("cls", "json"), ("json", "cls")])
def test_a_label_in_cls_comes_before_one_in_json(tmp_path, order):
    labels = {"cls": b"7", "json": b'{"label": "cat"}'}
    train, _ = built(
        **write_tar(tmp_path / "a.tar", ("0.png", encoded(0)), *((f"0.{end}", labels[end]) for end in order))
    )
    assert train.label(0) == 7


@pytest.mark.parametrize("write", [write_cls, write_json, write_column], ids=["cls", "json", "column"])
def test_validation_images_are_numbered_by_the_classes_of_training(tmp_path, write):
    settings = write(tmp_path / "train", ["a10", "a2", "b"])
    _, val = built(**settings, val_path=write(tmp_path / "val", ["b", "a10"])["data_path"])
    assert [val.label(i) for i in range(2)] == [2, 1]
    with pytest.raises(ConfigError, match="has the class 'c', which is none of the 3 classes of the training images"):
        built(**settings, val_path=write(tmp_path / "other", ["c"])["data_path"])


def test_class_labels_keep_their_numbers_and_names(tmp_path, caplog):
    label = datasets.ClassLabel(names=["-1", "10", "9"])
    numbered = rows(4).remove_columns("label").add_column("label", [2, 0, None, -1], feature=label)
    numbered.save_to_disk(tmp_path / "data")
    train, _ = built(dataset_name="hf", data_path=str(tmp_path / "data"), val_fraction=0)
    assert train.classes == ["-1", "10", "9"] and [train.label(i) for i in range(4)] == [2, 0, None, None]
    numbered.add_column("other", [0, 0, 0, 0], feature=label).save_to_disk(tmp_path / "two")
    assert built(dataset_name="hf", data_path=str(tmp_path / "two"), val_fraction=0)[0].classes is None
    assert "no classes are read, since ['label', 'other'] are ClassLabels: set label_column" in caplog.text


def test_a_shard_that_is_cut_or_holds_no_images_is_refused(tmp_path):
    settings = write_shards(tmp_path / "data")
    shard = tmp_path / "data" / "train-000001.tar"
    content = shard.read_bytes()
    for cut in (content[: len(content) // 2], content[: content.index(b"00015.png")]):
        shard.write_bytes(cut)
        with pytest.raises(UserError, match="train-000001.tar cannot be read as a shard .*copy it again"):
            built(**settings)
    shard.write_bytes(content)
    assert len(built(**settings, val_fraction=0)[0]) == N
    with tarfile.open(shard, "w") as tar:
        tar.add(__file__, arcname="a.txt")
    with pytest.raises(UserError, match=r"train-000001\.tar.*hold no images: expected files jpg, jpeg, png, webp"):
        built(**settings | dict(data_path=str(shard)))


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


def test_images_beside_the_class_folders_are_refused(tmp_path):
    settings = write_classes(tmp_path / "data")
    picture(0).save(tmp_path / "data" / "x.png")
    with pytest.raises(ConfigError, match=r"x\.png lies in .* itself: expected a sub-folder for each"):
        built(**settings)
    (tmp_path / "data" / "x.png").unlink()
    (tmp_path / "val" / "c").mkdir(parents=True)
    picture(0).save(tmp_path / "val" / "c" / "0.png")
    with pytest.raises(ConfigError, match="val_path has the class 'c', which is none of the 2 classes"):
        built(**settings, val_path=str(tmp_path / "val"))


def test_folders_that_are_numbers_are_their_classes(tmp_path):
    for i in range(12):
        (tmp_path / "data" / str(i)).mkdir(parents=True)
        picture(i).save(tmp_path / "data" / str(i) / "0.png")
    train, _ = built(dataset_name="imagefolder", data_path=str(tmp_path / "data"), val_fraction=0)
    assert [train.label(i) for i in range(12)] == [int(train.paths[i].parent.name) for i in range(12)]
    (tmp_path / "data" / "11").rename(tmp_path / "data" / "a")
    train, _ = built(dataset_name="imagefolder", data_path=str(tmp_path / "data"), val_fraction=0)
    assert train.classes == [*map(str, range(11)), "a"]


def test_splits_are_refused_as_classes_and_named_where_all_are_trained_on(tmp_path, caplog):
    for split in ("train", "val", "test"):
        write_classes(tmp_path / "data" / split, n=4)
    advice = f"set data_path: {tmp_path}/data/train and val_path: {tmp_path}/data/val"
    with pytest.raises(ConfigError, match=f"test, train, val of .* are splits, not classes: {advice}"):
        built(dataset_name="imagefolder", data_path=str(tmp_path / "data"))
    assert len(built(dataset_name="folder", data_path=str(tmp_path / "data"), val_fraction=0)[0]) == 12
    assert f"its sub-folders test and val are trained on, too; {advice}" in caplog.text
    parts = dict(data_path=str(tmp_path / "data" / "train"), val_path=str(tmp_path / "data" / "val"))
    train, val = built(dataset_name="imagefolder", **parts)
    assert train.classes == ["a", "b"] and len(train) == len(val) == 4


# ------------------------------------------------------------------------------------------------------------- crops


def test_random_windows_have_the_area_and_shape_that_is_asked_for():
    numbers = np.random.default_rng(0)
    for width, height in [(300, 200), (200, 300)] * 200:
        left, top, right, bottom = random_window((width, height), (0.25, 0.5), (0.5, 2), lambda name: numbers.random())
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert 0.24 < (right - left) * (bottom - top) / (width * height) < 0.51
        assert 0.48 < (right - left) / (bottom - top) < 2.1
    assert random_window((1000, 10), (0.9, 1.0), (0.75, 1.33), lambda name: 0.5) == (494, 0, 507, 10)


def test_cached_crops_are_those_that_are_served(tmp_path):
    """With the encoder's features cached, and the images' own crops."""
    changes = dict(write_shards(tmp_path / "data", n=12), crop="random_resized", cache_crops=3, num_workers=2,
                   cache_dir=str(tmp_path / "cache"), repa_cache=True, repa_encoder_dtype="fp32",
                   val_fraction=0.1)  # fmt: skip
    trainer = make_trainer(tmp_path / "run", **changes)
    dataset = trainer.train_loader.dataset
    assert dataset.caches["features"].flips == 3
    seen = {dataset[5, step, 2]["view"]: dataset[5, step, 2]["image"] for step in range(30)}
    assert seen.keys() == {0, 1, 2} and len({image.numpy().tobytes() for image in seen.values()}) == 3
    batch = dataset.collate([dataset[5, step, 2] for step in range(4)])
    features = trainer.repa_module.load_encoder() and trainer.repa_module.encoder(batch.images)
    torch.testing.assert_close(batch.features.float(), features, rtol=1e-2, atol=1e-2)


def test_joined_archives_and_hard_links_are_read_and_symbolic_links_counted(tmp_path, caplog):
    links = ("b.png", (tarfile.LNKTYPE, "./a.png")), ("c.png", (tarfile.SYMTYPE, "a.png"))
    first = write_tar(tmp_path / "1.tar", ("./a.png", encoded(0)), *links, ("d.png", (tarfile.LNKTYPE, "gone.png")))
    write_tar(tmp_path / "2.tar", ("./a.png", encoded(1)), ("e.png", encoded(2)))
    second = (tmp_path / "2.tar").read_bytes()
    with open(tmp_path / "1.tar", "ab") as file:
        file.write(second)
    train, _ = built(**first)
    assert images_of(train) == [0, 0, 1, 2] and len({train.name(i) for i in range(4)}) == 4
    for reason in (
        "1 symbolic links (such as 1.tar/c.png)",
        "1 hard links to files that are not there",
    ):
        assert reason in caplog.text
    with open(tmp_path / "1.tar", "ab") as file:
        file.write(second[:1000])
    with pytest.raises(UserError, match="1.tar cannot be read as a shard"):
        built(**first)


def test_the_runs_seed_changes_neither_the_split_nor_the_crops_that_are_cached(tmp_path):
    for i in range(12):
        picture(i).save(tmp_path / f"{i}.png")
    crops = dict(dataset_name="folder", crop="random_resized", crop_scale=[0.2, 0.3], cache_crops=3, val_fraction=0.25)
    first, second = (built(data_path=str(tmp_path), seed=seed, **crops) for seed in (0, 1))
    assert [d.paths for d in first] == [d.paths for d in second]
    assert torch.equal(*(train.views(0, 3)["image"] for train, _ in (first, second)))
    assert first[0].crop_scale == [0.2, 0.3]
