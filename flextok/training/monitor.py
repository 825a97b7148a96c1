"""What a run tells: progress bar, metrics.jsonl in the run folder, Weights & Biases. None of them can end it."""

import contextlib
import inspect
import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..utils.network import reachable
from ..utils.processes import rank
from .checkpoints import truncate_metrics
from .config import TrainConfig

log = logging.getLogger("flextok")

WANDB_SECONDS = 60  # that a run waits for W&B at its end


class Monitor:
    """Clocks and logs of a run. Every process has one, but only the first writes.

    Args:
        run_dir: Folder of the run.
        step, last_step: Optimizer steps done, and to be done.
        wandb_settings: project, name, tags, config and id for wandb.init; None: no W&B.
    """

    def __init__(self, run_dir: Path, step: int, last_step: int, wandb_settings: dict | None = None):
        self.metrics = MetricsFile(run_dir / "metrics.jsonl", step) if rank() == 0 else None
        self.wandb = WandbLog(run_dir, wandb_settings) if rank() == 0 and wandb_settings is not None else None
        self.progress = tqdm(
            total=last_step, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05, disable=rank() > 0
        )
        self.restart_clock()

    @property
    def wandb_id(self) -> str | None:
        return self.wandb.id if self.wandb is not None else None

    def restart_clock(self) -> None:
        self._clock, self._images, self._waited = time.perf_counter(), 0, 0.0

    def waiting_for(self, batches: Iterable) -> Iterator:
        """The batches, with the time that is spent waiting for them counted."""
        start = time.perf_counter()
        for batch in batches:
            self._waited += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    @contextlib.contextmanager
    def paused(self):
        """Keep what happens between steps (validation, pictures, checkpoints) out of the rates."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._clock += time.perf_counter() - start

    def step(self, images: int) -> None:
        """Count a step, and the images of all processes in it."""
        self._images += images
        self.progress.update(1)

    def rates(self) -> dict[str, float]:
        """Images per second and the share of time spent waiting for them, since they were last asked for."""
        seconds = time.perf_counter() - self._clock
        rates = {"train/images_per_second": self._images / seconds, "train/data_wait": self._waited / seconds}
        self.restart_clock()
        return rates

    def show(self, metrics: dict[str, float]) -> None:
        """Show a step's losses, learning rate and speed beside the progress bar."""
        names = {"loss": "loss", "flow": "flow_loss", "repa": "repa_loss"}
        shown = {name: f"{metrics[f'train/{key}']:.4f}" for name, key in names.items() if f"train/{key}" in metrics}
        rate = f"{metrics['train/images_per_second']:.1f}"
        self.progress.set_postfix({**shown, "lr": f"{metrics['train/lr']:.1e}", "img/s": rate})

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log plain numbers at a step."""
        if self.metrics is not None:
            self.metrics.write(metrics, step)
        if self.wandb is not None:
            self.wandb.log({**metrics, "train/step": step})

    def picture(self, key: str, path: Path, step: int) -> None:
        if self.wandb is not None:
            self.wandb.picture(key, path, step)

    def sync(self) -> None:
        """Make the metrics durable: a checkpoint that follows is then never ahead of them."""
        if self.metrics is not None:
            self.metrics.sync()

    def close(self) -> None:
        self.progress.close()
        if self.metrics is not None:
            self.metrics.close()
        if self.wandb is not None:
            self.wandb.finish()


def wandb_settings(config: TrainConfig, run_dir: Path, run_id: str | None) -> dict[str, Any] | None:
    """Arguments of wandb.init for a run, `run_id` that of the run which it continues; None: no W&B."""
    if not config.use_wandb:
        return None
    return dict(
        project=config.wandb_project, name=config.wandb_run_name or run_dir.name, tags=config.wandb_tags,
        config=config.to_dict(), id=run_id,
    )  # fmt: skip


class MetricsFile:
    """A JSON-lines file: each record has `step` and the keys of W&B; what is not finite becomes null.

    Records after `step` are dropped: the run continues from there. A record that is in the file already is not written
    again: a resumed run repeats what followed its checkpoint. What a full disk refuses is written once there is room.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        truncate_metrics(path, step if step else -1)
        self._there = set(path.read_text().splitlines()) if path.exists() else set()
        self._file = open(path, "ab", buffering=0)  # a buffer would write again what the disk refused in part
        self._refused = b""

    def write(self, metrics: dict[str, float], step: int) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        line = json.dumps({"step": step, **finite, "train/step": step})
        if line not in self._there:
            self._write(f"{line}\n".encode())

    def _write(self, data: bytes) -> None:
        warned, self._refused = len(self._refused) > 0, self._refused + data
        try:
            while self._refused:
                self._refused = self._refused[self._file.write(self._refused) :]
        except OSError as error:
            if not warned:
                log.warning("cannot write %s (%s): its records wait for room", self.path, error)

    def sync(self) -> None:
        self._write(b"")
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        with contextlib.suppress(OSError):
            self._file.close()


