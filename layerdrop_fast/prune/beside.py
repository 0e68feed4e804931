"""What a model says of its layers outside of their lists: how many there are, of what kinds, and the place of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from layerdrop_fast.nn.layer_drop_list import every_layer
from layerdrop_fast.prune.config import SIDES, prune_config
from layerdrop_fast.prune.lists import is_list_of_layers, layers_of, path_to

ABSENT = object()


class Change(NamedTuple):
    """An attribute of a module or config that changes with a cut."""

    attributes: dict[str, Any]
    name: str
    before: Any
    after: Any

    def make(self) -> None:
        self.attributes[self.name] = self.after

    def undo(self) -> None:
        if self.before is ABSENT:
            self.attributes.pop(self.name, None)
        else:
            self.attributes[self.name] = self.before


def changes_beside(model: nn.Module, wanted: Mapping[str, list[int]]) -> list[Change]:
    """What changes beside the lists of a model that is still whole when they are cut to ``wanted``.

    The ``layer_idx`` of each layer, and of the modules in it, where that is the layer's number: a cache has a slot for
    each number. Of the modules that hold a list, from the model down, and of their ``config``: what ``prune_config``
    cuts, where it is certain that this list is meant. It is not where another list beside it has as many layers, or
    where there is an encoder and a decoder and the list's name says neither.
    """
    return [
        *(change for name, keep in wanted.items() for change in _of_places(every_layer(layers_of(model, name)), keep)),
        *_of_counts(model, wanted),
    ]


def _of_places(layers: Sequence[nn.Module], keep: Sequence[int]) -> list[Change]:
    found = {}  # a layer may stand at several places
    for place, index in enumerate(keep):
        for module in layers[index].modules():
            said = vars(module).get("layer_idx")
            if type(said) is int and said == index:
                found[id(module)] = Change(vars(module), "layer_idx", index, place)
    return list(found.values())


def _of_counts(model: nn.Module, wanted: Mapping[str, list[int]]) -> list[Change]:
    total = {name: len(layers_of(model, name)) for name in wanted}
    found: dict[int, tuple[dict[str, Any], dict[str, list[int]]]] = {}  # attributes, and the lists that they are of
    for name, keep in wanted.items():
        # A config that several modules have is that of the innermost one, which has the fewest lists.
        owned = {
            id(attributes): (attributes, list(_alike(model, name, holder, module)))
            for holder, module in path_to(model, name)
            for attributes in _attributes_of(module)
        }
        for key, (attributes, others) in owned.items():
            if _is_of(attributes, name, keep, total[name], others):
                found.setdefault(key, (attributes, {}))[1][name] = keep
    return [change for attributes, keeps in found.values() for change in _of_attributes(attributes, keeps, total)]


def _attributes_of(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Of a module, and of its config where that is an object."""
    yield vars(module)
    config = getattr(vars(module).get("config"), "__dict__", None)
    if isinstance(config, dict):
        yield config


def _is_of(attributes: dict[str, Any], name: str, keep: list[int], total: int, others: Sequence[str]) -> bool:
    """Whether attributes certainly have the number of layers of a list; ``others`` have as many."""
    if _has_sides(attributes):
        if not _sides_named(name):
            return False
        others = [other for other in others if _sides_named(other) == _sides_named(name)]
    try:
        prune_config(_plain(attributes), {name: keep}, {name: total})
    except ValueError:  # they have none, or another
        return False
    return not others


def _has_sides(attributes: dict[str, Any]) -> bool:
    counted = any(f"{side}_layers" in key for key in attributes for side in SIDES)
    return counted or attributes.get("is_encoder_decoder") is True


def _sides_named(name: str) -> list[str]:
    return [side for side in SIDES if side in name]


def _alike(model: nn.Module, name: str, holder: str, module: nn.Module) -> Iterator[str]:
    """Other lists of as many layers in a module that holds a list."""
    layers = layers_of(model, name)
    inside = {id(layers)} | {id(inner) for layer in every_layer(layers) for inner in layer.modules()}
    for other, found in module.named_modules(prefix=holder):
        if id(found) not in inside and is_list_of_layers(found) and len(list(found.children())) == len(layers):
            yield other


def _of_attributes(
    attributes: dict[str, Any], keeps: Mapping[str, list[int]], total: Mapping[str, int]
) -> Iterator[Change]:
    plain = _plain(attributes)
    try:
        pruned = prune_config(plain, keeps, {name: total[name] for name in keeps})
    except ValueError:  # several lists have one number
        return
    for key, value in pruned.items():
        before = attributes.get(key, ABSENT)
        if isinstance(value, list):
            if len(value) < len(plain[key]):
                yield Change(attributes, key, before, type(before)(value))
        elif before is ABSENT or value != before:
            yield Change(attributes, key, before, value)


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    """What may count layers or have an entry for each."""
    return {
        key: list(value) if type(value) in (list, tuple) else value
        for key, value in attributes.items()
        if isinstance(value, int) or type(value) in (list, tuple)
    }
