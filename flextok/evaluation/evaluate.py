"""Evaluate a model: reconstruction by token count, alignment of its decoder with an encoder, use of its codes."""

import contextlib
import dataclasses
import datetime
import json
import logging
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..data.batch import collate
from ..data.loader import BatchLoader, BrokenFiles
from ..model.utils.repa_encoders import FrozenEncoder, encoder_dtype
from ..model.utils.repa_loss import load_encoder, normalised_target_sum
from ..training.pictures import save_grid
from ..training.token_use import tokens_warning
from ..utils.config import ConfigError
from ..utils.dtypes import autocast_dtype, faster_in_bf16, precision
from ..utils.errors import UserError
from ..utils.files import write_atomically
from ..utils.modules import evaluating
from ..utils.random import RANDOM_KEY, BatchRandom
from . import metrics
from .representation import cknna, knn_accuracy, linear_probe_accuracy
from .subjects import ImageSet, Subject
from .tokens import code_statistics, first_tokens_silhouette

log = logging.getLogger(__name__)

FORMAT = 1
VAE = "vae"  # the row of the VAE's own reconstruction, which no token limits
PICTURED = 4  # images in each grid
PROBE_SIGMA = 0.5  # noise level at which the decoder's features are looked at, as in the REPA paper's figures
FALLBACK_ENCODER = "efficientnet_lite0"  # its weights come with pip


@dataclasses.dataclass
class Options:
    """How to evaluate.

    Attributes:
        tokens: Token counts; None: powers of two up to the model's number.
        encoder: For Frechet distance and CKNNA; None: dinov2_vitl14 if it can be had, else efficientnet_lite0.
        guidance_scale, norm_guidance, inference_steps: Of the sampler; None: those of the training's pictures, or
            7.5, APG, 25.
    """

    tokens: list[int] | None = None
    seed: int = 0
    batch_size: int = 16
    num_workers: int = 0
    encoder: str | None = None
    encoder_weights: str | None = None
    encoder_image_size: int | None = None
    inference_steps: int | None = None
    guidance_scale: float | None = None
    norm_guidance: bool | None = None
    device: str = "cpu"
    use_amp: bool = True


