"""Register tokens that the encoder fills with what it sees."""

import re
from collections.abc import Sequence

import torch
import torch.nn as nn
from einops import repeat

from ...utils.batching import dense_batches
from ...utils.random import BatchRandom


class Registers1D(nn.Module):
    """Writes register tokens [B, n, D] for the images of a batch.

    Args:
        input_tensor_list_read_key: Any tensor of the batch: gives batch size and device.
        register_sizes_read_write_key: Where n is written.
        n_min, n_max, n_eval: Number of registers: `n_eval` (default n_max) in evaluation; in training drawn once per
            step by `size_sampling_mode`.
        size_sampling_mode: `uniform`: from n_min..n_max; `powers_of_two`: from the powers of two among them;
            `k=1-2-4`: from the given list.
        ordering_mode: `nested`: the first n registers are used.
    """

    def __init__(
        self,
        input_tensor_list_read_key: str,
        register_sizes_read_write_key: str,
        registers_write_key: str,
        dim: int,
        n_min: int,
        n_max: int,
        n_eval: int | None = None,
        size_sampling_mode: str = "uniform",
        ordering_mode: str = "nested",
        extra_registers_write_key: str | None = None,
        extra_registers_dim: int | None = None,
    ):
        super().__init__()
        if ordering_mode != "nested":
            raise NotImplementedError(f"Registers1D: ordering_mode {ordering_mode!r} is not supported, only 'nested'")
        if extra_registers_write_key is not None or extra_registers_dim is not None:
            raise NotImplementedError("Registers1D: extra_registers_* are not supported")
        if not 1 <= n_min <= n_max or not (n_eval is None or 1 <= n_eval <= n_max):
            raise ValueError(
                f"Registers1D: n_min {n_min}, n_eval {n_eval} and n_max {n_max} need 1 <= n_min, n_eval <= n_max"
            )
        self.read_key = input_tensor_list_read_key
        self.write_key = registers_write_key
        self.register_sizes_read_write_key = register_sizes_read_write_key
        self.n_max = n_max
        self.n_eval = n_max if n_eval is None else n_eval
        self.sizes: Sequence[int] = range(n_min, n_max + 1)
        if size_sampling_mode != "uniform":
            self.sizes = []
            if size_sampling_mode == "powers_of_two":
                self.sizes = [1 << i for i in range(n_max.bit_length()) if n_min <= 1 << i <= n_max]
            elif re.fullmatch(r"k=\d+(-\d+)*", size_sampling_mode):
                self.sizes = [int(k) for k in size_sampling_mode[2:].split("-")]
            if not self.sizes or min(self.sizes) < 1 or max(self.sizes) > n_max:
                raise ValueError(
                    f"size_sampling_mode is {size_sampling_mode!r}, expected uniform, powers_of_two or a list like "
                    f"k=1-2-4 of numbers up to {n_max}"
                )
        self.registers = nn.Parameter(torch.empty(n_max, dim))
        nn.init.trunc_normal_(self.registers, std=0.02)

    @dense_batches
    def forward(self, data_dict: dict) -> dict:
        like = data_dict[self.read_key]
        n = self.n_eval
        if self.training:
            n = self.sizes[0]
            if len(self.sizes) > 1:
                n = self.sizes[BatchRandom.of(data_dict, like).batch_integer("registers", 0, len(self.sizes) - 1)]
        data_dict[self.register_sizes_read_write_key] = (n,)
        data_dict[self.write_key] = repeat(self.registers[:n], "n d -> b n d", b=len(like))
        return data_dict
