"""The settings of a training run: one typed field each, with its meaning; also what checks a YAML file."""

import dataclasses
import inspect
import math
import re
import types
import typing
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import yaml

from ..utils.config import ConfigError, check_tree, nearest, shown
from ..utils.files import write_atomically
from ..utils.plain import parse_yaml
from .checkpoints import CONFIG_FILE

SPECIAL_DATASETS = ("celebahq", "digits", "photos")  # any other name is a folder of images


def setting(default: Any, help: str, choices=None, minimum=None, maximum=None, above=None, word=None, source=""):
    """A field with its meaning and limits.

    `above` is an exclusive lower limit, `word` one word that is allowed besides the field's type, `source` the paper
    or document that the setting comes from.
    """
    metadata = dict(help=help, choices=choices, minimum=minimum, maximum=maximum, above=above, word=word, source=source)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class TrainConfig:
    # Model
    model_name: str = setting(
        "EPFL-VILAB/flextok_d18_d18_in1k",
        "Model to start from: a Hub name, a folder (config.json, model.safetensors), or a .safetensors file.",
    )
    model_revision: Optional[str] = setting(None, "Branch, tag or commit of model_name on the Hub; null: its main.")
    model: Optional[Dict[str, Any]] = setting(
        None,
        "A new model by size instead: `preset` (d12-d12, d18-d18, d18-d28) and arguments of "
        "flextok.model.builder.build_config.",
    )
    train_from_scratch: bool = setting(
        False,
        "Take the architecture of model_name, but initialise encoder and decoder anew (the VAE keeps its weights).",
    )
    fsq_levels: Optional[List[int]] = setting(
        None, "Other FSQ levels than the model's; the two layers around the quantiser are initialised anew.", minimum=2
    )
    train_encoder: bool = setting(True, "Train the encoder.")
    train_decoder: bool = setting(True, "Train the decoder.")
    train_vae: bool = setting(
        False, "Train the VAE too, by its own reconstruction (MSE) and KL loss; the flow loss does not reach it."
    )
    vae_dtype: str = setting(
        "auto", "What a frozen VAE computes in; auto: bf16 on GPUs that have it, unless use_amp is false; else as its "
        "config says, fp32 for published models.",
        choices=("auto", "fp32", "bf16"),
    )  # fmt: skip
    vae_kl_weight: float = setting(1e-6, "Weight of the KL divergence (nats per image) in the VAE's loss.", minimum=0)
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass: less memory for one more forward pass, the same numbers."
    )
    compile: bool = setting(False, "Run encoder and decoder through torch.compile.")

    # Data
    dataset_name: str = setting(
        "folder",
        "`folder` (any images), `celebahq` (its 27000/1500/1500 split), `digits` (handwritten digits that scikit-learn "
        "carries), or `photos` (crops of the photographs that scikit-image and scikit-learn carry).",
    )
    data_path: Optional[str] = setting(
        None, "Folder of images: flat, in `images/`, or nested. Not needed for `digits` and `photos`."
    )
    val_path: Optional[str] = setting(
        None, "Folder of validation images; null: val_fraction of data_path, or celebahq's own split."
    )
    img_size: int = setting(256, "Side of the square training images in pixels.", minimum=1)
    use_augmentation: bool = setting(True, "Flip half of the training images horizontally.")
    random_crop: bool = setting(False, "Crop training images at a random place instead of the centre.")
    val_fraction: float = setting(0.05, "Part of a `folder` that is kept for validation.", minimum=0, maximum=0.9)
    photos_train_crops: int = setting(512, "Training crops of `photos`.", minimum=1)
    photos_val_crops: int = setting(64, "Validation crops of `photos`.", minimum=0)
    num_workers: int = setting(4, "Processes that load images; 0 loads in the training process.", minimum=0)

    # Training
    seed: int = setting(0, "Seed of initialisation, data order and every random draw.", minimum=0)
    num_epochs: int = setting(
        10, "Passes over the training images; the learning-rate schedule ends with them.", minimum=1
    )
    batch_size: int = setting(8, "Images per forward pass of one process.", minimum=1)
    gradient_accumulation_steps: int = setting(1, "Forward passes per optimizer step.", minimum=1)
    global_batch_size: Optional[int] = setting(
        None,
        "Images per optimizer step over all processes; sets gradient_accumulation_steps, and lets a run go on with "
        "another number of processes. null: batch_size x gradient_accumulation_steps x processes.",
        minimum=1,
    )
    parallel: str = setting(
        "ddp",
        "With torchrun: `ddp`, the whole model in every process, or `fsdp`, divided among them (FSDP2), for models "
        "that do not fit.",
        choices=("ddp", "fsdp"),
    )
    use_amp: Union[bool, str] = setting(
        "auto",
        "Autocast to bf16 (fp16 with loss scaling on older GPUs). auto: on GPUs; on a CPU where products of the "
        "model's sizes are faster in bf16, which is measured at the start and kept when the run is resumed.",
        word="auto",
    )
    max_grad_norm: float = setting(
        1.0, "Gradients are clipped to this norm over all trained parameters; 0: never.", minimum=0
    )
    max_nonfinite_steps: int = setting(
        10,
        "A step whose loss or gradient is not finite changes nothing; more than so many in a row end the run.",
        minimum=0,
    )
    val_batch_size: Optional[int] = setting(None, "Images per validation pass; null: batch_size.", minimum=1)
    max_val_batches: Optional[int] = setting(
        None, "Validation passes at most; null: the whole validation set.", minimum=1
    )
    val_every_steps: Optional[int] = setting(
        None, "Validate every so many steps too; null: only at the end of each epoch.", minimum=1
    )
    val_token_images: int = setting(
        32,
        "Validation images on which the use of the tokens is measured: flow loss by token count and noise level, codes. "
        "Each validation runs the decoder some ten times on them; 0: not measured.",
        minimum=0,
    )
    best_metric: str = setting(
        "val/flow_loss",
        "What best.pt is chosen by, a metric of the validation (val/psnr_k... draws a picture at each); more is better "
        "for val/psnr... and val/codes..., less for all others.",
    )

    # What helps a new model to use its tokens
    readout_weight: Optional[float] = setting(
        None,
        "Weight of the read-out: in training alone, a linear layer predicts the latents from the first tokens, which "
        "gives the encoder of a new model something to learn from. null: 1 for new models, 0 for published ones.",
        minimum=0,
    )
    readout_steps: Optional[int] = setting(
        None, "Step from which the read-out has no weight any more; null: it stays.", minimum=1
    )
    readout_lr: float = setting(1e-2, "Learning rate of the read-out.", above=0)

    # Optimizer
    optimizer: str = setting("adamw", "Optimizer.", choices=("adamw", "adam"))
    learning_rate: float = setting(1e-4, "Learning rate where no other is given.", above=0)
    encoder_lr: Optional[float] = setting(None, "Learning rate of the encoder; null: learning_rate.", above=0)
    decoder_lr: Optional[float] = setting(None, "Learning rate of the decoder; null: learning_rate.", above=0)
    vae_lr: Optional[float] = setting(None, "Learning rate of the VAE; null: learning_rate.", above=0)
    betas: List[float] = setting(
        [0.9, 0.99], "Adam's decay rates of the first and second moment.", minimum=0, maximum=1
    )
    weight_decay: float = setting(0.01, "Weight decay.", minimum=0)
    eps: float = setting(1e-8, "Adam's epsilon.", above=0)
    scheduler: str = setting(
        "cosine", "Course of the learning rate after warm-up: to min_lr at the last step, or constant.",
        choices=("cosine", "linear", "none"),
    )  # fmt: skip
    warmup_steps: int = setting(500, "Steps of linear warm-up.", minimum=0)
    min_lr: float = setting(1e-6, "Learning rate of the last step (cosine, linear).", minimum=0)
    use_ema: bool = setting(
        False, "Keep an exponential moving average of the model; validation, pictures and the export then use it."
    )
    ema_decay: float = setting(
        0.9999, "Decay of the average per step; smaller in the first steps: at most (1 + step) / (10 + step).",
        minimum=0, maximum=1,
    )  # fmt: skip

    # Caches of what frozen networks compute
    cache_latents: bool = setting(
        False,
        "Compute each image's latent distribution (mean, std) by the VAE once, in the first epoch, then read it from "
        "`cache_dir`; latents are still sampled anew in each step.",
    )
    cache_dir: str = setting("cache", "Folder of the caches (`cache_latents`, `repa_cache`); runs can share it.")

    # REPA
    use_repa: bool = setting(
        False, "Align a decoder layer with a frozen vision encoder.", source="REPA, arXiv 2410.06940"
    )
    repa_weight: float = setting(
        1.0, "Weight of the REPA loss: loss = flow_loss + repa_weight * repa_loss.", above=0,
        source="REPA",
    )  # fmt: skip
    repa_encoder_type: str = setting(
        "dinov2_vitl14",
        "Frozen encoder: dinov2_vits14, vitb14, vitl14 or vitg14, each with _reg; `timm:NAME` for any timm model with "
        "a feature grid; efficientnet_lite0.",
        source="DINOv2, arXiv 2304.07193; FlexTok used L",
    )
    repa_encoder_dim: Optional[int] = setting(
        None, "Channels of the encoder's features (S 384, B 768, L 1024, G 1536); null: ask the encoder.", minimum=1
    )
    repa_target_size: Union[List[int], str] = setting(
        [37, 37],
        "Height and width of the grid on which features are compared; `auto`: the encoder's grid or the decoder's, "
        "whichever is finer.",
        minimum=1, word="auto", source="37 = 518 px / 14",
    )  # fmt: skip
    repa_lr: float = setting(1e-4, "Learning rate of the REPA projector.", above=0, source="REPA")
    repa_layers: Optional[List[int]] = setting(
        None,
        "Decoder layers to align, 0 the first, with one projector each; the loss is their mean. null: those that the "
        "model's config keeps (published models: [1]).",
        minimum=0, source="[1]: FlexTok",
    )  # fmt: skip
    repa_projector: str = setting(
        "mlp", "`mlp`: three linear layers with SiLU; `conv`: one 3x3 convolution.", choices=("mlp", "conv"),
        source="mlp: REPA; conv: iREPA, arXiv 2512.10794",
    )  # fmt: skip
    repa_projector_hidden: int = setting(
        2048, "Width of the MLP projector between its layers.", minimum=1, source="REPA"
    )
    repa_project: str = setting(
        "after_resize",
        "Project the decoder's features after resizing them to repa_target_size, or before: fewer positions, less work "
        "(256 px: 16x16 instead of 37x37).",
        choices=("after_resize", "before_resize"),
    )
    repa_spatial_norm: bool = setting(
        False, "Normalise the encoder's features over positions: (x - gamma * mean) / std, per image and channel.",
        source="iREPA",
    )  # fmt: skip
    repa_spatial_norm_gamma: float = setting(
        0.6, "Gamma of repa_spatial_norm.", minimum=0, maximum=1, source="iREPA: 0.6"
    )
    repa_warmup_steps: int = setting(0, "Steps over which the weight rises linearly from 0.", minimum=0)
    repa_cooldown_steps: int = setting(0, "Steps before repa_stop over which the weight falls to 0.", minimum=0)
    repa_cooldown: str = setting("cosine", "Course of the cool-down.", choices=("linear", "cosine"))
    repa_stop: Optional[int] = setting(
        None,
        "Step from which there is no alignment any more: the encoder is freed, the projector not trained. null: never.",
        minimum=1, source="HASTE, arXiv 2505.16792",
    )  # fmt: skip
    repa_cache: bool = setting(
        False,
        "Compute the encoder's features of each image (and of its mirror image) once, in the first epoch, then read "
        "them from `cache_dir`.",
    )
    repa_image_size: Optional[int] = setting(
        None, "Side in pixels of the images that the encoder sees; null: its own (518 for DINOv2).", minimum=1
    )
    repa_encoder_dtype: str = setting(
        "auto", "What the encoder computes in; auto: bf16 on GPUs that have it, and on CPUs where it is faster (measured "
        "as for use_amp), else fp32.",
        choices=("auto", "fp32", "bf16", "fp16"),
    )  # fmt: skip
    repa_encoder_repo: Optional[str] = setting(
        None, "Folder with DINOv2's hubconf.py, for machines without network; its code is run: see repa_encoder_trust."
    )
    repa_encoder_trust: bool = setting(
        False,
        "Allow the code in repa_encoder_repo to run. torch.hub's own copy of facebookresearch/dinov2 needs no "
        "permission.",
    )
    repa_encoder_weights: Optional[str] = setting(
        None, "File with the encoder's weights (.pth, .safetensors), for machines without network."
    )
    repa_encoder_revision: Optional[str] = setting(
        None, "Branch, tag or commit of the encoder's repository (GitHub for DINOv2, the Hub for timm)."
    )
    repa_constant_images: int = setting(
        1000, "Training images that the constant prediction (val/repa_loss_constant) is fitted to; 0: not computed.",
        minimum=0,
    )  # fmt: skip

    # Pictures
    visualize_every: int = setting(
        1000, "Steps between pictures of flexible-length reconstructions; 0: only at the end.", minimum=0
    )
    num_vis_images: int = setting(8, "Validation images in a picture.", minimum=1)
    num_psnr_images: Optional[int] = setting(
        None, "Validation images whose PSNR by token count is measured with each picture; null: those in it.", minimum=1
    )
    vis_token_counts: List[int] = setting([1, 4, 16, 64, 256], "Token counts in a picture.", minimum=1)
    inference_steps: int = setting(25, "Sampler steps for pictures.", minimum=1)
    guidance_scale: float = setting(7.5, "Guidance scale for pictures; 1: none.", minimum=0)
    perform_norm_guidance: bool = setting(
        True, "Adaptive projected guidance (APG) rather than classifier-free guidance."
    )

    # Run
    checkpoint_dir: str = setting("runs", "Folder under which each run gets its own, by name and date.")
    resume: Optional[str] = setting(None, "Checkpoint, run folder or `latest` to continue from.")
    save_every: int = setting(10, "Epochs between checkpoints that are kept; 0: only latest and best.", minimum=0)
    keep_last: Optional[int] = setting(
        None, "How many of the checkpoints of save_every are kept, the last ones; null: all.", minimum=1
    )
    save_every_steps: int = setting(
        1000, "Steps between writings of the latest checkpoint; 0: only at the end of epochs.", minimum=0
    )
    log_every: int = setting(10, "Steps between logged metrics.", minimum=1)
    use_wandb: bool = setting(True, "Log to Weights & Biases; offline by itself where there is no login or no network.")
    wandb_project: str = setting("flextok-repa", "W&B project.")
    wandb_run_name: Optional[str] = setting(None, "Name of the run; null: that of the config file.")
    wandb_tags: List[str] = setting([], "W&B tags.")

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            setattr(self, field.name, _checked(field, hints[field.name], getattr(self, field.name)))
        self._check_together()

    def _check_together(self) -> None:
        for key in (
            "model_name", "data_path", "val_path", "checkpoint_dir", "cache_dir", "resume", "repa_encoder_repo",
            "repa_encoder_weights",
        ):  # fmt: skip
            if (getattr(self, key) or "").startswith("~"):
                setattr(self, key, str(Path(getattr(self, key)).expanduser()))
        if len(self.betas) != 2 or max(self.betas) >= 1:
            raise ConfigError(f"betas is {self.betas}, expected two numbers below 1, e.g. [0.9, 0.99]")
        if self.repa_target_size != "auto" and len(self.repa_target_size) != 2:
            raise ConfigError(f"repa_target_size is {self.repa_target_size}, expected [height, width] or auto")
        if not (self.train_encoder or self.train_decoder or self.train_vae):
            raise ConfigError("train_encoder, train_decoder and train_vae are all false: there is nothing to train")
        known = re.sub("[^a-z0-9]", "", self.dataset_name.lower())
        if known in SPECIAL_DATASETS:  # CelebA-HQ, celeba_hq ...
            self.dataset_name = known
        elif nearest(known, SPECIAL_DATASETS):
            raise ConfigError(
                f"dataset_name is {self.dataset_name!r}{nearest(known, SPECIAL_DATASETS)}; use `folder` for others"
            )
        if self.parallel == "fsdp" and self.train_vae:
            raise ConfigError("parallel is fsdp, but train_vae is true: a VAE is trained with ddp alone")
        if self.model is not None:
            _check_model_arguments(self.model)
        self._check_repa_schedule()
        self._check_caches()

    def _check_repa_schedule(self) -> None:
        warmup, cooldown, stop = self.repa_warmup_steps, self.repa_cooldown_steps, self.repa_stop
        if stop is None and cooldown:
            raise ConfigError(
                f"repa_cooldown_steps is {cooldown}, but repa_stop is null: set the step at which it ends"
            )
        if stop is not None and warmup + cooldown > stop:
            raise ConfigError(
                f"repa_warmup_steps {warmup} and repa_cooldown_steps {cooldown} together are more than repa_stop "
                f"{stop}, the step at which the cool-down ends: shorten them, or stop later"
            )
        if self.repa_layers is not None and len(set(self.repa_layers)) != len(self.repa_layers or [0, 0]):
            raise ConfigError(f"repa_layers is {self.repa_layers}, expected different layers, at least one, or null")

    def _check_caches(self) -> None:
        for key in ("cache_latents", "repa_cache"):
            if getattr(self, key) and self.random_crop:
                raise ConfigError(
                    f"{key} is true, but random_crop too, so that an image would have other values in every epoch: set "
                    "one of them to false (use_augmentation may stay: mirrored images are cached too)"
                )
        if self.cache_latents and self.train_vae:
            raise ConfigError("cache_latents is true, but train_vae too: the latents of a VAE that is trained change")

    def repa_weight_factor(self, step: int) -> float:
        """Share of repa_weight in force in the optimizer step with this number, from 0; 0 from repa_stop on."""
        if self.repa_stop is not None and step >= self.repa_stop:
            return 0.0
        factor = min(1.0, (step + 1) / self.repa_warmup_steps) if self.repa_warmup_steps else 1.0
        if self.repa_cooldown_steps:
            left = min(1.0, (self.repa_stop - step) / self.repa_cooldown_steps)  # from 1 to 0, which is at repa_stop
            factor *= left if self.repa_cooldown == "linear" else 0.5 * (1 - math.cos(math.pi * left))
        return factor

    def learning_rates(self) -> Dict[str, float]:
        """Base learning rate of each optimizer group in use."""
        rates = {}
        for group in ("encoder", "decoder", "vae"):
            if getattr(self, f"train_{group}"):
                rates[group] = getattr(self, f"{group}_lr") or self.learning_rate
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

    @classmethod
    def from_dict(cls, values: Dict[str, Any]) -> "TrainConfig":
        """Check a dict of settings; raises ConfigError for unknown keys, wrong types and impossible values."""
        if not isinstance(values, dict):
            raise ConfigError(f"the config is {_describe(values)}, expected a mapping of settings")
        values = dict(values)
        if "disable_gradient_checkpointing" in values:  # the older name, with the opposite sense
            disabled = values.pop("disable_gradient_checkpointing")
            if not isinstance(disabled, bool):
                raise ConfigError(f"disable_gradient_checkpointing is {_describe(disabled)}, expected true or false")
            if values.setdefault("gradient_checkpointing", not disabled) == disabled:
                raise ConfigError("gradient_checkpointing and disable_gradient_checkpointing contradict each other")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = [f"{shown(key)}{nearest(key, known)}" for key in values if key not in known]
        if unknown:
            more = f" and {len(unknown) - 20} more" if len(unknown) > 20 else ""
            raise ConfigError(f"unknown setting{'s' if len(unknown) > 1 else ''}: {', '.join(unknown[:20])}{more}")
        return cls(**values)

    def to_dict(self) -> Dict[str, Any]:
        return dataclasses.asdict(self)


