"""What goes in comes out: batches [B, ...] or lists of [1, ...], with the same numbers whoever shares the batch."""

import pytest
import torch
from helpers import (
    LATENT_SHAPE,
    N_REGISTERS,
    make_draws,
    make_images,
    make_noise,
    pack,
    tiny_model,
    tiny_model_that_draws,
    unpack,
)

from flextok.utils.random import RANDOM_KEY

CONTAINERS = ("batch", "list")
VELOCITY_AND_REPA = ("vae_latents_reconst", "dec_patches_repa_layer")
SIZES = [(32, 32), (16, 16), (32, 32), (24, 32)]
SHAPES = {  # of one image
    **dict.fromkeys(("vae_latents", "vae_latents_noised", "flow_noise", "vae_latents_reconst"), LATENT_SHAPE),
    **dict.fromkeys(("rgb", "rgb_reconst"), (3, 32, 32)),
    "tokens": (N_REGISTERS,),
    "enc_registers_quant": (N_REGISTERS, 6),
    "dec_patches_repa_layer": (4, 4, 64),
}


@pytest.fixture(scope="module")
def shared():
    return tiny_model(null_condition_prob=0.3)


@pytest.fixture
def model(shared):
    yield shared.eval()
    shared.zero_grad()


@pytest.fixture
def mixed_images():
    return [make_images(1, *size, seed=i) for i, size in enumerate(SIZES)]


def decoder_input(container="batch", n=3, **controls):
    return {
        "enc_registers_quant": pack(make_noise(n, N_REGISTERS, 6), container),
        "vae_latents_noised": pack(make_noise(n, *LATENT_SHAPE), container),
        "timesteps": [0.2, 0.5, 0.9],
        **controls,
    }


def assert_close(value, expected, tolerance=2e-5):
    torch.testing.assert_close(unpack(value).detach(), unpack(expected).detach(), rtol=1e-5, atol=tolerance)


# Containers


@pytest.mark.parametrize("container", CONTAINERS)
def test_public_methods_keep_the_container(model, container):
    images = pack(make_images(3), container)

    def check(data_dict, *keys):
        for key in keys:
            value, shape = data_dict[key], SHAPES[key]
            assert isinstance(value, torch.Tensor if container == "batch" else list), key
            assert container == "batch" or all(len(image) == 1 for image in value), key
            assert unpack(value).shape == (3, *shape), key

    encoded = model.encode({"rgb": images})
    check(encoded, "vae_latents", "tokens", "enc_registers_quant")
    for source in ("tokens", "enc_registers_quant"):
        check(model.decode({source: encoded[source]}, timesteps=1), source, "vae_latents_reconst", "rgb_reconst")
    check(model.autoencode({"rgb": images}, timesteps=1), "rgb", "vae_latents_reconst", "rgb_reconst")
    data_dict = model.train()({"rgb": images, RANDOM_KEY: make_draws(3)})
    check(data_dict, "vae_latents_noised", "flow_noise", "vae_latents_reconst", "tokens", "dec_patches_repa_layer")
    assert data_dict["sigmas"].shape == data_dict["timesteps"].shape == (3,)


def test_tokenize_and_detokenize_take_a_batch_or_any_sequence(model):
    images = make_images(3)
    tokens = model.tokenize(images)
    assert all(t.shape == (1, N_REGISTERS) and t.dtype == torch.long for t in tokens)
    for sequence in (list(images.split(1)), images.split(1)):
        assert all(map(torch.equal, model.tokenize(sequence), tokens))

    def pictures(tokens, **arguments):
        return model.detokenize(tokens, timesteps=1, generator=torch.Generator().manual_seed(4), **arguments)

    first = torch.cat(tokens)[:, :5]
    expected = pictures(first)
    assert expected.shape == (3, 3, 32, 32)
    for given in (first.int(), list(first.split(1)), first.split(1)):
        assert torch.equal(pictures(given), expected)
    sizes = [picture.shape[1:] for picture in pictures(first, vae_image_sizes=[4, (8, 6), 8])]
    assert sizes == [(3, 16, 16), (3, 32, 24), (3, 32, 32)]


# Mixed shapes


