"""The settings of a training run: one typed field each, with its meaning; also what checks a YAML file.

`python -m flextok.training.config` writes configs/schema.json, by which editors complete and check the YAML files, and
prints the tables of README_SETTINGS.md and README_REPA.md.
"""

import difflib
import json
import logging
import math
import os
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from ..utils.config import ConfigError, nearest, shown
from ..utils.plain import parse_yaml

log = logging.getLogger("flextok")

SPECIAL_DATASETS = ("celebahq", "imagefolder", "hf", "webdataset", "digits", "photos")  # others: a folder of images
SCHEMA = "configs/schema.json"

T = TypeVar("T")
Count = Annotated[int, Field(ge=1)]
Pair = Annotated[list[T], Field(min_length=2, max_length=2)]
UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
TEXT = (str, str | None, UserPath | None, UserPath | list[UserPath] | None)  # types of settings that are text
STRICT = ConfigDict(
    extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
)


class FlowSettings(BaseModel):
    """How the model's flow is trained and sampled; null: as the model's own config says."""

    model_config = STRICT

    keep_k_mode: Literal["uniform", "pow2", "uniform_pow2"] | None = None
    """How nested dropout draws the number k of kept tokens: from 1 to all of them, a power of two, or uniform and then
    rounded up to a power of two."""
    null_condition_prob: Annotated[float, Field(ge=0, le=1)] | None = None
    """Probability that an image is trained without its tokens, for guidance."""
    logit_normal_sigmas: bool | None = None
    """Noise levels sigma in training: the sigmoid of a normal; false: uniform, or by mode_scale."""
    logit_normal_mean: float | None = None
    """Mean of that normal; below 0 favours little noise."""
    logit_normal_std: PositiveFloat | None = None
    """Standard deviation of that normal."""
    mode_scale: float | None = None
    """SD3's mode sampling (arXiv 2403.03206, eq. 20), where sigmas are not logit-normal: above 0 favours the middle,
    below 0 the ends; 0: uniform."""
    stratified_sigmas: bool | None = None
    """Spread the noise levels of a global batch evenly over their quantiles."""
    shift: PositiveFloat | None = None
    """Time shift s for higher resolutions (SD3, eq. 23), in training and in the sampler: sigma becomes s * sigma /
    (1 + (s - 1) * sigma); above 1 favours much noise, 1: none."""


