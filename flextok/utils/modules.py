"""Helpers for modules."""

import contextlib
import hashlib

import torch
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


def weights_digest(module: nn.Module) -> str:
    """BLAKE2b of the names, shapes, dtypes and values of a module's weights, 16 bytes in hexadecimal."""
    hasher = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hasher.hexdigest()
