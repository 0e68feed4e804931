"""Cutting files of ``torch.save``: all state dicts, optimizers and options in them."""

from __future__ import annotations

import argparse
import errno
import pickle
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerdrop_fast.prune.config import left_as_is, prune_config, says_layers
from layerdrop_fast.prune.nameless_optimizers import WAY_OUT, parameter_names
from layerdrop_fast.prune.new_output import new_output
from layerdrop_fast.prune.pruned import Choose, Metadata, Pruned, planned
from layerdrop_fast.prune.state_dict import (
    NUMBERED,
    cut_optimizer,
    layer_lists,
    number_of_layers,
    own_names,
    prune_state_dict,
    renamed,
)

# What reading a broken file ends in: the readers of archives and pickles check little.
BROKEN = (RuntimeError, EOFError, pickle.UnpicklingError, struct.error, ValueError, LookupError, AssertionError)


def prune_torch_file(source: Path, out: Path, choose: Choose, optimizer: bool = True) -> Pruned:
    checkpoint = _load(source)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{source} holds a {type(checkpoint).__name__}, expected a state dict, or a dict of them")
    if not optimizer:
        checkpoint = _without_optimizers(checkpoint)
    state_dicts = sorted(_state_dicts(checkpoint), key=_rank)
    if not state_dicts:
        raise ValueError(f"{source} holds no state dict with layers; it has {sorted(map(str, checkpoint))[:8]}")
    model = state_dicts[0]
    cut = planned({name: value.nbytes for name, value in model.items() if isinstance(value, Tensor)}, choose)
    through = _Cut(model, cut.kept, cut.layers)
    smaller = _compact(through.everything(checkpoint))
    with new_output(out) as temporary, temporary.open("wb") as file:
        torch.save(smaller, file)
    return replace(cut, left_as_is={**cut.left_as_is, **through.left_as_is, **dict(_other_tensors(checkpoint))})


def sizes(path: Path) -> dict[str, int]:
    """The bytes of every tensor in a file with one state dict, by name."""
    return {name: value.nbytes if isinstance(value, Tensor) else 0 for name, value in _flat(path).items()}


def write(source: Path, out: Path, cut: Pruned, metadata: Metadata | None) -> list[str]:
    """Writes what stays of a file with one state dict, if anything does; returns the names in it."""
    entries = {new: value for name, value in _flat(source).items() if (new := renamed(name, cut.kept)) is not None}
    if entries:
        torch.save(_compact(entries), out)
    return list(entries)


def _flat(path: Path) -> dict[str, Any]:
    content = _load(path)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state dict")
    return content


def _load(source: Path) -> Any:
    """What ``torch.save`` wrote, nothing of which is executed.

    Raises:
        ValueError: the file is broken, or holds what would have to be executed.
    """
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
    elif not _is_optimizer(value):
        for _, inner in _entries(value):
            yield from _state_dicts(inner)


def _entries(value: Any) -> Iterator[tuple[Any, Any]]:
    """What a dict, Namespace, list or tuple holds, by name or place; nothing of another kind."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list | tuple):
        yield from enumerate(value)


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return False
    return bool(layer_lists(name for name, entry in value.items() if isinstance(entry, Tensor)))


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, dict) and set(value) >= {"state", "param_groups"}


def _holds_weights(value: Any) -> bool:
    """Whether state dicts or optimizers stand in it: options may have tensors too, such as the weights of classes."""
    return _is_state_dict(value) or _is_optimizer(value) or any(_holds_weights(inner) for _, inner in _entries(value))


def _without_optimizers(value: Any) -> Any:
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**_without_optimizers(vars(value)))
    if isinstance(value, dict):
        value = {name: inner for name, inner in value.items() if not _is_optimizer(inner)}
    elif type(value) in (list, tuple):
        value = type(value)(inner for inner in value if not _is_optimizer(inner))
    return _mapped(_without_optimizers, value)


def _other_tensors(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """What may be weights and belongs to no state dict or optimizer: where it stands, and how many they are."""
    if _is_optimizer(value):
        return
    entries = list(_entries(value))
    tensors = sum(
        isinstance(inner, Tensor) and inner.dim() > 0 and (inner.is_floating_point() or inner.is_complex())
        for _, inner in entries
    )
    if tensors and not _is_state_dict(value):
        yield place or "outermost", f"{tensors} {'tensor' if tensors == 1 else 'tensors'}"
    for name, inner in entries:
        yield from _other_tensors(inner, f"{place}.{name}".lstrip("."))


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
        self.left_as_is: dict[str, Any] = {}  # of options: what may number or count layers too

    def everything(self, value: Any) -> Any:
        """State dicts, optimizers and options, cut; all else as it is."""
        if isinstance(value, argparse.Namespace):
            return argparse.Namespace(**self.everything(vars(value)))
        if not isinstance(value, dict):
            return _mapped(self.everything, value)
        if _is_optimizer(value):
            return self.optimizer(value)
        if not _holds_weights(value):
            return self._options({name: self._inside_options(inner) for name, inner in value.items()})
        if _is_state_dict(value):
            value = prune_state_dict(value, self._named_as(value))
        # What stands beside state dicts, or beside the weights in one, may be options too: each dict for itself.
        cut = _mapped(self.everything, value)
        options = {name: inner for name, inner in cut.items() if not isinstance(inner, dict | Tensor)}
        return cut | self._options({name: inner for name, inner in options.items() if not _holds_weights(inner)})

    def optimizer(self, value: Mapping[str, Any]) -> dict[str, Any]:
        names = own_names(value)
        if names is None:
            return cut_optimizer(value, self.keep, parameter_names(value, self.model))
        keep = {}
        for prefix, indices in self.keep.items():
            other = _same_list(prefix, names)
            if other is None:  # all of it is frozen
                continue
            count = number_of_layers(names, other)
            if count > self.layers[prefix]:
                raise ValueError(
                    f"an optimizer has {count} layers {other!r}, the model {self.layers[prefix]}: expected that of the "
                    f"same model, {WAY_OUT}"
                )
            keep[other] = indices
        return cut_optimizer(value, keep, names)

    def _options(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """Options such as fairseq's; those that say nothing of layers stay as they are."""
        keep = {prefix: indices for prefix, indices in self.keep.items() if says_layers(value, prefix)}
        cut = prune_config(value, keep, self.layers)
        self.left_as_is |= left_as_is(value, cut, {prefix: self.layers[prefix] for prefix in keep})
        return cut

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
    """A dict, Namespace, list or tuple of what the function makes of each value; another kind as it is."""
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**_mapped(function, vars(value)))
    if isinstance(value, dict):
        return {name: function(inner) for name, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(function(inner) for inner in value)
    return value


def _compact(value: Any) -> Any:
    """The same without tensors that are part of a larger storage, which would be written with all of it."""
    return _compacted(value, {})


def _compacted(value: Any, copies: dict[Any, Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return _mapped(lambda inner: _compacted(inner, copies), value)
    if value.layout is not torch.strided or value.untyped_storage().nbytes() <= value.nbytes:
        return value
    place = (value.data_ptr(), value.dtype, value.shape, value.stride())
    if place not in copies:  # tied weights stay tied
        copies[place] = value.detach().clone()
    return copies[place]
