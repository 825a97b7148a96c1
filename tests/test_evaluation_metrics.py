"""Numbers of an evaluation, each against another implementation, a closed form, or the definition written out."""

import math
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from flextok.evaluation.metrics import (
    MAX_PSNR,
    FeatureStatistics,
    FrechetFeatures,
    MetricUnavailable,
    latent_mse,
    load_inception,
    load_lpips,
    mean_with_confidence,
    psnr,
    sample_warning,
    ssim,
    unavailable_metrics,
)
from flextok.evaluation.representation import cknna, knn_accuracy, linear_probe_accuracy
from flextok.evaluation.tokens import code_statistics, first_tokens_silhouette
from flextok.utils.errors import UserError


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def photographs():
    """Two crops of photographs and noisy versions that stay in [-1, 1], [2, 3, 48, 64]."""
    from skimage.data import astronaut, coffee

    crops = [torch.from_numpy(picture[100:148, 100:164].copy()) for picture in (astronaut(), coffee())]
    original = torch.stack(crops).permute(0, 3, 1, 2) / 127.5 - 1
    strength = torch.tensor([0.05, 0.2]).view(2, 1, 1, 1)
    return original, (original + strength * randn(2, 3, 48, 64)).clamp(-1, 1)


def as_skimage(image):
    return ((image.double() + 1) / 2).permute(1, 2, 0).numpy()


# Images.


def test_psnr_equals_scikit_image():
    original, noisy = photographs()
    pairs = zip(original, noisy)
    expected = [peak_signal_noise_ratio(as_skimage(a), as_skimage(b), data_range=1.0) for a, b in pairs]
    assert psnr(noisy, original).tolist() == pytest.approx(expected, abs=1e-3)


def test_psnr_of_a_constant_difference_is_known():
    original = torch.zeros(1, 3, 8, 8)
    assert psnr(original + 0.2, original).item() == pytest.approx(20.0, abs=1e-4)  # 10 log10(2^2 / 0.2^2)


def test_psnr_of_equal_images_is_finite():
    original, _ = photographs()
    assert psnr(original, original).tolist() == [MAX_PSNR] * 2


def test_ssim_equals_scikit_image():
    original, noisy = photographs()
    expected = [
        structural_similarity(
            as_skimage(a), as_skimage(b), data_range=1.0, channel_axis=2, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(original, noisy)
    ]  # fmt: skip
    assert ssim(noisy, original).tolist() == pytest.approx(expected, abs=1e-4)
    assert ssim(original, original).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_reconstructions_are_clamped(metric):
    original, noisy = photographs()
    outside = torch.where(noisy > 0.5, noisy * 3, noisy)
    assert torch.equal(metric(outside, original), metric(outside.clamp(-1, 1), original))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_values_of_an_image_do_not_depend_on_its_batch(metric):
    original, noisy = photographs()
    alone = torch.cat([metric(noisy[i : i + 1], original[i : i + 1]) for i in range(2)])
    assert alone.shape == (2,)
    torch.testing.assert_close(metric(noisy, original), alone)


@pytest.mark.parametrize(
    "reconstruction, original, message",
    [
        (torch.zeros(2, 3, 16, 16), torch.zeros(1, 3, 16, 16), r"\[2, 3, 16, 16\].*\[1, 3, 16, 16\]"),
        (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), r"expected \[B, 3, H, W\]"),
        (torch.zeros(0, 3, 16, 16), torch.zeros(0, 3, 16, 16), "at least one image"),
        (torch.full((1, 3, 16, 16), math.nan), torch.zeros(1, 3, 16, 16), "reconstructions hold NaN"),
        (torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 255.0), r"originals are in \[255, 255\]"),
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "uint8"),
    ],
)
@pytest.mark.parametrize("metric", [psnr, ssim])
def test_bad_images_are_refused(metric, reconstruction, original, message):
    with pytest.raises(ValueError, match=message):
        metric(reconstruction, original)


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16))


