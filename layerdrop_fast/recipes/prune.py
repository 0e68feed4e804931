"""``layerdrop-fast prune``: a checkpoint in, a smaller one out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from layerdrop_fast.prune import every_other, prune_checkpoint
from layerdrop_fast.prune.checkpoint_folders import SAFETENSORS
from layerdrop_fast.prune.pruned import Metadata, Pruned
from layerdrop_fast.recipes.checkpoint import is_checkpoint, load_checkpoint, metadata_of
from layerdrop_fast.recipes.files import RecipeError

STRATEGIES = {
    "every-other": lambda num_layers, kept: every_other(num_layers, kept=kept),
    "first": lambda num_layers, kept: list(range(kept)),
    "last": lambda num_layers, kept: list(range(num_layers - kept, num_layers)),
}
MIB = 2**20


@dataclass(frozen=True)
class Options:
    """What the command was given."""

    source: Path
    out: Path
    kept: int | None = None
    keep: Sequence[int] | None = None
    strategy: str | None = None  # with ``kept``: "every-other"
    optimizer: bool = True  # False: left out
    layers: Sequence[str] | None = None  # prefixes of lists of layers; None: the only one


def run(options: Options) -> None:
    """Prunes, and prints what was cut.

    Raises:
        RecipeError: something the user can mend; there is no output then.
    """
    source = options.source
    if options.keep is not None and options.strategy is not None:
        raise RecipeError(
            f"--keep says which layers stay, --strategy {options.strategy} chooses them: give one of both"
        )
    if (source.is_dir() or source.suffix == ".safetensors") and find_spec("safetensors") is None:
        raise RecipeError("prune needs safetensors: pip install 'layerdrop_fast[recipes]'")
    own = _own(source)
    try:
        found = prune_checkpoint(
            source,
            options.out,
            lambda lists: _keep(options, lists),
            progress=True,
            optimizer=options.optimizer,
            metadata=_metadata(own),
        )
    except ValueError as error:
        raise RecipeError(str(error)) from error
    except OSError as error:
        raise RecipeError(f"cannot prune {source}: {error.strerror}: {error.filename or options.out}") from error
    for prefix, keep in found.kept.items():
        print(f"{prefix or 'layers'}: {found.layers[prefix]} -> {len(keep)} layers, those that were {_listed(keep)}")
    if found.left_as_is:
        listed = ", ".join(f"{name} = {json.dumps(value, default=str)}" for name, value in found.left_as_is.items())
        print(f"{source.name}: {listed} left as is, check whether that fits the layers that are left")
    for name, (kinds, left) in found.now_alike.items():
        print(f"config.json: {name} had {_listed(kinds)}, only {left} is left: choose other layers with --keep")
    if found.left_out:
        print(f"left out: {', '.join(found.left_out)}")
    print(
        f"{found.bytes_before / MIB:,.1f} -> {found.bytes_after / MIB:,.1f} MiB of weights, in {options.out}",
        flush=True,
    )


def _own(source: Path) -> dict[str, Any] | None:
    """The record of a model of ``train lm`` or the demo, which tells its size."""
    path = source / SAFETENSORS.single if source.is_dir() else source
    return load_checkpoint(path)[1] if path.suffix == ".safetensors" and is_checkpoint(path) else None


def _metadata(record: dict[str, Any] | None) -> Metadata | None:
    """The record of what is left of such a model, which tells the size of that."""
    if record is None:
        return None

    def metadata(cut: Pruned, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        if list(cut.kept) != ["stack.layers"]:
            return {}
        (kept,) = cut.kept.values()
        settings = {**record["settings"], "num_layers": len(kept)}
        return metadata_of(tensors, {**record, "settings": settings, "kept": kept})

    return metadata


def _keep(options: Options, lists: Mapping[str, int]) -> dict[str, Sequence[int]]:
    """What to keep of which list."""
    chosen = list(options.layers or lists)
    found = ", ".join(f"{prefix!r} ({count})" for prefix, count in lists.items()) or "none"
    if options.layers is None and len(lists) != 1:
        raise ValueError(f"found lists of layers: {found}; expected one, or --layers to name those to cut")
    for prefix in chosen:
        if prefix not in lists:
            raise ValueError(f"no list of layers {prefix!r}; found {found}")
    if options.keep is not None:
        return dict.fromkeys(chosen, options.keep)
    kept = options.kept
    assert kept is not None  # the command line asks for one of the two
    for prefix in chosen:
        if not 1 <= kept <= lists[prefix]:
            raise ValueError(f"--kept is {kept}, expected 1 to {lists[prefix]}, the layers of {prefix!r}")
    return {prefix: STRATEGIES[options.strategy or "every-other"](lists[prefix], kept) for prefix in chosen}


def _listed(keep: Sequence[Any]) -> str:
    return ", ".join(map(str, keep))
