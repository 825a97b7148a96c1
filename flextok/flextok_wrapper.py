"""FlexTok: images to ordered discrete tokens and back (arXiv 2502.13967)."""

import copy
import json
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Union

import torch
import torch.nn as nn
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download

from .utils.batching import dense_batches
from .utils.checkpoint import build_model, load_safetensors, save_safetensors
from .utils.config import ConfigError, check_tree, instantiate
from .utils.files import write_atomically
from .utils.modules import evaluating
from .utils.plain import read_json_object

PARTS = ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline")
WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"


def flat_config(config: Dict) -> Dict:
    """The parts of a FlexTok config, which may stand at its top or under the key `config`; raises ConfigError."""
    if isinstance(config, dict) and isinstance(config.get("config"), dict):
        config = config["config"]
    missing = [part for part in PARTS if not isinstance(config, dict) or not isinstance(config.get(part), dict)]
    if missing:
        raise ConfigError(f"config: {', '.join(missing)} missing; a FlexTok config is a dict of {', '.join(PARTS)}")
    check_tree(config)
    return {part: config[part] for part in PARTS}


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
        self.vae, self.encoder, self.decoder = vae, encoder, decoder
        self.regularizer, self.flow_matching_noise_module = regularizer, flow_matching_noise_module
        for part in PARTS[:-1]:
            if not isinstance(getattr(self, part), nn.Module):
                raise ConfigError(f"{part} is a {type(getattr(self, part)).__name__}, expected a module")
        try:
            self.pipeline = pipeline(model=decoder)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"pipeline: no sampler can be made of it: {error}") from error

    @property
    def device(self) -> torch.device:
        return next(self.decoder.parameters()).device

    @property
    def n_registers(self) -> int:
        """Largest number of tokens per image."""
        return next(module.n_max for module in self.encoder.modules() if hasattr(module, "n_max"))

    def kept_tokens(self, counts: Sequence[int]) -> dict:
        """Entries of a data_dict that let the decoder see the first counts[i] tokens of image i, in evaluation mode."""
        keys = {m.eval_keep_k_read_key for m in self.decoder.modules() if hasattr(m, "eval_keep_k_read_key")}
        return {key: list(counts) for key in keys}

    @dense_batches
    def forward(self, data_dict: dict) -> dict:
        """Training pass: encode, quantise, noise the latents, predict the velocity (and leave REPA's activations)."""
        data_dict = self._encode(data_dict)
        return self.decoder(self.flow_matching_noise_module(data_dict))

    def _encode(self, data_dict: dict) -> dict:
        return self.regularizer(self.encoder(self.vae.encode(data_dict)))

    @dense_batches
    def encode(self, data_dict: dict) -> dict:
        """Images (or latents, if the VAE takes them) to quantised registers and tokens."""
        return self._encode(data_dict)

    def decode(
        self,
        data_dict: dict,
        timesteps: int = 25,
        generator: Optional[torch.Generator] = None,
        vae_image_sizes=None,
        verbose: bool = False,
        guidance_scale: Union[float, Callable[[float], float]] = 1.0,
        perform_norm_guidance: bool = False,
    ) -> dict:
        """Quantised registers, or tokens if there are none, to latents and images; arguments as MinRFPipeline's."""
        if self.regularizer.quants_write_key not in data_dict:
            self._quants_from_tokens(data_dict)
        data_dict = self.pipeline(
            data_dict, timesteps, generator, vae_image_sizes, verbose, guidance_scale, perform_norm_guidance
        )
        with torch.no_grad():
            return self.vae.decode(data_dict)

    def autoencode(self, data_dict: dict, **decode_arguments) -> dict:
        """Encode and decode to images of the same sizes; arguments as those of `decode`."""
        data_dict = self.encode(data_dict)
        latents = data_dict[self.vae.vae_latents_write_key]
        decode_arguments.setdefault("vae_image_sizes", [tuple(image.shape[-2:]) for image in latents])
        return self.decode(data_dict, **decode_arguments)

    @torch.no_grad()
    def tokenize(self, images: Union[torch.Tensor, Sequence[torch.Tensor]]) -> List[torch.Tensor]:
        """Images [B, 3, H, W] in [-1, 1] (or a list of [1, 3, H, W]) -> list of B tokens [1, L], long."""
        images = images if isinstance(images, torch.Tensor) else list(images)
        with evaluating(self):
            tokens = self.encode({self.vae.images_read_key: images})[self.regularizer.tokens_write_key]
        return list(tokens.split(1)) if isinstance(tokens, torch.Tensor) else tokens

    @torch.no_grad()
    def detokenize(self, token_ids_list: Sequence[torch.Tensor], vae_image_sizes=None, **decode_arguments):
        """Tokens, a list of [1, l] with l <= L (lengths may differ), -> images [B, 3, H, W] in about [-1, 1].

        `vae_image_sizes` and `decode_arguments` are those of `decode`. Images of several sizes come as a list.
        """
        data_dict = {self.regularizer.tokens_write_key: list(token_ids_list)}
        data_dict = self.decode(data_dict, vae_image_sizes=vae_image_sizes, **decode_arguments)
        images = data_dict[self.vae.images_reconst_write_key]
        return images if len({image.shape for image in images}) > 1 else torch.cat(images)

    def _quants_from_tokens(self, data_dict: dict) -> None:
        """Write quantised registers and keep_k for tokens of any length: padded with token 0, then masked."""
        key, n_max = self.regularizer.tokens_write_key, self.n_registers
        if key not in data_dict:
            raise KeyError(f"decode needs {self.regularizer.quants_write_key!r} or {key!r} in the data_dict")
        tokens = data_dict[key]
        if len(tokens) == 0:
            raise ValueError("the list of tokens is empty")
        padded = torch.zeros(len(tokens), n_max, dtype=torch.long)
        lengths = []
        for i, row in enumerate(tokens):
            row = row.detach().cpu()
            integers = not row.is_floating_point() and row.dtype != torch.bool
            if not integers or row.numel() != row.shape[-1] or not 1 <= row.numel() <= n_max:
                raise ValueError(
                    f"tokens of image {i} are {row.dtype} {list(row.shape)}, expected integers [1, l] "
                    f"with l from 1 to {n_max}"
                )
            row = row.flatten()
            if row.min() < 0 or row.max() >= self.regularizer.codebook_size:
                raise ValueError(
                    f"tokens of image {i} reach from {row.min()} to {row.max()}, but the codebook has 0 to "
                    f"{self.regularizer.codebook_size - 1}"
                )
            padded[i, : len(row)] = row
            lengths.append(len(row))
        quants = self.regularizer.indices_to_embedding(padded.to(self.device))
        data_dict[self.regularizer.quants_write_key] = list(quants.split(1)) if isinstance(tokens, list) else quants
        data_dict.update({**self.kept_tokens(lengths), **data_dict})


