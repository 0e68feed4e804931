"""Checkpoints: one safetensors file each, with everything that a run needs to go on.

The header's metadata hold ``record`` (JSON) and ``sha256``, the digest of the record and of every tensor, so that any
changed bit is noticed before it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerdrop_fast.recipes.files import RecipeError, read_bytes, write_atomically


class DamagedError(RecipeError):
    """What is in a file is not what a checkpoint of this program has."""


def save_checkpoint(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Writes tensors and a JSON record as one file, in one move.

    Raises:
        RecipeError: the file cannot be written; an earlier one is as it was.
    """
    from safetensors.torch import save

    on_host = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(on_host, metadata_of(on_host, record)))


def metadata_of(tensors: Mapping[str, Tensor], record: dict[str, Any]) -> dict[str, str]:
    """What the header of a checkpoint says; ``tensors`` are contiguous, on the CPU."""
    text = json.dumps(record)
    return {"record": text, "sha256": _digest(tensors, text)}


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the record of a checkpoint.

    Raises:
        RecipeError: the file cannot be read, is damaged, or is no checkpoint; it is left where it is.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    content = read_bytes(path)
    try:
        # Copies, since the tensors of a file lie at any alignment.
        tensors = {name: tensor.clone() for name, tensor in load(content).items()}
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        text, digest = header["__metadata__"]["record"], header["__metadata__"]["sha256"]
        record: dict[str, Any] = json.loads(text)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError):
        raise _damaged(path) from None
    if digest != _digest(tensors, text):
        raise _damaged(path)
    return tensors, record


def is_checkpoint(path: Path) -> bool:
    """Whether a file says that this program wrote it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {"record", "sha256"} <= set(file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load_weights(path: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Gives ``model`` the tensors that a checkpoint holds for it.

    Raises:
        RecipeError: they are those of another model, for instance of an earlier version's.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    got = {name: tensor.shape for name, tensor in tensors.items()}
    if got != expected:
        names = sorted(name for name in {*got, *expected} if got.get(name) != expected.get(name))
        first = f"{names[0]}: got {_shape(got, names[0])}, expected {_shape(expected, names[0])}"
        raise RecipeError(
            f"{path} holds other weights than this version's model ({first}; {len(names)} differ): move it away to "
            "train again, choose another folder with --out, or give --restart to begin anew"
        )
    model.load_state_dict(tensors)


def _shape(shapes: dict[str, torch.Size], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "none"


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    sha256 = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _damaged(path: Path) -> DamagedError:
    return DamagedError(
        f"{path} is damaged, or no checkpoint of this program: move it away to do that part again, "
        "or give --restart to begin anew"
    )


def check_same_settings(where: Path, stored: Any, wanted: dict[str, Any]) -> None:
    """Raises a RecipeError that names both sides where a saved run was made with other settings."""
    stored = stored if isinstance(stored, dict) else {}
    now = json.loads(json.dumps(wanted))
    if other := [name for name in now if name not in stored or stored[name] != now[name]]:
        before, here = (", ".join(f"{name} = {side.get(name)}" for name in other) for side in (stored, now))
        raise RecipeError(
            f"{where} was made with {before}, this call has {here}: "
            "repeat the earlier call, choose another folder with --out, or give --restart to begin anew"
        )
