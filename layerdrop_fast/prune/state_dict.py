"""Cutting checkpoints: state dicts, optimizer states and configs, without the model they belong to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from layerdrop_fast._checks import check_indices

Value = TypeVar("Value")

# As Python writes it: 00 is no other name of layer 0. No list of layers is as long as ten digits allow.
NUMBER = "(0|[1-9][0-9]{0,8})"
NUMBERED = re.compile(rf"(?:^|\.){NUMBER}(?=\.)")
OF_LAYER = re.compile(rf"{NUMBER}\.(.+)", re.DOTALL)
NAMED = 10  # so many layers are named in an error


def layer_lists(names: Iterable[str]) -> dict[str, int]:
    """The lists of layers among the names of a state dict: prefix -> number of layers.

    ``{"encoder.layers": 12, "decoder.layers": 6}`` of ``encoder.layers.0.fc1.weight``, ... Lists inside of layers, such
    as the experts of a mixture, are not among them.
    """
    found: dict[str, set[int]] = {}
    for name in names:
        if outermost := NUMBERED.search(name):
            found.setdefault(name[: outermost.start()], set()).add(int(outermost[1]))
    return {prefix: 1 + max(numbers) for prefix, numbers in found.items()}


def number_of_layers(names: Iterable[str], prefix: str) -> int:
    """How many layers a list has, also one inside of a layer."""
    numbers = (layer_of(name, prefix)[0] for name in names)
    return 1 + max((number for number in numbers if number is not None), default=-1)


def prune_state_dict(state_dict: Mapping[str, Value], keep: Mapping[str, Sequence[int]]) -> dict[str, Value]:
    """The entries that a network cut to ``keep`` has, renumbered from 0; values are passed on as they are.

        small = prune_state_dict(state_dict, {"decoder.layers": [0, 2, 4]})

    Args:
        state_dict: names such as ``encoder.layers.3.fc1.weight`` (fairseq, torch), ``bert.encoder.layer.3...``,
            ``model.layers.3...``, ``transformer.h.3...`` (transformers). It is left as it is.
        keep: for each list of layers to cut, by what its names have before the number: 0-based indices, ascending, at
            least one. Lists that are not named, such as the encoder's, stay whole.

    Raises:
        ValueError: a prefix without layers; indices out of range, unsorted or repeated; layers that are missing; an
            entry that a dropped layer alone has, beside all those of another one, which the others may share.
            TypeError: another kind of index.

    Source: Fan, Grave, Joulin 2019 (arXiv 1909.11556), section 3.3; fairseq's ``--decoder-layers-to-keep``.
    """
    checked = checked_against(state_dict, keep)
    pruned: dict[str, Value] = {}
    for name, value in state_dict.items():
        new = renamed(name, checked)
        if new is not None:
            pruned[new] = value
    return pruned


def checked_against(names: Iterable[str], keep: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """``keep`` as lists, checked against the names of a state dict."""
    names = list(names)
    _check_prefixes(keep)
    return {prefix: _checked(prefix, indices, names) for prefix, indices in keep.items()}


def check_mapping(keep: Mapping[str, Sequence[int]]) -> None:
    """What to keep is said list by list."""
    if not isinstance(keep, Mapping):
        raise TypeError(f"keep is a {type(keep).__name__}, expected {{prefix: layers to keep}}")


def _check_prefixes(keep: Mapping[str, Sequence[int]]) -> None:
    check_mapping(keep)
    if not keep:
        raise ValueError("keep is empty, expected {prefix: layers to keep}")
    for prefix in keep:
        if inside := [other for other in keep if other != prefix and other.startswith(_dotted(prefix))]:
            raise ValueError(f"{inside[0]!r} lies within {prefix!r}, expected lists of layers apart from each other")


def renamed(name: str, keep: Mapping[str, Sequence[int]]) -> str | None:
    """What an entry is called after the cut; None where its layer is dropped."""
    for prefix, indices in keep.items():
        number, rest = layer_of(name, prefix)
        if number is not None:
            return f"{_dotted(prefix)}{indices.index(number)}.{rest}" if number in indices else None
    return name


def _checked(prefix: str, keep: Sequence[int], names: Sequence[str]) -> list[int]:
    layers: dict[int, list[str]] = {}
    for name in names:
        number, rest = layer_of(name, prefix)
        if number is not None:
            layers.setdefault(number, []).append(rest)
    indices = _checked_indices(prefix, keep, layers, names)
    last = max(layers)
    if count := last + 1 - len(layers):
        missing = list(islice((number for number in range(last) if number not in layers), NAMED))
        more = f" and {count - len(missing)} more" if count > len(missing) else ""
        raise ValueError(f"layers {missing}{more} of {prefix!r} are missing, expected 0 to {last}")
    owners = Counter(rest for rests in layers.values() for rest in rests)
    for number, rests in layers.items():
        alone = [rest for rest in rests if owners[rest] == 1]
        # A layer of another kind, such as the dense ones of a mixture, lacks something too.
        if number not in indices and alone and any(set(rests) > set(other) for other in layers.values()):
            raise ValueError(
                f"layer {number} of {prefix!r} alone has {alone[0]!r}, which the others may share: expected it among "
                f"the layers to keep, got {indices}"
            )
    return indices


def _checked_indices(prefix: str, keep: Sequence[int], layers: Iterable[int], names: Iterable[str]) -> list[int]:
    """The layers to keep, checked against the numbers of those that there are."""
    last = max(layers, default=None)
    if last is None:
        found = ", ".join(f"{other!r} ({count})" for other, count in layer_lists(names).items()) or "none"
        raise ValueError(f"no layers {_dotted(prefix)}0, {_dotted(prefix)}1, ...; found lists of layers: {found}")
    return check_indices(keep, f"layers to keep of {prefix!r}", last + 1)


def layer_of(name: str, prefix: str) -> tuple[int | None, str]:
    """The number of the layer that an entry belongs to, and what stands after it."""
    if not name.startswith(_dotted(prefix)):
        return None, name
    found = OF_LAYER.fullmatch(name, len(_dotted(prefix)))
    return (int(found[1]), found[2]) if found else (None, name)


def _dotted(prefix: str) -> str:
    return f"{prefix}." if prefix else ""


def prune_optimizer_state_dict(
    state_dict: Mapping[str, Any],
    keep: Mapping[str, Sequence[int]],
    names: Sequence[str] | None = None,
    *,
    model: Iterable[str] | None = None,
) -> dict[str, Any]:
    """What ``optimizer.state_dict()`` is once the layers that are not kept are gone.

    Layers may be missing in it: those that are frozen. Groups of which nothing is left are dropped, such as those of
    an optimizer with one group a layer.

    Args:
        state_dict: of a torch optimizer; it is left as it is.
        keep: as for ``prune_state_dict``.
        names: of the optimizer's parameters, in the order in which it was given them, group by group; None: those that
            the optimizer was given (``torch.optim.AdamW(model.named_parameters())``), or that stand in the place of
            numbers (``torch.distributed.checkpoint.state_dict.get_optimizer_state_dict``).
        model: the names of the model's state dict, against which ``keep`` is checked; None: those of the optimizer,
            which do for this unless the last layers are frozen.

    Raises:
        ValueError: no names, or another number of them than of parameters; a prefix without layers; indices out of
            range, unsorted or repeated; with ``model``, as ``prune_state_dict``. TypeError: a value of another kind.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise TypeError(f"state_dict is a {type(state_dict).__name__}, expected what optimizer.state_dict() returns")
    if names is None:
        names = own_names(state_dict)
        if names is None:
            raise ValueError("the optimizer's state has no param_names, expected them, or names")
    _check_number(state_dict, names)
    if model is not None:
        checked = checked_against(model, keep)
    else:
        _check_prefixes(keep)
        checked = {
            prefix: _checked_indices(prefix, indices, range(number_of_layers(names, prefix)), names)
            for prefix, indices in keep.items()
        }
    return cut_optimizer(state_dict, checked, names)


