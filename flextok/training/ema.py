"""Exponential moving average of a model's trained parameters."""

import contextlib
from typing import Dict

import torch
import torch.nn as nn


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
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)

    def state_dict(self, model: nn.Module) -> Dict[str, torch.Tensor]:
        """The averaged model's whole state dict; what is not averaged shares its memory with the model."""
        return {**model.state_dict(), **dict(zip(self.names, self.averages))}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Dict[str, torch.Tensor]) -> None:
        for name, average in zip(self.names, self.averages):
            average.copy_(state_dict[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.averages):
            parameter.data, average.data = average.data, parameter.data

    @contextlib.contextmanager
    def swapped_in(self):
        """The model computes with the averages inside the context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()
