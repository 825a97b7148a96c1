"""How close reconstructions are to their originals: per image, and as two sets of features (Frechet distance).

Images are float [B, 3, H, W] in [-1, 1].
"""

import math
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import urlopen

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from ..utils.errors import UserError

MAX_PSNR = 100.0  # dB; above it reconstructions are equal in fp32 for any purpose, and means stay finite
SSIM_WINDOW = 11  # pixels, of the Gaussian window (Wang et al. 2004)
INCEPTION_DIM = 2048
CONNECT_TIMEOUT = 10.0  # seconds within which a server of weights has to answer: torch.hub waits for minutes
FRECHET_IMAGES = 10_000  # with fewer the Frechet distance is biased upwards; papers use 10 000 to 50 000
MEAN_IMAGES = 30  # with fewer a normal interval of their mean is doubtful


class MetricUnavailable(UserError, RuntimeError):
    """The weights of a metric are not here and cannot be fetched, or are damaged; the message says what to do."""


def psnr(reconstruction: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio 10 log10(4 / MSE) of each image in dB, [B]; at most MAX_PSNR, also of equal images."""
    values = peak_signal_noise_ratio(reconstruction, original, data_range=2.0, dim=(1, 2, 3), reduction="none")
    return values.clamp(max=MAX_PSNR)


def ssim(reconstruction: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image (Wang et al. 2004), [B] in [-1, 1]: Gaussian window with sigma 1.5.

    Computed on pixels in [0, 1] (data range 1), per channel, and averaged over channels and those positions whose
    window lies within the image, as in scikit-image with gaussian_weights=True and use_sample_covariance=False.

    Raises:
        ValueError: For images smaller than 11 x 11.
    """
    if min(original.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs images of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, but got {list(original.shape)}"
        )
    _, every_position = structural_similarity_index_measure(
        (reconstruction + 1) / 2, (original + 1) / 2, sigma=1.5, data_range=1.0, reduction="none",
        return_full_image=True,
    )  # fmt: skip
    edge = SSIM_WINDOW // 2
    return every_position[..., edge:-edge, edge:-edge].mean((1, 2, 3))


def latent_mse(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of each image's latents: a, b [B, ...] -> [B]."""
    return (a - b).square().flatten(1).mean(1)


class Features(torch.nn.Identity):
    """Lets torchmetrics take features [B, C] where it would compute them from images."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def frechet_distance(dim: int) -> FrechetInceptionDistance:
    """Squared Frechet distance of two sets of features: `update(features [B, dim], real=...)`, `compute()`; on the CPU.

    With Inception features (`load_inception`) this is FID (arXiv 1706.08500): rFID, as these are reconstructions.
    `reset()` forgets the reconstructions and keeps the originals, which are the same for every number of tokens.
    """
    return FrechetInceptionDistance(feature=Features(dim), reset_real_features=False)


def load_lpips(device: torch.device | str = "cpu") -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """LPIPS v0.1 with AlexNet (arXiv 1801.03924) as a function of reconstructions and originals -> [B]; 0 if equal.

    Raises:
        MetricUnavailable: AlexNet's weights (233 MB) are neither here nor within reach.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    from torchvision.models import AlexNet_Weights

    url = AlexNet_Weights.DEFAULT.url
    net = _network("lpips", url, lambda path: LearnedPerceptualImagePatchSimilarity(net_type="alex").net).to(device)
    return lambda reconstruction, original: net(reconstruction, original).flatten()


def load_inception(device: torch.device | str = "cpu") -> Callable[[torch.Tensor], torch.Tensor]:
    """The Inception-v3 of FID as a function of images -> features [B, 2048].

    It is torch-fidelity's, with the weights and the resizing of the original TensorFlow graph. Images are rounded to 8
    bits first, as if they had been written to files.

    Raises:
        MetricUnavailable: Its weights (91 MB) are neither here nor within reach.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    def build(path: Path) -> torch.nn.Module:
        return FeatureExtractorInceptionV3("inception-v3-compat", [str(INCEPTION_DIM)], str(path))

    net = _network("rfid", URL_INCEPTION_V3, build).to(device)
    return lambda images: net(((images + 1) * 127.5).round().to(torch.uint8))[0]


def _network(metric: str, url: str, build: Callable[[Path], torch.nn.Module]) -> torch.nn.Module:
    """build(file with the weights at `url`), frozen; what the torch.hub cache does not have is downloaded."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)
    if not path.is_file():
        try:
            urlopen(url, timeout=CONNECT_TIMEOUT).close()
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), path.stem.rsplit("-", 1)[-1], progress=False)
        except (OSError, HTTPException, RuntimeError) as error:
            raise MetricUnavailable(
                f"{metric} cannot be computed: tried {path} (no such file), then {url}; {type(error).__name__}: "
                f"{error}.\nWithout network, download {url} where there is one\nand copy it to {path}"
            ) from error
    try:
        return build(path).eval().requires_grad_(False)
    except Exception as error:  # of torch.load: many kinds
        raise MetricUnavailable(
            f"{metric} cannot be computed: {path} is not what it takes; {type(error).__name__}: {error}.\n"
            "Delete that file and start again"
        ) from error


def mean_with_confidence(values: torch.Tensor | Sequence[float]) -> dict[str, float | None]:
    """Mean of values [n], with its 95 % confidence interval for normally distributed means.

    Returns:
        value, n, and low, high = value -+ 1.96 s / sqrt(n) with the unbiased standard deviation s; None for n = 1.

    Raises:
        ValueError: For values that are not finite.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    n, bad = len(values), int((~values.isfinite()).sum())
    if bad:
        raise ValueError(f"{bad} of {n} values are NaN or infinite: look for the step that made them")
    value = values.mean().item()
    if n == 1:
        return {"value": value, "n": n, "low": None, "high": None}
    margin = 1.959964 * values.std().item() / math.sqrt(n)
    return {"value": value, "n": n, "low": value - margin, "high": value + margin}


def sample_warning(metric: str, n: int, dim: int | None = None) -> str | None:
    """What to say of a metric on too few images, or None.

    Args:
        metric: Its name, for the message.
        n: Images.
        dim: Of a Frechet distance, the channels of its features; None for a mean over images.
    """
    if dim is None:
        if n >= MEAN_IMAGES:
            return None
        return f"{metric} of {n} images: its interval is not to be trusted below {MEAN_IMAGES} images; use more"
    if n <= dim:
        return (
            f"{metric} of {n} images: with no more images than features ({dim}) the covariance is singular and the "
            f"distance far too large; use {max(FRECHET_IMAGES, dim + 1)} images or more"
        )
    if n < FRECHET_IMAGES:
        return (
            f"{metric} of {n} images: too large, by an amount that depends on the number of images; use "
            f"{FRECHET_IMAGES} or more, or compare only with runs on the same {n} images"
        )
    return None
