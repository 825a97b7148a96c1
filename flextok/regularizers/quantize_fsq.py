"""Finite scalar quantization (FSQ, arXiv 2309.15505)."""

import math
from collections.abc import Sequence

import torch
import torch.nn as nn

from ..utils.batching import dense_batches, per_image
from ..utils.random import BatchRandom


class FSQ(nn.Module):
    """Rounds each channel of a latent vector to one of `levels[i]` values: [B, ..., len(levels)], computed in fp32.

    Writes the quantised latents (in about [-1, 1], with a straight-through gradient) and tokens (long [B, ...], in
    0..codebook_size - 1). There is no codebook to learn, and nothing in the state dict.

    Args:
        levels: Number of values per channel, at least 2 each, with a product below 2^63.
        drop_quant_p: In training, probability that an image's latents are left unquantised.
        corrupt_tokens_p, min_corrupt_tokens_p: In training, a corrupted image has each code replaced, with a
            probability drawn uniformly between the two, by a code drawn uniformly from the codebook. The second is by
            default the first.
        apply_corrupt_tokens_p: Probability that an image is corrupted (if corrupt_tokens_p > 0).
        packed_call: Accepted and without effect: batches are dense here.
    """

    def __init__(
        self,
        latents_read_key: str,
        quants_write_key: str,
        tokens_write_key: str,
        levels: Sequence[int],
        drop_quant_p: float = 0.0,
        corrupt_tokens_p: float = 0.0,
        min_corrupt_tokens_p: float | None = None,
        apply_corrupt_tokens_p: float = 0.2,
        packed_call: bool = True,
    ):
        super().__init__()
        self.levels = [int(level) for level in levels]
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"levels is {self.levels}, expected numbers of at least 2")
        if sum(map(math.log2, self.levels)) >= 63:
            raise ValueError("levels give more codes than tokens of 64 bits can name: use fewer or smaller ones")
        self.codebook_size = math.prod(self.levels)
        min_corrupt_tokens_p = corrupt_tokens_p if min_corrupt_tokens_p is None else min_corrupt_tokens_p
        probabilities = {
            "drop_quant_p": drop_quant_p,
            "corrupt_tokens_p": corrupt_tokens_p,
            "min_corrupt_tokens_p": min_corrupt_tokens_p,
            "apply_corrupt_tokens_p": apply_corrupt_tokens_p,
        }
        for name, p in probabilities.items():
            if not 0.0 <= p <= 1.0:
                raise ValueError(f"{name} is {p}, expected a probability from 0 to 1")
        self.latents_read_key = latents_read_key
        self.quants_write_key = quants_write_key
        self.tokens_write_key = tokens_write_key
        self.drop_quant_p = drop_quant_p
        self.apply_corrupt_tokens_p = apply_corrupt_tokens_p
        self.corrupt_tokens_p = corrupt_tokens_p
        self.min_corrupt_tokens_p = min_corrupt_tokens_p
        basis = [math.prod(self.levels[:i]) for i in range(len(self.levels))]
        self.register_buffer("_levels", torch.tensor(self.levels), persistent=False)
        self.register_buffer("_basis", torch.tensor(basis), persistent=False)

    def bound(self, z: torch.Tensor) -> torch.Tensor:
        """Squash z, fp32 [..., channels], into the range whose rounding gives levels[i] integers per channel."""
        half = (self._levels - 1) * 1.001 / 2
        offset = torch.where(self._levels % 2 == 0, 0.5, 0.0)
        shift = (offset / half).atanh()
        return (z + shift).tanh() * half - offset

    def codes_to_indices(self, codes: torch.Tensor) -> torch.Tensor:
        """Integer codes [..., channels] (rounded, not divided) -> tokens, long [...]."""
        return ((codes.round().long() + self._levels // 2) * self._basis).sum(-1)

    def indices_to_embedding(self, indices: torch.Tensor) -> torch.Tensor:
        """Tokens, long [...] in 0..codebook_size - 1 -> quantised latents, fp32 [..., channels]."""
        half_width = self._levels // 2
        levels = indices[..., None] // self._basis % self._levels
        return (levels - half_width) / half_width.float()

    @dense_batches
    def forward(self, data_dict: dict) -> dict:
        z = data_dict[self.latents_read_key]
        if z.shape[-1] != len(self.levels):
            raise ValueError(f"{self.latents_read_key!r} has {z.shape[-1]} channels, but levels has {len(self.levels)}")
        half_width = self._levels // 2
        bounded = self.bound(z.float())
        rounded = bounded + (bounded.round() - bounded).detach()
        tokens = self.codes_to_indices(rounded.detach())
        quants = rounded / half_width
        if self.training and (self.drop_quant_p > 0 or self.corrupt_tokens_p > 0):
            random = BatchRandom.of(data_dict, z)
            if self.drop_quant_p > 0:
                drop = random.uniform("fsq/drop") < self.drop_quant_p
                quants = torch.where(per_image(drop, z), bounded / half_width, quants)
            if self.corrupt_tokens_p > 0:
                shape = tokens.shape[1:]
                applies = random.uniform("fsq/corrupt_image") < self.apply_corrupt_tokens_p
                spread = self.corrupt_tokens_p - self.min_corrupt_tokens_p
                p = self.min_corrupt_tokens_p + random.uniform("fsq/corrupt_p") * spread
                p = per_image(torch.where(applies, p, 0.0), tokens)
                replacements = random.integers("fsq/corrupt_code", 0, self.codebook_size - 1, shape)
                corrupt = random.uniform("fsq/corrupt", shape) < p  # [B, ...]
                tokens = torch.where(corrupt, replacements, tokens)
                quants = torch.where(corrupt[..., None], self.indices_to_embedding(replacements), quants)
        data_dict[self.quants_write_key] = quants
        data_dict[self.tokens_write_key] = tokens
        return data_dict