@pytest.mark.parametrize("training", [False, True])
def test_mixed_image_sizes_run_as_one_by_one(model, mixed_images, training):
    model.train(training)
    draws = make_draws(len(mixed_images))
    together = model({"rgb": mixed_images, RANDOM_KEY: draws})
    for i, image in enumerate(mixed_images):
        alone = model({"rgb": image, RANDOM_KEY: draws.select([i])})
        assert torch.equal(together["tokens"][i], alone["tokens"])
        assert unpack(together["sigmas"])[i] == alone["sigmas"][0]
        for key in ("vae_latents", "enc_registers", "vae_latents_noised", *VELOCITY_AND_REPA):
            assert_close(together[key][i], alone[key])


@pytest.mark.parametrize("sizes", [SIZES, [(32, 32)] * 2], ids=["mixed", "equal"])
def test_every_module_alone_takes_lists_and_gives_lists_back(sizes):
    model, draws = tiny_model_that_draws().train(), make_draws(len(sizes))
    images = [make_images(1, *size, seed=i) for i, size in enumerate(sizes)]
    together, data_dict = model({"rgb": images, RANDOM_KEY: draws}), {"rgb": images, RANDOM_KEY: draws}
    encoder, decoder = model.encoder.module_dict.values(), model.decoder.module_dict.values()
    for part in (model.vae.encode, *encoder, model.regularizer, model.flow_matching_noise_module, *decoder):
        before = dict(data_dict)
        data_dict = part(data_dict)
        assert not any(isinstance(v, torch.Tensor) and v.ndim > 1 for v in data_dict.values()), part
        assert data_dict.keys() > before.keys() or any(data_dict[key] is not before[key] for key in before), part
    for key in ("tokens", "enc_registers_quant", "sigmas", *VELOCITY_AND_REPA):
        assert all(map(torch.equal, data_dict[key], together[key])), key
    reconstructed = model.vae.decode({"vae_latents_reconst": data_dict["vae_latents"]})["rgb_reconst"]
    assert all(map(torch.equal, reconstructed, images))


def test_mixed_token_lengths_are_decoded_as_one_by_one_and_as_with_keep_k(model):
    lengths = [1, 8, 3, 8]
    tokens = torch.cat(model.tokenize(make_images(4)))
    cut = [row[None, :k] for row, k in zip(tokens, lengths, strict=True)]
    noise = make_noise(4, *LATENT_SHAPE)

    def pictures(**inputs):
        return unpack(model.decode(inputs, timesteps=2)["rgb_reconst"])

    together = pictures(tokens=cut, flow_noise=noise)
    for i in range(4):
        assert_close(together[i : i + 1], pictures(tokens=cut[i], flow_noise=noise[i : i + 1]))
    quants = model.regularizer.indices_to_embedding(tokens)
    assert_close(together, pictures(enc_registers_quant=quants, eval_keep_k=lengths, flow_noise=noise))


# Independence of the images of a batch


@pytest.mark.parametrize("training", [False, True])
def test_an_image_does_not_depend_on_its_batch(training):
    model = tiny_model_that_draws().train(training)
    images, draws = make_images(4), make_draws(4)
    together = model({"rgb": images, RANDOM_KEY: draws})
    for i in range(4):
        alone = model({"rgb": images[i : i + 1], RANDOM_KEY: draws.select([i])})
        for key in ("tokens", "flow_noise", "sigmas"):
            assert torch.equal(together[key][i : i + 1], alone[key]), key
        for key in ("enc_registers_quant", *VELOCITY_AND_REPA):
            assert_close(together[key][i : i + 1], alone[key])


# Control values


@pytest.mark.parametrize("container", CONTAINERS)
def test_control_values_come_as_list_or_tensor(model, container):
    controls = {"timesteps": [0.2, 0.5, 0.9], "eval_keep_k": [1, 8, 3], "eval_dropout_mask": [False, False, True]}
    expected = model.decoder(decoder_input(**controls))["vae_latents_reconst"]
    for convert in (torch.tensor, lambda values: [torch.tensor([value]) for value in values]):
        converted = {key: convert(values) for key, values in controls.items()}
        assert_close(model.decoder(decoder_input(container, **converted))["vae_latents_reconst"], expected)


# Wrong inputs
