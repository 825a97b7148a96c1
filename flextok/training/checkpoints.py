"""Checkpoint files: written whole or not at all, and read without executing anything."""

import contextlib
import json
import logging
import os
import re
import shutil
import zipfile
from pathlib import Path

import torch

from ..utils.checkpoint import CheckpointError, load_pickled
from ..utils.config import ConfigError
from ..utils.errors import UserError
from ..utils.files import folder_name, write_atomically
from ..utils.plain import parse_yaml

LATEST, BEST = "latest.pt", "best.pt"
PREVIOUS = "previous.pt"  # what was the latest before
EPOCH = "epoch_{}.pt"  # those that are kept
CONFIG_FILE = "config.yaml"  # the settings in force, in the run folder
REQUIRED = (
    "global_step", "data", "config", "model_state_dict", "optimizer_state_dict", "scheduler_state_dict",
    "scaler_state_dict", "ema_model_state_dict", "repa_module_state_dict", "best_val_loss",
)  # fmt: skip

log = logging.getLogger("flextok")


def save_checkpoint(checkpoint: dict, path: Path) -> None:
    """Write a checkpoint dict (tensors and plain values only) atomically; the one before is kept as `previous.pt`.

    Raises:
        UserError: It cannot be written (full disk, read-only folder); the files that are there stay as they are.
    """

    def keep_previous() -> None:
        if zipfile.is_zipfile(path):  # not one that is damaged, in whose place the previous one was continued
            link_checkpoint(path, path.with_name(PREVIOUS))

    check_writable(path.parent)
    try:
        write_atomically(path, lambda temporary: torch.save(checkpoint, temporary), keep_previous)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a full disk
        free = next((shutil.disk_usage(folder).free for folder in path.parents if os.path.exists(folder)), 0)
        raise UserError(
            f"cannot write {path}: {error}. The disk has {free / 1e9:.1f} GB free. Checkpoints that are there are as "
            "they were: make room, then go on with --resume latest"
        ) from error


def check_writable(folder: Path) -> None:
    """Make a folder, and see that files can be written there; raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "write_test", lambda path: path.write_bytes(b""))
        (folder / "write_test").unlink()
    except OSError as error:
        raise UserError(
            f"cannot write in {folder}: {error}. Give another folder (--run-dir, or checkpoint_dir), or the right to "
            "write there; files that are there are as they were"
        ) from error


def prune_checkpoints(folder: Path, keep_last: int | None) -> None:
    """Remove all but the last `keep_last` checkpoints of epochs (None: keep all); latest, previous and best stay."""
    if keep_last is not None:
        for path in sorted(folder.glob(EPOCH.format("*")))[: -keep_last or None]:
            path.unlink()


def readable_checkpoint(path: Path) -> tuple[Path, dict]:
    """A checkpoint and what it holds: `path`, or if that is a `latest.pt` that is damaged, the newest that is not.

    Raises:
        CheckpointError: Neither can be read.
    """
    try:
        return path, read_checkpoint(path)
    except CheckpointError as error:
        others = [other for other in path.parent.glob("*.pt") if other != path] if path.name == LATEST else []
        for other in sorted(others, key=lambda other: other.stat().st_mtime, reverse=True):
            with contextlib.suppress(CheckpointError):
                checkpoint = read_checkpoint(other)
                log.warning("%s. Going on from %s instead, step %s", error, other, checkpoint.get("global_step"))
                return other, checkpoint
        raise


def link_checkpoint(source: Path, target: Path) -> None:
    """Make `target` a second name of the file at `source`; a later write of `source` leaves `target` as it is."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        write_atomically(target, lambda path: path.write_bytes(source.read_bytes()))
    else:
        os.replace(temporary, target)


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint on the CPU; nothing in it is run.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is truncated, or not a checkpoint of this trainer.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    checkpoint = load_pickled(path)
    if not isinstance(checkpoint, dict) or "model_state_dict" not in checkpoint:
        raise CheckpointError(f"{path} is not a checkpoint of train_flextok.py: it has no model_state_dict")
    return checkpoint


def stored_config(path: Path) -> dict:
    """The settings that a run was trained with, from the config.yaml of its folder; without one, those in the file."""
    try:
        return parse_yaml((path.parent.parent / CONFIG_FILE).read_text())
    except (OSError, ConfigError, UnicodeDecodeError):
        return readable_checkpoint(path)[1].get("config") or {}


def find_checkpoint(
    resume: str, run_dir: Path | None, checkpoint_dir: Path, run_name: str | None, use_repa: bool
) -> Path | None:
    """The checkpoint file that `resume` means: `latest`, a run folder, or a file.

    `latest` is that of `run_dir` if given, else of the newest run of this name under `checkpoint_dir` that was trained
    with (or without) REPA as this one is; None if there is none yet, so that the same command line starts a run and
    continues it.

    Raises:
        FileNotFoundError: A path that does not exist, or a folder without a checkpoint.
    """
    if resume == "latest":
        folders = [run_dir]
        if run_dir is None:
            named = re.compile(re.escape(folder_name(run_name)) + r"-\d{8}-\d{6}(-\d+)?")
            folders = [path for path in checkpoint_dir.glob("*") if named.fullmatch(path.name)]
            folders = [path for path in folders if _is_of(path, run_name, use_repa)]
        files = [folder / "checkpoints" / LATEST for folder in folders]
        return max((file for file in files if file.is_file()), key=lambda file: file.stat().st_mtime, default=None)
    path = Path(resume).expanduser()
    if path.is_dir():
        for candidate in (path / "checkpoints" / LATEST, path / LATEST):
            if candidate.is_file():
                return candidate
        raise FileNotFoundError(f"resume: the folder {path} has no checkpoints/{LATEST}")
    if not path.is_file():
        raise FileNotFoundError(f"resume: there is no checkpoint at {path}; give a file, a run folder, or `latest`")
    return path


def _is_of(run_dir: Path, run_name: str | None, use_repa: bool) -> bool:
    """Whether a run folder is of this experiment, as far as its config.yaml says."""
    try:
        config = parse_yaml((run_dir / CONFIG_FILE).read_text())
    except (OSError, ConfigError, UnicodeDecodeError):
        return True
    if not isinstance(config, dict):
        return True
    return config.get("wandb_run_name") in (None, run_name) and config.get("use_repa", use_repa) == use_repa


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines of a metrics file that were logged after `step`, and a last line that was cut off."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    write_atomically(path, lambda temporary: temporary.write_text("".join(kept)))
