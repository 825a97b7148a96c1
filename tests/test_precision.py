"""bf16 autocast stays close to fp32, what must be fp32 is fp32, and repeats are identical."""

import pytest
import torch
from helpers import LATENT_SHAPE, N_REGISTERS, gradients, make_draws, make_images, make_noise, tiny_model
from torch.nn.functional import cosine_similarity

from flextok.model.layers.norm import Fp32LayerNorm
from flextok.model.preprocessors.time_embedding import TimestepEmbedder
from flextok.regularizers.quantize_fsq import FSQ
from flextok.utils.random import RANDOM_KEY


@pytest.fixture(scope="module")
def model():
    return tiny_model(null_condition_prob=0.3)


def bf16(enabled=True):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def training_step(model, autocast=False):
    """Loss, velocity and gradients of one step with fixed draws."""
    model.train()
    model.zero_grad()
    with bf16(autocast):
        data_dict = model({"rgb": make_images(6), RANDOM_KEY: make_draws(6)})
        target = data_dict["flow_noise"] - data_dict["vae_latents"]
        loss = (data_dict["vae_latents_reconst"].float() - target).square().mean()
    loss.backward()
    return loss.item(), data_dict["vae_latents_reconst"].detach().float(), gradients(model)


def decoder_input():
    return {
        "enc_registers_quant": make_noise(3, N_REGISTERS, 6).clamp(-1, 1),
        "vae_latents_noised": make_noise(3, *LATENT_SHAPE),
        "timesteps": torch.tensor([0.1, 0.5, 0.95]),
    }


def relative_error(value, expected):
    return ((value.float() - expected).norm() / expected.norm()).item()


def test_registers_under_bf16_are_close_to_fp32(model):
    expected = model.eval().encode({"rgb": make_images(3)})["enc_registers"]
    with bf16():
        registers = model.encode({"rgb": make_images(3)})["enc_registers"]
    assert 0 < relative_error(registers, expected) < 0.03


def test_velocity_under_bf16_is_close_to_fp32(model):
    expected = model.eval().decoder(decoder_input())
    with bf16():
        out = model.decoder(decoder_input())
    for key in ("vae_latents_reconst", "dec_patches_repa_layer"):
        assert 0 < relative_error(out[key], expected[key]) < 0.03


def test_gradients_under_bf16_are_finite_and_point_the_same_way(model):
    # The decoder alone: in a whole step a register near a rounding edge of FSQ may fall on its other side.
    def step(autocast):
        model.eval().zero_grad()
        with bf16(autocast):
            velocity = model.decoder(decoder_input())["vae_latents_reconst"]
        (velocity.float() - 1).square().mean().backward()
        return gradients(model)

    expected, cast = step(False), step(True)
    assert expected.keys() == cast.keys()
    for name, gradient in cast.items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all()
        assert cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.98, name
        assert relative_error(gradient.norm(), expected[name].norm()) < 0.05, name


def test_a_whole_training_step_under_bf16_is_finite_and_close(model):
    loss, _, _ = training_step(model)
    cast_loss, velocity, cast_gradients = training_step(model, autocast=True)
    assert cast_loss == pytest.approx(loss, rel=0.05)
    assert velocity.isfinite().all()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert cast_gradients.keys() == set(trained)
    assert all(gradient.isfinite().all() for gradient in cast_gradients.values())


def test_sampling_under_bf16_is_close_to_fp32(model):
    quants = decoder_input()["enc_registers_quant"]
    data_dict = {"enc_registers_quant": quants, "flow_noise": make_noise(3, *LATENT_SHAPE)}
    arguments = dict(timesteps=3, guidance_scale=2.0, perform_norm_guidance=True)
    expected = model.eval().decode(dict(data_dict), **arguments)["rgb_reconst"]
    with bf16():
        out = model.decode(dict(data_dict), **arguments)
    assert out["vae_latents_reconst"].dtype == torch.float32  # Euler steps add up in fp32
    assert relative_error(out["rgb_reconst"], expected) < 0.05


def test_layer_norm_is_computed_in_fp32(model):
    norm = Fp32LayerNorm(512)
    x = (make_noise(20, 512) + 30).bfloat16()  # bf16 sums would lose the deviations behind the mean
    exact = x.double()
    exact = (exact - exact.mean(-1, keepdim=True)) / (exact.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    for autocast in (False, True):
        with bf16(autocast):
            out = norm(x)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, exact.float().bfloat16())
    assert norm(make_noise(2, 512)).dtype == torch.float32


def test_every_layer_norm_of_a_model_works_in_fp32_under_autocast(model, monkeypatch):
    seen = []
    layer_norm = torch.nn.functional.layer_norm

    def record(x, *args, **kwargs):
        seen.append(x.dtype)
        return layer_norm(x, *args, **kwargs)

    monkeypatch.setattr("torch.nn.functional.layer_norm", record)
    with bf16():
        model.eval()({"rgb": make_images(1), RANDOM_KEY: make_draws(1)})
    assert len(seen) == (2 + 2) * 4 + 2  # norm1, norm2, q and k of each block; two heads
    assert set(seen) == {torch.float32}


def test_fsq_works_in_fp32_whatever_its_input():
    fsq = FSQ("z", "quants", "tokens", (8, 8, 8, 5, 5, 5)).eval()
    z = (make_noise(4, 500, 6) * 2).bfloat16()
    expected = fsq({"z": z.float()})
    with bf16():
        out = fsq({"z": z})
    assert out["quants"].dtype == torch.float32
    assert torch.equal(out["tokens"], expected["tokens"]) and torch.equal(out["quants"], expected["quants"])


def test_time_sinusoids_are_fp32_under_autocast():
    module = TimestepEmbedder("t", "emb", 8)
    t = torch.tensor([0.1, 0.7113, 0.999])
    with bf16():
        out = module.sinusoids(t)
    assert out.dtype == torch.float32 and torch.equal(out, module.sinusoids(t))


def test_sigmas_and_noised_latents_are_fp32_under_autocast(model):
    with bf16():
        data_dict = model.eval()({"rgb": make_images(2), RANDOM_KEY: make_draws(2)})
    for key in ("vae_latents", "sigmas", "timesteps", "flow_noise", "vae_latents_noised", "enc_registers_quant"):
        assert data_dict[key].dtype == torch.float32, key


@pytest.mark.parametrize("autocast", [False, True])
def test_a_repeated_step_is_identical_to_the_bit(model, autocast):
    first, second = training_step(model, autocast), training_step(model, autocast)
    assert first[0] == second[0] and torch.equal(first[1], second[1])
    assert all(torch.equal(gradient, second[2][name]) for name, gradient in first[2].items())
