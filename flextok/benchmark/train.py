"""Training speed: seconds and images per second, share of the machine's matrix-product peak, peak memory."""

import argparse
import contextlib
import multiprocessing
import re
import resource
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset

from train_flextok import FlexTokTrainer

from ..data.batch import Batch
from ..data.loader import GlobalBatchSampler
from ..flextok_wrapper import FlexTokFromHub
from ..model.builder import preset_config
from ..model.layers.attention import Attention
from ..utils.dtypes import name_of
from ..utils.processes import rank, world_size
from .timing import alternate, matmul_arm, ratio, report_ratios, report_seconds, spread, synchronize

IMG_SIZE = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="d12-d12", help="model: d12-d12, d18-d18 or d18-d28 (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="time the steps with it")
    parser.add_argument("--profile", action="store_true", help="also say where the time of a step goes")
    parser.add_argument("--memory-batch-size", type=int, default=8, metavar="N", help="0: skip memory (default: 8)")


# --------------------------------------------------------------------------------------------------------- the subject


def build_trainer(preset: str, device: torch.device, **settings) -> FlexTokTrainer:
    """A trainer of a published size with random weights, whose batches bring their latents (`latent_batch`)."""
    config = dict(model=dict(preset=preset), img_size=IMG_SIZE, use_wandb=False, readout_weight=0.0, **settings)
    with torch.random.fork_rng(devices=[]):
        model = FlexTokFromHub(preset_config(preset, vae_hub_path=None))
    images = TensorDataset(torch.zeros(100_000, 1).expand(-1, 3)[:, :, None, None])
    sampler = GlobalBatchSampler(len(images), config.get("batch_size", 1), rank=rank(), world_size=world_size())
    return FlexTokTrainer(config, model, DataLoader(images, batch_sampler=sampler), None, device, load_encoder=False)


def latent_batch(trainer: FlexTokTrainer, batch_size: int) -> Batch:
    """A batch as the loader gives it when latents are cached."""
    vae = trainer.model.vae
    size = IMG_SIZE // vae.downsample_factor
    moments = torch.randn(batch_size, 2, vae.latent_channels, size, size, generator=torch.Generator().manual_seed(1))
    return Batch(latents=moments * 0.5, position=torch.arange(batch_size))


@contextlib.contextmanager
def counted_flops(*parts: nn.Module) -> Iterator[list[int]]:
    """A list [n] whose n grows by the operations of the parts' forward passes: their matrix products.

    A linear layer takes 2 * inputs * outputs per token, attention 4 * queries * keys * width; what attention computes
    for the upper half of a causal square counts, recomputation and all else does not. With the gradients of inputs and
    weights a training step takes three times as much. (PyTorch's own counter does not know every attention kernel.)
    """
    total = [0]

    def linear(module: nn.Linear, args: tuple, output: torch.Tensor) -> None:
        total[0] += 2 * output.numel() * module.in_features

    def attention(module: Attention, args: tuple, output: torch.Tensor) -> None:
        n, mask = output.shape[1], args[1] if len(args) > 1 else None
        n_prefix = 0 if mask is None else mask.n_prefix
        total[0] += 4 * output.shape[0] * output.shape[2] * (n_prefix**2 + (n - n_prefix) * n)

    hooks = [
        module.register_forward_hook(linear if isinstance(module, nn.Linear) else attention)
        for part in parts
        for module in part.modules()
        if isinstance(module, (nn.Linear, Attention))
    ]
    try:
        yield total
    finally:
        for hook in hooks:
            hook.remove()


def forward_flops(trainer: FlexTokTrainer) -> int:
    """Operations of the model's forward pass on one image, counted while it runs."""
    with torch.no_grad(), counted_flops(trainer.model.encoder, trainer.model.decoder) as total:
        trainer.compute_loss(latent_batch(trainer, 1))
    return total[0]


# ----------------------------------------------------------------------------------------------------------------- time


def step_arm(trainer: FlexTokTrainer, batch_size: int, dtype: torch.dtype) -> Callable[[], Any]:
    """Forward, backward, clipping and AdamW on a batch whose latents are given."""
    batch = latent_batch(trainer, batch_size).to(trainer.device)

    def step() -> None:
        trainer.autocast_dtype = None if dtype == torch.float32 else dtype
        trainer.train_step([batch])

    return step


