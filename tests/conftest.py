"""One thread for the tests' small models: more would only wait for each other, above all on a busy machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="module")
def no_curves():
    """Runs end without their curves, which take longer than all else in a short one."""
    from tiny_runs import draw_no_curves

    with pytest.MonkeyPatch.context() as monkeypatch:
        draw_no_curves(monkeypatch.setattr)
        yield
