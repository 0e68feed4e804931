"""What several ranks have to agree on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    """The rank of this process, 0 where there is only one."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def several_ranks() -> bool:
    """Whether this process is one of several."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def any_sharded(layers: Iterable[nn.Module]) -> bool:
    """Whether the parameters of a layer are spread over ranks (FSDP), so that all ranks must run it or none."""
    if not several_ranks():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(part, FSDPModule | FullyShardedDataParallel) for layer in layers for part in layer.modules())


def check_ranks(layers: Iterable[nn.Module], granularity: str, seed_was_drawn: bool) -> None:
    """What a training forward on several ranks needs.

    Raises:
        RuntimeError: all ranks must keep the same layers, and each has drawn a seed of its own.

    Warns where DistributedDataParallel would wait for gradients of dropped layers; its next forward would then raise.
    """
    if not several_ranks():
        return
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if granularity == "batch" and seed_was_drawn and (wrapper is not None or any_sharded(layers)):
        raise RuntimeError(
            "this stack has drawn a seed of its own, and all ranks must keep the same layers: expected the same "
            "seed= on every rank"
        )
    if wrapper is not None and not wrapper.find_unused_parameters and wrapper.require_backward_grad_sync:
        warnings.warn(
            "dropped layers have no gradients, and DistributedDataParallel waits for all of them: wrap the model as "
            "DistributedDataParallel(model, find_unused_parameters=True)",
            stacklevel=5,
        )