def run(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    """All measurements as plain numbers; prints them."""
    result: dict[str, Any] = {"preset": arguments.preset}
    if arguments.memory_batch_size:  # first, while nothing else takes memory
        result["memory"] = report_memory(arguments.preset, arguments.memory_batch_size, device)
    settings = dict(gradient_checkpointing=arguments.gradient_checkpointing)
    trainers = {"": build_trainer(arguments.preset, device, **settings)}
    if arguments.compile:
        trainers[" compiled"] = build_trainer(arguments.preset, device, compile=True, **settings)
    flops = 3 * forward_flops(trainers[""])
    dtypes = {name_of(d): d for d in (torch.float32, dtype)}
    arms, peak_flops = {}, {}
    for name, d in dtypes.items():
        arms[f"{name} peak"], peak_flops[name] = matmul_arm(device, d)
        for suffix, trainer in trainers.items():
            for n in arguments.batch_sizes:
                arms[f"{name}{suffix}, batch {n}"] = step_arm(trainer, n, d)
    times = alternate(arms, arguments.rounds, device, warmup=2 if arguments.compile else 1)
    print(f"\n{arguments.preset}, {IMG_SIZE} px, latents given: forward, backward, clipping, AdamW")
    print(f"model: {flops / 1e12:.4f} TFLOP per image and step, three times its forward pass")
    result.update(flops_per_image=flops, seconds=times)
    result["arms"] = report_steps(times, flops, peak_flops)
    if arguments.profile:
        n = arguments.batch_sizes[-1]
        result["profile"] = {name: profile(step_arm(trainers[""], n, d), device) for name, d in dtypes.items()}
        report_profile(result["profile"], n)
    result["ratios"] = report_ratios(step_ratios(result["arms"], times, arguments.batch_sizes, list(dtypes)))
    return result


KINDS = {  # of operations (on GPUs kernels), by what their names hold
    "attention": "scaled_dot_product|flash|fmha|attention",
    "matrix products": r"::(addmm|mm|bmm|linear)\b|mkldnn|gemm|cutlass|xmma|nvjet",
    "optimizer": "adam|Adam",
    "casts, copies": "copy|Copy|::cat|Cat|memcpy|Memcpy",
    "layer norms": "layer_norm|LayerNorm",
}


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


def report_profile(shares: dict[str, dict[str, float]], batch_size: int) -> None:
    print(f"\nwhere the time of a step with {batch_size} images goes, by PyTorch's profiler")
    for kind in next(iter(shares.values())):
        print(f"  {kind:<20}", "  ".join(f"{name} {parts[kind]:6.1%}" for name, parts in shares.items()))


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
        share = ratio(rates, peaks)
        images = spread([batch_size / seconds for seconds in values])
        arms[name] = {
            "images_per_second": images,
            "flops_per_second": spread(rates),
            "peak": spread(peaks),
            "mfu": share,
        }
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


def kept_for_backward(run: Callable[[], torch.Tensor], parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of `run()`, besides the parameters."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()  # alive until here, so that no address is used twice
    del result
    return sum(sizes.values())


def process_peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except OSError:  # no Linux: ru_maxrss is in bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_of_a_step(preset: str, batch_size: int, device: torch.device, checkpointing: bool) -> dict[str, int]:
    """Bytes: the process's (CPU) or allocator's (CUDA) peak over three fp32 steps, and what it is made of."""
    runtime = process_peak()
    trainer = build_trainer(preset, device, use_amp=False, gradient_checkpointing=checkpointing)
    batch = latent_batch(trainer, batch_size)
    for _ in range(3):
        trainer.train_step([batch])
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_peak()
    nbytes = lambda tensors: sum(tensor.numel() * tensor.element_size() for tensor in tensors)  # noqa: E731
    trained = nbytes(trainer.trained_parameters)
    moments = nbytes(v for state in trainer.optimizer.state.values() for v in state.values() if v.ndim)
    trainer.model.train()
    kept = kept_for_backward(lambda: trainer.compute_loss(batch)["loss"], trainer.model.parameters())
    return {
        "peak": peak,
        "weights (VAE included)": nbytes(trainer.model.parameters()),
        "gradients": trained,
        "AdamW's moments": moments,
        "kept for the backward pass": kept,
        "PyTorch itself": 0 if device.type == "cuda" else runtime,
    }


def _send_memory(connection, *arguments) -> None:
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
        parts = in_fresh_processes(_send_memory, [(preset, batch_size, device, checkpointing)])
        result[name] = parts
        if parts is None:
            print(f"\npeak memory, {name}, batch {batch_size}: more than this machine has")
            continue
        is_target = preset == "d12-d12" and batch_size == 8
        wanted = f"  under {limit / 1e9:.0f} GB: {'yes' if parts['peak'] < limit else 'NO'}" if is_target else ""
        print(f"\npeak memory, {name}, batch {batch_size}: {parts['peak'] / 1e9:.2f} GB{wanted}")
        for part, size in parts.items():
            if part != "peak":
                print(f"  {part:<32} {size / 1e9:6.2f} GB")
        rest = 2 * parts["peak"] - sum(parts.values())
        print(f"  {'the rest: passing values':<32} {rest / 1e9:6.2f} GB")
    return result
