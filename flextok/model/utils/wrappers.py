"""A model as an ordered dict of modules that read and write a data_dict."""

from collections.abc import Iterable, Sequence

import torch.nn as nn

from ...utils.batching import dense_batches


class SequentialModuleDictWrapper(nn.Module):
    """Calls the modules of `module_dict` in order; each takes the data_dict and returns it."""

    def __init__(self, module_dict: dict[str, nn.Module]):
        super().__init__()
        self.module_dict = nn.ModuleDict(module_dict)

    @dense_batches
    def forward(self, data_dict: dict, names: Sequence[str] | None = None) -> dict:
        """Run all modules, or those called `names`, in the order of the model; values are batches or lists."""
        for name, module in self.module_dict.items():
            if names is None or name in names:
                data_dict = module(data_dict)
        return data_dict

    def split(self, changing: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the modules that can run once while the values under the keys `changing` vary, and of the others.

        The first have no key in common with the varying values, nor with any module before them that has.
        """
        touched = set(changing)
        fixed = []
        varying = []
        for name, module in self.module_dict.items():
            keys = _keys(module)
            if keys and touched.isdisjoint(keys):
                fixed.append(name)
            else:
                varying.append(name)
                touched |= keys
        return tuple(fixed), tuple(varying)


def _keys(module: nn.Module) -> set[str]:
    """The data_dict keys that a module reads or writes: its attributes `..._read_key`, `..._write_keys` and so on."""
    keys = set()
    for name, value in vars(module).items():
        if name.endswith(("read_key", "write_key")):
            keys |= {value} - {None}
        elif name.endswith(("read_keys", "write_keys")):
            keys |= set(value)
    return keys
