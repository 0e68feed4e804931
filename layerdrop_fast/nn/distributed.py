"""What several ranks have to agree on."""

from __future__ import annotations

import warnings

from torch import distributed
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    """The rank of this process, 0 where there is only one."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def several_ranks() -> bool:
    """Whether this process is one of several."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def may_be_sharded() -> bool:
    """Whether other ranks may wait in a layer that this one skips.

    Parameters may be spread over ranks by this stack's own wrapper or that of any module around it (FSDP), which the
    stack cannot see; only DistributedDataParallel is known to leave them whole.
    """
    return several_ranks() and DistributedDataParallel._get_active_ddp_module() is None


def check_ranks(granularity: str, seed_was_drawn: bool) -> None:
    """What a training forward on several ranks needs.

    Raises:
        RuntimeError: all ranks must keep the same layers, and each has drawn a seed of its own.

    Warns where DistributedDataParallel would wait for gradients of dropped layers; its next forward would then raise.
    """
    if not several_ranks():
        return
    if granularity == "batch" and seed_was_drawn:
        raise RuntimeError(
            "this stack has drawn a seed of its own, and all ranks must keep the same layers: expected the same "
            "seed= on every rank"
        )
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is not None and not wrapper.find_unused_parameters and wrapper.require_backward_grad_sync:
        warnings.warn(
            "dropped layers have no gradients, and DistributedDataParallel waits for all of them: wrap the model as "
            "DistributedDataParallel(model, find_unused_parameters=True)",
            stacklevel=5,
        )
