"""Behaviour of flextok.data.record_cache: what is stored is read back, despite kills, full disks, other processes."""

import errno
import multiprocessing
import os
import pickle
import re
import signal

import numpy as np
import pytest
import torch

from flextok.data.images import NoReadableImage
from flextok.data.record_cache import CacheError, RecordCache

KEY = {"encoder": "dinov2_vitl14", "weights_digest": "a1b2", "img_size": 256, "crop": "centre", "revision": None}
N, FLIPS, SHAPE = 24, 2, (3, 4, 5)
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "caches" / "features"


def create(folder, **changes):
    return RecordCache.create(**{**dict(folder=folder, key=KEY, n_images=N, flips=FLIPS, shape=SHAPE), **changes})


def open_cache(folder, **changes):
    return RecordCache.open(**{**dict(folder=folder, key=KEY, n_images=N, flips=FLIPS, shape=SHAPE), **changes})


def records(indices, dtype=np.float16) -> torch.Tensor:
    """Values [B, FLIPS, *SHAPE] that tell image, flip and place apart."""
    place = np.arange(FLIPS * np.prod(SHAPE)).reshape(FLIPS, *SHAPE)
    return torch.from_numpy(np.sin(np.reshape(indices, (-1, 1, 1, 1, 1)) * 1000.0 + place).astype(dtype))


def assert_holds(cache, indices):
    for flip in range(FLIPS):
        assert torch.equal(cache.read(indices, flip), records(indices)[:, flip])


def stored(cache):
    """Indices of the images whose records can be read."""
    return sorted({*range(N)} - {*cache.missing().tolist(), *cache.unreadable().tolist()})


def in_children(n, function):
    """Run a function in n forked processes at once, each with its number; their exit codes."""
    processes = [FORK.Process(target=function, args=(rank,)) for rank in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


# Values


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_records_are_read_as_they_were_written(folder, dtype):
    cache = create(folder, dtype=dtype)
    values = records(range(N), dtype)
    cache.write([5, 2, 23], values[[5, 2, 23]])
    cache.write(torch.tensor([0, 7]), values[[0, 7]])
    cache.write([5, 7], values[[8, 9]])  # what is there stays
    for one in (cache, cache.flush() or open_cache(folder, dtype=dtype), pickle.loads(pickle.dumps(cache))):
        indices, flips = [7, 23, 2, 7, 0], [1, 0, 1, 0, 0]
        result = one.read(indices, flips)
        assert result.dtype == getattr(torch, dtype) and result.is_contiguous() and result.shape == (5, *SHAPE)
        assert torch.equal(result, values[indices, flips])
        result.fill_(7)  # a copy
        assert torch.equal(one.read(torch.tensor([5, 2]), torch.tensor([True, False])), values[[5, 2], [1, 0]])
        with pytest.raises(KeyError, match="image 1 is not in the cache"):
            one.read([0, 1])
    plain = open_cache(folder, dtype=dtype, flips=1)  # has more than was asked for
    assert plain.flips == FLIPS and torch.equal(plain.read([5, 7]), values[[5, 7], 0])


# States of images


def test_records_show_to_others_after_flush(folder):
    cache, other = create(folder), open_cache(folder)
    cache.write([1, 2], records([1, 2]))
    cache.mark_unreadable([4])
    assert stored(cache) == [1, 2] and other.missing().tolist() == list(range(N))
    cache.flush()
    assert stored(other) == [1, 2] and other.unreadable().tolist() == [4]
    assert other.missing(2, 7).tolist() == [3, 5, 6] and other.missing(1, 3).tolist() == []
    assert_holds(other, [1, 2])
    with other.claim(0, N):
        other.write(other.missing(), records(other.missing()))
        assert other.complete and not cache.complete
    assert cache.complete and open_cache(folder).complete  # the end of a claim flushes


def test_unreadable_images_give_way_to_the_next(folder):
    cache = create(folder)
    cache.mark_unreadable([3, 4, 6, N - 1])
    for one in (cache, cache.flush() or open_cache(folder)):
        assert list(map(one.resolve, [2, 3, 4, 5, 6, N - 1])) == [2, 5, 5, 5, 7, 0]
    cache.write(range(N), records(range(N)))
    assert cache.complete and 3 not in stored(cache)
    cache.retry_unreadable()
    assert cache.missing().tolist() == [3, 4, 6, N - 1]
    nothing = create(folder.with_name("nothing"))
    nothing.mark_unreadable(range(N))
    with pytest.raises(NoReadableImage, match="none of the 24 images"):
        nothing.resolve(5)


# Opening


def test_a_folder_without_a_cache_gives_none_and_one_of_other_settings_is_refused_with_all_that_differs(folder):
    folder.mkdir(parents=True)
    (folder / "records.bin").write_bytes(b"12")
    assert open_cache(folder) is None
    create(folder)
    assert open_cache(folder, key={**KEY, "weights_digest": None}, optional=("weights_digest",))  # not known yet
    asked = {**KEY, "encoder": "dinov2_vitb14", "revision": "main", "weights_digest": "ffff"}
    changes = dict(key=asked, n_images=N + 1, flips=3, optional=("weights_digest",))
    differences = (
        "n_images was 24, now 25; flips was 2, now 3; encoder was 'dinov2_vitl14', now 'dinov2_vitb14'; "
        "revision was None, now 'main'; weights_digest was 'a1b2', now 'ffff': use those settings again, or set "
        "cache_dir to another folder"
    )
    for function in (open_cache, create):
        with pytest.raises(CacheError, match=re.escape(differences)):
            function(folder, **changes)


def test_a_disk_that_fills_during_creation_leaves_no_files(folder, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(CacheError, match="cache of 5.8 kB .*No space left on device"):
        patch.setattr(os, "posix_fallocate", full)
        create(folder)
    assert [path.name for path in folder.iterdir()] == ["create.lock"]
    assert create(folder).missing().size == N


# Several processes


def fill_with_claims(folder, log, ready, die_at=None):
    """Fill a cache in ranges of 3 images, as one of several processes; write each image to the log."""
    cache = open_cache(folder)
    ready.wait()
    while not cache.complete:
        for start in range(0, N, 3):
            with cache.claim(start, start + 3) as claimed:
                for index in cache.missing(start, start + 3) if claimed else ():
                    cache.write([index], records([index]))
                    os.write(log, b"%d\n" % index)
                    if index == die_at:
                        os.kill(os.getpid(), signal.SIGKILL)


def test_processes_with_claims_compute_each_image_once(folder, tmp_path):
    """Of one that was killed, what it had not flushed is computed again."""
    create(folder)
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    assert in_children(1, lambda rank: fill_with_claims(folder, log, FORK.Barrier(1), 10)) == [-signal.SIGKILL]
    ready = FORK.Barrier(3)
    assert in_children(3, lambda rank: fill_with_claims(folder, log, ready)) == [0] * 3
    os.close(log)
    images = list(map(int, (tmp_path / "log").read_text().split()))
    assert sorted(images) == sorted([*range(N), 9, 10])
    assert_holds(open_cache(folder), range(N))