def _describe(value: Any) -> str:
    kinds = {bool: "true/false", int: "a whole number", float: "a number", str: "a string", list: "a list",
             dict: "a mapping", type(None): "null"}  # fmt: skip
    return f"{shown(value)} ({kinds.get(type(value), type(value).__name__)})"


def _checked(field: dataclasses.Field, hint: Any, value: Any) -> Any:
    """`value` in the field's type and within its limits, or ConfigError."""
    check_tree(value, field.name)
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    limits = field.metadata
    kind = next(option for option in options if option is not type(None))
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    scalar = arguments[0] if origin is list else kind
    expected = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a string",
        dict: "a mapping",
    }.get(scalar if origin is not dict else dict)
    if origin is list:
        expected = f"a list of {expected.removeprefix('a ')}s"
    if limits["word"] is not None:
        expected += f" or {limits['word']}"
        if value == limits["word"]:
            return value
    if type(None) in options:
        expected += " or null"

    def convert(item):
        if scalar is float and isinstance(item, int) and not isinstance(item, bool):
            return float(item)
        if type(item) is not (dict if origin is dict else scalar):
            hint = ": remove the quotes" if isinstance(item, str) and _is_number(item) else ""
            raise ConfigError(f"{field.name} is {_describe(value)}, expected {expected}{hint}")
        return item

    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{field.name} is {_describe(value)}, expected {expected}")
        value = [convert(item) for item in value]
    else:
        value = convert(value)
    if limits["choices"] is not None and value not in limits["choices"]:
        raise ConfigError(
            f"{field.name} is {shown(value)}, expected one of "
            f"{', '.join(limits['choices'])}{nearest(value, limits['choices'])}"
        )
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, float) and not abs(item) < float("inf"):
            raise ConfigError(f"{field.name} is {item}, expected a finite number")
        if limits["minimum"] is not None and item < limits["minimum"]:
            raise ConfigError(f"{field.name} is {shown(value)}, expected at least {limits['minimum']}")
        if limits["maximum"] is not None and item > limits["maximum"]:
            raise ConfigError(f"{field.name} is {shown(value)}, expected at most {limits['maximum']}")
        if limits["above"] is not None and item <= limits["above"]:
            raise ConfigError(f"{field.name} is {shown(value)}, expected more than {limits['above']}")
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_model_arguments(arguments: Dict[str, Any]) -> None:
    from ..model.builder import build_config

    known = ["preset", *inspect.signature(build_config).parameters]
    for key in arguments:
        if key not in known:
            raise ConfigError(f"model: unknown argument {shown(key)}{nearest(key, known)}; it takes {', '.join(known)}")


