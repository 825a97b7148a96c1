"""Behaviour of flextok.data.record_cache: what is stored is read back, despite kills, full disks, other processes."""

import errno
import fcntl
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from flextok.data import record_cache
from flextok.data.images import NoReadableImage
from flextok.data.record_cache import CacheError, RecordCache, cache_bytes, readable_size, record_bytes

KEY = {"encoder": "dinov2_vitl14", "weights_digest": "a1b2", "img_size": 256, "crop": "centre", "revision": None}
N, FLIPS, SHAPE = 24, 2, (3, 4, 5)
RECORD = 3 * 4 * 5 * 2  # bytes
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


def in_child(function, *arguments):
    """Run a function in a forked process; its exit code (negative: the signal that ended it)."""
    process = FORK.Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


# Values


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_records_are_read_as_they_were_written(folder, dtype):
    cache = create(folder, dtype=dtype)
    values = records(range(N), dtype)
    cache.write([5, 2, 23], values[[5, 2, 23]])
    cache.write(torch.tensor([0, 7]), values[[0, 7]])
    for one in (cache, cache.flush() or open_cache(folder, dtype=dtype)):
        indices, flips = [7, 23, 2, 7, 0], [1, 0, 1, 0, 0]
        result = one.read(indices, flips)
        assert result.dtype == getattr(torch, dtype) and result.is_contiguous() and result.shape == (5, *SHAPE)
        assert torch.equal(result, values[indices, flips])
        assert torch.equal(one.read(torch.tensor([5, 2]), torch.tensor([True, False])), values[[5, 2], [1, 0]])
        result.fill_(7)  # a copy
        assert torch.equal(one.read(indices, flips), values[indices, flips])
        with pytest.raises(KeyError, match="image 1 is not in the cache"):
            one.read([0, 1])


def test_files_are_plain_arrays_of_the_stated_size(folder):
    cache = create(folder)
    cache.write([3], records([3]))
    cache.mark_unreadable([4])
    cache.flush()
    content = np.fromfile(folder / "records.bin", np.float16).reshape(N, FLIPS, *SHAPE)
    assert np.array_equal(content[3], records([3])[0]) and not content[[0, 1, 2, *range(4, N)]].any()
    assert (folder / "done.bin").read_bytes() == bytes([0, 0, 0, 1, 2] + [0] * (N - 5))
    assert record_bytes(SHAPE) == RECORD and record_bytes(SHAPE, "float32") == 2 * RECORD
    assert cache.nbytes == cache_bytes(N, FLIPS, SHAPE) == N * FLIPS * RECORD + N
    assert cache.nbytes == sum((folder / name).stat().st_size for name in ("records.bin", "done.bin"))
    sizes = [524_288, 2_806_000, 12, 3.2e11, 4.5e15]
    assert list(map(readable_size, sizes)) == ["524.3 kB", "2.8 MB", "0.0 kB", "320.0 GB", "4500.0 TB"]


def test_space_is_reserved_at_creation(folder):
    create(folder, shape=(2**20,), n_images=4)
    assert (folder / "records.bin").stat().st_blocks * 512 >= 4 * FLIPS * 2**21


def test_first_write_of_an_image_stays(folder):
    cache = create(folder)
    cache.write([1, 1], records([1, 9]))
    for _ in range(2):  # pending, then flushed
        cache.write([0, 1], records([0, 9]))
        assert_holds(cache, [0, 1])
        cache.flush()
    other = open_cache(folder)
    other.write([1], records([9]))
    other.mark_unreadable([1])
    assert_holds(other, [1])


def test_values_that_are_not_finite_are_refused_by_image(folder):
    cache = create(folder)
    for bad in (np.nan, np.inf, -np.inf):
        values = records([3, 8, 9])
        values[1, 1, 2, 3, 4] = bad
        with pytest.raises(CacheError, match="image 8 .*infinite or NaN in float16.*not stored"):
            cache.write([3, 8, 9], values)
    assert stored(cache) == [3]
    cache.write([8], records([8]))
    assert_holds(cache, [3, 8])


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
    other.write(other.missing(), records(other.missing()))
    assert other.complete and not cache.complete
    other.flush()
    assert cache.complete and open_cache(folder).complete


