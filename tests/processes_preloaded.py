"""What most runs import, for the process that they are forked from."""

import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.figure  # noqa: F401
import timm  # noqa: F401
import tiny_runs  # noqa: F401 (which keeps the photographs that are read below)
import torch

import train_flextok  # noqa: F401
from flextok.data.photos import PhotoCrops

torch.set_num_threads(1)
PhotoCrops("train", 32, 1)
