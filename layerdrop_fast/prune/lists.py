"""The lists of layers in a model: found by name, checked, cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torch import nn

from layerdrop_fast._checks import check_indices
from layerdrop_fast.nn.layer_drop_list import LayerDropModuleList, every_layer
from layerdrop_fast.nn.stack import LayerDropStack
from layerdrop_fast.nn.transformer_stack import TransformerStack
from layerdrop_fast.schedule import DropSchedule, per_layer

# Which layers to keep: of the only list, or of each list by its name.
Keep: TypeAlias = Sequence[int] | Mapping[str, Sequence[int]]
Layers: TypeAlias = nn.ModuleList | nn.Sequential


def checked_keep(model: nn.Module, keep: Keep) -> dict[str, list[int]]:
    """The indices to keep of each list of layers, by the name of its stack where it has one.

    Raises:
        ValueError: as ``extract``.
    """
    by_name = keep if isinstance(keep, Mapping) else {only_list(model): keep}
    lists = {name: layers_of(model, name) for name in by_name}
    _check_apart(lists)
    return {
        stack_of(model, name): check_indices(indices, f"layers to keep of {said(model, name)}", len(lists[name]))
        for name, indices in by_name.items()
    }


def named_list(model: nn.Module, layers: str | None) -> str:
    """The list of layers that a caller names, by the name of its stack where it has one; None: the only one."""
    return only_list(model) if layers is None else stack_of(model, layers)


def said(model: nn.Module, name: str) -> str:
    """A list of layers in words: its name, or what it is where the model itself is meant."""
    return repr(name) if name else f"the {type(model).__name__}"


def only_list(model: nn.Module) -> str:
    """The name of the only LayerDropStack or LayerDropModuleList."""
    names = [name for name, module in model.named_modules() if isinstance(module, LayerDropStack | LayerDropModuleList)]
    if len(names) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(names)} LayerDropStacks and LayerDropModuleLists {names}, expected 1, "
            f"or a list of layers by its name, layers=name or {{name: keep}}; found {_lists_in(model)}"
        )
    return str(names[0])


def _lists_in(model: nn.Module) -> str:
    """What may be named."""
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, LayerDropStack) or is_list_of_layers(module)
    ]
    return ", ".join(map(repr, found)) or "none"


def is_list_of_layers(module: nn.Module) -> bool:
    """Whether a module is a ModuleList, or a Sequential of modules of one kind."""
    kinds = {type(child) for child in module.children()}
    return isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and len(module) > 1 == len(kinds))


def path_to(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """The modules from the model down to the one that holds ``name``; of ``torch.compile(module)`` the module too."""
    names = name.split(".") if name else []
    found = []
    for length in range(len(names)):
        holder = ".".join(names[:length])
        module = model.get_submodule(holder)
        found += [(holder, module), *((holder, module) for module in wrapped_in(module))]
    return found


def wrapped_in(module: nn.Module) -> list[nn.Module]:
    """What ``torch.compile(module)`` wraps; nothing of others."""
    inner = module._modules.get("_orig_mod")
    return [] if inner is None else [inner]


def stack_of(model: nn.Module, name: str) -> str:
    """The name of the stack where ``name`` is that of a LayerDropStack's inner list, else ``name``."""
    owner, _, last = name.rpartition(".")
    inner = last == "layers" and isinstance(dict(model.named_modules()).get(owner), LayerDropStack)
    return owner if inner else name


def layers_of(model: nn.Module, name: str) -> Layers:
    """The layers of a LayerDropStack or a list of layers, by its name."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{type(model).__name__} has no module {name!r}; found the lists of layers {_lists_in(model)}"
        ) from None
    layers = module.layers if isinstance(module, LayerDropStack) else module
    if not isinstance(layers, Layers):
        raise ValueError(f"{name!r} is a {type(module).__name__}, expected a LayerDropStack or a list of layers")
    return layers


def cut(module: nn.Module, keep: Sequence[int]) -> None:
    """Leaves only the layers ``keep`` in a stack or a list of layers, in place."""
    if isinstance(module, LayerDropStack):
        cut(module.layers, keep)
        depth = per_layer(module.schedule.depth_rates[list(keep)].tolist())
        module.schedule = DropSchedule(len(keep), depth, module.schedule.time)
        if isinstance(module, TransformerStack):
            module.parts = module.parts.cut(keep)
        module._proven = set()
        module.reset_stats()
    elif isinstance(module, Layers):
        layers = every_layer(module)
        # A dict of its own: where the list is to be as it was before, the old one is put back. The names are the first
        # ones: those of a Sequential may be words.
        module._modules = dict(zip(module._modules, (layers[index] for index in keep), strict=False))


def _check_apart(lists: Mapping[str, Layers]) -> None:
    """No list stands under two names, or within another one, whose layers would be others when it is cut."""
    for name, layers in lists.items():
        for other, within in lists.items():
            if other != name and any(module is layers for module in within.modules()):
                how = "are the same list" if within is layers else "are a list and one of its layers' own"
                raise ValueError(f"{other!r} and {name!r} {how} of layers, expected lists apart from each other")