class Evaluator:
    """One evaluation; `run()` gives its results and leaves them in a folder, from which a stopped one goes on.

    Every random draw is a function of (seed, index of the image), whatever the batch size and the token count.

    Args:
        folder: Where results, parts and grids go.
    """

    def __init__(self, subject: Subject, images: ImageSet, options: Options, folder: Path):
        self.subject, self.images, self.options, self.folder = subject, images, options, Path(folder)
        self.device = torch.device(options.device)
        self.model = subject.model.to(self.device).eval()
        faster = self.device.type == "cuda" or faster_in_bf16(self.device, 1024, 1024)
        self.dtype = autocast_dtype(self.device) if options.use_amp and faster else None
        n_max, trained = self.model.n_registers, subject.config
        self.tokens = sorted(set(options.tokens or _powers_of_two(n_max)))
        if not 1 <= self.tokens[0] <= self.tokens[-1] <= n_max:
            raise ConfigError(f"--tokens is {self.tokens}, but the model has 1 to {n_max} tokens")

        def choose(given, setting: str, default):
            return given if given is not None else getattr(trained, setting, default)

        self.sampler = dict(
            timesteps=choose(options.inference_steps, "inference_steps", 25),
            guidance_scale=choose(options.guidance_scale, "guidance_scale", 7.5),
            perform_norm_guidance=choose(options.norm_guidance, "perform_norm_guidance", True),
        )
        self.skipped: dict[str, str] = {}
        self.broken = BrokenFiles(len(images))
        self.encoder = self._load_encoder()
        self.lpips = self._or_skip("lpips", metrics.load_lpips)
        self.inception = self._or_skip("rfid", metrics.load_inception)

    # ------------------------------------------------------------------------------------------------------- set-up

    def _load_encoder(self) -> FrozenEncoder:
        options, dtype = self.options, encoder_dtype("auto", self.device)
        arguments = dict(weights=options.encoder_weights, image_size=options.encoder_image_size, dtype=dtype)
        if options.encoder is not None:
            return load_encoder(options.encoder, **arguments).to(self.device)
        try:
            return load_encoder("dinov2_vitl14", **arguments).to(self.device)
        except UserError as error:
            log.warning(
                "dinov2_vitl14 cannot be had (%s): %s is used instead", str(error).split("\n")[0], FALLBACK_ENCODER
            )
            self.skipped["fd with dinov2_vitl14"] = f"{str(error).splitlines()[0]} {FALLBACK_ENCODER} is used instead."
            return load_encoder(FALLBACK_ENCODER, dtype=dtype).to(self.device)

    def _or_skip(self, name: str, load: Callable):
        try:
            return load(self.device)
        except metrics.MetricUnavailable as error:
            self.skipped[name] = str(error)
            log.warning("%s is skipped: %s", name, error)
            return None

    def settings(self) -> dict:
        """What the numbers depend on; parts of an evaluation with others are not gone on with."""
        state = self.model.state_dict()
        return {
            "format": FORMAT,
            "checkpoint": self.subject.name,
            "weights": float(sum(value.double().abs().sum() for value in state.values() if value.is_floating_point())),
            "data": self.images.name,
            "images": self.images.dataset.identity(),
            "n_images": len(self.images),
            "img_size": self.subject.img_size,
            "seed": self.options.seed,
            "encoder": f"{self.encoder.name} at {self.encoder.image_size} px",
            "skipped": sorted(self.skipped),
            "dtype": "fp32" if self.dtype is None else str(self.dtype).removeprefix("torch."),
            **self.sampler,
        }

    # ---------------------------------------------------------------------------------------------------------- run

    def run(self) -> dict:
        start = time.perf_counter()
        settings = self.settings()
        parts = self.folder / "parts"
        if read_json(parts / "settings.json") != settings:
            for file in parts.glob("*"):
                file.unlink()
            parts.mkdir(parents=True, exist_ok=True)
            write_json(parts / "settings.json", settings)
        with torch.no_grad(), evaluating(self.model):
            encoded = self._encode(self.images)
            originals = self._original_features()
            rows = {}
            for k in (VAE, *self.tokens):
                try:
                    rows[str(k)] = self._part(parts / f"{k}.json", lambda k=k: self._reconstruct(k, encoded, originals))
                except ValueError as error:  # of a metric: images that are not finite, or too small for it
                    raise UserError(f"{'VAE' if k == VAE else f'{k} tokens'}: {error}") from error
            results = {
                "format": FORMAT,
                "about": self._about(settings),
                "reconstruction": {k: row["metrics"] for k, row in rows.items()},
                "skipped": self.skipped,
                "alignment": self._part(parts / "alignment.json", lambda: self._alignment(encoded)),
                "probes": self._part(parts / "probes.json", lambda: self._probes(encoded)),
                "codes": self._codes(encoded),
                "tokens_warning": tokens_warning(
                    encoded["tokens"], {k: rows[str(k)]["metrics"]["psnr"]["value"] for k in self.tokens}
                ),
                "grids": self._grids(rows[str(self.tokens[-1])]["psnr"], encoded),
                "cost": {
                    "seconds": time.perf_counter() - start,
                    "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                },
            }
        write_json(self.folder / "results.json", results)
        return results

    def _part(self, file: Path, compute: Callable[[], dict | None]) -> dict | None:
        """What `compute` gives, and notes as skipped, from its file if an earlier run got that far."""
        stored = read_json(file)
        if stored is None:
            before = set(self.skipped)
            value = compute()
            skipped = {name: reason for name, reason in self.skipped.items() if name not in before}
            stored = {"value": value, "skipped": skipped}
            write_json(file, stored)
        self.skipped.update(stored["skipped"])
        return stored["value"]

    def _about(self, settings: dict) -> dict:
        encoder, decoder = self.model.encoder, self.model.decoder
        count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6  # noqa: E731
        return {
            **{key: value for key, value in settings.items() if key not in ("format", "weights", "images", "skipped")},
            "inference_steps": self.sampler["timesteps"],
            "model": f"encoder {count(encoder):.1f} M, decoder {count(decoder):.1f} M parameters, "
            f"{self.model.n_registers} tokens of {self.model.regularizer.codebook_size} codes",
            "averaged_weights": self.subject.averaged,
            "device": str(self.device),
            "date": datetime.date.today().isoformat(),
        }

    # ----------------------------------------------------------------------------------------------- reconstruction

    def _batches(self, images: ImageSet, text: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(indices, images on the device) of a set, in order."""
        options = self.options
        loader = BatchLoader(images.dataset, options.batch_size, num_workers=options.num_workers, collate_fn=collate)
        for batch in tqdm(loader, desc=text, unit="batch", leave=False, dynamic_ncols=True):
            self.broken.add(batch.broken)
            yield batch.position, batch.images.to(self.device)

    def _autocast(self):
        return precision(self.device, self.dtype)

    def _random(self, indices: torch.Tensor) -> BatchRandom:
        return BatchRandom(self.options.seed, 0, indices.to(self.device), len(self.images))

    def _encode(self, images: ImageSet) -> dict[str, torch.Tensor]:
        """Latents [N, C, h, w], tokens [N, L] and quantised registers [N, L, c] of a set, on the CPU."""
        vae, regularizer = self.model.vae, self.model.regularizer
        parts: dict[str, list] = {"latents": [], "tokens": [], "quants": []}
        for indices, batch in self._batches(images, "encode"):
            with self._autocast():
                data = self.model.encode({vae.images_read_key: batch, RANDOM_KEY: self._random(indices)})
            keys = (vae.vae_latents_write_key, regularizer.tokens_write_key, regularizer.quants_write_key)
            for part, key in zip(parts.values(), keys):
                part.append(data[key].float().cpu() if data[key].is_floating_point() else data[key].cpu())
        return {name: torch.cat(values) for name, values in parts.items()}

    def _decode(self, k, indices: torch.Tensor, encoded: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images in [-1, 1] and latents from the first k tokens; from the latents themselves if k is VAE."""
        vae, pipeline = self.model.vae, self.model.pipeline
        latents = encoded["latents"][indices].to(self.device)
        with self._autocast():
            if k == VAE:
                images = vae.decode({vae.vae_latents_read_key: latents})[vae.images_reconst_write_key]
                return images.clamp(-1, 1), latents
            data = {
                self.model.regularizer.tokens_write_key: encoded["tokens"][indices, :k],
                pipeline.noise_read_key: self._random(indices).normal("evaluation", latents.shape[1:]),
            }
            data = self.model.decode(data, **self.sampler)
        return data[vae.images_reconst_write_key].float().clamp(-1, 1), data[pipeline.reconst_write_key].float()

    def _pooled(self, images: torch.Tensor) -> torch.Tensor:
        """The encoder's features, mean over positions: float64 [B, C]."""
        return metrics.pooled_features(self.encoder(images).double())

    def _original_features(self) -> dict[str, metrics.FeatureStatistics]:
        """Statistics of the originals' features, which every token count is compared with."""
        statistics = {"fd": metrics.FeatureStatistics(self.encoder.dim)}
        if self.inception is not None:
            statistics["rfid"] = metrics.FeatureStatistics(metrics.INCEPTION_DIM)
        pooled = []
        for _, images in self._batches(self.images, "features"):
            pooled.append(self._pooled(images).cpu())
            statistics["fd"].update(pooled[-1])
            if self.inception is not None:
                statistics["rfid"].update(self.inception(images))
        self.encoder_features = torch.cat(pooled)
        if len(self.images) < 2:
            self.skipped["fd"] = self.skipped["rfid"] = "one image has no covariance"
            return {}
        return statistics

    def _reconstruct(self, k, encoded: dict, originals: dict[str, metrics.FeatureStatistics]) -> dict:
        """Metrics of the reconstructions from k tokens."""
        per_image: dict[str, list] = {}
        frechet = {name: metrics.FrechetFeatures(real.dim, real) for name, real in originals.items()}
        label = "VAE" if k == VAE else f"{k} tokens"
        for indices, images in self._batches(self.images, label):
            reconstruction, latents = self._decode(k, indices, encoded)
            values = {
                "psnr": metrics.psnr(reconstruction, images),
                "ssim": metrics.ssim(reconstruction, images),
                "latent_mse": metrics.latent_mse(latents, encoded["latents"][indices].to(self.device)),
            }
            if self.lpips is not None:
                values["lpips"] = self.lpips(reconstruction, images)
            for name, value in values.items():
                per_image.setdefault(name, []).append(value.cpu())
            for name, features in frechet.items():
                features_of = self._pooled if name == "fd" else self.inception
                features.update(features_of(reconstruction), real=False)
        per_image = {name: torch.cat(values) for name, values in per_image.items()}
        result = {name: metrics.mean_with_confidence(values) for name, values in per_image.items()}
        for name, features in frechet.items():
            result[name] = {"value": features.compute(), "n": len(self.images), "low": None, "high": None}
        for name, value in result.items():
            dim = frechet[name].dim if name in frechet else None
            warning = metrics.sample_warning(name, value["n"], dim)
            if warning is not None:
                value["warning"] = warning
        return {"metrics": result, "psnr": per_image["psnr"].tolist()}

    # ----------------------------------------------------------------------------------------------- representation

    @contextlib.contextmanager
    def _keeping_layers(self, layers: Sequence[int]):
        """Let the decoder keep the outputs of some of its layers."""
        transformer = self.model.decoder.module_dict["dec_transformer"]
        kept, transformer.intermediate_layers = transformer.intermediate_layers, list(layers)
        try:
            yield
        finally:
            transformer.intermediate_layers = kept

    def _decoder_features(self, indices: torch.Tensor, encoded: dict) -> torch.Tensor:
        """Patch features of the layers that the decoder keeps, [B, h, w, layers * D], at noise level PROBE_SIGMA."""
        pipeline = self.model.pipeline
        latents = encoded["latents"][indices].to(self.device)
        noise = self._random(indices).normal("features", latents.shape[1:])
        data = {
            pipeline.latents_read_key: encoded["quants"][indices].to(self.device),
            pipeline.noised_images_read_key: PROBE_SIGMA * noise + (1 - PROBE_SIGMA) * latents,
            pipeline.timesteps_read_key: torch.full((len(indices),), PROBE_SIGMA, device=self.device),
        }
        with self._autocast():
            data = self.model.decoder(data)
        unpacker = self.model.decoder.module_dict["dec_repa_unpacker"]
        return unpacker(data)[unpacker.write_keys[0]].float()

    def _has_layers(self) -> bool:
        modules = self.model.decoder.module_dict
        return "dec_repa_unpacker" in modules and modules["dec_transformer"].intermediate_layer_write_key is not None

    def _pooled_layers(self, encoded: dict) -> torch.Tensor:
        """Mean over positions of every decoder layer's features, [N, layers, D]; computed once for a set."""
        if "layers" in encoded:
            return encoded["layers"]
        transformer = self.model.decoder.module_dict["dec_transformer"]
        pooled = []
        with self._keeping_layers(range(transformer.depth)):
            for indices in _index_batches(len(encoded["latents"]), self.options.batch_size, "decoder features"):
                features = self._decoder_features(indices, encoded).mean(dim=(1, 2))
                pooled.append(features.unflatten(1, (transformer.depth, -1)).cpu())
        encoded["layers"] = torch.cat(pooled)
        return encoded["layers"]

    def _alignment(self, encoded: dict) -> dict | None:
        if not self._has_layers():
            self.skipped["alignment"] = "the model's decoder keeps no layer for REPA"
            return None
        k = min(10, len(self.images) - 1)
        result = {
            "encoder": self.encoder.name, "cosine": None, "constant": None, "layers": [], "k": k,
            "n": len(self.images), "tokens_cknna": None, "aligned_layers": self.subject.aligned_layers,
        }  # fmt: skip
        if k < 2:
            self.skipped["cknna"] = f"{len(self.images)} images are too few for neighbours"
        else:
            layers = self._pooled_layers(encoded)
            for layer in range(layers.shape[1]):
                value = self._cknna(f"decoder layer {layer}", layers[:, layer], k)
                result["layers"].append({"layer": layer, "cknna": value})
            result["tokens_cknna"] = self._cknna("tokens", encoded["quants"].flatten(1), k)
        try:
            result.update(self._projected_alignment(encoded))
        except UserError as error:
            self.skipped["alignment cosine"] = str(error)
        return result

    def _cknna(self, name: str, features: torch.Tensor, k: int) -> float | None:
        try:
            return cknna(features, self.encoder_features, k)
        except ValueError as error:  # features that are all the same have no neighbours
            self.skipped[f"cknna of {name}"] = str(error)
            return None

    def _projected_alignment(self, encoded: dict) -> dict:
        """Cosine of the trained projector's output with its encoder's features, and that of a constant prediction."""
        module = self.subject.repa_module(self.device)
        if module is None:
            self.skipped["alignment cosine"] = "only a training checkpoint with REPA has the trained projector"
            return {}
        module.load_encoder()
        cosines, total, count = [], 0.0, 0
        with self._keeping_layers(self.subject.aligned_layers):
            for indices, images in self._batches(self.images, "alignment"):
                target = module.target_features(images)
                features = self._decoder_features(indices, encoded)
                for i in range(len(images)):  # one by one: the confidence is over images
                    losses = module.layer_losses(features[i : i + 1], target[i : i + 1])
                    cosines.append(-torch.stack(losses).mean().cpu())
                batch_total, batch_count = normalised_target_sum(target)
                total, count = total + batch_total, count + batch_count
        # The best constant for these very images, a little more than any constant fitted elsewhere reaches.
        constant = float((total / count).norm())
        return {"projector_encoder": module.encoder_name, "cosine": metrics.mean_with_confidence(torch.stack(cosines)),
                "constant": constant}  # fmt: skip

    def _probes(self, encoded: dict) -> dict | None:
        """Accuracy with which classes are read off the decoder's features and the tokens."""
        images = self.images
        if images.labels is None:
            self.skipped["probes"] = "the images have no classes (a folder needs a sub-folder for each)"
            return None
        labels = torch.tensor(images.labels)
        if images.train is not None:
            train_encoded, train_labels = self._encode(images.train), torch.tensor(images.train.labels)
            test = (encoded, labels)
        else:
            fitted = _every_other(labels)
            if self._has_layers():
                self._pooled_layers(encoded)  # of the whole set, where each image has its own noise, then divided
            train_encoded, train_labels = {name: value[fitted] for name, value in encoded.items()}, labels[fitted]
            test = ({name: value[~fitted] for name, value in encoded.items()}, labels[~fitted])
        shares = torch.bincount(test[1], minlength=len(images.classes)) / len(test[1])
        if len(set(train_labels.tolist())) < 2:
            self.skipped["probes"] = f"{len(train_labels)} images are of one class"
            return None
        sets = [self._probed_features(train_encoded), self._probed_features(test[0])]
        features = {
            name: {
                "knn": knn_accuracy(sets[0][name], train_labels, sets[1][name], test[1], min(20, len(train_labels))),
                "linear": linear_probe_accuracy(sets[0][name], train_labels, sets[1][name], test[1]),
            }
            for name in tqdm(sets[0], desc="probes", leave=False, dynamic_ncols=True)
        }
        return {"classes": images.classes, "n_train": len(train_labels), "n_test": len(test[1]),
                "chance": float(shares.max()), "features": features}  # fmt: skip

    def _probed_features(self, encoded: dict) -> dict[str, torch.Tensor]:
        features = {}
        if self._has_layers():
            layers = self._pooled_layers(encoded)
            features.update({f"decoder layer {i}": layers[:, i] for i in range(layers.shape[1])})
        for k in (1, 4, self.model.n_registers):
            if k <= self.model.n_registers:
                features[f"tokens, first {k}"] = encoded["quants"][:, :k].flatten(1)
        return features

    def _codes(self, encoded: dict) -> dict:
        statistics = code_statistics(encoded["tokens"], self.model.regularizer.codebook_size)
        counts = [k for k in (1, 2, 4) if k <= self.model.n_registers]
        silhouette = first_tokens_silhouette(encoded["quants"], counts, self.images.labels, seed=self.options.seed)
        by = "classes" if self.images.labels is not None else "k-means"
        return {"codebook_size": self.model.regularizer.codebook_size, "n": len(self.images), **statistics,
                "silhouette": silhouette, "silhouette_by": by}  # fmt: skip

    # ------------------------------------------------------------------------------------------------------ pictures

    def _grids(self, psnr: list[float], encoded: dict) -> dict[str, str]:
        """Flexible-length reconstructions of those images that the largest token count reconstructs best, in the middle
        and worst, and of the first, which are the same for every model."""
        order = torch.tensor(psnr).argsort(descending=True)
        n, middle = min(PICTURED, len(order)), len(order) // 2
        first = max(0, min(middle - n // 2, len(order) - n))
        chosen = {
            "best": order[:n], "median": order[first : first + n], "worst": order[-n:], "first": torch.arange(n),
        }  # fmt: skip
        titles = ["VAE", *(f"{k} token{'s' if k > 1 else ''}" for k in self.tokens), "original"]
        for name, indices in chosen.items():
            originals = torch.stack([self.images.dataset[int(i)]["image"] for i in indices])
            columns = [self._decode(k, indices, encoded)[0].cpu() for k in (VAE, *self.tokens)]
            save_grid([*columns, originals], titles, self.folder / "grids" / f"{name}.png")
        return {name: f"grids/{name}.png" for name in chosen}


def _powers_of_two(n_max: int) -> list[int]:
    return sorted({*(2**i for i in range(n_max.bit_length()) if 2**i <= n_max), n_max})


def _index_batches(n: int, batch_size: int, text: str) -> Iterator[torch.Tensor]:
    yield from tqdm(torch.arange(n).split(batch_size), desc=text, unit="batch", leave=False, dynamic_ncols=True)


def _every_other(labels: torch.Tensor) -> torch.Tensor:
    """Bool [N]: every other image of each class, from its first on."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        chosen[(labels == label).nonzero().flatten()[::2]] = True
    return chosen


def read_json(path: Path) -> dict | None:
    """The value in a JSON file; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file atomically, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1)))
