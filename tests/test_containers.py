"""What goes in comes out: batches [B, ...] or lists of [1, ...], with the same numbers whoever shares the batch."""

import pytest
import torch
from helpers import (
    LATENT_SHAPE,
    N_REGISTERS,
    gradients,
    make_draws,
    make_images,
    make_noise,
    pack,
    tiny_model,
    tiny_model_that_draws,
    unpack,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flextok.utils.random import RANDOM_KEY

CONTAINERS = ("batch", "list")
VELOCITY_AND_REPA = ("vae_latents_reconst", "dec_patches_repa_layer")
SIZES = [(32, 32), (16, 16), (32, 32), (24, 32), (16, 16)]


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


def assert_container(data_dict, container, shapes):
    """The values have these shapes per image of three, in the container."""
    for key, shape in shapes.items():
        value = data_dict[key]
        assert isinstance(value, torch.Tensor if container == "batch" else list), key
        assert container == "batch" or all(len(image) == 1 for image in value), key
        assert unpack(value).shape == (3, *shape), key


def assert_close(value, expected, tolerance=2e-5):
    torch.testing.assert_close(unpack(value).detach(), unpack(expected).detach(), rtol=1e-5, atol=tolerance)


# Containers


@pytest.mark.parametrize("container", CONTAINERS)
def test_public_methods_keep_the_container(model, container):
    images = pack(make_images(3), container)
    sources = {"tokens": (N_REGISTERS,), "enc_registers_quant": (N_REGISTERS, 6)}
    pictures = {"vae_latents_reconst": LATENT_SHAPE, "rgb_reconst": (3, 32, 32)}
    encoded = model.encode({"rgb": images})
    assert_container(encoded, container, {"vae_latents": LATENT_SHAPE, **sources})
    for source, shape in sources.items():
        decoded = model.decode({source: encoded[source]}, timesteps=1)
        assert_container(decoded, container, {source: shape, **pictures})
    assert_container(model.autoencode({"rgb": images}, timesteps=1), container, {"rgb": (3, 32, 32), **pictures})
    for training in (False, True):
        data_dict = model.train(training)({"rgb": images, RANDOM_KEY: make_draws(3)})
        latents = dict.fromkeys(
            ("vae_latents", "vae_latents_noised", "flow_noise", "vae_latents_reconst"), LATENT_SHAPE
        )
        assert_container(data_dict, container, {**latents, "tokens": (8,), "dec_patches_repa_layer": (4, 4, 64)})
        assert data_dict["sigmas"].shape == data_dict["timesteps"].shape == (3,)


def test_tokenize_takes_any_sequence_and_gives_a_list(model):
    images = make_images(3)
    expected = model.tokenize(images)
    assert len(expected) == 3 and all(t.shape == (1, N_REGISTERS) and t.dtype == torch.long for t in expected)
    for sequence in (list(images.split(1)), tuple(images.split(1))):
        assert all(map(torch.equal, model.tokenize(sequence), expected))


@pytest.mark.parametrize("length", [1, 5, N_REGISTERS])
@pytest.mark.parametrize("dtype", [torch.long, torch.int32])
def test_detokenize_takes_a_batch_of_tokens_or_a_list(model, length, dtype):
    tokens = torch.cat(model.tokenize(make_images(3)))[:, :length].to(dtype)

    def pictures(tokens, **arguments):
        return model.detokenize(tokens, timesteps=2, generator=torch.Generator().manual_seed(4), **arguments)

    expected = pictures(tokens)
    assert expected.shape == (3, 3, 32, 32)
    for sequence in (list(tokens.split(1)), tokens.split(1)):
        assert torch.equal(pictures(sequence), expected)
    sizes = [picture.shape[1:] for picture in pictures(tokens, vae_image_sizes=[4, (8, 6), 8])]
    assert sizes == [(3, 16, 16), (3, 32, 24), (3, 32, 32)]


@pytest.mark.parametrize("training", [False, True])
def test_list_and_batch_give_the_same_numbers(model, training):
    model.train(training)
    from_batch, from_list = (
        model({"rgb": pack(make_images(4), container), RANDOM_KEY: make_draws(4)}) for container in CONTAINERS
    )
    assert from_batch.keys() == from_list.keys()
    for key in ("tokens", "vae_latents_noised", "sigmas", *VELOCITY_AND_REPA):
        assert torch.equal(unpack(from_batch[key]), unpack(from_list[key])), key


def test_gradients_reach_the_images_of_a_list(model):
    found = []
    for container in CONTAINERS:
        noised = make_noise(3, *LATENT_SHAPE).requires_grad_()
        quants = make_noise(3, N_REGISTERS, 6).requires_grad_()
        inputs = {"vae_latents_noised": pack(noised, container), "enc_registers_quant": pack(quants, container)}
        unpack(model.decoder(decoder_input(**inputs))["vae_latents_reconst"]).square().sum().backward()
        found.append((noised.grad, quants.grad))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_modules_called_one_by_one_compute_what_the_model_computes(model, part):
    inputs = {"vae_latents": make_noise(3, *LATENT_SHAPE)} if part == "encoder" else decoder_input()
    written = "enc_registers" if part == "encoder" else "vae_latents_reconst"
    data_dict = dict(inputs)
    for module in getattr(model, part).module_dict.values():
        data_dict = module(data_dict)
    assert torch.equal(data_dict[written], getattr(model, part)(dict(inputs))[written])


def test_what_no_module_writes_comes_back_as_it_was(model):
    carried = {"eval_keep_k": [1, 2, 3], "names": ["a", "b", "c"], "note": "text", RANDOM_KEY: make_draws(3)}
    images = pack(make_images(3), "list")
    data_dict = model.encode({"rgb": images, **carried})
    assert all(data_dict[key] is value for key, value in carried.items())
    assert all(map(torch.equal, data_dict["rgb"], images))


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


def test_mixed_image_sizes_are_tokenised_in_their_order_and_given_back(model, mixed_images):
    tokens = model.tokenize(mixed_images)
    assert all(torch.equal(tokens[i], model.tokenize(image)[0]) for i, image in enumerate(mixed_images))
    assert len({tuple(t.flatten().tolist()) for t in tokens}) == len(tokens)
    images = model.autoencode({"rgb": list(mixed_images)}, timesteps=1)["rgb_reconst"]
    assert [image.shape for image in images] == [image.shape for image in mixed_images]
    assert model.autoencode({"rgb": mixed_images[3]}, timesteps=1)["rgb_reconst"].shape == mixed_images[3].shape


def test_mixed_latent_sizes_are_decoded_as_one_by_one(model):
    quants = make_noise(4, N_REGISTERS, 6)
    noise = [make_noise(1, 48, size, 8, seed=size) for size in (8, 4, 6, 8)]
    control = {"eval_keep_k": [1, 8, 5, 2], "eval_dropout_mask": torch.tensor([False, False, True, False])}
    arguments = dict(timesteps=2, guidance_scale=2.0)
    together = model.decode({"enc_registers_quant": pack(quants, "list"), "flow_noise": noise, **control}, **arguments)
    for i in range(4):
        alone = {"enc_registers_quant": quants[i : i + 1], "flow_noise": noise[i]}
        alone.update({key: value[i : i + 1] for key, value in control.items()})
        assert_close(together["rgb_reconst"][i], model.decode(alone, **arguments)["rgb_reconst"])


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
    images, draws = make_images(8), make_draws(8)
    together = model({"rgb": images, RANDOM_KEY: draws})
    for i in range(8):
        alone = model({"rgb": images[i : i + 1], RANDOM_KEY: draws.select([i])})
        for key in ("tokens", "flow_noise", "sigmas"):
            assert torch.equal(together[key][i : i + 1], alone[key]), key
        for key in ("enc_registers_quant", *VELOCITY_AND_REPA):
            assert_close(together[key][i : i + 1], alone[key])


def test_the_gradient_of_a_batch_is_the_mean_over_its_images(model):
    def gradient(images, draws):
        model.zero_grad()
        data_dict = model({"rgb": images, RANDOM_KEY: draws})
        target = data_dict["flow_noise"] - data_dict["vae_latents"]
        (data_dict["vae_latents_reconst"] - target).square().mean().backward()
        return gradients(model)

    model.train()
    images, draws = make_images(4), make_draws(4)
    together = gradient(images, draws)
    alone = [gradient(images[i : i + 1], draws.select([i])) for i in range(4)]
    for name, expected in together.items():
        mean = sum(g[name] for g in alone) / 4
        torch.testing.assert_close(mean, expected, rtol=1e-3, atol=1e-5)


def test_work_grows_exactly_in_proportion_to_the_batch():
    def flops(n):
        model = tiny_model().train()
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):  # the products of its attention are counted one by one
            model({"rgb": make_images(n), RANDOM_KEY: make_draws(n)})["vae_latents_reconst"].sum().backward()
        return counter.get_flop_counts()["Global"]

    one, two, five = flops(1), flops(2), flops(5)
    assert {str(operation) for operation in one} >= {"aten.mm", "aten.bmm"}
    for operation, count in one.items():
        assert (two[operation], five[operation]) == (2 * count, 5 * count), operation


