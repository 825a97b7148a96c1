"""A model as an ordered dict of modules that read and write a data_dict."""

from typing import Dict

import torch.nn as nn

from ...utils.batching import dense_batches


class SequentialModuleDictWrapper(nn.Module):
    """Calls the modules of `module_dict` in order; each takes the data_dict and returns it."""

    def __init__(self, module_dict: Dict[str, nn.Module]):
        super().__init__()
        self.module_dict = nn.ModuleDict(module_dict)

    @dense_batches
    def forward(self, data_dict: dict) -> dict:
        for module in self.module_dict.values():
            data_dict = module(data_dict)
        return data_dict
