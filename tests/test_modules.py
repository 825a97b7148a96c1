"""The parts of encoder and decoder against independent computations."""

import math

import numpy as np
import pytest
import torch
from helpers import make_draws, make_images, make_noise, randomise, tiny_model

from flextok.flow_matching.noise_modules import MinRFNoiseModule
from flextok.model.preprocessors.flex_seq_packing import BlockWiseSequencePacker
from flextok.model.preprocessors.nullcond import LearnedNullCond, ZeroNullCond
from flextok.model.preprocessors.token_dropout import MaskedNestedDropout
from flextok.model.trunks.transformers import FlexTransformer
from flextok.model.utils.posembs import PositionalEmbedding
from flextok.regularizers.quantize_fsq import FSQ
from flextok.utils.random import RANDOM_KEY, BatchRandom

LEVELS = (8, 8, 8, 5, 5, 5)
HALF_WIDTHS = torch.tensor([4, 4, 4, 2, 2, 2])


def assert_uniform(u):
    """Kolmogorov-Smirnov: fails for uniform numbers in one of about 10 000 cases."""
    u = u.double().flatten().sort().values
    steps = torch.arange(len(u), dtype=torch.float64) / len(u)
    distance = torch.maximum((u - steps).abs(), (u - steps - 1 / len(u)).abs()).max().item()
    assert distance < 2.2 / math.sqrt(len(u)), distance


def assert_frequency(hits, p):
    """A share of `hits` within five standard deviations of p."""
    hits = hits.double().flatten()
    assert abs(hits.mean().item() - p) < 5 * math.sqrt(p * (1 - p) / len(hits)) + 1e-12


def assert_shares(drawn, shares):
    """Only the keys of `shares` are drawn, each as often as it says."""
    assert sorted(set(drawn.tolist())) == sorted(shares)
    for value, share in shares.items():
        assert_frequency(drawn == value, share)


# Positional embeddings