def test_records_that_could_not_be_synced_are_never_marked(folder, monkeypatch):
    cache = create(folder)
    cache.write([0], records([0]))
    cache.flush()
    cache.write([1], records([1]))
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fdatasync", failing(errno.EIO))
        cache.flush()
    cache.flush()
    assert stored(open_cache(folder)) == [0]


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


def test_a_folder_without_a_cache_gives_none(folder):
    assert open_cache(folder) is None
    folder.mkdir(parents=True)
    assert open_cache(folder) is None
    (folder / "records.bin").write_bytes(b"12")
    (folder / "done.bin").write_bytes(b"\1" * N)
    assert open_cache(folder) is None
    assert not stored(create(folder))


def test_every_differing_field_is_named(folder):
    create(folder, key={**KEY, "gone": 1})
    asked = {**KEY, "encoder": "dinov2_vitb14", "revision": "main", "new": [1, 2]}
    changes = dict(key=asked, n_images=N + 1, flips=3, shape=(3, 20), dtype="float32", optional=("weights_digest",))
    expected = [
        "encoder was 'dinov2_vitl14', now 'dinov2_vitb14'", "revision was None, now 'main'", "gone was 1, now None",
        "new was None, now [1, 2]", "n_images was 24, now 25", "flips was 2, now 3", "shape was [3, 4, 5], now [3, 20]",
        "dtype was 'float16', now 'float32'", "use those settings again, or set cache_dir to another folder",
    ]  # fmt: skip
    for function in (open_cache, create):
        with pytest.raises(CacheError) as caught:
            function(folder, **changes)
        assert all(part in str(caught.value) for part in expected) and str(caught.value).count(", now ") == 8


def test_an_optional_field_is_compared_where_both_know_it(folder):
    def other(value, optional=("weights_digest",)):
        return open_cache(folder, key={**KEY, "weights_digest": value}, optional=optional)

    create(folder)
    assert other("a1b2") and other(None)
    with pytest.raises(CacheError, match="weights_digest was 'a1b2', now 'ffff'"):
        other("ffff")
    with pytest.raises(CacheError, match="weights_digest was 'a1b2', now None"):
        other(None, optional=())
    shutil.rmtree(folder)
    create(folder, key={**KEY, "weights_digest": None})
    assert other("ffff")


def test_more_flips_than_asked_for_are_accepted(folder):
    cache = create(folder)
    cache.write([0], records([0]))
    cache.flush()
    cache = open_cache(folder, flips=1)
    assert cache.flips == FLIPS
    cache.write([1], records([1]))
    assert_holds(cache, [0, 1])


