"""Timing on machines whose speed drifts: the arms of a comparison take turns, and ratios are within one round."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

Spread = tuple[float, float, float]  # (median, smallest, largest)


def at_least_1(text: str) -> int:
    """Type of a command-line option: a count."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def add_preset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="d12-d12", help="model: d12-d12, d18-d18 or d18-d28 (default: %(default)s)")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    arms: dict[str, Callable[[], object]], rounds: int, device: torch.device, warmup: int = 1, at_least: float = 0.5
) -> dict[str, list[float]]:
    """Seconds of each arm in each round, after `warmup` rounds that are not counted: {name: [seconds] * rounds}.

    An arm that takes less than `at_least` seconds is run several times in a row, without waiting for the device in
    between, as a training does: the mean is what counts.
    """
    times: dict[str, list[float]] = {name: [] for name in arms}
    repeats = dict.fromkeys(arms, 1)
    for i in range(warmup + rounds):
        for name, run in arms.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            synchronize(device)
            seconds = (time.perf_counter() - start) / repeats[name]
            if i < warmup:
                repeats[name] = max(1, round(at_least / max(seconds, 1e-6)))
            else:
                times[name].append(seconds)
    return times


def spread(values: list[float]) -> Spread:
    return statistics.median(values), min(values), max(values)


def ratio(numerator: list[float], denominator: list[float]) -> Spread:
    """Median, smallest and largest of the ratios of each round."""
    return spread([a / b for a, b in zip(numerator, denominator)])


def matmul_arm(device: torch.device, dtype: torch.dtype, size: int | None = None) -> tuple[Callable[[], object], float]:
    """The product of two square matrices: (an arm for `alternate`, its FLOPs).

    FLOPs over seconds is what this machine reaches now, the peak that a model's FLOP/s are compared with.

    Args:
        size: Rows and columns; default: 2048 on a CPU, 8192 on a GPU.
    """
    size = size or (2048 if device.type == "cpu" else 8192)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = a @ b
    return lambda: torch.mm(a, b, out=product), 2.0 * size**3


def report(name: str, values: Spread, digits: int = 3, note: str = "") -> None:
    """Print a name, the median and (smallest to largest)."""
    median, smallest, largest = (f"{value:.{digits}f}" for value in values)
    print(f"  {name:<46} {median:>9}  ({smallest} to {largest}){note}")


def report_seconds(times: dict[str, list[float]], title: str) -> None:
    print(f"\n{title}, median (smallest to largest) of {len(next(iter(times.values())))} rounds")
    for name, values in times.items():
        report(name, spread(values), digits=4)


def report_ratios(rows: list[tuple[str, Spread, float | None]]) -> dict[str, Spread]:
    """Print ratios (name, values, limit): at most `limit` is wanted, or at least, if negative."""
    print("ratios within a round")
    for name, values, limit in rows:
        wanted = ""
        if limit is not None:
            met = values[0] <= limit if limit > 0 else values[0] >= -limit
            wanted = f"  at {'most' if limit > 0 else 'least'} {abs(limit):.2f}: {'yes' if met else 'NO'}"
        report(name, values, note=wanted)
    return {name: values for name, values, _ in rows}
