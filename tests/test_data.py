"""Behaviour of flextok.data: finding, splitting and reading images, photographs, samplers, loaders."""

import logging
import multiprocessing
import os
import resource
import signal

import numpy as np
import pytest
import torch
from PIL import Image, features

from flextok.data.batch import FILLER
from flextok.data.images import (
    BrokenFile,
    BrokenImage,
    ImageFolderDataset,
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

AVIF = ["avif"] if features.check("avif") else []


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


def test_every_extension_in_any_case_is_found_also_in_linked_folders_and_hidden_files_are_not(tmp_path):
    names = ["a.jpg", "b.JPEG", "c.Png", "d.webp", "e.bmp", "f.tif", "g.TIFF", "h.gif"]
    names += ["i.jfif", "j.JPE"] + [f"k.{end}" for end in AVIF]
    touch(tmp_path / "set", *names, "._a.jpg", ".hidden/i.jpg", "j.jpg.txt", "a.pdf")
    touch(tmp_path / "elsewhere", "l.jpg")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    assert listed(tmp_path / "set") == [*names, "linked/l.jpg"]


def test_images_of_formats_that_are_not_read_are_counted_and_one_is_named(tmp_path, caplog):
    touch(tmp_path, "a.jpg", "b/c.heic", "b/d.HEIC", "e.svg", "f.jp2", "g.psd", "._h.heic")
    assert listed(tmp_path) == ["a.jpg"]
    (line,) = caplog.messages
    assert "5 files are left out, of formats that are not read: 2 .heic, " in line and "(such as b/c.heic)" in line


def test_masks_of_celebahq_are_left_out_and_the_log_says_from_which_folders_images_are_taken(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = "CelebAMask-HQ/CelebA-HQ-img"
    touch(tmp_path / "hq", f"{folder}/0.jpg", "CelebAMask-HQ/CelebAMask-HQ-mask-anno/0/0_hair.png", "_X/readme")
    assert listed(tmp_path / "hq") == [f"{folder}/0.jpg"]
    assert f"only the 1 images of its folder {folder} are taken" in caplog.text
    touch(tmp_path / "all", "2.jpg", "images/1.jpg", "masks/1.png")
    assert listed(tmp_path / "all") == ["images/1.jpg", "masks/1.png", "2.jpg"]
    assert "3 images of all its folders are taken: . (1), images (1), masks (1)" in caplog.text


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
    assert len(val) == 20 and test == [] and val != paths[-20:]
    assert train == sorted(train) and val == sorted(val) and sorted(train + val) == paths
    torch.manual_seed(1)
    assert split_paths(paths, "folder", 0.1, 5) == (train, val, test)
    assert split_paths(paths, "folder", 0.1, 6)[1] != val
    for n, fraction, n_val in ((10, 0.0, 0), (10, 0.01, 1), (2, 0.99, 1), (1, 0.5, 0), (10, 0.25, 2)):
        assert list(map(len, split_paths(paths[:n], "folder", fraction, 0))) == [n - n_val, n_val, 0]


# Reading


def over_white(rgb, alpha):
    weight = alpha[..., None] / 255
    return rgb * weight + 255 * (1 - weight)


PIXELS, ALPHA, CMYK = noise(16, 16), noise(16, 16, seed=1)[..., 0], np.dstack([noise(16, 16), noise(16, 16)[..., 0]])
PALETTE = Image.fromarray(PIXELS).quantize(8)
GREY, RAMP = PIXELS[..., :1], np.linspace(0, 1, 64).reshape(8, 8, 1)
MODES = {  # what is saved, and the colours that are read, which are broadcast to RGB
    "rgb.png": (PIXELS, PIXELS),
    "palette.png": (PALETTE, PALETTE.convert("RGB")),
    "grey.png": (PIXELS[..., 0], GREY),
    "1 bit.png": (PIXELS[..., 0] > 127, (GREY > 127) * 255),
    "16 bit.png": ((RAMP[..., 0] * 65535).astype(np.uint16), RAMP * 255),
    "16 bit.tif": ((RAMP[..., 0] * 65535).astype(np.uint16), RAMP * 255),
    "alpha.png": (np.dstack([PIXELS, ALPHA]), over_white(PIXELS, ALPHA)),
    "grey with alpha.png": (np.dstack([GREY, ALPHA]), over_white(GREY, ALPHA)),
    "cmyk.tif": (Image.frombytes("CMYK", (16, 16), CMYK.tobytes()), (255 - CMYK[..., :3]) * (1 - CMYK[..., 3:] / 255)),
}


@pytest.mark.parametrize("name", MODES)
def test_images_of_any_mode_are_read_as_rgb_over_white(tmp_path, name):
    image, expected = MODES[name]
    assert np.abs(read(save(tmp_path / name, image)) - np.asarray(expected, dtype=float)).max() < 1


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "bmp", "tif", "gif", "jfif", *AVIF])
def test_truncated_files_are_broken(tmp_path, extension):
    path = save(tmp_path / f"a.{extension}", noise(50, 50))
    assert read(path).shape == (50, 50, 3)
    content = path.read_bytes()
    for kept in (0.02, 0.5, 0.98):
        path.write_bytes(content[: int(kept * len(content))])
        with pytest.raises(BrokenImage, match=f"cannot read the image .*a.{extension}: ."):
            load_image(path)


