"""Timing on machines whose speed drifts: the arms of a comparison take turns, and ratios are within one round."""

import statistics
import time
from typing import Callable, Dict, List, Tuple

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(arms: Dict[str, Callable[[], object]], rounds: int, device: torch.device, warmup: int = 1) -> dict:
    """Seconds of each arm in each round, after `warmup` rounds that are not counted: {name: [seconds] * rounds}."""
    times: Dict[str, List[float]] = {name: [] for name in arms}
    for i in range(warmup + rounds):
        for name, run in arms.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if i >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def spread(values: List[float]) -> Tuple[float, float, float]:
    """(median, smallest, largest)."""
    return statistics.median(values), min(values), max(values)


def ratio(numerator: List[float], denominator: List[float]) -> Tuple[float, float, float]:
    """Median, smallest and largest of the ratios of each round."""
    return spread([a / b for a, b in zip(numerator, denominator)])


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int = 2048, seconds: float = 0.5) -> float:
    """FLOP/s of repeated products of two size x size matrices: what this machine reaches now."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = a @ b
    n = 1
    while True:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(n):
            torch.mm(a, b, out=product)
        synchronize(device)
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return n * 2 * size**3 / elapsed
        n = max(n + 1, int(1.2 * n * seconds / max(elapsed, 1e-6)))
