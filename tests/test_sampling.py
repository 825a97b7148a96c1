"""Sampling against an independent implementation, and what tokens, sizes and generators mean for it."""

import math

import numpy as np
import pytest
import torch
from helpers import LATENT_SHAPE, N_REGISTERS, make_images, make_noise, tiny_model, tiny_model_that_draws
from torch import nn

from flextok.flow_matching.pipelines import DecoderPasses, MinRFPipeline

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
        self.passes.append((t[0].item(), bool(dropped.any()), self.training))
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


@pytest.mark.parametrize("steps", [1, 3, 25])
def test_euler_steps_go_from_one_to_zero(steps):
    decoder, noise = ToyDecoder(), make_noise(3, *SHAPE)
    assert_close(sample(noise, make_pipeline(decoder), timesteps=steps), sample_reference(noise, steps)[0])
    assert [t for t, _, _ in decoder.passes] == pytest.approx([i / steps for i in range(steps, 0, -1)])
    assert not any(dropped for _, dropped, _ in decoder.passes)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5])
def test_classifier_free_guidance_extrapolates_from_the_unconditional_velocity(scale):
    decoder, noise = ToyDecoder(), make_noise(3, *SHAPE)
    expected, _ = sample_reference(noise, 4, lambda t: scale)
    assert_close(sample(noise, make_pipeline(decoder), timesteps=4, guidance_scale=scale), expected)
    assert [dropped for _, dropped, _ in decoder.passes] == [False, True] * 4


@pytest.mark.parametrize("scale", [0.5, 3.0, 7.5])
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
    assert [dropped for _, dropped, _ in decoder.passes] == [False, True, False, True, False, False]
    assert_close(result, sample_reference(noise, 4, scale, apg)[0])


def test_guidance_without_a_null_condition_and_no_steps_are_refused():
    decoder = nn.Identity()
    decoder.forward = ToyDecoder().forward
    with pytest.raises(ValueError, match="guidance_scale needs a decoder with a null condition"):
        sample(make_noise(3, *SHAPE), make_pipeline(decoder), timesteps=1, guidance_scale=2.0)
    for timesteps in (0, -3):
        with pytest.raises(ValueError, match=f"timesteps is {timesteps}"):
            sample(make_noise(3, *SHAPE), timesteps=timesteps)


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

    assert torch.equal(pictures(1), pictures(1))
    assert not torch.equal(pictures(1), pictures(2))


def test_drawn_noise_is_standard_normal(model):
    data_dict = {"enc_registers_quant": make_noise(40, N_REGISTERS, 6)}
    generator = torch.Generator().manual_seed(3)
    noise = model.decode(data_dict, timesteps=1, generator=generator)["vae_latents_noised"]
    assert noise.shape == (40, *LATENT_SHAPE)
    assert noise.mean().item() == pytest.approx(0, abs=0.02) and noise.std().item() == pytest.approx(1, abs=0.02)


def test_sizes_of_latents_come_as_int_tuple_list_or_in_the_data_dict(model, tokens, detokenize, monkeypatch):
    expected = detokenize(tokens)
    for sizes in (None, 8, (8, 8), [8, 8, 8], [(8, 8), 8, (8, 8)]):
        assert torch.equal(detokenize(tokens, vae_image_sizes=sizes), expected)
    assert detokenize(tokens, vae_image_sizes=4).shape == (3, 3, 16, 16)
    assert detokenize(tokens, vae_image_sizes=(4, 6)).shape == (3, 3, 16, 24)
    pictures = detokenize(tokens, vae_image_sizes=[4, (8, 6), (8, 8)])
    assert [tuple(picture.shape) for picture in pictures] == [(1, 3, 16, 16), (1, 3, 32, 24), (1, 3, 32, 32)]
    with pytest.raises(ValueError, match="2 sizes for 3 images"):
        detokenize(tokens, vae_image_sizes=[8, 8])
    monkeypatch.setattr(model.pipeline, "target_sizes_read_key", "sizes")
    data_dict = {"tokens": tokens, "sizes": [(4, 4), (4, 4), (4, 4)]}
    assert model.decode(data_dict, timesteps=1)["rgb_reconst"].shape == (3, 3, 16, 16)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_k_tokens_means_that_exactly_k_tokens_matter(model, tokens, k):
    def pictures(tokens, **control):
        data_dict = {"tokens": tokens, "flow_noise": make_noise(3, *LATENT_SHAPE), **control}
        return model.decode(data_dict, timesteps=2)["rgb_reconst"]

    expected = pictures(tokens, eval_keep_k=[k] * 3)
    assert torch.equal(pictures(tokens[:, :k]), expected)
    assert torch.equal(pictures(change(tokens, k), eval_keep_k=[k] * 3), expected)
    assert not torch.equal(pictures(change(tokens, k - 1), eval_keep_k=[k] * 3), expected)
    assert not torch.equal(pictures(change(tokens, -1)), pictures(tokens))  # without keep_k all of them


def test_dropping_the_condition_by_hand_is_the_unconditional_pass(model, tokens):
    pictures = []
    for some in (tokens, tokens.roll(1, 0)):
        data_dict = {"tokens": some, "eval_dropout_mask": [True] * 3, "flow_noise": make_noise(3, *LATENT_SHAPE)}
        pictures.append(model.decode(data_dict, timesteps=2)["rgb_reconst"])
    assert torch.equal(*pictures)


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
    with pytest.raises(ValueError, match="positional"):  # a failed call changes no mode either
        detokenize(tokens, vae_image_sizes=100)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert modes["decoder"] and not modes["decoder.module_dict.dec_transformer.blocks.0"]


