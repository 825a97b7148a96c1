"""Behaviour of flextok.data: finding, splitting and reading images, photographs, samplers, loaders."""

import gc
import logging
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from flextok.data.batch import FILLER
from flextok.data.images import (
    BrokenFile,
    BrokenImage,
    ImageFolderDataset,
    NoReadableImage,
    image_to_tensor,
    list_images,
    load_image,
    split_paths,
)
from flextok.data.loader import (
    BrokenFiles,
    GlobalBatchSampler,
    LoaderError,
    TooManyBrokenFiles,
    build_loader,
)
from flextok.data.photos import PHOTOS, PhotoCrops, photo_path
from flextok.data.sources import build_datasets
from flextok.training.config import TrainConfig
from flextok.utils.random import uniform_number


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def read(path, **options):
    image = load_image(path, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.fixture
def folder(tmp_path):
    """Twelve noise images of 20 x 30 pixels, 0.png to 11.png."""
    for i in range(12):
        save(tmp_path / "set" / f"{i}.png", noise(20, 30, seed=i))
    return tmp_path / "set"


# Files and splits


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def listed(folder):
    return [path.relative_to(folder).as_posix() for path in list_images(folder)]


@pytest.mark.parametrize(
    "names",
    [
        ["1.png", "2.jpg", "10.jpg", "0030.jpg"],
        ["male/0.jpg", "female/1.jpg", "female/2.jpg", "male/10.jpg"],
        ["7.jpg", "b/dog.jpg", "cat2.jpg", "Cat3.jpg", "cat10.jpg"],
    ],
    ids=["numbers", "numbers in sub-folders", "names"],
)
def test_files_are_sorted_by_number_or_else_naturally(tmp_path, names):
    touch(tmp_path, *reversed(names), "notes.txt")
    assert listed(tmp_path) == names


def test_every_extension_in_any_case_is_found_and_hidden_files_are_not(tmp_path):
    names = ["a.jpg", "b.JPEG", "c.Png", "d.webp", "e.bmp", "f.tif", "g.TIFF", "h.gif"]
    touch(tmp_path, *names, "._a.jpg", ".hidden/i.jpg", "j.jpg.txt", "k.svg")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    assert listed(tmp_path) == names


@pytest.mark.parametrize(
    "names, taken, message",
    [
        (["images/1.jpg", "masks/1.png"], ["images/1.jpg"], "only the 1 images of its folder images are taken"),
        (
            ["2.jpg", "images/1.jpg", "masks/1.png"], ["images/1.jpg", "masks/1.png", "2.jpg"],
            "3 images of all its folders are taken: . (1), images (1), masks (1)",
        ),
        (
            ["CelebA-HQ-img/0.jpg", "CelebA-HQ-img/10.jpg", "CelebAMask-HQ-mask-anno/0/00000_hair.png"],
            ["CelebA-HQ-img/0.jpg", "CelebA-HQ-img/10.jpg"], "only the 2 images of its folder CelebA-HQ-img are taken",
        ),
        (
            ["CelebAMask-HQ/CelebA-HQ-img/0.jpg", "CelebAMask-HQ/CelebAMask-HQ-mask-anno/0/0_hair.png", "_X/readme"],
            ["CelebAMask-HQ/CelebA-HQ-img/0.jpg"],
            "only the 1 images of its folder CelebAMask-HQ/CelebA-HQ-img are taken",
        ),
        (
            [f"class{i}/{j}.jpg" for j in range(8) for i in range(j, 8)],
            [f"class{i}/{j}.jpg" for j in range(8) for i in range(j, 8)],
            "36 images of all its folders are taken: class7 (8), class6 (7), class5 (6), class4 (5), class3 (4) and "
            "3 more",
        ),
    ],
    ids=["images", "all folders", "CelebA-HQ", "CelebAMask-HQ", "classes"],
)  # fmt: skip
def test_the_log_says_from_which_folders_images_are_taken(tmp_path, caplog, names, taken, message):
    caplog.set_level(logging.INFO)
    touch(tmp_path, *names)
    assert listed(tmp_path) == taken
    assert caplog.messages == [f"data_path {tmp_path}: {message}"]


def test_linked_folders_are_followed_once(tmp_path):
    touch(tmp_path, "set/a/1.jpg", "elsewhere/2.jpg")
    (tmp_path / "set" / "a" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "self").symlink_to("self")
    (tmp_path / "set" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "c").symlink_to(tmp_path / "elsewhere")
    assert listed(tmp_path / "set") == ["a/1.jpg", "b/2.jpg"]


def test_folder_errors_say_what_was_given_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="data_path is .*nowhere, which does not exist.*set it to"):
        list_images(tmp_path / "nowhere")
    touch(tmp_path, "file.jpg")
    with pytest.raises(NotADirectoryError, match="file.jpg, a file: set it to the folder"):
        list_images(tmp_path / "file.jpg")
    touch(tmp_path, "empty/readme.md")
    with pytest.raises(FileNotFoundError, match=r"no images in .*empty.*\.jpg.*check data_path"):
        list_images(str(tmp_path / "empty"))


