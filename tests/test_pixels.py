"""Pixels, labels and names of every source against Pillow alone: as they are served, loaded, cached and tokenized."""

import io
import re
import tarfile

import datasets
import numpy as np
import pytest
import torch
import yaml
from helpers import pillow_square, tiny_model
from PIL import Image
from sklearn.datasets import load_digits
from test_caching import latent_settings, vae_folder  # noqa: F401
from test_sources import hub_cache  # noqa: F401
from test_token_export import export
from tiny_runs import settings

from flextok.data.images import random_window
from flextok.data.loader import GlobalBatchSampler, build_loader, build_loaders, image_names
from flextok.data.precompute import precompute
from flextok.data.sources import build_datasets
from flextok.model.utils.repa_loss import load_encoder
from flextok.training.config import TrainConfig
from flextok.training.models import load_model
from flextok.utils.random import uniform_number

# Width and height of pictures for squares of 32: one, two and four times that, one off each way, odd, smaller.
SHAPES = [(64, 96), (96, 64), (63, 97), (97, 63), (65, 80), (80, 65), (64, 64), (32, 32), (33, 32), (32, 35), (17, 29)]
SHAPES += [(23, 11), (128, 150), (150, 128), (127, 160), (160, 127), (129, 200), (75, 110), (63, 63), (99, 35)]
NUMBERS, BROKEN = list(range(len(SHAPES))), 6
CLASSES = ["cat", "ant", "bee"]
KINDS = [CLASSES[i * i % 7 % 3] for i in NUMBERS]


def ending(i):
    return "png" if i % 3 == 2 else "jpg"


def encoded(i) -> bytes:
    """Picture i as a file; every other one lies on its side and says so."""
    exif, buffer = Image.Exif(), io.BytesIO()
    pixels = np.random.default_rng(i).integers(64, 192, (*SHAPES[i][::-1], 3), dtype=np.uint8)  # nothing is clipped
    if i % 2:
        exif[0x0112], pixels = 6, np.ascontiguousarray(np.rot90(pixels))
    Image.fromarray(pixels).save(buffer, {"png": "PNG", "jpg": "JPEG"}[ending(i)], exif=exif)
    return buffer.getvalue() if i != BROKEN else b"broken"


def expected(i, mirrored=False, **how) -> torch.Tensor:
    image = pillow_square(io.BytesIO(encoded(i)), **how)
    return image.flip(-1) if mirrored else image


def assert_same(images, pictures):
    """Up to one level of 255, by which Pillow rounds a window and the whole image differently."""
    torch.testing.assert_close(images, pictures, atol=1.01 / 127.5, rtol=0)


def assert_near(values, of_pictures):
    """What a network gives for images that are the same in this sense, by image."""
    error = (values.float() - of_pictures).flatten(1).norm(dim=1) / of_pictures.flatten(1).norm(dim=1)
    assert error.max() < 0.1


# Sources: each writes some of the pictures into a folder. `classes` is the order of a ClassLabel's names.


def write_folder(folder, numbers, classes):
    folder.mkdir(parents=True)
    for i in numbers:
        (folder / f"{i}.{ending(i)}").write_bytes(encoded(i))
    return dict(dataset_name="folder", data_path=str(folder))


def write_celebahq(folder, numbers, classes):
    return write_folder(folder, numbers, classes) | dict(dataset_name="celebahq")


def write_classes(folder, numbers, classes):
    for kind in classes:
        write_folder(folder / kind, [i for i in numbers if KINDS[i] == kind], classes)
    return dict(dataset_name="imagefolder", data_path=str(folder))


def rows(numbers, classes):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=classes))
    images = [{"bytes": encoded(i), "path": None} for i in numbers]
    return datasets.Dataset.from_dict(dict(image=images, label=[KINDS[i] for i in numbers]), features=features)


def write_parquet(folder, numbers, classes):
    folder.mkdir(parents=True)
    rows(numbers, classes).to_parquet(folder / "data.parquet")
    return dict(dataset_name="hf", data_path=str(folder))


def write_disk(folder, numbers, classes):
    rows(numbers, classes).save_to_disk(folder)
    return dict(dataset_name="hf", data_path=str(folder))


