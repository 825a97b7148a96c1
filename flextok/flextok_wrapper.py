"""FlexTok: images to ordered discrete tokens and back (arXiv 2502.13967)."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from .flow_matching.pipelines import Sizes
from .utils.batching import dense_batches
from .utils.checkpoint import (
    CheckpointError,
    PathLike,
    advice_on_training_checkpoint,
    check_weights,
    clean_key,
    load_safetensors,
    load_weights,
    save_safetensors,
)
from .utils.config import ConfigError, instantiate, shown
from .utils.files import write_atomically
from .utils.modules import evaluating
from .utils.plain import read_json_object
from .utils.random import BatchRandom

PARTS = ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline")
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
# Constructor arguments that the published package lacks, by part. A saved model has them in a file of their own: the
# published package reads config.json and the weights' header and builds all that is in them, so nothing may be there
# that its constructors refuse; other files it does not ask for. Without this file a model samples in equal steps.
FLOW_NAME = "flow.json"
FLOW_ARGUMENTS = {"flow_matching_noise_module": ("ln_mean", "ln_std", "shift"), "pipeline": ("shift",)}


def flat_config(config: dict) -> dict:
    """The parts of a FlexTok config, which may stand at its top or under the key `config`; raises ConfigError."""
    config = config if isinstance(config, dict) else {}
    config = config["config"] if isinstance(config.get("config"), dict) else config
    missing = [part for part in PARTS if not isinstance(config.get(part), dict)]
    if missing:
        raise ConfigError(f"config: {', '.join(missing)} missing; a FlexTok config is a dict of {', '.join(PARTS)}")
    return {part: config[part] for part in PARTS}


def saved_config(config: dict, flow_file: Path | None) -> dict:
    """The parts of a saved config, with the arguments that FLOW_NAME beside it holds; raises ConfigError."""
    config = flat_config(config)
    arguments = read_json_object(flow_file) if flow_file is not None and flow_file.is_file() else {}
    for part, given in arguments.items():
        if part not in FLOW_ARGUMENTS or not isinstance(given, dict) or not given.keys() <= set(FLOW_ARGUMENTS[part]):
            raise ConfigError(f"{flow_file} has {shown({part: given})}, expected arguments as in {FLOW_ARGUMENTS}")
        config[part] = {**config[part], **given}
    return config


def hub_flow_file(name: str, **download) -> Path | None:
    """FLOW_NAME of a model on the Hub, None if it has none; `download` as those of hf_hub_download."""
    try:
        return Path(hf_hub_download(name, FLOW_NAME, **download))
    except EntryNotFoundError:
        return None


def weights_file(folder: Path) -> Path:
    """The weights in the folder of a saved model; raises FileNotFoundError, with where they are if it is a run's."""
    if (folder / WEIGHTS_NAME).is_file():
        return folder / WEIGHTS_NAME
    if (folder / "export" / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"the folder {folder} has no {WEIGHTS_NAME}, but {folder / 'export'} has: give that")
    raise FileNotFoundError(f"the folder {folder} has no {WEIGHTS_NAME}")


