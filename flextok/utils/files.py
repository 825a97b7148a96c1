"""Writing files whole or not at all."""

import os
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