def own_names(optimizer: Mapping[str, Any]) -> list[str] | None:
    """The names of an optimizer's parameters; None where one of its groups has none.

    They stand beside the parameters' numbers where the optimizer was given them, and in the place of those in what
    ``torch.distributed.checkpoint.state_dict.get_optimizer_state_dict`` returns.
    """
    groups = optimizer["param_groups"]
    if all(isinstance(parameter, str) for group in groups for parameter in group["params"]):
        return [name for group in groups for name in group["params"]]
    if any("param_names" not in group for group in groups):
        return None
    return [name for group in groups for name in group["param_names"]]


def _check_number(optimizer: Mapping[str, Any], names: Sequence[str]) -> None:
    total = sum(len(group["params"]) for group in optimizer["param_groups"])
    if len(names) != total:
        raise ValueError(f"got {len(names)} names, expected {total}, one a parameter of the optimizer")


def cut_optimizer(
    state_dict: Mapping[str, Any], keep: Mapping[str, Sequence[int]], names: Sequence[str]
) -> dict[str, Any]:
    """``prune_optimizer_state_dict`` with ``keep`` as it is."""
    groups = state_dict["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    _check_number(state_dict, names)
    new_names = {number: renamed(name, keep) for number, name in zip(numbers, names, strict=True)}
    kept = [number for number in numbers if new_names[number] is not None]
    places = {number: new_names[number] if isinstance(number, str) else place for place, number in enumerate(kept)}
    new_groups = []
    for group in groups:
        stay = [number for number in group["params"] if number in places]
        if group["params"] and not stay:
            continue
        new = {**group, "params": [places[number] for number in stay]}
        if "param_names" in group:
            new["param_names"] = [new_names[number] for number in stay]
        new_groups.append(new)
    state = {places[number]: value for number, value in state_dict["state"].items() if number in places}
    return {**state_dict, "state": state, "param_groups": new_groups}
