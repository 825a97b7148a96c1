"""Config trees come from strangers: only the parts of FlexTok are built, and nothing else is imported or called."""

import importlib
import inspect
import sys

import pytest
from torch import nn

from flextok.model.utils.dict_ops import channels_first_to_last, channels_last_to_first
from flextok.utils.config import ConfigError, instantiate

PERMUTE = "flextok.model.utils.dict_ops.PerSampleOp"
LINEAR = "flextok.model.preprocessors.linear.LinearLayer"
FORBIDDEN = [
    "trap_module.spring",
    "os.system",
    "torch.nn.Linear",
    "flextok.utils.config.importlib.import_module",
    "flextok.model.postprocessors.heads.MLPHead",
    None,
]


@pytest.fixture(autouse=True)
def trap(tmp_path, monkeypatch):
    """A module `trap_module` that leaves a file behind when it is imported or its functions are called."""
    marker = tmp_path / "sprung"
    touch = f"open({str(marker)!r}, 'w').close()"
    source = f"{touch}\ndef spring(*args, **kwargs):\n    {touch}\nTrap = spring\n"
    (tmp_path / "trap_module.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    assert "trap_module" not in sys.modules
    assert not marker.exists()


def linear(**more):
    return {"_target_": LINEAR, "read_key": "x", "write_key": "y", "dim_in": 2, "dim": 3, **more}


@pytest.mark.parametrize("target", FORBIDDEN)
def test_other_targets_are_refused_by_name(target):
    for partial in (False, True):
        with pytest.raises(ConfigError) as error:
            instantiate({"_target_": target, "_partial_": partial})
        assert repr(target) in str(error.value)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda trap: {"a": {"b": trap}},
        lambda trap: [1, (trap,)],
        lambda trap: {"_target_": PERMUTE, "read_key": "x", "write_key": "y", "per_sample_op": trap},
    ],
    ids=["dict", "list", "function"],
)
def test_other_targets_are_refused_anywhere_in_the_tree(wrap):
    with pytest.raises(ConfigError, match="'trap_module.spring' is not allowed"):
        instantiate(wrap({"_target_": "trap_module.spring", "_partial_": True}))


@pytest.mark.parametrize("arguments", [{"path": "os.system"}, {}])
def test_get_method_of_anything_else_is_refused(arguments):
    with pytest.raises(ConfigError, match="hydra.utils.get_method"):
        instantiate({"_target_": "hydra.utils.get_method", **arguments})


def test_get_method_gives_the_two_channel_functions():
    for function in (channels_first_to_last, channels_last_to_first):
        path = f"flextok.model.utils.dict_ops.{function.__name__}"
        assert instantiate({"_target_": "hydra.utils.get_method", "path": path}) is function


@pytest.mark.parametrize(
    "config, message",
    [
        ({"layers": [1, linear(dim_inn=2)]}, r"config\.layers\[1\].*LinearLayer.*'dim_inn'.*did you mean 'dim_in'"),
        (linear(_target_=LINEAR + "s"), "LinearLayers.*did you mean .*LinearLayer'"),
        ({"a": linear(weight_init_style="ones")}, r"config\.a.*weight_init_style is 'ones'"),
        ({"a": linear(dim="three")}, r"config\.a"),
    ],
)
def test_what_is_misspelt_or_refused_by_a_constructor_is_named_with_its_place(config, message):
    with pytest.raises(ConfigError, match=message):
        instantiate(config)


TRANSFORMER = {
    "_target_": "flextok.model.trunks.transformers.FlexTransformer", "input_seq_read_key": "x",
    "output_seq_write_key": "x", "dim": 64, "depth": 1,
}  # fmt: skip
HEADS = "flextok.model.postprocessors.heads."
REQUIRED = inspect.Parameter.empty
MODULES = "flextok.model.preprocessors."
PUBLISHED_DEFAULTS = {
    "flextok.flow_matching.noise_modules.MinRFNoiseModule": dict(
        timesteps_write_key=REQUIRED, sigmas_write_key=REQUIRED, ln=True, stratisfied=False, mode_scale=0.0,
        noise_write_key="flow_noise",
    ),
    "flextok.flow_matching.pipelines.MinRFPipeline": dict(noise_read_key=None),
    MODULES + "nullcond.ZeroNullCond": dict(dropout_prob=0.0, eval_drop_flag_read_key="eval_dropout_mask"),
    MODULES + "nullcond.LearnedNullCond": dict(dropout_prob=0.0, eval_drop_flag_read_key="eval_dropout_mask"),
    MODULES + "token_dropout.MaskedNestedDropout": dict(
        eval_keep_k_read_key="eval_keep_k", train_keep_k_write_key="train_keep_k"
    ),
    MODULES + "patching.PatchEmbedder": dict(flatten_patches=True),
    MODULES + "registers.Registers1D": dict(n_min=REQUIRED, n_max=REQUIRED),
    MODULES + "time_embedding.TimestepEmbedder": dict(max_timestep=1000.0, frequency_embedding_size=256),
    MODULES + "linear.LinearLayer": dict(proj_bias=True),
    HEADS + "LinearHead": dict(use_mup_readout=REQUIRED, proj_bias=True),
    HEADS + "ToPatchesLinearHead": dict(use_mup_readout=REQUIRED, proj_bias=True),
    "flextok.regularizers.quantize_fsq.FSQ": dict(
        apply_corrupt_tokens_p=0.2, corrupt_tokens_p=0.0, min_corrupt_tokens_p=None
    ),
    "flextok.vae_wrapper.StableDiffusionVAE": dict(
        images_read_key=REQUIRED, vae_latents_read_key=REQUIRED, vae_latents_write_key=REQUIRED,
        images_reconst_write_key=REQUIRED, latent_channels=16, frozen=False, dtype_override="fp32",
    ),
    "flextok.model.trunks.transformers.FlexTransformer": dict(
        dim=768, depth=12, head_dim=64, mlp_ratio=4, qkv_bias=False, proj_bias=False, mlp_bias=False,
        act_layer=nn.SiLU, gated_mlp=True, qk_norm=True, intermediate_layers=(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("target", PUBLISHED_DEFAULTS)
def test_what_a_config_leaves_out_is_as_in_the_published_constructors(target):
    module, name = target.rsplit(".", 1)
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    defaults = PUBLISHED_DEFAULTS[target]
    assert {argument: parameters[argument].default for argument in defaults} == defaults


def test_norms_of_a_config_are_affine_with_bias_unless_it_says_otherwise_and_others_learn_nothing():
    norm = {"_target_": "flextok.model.layers.norm.Fp32LayerNorm"}
    names = {name for name, _ in instantiate({**norm, "normalized_shape": 8}).named_parameters()}
    assert names == {"weight", "bias"}

    def learned(transformer):
        return {name.rsplit(".", 2)[-2] for name, _ in transformer.named_parameters() if "norm" in name}

    assert learned(instantiate(TRANSFORMER)) == set()
    given = instantiate({**TRANSFORMER, "norm_layer": {**norm, "_partial_": True}})
    assert learned(given) == {"norm1", "norm2", "q_norm", "k_norm"}
