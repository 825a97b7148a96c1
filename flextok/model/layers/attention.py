"""Multi-head self-attention over one dense batch of sequences."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from ...utils.dtypes import for_products
from ..utils.init import init_linear
from .norm import plain_norm


class BlockCausalMask(NamedTuple):
    """Who sees whom in a sequence of `n_prefix` tokens followed by a causal rest.

    Prefix tokens see the prefix; the others see the prefix and, causally, each other. `mask` is bool
    [n_rest, n_prefix + n_rest], True where token n_prefix + i may look.
    """

    n_prefix: int
    mask: torch.Tensor


class Attention(nn.Module):
    """Self-attention with normalised queries and keys: [B, N, D] -> [B, N, D].

    Args:
        dim: Width D, a multiple of head_dim.
        head_dim: Width of a head; the softmax scale is 8 / head_dim.
        norm_layer: Factory of the norm of queries and keys, over head_dim.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int = 64,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        qk_norm: bool = True,
        norm_layer: Callable = plain_norm,
        weight_init_style: str = "xavier",
        zero_init_query_proj: bool = False,
    ):
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"dim is {dim}, which is not a multiple of head_dim {head_dim}")
        self.head_dim = head_dim
        self.scale = 8.0 / head_dim
        self.wq = init_linear(nn.Linear(dim, dim, bias=qkv_bias), "zero" if zero_init_query_proj else weight_init_style)
        self.wk = init_linear(nn.Linear(dim, dim, bias=qkv_bias), weight_init_style)
        self.wv = init_linear(nn.Linear(dim, dim, bias=qkv_bias), weight_init_style)
        self.q_norm = norm_layer(head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(head_dim) if qk_norm else nn.Identity()
        self.proj = init_linear(nn.Linear(dim, dim, bias=proj_bias), weight_init_style)

    def forward(self, x: torch.Tensor, mask: BlockCausalMask | None = None) -> torch.Tensor:
        x = for_products(x)
        q = self.q_norm(rearrange(self.wq(x), "b n (h d) -> b n h d", d=self.head_dim)).transpose(1, 2)
        k = self.k_norm(rearrange(self.wk(x), "b n (h d) -> b n h d", d=self.head_dim)).transpose(1, 2)
        v = rearrange(self.wv(x), "b n (h d) -> b h n d", d=self.head_dim)
        if mask is None:
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            n = mask.n_prefix
            out = F.scaled_dot_product_attention(q[:, :, n:], k, v, attn_mask=mask.mask, scale=self.scale)
            if n > 0:
                prefix = F.scaled_dot_product_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], scale=self.scale)
                out = torch.cat([prefix, out], dim=2)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))
