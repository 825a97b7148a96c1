"""The model that a training config asks for."""

import logging
import os
import shutil
from pathlib import Path

import torch
import torch.nn as nn

from ..flextok_wrapper import (
    CONFIG_NAME,
    FLOW_NAME,
    WEIGHTS_NAME,
    FlexTokFromHub,
    build_model,
    flat_config,
    hub_flow_file,
    saved_config,
    weights_file,
)
from ..model.builder import PRESETS, build_config, preset_config, with_flow, with_fsq_levels
from ..model.preprocessors.patching import PatchEmbedder
from ..model.trunks.transformers import TransformerBlock
from ..model.utils.posembs import PositionalEmbedding
from ..utils.checkpoint import CheckpointError, load_metadata, load_safetensors
from ..utils.config import ConfigError
from ..utils.dtypes import DTYPES, computes_bf16, faster_in_bf16, name_of
from ..utils.modules import evaluating
from ..utils.plain import read_json_object
from ..utils.processes import from_first
from ..utils.random import RANDOM_KEY, BatchRandom, address_key
from .config import TrainConfig
from .readout import TokenReadout

log = logging.getLogger(__name__)

BF16_WIDTH = 512  # on CPUs casts cost narrower models more than the faster products save


def new_model_config(config: TrainConfig) -> dict:
    """The FlexTok config of `model`, the settings of a new model by size; its VAE is a published one by default."""
    arguments = {"img_size": config.img_size, **config.model}
    preset = arguments.pop("preset", None)
    if arguments.get("vae", "stable_diffusion") == "stable_diffusion":
        arguments.setdefault("vae_hub_path", f"EPFL-VILAB/flextok_vae_c{arguments.get('latent_channels', 16)}")
        if arguments["vae_hub_path"] is None and not config.train_vae:
            raise ConfigError(
                "model.vae_hub_path is null and train_vae false: a frozen VAE of random weights is of no use"
            )
    try:
        return build_config(**arguments) if preset is None else preset_config(preset, **arguments)
    except TypeError as error:
        raise ConfigError(f"model: {error}") from error


def _files(model_name: str) -> "tuple[Path | None, Path | None]":
    """(config.json, weights) of a local model; (None, None) if the name is not local."""
    path = Path(model_name)
    if path.is_dir():
        try:
            weights = weights_file(path)
        except FileNotFoundError as error:
            raise ConfigError(f"model_name: {error}") from error
        return (path / CONFIG_NAME if (path / CONFIG_NAME).is_file() else None), weights
    if path.is_file():
        return None, path
    if path.suffix == ".safetensors" or path.is_absolute() or model_name.startswith("."):
        raise ConfigError(f"model_name: there is no file or folder {model_name}")
    return None, None


def known_model_config(config: TrainConfig) -> dict | None:
    """The FlexTok config of the run's model as far as it can be told without loading weights or asking the Hub.

    Published names are known by their size; None for other Hub names.
    """
    if config.model is not None:
        return new_model_config(config)
    config_file, weights = _files(config.model_name)
    if weights is None:
        for preset in PRESETS:
            if preset.replace("-", "_") in config.model_name:
                return preset_config(preset)
        return None
    if config_file is not None:
        return flat_config(read_json_object(config_file))
    try:
        header = load_metadata(weights)
    except CheckpointError as error:
        raise CheckpointError(f"model_name: {error}") from error
    if "encoder" not in header and "config" not in header:
        raise ConfigError(f"model_name: {weights} has no config, neither {CONFIG_NAME} beside it nor in its header")
    return flat_config(header)


def with_settings(model_config: dict, config: TrainConfig) -> tuple[dict, list[str]]:
    """A model's config with the settings `fsq_levels` and `flow`, and the layers that need new weights by them."""
    fresh: list[str] = []
    if config.fsq_levels is not None and config.fsq_levels != model_config["regularizer"].get("levels"):
        model_config, fresh = with_fsq_levels(model_config, config.fsq_levels)
    if config.flow is not None:
        model_config = with_flow(model_config, **config.flow.model_dump())
    return model_config, fresh


def model_without_weights(config: TrainConfig) -> FlexTokFromHub | None:
    """The run's model on the meta device, checked against the settings; None if its config is still on the Hub.

    Raises:
        ConfigError: The model does not take images of `img_size`, or has no layer that REPA could align.
    """
    model_config = known_model_config(config)
    if model_config is None:
        return None
    model_config, _ = with_settings(model_config, config)
    model_config["vae"].pop("hf_hub_path", None)
    with torch.device("meta"):
        model = FlexTokFromHub(model_config)
    if config.posemb_scaling == "interpolate":
        interpolate_posembs(model, config.img_size)
    check_image_size(model, config.img_size)
    if config.use_repa:
        check_repa_model(model, config.repa_layers)
    return model


