"""Cutting files of ``torch.save``: all state dicts, optimizers and options in them."""

from __future__ import annotations

import argparse
import errno
import pickle
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerdrop_fast.prune.config import prune_config, says_layers
from layerdrop_fast.prune.new_output import new_output
from layerdrop_fast.prune.pruned import Choose, Pruned, planned
from layerdrop_fast.prune.state_dict import (
    NUMBERED,
    cut_optimizer,
    layer_lists,
    number_of_layers,
    own_names,
    prune_state_dict,
)

# What well-known modules have in their state dicts beside parameters. Buffers of integers are told by their kind.
BUFFERS = frozenset(
    {"_extra_state", "_float_tensor", "inv_freq", "masked_bias", "original_inv_freq"}
    | {"running_mean", "running_var", "version"}
)
# What reading a broken file ends in: the readers of archives and pickles check little.
BROKEN = (RuntimeError, EOFError, pickle.UnpicklingError, struct.error, ValueError, LookupError, AssertionError)


def prune_torch_file(source: Path, out: Path, choose: Choose) -> Pruned:
    checkpoint = _load(source)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{source} holds a {type(checkpoint).__name__}, expected a state dict, or a dict of them")
    state_dicts = sorted(_state_dicts(checkpoint), key=_rank)
    if not state_dicts:
        raise ValueError(f"{source} holds no state dict with layers; it has {sorted(map(str, checkpoint))[:8]}")
    model = state_dicts[0]
    cut = planned({name: value.nbytes for name, value in model.items() if isinstance(value, Tensor)}, choose)
    smaller = _compact(_Cut(model, cut.kept, cut.layers).everything(checkpoint), {})
    with new_output(out) as temporary, temporary.open("wb") as file:
        torch.save(smaller, file)
    return cut