class FlexTok(nn.Module):
    """An image tokenizer: VAE, encoder to registers, FSQ to tokens, and a flow decoder back to VAE latents.

    Methods take a `data_dict`, add to it and return it. Its values are batches [B, ...] or lists of [1, ...] tensors;
    what goes in comes out, and lists may mix image sizes. Images are [B, 3, H, W] in [-1, 1].

    Args:
        vae: Images <-> latents, by its methods `encode` and `decode`.
        encoder, decoder: Modules on the data_dict.
        regularizer: FSQ.
        flow_matching_noise_module: Noises the latents, for training.
        pipeline: Factory of the sampler, called with `model=decoder`.

    Raises:
        ConfigError: A part that is no module, or a pipeline that takes no model.
    """

    def __init__(
        self,
        vae: nn.Module,
        encoder: nn.Module,
        decoder: nn.Module,
        regularizer: nn.Module,
        flow_matching_noise_module: nn.Module,
        pipeline: Callable,
    ):
        super().__init__()
        modules = (vae, encoder, decoder, regularizer, flow_matching_noise_module)
        for part, module in zip(PARTS, modules):
            if not isinstance(module, nn.Module):
                raise ConfigError(f"{part} is a {type(module).__name__}, expected a module")
            setattr(self, part, module)
        try:
            self.pipeline = pipeline(model=decoder)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"pipeline: no sampler can be made of it: {error}") from error

    @property
    def device(self) -> torch.device:
        """Where the decoder is."""
        return next(self.decoder.parameters()).device

    @property
    def n_registers(self) -> int:
        """Largest number of tokens per image."""
        return next(module.n_max for module in self.encoder.modules() if hasattr(module, "n_max"))

    def kept_tokens(self, counts: Sequence[int]) -> dict:
        """Entries of a data_dict that let the decoder see the first counts[i] tokens of image i, in evaluation mode."""
        keys = {m.eval_keep_k_read_key for m in self.decoder.modules() if hasattr(m, "eval_keep_k_read_key")}
        return {key: list(counts) for key in keys}

    def drawn_token_counts(self, random: BatchRandom) -> dict:
        """Entries of a data_dict that in evaluation mode let the decoder see as many tokens as training would draw."""
        modules = [m for m in self.decoder.modules() if hasattr(m, "sample_keep_k")]
        return {m.eval_keep_k_read_key: m.sample_keep_k(random, self.n_registers) for m in modules}

    @dense_batches
    def forward(self, data_dict: dict) -> dict:
        """Training pass: encode, quantise, noise the latents, predict the velocity [B, C, h, w].

        The decoder also leaves the activations that REPA reads.
        """
        data_dict = self.encode(data_dict)
        data_dict = self.flow_matching_noise_module(data_dict)
        return self.decoder(data_dict)

    @dense_batches
    def encode(self, data_dict: dict) -> dict:
        """Images [B, 3, H, W], or latents [B, C, h, w] if the VAE takes them, to registers [B, L, c] and tokens [B, L].

        Raises:
            ValueError: Images that are not floats, or of a shape that the VAE does not take.
        """
        data_dict = self.vae.encode(data_dict)
        data_dict = self.encoder(data_dict)
        return self.regularizer(data_dict)

    def decode(
        self,
        data_dict: dict,
        timesteps: int = 25,
        generator: torch.Generator | None = None,
        vae_image_sizes: Sizes | None = None,
        verbose: bool = False,
        guidance_scale: float | Callable[[float], float] = 1.0,
        perform_norm_guidance: bool = False,
        noise: torch.Tensor | Sequence[torch.Tensor] | None = None,
    ) -> dict:
        """Quantised registers [B, L, c], or tokens [B, l] if there are none, to latents [B, C, h, w] and images.

        The arguments are those of MinRFPipeline. Start noise in the data_dict is used, under the pipeline's key for it,
        or that of the noise module.

        Raises:
            KeyError: Neither registers nor tokens.
            ValueError: Tokens of another shape or outside the codebook, or arguments that do not fit.
        """
        if self.regularizer.quants_write_key not in data_dict:
            self._quants_from_tokens(data_dict)
        if noise is None and self.pipeline.noise_read_key is None:  # as the training pass names it
            noise = data_dict.get(self.flow_matching_noise_module.noise_write_key)
        data_dict = self.pipeline(
            data_dict, timesteps, generator, vae_image_sizes, verbose, guidance_scale, perform_norm_guidance, noise
        )
        return self._decode_latents(data_dict)

    @dense_batches
    @torch.no_grad()
    def _decode_latents(self, data_dict: dict) -> dict:
        return self.vae.decode(data_dict)

    def autoencode(self, data_dict: dict, **decode_arguments) -> dict:
        """Encode and decode to images of the same sizes; arguments as those of `decode`."""
        data_dict = self.encode(data_dict)
        latents = data_dict[self.vae.vae_latents_write_key]
        decode_arguments.setdefault("vae_image_sizes", [tuple(image.shape[-2:]) for image in latents])
        return self.decode(data_dict, **decode_arguments)

    @torch.no_grad()
    def tokenize(self, images: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Images [B, 3, H, W] in [-1, 1] (or a list of [1, 3, H, W]) -> list of B tokens [1, L], long.

        Raises:
            ValueError: Images that are not floats, as pixels of uint8, or of a shape that the VAE does not take.
        """
        images = images if isinstance(images, torch.Tensor) else list(images)
        with evaluating(self):
            tokens = self.encode({self.vae.images_read_key: images})[self.regularizer.tokens_write_key]
        return list(tokens.split(1)) if isinstance(tokens, torch.Tensor) else tokens

    @torch.no_grad()
    def detokenize(
        self,
        token_ids_list: torch.Tensor | Sequence[torch.Tensor],
        vae_image_sizes: Sizes | None = None,
        **decode_arguments,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Tokens -> images [B, 3, H, W] in about [-1, 1]; images of several sizes come as a list of [1, 3, H, W].

        Args:
            token_ids_list: One batch [B, l], or a list of [1, l] whose lengths may differ; l <= L.
            vae_image_sizes, decode_arguments: Those of `decode`.

        Raises:
            ValueError: Tokens of another shape or outside the codebook.
        """
        tokens = token_ids_list if isinstance(token_ids_list, torch.Tensor) else list(token_ids_list)
        data_dict = {self.regularizer.tokens_write_key: tokens}
        data_dict = self.decode(data_dict, vae_image_sizes=vae_image_sizes, **decode_arguments)
        images = data_dict[self.vae.images_reconst_write_key]
        if isinstance(images, torch.Tensor) or len({image.shape for image in images}) > 1:
            return images
        return torch.cat(images)

    def _quants_from_tokens(self, data_dict: dict) -> None:
        """Write quantised registers [B, L, c] and keep_k for tokens of any length: padded with token 0, then masked."""
        key, n_codes = self.regularizer.tokens_write_key, self.regularizer.codebook_size
        if key not in data_dict:
            raise KeyError(f"decode needs {self.regularizer.quants_write_key!r} or {key!r} in the data_dict")
        tokens = data_dict[key]
        rows = [row.detach().cpu() for row in (tokens if isinstance(tokens, list) else tokens.split(1))]
        if not rows or len(rows[0]) == 0:
            raise ValueError("the list of tokens is empty")
        for i, row in enumerate(rows):
            integers = not row.is_floating_point() and row.dtype != torch.bool
            if not integers or row.ndim != 2 or len(row) != 1 or not 1 <= row.shape[1] <= self.n_registers:
                raise ValueError(
                    f"tokens of image {i} are {row.dtype} {list(row.shape)}, expected integers [1, l] with l from 1 to "
                    f"{self.n_registers}; or all images as one batch [B, l]"
                )
            if row.min() < 0 or row.max() >= n_codes:
                raise ValueError(
                    f"tokens of image {i} are {row.min()} to {row.max()}, but the codebook has 0 to {n_codes - 1}"
                )
        lengths = [row.shape[1] for row in rows]
        padded = torch.cat([F.pad(row.long(), (0, self.n_registers - row.shape[1])) for row in rows])
        quants = self.regularizer.indices_to_embedding(padded.to(self.device))
        data_dict[self.regularizer.quants_write_key] = list(quants.split(1)) if isinstance(tokens, list) else quants
        for key, counts in self.kept_tokens(lengths).items():
            data_dict.setdefault(key, counts)


class FlexTokFromHub(FlexTok, PyTorchModelHubMixin):
    """FlexTok built from a config; `from_pretrained(hub name or folder)`, `save_pretrained(folder)`, `push_to_hub`.

    Args:
        config: Tree of `_target_` dicts with the keys vae, encoder, decoder, regularizer, flow_matching_noise_module
            and pipeline, at its top or under the key `config`.

    Raises:
        ConfigError: The config cannot be built.
    """

    def __init__(self, config: dict):
        parts = flat_config(config)
        parts["pipeline"] = {**parts["pipeline"], "_partial_": True}
        super().__init__(**{part: instantiate(value, f"config.{part}") for part, value in parts.items()})
        self.config = copy.deepcopy(parts)
        self._state_to_save: dict[str, torch.Tensor] | None = None  # by push_to_hub: this model's own
        if "scaling_factor" in self.config["vae"]:  # null there means the VAE's own: a saved model says which
            self.config["vae"]["scaling_factor"] = self.vae.scaling_factor
        if self.config["vae"].get("hf_hub_path") is not None:  # without a revision, of which others know nothing
            self.config["vae"]["hf_hub_path"] = self.vae.hf_hub_path

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **arguments) -> "FlexTokFromHub":
        """Load from the Hub, its cache, or a folder, in evaluation mode on the CPU.

        Args:
            pretrained_model_name_or_path: A name on the Hub, or a folder with model.safetensors and config.json.
            arguments: `revision` (branch, tag or commit on the Hub), `cache_dir`, `force_download`,
                `local_files_only`, `token`, and `map_location`, the device.

        Raises:
            OSError: Not there, and not to be downloaded; without model.safetensors it is FileNotFoundError.
            ConfigError, CheckpointError: The config cannot be read or built, or the weights not be read, or not fit; a
                file is given in place of a folder.
        """
        path = Path(pretrained_model_name_or_path)
        if path.is_file():
            advice = advice_on_training_checkpoint(path)
            if path.suffix == ".safetensors":
                advice = "give its folder, if config.json is beside it, or use load_model_from_safetensors"
            raise CheckpointError(f"{path} is a file, expected a folder or a name on the Hub: {advice}")
        config_file = path / CONFIG_NAME
        if config_file.is_file():
            arguments.setdefault("config", read_json_object(config_file))
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **arguments)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, AttributeError) as error:
            raise ConfigError(f"the {CONFIG_NAME} of {pretrained_model_name_or_path} is no config: {error}") from error

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, map_location: str = "cpu", config: dict | None = None, **download
    ) -> "FlexTokFromHub":
        folder = Path(model_id)
        if folder.is_dir():
            path, flow_file = weights_file(folder), folder / FLOW_NAME
        else:
            path, flow_file = hf_hub_download(model_id, WEIGHTS_NAME, **download), hub_flow_file(model_id, **download)
        tensors, header = load_safetensors(path)
        if not (config or header):
            raise ConfigError(f"{model_id} has neither a config.json nor a config in the header of {WEIGHTS_NAME}")
        return build_model(saved_config(config or header, flow_file), tensors, str(model_id)).to(map_location)

    def save_pretrained(
        self, save_directory: str | Path, *, state_dict: dict[str, torch.Tensor] | None = None, **arguments
    ):
        """Write config.json, model.safetensors and flow.json (see FLOW_ARGUMENTS).

        `state_dict`: to be written instead of this model's own weights.
        """
        self._state_to_save = state_dict
        try:
            return super().save_pretrained(save_directory, **arguments)
        finally:
            self._state_to_save = None

    def _save_pretrained(self, save_directory: Path) -> None:
        state_dict = self.state_dict() if self._state_to_save is None else self._state_to_save
        config, flow = dict(self.config), {}
        for part, names in FLOW_ARGUMENTS.items():
            flow[part] = {name: value for name, value in config[part].items() if name in names}
            config[part] = {name: value for name, value in config[part].items() if name not in names}
        save_safetensors(state_dict, Path(save_directory) / WEIGHTS_NAME, config)
        # Also without such arguments, in place of what a model that was saved or pushed here before had.
        for name, content in ((FLOW_NAME, flow), (CONFIG_NAME, config)):
            text = json.dumps(content, indent=2)
            write_atomically(Path(save_directory) / name, lambda path, text=text: path.write_text(text))


