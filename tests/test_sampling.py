"""Sampling against an independent implementation, and what tokens, sizes and generators mean for it."""

import math

import numpy as np
import pytest
import torch
from helpers import (
    LATENT_SHAPE,
    N_REGISTERS,
    make_images,
    make_noise,
    pack,
    randomise,
    tiny_config,
    tiny_model,
    tiny_model_that_draws,
    unpack,
)
from torch import nn

from flextok import FlexTokFromHub
from flextok.flow_matching import pipelines
from flextok.flow_matching.pipelines import MinRFPipeline
from flextok.training.token_use import reconstructions

SHAPE = (3, 4, 4)
STRENGTHS = [0.02, 0.2, 3.0]  # of the condition, per image


class ToyDecoder(nn.Module):
    """A decoder of one formula: v = tanh(x + t) + (condition, unless dropped) * (1 + t) * pattern."""

    eval_drop_flag_read_key = "drop"

    def __init__(self):
        super().__init__()
        self.passes = []

    def forward(self, data_dict):
        x, t = data_dict["x_t"], data_dict["t"].view(-1, 1, 1, 1)
        dropped = data_dict.get("drop", torch.zeros(len(x), dtype=torch.bool))
        self.passes.append((t[0].item(), bool(dropped.any())))
        condition = torch.where(dropped, 0.0, data_dict["condition"][:, 0]).view(-1, 1, 1, 1)
        pattern = torch.linspace(-1, 1, math.prod(SHAPE)).view(SHAPE).roll(5, dims=-1)
        data_dict["v"] = torch.tanh(x + t) + condition * (1 + t) * torch.sin(pattern * 7 + 20 * t)
        return data_dict


def make_pipeline(decoder=None):
    return MinRFPipeline(
        decoder or ToyDecoder(),
        noise_read_key="noise",
        latents_read_key="condition",
        timesteps_read_key="t",
        noised_images_read_key="x_t",
        reconst_write_key="v",
        out_channels=3,
    )


def sample(noise, pipeline=None, **arguments):
    data_dict = {"condition": torch.tensor(STRENGTHS)[:, None], "noise": noise}
    return (pipeline or make_pipeline())(data_dict, **arguments)["v"]


def sample_reference(noise, steps, guidance=lambda t: 1.0, apg=False):
    """Latents, and the norms of the guidance before they are bounded, image by image in float64."""
    results, norms = [], []
    for x, strength in zip(noise.double().numpy(), STRENGTHS, strict=True):
        running, image_norms = np.zeros(SHAPE), []
        for i in range(steps, 0, -1):
            t, g = i / steps, guidance(i / steps)
            pattern = np.roll(np.linspace(-1, 1, math.prod(SHAPE)).reshape(SHAPE), 5, axis=-1)
            v_u = np.tanh(x + t)
            v = v_c = v_u + strength * (1 + t) * np.sin(pattern * 7 + 20 * t)
            if g != 1 and not apg:
                v = v_u + g * (v_c - v_u)
            if g != 1 and apg:
                running = (v_c - v_u) - 0.5 * running
                norm = np.sqrt((running**2).sum())
                image_norms.append(norm)
                d = running * min(1.0, 2.5 / norm)
                d = d - (d * v_c).sum() / (v_c * v_c).sum() * v_c
                v = v_c + (g - 1) * d
            x = x - v / steps
        results.append(x)
        norms.append(image_norms)
    return torch.from_numpy(np.stack(results)), np.array(norms)


def assert_close(value, expected):
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 25])
def test_euler_steps_go_from_one_to_zero(steps):
    decoder, noise = ToyDecoder(), make_noise(3, *SHAPE)
    assert_close(sample(noise, make_pipeline(decoder), timesteps=steps), sample_reference(noise, steps)[0])
    assert [t for t, _ in decoder.passes] == pytest.approx([i / steps for i in range(steps, 0, -1)])
    assert not any(dropped for _, dropped in decoder.passes)


