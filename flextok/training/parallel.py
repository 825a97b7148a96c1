"""DDP or FSDP2 around what computes the losses; with one process neither is there."""

import contextlib
import warnings
from typing import Any, Callable, Dict, List, Optional

import torch
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..model.trunks.transformers import TransformerBlock
from ..utils.config import ConfigError
from ..utils.processes import is_distributed, rank, world_size


class Losses(nn.Module):
    """The trained modules and the function that computes the losses from them, as one module for DDP to wrap."""

    def __init__(self, modules: List[nn.Module], compute: Callable[..., Dict[str, torch.Tensor]]):
        super().__init__()
        self.trained, self.compute = nn.ModuleList(modules), compute

    def forward(self, *arguments: Any) -> Dict[str, torch.Tensor]:
        return self.compute(*arguments)


def replicate(modules: List[nn.Module], compute: Callable[..., Dict[str, torch.Tensor]]) -> nn.Module:
    """`compute` as a module whose backward pass averages the gradients of `modules`, if any, over the processes."""
    losses = Losses(modules, compute)
    if world_size() == 1 or not modules:
        return losses
    with warnings.catch_warnings():  # the newer name of the argument is not known to older versions
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(losses, broadcast_buffers=False, gradient_as_bucket_view=True)


def shard(parts: List[nn.Module], device: torch.device, dtype: Optional[torch.dtype]) -> None:
    """Divide the parameters of `parts` among the processes (FSDP2, arXiv 2304.11277), each transformer block a unit.

    A unit's parameters are gathered when it runs, in `dtype` if given, and its gradients averaged in fp32.

    Raises:
        ConfigError: fp16, which would need a scaler that knows of shards.
    """
    if not is_distributed():
        return
    if dtype == torch.float16:
        raise ConfigError(
            "parallel: fsdp computes in bf16, which this device does not have: set use_amp: false, or ddp"
        )
    # Nothing here changes what a part returns in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (world_size(),))
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    policy = whole
    if dtype is not None:  # autocast casts what goes into matrix products, as it does without FSDP
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in parts:
        for module in part.modules():
            if isinstance(module, TransformerBlock):
                fully_shard(module, mesh=mesh, mp_policy=policy)
            elif getattr(module, "dtype_override", None) == torch.float32:
                fully_shard(module, mesh=mesh, mp_policy=whole)
        fully_shard(part, mesh=mesh, mp_policy=policy)


@contextlib.contextmanager
def exchanging(losses: nn.Module, parts: List[nn.Module], exchange: bool):
    """Whether a backward pass inside the context exchanges gradients: only the last of an accumulation needs to."""
    for part in parts:
        if hasattr(part, "set_requires_gradient_sync"):  # FSDP2
            part.set_requires_gradient_sync(exchange)
    with contextlib.nullcontext() if exchange or not hasattr(losses, "no_sync") else losses.no_sync():
        yield


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whole, where it is; of a sharded one every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(tree: Any) -> Any:
    """A tree of dicts, lists and tensors with sharded tensors whole, on the CPU of process 0; the others get None.

    Every process has to call this. A tree without sharded tensors is as it was.
    """
    if isinstance(tree, DTensor):
        tensor = full(tree)
        return tensor.cpu() if rank() == 0 else None
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value) for value in tree]
    return tree


def sharded_like(tensor: Any, reference: torch.Tensor) -> Any:
    """A whole tensor divided as `reference` is, if that is sharded and of the same shape."""
    if isinstance(reference, DTensor) and isinstance(tensor, torch.Tensor) and tensor.shape == reference.shape:
        return distribute_tensor(tensor.to(reference.device), reference.device_mesh, reference.placements)
    return tensor
