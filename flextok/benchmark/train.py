"""Training speed: seconds and images per second, share of the machine's matrix-product peak, peak memory."""

import argparse
import multiprocessing
import re
import resource
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from train_flextok import FlexTokTrainer

from ..data.batch import Batch
from ..data.loader import GlobalBatchSampler
from ..flextok_wrapper import FlexTokFromHub
from ..model.builder import preset_config
from ..utils.dtypes import name_of
from ..utils.processes import rank, world_size
from .timing import add_preset, alternate, matmul_arm, ratio, report_ratios, report_seconds, spread, synchronize

IMG_SIZE = 256
KINDS = {  # of operations (on GPUs kernels), by what their names hold
    "attention": "scaled_dot_product|flash|fmha|attention",
    "matrix products": r"::(addmm|mm|bmm|linear)\b|mkldnn|gemm|cutlass|xmma|nvjet",
    "optimizer": "adam|Adam",
    "casts, copies": "copy|Copy|::cat|Cat|memcpy|Memcpy",
    "layer norms": "layer_norm|LayerNorm",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_preset(parser)
    parser.add_argument("--compile", action="store_true", help="also time torch.compile")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="time the steps with it")
    parser.add_argument("--profile", action="store_true", help="also say where the time of a step goes")
    parser.add_argument("--memory-batch-size", type=int, default=8, metavar="N", help="0: skip memory (default: 8)")


# --------------------------------------------------------------------------------------------------------- the subject


def build_trainer(preset: str, device: torch.device, **settings) -> FlexTokTrainer:
    """A trainer of a published size with random weights, whose batches bring their latents (`latent_batch`)."""
    config = dict(model=dict(preset=preset), img_size=IMG_SIZE, use_wandb=False, readout_weight=0.0)
    config |= {"batch_size": 1, **settings}
    with torch.random.fork_rng(devices=[]):
        model = FlexTokFromHub(preset_config(preset, vae_hub_path=None))
    images = TensorDataset(torch.zeros(100_000, 1).expand(-1, 3)[:, :, None, None])
    sampler = GlobalBatchSampler(len(images), config["batch_size"], rank=rank(), world_size=world_size())
    return FlexTokTrainer(config, model, DataLoader(images, batch_sampler=sampler), None, device, load_encoder=False)


def latent_batch(trainer: FlexTokTrainer, batch_size: int) -> Batch:
    """A batch as the loader gives it when latents are cached."""
    vae = trainer.model.vae
    size = IMG_SIZE // vae.downsample_factor
    moments = torch.randn(batch_size, 2, vae.latent_channels, size, size, generator=torch.Generator().manual_seed(1))
    return Batch(latents=moments * 0.5, position=torch.arange(batch_size))


