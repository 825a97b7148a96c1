"""Cutting a grid into patches."""

import math
from collections.abc import Sequence

import torch.nn as nn
from einops import rearrange

from ...utils.batching import dense_batches
from ..utils.init import init_linear


class PatchEmbedder(nn.Module):
    """[B, H, W, C] -> patches [B, H / p1 * W / p2, D], each patch vector in the order (p1 p2 c) before its projection.

    Args:
        n_patches_write_key: Where (H / p1, W / p2) is written.
        patch_sizes: (p1, p2).
        dim: Width of the projection `patch_proj`; None: patch vectors of p1 * p2 * C as they are.
        flatten_patches: False: write [B, H / p1, W / p2, D] instead.
    """

    def __init__(
        self,
        input_tensor_list_read_key: str,
        patches_list_write_key: str,
        n_patches_write_key: str,
        patch_sizes: Sequence[int],
        channels_in: int,
        dim: int | None = None,
        flatten_patches: bool = True,
        weight_init_style: str = "xavier",
    ):
        super().__init__()
        self.read_key = input_tensor_list_read_key
        self.write_key = patches_list_write_key
        self.n_patches_write_key = n_patches_write_key
        if len(patch_sizes) != 2:
            raise ValueError(f"patch_sizes is {list(patch_sizes)}, expected two sizes")
        self.patch_sizes = tuple(patch_sizes)
        self.channels_in = channels_in
        self.flatten_patches = flatten_patches
        patch_dim = math.prod(self.patch_sizes) * channels_in
        self.patch_proj = nn.Identity() if dim is None else init_linear(nn.Linear(patch_dim, dim), weight_init_style)

    @dense_batches
    def forward(self, data_dict: dict) -> dict:
        x = data_dict[self.read_key]
        p1, p2 = self.patch_sizes
        if x.ndim != 4 or x.shape[3] != self.channels_in or x.shape[1] % p1 or x.shape[2] % p2:
            raise ValueError(
                f"{self.read_key!r} is {list(x.shape)}, expected [B, H, W, {self.channels_in}] with H a multiple of "
                f"{p1} and W of {p2}"
            )
        patches = self.patch_proj(rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=p1, q=p2))
        data_dict[self.n_patches_write_key] = tuple(patches.shape[1:3])
        data_dict[self.write_key] = rearrange(patches, "b h w d -> b (h w) d") if self.flatten_patches else patches
        return data_dict