@pytest.mark.parametrize("name, found", [("records.bin", 0), ("records.bin", 99), ("done.bin", N + 1)])
def test_a_file_of_another_size_is_refused_with_both_sizes(folder, name, found):
    create(folder)
    size = (folder / name).stat().st_size
    os.truncate(folder / name, found)
    for function in (open_cache, create):
        with pytest.raises(CacheError, match=f"{name} is damaged: it has {found} bytes, expected {size}: delete"):
            function(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', "\xff\0"])
def test_a_damaged_or_foreign_description_is_refused(folder, text):
    create(folder)
    (folder / "meta.json").write_bytes(text.encode("latin-1"))
    for function in (open_cache, create):
        with pytest.raises(CacheError, match="meta.json is damaged or not of a cache: set cache_dir .*delete"):
            function(folder)


def test_a_newer_format_and_a_file_in_the_place_of_the_folder_are_refused(folder):
    create(folder)
    path = folder / "meta.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CacheError, match="has format 2, expected 1: .*cache_dir"):
        open_cache(folder)
    with pytest.raises(CacheError, match="Not a directory: check cache_dir"):
        create(path)


def test_a_read_only_folder_serves_reading_and_refuses_the_rest():
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "cache"
        cache = create(folder)
        cache.write([0, 1], records([0, 1]))
        cache.flush()
        for path in folder.iterdir():
            path.chmod(0o444)
        folder.chmod(0o555)
        Path(parent).chmod(0o555)

        def use():
            if os.getuid() == 0:  # who may write everywhere
                os.setresuid(65534, 65534, 65534)
            cache = open_cache(folder)
            assert_holds(cache, [0, 1])
            with pytest.raises(CacheError, match="cannot write to .*records.bin: Permission denied"):
                cache.write([2], records([2]))
            with pytest.raises(CacheError, match="cannot write to .*claim.lock: Permission denied"):
                with cache.claim(0, 1):
                    pass
            with pytest.raises(CacheError, match="cannot make a cache of .* in .*new: Permission denied: .*cache_dir"):
                create(folder.with_name("new"))

        exit_code = in_child(use)
        Path(parent).chmod(0o755)
        folder.chmod(0o755)
    assert exit_code == 0


# Space


def failing(number):
    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    return fail


def test_a_cache_larger_than_the_free_space_is_refused_before_anything_is_written(folder, monkeypatch):
    needed = cache_bytes(N, FLIPS, SHAPE)
    free = needed + record_cache.RESERVE
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free - 1))
    with pytest.raises(CacheError, match=r"needs 5\.8 kB, but the disk has 67\.1 MB free, .*cache_dir"):
        create(folder)
    assert not folder.parent.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    create(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    create(folder)  # needs no more


@pytest.mark.parametrize("number, failing_call", [(errno.ENOSPC, 1), (errno.EDQUOT, 2)])
def test_a_disk_that_fills_during_creation_leaves_no_files(folder, monkeypatch, number, failing_call):
    reserve, calls = os.posix_fallocate, []

    def sometimes(*arguments):
        calls.append(arguments)
        (failing(number) if len(calls) == failing_call else reserve)(*arguments)

    with monkeypatch.context() as patch, pytest.raises(CacheError) as caught:
        patch.setattr(os, "posix_fallocate", sometimes)
        create(folder)
    assert os.strerror(number) in str(caught.value) and "5.8 kB" in str(caught.value)
    assert not {path.name for path in folder.iterdir()} - {"create.lock"}
    assert create(folder).missing().size == N


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_systems_without_reservation_and_locks_work(folder, monkeypatch, number):
    monkeypatch.setattr(os, "posix_fallocate", failing(number))
    monkeypatch.setattr(fcntl, "flock", failing(number))
    monkeypatch.setattr(fcntl, "lockf", failing(number))
    cache = create(folder)
    with cache.claim(0, N) as claimed:
        assert claimed
        cache.write(range(N), records(range(N)))
    assert_holds(open_cache(folder), range(N))


def test_a_write_that_fails_leaves_what_was_flushed(folder):
    def write_too_much():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 * FLIPS * RECORD + 100, resource.RLIM_INFINITY))
        cache = open_cache(folder)
        cache.write([0, 1, 2], records([0, 1, 2]))
        cache.flush()
        with pytest.raises(OSError) as caught:
            cache.write([3, 4, 5, 6], records([3, 4, 5, 6]))
        assert caught.value.errno == errno.EFBIG
        assert_holds(cache, range(5))
        cache.flush()

    create(folder)
    assert in_child(write_too_much) == 0
    cache = open_cache(folder)
    assert cache.missing().tolist() == list(range(5, N))
    assert_holds(cache, range(5))
    cache.write(cache.missing(), records(cache.missing()))
    assert_holds(cache, range(N))


# Kills


