"""Helpers for modules."""

import contextlib

import torch.nn as nn


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Evaluation mode inside the context; afterwards each sub-module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


def count_parameters(module: nn.Module) -> int:
    """Number of scalar parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in module.parameters())
