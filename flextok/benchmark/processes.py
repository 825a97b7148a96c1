"""Training in several processes, DDP and FSDP, against one process: fresh processes in each round.

On a CPU one process has all threads and the several share them and the batch, so that the work is the same and a ratio
above 1 is what the all-reduce of gradients costs. On GPUs each process has one, with a batch of its own.
"""

import argparse
import os
import socket
import statistics

import torch

from ..utils.devices import chosen_device
from ..utils.dtypes import name_of
from ..utils.errors import UserError
from ..utils.processes import joined, rank
from .timing import add_preset, alternate, at_least_1, ratio, report_ratios, report_seconds
from .train import IMG_SIZE, build_trainer, in_fresh_processes, step_arm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_preset(parser)
    parser.add_argument("--processes", type=at_least_1, metavar="N", help="at least 2 (default: all GPUs; 2 on a CPU)")
    parser.add_argument("--steps", type=at_least_1, default=3, metavar="N", help="steps a round (default: 3)")
    parser.add_argument(
        "--parallel", nargs="+", choices=("ddp", "fsdp"), default=["ddp", "fsdp"], help="(default: all)"
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def send_step_seconds(
    connection, process: int, n: int, port: int, threads: int, device: str, dtype: torch.dtype, settings: dict,
    steps: int,
) -> None:  # fmt: skip
    """Be process `process` of n, train for some steps after a first one, and send how long each took."""
    if n > 1:
        place = dict(RANK=process, LOCAL_RANK=process, WORLD_SIZE=n, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(threads)
    device = chosen_device(device)
    with joined(device):
        trainer = build_trainer(device=device, use_amp=dtype != torch.float32, **settings)
        step = step_arm(trainer, settings["batch_size"], dtype)
        seconds = alternate({"step": step}, rounds=steps, device=device, at_least=0)["step"]
        if rank() == 0:
            connection.send(seconds)


def run(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    """All measurements as plain numbers; prints them."""
    on_cpu = device.type == "cpu"
    n = arguments.processes or (2 if on_cpu else torch.cuda.device_count())
    if n < 2:
        raise UserError("there is one GPU: with --device cpu two processes share the processor")
    threads = torch.get_num_threads()
    arms: dict[str, tuple[int, dict]] = {}  # name: (processes, settings)
    baseline = {}  # of each arm of several processes
    for images in arguments.batch_sizes:
        if on_cpu and images % n:
            raise UserError(f"a batch of {images} cannot be shared by {n} processes: give multiples of {n}")
        one, share = f"1 process, batch {images}", images // n if on_cpu else images
        arms[one] = (1, dict(batch_size=images))
        for parallel in arguments.parallel:
            name = f"{n} processes, {parallel}, batch {n} x {share}"
            arms[name], baseline[name] = (n, dict(batch_size=share, parallel=parallel)), one

    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(arguments.rounds):
        for name, (processes, settings) in arms.items():
            common = (processes, free_port(), max(1, threads // processes), device.type, dtype,
                      dict(settings, preset=arguments.preset), arguments.steps)  # fmt: skip
            steps = in_fresh_processes(send_step_seconds, [(i, *common) for i in range(processes)])
            if steps is None:
                raise UserError(f"{name}: ended early, out of memory or see above")
            times[name].append(statistics.median(steps))
    print(f"\n{arguments.preset}, {IMG_SIZE} px, {name_of(dtype)}, latents given; {threads} threads in all")
    report_seconds(times, f"seconds a step (median of {arguments.steps} in each round)")
    rows = [(f"{name} / {one}", ratio(times[name], times[one]), None) for name, one in baseline.items()]
    return {"processes": n, "threads": threads, "seconds": times, "ratios": report_ratios(rows)}