def test_sincos_table_follows_its_formula():
    dim, height, width = 24, 3, 5
    table = PositionalEmbedding(dim, [height, width], "sincos").posembs
    assert table.shape == (1, dim, height, width) and not table.requires_grad
    for r, c, k in np.ndindex(height, width, dim // 4):
        w = 10_000 ** (-k / (dim / 4))
        expected = [math.sin(r * w), math.cos(r * w), math.sin(c * w), math.cos(c * w)]
        assert table[0, k :: dim // 4, r, c].tolist() == pytest.approx(expected, abs=1e-6)


def interpolate_axis(table, size):
    """Linear resampling of the first axis, with the first and last positions kept."""
    positions = np.linspace(0, len(table) - 1, size)
    low = np.minimum(positions.astype(int), len(table) - 2)
    weight = (positions - low).reshape(-1, *[1] * (table.ndim - 1))
    return table[low] * (1 - weight) + table[low + 1] * weight


@pytest.mark.parametrize("posemb_type", ["sincos", "learnable_sum", "learnable_prod"])
def test_a_grid_is_cropped_or_resized_bilinearly_with_aligned_corners(posemb_type):
    absolute = randomise(PositionalEmbedding(8, [4, 6], posemb_type, "absolute"))
    assert torch.equal(absolute((2, 5)), absolute((4, 6))[:, :2, :5])
    resized = randomise(PositionalEmbedding(8, [4, 6], posemb_type, "interpolate"))
    table = resized((4, 6))[0].detach().double().numpy()
    for height, width in ((7, 3), (4, 9), (2, 2)):
        expected = interpolate_axis(interpolate_axis(table, height).swapaxes(0, 1), width).swapaxes(0, 1)
        np.testing.assert_allclose(resized((height, width))[0].detach().numpy(), expected, atol=1e-5)


# Sequences and attention


def make_packer(mask_mode, **more):
    return BlockWiseSequencePacker(["a", "b"], "seq", "mask", "inner", "outer", mask_mode, **more)


def make_transformer(**more):
    arguments = dict(dim=32, depth=2, head_dim=16, block_mask_read_key="mask")
    return randomise(FlexTransformer("seq", "out", **{**arguments, **more})).eval()


def visible(mask_mode, n_first, n_second):
    """Matrix: may token i (row) look at token j (column)?"""
    i, j = np.indices((n_first + n_second,) * 2)
    matrix = {"full": i >= 0, "causal": j <= i, "causal_last": (j < n_first) | ((i >= n_first) & (j <= i))}
    return torch.from_numpy(matrix[mask_mode])


def reference_transformer(transformer, x, allowed, embedding=None, lengths=None):
    """The blocks of a FlexTransformer written out for one image [N, D], token by token where it matters."""

    def norm(y):
        return (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    outputs = []
    for block in transformer.blocks:
        parts = [torch.zeros(len(x), x.shape[1])] * 6
        if embedding is not None:
            linear = block.adaLN_modulation[1]
            modulation = (embedding * embedding.sigmoid()) @ linear.weight.T + linear.bias
            of_part = modulation.reshape(len(lengths), 6, -1)
            part_of_token = [part for part, length in enumerate(lengths) for _ in range(length)]
            parts = [torch.stack([of_part[part, i] for part in part_of_token]) for i in range(6)]
        gate_msa, gate_mlp, shift_msa, scale_msa, shift_mlp, scale_mlp = parts
        if embedding is None:
            gate_msa = gate_mlp = torch.ones(len(x), x.shape[1])

        y = norm(x) * (1 + scale_msa) + shift_msa
        heads = []
        for h in range(x.shape[1] // 16):
            rows = slice(16 * h, 16 * (h + 1))
            q, k, v = (y @ layer.weight[rows].T for layer in (block.attn.wq, block.attn.wk, block.attn.wv))
            scores = (norm(q) @ norm(k).T) * 8 / 16
            heads.append(scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v)
        x = x + gate_msa * (torch.cat(heads, dim=1) @ block.attn.proj.weight.T)

        y = norm(x) * (1 + scale_mlp) + shift_mlp
        hidden = y @ block.mlp.fc1.weight.T
        hidden = hidden * hidden.sigmoid() * (y @ block.mlp.fc3.weight.T)
        x = x + gate_mlp * (hidden @ block.mlp.fc2.weight.T)
        outputs.append(x)
    return outputs


@pytest.mark.parametrize("mask_mode", ["full", "causal", "causal_last"])
@pytest.mark.parametrize("lengths", [(5, 5), (6, 3)], ids=["equal", "unequal"])
@pytest.mark.parametrize("modulations", [0, 1, 2])
def test_transformer_matches_its_blocks_written_out(mask_mode, lengths, modulations):
    adaln = dict(adaLN_emb_read_key="emb", adaLN_packing_fn_read_key="lengths", adaLN_expansion=modulations)
    layers = dict(intermediate_layer_write_key="layers", intermediate_layers=[0])
    transformer = make_transformer(**layers, **(adaln if modulations else {}))
    packer = make_packer(mask_mode, emb_packing_fn_write_key="lengths", per_subseq_embs=modulations == 2)
    first, second = make_noise(2, lengths[0], 32, seed=1), make_noise(2, lengths[1], 32, seed=2)
    embedding = make_noise(2, 32, seed=3)
    data_dict = transformer(packer({"a": first, "b": second, "emb": embedding}))
    for i in range(2):
        arguments = (embedding[i], lengths if modulations == 2 else (sum(lengths),)) if modulations else ()
        x = torch.cat([first[i], second[i]])
        expected = reference_transformer(transformer, x, visible(mask_mode, *lengths), *arguments)
        torch.testing.assert_close(data_dict["layers"][i], expected[0], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(data_dict["out"][i], expected[1], rtol=1e-4, atol=2e-5)


# Nested dropout and null conditions


@pytest.mark.parametrize(
    "mode, n, shares",
    [
        ("uniform", 12, {k: 1 / 12 for k in range(1, 13)}),
        ("pow2", 16, {k: 1 / 5 for k in (1, 2, 4, 8, 16)}),
        ("pow2", 12, {k: 1 / 4 for k in (1, 2, 4, 8)}),
        ("uniform_pow2", 16, {1: 1 / 16, 2: 1 / 16, 4: 1 / 8, 8: 1 / 4, 16: 1 / 2}),
        ("uniform_pow2", 12, {1: 1 / 12, 2: 1 / 12, 4: 1 / 6, 8: 1 / 3, 12: 1 / 3}),
        ("uniform_pow2", 1, {1: 1.0}),
    ],
)
def test_kept_tokens_are_drawn_per_image_from_the_named_distribution(mode, n, shares):
    module = MaskedNestedDropout("x", 4, size_sampling_mode=mode)
    assert_shares(module.sample_keep_k(BatchRandom(1, 2, torch.arange(20_000)), n), shares)


def masked(x, keep_k, token):
    """Registers from position k on replaced, image by image."""
    out = x.clone()
    for i, k in enumerate(keep_k):
        out[i, k:] = token
    return out


def test_nested_dropout_masks_from_the_drawn_or_given_position_on():
    module = randomise(MaskedNestedDropout("x", 4, eval_keep_k_read_key="given", train_keep_k_write_key="drawn"))
    token, x = module.dropout_mask_token.detach(), make_noise(20, 6, 4)
    data_dict = module({"x": x, RANDOM_KEY: make_draws(20), "given": [6] * 20})
    assert data_dict["drawn"].dtype == torch.long and len(set(data_dict["drawn"].tolist())) > 3
    assert torch.equal(data_dict["x"], masked(x, data_dict["drawn"].tolist(), token))
    module.eval()
    assert torch.equal(module({"x": x[:3]})["x"], x[:3])
    for keep_k in ([0, 1, 6], torch.tensor([3, 6, 2])):
        assert torch.equal(module({"x": x[:3], "given": keep_k})["x"], masked(x[:3], list(keep_k), token))


@pytest.mark.parametrize("cls", [LearnedNullCond, ZeroNullCond])
def test_null_condition_drops_whole_images_by_its_probability_or_flags(cls):
    x, flags = make_noise(4000, 2, 4), [True, False] * 2000
    for p in (0.0, 0.2, 1.0):
        module = cls("x", dim=4, dropout_prob=p) if cls is LearnedNullCond else cls("x", dropout_prob=p)
        module = randomise(module)
        null = module.nullcond.detach() if cls is LearnedNullCond else torch.zeros(4)
        out = module({"x": x, RANDOM_KEY: make_draws(4000)})["x"]
        dropped = (out == null).flatten(1).all(1)
        assert torch.equal(out, torch.where(dropped[:, None, None], null, x))
        assert_frequency(dropped, p)
        module.eval()
        assert torch.equal(module({"x": x})["x"], x)
        out = module({"x": x, "eval_dropout_mask": flags})["x"]
        assert torch.equal(out[1::2], x[1::2]) and torch.equal(out[::2], null.expand(2000, 2, 4))


@pytest.mark.parametrize("null_condition_prob, n_registers", [(0.0, 1), (1.0, 8)])
def test_every_trained_parameter_gets_a_gradient_in_each_step(null_condition_prob, n_registers):
    # With one register nothing is ever masked; with probability 0 nothing is dropped, with 1 everything.
    model = tiny_model(null_condition_prob=null_condition_prob, n_registers=n_registers).train()
    data_dict = model({"rgb": make_images(2), RANDOM_KEY: make_draws(2)})
    data_dict["vae_latents_reconst"].square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


# FSQ


def make_fsq(levels=LEVELS, **more):
    return FSQ("z", "quants", "tokens", levels, **more)


def bounds():
    """Half width and offset of the range of each channel, before rounding."""
    level = torch.tensor(LEVELS)
    return (level - 1) * 1.001 / 2, torch.where(level % 2 == 0, 0.5, 0.0)


def fsq_reference(z, levels):
    """Token and quantised value of one vector, in float64."""
    token, basis, quants = 0, 1, []
    for value, level in zip(z, levels, strict=True):
        half = (level - 1) * 1.001 / 2
        offset = 0.5 if level % 2 == 0 else 0.0
        code = round(math.tanh(value + math.atanh(offset / half)) * half - offset)
        quants.append(code / (level // 2))
        token += (code + level // 2) * basis
        basis *= level
    return token, quants


@pytest.mark.parametrize("levels", [LEVELS, (2, 3, 7), (16,)])
def test_fsq_follows_its_formula(levels):
    z = make_noise(2, 200, len(levels)) * 2
    z[:, 150:] *= 20  # beyond the outermost levels
    data_dict = make_fsq(levels).eval()({"z": z})
    expected = [fsq_reference(row, levels) for row in z.flatten(0, 1).tolist()]
    assert data_dict["tokens"].dtype == torch.long and data_dict["tokens"].shape == (2, 200)
    assert data_dict["tokens"].flatten().tolist() == [token for token, _ in expected]
    quants = torch.tensor([quants for _, quants in expected]).view(2, 200, -1)
    torch.testing.assert_close(data_dict["quants"], quants, rtol=0, atol=1e-6)


def test_all_64000_codes_round_trip_and_latents_behind_each_are_quantised_to_it():
    fsq, tokens = make_fsq(), torch.arange(64_000)
    quants = fsq.indices_to_embedding(tokens)
    codes = quants * HALF_WIDTHS
    assert fsq.codebook_size == 64_000 and len(quants.unique(dim=0)) == 64_000
    assert torch.equal(fsq.codes_to_indices(codes), tokens)
    half, offset = bounds()
    z = ((codes + offset) / half).double().atanh() - (offset / half).double().atanh()
    data_dict = fsq({"z": z.float()[None]})
    assert torch.equal(data_dict["tokens"][0], tokens) and torch.equal(data_dict["quants"][0], quants)


def test_some_images_stay_unquantised_or_have_codes_replaced_in_training_alone():
    z, draws = make_noise(1000, 40, 6), make_draws(1000)
    plain = make_fsq().eval()({"z": z})
    fsq = make_fsq(drop_quant_p=0.3)
    out = fsq({"z": z, RANDOM_KEY: draws})
    changed = (out["quants"] != plain["quants"]).flatten(1).any(1)
    assert_frequency(changed, 0.3)
    assert torch.equal(out["tokens"], plain["tokens"])
    torch.testing.assert_close(out["quants"][changed], (fsq.bound(z) / HALF_WIDTHS)[changed])
    assert torch.equal(fsq.eval()({"z": z})["quants"], plain["quants"])

    fsq = make_fsq(corrupt_tokens_p=0.6, min_corrupt_tokens_p=0.2, apply_corrupt_tokens_p=0.5)
    out = fsq({"z": z, RANDOM_KEY: draws})
    replaced = out["tokens"] != plain["tokens"]
    assert_frequency(replaced.any(1), 0.5)
    assert replaced[replaced.any(1)].double().mean().item() == pytest.approx(0.4, abs=0.02)  # of 0.2 to 0.6
    assert_uniform(out["tokens"][replaced] / 64_000)
    few = FSQ("z", "quants", "tokens", [2, 2], corrupt_tokens_p=1.0, apply_corrupt_tokens_p=1.0)
    assert few({"z": z[..., :2], RANDOM_KEY: draws})["tokens"].unique().tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(out["quants"], fsq.indices_to_embedding(out["tokens"]))
    assert torch.equal(fsq.eval()({"z": z})["tokens"], plain["tokens"])


# Noise


def draw_sigmas(n=20_000, positions=None, global_batch_size=None, **options):
    positions = torch.arange(n) if positions is None else positions
    module = MinRFNoiseModule("x", "noised", "timesteps", "sigmas", **{"ln": False, **options})
    return module.sample_sigmas(BatchRandom(3, 4, positions, global_batch_size)).double()


def normal_cdf_of_logit(sigmas):
    return (1 + torch.erf((sigmas / (1 - sigmas)).log() / math.sqrt(2))) / 2


def test_sigmas_are_uniform_or_logit_normal_or_follow_the_inverse_of_the_mode_scaled_formula():
    assert_uniform(draw_sigmas())
    assert_uniform(normal_cdf_of_logit(draw_sigmas(ln=True)))
    u = np.linspace(0, 1, 100_001)
    for s in (0.25, -0.5):
        sigmas = draw_sigmas(mode_scale=s)
        formula = 1 - u - s * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
        assert_uniform(torch.from_numpy(np.interp(sigmas.numpy(), formula[::-1], u[::-1])))
        assert 0 < sigmas.min() and sigmas.max() < 1


@pytest.mark.parametrize("ln", [False, True])
def test_stratified_sigmas_fill_each_bin_of_the_global_batch_once(ln):
    ranks = torch.arange(64).split(16)
    quantiles = torch.cat([draw_sigmas(positions=r, global_batch_size=64, stratisfied=True, ln=ln) for r in ranks])
    quantiles = normal_cdf_of_logit(quantiles) if ln else quantiles
    assert (quantiles * 64).floor().long().tolist() == list(range(64))
    assert_uniform(quantiles * 64 % 1)


def test_noised_latents_mix_clean_latents_and_noise_that_is_drawn_or_given():
    clean = make_noise(50, 4, 16, 16)
    module = MinRFNoiseModule("clean", "noised", "timesteps", "sigmas", ln=False, noise_read_key="given")
    for given in (None, make_noise(50, 4, 16, 16, seed=9)):
        out = module({"clean": clean, "given": given, RANDOM_KEY: make_draws(50)})
        assert out["sigmas"].dtype == torch.float32 and torch.equal(out["timesteps"], out["sigmas"])
        assert len(set(out["sigmas"].tolist())) == 50
        noise, sigma = out["flow_noise"], out["sigmas"][:, None, None, None]
        torch.testing.assert_close(out["noised"], sigma * noise + (1 - sigma) * clean)
        assert noise.mean().item() == pytest.approx(0, abs=0.025)
        assert noise.std().item() == pytest.approx(1, abs=0.02)
        assert len({row.sum().item() for row in noise}) == 50
        assert given is None or torch.equal(noise, given)


# Initialisation