class FlexTokFromHub(FlexTok, PyTorchModelHubMixin):
    """FlexTok built from a config; `from_pretrained(hub name or folder)`, `save_pretrained(folder)`, `push_to_hub`.

    Args:
        config: Tree of `_target_` dicts with the keys vae, encoder, decoder, regularizer, flow_matching_noise_module
            and pipeline, at its top or under the key `config`.

    Raises:
        ConfigError: The config cannot be built.
    """

    def __init__(self, config: Dict):
        parts = flat_config(config)
        parts["pipeline"] = {**parts["pipeline"], "_partial_": True}
        super().__init__(**{part: instantiate(value, f"config.{part}") for part, value in parts.items()})
        self.config = copy.deepcopy(parts)
        if "scaling_factor" in self.config["vae"]:  # null there means the VAE's own: a saved model says which
            self.config["vae"]["scaling_factor"] = self.vae.scaling_factor
        if self.config["vae"].get("hf_hub_path") is not None:  # without a revision, of which others know nothing
            self.config["vae"]["hf_hub_path"] = self.vae.hf_hub_path

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Union[str, Path], **arguments) -> "FlexTokFromHub":
        """Load from the Hub, its cache, or a folder, in evaluation mode on the CPU.

        Args:
            pretrained_model_name_or_path: A name on the Hub, or a folder with model.safetensors and config.json.
            arguments: `revision` (branch, tag or commit on the Hub), `cache_dir`, `force_download`,
                `local_files_only`, `token`, and `map_location`, the device.

        Raises:
            OSError: Not there, and not to be downloaded; without model.safetensors it is FileNotFoundError.
            ConfigError, CheckpointError: The config cannot be read or built, or the weights not be read, or not fit.
        """
        config_file = Path(pretrained_model_name_or_path) / CONFIG_NAME
        if config_file.is_file():
            arguments.setdefault("config", read_json_object(config_file))
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **arguments)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, AttributeError) as error:
            raise ConfigError(f"the {CONFIG_NAME} of {pretrained_model_name_or_path} is no config: {error}") from error

    @classmethod
    def _from_pretrained(
        cls, *, model_id, revision=None, cache_dir=None, force_download=False, local_files_only=False, token=None,
        map_location="cpu", config=None, **_
    ):  # fmt: skip
        if Path(model_id).is_dir():
            path = Path(model_id) / WEIGHTS_NAME
        else:
            path = hf_hub_download(
                repo_id=model_id, filename=WEIGHTS_NAME, revision=revision, cache_dir=cache_dir,
                force_download=force_download, token=token, local_files_only=local_files_only,
            )  # fmt: skip
        tensors, header = load_safetensors(path)
        config = config or header
        if not config:
            raise ConfigError(f"{model_id} has neither a config.json nor a config in the header of {WEIGHTS_NAME}")
        return build_model(config, tensors, str(model_id)).to(map_location)

    def save_pretrained(self, save_directory, *, state_dict: Optional[Dict[str, torch.Tensor]] = None, **arguments):
        """Write config.json and model.safetensors; `state_dict` instead of this model's own weights, if given."""
        self._state_to_save = state_dict
        try:
            return super().save_pretrained(save_directory, **arguments)
        finally:
            self._state_to_save = None

    def _save_pretrained(self, save_directory: Path) -> None:
        state_dict = getattr(self, "_state_to_save", None)
        state_dict = self.state_dict() if state_dict is None else state_dict
        save_safetensors(state_dict, Path(save_directory) / WEIGHTS_NAME, self.config)
        text = json.dumps(self.config, indent=2)
        write_atomically(Path(save_directory) / CONFIG_NAME, lambda path: path.write_text(text))