def test_sampling_builds_no_graph(model, tokens):
    assert not model.detokenize(tokens, timesteps=1).requires_grad
    quants = make_noise(2, N_REGISTERS, 6).requires_grad_()
    assert not model.decode({"enc_registers_quant": quants}, timesteps=1)["vae_latents_reconst"].requires_grad


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([], "empty"),
        ([torch.zeros(1, 0, dtype=torch.long)], r"torch.int64 \[1, 0\], expected integers \[1, l\] with l from 1 to 8"),
        ([torch.zeros(1, 9, dtype=torch.long)], r"torch.int64 \[1, 9\], expected integers \[1, l\] with l from 1 to 8"),
        ([torch.zeros(1, 8)], "torch.float32"),
        ([torch.zeros(1, 8, dtype=torch.bool)], "torch.bool"),
        ([torch.tensor([[0, 64_000]])], "0 to 64000.*0 to 63999"),
        ([torch.tensor([[0, -1]])], "-1 to 0, .*0 to 63999"),
        ([torch.zeros(1, 2, dtype=torch.long), torch.tensor([[64_000]])], "image 1"),
        ([torch.zeros(2, 4, dtype=torch.long)], r"image 0.*\[2, 4\]"),
        ([torch.zeros(4, dtype=torch.long)], r"image 0.*\[4\], expected integers \[1, l\]"),
        (torch.zeros(0, 4, dtype=torch.long), "empty"),
        (torch.zeros(4, dtype=torch.long), r"\[1\], expected .*one batch \[B, l\]"),
        (torch.zeros(2, 9, dtype=torch.long), "with l from 1 to 8"),
        (torch.tensor([[1, 2], [3, 64_000]]), "image 1.*0 to 63999"),
    ],
)
def test_wrong_tokens_are_refused_with_what_is_wrong(model, tokens, message):
    with pytest.raises(ValueError, match=message):
        model.detokenize(tokens, timesteps=1)


def test_a_progress_bar_is_shown_on_request_only(model, tokens, capsys):
    model.detokenize(tokens, timesteps=1)
    assert capsys.readouterr().err == ""
    model.detokenize(tokens, timesteps=1, verbose=True)
    assert "sampling" in capsys.readouterr().err


# Work done once per call


def test_what_does_not_depend_on_the_step_is_computed_once():
    model = tiny_model_that_draws().eval()
    calls = {name: 0 for name in model.decoder.module_dict}
    for name, module in model.decoder.module_dict.items():
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    tokens = model.tokenize(make_images(2))
    for guidance_scale, passes in ((1.0, 1), (3.0, 2), (lambda t: 1.0 if t > 0.5 else 3.0, 2)):
        calls.update(dict.fromkeys(calls, 0))
        model.detokenize(tokens, timesteps=5, guidance_scale=guidance_scale)
        once = {name for name, n in calls.items() if n == passes}
        assert once == {"dec_from_latents", "dec_registers_posemb_module", "dec_nested_dropout", "dec_latent_dropout"}
        steps = 7 if callable(guidance_scale) else 5 * passes
        assert {n for name, n in calls.items() if name not in once} == {steps}


def test_values_that_a_step_overwrites_are_those_of_the_condition_in_the_next():
    """The packed registers end under the key that the next step packs them from."""
    model = tiny_model_that_draws().eval()
    quants, noise = torch.randn(2, N_REGISTERS, 6), make_noise(2, *LATENT_SHAPE)
    data_dict = {"enc_registers_quant": quants, "flow_noise": noise}
    whole = model.pipeline(dict(data_dict), timesteps=3)["vae_latents_reconst"]
    x = noise
    for i in (3, 2, 1):
        step = {"enc_registers_quant": quants, "vae_latents_noised": x, "timesteps": torch.full((2,), i / 3)}
        with torch.no_grad():
            x = x - model.decoder(step)["vae_latents_reconst"] / 3
    torch.testing.assert_close(whole, x)


def test_a_module_that_shares_a_key_with_a_changing_one_is_not_run_once():
    decoder = tiny_model_that_draws().decoder
    fixed, varying = decoder.split(["dec_registers"])
    patches = ("dec_noise_channels_to_last", "dec_noise_patch_emb", "dec_patches_posemb_module")
    assert fixed == (*patches, "dec_time_embedder")
    assert [name for name in decoder.module_dict if name not in fixed] == list(varying)


@pytest.mark.parametrize("n", [1, 3])
def test_both_passes_as_one_batch_are_the_two_passes(n):
    """As on GPUs, with a token count for each image."""
    model = tiny_model_that_draws().eval()
    data_dict = {"enc_registers_quant": torch.randn(n, N_REGISTERS, 6), "eval_keep_k": [1, 8, 3][:n]}
    x = make_noise(n, *LATENT_SHAPE)
    predict = DecoderPasses(model.pipeline, data_dict)
    with torch.no_grad():
        apart = [predict(x, 0.4, (null,)) for null in (False, True)]
        torch.testing.assert_close(predict(x, 0.4, (False, True)), torch.cat(apart))
    assert not torch.allclose(*apart)
