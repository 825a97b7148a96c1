"""Images from the web into tensors, and tensors into pictures: what the demo notebooks use."""

import io
import urllib.request
from collections.abc import Sequence

import torch
from PIL import Image
from torchvision.transforms import v2

MEAN = STD = (0.5, 0.5, 0.5)  # [0, 1] <-> [-1, 1]


def img_from_url(url: str, img_size: int = 256, timeout: float = 30.0) -> torch.Tensor:
    """Fetch an image (http, https or file URL), resize its short side, crop the centre: [1, 3, S, S] in [-1, 1]."""
    request = urllib.request.Request(url, headers={"User-Agent": "flextok"})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        image = Image.open(io.BytesIO(response.read())).convert("RGB")
    transform = v2.Compose(
        [
            v2.Resize(img_size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(img_size),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return transform(image)[None]


def imgs_from_urls(urls: Sequence[str], img_size: int = 256) -> torch.Tensor:
    """Fetch several images: [B, 3, S, S] in [-1, 1]."""
    return torch.cat([img_from_url(url, img_size) for url in urls])


def denormalize(images: torch.Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> torch.Tensor:
    """[..., 3, H, W] in [-1, 1] -> [0, 1], clipped."""
    mean, std = (torch.as_tensor(v, device=images.device, dtype=images.dtype).view(3, 1, 1) for v in (mean, std))
    return (images * std + mean).clamp(0, 1)


def batch_to_pil(images: torch.Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [-1, 1] -> PIL images."""
    pixels = (denormalize(images.float()) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in pixels]