def load_model(config: TrainConfig) -> FlexTokFromHub:
    """Build or load the model of a run, on the CPU.

    New weights depend on `seed` alone and leave torch's global random state as it was.

    Raises:
        ConfigError, CheckpointError: Nothing there, or it does not fit; the message says what.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(address_key(config.seed, "model") >> 1)
        if config.model is not None:
            return FlexTokFromHub(with_settings(new_model_config(config), config)[0])
        model_config, tensors = _fetch(config.model_name, config.model_revision)
        model_config, fresh = with_settings(model_config, config)
        if config.train_from_scratch:
            fresh = ["encoder", "decoder"]
        model = build_model(model_config, tensors, config.model_name, fresh=fresh)
        if config.posemb_scaling == "interpolate":
            interpolate_posembs(model, config.img_size)
        return model


def _fetch(model_name: str, revision: str | None = None) -> "tuple[dict, dict]":
    """(config, tensors) of a folder, a file, or a Hub repository, there of a revision."""
    config_file, weights = _files(model_name)
    if weights is not None and revision is not None:
        raise ConfigError(f"model_revision is {revision}, but model_name is {model_name}, on this machine: remove it")
    if weights is not None:
        flow_file = weights.with_name(FLOW_NAME) if weights.name == WEIGHTS_NAME else None
    else:
        from huggingface_hub import hf_hub_download

        try:
            config_file, weights = (
                Path(hf_hub_download(model_name, name, revision=revision)) for name in (CONFIG_NAME, WEIGHTS_NAME)
            )
            flow_file = hub_flow_file(model_name, revision=revision)
        except (OSError, ValueError) as error:
            at = "" if revision is None else f" --revision {revision}"
            raise ConfigError(
                f"model_name: {model_name!r} is neither a folder, nor in the Hugging Face cache, nor can it be "
                f"downloaded ({error}). Without network, run `hf download {model_name}{at}` elsewhere and copy the "
                "folder here"
            ) from error
    tensors, header = load_safetensors(weights)
    if config_file is not None:
        header = read_json_object(config_file)
    return saved_config(header, flow_file), tensors


def settled(
    config: TrainConfig, model: nn.Module | None, device: torch.device, resumed: dict | None = None
) -> TrainConfig:
    """A copy of the config with what it leaves open decided: use_amp, repa_encoder_dtype, readout_weight.

    Args:
        model: The model, which may be on the meta device; None if it is not known yet.
        resumed: The config of the checkpoint that the run continues from, whose decisions stay, whatever the machine;
            so does that of a feature cache which is there.
    """
    decided, resumed = {}, resumed or {}
    if config.use_amp == "auto":
        decided["use_amp"] = resumed.get("use_amp", "auto")
    if decided.get("use_amp") == "auto":
        width = 1152 if model is None else model.decoder.module_dict["dec_transformer"].dim
        decided["use_amp"] = device.type == "cuda" or from_first(
            lambda: width >= BF16_WIDTH and faster_in_bf16(device, width, 8 * width // 3)
        )
    if config.use_repa and config.repa_encoder_dtype == "auto":
        from ..data.caching import stored_encoder_dtype  # a run without REPA needs none of it
        from ..model.utils.repa_encoders import encoder_dtype

        was = resumed.get("repa_encoder_dtype", "auto")
        if was == "auto" and config.repa_cache:
            was = from_first(lambda: stored_encoder_dtype(config)) or "auto"
        if was != "auto" or device.type == "cpu":
            decided["repa_encoder_dtype"] = from_first(lambda: name_of(encoder_dtype(was, device)))
    if config.readout_weight is None:
        decided["readout_weight"] = resumed.get("readout_weight", 0.0) if resumed else config.settled_readout_weight
    return config.model_copy(update=decided)


def build_readout(config: TrainConfig, model: nn.Module) -> TokenReadout | None:
    """The read-out of a model's tokens that is trained beside it, on the CPU; None if the settings ask for none."""
    if not config.uses_readout:
        return None
    side = config.img_size // model.vae.downsample_factor
    n_latents = model.vae.latent_channels * side**2
    return TokenReadout(model.n_registers, len(model.regularizer.levels), n_latents, config.seed)


