"""Cutting checkpoint files: safetensors, single or in shards with their config, and torch's own."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerdrop_fast._files import replace_atomically, sync_folder
from layerdrop_fast._progress import stage
from layerdrop_fast.prune.config import prune_config, says_layers
from layerdrop_fast.prune.state_dict import (
    checked_keep,
    layer_lists,
    prune_optimizer_state_dict,
    prune_state_dict,
    renamed,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TORCH = (".pt", ".pth", ".bin", ".ckpt")

# From the lists of layers that were found, {prefix: layers}, to what to keep of each.
Choose = Callable[[dict[str, int]], Mapping[str, Sequence[int]]]


@dataclass(frozen=True)
class Pruned:
    """What was cut."""

    kept: dict[str, list[int]]
    layers: dict[str, int]  # that each list had
    bytes_before: int
    bytes_after: int


def prune_checkpoint(source: Path | str, out: Path | str, choose: Choose, *, progress: bool = False) -> Pruned:
    """Writes a checkpoint of a network cut to fewer layers.

    ``source`` is a safetensors file; a folder as transformers saves it, with ``config.json`` and
    ``model.safetensors``, in shards or not; or a file of ``torch.save`` with state dicts in it, of which all that have
    the layers are cut (the model's, an EMA's), and the optimizer's. Such a file is read with ``weights_only=True``:
    nothing in it is executed. ``out`` is a file or folder of the same kind.

    Args:
        choose: called with the lists of layers that the checkpoint has, {prefix: number of layers}; returns
            {prefix: layers to keep}.
        progress: show how many shards are done.

    Raises:
        ValueError: as ``prune_state_dict`` and ``prune_config``; a source of another kind; an ``out`` that exists.
            OSError: a file cannot be read or written. ``source`` is never written, and ``out`` is there whole or not at
            all.
    """
    source, out = Path(source), Path(out)
    if out.exists():
        raise ValueError(f"{out} exists, expected a new name")
    if source.is_dir():
        return _folder(source, out, choose, progress)
    if source.suffix == ".safetensors":
        return _safetensors_file(source, out, choose)
    if source.suffix in TORCH:
        return _torch_file(source, out, choose)
    raise ValueError(f"{source} is none of a folder, .safetensors, {', '.join(TORCH)}")


def _safetensors_file(source: Path, out: Path, choose: Choose) -> Pruned:
    sizes = _sizes([source])
    keep = checked_keep(sizes, choose(layer_lists(sizes)))
    with _new_file(out) as temporary:
        _write_shard(source, temporary, keep)
    return _pruned(keep, sizes)


def _folder(source: Path, out: Path, choose: Choose, progress: bool) -> Pruned:
    index = _json(source / INDEX) if (source / INDEX).exists() else None
    shards = sorted(set(index["weight_map"].values())) if index is not None else [SINGLE]
    for shard in shards:
        if not (source / shard).is_file():
            raise ValueError(f"{source} has no {shard}, expected {SINGLE}, or {INDEX} and its shards")
    sizes = _sizes([source / shard for shard in shards])
    lists = layer_lists(sizes)
    keep = checked_keep(sizes, choose(lists))
    config = source / "config.json"
    smaller = prune_config(_json(config), keep, lists) if config.exists() else None
    shown = stage("prune", len(shards)) if progress else nullcontext(lambda done, note: None)
    with _new_folder(out) as temporary, shown as show:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            weight_map |= dict.fromkeys(_write_shard(source / shard, temporary / shard, keep), shard)
            show(number, shard)
        if index is not None:
            total = sum(size for name, size in sizes.items() if renamed(name, keep) is not None)
            metadata = {**index.get("metadata", {}), "total_size": total}
            _write_json(temporary / INDEX, {**index, "metadata": metadata, "weight_map": weight_map})
        if smaller is not None:
            _write_json(temporary / "config.json", smaller)
        for other in source.iterdir():  # tokenizers and their like
            if other.is_file() and other.name not in (*shards, INDEX, "config.json") and not _is_weights(other):
                shutil.copy2(other, temporary / other.name)
    return _pruned(keep, sizes)


def _is_weights(path: Path) -> bool:
    return path.suffix in (".safetensors", *TORCH, ".h5", ".msgpack") or path.name.endswith(".index.json")


def _write_shard(source: Path, out: Path, keep: Mapping[str, Sequence[int]]) -> list[str]:
    """Writes what stays of a safetensors file; returns the names in it."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(source, framework="pt") as file:
        names = {name: new for name in file.keys() if (new := renamed(name, keep)) is not None}  # noqa: SIM118
        # A record of what a file held would not be true of what is left.
        metadata = {name: value for name, value in (file.metadata() or {}).items() if name == "format"}
        save_file({new: file.get_tensor(name) for name, new in names.items()}, out, metadata or None)
    return list(names.values())