# Control values


@pytest.mark.parametrize("container", CONTAINERS)
def test_control_values_come_as_list_or_tensor(model, container):
    controls = {"timesteps": [0.2, 0.5, 0.9], "eval_keep_k": [1, 8, 3], "eval_dropout_mask": [False, False, True]}
    expected = model.decoder(decoder_input(**controls))["vae_latents_reconst"]
    for convert in (
        lambda values: values,
        lambda values: torch.tensor(values),
        lambda values: [torch.tensor(value) for value in values],
        lambda values: [torch.tensor([value]) for value in values],
    ):
        converted = {key: convert(values) for key, values in controls.items()}
        assert_close(model.decoder(decoder_input(container, **converted))["vae_latents_reconst"], expected)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("key, value", [("eval_keep_k", 3), ("eval_dropout_mask", True), ("timesteps", 0.5)])
def test_control_values_for_another_number_of_images_are_refused(model, container, key, value):
    for length in (1, 2):  # a single value must not spread over all images unnoticed
        with pytest.raises(ValueError, match=rf"{length}.*3|3.*{length}"):
            model.decoder(decoder_input(container, **{key: [value] * length}))


# Wrong inputs


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
@pytest.mark.parametrize("container", CONTAINERS)
def test_images_that_are_not_floats_are_refused_with_how_to_convert_them(model, container, dtype):
    pixels = (make_images(2) * 127.5 + 127.5).to(dtype)
    message = rf"{dtype}, expected floats in \[-1, 1\].*images / 127.5 - 1"
    for method in (model.tokenize, lambda images: model.encode({"rgb": images}), lambda images: model({"rgb": images})):
        with pytest.raises(ValueError, match=message):
            method(pack(pixels, container))


