"""Taking the smaller network out of a trained one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from layerdrop_fast._checks import check_count
from layerdrop_fast.nn.layer_drop_list import LayerDropModuleList, every_layer
from layerdrop_fast.nn.stack import LayerDropStack
from layerdrop_fast.schedule import DropSchedule, per_layer

Model = TypeVar("Model", bound=nn.Module)


def extract(model: Model, keep: Sequence[int] | Mapping[str, Sequence[int]]) -> Model:
    """A copy of ``model`` that has only the layers in ``keep``, renumbered from 0.

    The model itself is left as it is, and the layers that are not kept are not copied. Kept layers keep their drop
    rates, for finetuning with LayerDrop; the paper finetunes pruned networks without (evaluation drops nothing).

        small = extract(model, every_other(16, kept=8))
        small = extract(model, {"encoder.layers": [0, 3], "decoder.layers": [0, 1, 5]})

    Args:
        model: a module that is or holds a LayerDropStack, a LayerDropModuleList or a ModuleList.
        keep: 0-based indices, ascending, at least one; or such a list for each of several lists of layers, by their
            names in ``model.named_modules()``. Without a name, the model must hold exactly one LayerDropStack or
            LayerDropModuleList.

    Raises:
        ValueError: indices out of range, unsorted or repeated; a name that is no list of layers; no single list where
            no name is given.

    Source: Fan, Grave, Joulin 2019 (arXiv 1909.11556), section 3.3.
    """
    by_name = keep if isinstance(keep, Mapping) else {_only_list(model): keep}
    by_name = {_stack_of(model, name): indices for name, indices in by_name.items()}
    wanted = {name: _checked(name, indices, _layers_of(model, name)) for name, indices in by_name.items()}

    layers = [layer for name in wanted for layer in every_layer(_layers_of(model, name))]
    kept = {id(_layers_of(model, name)[index]) for name, indices in wanted.items() for index in indices}
    # What stands in the memo is taken as already copied.
    smaller = copy.deepcopy(model, {id(layer): layer for layer in layers if id(layer) not in kept})
    for name, indices in wanted.items():
        _cut(smaller.get_submodule(name), indices)
    uncopied = {id(layer) for layer in layers} - kept
    for name, module in smaller.named_modules():
        if id(module) in uncopied:
            raise ValueError(f"the layer {name!r} is used outside the lists that were cut, expected it to go with them")
    return smaller


def _only_list(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, LayerDropStack | LayerDropModuleList)]
    if len(names) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(names)} LayerDropStacks and LayerDropModuleLists {names}, expected 1; "
            "name the lists to cut: {name: keep}"
        )
    return str(names[0])


def _stack_of(model: nn.Module, name: str) -> str:
    """The name of the stack where ``name`` is that of a LayerDropStack's inner list, else ``name``."""
    owner, _, last = name.rpartition(".")
    inner = last == "layers" and isinstance(dict(model.named_modules()).get(owner), LayerDropStack)
    return owner if inner else name


def _layers_of(model: nn.Module, name: str) -> nn.ModuleList:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{type(model).__name__} has no module {name!r}") from None
    layers = module.layers if isinstance(module, LayerDropStack) else module
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{name!r} is a {type(module).__name__}, expected a LayerDropStack or a list of layers")
    return layers


def _checked(name: str, keep: Sequence[int], layers: nn.ModuleList) -> list[int]:
    indices = [check_count(index, "layer to keep", 0) for index in keep]
    if not indices or indices != sorted(set(indices)) or indices[-1] >= len(layers):
        raise ValueError(
            f"layers to keep of {name!r} are {indices}, expected at least one of 0 to {len(layers) - 1}, ascending"
        )
    return indices


def _cut(module: nn.Module, keep: list[int]) -> None:
    """Leaves only the layers ``keep`` in a stack or a list of layers, in place."""
    if isinstance(module, LayerDropStack):
        _cut(module.layers, keep)
        depth = per_layer(module.schedule.depth_rates[keep].tolist())
        module.schedule = DropSchedule(len(keep), depth, module.schedule.time)
        module._proven.clear()
        module.reset_stats()
    elif isinstance(module, nn.ModuleList):
        for index in reversed(range(len(module))):
            if index not in keep:
                del module[index]