def test_celebahq_is_split_in_order_and_another_size_in_proportion_with_a_warning(caplog):
    paths = list(range(30_000))
    assert split_paths(paths, "celebahq", 0.3, 0) == (paths[:27_000], paths[27_000:28_500], paths[28_500:])
    assert not caplog.records
    assert split_paths(paths[:1000], "celebahq", 0.3, 0) == (paths[:900], paths[900:950], paths[950:1000])
    assert "30000 images, but 1000 were found" in caplog.text
    assert split_paths([1, 2, 3], "celebahq", 0.0, 0) == ([1, 2], [3], [])


def test_random_split_is_seeded_sorted_and_complete():
    paths = list(range(200))
    train, val, test = split_paths(paths, "folder", 0.1, 5)
    assert len(val) == 20 and test == []
    assert train == sorted(train) and val == sorted(val) and sorted(train + val) == paths
    assert val != paths[-20:] and val != paths[:20]
    torch.manual_seed(1)
    assert split_paths(paths, "folder", 0.1, 5) == (train, val, test)
    assert split_paths(paths, "folder", 0.1, 6)[1] != val
    for n, fraction, n_val in ((10, 0.0, 0), (10, 0.01, 1), (2, 0.99, 1), (1, 0.5, 0), (10, 0.25, 2)):
        assert list(map(len, split_paths(paths[:n], "folder", fraction, 0))) == [n - n_val, n_val, 0]


# Reading


def grey(values):
    return np.repeat(np.asarray(values, dtype=np.uint8)[..., None], 3, axis=2)


def over_white(rgb, alpha):
    weight = alpha[..., None] / 255
    return rgb * weight + 255 * (1 - weight)


def test_rgb_and_grey_are_read_exactly(tmp_path):
    pixels = noise(7, 5)
    assert (read(save(tmp_path / "a.png", pixels)) == pixels).all()
    assert (read(save(tmp_path / "a.jpg", pixels, format="PNG")) == pixels).all()  # by content, not by name
    assert (read(save(tmp_path / "b.bmp", pixels)) == pixels).all()
    assert (read(save(tmp_path / "c.webp", pixels, lossless=True)) == pixels).all()
    assert (read(save(tmp_path / "d.png", pixels[..., 0])) == grey(pixels[..., 0])).all()
    bits = pixels[..., 0] > 127
    assert (read(save(tmp_path / "e.png", Image.fromarray(bits))) == grey(bits * 255)).all()