def forward_flops(forward: Callable[[], Any]) -> int:
    """Operations of the matrix products of a forward pass, attention's included, counted while it runs.

    With the gradients of inputs and weights a training step takes three times as much.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # whose products the counter sees
        forward()
    return counter.get_total_flops()


def step_arm(trainer: FlexTokTrainer, batch_size: int, dtype: torch.dtype) -> Callable[[], None]:
    """Forward, backward, clipping and AdamW on a batch whose latents are given."""
    batch = latent_batch(trainer, batch_size).to(trainer.device)

    def step() -> None:
        trainer.autocast_dtype = None if dtype == torch.float32 else dtype
        trainer.train_step([batch])

    return step


def run(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    """All measurements as plain numbers; prints them."""
    preset = arguments.preset
    result: dict[str, Any] = {"preset": preset}
    if arguments.memory_batch_size:  # first, while nothing else takes memory
        result["memory"] = report_memory(preset, arguments.memory_batch_size, device)
    settings = dict(gradient_checkpointing=arguments.gradient_checkpointing)
    trainers = {"": build_trainer(preset, device, **settings)}
    if arguments.compile:
        trainers[" compiled"] = build_trainer(preset, device, compile=True, **settings)
    flops = 3 * forward_flops(lambda: trainers[""].compute_loss(latent_batch(trainers[""], 1)))
    dtypes = {name_of(d): d for d in (torch.float32, dtype)}
    arms, peak_flops = {}, {}
    for name, d in dtypes.items():
        arms[f"{name} peak"], peak_flops[name] = matmul_arm(device, d)
        for suffix, trainer in trainers.items():
            for n in arguments.batch_sizes:
                arms[f"{name}{suffix}, batch {n}"] = step_arm(trainer, n, d)
    times = alternate(arms, arguments.rounds, device, warmup=2 if arguments.compile else 1)
    print(f"\n{preset}, {IMG_SIZE} px, latents given: forward, backward, clipping, AdamW")
    print(f"model: {flops / 1e12:.4f} TFLOP per image and step, three times its forward pass")
    result.update(flops_per_image=flops, seconds=times)
    result["arms"] = report_steps(times, flops, peak_flops)
    if arguments.profile:
        n = arguments.batch_sizes[-1]
        shares = {name: profile(step_arm(trainers[""], n, d), device) for name, d in dtypes.items()}
        print(f"\nwhere the time of a step with {n} images goes, by PyTorch's profiler")
        for kind in [*KINDS, "the rest"]:
            print(f"  {kind:<20}", "  ".join(f"{name} {parts[kind]:6.1%}" for name, parts in shares.items()))
        result["profile"] = shares
    result["ratios"] = report_ratios(step_ratios(result["arms"], times, arguments.batch_sizes, list(dtypes)))
    return result


def profile(step: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Shares of a step's time by kind of operation, each in itself."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU] + [activity.CUDA] * (device.type == "cuda")) as profiler:
        step()
        synchronize(device)
    seconds = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in profiler.key_averages():
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key)), "the rest")
        seconds[kind] += event.self_cpu_time_total if device.type == "cpu" else event.self_device_time_total
    return {kind: value / sum(seconds.values()) for kind, value in seconds.items()}


def report_steps(times: dict[str, list[float]], flops: int, peak_flops: dict[str, float]) -> dict[str, dict]:
    """Per arm: images and operations per second, and their share of the peak of the same dtype and round."""
    arms = {}
    report_seconds(times, "seconds")
    print(f"\n{'':<24} {'images/s':>9} {'TFLOP/s':>9} {'peak':>9}   share of the peak in the same round")
    for name, values in times.items():
        if name.endswith(" peak"):
            continue
        dtype, batch_size = name.split(",")[0].split()[0], int(name.rsplit(" ", 1)[1])
        peaks = [peak_flops[dtype] / seconds for seconds in times[f"{dtype} peak"]]
        rates = [flops * batch_size / seconds for seconds in values]
        images, share = spread([batch_size / seconds for seconds in values]), ratio(rates, peaks)
        arms[name] = dict(images_per_second=images, flops_per_second=spread(rates), peak=spread(peaks), mfu=share)
        print(f"{name:<24} {images[0]:>9.3f} {spread(rates)[0] / 1e12:>9.3f} {spread(peaks)[0] / 1e12:>9.3f}   "
              "{:.3f}  ({:.3f} to {:.3f})".format(*share))  # fmt: skip
    return arms


def step_ratios(arms: dict[str, dict], times: dict[str, list[float]], batch_sizes: list[int], dtypes: list[str]):
    """Rows for report_ratios."""
    rows = []
    first, last = batch_sizes[0], batch_sizes[-1]
    for n in batch_sizes:
        rows.append((f"fp32 share of peak, batch {n}", arms[f"fp32, batch {n}"]["mfu"], -0.65))
        if len(dtypes) > 1:
            fp32_by_other = ratio(times[f"fp32, batch {n}"], times[f"{dtypes[1]}, batch {n}"])
            rows.append((f"fp32 / {dtypes[1]}, batch {n}", fp32_by_other, -1.8))
        for dtype in dtypes:
            if f"{dtype} compiled, batch {n}" in times:
                eager_by_compiled = ratio(times[f"{dtype}, batch {n}"], times[f"{dtype} compiled, batch {n}"])
                rows.append((f"{dtype}: eager / compiled, batch {n}", eager_by_compiled, None))
    if last != first:
        for dtype in dtypes:
            per_image = [[t / n for t in times[f"{dtype}, batch {n}"]] for n in (last, first)]
            rows.append((f"{dtype}, time per image, batch {last} / batch {first}", ratio(*per_image), 1.10))
    return rows


# --------------------------------------------------------------------------------------------------------------- memory


def kept_for_backward(run: Callable[[], Any], parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of `run()`, besides the parameters."""
    known = {parameter.untyped_storage()._cdata for parameter in parameters}
    kept: dict[int, Any] = {}  # storages, alive until they are counted, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())


def process_peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")  # of Linux, where ru_maxrss begins with that of the parent process
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def memory_of_a_step(preset: str, batch_size: int, device: torch.device, checkpointing: bool) -> dict[str, int]:
    """Bytes: the process's (CPU) or allocator's (CUDA) peak over three fp32 steps, and what it is made of."""
    runtime = process_peak()
    trainer = build_trainer(preset, device, use_amp=False, gradient_checkpointing=checkpointing)
    batch = latent_batch(trainer, batch_size)
    for _ in range(3):
        trainer.train_step([batch])
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_peak()
    moments = [v for state in trainer.optimizer.state.values() for v in state.values() if v.ndim]
    trainer.model.train()
    return {
        "peak": peak,
        "weights (VAE included)": sum(tensor.nbytes for tensor in trainer.model.parameters()),
        "gradients": sum(tensor.nbytes for tensor in trainer.trained_parameters),
        "AdamW's moments": sum(tensor.nbytes for tensor in moments),
        "kept for the backward pass": kept_for_backward(
            lambda: trainer.compute_loss(batch)["loss"], trainer.model.parameters()
        ),
        "PyTorch itself": 0 if device.type == "cuda" else runtime,
    }


def send_memory(connection, *arguments) -> None:
    connection.send(memory_of_a_step(*arguments))


def in_fresh_processes(target: Callable, arguments: list[tuple]) -> Any:
    """What one of the processes that run `target(connection, *arguments[i])` sends, None if none does (killed)."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    processes = [context.Process(target=target, args=(sender, *own)) for own in arguments]
    for process in processes:
        process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        for process in processes:
            process.join()


def report_memory(preset: str, batch_size: int, device: torch.device) -> dict[str, dict]:
    result = {}
    for name, checkpointing, limit in (("fp32", False, 13e9), ("fp32, gradient checkpointing", True, 7e9)):
        result[name] = parts = in_fresh_processes(send_memory, [(preset, batch_size, device, checkpointing)])
        title = f"\npeak memory, {name}, batch {batch_size}:"
        if parts is None:
            print(f"{title} more than this machine has")
            continue
        is_target = preset == "d12-d12" and batch_size == 8
        wanted = f"  under {limit / 1e9:.0f} GB: {'yes' if parts['peak'] < limit else 'NO'}" if is_target else ""
        print(f"{title} {parts['peak'] / 1e9:.2f} GB{wanted}")
        rest = 2 * parts["peak"] - sum(parts.values())
        for part, size in [*list(parts.items())[1:], ("the rest: passing values", rest)]:
            print(f"  {part:<32} {size / 1e9:6.2f} GB")
    return result
