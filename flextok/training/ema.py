"""Exponential moving average of a model's trained parameters."""

import contextlib
from typing import Dict

import torch
import torch.nn as nn

from .parallel import local, sharded_like


class EMA:
    """Keeps average = decay * average + (1 - decay) * parameter, with decay at most (1 + step) / (10 + step).

    Only trained parameters are averaged; the rest of the model is the same in both.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, step: int, skip: torch.Tensor) -> None:
        """Move the averages, unless `skip` (0 or 1, on the device) is 1."""
        weight = (1 - min(self.decay, (1 + step) / (10 + step))) * (1 - skip)
        for average, parameter in zip(map(local, self.averages), map(local, self.parameters)):
            average.lerp_(parameter, weight.to(average.dtype))

    def state_dict(self, model: nn.Module) -> Dict[str, torch.Tensor]:
        """The averaged model's whole state dict; what is not averaged shares its memory with the model."""
        return {**model.state_dict(), **dict(zip(self.names, self.averages))}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Dict[str, torch.Tensor]) -> None:
        for name, average in zip(self.names, self.averages):
            average.copy_(sharded_like(state_dict[name], average))

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(map(local, self.parameters), map(local, self.averages)):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    @contextlib.contextmanager
    def swapped_in(self):
        """The model computes with the averages inside the context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()
