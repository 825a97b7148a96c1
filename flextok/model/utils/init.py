"""Initialisation of linear layers by the names that configs use."""

import torch.nn as nn

WEIGHT_INIT_STYLES = ("xavier", "trunc_normal", "zero")


def init_linear(linear: nn.Linear, style: str) -> nn.Linear:
    """Initialise a linear layer in place: `xavier` (uniform), `trunc_normal` (std 0.02) or `zero`; biases become 0."""
    if style == "xavier":
        nn.init.xavier_uniform_(linear.weight)
    elif style == "trunc_normal":
        nn.init.trunc_normal_(linear.weight, std=0.02)
    elif style == "zero":
        nn.init.zeros_(linear.weight)
    else:
        raise ValueError(f"weight_init_style is {style!r}, expected one of {', '.join(WEIGHT_INIT_STYLES)}")
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear
