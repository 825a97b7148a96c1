"""How close reconstructions are to their originals: per image, and as two sets of features (Frechet distance).

Images are float [B, 3, H, W] in [-1, 1]. Reconstructions are clamped to that range first, as a picture of them is.
Originals outside of it are refused, since every number below would mean something else.
"""

import importlib
import math
import os
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import urlopen

import torch

from ..utils.errors import UserError

# Above it reconstructions are equal in fp32 for any purpose; a bound keeps means finite.
MAX_PSNR = 100.0

# SSIM's Gaussian window, in pixels (Wang et al. 2004).
SSIM_WINDOW = 11

INCEPTION_DIM = 2048

# Seconds within which a server of weights has to answer before it counts as out of reach.
CONNECT_TIMEOUT = 10.0

# The Frechet distance is biased upwards with few images; papers use 10 000 to 50 000.
FRECHET_IMAGES = 10_000

# Fewer values than this make a normal interval of their mean doubtful.
MEAN_IMAGES = 30

Device = str | torch.device


class MetricUnavailable(UserError, RuntimeError):
    """A package or the weights of a metric are not here and cannot be fetched; the message says what to do."""


def psnr(reconstruction: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio 10 log10(4 / MSE) of each image, in dB; 4 is the square of the data range of 2.

    Args:
        reconstruction: [B, 3, H, W], clamped to [-1, 1].
        original: [B, 3, H, W] in [-1, 1].

    Returns:
        Float32 [B], at most MAX_PSNR: also for equal images.

    Raises:
        ValueError: For shapes that differ or are not [B, 3, H, W], other values than finite floats, or an original
            outside [-1, 1].
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    reconstruction, original = _checked_pair(reconstruction, original)
    values = peak_signal_noise_ratio(reconstruction, original, data_range=2.0, dim=(1, 2, 3), reduction="none")
    return values.clamp(max=MAX_PSNR)


def ssim(reconstruction: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image (Wang et al. 2004): Gaussian window of 11 pixels with sigma 1.5.

    Computed on pixels in [0, 1] (data range 1), per channel, and averaged over channels and those positions whose
    window lies within the image, as in scikit-image with gaussian_weights=True and use_sample_covariance=False.

    Args:
        reconstruction: [B, 3, H, W], clamped to [-1, 1].
        original: [B, 3, H, W] in [-1, 1].

    Returns:
        Float32 [B] in [-1, 1]; 1 for equal images.

    Raises:
        ValueError: As `psnr`, and for images smaller than 11 x 11.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    reconstruction, original = _checked_pair(reconstruction, original)
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
    """Mean squared difference of each image's latents: a, b [B, ...] of one shape -> float32 [B].

    Raises:
        ValueError: For shapes that differ, an empty batch, or values that are not finite.
    """
    if a.shape != b.shape or a.dim() < 2 or not a.numel():
        raise ValueError(f"latents are {list(a.shape)} and {list(b.shape)}, expected two of one shape [B, ...]")
    error = (a.float() - b.float()).square().flatten(1).mean(1)
    if not error.isfinite().all():
        raise ValueError("latents hold NaN or infinite values, expected finite ones: look for the step that made them")
    return error


def _checked_pair(reconstruction: torch.Tensor, original: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as float32, the reconstruction clamped to [-1, 1]."""
    if reconstruction.shape != original.shape:
        raise ValueError(
            f"reconstructions are {list(reconstruction.shape)}, but originals {list(original.shape)}: "
            "compare images of one shape [B, 3, H, W]"
        )
    reconstruction, original = _checked("reconstructions", reconstruction), _checked("originals", original)
    low, high = original.min().item(), original.max().item()
    if low < -1.001 or high > 1.001:
        raise ValueError(f"originals are in [{low:.4g}, {high:.4g}], expected [-1, 1]: scale them first")
    return reconstruction.clamp(-1, 1), original


def _checked(name: str, images: torch.Tensor) -> torch.Tensor:
    if images.dim() != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(f"{name} are {list(images.shape)}, expected [B, 3, H, W] with at least one image")
    if not images.is_floating_point():
        raise ValueError(f"{name} are {images.dtype}, expected float in [-1, 1]: convert them with x / 127.5 - 1")
    if not images.isfinite().all():
        raise ValueError(f"{name} hold NaN or infinite values: look for the step that made them")
    return images.float()


def pooled_features(features: torch.Tensor) -> torch.Tensor:
    """One vector per image: [B, C, gh, gw] averaged over positions, or [B, C] as it is.

    Raises:
        ValueError: For other shapes, an empty batch, or values that are not finite.
    """
    if features.dim() not in (2, 4) or not features.numel():
        raise ValueError(
            f"features are {list(features.shape)}, expected [B, C, gh, gw] or [B, C] of at least one image"
        )
    if not features.isfinite().all():
        raise ValueError("features hold NaN or infinite values: look for the step that made them")
    return features if features.dim() == 2 else features.mean((2, 3))


class FeatureStatistics:
    """Count, sum and sum of outer products of feature vectors, in float64 on the CPU: enough for mean and covariance.

    Args:
        dim: Channels C of the features.
    """

    def __init__(self, dim: int):
        self.dim, self.count = dim, 0
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: torch.Tensor) -> None:
        """Add the images of a batch: [B, C, gh, gw], averaged over positions, or [B, C].

        Raises:
            ValueError: For other shapes or channels, or values that are not finite; nothing is added then.
        """
        vectors = pooled_features(features.detach().to("cpu", torch.float64))
        if vectors.shape[1] != self.dim:
            raise ValueError(f"features have {vectors.shape[1]} channels, but these statistics have {self.dim}")
        self.count += len(vectors)
        self.sum += vectors.sum(0)
        self.outer.addmm_(vectors.T, vectors)

    def mean_and_covariance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean [C] and unbiased covariance [C, C], float64. Raises ValueError for fewer than two images."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, but got {self.count}")
        mean = self.sum / self.count
        return mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)

    def state(self) -> dict[str, torch.Tensor]:
        """A copy as tensors: count (long, no dimensions), sum [C] and outer [C, C] (float64)."""
        return {"count": torch.tensor(self.count), "sum": self.sum.clone(), "outer": self.outer.clone()}

    @classmethod
    def from_state(cls, state: dict[str, torch.Tensor]) -> "FeatureStatistics":
        """What `state()` described. Raises ValueError where that is not such a state."""
        shapes = {key: list(tensor.shape) for key, tensor in state.items()}
        dim = (shapes.get("sum") or [0])[0]
        if shapes != {"count": [], "sum": [dim], "outer": [dim, dim]}:
            raise ValueError(f"a state of feature statistics has count [], sum [C] and outer [C, C], but got {shapes}")
        statistics = cls(dim)
        statistics.count = int(state["count"])
        statistics.sum = state["sum"].to("cpu", torch.float64, copy=True)
        statistics.outer = state["outer"].to("cpu", torch.float64, copy=True)
        return statistics


class FrechetFeatures:
    """Frechet distance between the features of originals and of reconstructions, whichever encoder gave them.

    With Inception features (`load_inception`) this is FID (arXiv 1706.08500): rFID, as these are reconstructions. The
    originals are the same for every number of tokens: one `real` may serve several of these.

    Args:
        dim: Channels C of the features.
        real: Statistics of the originals, shared and not copied. Default: empty ones.

    Raises:
        ValueError: If `real` has other channels than `dim`.
    """

    def __init__(self, dim: int, real: FeatureStatistics | None = None):
        if real is not None and real.dim != dim:
            raise ValueError(f"dim is {dim}, but the statistics of the originals have {real.dim} channels")
        self.dim = dim
        self.real = FeatureStatistics(dim) if real is None else real
        self.fake = FeatureStatistics(dim)

    @property
    def n(self) -> int:
        """Images behind the distance: the smaller of the two counts."""
        return min(self.real.count, self.fake.count)

    def update(self, features: torch.Tensor, real: bool) -> None:
        """Add the features [B, C, gh, gw] or [B, C] of originals (`real`) or of reconstructions.

        Raises:
            ValueError: As `FeatureStatistics.update`.
        """
        (self.real if real else self.fake).update(features)

    def compute(self) -> float:
        """The distance, at least 0, in squared units of the features.

        Raises:
            ValueError: For fewer than two originals or reconstructions.
        """
        if self.n < 2:
            raise ValueError(
                "a Frechet distance needs at least 2 originals and 2 reconstructions, "
                f"but got {self.real.count} and {self.fake.count}"
            )
        return frechet_distance(*self.real.mean_and_covariance(), *self.fake.mean_and_covariance())

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """A copy of both statistics as plain tensors, to be saved."""
        return {"real": self.real.state(), "fake": self.fake.state()}

    @classmethod
    def from_state(cls, state: dict[str, dict[str, torch.Tensor]]) -> "FrechetFeatures":
        """What `state()` described. Raises ValueError where that is not such a state."""
        if set(state) != {"real", "fake"}:
            raise ValueError(f"a state of Frechet features has real and fake, but got {sorted(state)}")
        real, fake = FeatureStatistics.from_state(state["real"]), FeatureStatistics.from_state(state["fake"])
        if real.dim != fake.dim:
            raise ValueError(f"the state has {real.dim} channels for originals, but {fake.dim} for reconstructions")
        frechet = cls(real.dim, real)
        frechet.fake = fake
        return frechet


def frechet_distance(mean_a: torch.Tensor, cov_a: torch.Tensor, mean_b: torch.Tensor, cov_b: torch.Tensor) -> float:
    """Squared Frechet distance of two Gaussians: |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    With A = X X^T and B = Y Y^T, tr (A B)^(1/2) is the sum of the singular values of X^T Y. Directions without
    variance are no part of X and Y, so that covariances of fewer images than channels do no harm.

    Args:
        mean_a, mean_b: Float64 [C].
        cov_a, cov_b: Symmetric float64 [C, C].

    Returns:
        The distance, at least 0, in squared units of the features.
    """
    cross = torch.linalg.svdvals(_factor(cov_a).T @ _factor(cov_b)).sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)


def _factor(cov: torch.Tensor) -> torch.Tensor:
    """X [C, rank] with X X^T = cov."""
    from scipy.linalg import eigh

    # LAPACK's default (divide and conquer) fails on some matrices with many equal eigenvalues: few, similar images.
    values, vectors = (torch.from_numpy(array).to(cov.device) for array in eigh(cov.cpu().numpy(), driver="evr"))
    noise = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    kept = values > noise
    return vectors[:, kept] * values[kept].sqrt()


def load_lpips(device: Device = "cpu") -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """LPIPS v0.1 with AlexNet (arXiv 1801.03924) as a function of reconstructions and originals -> float32 [B].

    The function takes images [B, 3, H, W] on `device`, checked and clamped as `psnr` does. 0 for equal images.

    Raises:
        MetricUnavailable: Without torchmetrics, or where AlexNet's weights (233 MB) are neither here nor within reach.
    """
    path = _lpips_weights()
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    build = lambda: LearnedPerceptualImagePatchSimilarity(net_type="alex").net  # noqa: E731
    net = _built("lpips", path, build).to(device)

    @torch.no_grad()
    def lpips(reconstruction: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        with torch.autocast(original.device.type, enabled=False):
            return net(*_checked_pair(reconstruction, original)).flatten()

    return lpips


def load_inception(device: Device = "cpu") -> Callable[[torch.Tensor], torch.Tensor]:
    """The Inception-v3 of FID as a function of images: [B, 3, H, W] in [-1, 1], on `device` -> float32 [B, 2048].

    It is torch-fidelity's, with the weights and the resizing of the original TensorFlow graph. Images are clamped
    and rounded to 8 bits first, as if they had been written to files.

    Raises:
        MetricUnavailable: Without torch-fidelity, or where its weights (91 MB) are neither here nor within reach.
    """
    path = _rfid_weights()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    name, layers = "inception-v3-compat", [str(INCEPTION_DIM)]
    net = _built("rfid", path, lambda: FeatureExtractorInceptionV3(name, layers, str(path))).to(device)

    @torch.no_grad()
    def inception(images: torch.Tensor) -> torch.Tensor:
        pixels = (_checked("images", images).clamp(-1, 1) + 1) * 127.5
        with torch.autocast(images.device.type, enabled=False):
            return net(pixels.round().to(torch.uint8))[0]

    return inception


def unavailable_metrics(names: Sequence[str]) -> dict[str, str]:
    """Those metrics that cannot be computed here, each with the reason and the remedy: to be asked before a run.

    Weights that are missing but within reach are downloaded. `psnr` and `ssim` need a package, `lpips` and `rfid`
    weights too; other names need nothing and are never in the result.
    """
    reasons = {}
    for name in names:
        try:
            _NEEDS.get(name, lambda: None)()
        except MetricUnavailable as error:
            reasons[name] = str(error)
    return reasons


def _lpips_weights() -> Path:
    _need_package("lpips", "torchmetrics")
    from torchvision.models import AlexNet_Weights

    return _weights("lpips", AlexNet_Weights.DEFAULT.url)


def _rfid_weights() -> Path:
    _need_package("rfid", "torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return _weights("rfid", URL_INCEPTION_V3)


_NEEDS: dict[str, Callable[[], object]] = {
    "psnr": lambda: _need_package("psnr", "torchmetrics"),
    "ssim": lambda: _need_package("ssim", "torchmetrics"),
    "lpips": _lpips_weights,
    "rfid": _rfid_weights,
}


def _need_package(metric: str, module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise MetricUnavailable(
            f"{metric} needs {module}, which cannot be imported ({error}): "
            f"pip install {module.replace('_', '-')}, or leave {metric} out"
        ) from error


def _weights(metric: str, url: str) -> Path:
    """The file in the torch.hub cache that holds what is at a URL, downloaded if it is not there."""
    path = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(urlparse(url).path))
    if path.is_file():
        return path
    try:
        # torch.hub waits for a silent server for minutes.
        urlopen(url, timeout=CONNECT_TIMEOUT).close()
        path.parent.mkdir(parents=True, exist_ok=True)
        hash_prefix = path.stem.rsplit("-", 1)[-1]
        torch.hub.download_url_to_file(url, str(path), hash_prefix, progress=False)
    except (OSError, HTTPException, RuntimeError) as error:
        raise MetricUnavailable(
            f"{metric} cannot be computed: tried {path} (no such file), then {url}; {type(error).__name__}: {error}.\n"
            f"Without network, download {url} where there is one\nand copy it to {path} (TORCH_HOME moves that "
            f"folder), or leave {metric} out"
        ) from error
    return path


def _built(metric: str, path: Path, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """`build()` in eval mode, with one clear error where the weights at `path` are not what it takes."""
    try:
        return build().eval().requires_grad_(False)
    except Exception as error:  # of torch.load: many kinds
        raise MetricUnavailable(
            f"{metric} cannot be computed: {path} is not what it takes; {type(error).__name__}: {error}.\n"
            "Delete that file and start again, or copy it anew"
        ) from error


def mean_with_confidence(values: torch.Tensor | Sequence[float]) -> dict[str, float | None]:
    """Mean of values [n], with its 95 % confidence interval for normally distributed means.

    Returns:
        value, n, and low, high = value -+ 1.96 s / sqrt(n) with the unbiased standard deviation s; None for n = 1.

    Raises:
        ValueError: For no values, more than one dimension, or values that are not finite.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.dim() != 1 or not len(values):
        raise ValueError(f"a mean needs values [n] with n of at least 1, but got {list(values.shape)}")
    bad = int((~values.isfinite()).sum())
    if bad:
        raise ValueError(f"{bad} of {len(values)} values are NaN or infinite: look for the step that made them")
    value, n = values.mean().item(), len(values)
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
