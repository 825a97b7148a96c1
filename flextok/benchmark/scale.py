"""What training takes on many GPUs, counted: memory with DDP and FSDP, gradient exchange, time, data rate, caches.

Nothing is measured: parameters, operations and activations are counted on tensors without data, and divided by the
speeds that are given.
"""

import argparse
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..flextok_wrapper import FlexTokFromHub
from ..model.builder import PRESETS, preset_config
from ..model.trunks.transformers import TransformerBlock
from ..model.utils.repa_loss import encoder_facts
from ..utils.modules import count_parameters
from ..utils.random import RANDOM_KEY, BatchRandom
from .timing import at_least_1
from .train import IMG_SIZE, counted_flops

IMAGENET = 1_281_167  # training images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=at_least_1, nargs="+", default=[8, 64], metavar="N", help="(default: 8 64)")
    parser.add_argument("--tflops", type=float, default=300, help="TFLOP/s that a GPU sustains (default: 300)")
    parser.add_argument("--link", type=float, default=50, help="GB/s of a GPU's slowest link (default: 50, 400 Gbit/s)")
    parser.add_argument("--global-batch-size", type=at_least_1, default=1024, metavar="N", help="(default: 1024)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="count with it")
    parser.add_argument("--image-kb", type=float, default=110, help="kB of an image file (default: 110, ImageNet)")


def step_counts(preset: str, batch: int, checkpointing: bool) -> dict[str, float]:
    """Parameters of a model, its VAE and its largest block; operations of a step without recomputation; bytes kept.

    Kept is what the forward pass under bf16 autocast leaves for the backward pass.
    """
    kept: dict[int, Any] = {}
    with torch.device("meta"):
        model = FlexTokFromHub(preset_config(preset, vae_hub_path=None, use_act_checkpoint=checkpointing)).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        size = IMG_SIZE // model.vae.downsample_factor
        latents = torch.randn(batch, model.vae.latent_channels, size, size)
        data_dict = {model.vae.vae_latents_write_key: latents, RANDOM_KEY: BatchRandom(0, 0, torch.arange(batch))}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage()._cdata not in known:
                kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16), counted_flops(model.encoder, model.decoder) as flops:
                output = model(data_dict)
        del output
        parts = (model.encoder, model.decoder)
        blocks = [count_parameters(module) for module in model.modules() if isinstance(module, TransformerBlock)]
        return {
            "trained": sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad),
            "frozen": count_parameters(model.vae),
            "block": max(blocks),
            "flops": 3 * flops[0],
            "kept": sum(storage.nbytes() for storage in kept.values()),
        }


def count(preset: str, checkpointing: bool) -> dict[str, float]:
    """As step_counts, with `flops` and `kept` per image, and `kept_once`, which does not grow with the batch."""
    two, four = (step_counts(preset, batch, checkpointing) for batch in (2, 4))
    kept = (four["kept"] - two["kept"]) / 2
    return {**two, "flops": two["flops"] / 2, "kept": kept, "kept_once": two["kept"] - 2 * kept}


def memory(counts: dict[str, float], images: int, parts: int = 1, keep: bool = False) -> float:
    """Bytes on a GPU: weights, gradients and moments in fp32, divided among `parts`, and activations.

    Args:
        keep: With FSDP and accumulation, whole gradients are kept until the last micro-batch (`fsdp_accumulation`).
    """
    state = 4 * 4 * counts["trained"] / parts
    if parts > 1:  # gathered in fp32, two blocks at a time
        state += 2 * 4 * counts["block"]
    if keep:
        state += 4 * counts["trained"]
    return state + counts["kept_once"] + 4 * counts["frozen"] + images * counts["kept"]


def run(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    """All counts as plain numbers; prints them as Markdown tables."""
    result: dict[str, Any] = {"counts": {}, "gpus": {}}
    checkpointing = arguments.gradient_checkpointing
    print(f"\nper image at {IMG_SIZE} px, bf16 autocast, gradient checkpointing {'on' if checkpointing else 'off'}\n")
    print("| model | trained parameters | TFLOP a step | activations | weights, gradients, AdamW | with averages |")
    print("|---|---|---|---|---|---|")
    for preset in PRESETS:
        counts = result["counts"][preset] = count(preset, checkpointing)
        row = [f"{counts['trained'] / 1e6:.0f} M", f"{counts['flops'] / 1e12:.2f}", f"{counts['kept'] / 1e9:.2f} GB"]
        row += [f"{copies * 4 * counts['trained'] / 1e9:.1f} GB" for copies in (4, 5)]
        print(f"| {preset} | {' | '.join(row)} |")
    for n in arguments.gpus:
        images = max(1, arguments.global_batch_size // n)
        print(f"\n{n} GPUs, {images * n} images a step, {images} per GPU; {arguments.tflops:g} TFLOP/s, "
              f"{arguments.link:g} GB/s\n")  # fmt: skip
        print("| model | compute | gradients | reducing them | images/s, all | data | memory DDP | FSDP | FSDP, keep |")
        print("|---|---|---|---|---|---|---|---|---|")
        result["gpus"][n] = {}
        for preset, counts in result["counts"].items():
            compute = images * counts["flops"] * (4 / 3 if checkpointing else 1) / (arguments.tflops * 1e12)
            gradients = 4 * counts["trained"]
            exchange = 2 * (n - 1) / n * gradients / (arguments.link * 1e9)  # a ring sends and receives it twice
            rate = images * n / max(compute, exchange)
            data = rate * arguments.image_kb * 1e3
            ddp, fsdp, keep = memory(counts, images), memory(counts, images, n), memory(counts, images, n, keep=True)
            result["gpus"][n][preset] = dict(
                compute=compute, exchange=exchange, rate=rate, ddp=ddp, fsdp=fsdp, fsdp_keep=keep
            )
            memories = " | ".join(f"{size / 1e9:.0f} GB" for size in (ddp, fsdp, keep))
            print(f"| {preset} | {compute:.2f} s | {gradients / 1e9:.1f} GB | {exchange:.2f} s | {rate:.0f} "
                  f"| {data / 1e9:.2f} GB/s | {memories} |")  # fmt: skip
    print(f"\ncaches of ImageNet's {IMAGENET} training images, mirrored ones too\n")
    print("| cache | per image | all |\n|---|---|---|")
    facts = [encoder_facts("dinov2_vitl14", size) for size in (518, 224)]
    caches = {f"DINOv2-L at {f.image_size} px, fp16": 2 * 2 * f.grid[0] * f.grid[1] * f.dim for f in facts}
    caches["latents of 16 channels, fp32"] = 2 * 2 * 4 * 16 * 32 * 32
    for name, size in caches.items():
        print(f"| {name} | {size / 1e6:.2f} MB | {size * IMAGENET / 1e12:.2f} TB |")
    return {**result, "caches": caches}
