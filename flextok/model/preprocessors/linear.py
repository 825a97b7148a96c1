"""A linear layer on one value of the data_dict."""

import torch.nn as nn

from ...utils.batching import dense_batches
from ...utils.dtypes import parse_dtype, precision
from ..utils.init import init_linear


class LinearLayer(nn.Module):
    """[..., dim_in] -> [..., dim], in `dtype_override` if given."""

    def __init__(
        self,
        read_key: str,
        write_key: str,
        dim_in: int,
        dim: int,
        weight_init_style: str = "xavier",
        dtype_override: str | None = None,
        proj_bias: bool = True,
    ):
        super().__init__()
        self.read_key = read_key
        self.write_key = write_key
        self.dtype_override = parse_dtype(dtype_override)
        self.proj = init_linear(nn.Linear(dim_in, dim, bias=proj_bias), weight_init_style)

    @dense_batches
    def forward(self, data_dict: dict) -> dict:
        x = data_dict[self.read_key]
        with precision(x.device, self.dtype_override):
            data_dict[self.write_key] = self.proj(x.to(self.dtype_override or x.dtype))
        return data_dict
