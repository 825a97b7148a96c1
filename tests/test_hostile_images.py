"""Hostile image folders: every file is read or skipped and reported, in bounded memory."""

import io
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from flextok.data.images import (
    EXTENSIONS,
    MAX_PIXELS,
    BrokenImage,
    ImageFolderDataset,
    image_to_tensor,
    list_images,
    load_image,
)

FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"]


def encoded(image_format, size=(24, 16), frames=1, **options):
    """A noise image as a file's bytes."""
    images = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        for i in range(frames)
    ]
    buffer = io.BytesIO()
    more = dict(save_all=True, append_images=images[1:]) if frames > 1 else {}
    images[0].save(buffer, image_format, **more, **options)
    return buffer.getvalue()


def served(path, size=8):
    """What the dataset makes of one file beside a good one: its tensor, or None if it was skipped and reported."""
    good = path.parent / "good.png"
    good.write_bytes(encoded("PNG"))
    item = ImageFolderDataset([path, good], size)[0]
    assert item["image"].shape == (3, size, size) and item["image"].abs().max() <= 1
    assert (item["index"] == 1) == ([file.path for file in item["broken"]] == [str(path)])
    assert all(file.reason for file in item["broken"])
    return item["image"] if item["index"] == 0 else None


@settings(deadline=None, derandomize=True, max_examples=150, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(FORMATS),
    st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=6)), max_size=4),
    st.one_of(st.just(1.0), st.floats(0, 1)),
    st.sampled_from(EXTENSIONS),
)
def test_any_damage_of_any_format_is_read_or_reported(tmp_path_factory, image_format, changes, kept, extension):
    data = bytearray(encoded(image_format))
    for place, piece in changes:
        start = int(place**2 * len(data))  # rather in the header
        data[start : start + len(piece)] = piece
    path = tmp_path_factory.getbasetemp() / f"any{extension}"
    path.write_bytes(data[: int(kept * len(data))])
    served(path)


def test_later_frames_of_an_animation_may_be_missing(tmp_path):
    path = tmp_path / "animated.gif"
    for image_format in ("GIF", "PNG"):
        path.write_bytes(encoded(image_format, frames=40))
        first = np.asarray(load_image(path))
        path.write_bytes(path.read_bytes()[:-200])
        assert np.array_equal(np.asarray(load_image(path)), first)


@pytest.mark.parametrize("image_format", FORMATS)
def test_the_smallest_images_are_served_in_every_format(tmp_path, image_format):
    for size in ((1, 1), (1, 3), (2, 1)):
        (tmp_path / "small.png").write_bytes(encoded(image_format, size))
        assert served(tmp_path / "small.png", 32) is not None


def test_links_that_lead_nowhere_are_named_and_left_out(tmp_path, caplog):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "good.png").write_bytes(encoded("PNG"))
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "gone.png").symlink_to(tmp_path / "nothing.png")
    (folder / "notes.txt").symlink_to("notes.txt")
    assert list_images(folder) == [folder / "good.png"]
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == 2 and all("link to nothing, or to itself" in message for message in named)
    (tmp_path / "data").symlink_to("data")
    with pytest.raises(FileNotFoundError, match="data_path is .*data, which does not exist"):
        list_images(tmp_path / "data")


def test_names_of_any_bytes_are_listed_and_served(tmp_path):
    names = [b"\xff\xfe.png", "é\n.png".encode(), b"9" * 200 + b".png", b" .png", b"-rf.png"]
    for name in names:
        (tmp_path / name.decode("utf-8", "surrogateescape")).write_bytes(encoded("PNG"))
    dataset = ImageFolderDataset(list_images(tmp_path), 8)
    assert len(dataset) == len(names) and all(dataset[i]["index"] == i for i in range(len(names)))
    assert len(dataset.identity()) == 16


def test_png_files_with_large_texts_and_profiles_are_read(tmp_path):
    """Editors store megabytes of XMP history in a PNG, compressed or not; profiles of printers have megabytes too."""
    large = np.random.default_rng(0).integers(97, 123, 2_500_000, dtype=np.uint8).tobytes().decode()
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", large, zip=True)
    info.add_text("Description", large, zip=True)
    info.add_text("Comment", large)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + large.encode()
    path = tmp_path / "edited.png"
    for options in ({"pnginfo": info}, {"icc_profile": profile}):
        path.write_bytes(encoded("PNG", **options))
        assert path.stat().st_size > 1_000_000
        assert np.array_equal(np.asarray(load_image(path)), np.asarray(Image.open(io.BytesIO(encoded("PNG")))))


# Memory


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, body):
    """An RGBA file of any declared size with whatever compressed body."""
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("width, height", [(MAX_PIXELS, 2), (15_812, 15_812)])
def test_an_image_beyond_the_limit_of_pixels_is_skipped_and_reported(tmp_path, width, height):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height, zlib.compress(bytes(1000))))
    with pytest.raises(BrokenImage, match=f"{width} x {height} pixels, more than the limit of {MAX_PIXELS}|exceeds"):
        load_image(path)
    assert served(path) is None


def test_a_large_image_takes_no_more_than_its_pixels_four_times(tmp_path):
    width, height = 20_000, 1_000
    path = tmp_path / "wide.png"
    path.write_bytes(png(width, height, zlib.compress(bytes((4 * width + 1) * height), 1)))
    load_image(path).close()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 4 * width * height * 4, limits[1]))
    try:
        assert image_to_tensor(load_image(path, 256), 256).shape == (3, 256, 256)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
