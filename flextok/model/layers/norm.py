"""Layer norm in fp32."""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F


class Fp32LayerNorm(nn.LayerNorm):
    """torch's LayerNorm over the last dimension, computed in fp32 and returned in the input's dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


# What blocks and heads use unless a config says otherwise: nothing learned in it.
plain_norm = functools.partial(Fp32LayerNorm, elementwise_affine=False, bias=False)
