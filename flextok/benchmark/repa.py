"""What REPA costs: step time with and without it, online and from the cache, memory, cache sizes."""

import argparse
import contextlib
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

from train_flextok import FlexTokTrainer

from ..data.batch import Batch
from ..data.record_cache import RecordCache, cache_bytes
from ..model.utils.repa_encoders import FrozenEncoder
from ..model.utils.repa_loss import REPAModule, encoder_facts, known_encoders, projector_parameters
from ..utils.config import ConfigError
from ..utils.dtypes import name_of
from .timing import add_preset, alternate, ratio, report_ratios, report_seconds
from .train import IMG_SIZE, build_trainer, kept_for_backward

WIDTHS = (768, 1152, 1792)  # of the decoders d12, d18, d28


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_preset(parser)
    parser.add_argument(
        "--encoder", default="dinov2_vitl14", help="its size, with random weights (default: %(default)s)"
    )
    parser.add_argument("--image-size", type=int, help="repa_image_size (default: the encoder's own)")


class CachedBatches:
    """Batches as a loader gives them, with latents; features are read from a RecordCache on disk."""

    def __init__(self, folder: Path, grid, dim: int, batch_size: int, latent_shape, n_images: int = 32):
        self.cache = RecordCache.create(folder, {}, n_images, 2, (*grid, dim))
        values = torch.randn(n_images, 2, *grid, dim, generator=torch.Generator().manual_seed(0))
        self.cache.write(torch.arange(n_images), values.half())
        self.cache.flush()
        draws = torch.Generator().manual_seed(1)
        self.images = torch.rand(batch_size, 3, IMG_SIZE, IMG_SIZE, generator=draws) * 2 - 1
        self.moments = torch.randn(batch_size, 2, *latent_shape, generator=draws) * 0.5
        self.index = torch.randperm(n_images, generator=draws)[:batch_size]
        self.flip = torch.arange(batch_size) % 2 == 0

    def batch(self, features: bool, images: bool) -> Batch:
        read = self.cache.read(self.index, self.flip).permute(0, 3, 1, 2) if features else None
        position = torch.arange(len(self.index))
        return Batch(self.images if images else None, latents=self.moments, features=read, position=position)


def random_encoder(name: str, image_size: int, dtype: torch.dtype) -> FrozenEncoder:
    """The architecture of a DINOv2 from timm, with random weights: the same work, nothing to download."""
    facts = encoder_facts(name, image_size)
    timm_name = f"vit_{ {'s': 'small', 'b': 'base', 'l': 'large', 'g': 'giant'}[name[10]] }_patch14_dinov2"
    model = timm.create_model(timm_name, pretrained=False, num_classes=0, img_size=facts.image_size)

    def features(model, images):
        return model.forward_features(images)[:, 1:].transpose(1, 2).unflatten(2, facts.grid)

    return FrozenEncoder(name, model, features, facts, dtype)