def test_wrong_containers_are_refused_with_what_is_wrong(model):
    with pytest.raises(ValueError, match=r"'rgb' is a list.*\[3, 32, 32\]"):
        model.encode({"rgb": list(make_images(2))})
    with pytest.raises(ValueError, match=r"\[3, 32, 32\].*expected floats \[B, 3, H, W\]"):
        model.encode({"rgb": make_images(1)[0]})
    with pytest.raises(ValueError, match="lists 3 images.*lists 2"):
        model.decoder(decoder_input("list", vae_latents_noised=pack(make_noise(2, *LATENT_SHAPE), "list")))
    with pytest.raises(ValueError, match="'rgb'|images"):
        model.tokenize([])
    with pytest.raises(ValueError, match="2 images.*has 3"):
        model.train()({"rgb": make_images(3), RANDOM_KEY: make_draws(2)})
    with pytest.raises(ValueError, match=r"\[4, 4\].*\[5, 5\]"):  # the positional table
        model.eval().encode({"rgb": make_images(1, 40, 40)})


def test_a_missing_input_is_named(model):
    with pytest.raises(KeyError, match="rgb"):
        model.encode({"pictures": make_images(1)})
    with pytest.raises(KeyError, match="enc_registers_quant.*tokens"):
        model.decode({"rgb": make_images(1)})
