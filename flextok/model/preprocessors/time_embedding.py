"""Embedding of the flow timestep."""

import math

import torch
import torch.nn as nn

from ...utils.batching import as_batch_tensor, dense_batches
from ..utils.init import init_linear


class TimestepEmbedder(nn.Module):
    """Timesteps [B] in [0, max_timestep] -> embeddings [B, dim]: sinusoids, then Linear, SiLU, Linear."""

    def __init__(
        self,
        timesteps_read_key: str,
        time_embedding_write_key: str,
        dim: int,
        frequency_embedding_size: int = 256,
        weight_init_style: str = "xavier",
        max_timestep: float = 1000.0,
        temb_as_tokens: bool = False,
    ):
        super().__init__()
        if temb_as_tokens:
            raise NotImplementedError("TimestepEmbedder: temb_as_tokens is not supported")
        self.timesteps_read_key = timesteps_read_key
        self.time_embedding_write_key = time_embedding_write_key
        self.frequency_embedding_size = frequency_embedding_size
        self.max_timestep = max_timestep
        self.mlp = nn.Sequential(
            init_linear(nn.Linear(frequency_embedding_size, dim), weight_init_style),
            nn.SiLU(),
            init_linear(nn.Linear(dim, dim), weight_init_style),
        )

    def sinusoids(self, t: torch.Tensor) -> torch.Tensor:
        """[cos(t f), sin(t f)] with f_k = 1000 / max_timestep * 256^(-k / half): [B] -> fp32 [B, 2 * half]."""
        half = self.frequency_embedding_size // 2
        k = torch.arange(half, dtype=torch.float32, device=t.device)
        frequencies = (1000 / self.max_timestep) * torch.exp(-math.log(256) * k / half)
        angles = t.float()[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    @dense_batches
    def forward(self, data_dict: dict) -> dict:
        weight = self.mlp[0].weight
        t = as_batch_tensor(data_dict, self.timesteps_read_key, weight, same_batch=False)
        data_dict[self.time_embedding_write_key] = self.mlp(self.sinusoids(t).to(weight.dtype))
        return data_dict
