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


def container_of(value):
    """`batch` or `list`, after checking that a list holds [1, ...] tensors."""
    if isinstance(value, torch.Tensor):
        return "batch"
    assert isinstance(value, list) and all(item.shape[0] == 1 for item in value)
    return "list"


def assert_close(value, expected, tolerance=2e-5):
    torch.testing.assert_close(unpack(value).detach(), unpack(expected).detach(), rtol=1e-5, atol=tolerance)


# Containers


@pytest.mark.parametrize("container", CONTAINERS)
def test_encode_keeps_the_container(model, container):
    data_dict = model.encode({"rgb": pack(make_images(3), container)})
    for key, shape in {"vae_latents": LATENT_SHAPE, "enc_registers_quant": (8, 6), "tokens": (8,)}.items():
        assert container_of(data_dict[key]) == container
        assert unpack(data_dict[key]).shape == (3, *shape)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("training", [False, True])
def test_forward_keeps_the_container(model, container, training):
    model.train(training)
    data_dict = model({"rgb": pack(make_images(3), container), RANDOM_KEY: make_draws(3)})
    for key in ("vae_latents", "vae_latents_noised", "flow_noise", "tokens", *VELOCITY_AND_REPA):
        assert container_of(data_dict[key]) == container
        assert len(unpack(data_dict[key])) == 3
    for key in ("sigmas", "timesteps"):
        assert unpack(data_dict[key]).shape == (3,)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("source", ["tokens", "enc_registers_quant"])
def test_decode_keeps_the_container(model, container, source):
    encoded = model.encode({"rgb": pack(make_images(3), container)})
    data_dict = model.decode({source: encoded[source]}, timesteps=1)
    assert unpack(data_dict[source]).shape == unpack(encoded[source]).shape
    for key, shape in {"vae_latents_reconst": LATENT_SHAPE, "rgb_reconst": (3, 32, 32)}.items():
        assert container_of(data_dict[key]) == container_of(data_dict[source]) == container
        assert unpack(data_dict[key]).shape == (3, *shape)


@pytest.mark.parametrize("container", CONTAINERS)
def test_autoencode_keeps_the_container(model, container):
    data_dict = model.autoencode({"rgb": pack(make_images(2), container)}, timesteps=1)
    assert container_of(data_dict["rgb_reconst"]) == container


@pytest.mark.parametrize("container", CONTAINERS)
def test_tokenize_gives_a_list_and_detokenize_a_batch(model, container):
    tokens = model.tokenize(pack(make_images(3), container))
    assert container_of(tokens) == "list" and len(tokens) == 3
    assert all(t.shape == (1, N_REGISTERS) and t.dtype == torch.long for t in tokens)
    images = model.detokenize(tokens, timesteps=1)
    assert images.shape == (3, 3, 32, 32)


def test_tokenize_takes_any_sequence_of_images(model):
    images = make_images(3)
    expected = model.tokenize(images)
    assert torch.equal(torch.cat(model.tokenize(tuple(images.split(1)))), torch.cat(expected))


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
    gradients = []
    for container in CONTAINERS:
        noised = make_noise(3, *LATENT_SHAPE).requires_grad_()
        quants = make_noise(3, N_REGISTERS, 6).requires_grad_()
        data_dict = {"vae_latents_noised": pack(noised, container), "enc_registers_quant": pack(quants, container)}
        velocity = model.decoder({**data_dict, "timesteps": [0.2, 0.5, 0.9]})["vae_latents_reconst"]
        unpack(velocity).square().sum().backward()
        gradients.append((noised.grad, quants.grad))
    for batch, listed in zip(*gradients):
        torch.testing.assert_close(batch, listed)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_modules_called_one_by_one_compute_what_the_model_computes(model, container, part):
    def inputs():
        if part == "encoder":
            return {"vae_latents": pack(make_noise(3, *LATENT_SHAPE), container)}
        quants, noised = make_noise(3, N_REGISTERS, 6), make_noise(3, *LATENT_SHAPE)
        return {
            "enc_registers_quant": pack(quants, container), "vae_latents_noised": pack(noised, container),
            "timesteps": torch.tensor([0.2, 0.5, 0.9]),
        }  # fmt: skip

    data_dict = inputs()
    for module in getattr(model, part).module_dict.values():
        data_dict = module(data_dict)
    written = "enc_registers" if part == "encoder" else "vae_latents_reconst"
    assert container_of(data_dict[written]) == container
    assert_close(data_dict[written], getattr(model, part)(inputs())[written])