@pytest.mark.filterwarnings("error")
def test_a_panorama_beyond_pillows_own_limit_is_read(tmp_path):
    path = save(tmp_path / "panorama.jpg", Image.new("L", (20_000, 10_000), 99))
    assert load_image(path, min_size=256).size == (2500, 1250)


# Photographs


def windows(dataset):
    """[(photo, x, y, side)] of a PhotoCrops."""
    for name in dataset.names:
        photo, numbers = name.split("@")
        yield photo, *map(int, numbers.split(","))


def test_training_and_validation_windows_share_no_pixel_and_vary():
    covered, sides = {}, set()
    shapes = {photo: load_image(photo_path(photo)).size[::-1] for photo in PHOTOS}
    for split, img_size in [(split, img_size) for split in ("train", "val") for img_size in (16, 256)]:
        for photo, x, y, side in windows(PhotoCrops(split, img_size, 60)):
            height, width = shapes[photo]
            assert 0 <= x and x + side <= width and 0 <= y and y + side <= height
            mask = covered.setdefault((photo, split), np.zeros(shapes[photo], dtype=bool))
            mask[y : y + side, x : x + side] = True
            sides.add(side)
    for photo in PHOTOS:
        assert covered[photo, "train"].any() and covered[photo, "val"].any()
        assert not (covered[photo, "train"] & covered[photo, "val"]).any()
    assert len(sides) > 20


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


def test_an_epoch_takes_each_image_once_in_shuffled_order_or_as_they_are():
    first, second = addresses(images=53, batch_size=12), addresses(images=53, batch_size=12, epoch=1)
    assert sorted(first) == sorted(second) == list(range(53))
    expected = [(step, position) for step in range(5) for position in range(12 if step < 4 else 5)]
    assert sorted(first.values()) == expected
    assert sorted(second.values()) == [(step + 5, position) for step, position in expected]
    order = sorted(first, key=first.get)
    assert order != sorted(second, key=second.get) and order != list(range(53))
    assert addresses(images=53, batch_size=12, seed=1) != first
    torch.manual_seed(99)
    assert addresses(images=53, batch_size=12) == first
    assert addresses(images=7, batch_size=3, shuffle=False, epoch=2) == {i: (6 + i // 3, i % 3) for i in range(7)}


@pytest.mark.parametrize("batch_size, accumulation, world_size", [(3, 4, 1), (6, 1, 2), (2, 2, 3)])
@pytest.mark.parametrize("n_images", [1, 48, 53])
def test_addresses_do_not_depend_on_how_the_global_batch_is_factored(n_images, batch_size, accumulation, world_size):
    reference = addresses(images=n_images, batch_size=12, epoch=3)
    found = addresses(images=n_images, batch_size=batch_size, accumulation=accumulation, world_size=world_size, epoch=3)
    assert found == reference


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch_size, accumulation", [(1, 3), (5, 3)])
def test_ranks_yield_equally_many_micro_batches(world_size, batch_size, accumulation):
    for n_images in range(1, 64):
        samplers = [
            GlobalBatchSampler(n_images, batch_size, accumulation, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for step, size in enumerate(map(samplers[0].window_size, range(samplers[0].steps_per_epoch))):
            batches = [[batch for batch in sampler if batch[0][1] == step] for sampler in samplers]
            assert {len(found) for found in batches} == {samplers[0].micro_batches(step)}
            sizes = [sum(item[2] != FILLER for item in batch) for found in batches for batch in found]
            assert sum(sizes) == size and max(sizes) - min(sizes) <= 1


# Loader


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


def test_a_killed_loading_process_ends_the_loading_with_one_line(folder, monkeypatch):
    """When its batch is waited for; PyTorch would raise it anywhere in a step."""
    look = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(look, "__defaults__", (0.2,))  # else every five seconds
    before = set(multiprocessing.active_children())
    loader = build_loader(ImageFolderDataset(list_images(folder), img_size=16), GlobalBatchSampler(12, 2), 2, "cpu")
    batches = iter(loader)
    next(batches), next(batches)  # one of each process, which is at work then
    os.kill((set(multiprocessing.active_children()) - before).pop().pid, signal.SIGKILL)
    with pytest.raises(LoaderError, match="one of them was killed, perhaps for want of memory.*lower num_workers"):
        for _ in range(3):  # some batches are there already
            list(batches)
            batches = iter(loader)


# Broken files


def test_broken_files_are_logged_once_with_the_reason_and_end_a_run_beyond_one_percent(caplog):
    broken = BrokenFiles(1000)
    for names in ("ab", "b", range(8)):
        broken.note(BrokenFile(f"{name}.jpg", f"no {name}") for name in names)
        broken.report()
    assert broken.count == len(caplog.records) == 10 and {record.levelname for record in caplog.records} == {"WARNING"}
    assert caplog.messages[0] == "cannot read the image a.jpg: no a; another takes its place"
    broken.note(BrokenFile(f"{name}.jpg", f"no {name}") for name in "cdefghijklmno")
    with pytest.raises(TooManyBrokenFiles, match=r"23 of 1000 images cannot be read(?s:.)*\na\.jpg: no a\nb\.jpg"
                                                 r"(?s:.)*and 3 more$"):  # fmt: skip
        broken.report()
    broken = BrokenFiles(3)  # a single one never stops a run
    broken.note([BrokenFile("a.jpg", "no a")] * 2)
    broken.report()
    broken.note([BrokenFile("b.jpg", "no b")])
    with pytest.raises(TooManyBrokenFiles, match="2 of 3"):
        broken.report()
