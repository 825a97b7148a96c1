"""Start-up: how long a fresh process takes to answer --help, and to the first step of the quick start."""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import train_flextok

from ..utils.errors import UserError
from .timing import ratio, report_ratios, spread

ROOT = Path(train_flextok.__file__).resolve().parent
HELP = ["train_flextok.py", "--help"]
QUICK_START = ["train_flextok.py", "--config", "configs/quickstart.yaml"]
FIRST_STEP_ROUNDS = 3  # at most: a round takes long


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def process_seconds(*arguments: str) -> float:
    """Seconds that `python ARGUMENTS` takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def seconds_to_first_step(command: list[str], run_dir: Path) -> float:
    """Seconds from the start of a training command to the first step in its run's metrics; the process is then ended.

    Raises:
        UserError: The process ends without a step.
    """
    metrics, output = run_dir / "metrics.jsonl", run_dir.with_name(f"{run_dir.name}.log")
    with open(output, "w") as file:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            while True:
                ended = process.poll() is not None
                if metrics.exists() and '"train/loss"' in metrics.read_text():
                    return time.perf_counter() - start
                if ended:
                    raise UserError(f"{' '.join(command)} ended before its first step:\n{output.read_text()[-2000:]}")
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()


def first_step(device: torch.device) -> float:
    """Seconds to the first step of the quick start, with empty caches and without W&B."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        options = ["--max-steps", "1", "--run-dir", str(run_dir), "--device", str(device)]
        for override in (f"cache_dir={folder}/cache", "log_every=1", "use_wandb=false"):
            options += ["--set", override]
        return seconds_to_first_step([sys.executable, *QUICK_START, *options], run_dir)


def imported_modules(*arguments: str) -> set[str]:
    """Names of all modules that `python ARGUMENTS` imports."""
    command = [sys.executable, "-X", "importtime", *arguments]
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return {line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}


def run(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    """All measurements as plain numbers; prints them."""
    arms: dict[str, Callable[[], float]] = {
        "--help": lambda: process_seconds(*HELP),
        "import torch": lambda: process_seconds("-c", "import torch"),
        "first step of the quick start": lambda: first_step(device),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(arguments.rounds):
        for name, seconds in arms.items():
            if i < FIRST_STEP_ROUNDS or "first step" not in name:
                times[name].append(seconds())
    result = {
        "seconds": times,
        "ratios": {
            f"{name} / import torch": ratio(values, times["import torch"])
            for name, values in times.items()
            if name != "import torch"
        },
        "help_imports_torch": "torch" in imported_modules(*HELP),
    }
    report(result)
    return result


def report(result: dict) -> None:
    targets = {"--help": 1.5, "first step of the quick start": 20}
    print("\nseconds of fresh processes, median (smallest to largest)")
    for name, values in result["seconds"].items():
        middle, smallest, largest = spread(values)
        target = targets.get(name)
        wanted = "" if target is None else f"  under {target}: {'yes' if middle < target else 'NO'}"
        print(f"  {name:<46} {middle:9.2f}  ({smallest:.2f} to {largest:.2f}), {len(values)} rounds{wanted}")
    report_ratios([(name, values, None) for name, values in result["ratios"].items()])
    print(f"--help imports torch: {'YES' if result['help_imports_torch'] else 'no'}")
