"""The parts of encoder and decoder against independent computations."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import make_draws, make_images, make_noise, randomise, tiny_model
from torch import nn

from flextok.flow_matching.noise_modules import MinRFNoiseModule
from flextok.model.layers.norm import Fp32LayerNorm
from flextok.model.postprocessors.heads import LinearHead, ToPatchesLinearHead
from flextok.model.postprocessors.seq_unpacking import SequenceUnpacker
from flextok.model.preprocessors.flex_seq_packing import BlockWiseSequencePacker
from flextok.model.preprocessors.linear import LinearLayer
from flextok.model.preprocessors.nullcond import LearnedNullCond, ZeroNullCond
from flextok.model.preprocessors.patching import PatchEmbedder
from flextok.model.preprocessors.registers import Registers1D
from flextok.model.preprocessors.time_embedding import TimestepEmbedder
from flextok.model.preprocessors.token_dropout import MaskedNestedDropout
from flextok.model.trunks.transformers import FlexTransformer
from flextok.model.utils.dict_ops import DictKeyFilter, PerSampleOp, channels_first_to_last, channels_last_to_first
from flextok.model.utils.posembs import PositionalEmbedding, PositionalEmbeddingAdder
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


@pytest.mark.parametrize("posemb_type", ["learnable_sum", "learnable_prod"])
def test_learned_tables_of_rows_and_columns_are_joined(posemb_type):
    module = randomise(PositionalEmbedding(6, [3, 5], posemb_type))
    assert module.posembs.shape == (2, 1, 6, 5) and module.posembs.requires_grad
    table = module((3, 5))
    assert table.shape == (1, 3, 5, 6)
    for r, c in np.ndindex(3, 5):
        row, column = module.posembs[0, 0, :, r], module.posembs[1, 0, :, c]
        assert torch.equal(table[0, r, c], row + column if posemb_type == "learnable_sum" else row * column)


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
    for sizes in ((5, 4), (4, 7)):
        with pytest.raises(ValueError, match=r"\[4, 6\].*\[[54], [47]\]"):
            absolute(sizes)
    resized = randomise(PositionalEmbedding(8, [4, 6], posemb_type, "interpolate"))
    table = resized((4, 6))[0].detach().double().numpy()
    for height, width in ((7, 3), (4, 9), (2, 2)):
        expected = interpolate_axis(interpolate_axis(table, height).swapaxes(0, 1), width).swapaxes(0, 1)
        np.testing.assert_allclose(resized((height, width))[0].detach().numpy(), expected, atol=1e-5)


def test_a_sequence_is_cropped_or_resized_linearly_with_aligned_ends():
    absolute = randomise(PositionalEmbedding(6, [7], "learnable_sum"))
    assert absolute.posembs.shape == (1, 1, 6, 7)
    assert torch.equal(absolute((4,)), absolute.posembs[0, :, :, :4].transpose(1, 2))
    resized = randomise(PositionalEmbedding(8, [6], "learnable_sum", "interpolate"))
    expected = interpolate_axis(resized((6,))[0].detach().double().numpy(), 9)
    np.testing.assert_allclose(resized((9,))[0].detach().numpy(), expected, atol=1e-5)


def test_posemb_adder_adds_to_each_image_and_keeps_the_table():
    module = randomise(PositionalEmbeddingAdder("x", "y", 8, [4, 6], "learnable_sum", posemb_write_key="table"))
    x = make_noise(3, 2, 5, 8)
    data_dict = module({"x": x})
    assert torch.equal(data_dict["table"], PositionalEmbedding.forward(module, (2, 5)))
    for i in range(3):
        assert torch.equal(data_dict["y"][i], x[i] + data_dict["table"][0])


# Patches


def test_patch_vectors_are_in_the_order_row_column_channel_there_and_back():
    p1, p2, channels = 2, 3, 4
    x = make_noise(2, 6, 9, channels)
    data_dict = PatchEmbedder("x", "patches", "n", [p1, p2], channels)({"x": x})
    assert data_dict["patches"].shape == (2, 3, 3, p1 * p2 * channels)
    assert tuple(data_dict["n"]) == (3, 3)
    for i, j, a, b, c in np.ndindex(3, 3, p1, p2, channels):
        index = (a * p2 + b) * channels + c
        assert torch.equal(data_dict["patches"][:, i, j, index], x[:, i * p1 + a, j * p2 + b, c])
    dim = p1 * p2 * channels
    head = ToPatchesLinearHead("patches", "y", dim, channels, [p1, p2], norm_layer=nn.Identity, proj_bias=False)
    head.proj.weight.data = torch.eye(dim)
    assert torch.equal(head(data_dict)["y"], x)


def test_patch_projection_is_a_linear_layer_on_patch_vectors():
    x = make_noise(2, 4, 6, 3)
    module = randomise(PatchEmbedder("x", "patches", "n", [2, 2], 3, dim=5, flatten_patches=True))
    plain = PatchEmbedder("x", "patches", "n", [2, 2], 3, flatten_patches=True)({"x": x})["patches"]
    assert plain.shape == (2, 6, 12)
    torch.testing.assert_close(module({"x": x})["patches"], F.linear(plain, *module.patch_proj.parameters()))


@pytest.mark.parametrize("shape", [(2, 5, 6, 4), (2, 6, 7, 4), (2, 6, 6, 3), (6, 6, 4)])
def test_grids_that_do_not_fit_the_patches_are_refused_with_both_shapes(shape):
    with pytest.raises(ValueError, match=r"'x' is \[.*expected \[B, H, W, 4\]"):
        PatchEmbedder("x", "patches", "n", [2, 2], 4, dim=8)({"x": make_noise(*shape)})


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


def test_modulation_parts_embeddings_and_sub_sequences_must_agree():
    transformer = make_transformer(adaLN_emb_read_key="emb", adaLN_packing_fn_read_key="lengths", adaLN_expansion=2)
    data_dict = {"seq": make_noise(2, 6, 32), "emb": make_noise(2, 32), "lengths": (2, 2, 2), "mask": None}
    with pytest.raises(ValueError, match="adaLN_expansion is 2.*3 sub-sequences"):
        transformer(dict(data_dict))
    with pytest.raises(ValueError, match="embedding is for 3 images.*2"):
        transformer({**data_dict, "lengths": (3, 3), "emb": make_noise(3, 32)})


def test_several_intermediate_layers_are_joined_in_the_listed_order():
    def layers(*indices):
        transformer = make_transformer(depth=3, intermediate_layer_write_key="layers", intermediate_layers=indices)
        return transformer({"seq": make_noise(2, 5, 32), "mask": None})["layers"]

    assert torch.equal(layers(2, 0), torch.cat([layers(2), layers(0)], dim=-1))
    assert not torch.equal(layers(0), layers(1))


def test_unpacking_inverts_packing():
    unpacker = SequenceUnpacker("seq", ["a2", "b2"], "inner", "outer")
    grid, sequence = make_noise(2, 2, 3, 8), make_noise(2, 4, 8)
    data_dict = unpacker(make_packer("full")({"a": grid, "b": sequence}))
    assert torch.equal(data_dict["seq"], torch.cat([grid.flatten(1, 2), sequence], dim=1))
    assert torch.equal(data_dict["a2"], grid) and torch.equal(data_dict["b2"], sequence)
    with pytest.raises(ValueError, match="10 tokens.*max_seq_len is 9"):
        make_packer("full", max_seq_len=9)({"a": grid, "b": sequence})


@pytest.mark.parametrize("gated, ratio, hidden", [(True, 4.0, 85), (True, 3.3, 70), (False, 3.3, 105)])
def test_mlp_has_its_width_and_follows_its_formula(gated, ratio, hidden):
    mlp = make_transformer(mlp_ratio=ratio, gated_mlp=gated, mlp_bias=True).blocks[0].mlp
    assert mlp.fc1.weight.shape == (hidden, 32) and mlp.fc2.weight.shape == (32, hidden)
    x = make_noise(2, 5, 32)
    inner = F.silu(mlp.fc1(x)) * (mlp.fc3(x) if gated else 1)
    torch.testing.assert_close(mlp(x), mlp.fc2(inner))
    assert (mlp.fc3 is not None) == gated


def test_bias_defaults_are_those_of_published_checkpoints():
    transformer = FlexTransformer("seq", "out", 32, 1, 16, adaLN_emb_read_key="emb")
    biases = [name for name, _ in transformer.named_parameters() if name.endswith("bias")]
    assert biases == ["blocks.0.adaLN_modulation.1.bias"]
    heads = LinearHead("x", "y", 4, 8), ToPatchesLinearHead("x", "y", 4, 8, [2, 2])
    for module in (LinearLayer("x", "y", 4, 8), *heads):
        assert module.proj.bias is not None


# Dropout of the transformer


def test_drop_path_skips_whole_branches_of_an_image():
    transformer = make_transformer(depth=2, drop_path_rate=0.25).train()
    first, second = transformer.blocks
    x = make_noise(1, 5, 32).expand(400, -1, -1)
    out = transformer({"seq": x, "mask": None, RANDOM_KEY: make_draws(400)})["out"]
    middle = x[:1] + first.attn(first.norm1(x[:1]))
    middle = middle + first.mlp(first.norm2(middle))  # the rate grows from 0 at the first block
    outcomes = {}
    for keep_attn in (0, 1):
        after = middle + keep_attn / 0.75 * second.attn(second.norm1(middle))
        for keep_mlp in (0, 1):
            outcomes[keep_attn, keep_mlp] = after + keep_mlp / 0.75 * second.mlp(second.norm2(after))
    hits = {kept: (out - expected).abs().amax((1, 2)) < 1e-4 for kept, expected in outcomes.items()}
    assert (sum(hit.long() for hit in hits.values()) == 1).all()
    assert_frequency(hits[0, 0] | hits[0, 1], 0.25)
    assert_frequency(hits[0, 0] | hits[1, 0], 0.25)
    assert_frequency(hits[0, 0], 0.0625)


def test_drop_zeroes_elements_and_scales_the_rest():
    transformer = make_transformer(depth=1, drop=0.2).train()
    block = transformer.blocks[0]
    block.attn.proj.weight.data.zero_()
    x = make_noise(50, 20, 32)
    out = transformer({"seq": x, "mask": None, RANDOM_KEY: make_draws(50)})["out"]
    share = (out - x) / block.mlp(block.norm2(x))
    dropped = share.abs() < 0.1
    torch.testing.assert_close(share[~dropped], torch.full_like(share[~dropped], 1.25), rtol=0, atol=0.02)
    assert_frequency(dropped, 0.2)


def test_dropout_is_a_function_of_the_address():
    transformer = make_transformer(drop=0.3, drop_path_rate=0.4).train()
    x = make_noise(6, 5, 32)

    def run(x, draws):
        return transformer({"seq": x, "mask": None, RANDOM_KEY: draws})["out"]

    out = run(x, make_draws(6))
    assert torch.equal(out, run(x, make_draws(6)))
    assert not torch.equal(out, run(x, make_draws(6, step=4)))
    for i in range(6):
        torch.testing.assert_close(run(x[i : i + 1], make_draws(6).select([i])), out[i : i + 1], rtol=1e-4, atol=1e-5)
    same = run(x[:1].expand(6, -1, -1), make_draws(6))
    assert len({tuple(row.flatten().tolist()) for row in same}) == 6
    evaluated = {"seq": x, "mask": None}
    assert torch.equal(transformer.eval()(dict(evaluated))["out"], make_transformer()(dict(evaluated))["out"])


# Time embedding


@pytest.mark.parametrize("size, max_timestep", [(256, 1.0), (64, 10.0)])
def test_time_sinusoids_follow_their_formula(size, max_timestep):
    t = torch.tensor([0.0, 0.013, 0.5, 0.999, 1.0]) * max_timestep
    out = TimestepEmbedder("t", "emb", 8, size, max_timestep=max_timestep).sinusoids(t)
    k = np.arange(size // 2)
    angles = t.double().numpy()[:, None] * (1000 / max_timestep) * 256.0 ** (-k / (size // 2))
    np.testing.assert_allclose(out.numpy(), np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=3e-4)
    assert out.dtype == torch.float32


def test_time_mlp_is_linear_silu_linear():
    module = randomise(TimestepEmbedder("t", "emb", 8, 16))
    t = torch.tensor([0.1, 0.9])
    expected = module.mlp[2](F.silu(module.mlp[0](module.sinusoids(t))))
    for given in (t, t.tolist()):
        torch.testing.assert_close(module({"t": given})["emb"], expected)


# Registers


def make_registers(**more):
    return randomise(Registers1D("x", "sizes", "registers", 4, **more))


@pytest.mark.parametrize("n_eval, expected", [(None, 12), (5, 5)])
def test_register_count_in_evaluation(n_eval, expected):
    module = make_registers(n_min=2, n_max=12, n_eval=n_eval).eval()
    assert module.n_max == 12
    registers = module({"x": make_noise(3, 2, 4)})["registers"]
    assert torch.equal(registers, module.registers[:expected].expand(3, -1, -1))


@pytest.mark.parametrize(
    "mode, n_min, allowed",
    [
        ("uniform", 3, list(range(3, 13))),
        ("powers_of_two", 1, [1, 2, 4, 8]),
        ("powers_of_two", 3, [4, 8]),
        ("k=1-3-12", 1, [1, 3, 12]),
        ("k=5", 1, [5]),
    ],
)
def test_register_counts_in_training_are_drawn_evenly(mode, n_min, allowed):
    module, counts = make_registers(n_min=n_min, n_max=12, size_sampling_mode=mode), []
    for step in range(600):
        data_dict = module({"x": make_noise(3, 2, 4), RANDOM_KEY: make_draws(3, step=step)})
        counts.append(data_dict["registers"].shape[1])
        assert tuple(data_dict["sizes"]) == (counts[-1],)
        assert torch.equal(data_dict["registers"], module.registers[: counts[-1]].expand(3, -1, -1))
    assert_shares(torch.tensor(counts), {n: 1 / len(allowed) for n in allowed})


@pytest.mark.parametrize("mode", ["k=0-2", "k=13", "k=1,2", "sometimes"])
def test_register_count_modes_that_cannot_be_drawn_are_refused(mode):
    with pytest.raises(ValueError, match="size_sampling_mode"):
        make_registers(n_max=12, size_sampling_mode=mode)


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
        out = module({"x": x, RANDOM_KEY: make_draws(4000), "eval_dropout_mask": flags})["x"]
        dropped = (out == null).flatten(1).all(1)
        assert torch.equal(out, torch.where(dropped[:, None, None], null, x))
        assert_frequency(dropped, p)
        module.eval()
        assert torch.equal(module({"x": x})["x"], x)
        for given in (flags, torch.tensor(flags)):
            out = module({"x": x, "eval_dropout_mask": given})["x"]
            assert torch.equal(out[1::2], x[1::2]) and torch.equal(out[::2], null.expand(2000, 2, 4))


@pytest.mark.parametrize("null_condition_prob", [0.0, 1.0])
@pytest.mark.parametrize("n_registers", [1, 8])
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
    data_dict = make_fsq(levels).eval()({"z": z})
    expected = [fsq_reference(row, levels) for row in z.flatten(0, 1).tolist()]
    assert data_dict["tokens"].dtype == torch.long and data_dict["tokens"].shape == (2, 200)
    assert data_dict["tokens"].flatten().tolist() == [token for token, _ in expected]
    quants = torch.tensor([quants for _, quants in expected]).view(2, 200, -1)
    torch.testing.assert_close(data_dict["quants"], quants, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def codebook():
    """All codes of the published levels: quantised values [64000, 6] and integer codes."""
    quants = make_fsq().indices_to_embedding(torch.arange(64_000))
    return quants, quants * HALF_WIDTHS


def test_all_64000_codes_round_trip_and_latents_behind_each_are_quantised_to_it(codebook):
    fsq, tokens, (quants, codes) = make_fsq(), torch.arange(64_000), codebook
    assert fsq.codebook_size == 64_000 and len(quants.unique(dim=0)) == 64_000
    assert torch.equal(fsq.codes_to_indices(codes), tokens)
    digits, rest = [], tokens.numpy()
    for level in LEVELS:
        digits.append((rest % level - level // 2) / (level // 2))
        rest = rest // level
    np.testing.assert_array_equal(quants.numpy(), np.stack(digits, axis=1).astype(np.float32))
    half, offset = bounds()
    z = ((codes + offset) / half).double().atanh() - (offset / half).double().atanh()
    data_dict = fsq({"z": z.float()[None]})
    assert torch.equal(data_dict["tokens"][0], tokens) and torch.equal(data_dict["quants"][0], quants)


@pytest.mark.parametrize("level", [2, 3, 4, 5, 8, 16])
def test_every_level_can_be_reached_and_no_other(level):
    z = torch.linspace(-30, 30, 60_001)[None, :, None]
    tokens = make_fsq((level,)).eval()({"z": z})["tokens"]
    assert tokens.unique().tolist() == list(range(level))
    assert (tokens[0].diff() >= 0).all()


def test_gradient_passes_straight_through_the_rounding():
    z = make_noise(2, 5, 6).requires_grad_()
    weights = make_noise(2, 5, 6, seed=9)
    (make_fsq()({"z": z})["quants"] * weights).sum().backward()
    half, offset = bounds()
    slope = 1 - (z.detach() + (offset / half).atanh()).tanh() ** 2
    torch.testing.assert_close(z.grad, weights * slope * half / HALF_WIDTHS)


def test_unquantised_images_keep_their_bounded_latents_and_tokens():
    z = make_noise(2000, 3, 6)
    plain = make_fsq().eval()({"z": z})
    fsq = make_fsq(drop_quant_p=0.3)
    out = fsq.train()({"z": z, RANDOM_KEY: make_draws(2000)})
    changed = (out["quants"] != plain["quants"]).flatten(1).any(1)
    assert_frequency(changed, 0.3)
    assert torch.equal(out["tokens"], plain["tokens"])
    torch.testing.assert_close(out["quants"][changed], (fsq.bound(z) / HALF_WIDTHS)[changed])
    assert torch.equal(fsq.eval()({"z": z})["quants"], plain["quants"])


def test_corruption_replaces_codes_of_some_images_at_rates_drawn_per_image():
    z = make_noise(1500, 400, 6)
    plain = make_fsq().eval()({"z": z})["tokens"]
    fsq = make_fsq(corrupt_tokens_p=0.6, min_corrupt_tokens_p=0.2, apply_corrupt_tokens_p=0.5).train()
    out = fsq({"z": z, RANDOM_KEY: make_draws(1500)})
    replaced = out["tokens"] != plain
    rates = replaced.double().mean(1)
    applied = rates > 0
    assert_frequency(applied, 0.5)
    rates = rates[applied]
    assert rates.mean().item() == pytest.approx(0.4, abs=0.02)
    assert rates.min() > 0.1 and rates.max() < 0.7
    # The rate of an image is uniform in 0.2..0.6 with the binomial noise of its 400 codes on top.
    assert rates.std().item() == pytest.approx(math.sqrt(0.4**2 / 12 + 0.225 / 400), abs=0.01)
    assert_uniform(out["tokens"][replaced] / 64_000)
    torch.testing.assert_close(out["quants"], fsq.indices_to_embedding(out["tokens"]))


def test_fsq_training_options_need_training_and_both_probabilities():
    z = make_noise(50, 20, 6)
    plain = make_fsq().eval()({"z": z})
    for options in (dict(corrupt_tokens_p=0.5), dict(apply_corrupt_tokens_p=1.0)):
        out = make_fsq(**options)({"z": z, RANDOM_KEY: make_draws(50)})
        assert torch.equal(out["tokens"], plain["tokens"])
    fsq = make_fsq(drop_quant_p=1.0, corrupt_tokens_p=1.0, apply_corrupt_tokens_p=1.0).eval()
    assert torch.equal(fsq({"z": z})["quants"], plain["quants"])
    assert fsq.state_dict() == {} and list(fsq.parameters()) == []


def test_fsq_refuses_impossible_settings_and_latents_of_another_width():
    for options in (dict(levels=(8, 1)), dict(levels=()), dict(drop_quant_p=1.5), dict(corrupt_tokens_p=-0.1)):
        with pytest.raises(ValueError):
            make_fsq(**options)
    with pytest.raises(ValueError, match="5 channels.*levels has 6"):
        make_fsq()({"z": make_noise(1, 4, 5)})


# Noise


def draw_sigmas(n=20_000, positions=None, global_batch_size=None, **options):
    positions = torch.arange(n) if positions is None else positions
    module = MinRFNoiseModule("x", "noised", **options)
    return module.sample_sigmas(BatchRandom(3, 4, positions, global_batch_size)).double()


def normal_cdf_of_logit(sigmas):
    return (1 + torch.erf((sigmas / (1 - sigmas)).log() / math.sqrt(2))) / 2


def test_sigmas_are_uniform_or_logit_normal():
    sigmas = draw_sigmas()
    assert_uniform(sigmas)
    assert 0 < sigmas.min() and sigmas.max() < 1
    assert_uniform(normal_cdf_of_logit(draw_sigmas(ln=True)))
    assert draw_sigmas(mode_scale=1.0).std() < sigmas.std() - 0.02  # a positive mode scale favours the middle


@pytest.mark.parametrize("s", [0.25, 1.29, -0.5])
def test_mode_scaled_sigmas_follow_the_inverse_of_their_formula(s):
    sigmas = draw_sigmas(mode_scale=s)
    u = np.linspace(0, 1, 100_001)
    formula = 1 - u - s * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
    assert (np.diff(formula) < 0).all()
    assert_uniform(torch.from_numpy(np.interp(sigmas.numpy(), formula[::-1], u[::-1])))
    assert 0 < sigmas.min() and sigmas.max() < 1


@pytest.mark.parametrize("ln", [False, True])
def test_stratified_sigmas_fill_each_bin_of_the_global_batch_once(ln):
    ranks = torch.arange(64).split(16)
    quantiles = torch.cat([draw_sigmas(positions=r, global_batch_size=64, stratisfied=True, ln=ln) for r in ranks])
    quantiles = normal_cdf_of_logit(quantiles) if ln else quantiles
    assert (quantiles * 64).floor().long().tolist() == list(range(64))
    assert_uniform(quantiles * 64 % 1)


@pytest.mark.parametrize("options", [dict(), dict(ln=True), dict(mode_scale=1.0), dict(stratisfied=True, ln=True)])
@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
def test_sigmas_stay_inside_the_open_interval(monkeypatch, options, u):
    monkeypatch.setattr(BatchRandom, "uniform", lambda self, name: torch.full((1,), u, dtype=torch.float64))
    sigma = MinRFNoiseModule("x", "noised", **options).sample_sigmas(make_draws(1))
    assert sigma.dtype == torch.float32 and 0 < sigma.item() < 1


def test_noised_latents_mix_clean_latents_and_noise_that_is_drawn_or_given():
    clean = make_noise(50, 4, 16, 16)
    module = MinRFNoiseModule("clean", "noised", mode_scale=0.25, noise_read_key="given")
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


# Heads, precision, initialisation, small operations


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 4)])
@pytest.mark.parametrize("modulated", [False, True])
def test_linear_head_norms_modulates_per_image_and_projects(shape, modulated):
    head = randomise(LinearHead("x", "y", 8, 3, adaLN_emb_read_key="emb" if modulated else None))
    x, embedding = make_noise(*shape, 8) * 3 + 1, make_noise(2, 8, seed=3)
    shift, scale = torch.zeros(2, 2, 8)
    if modulated:
        shift, scale = head.adaLN_modulation[1](F.silu(embedding)).chunk(2, dim=1)
    out = head({"x": x, "emb": embedding})["y"]
    for i in range(2):
        normed = (x[i] - x[i].mean(-1, keepdim=True)) / (x[i].var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(out[i], head.proj(normed * (1 + scale[i]) + shift[i]))


@pytest.mark.parametrize(
    "make",
    [
        lambda dtype: LinearLayer("x", "y", 8, 8, dtype_override=dtype),
        lambda dtype: LinearHead("x", "y", 8, 8, dtype_override=dtype, adaLN_emb_read_key="emb"),
        lambda dtype: ToPatchesLinearHead("x", "y", 8, 2, [2, 2], dtype_override=dtype, adaLN_emb_read_key="emb"),
    ],
    ids=["layer", "head", "patch head"],
)
def test_dtype_override_decides_over_autocast(make):
    data_dict = {"x": make_noise(2, 3, 3, 8), "emb": make_noise(2, 8, seed=3)}
    expected = randomise(make(None))(dict(data_dict))["y"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        overridden = randomise(make("fp32"))(dict(data_dict))["y"]
        followed = randomise(make(None))(dict(data_dict))["y"]
    assert overridden.dtype == torch.float32 and torch.equal(overridden, expected)
    assert followed.dtype == torch.bfloat16
    assert randomise(make("bf16"))(dict(data_dict))["y"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype_override is 'half-ish'"):
        make("half-ish")


def test_initialisation_of_linear_layers_by_style():
    xavier = LinearLayer("x", "y", 300, 200, weight_init_style="xavier").proj
    bound = math.sqrt(6 / 500)
    assert bound * 0.99 < xavier.weight.abs().max() <= bound
    assert xavier.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    truncated = LinearLayer("x", "y", 300, 200, weight_init_style="trunc_normal").proj
    assert truncated.weight.std().item() == pytest.approx(0.02, rel=0.02)
    zero = LinearLayer("x", "y", 300, 200, weight_init_style="zero").proj
    for linear in (xavier, truncated, zero):
        assert not linear.bias.any()
    assert not zero.weight.any()
    with pytest.raises(ValueError, match="weight_init_style is 'ones'"):
        LinearLayer("x", "y", 3, 2, weight_init_style="ones")


def test_heads_modulations_and_chosen_queries_start_at_zero():
    head = LinearHead("x", "y", 8, 3, adaLN_emb_read_key="emb")
    transformer = FlexTransformer("seq", "out", 32, 1, 16, adaLN_emb_read_key="emb", zero_init_query_proj=True)
    attention = transformer.blocks[0].attn
    for linear in (head.proj, head.adaLN_modulation[1], transformer.blocks[0].adaLN_modulation[1], attention.wq):
        assert not linear.weight.any() and (linear.bias is None or not linear.bias.any())
    assert attention.wk.weight.any()


def test_learned_tokens_start_small():
    parameters = [
        Registers1D("x", "sizes", "registers", 64, n_max=64).registers,
        PositionalEmbedding(64, [64], "learnable_sum").posembs,
        MaskedNestedDropout("x", 4096).dropout_mask_token,
        LearnedNullCond("x", 4096).nullcond,
    ]
    for parameter in parameters:
        assert parameter.std().item() == pytest.approx(0.02, rel=0.06)


def test_layer_norm_has_no_affine_parameters_by_default():
    assert list(Fp32LayerNorm(8).parameters()) == []
    affine = randomise(Fp32LayerNorm(8, elementwise_affine=True, bias=True))
    x = make_noise(3, 8)
    torch.testing.assert_close(affine(x), F.layer_norm(x, (8,), affine.weight, affine.bias, 1e-5))


def test_channels_move_both_ways():
    x = make_noise(2, 3, 4, 5)
    moved = PerSampleOp("x", "y", channels_first_to_last)({"x": x})["y"]
    assert moved.shape == (2, 4, 5, 3)
    assert torch.equal(moved[:, 1, 2], x[:, :, 1, 2])
    assert torch.equal(channels_last_to_first(moved), x)


def test_key_filter_keeps_allowed_or_drops_blocked_keys():
    data_dict = {"a": 1, "b": 2, "c": 3}
    assert DictKeyFilter(allowed_keys=["a", "x"])(dict(data_dict)) == {"a": 1}
    assert DictKeyFilter(blocked_keys=["a", "x"])(dict(data_dict)) == {"b": 2, "c": 3}
    with pytest.raises(ValueError, match="either"):
        DictKeyFilter()
