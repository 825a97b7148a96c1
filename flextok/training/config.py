"""The settings of a training run: one typed field each, with its meaning; also what checks a YAML file.

`python -m flextok.training.config` writes configs/schema.json, by which editors complete and check the YAML files, and
prints the tables of README_SETTINGS.md and README_REPA.md.
"""

import datetime
import itertools
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
from ..utils.errors import UserError
from ..utils.files import folder_name, write_atomically
from ..utils.plain import parse_yaml
from .checkpoints import CONFIG_FILE

log = logging.getLogger("flextok")

SPECIAL_DATASETS = ("celebahq", "digits", "photos")  # any other name is a folder of images
SCHEMA = "configs/schema.json"

T = TypeVar("T")
Count = Annotated[int, Field(ge=1)]
Pair = Annotated[list[T], Field(min_length=2, max_length=2)]
UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
TEXT = (str, str | None, UserPath | None)  # types of settings that are text


class TrainConfig(BaseModel):
    """Settings of a training run. A setting that cannot be computed with is refused, with a ConfigError."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

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
    """`folder` (any images), `celebahq` (its 27000/1500/1500 split), `digits` (handwritten digits that scikit-learn
    carries), or `photos` (crops of the photographs that scikit-image and scikit-learn carry)."""
    data_path: UserPath | None = None
    """Folder of images: flat, in `images/`, or nested. Not needed for `digits` and `photos`."""
    val_path: UserPath | None = None
    """Folder of validation images; null: val_fraction of data_path, or celebahq's own split."""
    img_size: Count = 256
    """Side of the square training images in pixels."""
    use_augmentation: bool = True
    """Flip half of the training images horizontally."""
    random_crop: bool = False
    """Crop training images at a random place instead of the centre."""
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Part of a `folder` that is kept for validation."""
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
    """Autocast to bf16 (fp16 with loss scaling on older GPUs). auto: on GPUs; on a CPU where products of the model's
    sizes are faster in bf16, which is measured at the start and kept when the run is resumed."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this norm over all trained parameters; 0: never."""
    max_nonfinite_steps: NonNegativeInt = 10
    """A step whose loss or gradient is not finite changes nothing; more than so many in a row end the run."""
    val_batch_size: Count | None = None
    """Images per validation pass; null: batch_size."""
    max_val_batches: Count | None = None
    """Validation passes at most; null: the whole validation set."""
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
    optimizer: Literal["adamw", "adam"] = "adamw"
    """Optimizer."""
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
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    scheduler: Literal["cosine", "linear", "none"] = "cosine"
    """Learning rate after the warm-up: falling to min_lr at the last step (cosine, linear), or constant (none)."""
    warmup_steps: NonNegativeInt = 500
    """Steps of linear warm-up."""
    min_lr: NonNegativeFloat = 1e-6
    """Learning rate of the last step (cosine, linear)."""
    use_ema: bool = False
    """Keep an exponential moving average of the model; validation, pictures and the export then use it."""
    ema_decay: Annotated[float, Field(ge=0, le=1)] = 0.9999
    """Decay of the average per step; smaller in the first steps: at most (1 + step) / (10 + step)."""

    # Caches of what frozen networks compute
    cache_latents: bool = False
    """Compute each image's latent distribution (mean, std) by the VAE once, before training, then read it from
    `cache_dir`; each step still samples its own latents from it."""
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
    """What the encoder computes in; auto: bf16 on GPUs that have it, and on CPUs where it is faster (measured as for
    use_amp), else fp32."""
    repa_encoder_repo: UserPath | None = None
    """Folder with DINOv2's hubconf.py, for machines without network; its code is run: see repa_encoder_trust."""
    repa_encoder_trust: bool = False
    """Allow the code in repa_encoder_repo to run. torch.hub's own copy of facebookresearch/dinov2 needs no
    permission."""
    repa_encoder_weights: UserPath | None = None
    """File with the encoder's weights (.pth, .safetensors), for machines without network."""
    repa_encoder_revision: str | None = None
    """Branch, tag or commit of the encoder's repository (GitHub for DINOv2, the Hub for timm)."""
    repa_constant_images: NonNegativeInt = 1000
    """Training images that the constant prediction (val/repa_loss_constant) is fitted to; 0: not computed."""

    # Pictures
    visualize_every: NonNegativeInt = 1000
    """Steps between pictures of flexible-length reconstructions; 0: only at the end."""
    num_vis_images: Count = 8
    """Validation images in a picture."""
    num_psnr_images: Count | None = None
    """Validation images whose PSNR by token count is measured with each picture; null: those in it."""
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
        """Tuples for lists; `disable_gradient_checkpointing`, the older name with the opposite sense."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        if isinstance(values.get("disable_gradient_checkpointing"), bool):
            enabled = not values.pop("disable_gradient_checkpointing")
            if values.setdefault("gradient_checkpointing", enabled) != enabled:
                raise ValueError("gradient_checkpointing and disable_gradient_checkpointing contradict each other")
        return values

    @field_validator("dataset_name")
    @classmethod
    def _known_dataset(cls, name: str) -> str:
        known = re.sub("[^a-z0-9]", "", name.lower())  # CelebA-HQ, celeba_hq ...
        if known not in SPECIAL_DATASETS and (suggestion := nearest(known, SPECIAL_DATASETS)):
            raise ValueError(f"dataset_name is {name!r}{suggestion}; use `folder` for others")
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
        if self.parallel == "fsdp" and self.train_vae:
            yield "parallel is fsdp, but train_vae is true: a VAE is trained with ddp alone"
        if self.repa_cooldown_steps and self.repa_stop is None:
            yield (
                f"repa_cooldown_steps is {self.repa_cooldown_steps}, but repa_stop is null: set the step at which the "
                "cool-down ends"
            )
        if self.repa_layers is not None and len(set(self.repa_layers)) != len(self.repa_layers or [0, 0]):
            yield f"repa_layers is {self.repa_layers}, expected different layers, at least one, or null"
        for name in ("cache_latents", "repa_cache"):
            if getattr(self, name) and self.random_crop:
                yield (
                    f"{name} is true, but random_crop too, so that an image would have other values in every epoch: "
                    "set one of them to false (use_augmentation may stay: mirrored images are cached too)"
                )
        if self.cache_latents and self.train_vae:
            yield "cache_latents is true, but train_vae too: the latents of a VAE that is trained change"

    def unwise(self) -> Iterator[str]:
        """Warnings about settings that can be computed, but are hardly meant."""
        if self.use_repa and self.repa_weight == 0:
            yield "repa_weight is 0: the alignment is computed and moves nothing; use_repa: false saves its work"
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

    def learning_rates(self) -> dict[str, float]:
        """Base learning rate of each optimizer group in use."""
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
    "list_type": "a list of values", "too_short": "at least {min_length} values",
    "too_long": "at most {max_length} values", "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}", "less_than": "less than {lt:g}", "less_than_equal": "at most {le:g}",
}  # fmt: skip


def _sentences(error: ValidationError, settings: dict[str, Any]) -> Iterator[str]:
    """One sentence for each setting that is wrong: what was given, what was expected, what to do."""
    expected: dict[str, list[str]] = {}  # by setting; of a union, what each of its types expects
    for problem in error.errors():
        kind, name, context = problem["type"], str(next(iter(problem["loc"]), "")), problem.get("ctx", {})
        if kind == "value_error":  # of a validator above, which wrote the sentence
            yield str(context["error"])
        elif kind == "extra_forbidden":
            yield f"unknown setting: {shown(name)}{nearest(name, TrainConfig.model_fields)}"
        else:
            if kind == "literal_error":  # 'a', 'b' or 'c'
                choices = re.findall("'(.*?)'", context["expected"])
                text = f"{'one of ' if len(choices) > 1 else ''}{', '.join(choices)}"
            else:
                text = EXPECTED.get(kind, problem["msg"]).format(**context)
            if text not in expected.setdefault(name, []):
                expected[name].append(text)
    for name, texts in expected.items():
        value, types = settings[name], typing.get_args(TrainConfig.model_fields[name].annotation)
        hint = nearest(value, [choice for choice in types if isinstance(choice, str)])
        if "number" in texts[0] and re.search(r"'[-+.\deE]*\d'", repr(value)):
            hint = ": remove the quotes"
        elif "text" in texts and isinstance(value, int | float):
            hint = ": put it in quotes"
        texts += ["null"] if type(None) in types else []
        yield f"{name} is {shown(value)}, expected {' or '.join(texts)}{hint}"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and apply overrides `key=value`; `model.key=value` reaches into `model`.

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


def write_config(folder: Path, config: TrainConfig) -> None:
    """Write the settings of a run to `config.yaml` in a folder; load_config reads it."""
    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(text))


def new_run_dir(config: TrainConfig) -> Path:
    """Make the folder of a new run, by name and date under `checkpoint_dir`; no two runs get the same.

    Raises:
        UserError: It cannot be made.
    """
    name = f"{folder_name(config.wandb_run_name)}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    for i in itertools.count(1):
        folder = Path(config.checkpoint_dir, name if i == 1 else f"{name}-{i}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"cannot make {folder}: {error}. Give another folder (--run-dir, or checkpoint_dir)"
            ) from error
    raise AssertionError


# For documentation and editors


def settings_table(names: Sequence[str]) -> str:
    """Markdown table of settings: name, default, meaning."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for name in names:
        field = TrainConfig.model_fields[name]
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
    for entry in [*schema["properties"].values(), *model["properties"].values()]:
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