@pytest.mark.parametrize("scale", [0.0, 7.5])
def test_classifier_free_guidance_extrapolates_from_the_unconditional_velocity(scale):
    decoder, noise = ToyDecoder(), make_noise(3, *SHAPE)
    expected, _ = sample_reference(noise, 4, lambda t: scale)
    assert_close(sample(noise, make_pipeline(decoder), timesteps=4, guidance_scale=scale), expected)
    assert [dropped for _, dropped in decoder.passes] == [False, True] * 4


@pytest.mark.parametrize("scale", [0.5, 7.5])
def test_norm_guidance_has_momentum_a_norm_bound_and_no_parallel_part(scale):
    pipeline, noise = make_pipeline(), make_noise(3, *SHAPE)
    expected, norms = sample_reference(noise, 6, lambda t: scale, apg=True)
    assert (norms[0] < 2.5).all() and (norms[2] > 2.5).all()
    assert (norms[1] < 2.5).any() and (norms[1] > 2.5).any()
    for _ in range(2):  # each call starts without momentum
        assert_close(sample(noise, pipeline, timesteps=6, guidance_scale=scale, perform_norm_guidance=True), expected)


@pytest.mark.parametrize("apg", [False, True])
def test_guidance_scale_may_be_a_function_of_t_and_1_costs_one_pass(apg):
    asked, decoder, noise = [], ToyDecoder(), make_noise(3, *SHAPE)

    def scale(t):
        asked.append(t)
        return 1 + 3 * t if t > 0.5 else 1.0

    result = sample(noise, make_pipeline(decoder), timesteps=4, guidance_scale=scale, perform_norm_guidance=apg)
    assert asked == [1.0, 0.75, 0.5, 0.25]
    assert [dropped for _, dropped in decoder.passes] == [False, True, False, True, False, False]
    assert_close(result, sample_reference(noise, 4, scale, apg)[0])


# With a whole model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokens(model):
    return torch.cat(model.tokenize(make_images(3)))


@pytest.fixture(scope="module")
def detokenize(model):
    """`model.detokenize` from the start noise of a seed."""

    def run(tokens, seed=1, **arguments):
        return model.detokenize(tokens, generator=torch.Generator().manual_seed(seed), **{"timesteps": 1, **arguments})

    return run


def change(tokens, position):
    other = tokens.clone()
    other[:, position] = (other[:, position] + 12_345) % 64_000
    return other


@pytest.mark.parametrize("source", ["generator", "global"])
def test_the_generator_or_else_the_global_seed_decides_the_pictures(model, tokens, detokenize, source):
    def pictures(seed):
        if source == "generator":
            return detokenize(tokens, seed)
        torch.manual_seed(seed)
        return model.detokenize(tokens, timesteps=1)

    assert torch.equal(pictures(1), pictures(1)) and not pictures(1).requires_grad
    assert not torch.equal(pictures(1), pictures(2))


def test_sizes_of_latents_are_for_all_images_or_for_each(tokens, detokenize):
    assert torch.equal(detokenize(tokens, vae_image_sizes=[8, (8, 8), 8]), detokenize(tokens))
    assert detokenize(tokens, vae_image_sizes=(4, 6)).shape == (3, 3, 16, 24)
    pictures = detokenize(tokens, vae_image_sizes=[4, (8, 6), (8, 8)])
    assert [tuple(picture.shape) for picture in pictures] == [(1, 3, 16, 16), (1, 3, 32, 24), (1, 3, 32, 32)]
    with pytest.raises(ValueError, match="2 sizes for 3 images"):
        detokenize(tokens, vae_image_sizes=[8, 8])


@pytest.mark.parametrize("k", [1, 7])
def test_k_tokens_means_that_exactly_k_tokens_matter(model, tokens, k):
    def pictures(tokens, **control):
        data_dict = {"tokens": tokens, "flow_noise": make_noise(3, *LATENT_SHAPE), **control}
        return model.decode(data_dict, timesteps=2)["rgb_reconst"]

    expected = pictures(tokens, eval_keep_k=[k] * 3)
    assert torch.equal(pictures(tokens[:, :k]), expected)
    assert torch.equal(pictures(change(tokens, k), eval_keep_k=[k] * 3), expected)
    assert not torch.equal(pictures(change(tokens, k - 1), eval_keep_k=[k] * 3), expected)
    assert not torch.equal(pictures(change(tokens, -1)), pictures(tokens))  # without keep_k all of them


