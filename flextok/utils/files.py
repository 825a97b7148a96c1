"""Writing files whole or not at all, and telling their contents apart."""

import functools
import hashlib
import os
import re
from pathlib import Path


def write_atomically(path: Path, write, before_rename=lambda: None) -> None:
    """Call write(temporary path), flush what it wrote to disk, call before_rename(), then rename it to `path`.

    A crash, a kill or a full disk at any moment leaves the previous file as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        before_rename()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def folder_name(run_name: str | None) -> str:
    """A run's name as the name of one folder: `a/b` is a_b and `/tmp/x` tmp_x, so that it stays in checkpoint_dir."""
    return re.sub(r"[/\\]+", "_", (run_name or "").strip("/\\ ")) or "flextok"


def file_digest(path: os.PathLike) -> str:
    """BLAKE2b of a file's content, 16 bytes in hexadecimal; of an unchanged file it is computed once in a process."""
    status = os.stat(path)
    return _digest(os.fspath(path), status.st_size, status.st_mtime_ns)


@functools.cache
def _digest(path: str, size: int, modified: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
