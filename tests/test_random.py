"""Addressed random numbers: a pure function of seed, step, position and name."""

import math

import pytest
import torch
from helpers import make_draws, make_images, tiny_model_that_draws

from flextok.utils.random import RANDOM_KEY, BatchRandom, address_key, generator, uniform_number

MASK = (1 << 64) - 1


def splitmix64(state, count):
    """The SplitMix64 sequence as its authors print it (Steele et al. 2014)."""
    outputs = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        outputs.append(z ^ (z >> 31))
    return outputs


def image_key(seed, name, step, position):
    """The state from which the draws of one image start."""
    return splitmix64((address_key(seed, name, step) + position) & MASK, 1)[0]


def uniform_reference(seed, name, step, position, count):
    return [(bits >> 11) / 2**53 for bits in splitmix64(image_key(seed, name, step, position), count)]


def normal_reference(seed, name, step, position, count):
    numbers = []
    for bits in splitmix64(image_key(seed, name, step, position), count):
        radius = math.sqrt(-2 * math.log(((bits >> 32) + 0.5) / 2**32))
        numbers.append(radius * math.cos(2 * math.pi * (bits & 0xFFFFFFFF) / 2**32))
    return numbers


def test_reference_sequence_is_the_published_splitmix64():
    # First outputs for seed 1234567, as in the test vectors of the Rosetta Code page and of many libraries.
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniform_draws_follow_splitmix64_in_double_precision():
    positions = [0, 3, 2**40]
    draws = BatchRandom(11, 5, torch.tensor(positions)).uniform("sigma", (4,))
    assert draws.dtype == torch.float64
    assert draws.tolist() == [uniform_reference(11, "sigma", 5, position, 4) for position in positions]


def test_normal_draws_follow_box_muller_of_splitmix64():
    draws = BatchRandom(11, 5, torch.tensor([3])).normal("noise", (64, 32))
    expected = torch.tensor(normal_reference(11, "noise", 5, 3, 2048), dtype=torch.float64)
    assert draws.dtype == torch.float32
    torch.testing.assert_close(draws.flatten().double(), expected, rtol=1e-6, atol=1e-7)


def test_stream_never_changes():
    assert address_key(0, "keep_k") == 12648195170209397536
    assert address_key(-1, "épreuve", 2, 3) == 12082609991133857549
    draws = BatchRandom(42, 7, torch.tensor([0, 5]))
    assert draws.uniform("sigma").tolist() == [0.5291824236640649, 0.16185275035959468]
    assert draws.integers("keep_k", 1, 256, (3,)).tolist() == [[126, 66, 154], [29, 9, 9]]
    normal = torch.tensor([[-0.78937685, -1.32192552], [-1.65226388, -0.09094802]])
    torch.testing.assert_close(draws.normal("flow_noise", (2,)), normal, rtol=1e-6, atol=1e-7)
    assert draws.batch_integer("registers", 0, 1000) == 980
    assert torch.randint(0, 2**31, (2,), generator=generator(42, "shuffle", 3)).tolist() == [1077035397, 1521262184]


def test_one_number_and_the_tensor_draw_agree_exactly():
    draws = BatchRandom(9, 4, torch.arange(6)).uniform("crop")
    assert draws.tolist() == [uniform_number(9, "crop", 4, position) for position in range(6)]


def test_integers_are_uniform_with_both_ends_included():
    integers = BatchRandom(1, 2, torch.arange(500)).integers("k", 3, 7, (100,))
    assert integers.dtype == torch.long
    counts = torch.bincount(integers.flatten(), minlength=9).tolist()
    assert counts[:3] == [0] * 3 and counts[8:] == [0] and counts[3:8] == pytest.approx([10_000] * 5, abs=450)


def test_selected_images_keep_their_draws():
    draws = BatchRandom(1, 2, torch.arange(10, 16), 64)
    chosen = draws.select([4, 0, 4])
    assert chosen.global_batch_size == 64 and chosen.batch_integer("i", 0, 10**6) == draws.batch_integer("i", 0, 10**6)
    assert torch.equal(chosen.uniform("u", (5,)), draws.uniform("u", (5,))[[4, 0, 4]])
    assert torch.equal(chosen.normal("n", (5,)), draws.normal("n", (5,))[[4, 0, 4]])


def test_given_draws_leave_torchs_global_state_alone():
    model = tiny_model_that_draws()
    before = torch.get_rng_state()
    model({"rgb": make_images(2), RANDOM_KEY: make_draws(2)})
    assert torch.equal(torch.get_rng_state(), before)