def test_latent_mse_is_the_mean_of_each_image():
    a, b = randn(3, 4, 8, 8), randn(3, 4, 8, 8, seed=1)
    expected = [float(np.mean((x.double().numpy() - y.double().numpy()) ** 2)) for x, y in zip(a, b)]
    assert latent_mse(a, b).tolist() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"\[3, 4, 8, 8\] and \[2, 4, 8, 8\]"):
        latent_mse(a, b[:2])
    with pytest.raises(ValueError, match="NaN"):
        latent_mse(a, b * math.nan)


# Frechet distance.


def samples_with(mean, cov, n=64, seed=0):
    """[n, C] in float64 whose mean and unbiased covariance are exactly these."""
    x = randn(n, len(mean), seed=seed).double()
    x = x - x.mean(0)
    whitened = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)).T)
    return whitened @ torch.linalg.cholesky(cov).T + mean


def frechet_of(real, fake):
    frechet = FrechetFeatures(real.shape[1])
    frechet.update(real, real=True)
    frechet.update(fake, real=False)
    return frechet.compute()


def test_frechet_distance_of_diagonal_gaussians_is_its_closed_form():
    mean_a, mean_b = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.0, 1.0, 0.5]).double()
    std_a, std_b = torch.tensor([1.0, 0.5, 2.0]).double(), torch.tensor([2.0, 0.5, 0.1]).double()
    value = frechet_of(samples_with(mean_a, std_a.square().diag()), samples_with(mean_b, std_b.square().diag(), seed=1))
    assert value == pytest.approx(float((mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()), rel=1e-9)


def test_frechet_distance_of_correlated_gaussians_is_its_closed_form():
    a = torch.tensor([[2.0, 0.9], [0.9, 1.0]]).double()
    b = torch.tensor([[1.0, -0.4], [-0.4, 3.0]]).double()
    zero = torch.zeros(2).double()
    trace_of_root = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float(a.det() * b.det())))  # of a 2 x 2 matrix
    expected = float(a.trace() + b.trace()) - 2 * trace_of_root
    assert frechet_of(samples_with(zero, a), samples_with(zero, b, seed=1)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_equals_torchmetrics_and_scipy():
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, fake = randn(50, 8) @ randn(8, 8, seed=2), 0.5 + randn(40, 8, seed=1)
    reference = FrechetInceptionDistance(feature=FlatFeatures())
    reference.update(real, real=True)
    reference.update(fake, real=False)
    value = frechet_of(real, fake)
    assert value == pytest.approx(reference.compute().item(), rel=1e-4)
    a, b = np.cov(real.double().numpy().T), np.cov(fake.double().numpy().T)
    shift = np.square(real.double().numpy().mean(0) - fake.double().numpy().mean(0)).sum()
    assert value == pytest.approx(shift + np.trace(a) + np.trace(b) - 2 * np.trace(sqrtm(a @ b).real), rel=1e-6)


class FlatFeatures(torch.nn.Module):
    num_features = 8

    def forward(self, features):
        return features


def test_frechet_distance_with_fewer_images_than_channels():
    real, fake = 3 + randn(12, 100).double(), randn(9, 100, seed=1).double()
    x, y = (real - real.mean(0)) / math.sqrt(11), (fake - fake.mean(0)) / math.sqrt(8)
    overlap = np.linalg.norm((x @ y.T).numpy(), "nuc")
    shift = (real.mean(0) - fake.mean(0)).square().sum()
    expected = float(shift + x.square().sum() + y.square().sum()) - 2 * overlap
    assert frechet_of(real, fake) == pytest.approx(expected, rel=1e-9)
    assert frechet_of(real, real) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_of_constant_features_is_that_of_their_means():
    assert frechet_of(torch.ones(3, 4), torch.zeros(5, 4)) == pytest.approx(4.0)


def test_feature_maps_are_averaged_over_positions():
    real, fake = randn(20, 5, 3, 4), 1 + randn(20, 5, 3, 4, seed=1)
    assert frechet_of(real, fake) == pytest.approx(frechet_of(real.mean((2, 3)), fake.mean((2, 3))), rel=1e-5)


def test_batches_add_up_to_the_whole():
    real, fake = randn(30, 6), randn(30, 6, seed=1)
    frechet = FrechetFeatures(6)
    for part in range(0, 30, 7):
        frechet.update(real[part : part + 7], real=True)
        frechet.update(fake[part : part + 7], real=False)
    assert frechet.n == 30 and frechet.dim == 6
    assert frechet.compute() == pytest.approx(frechet_of(real, fake), rel=1e-12)


def test_a_resumed_state_gives_what_an_uninterrupted_one_gives(tmp_path):
    real, fake = randn(30, 6), randn(30, 6, seed=1)
    whole = FrechetFeatures(6)
    for features, is_real in ((real[:10], True), (fake[:10], False), (real[10:], True), (fake[10:], False)):
        whole.update(features, is_real)
    first = FrechetFeatures(6)
    first.update(real[:10], real=True)
    first.update(fake[:10], real=False)
    torch.save(first.state(), tmp_path / "state.pt")
    resumed = FrechetFeatures.from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    first.update(real, real=True)  # does not reach the state that was saved
    resumed.update(real[10:], real=True)
    resumed.update(fake[10:], real=False)
    assert resumed.compute() == whole.compute() and resumed.n == whole.n == 30


def test_an_empty_state_can_be_resumed():
    frechet = FrechetFeatures.from_state(FrechetFeatures(3).state())
    frechet.update(randn(5, 3), real=True)
    frechet.update(randn(5, 3), real=False)
    assert frechet.compute() == pytest.approx(0.0, abs=1e-9)


def test_a_state_does_not_change_with_what_is_added_later():
    frechet = FrechetFeatures(3)
    frechet.update(randn(5, 3), real=True)
    state = frechet.state()
    before = {name: tensor.clone() for name, tensor in state["real"].items()}
    frechet.update(randn(5, 3, seed=1), real=True)
    FeatureStatistics.from_state(state["real"]).update(randn(5, 3, seed=2))
    assert all(torch.equal(state["real"][name], before[name]) for name in ("count", "sum", "outer"))


def test_originals_serve_several_sets_of_reconstructions():
    originals = FeatureStatistics(4)
    originals.update(randn(20, 4))
    few, many = FrechetFeatures(4, originals), FrechetFeatures(4, originals)
    few.update(1 + randn(20, 4, seed=1), real=False)
    many.update(randn(20, 4, seed=2), real=False)
    assert few.compute() == pytest.approx(frechet_of(randn(20, 4), 1 + randn(20, 4, seed=1)))
    assert many.compute() == pytest.approx(frechet_of(randn(20, 4), randn(20, 4, seed=2)))


def test_bad_features_are_refused_and_not_added():
    frechet = FrechetFeatures(3)
    frechet.update(randn(4, 3), real=True)
    for features, message in (
        (randn(4, 5), "5 channels.*have 3"),
        (randn(4, 3) * math.nan, "NaN"),
        (randn(4, 3, 2), r"\[4, 3, 2\]"),
        (randn(0, 3), "at least one image"),
    ):
        with pytest.raises(ValueError, match=message):
            frechet.update(features, real=True)
    assert frechet.real.count == 4
    frechet.update(randn(1, 3), real=False)
    with pytest.raises(ValueError, match="at least 2.*got 4 and 1"):
        frechet.compute()
    with pytest.raises(ValueError, match="dim is 5, but .* have 3"):
        FrechetFeatures(5, frechet.real)
    with pytest.raises(ValueError, match="3 channels for originals, but 5"):
        FrechetFeatures.from_state({"real": frechet.real.state(), "fake": FeatureStatistics(5).state()})
    with pytest.raises(ValueError, match=r"'sum': \[3\]"):
        FeatureStatistics.from_state({"count": torch.tensor(4), "sum": torch.zeros(3), "outer": torch.zeros(2, 2)})


# Networks with weights: random ones stand in for the published, in the place where those are looked for.


@pytest.fixture
def weights_folder(tmp_path, monkeypatch):
    """The empty folder of the torch.hub cache where weights are looked for; no server is within reach."""

    def unreachable(url, timeout):
        assert timeout <= 30
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("flextok.evaluation.metrics.urlopen", unreachable)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def put_alexnet(folder):
    from torchvision.models import alexnet

    torch.manual_seed(0)
    with torch.device("meta"):
        model = alexnet(weights=None)
    state = {
        name: 0.05 * torch.randn(value.shape) if "features" in name else torch.zeros(1).expand(value.shape)
        for name, value in model.state_dict().items()
    }
    torch.save(state, folder / "alexnet-owt-7be5be79.pth")
    return state


def put_inception(folder):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], "nowhere")
    torch.save(model.state_dict(), folder / "weights-inception-2015-12-05-6726825d.pth")
    return model.eval()


