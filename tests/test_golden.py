"""A small model computes what the published implementation computes from the same weights (tests/golden/tiny)."""

import json
from pathlib import Path

import pytest
import torch
from helpers import LATENT_SHAPE, N_REGISTERS, gradients, make_draws, make_noise, pack, tiny_model, unpack
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

from flextok.model.layers.attention import Attention
from flextok.model.trunks.transformers import FlexTransformer
from flextok.utils.checkpoint import load_weights
from flextok.utils.config import instantiate
from flextok.utils.random import RANDOM_KEY

GOLDEN = Path(__file__).parent / "golden" / "tiny"
TOLERANCE = 2e-5
CONTAINERS = ("batch", "list")


@pytest.fixture(scope="module")
def recorded():
    """Inputs and outputs of the published implementation."""
    return load_file(GOLDEN / "tensors.safetensors")


@pytest.fixture(scope="module")
def reference():
    return json.loads((GOLDEN / "reference.json").read_text())


def build_original(reference):
    model = instantiate(reference["config"]).eval()
    load_weights(model, load_file(GOLDEN / "model.safetensors"))
    return model


@pytest.fixture(scope="module")
def original(reference):
    return build_original(reference)


@pytest.fixture
def model(original):
    """The model without gradients and without checkpointing."""
    original.zero_grad()
    set_checkpointing(original, False)
    yield original
    torch._dynamo.reset()


@pytest.fixture
def decoder_input(recorded):
    """A function that gives the decoder's input in a container."""

    def make(container="batch", **control):
        sigma = recorded["sigmas"].view(-1, 1, 1, 1)
        noised = sigma * recorded["flow_noise"] + (1 - sigma) * recorded["vae_latents"]
        return {
            "enc_registers_quant": pack(recorded["quants"], container),
            "vae_latents_noised": pack(noised, container),
            "timesteps": recorded["sigmas"],
            **control,
        }

    return make


def assert_close(value, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(unpack(value).detach(), expected, rtol=0, atol=tolerance)


def set_checkpointing(model, on):
    for module in model.modules():
        if isinstance(module, FlexTransformer):
            module.use_act_checkpoint = on


def flow_loss(model, recorded, container="batch"):
    """Mean squared error of the velocity for the recorded latents, noise and keep_k."""
    control = {"eval_keep_k": recorded["eval_keep_k"]}
    data_dict = model.encode({"vae_latents": pack(recorded["vae_latents"], container), **control})
    sigma = recorded["sigmas"].view(-1, 1, 1, 1)
    noised = sigma * recorded["flow_noise"] + (1 - sigma) * recorded["vae_latents"]
    data_dict.update(vae_latents_noised=pack(noised, container), timesteps=recorded["sigmas"])
    velocity = unpack(model.decoder(data_dict)["vae_latents_reconst"])
    return (velocity - (recorded["flow_noise"] - recorded["vae_latents"])).square().mean()


@pytest.mark.parametrize("container", CONTAINERS)
def test_encoder_gives_the_recorded_registers_quants_and_tokens(model, recorded, container):
    data_dict = model.encode({"vae_latents": pack(recorded["vae_latents"], container)})
    assert torch.equal(unpack(data_dict["tokens"]), recorded["tokens"])
    assert_close(data_dict["enc_registers"], recorded["enc_registers"])
    assert_close(data_dict["enc_registers_quant"], recorded["quants"])


def test_recorded_tokens_give_the_recorded_quants(model, recorded):
    assert_close(model.regularizer.indices_to_embedding(recorded["tokens"]), recorded["quants"])


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("condition", ["full", "keep_k", "uncond"])
def test_decoder_gives_the_recorded_velocity(model, recorded, decoder_input, container, condition):
    control = {
        "full": {},
        "keep_k": {"eval_keep_k": recorded["eval_keep_k"]},
        "uncond": {"eval_dropout_mask": [True] * 3},
    }[condition]
    data_dict = model.decoder(decoder_input(container, **control))
    assert_close(data_dict["vae_latents_reconst"], recorded[f"velocity_{condition}"])


@pytest.mark.parametrize("container", CONTAINERS)
def test_decoder_leaves_the_recorded_repa_activations(model, recorded, decoder_input, container):
    data_dict = model.decoder(decoder_input(container))
    assert_close(data_dict["dec_patches_repa_layer"], recorded["dec_patches_repa_layer"])


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("sampler", ["plain", "cfg", "apg"])
def test_samplers_give_the_recorded_latents(model, recorded, reference, monkeypatch, container, sampler):
    monkeypatch.setattr(model.vae, "decode", lambda data_dict: data_dict)
    keep_k = recorded["eval_keep_k"].tolist()
    data_dict = model.decode(
        {
            "tokens": [row[None, :k] for row, k in zip(recorded["tokens"], keep_k)],
            "flow_noise": pack(recorded["flow_noise"], container),
        },
        timesteps=reference["sampling"]["timesteps"],
        guidance_scale=1.0 if sampler == "plain" else reference["sampling"]["guidance_scale"],
        perform_norm_guidance=sampler == "apg",
    )
    assert_close(data_dict["vae_latents_reconst"], recorded[f"sample_{sampler}"])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("container", CONTAINERS)
def test_flow_loss_and_gradient_norms_are_the_recorded_ones(model, recorded, reference, container, checkpointing):
    set_checkpointing(model, checkpointing)
    loss = flow_loss(model, recorded, container)
    assert abs(loss.item() - reference["flow_loss"]) < 1e-6
    loss.backward()
    norms = {name: gradient.norm().item() for name, gradient in gradients(model).items()}
    assert norms.keys() == reference["grad_norms"].keys()
    assert norms == pytest.approx(reference["grad_norms"], rel=1e-4)


def test_gradient_checkpointing_recomputes_each_block_and_changes_no_bit(model, recorded):
    flow_loss(model, recorded).backward()
    plain = gradients(model)
    model.zero_grad()
    set_checkpointing(model, True)
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    calls = []
    hooks = [module.register_forward_hook(lambda module, *_: calls.append(module)) for module in attentions]
    flow_loss(model, recorded).backward()
    for hook in hooks:
        hook.remove()
    assert sorted(map(id, calls)) == sorted(map(id, attentions * 2))
    checkpointed = gradients(model)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_a_compiled_decoder_trains_with_one_graph_for_all_steps():
    model, graphs = tiny_model(encoder_depth=1, null_condition_prob=0.5).train(), CompileCounter()
    decoder = torch.compile(model.decoder, backend=graphs, fullgraph=True)
    for step in range(3):
        data_dict = {
            "enc_registers_quant": make_noise(3, N_REGISTERS, 6), "vae_latents_noised": make_noise(3, *LATENT_SHAPE),
            "timesteps": torch.tensor([0.1, 0.5, 0.9]), RANDOM_KEY: make_draws(3, step=step),
        }  # fmt: skip
        compiled, plain = decoder(dict(data_dict)), model.decoder(dict(data_dict))
        assert torch.equal(compiled["train_keep_k"], plain["train_keep_k"])
        assert_close(compiled["vae_latents_reconst"], plain["vae_latents_reconst"].detach())
    assert graphs.frame_count <= 2  # dynamo makes the step a variable when it changes for the first time
