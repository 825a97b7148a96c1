"""Configs of new FlexTok models by size, in the form that published checkpoints carry."""

import copy
from collections.abc import Sequence

from ..utils.config import ConfigError, nearest
from ..vae_wrapper import check_coefficients

# The published sizes: (encoder depth, decoder depth); width is 64 x depth.
PRESETS = {"d12-d12": (12, 12), "d18-d18": (18, 18), "d18-d28": (18, 28)}


def build_config(
    encoder_depth: int = 12,
    decoder_depth: int = 12,
    encoder_width: int | None = None,
    decoder_width: int | None = None,
    head_dim: int = 64,
    n_registers: int = 256,
    fsq_levels: Sequence[int] = (8, 8, 8, 5, 5, 5),
    patch_size: int = 2,
    img_size: int = 256,
    vae: str = "stable_diffusion",
    vae_factor: int = 8,
    vae_hub_path: str | None = None,
    vae_scaling_factor: float | None = None,
    latent_channels: int = 16,
    dct_coefficients: Sequence[int] | None = None,
    dct_whitening: float = 1.0,
    repa_layers: Sequence[int] | None = None,
    keep_k_mode: str = "uniform",
    null_condition_prob: float = 0.2,
    logit_normal_sigmas: bool = False,
    stratified_sigmas: bool = False,
    mode_scale: float | None = 0.25,
    encoder_head_init: str = "zero",
    use_act_checkpoint: bool = False,
) -> dict:
    """The config of a FlexTok model, for `FlexTokFromHub(config)`.

    Args:
        encoder_depth, decoder_depth: Transformer blocks.
        encoder_width, decoder_width: Channels; None: 64 x depth.
        head_dim: Channels per attention head.
        n_registers: Largest number of tokens per image.
        fsq_levels: Levels of the quantiser per channel; their product is the codebook size.
        patch_size: Latents per patch, in each dimension.
        img_size: Side of the (square) images in pixels: sets the positional tables.
        vae: `stable_diffusion` (AutoencoderKL, downsampling by 8), `pixel` (lossless pixel unshuffle) or `dct` (the
            lowest frequencies of blocks of pixels).
        vae_factor: Downsampling of the pixel and DCT VAEs.
        vae_hub_path: Weights of the AutoencoderKL, e.g. EPFL-VILAB/flextok_vae_c16 (or ...c16@revision); None: random.
        vae_scaling_factor: Factor on the latents; None: the AutoencoderKL's own, 0.5 for pixels, 1 for `dct`.
        latent_channels: Channels of the AutoencoderKL's latents (4, 8 or 16 as published).
        dct_coefficients: Kept coefficients of each block for `dct`: of brightness, and of each colour difference; None:
            10 and 3, or as many as a block has.
        dct_whitening: 1: they have about unit variance each; 0: as they are, so that low frequencies weigh more in the
            losses; or between the two.
        repa_layers: Decoder blocks whose output is kept for REPA, 0 the first; None: 1, or 0 where it is the only one.
        keep_k_mode: How nested dropout draws the number of kept tokens: `uniform`, `pow2` or `uniform_pow2`.
        null_condition_prob: Probability that an image is trained without its tokens, for guidance.
        logit_normal_sigmas, stratified_sigmas, mode_scale: See MinRFNoiseModule.
        encoder_head_init: `zero`, `xavier` or `trunc_normal`, for the layer in front of the quantiser. With `zero` all
            images have the same tokens at first, and the quantiser's input grows only as far as training needs it;
            with `xavier` it soon saturates the quantiser's tanh. README_EXPERIMENTS.md compares trainings.
        use_act_checkpoint: Gradient checkpointing.

    Raises:
        ConfigError: Sizes that do not fit each other.
    """
    factor = 8 if vae == "stable_diffusion" else vae_factor
    encoder_width = 64 * encoder_depth if encoder_width is None else encoder_width
    decoder_width = 64 * decoder_depth if decoder_width is None else decoder_width
    sizes = dict(
        head_dim=head_dim, encoder_depth=encoder_depth, decoder_depth=decoder_depth, encoder_width=encoder_width,
        decoder_width=decoder_width, n_registers=n_registers, patch_size=patch_size,
        img_size=img_size, vae_factor=factor, latent_channels=latent_channels,
    )  # fmt: skip
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} is {size}, expected at least 1")
        if name.endswith("width") and (size % head_dim or size % 4):
            raise ConfigError(
                f"{name} is {size}, expected a multiple of head_dim {head_dim} and of 4 (by default it is 64 x depth)"
            )
    if img_size % (factor * patch_size):
        raise ConfigError(
            f"img_size is {img_size}, expected a multiple of {factor * patch_size} (VAE factor {factor} "
            f"x patch_size {patch_size})"
        )
    repa_layers = [min(1, decoder_depth - 1)] if repa_layers is None else sorted(repa_layers)
    if any(not 0 <= layer < decoder_depth for layer in repa_layers):
        raise ConfigError(f"repa_layers is {repa_layers}, but the decoder's layers are 0 to {decoder_depth - 1}")

    if vae == "stable_diffusion":
        channels = latent_channels
        vae_config = _part(
            "vae_wrapper.StableDiffusionVAE", latent_channels=channels, scaling_factor=vae_scaling_factor,
            hf_hub_path=vae_hub_path, sample_posterior=True, vae_kl_loss_write_key="vae_kl_loss", frozen=True,
        )  # fmt: skip
    elif vae == "pixel":
        channels = 3 * factor**2
        vae_config = _part("vae_wrapper.PixelUnshuffleVAE", factor=factor)
    elif vae == "dct":
        if dct_coefficients is None:
            dct_coefficients = [min(n, factor**2) for n in (10, 3)]
        check_coefficients(dct_coefficients, factor, "dct_coefficients")
        channels = dct_coefficients[0] + 2 * dct_coefficients[1]
        coefficients = list(dct_coefficients)
        vae_config = _part("vae_wrapper.BlockDCTVAE", factor=factor, coefficients=coefficients, whitening=dct_whitening)
    else:
        raise ConfigError(f"vae is {vae!r}, expected 'stable_diffusion', 'pixel' or 'dct'")
    if vae_scaling_factor is not None:
        vae_config["scaling_factor"] = vae_scaling_factor
    vae_config.update(
        images_read_key="rgb", vae_latents_read_key="vae_latents_reconst", vae_latents_write_key="vae_latents",
        images_reconst_write_key="rgb_reconst", force_vae_encode=False,
    )  # fmt: skip

    # What encoder and decoder have in common
    grid = [img_size // factor // patch_size] * 2
    preprocessors, postprocessors = "model.preprocessors", "model.postprocessors"

    def permute(read_key: str, write_key: str, function: str) -> dict:
        operation = _part(f"model.utils.dict_ops.{function}", _partial_=True)
        return _part(
            "model.utils.dict_ops.PerSampleOp", read_key=read_key, write_key=write_key, per_sample_op=operation
        )

    def patch_embedder(read_key: str, write_key: str, n_patches_key: str, dim: int) -> dict:
        return _part(
            f"{preprocessors}.patching.PatchEmbedder", input_tensor_list_read_key=read_key,
            patches_list_write_key=write_key, n_patches_write_key=n_patches_key, channels_in=channels, dim=dim,
            patch_sizes=[patch_size, patch_size], flatten_patches=False,
        )  # fmt: skip

    def posemb(key: str, dim: int, max_sizes: list[int], posemb_type: str) -> dict:
        return _part(
            "model.utils.posembs.PositionalEmbeddingAdder", read_key=key, write_key=key, dim=dim, max_sizes=max_sizes,
            posemb_type=posemb_type, posemb_scaling="absolute",
        )  # fmt: skip

    def packer(read_keys: list[str], prefix: str, block_mask_key: str, mask_mode: str, **more) -> dict:
        return _part(
            f"{preprocessors}.flex_seq_packing.BlockWiseSequencePacker", input_list_read_keys=read_keys,
            packed_seq_write_key=f"{prefix}_packed_seq", block_mask_write_key=block_mask_key,
            inner_packed_shapes_write_key=f"{prefix}_ps_inner", outer_packed_shapes_write_key=f"{prefix}_ps_outer",
            mask_mode=mask_mode, pad_to_multiple=128, compile_block_mask=False, return_materialized_mask=False, **more,
        )  # fmt: skip

    def transformer(key: str, dim: int, depth: int, block_mask_key: str, **more) -> dict:
        return _part(
            "model.trunks.transformers.FlexTransformer", input_seq_read_key=key, output_seq_write_key=key, dim=dim,
            depth=depth, head_dim=head_dim, block_mask_read_key=block_mask_key, use_act_checkpoint=use_act_checkpoint,
            **more,
        )  # fmt: skip

    def unpacker(read_key: str, write_keys: list[str], prefix: str) -> dict:
        return _part(
            f"{postprocessors}.seq_unpacking.SequenceUnpacker", packed_seq_read_key=read_key,
            inner_seq_write_keys=write_keys, inner_packed_shapes_read_key=f"{prefix}_ps_inner",
            outer_packed_shapes_read_key=f"{prefix}_ps_outer",
        )  # fmt: skip

    encoder = {
        "enc_channels_to_last": permute("vae_latents", "vae_latents_bhwc", "channels_first_to_last"),
        "enc_patch_emb": patch_embedder(
            "vae_latents_bhwc", "enc_vae_latents_patched", "enc_n_patches", encoder_width
        ),
        "enc_posemb_module": posemb("enc_vae_latents_patched", encoder_width, grid, "sincos"),
        "enc_register_module": _part(
            f"{preprocessors}.registers.Registers1D", input_tensor_list_read_key="enc_vae_latents_patched",
            register_sizes_read_write_key="register_sizes", registers_write_key="enc_registers", dim=encoder_width,
            n_min=n_registers, n_max=n_registers, size_sampling_mode="uniform", ordering_mode="nested",
        ),
        "enc_seq_packer": packer(["enc_vae_latents_patched", "enc_registers"], "enc", "enc_block_mask", "causal_last"),
        "enc_transformer": transformer("enc_packed_seq", encoder_width, encoder_depth, "enc_block_mask"),
        "enc_unpacker": unpacker("enc_packed_seq", ["enc_vae_latents_patched", "enc_registers"], "enc"),
        "enc_to_latents": _part(
            f"{postprocessors}.heads.LinearHead", read_key="enc_registers", write_key="enc_registers",
            dim=encoder_width, dim_out=len(fsq_levels), weight_init_style=encoder_head_init, dtype_override=None,
            use_mup_readout=False,
        ),
    }  # fmt: skip
    decoder = {
        "dec_from_latents": _part(
            f"{preprocessors}.linear.LinearLayer", read_key="enc_registers_quant", write_key="dec_registers",
            dim_in=len(fsq_levels), dim=decoder_width,
        ),
        "dec_registers_posemb_module": posemb("dec_registers", decoder_width, [n_registers], "learnable_sum"),
        "dec_nested_dropout": _part(
            f"{preprocessors}.token_dropout.MaskedNestedDropout", read_write_key="dec_registers", dim=decoder_width,
            eval_keep_k_read_key="eval_keep_k", train_keep_k_write_key="train_keep_k", size_sampling_mode=keep_k_mode,
        ),
        "dec_latent_dropout": _part(
            f"{preprocessors}.nullcond.LearnedNullCond", read_write_key="dec_registers", dim=decoder_width,
            eval_drop_flag_read_key="eval_dropout_mask", dropout_prob=null_condition_prob,
        ),
        "dec_noise_channels_to_last": permute(
            "vae_latents_noised", "vae_latents_noised_bhwc", "channels_first_to_last"
        ),
        "dec_noise_patch_emb": patch_embedder("vae_latents_noised_bhwc", "dec_patches", "dec_n_patches", decoder_width),
        "dec_patches_posemb_module": posemb("dec_patches", decoder_width, grid, "sincos"),
        "dec_seq_packer": packer(
            ["dec_patches", "dec_registers"], "dec", "dec_sa_block_mask", "full",
            emb_packing_fn_write_key="dec_emb_packing_fn", per_subseq_embs=True,
        ),
        "dec_time_embedder": _part(
            f"{preprocessors}.time_embedding.TimestepEmbedder", timesteps_read_key="timesteps",
            time_embedding_write_key="dec_temb", dim=decoder_width, frequency_embedding_size=256, max_timestep=1.0,
        ),
        "dec_transformer": transformer(
            "dec_packed_seq", decoder_width, decoder_depth, "dec_sa_block_mask", adaLN_emb_read_key="dec_temb",
            adaLN_packing_fn_read_key="dec_emb_packing_fn", adaLN_expansion=2,
            intermediate_layer_write_key="dec_packed_seq_repa_layer", intermediate_layers=repa_layers,
        ),
        "dec_unpacker": unpacker("dec_packed_seq", ["dec_patches", "dec_registers"], "dec"),
        "dec_repa_unpacker": unpacker(
            "dec_packed_seq_repa_layer", ["dec_patches_repa_layer", "dec_registers_repa_layer"], "dec"
        ),
        "dec_to_patches": _part(
            f"{postprocessors}.heads.ToPatchesLinearHead", read_key="dec_patches", write_key="vae_latents_reconst",
            dim=decoder_width, channels_out=channels, patch_sizes=[patch_size, patch_size], weight_init_style="zero",
            adaLN_emb_read_key="dec_temb", use_mup_readout=False,
        ),
        "dec_channels_to_first": permute("vae_latents_reconst", "vae_latents_reconst", "channels_last_to_first"),
    }  # fmt: skip
    if not repa_layers:
        del decoder["dec_repa_unpacker"]
    return {
        "vae": vae_config,
        "encoder": _part("model.utils.wrappers.SequentialModuleDictWrapper", module_dict=encoder),
        "decoder": _part("model.utils.wrappers.SequentialModuleDictWrapper", module_dict=decoder),
        "regularizer": _part(
            "regularizers.quantize_fsq.FSQ", latents_read_key="enc_registers", quants_write_key="enc_registers_quant",
            tokens_write_key="tokens", levels=list(fsq_levels), drop_quant_p=0.0, corrupt_tokens_p=0.0,
            min_corrupt_tokens_p=0.0, apply_corrupt_tokens_p=0.0,
        ),
        "flow_matching_noise_module": _part(
            "flow_matching.noise_modules.MinRFNoiseModule", clean_images_read_key="vae_latents",
            noised_images_write_key="vae_latents_noised", timesteps_write_key="timesteps", sigmas_write_key="sigmas",
            ln=logit_normal_sigmas, stratisfied=stratified_sigmas, mode_scale=mode_scale or 0.0,
            noise_write_key="flow_noise",
        ),
        "pipeline": _part(
            "flow_matching.pipelines.MinRFPipeline", _partial_=True, noise_read_key="flow_noise",
            latents_read_key="enc_registers_quant", timesteps_read_key="timesteps",
            noised_images_read_key="vae_latents_noised", reconst_write_key="vae_latents_reconst",
            out_channels=channels,
        ),
    }  # fmt: skip


def _part(name: str, **arguments) -> dict:
    """The config of the object flextok.`name`."""
    return {"_target_": f"flextok.{name}", **arguments}


def preset_config(name: str, **overrides) -> dict:
    """The config of a published size, `d12-d12`, `d18-d18` or `d18-d28`; `overrides` are arguments of build_config."""
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}{nearest(name, PRESETS)}, only {', '.join(PRESETS)}")
    encoder_depth, decoder_depth = PRESETS[name]
    return build_config(**{"encoder_depth": encoder_depth, "decoder_depth": decoder_depth, **overrides})


