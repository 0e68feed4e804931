"""Cutting safetensors files."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerdrop_fast.prune.new_output import new_output
from layerdrop_fast.prune.pruned import Choose, Metadata, Pruned, planned
from layerdrop_fast.prune.state_dict import renamed


def prune_safetensors_file(source: Path, out: Path, choose: Choose, metadata: Metadata | None = None) -> Pruned:
    cut = planned(sizes(source), choose)
    with new_output(out) as temporary:
        write(source, temporary, cut, metadata)
    return cut


def write(source: Path, out: Path, cut: Pruned, metadata: Metadata | None) -> list[str]:
    """Writes what stays of a safetensors file, if anything does; returns the names in it."""
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
    if not tensors:
        return []
    header |= metadata(cut, tensors) if metadata is not None else {}
    try:
        save_file(tensors, out, header or None)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(out)) from error
    shutil.copymode(source, out)  # safetensors' own is for the user alone
    return list(names.values())


def sizes(path: Path) -> dict[str, int]:
    """The bytes of every tensor, by name, from the header alone."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        room = os.path.getsize(path) - 8 - length
        if room < 0:
            raise ValueError(f"{path} is no safetensors file")
        try:
            offsets = dict(_offsets(json.loads(file.read(length))))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no safetensors file ({error})") from error
    expected = max((end for _, end in offsets.values()), default=0)
    if expected != room:
        raise ValueError(f"{path} has {room} bytes of weights, expected {expected}: it is not whole")
    return {name: end - start for name, (start, end) in offsets.items()}


def _offsets(header: dict[str, Any]) -> Iterator[tuple[str, tuple[int, int]]]:
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, (int(start), int(end))
