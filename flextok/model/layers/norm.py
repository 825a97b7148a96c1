"""Layer norm in fp32."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Fp32LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension, computed in fp32 and returned in the input's dtype; no affine by default."""

    def __init__(self, normalized_shape, eps: float = 1e-5, elementwise_affine: bool = False, bias: bool = False):
        super().__init__(normalized_shape, eps=eps, elementwise_affine=elementwise_affine, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)