def with_flow(
    config: dict,
    keep_k_mode: str | None = None,
    null_condition_prob: float | None = None,
    logit_normal_sigmas: bool | None = None,
    logit_normal_mean: float | None = None,
    logit_normal_std: float | None = None,
    mode_scale: float | None = None,
    stratified_sigmas: bool | None = None,
    shift: float | None = None,
) -> dict:
    """A copy of a model's config with other settings of flow matching, those that are not None.

    Args:
        keep_k_mode, null_condition_prob, logit_normal_sigmas, mode_scale, stratified_sigmas: See build_config.
        logit_normal_mean, logit_normal_std, shift: `ln_mean`, `ln_std` and `shift` of MinRFNoiseModule; the shift is
            that of the sampler too.

    Raises:
        ConfigError: The decoder has no module that a setting is for.
    """
    config = copy.deepcopy(config)
    decoder = [m for m in config["decoder"].get("module_dict", {}).values() if isinstance(m, dict)]
    of_decoder = [  # setting, its value, the classes and the argument that it is for
        ("keep_k_mode", keep_k_mode, "MaskedNestedDropout", "size_sampling_mode"),
        ("null_condition_prob", null_condition_prob, "NullCond", "dropout_prob"),
    ]
    for name, value, kind, argument in of_decoder:
        modules = [module for module in decoder if str(module.get("_target_")).endswith(kind)]
        if value is not None and not modules:
            raise ConfigError(f"flow.{name} is {value}, but the model's decoder has no {kind}: set it to null")
        for module in modules if value is not None else []:
            module[argument] = value
    noise = dict(
        ln=logit_normal_sigmas, ln_mean=logit_normal_mean, ln_std=logit_normal_std, mode_scale=mode_scale,
        stratisfied=stratified_sigmas, shift=shift,
    )  # fmt: skip
    config["flow_matching_noise_module"].update({key: value for key, value in noise.items() if value is not None})
    if shift is not None:
        config["pipeline"]["shift"] = shift
    return config


def with_fsq_levels(config: dict, levels: Sequence[int]) -> tuple[dict, list[str]]:
    """A copy of a model's config with other FSQ levels, and the names of the two layers that must be made anew.

    They are the encoder's last layer, which writes what FSQ reads, and the decoder's first, which reads what FSQ
    writes; found by their keys in the config.

    Raises:
        ConfigError: The config has no such layers.
    """
    config = copy.deepcopy(config)
    fsq, encoder, decoder = config["regularizer"], config["encoder"]["module_dict"], config["decoder"]["module_dict"]
    into = [n for n, m in encoder.items() if m.get("write_key") == fsq["latents_read_key"] and "dim_out" in m]
    out_of = [n for n, m in decoder.items() if m.get("read_key") == fsq["quants_write_key"] and "dim_in" in m]
    if not into or not out_of:
        raise ConfigError("fsq_levels: the config has no layer before, or none after, the quantiser to rebuild")
    fsq["levels"] = list(levels)
    encoder[into[-1]]["dim_out"] = decoder[out_of[0]]["dim_in"] = len(levels)
    return config, [f"encoder.module_dict.{into[-1]}", f"decoder.module_dict.{out_of[0]}"]