def set_vae_dtype(config: TrainConfig, vae: nn.Module, device: torch.device) -> None:
    """Let a frozen VAE compute in what the setting `vae_dtype` means on a device; a trained one stays as it is."""
    if config.train_vae or not hasattr(vae, "dtype_override"):
        return
    if config.vae_dtype != "auto":
        vae.dtype_override = DTYPES[config.vae_dtype]
    elif config.use_amp and device.type == "cuda" and computes_bf16(device):
        vae.dtype_override = torch.bfloat16


def select_trained_parameters(config: TrainConfig, model: nn.Module, device: torch.device) -> None:
    """Freeze what the settings do not train, and set gradient checkpointing and the VAE's precision.

    Raises:
        ConfigError: A VAE without parameters is to be trained.
    """
    for name, part in (("encoder", model.encoder), ("decoder", model.decoder)):
        part.requires_grad_(getattr(config, f"train_{name}"))
        for module in part.modules():
            if getattr(module, "posemb_type", None) == "sincos":
                module.requires_grad_(False)  # a table, not a weight
            if hasattr(module, "use_act_checkpoint"):
                module.use_act_checkpoint = config.gradient_checkpointing
    vae = model.vae
    if config.train_vae and not any(True for _ in vae.parameters()):
        raise ConfigError("train_vae is true, but this model's VAE has no parameters")
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(config.train_vae and name != "logvar")  # which plays no part in any loss
    vae.frozen = not config.train_vae
    vae.force_vae_encode = False  # a trained VAE's latents come from its own loss; others are never there
    set_vae_dtype(config, vae, device)


def compile_blocks(model: nn.Module) -> None:
    """Compile each transformer block: all of a width share one graph, and it goes together with DDP and FSDP.

    Raises:
        ConfigError: There is no C++ compiler, which torch.compile needs.
    """
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    if not any(map(shutil.which, compilers)):
        raise ConfigError(
            f"compile is true, but there is no C++ compiler ({' or '.join(compilers)}): install g++, or set CXX or "
            "compile: false"
        )
    for module in model.modules():
        if isinstance(module, TransformerBlock):
            module.compile()


def latents_side(model: nn.Module, img_size: int) -> int:
    """Side of the latents of square images; raises ConfigError if the VAE makes none of this size."""
    factor = getattr(model.vae, "downsample_factor", None)
    if factor is None:
        raise ConfigError(f"the model's vae is a {type(model.vae).__name__}, which makes no latents of images")
    if img_size % factor:
        raise ConfigError(f"img_size is {img_size}, expected a multiple of {factor}, the VAE's pixels per latent")
    return img_size // factor


