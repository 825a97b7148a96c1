"""Checkpoint files: written whole or not at all, and read without executing anything."""

import contextlib
import json
import logging
import os
import shutil
import zipfile
from pathlib import Path

import torch

from ..utils.checkpoint import CheckpointError, load_pickled
from ..utils.errors import UserError
from ..utils.files import write_atomically

LATEST, BEST = "latest.pt", "best.pt"
PREVIOUS = "previous.pt"  # what was the latest before
EPOCH = "epoch_{}.pt"  # those that are kept

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
    """Make a folder, see that files can be written there, and remove what a killed run left; raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.tmp"):
            left.unlink(missing_ok=True)
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
        epochs = {path.stem.removeprefix("epoch_"): path for path in folder.glob(EPOCH.format("*"))}
        for epoch in sorted(filter(str.isdecimal, epochs), key=int)[:-keep_last]:
            epochs[epoch].unlink()


def later_checkpoint(path: Path, step: int) -> tuple[Path, int] | None:
    """The checkpoint beside `path` of the latest step after `step`, and that step; None if there is none."""
    steps = {}
    for other in path.parent.glob("*.pt"):
        with contextlib.suppress(CheckpointError):
            steps[other] = read_checkpoint(other).get("global_step")
    steps = {other: at for other, at in steps.items() if isinstance(at, int)}
    last = max(steps, key=lambda other: (steps[other], other.name == LATEST), default=path)
    return (last, steps[last]) if steps.get(last, 0) > step else None


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
        temporary.unlink(missing_ok=True)  # which renaming leaves where both are one file already


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