def test_given_start_noise_needs_no_key_in_the_config(tokens):
    """As published configs are: it is then looked for under the noise module's key."""
    config = tiny_config()
    assert config["pipeline"].pop("noise_read_key") == "flow_noise"
    model, keyed = randomise(FlexTokFromHub(config)).eval(), tiny_model()
    noise = make_noise(3, *LATENT_SHAPE)

    def pictures(model, **data):
        arguments = dict(timesteps=2, generator=torch.Generator().manual_seed(1))
        return model.decode({"tokens": tokens, **data}, **arguments)["rgb_reconst"]

    drawn, given = pictures(model), pictures(keyed, flow_noise=noise)
    assert torch.equal(pictures(model, flow_noise=noise), given) and not torch.equal(drawn, given)
    for container in ("batch", "list"):
        data = model.decode({"tokens": pack(tokens, container)}, timesteps=2, noise=pack(noise, container))
        assert torch.equal(unpack(data["rgb_reconst"]), given)
    encoded = {"enc_registers_quant": model.regularizer.indices_to_embedding(tokens)}
    ((k, images),) = reconstructions(model, encoded, noise, [N_REGISTERS], lambda: None, timesteps=2)
    assert k == N_REGISTERS and torch.equal(images, given.clamp(-1, 1))


def test_a_model_in_training_mode_samples_as_in_evaluation_mode_and_trains_on():
    model, images = tiny_model_that_draws().eval(), make_images(3)

    def detokenize(tokens, **arguments):
        return model.detokenize(tokens, timesteps=2, generator=torch.Generator().manual_seed(1), **arguments)

    tokens = torch.cat(model.tokenize(images))
    expected = detokenize(tokens[:, :3])
    model.train()
    model.decoder.module_dict["dec_transformer"].blocks[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert torch.equal(torch.cat(model.tokenize(images)), tokens)
    assert torch.equal(detokenize(tokens[:, :3]), expected)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert modes["decoder"] and not modes["decoder.module_dict.dec_transformer.blocks.0"]


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([torch.zeros(1, 9, dtype=torch.long)], r"torch.int64 \[1, 9\], expected integers \[1, l\] with l from 1 to 8"),
        ([torch.zeros(1, 2, dtype=torch.long), torch.tensor([[64_000]])], "image 1"),
        (torch.zeros(4, dtype=torch.long), r"\[1\], expected .*one batch \[B, l\]"),
        (torch.tensor([[1, 2], [3, -1]]), "image 1.*0 to 63999"),
    ],
)
def test_wrong_tokens_are_refused_with_what_is_wrong(model, tokens, message):
    with pytest.raises(ValueError, match=message):
        model.detokenize(tokens, timesteps=1)


@pytest.mark.parametrize("apg", [False, True])
def test_both_passes_as_one_batch_as_on_gpus_give_the_same(tokens, monkeypatch, apg):
    """With a token count for each image."""
    model, sizes = tiny_model_that_draws().eval(), []
    transformer = model.decoder.module_dict["dec_transformer"]
    transformer.register_forward_hook(lambda *call: sizes.append(len(call[2]["dec_packed_seq"])))

    def sample():
        sampler = dict(timesteps=2, guidance_scale=4.0, perform_norm_guidance=apg, noise=make_noise(3, *LATENT_SHAPE))
        return model.decode({"tokens": tokens, "eval_keep_k": [1, 8, 3]}, **sampler)["rgb_reconst"]

    apart = sample()
    monkeypatch.setattr(pipelines, "ONE_BATCH_ON", ("cpu",))
    torch.testing.assert_close(sample(), apart, rtol=1e-4, atol=1e-4)
    assert sizes == [3] * 4 + [6] * 2