def write_shards(folder, numbers, classes):
    """Two tar files, the first of which is two that were joined; labels before or after their images."""
    folder.mkdir(parents=True)
    for name, part in (("0.tar", numbers[:4]), ("0.tar", numbers[4:9]), ("1.tar", numbers[9:])):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            for i in part:
                for kind, data in [(ending(i), encoded(i)), ("cls", KINDS[i].encode())][:: 1 if i % 2 else -1]:
                    info = tarfile.TarInfo(f"{i}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        with open(folder / name, "ab") as file:
            file.write(content.getvalue())
    return dict(dataset_name="webdataset", data_path=str(folder))


LABELLED = {"classes": write_classes, "parquet": write_parquet, "disk": write_disk, "shards": write_shards}
SOURCES = {"folder": write_folder, "celebahq": write_celebahq, **LABELLED}


def number_of(name, numbers=NUMBERS) -> int:
    """Which picture a name means; that of a row counts within those that were written."""
    number = int(re.search(r"(\d+)(\.\w+)?( of .*)?$", name)[1])
    return numbers[number] if name.startswith("row ") else number


def check(dataset, numbers, labelled, crop) -> list[int]:
    """Each image of a dataset and its label are those of the picture that it is named by; gives the pictures."""
    pictures = [number_of(dataset.name(i), numbers) for i in range(len(dataset))]
    for i, picture in enumerate(pictures):
        item = dataset[i]
        served = (i + (picture == BROKEN)) % len(dataset)
        assert item["index"] == served and item["position"] == i
        assert_same(item["image"], expected(pictures[served], crop=crop))
        assert [file.path for file in item["broken"]] == [dataset.name(i)] * (picture == BROKEN)
        assert (dataset.label(i) is not None) == labelled
        assert not labelled or dataset.classes[dataset.label(i)] == KINDS[picture]
    return pictures


@pytest.mark.parametrize("split", ["val_fraction", "val_path"])
@pytest.mark.parametrize("source", SOURCES)
def test_images_and_labels_of_every_source_are_those_of_their_names(tmp_path, source, split):
    given, val_numbers = dict(img_size=32, val_fraction=0.3, use_augmentation=False), NUMBERS
    given |= SOURCES[source](tmp_path / "data", NUMBERS, CLASSES)
    if split == "val_path":
        val_numbers = [i for i in NUMBERS if KINDS[i] != "ant"][:: -1 if source in ("parquet", "disk") else 1]
        given["val_path"] = SOURCES[source](tmp_path / "val", val_numbers, CLASSES[::-1])["data_path"]
    for crop in ("center", "adm"):
        train, val = build_datasets(TrainConfig.from_dict(given | dict(crop=crop)))
        found = [check(train, NUMBERS, source in LABELLED, crop), check(val, val_numbers, source in LABELLED, crop)]
        if split == "val_path":
            assert list(map(sorted, found)) == [NUMBERS, sorted(val_numbers)]
        elif source == "celebahq":
            assert found == [NUMBERS[:18], [18]]
        else:
            assert sorted(found[0] + found[1]) == NUMBERS and len(found[1]) == 6
    again, _ = build_datasets(TrainConfig.from_dict(given | SOURCES[source](tmp_path / "2" / "data", NUMBERS, CLASSES)))
    first, val = build_datasets(TrainConfig.from_dict(given))
    for fingerprint in ("identity", "content_probe"):
        of = [getattr(dataset, fingerprint)() for dataset in (first, again, val)]
        assert of[0] == of[1] != of[2]


@pytest.mark.parametrize("split", ["train", "val"])
def test_digits_are_those_of_their_names(split):
    train, val = build_datasets(TrainConfig.from_dict(dict(dataset_name="digits", img_size=20)))
    dataset, data = (train if split == "train" else val), load_digits()
    for i in range(0, len(dataset), 37):
        number = number_of(dataset.name(i))
        drawing = Image.fromarray(np.rint(data.images[number] * 255 / 16).astype(np.uint8))
        pixels = np.asarray(drawing.resize((20, 20), Image.Resampling.BILINEAR), dtype=np.float32)
        assert torch.equal(dataset[i]["image"], torch.from_numpy(pixels / 127.5 - 1).expand(3, 20, 20))
        assert dataset.classes[dataset.label(i)] == str(data.target[number])


@pytest.mark.parametrize(
    "source, crop", [("classes", "random"), ("parquet", "random"), ("shards", "random_resized"), ("shards", "cached")]
)
def test_batches_of_two_epochs_hold_the_images_of_their_addresses(tmp_path, vae_folder, source, crop):  # noqa: F811
    """From loading processes: random crops, or what is cached of an image and of its mirror image."""
    cached = crop == "cached"
    given = latent_settings(vae_folder, **SOURCES[source](tmp_path / "data", NUMBERS, CLASSES)) | dict(
        crop="center" if cached else crop, cache_latents=cached, repa_cache=cached, repa_encoder_dtype="fp32",
        cache_dir=str(tmp_path / "cache"), val_fraction=0.3, batch_size=2, global_batch_size=4, val_batch_size=4,
        num_workers=2, seed=3,
    )  # fmt: skip
    config = TrainConfig.from_dict(settings(**given))
    model = load_model(config)
    plain = build_datasets(config)
    names = [[number_of(dataset.name(i)) for i in range(len(dataset))] for dataset in plain]
    served = [[of[of.index(i) + 1] if i == BROKEN else i for i in of] for of in names]  # the next for a broken one
    assert any(BROKEN in of for of in names)
    cached_sets = precompute(config, *plain, model, torch.device("cpu"))
    encoder = load_encoder("efficientnet_lite0", None, None, 64, None, torch.float32, False) if cached else None

    def assert_holds(batch, pictures):
        pictures = torch.stack(pictures)
        if not cached:
            assert_same(batch.images, pictures)
            return
        latents = model.vae.vae.encode(pictures).latent_dist
        assert_near(batch.latents[:, 0], latents.mean)
        assert_near(batch.latents[:, 1], latents.std)
        assert_near(batch.features, encoder(pictures))

    loader, val_loader = build_loaders(config, *cached_sets, "cpu")
    orders, random_state = [], torch.get_rng_state()
    for epoch in (0, 1):
        loader.batch_sampler.set_state(epoch, 0)
        batches, found = list(loader), []
        assert [batch.position.tolist() for batch in batches] == [[0, 1], [2, 3]] * 3 + [[0, 1]]
        for i, batch in enumerate(batches):
            pictures, step = [], 4 * epoch + i // 2
            found += [number_of(name) for name in image_names(loader.dataset, batch.index.tolist())]
            for position, number in zip(batch.position.tolist(), found[-2:], strict=True):
                draw = lambda name: uniform_number(3, name, step, position)  # noqa: B023, E731
                window = lambda size: random_window(size, (0.8, 1.0), (3 / 4, 4 / 3), draw)  # noqa: B023, E731
                how = dict(window=window) if crop == "random_resized" else dict(place=0.5 if cached else draw("crop"))
                pictures.append(expected(number, mirrored=draw("flip") < 0.5, **how))
            assert_holds(batch, pictures)
        assert sorted(found) == sorted(served[0]) and sum(batch.size for batch in batches) == 14
        broken = [number_of(file.path) for batch in batches for file in batch.broken]
        assert broken == ([] if cached else [BROKEN] * (BROKEN in names[0]))
        orders.append(found)
        found = []
        for batch in val_loader:
            found += (numbers := [number_of(name) for name in image_names(val_loader.dataset, batch.index.tolist())])
            assert_holds(batch, [expected(number) for number in numbers])
        assert sorted(found) == sorted(served[1])
    assert orders[0] != orders[1] and torch.equal(torch.get_rng_state(), random_state)
    if cached:  # as what is computed of images that are not mirrored takes them
        pictures = torch.stack([expected(number) for number in served[0]])
        assert_near(loader.dataset.cached_features(range(len(pictures))), encoder(pictures))


def test_fillers_do_not_count(tmp_path):
    given = write_folder(tmp_path / "data", NUMBERS[10:], CLASSES) | dict(img_size=32, val_fraction=0)
    train, _ = build_datasets(TrainConfig.from_dict(given))
    samplers = [GlobalBatchSampler(10, batch_size=3, rank=rank, world_size=3) for rank in range(3)]
    batches = [batch for sampler in samplers for batch in build_loader(train, sampler, 0, "cpu")]
    assert sorted(batch.size for batch in batches) == [0, 0, 1, 3, 3, 3] and min(map(len, batches)) == 1
    assert sorted(i for batch in batches if batch.weight for i in batch.index.tolist()) == list(range(10))


@pytest.mark.parametrize("source", ["classes", "parquet", "shards"])
def test_tokens_and_labels_are_those_of_the_images_of_their_names(tmp_path, source):
    """Behind a broken image and of both splits; mirrored images, too."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    given = dict(SOURCES[source](tmp_path / "data", NUMBERS, CLASSES), img_size=32, val_fraction=0.3)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(given))
    found = []
    for split in ("train", "val"):
        options = ["--config", str(tmp_path / "tiny.yaml"), "--split", split, "--flips", "--num-workers", "2"]
        shards = export(tmp_path / "model", tmp_path / split, *options)
        found += (numbers := [number_of(shards.names[item["index"]]) for item in shards])
        for item, number in zip(shards, numbers, strict=True):
            views = torch.stack([expected(number), expected(number, mirrored=True)])
            same = item["tokens"] == torch.cat(model.tokenize(views))
            assert same.float().mean(dim=1).min() > 0.5, number
            assert shards.meta["classes"][item["label"]] == KINDS[number]
        assert shards.meta["split"] == split and shards.index.tolist() == [item["index"] for item in shards]
    assert sorted(found) == [i for i in NUMBERS if i != BROKEN]
