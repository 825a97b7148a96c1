"""Pictures of a run: grids of reconstructions and curves of losses."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont

from ..utils.demo import batch_to_pil
from ..utils.files import write_atomically
from ..utils.random import PICTURE_STEP, RANDOM_KEY, BatchRandom
from .token_use import reconstructions

MIN_CELL = 128  # pixels; smaller images are enlarged by a whole factor, so that titles fit and pixels stay visible


def flexible_length(
    model: nn.Module,
    batches: Iterable[torch.Tensor],
    counts: list[int],
    seed: int,
    device: torch.device,
    before_each: Callable[[], None],
    **sampler,
) -> dict[str, torch.Tensor]:
    """Columns of a picture by title, each [N, 3, H, W] in [-1, 1]: the VAE's images, those from k tokens, originals.

    Args:
        model: In evaluation mode.
        batches: The images [B, 3, H, W] in [-1, 1].
        counts: Token counts k.
        seed: Seed of the noise that the sampler starts from.
        before_each: Called before each reconstruction; may raise.
        sampler: timesteps, guidance_scale and perform_norm_guidance of `FlexTok.decode`.
    """
    vae, columns = model.vae, {}
    done = 0
    for images in batches:
        images = images.to(device)
        random = BatchRandom(seed, PICTURE_STEP, torch.arange(done, done + len(images), device=device))
        done += len(images)
        encoded = model.encode({vae.images_read_key: images, RANDOM_KEY: random})
        latents = encoded[vae.vae_latents_write_key]
        decoded = vae.decode({vae.vae_latents_read_key: latents})[vae.images_reconst_write_key]
        columns.setdefault("VAE", []).append(decoded.clamp(-1, 1))
        noise = random.normal("picture", latents.shape[1:]).to(latents.dtype)
        for k, images_of_k in reconstructions(model, encoded, noise, counts, before_each, **sampler):
            columns.setdefault(f"{k} token{'s' if k > 1 else ''}", []).append(images_of_k)
        columns.setdefault("original", []).append(images)
    return {title: torch.cat(parts) for title, parts in columns.items()}


def save_grid(columns: Sequence[torch.Tensor], titles: Sequence[str], path: Path) -> None:
    """Write a PNG with one column per entry of `columns` ([B, 3, H, W] in [-1, 1]) under its title."""
    images = [batch_to_pil(column) for column in columns]
    width, height = images[0][0].size
    zoom = max(1, -(-MIN_CELL // width))
    width, height, gap = width * zoom, height * zoom, 4
    font = ImageFont.load_default(size=max(14, width // 10))
    header = int(font.size * 1.8)
    rows = len(images[0])
    grid = Image.new("RGB", (len(images) * (width + gap) + gap, header + rows * (height + gap)), "white")
    draw = ImageDraw.Draw(grid)
    for i, (column, title) in enumerate(zip(images, titles)):
        x = gap + i * (width + gap)
        draw.text((x + width / 2, header / 2), title, fill="black", font=font, anchor="mm")
        for j, image in enumerate(column):
            grid.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, header + j * (height + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: grid.save(temporary, format="PNG"))


def save_curves(metrics_path: Path, path: Path) -> None:
    """Draw a metrics.jsonl: flow loss, REPA loss with its constant predictions, PSNR by token count; what is there."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in metrics_path.read_text().splitlines()]

    def series(key):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        return [p[0] for p in points], [p[1] for p in points]

    counts = sorted(int(key.removeprefix("val/psnr_k")) for key in {k for r in records for k in r} if "psnr_k" in key)
    names = ["flow_loss", *["repa_loss"] * any("train/repa_loss" in r for r in records), *["psnr"] * bool(counts)]
    figure = Figure(figsize=(max(5.5, 4.8 * len(names)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {
        "flow_loss": "flow loss (mean squared velocity error)", "repa_loss": "REPA loss (- cosine)",
        "psnr": "PSNR of reconstructions [dB]",
    }  # fmt: skip
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        if name == "psnr":
            for i, k in enumerate(counts):
                colour = matplotlib.colormaps["viridis"](i / len(counts))
                axis.plot(*series(f"val/psnr_k{k}"), color=colour, marker=".", label=f"{k} token{'s' * (k > 1)}")
            constants = {"mean image": "val/psnr_mean_image"}
        else:
            axis.plot(*series(f"train/{name}"), color="tab:blue", linewidth=1, alpha=0.7, label=f"train/{name}")
            axis.plot(*series(f"val/{name}"), color="tab:orange", marker=".", label=f"val/{name}")
            constants = {"best without the image": f"val/{name}_constant", "best single vector": f"val/{name}_mean"}
        for (constant, key), line in zip(constants.items(), ("--", ":")):
            if values := series(key)[1]:
                axis.axhline(values[-1], color="grey", linestyle=line, label=constant)
        axis.set_xlabel("step")
        axis.set_title(titles[name])
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", framealpha=0.6)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