def build_model(
    config: dict, state_dict: dict[str, torch.Tensor], source: str = "the checkpoint", fresh: Sequence[str] = ()
) -> FlexTokFromHub:
    """The model of a config with the weights of a state dict, in evaluation mode on the CPU; `fresh` as load_weights.

    The VAE's own weights are fetched (config key `vae.hf_hub_path`) only if the state dict does not hold them. The
    model is first built without memory and compared with the state dict: one that does not fit costs nothing.

    Raises:
        ConfigError: The config cannot be built.
        CheckpointError: As load_weights.
    """
    config = flat_config(config)
    vae, unloaded = config["vae"], config["vae"]
    if str(vae.get("_target_")).endswith(".StableDiffusionVAE"):
        unloaded = {**vae, "load_weights": False}
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        skeleton = FlexTokFromHub({**config, "vae": unloaded})
    check_weights(skeleton, state_dict, source, fresh)
    has_vae = any(clean_key(key).startswith("vae.vae.") for key in state_dict)
    model = FlexTokFromHub({**config, "vae": unloaded if has_vae else vae})
    model.config["vae"].pop("load_weights", None)
    load_weights(model, state_dict, source, fresh)
    return model.eval()


def load_model_from_safetensors(safetensors_path: PathLike, device: str | None = None) -> FlexTokFromHub:
    """Load a single-file FlexTok checkpoint, whose header holds the config; the model comes in evaluation mode.

    A flow.json beside the model.safetensors of an export adds to that config.

    Raises:
        FileNotFoundError, CheckpointError: As load_safetensors, or weights and config do not fit each other.
        ConfigError: The config in the header cannot be built.
    """
    tensors, config = load_safetensors(safetensors_path)
    if not config:
        raise CheckpointError(
            f"{safetensors_path} has no config in its header: load it with its config.json, by "
            "FlexTokFromHub.from_pretrained(folder)"
        )
    path = Path(safetensors_path)
    config = saved_config(config, path.with_name(FLOW_NAME) if path.name == WEIGHTS_NAME else None)
    return build_model(config, tensors, str(safetensors_path)).to(device or "cpu")