def test_a_data_dict_used_again_holds_what_the_second_call_wrote(model):
    data_dict = model.encoder({"vae_latents": pack(make_noise(2, *LATENT_SHAPE), "list")})
    smaller = pack(make_noise(2, 48, 4, 4), "list")
    again, fresh = model.encoder({**data_dict, "vae_latents": smaller}), model.encoder({"vae_latents": smaller})
    for key in ("enc_n_patches", "enc_ps_inner", "enc_ps_outer"):
        assert again[key] == fresh[key], key


def test_what_no_module_writes_comes_back_as_it_was(model):
    carried = {"eval_keep_k": [1, 2, 3], "names": ["a", "b", "c"], "note": "text", RANDOM_KEY: make_draws(3)}
    images = pack(make_images(3), "list")
    data_dict = model.encode({"rgb": images, **carried})
    assert all(data_dict[key] is value for key, value in carried.items())
    assert all(map(torch.equal, data_dict["rgb"], images))


# Mixed shapes


def test_mixed_image_sizes_are_encoded_as_one_by_one(model, mixed_images):
    together = model.encode({"rgb": mixed_images})
    for i, image in enumerate(mixed_images):
        alone = model.encode({"rgb": image})
        assert together["vae_latents"][i].shape == alone["vae_latents"].shape
        assert_close(together["enc_registers"][i], alone["enc_registers"])
        assert torch.equal(together["tokens"][i], alone["tokens"])


@pytest.mark.parametrize("training", [False, True])
def test_mixed_image_sizes_train_as_one_by_one(model, mixed_images, training):
    model.train(training)
    draws = make_draws(len(mixed_images))
    together = model({"rgb": mixed_images, RANDOM_KEY: draws})
    for i, image in enumerate(mixed_images):
        alone = model({"rgb": [image], RANDOM_KEY: draws.select([i])})
        for key in ("vae_latents_noised", *VELOCITY_AND_REPA):
            assert together[key][i].shape == alone[key][0].shape
            assert_close(together[key][i], alone[key][0])
        assert unpack(together["sigmas"])[i] == unpack(alone["sigmas"])[0]


def test_mixed_image_sizes_are_tokenised_in_their_order(model, mixed_images):
    tokens = model.tokenize(mixed_images)
    assert all(torch.equal(tokens[i], model.tokenize(image)[0]) for i, image in enumerate(mixed_images))
    assert len({tuple(t.flatten().tolist()) for t in tokens}) == len(tokens)


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


def test_mixed_token_lengths_are_decoded_as_one_by_one(model):
    lengths = [1, 8, 3, 8]
    tokens = [t[:, :k] for t, k in zip(model.tokenize(make_images(4)), lengths)]
    noise = make_noise(4, *LATENT_SHAPE)
    together = unpack(model.decode({"tokens": tokens, "flow_noise": noise}, timesteps=2)["rgb_reconst"])
    for i in range(4):
        alone = model.decode({"tokens": tokens[i], "flow_noise": noise[i : i + 1]}, timesteps=2)["rgb_reconst"]
        assert_close(together[i : i + 1], alone)