def _load(source: Path) -> Any:
    # fairseq keeps its options in a Namespace, which is a dict by another name.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            try:
                return torch.load(source, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # files from before torch 1.6, which cannot be mapped
                return torch.load(source, map_location="cpu", weights_only=True)
        except (*BROKEN, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # the reader sought before the start
                raise
            raise ValueError(
                f"cannot read {source}, expected state dicts that torch.save wrote: {_why(error)}"
            ) from error


def _why(error: Exception) -> str:
    """What stands in the way, without torch's advice to execute it."""
    text = str(error)
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"it holds a {named[1]}, which would have to be executed: save state dicts and plain numbers only"
    known = f" ({type(error).__name__}: {text.splitlines()[0]})" if text and "weights_only" not in text else ""
    return f"it is none, or damaged{known}"


def _state_dicts(value: Any) -> Iterator[dict[str, Any]]:
    """The state dicts with layers in a checkpoint."""
    if _is_state_dict(value):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _state_dicts(inner)


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return False
    return bool(layer_lists(name for name, entry in value.items() if isinstance(entry, Tensor)))


def _rank(state_dict: Mapping[str, Any]) -> tuple[int, bool]:
    """The model comes before others: the most in layers, and names that are not an averaged or wrapped model's."""
    inside = sum(NUMBERED.search(name) is not None for name in state_dict)
    return -inside, any(name.startswith("module.") for name in state_dict)


class _Cut:
    """One cut through all that a checkpoint has of a model.

    ``layers``: how many layers the lists have, by the prefixes of ``keep``.
    """

    def __init__(self, model: Mapping[str, Any], keep: Mapping[str, Sequence[int]], layers: Mapping[str, int]) -> None:
        self.model = model
        self.keep = keep
        self.layers = layers

    def everything(self, value: Any) -> Any:
        """State dicts, optimizers and options, cut; all else as it is."""
        if isinstance(value, dict):
            if set(value) >= {"state", "param_groups"}:
                return self.optimizer(value)
            if _is_state_dict(value):
                return prune_state_dict(value, self._named_as(value))
            if not _has_tensors(value):
                return self.options(value)
        elif isinstance(value, argparse.Namespace):
            return argparse.Namespace(**self.options(vars(value)))
        return _mapped(self.everything, value)

    def optimizer(self, value: Mapping[str, Any]) -> dict[str, Any]:
        names = own_names(value)
        if names is None:
            return cut_optimizer(value, self.keep, _parameter_names(value, self.model))
        keep = {}
        for prefix, indices in self.keep.items():
            other = _same_list(prefix, names)
            if other is None:  # all of it is frozen
                continue
            count = number_of_layers(names, other)
            if count > self.layers[prefix]:
                raise ValueError(f"an optimizer has {count} layers {other!r}, the model {self.layers[prefix]}")
            keep[other] = indices
        return cut_optimizer(value, keep, names)

    def options(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """Options such as fairseq's; those that say nothing of layers stay as they are."""
        keep = {prefix: indices for prefix, indices in self.keep.items() if says_layers(value, prefix)}
        return prune_config({name: self._inside_options(inner) for name, inner in value.items()}, keep, self.layers)

    def _inside_options(self, value: Any) -> Any:
        # Dicts in dicts are cut with the outermost, which has the number of layers in one place.
        return _mapped(self._inside_options, value) if isinstance(value, dict) else self.everything(value)

    def _named_as(self, state_dict: Mapping[str, Any]) -> dict[str, Sequence[int]]:
        """``keep`` with the prefixes that another state dict of the model has, such as ``module.encoder.layers``."""
        keep = {}
        for prefix, indices in self.keep.items():
            other = _same_list(prefix, state_dict)
            count = 0 if other is None else number_of_layers(state_dict, other)
            if other is None or other in keep or count != self.layers[prefix]:
                raise ValueError(
                    f"a state dict beside the model's has lists of layers {layer_lists(state_dict)}, expected "
                    f"{self.layers[prefix]} layers {prefix!r}"
                )
            keep[other] = indices
        return keep


def _same_list(prefix: str, names: Iterable[str]) -> str | None:
    """What a list of layers is called among other names of the same model; None where it is not there."""
    names = list(names)
    if number_of_layers(names, prefix):
        return prefix
    ends = [other for other in layer_lists(names) if _ends(other, prefix) or _ends(prefix, other)]
    if len(ends) > 1:
        raise ValueError(f"cannot tell which of the lists of layers {ends} is {prefix!r}, expected one")
    return ends[0] if ends else None


def _ends(name: str, end: str) -> bool:
    return not end or f".{name}".endswith(f".{end}")


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """A dict, list or tuple of what the function makes of each value; another kind as it is."""
    if isinstance(value, dict):
        return {name: function(inner) for name, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(function(inner) for inner in value)
    return value


def _has_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_tensors(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return any(_has_tensors(inner) for inner in value)
    return isinstance(value, Tensor)


def _parameter_names(optimizer: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    """The names of the parameters of an optimizer that has none: those of the model, in its order."""
    groups = optimizer["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    if len(groups) != 1:  # which parameters went to which group is not written anywhere
        raise ValueError(
            f"cannot tell which of the optimizer's {len(numbers)} parameters in {len(groups)} groups belong to which "
            "layer: expected groups of named parameters (model.named_parameters()), a single group, or a checkpoint "
            "without an optimizer"
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
            "model.named_parameters(), or a checkpoint without an optimizer"
        )
    return list(parameters)


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


def _compact(value: Any, copies: dict[Any, Tensor]) -> Any:
    """The same without tensors that are part of a larger storage, which would be written with all of it."""
    if not isinstance(value, Tensor):
        return _mapped(lambda inner: _compact(inner, copies), value)
    if value.layout is not torch.strided or value.untyped_storage().nbytes() <= value.nbytes:
        return value
    place = (value.data_ptr(), value.dtype, value.shape, value.stride())
    if place not in copies:  # tied weights stay tied
        copies[place] = value.detach().clone()
    return copies[place]