def lpips_by_hand(state, a, b):
    """Of the paper's equation 1, with the linear weights that torchmetrics carries."""
    from pathlib import Path

    import torchmetrics.functional.image as package
    from torchvision.models import alexnet

    linear = torch.load(Path(package.__file__).parent / "lpips_models" / "alex.pth", map_location="cpu")
    with torch.device("meta"):
        layers = alexnet(weights=None).features[:-1]  # without the last pooling
    layers.load_state_dict({k[9:]: v for k, v in state.items() if "features" in k}, assign=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    total, level = 0.0, 0  # sum over the outputs of the five ReLUs
    a, b = ((x - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1) for x in (a, b))
    for layer in layers:
        a, b = layer(a), layer(b)
        if isinstance(layer, torch.nn.ReLU):
            difference = (a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)) ** 2
            total = total + (linear[f"lin{level}.model.1.weight"] * difference).sum(1).mean((1, 2))
            level += 1
    return total


def test_lpips_equals_its_equation_for_each_image(weights_folder):
    state = put_alexnet(weights_folder)
    original, noisy = photographs()
    lpips = load_lpips()
    with torch.no_grad():
        expected = lpips_by_hand(state, noisy, original)
    torch.testing.assert_close(lpips(noisy, original), expected, rtol=1e-3, atol=1e-6)
    assert lpips(noisy[:1], original[:1]).shape == (1,)
    assert torch.equal(lpips(original * 1.001, original * 1.0), lpips((original * 1.001).clamp(-1, 1), original))
    assert lpips(original, original).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="compare images of one shape"):
        lpips(noisy[:1], original)


