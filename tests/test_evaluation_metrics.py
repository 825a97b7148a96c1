"""Numbers of an evaluation, each against another implementation, a closed form, or the definition written out."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import norm, sem
from skimage.data import astronaut, coffee
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import silhouette_score
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision.models import alexnet

from flextok.evaluation.metrics import (
    MAX_PSNR,
    MetricUnavailable,
    frechet_distance,
    load_inception,
    load_lpips,
    mean_with_confidence,
    psnr,
    sample_warning,
    ssim,
)
from flextok.evaluation.representation import cknna, probe_accuracy
from flextok.evaluation.tokens import code_statistics, first_tokens_silhouette


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def photographs():
    """Two crops of photographs and noisy versions that stay in [-1, 1], [2, 3, 48, 64]."""
    crops = [torch.from_numpy(picture[100:148, 100:164].copy()) for picture in (astronaut(), coffee())]
    original = torch.stack(crops).permute(0, 3, 1, 2) / 127.5 - 1
    strength = torch.tensor([0.05, 0.2]).view(2, 1, 1, 1)
    return original, (original + strength * randn(2, 3, 48, 64)).clamp(-1, 1)


def as_skimage(image):
    return ((image.double() + 1) / 2).permute(1, 2, 0).numpy()


# Images.


def test_psnr_equals_scikit_image_for_each_image(photographs):
    original, noisy = photographs
    expected = [peak_signal_noise_ratio(as_skimage(a), as_skimage(b), data_range=1.0) for a, b in zip(original, noisy)]
    assert psnr(noisy, original).tolist() == pytest.approx(expected, abs=1e-3)
    assert psnr(torch.full((1, 3, 8, 8), 0.2), torch.zeros(1, 3, 8, 8)).item() == pytest.approx(20.0, abs=1e-4)
    assert psnr(original, original).tolist() == [MAX_PSNR] * 2


def test_ssim_equals_scikit_image_for_each_image(photographs):
    original, noisy = photographs
    expected = [
        structural_similarity(
            as_skimage(a), as_skimage(b), data_range=1.0, channel_axis=2, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(original, noisy)
    ]  # fmt: skip
    assert ssim(noisy, original).tolist() == pytest.approx(expected, abs=1e-4)
    assert ssim(original, original).tolist() == pytest.approx([1.0, 1.0])
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16))


# Frechet distance.


def frechet_of(real, fake):
    distance = frechet_distance(real.shape[1])
    distance.update(real, real=True)
    distance.update(fake, real=False)
    return distance.compute().item()


def test_frechet_distance_equals_its_equation():
    real, fake = randn(50, 8) @ randn(8, 8, seed=2), 0.5 + randn(40, 8, seed=1)
    a, b = np.cov(real.double().numpy().T), np.cov(fake.double().numpy().T)
    shift = np.square(real.double().numpy().mean(0) - fake.double().numpy().mean(0)).sum()
    expected = shift + np.trace(a) + np.trace(b) - 2 * np.trace(sqrtm(a @ b).real)
    assert frechet_of(real, fake) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_with_fewer_images_than_channels():
    real, fake = 3 + randn(12, 100).double(), randn(9, 100, seed=1).double()
    x, y = (real - real.mean(0)) / math.sqrt(11), (fake - fake.mean(0)) / math.sqrt(8)
    overlap = np.linalg.norm((x @ y.T).numpy(), "nuc")
    shift = (real.mean(0) - fake.mean(0)).square().sum()
    expected = float(shift + x.square().sum() + y.square().sum()) - 2 * overlap
    assert frechet_of(real, fake) == pytest.approx(expected, rel=1e-6)
    assert frechet_of(real, real) == pytest.approx(0.0, abs=1e-4)
    assert frechet_of(torch.ones(3, 4), torch.zeros(5, 4)) == pytest.approx(4.0)  # without any variance


# Networks with weights: random ones stand in for the published, in the place where those are looked for.


@pytest.fixture
def weights_folder(tmp_path, monkeypatch):
    """The empty folder of the torch.hub cache where weights are looked for; no server is within reach."""

    def unreachable(url, timeout):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("flextok.evaluation.metrics.urlopen", unreachable)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def put_alexnet(folder):
    torch.manual_seed(0)
    with torch.device("meta"):
        model = alexnet(weights=None)
    state = {
        name: 0.05 * torch.randn(value.shape) if "features" in name else torch.zeros(1).expand(value.shape)
        for name, value in model.state_dict().items()
    }
    torch.save(state, folder / "alexnet-owt-7be5be79.pth")


def put_inception(folder):
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], "nowhere")
    torch.save(model.state_dict(), folder / "weights-inception-2015-12-05-6726825d.pth")
    return model.eval()


def test_lpips_is_that_of_torchmetrics_for_each_image(weights_folder, photographs):
    put_alexnet(weights_folder)
    original, noisy = photographs
    lpips, reference = load_lpips(), LearnedPerceptualImagePatchSimilarity(net_type="alex")
    expected = [reference(noisy[i : i + 1], original[i : i + 1]).item() for i in range(2)]
    assert lpips(noisy, original).tolist() == pytest.approx(expected, rel=1e-4) and 0 < expected[0] < expected[1]
    assert lpips(original, original).tolist() == [0.0, 0.0]


def test_inception_takes_the_pixels_that_a_file_would_hold(weights_folder, photographs):
    reference = put_inception(weights_folder)
    noisy = photographs[1]
    features = load_inception()(noisy)
    written = np.rint((noisy.numpy() + 1) * np.float32(127.5)).astype(np.uint8)
    assert features.shape == (2, 2048) and features.dtype == torch.float32
    assert torch.equal(features, reference(torch.from_numpy(written))[0])


@pytest.mark.parametrize(
    "load, file",
    [(load_lpips, "alexnet-owt-7be5be79.pth"), (load_inception, "weights-inception-2015-12-05-6726825d.pth")],
)
def test_missing_weights_are_named_with_the_place_to_copy_them_to(weights_folder, load, file):
    with pytest.raises(MetricUnavailable) as error:
        load()
    for part in (str(weights_folder / file), "https://", "no route to host", "copy it to"):
        assert part in str(error.value)


# Means.


def test_confidence_interval_equals_scipy_and_small_samples_are_warned_of():
    values = randn(50).double().numpy()
    low, high = norm.interval(0.95, loc=values.mean(), scale=sem(values))
    result = mean_with_confidence(values)
    assert result["n"] == 50 and result["value"] == pytest.approx(values.mean())
    assert (result["low"], result["high"]) == (pytest.approx(low), pytest.approx(high))
    assert mean_with_confidence([2.5]) == {"value": 2.5, "n": 1, "low": None, "high": None}
    with pytest.raises(ValueError, match="1 of 2 values are NaN"):
        mean_with_confidence([1.0, math.nan])
    assert "30" in sample_warning("psnr", 29) and sample_warning("psnr", 30) is None
    assert "singular" in sample_warning("rfid", 2048, 2048) and sample_warning("rfid", 10_000, 2048) is None


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


@pytest.mark.parametrize("k, rows_at_once", [(1, 1024), (10, 7)])
def test_cknna_equals_its_definition(k, rows_at_once):
    a = 0.5 + randn(24, 6)
    b = torch.cat([a[:, :4], 0.7 * randn(24, 5, seed=1)], dim=1)
    assert cknna(a, b, k, rows_at_once) == pytest.approx(cknna_by_definition(a, b, k), rel=1e-9)


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
def test_probes_equal_a_vote_of_20_neighbours_and_scikit_learn_by_hand():
    train_y, test_y = torch.arange(60) % 3, torch.arange(600) % 3
    train_x = randn(60, 5) + 1.2 * torch.nn.functional.one_hot(train_y, 5)
    test_x = randn(600, 5, seed=1) + 1.2 * torch.nn.functional.one_hot(test_y, 5)
    cosine = torch.nn.functional.cosine_similarity(test_x[:, None], train_x[None], dim=-1)
    correct = 0
    for similarities, label in zip(cosine, test_y):
        votes = Counter(train_y[similarities.topk(20).indices].tolist())
        correct += min(votes, key=lambda c: (-votes[c], c)) == int(label)
    assert probe_accuracy(train_x, train_y, test_x, test_y)["knn"] == pytest.approx(correct / 600)
    scales = torch.tensor([1.0, 1e3, 1e-3, 1.0, 10.0])
    train_x, test_x = train_x * scales, test_x * scales
    mean, std = train_x.mean(0), train_x.std(0, correction=0)
    probe = LogisticRegression(max_iter=1000).fit((train_x - mean) / std, train_y)
    linear = (probe.predict((test_x - mean) / std) == test_y.numpy()).mean()
    assert probe_accuracy(train_x, train_y, test_x, test_y)["linear"] == pytest.approx(linear)
    assert 0.4 < correct / 600 < 1 and 0.4 < linear < 1


# Tokens.


def test_entropy_of_known_distributions():
    uniform, constant = torch.arange(8), torch.full((8,), 5)
    halves = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])  # 1/2, 1/4, 1/8, 1/8
    result = code_statistics(torch.stack([uniform, constant, halves], dim=1), codebook_size=1000)
    assert result["used"] == [8, 1, 4]
    assert result["entropy_bits"] == pytest.approx([3.0, 0.0, 1.75])
    assert result["perplexity"] == pytest.approx([8.0, 1.0, 2**1.75])
    assert result["used_overall"] == 8
    assert code_statistics(torch.tensor([[0, 7, 7], [0, 8, 9]]), 10)["used_overall"] == 4
    with pytest.raises(ValueError, match=r"0\.\.10, but a codebook of 10 has 0\.\.9"):
        code_statistics(torch.tensor([[0, 10]]), 10)


def test_silhouette_by_class_equals_scikit_learn():
    codes, labels = (2 * randn(60, 4, 3)).round().clamp(-2, 2) / 2, torch.arange(60) % 3
    codes[:, 1] += labels[:, None]  # the second token tells classes apart
    found = {k: first_tokens_silhouette(codes, k, labels.tolist()) for k in (1, 2, 4)}
    for k, value in found.items():
        assert value == pytest.approx(silhouette_score(codes[:, :k].reshape(60, -1), labels))
    assert found[2] > found[1] + 0.05
