"""The container rule: a `data_dict` holds lists of [1, ...] tensors or batches [B, ...]; what goes in comes out.

Modules are written for batches. `dense_batches` wraps their entry points: a list becomes one batch (one per shape, if
the shapes are mixed), and what the module wrote comes back as lists of [1, ...].
"""

import functools
from typing import Any, Callable

import torch

from .random import BatchRandom


def as_batch_tensor(data_dict: dict, key: str, like: torch.Tensor, dtype=None, same_batch: bool = True) -> torch.Tensor:
    """A control value (a list or tensor with one entry per image) as a tensor [B] on the device of `like`.

    Raises:
        ValueError: It does not have one entry per image of `like` [B, ...] (not checked unless `same_batch`).
    """
    value = data_dict[key]
    if isinstance(value, (list, tuple)):
        value = [v.item() if isinstance(v, torch.Tensor) else v for v in value]
    value = torch.as_tensor(value, dtype=dtype).to(like.device, non_blocking=True)
    if same_batch and value.shape != like.shape[:1]:
        raise ValueError(f"{key!r} has shape {list(value.shape)}, but the batch has {len(like)} images")
    return value


def _is_sample_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(v, torch.Tensor) and v.ndim > 0 for v in value)


def dense_batches(method: Callable) -> Callable:
    """Let `method(self, data_dict, ...)`, written for batched tensors, also take and return lists of [1, ...]."""

    @functools.wraps(method)
    def wrapper(self, data_dict, *args, **kwargs):
        if not any(_is_sample_list(value) for value in data_dict.values()):
            return method(self, data_dict, *args, **kwargs)
        return _run_by_shape(functools.partial(method, self), data_dict, args, kwargs)

    return wrapper


def _run_by_shape(method: Callable, data_dict: dict, args, kwargs) -> dict:
    list_keys = [key for key, value in data_dict.items() if _is_sample_list(value)]
    n = len(data_dict[list_keys[0]])
    for key in list_keys:
        if len(data_dict[key]) != n:
            raise ValueError(f"{list_keys[0]!r} lists {n} images, but {key!r} lists {len(data_dict[key])}")
        for tensor in data_dict[key]:
            if tensor.shape[0] != 1:
                raise ValueError(
                    f"{key!r} is a list, so each entry must be one image [1, ...], but one is {list(tensor.shape)}: "
                    "pass a single batched tensor, or a list of [1, ...]"
                )
    groups: dict = {}
    for i in range(n):
        groups.setdefault(tuple(data_dict[key][i].shape for key in list_keys), []).append(i)

    results, written = [], set()  # what a module wrote is known by its identity
    for indices in groups.values():
        dense = gather(data_dict, list_keys, indices, n)
        out = method(dict(dense), *args, **kwargs)
        written |= {key for key in out if key not in dense or out[key] is not dense[key]}
        results.append((indices, out))
    merged = {key: _scatter(key, results, data_dict, n) if key in written else data_dict[key] for key in results[0][1]}
    for key in list(data_dict):
        if key not in merged:
            del data_dict[key]
    data_dict.update(merged)
    return data_dict


def gather(data_dict: dict, list_keys: list, indices: list, n: int) -> dict:
    """The dense data_dict of the images at `indices` of n; the values under `list_keys` are lists of [1, ...]."""
    dense = {}
    for key, value in data_dict.items():
        if key in list_keys:
            dense[key] = torch.cat([value[i] for i in indices])
        elif isinstance(value, BatchRandom):
            dense[key] = value.select(indices)
        elif isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == n:
            dense[key] = value[indices]
        elif isinstance(value, list) and len(value) == n:
            first = value[indices[0]]
            # What a packer noted (shapes, a mask) is the same for all images of a group; the rest are control values.
            dense[key] = first if first is None or isinstance(first, tuple) else [value[i] for i in indices]
        else:
            dense[key] = value
    return dense


def _scatter(key: str, results: list, data_dict: dict, n: int):
    """Merge the groups' values of one key into the container that belongs outside."""
    before = data_dict.get(key)
    per_image = [None] * n
    tensors = True
    for indices, out in results:
        value = out[key]
        batched = isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == len(indices)
        tensors = tensors and batched
        for j, i in enumerate(indices):
            per_image[i] = value[j : j + 1] if batched else value
    stays_batched = tensors and (isinstance(before, torch.Tensor) or (before is None and per_image[0].ndim == 1))
    if stays_batched and len({tensor.shape for tensor in per_image}) == 1:
        return torch.cat(per_image)
    return per_image
