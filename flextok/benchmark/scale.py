"""What training takes on many GPUs, counted: memory with DDP and FSDP, gradient exchange, time, data rate, caches.

Nothing is measured: parameters, operations and activations are counted on tensors without data, and divided by the
speeds that are given.
"""

import argparse
import math
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..flextok_wrapper import FlexTokFromHub
from ..model.builder import PRESETS, preset_config
from ..model.trunks.transformers import TransformerBlock
from ..model.utils.repa_loss import encoder_facts
from ..training.models import decoder_grid
from ..utils.modules import count_parameters
from ..utils.random import RANDOM_KEY, BatchRandom
from .timing import at_least_1
from .train import IMG_SIZE, forward_flops, kept_for_backward

IMAGENET = 1_281_167  # training images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=at_least_1, nargs="+", default=[8, 64], metavar="N", help="(default: 8 64)")
    parser.add_argument("--tflops", type=float, default=300, help="TFLOP/s that a GPU sustains (default: 300)")
    parser.add_argument("--link", type=float, default=50, help="GB/s of a GPU's slowest link (default: 50, 400 Gbit/s)")
    parser.add_argument("--global-batch-size", type=at_least_1, default=1024, metavar="N", help="(default: 1024)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="count with it")
    parser.add_argument("--image-size", type=int, default=IMG_SIZE, metavar="PX",
                        help=f"side of the images, a multiple of 16 (default: {IMG_SIZE})")  # fmt: skip
    parser.add_argument("--image-kb", type=float, default=110, help="kB of an image file (default: 110, ImageNet)")


def count(preset: str, img_size: int, checkpointing: bool) -> dict[str, float]:
    """Parameters of a model (`trained`), its VAE (`frozen`) and its largest `block`; patches and registers per image
    (`sequence`); operations of a step per image without recomputation (`flops`); bytes that the forward pass under bf16
    autocast leaves for the backward pass, per image (`kept`) and whatever the batch (`kept_once`)."""
    config = preset_config(preset, img_size=img_size, vae_hub_path=None, use_act_checkpoint=checkpointing)
    with torch.device("meta"):
        model = FlexTokFromHub(config).train()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        model.to_empty(device="cpu")
        size = img_size // model.vae.downsample_factor

        def forward(batch: int) -> dict:
            latents = torch.randn(batch, model.vae.latent_channels, size, size)
            random = BatchRandom(0, 0, torch.arange(batch))
            return model({model.vae.vae_latents_write_key: latents, RANDOM_KEY: random})

        flops = 3 * forward_flops(lambda: forward(1))
        two, four = (kept_for_backward(lambda n=n: forward(n), model.parameters()) for n in (2, 4))
    parts = (model.encoder, model.decoder)
    return {
        "trained": sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad),
        "frozen": count_parameters(model.vae),
        "block": max(count_parameters(module) for module in model.modules() if isinstance(module, TransformerBlock)),
        "sequence": math.prod(decoder_grid(model, img_size)) + model.n_registers,
        "flops": flops,
        "kept": (four - two) / 2,
        "kept_once": 2 * two - four,
    }


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
    checkpointing, img_size = arguments.gradient_checkpointing, arguments.image_size
    print(f"\nper image at {img_size} px, bf16 autocast, gradient checkpointing {'on' if checkpointing else 'off'}\n")
    print("| model | trained parameters | patches and registers | TFLOP a step | activations "
          "| weights, gradients, AdamW | with averages |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for preset in PRESETS:
        counts = result["counts"][preset] = count(preset, img_size, checkpointing)
        row = [f"{counts['trained'] / 1e6:.0f} M", str(counts["sequence"])]
        row += [f"{counts['flops'] / 1e12:.2f}", f"{counts['kept'] / 1e9:.2f} GB"]
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
            ddp, fsdp, keep = memory(counts, images), memory(counts, images, n), memory(counts, images, n, keep=True)
            result["gpus"][n][preset] = dict(
                compute=compute, exchange=exchange, rate=rate, ddp=ddp, fsdp=fsdp, fsdp_keep=keep
            )
            memories = " | ".join(f"{size / 1e9:.0f} GB" for size in (ddp, fsdp, keep))
            print(f"| {preset} | {compute:.2f} s | {gradients / 1e9:.1f} GB | {exchange:.2f} s | {rate:.0f} "
                  f"| {rate * arguments.image_kb / 1e6:.2f} GB/s | {memories} |")  # fmt: skip
    print(f"\ncaches of ImageNet's {IMAGENET} training images, mirrored ones too\n")
    print("| cache | per image | all |\n|---|---|---|")
    facts = [encoder_facts("dinov2_vitl14", size) for size in (518, 224)]
    caches = {f"DINOv2-L at {f.image_size} px, fp16": 2 * 2 * f.grid[0] * f.grid[1] * f.dim for f in facts}
    caches["latents of 16 channels, fp32"] = 2 * 2 * 4 * 16 * (img_size // 8) ** 2
    for name, size in caches.items():
        print(f"| {name} | {size / 1e6:.2f} MB | {size * IMAGENET / 1e12:.2f} TB |")
    return {**result, "caches": caches}
