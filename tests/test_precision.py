"""bf16 autocast stays close to fp32, and what must be fp32 is fp32."""

import pytest
import torch
from helpers import LATENT_SHAPE, N_REGISTERS, make_draws, make_images, make_noise, tiny_model
from tiny_runs import make_trainer

from flextok.regularizers.quantize_fsq import FSQ
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


def test_token_metrics_and_pictures_are_in_the_precision_of_the_training():
    trainer, seen = make_trainer(use_amp=True, use_repa=False), []
    trainer.model.decoder.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    trainer.evaluator.tokens()
    trainer.evaluator.reconstructions()
    assert len(seen) > 10 and all(seen)
