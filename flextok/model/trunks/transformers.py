"""The transformer of encoder and decoder."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from ...utils.batching import dense_batches
from ...utils.random import BatchRandom
from ..layers.adaln import adaln_modulation, per_subsequence, scale_and_shift
from ..layers.attention import Attention, BlockCausalMask
from ..layers.mlp import Mlp
from ..layers.norm import plain_norm

N_MODULATIONS = 6  # gate_msa, gate_mlp, shift_msa, scale_msa, shift_mlp, scale_mlp


class TransformerBlock(nn.Module):
    """Pre-norm block of width `dim`, modulated by an embedding if `adaLN_expansion` > 0.

    Args:
        norm_layer: Factory of the two norms.
        adaLN_expansion: Number of sub-sequences with a modulation of their own; 0: no modulation.
        drop: Dropout after the attention's and the MLP's last layer.
        drop_path: Probability that an image skips each residual branch in training.
        name: Address of this block's dropout draws.
    """

    def __init__(
        self,
        dim: int,
        attn: Attention,
        mlp: Mlp,
        norm_layer: Callable,
        adaLN_expansion: int,
        drop: float,
        drop_path: float,
        name: str,
    ):
        super().__init__()
        self.drop = drop
        self.drop_path = drop_path
        self.adaLN_expansion = adaLN_expansion
        self.name = name
        self.norm1 = norm_layer(dim)
        self.attn = attn
        self.norm2 = norm_layer(dim)
        self.mlp = mlp
        if adaLN_expansion:
            self.adaLN_modulation = adaln_modulation(dim, adaLN_expansion * N_MODULATIONS * dim)

    def _dropped(self, x: torch.Tensor, random: BatchRandom | None, branch: str) -> torch.Tensor:
        if random is None:
            return x
        if self.drop > 0:
            keep = random.uniform(f"{self.name}/{branch}/drop", x.shape[1:]) >= self.drop
            x = x * keep.to(x.dtype) / (1 - self.drop)
        if self.drop_path > 0:
            keep = random.uniform(f"{self.name}/{branch}/drop_path") >= self.drop_path
            x = x * keep.to(x.dtype)[:, None, None] / (1 - self.drop_path)
        return x

    def forward(
        self,
        x: torch.Tensor,
        mask: BlockCausalMask | None = None,
        embedding: torch.Tensor | None = None,
        lengths: Sequence[int] = (),
        random: BatchRandom | None = None,
    ) -> torch.Tensor:
        """x [B, N, D], embedding [B, D], `lengths` of the sub-sequences -> [B, N, D]."""
        if not self.adaLN_expansion:
            x = x + self._dropped(self.attn(self.norm1(x), mask), random, "attn")
            return x + self._dropped(self.mlp(self.norm2(x)), random, "mlp")
        modulation = self.adaLN_modulation(embedding).unflatten(-1, (self.adaLN_expansion, N_MODULATIONS, -1))
        gate_msa, gate_mlp, shift_msa, scale_msa, shift_mlp, scale_mlp = modulation.unbind(2)  # each [B, parts, D]
        y = self.attn(per_subsequence(scale_and_shift, self.norm1(x), (shift_msa, scale_msa), lengths), mask)
        x = x + per_subsequence(torch.mul, self._dropped(y, random, "attn"), (gate_msa,), lengths)
        y = self.mlp(per_subsequence(scale_and_shift, self.norm2(x), (shift_mlp, scale_mlp), lengths))
        return x + per_subsequence(torch.mul, self._dropped(y, random, "mlp"), (gate_mlp,), lengths)


class FlexTransformer(nn.Module):
    """Transformer over packed sequences [B, N, D].

    Args:
        input_seq_read_key, output_seq_write_key: Sequence [B, N, D], before and after.
        block_mask_read_key: What the sequence packer wrote: None or a BlockCausalMask.
        adaLN_emb_read_key: Embedding [B, D] that modulates every block; None: unmodulated blocks.
        adaLN_packing_fn_read_key: Lengths of the sub-sequences, from the packer; None: the sequence is one.
        adaLN_expansion: Number of sub-sequences with a modulation of their own (1: all share one).
        intermediate_layer_write_key, intermediate_layers: Outputs of the blocks with these indices, written as
            [B, N, D], or [B, N, layers * D] in the listed order if there are several.
        use_act_checkpoint: Recompute each block in the backward pass instead of keeping its activations.
        drop_path_rate: Stochastic depth (arXiv 1603.09382) of the last block; grows linearly from 0 at the first.
    """

    def __init__(
        self,
        input_seq_read_key: str,
        output_seq_write_key: str,
        dim: int = 768,
        depth: int = 12,
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        mlp_bias: bool = False,
        drop: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: Callable = nn.SiLU,
        norm_layer: Callable = plain_norm,
        gated_mlp: bool = True,
        qk_norm: bool = True,
        use_act_checkpoint: bool = False,
        weight_init_style: str = "xavier",
        zero_init_query_proj: bool = False,
        block_mask_read_key: str | None = None,
        score_mod_read_key: str | None = None,
        adaLN_emb_read_key: str | None = None,
        adaLN_packing_fn_read_key: str | None = None,
        adaLN_expansion: int = 1,
        rope_forward_read_key: str | None = None,
        intermediate_layer_write_key: str | None = None,
        intermediate_layers: Sequence[int] | None = (),
    ):
        super().__init__()
        if score_mod_read_key is not None or rope_forward_read_key is not None:
            raise NotImplementedError("FlexTransformer: score_mod_read_key and rope_forward_read_key are not supported")
        self.input_seq_read_key = input_seq_read_key
        self.output_seq_write_key = output_seq_write_key
        self.block_mask_read_key = block_mask_read_key
        self.adaLN_emb_read_key = adaLN_emb_read_key
        self.adaLN_packing_fn_read_key = adaLN_packing_fn_read_key
        self.adaLN_expansion = adaLN_expansion
        self.intermediate_layer_write_key = intermediate_layer_write_key
        self.intermediate_layers = list(intermediate_layers or [])
        for layer in self.intermediate_layers:
            if not 0 <= layer < depth:
                raise ValueError(f"intermediate_layers names layer {layer}, but the layers are 0 to {depth - 1}")
        self.dim = dim
        self.depth = depth
        self.use_act_checkpoint = use_act_checkpoint
        self.drops = drop > 0 or drop_path_rate > 0
        self.blocks = nn.ModuleList()
        for i in range(depth):
            attn = Attention(
                dim, head_dim, qkv_bias, proj_bias, qk_norm, norm_layer, weight_init_style, zero_init_query_proj
            )
            mlp = Mlp(dim, mlp_ratio, act_layer, mlp_bias, weight_init_style, gated_mlp)
            expansion = adaLN_expansion if adaLN_emb_read_key is not None else 0
            drop_path, name = drop_path_rate * i / max(depth - 1, 1), f"{output_seq_write_key}/{i}"
            self.blocks.append(TransformerBlock(dim, attn, mlp, norm_layer, expansion, drop, drop_path, name))

    @dense_batches
    def forward(self, data_dict: dict) -> dict:
        x = data_dict[self.input_seq_read_key]
        mask = data_dict[self.block_mask_read_key] if self.block_mask_read_key is not None else None
        embedding = None
        lengths = ()
        if self.adaLN_emb_read_key is not None:
            embedding = data_dict[self.adaLN_emb_read_key]
            lengths = (x.shape[1],)
            if self.adaLN_packing_fn_read_key is not None and self.adaLN_expansion > 1:
                lengths = data_dict[self.adaLN_packing_fn_read_key]
            if len(lengths) != self.adaLN_expansion:
                raise ValueError(
                    f"adaLN_expansion is {self.adaLN_expansion}, but the sequence has {len(lengths)} sub-sequences"
                )
            if len(embedding) != len(x):
                raise ValueError(f"the time embedding is for {len(embedding)} images, but the sequences are {len(x)}")
        random = BatchRandom.of(data_dict, x) if self.training and self.drops else None
        intermediates = {}
        for i, block in enumerate(self.blocks):
            if self.use_act_checkpoint and torch.is_grad_enabled():
                # No block draws from the global random state (dropout draws by address): nothing to save and restore.
                x = checkpoint(
                    block, x, mask, embedding, lengths, random, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = block(x, mask, embedding, lengths, random)
            if i in self.intermediate_layers:
                intermediates[i] = x
        data_dict[self.output_seq_write_key] = x
        if self.intermediate_layer_write_key is not None and intermediates:
            layers = [intermediates[i] for i in self.intermediate_layers]
            data_dict[self.intermediate_layer_write_key] = layers[0] if len(layers) == 1 else torch.cat(layers, dim=-1)
        return data_dict
