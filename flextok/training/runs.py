"""Folders of runs: a new one by name and date, the one to continue, and the settings that each keeps."""

import contextlib
import datetime
import itertools
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..utils.config import ConfigError
from ..utils.errors import UserError
from ..utils.files import folder_name, write_atomically
from ..utils.plain import parse_yaml
from .checkpoints import LATEST, check_writable, later_checkpoint, read_checkpoint, readable_checkpoint
from .config import TrainConfig

log = logging.getLogger("flextok")

CONFIG_FILE, METRICS = "config.yaml", "metrics.jsonl"


def new_run_dir(config: TrainConfig) -> Path:
    """Make the folder of a new run, by name and date under `checkpoint_dir`; no two runs get the same.

    Raises:
        UserError: It cannot be made.
    """
    name = f"{folder_name(config.wandb_run_name)}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(config.checkpoint_dir, name)
    for i in itertools.count(2):
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            folder = Path(config.checkpoint_dir, f"{name}-{i}")
        except OSError as error:
            raise UserError(f"cannot make {folder}: {error}. Give another --run-dir, or checkpoint_dir") from error
    return folder


@contextlib.contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Let what fails inside before anything is written leave no folder."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise


def prepare_run_dir(folder: Path, config: TrainConfig, branched_from: Path | None = None) -> None:
    """See that a run can write in its folder, and leave its settings there; raises UserError.

    Args:
        branched_from: Folder of the run whose checkpoint this one goes on from; its metrics are copied.
    """
    check_writable(folder / "checkpoints")
    write_config(folder, config)
    has_begun = any((folder / "checkpoints").glob("*.pt"))
    if branched_from is not None and (branched_from / METRICS).is_file() and not has_begun:
        write_atomically(folder / METRICS, lambda path: shutil.copyfile(branched_from / METRICS, path))


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in, if it does."""
    folder = checkpoint.parent if checkpoint.parent.name else checkpoint.absolute().parent
    return folder.parent if folder.name == "checkpoints" else None


def write_config(folder: Path, config: TrainConfig) -> None:
    """Write the settings of a run to `config.yaml` in its folder; load_config reads it."""
    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(text))


def _written_config(folder: Path) -> dict[str, Any]:
    """The settings that the config.yaml of a run folder holds; none where it is missing or damaged."""
    try:
        settings = parse_yaml((folder / CONFIG_FILE).read_text())
    except (OSError, ConfigError, UnicodeDecodeError):
        return {}
    return settings if isinstance(settings, dict) else {}


def stored_config(checkpoint: Path) -> dict[str, Any]:
    """The settings that a run was trained with: those in its folder, or else in the checkpoint file itself."""
    return _written_config(checkpoint.parent.parent) or readable_checkpoint(checkpoint)[1].get("config") or {}


def find_run(config: TrainConfig, resume: str | None, run_dir: str | None) -> tuple[Path | None, Path | None]:
    """The folder of a run, None for a new one by name and date; and the checkpoint to continue from, if any.

    Args:
        resume: A checkpoint file, a run folder, or `latest`: that of `run_dir` if given, else of the newest run of
            this name under `checkpoint_dir` that was trained with (or without) REPA as this one is. Where there is
            none yet, the run is a new one, so that the same command line starts a run and continues it.
        run_dir: The folder that was asked for.

    Raises:
        FileNotFoundError: A path that does not exist, or a folder without a checkpoint.
        ConfigError: The folder holds a run already, which is not the one to continue, or has gone on since.
    """
    folder, checkpoint = Path(run_dir) if run_dir is not None else None, None
    if resume == "latest":
        files = [path / "checkpoints" / LATEST for path in ([folder] if folder is not None else runs_of(config))]
        checkpoint = max(
            (file for file in files if file.is_file()), key=lambda file: file.stat().st_mtime, default=None
        )
        arm, hint = "", ""
        if folder is None:
            arm = f" of a run {'with' if config.use_repa else 'without'} REPA"
            hint = " (to switch REPA in a run that goes on, give its folder: --resume RUN)"
        found = f"finds no checkpoint{arm}, this is a new run"
        log.info("resume: latest %s%s", found if checkpoint is None else f"is {checkpoint}, the newest{arm}", hint)
    elif resume is not None:
        path = Path(resume).expanduser()
        files = [path / "checkpoints" / LATEST, path / LATEST] if path.is_dir() else [path]
        checkpoint = next((file for file in files if file.is_file()), None)
        if checkpoint is None:
            raise FileNotFoundError(f"resume: there is no checkpoint at {path}; give a file, a run folder, or `latest`")
    own = None if checkpoint is None else run_of(checkpoint)
    if own is not None and checkpoint.name != LATEST and (folder is None or folder.resolve() == own.resolve()):
        step = read_checkpoint(checkpoint).get("global_step", 0)
        if later := later_checkpoint(checkpoint, step):
            raise ConfigError(
                f"{checkpoint} is of step {step}, but its run has gone on to step {later[1]} ({later[0].name}), which "
                f"would be overwritten: branch off with --run-dir NEW, or go on from there with --resume {own}"
            )
    if folder is None:
        return own, checkpoint
    begun = (folder / METRICS).exists() and (resume is None or any((folder / "checkpoints").glob("*.pt")))
    if begun and (checkpoint is None or checkpoint.resolve().parent.parent != folder.resolve()):
        raise ConfigError(
            f"--run-dir {folder} holds a run already: continue it with --resume latest, or name another folder"
        )
    return folder, checkpoint


def runs_of(config: TrainConfig) -> list[Path]:
    """Folders under `checkpoint_dir` of this very experiment, as far as they say."""
    named = re.compile(re.escape(folder_name(config.wandb_run_name)) + r"-\d{8}-\d{6}(-\d+)?")
    folders = [path for path in Path(config.checkpoint_dir).glob("*") if named.fullmatch(path.name)]
    settings = {folder: _written_config(folder) for folder in folders}
    return [
        folder
        for folder, written in settings.items()
        if written.get("wandb_run_name") in (None, config.wandb_run_name)
        and written.get("use_repa", config.use_repa) == config.use_repa
    ]
