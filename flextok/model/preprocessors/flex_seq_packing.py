"""Joining sub-sequences (patches, registers) into the sequence that a transformer reads."""

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
from einops import pack

from ...utils.batching import dense_batches
from ..layers.attention import BlockCausalMask

MASK_MODES = ("full", "causal", "causal_last")


class BlockWiseSequencePacker(nn.Module):
    """Per image, the sub-sequences one after the other: [B, ..., D] each -> [B, N, D]. Images never see each other.

    Args:
        input_list_read_keys: The sub-sequences, [B, n, D] or [B, h, w, D].
        block_mask_write_key: Where the mask goes, for FlexTransformer: None if every token sees every token.
        inner_packed_shapes_write_key: The shapes of the sub-sequences without batch and channels, for SequenceUnpacker.
        outer_packed_shapes_write_key: Their token counts.
        mask_mode: `full`; `causal`; `causal_last`: every token sees all but the last sub-sequence, whose tokens also
            see, causally, each other.
        emb_packing_fn_write_key: Where the token counts go that FlexTransformer's adaLN parts are broadcast over.
        per_subseq_embs: One adaLN part per sub-sequence, rather than one for all.
        max_seq_len: Upper limit of N, an error beyond it.
        pad_to_multiple, compile_block_mask, return_materialized_mask: Accepted and without effect: they say how the
            published package lays out one sequence for a whole batch.
    """

    def __init__(
        self,
        input_list_read_keys: Sequence[str],
        packed_seq_write_key: str,
        block_mask_write_key: str,
        inner_packed_shapes_write_key: str,
        outer_packed_shapes_write_key: str,
        mask_mode: str = "full",
        max_seq_len: int | None = None,
        pad_to_multiple: int | None = None,
        emb_packing_fn_write_key: str | None = None,
        per_subseq_embs: bool = False,
        compile_block_mask: bool = True,
        return_materialized_mask: bool = False,
    ):
        super().__init__()
        if mask_mode not in MASK_MODES:
            raise ValueError(f"mask_mode is {mask_mode!r}, expected one of {', '.join(MASK_MODES)}")
        self.read_keys = list(input_list_read_keys)
        self.write_key = packed_seq_write_key
        self.block_mask_write_key = block_mask_write_key
        self.inner_packed_shapes_write_key = inner_packed_shapes_write_key
        self.outer_packed_shapes_write_key = outer_packed_shapes_write_key
        self.emb_packing_fn_write_key = emb_packing_fn_write_key
        self.per_subseq_embs = per_subseq_embs
        self.mask_mode = mask_mode
        self.max_seq_len = max_seq_len

    def _mask(self, lengths: Sequence[int], device: torch.device) -> BlockCausalMask | None:
        if self.mask_mode == "full":
            return None
        n_prefix = sum(lengths[:-1]) if self.mask_mode == "causal_last" else 0
        n_rest = sum(lengths) - n_prefix
        mask = torch.ones(n_rest, n_prefix + n_rest, dtype=torch.bool, device=device).tril(n_prefix)
        return BlockCausalMask(n_prefix, mask)

    @dense_batches
    def forward(self, data_dict: dict) -> dict:
        sequence, shapes = pack([data_dict[key] for key in self.read_keys], "b * d")
        lengths = tuple(math.prod(shape) for shape in shapes)
        if self.max_seq_len is not None and sum(lengths) > self.max_seq_len:
            raise ValueError(f"the packed sequence has {sum(lengths)} tokens, but max_seq_len is {self.max_seq_len}")
        data_dict[self.write_key] = sequence
        data_dict[self.inner_packed_shapes_write_key] = tuple(tuple(shape) for shape in shapes)
        data_dict[self.outer_packed_shapes_write_key] = lengths
        data_dict[self.block_mask_write_key] = self._mask(lengths, sequence.device)
        if self.emb_packing_fn_write_key is not None:
            data_dict[self.emb_packing_fn_write_key] = lengths if self.per_subseq_embs else (sum(lengths),)
        return data_dict
