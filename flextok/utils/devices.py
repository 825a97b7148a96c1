"""The device that a command runs on."""

import ctypes
import os
import platform
import re

import torch

from .config import ConfigError


def chosen_device(name: str | None) -> torch.device:
    """The device called `cpu`, `cuda` or `cuda:N`, by default cuda if there is one; made the current one.

    Of torchrun's processes on a node each takes a CUDA device of its own.

    On CUDA, what stays in fp32 is computed in TF32.

    Raises:
        ConfigError: Another name, or a CUDA device that is not there.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"--device is {name!r}, expected cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"--device is {name}, but PyTorch sees {torch.cuda.device_count()} CUDA devices: use --device cpu"
            )
        torch.cuda.set_device(device.index or 0)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    return device


def return_freed_memory() -> None:
    """Let malloc give blocks of 4 MiB and more back to the system as soon as they are freed (glibc only).

    Its heap, in which it else puts blocks of up to 32 MiB, gets holes that gradient checkpointing's sequence of small
    and large tensors cannot use: at 256 px and batch 8 they are a third of the process. It costs time, about 5 %.
    """
    if platform.libc_ver()[0] == "glibc":
        mmap_threshold = -3  # M_MMAP_THRESHOLD of mallopt(3)
        ctypes.CDLL(None).mallopt(mmap_threshold, 4 << 20)
