"""What most runs import, for the process that they are forked from."""

import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.figure  # noqa: F401
import timm  # noqa: F401
import torch

import train_flextok  # noqa: F401

torch.set_num_threads(1)