def test_mixed_token_lengths_are_detokenised_as_with_keep_k(model):
    tokens = model.tokenize(make_images(3))
    cut = [t[:, :k] for t, k in zip(tokens, (2, 8, 5))]
    images = model.detokenize(cut, timesteps=2, generator=torch.Generator().manual_seed(4))
    quants = model.regularizer.indices_to_embedding(torch.cat(tokens))
    data_dict = {"enc_registers_quant": quants, "eval_keep_k": [2, 8, 5]}
    expected = model.decode(data_dict, timesteps=2, generator=torch.Generator().manual_seed(4))["rgb_reconst"]
    assert_close(images, expected)


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
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

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
@pytest.mark.parametrize(
    "convert",
    [
        lambda values: values,
        lambda values: torch.tensor(values),
        lambda values: [torch.tensor(value) for value in values],
        lambda values: [torch.tensor([value]) for value in values],
    ],
    ids=["numbers", "tensor", "scalar tensors", "[1] tensors"],
)
def test_control_values_come_as_list_or_tensor(model, container, convert):
    controls = {"timesteps": [0.2, 0.5, 0.9], "eval_keep_k": [1, 8, 3], "eval_dropout_mask": [False, False, True]}

    def velocity(container, controls):
        data_dict = {
            "enc_registers_quant": pack(make_noise(3, N_REGISTERS, 6), container),
            "vae_latents_noised": pack(make_noise(3, *LATENT_SHAPE), container),
        }
        return model.decoder({**data_dict, **controls})["vae_latents_reconst"]

    converted = {key: convert(values) for key, values in controls.items()}
    assert_close(velocity(container, converted), velocity("batch", controls))


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("key, value", [("eval_keep_k", 3), ("eval_dropout_mask", True), ("timesteps", 0.5)])
def test_control_values_for_another_number_of_images_are_refused(model, container, key, value):
    data_dict = {
        "enc_registers_quant": pack(make_noise(3, N_REGISTERS, 6), container),
        "vae_latents_noised": pack(make_noise(3, *LATENT_SHAPE), container),
        "timesteps": torch.rand(3),
    }
    for length in (1, 2):  # a single value must not spread over all images unnoticed
        with pytest.raises(ValueError, match=rf"{length}.*3|3.*{length}"):
            model.decoder({**data_dict, key: [value] * length})


# Wrong containers


def test_unbatched_images_are_refused_with_their_shape(model):
    with pytest.raises(ValueError, match=r"'rgb' is a list.*\[3, 32, 32\]"):
        model.encode({"rgb": list(make_images(2))})
    with pytest.raises(ValueError, match=r"\[3, 32, 32\].*expected \[B, 3, H, W\]"):
        model.encode({"rgb": make_images(1)[0]})


def test_lists_of_different_lengths_are_refused_with_both_lengths(model):
    data_dict = {"enc_registers_quant": pack(make_noise(3, 8, 6), "list"), "timesteps": torch.rand(3)}
    with pytest.raises(ValueError, match="lists 3 images.*lists 2"):
        model.decoder({**data_dict, "vae_latents_noised": pack(make_noise(2, *LATENT_SHAPE), "list")})


def test_an_empty_list_of_images_is_refused(model):
    with pytest.raises(ValueError, match="'rgb'|images"):
        model.tokenize([])


def test_a_missing_input_is_named(model):
    with pytest.raises(KeyError, match="rgb"):
        model.encode({"pictures": make_images(1)})
    with pytest.raises(KeyError, match="enc_registers_quant.*tokens"):
        model.decode({"rgb": make_images(1)})


def test_draws_for_another_number_of_images_are_refused(model):
    with pytest.raises(ValueError, match="2 images.*has 3"):
        model.train()({"rgb": make_images(3), RANDOM_KEY: make_draws(2)})


def test_images_larger_than_the_positional_table_are_refused_with_both_sizes(model):
    with pytest.raises(ValueError, match=r"\[4, 4\].*\[5, 5\]"):
        model.encode({"rgb": make_images(1, 40, 40)})


def test_autoencode_returns_images_of_the_sizes_it_got(model, mixed_images):
    out = model.autoencode({"rgb": list(mixed_images)}, timesteps=1)["rgb_reconst"]
    assert [image.shape for image in out] == [image.shape for image in mixed_images]
    for image in mixed_images:
        assert model.autoencode({"rgb": image}, timesteps=1)["rgb_reconst"].shape == image.shape
