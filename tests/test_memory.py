"""The peak of memory that is reported."""

import json
import time
from pathlib import Path

import pytest
import torch
from processes import start

from flextok.utils.memory import PeakMemory

SIZE = 200_000_000


def measure_memory(folder: Path) -> None:
    """Map a file, then take memory; leave what the peak was after each, in a process of which nothing else is known."""
    (folder / "cache").write_bytes(bytes(SIZE))
    peak = PeakMemory(torch.device("cpu"))
    start = peak.read()
    mapped = torch.from_file(str(folder / "cache"), size=SIZE, dtype=torch.uint8)
    assert mapped.max() == 0  # every page of it is resident now
    with_file = peak.read()
    taken = torch.ones(SIZE, dtype=torch.uint8)
    deadline = time.monotonic() + 10
    while peak._peak[0] - start < 0.9 * SIZE and time.monotonic() < deadline:  # the thread looks without being asked
        time.sleep(0.01)
    del taken
    (folder / "peaks.json").write_text(json.dumps([with_file - start, peak.read() - start]))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures the memory as Linux tells it")
def test_peak_memory_is_what_the_process_took_without_the_files_that_it_maps(tmp_path):
    start(measure_memory, tmp_path).join()
    with_file, with_memory = json.loads((tmp_path / "peaks.json").read_text())
    assert with_file < 0.2 * SIZE and 0.9 * SIZE < with_memory < 1.5 * SIZE


def test_peak_memory_is_that_of_the_gpu_and_unknown_where_the_system_does_not_tell(monkeypatch, tmp_path):
    for name, value in (("init", None), ("reset_peak_memory_stats", None), ("max_memory_allocated", 123)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert PeakMemory(torch.device("cuda:0")).read() == 123
    monkeypatch.setattr("flextok.utils.memory.STATM", tmp_path / "nothing")
    assert PeakMemory(torch.device("cpu")).read() is None
