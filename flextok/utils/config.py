"""Building modules from config trees: a dict with `_target_` names what to build from its other keys.

A config is data from a stranger: only the names in `ALLOWED_TARGETS` can be built, and a name is looked up there before
anything is imported.
"""

import difflib
import functools
import importlib
import inspect
import reprlib
from collections.abc import Callable, Iterable
from typing import Any

from .errors import UserError

_PREPROCESSORS = "flextok.model.preprocessors."
_POSTPROCESSORS = "flextok.model.postprocessors."

ALLOWED_TARGETS = frozenset(
    {
        "flextok.flextok_wrapper.FlexTok",
        "flextok.flextok_wrapper.FlexTokFromHub",
        "flextok.vae_wrapper.StableDiffusionVAE",
        "flextok.vae_wrapper.PixelUnshuffleVAE",
        "flextok.vae_wrapper.BlockDCTVAE",
        "flextok.flow_matching.pipelines.MinRFPipeline",
        "flextok.flow_matching.noise_modules.MinRFNoiseModule",
        "flextok.model.utils.wrappers.SequentialModuleDictWrapper",
        "flextok.model.utils.posembs.PositionalEmbedding",
        "flextok.model.utils.posembs.PositionalEmbeddingAdder",
        "flextok.model.utils.dict_ops.DictKeyFilter",
        "flextok.model.utils.dict_ops.PerSampleOp",
        "flextok.model.utils.dict_ops.channels_first_to_last",
        "flextok.model.utils.dict_ops.channels_last_to_first",
        "flextok.model.trunks.transformers.FlexTransformer",
        _PREPROCESSORS + "token_dropout.MaskedNestedDropout",
        _PREPROCESSORS + "time_embedding.TimestepEmbedder",
        _PREPROCESSORS + "registers.Registers1D",
        _PREPROCESSORS + "patching.PatchEmbedder",
        _PREPROCESSORS + "nullcond.ZeroNullCond",
        _PREPROCESSORS + "nullcond.LearnedNullCond",
        _PREPROCESSORS + "linear.LinearLayer",
        _PREPROCESSORS + "flex_seq_packing.BlockWiseSequencePacker",
        _POSTPROCESSORS + "seq_unpacking.SequenceUnpacker",
        _POSTPROCESSORS + "heads.LinearHead",
        _POSTPROCESSORS + "heads.ToPatchesLinearHead",
        "flextok.model.layers.norm.Fp32LayerNorm",
        "flextok.regularizers.quantize_fsq.FSQ",
    }
)
ALLOWED_FUNCTIONS = (
    "flextok.model.utils.dict_ops.channels_first_to_last",
    "flextok.model.utils.dict_ops.channels_last_to_first",
)
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200  # characters
_SHORT.maxlist = _SHORT.maxdict = 10  # items


class ConfigError(UserError, ValueError):
    """A config that cannot be built; the message says where in the tree, what was given and what was expected."""


def nearest(name: Any, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` if a known name is close to the text `name`, else an empty string."""
    matches = difflib.get_close_matches(name, known, n=1) if isinstance(name, str) else ()
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def shown(value: Any) -> str:
    """`repr(value)` for a message, with what is long or deep in it left out."""
    return _SHORT.repr(value)


def _lookup(target: Any, where: str) -> Callable:
    """The class or function behind an allowed dotted name."""
    if not isinstance(target, str) or target not in ALLOWED_TARGETS:
        raise ConfigError(
            f"{where}: _target_ {shown(target)} is not allowed{nearest(target, ALLOWED_TARGETS)}; a config can only "
            "build the parts of FlexTok that flextok.utils.config.ALLOWED_TARGETS lists"
        )
    module, name = target.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def instantiate(config: Any, _where: str = "config", **extra) -> Any:
    """Build what a config tree describes.

    Args:
        config: A tree of dicts, lists and plain values. A dict with `_target_` becomes the object of that name, built
            from its other keys; with `_partial_: true` it becomes a factory.
        extra: Further constructor arguments of the outermost object.

    Raises:
        ConfigError: `_target_` not allowed (anywhere in the tree), an unknown or missing constructor argument, or
            arguments that the constructor refuses.
    """
    if isinstance(config, (list, tuple)):
        return [instantiate(value, f"{_where}[{i}]") for i, value in enumerate(config)]
    if not isinstance(config, dict):
        return config
    if "_target_" not in config:
        return {key: instantiate(value, f"{_where}.{key}") for key, value in config.items()}

    name = config["_target_"]
    if name == "hydra.utils.get_method":
        if config.get("path") not in ALLOWED_FUNCTIONS:
            raise ConfigError(
                f"{_where}: hydra.utils.get_method of {shown(config.get('path'))} is not allowed, only of "
                f"{', '.join(ALLOWED_FUNCTIONS)}"
            )
        return _lookup(config["path"], _where)

    target = _lookup(name, _where)
    signature = inspect.signature(target.__init__ if inspect.isclass(target) else target)
    known = [key for key in signature.parameters if key != "self"]
    given = {key: value for key, value in config.items() if key not in ("_target_", "_partial_")}
    for key in given:
        if key not in known:
            raise ConfigError(
                f"{_where}: {name} takes no argument {shown(key)}{nearest(key, known)}; it takes {', '.join(known)}"
            )
    if not name.endswith(".FlexTokFromHub"):  # which takes the tree itself, not what it describes
        given = {key: instantiate(value, f"{_where}.{key}") for key, value in given.items()}
    given.update(extra)
    if config.get("_partial_"):
        return functools.partial(target, **given) if given else target
    try:
        return target(**given)
    except ConfigError:
        raise
    except Exception as error:  # of whatever a constructor makes of wrong values
        raise ConfigError(f"{_where}: {name}: {error}") from error