class TrainConfig(BaseModel):
    """Settings of a training run. A setting that cannot be computed with is refused, with a ConfigError."""

    model_config = STRICT

    # Model
    model_name: UserPath = "EPFL-VILAB/flextok_d18_d18_in1k"
    """Model to start from: a Hub name, a folder (config.json, model.safetensors), or a .safetensors file."""
    model_revision: str | None = None
    """Branch, tag or commit of model_name on the Hub; null: its main."""
    model: dict[str, Any] | None = None
    """A new model by size instead: `preset` (d12-d12, d18-d18, d18-d28) and arguments of
    flextok.model.builder.build_config."""
    train_from_scratch: bool = False
    """Take the architecture of model_name, but with new weights in encoder and decoder (the VAE keeps its own)."""
    fsq_levels: list[Annotated[int, Field(ge=2)]] | None = None
    """Other FSQ levels than the model's; the two layers around the quantiser get new weights."""
    posemb_scaling: Literal["interpolate"] | None = None
    """`interpolate`: resize the positional tables of model_name bilinearly to the patch grid of img_size, for images of
    another size than it was made for, e.g. 512 px; null: as they are, which takes images up to that size."""
    flow: FlowSettings | None = None
    """Other settings of flow matching than the model's, new or loaded; null, also of each: the model's own. The export
    keeps them."""
    train_encoder: bool = True
    """Train the encoder."""
    train_decoder: bool = True
    """Train the decoder."""
    train_vae: bool = False
    """Train the VAE too, by its own reconstruction (MSE) and KL loss; the flow loss does not reach it."""
    vae_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """What a frozen VAE computes in; auto: bf16 on GPUs that have it, unless use_amp is false; else as its config says,
    fp32 for published models."""
    vae_kl_weight: NonNegativeFloat = 1e-6
    """Weight of the KL divergence (nats per image) in the VAE's loss."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory for one more forward pass, the same numbers."""
    compile: bool = False
    """Run each transformer block through torch.compile."""

    # Data
    dataset_name: str = "folder"
    """`folder` (any images), `imagefolder` (a sub-folder for each class), `celebahq` (its 27000/1500/1500 split), `hf`
    (a dataset of the Hugging Face Hub, or a folder of parquet), `webdataset` (tar shards), `digits` (handwritten digits
    that scikit-learn carries), or `photos` (crops of the photographs that scikit-image and scikit-learn carry)."""
    data_path: UserPath | list[UserPath] | None = None
    """Folder of images: flat, in `images/`, or nested; for `hf` a name on the Hub, a folder of parquet files or of
    `save_to_disk`; for `webdataset` shards, `train-{000000..000146}.tar`, a folder of them, or a list. Not needed for
    `digits` and `photos`."""
    val_path: UserPath | list[UserPath] | None = None
    """Validation images, likewise; null: a validation split of `hf`, celebahq's own, else val_fraction of data_path."""
    data_config: str | None = None
    """`hf`: configuration (subset) of the dataset."""
    data_revision: str | None = None
    """`hf`: branch, tag or commit on the Hub; null: its main."""
    train_split: str = "train"
    """`hf`: split to train on."""
    val_split: str | None = None
    """`hf`: split to validate on; null: `validation`, `val` or `valid` if there is one, else val_fraction of
    train_split."""
    image_column: str | None = None
    """`hf`: column of the images; null: the only one of that type."""
    label_column: str | None = None
    """`hf`: column of the classes; null: the only one of type ClassLabel, if any. Whole numbers keep their value, texts
    are numbered in natural order."""
    img_size: Count = 256
    """Side of the square training images in pixels."""
    use_augmentation: bool = True
    """Flip half of the training images horizontally."""
    crop: Literal["center", "adm", "random", "random_resized"] = "center"
    """Square of an image that is not square: `center`; `adm`, the centre as guided-diffusion scales it, to which
    published FID values refer; in training also `random`, a place along the longer side, or `random_resized`, a window
    of random area and shape. `random_crop: true`, the older name, is `random`."""
    crop_scale: Pair[Annotated[float, Field(gt=0, le=1)]] = [0.8, 1.0]
    """Least and largest area of a `random_resized` window, as parts of the image's."""
    crop_ratio: Pair[PositiveFloat] = [0.75, 1.3333]
    """Least and largest width / height of a `random_resized` window."""
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Part of the images that is kept for validation where nothing else is named."""
    photos_train_crops: Count = 512
    """Training crops of `photos`."""
    photos_val_crops: NonNegativeInt = 64
    """Validation crops of `photos`."""
    num_workers: NonNegativeInt = 4
    """Processes that load images; 0 loads in the training process."""

    # Training
    seed: NonNegativeInt = 0
    """Seed of initialisation, data order and every random draw."""
    num_epochs: Count = 10
    """Passes over the training images; the learning-rate schedule ends with them."""
    max_steps: Count | None = None
    """Optimizer steps of the run in place of num_epochs: it and its learning-rate schedule end there; null: by
    num_epochs."""
    batch_size: Count = 8
    """Images per forward pass of one process."""
    gradient_accumulation_steps: Count = 1
    """Forward passes per optimizer step."""
    global_batch_size: Count | None = None
    """Images per optimizer step over all processes; sets gradient_accumulation_steps, and lets a run be resumed
    with another number of processes. null: batch_size x gradient_accumulation_steps x processes."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With torchrun: `ddp`, the whole model in every process, or `fsdp`, divided among them (FSDP2), for models that do
    not fit."""
    fsdp_accumulation: Literal["reduce", "keep"] = "reduce"
    """With `fsdp` and several micro-batches per step: `reduce` the gradients of each, which takes the least memory, or
    `keep` them whole in fp32 until the last, which communicates less."""
    use_amp: bool | Literal["auto"] = "auto"
    """Autocast to bf16 (fp16 with loss scaling on older GPUs). auto: on GPUs; on a CPU for a decoder of width 512 or
    more where its products are faster in bf16, which is measured at the start and kept when the run is resumed."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this norm over all trained parameters; 0: never."""
    max_nonfinite_steps: NonNegativeInt = 10
    """A step whose loss or gradient is not finite changes nothing; more than so many in a row end the run."""
    val_batch_size: Count | None = None
    """Images per validation pass; null: batch_size."""
    val_images: Count | None = None
    """Images of each validation, over all processes: evenly spread over the validation set, the same ones each time.
    null: max_val_batches x val_batch_size, or the whole set."""
    max_val_batches: Count | None = None
    """The same as a number of batches of val_batch_size images; null: as val_images says."""
    val_every_steps: Count | None = None
    """Validate every so many steps too; null: only at the end of each epoch."""
    val_token_images: NonNegativeInt = 32
    """Validation images on which the use of the tokens is measured: flow loss by token count and noise level, codes.
    Each validation runs the decoder some ten times on them; 0: not measured."""
    best_metric: str = "val/flow_loss"
    """What best.pt is chosen by, a metric of the validation (val/psnr_k... draws a picture at each); more is better for
    val/psnr... and val/codes..., less for all others."""

    # What helps a new model to use its tokens
    readout_weight: NonNegativeFloat | None = None
    """Weight of the read-out: in training alone, a linear layer predicts the latents from the first tokens, which gives
    the encoder of a new model something to learn from. null: 1 for new models, 0 for published ones."""
    readout_steps: Count | None = None
    """Step from which the read-out has no weight any more; null: it stays."""
    readout_lr: PositiveFloat = 1e-2
    """Learning rate of the read-out."""

    # Optimizer
    optimizer: Literal["adamw", "adam", "adamw8bit", "muon"] = "adamw"
    """`adamw`, `adam`; `adamw8bit`: AdamW with moments of 8 bits (bitsandbytes, CUDA alone); `muon`: Muon, at AdamW's
    rates, for the attention and MLP matrices of the transformer blocks, AdamW for all else (PyTorch 2.9)."""
    learning_rate: PositiveFloat = 1e-4
    """Learning rate where no other is given."""
    encoder_lr: PositiveFloat | None = None
    """Learning rate of the encoder; null: learning_rate."""
    decoder_lr: PositiveFloat | None = None
    """Learning rate of the decoder; null: learning_rate."""
    vae_lr: PositiveFloat | None = None
    """Learning rate of the VAE; null: learning_rate."""
    betas: Pair[Annotated[float, Field(ge=0, lt=1)]] = [0.9, 0.99]
    """Adam's decay rates of the first and second moment."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay."""
    decay_all: bool = True
    """Decay every trained parameter; false: only the weights of linear layers and convolutions, not biases, norms,
    registers, positional tables and mask tokens."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    scheduler: Literal["cosine", "linear", "wsd", "none"] = "cosine"
    """Learning rate after the warm-up: falling to min_lr at the last step (cosine, linear), constant until the last
    decay_steps and then linearly to min_lr (wsd: warm-up, stable, decay), or constant (none)."""
    warmup_steps: NonNegativeInt = 500
    """Steps of linear warm-up."""
    decay_steps: Count | None = None
    """Steps of the decay at the end (wsd); null: a tenth of the run."""
    min_lr: NonNegativeFloat = 1e-6
    """Learning rate of the last step (cosine, linear, wsd)."""
    use_ema: bool = False
    """Keep an exponential moving average of the model; validation, pictures and the export then use it."""
    ema_decay: Annotated[float, Field(ge=0, le=1)] = 0.9999
    """Decay of the average per step; smaller in the first steps: at most (1 + step) / (10 + step)."""

    # Caches of what frozen networks compute
    cache_latents: bool = False
    """Compute each image's latent distribution (mean, std) by the VAE once, before training, then read it from
    `cache_dir`; each step still samples its own latents from it."""
    cache_crops: Count | None = None
    """With random crops (`crop`) and a cache: so many crops of each image, mirrored or not, are drawn once and cached,
    and each step takes one of them."""
    cache_dir: UserPath = "cache"
    """Folder of the caches (`cache_latents`, `repa_cache`); runs can share it."""

    # REPA
    use_repa: bool = False
    """Align a decoder layer with a frozen vision encoder (REPA, arXiv 2410.06940)."""
    repa_weight: NonNegativeFloat = 1.0
    """Weight of the REPA loss: loss = flow_loss + repa_weight * repa_loss."""
    repa_encoder_type: str = "dinov2_vitl14"
    """Frozen encoder: dinov2_vits14, vitb14, vitl14 or vitg14, each with _reg; `timm:NAME` for any timm model with a
    feature grid; efficientnet_lite0. FlexTok used DINOv2-L (arXiv 2304.07193)."""
    repa_encoder_dim: Count | None = None
    """Channels of the encoder's features (S 384, B 768, L 1024, G 1536); null: ask the encoder."""
    repa_target_size: Pair[Count] | Literal["auto"] = [37, 37]
    """Height and width of the grid on which features are compared; `auto`: the encoder's grid or the decoder's,
    whichever is finer. 37 = 518 px / 14."""
    repa_lr: PositiveFloat = 1e-4
    """Learning rate of the REPA projector."""
    repa_layers: list[NonNegativeInt] | None = None
    """Decoder layers to align, 0 the first, with one projector each; the loss is their mean. null: those that the
    model's config keeps (published models: [1])."""
    repa_projector: Literal["mlp", "conv"] = "mlp"
    """`mlp`: three linear layers with SiLU (REPA); `conv`: one 3x3 convolution (iREPA, arXiv 2512.10794)."""
    repa_projector_hidden: Count = 2048
    """Width of the MLP projector between its layers."""
    repa_project: Literal["after_resize", "before_resize"] = "after_resize"
    """Project the decoder's features after resizing them to repa_target_size, or before: fewer positions, less work
    (256 px: 16x16 instead of 37x37)."""
    repa_spatial_norm: bool = False
    """Normalise the encoder's features over positions: (x - gamma * mean) / std, per image and channel (iREPA)."""
    repa_spatial_norm_gamma: float = 0.6
    """Gamma of repa_spatial_norm (iREPA: 0.6)."""
    repa_warmup_steps: NonNegativeInt = 0
    """Steps over which the weight rises linearly from 0."""
    repa_cooldown_steps: NonNegativeInt = 0
    """Steps before repa_stop over which the weight falls to 0."""
    repa_cooldown: Literal["linear", "cosine"] = "cosine"
    """Shape of the cool-down."""
    repa_stop: Count | None = None
    """Step from which there is no alignment any more: the encoder is freed, the projector not trained. null: never
    (HASTE, arXiv 2505.16792)."""
    repa_cache: bool = False
    """Compute the encoder's features of each image (and of its mirror image) once, before training, then read them
    from `cache_dir`."""
    repa_image_size: Count | None = None
    """Side in pixels of the images that the encoder sees; null: its own (518 for DINOv2)."""
    repa_encoder_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What the encoder computes in; auto: what the features in the cache were computed in, else bf16 on GPUs that have
    it, and on CPUs where it is faster (measured as for use_amp), else fp32."""
    repa_encoder_repo: UserPath | None = None
    """Folder with DINOv2's hubconf.py, for machines without network; its code is run: see repa_encoder_trust."""
    repa_encoder_trust: bool = False
    """Allow the code in repa_encoder_repo to run. torch.hub's own copy of facebookresearch/dinov2 needs no
    permission."""
    repa_encoder_weights: UserPath | None = None
    """File with the encoder's weights (.pth, .safetensors), for machines without network."""
    repa_encoder_revision: str | None = None
    """Branch, tag or commit of the encoder's repository (GitHub for DINOv2, the Hub for timm)."""
    repa_constant_images: NonNegativeInt = 256
    """Training images that the constant predictions (repa_loss_constant, repa_loss_mean) are fitted to; 0: not
    computed."""

    # Pictures
    visualize_every: NonNegativeInt = 1000
    """Steps between pictures of flexible-length reconstructions; 0: only at the end."""
    num_vis_images: Count = 8
    """Validation images in a picture."""
    num_psnr_images: Count | None = None
    """Validation images whose PSNR by token count is measured with each picture; null: as many as are in it."""
    psnr_guidance_scale: NonNegativeFloat = 1.0
    """Guidance scale of the reconstructions whose PSNR is measured; 1: none, which comes closest to the pixels."""
    vis_token_counts: list[Count] = [1, 4, 16, 64, 256]
    """Token counts in a picture."""
    inference_steps: Count = 25
    """Sampler steps for pictures."""
    guidance_scale: NonNegativeFloat = 7.5
    """Guidance scale for pictures; 1: none."""
    perform_norm_guidance: bool = True
    """Adaptive projected guidance (APG) rather than classifier-free guidance."""

    # Run
    checkpoint_dir: UserPath = "runs"
    """Folder under which each run gets its own, by name and date."""
    resume: UserPath | None = None
    """Checkpoint, run folder or `latest` to continue from."""
    save_every: NonNegativeInt = 10
    """Epochs between checkpoints that are kept; 0: only latest and best."""
    keep_last: Count | None = None
    """How many of the checkpoints of save_every are kept, the last ones; null: all."""
    save_every_steps: NonNegativeInt = 1000
    """Steps between writings of the latest checkpoint; 0: only at the end of epochs."""
    log_every: Count = 10
    """Steps between logged metrics."""
    use_wandb: bool = True
    """Log to Weights & Biases; offline by itself where there is no login or no network."""
    wandb_project: str = "flextok-repa"
    """W&B project."""
    wandb_run_name: str | None = None
    """Name of the run; null: that of the config file."""
    wandb_tags: list[str] = []
    """W&B tags."""

    def __init__(self, **settings: Any):
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError("\n".join(_sentences(error, settings))) from None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """Check a dict of settings; raises ConfigError for unknown keys, wrong types and impossible values."""
        if not isinstance(values, dict):
            raise ConfigError(f"the config is {shown(values)}, expected a mapping of settings")
        return cls(**{str(key): value for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, from which `from_dict` makes the same settings."""
        return self.model_dump()

    # Checks

    @model_validator(mode="before")
    @classmethod
    def _older_forms(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Tuples for lists; `random_crop`; `disable_gradient_checkpointing`, the older name with the opposite sense."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        if isinstance(values.get("random_crop"), bool):
            random = values.pop("random_crop")
            if random and values.setdefault("crop", "random") != "random":
                raise ValueError(f"random_crop is true, but crop is {values['crop']}: remove random_crop")
        if isinstance(values.get("disable_gradient_checkpointing"), bool):
            enabled = not values.pop("disable_gradient_checkpointing")
            if values.setdefault("gradient_checkpointing", enabled) != enabled:
                raise ValueError("gradient_checkpointing and disable_gradient_checkpointing contradict each other")
        return values

    @field_validator("dataset_name")
    @classmethod
    def _known_dataset(cls, name: str) -> str:
        known = re.sub("[^a-z0-9]", "", name.lower())  # CelebA-HQ, celeba_hq ...
        if known not in SPECIAL_DATASETS and (close := difflib.get_close_matches(known, SPECIAL_DATASETS, 1, 0.85)):
            raise ValueError(f"dataset_name is {name!r} (did you mean {close[0]!r}?); use `folder` for others")
        return known if known in SPECIAL_DATASETS else name

    @field_validator("model")
    @classmethod
    def _known_arguments(cls, arguments: dict[str, Any] | None) -> dict[str, Any] | None:
        if arguments is not None:
            known = model_schema()["properties"]
            unknown = [f"{shown(key)}{nearest(key, known)}" for key in arguments if key not in known]
            if unknown:
                raise ValueError(f"model: unknown argument {', '.join(unknown)}; it takes {', '.join(known)}")
        return arguments

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        problems = list(self._contradictions())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _contradictions(self) -> Iterator[str]:
        if not (self.train_encoder or self.train_decoder or self.train_vae):
            yield "train_encoder, train_decoder and train_vae are all false: there is nothing to train"
        if self.posemb_scaling is not None and self.model is not None:
            yield (
                "posemb_scaling is interpolate, but model gives a new one, whose positional tables are for its own "
                f"img_size: set posemb_scaling to null, and model.img_size, if it is given, to {self.img_size}"
            )
        if self.parallel == "fsdp" and self.train_vae:
            yield "parallel is fsdp, but train_vae is true: a VAE is trained with ddp alone"
        if self.parallel == "fsdp" and self.optimizer in ("muon", "adamw8bit"):
            yield (
                f"optimizer is {self.optimizer}, which needs whole parameters, but parallel is fsdp, which divides "
                "them among the processes: set parallel: ddp, or optimizer: adamw"
            )
        if self.optimizer == "muon" and not (self.train_encoder or self.train_decoder):
            yield (
                "optimizer is muon, which trains the matrices of transformers, but train_encoder and train_decoder "
                "are false: set optimizer: adamw"
            )
        for name in ("crop_scale", "crop_ratio"):
            least, largest = getattr(self, name)
            if least > largest:
                yield f"{name} is {[least, largest]}, expected the least value first"
        if self.repa_cooldown_steps and self.repa_stop is None:
            yield (
                f"repa_cooldown_steps is {self.repa_cooldown_steps}, but repa_stop is null: set the step at which the "
                "cool-down ends"
            )
        if self.repa_layers is not None and len(set(self.repa_layers)) != len(self.repa_layers or [0, 0]):
            yield f"repa_layers is {self.repa_layers}, expected different layers, at least one, or null"
        for name in ("cache_latents", "repa_cache"):
            if getattr(self, name) and self.crop.startswith("random") and self.cache_crops is None:
                yield (
                    f"{name} is true, but crop is {self.crop}, so that an image would have other values in every epoch:"
                    f" set cache_crops: 10 to cache ten crops of each, or crop: center, or {name}: false"
                )
        if self.cache_latents and self.train_vae:
            yield "cache_latents is true, but train_vae too: the latents of a VAE that is trained change"

    def unwise(self) -> Iterator[str]:
        """Warnings about settings that can be computed, but are hardly meant."""
        if self.use_repa and self.repa_weight == 0:
            yield "repa_weight is 0: the alignment is computed and moves nothing; use_repa: false saves its work"
        if self.cache_crops is not None and not self.crop.startswith("random"):
            yield f"cache_crops is {self.cache_crops}, but crop is {self.crop}, of which there is one for each image"
        if self.val_images is not None and self.max_val_batches is not None:
            yield f"max_val_batches is {self.max_val_batches}, but val_images is set too, which is what counts"
        if self.model is not None and self.model_revision is not None:
            yield f"model_revision is {self.model_revision}, but model gives a new one, which has no revisions"
        if self.decay_steps is not None and self.scheduler != "wsd":
            yield f"decay_steps is {self.decay_steps}, but scheduler is {self.scheduler}: only wsd has such a decay"
        flow = self.flow or FlowSettings()
        if flow.logit_normal_sigmas is not True and (flow.logit_normal_mean, flow.logit_normal_std) != (None, None):
            yield (
                "flow.logit_normal_mean and _std do nothing where the model's noise levels are not logit-normal: set "
                "flow.logit_normal_sigmas: true"
            )
        if flow.logit_normal_sigmas and flow.mode_scale is not None:
            yield "flow.mode_scale does nothing, because flow.logit_normal_sigmas is true"
        if flow.mode_scale is not None and not -1 <= flow.mode_scale <= 1.75:
            yield f"flow.mode_scale is {flow.mode_scale:g}: only from -1 to 1.75 is it a distribution over 0 to 1"
        stop, together = self.repa_stop, self.repa_warmup_steps + self.repa_cooldown_steps
        if self.use_repa and stop is not None and together > stop:
            yield (
                f"repa_warmup_steps and repa_cooldown_steps are {together} together, but repa_stop is {stop}: the "
                "weight never reaches repa_weight; shorten them, or stop later"
            )

    # What follows from the settings

    def repa_weight_factor(self, step: int) -> float:
        """Share of repa_weight that the optimizer step with this number, from 0, uses; 0 from repa_stop on."""
        if self.repa_stop is not None and step >= self.repa_stop:
            return 0.0
        factor = min(1.0, (step + 1) / self.repa_warmup_steps) if self.repa_warmup_steps else 1.0
        if self.repa_cooldown_steps:
            left = min(1.0, (self.repa_stop - step) / self.repa_cooldown_steps)  # from 1 to 0, which is at repa_stop
            factor *= left if self.repa_cooldown == "linear" else 0.5 * (1 - math.cos(math.pi * left))
        return factor

    def n_val_images(self, n: int) -> int:
        """Images of each validation, of a validation set of n."""
        if self.val_images is not None:
            return min(n, self.val_images)
        batches, size = self.max_val_batches, self.val_batch_size or self.batch_size
        return n if batches is None else min(n, batches * size)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the run."""
        return self.max_steps or self.num_epochs * steps_per_epoch

    def learning_rates(self) -> dict[str, float]:
        """Base learning rate of each part that is trained."""
        rates = {
            group: getattr(self, f"{group}_lr") or self.learning_rate
            for group in ("encoder", "decoder", "vae")
            if getattr(self, f"train_{group}")
        }
        if self.use_repa:
            rates["repa_projector"] = self.repa_lr
        if self.uses_readout:
            rates["readout"] = self.readout_lr
        return rates

    @property
    def fine_tunes(self) -> bool:
        """Whether the run starts from codes that someone may have built on."""
        return self.model is None and not self.train_from_scratch and self.fsq_levels is None

    @property
    def uses_readout(self) -> bool:
        """Whether the tokens' read-out is trained beside the model."""
        return self.train_encoder and self.settled_readout_weight > 0

    @property
    def settled_readout_weight(self) -> float:
        """readout_weight, or what null means there."""
        if self.readout_weight is not None:
            return self.readout_weight
        return 1.0 if self.model is not None or self.train_from_scratch else 0.0

    def accumulation(self, world_size: int) -> int:
        """Forward passes of each of `world_size` processes per optimizer step.

        Raises:
            ConfigError: `global_batch_size` is no multiple of what one pass takes, or contradicts another setting.
        """
        one_pass = self.batch_size * world_size
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps
        steps, rest = divmod(self.global_batch_size, one_pass)
        if rest or self.gradient_accumulation_steps not in (1, steps):
            raise ConfigError(
                f"global_batch_size is {self.global_batch_size}, but batch_size is {self.batch_size}, there "
                f"{'is 1 process' if world_size == 1 else f'are {world_size} processes'} and "
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}: expected a multiple of "
                f"{one_pass}, and gradient_accumulation_steps 1, which is then computed"
            )
        return steps


# pydantic's kinds of errors, as the end of a sentence that begins with "expected".
EXPECTED = {
    "bool_type": "true or false", "int_type": "a whole number", "float_type": "a number",
    "finite_number": "a finite number", "string_type": "text", "dict_type": "a mapping",
    "model_type": "a mapping", "list_type": "a list of values", "too_short": "at least {min_length} values",
    "too_long": "at most {max_length} values", "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}", "less_than": "less than {lt:g}", "less_than_equal": "at most {le:g}",
}  # fmt: skip


def _sentences(error: ValidationError, settings: dict[str, Any]) -> Iterator[str]:
    """One sentence for each setting that is wrong: what was given, what was expected, what to do."""
    expected: dict[tuple[str, ...], list[str]] = {}  # by setting; of a union, what each of its types expects
    for problem in error.errors():
        kind, context = problem["type"], problem.get("ctx", {})
        path = tuple(map(str, problem["loc"][: 2 if problem["loc"][:1] == ("flow",) else 1]))
        fields = (FlowSettings if len(path) > 1 else TrainConfig).model_fields
        if kind == "value_error":  # of a validator above, which wrote the sentence
            yield str(context["error"])
        elif kind == "extra_forbidden":
            yield f"unknown setting: {shown('.'.join(path))}{nearest(path[-1], fields)}"
        else:
            if kind == "literal_error":  # 'a', 'b' or 'c'
                choices = re.findall("'(.*?)'", context["expected"])
                text = f"{'one of ' if len(choices) > 1 else ''}{', '.join(choices)}"
            else:
                text = EXPECTED.get(kind, problem["msg"]).format(**context)
            if text not in expected.setdefault(path, []):
                expected[path].append(text)
    for path, texts in expected.items():
        value, fields = settings[path[0]], TrainConfig.model_fields
        if len(path) > 1:
            value, fields = value[path[1]], FlowSettings.model_fields
        types = typing.get_args(fields[path[-1]].annotation)
        choices = [choice for of in types for choice in (of, *typing.get_args(of)) if isinstance(choice, str)]
        hint = nearest(value, choices)
        if "number" in texts[0] and re.search(r"'[-+.\deE]*\d'", repr(value)):
            hint = ": remove the quotes"
        elif "text" in texts and isinstance(value, int | float):
            hint = ": put it in quotes"
        texts += ["null"] if type(None) in types else []
        yield f"{'.'.join(path)} is {shown(value)}, expected {' or '.join(texts)}{hint}"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and apply overrides `key=value`; `model.key=value` reaches into `model`, as into `flow`.

    What follows `=` is YAML; for a setting that is text it is that text as it stands, `null` or nothing meaning null.

    Raises:
        ConfigError: The file is missing or not YAML, or a setting is unknown, of the wrong type or impossible.
    """
    path = Path(path)
    if not path.is_file():
        configs = sorted(str(p) for p in Path("configs").glob("*.yaml"))
        raise ConfigError(f"there is no config file {path}; in configs/: {', '.join(configs) or 'nothing'}")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8")) or {}
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {shown(values)}, expected a mapping of settings")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {override!r}: expected key=value, e.g. --set use_repa=true")
        *parents, key = key.strip().split(".")
        target = values
        for parent in parents:
            if not isinstance(target.get(parent), dict):
                target[parent] = {}
            target = target[parent]
        target[key] = parse_yaml(text) if parents else _override(key, text)
    default = TrainConfig.model_fields["model_name"].default  # which a run's own config.yaml has beside its model
    name_is_given = any(override.split("=")[0].strip() == "model_name" for override in overrides)
    if values.get("model") is not None and (name_is_given or values.get("model_name", default) != default):
        raise ConfigError(
            f"model_name is {shown(values['model_name'])}, but model is set too, which makes a new model: remove "
            "model (--set model=null) to start from model_name, or remove model_name"
        )
    config = TrainConfig.from_dict(values)
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes the first speaks for all
        for warning in config.unwise():
            log.warning(warning)
    return config


def _override(name: str, text: str) -> Any:
    """The value that `text` gives a setting: YAML, or the text itself where the setting is text and not in quotes."""
    field = TrainConfig.model_fields.get(name)
    in_quotes = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if field is None or field.annotation not in TEXT or in_quotes:
        return parse_yaml(text)
    return None if text in ("", "null") and field.default is None else text


# For documentation and editors


def settings_table(names: Sequence[str]) -> str:
    """Markdown table of settings: name, default, meaning."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    fields = {}
    for name in names:
        fields[name] = TrainConfig.model_fields[name]
        if name == "flow":
            fields.update({f"flow.{key}": field for key, field in FlowSettings.model_fields.items()})
    for name, field in fields.items():
        default = yaml.safe_dump(field.default, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
        rows.append(f"| `{name}` | `{default}` | {' '.join(field.description.split())} |")
    return "\n".join(rows)


def model_schema() -> dict[str, Any]:
    """JSON schema of the setting `model`: `preset` and the arguments of build_config."""
    from ..model.builder import PRESETS, build_config

    schema = TypeAdapter(build_config).json_schema()
    schema["properties"] = {"preset": {"enum": [*PRESETS]}, **schema["properties"]}
    return schema


def json_schema() -> dict[str, Any]:
    """JSON schema of a config file."""
    schema, model = TrainConfig.model_json_schema(), model_schema()
    schema["properties"]["model"]["anyOf"][0] = model
    flow = schema["$defs"]["FlowSettings"]["properties"]
    for entry in [*schema["properties"].values(), *model["properties"].values(), *flow.values()]:
        entry.pop("title", None)
        if "description" in entry:
            entry["description"] = " ".join(entry["description"].split())
    return schema


if __name__ == "__main__":
    Path(SCHEMA).write_text(json.dumps(json_schema(), indent=2) + "\n")
    every = list(TrainConfig.model_fields)
    print(settings_table([name for name in every if "repa" not in name]))
    print()
    print(settings_table([name for name in every if "repa" in name]))
