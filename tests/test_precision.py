"""bf16 autocast stays close to fp32, and what must be fp32 is fp32."""

import pytest
import torch
from helpers import LATENT_SHAPE, N_REGISTERS, gradients, make_draws, make_images, make_noise, tiny_model
from torch.nn.functional import cosine_similarity

from flextok.regularizers.quantize_fsq import FSQ
from flextok.training import models
from flextok.training.config import TrainConfig
from flextok.utils.random import RANDOM_KEY


@pytest.fixture(scope="module")
def model():
    return tiny_model(null_condition_prob=0.3)


def bf16(enabled=True):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def decoder_input():
    return {
        "enc_registers_quant": make_noise(3, N_REGISTERS, 6).clamp(-1, 1),
        "vae_latents_noised": make_noise(3, *LATENT_SHAPE),
        "timesteps": torch.tensor([0.1, 0.5, 0.95]),
    }


def relative_error(value, expected):
    return ((value.float() - expected).norm() / expected.norm()).item()


def test_registers_and_velocity_under_bf16_are_close_to_fp32(model):
    expected = model.eval().encode({"rgb": make_images(3)}), model.decoder(decoder_input())
    with bf16():
        out = model.encode({"rgb": make_images(3)}), model.decoder(decoder_input())
    for i, key in ((0, "enc_registers"), (1, "vae_latents_reconst"), (1, "dec_patches_repa_layer")):
        assert 0 < relative_error(out[i][key], expected[i][key]) < 0.03


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


def test_sigmas_and_noised_latents_are_fp32_under_autocast(model):
    with bf16():
        data_dict = model.eval()({"rgb": make_images(2), RANDOM_KEY: make_draws(2)})
    for key in ("vae_latents", "sigmas", "timesteps", "flow_noise", "vae_latents_noised", "enc_registers_quant"):
        assert data_dict[key].dtype == torch.float32, key


def test_small_models_stay_in_fp32_on_a_cpu_however_fast_its_bf16_products_are(model, monkeypatch):
    monkeypatch.setattr(models, "faster_in_bf16", lambda *_: True)
    for width, expected in ((64, False), (768, True)):
        monkeypatch.setattr(model.decoder.module_dict["dec_transformer"], "dim", width)
        assert models.settled(TrainConfig(dataset_name="digits"), model, torch.device("cpu")).use_amp is expected
