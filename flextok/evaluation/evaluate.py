"""Evaluate a model: reconstruction by token count, alignment of its decoder with an encoder, use of its codes."""

import contextlib
import dataclasses
import datetime
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..data.batch import collate
from ..data.loader import BatchLoader, BrokenFiles
from ..model.utils.repa_encoders import FrozenEncoder
from ..model.utils.repa_loss import load_encoder, unit_target_sum
from ..training.pictures import save_grid
from ..training.token_use import tokens_warning
from ..utils.config import ConfigError
from ..utils.dtypes import DTYPES, precision
from ..utils.errors import UserError
from ..utils.files import write_atomically
from ..utils.memory import PeakMemory
from ..utils.modules import count_parameters, evaluating
from ..utils.random import RANDOM_KEY, BatchRandom
from . import metrics
from .representation import cknna, probe_accuracy
from .subjects import ImageSet, Subject
from .tokens import code_statistics, first_tokens_silhouette

log = logging.getLogger(__name__)

FORMAT = 2
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
        norm_guidance, inference_steps: Of the sampler; None: those of the training's pictures, or APG, 25.
        guidance_scale: Of all reconstructions; None: 1 where they are measured (the training's `psnr_guidance_scale`),
            and in grids that of the training's pictures, or 7.5.
        precision: fp32 or bf16, of the model (by autocast) and of encoders.
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
    precision: str = "fp32"


class Evaluator:
    """One evaluation; `run()` gives its results and leaves them in a folder, from which a stopped one goes on.

    Every random draw is a function of (seed, number of the image in its whole data set), whatever the batch size, the
    token count and the choice of images. Encoded images are a dict of tensors on the CPU, one row per image of a set.

    Args:
        folder: Where results, parts and grids go.
    """

    def __init__(self, subject: Subject, images: ImageSet, options: Options, folder: Path):
        self.subject, self.images, self.options, self.folder = subject, images, options, Path(folder)
        self.device = torch.device(options.device)
        self.memory = PeakMemory(self.device)
        self.model = subject.model.to(self.device).eval()
        self.dtype = DTYPES[options.precision]
        n_max = self.model.n_registers
        powers = [2**i for i in range(n_max.bit_length())]
        self.tokens = sorted(set(options.tokens or [*powers, n_max]))
        if not 1 <= self.tokens[0] <= self.tokens[-1] <= n_max:
            raise ConfigError(f"--tokens is {self.tokens}, but the model has 1 to {n_max} tokens")

        def choose(given, setting: str, default):
            return given if given is not None else getattr(subject.config, setting, default)

        self.picture_guidance_scale = choose(options.guidance_scale, "guidance_scale", 7.5)
        self.sampler = dict(
            timesteps=choose(options.inference_steps, "inference_steps", 25),
            guidance_scale=choose(options.guidance_scale, "psnr_guidance_scale", 1.0),
            perform_norm_guidance=choose(options.norm_guidance, "perform_norm_guidance", True),
        )
        modules = dict(self.model.decoder.module_dict)
        self.transformer, self.unpacker = modules["dec_transformer"], modules.get("dec_repa_unpacker")
        self.skipped: dict[str, str] = {}
        self.broken = BrokenFiles(len(images))
        self.encoder = self.load_encoder()
        self.lpips = self.or_skip("lpips", metrics.load_lpips)
        self.inception = self.or_skip("rfid", metrics.load_inception)

    def load_encoder(self) -> FrozenEncoder:
        options = self.options
        arguments = dict(weights=options.encoder_weights, image_size=options.encoder_image_size, dtype=self.dtype)
        try:
            return load_encoder(options.encoder or "dinov2_vitl14", **arguments).to(self.device)
        except UserError as error:
            if options.encoder is not None:
                raise
            reason = str(error).splitlines()[0]
            log.warning("dinov2_vitl14 cannot be had (%s): %s is used instead", reason, FALLBACK_ENCODER)
            self.skipped["fd with dinov2_vitl14"] = f"{reason} {FALLBACK_ENCODER} is used instead."
            return load_encoder(FALLBACK_ENCODER, dtype=self.dtype).to(self.device)
        except ValueError as error:
            raise ConfigError(f"--encoder, --encoder-image-size: {error}") from error

    def or_skip(self, name: str, load: Callable):
        try:
            return load(self.device)
        except metrics.MetricUnavailable as error:
            self.skipped[name] = str(error)
            log.warning("%s is skipped: %s", name, error)
            return None

    # ---------------------------------------------------------------------------------------------------------- run

    def run(self) -> dict:
        start = time.perf_counter()
        settings = self.settings()
        parts = self.folder / "parts"
        if read_json(parts / "settings.json") != settings:
            for file in parts.glob("*"):
                file.unlink()
            write_json(parts / "settings.json", settings)
        with torch.no_grad(), evaluating(self.model):
            encoded = self.encode(self.images)
            self.look_at_originals()
            rows = {}
            for k in (VAE, *self.tokens):
                try:
                    rows[str(k)] = self.part(parts / f"{k}.json", lambda k=k: self.reconstruct(k, encoded))
                except ValueError as error:  # of a metric: images that are not finite, or too small for it
                    raise UserError(f"{'VAE' if k == VAE else f'{k} tokens'}: {error}") from error
            reconstruction = {k: row["metrics"] for k, row in rows.items()}
            psnr = {k: reconstruction[str(k)]["psnr"]["value"] for k in self.tokens}
            results = {
                "format": FORMAT,
                "about": self.about(settings),
                "reconstruction": reconstruction,
                "skipped": self.skipped,
                "alignment": self.part(parts / "alignment.json", lambda: self.alignment(encoded)),
                "probes": self.part(parts / "probes.json", lambda: self.probes(encoded)),
                "codes": self.codes(encoded),
                "tokens_warning": tokens_warning(encoded["tokens"], psnr),
                "grids": self.save_grids(rows[str(self.tokens[-1])]["psnr"], encoded),
                "cost": {
                    "seconds": time.perf_counter() - start,
                    "peak_memory_bytes": self.memory.read(),
                },
            }
        write_json(self.folder / "results.json", results)
        return results

    def settings(self) -> dict:
        """What the numbers depend on: an evaluation with others starts afresh."""
        state, device, dtype = self.model.state_dict(), self.device.type, self.options.precision
        if device == "cuda":
            device = f"cuda ({torch.cuda.get_device_name(self.device)})"
            if torch.get_float32_matmul_precision() != "highest" and self.dtype == torch.float32:
                dtype = "fp32, products in TF32"
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
            "encoder_weights": self.options.encoder_weights,
            "skipped": sorted(self.skipped),
            "device": device,
            "precision": dtype,
            "inference_steps": self.sampler["timesteps"],
            "guidance_scale": self.sampler["guidance_scale"],
            "picture_guidance_scale": self.picture_guidance_scale,
            "perform_norm_guidance": self.sampler["perform_norm_guidance"],
        }

    def about(self, settings: dict) -> dict:
        millions = [count_parameters(part) / 1e6 for part in (self.model.encoder, self.model.decoder)]
        return {
            **{key: value for key, value in settings.items() if key not in ("format", "weights", "images", "skipped")},
            "model": f"encoder {millions[0]:.1f} M, decoder {millions[1]:.1f} M parameters, "
            f"{self.model.n_registers} tokens of {self.model.regularizer.codebook_size} codes",
            "averaged_weights": self.subject.averaged,
            "date": datetime.date.today().isoformat(),
        }

    def part(self, file: Path, compute: Callable[[], dict | None]) -> dict | None:
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

    # ----------------------------------------------------------------------------------------------- reconstruction

    def batches(self, images: ImageSet, text: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(rows [B] of a set, their images [B, 3, H, W] on the device), in order."""
        options = self.options
        loader = BatchLoader(images.dataset, options.batch_size, num_workers=options.num_workers, collate_fn=collate)
        rows = torch.arange(len(images)).split(options.batch_size)
        for batch, some in zip(tqdm(loader, desc=text, unit="batch", leave=False, dynamic_ncols=True), rows):
            self.broken.add(batch.broken)
            yield some, batch.images.to(self.device)

    def random(self, indices: torch.Tensor) -> BatchRandom:
        """The draws of some images, by their numbers in the whole data set."""
        return BatchRandom(self.options.seed, 0, indices.to(self.device))

    def encode(self, images: ImageSet) -> dict[str, torch.Tensor]:
        """Latents [N, C, h, w], tokens [N, L], quantised registers [N, L, c] and numbers `index` [N] of a set."""
        vae, regularizer = self.model.vae, self.model.regularizer
        index, latents, tokens, quants = torch.tensor(images.indices), [], [], []
        for rows, batch in self.batches(images, "encode"):
            with precision(self.device, self.dtype):
                data = self.model.encode({vae.images_read_key: batch, RANDOM_KEY: self.random(index[rows])})
            latents.append(data[vae.vae_latents_write_key].float().cpu())
            tokens.append(data[regularizer.tokens_write_key].cpu())
            quants.append(data[regularizer.quants_write_key].float().cpu())
        return {
            "index": index, "latents": torch.cat(latents), "tokens": torch.cat(tokens), "quants": torch.cat(quants),
        }  # fmt: skip

    def decode(self, k, rows: torch.Tensor, encoded: dict, **sampler) -> tuple[torch.Tensor, torch.Tensor]:
        """Images in [-1, 1] and latents from the first k tokens; from the latents themselves if k is VAE.

        Args:
            rows: Which of the encoded images.
            sampler: What differs from the sampler of the measured reconstructions.
        """
        vae, pipeline = self.model.vae, self.model.pipeline
        latents = encoded["latents"][rows].to(self.device)
        with precision(self.device, self.dtype):
            if k == VAE:
                data = {**vae.decode({vae.vae_latents_read_key: latents}), pipeline.reconst_write_key: latents}
            else:
                data = {self.model.regularizer.tokens_write_key: encoded["tokens"][rows, :k]}
                noise = self.random(encoded["index"][rows]).normal("evaluation", latents.shape[1:])
                data = self.model.decode(data, noise=noise, **{**self.sampler, **sampler})
        return data[vae.images_reconst_write_key].float().clamp(-1, 1), data[pipeline.reconst_write_key].float()

    def frechet_features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features [B, C], on the CPU, by the Frechet distance on them; the encoder's are means over positions."""
        features = {"fd": self.encoder(images).double().mean((2, 3)).cpu()}
        if self.inception is not None:
            features["rfid"] = self.inception(images).cpu()
        return features

    def look_at_originals(self) -> None:
        """Leave the originals' statistics in `frechet`, which every token count is compared with, and their features
        in `encoder_features`, for CKNNA."""
        self.frechet = {"fd": metrics.frechet_distance(self.encoder.dim)}
        if self.inception is not None:
            self.frechet["rfid"] = metrics.frechet_distance(metrics.INCEPTION_DIM)
        pooled = []
        for _, images in self.batches(self.images, "features"):
            features = self.frechet_features(images)
            pooled.append(features["fd"])
            for name, distance in self.frechet.items():
                distance.update(features[name], real=True)
        self.encoder_features = torch.cat(pooled)
        if len(self.images) < 2:
            self.skipped["fd"] = self.skipped["rfid"] = "one image has no covariance"
            self.frechet = {}

    def reconstruct(self, k, encoded: dict) -> dict:
        """Metrics of the reconstructions from k tokens, and the PSNR of each image."""
        per_image: dict[str, list] = {}
        for distance in self.frechet.values():
            distance.reset()  # of the last token count's reconstructions
        for rows, images in self.batches(self.images, "VAE" if k == VAE else f"{k} tokens"):
            reconstruction, latents = self.decode(k, rows, encoded)
            values = {
                "psnr": metrics.psnr(reconstruction, images),
                "ssim": metrics.ssim(reconstruction, images),
                "latent_mse": metrics.latent_mse(latents, encoded["latents"][rows].to(self.device)),
            }
            if self.lpips is not None:
                values["lpips"] = self.lpips(reconstruction, images)
            for name, value in values.items():
                per_image.setdefault(name, []).append(value.cpu())
            if self.frechet:
                for name, features in self.frechet_features(reconstruction).items():
                    self.frechet[name].update(features, real=False)
        n, result = len(self.images), {}
        for name, parts in per_image.items():
            result[name] = metrics.mean_with_confidence(torch.cat(parts))
            warning = metrics.sample_warning(name, n)
            result[name].update({"warning": warning} if warning else {})
        for name, distance in self.frechet.items():
            value = max(0.0, distance.compute().item())  # rounding may leave a little less than 0
            result[name] = {"value": value, "n": n, "low": None, "high": None}
            dim = metrics.INCEPTION_DIM if name == "rfid" else self.encoder.dim
            warning = metrics.sample_warning(name, n, dim)
            result[name].update({"warning": warning} if warning else {})
        return {"metrics": result, "psnr": torch.cat(per_image["psnr"]).tolist()}

    # ----------------------------------------------------------------------------------------------- representation

    @property
    def has_layers(self) -> bool:
        """Whether the decoder can keep its layers' outputs, as models for REPA do."""
        return self.unpacker is not None and self.transformer.intermediate_layer_write_key is not None

    @contextlib.contextmanager
    def keeping_layers(self, layers: Sequence[int]):
        """Let the decoder keep the outputs of some of its layers."""
        kept, self.transformer.intermediate_layers = self.transformer.intermediate_layers, list(layers)
        try:
            yield
        finally:
            self.transformer.intermediate_layers = kept

    def decoder_features(self, rows: torch.Tensor, encoded: dict) -> torch.Tensor:
        """Patch features of the layers that the decoder keeps, [B, h, w, layers * D], at noise level PROBE_SIGMA."""
        pipeline = self.model.pipeline
        latents = encoded["latents"][rows].to(self.device)
        noise = self.random(encoded["index"][rows]).normal("features", latents.shape[1:])
        data = {
            pipeline.latents_read_key: encoded["quants"][rows].to(self.device),
            pipeline.noised_images_read_key: PROBE_SIGMA * noise + (1 - PROBE_SIGMA) * latents,
            pipeline.timesteps_read_key: torch.full((len(rows),), PROBE_SIGMA, device=self.device),
        }
        with precision(self.device, self.dtype):
            data = self.model.decoder(data)
        return self.unpacker(data)[self.unpacker.write_keys[0]].float()

    def pooled_layers(self, encoded: dict) -> torch.Tensor:
        """Mean over positions of every decoder layer's features, [N, layers, D]; computed once for a set."""
        if "layers" not in encoded:
            pooled, depth = [], self.transformer.depth
            rows = torch.arange(len(encoded["latents"])).split(self.options.batch_size)
            with self.keeping_layers(range(depth)):
                for some in tqdm(rows, desc="decoder features", unit="batch", leave=False, dynamic_ncols=True):
                    features = self.decoder_features(some, encoded).mean(dim=(1, 2))
                    pooled.append(features.unflatten(1, (depth, -1)).cpu())
            encoded["layers"] = torch.cat(pooled)
        return encoded["layers"]

    def alignment(self, encoded: dict) -> dict | None:
        """CKNNA of each decoder layer and of the tokens with the encoder, and the trained projector's cosine."""
        if not self.has_layers:
            self.skipped["alignment"] = "the model's decoder keeps no layer for REPA"
            return None
        k = min(10, len(self.images) - 1)
        result = {
            "encoder": self.encoder.name, "cosine": None, "constant": None, "mean": None, "layers": [],
            "k": k, "n": len(self.images), "tokens_cknna": None, "aligned_layers": self.subject.aligned_layers,
        }  # fmt: skip
        if k < 2:
            self.skipped["cknna"] = f"{len(self.images)} images are too few for neighbours"
        else:
            for layer, features in enumerate(self.pooled_layers(encoded).unbind(1)):
                value = self.cknna_or_skip(f"decoder layer {layer}", features, k)
                result["layers"].append({"layer": layer, "cknna": value})
            result["tokens_cknna"] = self.cknna_or_skip("tokens", encoded["quants"].flatten(1), k)
        module = self.subject.repa_module(self.device, self.options.precision)
        if module is None:
            self.skipped["alignment cosine"] = "only a training checkpoint with REPA has the trained projector"
            return result
        try:
            module.load_encoder()
        except UserError as error:
            self.skipped["alignment cosine"] = str(error)
            return result
        cosines, total = [], 0.0
        with self.keeping_layers(self.subject.aligned_layers):
            for rows, images in self.batches(self.images, "alignment"):
                target = module.target_features(images)
                features = self.decoder_features(rows, encoded)
                for i in range(len(images)):  # one by one: the confidence is over images
                    losses = module.layer_losses(features[i : i + 1], target[i : i + 1])
                    cosines.append(-torch.stack(losses).mean().cpu())
                total = total + unit_target_sum(target)  # [C, H, W]
        result["projector_encoder"] = module.encoder_name
        result["cosine"] = metrics.mean_with_confidence(torch.stack(cosines))
        # What ignores the image reaches no more: with the best vector at each position, since a decoder knows its
        # positions, or the best one for all. Of these very images: vectors fitted elsewhere reach a little less.
        mean = total / len(self.images)
        result["constant"], result["mean"] = float(mean.norm(dim=0).mean()), float(mean.mean((1, 2)).norm())
        return result

    def cknna_or_skip(self, name: str, features: torch.Tensor, k: int) -> float | None:
        try:
            return cknna(features, self.encoder_features, k)
        except ValueError as error:  # features that are all the same have no neighbours
            self.skipped[f"cknna of {name}"] = str(error)
            return None

    def probes(self, encoded: dict) -> dict | None:
        """Accuracy with which classes are read off the decoder's features and the tokens."""
        images = self.images
        if images.labels is None:
            self.skipped["probes"] = "the images have no classes (a folder needs a sub-folder for each)"
            return None
        labels = torch.tensor(images.labels)
        if images.train is not None:
            train, train_labels = self.encode(images.train), torch.tensor(images.train.labels)
            fit_rows, test_rows = train_labels >= 0, labels >= 0
        else:  # every other image of each class, from its first on
            train, train_labels, fit_rows = encoded, labels, torch.zeros(len(labels), dtype=torch.bool)
            for label in images.classes:
                fit_rows[(labels == label).nonzero().flatten()[::2]] = True
            test_rows = (labels >= 0) & ~fit_rows
        fit_y, test_y = train_labels[fit_rows], labels[test_rows]
        if len(fit_y.unique()) < 2 or not len(test_y):
            n_classes = len(fit_y.unique())
            self.skipped["probes"] = (
                f"{len(fit_y)} images of {n_classes} class{'es' * (n_classes != 1)} to fit to and {len(test_y)} to "
                "test are too few"
            )
            return None
        fit_x, test_x = self.probed_features(train), self.probed_features(encoded)
        accuracy = {
            name: probe_accuracy(fit_x[name][fit_rows], fit_y, test_x[name][test_rows], test_y)
            for name in tqdm(test_x, desc="probes", leave=False, dynamic_ncols=True)
        }
        return {
            "classes": list(images.classes.values()), "n_train": len(fit_y), "n_test": len(test_y),
            "n_unlabelled": int((labels < 0).sum()), "features": accuracy,
            "chance": test_y.unique(return_counts=True)[1].max().item() / len(test_y),
        }  # fmt: skip

    def probed_features(self, encoded: dict) -> dict[str, torch.Tensor]:
        """By name [N, D]: each decoder layer, and the first 1, 4 and all tokens."""
        features = {}
        if self.has_layers:
            layers = self.pooled_layers(encoded).unbind(1)
            features.update({f"decoder layer {i}": layer for i, layer in enumerate(layers)})
        for k in (1, 4, self.model.n_registers):
            if k <= self.model.n_registers:
                features[f"tokens, first {k}"] = encoded["quants"][:, :k].flatten(1)
        return features

    def codes(self, encoded: dict) -> dict:
        """Use of the codes, and how they group images: those that have a class, if there are classes."""
        n, labels, codebook_size = len(self.images), self.images.labels, self.model.regularizer.codebook_size
        quants, by = encoded["quants"], "k-means"
        if labels is not None:
            rows = [row for row, label in enumerate(labels) if label >= 0]
            quants, labels = quants[rows], [labels[row] for row in rows]
            by = "classes" if len(rows) == n else f"classes, {len(rows)} of {n} images have one"
        return {
            "codebook_size": codebook_size,
            "n": n,
            **code_statistics(encoded["tokens"], codebook_size),
            "silhouette": {
                str(k): first_tokens_silhouette(quants, k, labels, seed=self.options.seed)
                for k in (1, 2, 4)
                if k <= self.model.n_registers
            },
            "silhouette_by": by,
        }

    def save_grids(self, psnr: list[float], encoded: dict) -> dict[str, str]:
        """Flexible-length reconstructions of those images that the largest token count reconstructs best, in the middle
        and worst, and of the first, which are the same for every model."""
        order = torch.tensor(psnr).argsort(descending=True)
        n, middle = min(PICTURED, len(order)), len(order) // 2
        first = max(0, min(middle - n // 2, len(order) - n))
        chosen = {
            "best": order[:n], "median": order[first : first + n], "worst": order[-n:], "first": torch.arange(n),
        }  # fmt: skip
        titles = ["VAE", *(f"{k} token{'s' if k > 1 else ''}" for k in self.tokens), "original"]
        scale = self.picture_guidance_scale
        for name, rows in chosen.items():
            originals = torch.stack([self.images.dataset[int(row)]["image"] for row in rows])
            columns = [self.decode(k, rows, encoded, guidance_scale=scale)[0].cpu() for k in (VAE, *self.tokens)]
            save_grid([*columns, originals], titles, self.folder / "grids" / f"{name}.png")
        return {name: f"grids/{name}.png" for name in chosen}


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
