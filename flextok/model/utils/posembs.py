"""Positional embeddings for sequences and grids."""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat

from ...utils.batching import dense_batches

POSEMB_TYPES = ("sincos", "learnable_sum", "learnable_prod")
POSEMB_SCALINGS = ("absolute", "interpolate")


def sincos_table(dim: int, height: int, width: int) -> torch.Tensor:
    """[1, dim, height, width]: sin(r w_k), cos(r w_k), sin(c w_k), cos(c w_k) with w_k = 10000^(-k / (dim / 4))."""
    if dim % 4:
        raise ValueError(f"dim is {dim}, but 2-D sincos positional embeddings need a multiple of 4")
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows = torch.arange(height, dtype=torch.float64)[:, None] * frequencies  # [height, dim / 4]
    columns = torch.arange(width, dtype=torch.float64)[:, None] * frequencies
    rows = repeat(torch.cat([rows.sin(), rows.cos()], dim=1), "h d -> 1 d h w", w=width)
    columns = repeat(torch.cat([columns.sin(), columns.cos()], dim=1), "w d -> 1 d h w", h=height)
    return torch.cat([rows, columns], dim=1).float()


class PositionalEmbedding(nn.Module):
    """Positional embeddings of a sequence (one entry in `max_sizes`) or a grid (two entries).

    Args:
        dim: Channels D.
        max_sizes: Largest size of each dimension.
        posemb_type: `sincos` (2-D, frozen), `learnable_sum` or `learnable_prod` (one learned table per dimension,
            added or multiplied).
        posemb_scaling: `absolute`: the first positions are used; `interpolate`: the whole table is resized linearly
            (align_corners True).
    """

    def __init__(
        self, dim: int, max_sizes: Sequence[int], posemb_type: str = "sincos", posemb_scaling: str = "absolute"
    ):
        super().__init__()
        if posemb_type not in POSEMB_TYPES:
            raise ValueError(f"posemb_type is {posemb_type!r}, expected one of {', '.join(POSEMB_TYPES)}")
        if posemb_scaling not in POSEMB_SCALINGS:
            raise ValueError(f"posemb_scaling is {posemb_scaling!r}, expected one of {', '.join(POSEMB_SCALINGS)}")
        self.max_sizes = [int(size) for size in max_sizes]
        n_dim = len(self.max_sizes)
        if n_dim not in ((2,) if posemb_type == "sincos" else (1, 2)):
            raise ValueError(f"max_sizes is {self.max_sizes}, expected two sizes (or one of a learned table)")
        self.posemb_type = posemb_type
        self.posemb_scaling = posemb_scaling
        if posemb_type == "sincos":
            self.posembs = nn.Parameter(sincos_table(dim, *self.max_sizes), requires_grad=False)
        else:
            self.posembs = nn.Parameter(torch.empty(n_dim, 1, dim, max(self.max_sizes)))
            nn.init.trunc_normal_(self.posembs, std=0.02)

    def _table(self) -> torch.Tensor:
        """[1, D, *max_sizes]."""
        if self.posemb_type == "sincos":
            return self.posembs
        if len(self.max_sizes) == 1:
            return self.posembs[0, :, :, : self.max_sizes[0]]
        rows = self.posembs[0, :, :, : self.max_sizes[0], None]
        columns = self.posembs[1, :, :, None, : self.max_sizes[1]]
        return rows + columns if self.posemb_type == "learnable_sum" else rows * columns

    @torch.no_grad()
    def resize(self, sizes: Sequence[int]) -> None:
        """Interpolate the tables to other `max_sizes`, and any other size from now on; the same leave them as they are.

        At `sizes` the embeddings are then those that `interpolate` gave there before.
        """
        sizes = [int(size) for size in sizes]
        if sizes != self.max_sizes:
            if self.posemb_type == "sincos":
                table = F.interpolate(self.posembs, size=sizes, mode="bilinear", align_corners=True)
            else:  # each dimension by itself, whose sum or product is then bilinear
                table = self.posembs.new_zeros(*self.posembs.shape[:-1], max(sizes))
                for resized, learned, before, size in zip(table, self.posembs, self.max_sizes, sizes, strict=True):
                    resized[..., :size] = F.interpolate(learned[..., :before], size, mode="linear", align_corners=True)
            self.posembs = nn.Parameter(table, requires_grad=self.posembs.requires_grad)
        self.max_sizes, self.posemb_scaling = sizes, "interpolate"

    def forward(self, sizes: Sequence[int]) -> torch.Tensor:
        """Embeddings [1, *sizes, D]; raises ValueError if `sizes` do not fit."""
        sizes = list(sizes)
        if len(sizes) != len(self.max_sizes):
            raise ValueError(f"positional embeddings are for {len(self.max_sizes)} dimensions, but got sizes {sizes}")
        table = self._table()
        if self.posemb_scaling == "interpolate" and sizes != self.max_sizes:
            mode = "linear" if len(sizes) == 1 else "bilinear"
            table = F.interpolate(table, size=sizes, mode=mode, align_corners=True)
        elif any(size > limit for size, limit in zip(sizes, self.max_sizes, strict=True)):
            raise ValueError(
                f"the positional embeddings reach to {self.max_sizes} positions, but the input has {sizes}: set "
                "posemb_scaling: interpolate, which resizes them, or use a smaller input"
            )
        else:
            for dim, size in enumerate(sizes, start=2):
                table = table.narrow(dim, 0, size)
        return rearrange(table, "1 d ... -> 1 ... d")


class PositionalEmbeddingAdder(PositionalEmbedding):
    """Adds positional embeddings to [B, N, D] or [B, H, W, D]; `posemb_write_key` also keeps them, as [1, ..., D]."""

    def __init__(
        self,
        read_key: str,
        write_key: str,
        dim: int,
        max_sizes: Sequence[int],
        posemb_type: str = "sincos",
        posemb_scaling: str = "absolute",
        posemb_write_key: str | None = None,
    ):
        super().__init__(dim, max_sizes, posemb_type, posemb_scaling)
        self.read_key = read_key
        self.write_key = write_key
        self.posemb_write_key = posemb_write_key

    @dense_batches
    def forward(self, data_dict: dict) -> dict:
        """Embeddings of x's own sizes are added to x [B, ..., D]."""
        x = data_dict[self.read_key]
        posembs = super().forward(x.shape[1:-1])
        data_dict[self.write_key] = x + posembs
        if self.posemb_write_key is not None:
            data_dict[self.posemb_write_key] = posembs
        return data_dict
