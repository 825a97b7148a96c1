"""`python -m flextok.benchmark NAME`: prints a table and writes JSON; without a NAME all of them, in turn."""

import argparse
import json
import platform
import re
from pathlib import Path

import torch

from ..utils.devices import chosen_device
from ..utils.dtypes import DTYPES, computes_bf16
from ..utils.errors import UserError, run_command
from . import data, processes, repa, scale, train
from .timing import at_least_1

BENCHMARKS = {
    "train": (train, "training: step time, share of the machine's matrix-product peak, memory"),
    "data": (data, "data: JPEGs to tensors against Pillow and torchvision; how long training waits"),
    "processes": (processes, "several processes: training with DDP and FSDP against one process"),
    "scale": (scale, "many GPUs: what training takes, counted, not measured"),
    "repa": (repa, "REPA: step time online and from the cache, memory, cache sizes"),
}


def machine(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpus.read_text()) if cpus.exists() else None
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flextok.benchmark", description="Measure speed and memory.")
    benchmarks = parser.add_subparsers(dest="benchmark")
    for name, (module, text) in BENCHMARKS.items():
        add = benchmarks.add_parser(name, help=text)
        file = Path("benchmark", f"{name}.json")
        add.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
        add.add_argument("--dtype", choices=sorted(DTYPES),
                         help="fp32 or autocast (default: bf16 where the device computes it)")  # fmt: skip
        add.add_argument("--batch-sizes", type=at_least_1, nargs="+", metavar="N", help="default: 4, on GPUs 32")
        add.add_argument("--rounds", type=at_least_1, default=5, metavar="N",
                         help="rounds in which the arms take turns (default: 5)")  # fmt: skip
        add.add_argument("--json", type=Path, default=file, metavar="FILE", help=f"all numbers (default: {file})")
        module.add_arguments(add)
    arguments = parser.parse_args(command_line)
    if arguments.benchmark is None:
        for name in BENCHMARKS:
            try:
                main([name])
            except UserError as error:  # such as one GPU, where `processes` needs two
                print(f"{name}: {error}\n")
        return
    device = chosen_device(arguments.device)
    arguments.batch_sizes = arguments.batch_sizes or [4 if device.type == "cpu" else 32]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    dtype = DTYPES[arguments.dtype or ("bf16" if computes_bf16(device) else "fp32")]
    about = {"benchmark": arguments.benchmark, "machine": machine(device), "dtype": str(dtype),
             "torch": torch.__version__}  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    result = BENCHMARKS[arguments.benchmark][0].run(arguments, device, dtype)
    arguments.json.write_text(json.dumps({**about, **result}, indent=2))
    print(f"all numbers: {arguments.json}\n")


if __name__ == "__main__":
    run_command(main)
