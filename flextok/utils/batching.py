"""The container rule: a `data_dict` holds batches [B, ...] or lists of [1, ...] tensors; what goes in comes out.

Modules are written for batches alone; `dense_batches` lets each method that takes a data_dict take lists too. What is
called from within such a method gets batches.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .random import BatchRandom


def as_batch_tensor(
    data_dict: dict, key: str, like: torch.Tensor, dtype: torch.dtype | None = None, same_batch: bool = True
) -> torch.Tensor:
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


def per_image(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Values [B] as [B, 1, ..., 1], to be broadcast over `like` [B, ...]."""
    return values.view(-1, *[1] * (like.ndim - 1))


def dense_batches(method: Callable) -> Callable:
    """Let `method(self, data_dict, ...)`, written for batches, also take lists of [1, ...] tensors and give them back.

    Images of one shape run as one batch; lists of mixed shapes run shape by shape.
    """

    @functools.wraps(method)
    def wrapper(self, data_dict: dict, *args, **kwargs) -> dict:
        list_keys = [key for key, value in data_dict.items() if _is_list_of_images(value)]
        if not list_keys:
            return method(self, data_dict, *args, **kwargs)
        return _run_by_shape(functools.partial(method, self), data_dict, list_keys, args, kwargs)

    return wrapper


def select_images(data_dict: dict, indices: Sequence[int], n: int, list_keys: Sequence[str] = ()) -> dict:
    """A data_dict of the images at `indices` of n, in which the lists under `list_keys` become batches [B, ...]."""
    selected = dict(data_dict)
    for key, value in data_dict.items():
        if key in list_keys:
            selected[key] = torch.cat([value[i] for i in indices])
        elif isinstance(value, BatchRandom):
            selected[key] = value.select(indices)
        elif isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == n:
            selected[key] = value[indices]
        elif isinstance(value, list) and len(value) == n:
            selected[key] = [value[i] for i in indices]
            if list_keys and isinstance(selected[key][0], (tuple, type(None))):
                selected[key] = selected[key][0]  # lengths or a mask, which images of one shape have in common
    return selected


def _is_list_of_images(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(v, torch.Tensor) and v.ndim > 0 for v in value)


def _run_by_shape(method: Callable, data_dict: dict, list_keys: list[str], args: tuple, kwargs: dict) -> dict:
    n = _number_of_images(data_dict, list_keys)
    indices_by_shape: dict[tuple, list[int]] = {}
    for i in range(n):
        shapes = tuple(data_dict[key][i].shape for key in list_keys)
        indices_by_shape.setdefault(shapes, []).append(i)

    results = []
    written = set()  # keys whose value is another object than before
    for indices in indices_by_shape.values():
        batch = select_images(data_dict, indices, n, list_keys)
        out = method(dict(batch), *args, **kwargs)
        results.append((indices, out))
        written |= {key for key in out if key not in batch or out[key] is not batch[key]}
    for key in data_dict.keys() - out.keys():
        del data_dict[key]
    for key in out:
        if key in written:
            data_dict[key] = _merge([(indices, out[key]) for indices, out in results], n, data_dict.get(key))
    return data_dict


def _number_of_images(data_dict: dict, list_keys: list[str]) -> int:
    """The length of the lists; raises ValueError unless all have the same, and entries [1, ...]."""
    n = len(data_dict[list_keys[0]])
    for key in list_keys:
        if len(data_dict[key]) != n:
            raise ValueError(f"{list_keys[0]!r} lists {n} images, but {key!r} lists {len(data_dict[key])}")
        for tensor in data_dict[key]:
            if len(tensor) != 1:
                raise ValueError(
                    f"{key!r} is a list, so each entry must be one image [1, ...], but one is {list(tensor.shape)}: "
                    "pass a single batched tensor, or a list of [1, ...]"
                )
    return n


def _merge(results: list[tuple[list[int], Any]], n: int, before: Any) -> list | torch.Tensor:
    """What each group wrote, as a list of one value per image.

    It becomes a batch where `before`, the value that it replaces, was one, and where it is a new number per image; one
    number for a whole group (a loss) becomes the mean over images.
    """
    values: list = [None] * n
    for indices, value in results:
        is_batch = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == len(indices)
        for i, one in zip(indices, value.split(1) if is_batch else [value] * len(indices), strict=True):
            values[i] = one
    if all(isinstance(value, torch.Tensor) and value.ndim == 0 and value.is_floating_point() for value in values):
        return torch.stack(values).mean()
    if not _is_list_of_images(values) or len({value.shape for value in values}) > 1:
        return values
    is_batch = isinstance(before, torch.Tensor) or (before is None and values[0].ndim == 1)
    return torch.cat(values) if is_batch else values