def load_config(path: Union[str, Path], overrides: typing.Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and apply `key=value` overrides (values are YAML; `model.key=value` reaches into `model`).

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
        raise ConfigError(f"{path}: {_describe(values)}, expected a mapping of settings")
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
        target[key] = parse_yaml(text)
    return TrainConfig.from_dict(values)


def write_config(folder: Path, config: TrainConfig) -> None:
    """Write the settings in force to `config.yaml` in a folder; load_config reads it."""
    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(text))


def settings_table(names: typing.Sequence[str]) -> str:
    """Markdown table of settings: name, default, meaning, and source where any has one."""
    defaults = TrainConfig()
    fields = [field for field in dataclasses.fields(TrainConfig) if field.name in names]
    columns = ["setting", "default", "meaning", "source"][: 4 if any(f.metadata["source"] for f in fields) else 3]
    rows = [columns]
    for field in fields:
        default = getattr(defaults, field.name)
        text = yaml.safe_dump(default, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
        rows.append([f"`{field.name}`", f"`{text}`", field.metadata["help"], field.metadata["source"]][: len(columns)])
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(columns), *body])


if __name__ == "__main__":  # the tables of README.md and README_REPA.md
    every = [field.name for field in dataclasses.fields(TrainConfig)]
    print(settings_table([name for name in every if "repa" not in name]))
    print()
    print(settings_table([name for name in every if "repa" in name]))