def test_palette_images_have_the_colours_of_their_palette(tmp_path):
    indices = noise(7, 5)[..., 0] % 3
    palette = np.array([[10, 20, 30], [250, 0, 120], [7, 77, 177]], dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    assert (read(save(tmp_path / "a.png", image)) == palette[indices]).all()
    assert (read(save(tmp_path / "b.gif", image)) == palette[indices]).all()
    transparent = np.where((indices == 1)[..., None], 255, palette[indices])
    assert (read(save(tmp_path / "c.png", image, transparency=1)) == transparent).all()
    assert (read(save(tmp_path / "d.gif", image, transparency=1)) == transparent).all()
    half = over_white(palette[indices], np.array([255, 128, 0])[indices])
    assert np.abs(read(save(tmp_path / "e.png", image, transparency=bytes([255, 128, 0]))) - half).max() <= 1


def test_alpha_is_composited_over_white(tmp_path):
    pixels, alpha = noise(16, 16), noise(16, 16, seed=1)[..., 0]
    rgba = np.dstack([pixels, alpha])
    expected = over_white(pixels, alpha)
    assert np.abs(read(save(tmp_path / "a.png", rgba)) - expected).max() <= 1
    assert np.abs(read(save(tmp_path / "b.webp", rgba, lossless=True, exact=True)) - expected).max() <= 1
    la = Image.merge("LA", [Image.fromarray(pixels[..., 0]), Image.fromarray(alpha)])
    assert np.abs(read(save(tmp_path / "c.png", la)) - over_white(grey(pixels[..., 0]), alpha)).max() <= 1
    pixels[0, :8] = (1, 2, 3)
    keyed = np.where((pixels == (1, 2, 3)).all(axis=2, keepdims=True), 255, pixels)
    assert (read(save(tmp_path / "d.png", pixels, transparency=(1, 2, 3))) == keyed).all()


def test_cmyk_becomes_rgb(tmp_path):
    cmyk = np.dstack([noise(16, 16), noise(16, 16, seed=1)[..., 0]])
    expected = (255.0 - cmyk[..., :3]) * (255.0 - cmyk[..., 3:]) / 255
    image = Image.frombytes("CMYK", (16, 16), cmyk.tobytes())
    assert np.abs(read(save(tmp_path / "a.tif", image)) - expected).max() <= 1
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(read(save(tmp_path / "b.jpg", flat)) - np.array([255, 0, 0])).max() <= 4


def test_16_bit_grey_is_scaled_from_its_full_range(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for name in ("a.png", "a.tif"):
        assert np.abs(read(save(tmp_path / name, values)) - values[..., None] / 257).max() <= 0.5
        assert read(save(tmp_path / name, (values // 256).astype(np.uint16))).max() == 1
    big_endian = Image.frombytes("I;16B", (8, 8), values.astype(">u2").tobytes())
    assert np.abs(read(save(tmp_path / "b.tif", big_endian)) - values[..., None] / 257).max() <= 0.5


@pytest.mark.parametrize(
    "dtype, low, high, black, white",
    [
        (np.int32, 0, 200, 0, 255),
        (np.int32, 0, 60_000, 0, 65_535),
        (np.int32, -500, 1_000_000, -500, 1_000_000),
        (np.int32, 0, 1_000_000, 0, 1_000_000),
        (np.float32, 0, 0.9, 0, 1),
        (np.float32, 0, 254, 0, 255),
        (np.float32, -3.5, 2.5, -3.5, 2.5),
        (np.float32, -1, -1, -1, 1),
    ],
)
def test_32_bit_grey_is_scaled_and_not_clipped(tmp_path, dtype, low, high, black, white):
    values = np.linspace(low, high, 64).astype(dtype).reshape(8, 8)
    expected = (values - black) * (255 / (white - black))
    assert np.abs(read(save(tmp_path / "a.tif", values)) - expected[..., None]).max() <= 0.51
    if dtype == np.float32 and black == 0 and white == 1:
        values[0, :2] = np.nan, np.inf
        assert read(save(tmp_path / "a.tif", values))[0, :2, 0].tolist() == [0, 0]


STORED = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright.transpose(1, 0, 2), 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = noise(6, 9)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](upright))
    for name in ("a.png", "a.tif"):
        assert (read(save(tmp_path / name, stored, exif=exif)) == upright).all()
    upright = upright[:2, :3].repeat(400, axis=0).repeat(400, axis=1)
    stored = np.ascontiguousarray(STORED[orientation](upright))
    drafted = read(save(tmp_path / "a.jpg", stored, exif=exif, quality=95, subsampling=0), min_size=90)
    assert drafted.shape == (200, 300, 3)
    assert np.abs(drafted[50::100, 50::100].astype(int) - upright[200::400, 200::400]).max() < 12


@pytest.mark.parametrize("block", [b"Exif\0\0no TIFF header", b"Exif\0\0MM\0*"])
def test_damaged_exif_does_not_hide_the_pixels(tmp_path, block):
    for name in ("a.jpg", "a.png", "a.webp"):
        path = save(tmp_path / name, Image.new("RGB", (16, 16), (200, 200, 200)), exif=block)
        assert np.abs(read(path).astype(int) - 200).max() <= 2


def test_first_frame_of_animations_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"save_all": True, "append_images": frames[1:], "duration": 100}
    for name in ("a.gif", "a.png", "a.tif"):
        assert (read(save(tmp_path / name, frames[0], **options)) == (255, 0, 0)).all()
    assert (read(save(tmp_path / "a.webp", frames[0], lossless=True, **options)) == (255, 0, 0)).all()


@pytest.mark.parametrize(
    "min_size, shape", [(None, (800, 1200)), (201, (800, 1200)), (200, (400, 600)), (1, (100, 150))]
)
def test_large_jpegs_are_decoded_at_no_less_than_twice_the_hint(tmp_path, min_size, shape):
    pixels = noise(2, 3).repeat(400, axis=0).repeat(400, axis=1)
    image = read(save(tmp_path / "a.jpg", pixels, quality=95, subsampling=0), min_size=min_size)
    assert image.shape == (*shape, 3)
    step = shape[0] // 2
    assert np.abs(image[step // 2 :: step, step // 2 :: step].astype(int) - pixels[200::400, 200::400]).max() < 12


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "bmp", "tif", "gif"])
def test_truncated_files_are_broken(tmp_path, extension):
    path = save(tmp_path / f"a.{extension}", noise(50, 50))
    content = path.read_bytes()
    for kept in (0.02, 0.5, 0.98):
        path.write_bytes(content[: int(kept * len(content))])
        with pytest.raises(BrokenImage, match=f"cannot read the image .*a.{extension}: ."):
            load_image(path)


def test_empty_foreign_and_missing_files_are_broken(tmp_path):
    touch(tmp_path, "text.jpg")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    for name in ("text.jpg", "empty.jpg", "program.jpg"):
        with pytest.raises(BrokenImage, match="empty, damaged, or not a JPEG"):
            load_image(tmp_path / name)
    with pytest.raises(BrokenImage, match="No such file"):
        load_image(tmp_path / "gone.jpg")


@pytest.mark.filterwarnings("error")
def test_wide_panoramas_are_read(tmp_path):
    path = save(tmp_path / "panorama.jpg", Image.new("L", (20_000, 10_000), 99))
    assert load_image(path, min_size=256).size == (2500, 1250)
    strip = load_image(save(tmp_path / "strip.png", Image.new("L", (20_000, 30), 99)))
    assert image_to_tensor(strip, 16).shape == (3, 16, 16)


# Tensors


def scaled_by_torch(pixels, height, width):
    """The whole image scaled in floating point, [3, height, width] in [-1, 1]."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    scaled = torch.nn.functional.interpolate(image, (height, width), mode="bicubic", antialias=True)
    return scaled[0].clamp(0, 255) / 127.5 - 1


@pytest.mark.parametrize("size", [16, 80])
@pytest.mark.parametrize("shape", [(48, 96), (96, 48)])
@pytest.mark.parametrize("crop", [(0.5, 0.5), (0.0, 0.0), (1.0, 1.0), (0.26, 0.26)])
def test_image_to_tensor_is_a_scaling_followed_by_a_crop(size, shape, crop):
    pixels = noise(*shape, seed=3) // 2 + 64  # no overshoot beyond 0..255, which Pillow clips in between
    height, width = (length * size // 48 for length in shape)
    x, y = round(crop[0] * (width - size)), round(crop[1] * (height - size))
    expected = scaled_by_torch(pixels, height, width)[:, y : y + size, x : x + size]
    result = image_to_tensor(Image.fromarray(pixels), size, crop)
    assert result.dtype == torch.float32 and result.is_contiguous()
    assert (result - expected).abs().max() < 2.1 / 127.5


def test_pixels_of_an_image_of_the_right_size_are_unchanged():
    pixels = noise(32, 33)
    result = image_to_tensor(Image.fromarray(pixels), 32)
    assert torch.equal((result + 1).mul(127.5).round().byte().permute(1, 2, 0), torch.from_numpy(pixels[:, :32]))
    extremes = image_to_tensor(Image.fromarray(np.array([[[0, 128, 255]]], dtype=np.uint8)), 1)
    assert extremes.flatten().tolist() == pytest.approx([-1, 1 / 255, 1], abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9000), (9000, 1), (2, 3), (301, 7)])
def test_any_shape_gives_a_full_square(shape):
    for place in (0.0, 0.3, 1.0):
        result = image_to_tensor(Image.new("RGB", shape, (255, 0, 255)), 24, (place, place))
        assert result.shape == (3, 24, 24)
        assert (result == torch.tensor([1.0, -1.0, 1.0])[:, None, None]).all()


# Datasets


def test_dataset_serves_the_contract(folder):
    dataset = ImageFolderDataset(list_images(folder), img_size=16, flip=True, crop="random")
    assert len(dataset) == 12 and dataset.names[10] == "10.png" and dataset.name(10) == str(folder / "10.png")
    item = dataset[10]
    assert torch.equal(item.pop("image"), image_to_tensor(Image.fromarray(noise(20, 30, seed=10)), 16))
    assert item == {"index": 10, "position": 10, "view": 0, "broken": ()}
    item = dataset[(3, 7, 5)]
    assert (item["index"], item["position"]) == (3, 5)
    assert [item["index"] for item in dataset] == list(range(12))
    with pytest.raises(IndexError):
        dataset[12]


def test_flips_and_crops_follow_the_address_alone(folder):
    dataset = ImageFolderDataset(list_images(folder), img_size=20, flip=True, crop="random", seed=4)
    pixels, flips, places = noise(20, 30, seed=2), [], set()
    for step, position in [(step, position) for step in range(4) for position in range(8)]:
        torch.manual_seed(step)
        random.seed(step)
        np.random.seed(step)
        item = dataset[(2, step, position)]
        x = round(10 * uniform_number(4, "crop", step, position))
        flip = uniform_number(4, "flip", step, position) < 0.5
        expected = pixels[:, x : x + 20]
        expected = expected[:, ::-1] if flip else expected
        assert torch.equal(item["image"], image_to_tensor(Image.fromarray(expected.copy()), 20))
        assert item["view"] == flip
        flips.append(flip)
        places.add(x)
    assert 8 < sum(flips) < 24 and len(places) > 5


def test_broken_files_are_replaced_by_the_next_readable_one(folder):
    paths = list_images(folder)
    for i in (4, 5, 11):
        paths[i].write_bytes(b"")
    dataset = ImageFolderDataset(paths, img_size=16)
    item = dataset[(4, 0, 9)]
    assert (
        item["index"] == 6
        and item["position"] == 9
        and [file.path for file in item["broken"]] == list(map(str, paths[4:6]))
    )
    assert all("empty, damaged, or not a JPEG" in file.reason for file in item["broken"])
    assert torch.equal(item["image"], dataset[6]["image"])
    assert dataset[11]["index"] == 0 and dataset[11]["broken"][0].path == str(paths[11])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_dataset_without_a_readable_file_says_so(tmp_path, num_workers):
    touch(tmp_path, "1.jpg", "2.jpg")
    loader = build_loader(ImageFolderDataset(list_images(tmp_path), 16), GlobalBatchSampler(2, 1), num_workers, "cpu")
    with pytest.raises(
        NoReadableImage, match=r"^none of the 2 images .* can be read .*\.jpg: empty, .*check that data_path"
    ):
        next(iter(loader))


def test_identity_changes_with_the_data(folder):
    def identity(**changes):
        return ImageFolderDataset(**{"paths": list_images(folder), "img_size": 16, **changes}).identity()

    first = identity()
    assert first == identity(flip=True, seed=3) and 8 <= len(first) <= 32 and int(first, 16) >= 0
    assert len({first, identity(img_size=32), identity(crop="random"), identity(paths=list_images(folder)[1:])}) == 4
    folder.rename(folder.with_name("moved"))
    folder = folder.with_name("moved")
    assert identity() == first
    (folder / "3.png").write_bytes(b"x")
    changed = identity()
    dataset = ImageFolderDataset(list_images(folder), img_size=16)
    (folder / "3.png").unlink()
    assert len({first, changed, dataset.identity()}) == 3


# Photographs


def windows(dataset):
    """[(photo, x, y, side)] of a PhotoCrops."""
    for name in dataset.names:
        photo, numbers = name.split("@")
        yield photo, *map(int, numbers.split(","))


def test_training_and_validation_windows_share_no_pixel():
    covered = {}
    shapes = {photo: load_image(photo_path(photo)).size[::-1] for photo in PHOTOS}
    for split, img_size in [(split, img_size) for split in ("train", "val") for img_size in (16, 256)]:
        for photo, x, y, side in windows(PhotoCrops(split, img_size, 100)):
            height, width = shapes[photo]
            assert 0 <= x and x + side <= width and 0 <= y and y + side <= height
            mask = covered.setdefault((photo, split), np.zeros(shapes[photo], dtype=bool))
            mask[y : y + side, x : x + side] = True
    for photo in PHOTOS:
        assert covered[photo, "train"].any() and covered[photo, "val"].any()
        assert not (covered[photo, "train"] & covered[photo, "val"]).any()


def test_crops_are_the_pixels_that_their_names_say():
    dataset = PhotoCrops("val", 24, 30)
    for i, (photo, x, y, side) in enumerate(windows(dataset)):
        pixels = np.array(Image.open(photo_path(photo)).convert("RGB"))[y : y + side, x : x + side]
        expected = scaled_by_torch(np.ascontiguousarray(pixels), 24, 24)
        item = dataset[i]
        assert (item["image"] - expected).abs().mean() < 0.6 / 127.5
        assert (item["index"], item["position"], item["view"], item["broken"]) == (i, i, 0, ())
    assert dataset.pixels.dtype == np.uint8 and dataset.pixels.shape == (30, 24, 24, 3)


def test_windows_vary_in_place_and_scale():
    found = list(windows(PhotoCrops("train", 32, 200)))
    sides = [side for *_, side in found]
    assert min(sides) < 45 and max(sides) > 115 and all(32 <= side <= 128 for side in sides)
    assert len(set(found)) == 200 and {photo for photo, *_ in found} == set(PHOTOS)


def test_photo_crops_are_fixed_by_their_seed():
    torch.manual_seed(0)
    first = PhotoCrops("train", 16, 20)
    torch.manual_seed(1)
    second, longer = PhotoCrops("train", 16, 20), PhotoCrops("train", 16, 30)
    other = PhotoCrops("train", 16, 20, window_seed=1)
    assert first.names == second.names == longer.names[:20] and (first.pixels == second.pixels).all()
    assert first.identity() == second.identity()
    val = PhotoCrops("val", 16, 20)
    assert len({dataset.identity() for dataset in (first, longer, other, val, PhotoCrops("train", 17, 20))}) == 5
    assert PhotoCrops("val", 300, 1).identity() != PhotoCrops("val", 301, 1).identity()  # one window, two sizes
    assert first.names[:3] == ["astronaut@273,376,25", "chelsea@18,12,27", "china@125,38,43"]


@pytest.mark.parametrize("module, package", [("sklearn", "scikit-learn"), ("skimage", "scikit-image")])
def test_photographs_without_their_package_say_what_to_install(monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=f"dataset_name: photos .*pip install {package}"):
        PhotoCrops("train", 16, 20)


# Sampler


def addresses(**settings):
    """{image: (step, position)} of an epoch, over all ranks; each image may occur once."""
    found, epoch = {}, settings.pop("epoch", 0)
    for rank in range(settings.get("world_size", 1)):
        sampler = GlobalBatchSampler(rank=rank, **settings)
        sampler.set_state(epoch, 0)
        for batch in sampler:
            assert 0 < len(batch) <= settings["batch_size"]
            for index, step, position in batch if batch[0][2] != FILLER else ():
                assert index not in found
                found[index] = (step, position)
    return found


def test_an_epoch_takes_each_image_once_in_shuffled_order():
    first, second = addresses(n_images=53, batch_size=12), addresses(n_images=53, batch_size=12, epoch=1)
    assert sorted(first) == sorted(second) == list(range(53))
    expected = [(step, position) for step in range(5) for position in range(12 if step < 4 else 5)]
    assert sorted(first.values()) == expected
    assert sorted(second.values()) == [(step + 5, position) for step, position in expected]
    order = sorted(first, key=first.get)
    assert order != sorted(second, key=second.get) and order != list(range(53))
    assert addresses(n_images=53, batch_size=12, seed=1) != first
    torch.manual_seed(99)
    assert addresses(n_images=53, batch_size=12) == first


def test_without_shuffle_the_order_is_kept():
    assert addresses(n_images=7, batch_size=3, shuffle=False, epoch=2) == {i: (6 + i // 3, i % 3) for i in range(7)}


@pytest.mark.parametrize("batch_size, accumulation, world_size", [(3, 4, 1), (6, 1, 2), (2, 2, 3)])
@pytest.mark.parametrize("n_images", [1, 48, 53])
def test_addresses_do_not_depend_on_how_the_global_batch_is_factored(n_images, batch_size, accumulation, world_size):
    reference = addresses(n_images=n_images, batch_size=12, epoch=3)
    found = addresses(
        n_images=n_images, batch_size=batch_size, accumulation=accumulation, world_size=world_size, epoch=3
    )
    assert found == reference


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch_size, accumulation", [(1, 3), (5, 3)])
def test_ranks_yield_equally_many_micro_batches_of_even_size(world_size, batch_size, accumulation):
    for n_images in range(1, 64):
        samplers = [
            GlobalBatchSampler(n_images, batch_size, accumulation, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        batches = [list(sampler) for sampler in samplers]
        first = samplers[0]
        assert first.steps_per_epoch == -(-n_images // first.global_batch_size)
        assert {len(found) for found in batches} == {len(first)}
        counts = [first.micro_batches(step) for step in range(first.steps_per_epoch)]
        assert sum(counts) == len(first) and all(count == accumulation for count in counts[:-1])
        for step, count in enumerate(counts):
            window = [[batch for batch in found if batch[0][1] == step] for found in batches]
            assert {len(found) for found in window} == {count}
            real = [[[item for item in batch if item[2] != FILLER] for batch in found] for found in window]
            assert all(real[r][m] or len(window[r][m]) == 1 for r in range(world_size) for m in range(count))
            sizes = [len(batch) for found in real for batch in found]
            assert max(sizes) - min(sizes) <= 1 and max(sizes) <= batch_size
            positions = [place for m in range(count) for found in real for _, _, place in found[m]]
            assert positions == list(range(first.window_size(step)))
        assert sum(map(first.window_size, range(first.steps_per_epoch))) == n_images


def test_a_filler_is_a_batch_that_counts_for_nothing(folder):
    """Three images for two processes with one each: in the second step one has nothing left."""
    dataset = ImageFolderDataset(list_images(folder)[:3], 8)
    samplers = [GlobalBatchSampler(3, 1, rank=rank, world_size=2, shuffle=False) for rank in range(2)]
    last = [build_loader(dataset, sampler, 0, "cpu") for sampler in samplers]
    last = [list(loader)[-1] for loader in last]
    assert sorted(batch.weight == 0 for batch in last) == [False, True]
    assert sorted(batch.size for batch in last) == [0, 1]
    assert all(len(batch.images) == 1 and batch.position.tolist() == [0] for batch in last)


@pytest.mark.parametrize("step_in_epoch", [0, 1, 4, 5])
def test_set_state_resumes_with_exactly_the_rest_of_the_epoch(step_in_epoch):
    settings = {"n_images": 53, "batch_size": 3, "accumulation": 2, "world_size": 2, "rank": 1}
    whole = GlobalBatchSampler(**settings)
    whole.set_state(2, 0)
    whole = list(whole)
    resumed = GlobalBatchSampler(**settings)
    resumed.set_state(2, step_in_epoch)
    assert list(resumed) == [batch for batch in whole if batch[0][1] >= 2 * resumed.steps_per_epoch + step_in_epoch]
    assert resumed.steps_per_epoch == 5 and len(resumed) == len(whole)


# Loader


def test_batches_do_not_depend_on_workers(folder):
    paths = list_images(folder)
    paths[7].write_bytes(b"")
    dataset = ImageFolderDataset(paths, img_size=16, flip=True, crop="random", seed=3)
    epochs = {}
    for num_workers in (0, 2):
        sampler = GlobalBatchSampler(len(dataset), 2, accumulation=2)
        loader = build_loader(dataset, sampler, num_workers, "cpu")
        for epoch in (0, 1):
            sampler.set_state(epoch, 0)
            epochs[num_workers, epoch] = list(loader)
            assert len(epochs[num_workers, epoch]) == len(loader) == 6
    for epoch in (0, 1):
        for one, other in zip(epochs[0, epoch], epochs[2, epoch], strict=True):
            assert one.broken == other.broken
            assert all(torch.equal(getattr(one, key), getattr(other, key)) for key in ("images", "index", "position"))
    assert [file.path for batch in epochs[2, 0] for file in batch.broken] == [str(paths[7])]
    assert not torch.equal(epochs[0, 0][0].index, epochs[0, 1][0].index)


class ThreadCounts(torch.utils.data.Dataset):
    def __getitem__(self, item):
        return {"image": torch.tensor(torch.get_num_threads()), "index": 0, "position": 0, "view": 0, "broken": ()}


def test_workers_use_one_thread_each_and_loading_leaves_the_random_state_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    try:
        loader = build_loader(ThreadCounts(), GlobalBatchSampler(2, 1), 2, "cpu")
        assert [batch.images.tolist() for batch in loader] == [[1], [1]]
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "limit, advice",
    [
        (resource.RLIMIT_NOFILE, r"too many files are open\. Raise the limit in the shell \(ulimit -n\)"),
        (resource.RLIMIT_FSIZE, r"no room in the shared memory .*\(docker run --shm-size=8g\)"),
    ],
    ids=["files", "memory"],
)
def test_processes_that_cannot_hand_over_their_batches_end_the_loading_with_what_to_raise(folder, limit, advice):
    """A kept batch costs one open file. A container's full /dev/shm is simulated by a limit on the size of a file."""
    dataset = ImageFolderDataset(list_images(folder), img_size=64)
    loader = build_loader(dataset, GlobalBatchSampler(12, 2), 2, "cpu")
    loader.timeout = 30  # rather fail than hang
    before, kept, files = resource.getrlimit(limit), [], limit == resource.RLIMIT_NOFILE
    value = len(os.listdir("/proc/self/fd")) + 60 if files else 90_000  # a batch has 98304 bytes
    resource.setrlimit(limit, (value, before[1]))
    try:
        with pytest.raises(LoaderError, match=rf"^the processes that load .*{advice}, or lower num_workers \(now 2;"):
            for _ in range(20):
                kept += list(loader)
    finally:
        resource.setrlimit(limit, before)
    assert len(kept) >= (25 if files else 0)


@pytest.fixture
def loading(folder):
    """A loader of six batches that two processes load, and those."""
    before = set(multiprocessing.active_children())
    loader = build_loader(ImageFolderDataset(list_images(folder), img_size=16), GlobalBatchSampler(12, 2), 2, "cpu")
    batches = iter(loader)
    next(batches), next(batches)  # one of each process, which is at work then
    loading = SimpleNamespace(loader=loader, batches=batches)
    loading.processes = list(set(multiprocessing.active_children()) - before)
    assert len(loading.processes) == 2
    return loading


def test_a_killed_loading_process_ends_the_loading_with_one_line(loading):
    """When its batch is waited for; PyTorch would raise it anywhere in a step."""
    os.kill(loading.processes[0].pid, signal.SIGKILL)
    with pytest.raises(LoaderError, match="one of them was killed, perhaps for want of memory.*lower num_workers"):
        for _ in range(3):  # some batches are there already
            list(loading.batches)
            loading.batches = iter(loading.loader)


def test_a_stop_signal_from_elsewhere_does_not_end_the_loading(loading):
    """It goes to all processes of a job, and the training process needs its batches to act on it."""
    for process in loading.processes:
        for signum in ("TERM", "INT"):
            subprocess.run(["kill", f"-{signum}", str(process.pid)], check=True)
    assert len(list(loading.batches)) == 4


@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_a_loader_that_is_dropped_ends_its_processes(loading, in_a_cycle):
    loading.loader.itself = loading.loader if in_a_cycle else None
    del loading.loader, loading.batches
    gc.collect()
    assert [process.exitcode for process in loading.processes] == [0, 0]


def test_datasets_can_be_sent_to_a_spawned_worker(folder):
    for dataset in (ImageFolderDataset(list_images(folder), 16), PhotoCrops("val", 16, 5)):
        copy = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(copy[3]["image"], dataset[3]["image"]) and copy.identity() == dataset.identity()


# Configuration


def config(**changes):
    settings = dict(dataset_name="folder", img_size=16, crop="random", val_fraction=0.25, photos_train_crops=12,
                    photos_val_crops=5)  # fmt: skip
    return TrainConfig.from_dict({**settings, **changes})


def test_build_datasets_from_a_folder(folder, caplog):
    train, val = build_datasets(config(data_path=str(folder)))
    assert len(train) == 9 and len(val) == 3 and not set(train.names) & set(val.names)
    assert train.flip and train.crop == "random" and not val.flip and val.crop == "center"
    assert not any(val[(0, 0, position)]["view"] for position in range(20))
    plain, none = build_datasets(config(data_path=str(folder), val_fraction=0.0, use_augmentation=False, crop="center"))
    assert len(plain) == 12 and none is None and not plain.flip and plain.crop == "center"
    with caplog.at_level(logging.WARNING):
        train, val = build_datasets(config(data_path=str(folder), dataset_name="celebahq"))
    assert train.names == [f"{i}.png" for i in range(11)] and val.names == ["11.png"] and "celebahq" in caplog.text


def test_build_datasets_of_photographs():
    train, val = build_datasets(config(dataset_name="photos", seed=2))
    assert (len(train), len(val)) == (12, 5) and train.flip and not val.flip
    assert train.names == PhotoCrops("train", 16, 12).names


def test_missing_data_path_says_what_to_set():
    with pytest.raises(ValueError, match="data_path is None, but dataset_name is 'celebahq': set data_path"):
        build_datasets(config(dataset_name="celebahq"))


# Broken files


def broken_files(*names):
    return [BrokenFile(f"{name}.jpg", f"no {name}") for name in names]


def test_broken_files_are_counted_and_logged_once_with_the_reason(caplog):
    broken = BrokenFiles(1000)
    for names in ("ab", "b", range(8)):
        broken.note(broken_files(*names))
        broken.report()
    assert broken.count == len(caplog.records) == 10 and {record.levelname for record in caplog.records} == {"WARNING"}
    assert caplog.messages[0] == "cannot read the image a.jpg: no a; another takes its place"
    broken.note(broken_files("c"))
    with pytest.raises(TooManyBrokenFiles, match=r"11 of 1000 images cannot be read(?s:.)*\na\.jpg: no a\nb\.jpg"):
        broken.report()
    broken = BrokenFiles(100)
    broken.note(broken_files(*range(50)))
    with pytest.raises(TooManyBrokenFiles) as caught:
        broken.report()
    assert str(caught.value).endswith("19.jpg: no 19\nand 30 more")


def test_one_broken_file_never_stops_a_run():
    broken = BrokenFiles(3)
    broken.note(broken_files("a"))
    broken.note(broken_files("a"))
    broken.report()
    broken.note(broken_files("b"))
    with pytest.raises(TooManyBrokenFiles, match="2 of 3"):
        broken.report()
