"""adaLN-zero modulation (DiT, arXiv 2212.09748), one part per sub-sequence."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from ..utils.init import init_linear


def adaln_modulation(dim: int, dim_out: int, bias: bool = True) -> nn.Sequential:
    """SiLU and a zero-initialised linear layer: embedding [B, dim] -> modulation [B, dim_out]."""
    return nn.Sequential(nn.SiLU(), init_linear(nn.Linear(dim, dim_out, bias=bias), "zero"))


def per_subsequence(
    fn: Callable, x: torch.Tensor, parts: Sequence[torch.Tensor], lengths: Sequence[int]
) -> torch.Tensor:
    """Apply `fn(tokens, *parts)` to each sub-sequence of x with its own parts.

    Args:
        fn: Elementwise function of tokens [..., n, D] and parts [..., 1, D].
        x: [B, N, D], sub-sequences one after the other.
        parts: Tensors [B, P, D], one row per sub-sequence; they are broadcast over tokens, never expanded.
        lengths: P token counts with sum N.
    """
    if len(set(lengths)) == 1:  # equal lengths: a view, nothing is split or copied
        blocks = x.unflatten(1, (len(lengths), lengths[0]))
        return fn(blocks, *(part[:, :, None] for part in parts)).flatten(1, 2)
    pieces = x.split(list(lengths), dim=1)
    return torch.cat([fn(piece, *(part[:, i, None] for part in parts)) for i, piece in enumerate(pieces)], dim=1)


def scale_and_shift(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [..., n, D], modulated by shift and scale [..., 1, D]."""
    return x * (1 + scale) + shift