def fill_until_killed_at(folder, last_call):
    """Fill a cache and be killed in the middle of a system call that writes, by number."""
    calls = 0

    def killing(function, halve=None):
        def call(fd, *arguments):
            nonlocal calls
            calls += 1
            if calls == last_call:
                if halve is not None:
                    function(fd, arguments[0][: len(arguments[0]) // 2], *arguments[1:])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(fd, *arguments)

        return call

    os.pwrite = killing(os.pwrite, halve=True)
    os.fdatasync, os.posix_fallocate, os.replace = map(killing, (os.fdatasync, os.posix_fallocate, os.replace))
    cache = create(folder)
    for start in range(0, 6, 2):
        cache.write([start, start + 1], records([start, start + 1]))
        cache.flush()


def test_a_kill_in_any_call_leaves_a_cache_that_can_be_continued(tmp_path):
    opened, counts, last_call, exit_code = set(), set(), 0, -signal.SIGKILL
    while exit_code:
        last_call += 1
        folder = tmp_path / str(last_call)
        exit_code = in_child(fill_until_killed_at, folder, last_call)
        assert exit_code in (0, -signal.SIGKILL)
        opened.add(open_cache(folder) is not None)
        cache = create(folder)
        assert_holds(cache, stored(cache))
        counts.add(len(stored(cache)))
        cache.write(cache.missing(), records(cache.missing()))
        assert_holds(cache, range(N))
    assert last_call == 3 + 3 * (2 + 1 + 2 + 1) + 1
    assert opened == {False, True} and counts == set(range(7))


# Several processes


def test_processes_create_one_cache_at_once(folder):
    ready = FORK.Barrier(4)

    def create_and_write(rank):
        ready.wait()
        cache = create(folder)
        cache.write([rank], records([rank]))
        cache.flush()

    processes = [FORK.Process(target=create_and_write, args=(rank,)) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert_holds(open_cache(folder), range(4))


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


@pytest.mark.parametrize("die_at", [None, 10])
def test_processes_with_claims_compute_each_image_once(folder, tmp_path, die_at):
    create(folder)
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    ready = FORK.Barrier(3)
    if die_at is not None:
        assert in_child(fill_with_claims, folder, log, FORK.Barrier(1), die_at) == -signal.SIGKILL
    processes = [FORK.Process(target=fill_with_claims, args=(folder, log, ready)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 3
    os.close(log)
    images = list(map(int, (tmp_path / "log").read_text().split()))
    twice = [] if die_at is None else [9, 10]  # not flushed when their process was killed
    assert sorted(images) == sorted([*range(N), *twice])
    assert_holds(open_cache(folder), range(N))


def test_a_claim_excludes_others_until_its_end_or_the_death_of_its_process(folder):
    cache = create(folder)
    claimed_by_child, waiting = FORK.Event(), FORK.Event()

    def claim_and_die():
        with open_cache(folder).claim(3, 6) as claimed:
            assert claimed
            claimed_by_child.set()
            waiting.wait()
            os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=claim_and_die)
    process.start()
    claimed_by_child.wait()
    for start, stop, free in ((0, 3, True), (6, N, True), (3, 4, False), (5, 6, False), (0, N, False)):
        with cache.claim(start, stop) as claimed:
            assert claimed == free
    waiting.set()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with cache.claim(0, N) as claimed:
        assert claimed

    def try_claim():
        with open_cache(folder).claim(0, 3) as claimed:
            os._exit(10 + claimed)

    with cache.claim(0, 3):
        assert in_child(try_claim) == 10
        with open_cache(folder).claim(6, 9):  # another object, another range
            pass
    assert in_child(try_claim) == 11
    with pytest.raises(ZeroDivisionError), cache.claim(0, 3):
        _ = 1 / 0
    assert in_child(try_claim) == 11


def test_a_claim_is_flushed_at_its_end(folder):
    cache, other = create(folder), open_cache(folder)
    with cache.claim(0, 2):
        cache.write([0, 1], records([0, 1]))
    assert stored(other) == [0, 1]


class CachedRecords(Dataset):
    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return N

    def __getitem__(self, index):
        lines = Path("/proc/self/maps").read_text().splitlines()
        maps = [line.split()[1] for line in lines if line.endswith(str(self.cache.folder / "records.bin"))]
        return {"values": self.cache.read([index], index % 2)[0], "maps": " ".join(maps)}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers_read_through_one_shared_read_only_map(folder, method):
    cache = create(folder)
    cache.write(range(N), records(range(N)))
    cache.flush()
    batches = list(DataLoader(CachedRecords(cache), batch_size=4, num_workers=1, multiprocessing_context=method))
    assert torch.equal(torch.cat([batch["values"] for batch in batches]), records(range(N))[range(N), np.arange(N) % 2])
    assert {text for batch in batches for text in batch["maps"]} == {"r--s"}
