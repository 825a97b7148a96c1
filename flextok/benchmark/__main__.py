"""`python -m flextok.benchmark NAME`: prints a table, and writes JSON where --json says."""

import argparse
import json
import platform
from pathlib import Path

import torch

from ..utils.devices import chosen_device
from ..utils.dtypes import DTYPES, computes_bf16
from ..utils.errors import run_command
from . import data, processes, repa, sample, scale, startup, train
from .timing import at_least_1

BENCHMARKS = {
    "train": (train, "training: step time, share of the machine's matrix-product peak, memory"),
    "sample": (sample, "sampling with guidance, against the decoder passes that it takes"),
    "data": (data, "image loading: JPEGs to tensors on one core, against Pillow and torchvision"),
    "startup": (startup, "start-up: --help, and the first step of the quick start, in fresh processes"),
    "processes": (processes, "several processes: training with DDP and FSDP against one process"),
    "scale": (scale, "many GPUs: what training takes, counted, not measured"),
    "repa": (repa, "REPA: step time online and from the cache, memory, checkpoint and cache sizes"),
}


def machine(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":", 1)[1].strip() for line in _cpu_info() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _cpu_info() -> list:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flextok.benchmark", description="Measure speed and memory.")
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    for name, (module, text) in BENCHMARKS.items():
        benchmark = benchmarks.add_parser(name, help=text)
        benchmark.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
        benchmark.add_argument("--dtype", choices=sorted(DTYPES), help="fp32 or autocast (default: bf16 if it is fast)")
        benchmark.add_argument("--batch-sizes", type=at_least_1, nargs="+", default=[4], metavar="N", help="default: 4")
        benchmark.add_argument(
            "--rounds", type=at_least_1, default=5, metavar="N", help="rounds in which the arms take turns (default: 5)"
        )
        benchmark.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers there")
        module.add_arguments(benchmark)
    arguments = parser.parse_args()
    device = chosen_device(arguments.device)
    dtype = DTYPES[arguments.dtype or ("bf16" if computes_bf16(device) else "fp32")]
    about = {
        "benchmark": arguments.benchmark,
        "machine": machine(device),
        "dtype": str(dtype),
        "torch": torch.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    result = BENCHMARKS[arguments.benchmark][0].run(arguments, device, dtype)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({**about, **result}, indent=2))


if __name__ == "__main__":
    run_command(main)
