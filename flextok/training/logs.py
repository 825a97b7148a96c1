"""Where metrics go: a JSON-lines file in the run folder, and Weights & Biases if it is there."""

import json
import logging
import math
import netrc
import os
import socket
import urllib.request
from pathlib import Path
from typing import Dict, Optional
from urllib.parse import urlsplit

from .checkpoints import truncate_metrics

log = logging.getLogger(__name__)


def _wandb_mode() -> str:
    """`online` only with a login and a reachable server: W&B must neither ask nor wait."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    url = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    if not os.environ.get("WANDB_API_KEY"):
        try:
            if netrc.netrc(os.environ.get("NETRC")).authenticators(url.hostname) is None:
                return "offline"
        except (OSError, netrc.NetrcParseError):
            return "offline"
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy is not None:
        url = urlsplit(proxy)
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=3).close()
    except OSError:
        return "offline"
    return "online"


class MetricsLog:
    """Writes each record to `metrics.jsonl` (keys as in W&B, plus `step`) and to W&B.

    Args:
        run_dir: Folder of the run.
        resume_step: Step of the checkpoint that the run continues from: later lines are dropped; None: a new run.
        wandb_settings: project, name, tags, config and id for wandb.init; None: no W&B.
    """

    def __init__(self, run_dir: Path, resume_step: Optional[int] = None, wandb_settings: Optional[dict] = None):
        self.path = run_dir / "metrics.jsonl"
        truncate_metrics(self.path, -1 if resume_step is None else resume_step)
        self.there = set(self.path.read_text().splitlines()) if self.path.exists() else set()
        self.file = open(self.path, "a", buffering=1)
        self.run = self._start_wandb(run_dir, wandb_settings) if wandb_settings is not None else None

    def _start_wandb(self, run_dir: Path, settings: dict):
        try:
            import wandb
        except ImportError:
            log.warning("wandb is not installed: metrics go to %s alone (pip install wandb)", self.path)
            return None
        mode = _wandb_mode()
        try:
            quiet = wandb.Settings(silent=True, init_timeout=60)
            run = wandb.init(dir=run_dir, mode=mode, resume="allow", settings=quiet, **settings)
        except Exception as error:  # whatever W&B trips over, the training goes on
            log.warning("W&B did not start (%s): metrics go to %s alone", error, self.path)
            return None
        run.define_metric("*", step_metric="train/step")  # a resumed run logs some steps again
        if mode == "offline":
            log.info("W&B is offline (no login or no network); upload later: wandb sync %s", Path(run.dir).parent)
        return run

    @property
    def wandb_id(self) -> Optional[str]:
        return self.run.id if self.run is not None else None

    def write(self, metrics: Dict[str, float], step: int) -> None:
        """Log plain numbers at a step; what is not finite becomes null in the file.

        A record that the file held when it was opened is not written again: a run that is resumed at its end draws and
        measures once more what it did after its last checkpoint.
        """
        metrics = {**metrics, "train/step": step}
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        line = json.dumps({"step": step, **finite})
        if line not in self.there:
            self.file.write(line + "\n")
        if self.run is not None:
            self.run.log(metrics)

    def picture(self, key: str, path: Path, step: int) -> None:
        if self.run is not None:
            import wandb

            self.run.log({key: wandb.Image(str(path)), "train/step": step})

    def sync(self) -> None:
        """Make what was written durable: a checkpoint that follows is then never ahead of the metrics."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        if self.run is not None:
            self.run.finish()