def test_inception_takes_the_pixels_that_a_file_would_hold(weights_folder):
    reference = put_inception(weights_folder)
    original, noisy = photographs()
    features = load_inception()(noisy * 1.5)
    written = np.rint((np.clip(noisy.numpy() * np.float32(1.5), -1, 1) + 1) * np.float32(127.5)).astype(np.uint8)
    assert features.shape == (2, 2048) and features.dtype == torch.float32
    assert torch.equal(features, reference(torch.from_numpy(written))[0])


def test_weights_out_of_reach_are_named_up_front(weights_folder):
    reasons = unavailable_metrics(["psnr", "ssim", "latent_mse", "lpips", "rfid"])
    assert sorted(reasons) == ["lpips", "rfid"]
    for name, load, file in (
        ("lpips", load_lpips, "alexnet-owt-7be5be79.pth"),
        ("rfid", load_inception, "weights-inception-2015-12-05-6726825d.pth"),
    ):
        for part in (str(weights_folder / file), "https://", "no route to host", "copy it to", f"leave {name} out"):
            assert part in reasons[name]
        with pytest.raises(MetricUnavailable) as error:
            load()
        assert str(error.value) == reasons[name] and isinstance(error.value, UserError)


def test_broken_weights_are_named(weights_folder):
    for load, file in (
        (load_lpips, "alexnet-owt-7be5be79.pth"),
        (load_inception, "weights-inception-2015-12-05-6726825d.pth"),
    ):
        (weights_folder / file).write_bytes(b"not weights")
        with pytest.raises(MetricUnavailable, match=f"{file} is not what it takes"):
            load()


