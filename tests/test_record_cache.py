"""Behaviour of flextok.data.record_cache: kills, a full disk, and several processes that fill it."""

import errno
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

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


def in_children(n, function):
    """Run a function in n forked processes at once, each with its number; their exit codes."""
    processes = [FORK.Process(target=function, args=(rank,)) for rank in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def test_a_disk_that_fills_during_creation_leaves_no_files(folder, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(CacheError, match="cache of 5.8 kB .*No space left on device"):
        patch.setattr(os, "posix_fallocate", full)
        create(folder)
    assert [path.name for path in folder.iterdir()] == ["create.lock"]
    assert create(folder).missing().size == N


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
