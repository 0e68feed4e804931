"""Optimizers that were given parameters without their names: which they are, as far as that can be told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from layerdrop_fast.prune.state_dict import NUMBERED

# What well-known modules have in their state dicts beside parameters. Buffers of integers are told by their kind.
BUFFERS = frozenset(
    {"_extra_state", "_float_tensor", "inv_freq", "masked_bias", "original_inv_freq"}
    | {"running_mean", "running_var", "version"}
)
WAY_OUT = "or the checkpoint without it (optimizer=False, --without-optimizer)"


def parameter_names(optimizer: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    """The names of the parameters of an optimizer that has none: those of the model, in its order.

    Raises:
        ValueError: several groups; other shapes or another number than the model's; a model whose layers are not in
            order, as those of a sorted state dict, so that the order of its parameters is not known.
    """
    groups = optimizer["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    if len(groups) != 1:  # which parameters went to which group is not written anywhere
        raise ValueError(
            f"cannot tell which of the optimizer's {len(numbers)} parameters in {len(groups)} groups belong to which "
            f"layer: expected groups of named parameters (model.named_parameters()), a single group, {WAY_OUT}"
        )
    parameters = _parameters(model)
    moments = [
        (number, moment.shape)
        for number, state in optimizer["state"].items()
        for moment in state.values()
        if isinstance(moment, Tensor) and moment.dim()
    ]
    shapes = dict(zip(numbers, (value.shape for value in parameters.values()), strict=False))
    if len(parameters) != len(numbers) or any(shapes.get(number) != shape for number, shape in moments):
        raise ValueError(
            f"cannot tell which of the optimizer's {len(numbers)} parameters belong to which layer, the model has "
            f"{len(parameters)}: expected an optimizer of all of them in the model's order, one of "
            f"model.named_parameters(), {WAY_OUT}"
        )
    _check_order(parameters)
    return list(parameters)


def _check_order(names: Iterable[str]) -> None:
    """The parameters of a model come layer by layer; the names of a sorted state dict do not, from ten layers on."""
    last: dict[str, int] = {}
    for name in names:
        for found in NUMBERED.finditer(name):
            prefix, number = name[: found.start()], int(found[1])
            if number < last.get(prefix, 0):
                raise ValueError(
                    f"cannot tell which of the optimizer's parameters belong to which layer: the state dict has layer "
                    f"{last[prefix]} of {prefix!r} before layer {number}, expected them in the model's order, an "
                    f"optimizer of model.named_parameters(), {WAY_OUT}"
                )
            last[prefix] = number


def _parameters(model: Mapping[str, Any]) -> dict[str, Tensor]:
    """What seem to be the parameters in a state dict; weights that are tied stand in it twice, and here once."""
    parameters: dict[str, Tensor] = {}
    seen = set()
    for name, value in model.items():
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            continue
        place = (value.data_ptr(), value.shape) if value.numel() else name
        if name.rpartition(".")[2] not in BUFFERS and place not in seen:
            seen.add(place)
            parameters[name] = value
    return parameters