def test_missing_weights_are_downloaded_once(weights_folder, monkeypatch):
    import io

    downloads = []

    def download(url, path, hash_prefix, progress):
        downloads.append((url.rsplit("/", 1)[-1], hash_prefix))
        open(path, "wb").close()

    monkeypatch.setattr("flextok.evaluation.metrics.urlopen", lambda url, timeout: io.BytesIO())
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert unavailable_metrics(["lpips", "rfid"]) == {}
    assert downloads == [
        ("alexnet-owt-7be5be79.pth", "7be5be79"),
        ("weights-inception-2015-12-05-6726825d.pth", "6726825d"),
    ]


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    reasons = unavailable_metrics(["psnr", "ssim", "lpips", "rfid"])
    assert "pip install torchmetrics" in reasons["psnr"] and "pip install torchmetrics" in reasons["lpips"]
    assert "pip install torch-fidelity" in reasons["rfid"] and "leave ssim out" in reasons["ssim"]


def test_importing_the_package_loads_no_metric_library():
    import subprocess

    code = (
        "import sys; import flextok.evaluation.metrics, flextok.evaluation.representation, flextok.evaluation.tokens;"
        "print(sorted({'torchmetrics', 'sklearn', 'scipy', 'torch_fidelity', 'torchvision'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# Means.


def test_confidence_interval_equals_scipy():
    from scipy.stats import norm, sem

    values = randn(50).double().numpy()
    low, high = norm.interval(0.95, loc=values.mean(), scale=sem(values))
    result = mean_with_confidence(values)
    assert result["n"] == 50 and result["value"] == pytest.approx(values.mean())
    assert (result["low"], result["high"]) == (pytest.approx(low), pytest.approx(high))


def test_confidence_of_one_value_is_none():
    assert mean_with_confidence([2.5]) == {"value": 2.5, "n": 1, "low": None, "high": None}


@pytest.mark.parametrize("values, message", [([], "at least 1"), ([1.0, math.nan], "1 of 2"), ([math.inf], "1 of 1")])
def test_a_mean_of_bad_values_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        mean_with_confidence(values)


def test_small_samples_are_warned_of():
    assert "30" in sample_warning("psnr", 29) and sample_warning("psnr", 30) is None
    assert "singular" in sample_warning("rfid", 2048, 2048)
    assert "10000" in sample_warning("rfid", 2049, 2048) and "singular" not in sample_warning("rfid", 2049, 2048)
    assert sample_warning("rfid", 10_000, 2048) is None


# Representations.


def cknna_by_definition(a, b, k):
    """The equations of the docstring, pair by pair."""
    n = len(a)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a.double().numpy(), b.double().numpy()))

    def neighbours(x, i):
        return set(sorted((j for j in range(n) if j != i), key=lambda j: -(x[i] @ x[j]))[:k])

    def centred(x, i, j):
        return x[i] @ x[j] - sum(x[i] @ x[m] for m in range(n)) / n

    def align(x, y):
        pairs = [(i, j) for i in range(n) for j in neighbours(x, i) & neighbours(y, i)]
        return sum(centred(x, i, j) * centred(y, i, j) for i, j in pairs) / (n - 1) ** 2

    return align(a, b) / math.sqrt(align(a, a) * align(b, b))


def related_features(n=40):
    a = 0.5 + randn(n, 6)
    return a, torch.cat([a[:, :4], 0.7 * randn(n, 5, seed=1)], dim=1)


@pytest.mark.parametrize("k", [1, 10, 39])
def test_cknna_equals_its_definition(k):
    a, b = related_features()
    assert cknna(a, b, k) == pytest.approx(cknna_by_definition(a, b, k), rel=1e-9)


def test_cknna_does_not_depend_on_the_rows_in_memory(monkeypatch):
    a, b = related_features()
    whole = cknna(a, b)
    monkeypatch.setattr("flextok.evaluation.representation.CKNNA_ROWS", 7)
    assert cknna(a, b) == pytest.approx(whole, rel=1e-12)


def test_cknna_is_one_for_the_same_space_rotated_and_scaled():
    a, b = related_features()
    rotation = torch.linalg.qr(randn(6, 6, seed=3).double()).Q
    rotated = 7 * a.double() @ rotation
    assert cknna(a, a) == pytest.approx(1.0)
    assert cknna(a, rotated) == pytest.approx(1.0)
    assert cknna(rotated, b) == pytest.approx(cknna(a, b), rel=1e-6)


def test_cknna_of_unrelated_features_is_near_zero():
    a, b = randn(600, 32), randn(600, 32, seed=1)
    assert abs(cknna(a, b)) < 0.05 < 0.3 < cknna(a, torch.cat([a, 0.5 * b], 1))


