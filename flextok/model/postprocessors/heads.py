"""Output heads: a norm, optionally modulated, and a linear layer."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from einops import rearrange

from ...utils.batching import dense_batches
from ...utils.dtypes import parse_dtype, precision
from ..layers.adaln import adaln_modulation, scale_and_shift
from ..layers.norm import plain_norm
from ..utils.init import init_linear


class LinearHead(nn.Module):
    """[B, ..., dim] -> [B, ..., dim_out]: proj(norm(x)), or proj(norm(x) * (1 + scale) + shift) with an embedding.

    Args:
        adaLN_emb_read_key: Embedding [B, dim] that gives shift and scale; None: none.
        dtype_override: Precision of the head, e.g. `fp32` under autocast.
        use_mup_readout: Not supported; no published model uses it.
    """

    def __init__(
        self,
        read_key: str,
        write_key: str,
        dim: int,
        dim_out: int,
        use_mup_readout: bool,
        weight_init_style: str = "zero",
        norm_layer: Callable = plain_norm,
        dtype_override: str | None = None,
        adaLN_emb_read_key: str | None = None,
        adaLN_packing_fn_read_key: str | None = None,
        adaLN_bias: bool = True,
        proj_bias: bool = True,
    ):
        super().__init__()
        if use_mup_readout:
            raise NotImplementedError(f"{type(self).__name__}: use_mup_readout: true is not supported, set it to false")
        if adaLN_packing_fn_read_key is not None:
            raise NotImplementedError(f"{type(self).__name__}: adaLN_packing_fn_read_key is not supported")
        self.read_key = read_key
        self.write_key = write_key
        self.dtype_override = parse_dtype(dtype_override)
        self.adaLN_emb_read_key = adaLN_emb_read_key
        self.norm = norm_layer(dim)
        self.proj = init_linear(nn.Linear(dim, dim_out, bias=proj_bias), weight_init_style)
        if adaLN_emb_read_key is not None:
            self.adaLN_modulation = adaln_modulation(dim, 2 * dim, bias=adaLN_bias)

    def head(self, data_dict: dict) -> torch.Tensor:
        """What `forward` writes, [B, ..., dim_out]."""
        x = data_dict[self.read_key]
        with precision(x.device, self.dtype_override):
            x = self.norm(x.to(self.dtype_override or x.dtype))
            if self.adaLN_emb_read_key is not None:
                embedding = data_dict[self.adaLN_emb_read_key].to(self.dtype_override or x.dtype)
                modulation = self.adaLN_modulation(embedding)  # [B, 2 * dim]
                modulation = modulation.view(len(x), *[1] * (x.ndim - 2), -1)
                shift, scale = modulation.chunk(2, dim=-1)
                x = scale_and_shift(x, shift, scale)
            return self.proj(x)

    @dense_batches
    def forward(self, data_dict: dict) -> dict:
        data_dict[self.write_key] = self.head(data_dict)
        return data_dict


class ToPatchesLinearHead(LinearHead):
    """[B, h, w, dim] -> [B, h * p1, w * p2, channels_out], each patch vector in the order (p1 p2 c)."""

    def __init__(
        self,
        read_key: str,
        write_key: str,
        dim: int,
        channels_out: int,
        patch_sizes: Sequence[int],
        use_mup_readout: bool,
        weight_init_style: str = "zero",
        norm_layer: Callable = plain_norm,
        dtype_override: str | None = None,
        adaLN_emb_read_key: str | None = None,
        adaLN_packing_fn_read_key: str | None = None,
        adaLN_bias: bool = True,
        proj_bias: bool = True,
    ):
        p1, p2 = patch_sizes
        super().__init__(
            read_key, write_key, dim, p1 * p2 * channels_out, use_mup_readout, weight_init_style, norm_layer,
            dtype_override, adaLN_emb_read_key, adaLN_packing_fn_read_key, adaLN_bias, proj_bias,
        )  # fmt: skip
        self.patch_sizes = (p1, p2)

    @dense_batches
    def forward(self, data_dict: dict) -> dict:
        p1, p2 = self.patch_sizes
        patches = self.head(data_dict)
        data_dict[self.write_key] = rearrange(patches, "b h w (p q c) -> b (h p) (w q) c", p=p1, q=p2)
        return data_dict