def interpolate_posembs(model: FlexTokFromHub, img_size: int) -> None:
    """Resize the positional tables of a model's patches to images of another size; its config says so afterwards."""
    side = latents_side(model, img_size)
    for part in ("encoder", "decoder"):
        modules = getattr(model, part).module_dict
        patch_sizes = next(module.patch_sizes for module in modules.values() if isinstance(module, PatchEmbedder))
        if any(side % size for size in patch_sizes):
            raise ConfigError(
                f"img_size is {img_size}, expected a multiple of {max(patch_sizes) * model.vae.downsample_factor}, the "
                "pixels per patch"
            )
        grid = [side // size for size in patch_sizes]
        for name, module in modules.items():
            if isinstance(module, PositionalEmbedding) and len(module.max_sizes) == len(grid):
                module.resize(grid)
                model.config[part]["module_dict"][name].update(max_sizes=grid, posemb_scaling="interpolate")


def check_image_size(model: nn.Module, img_size: int) -> None:
    """Raise ConfigError unless the model takes square images of this size; `model` is on the meta device."""
    side = latents_side(model, img_size)
    with torch.device("meta"), torch.no_grad(), evaluating(model):
        latents = torch.empty(1, model.vae.latent_channels, side, side)
        draws = BatchRandom(0, 0, torch.zeros(1, dtype=torch.long))
        data_dict = {model.vae.vae_latents_write_key: latents, RANDOM_KEY: draws}
        try:
            model.decoder(model.flow_matching_noise_module(model.regularizer(model.encoder(data_dict))))
        except ValueError as error:
            raise ConfigError(f"img_size {img_size} does not fit the model: {error}") from error
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:  # parts that do not fit each other
            raise ConfigError(f"the model's config makes no working model: {type(error).__name__}: {error}") from error


def check_repa_model(model: nn.Module, layers: list[int] | None = None) -> list[int]:
    """The decoder layers that REPA aligns: `layers`, by default those that the model's config keeps.

    Raises:
        ConfigError: The decoder keeps no activation and cannot unpack one, or has no such layer.
    """
    modules = model.decoder.module_dict
    for name in ("dec_transformer", "dec_repa_unpacker"):
        if name not in modules:
            raise ConfigError(
                f"use_repa is true, but the model's decoder has no {name!r}: use a model whose config has it"
            )
    transformer = modules["dec_transformer"]
    layers = transformer.intermediate_layers if layers is None else layers
    if transformer.intermediate_layer_write_key is None or not layers:
        raise ConfigError(
            "use_repa is true, but dec_transformer keeps no intermediate layer: its config needs "
            "intermediate_layer_write_key: dec_packed_seq_repa_layer and intermediate_layers: [1]"
        )
    if max(layers) >= transformer.depth:
        raise ConfigError(f"repa_layers is {layers}, but the decoder has the layers 0 to {transformer.depth - 1}")
    return list(layers)


def decoder_grid(model: nn.Module, img_size: int) -> tuple[int, int]:
    """Rows and columns of the decoder's patches for square images of this size."""
    embedder = next(module for module in model.decoder.modules() if isinstance(module, PatchEmbedder))
    latents = img_size // model.vae.downsample_factor
    return latents // embedder.patch_sizes[0], latents // embedder.patch_sizes[1]


def repa_target_size(config: TrainConfig, model: nn.Module) -> tuple[int, int]:
    """The grid (H, W) that `repa_target_size` means for this model."""
    if config.repa_target_size != "auto":
        return tuple(config.repa_target_size)
    from ..model.utils.repa_loss import auto_target_size, encoder_facts

    facts = encoder_facts(config.repa_encoder_type, config.repa_image_size)
    return auto_target_size(facts.grid, decoder_grid(model, config.img_size))


def build_repa_module(config: TrainConfig, model: nn.Module, device: torch.device) -> nn.Module:
    """The REPAModule of these settings for a model's decoder, on the device; its encoder is not loaded yet.

    Raises:
        ConfigError: Settings that do not fit each other, the model or the device.
    """
    from ..model.utils.repa_encoders import encoder_dtype  # a run without REPA needs none of it
    from ..model.utils.repa_loss import REPAModule

    layers = check_repa_model(model, config.repa_layers)
    try:
        module = REPAModule(
            decoder_dim=model.decoder.module_dict["dec_transformer"].dim,
            encoder_type=config.repa_encoder_type,
            encoder_dim=config.repa_encoder_dim,
            target_size=repa_target_size(config, model),
            image_size=config.repa_image_size,
            encoder_repo=config.repa_encoder_repo,
            encoder_weights=config.repa_encoder_weights,
            encoder_revision=config.repa_encoder_revision,
            encoder_trust=config.repa_encoder_trust,
            encoder_dtype=encoder_dtype(config.repa_encoder_dtype, device),
            n_layers=len(layers),
            projector=config.repa_projector,
            hidden_dim=config.repa_projector_hidden,
            project_when=config.repa_project,
            spatial_norm=config.repa_spatial_norm_gamma if config.repa_spatial_norm else None,
            seed=config.seed,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return module.to(device)


def check_repa_settings(config: TrainConfig, device: torch.device) -> None:
    """Raise ConfigError unless encoder, dimensions, image size and dtype fit each other; loads nothing."""
    from ..model.utils.repa_encoders import encoder_dtype
    from ..model.utils.repa_loss import check_encoder_settings, check_trust, encoder_facts

    try:
        check_encoder_settings(config.repa_encoder_type, config.repa_encoder_dim, config.repa_image_size)
        encoder_dtype(config.repa_encoder_dtype, device)
        grid = encoder_facts(config.repa_encoder_type, config.repa_image_size).grid
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.repa_spatial_norm and min(grid) < 2:
        raise ConfigError(
            f"repa_spatial_norm is true, but {config.repa_encoder_type} gives a grid of {grid[0]}x{grid[1]}, which has "
            "no spread over positions: set a larger repa_image_size"
        )
    for key in ("repa_encoder_repo", "repa_encoder_weights"):
        path = getattr(config, key)
        if path is not None and not Path(path).expanduser().exists():
            raise ConfigError(f"{key}: there is nothing at {path}")
    if config.repa_encoder_repo is not None:
        check_trust(config.repa_encoder_repo, config.repa_encoder_trust)
