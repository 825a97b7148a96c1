"""A linear read-out of the tokens: what gives the encoder of a new model something to learn from, in training alone.

At the start of a training the decoder ignores the tokens, so that the flow loss tells the encoder nothing about what
to write, and often all images end with the same codes. The read-out is a short path: one linear layer reads the first
k quantised registers and predicts the clean latents. Its gradient reaches the encoder through the quantiser, the
codes soon tell images apart, and the decoder finds tokens that are worth reading. The model does not know of it, and
no export has it.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..utils.dtypes import precision
from ..utils.random import BatchRandom, generator

INITIAL_STD = 0.3


class TokenReadout(nn.Module):
    """Mean squared error of latents [B, C, h, w] predicted linearly from the first k registers [B, L, c].

    k is uniform in 1..L, drawn for each image by address; the other registers count as 0, so that the first ones learn
    what matters most, and all of them something.

    The layer in front of the quantiser starts at zero, and so do all codes. Were the read-out to start at zero too,
    neither would give the other a gradient; with random weights each number of a code is at once asked for a random
    projection of the image, and large ones keep what the encoder has to write small.

    Args:
        n_registers, channels: L and c.
        n_latents: Numbers in an image's latents, C * h * w.
        seed: Seed of its weights.
    """

    def __init__(self, n_registers: int, channels: int, n_latents: int, seed: int = 0):
        super().__init__()
        self.linear = nn.Linear(n_registers * channels, n_latents)
        nn.init.normal_(self.linear.weight, std=INITIAL_STD, generator=generator(seed, "readout"))
        nn.init.zeros_(self.linear.bias)

    def forward(self, quants: torch.Tensor, latents: torch.Tensor, random: BatchRandom) -> torch.Tensor:
        """The loss, a scalar, computed in fp32 whatever the autocast.

        Args:
            quants: Quantised registers [B, L, c], with the gradient that passes the quantiser.
            latents: The clean latents [B, C, h, w], of which no gradient is taken.
            random: Draws k.
        """
        keep_k = random.integers("readout/keep_k", 1, quants.shape[1])
        kept = torch.arange(quants.shape[1], device=quants.device) < keep_k[:, None]  # [B, L]
        dtype = self.linear.weight.dtype
        with precision(quants.device, torch.float32):
            prediction = self.linear((quants.to(dtype) * kept[..., None]).flatten(1))
        return F.mse_loss(prediction, latents.detach().to(dtype).flatten(1))