def step_arms(trainer: FlexTokTrainer, data: CachedBatches, encoder: FrozenEncoder) -> dict[str, Callable[[], Any]]:
    """A training step (forward, backward, clipping, AdamW) without REPA and with it in each form, and REPA's parts."""

    def step(active: bool, project_when: str = "after_resize", online: bool = False) -> None:
        trainer.repa_ended, trainer.repa_module.project_when = not active, project_when
        trainer.train_step([data.batch(features=active and not online, images=online)])

    device, module = trainer.device, trainer.repa_module
    images = data.images.to(device)
    grid = (IMG_SIZE // 16, IMG_SIZE // 16)
    decoder_features = torch.randn(len(images), *grid, module.decoder_dim, device=device, requires_grad=True)
    target = torch.randn(len(images), module.encoder_dim, *module.target_size, device=device)

    def project() -> None:
        module.project_when = "after_resize"
        with trainer.autocast():
            loss = torch.stack(module.layer_losses(decoder_features, target)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        trainer.optimizer.step()  # the model's parameters have no gradients, so that only the projector's are updated
        trainer.optimizer.zero_grad(set_to_none=True)

    return {
        "no REPA": lambda: step(False),
        "cached, before_resize": lambda: step(True, "before_resize"),
        "cached, after_resize": lambda: step(True, "after_resize"),
        "online, after_resize": lambda: step(True, "after_resize", online=True),
        "encoder alone": lambda: encoder(images),
        "projector alone, after_resize": project,
    }


def build_repa_trainer(preset: str, autocast: bool, device: torch.device, encoder: FrozenEncoder) -> FlexTokTrainer:
    trainer = build_trainer(
        preset, device, use_amp=autocast, use_repa=True, repa_encoder_type=encoder.name,
        repa_image_size=encoder.image_size,
    )  # fmt: skip
    trainer.repa_module.use_encoder(encoder)
    return trainer


def projector_memory(decoder_dim: int, encoder: str, autocast: Callable[[], Any]) -> dict[str, int]:
    """Bytes per image that the projector and the loss keep for the backward pass, by `repa_project`."""
    per_image = {}
    for project_when in ("after_resize", "before_resize"):
        module = REPAModule(decoder_dim, encoder, project_when=project_when)
        kept = []
        for batch_size in (1, 2):
            features = torch.randn(batch_size, IMG_SIZE // 16, IMG_SIZE // 16, decoder_dim)
            target = torch.randn(batch_size, module.encoder_dim, *module.target_size)
            with autocast():
                loss = functools.partial(module.layer_losses, features, target)
                kept.append(kept_for_backward(loss, module.parameters()))
        per_image[project_when] = kept[1] - kept[0]  # what is kept once, such as weights cast to bf16, drops out
    return per_image


def memory_tables() -> list[dict]:
    """Sizes of encoders, projectors and caches; computed, not measured."""
    rows = []
    for name, known in known_encoders().items():
        for image_size in [] if name.endswith("_reg") else sorted({known.image_size, 224}):
            facts = encoder_facts(name, image_size)
            rows.append({
                "encoder": name, "image_size": image_size, "grid": list(facts.grid), "parameters": facts.parameters,
                "bytes_fp32": 4 * facts.parameters, "bytes_bf16": 2 * facts.parameters,
                "cache_bytes_per_1000_images": cache_bytes(1000, 2, (*facts.grid, facts.dim)),
                "projector_parameters": {D: projector_parameters(D, facts.dim) for D in WIDTHS},
            })  # fmt: skip
    return rows


def run(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    """All measurements as plain numbers; prints them."""
    if not arguments.encoder.startswith("dinov2_vit"):
        raise ConfigError(f"--encoder is {arguments.encoder}, expected a DINOv2, such as dinov2_vitb14")
    facts = encoder_facts(arguments.encoder, arguments.image_size)
    autocast = dtype != torch.float32
    encoder = random_encoder(arguments.encoder, arguments.image_size, dtype).to(device)
    result: dict[str, Any] = {"preset": arguments.preset, "encoder": arguments.encoder, "image_size": facts.image_size}
    for batch_size in arguments.batch_sizes:
        trainer = build_repa_trainer(arguments.preset, autocast, device, encoder)
        with tempfile.TemporaryDirectory() as folder:
            latent_shape = (trainer.model.vae.latent_channels, IMG_SIZE // 8, IMG_SIZE // 8)
            data = CachedBatches(Path(folder), facts.grid, facts.dim, batch_size, latent_shape)
            times = alternate(step_arms(trainer, data, encoder), arguments.rounds, device)
        base, online = times["no REPA"], times["online, after_resize"]
        parts = [sum(each) for each in zip(base, times["encoder alone"], times["projector alone, after_resize"])]
        report_seconds(times, f"batch {batch_size}: seconds per step")
        ratios = report_ratios([
            ("cached, before_resize / no REPA", ratio(times["cached, before_resize"], base), 1.10),
            ("cached, after_resize / no REPA", ratio(times["cached, after_resize"], base), 1.25),
            ("online / (no REPA + encoder + projector)", ratio(online, parts), 1.05),
            ("online / no REPA", ratio(online, base), None),
        ])  # fmt: skip
        result[f"batch {batch_size}"] = {"seconds": times, "ratios": ratios}
    precisions = {"fp32": contextlib.nullcontext}
    if autocast:
        precisions[name_of(dtype)] = functools.partial(torch.autocast, "cpu", dtype)  # where it is counted
    print("\nkept for the backward pass by projector and loss, per image")
    result["projector_memory"] = {}
    for width in WIDTHS:
        for name, context in precisions.items():
            sizes = projector_memory(width, arguments.encoder, context)
            result["projector_memory"][f"width {width}, {name}"] = sizes
            shown = ", ".join(f"{when} {size / 1e6:.1f} MB" for when, size in sizes.items())
            print(f"  {f'width {width}, {name}':<24} {shown}")
    result["memory"] = memory_tables()
    print("\nencoder              px   grid      parameters  fp32 GB  bf16 GB  cache per 1000 images, flips included")
    for row in result["memory"]:
        grid = "x".join(map(str, row["grid"]))
        print(f"{row['encoder']:<19} {row['image_size']:>4}   {grid:<7} {row['parameters'] / 1e6:>9.1f} M "
              f"{row['bytes_fp32'] / 1e9:>8.2f} {row['bytes_bf16'] / 1e9:>8.2f}  "
              f"{row['cache_bytes_per_1000_images'] / 1e9:.2f} GB")  # fmt: skip
    return result
