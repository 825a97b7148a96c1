"""Hostile image folders: every file is read or skipped and reported, in bounded memory."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from flextok.data.images import (
    EXTENSIONS,
    MAX_PIXELS,
    BrokenImage,
    ImageFolderDataset,
    image_to_tensor,
    list_images,
    load_image,
)

ROOT = Path(__file__).resolve().parents[1]
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
    assert (item["index"] == 1) == (item["broken"] == (str(path),))
    return item["image"] if item["index"] == 0 else None


@settings(deadline=None, derandomize=True, max_examples=250, database=None, suppress_health_check=list(HealthCheck))
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


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_read_and_later_ones_may_be_missing(tmp_path, image_format):
    path = tmp_path / "animated.gif"
    options = dict(lossless=True) if image_format == "WEBP" else {}
    path.write_bytes(encoded(image_format, frames=40, **options))
    first = np.asarray(load_image(path), dtype=int)
    expected = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8).astype(int)
    assert np.abs(first - expected).mean() < (0.5 if image_format != "GIF" else 40)  # a GIF has 256 colours
    if image_format in ("GIF", "PNG"):
        path.write_bytes(path.read_bytes()[:-200])
        assert np.array_equal(np.asarray(load_image(path)), first)


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 1)], ids=str)
def test_the_smallest_images_are_served_in_every_format(tmp_path, image_format, size):
    path = tmp_path / "small.png"
    path.write_bytes(encoded(image_format, size))
    assert served(path, 32) is not None


def test_links_that_lead_nowhere_are_named_and_left_out(tmp_path, caplog):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "good.png").write_bytes(encoded("PNG"))
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "ring.jpg").symlink_to("gnir.jpg")
    (folder / "gnir.jpg").symlink_to("ring.jpg")
    (folder / "gone.png").symlink_to(tmp_path / "nothing.png")
    (folder / "notes.txt").symlink_to("notes.txt")
    assert list_images(folder) == [folder / "good.png"]
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == 4 and all("link to nothing, or to itself" in message for message in named)
    with pytest.raises(BrokenImage):
        load_image(folder / "loop.png")


def test_a_data_path_that_is_a_link_to_itself_does_not_exist(tmp_path):
    (tmp_path / "data").symlink_to("data")
    with pytest.raises(FileNotFoundError, match="data_path is .*data, which does not exist"):
        list_images(tmp_path / "data")


def test_names_of_any_bytes_are_listed_and_served(tmp_path):
    names = [b"\xff\xfe.png", "é\n.png".encode(), b"9" * 200 + b".png", " .png".encode(), b"-rf.png"]
    for name in names:
        (tmp_path / "x").write_bytes(encoded("PNG"))
        (tmp_path / "x").rename(Path(str(tmp_path)) / name.decode("utf-8", "surrogateescape"))
    dataset = ImageFolderDataset(list_images(tmp_path), 8)
    assert len(dataset) == len(names) and all(dataset[i]["index"] == i for i in range(len(names)))
    assert len(dataset.identity()) == 16


# Memory


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, colour=2, bits=8, body=None, more=b""):
    """A PNG of any declared size with whatever compressed body."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = zlib.compress(bytes(1000)) if body is None else body
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def zeros(n):
    """`n` zero bytes, compressed."""
    compressor = zlib.compressobj(9)
    parts = [compressor.compress(bytes(1 << 20)) for _ in range(n >> 20)]
    return b"".join(parts) + compressor.compress(bytes(n % (1 << 20))) + compressor.flush()


def bmp(width, height):
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def peak_mb(path, size=256):
    """What serving a file in a fresh process takes beyond the imports, in MB, and whether it was read.

    By the process's own high-water mark: that of getrusage begins with its parent's.
    """
    code = (
        "import re, sys\n"
        "from flextok.data.images import ImageFolderDataset, load_image, BrokenImage, image_to_tensor\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        "before = peak()\n"
        "try: image_to_tensor(load_image(sys.argv[1], int(sys.argv[2])), int(sys.argv[2])); read = True\n"
        "except BrokenImage as error: read = False; print(error, file=sys.stderr)\n"
        "print(peak() - before, read)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(path), str(size)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    megabytes, read = run.stdout.split()
    return float(megabytes), read == "True"


BOMBS = {
    "size": lambda: png(2**31 - 1, 2**31 - 1),
    "body": lambda: png(16, 16, body=zeros(1 << 30)),  # a gigabyte of pixels in a file of 1 MB, for 16 x 16
    "text": lambda: png(16, 16, more=chunk(b"zTXt", b"k\0\0" + zeros(1 << 29))),
    "profile": lambda: png(16, 16, more=chunk(b"iCCP", b"k\0\0" + zeros(1 << 29))),
    "bmp": lambda: bmp(2**31 - 1, 2**31 - 1),
    "gif": lambda: encoded("GIF").replace(struct.pack("<HH", 24, 16), struct.pack("<HH", 65535, 65535)),
}


@pytest.mark.parametrize("make", BOMBS.values(), ids=BOMBS.keys())
def test_decompression_bombs_take_little_memory(tmp_path, make):
    path = tmp_path / "bomb.png"
    path.write_bytes(make())
    assert path.stat().st_size < 2 << 20
    megabytes, read = peak_mb(path)
    assert megabytes < 300


@pytest.mark.parametrize("width, height", [(MAX_PIXELS, 2), (15_812, 15_812)])
def test_a_bomb_beyond_the_limit_of_pixels_is_skipped_and_reported(tmp_path, width, height):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height))
    with pytest.raises(BrokenImage, match=f"{width} x {height} pixels, more than the limit of {MAX_PIXELS}"):
        load_image(path)
    assert served(path) is None


def test_a_wide_jpeg_is_read_in_little_memory(tmp_path):
    path = tmp_path / "wide.jpg"
    Image.new("RGB", (20_000, 5_000), (200, 30, 90)).save(path)
    megabytes, read = peak_mb(path)
    assert read and megabytes < 150  # whole, it would be 400 MB


def test_the_largest_image_that_is_read_takes_no_more_than_its_pixels_four_times(tmp_path):
    path = tmp_path / "wide.png"
    path.write_bytes(png(20_000, 1_000, colour=6, body=zeros(20_001 * 4 * 1_000)))  # with transparency: the dearest
    megabytes, read = peak_mb(path)
    assert read and megabytes < 4 * 20_000 * 1_000 * 4 / 2**20


def test_a_body_that_ends_early_costs_no_more_than_its_declared_pixels(tmp_path):
    path = tmp_path / "short.png"
    path.write_bytes(png(10_000, 2_500))
    megabytes, read = peak_mb(path)
    assert not read and megabytes < 110  # 4 bytes per pixel
    assert image_to_tensor(Image.new("RGB", (1, 20_000)), 8).shape == (3, 8, 8)
