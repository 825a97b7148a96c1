"""Exponential moving average of a model's trained parameters."""

import contextlib

import torch
import torch.nn as nn

from .distributed import from_rank_0, local, reshard


class EMA:
    """Keeps average = decay * average + (1 - decay) * parameter, with decay at most (1 + step) / (10 + step).

    Only trained parameters are averaged; the rest of the model is the same in both.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, step: int, skip: torch.Tensor) -> None:
        """Move the averages, unless `skip` (0 or 1, on the device) is 1."""
        weight = (1 - min(self.decay, (1 + step) / (10 + step))) * (1 - skip)
        averages = [local(average) for average in self.averages]
        parameters = [local(parameter) for parameter in self.parameters]
        torch._foreach_lerp_(averages, parameters, [weight.to(average.dtype) for average in averages])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged model's whole state dict; what is not averaged shares its memory with the model."""
        return {**self.model.state_dict(), **dict(zip(self.names, self.averages))}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        for name, average in zip(self.names, self.averages):
            average.copy_(from_rank_0(state_dict[name], average))

    @torch.no_grad()
    def _swap(self) -> None:
        reshard(self.model)  # else FSDP's gathered parameters would stay what they were
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
