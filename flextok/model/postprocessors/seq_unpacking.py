"""Taking a packed sequence apart again."""

import math
from collections.abc import Sequence

import torch.nn as nn

from ...utils.batching import dense_batches


class SequenceUnpacker(nn.Module):
    """[B, N, D] -> the sub-sequences that BlockWiseSequencePacker joined, in their own shapes [B, ..., D]."""

    def __init__(
        self,
        packed_seq_read_key: str,
        inner_seq_write_keys: Sequence[str],
        inner_packed_shapes_read_key: str,
        outer_packed_shapes_read_key: str,
    ):
        super().__init__()
        self.read_key = packed_seq_read_key
        self.write_keys = list(inner_seq_write_keys)
        self.inner_packed_shapes_read_key = inner_packed_shapes_read_key
        self.outer_packed_shapes_read_key = outer_packed_shapes_read_key

    @dense_batches
    def forward(self, data_dict: dict) -> dict:
        shapes = data_dict[self.inner_packed_shapes_read_key]
        if len(shapes) != len(self.write_keys):
            raise ValueError(
                f"{len(shapes)} sub-sequences were packed, but {self.write_keys} names {len(self.write_keys)}"
            )
        # What einops.unpack computes; its slices cost more than `split` in the backward pass.
        pieces = data_dict[self.read_key].split([math.prod(shape) for shape in shapes], dim=1)
        for key, piece, shape in zip(self.write_keys, pieces, shapes, strict=True):
            data_dict[key] = piece.unflatten(1, shape)
        return data_dict
