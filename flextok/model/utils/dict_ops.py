"""Small operations on a data_dict."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from einops import rearrange

from ...utils.batching import dense_batches
from ...utils.random import RANDOM_KEY


def channels_first_to_last(x: torch.Tensor) -> torch.Tensor:
    """[B, C, ...] -> [B, ..., C], a view."""
    return rearrange(x, "b c ... -> b ... c")


def channels_last_to_first(x: torch.Tensor) -> torch.Tensor:
    """[B, ..., C] -> [B, C, ...], a view."""
    return rearrange(x, "b ... c -> b c ...")


class DictKeyFilter(nn.Module):
    """Keep only `allowed_keys` of a data_dict, or drop `blocked_keys`; give one of the two."""

    def __init__(self, allowed_keys: Sequence[str] | None = None, blocked_keys: Sequence[str] | None = None):
        super().__init__()
        if (allowed_keys is None) == (blocked_keys is None):
            raise ValueError("DictKeyFilter takes either allowed_keys or blocked_keys")
        self.allowed_keys = allowed_keys
        self.blocked_keys = blocked_keys

    def forward(self, data_dict: dict) -> dict:
        for key in list(data_dict):
            keep = key in self.allowed_keys if self.allowed_keys is not None else key not in self.blocked_keys
            if not keep and key != RANDOM_KEY:
                del data_dict[key]
        return data_dict


class PerSampleOp(nn.Module):
    """Write per_sample_op(data_dict[read_key]) under write_key; the operation works on batches [B, ...]."""

    def __init__(self, read_key: str, write_key: str, per_sample_op: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.read_key = read_key
        self.write_key = write_key
        self.per_sample_op = per_sample_op

    @dense_batches
    def forward(self, data_dict: dict) -> dict:
        data_dict[self.write_key] = self.per_sample_op(data_dict[self.read_key])
        return data_dict
