"""Dropping the condition of an image, for classifier-free guidance (arXiv 2207.12598)."""

import torch
import torch.nn as nn

from ...utils.batching import as_batch_tensor, dense_batches, per_image
from ...utils.random import BatchRandom


class ZeroNullCond(nn.Module):
    """Every token of a dropped image, in [B, ..., D], becomes zero.

    An image is dropped with `dropout_prob` in training, and where data_dict[eval_drop_flag_read_key] (booleans, one
    per image) is true in evaluation.
    """

    def __init__(
        self, read_write_key: str, eval_drop_flag_read_key: str = "eval_dropout_mask", dropout_prob: float = 0.0
    ):
        super().__init__()
        if not 0.0 <= dropout_prob <= 1.0:
            raise ValueError(f"dropout_prob is {dropout_prob}, expected 0 to 1")
        self.read_write_key = read_write_key
        self.eval_drop_flag_read_key = eval_drop_flag_read_key
        self.dropout_prob = dropout_prob

    def null(self, x: torch.Tensor) -> torch.Tensor:
        """What the tokens of a dropped image become, [D] or []."""
        return x.new_zeros(())

    @dense_batches
    def forward(self, data_dict: dict) -> dict:
        x = data_dict[self.read_write_key]
        if self.training:
            drop = BatchRandom.of(data_dict, x).uniform("null_condition") < self.dropout_prob
        elif data_dict.get(self.eval_drop_flag_read_key) is not None:
            drop = as_batch_tensor(data_dict, self.eval_drop_flag_read_key, x, torch.bool)
        else:
            return data_dict
        data_dict[self.read_write_key] = torch.where(per_image(drop, x), self.null(x), x)
        return data_dict


class LearnedNullCond(ZeroNullCond):
    """As ZeroNullCond, with the learned token `nullcond` [D] instead of zeros."""

    def __init__(
        self,
        read_write_key: str,
        dim: int,
        eval_drop_flag_read_key: str = "eval_dropout_mask",
        dropout_prob: float = 0.0,
        replace_with_single_token: bool = False,
    ):
        super().__init__(read_write_key, eval_drop_flag_read_key, dropout_prob)
        if replace_with_single_token:
            raise NotImplementedError("LearnedNullCond: replace_with_single_token is not supported")
        self.nullcond = nn.Parameter(torch.empty(dim))
        nn.init.trunc_normal_(self.nullcond, std=0.02)

    def null(self, x: torch.Tensor) -> torch.Tensor:
        return self.nullcond.to(x.dtype)
