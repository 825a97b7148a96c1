"""Random numbers by address: a draw is a pure function of (seed, step, position in the global batch, name).

Nothing here has a state. The draw called `name` of the image at `position` of step `step` is the same whoever
computes it: any worker, any rank, any device, before or after a resume. The generator is SplitMix64 (Steele et al.,
"Fast splittable pseudorandom number generators", 2014): a key is folded from the address, and element j of a draw is
the mixed value of key + (j + 1) * gamma. All of it is integer arithmetic modulo 2^64, on the device of the batch.
"""

import hashlib
import math
from collections.abc import Sequence

import torch

MASK64 = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)

# Steps of draws outside training, where every validation and picture draws the same.
VALIDATION_STEP, PICTURE_STEP, TOKENS_STEP = -1, -2, -3

# `data_dict` key under which a BatchRandom travels; modules that draw numbers look for it.
RANDOM_KEY = "random_draws"


def _signed(value: int) -> int:
    """The int64 with the same bits as the unsigned 64-bit `value`."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * MULTIPLIERS[0]) & MASK64
    value = ((value ^ (value >> 27)) * MULTIPLIERS[1]) & MASK64
    return value ^ (value >> 31)


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of int64 bits (`>>` alone keeps the sign)."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix_tensor(value: torch.Tensor) -> torch.Tensor:
    value = (value ^ _shift_right(value, 30)) * _signed(MULTIPLIERS[0])
    value = (value ^ _shift_right(value, 27)) * _signed(MULTIPLIERS[1])
    return value ^ _shift_right(value, 31)


@torch._dynamo.assume_constant_result  # torch.compile cannot look into hashlib
def _name_key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def address_key(seed: int, name: str, *numbers: int) -> int:
    """Fold (seed, name, numbers) into an unsigned 64-bit key, e.g. `address_key(seed, "epoch", epoch)`."""
    key = _name_key(name)
    for number in (seed, *numbers):
        key = _mix((key + GAMMA + (number & MASK64)) & MASK64)
    return key


def uniform_number(seed: int, name: str, step: int, position: int) -> float:
    """One uniform number in [0, 1): the first element of `BatchRandom.uniform` at the same address, as a float."""
    key = _mix((address_key(seed, name, step) + GAMMA + (position & MASK64)) & MASK64)
    return (_mix((key + GAMMA) & MASK64) >> 11) * 2.0**-53


def generator(seed: int, name: str, *numbers: int) -> torch.Generator:
    """A CPU generator for one purpose (an initialisation, a shuffle), seeded from its address."""
    return torch.Generator().manual_seed(_signed(address_key(seed, name, *numbers)))


class BatchRandom:
    """The random draws of one batch.

    Args:
        seed: The run's seed.
        step: Optimizer step that the batch belongs to.
        positions: Long [B], the place of each image in the global batch of that step.
        global_batch_size: Images in the global batch; stratified draws are stratified over it. Default: B.
    """

    def __init__(self, seed: int, step: int, positions: torch.Tensor, global_batch_size: int | None = None):
        self.seed, self.step, self.positions = seed, step, positions
        self.global_batch_size = global_batch_size or len(positions)
        # Seed and step as tensors, filled on the device: a compiled step is not compiled anew for each of them.
        self._numbers = [torch.full((), _signed(n & MASK64), device=positions.device) for n in (seed, step)]

    @classmethod
    def from_global_state(cls, batch_size: int, device) -> "BatchRandom":
        """Draws that follow `torch.manual_seed`, for callers outside a trainer."""
        seed = int(torch.randint(0, 1 << 62, ()))
        return cls(seed, 0, torch.arange(batch_size, device=device))

    @classmethod
    def of(cls, data_dict: dict, like: torch.Tensor) -> "BatchRandom":
        """The draws that travel in `data_dict`, or new ones from torch's global state for the batch of `like`."""
        random = data_dict.get(RANDOM_KEY)
        if random is None:
            return cls.from_global_state(like.shape[0], like.device)
        if len(random.positions) != like.shape[0]:
            raise ValueError(
                f"the random draws in data_dict[{RANDOM_KEY!r}] are for {len(random.positions)} images, "
                f"but the batch has {like.shape[0]}"
            )
        return random

    def select(self, indices: Sequence[int]) -> "BatchRandom":
        """The draws of some images of this batch, unchanged."""
        return BatchRandom(self.seed, self.step, self.positions[list(indices)], self.global_batch_size)

    def _bits(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """Long [B, *shape] of 64 random bits each."""
        key = torch.full((), _signed(_name_key(name)), device=self.positions.device)
        for number in self._numbers:
            key = _mix_tensor(key + _signed(GAMMA) + number)
        keys = _mix_tensor(self.positions.long() + key + _signed(GAMMA))
        counter = torch.arange(1, math.prod(shape) + 1, device=keys.device) * _signed(GAMMA)
        return _mix_tensor(keys[:, None] + counter).view(len(keys), *shape)

    def uniform(self, name: str, shape: Sequence[int] = ()) -> torch.Tensor:
        """Float64 [B, *shape], uniform in [0, 1)."""
        return _shift_right(self._bits(name, shape), 11).double() * 2.0**-53

    def normal(self, name: str, shape: Sequence[int] = ()) -> torch.Tensor:
        """Float32 [B, *shape], standard normal (Box-Muller on the two halves of each 64-bit value).

        Computed in float64, so that rounding to float32 hides the last-bit differences of vectorised libraries and an
        image's noise does not depend on the batch around it.
        """
        bits = self._bits(name, shape)
        radius = (-2.0 * (((bits >> 32) & 0xFFFFFFFF).double() + 0.5).mul(2.0**-32).log()).sqrt()
        angle = (bits & 0xFFFFFFFF).double().mul(2.0 * math.pi * 2.0**-32)
        return (radius * angle.cos()).float()

    def integers(self, name: str, low: int, high: int, shape: Sequence[int] = ()) -> torch.Tensor:
        """Long [B, *shape], uniform in low..high, both included."""
        return low + (self.uniform(name, shape) * (high - low + 1)).long()

    def batch_integer(self, name: str, low: int, high: int) -> int:
        """One integer in low..high for the whole step, the same on every rank."""
        return low + int(uniform_number(self.seed, name, self.step, -1) * (high - low + 1))
