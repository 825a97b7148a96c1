"""Nested dropout: only the first k registers of an image are kept (FlexTok's ordered tokens)."""

import torch
import torch.nn as nn

from ...utils.batching import as_batch_tensor, dense_batches
from ...utils.random import BatchRandom

SIZE_SAMPLING_MODES = ("uniform", "pow2", "uniform_pow2")


class MaskedNestedDropout(nn.Module):
    """Replaces the registers from position k on by the learned `dropout_mask_token`: [B, N, D] -> [B, N, D].

    In training k is drawn per image and written to `train_keep_k_write_key` (long [B]); in evaluation k is read from
    `eval_keep_k_read_key` (one integer per image) if it is there.

    Args:
        size_sampling_mode: `uniform`: k from 1..N; `pow2`: a power of two up to N; `uniform_pow2`: k from 1..N,
            rounded up to a power of two (at most N).
    """

    def __init__(
        self,
        read_write_key: str,
        dim: int,
        eval_keep_k_read_key: str = "eval_keep_k",
        train_keep_k_write_key: str = "train_keep_k",
        size_sampling_mode: str = "uniform",
    ):
        super().__init__()
        if size_sampling_mode not in SIZE_SAMPLING_MODES:
            raise ValueError(
                f"size_sampling_mode is {size_sampling_mode!r}, expected one of {', '.join(SIZE_SAMPLING_MODES)}"
            )
        self.read_write_key = read_write_key
        self.eval_keep_k_read_key = eval_keep_k_read_key
        self.train_keep_k_write_key = train_keep_k_write_key
        self.size_sampling_mode = size_sampling_mode
        self.dropout_mask_token = nn.Parameter(torch.empty(dim))
        nn.init.trunc_normal_(self.dropout_mask_token, std=0.02)

    def sample_keep_k(self, random: BatchRandom, n: int) -> torch.Tensor:
        """Long [B]: how many of n registers each image keeps."""
        if self.size_sampling_mode == "pow2":
            return 1 << random.integers("keep_k", 0, n.bit_length() - 1)
        k = random.integers("keep_k", 1, n)
        if self.size_sampling_mode == "uniform_pow2":
            powers = 1 << torch.arange((n - 1).bit_length() + 1, device=k.device)
            k = powers[torch.searchsorted(powers, k)].clamp(max=n)
        return k

    @dense_batches
    def forward(self, data_dict: dict) -> dict:
        x = data_dict[self.read_write_key]
        if self.training:
            keep_k = self.sample_keep_k(BatchRandom.of(data_dict, x), x.shape[1])
            data_dict[self.train_keep_k_write_key] = keep_k
        elif data_dict.get(self.eval_keep_k_read_key) is not None:
            keep_k = as_batch_tensor(data_dict, self.eval_keep_k_read_key, x)
        else:
            return data_dict
        keep = torch.arange(x.shape[1], device=x.device) < keep_k[:, None]  # [B, N]
        data_dict[self.read_write_key] = torch.where(keep[..., None], x, self.dropout_mask_token.to(x.dtype))
        return data_dict
