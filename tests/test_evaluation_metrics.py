"""Networks of an evaluation against other implementations; its other numbers are in test_evaluation_numbers.py."""

import numpy as np
import pytest
import torch
from skimage.data import astronaut, coffee
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision.models import alexnet

from flextok.evaluation.metrics import (
    MetricUnavailable,
    load_inception,
    load_lpips,
)
from flextok.evaluation.tokens import first_tokens_silhouette


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def photographs():
    """Two crops of photographs and noisy versions that stay in [-1, 1], [2, 3, 48, 64]."""
    crops = [torch.from_numpy(picture[100:148, 100:164].copy()) for picture in (astronaut(), coffee())]
    original = torch.stack(crops).permute(0, 3, 1, 2) / 127.5 - 1
    strength = torch.tensor([0.05, 0.2]).view(2, 1, 1, 1)
    return original, (original + strength * randn(2, 3, 48, 64)).clamp(-1, 1)


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


# Tokens.


def test_silhouette_without_classes_is_that_of_clusters():
    codes = (2 * randn(60, 4, 3)).round().clamp(-2, 2).double() / 2
    vectors = codes[:, :2].reshape(60, -1).numpy()
    clusters = KMeans(8, n_init=10, random_state=3).fit_predict(vectors)
    assert first_tokens_silhouette(codes, 2, seed=3) == pytest.approx(silhouette_score(vectors, clusters))
