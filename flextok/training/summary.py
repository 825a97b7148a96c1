"""What a run is going to do, in a few lines, before it starts."""

import math
from pathlib import Path

import torch

from ..model.trunks.transformers import FlexTransformer
from ..utils.dtypes import autocast_dtype, computes_bf16, name_of
from ..utils.modules import count_parameters
from ..utils.processes import world_size
from .config import TrainConfig
from .models import repa_target_size


def summary(
    config: TrainConfig, model, train_dataset, val_dataset, device: torch.device, run_dir: Path | None, resume
) -> str:
    """What this run is, in a few lines; `model` may be without weights, or None if its config is not known yet."""
    millions = lambda n: f"{n / 1e6:.2f} M"  # noqa: E731
    lines = []
    name = "new model" if config.model is not None else config.model_name
    if config.train_from_scratch and config.model is None:
        name += " (architecture alone, new weights)"
    if model is None:
        lines.append(("model", f"{name}: size known once its config is fetched from the Hub"))
    else:
        encoder, decoder = (
            next(module for module in part.modules() if isinstance(module, FlexTransformer))
            for part in (model.encoder, model.decoder)
        )
        levels = config.fsq_levels or model.regularizer.levels
        sizes = f"encoder {encoder.depth} x {encoder.dim}, decoder {decoder.depth} x {decoder.dim}"
        lines.append(("model", f"{name}: {sizes}, {model.n_registers} tokens of {math.prod(levels)} codes"))
        parts = []
        for part in ("encoder", "decoder", "vae"):
            n = count_parameters(getattr(model, part))
            state = (
                "no parameters"
                if n == 0
                else f"{millions(n)} {'trained' if getattr(config, f'train_{part}') else 'frozen'}"
            )
            parts.append(f"{part} {state}")
        lines.append(("parameters", ", ".join(parts)))
    if config.flow is not None:
        changed = config.flow.model_dump(exclude_none=True)
        lines.append(("flow", ", ".join(f"{name} {value}" for name, value in changed.items()) or "the model's own"))
    if config.use_repa:
        lines += repa_summary(config, model, device)
    else:
        lines.append(("REPA", "off"))
    n_val = len(val_dataset) if val_dataset is not None else 0
    source = config.dataset_name if config.data_path is None else f"{config.data_path} ({config.dataset_name})"
    if config.use_repa and config.repa_cache:
        lines += cache_summary(config, train_dataset, val_dataset, device)
    lines.append(
        ("data", f"{source}: {len(train_dataset)} training and {n_val} validation images, {config.img_size} px")
    )
    global_batch = config.batch_size * config.accumulation(world_size()) * world_size()
    steps = -(-len(train_dataset) // global_batch)
    text = f"{config.num_epochs} epochs x {steps} = {config.total_steps(steps)}"
    if config.max_steps is not None:
        text = f"{config.max_steps} (max_steps), {config.max_steps / steps:.3g} epochs of {steps}"
    lines.append(("steps", f"{text}, {global_batch} images each"))
    dtype = autocast_dtype(device) if config.use_amp else None
    where = device if world_size() == 1 else f"{world_size()} processes ({config.parallel}), this one on {device}"
    text = "fp32" if dtype is None else f"{name_of(dtype)} autocast"
    if dtype is None and device.type == "cpu" and computes_bf16(device):
        text += " (bf16, which this CPU knows, is slower or was not asked for)"
    lines.append(("device", f"{where}, {text}"))
    lines.append(("run folder", "new, by name and date" if run_dir is None else str(run_dir)))
    if resume is not None:
        lines.append(("resume", str(resume)))
    return "\n".join(f"  {label:<13} {text}" for label, text in lines)


def repa_summary(config: TrainConfig, model, device: torch.device) -> list[tuple[str, str]]:
    """The summary's lines on REPA."""
    from ..model.utils.repa_encoders import encoder_dtype
    from ..model.utils.repa_loss import encoder_facts, projector_parameters

    facts = encoder_facts(config.repa_encoder_type, config.repa_image_size)
    dtype = name_of(encoder_dtype(config.repa_encoder_dtype, device))
    size = config.repa_target_size
    if model is not None:
        size = repa_target_size(config, model)
    grid = size if size == "auto" else "x".join(map(str, size))
    lines = [
        (
            "REPA",
            f"{config.repa_encoder_type} ({facts.parameters / 1e6:.2f} M frozen, {dtype}) at {facts.image_size} px",
        )
    ]
    text = f"on {grid} x {facts.dim}"
    if model is not None:
        transformer = model.decoder.module_dict["dec_transformer"]
        layers = config.repa_layers or transformer.intermediate_layers
        n = projector_parameters(transformer.dim, facts.dim, config.repa_projector, config.repa_projector_hidden)
        of_layers = f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
        text = f"{of_layers} of the decoder {text}, projector {n * len(layers) / 1e6:.2f} M trained"
    lines.append(("", f"{text}, weight {config.repa_weight:g}"))
    if config.repa_stop is not None:
        lines.append(("", f"until step {config.repa_stop}"))
    return lines


def cache_summary(config: TrainConfig, train_dataset, val_dataset, device: torch.device) -> list[tuple[str, str]]:
    """The summary's line on the feature cache; raises CacheError for one that does not fit the run."""
    from ..data.caching import feature_plans

    datasets = {"train": train_dataset, "val": val_dataset}
    plans = feature_plans(config, {split: d for split, d in datasets.items() if d is not None}, device)
    return [("feature cache" if split == "train" else "", plan.describe()) for split, plan in plans.items()]


def closing_words(step: int, metrics: dict[str, float], warnings: dict[str, str], run_dir: Path) -> str:
    """The end of a run: what its last validation and picture measured, what is wrong with its tokens, where all is.

    Args:
        metrics: The last value of each.
        warnings: On the tokens; empty where nothing is wrong.
    """
    lines = ["", f"Done: {step} steps."]
    by_count = {int(key.removeprefix("val/psnr_k")): metrics[key] for key in metrics if key.startswith("val/psnr_k")}
    if by_count:
        text = ", ".join(f"{psnr:.2f} from {k} token{'s' * (k > 1)}" for k, psnr in sorted(by_count.items()))
        lines.append(f"  PSNR [dB]  {text}; mean image {metrics['val/psnr_mean_image']:.2f}")
    if "val/repa_loss" in metrics:
        names = {"without the image": "val/repa_loss_constant", "one vector": "val/repa_loss_mean"}
        known = [f"{name}: {metrics[key]:.3f}" for name, key in names.items() if metrics.get(key) is not None]
        lines.append(f"  REPA loss  {metrics['val/repa_loss']:.3f}" + (f" ({', '.join(known)})" if known else ""))
    if "val/codes_distinct_1" in metrics:
        distinct, bits = metrics["val/codes_distinct_1"], metrics["val/codes_entropy_1"]
        lines.append(f"  codes      {distinct:.0%} as many different first codes as images ({bits:.1f} bits)")
    lines += [f"  warning    {warning}" for warning in filter(None, warnings.values())]
    return "\n".join([
        *lines,
        f"  pictures   {run_dir / 'pictures'}",
        f"  curves     {run_dir / 'curves.png'}",
        f"  metrics    {run_dir / 'metrics.jsonl'}",
        f"  model      {run_dir / 'export'}   (FlexTokFromHub.from_pretrained loads it)",
    ])  # fmt: skip