@pytest.mark.parametrize(
    "a, b, k, message",
    [
        (randn(20, 4), randn(19, 4), 5, r"\[20, 4\] and \[19, 4\]"),
        (randn(20, 4, 2, 2), randn(20, 4), 5, r"expected \[N, D1\]"),
        (randn(10, 4), randn(10, 4), 10, "k is 10, but 10 images have 1 to 9"),
        (randn(1, 4), randn(1, 4), 1, "use more images"),
        (randn(20, 4), randn(20, 4) * math.nan, 5, "NaN"),
        (randn(20, 4), torch.ones(20, 4) / 3, 5, "second features are the same for all 20"),
        (torch.zeros(20, 4), randn(20, 4), 5, "first features are the same for all 20"),
    ],
)
def test_cknna_refuses_bad_features(a, b, k, message):
    with pytest.raises(ValueError, match=message):
        cknna(a, b, k)


def overlapping_classes(n, seed):
    labels = torch.arange(n) % 3
    return randn(n, 5, seed=seed) + 1.2 * torch.nn.functional.one_hot(labels, 5), labels


def test_knn_accuracy_equals_a_vote_by_hand():
    train_x, train_y = overlapping_classes(60, seed=0)
    test_x, test_y = overlapping_classes(30, seed=1)
    cosine = torch.nn.functional.cosine_similarity(test_x[:, None], train_x[None], dim=-1)
    correct = 0
    for similarities, label in zip(cosine, test_y):
        votes = Counter(train_y[similarities.topk(5).indices].tolist())
        correct += min(votes, key=lambda c: (-votes[c], c)) == int(label)
    assert knn_accuracy(train_x, train_y, test_x, test_y, k=5) == pytest.approx(correct / 30)
    assert 0.4 < correct / 30 < 1


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
def test_linear_probe_equals_scikit_learn_by_hand():
    from sklearn.linear_model import LogisticRegression

    train_x, train_y = overlapping_classes(60, seed=0)
    test_x, test_y = overlapping_classes(30, seed=1)
    scales = torch.tensor([1.0, 1e3, 1e-3, 1.0, 10.0])
    train_x, test_x = train_x * scales, test_x * scales
    mean, std = train_x.mean(0), train_x.std(0, correction=0)
    probe = LogisticRegression(max_iter=1000).fit((train_x - mean) / std, train_y)
    expected = (probe.predict((test_x - mean) / std) == test_y.numpy()).mean()
    assert linear_probe_accuracy(train_x, train_y, test_x, test_y) == pytest.approx(expected)
    assert 0.4 < expected < 1
    unscaled = LogisticRegression(max_iter=1000).fit(train_x, train_y).score(test_x, test_y)
    assert unscaled != pytest.approx(expected)  # or standardising would not be tested


@pytest.mark.parametrize("accuracy", [knn_accuracy, linear_probe_accuracy])
def test_probes_refuse_bad_data(accuracy):
    x, y = overlapping_classes(30, seed=0)
    for arguments, message in (
        ((x, torch.zeros(30), x, y), "at least two classes"),
        ((x * math.nan, y, x, y), "training features hold NaN"),
        ((x, y, x * math.inf, y), "test features hold NaN"),
        ((x, y[:5], x, y), r"training features are \[30, 5\] and labels \[5\]"),
        ((x, y, x[:, :4], y), "5 channels, but test features 4"),
        ((x[:1], y[:1], x, y), "at least two classes"),
        ((x, y, x[:0], y[:0]), "at least one image"),
    ):
        with pytest.raises(ValueError, match=message):
            accuracy(*arguments)


def test_knn_refuses_more_neighbours_than_images():
    x, y = overlapping_classes(19, seed=0)
    with pytest.raises(ValueError, match="k is 20, but there are 19"):
        knn_accuracy(x, y, x, y)


# Tokens.


