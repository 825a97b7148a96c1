"""Start-up: how long a fresh process takes to answer --help, and to the first step of the quick start."""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import train_flextok

from ..utils.errors import UserError
from .timing import ratio, report, report_ratios, spread

ROOT = Path(train_flextok.__file__).resolve().parent
HELP = ["train_flextok.py", "--help"]
QUICK_START = ["train_flextok.py", "--config", "configs/quickstart.yaml"]
FIRST_STEP = "first step of the quick start"
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
        options = ["--max-steps", "1", "--run-dir", str(run_dir), "--device", str(device),
                   f"--set=cache_dir={folder}/cache", "--set=log_every=1", "--set=use_wandb=false"]  # fmt: skip
        return seconds_to_first_step([sys.executable, *QUICK_START, *options], run_dir)


def imported_modules(*arguments: str) -> set[str]:
    """Names of all modules that `python ARGUMENTS` imports."""
    command = [sys.executable, "-X", "importtime", *arguments]
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return {line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}


def run(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    """All measurements as plain numbers; prints them."""
    times: dict[str, list[float]] = {"--help": [], "import torch": [], FIRST_STEP: []}
    for i in range(arguments.rounds):
        times["--help"].append(process_seconds(*HELP))
        times["import torch"].append(process_seconds("-c", "import torch"))
        if i < FIRST_STEP_ROUNDS:
            times[FIRST_STEP].append(first_step(device))
    print("\nseconds of fresh processes, median (smallest to largest)")
    targets = {"--help": 1.5, FIRST_STEP: 20}
    for name, values in times.items():
        note, target, middle = f", {len(values)} rounds", targets.get(name), spread(values)
        if target is not None:
            note += f"  under {target}: {'yes' if middle[0] < target else 'NO'}"
        report(name, middle, digits=2, note=note)
    rows = [(f"{name} / import torch", ratio(times[name], times["import torch"]), None) for name in targets]
    ratios, imports_torch = report_ratios(rows), "torch" in imported_modules(*HELP)
    print(f"--help imports torch: {'YES' if imports_torch else 'no'}")
    return {"seconds": times, "ratios": ratios, "help_imports_torch": imports_torch}
