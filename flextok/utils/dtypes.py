"""Precision that a module asks for, whatever autocast is in force."""

import contextlib
import functools
import time

import torch

DTYPES = {
    "fp32": torch.float32, "float32": torch.float32,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16,
}  # fmt: skip


def parse_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of a `dtype_override` setting (None stays None); raises ValueError for an unknown name."""
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise ValueError(f"dtype_override is {name!r}, expected one of {', '.join(DTYPES)} or null")
    return DTYPES[name]


def name_of(dtype: torch.dtype) -> str:
    """fp32, bf16 or fp16."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def precision(device: torch.device, dtype: torch.dtype | None):
    """Context in which matrix products run in `dtype`: None leaves autocast as it is, fp32 switches it off."""
    if dtype is None:
        return contextlib.nullcontext()
    if dtype == torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)


def for_products(x: torch.Tensor) -> torch.Tensor:
    """x as autocast hands it to matrix products: one copy for several of them, each of which would make and keep one.

    The same numbers; a bf16 training step keeps 8 % less for its backward pass.
    """
    if x.dtype == torch.float32 and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def computes_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of PyTorch cannot tell
        return any(map(capabilities.get, ("avx512_bf16", "amx_bf16", "bf16")))
    return False


BF16_GAIN = 1.2  # how much faster products must be: casting costs something, and the choice should not hang on noise


@functools.cache
def faster_in_bf16(device: torch.device, width: int, hidden: int, rows: int = 512) -> bool:
    """Whether [rows, width] x [width, hidden] products are faster in bf16 than in fp32; measured on CPUs.

    The flags of a CPU do not tell: without AMX, some report bf16 instructions and take twice as long.
    """
    if not computes_bf16(device) or device.type != "cpu":
        return computes_bf16(device)
    seconds = {torch.float32: [], torch.bfloat16: []}
    operands = {
        dtype: (torch.ones(rows, width, dtype=dtype), torch.ones(hidden, width, dtype=dtype)) for dtype in seconds
    }
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(7):
            for dtype, (x, weight) in operands.items():
                start = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                seconds[dtype].append(time.perf_counter() - start)
    return min(seconds[torch.float32]) > BF16_GAIN * min(seconds[torch.bfloat16])


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What `use_amp: true` means: bf16 where the device computes it; fp16 on older GPUs; else None (fp32)."""
    if computes_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else None
