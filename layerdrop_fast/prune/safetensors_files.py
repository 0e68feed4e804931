"""Cutting safetensors files: single, or in shards with their config."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from layerdrop_fast._progress import stage
from layerdrop_fast.prune.config import left_as_is, prune_config
from layerdrop_fast.prune.new_output import new_output
from layerdrop_fast.prune.pruned import Choose, Metadata, Pruned, planned
from layerdrop_fast.prune.state_dict import renamed

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".h5", ".msgpack")


def prune_safetensors_file(source: Path, out: Path, choose: Choose, metadata: Metadata | None = None) -> Pruned:
    cut = planned(_sizes([source]), choose)
    with new_output(out) as temporary:
        _write_shard(source, temporary, cut, metadata)
    return cut


def prune_folder(source: Path, out: Path, choose: Choose, progress: bool, metadata: Metadata | None = None) -> Pruned:
    index = _json(source / INDEX) if (source / INDEX).exists() else None
    shards = _shards(source, index) if index is not None else [SINGLE]
    for shard in shards:
        if not (source / shard).is_file():
            raise ValueError(f"{source} has no {shard}, expected {SINGLE}, or {INDEX} and its shards")
    cut = planned(_sizes([source / shard for shard in shards]), choose)
    config = source / "config.json"
    whole = _json(config) if config.exists() else None
    smaller = prune_config(whole, cut.kept, cut.layers) if whole is not None else None
    shown = stage("prune", len(shards)) if progress else nullcontext(lambda done, note: None)
    with new_output(out) as temporary, shown as show:
        temporary.mkdir()
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            names = _write_shard(source / shard, temporary / shard, cut, metadata if index is None else None)
            weight_map |= dict.fromkeys(names, shard)
            show(number, shard)
        if index is not None:
            said = {**index.get("metadata", {}), "total_size": cut.bytes_after}
            said.pop("total_parameters", None)  # of the whole network
            _write_json(temporary / INDEX, {**index, "metadata": said, "weight_map": weight_map})
        if smaller is not None:
            _write_json(temporary / "config.json", smaller)
        for other in source.iterdir():  # tokenizers and their like
            if other.is_file() and other.name not in (*shards, INDEX, "config.json") and not _is_weights(other):
                shutil.copy2(other, temporary / other.name)
    if whole is None or smaller is None:
        return cut
    return replace(cut, left_as_is=left_as_is(whole, smaller, cut.kept))


def _shards(source: Path, index: Mapping[str, Any]) -> list[str]:
    """The files of an index: names in its folder, which is where they are read and, in ``out``, written."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{source / INDEX} has no weight_map, expected {{name of a tensor: file}}")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{source / INDEX} names {shard!r}, expected the name of a .safetensors file beside it")
    if not isinstance(index.get("metadata", {}), dict):
        raise ValueError(f"{source / INDEX} has the metadata {index['metadata']!r}, expected an object")
    return sorted(set(weight_map.values()))


def _is_weights(path: Path) -> bool:
    return path.suffix in WEIGHTS or path.name.endswith(".index.json")


def _write_shard(source: Path, out: Path, cut: Pruned, metadata: Metadata | None) -> list[str]:
    """Writes what stays of a safetensors file; returns the names in it."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    try:
        with safe_open(source, framework="pt") as file:
            names = {name: new for name in file.keys() if (new := renamed(name, cut.kept)) is not None}  # noqa: SIM118
            # A record of what a file held would not be true of what is left.
            header = {name: value for name, value in (file.metadata() or {}).items() if name == "format"}
            tensors = {new: file.get_tensor(name) for name, new in names.items()}
    except SafetensorError as error:
        raise ValueError(f"{source} is no safetensors file ({error})") from error
    header |= metadata(cut, tensors) if metadata is not None else {}
    try:
        save_file(tensors, out, header or None)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(out)) from error
    shutil.copymode(source, out)  # safetensors' own is for the user alone
    return list(names.values())


def _sizes(files: Sequence[Path]) -> dict[str, int]:
    """The bytes of every tensor, by name, from the headers alone."""
    sizes: dict[str, int] = {}
    for path in files:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            room = os.path.getsize(path) - 8 - length
            if length == 0 or room < 0:
                raise ValueError(f"{path} is no safetensors file")
            try:
                offsets = dict(_offsets(json.loads(file.read(length))))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} is no safetensors file ({error})") from error
        expected = max((end for _, end in offsets.values()), default=0)
        if expected != room:
            raise ValueError(f"{path} has {room} bytes of weights, expected {expected}: it is not whole")
        sizes |= {name: end - start for name, (start, end) in offsets.items()}
    return sizes


def _offsets(header: dict[str, Any]) -> Iterator[tuple[str, tuple[int, int]]]:
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, (int(start), int(end))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
