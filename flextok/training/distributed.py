"""Several processes: DDP or FSDP2 around what computes the losses; with one process neither is there."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..model.trunks.transformers import TransformerBlock
from ..utils.config import ConfigError
from ..utils.processes import is_distributed, rank, world_size


class Losses(nn.Module):
    """The trained modules and the function that computes the losses from them, as one module for DDP to wrap."""

    def __init__(self, modules: list[nn.Module], compute: Callable[..., dict[str, torch.Tensor]]):
        super().__init__()
        self.trained, self.compute = nn.ModuleList(modules), compute

    def forward(self, *arguments: Any) -> dict[str, torch.Tensor]:
        return self.compute(*arguments)


def data_parallel(compute: Callable[..., dict[str, torch.Tensor]], parts: dict[str, nn.Module]) -> nn.Module:
    """`compute` as a module whose backward pass averages the gradients of `parts`, if any, over the processes."""
    losses = Losses(called_modules(parts), compute)
    if world_size() == 1 or not parts:
        return losses
    with warnings.catch_warnings():  # the newer name of the argument is not known to older versions
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(losses, broadcast_buffers=False, gradient_as_bucket_view=True)


def called_modules(parts: dict[str, nn.Module]) -> list[nn.Module]:
    """The modules of `parts` that have a forward pass: those in a ModuleList, not itself."""
    return [m for part in parts.values() for m in (part if isinstance(part, nn.ModuleList) else [part])]


def shard(parts: dict[str, nn.Module], device: torch.device) -> None:
    """Divide the parameters of `parts` among the processes (FSDP2, arXiv 2304.11277), each transformer block a unit.

    Parameters are gathered in fp32 and autocast casts them, as it does under DDP: the same numbers.
    """
    # Nothing here changes what a part returns in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (world_size(),))
    settings = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for part in called_modules({name: part for name, part in parts.items() if name != "vae"}):  # which stays frozen
        for module in part.modules():
            if isinstance(module, TransformerBlock):
                fully_shard(module, **settings)
        fully_shard(part, **settings)


@contextlib.contextmanager
def sync_gradients(losses: nn.Module, parts: dict[str, nn.Module], last: bool, keep: bool):
    """Whether a backward pass inside the context reduces gradients over the processes.

    DDP reduces those of the last micro-batch of a step, in which the others are summed. So does FSDP with `keep`, but
    then keeps whole fp32 gradients until then; without, each micro-batch is reduced, and only shards are kept.
    """
    for part in called_modules(parts):
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(last or not keep)
    with contextlib.nullcontext() if last or not hasattr(losses, "no_sync") else losses.no_sync():
        yield


def reshard(module: nn.Module) -> None:
    """Let FSDP gather its parameters from the shards at their next use, which may have been changed."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whole, where it is; of a sharded one every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state(tree: Any) -> Any:
    """A tree of dicts, lists and tensors with sharded tensors whole, on the CPU of process 0; the others get None.

    Every process has to call this. A tree without sharded tensors is as it was.
    """
    if isinstance(tree, DTensor):
        tensor = full(tree)
        return tensor.cpu() if rank() == 0 else None
    if isinstance(tree, dict):
        return {key: full_state(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [full_state(value) for value in tree]
    return tree


def without_values(tree: Any) -> Any:
    """A tree of dicts, lists and tensors with each tensor as one without values, on the meta device."""
    if isinstance(tree, torch.Tensor):
        return torch.empty_like(tree, device="meta")
    if isinstance(tree, dict):
        return {key: without_values(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_values(value) for value in tree]
    return tree


def from_rank_0(value: Any, like: torch.Tensor) -> Any:
    """Process 0's tensor in all processes, on the device of `like`, and divided as that is if the shapes agree.

    Args:
        value: The tensor in process 0, one of its shape (on the meta device) in the others; or a dict of these;
            anything else stays.
    """
    if isinstance(value, dict):
        return {key: from_rank_0(entry, like) for key, entry in value.items()}
    if not isinstance(value, torch.Tensor) or world_size() == 1:
        return value
    value = value.to(like.device) if rank() == 0 else torch.empty_like(value, device=like.device)
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value, like.device_mesh, like.placements)
    dist.broadcast(value, 0)
    return value


def check_parallel(parallel: str, train_dtype: torch.dtype | None) -> None:
    """Raise ConfigError for fp16 with FSDP, which would need a scaler that knows of shards."""
    if parallel == "fsdp" and is_distributed() and train_dtype == torch.float16:
        raise ConfigError(
            "parallel: fsdp computes in bf16, which this device does not have: set use_amp: false, or ddp"
        )