class WandbLog:
    """Weights & Biases in a thread of its own: its waiting and its failures are not the run's.

    Args:
        run_dir: Its `wandb` folder is here.
        settings: Arguments of wandb.init.
    """

    def __init__(self, run_dir: Path, settings: dict):
        self.run, self.id, self.run_dir = None, settings.get("id"), run_dir
        try:
            import wandb
        except ImportError:
            log.warning("wandb is not installed: metrics go to metrics.jsonl alone (pip install wandb)")
            return
        self._wandb = wandb
        self._tasks: queue.Queue = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        started = threading.Event()
        self._tasks.put(lambda: self._start(settings))
        self._tasks.put(started.set)
        if not started.wait(WANDB_SECONDS):
            log.warning("W&B does not start within %d s: the run goes on without waiting for it", WANDB_SECONDS)

    def _start(self, settings: dict) -> None:
        mode = wandb_mode(self._wandb)
        quiet = self._wandb.Settings(silent=True, init_timeout=WANDB_SECONDS)
        run = self._wandb.init(dir=self.run_dir, mode=mode, resume="allow", settings=quiet, **settings)
        run.define_metric("*", step_metric="train/step")  # a resumed run logs some steps again
        self.run, self.id = run, run.id
        if mode == "offline":
            log.info("W&B is offline (no login or no network); upload later: wandb sync %s", Path(run.dir).parent)

    def _work(self) -> None:
        while True:
            task = self._tasks.get()
            try:
                task()
            except BaseException as error:  # whatever W&B trips over (it even exits), the training goes on
                log.warning("W&B failed (%s: %s): metrics go to metrics.jsonl alone", type(error).__name__, error)
                self.run = None

    def _do(self, task: Callable) -> None:
        if self.run is not None:
            self._tasks.put(lambda: task(self.run) if self.run is not None else None)

    def log(self, metrics: dict[str, float]) -> None:
        self._do(lambda run: run.log(metrics))

    def picture(self, key: str, path: Path, step: int) -> None:
        self._do(lambda run: run.log({key: self._wandb.Image(str(path)), "train/step": step}))

    def finish(self) -> None:
        if self.run is None:
            return
        finished = threading.Event()
        self._do(lambda run: run.finish())
        self._tasks.put(finished.set)
        if not finished.wait(WANDB_SECONDS):
            log.warning("W&B is not done after %d s; upload the rest later: wandb sync %s", WANDB_SECONDS,
                        self.run_dir / "wandb" / "latest-run")  # fmt: skip


def wandb_mode(wandb: Any) -> str:
    """`online` only with a login and a reachable server: W&B must neither ask nor wait.

    Server, mode and login are those of W&B itself: of its environment variables, its settings files (where
    `wandb login --host` leaves a server of one's own) and netrc.
    """
    settings = wandb.setup(settings=wandb.Settings(silent=True)).settings
    if settings.mode not in (None, "online"):
        return settings.mode
    if "prompt" in inspect.signature(wandb.login).parameters:
        logged_in = wandb.login(prompt=False, verify=False)
    else:  # of older versions
        logged_in = wandb.api.api_key is not None
    return "online" if logged_in and reachable(settings.base_url) else "offline"