def test_entropy_of_known_distributions():
    uniform, constant = torch.arange(8), torch.full((8,), 5)
    halves = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])  # 1/2, 1/4, 1/8, 1/8
    result = code_statistics(torch.stack([uniform, constant, halves], dim=1), codebook_size=1000)
    assert result["used"] == [8, 1, 4]
    assert result["entropy_bits"] == pytest.approx([3.0, 0.0, 1.75])
    assert result["perplexity"] == pytest.approx([8.0, 1.0, 2**1.75])
    assert result["used_overall"] == 8


def test_codes_at_different_positions_count_overall():
    assert code_statistics(torch.tensor([[0, 7, 7], [0, 8, 9]]), 10)["used_overall"] == 4


@pytest.mark.parametrize(
    "tokens, message",
    [
        (torch.tensor([[0, 10]]), r"0\.\.10, but a codebook of 10 has 0\.\.9"),
        (torch.tensor([[-1, 3]]), r"-1\.\.3"),
        (torch.tensor([[0.0, 1.0]]), "float32"),
        (torch.tensor([0, 1]), r"\[2\], expected integers \[N, L\]"),
        (torch.zeros(0, 4, dtype=torch.long), "not empty"),
    ],
)
def test_bad_tokens_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        code_statistics(tokens, 10)


def fsq_codes(n=60, length=4, channels=3, seed=0):
    return (2 * randn(n, length, channels, seed=seed)).round().clamp(-2, 2) / 2


def test_silhouette_by_class_equals_scikit_learn():
    from sklearn.metrics import silhouette_score

    codes, labels = fsq_codes(), torch.arange(60) % 3
    codes[:, 1] += labels[:, None]  # the second token tells classes apart
    result = first_tokens_silhouette(codes, labels=labels)
    assert list(result) == ["1", "2", "4"]
    for k in (1, 2, 4):
        assert result[str(k)] == pytest.approx(silhouette_score(codes[:, :k].reshape(60, -1), labels))
    assert result["2"] > result["1"] + 0.05


def test_silhouette_without_labels_is_of_k_means():
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    vectors = fsq_codes()[:, :2].reshape(60, -1).double().numpy()
    clusters = KMeans(5, n_init=10, random_state=3).fit_predict(vectors)
    result = first_tokens_silhouette(fsq_codes(), counts=[2], n_clusters=5, seed=3)
    assert result == {"2": pytest.approx(silhouette_score(vectors, clusters))}


def test_few_distinct_codes_get_fewer_clusters():
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    six = torch.tensor([-1.0, -0.9, -0.8, 0.7, 0.9, 1.0]).repeat(10).view(60, 1, 1)
    clusters = KMeans(3, n_init=10, random_state=0).fit_predict(six.view(60, 1))
    value = first_tokens_silhouette(six, counts=[1])["1"]
    assert value == pytest.approx(silhouette_score(six.view(60, 1), clusters)) and value < 0.99


def test_silhouette_is_none_where_it_is_undefined():
    same = torch.ones(6, 2, 3)
    assert first_tokens_silhouette(same, counts=[1, 2]) == {"1": None, "2": None}
    assert first_tokens_silhouette(same, counts=[1], labels=[0, 0, 0, 1, 1, 1]) == {"1": None}
    assert first_tokens_silhouette(fsq_codes(6), counts=[1], labels=[4] * 6) == {"1": None}
    assert first_tokens_silhouette(fsq_codes(6), counts=[1], labels=range(6)) == {"1": None}
    assert first_tokens_silhouette(fsq_codes(1), counts=[1]) == {"1": None}
    assert first_tokens_silhouette(torch.tensor([[[0.0]], [[1.0]]]), counts=[1]) == {"1": None}


@pytest.mark.parametrize(
    "codes, arguments, message",
    [
        (fsq_codes(length=2), {}, "2 tokens"),
        (fsq_codes()[..., 0], {}, r"\[60, 4\], expected \[N, L, C\]"),
        (fsq_codes() * math.nan, {}, "NaN"),
        (fsq_codes(), {"labels": [0, 1]}, r"labels are \[2\], but codes are of 60"),
        (fsq_codes(), {"n_clusters": 1}, "at least 2"),
    ],
)
def test_bad_codes_are_refused(codes, arguments, message):
    with pytest.raises(ValueError, match=message):
        first_tokens_silhouette(codes, **arguments)