def _sizes(files: Sequence[Path]) -> dict[str, int]:
    """The bytes of every tensor, by name, from the headers alone."""
    sizes: dict[str, int] = {}
    for path in files:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= os.path.getsize(path) - 8:
                raise ValueError(f"{path} is no safetensors file")
            try:
                header = json.loads(file.read(length))
                sizes |= {name: end - start for name, (start, end) in _offsets(header)}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} is no safetensors file ({error})") from error
    return sizes


def _offsets(header: dict[str, Any]) -> Iterator[tuple[str, tuple[int, int]]]:
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, (start, end)


def _torch_file(source: Path, out: Path, choose: Choose) -> Pruned:
    # fairseq keeps its options in a Namespace, which is a dict by another name.
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{source} holds a {type(checkpoint).__name__}, expected a state dict, or a dict of them")
    state_dicts = dict(_state_dicts(checkpoint))
    if not state_dicts:
        raise ValueError(f"{source} holds no state dict with layers; it has {sorted(map(str, checkpoint))[:8]}")
    model = next(iter(state_dicts.values()))
    sizes = {name: value.nbytes for name, value in model.items() if isinstance(value, Tensor)}
    keep = checked_keep(model, choose(layer_lists(model)))
    smaller = _cut_everything(checkpoint, keep, model)
    with _new_file(out) as temporary:
        torch.save(smaller, temporary)
    return _pruned(keep, sizes)


def _state_dicts(value: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The state dicts with layers in a checkpoint, the largest first."""
    found = [(place, value)] if _is_state_dict(value) else []
    if isinstance(value, dict) and not found:
        found = [pair for name, inner in value.items() for pair in _state_dicts(inner, f"{place}.{name}")]
    yield from sorted(found, key=lambda pair: -len(pair[1]))


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return False
    return bool(layer_lists(name for name, entry in value.items() if isinstance(entry, Tensor)))


def _cut_everything(value: Any, keep: Mapping[str, Sequence[int]], model: Mapping[str, Any]) -> Any:
    """State dicts, optimizers and options in a checkpoint, cut; all else as it is."""
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**_cut_options(vars(value), keep, model))
    if not isinstance(value, dict):
        return value
    if set(value) >= {"state", "param_groups"}:
        return prune_optimizer_state_dict(value, keep, _parameter_names(value, model))
    if _is_state_dict(value):
        return prune_state_dict(value, _as_named(value, keep))
    return {name: _cut_everything(inner, keep, model) for name, inner in value.items()}


def _as_named(state_dict: Mapping[str, Any], keep: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """``keep`` with the prefixes that another state dict of the same model has, such as ``module.encoder.layers``."""
    lists = layer_lists(state_dict)
    return {
        next((other for other in lists if other == prefix or other.endswith(f".{prefix}")), prefix): indices
        for prefix, indices in keep.items()
    }


def _cut_options(
    options: dict[str, Any], keep: Mapping[str, Sequence[int]], model: Mapping[str, Any]
) -> dict[str, Any]:
    """Options such as fairseq's; those that say nothing of layers stay as they are."""
    keep = {prefix: indices for prefix, indices in keep.items() if says_layers(options, prefix)}
    return prune_config(options, keep, layer_lists(model))


def _parameter_names(optimizer: Mapping[str, Any], model: Mapping[str, Any]) -> list[str] | None:
    """The names of an optimizer's parameters; None where it has them itself."""
    groups = optimizer["param_groups"]
    if all("param_names" in group for group in groups):
        return None
    numbers = [number for group in groups for number in group["params"]]
    # Weights that are tied stand in a state dict twice.
    tensors = {name: value for name, value in model.items() if isinstance(value, Tensor)}
    once = {(value.data_ptr(), value.shape): name for name, value in reversed(tensors.items())}
    names = [name for name in tensors if name in set(once.values())]
    moments = {
        number: moment.shape
        for number, state in optimizer["state"].items()
        for moment in state.values()
        if isinstance(moment, Tensor) and moment.dim()
    }
    if len(names) != len(numbers) or any(
        number in moments and moments[number] != tensors[name].shape
        for number, name in zip(numbers, names, strict=True)
    ):
        raise ValueError(
            f"cannot tell which of the optimizer's {len(numbers)} parameters belong to which layer: expected one that "
            "was made from model.named_parameters(), or a checkpoint without an optimizer"
        )
    return names


def _pruned(keep: dict[str, list[int]], sizes: Mapping[str, int]) -> Pruned:
    after = sum(size for name, size in sizes.items() if renamed(name, keep) is not None)
    lists = layer_lists(sizes)
    return Pruned(keep, {prefix: lists[prefix] for prefix in keep}, sum(sizes.values()), after)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    replace_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


@contextmanager
def _new_file(out: Path) -> Iterator[Path]:
    """A file that is there once the block has ended well."""
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(out.parent)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that is there once the block has ended well."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(out.parent)
